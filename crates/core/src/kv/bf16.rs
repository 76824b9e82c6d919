//! `bf16`: the upper half of an f32 (8 exponent, 7 mantissa bits), little-endian, rounded to nearest even.
//! Error: at most 2^-8 of each number.
//!
//! A row is woven (`Kernels::weave_bf16`): in each group of 32 numbers the two halves alternate, so that sixteen words of
//! 32 bits widen into two vectors with one shift and one mask. What is left of a row keeps its order.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::{Codec, KeyCodec, KvFormat, KvScratch, PAGE_TOKENS, Rows, ValueCodec, slice_rows};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "bf16",
    summary: "bfloat16, rounded to nearest even; relative error at most 2^-8",
    keys: &Bf16,
    values: &Bf16,
    rotate: false,
    centre: false,
};

pub(super) struct Bf16;

impl Bf16 {
    fn rows<'a>(rows: &Rows<'a>) -> &'a [u16] {
        bytemuck::cast_slice(slice_rows(rows.page, 0, size_of::<u16>() * rows.head_dim, &rows.range))
    }
}

impl Codec for Bf16 {
    fn page_bytes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * size_of::<u16>() * head_dim
    }

    /// The largest number of bfloat16; what lies above might round to infinity.
    fn largest(&self) -> f32 {
        f32::from_bits(0x7f7f_0000)
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let at = first * size_of::<u16>() * head_dim;
        let page = &mut page[at..at + rows.len() * size_of::<u16>()];
        kernels.weave_bf16(rows, head_dim, bytemuck::cast_slice_mut(page));
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        kernels.unweave_bf16(Self::rows(rows), rows.head_dim, out);
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        [slice_rows(page, 0, size_of::<u16>() * head_dim, &rows), &[], &[]]
    }
}

impl KeyCodec for Bf16 {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        out: &mut [f32],
    ) {
        let upcoming = bytemuck::try_cast_slice(rows.upcoming).unwrap_or_default();
        kernels.scores_bf16(queries, Self::rows(rows), rows.head_dim, out, upcoming);
    }
}

impl ValueCodec for Bf16 {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let upcoming = bytemuck::try_cast_slice(rows.upcoming).unwrap_or_default();
        kernels.accumulate_bf16(weights, Self::rows(rows), rows.head_dim, acc, upcoming);
    }
}
