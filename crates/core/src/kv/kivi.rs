//! `kivi4` and `kivi2`: KIVI (arXiv 2402.02750). Keys are rounded per channel in groups of 32 tokens, values per token in
//! groups of 32 channels, both from the smallest to the largest of the group in 15 or 3 steps, with an f16 step and an f16
//! smallest number. Newest tokens are kept exactly: of the keys `len % 128`, which become groups when there are 128; of the
//! values always the last 128. 80 or 48 bytes for 128 numbers.
//! Error: at most half a step and the rounding of the two f16 numbers.
//!
//! A page is its codes, its steps, and its smallest numbers. Steps of keys go into the query, once a group; their smallest
//! numbers add one dot product with the query a group, those of the values one weighted sum a block.

use std::ops::Range;

use longbit_kernels::{CodeBits, CodeShape, Kernels, QueryBits, Rows as CodeRows, Scales};

use super::coded::{inverse, refuse_unless_multiple, round_even};
use super::{Codec, KeyCodec, KvFormat, KvScratch, PAGE_TOKENS, Rows, ValueCodec, slice_rows};

pub(super) const KIVI4: KvFormat = KvFormat {
    name: "kivi4",
    summary: "KIVI: 4 bits, keys per channel of 32 tokens, values per token, the newest 128 tokens exact",
    keys: &Keys(CodeBits::Four),
    values: &Values(CodeBits::Four),
    rotate: false,
    centre: false,
};

pub(super) const KIVI2: KvFormat = KvFormat {
    name: "kivi2",
    summary: "KIVI: 2 bits, keys per channel of 32 tokens, values per token, the newest 128 tokens exact",
    keys: &Keys(CodeBits::Two),
    values: &Values(CodeBits::Two),
    rotate: false,
    centre: false,
};

/// Tokens, or channels, of a group.
const GROUP: usize = 32;
/// Newest tokens kept exactly.
const RESIDUAL: usize = 128;
/// An index is a number of steps.
const STEPS: [i8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// Far enough below the largest f16 for the step of a group.
const LARGEST: f32 = 65504.0 / 2.0;

struct Keys(CodeBits);
struct Values(CodeBits);

fn row_bytes(bits: CodeBits, head_dim: usize) -> usize {
    CodeShape { dims: head_dim, bits }.row_bytes()
}

/// Step and smallest number of a group, as f16 bits, and what rounds to codes: the inverse of the step, the smallest.
fn range(kernels: &Kernels, bits: CodeBits, least: f32, most: f32) -> ([u16; 2], [f32; 2]) {
    let steps = ((1 << bits.width()) - 1) as f32;
    let mut stored = [0u16; 2];
    kernels.f32_to_f16(&[(most - least) / steps, least], &mut stored);
    let mut read = [0.0; 2];
    kernels.f16_to_f32(&stored, &mut read);
    (stored, [inverse(read[0]), read[1]])
}

fn code(bits: CodeBits, x: f32, inverse: f32, least: f32) -> i8 {
    let steps = ((1 << bits.width()) - 1) as f32;
    round_even(((x - least) * inverse).clamp(0.0, steps)) as i8
}

/// Two f16 arrays of a page that follow its codes, `[n]` each, cut to `range`.
fn pair(page: &[u8], codes: usize, n: usize, range: Range<usize>) -> [&[u8]; 2] {
    [codes, codes + 2 * n].map(|at| &page[at + 2 * range.start..at + 2 * range.end])
}

impl Keys {
    fn codes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * row_bytes(self.0, head_dim)
    }

    /// Steps and smallest numbers of `groups`.
    fn ranges<'a>(&self, page: &'a [u8], groups: Range<usize>, head_dim: usize) -> [&'a [u8]; 2] {
        let all = PAGE_TOKENS / GROUP * head_dim;
        pair(page, self.codes(head_dim), all, groups.start * head_dim..groups.end * head_dim)
    }
}

impl Codec for Keys {
    fn page_bytes(&self, head_dim: usize) -> usize {
        self.codes(head_dim) + 2 * 2 * PAGE_TOKENS / GROUP * head_dim
    }

    fn refuses(&self, head_dim: usize) -> Option<String> {
        refuse_unless_multiple(head_dim, GROUP)
    }

    fn largest(&self) -> f32 {
        LARGEST
    }

    fn group(&self) -> usize {
        GROUP
    }

    fn settled(&self, len: usize) -> usize {
        len - len % RESIDUAL
    }

