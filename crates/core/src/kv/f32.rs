//! `f32`: four bytes a number, little-endian. Error: none.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::{Codec, KeyCodec, KvFormat, KvScratch, PAGE_TOKENS, Rows, ValueCodec, slice_rows};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "f32",
    summary: "single precision; exact",
    keys: &F32,
    values: &F32,
    rotate: false,
    centre: false,
};

pub(super) struct F32;

impl F32 {
    fn rows<'a>(rows: &Rows<'a>) -> &'a [f32] {
        bytemuck::cast_slice(slice_rows(rows.page, 0, size_of::<f32>() * rows.head_dim, &rows.range))
    }
}

impl Codec for F32 {
    fn page_bytes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * size_of::<f32>() * head_dim
    }

    fn encode(&self, _: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let at = first * size_of::<f32>() * head_dim;
        let page = &mut page[at..at + size_of_val(rows)];
        page.copy_from_slice(bytemuck::cast_slice(rows));
    }

    fn decode(&self, _: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        out.copy_from_slice(Self::rows(rows));
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        [slice_rows(page, 0, size_of::<f32>() * head_dim, &rows), &[], &[]]
    }
}

impl KeyCodec for F32 {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        out: &mut [f32],
    ) {
        let upcoming = bytemuck::try_cast_slice(rows.upcoming).unwrap_or_default();
        kernels.scores_f32(queries, Self::rows(rows), rows.head_dim, out, upcoming);
    }
}

impl ValueCodec for F32 {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let upcoming = bytemuck::try_cast_slice(rows.upcoming).unwrap_or_default();
        kernels.accumulate_f32(weights, Self::rows(rows), rows.head_dim, acc, upcoming);
    }
}
