//! `f16`: IEEE binary16 (5 exponent, 10 mantissa bits), little-endian, rounded to nearest even. Error: at most 2^-11 of each
//! number from 2^-14 on, 2^-25 below. Numbers from 65520 on, which would round to infinity, are refused.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::{Codec, KeyCodec, KvFormat, KvScratch, PAGE_TOKENS, Rows, ValueCodec, slice_rows};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "f16",
    summary: "binary16, rounded to nearest even; relative error at most 2^-11",
    keys: &F16,
    values: &F16,
    rotate: false,
    centre: false,
};

pub(super) struct F16;

impl F16 {
    fn rows<'a>(rows: &Rows<'a>) -> &'a [u16] {
        bytemuck::cast_slice(slice_rows(rows.page, 0, size_of::<u16>() * rows.head_dim, &rows.range))
    }
}

impl Codec for F16 {
    fn page_bytes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * size_of::<u16>() * head_dim
    }

    fn largest(&self) -> f32 {
        65519.0
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let at = first * size_of::<u16>() * head_dim;
        let page = &mut page[at..at + rows.len() * size_of::<u16>()];
        kernels.f32_to_f16(rows, bytemuck::cast_slice_mut(page));
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        kernels.f16_to_f32(Self::rows(rows), out);
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        [slice_rows(page, 0, size_of::<u16>() * head_dim, &rows), &[], &[]]
    }
}

impl KeyCodec for F16 {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        out: &mut [f32],
    ) {
        let upcoming = bytemuck::try_cast_slice(rows.upcoming).unwrap_or_default();
        kernels.scores_f16(queries, Self::rows(rows), rows.head_dim, out, upcoming);
    }
}

impl ValueCodec for F16 {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let upcoming = bytemuck::try_cast_slice(rows.upcoming).unwrap_or_default();
        kernels.accumulate_f16(weights, Self::rows(rows), rows.head_dim, acc, upcoming);
    }
}