    fn unsettled(&self) -> usize {
        RESIDUAL - 1
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let (bytes, ranges) = page.split_at_mut(self.codes(head_dim));
        let (steps, leasts) = ranges.split_at_mut(2 * PAGE_TOKENS / GROUP * head_dim);
        let steps: &mut [u16] = bytemuck::cast_slice_mut(steps);
        let leasts: &mut [u16] = bytemuck::cast_slice_mut(&mut leasts[..2 * PAGE_TOKENS / GROUP * head_dim]);
        let row_bytes = row_bytes(self.0, head_dim);
        let shape = CodeShape { dims: head_dim, bits: self.0 };
        let mut codes = vec![0i8; GROUP * head_dim];
        for (group, rows) in (first / GROUP..).zip(rows.chunks_exact(GROUP * head_dim)) {
            for c in 0..head_dim {
                let channel = || rows[c..].iter().step_by(head_dim).copied();
                let (least, most) = (channel().fold(f32::MAX, f32::min), channel().fold(f32::MIN, f32::max));
                let (stored, [inverse, least]) = range(kernels, self.0, least, most);
                [steps[group * head_dim + c], leasts[group * head_dim + c]] = stored;
                for (out, x) in codes[c..].iter_mut().step_by(head_dim).zip(channel()) {
                    *out = code(self.0, x, inverse, least);
                }
            }
            let bytes = &mut bytes[group * GROUP * row_bytes..(group + 1) * GROUP * row_bytes];
            kernels.pack_codes(shape, &codes, bytes, &mut []);
        }
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        let d = rows.head_dim;
        let mut codes = vec![0i8; out.len()];
        let stored = slice_rows(rows.page, 0, row_bytes(self.0, d), &rows.range);
        kernels.unpack_codes(
            CodeShape { dims: d, bits: self.0 },
            CodeRows::indices(stored, &STEPS),
            &mut codes,
        );
        let (mut steps, mut leasts) = (vec![0.0; d], vec![0.0; d]);
        for ((row, out), codes) in rows.range.clone().zip(out.chunks_exact_mut(d)).zip(codes.chunks_exact(d))
        {
            let group = row / GROUP;
            let [step, least] = self.ranges(rows.page, group..group + 1, d);
            kernels.f16_to_f32(bytemuck::cast_slice(step), &mut steps);
            kernels.f16_to_f32(bytemuck::cast_slice(least), &mut leasts);
            for (((out, &code), step), least) in out.iter_mut().zip(codes).zip(&steps).zip(&leasts) {
                *out = f32::from(code).mul_add(*step, *least);
            }
        }
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        let groups = rows.start / GROUP..rows.end.div_ceil(GROUP);
        let [steps, leasts] = self.ranges(page, groups, head_dim);
        [slice_rows(page, 0, row_bytes(self.0, head_dim), &rows), steps, leasts]
    }
}

impl KeyCodec for Keys {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let (d, n) = (rows.head_dim, rows.range.len());
        let shape = CodeShape { dims: d, bits: self.0 };
        let heads = queries.len() / d;
        let mut start = rows.range.start;
        while start < rows.range.end {
            let group = start / GROUP;
            let end = rows.range.end.min((group + 1) * GROUP);
            let [steps, leasts] = self.ranges(rows.page, group..group + 1, d);
            scratch.floats.resize(d, 0.0);
            kernels.f16_to_f32(bytemuck::cast_slice(steps), &mut scratch.floats);
            scratch.fold(kernels, shape, QueryBits::Sixteen, queries);
            kernels.f16_to_f32(bytemuck::cast_slice(leasts), &mut scratch.floats);
            let stored = slice_rows(rows.page, 0, row_bytes(self.0, d), &(start..end));
            let len = end - start;
            scratch.group.resize(heads * len, 0.0);
            let query = &scratch.folded_query;
            // Groups follow one another up to the end of the run.
            let upcoming = match end {
                end if end == rows.range.end => rows.upcoming,
                end => slice_rows(rows.page, 0, row_bytes(self.0, d), &(end..rows.range.end)),
            };
            let stored = CodeRows::indices(stored, &STEPS).before(upcoming);
            kernels.code_scores(shape, query, stored, Scales::One, &mut scratch.group);
            let at = start - rows.range.start;
            for (h, scores) in scratch.group.chunks_exact(len).enumerate() {
                let least = kernels.dot(&queries[h * d..(h + 1) * d], &scratch.floats);
                let out = &mut out[h * n + at..h * n + at + len];
                out.iter_mut().zip(scores).for_each(|(out, score)| *out = score + least);
            }
            start = end;
        }
    }
}

