//! `fp8-e4m3` and `fp8-e5m2`: the 8-bit floats of the Open Compute Project (OCP 8-bit Floating Point Specification 1.0),
//! rounded to nearest even, saturating at 448 and 57344. As they are, or (`-row`) with a bfloat16 scale a row that brings its
//! largest magnitude to the largest of the format.
//!
//! Error of a number: at most 2^-4 (e4m3) or 2^-3 (e5m2) of it, in the range of normal numbers; below, half a step of
//! 2^-9 or 2^-16, times the scale. Codes of a page come first, scales behind them.

use std::ops::Range;

use longbit_kernels::{Fp8, Kernels};

use super::coded::{bf16_up, inverse, largest};
use super::{Codec, KeyCodec, KvFormat, KvScratch, PAGE_TOKENS, Rows, ValueCodec, slice_rows};

const fn format(name: &'static str, summary: &'static str, codec: &'static Float8) -> KvFormat {
    KvFormat { name, summary, keys: codec, values: codec, rotate: false, centre: false }
}

pub(super) const E4M3: KvFormat = format(
    "fp8-e4m3",
    "OCP 8-bit float, 3 bits of mantissa, up to 448; relative error at most 2^-4",
    &Float8 { format: Fp8::E4m3, scaled: false },
);
pub(super) const E4M3_ROW: KvFormat = format(
    "fp8-e4m3-row",
    "fp8-e4m3 with a bfloat16 scale a row; relative error at most 2^-4 down to 2^-15 of the row's largest",
    &Float8 { format: Fp8::E4m3, scaled: true },
);
pub(super) const E5M2: KvFormat = format(
    "fp8-e5m2",
    "OCP 8-bit float, 2 bits of mantissa, up to 57344; relative error at most 2^-3",
    &Float8 { format: Fp8::E5m2, scaled: false },
);
pub(super) const E5M2_ROW: KvFormat = format(
    "fp8-e5m2-row",
    "fp8-e5m2 with a bfloat16 scale a row; relative error at most 2^-3 down to 2^-30 of the row's largest",
    &Float8 { format: Fp8::E5m2, scaled: true },
);

struct Float8 {
    format: Fp8,
    scaled: bool,
}

impl Float8 {
    fn split<'a>(&self, page: &'a [u8], range: &Range<usize>, head_dim: usize) -> [&'a [u8]; 2] {
        let scales = if self.scaled { slice_rows(page, PAGE_TOKENS * head_dim, 2, range) } else { &[] };
        [slice_rows(page, 0, head_dim, range), scales]
    }

    /// The scales of rows, widened into `out`; none where there are none.
    fn widen<'a>(&self, kernels: &Kernels, scales: &[u8], out: &'a mut Vec<f32>) -> Option<&'a [f32]> {
        if !self.scaled {
            return None;
        }
        out.resize(scales.len() / 2, 0.0);
        kernels.bf16_to_f32(bytemuck::cast_slice(scales), out);
        Some(out)
    }
}

impl Codec for Float8 {
    fn page_bytes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * (head_dim + if self.scaled { 2 } else { 0 })
    }

    fn refuses(&self, head_dim: usize) -> Option<String> {
        super::coded::refuse_unless_multiple(head_dim, 2)
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let (codes, scales) = page.split_at_mut(PAGE_TOKENS * head_dim);
        let codes = &mut codes[first * head_dim..][..rows.len()];
        if !self.scaled {
            return kernels.f32_to_fp8(self.format, rows, codes);
        }
        let scales: &mut [u16] = bytemuck::cast_slice_mut(scales);
        let mut scaled = [0.0; super::coded::MOST_DIMS];
        let rows = rows.chunks_exact(head_dim).zip(codes.chunks_exact_mut(head_dim));
        for ((row, codes), bits) in rows.zip(&mut scales[first..]) {
            let (scale_bits, scale) = bf16_up(largest(row) / self.format.largest());
            *bits = scale_bits;
            let inverse = inverse(scale);
            let scaled = &mut scaled[..head_dim];
            scaled.iter_mut().zip(row).for_each(|(y, x)| *y = x * inverse);
            kernels.f32_to_fp8(self.format, scaled, codes);
        }
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        let [codes, scales] = self.split(rows.page, &rows.range, rows.head_dim);
        kernels.fp8_to_f32(self.format, codes, out);
        let mut widened = Vec::new();
        if let Some(scales) = self.widen(kernels, scales, &mut widened) {
            for (row, &scale) in out.chunks_exact_mut(rows.head_dim).zip(scales) {
                kernels.scale(row, scale);
            }
        }
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        let [codes, scales] = self.split(page, &rows, head_dim);
        [codes, scales, &[]]
    }
}

impl KeyCodec for Float8 {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let [codes, scales] = self.split(rows.page, &rows.range, rows.head_dim);
        let scales = self.widen(kernels, scales, &mut scratch.floats);
        kernels.scores_fp8(self.format, queries, codes, rows.head_dim, scales, out, rows.upcoming);
    }
}

impl ValueCodec for Float8 {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let [codes, scales] = self.split(rows.page, &rows.range, rows.head_dim);
        let scales = self.widen(kernels, scales, &mut scratch.floats);
        kernels.accumulate_fp8(self.format, weights, codes, rows.head_dim, scales, acc, rows.upcoming);
    }
}
