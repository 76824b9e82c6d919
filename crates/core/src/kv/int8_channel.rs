//! `int8-channel`: keys as signed bytes with a scale for each channel of a page instead of each row: a channel that is
//! always large costs the others nothing. A page is encoded when all its 256 keys are there; until then they are kept
//! exactly. 129 bytes for 128 numbers. The scale of a channel goes into the query, once a page. Values are int8+plain.
//! Error: at most `1.008 / 254` of the largest magnitude of the channel in the page.
//!
//! A page is its codes and behind them the scales, bfloat16.

use std::ops::Range;

use longbit_kernels::{CodeBits, CodeShape, Kernels, QueryBits, Rows as CodeRows, Scales};

use super::coded::{Coded, bf16_up, inverse, refuse_unless_multiple, round_even};
use super::{Codec, KeyCodec, KvFormat, KvScratch, PAGE_TOKENS, Rows, int8, slice_rows};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "int8-channel",
    summary: "keys: signed bytes, a bfloat16 scale for a channel of 256 tokens, the newest page exact; values: int8+plain",
    keys: &Channels,
    values: &Coded::<int8::Int8>::NEW,
    rotate: false,
    centre: false,
};

struct Channels;

fn shape(head_dim: usize) -> CodeShape {
    CodeShape { dims: head_dim, bits: CodeBits::Eight }
}

fn row_bytes(head_dim: usize) -> usize {
    shape(head_dim).row_bytes()
}

/// The scales of a page.
fn scales(page: &[u8], head_dim: usize) -> &[u8] {
    &page[PAGE_TOKENS * row_bytes(head_dim)..][..2 * head_dim]
}

fn widened(kernels: &Kernels, page: &[u8], head_dim: usize, out: &mut Vec<f32>) {
    out.resize(head_dim, 0.0);
    kernels.bf16_to_f32(bytemuck::cast_slice(scales(page, head_dim)), out);
}

impl Codec for Channels {
    fn page_bytes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * row_bytes(head_dim) + 2 * head_dim
    }

    fn refuses(&self, head_dim: usize) -> Option<String> {
        refuse_unless_multiple(head_dim, 8)
    }

    fn group(&self) -> usize {
        PAGE_TOKENS
    }

    fn settled(&self, len: usize) -> usize {
        len - len % PAGE_TOKENS
    }

    fn unsettled(&self) -> usize {
        PAGE_TOKENS - 1
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], _: usize) {
        let mut largest = vec![0.0f32; head_dim];
        for row in rows.chunks_exact(head_dim) {
            largest.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(x.abs()));
        }
        let (bytes, scales) = page.split_at_mut(PAGE_TOKENS * row_bytes(head_dim));
        let scales: &mut [u16] = bytemuck::cast_slice_mut(&mut scales[..2 * head_dim]);
        for (scale, most) in scales.iter_mut().zip(&mut largest) {
            let (bits, value) = bf16_up(*most / 127.0);
            *scale = bits;
            *most = inverse(value);
        }
        let mut codes = vec![0i8; rows.len()];
        for (codes, row) in codes.chunks_exact_mut(head_dim).zip(rows.chunks_exact(head_dim)) {
            for ((code, x), inverse) in codes.iter_mut().zip(row).zip(&largest) {
                *code = round_even(x * inverse) as i8;
            }
        }
        kernels.pack_codes(shape(head_dim), &codes, bytes, &mut []);
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        let d = rows.head_dim;
        let mut codes = vec![0i8; out.len()];
        let stored = CodeRows::bytes(slice_rows(rows.page, 0, row_bytes(d), &rows.range));
        kernels.unpack_codes(shape(d), stored, &mut codes);
        let mut scales = Vec::new();
        widened(kernels, rows.page, d, &mut scales);
        for (out, codes) in out.chunks_exact_mut(d).zip(codes.chunks_exact(d)) {
            for ((out, &code), scale) in out.iter_mut().zip(codes).zip(&scales) {
                *out = f32::from(code) * scale;
            }
        }
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        [slice_rows(page, 0, row_bytes(head_dim), &rows), scales(page, head_dim), &[]]
    }
}

impl KeyCodec for Channels {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let d = rows.head_dim;
        widened(kernels, rows.page, d, &mut scratch.floats);
        scratch.fold(kernels, shape(d), QueryBits::Sixteen, queries);
        let stored = slice_rows(rows.page, 0, row_bytes(d), &rows.range);
        let stored = CodeRows::bytes(stored).before(rows.upcoming);
        kernels.code_scores(shape(d), &scratch.folded_query, stored, Scales::One, out);
    }
}