impl Values {
    fn codes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * row_bytes(self.0, head_dim)
    }

    fn split<'a>(&self, page: &'a [u8], rows: &Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        let blocks = head_dim / GROUP;
        let [steps, leasts] =
            pair(page, self.codes(head_dim), PAGE_TOKENS * blocks, rows.start * blocks..rows.end * blocks);
        [slice_rows(page, 0, row_bytes(self.0, head_dim), rows), steps, leasts]
    }
}

impl Codec for Values {
    fn page_bytes(&self, head_dim: usize) -> usize {
        self.codes(head_dim) + 2 * 2 * PAGE_TOKENS * (head_dim / GROUP)
    }

    fn refuses(&self, head_dim: usize) -> Option<String> {
        refuse_unless_multiple(head_dim, GROUP)
    }

    fn largest(&self) -> f32 {
        LARGEST
    }

    fn settled(&self, len: usize) -> usize {
        len.saturating_sub(RESIDUAL)
    }

    fn unsettled(&self) -> usize {
        RESIDUAL
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let blocks = head_dim / GROUP;
        let (bytes, ranges) = page.split_at_mut(self.codes(head_dim));
        let (steps, leasts) = ranges.split_at_mut(2 * PAGE_TOKENS * blocks);
        let steps: &mut [u16] = bytemuck::cast_slice_mut(steps);
        let leasts: &mut [u16] = bytemuck::cast_slice_mut(&mut leasts[..2 * PAGE_TOKENS * blocks]);
        let row_bytes = row_bytes(self.0, head_dim);
        let shape = CodeShape { dims: head_dim, bits: self.0 };
        let mut codes = [0i8; super::coded::MOST_DIMS];
        let codes = &mut codes[..head_dim];
        for (i, row) in (first..).zip(rows.chunks_exact(head_dim)) {
            for (b, (block, codes)) in row.chunks_exact(GROUP).zip(codes.chunks_exact_mut(GROUP)).enumerate()
            {
                let (least, most) = (
                    block.iter().copied().fold(f32::MAX, f32::min),
                    block.iter().copied().fold(f32::MIN, f32::max),
                );
                let (stored, [inverse, least]) = range(kernels, self.0, least, most);
                [steps[i * blocks + b], leasts[i * blocks + b]] = stored;
                codes.iter_mut().zip(block).for_each(|(out, &x)| *out = code(self.0, x, inverse, least));
            }
            kernels.pack_codes(shape, codes, &mut bytes[i * row_bytes..(i + 1) * row_bytes], &mut []);
        }
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        let d = rows.head_dim;
        let [stored, steps, leasts] = self.split(rows.page, &rows.range, d);
        let mut codes = vec![0i8; out.len()];
        kernels.unpack_codes(
            CodeShape { dims: d, bits: self.0 },
            CodeRows::indices(stored, &STEPS),
            &mut codes,
        );
        let [steps, leasts] = [steps, leasts].map(|bytes| {
            let mut floats = vec![0.0; bytes.len() / 2];
            kernels.f16_to_f32(bytemuck::cast_slice(bytes), &mut floats);
            floats
        });
        let blocks = out.chunks_exact_mut(GROUP).zip(codes.chunks_exact(GROUP));
        for ((out, codes), (step, least)) in blocks.zip(steps.iter().zip(&leasts)) {
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = f32::from(code).mul_add(*step, *least));
        }
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        self.split(page, &rows, head_dim)
    }
}

impl ValueCodec for Values {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let (d, n) = (rows.head_dim, rows.range.len());
        let [stored, steps, leasts] = self.split(rows.page, &rows.range, d);
        let blocks = d / GROUP;
        scratch.floats.resize(n * blocks, 0.0);
        kernels.f16_to_f32(bytemuck::cast_slice(steps), &mut scratch.floats);
        let shape = CodeShape { dims: d, bits: self.0 };
        let scales = Scales::Block(&scratch.floats);
        let stored = CodeRows::indices(stored, &STEPS).before(rows.upcoming);
        kernels.code_accumulate(shape, weights, stored, scales, acc);
        kernels.f16_to_f32(bytemuck::cast_slice(leasts), &mut scratch.floats);
        scratch.group.clear();
        scratch.group.resize(weights.len() / n * blocks, 0.0);
        kernels.accumulate_f32(weights, &scratch.floats, blocks, &mut scratch.group, &[]);
        for (acc, &more) in acc.chunks_exact_mut(GROUP).zip(&scratch.group) {
            acc.iter_mut().for_each(|x| *x += more);
        }
    }
}
