//! Rows of floats as they are, one after another: what `f32`, `f16` and `bf16` share. A format says what its [`Element`]
//! is; a page has no scales, so that any row can be read alone.

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;
use longbit_kernels::Kernels;

use super::{Codec, KeyCodec, KvScratch, PAGE_TOKENS, Rows, ValueCodec, slice_rows};

/// A kernel that goes through rows: what is multiplied, the rows, `head_dim`, the result, what is read next.
pub(super) type RowKernel<B> = fn(&Kernels, &[f32], &[B], usize, &mut [f32], &[B]);

/// A number format of which every number stands for itself.
pub(super) trait Element: Send + Sync + 'static {
    /// Its bits.
    type Bits: Pod;
    /// Largest magnitude of a number.
    const LARGEST: f32;
    /// Numbers to bits: rows, `head_dim`, bits.
    const ENCODE: fn(&Kernels, &[f32], usize, &mut [Self::Bits]);
    /// Bits to numbers: bits, `head_dim`, rows.
    const DECODE: fn(&Kernels, &[Self::Bits], usize, &mut [f32]);
    /// See [`KeyCodec::scores`].
    const SCORES: RowKernel<Self::Bits>;
    /// See [`ValueCodec::accumulate`].
    const ACCUMULATE: RowKernel<Self::Bits>;
}

/// The codec of an [`Element`].
pub(super) struct Floats<E>(PhantomData<E>);

impl<E: Element> Floats<E> {
    pub(super) const NEW: Self = Floats(PhantomData);

    fn row_bytes(head_dim: usize) -> usize {
        size_of::<E::Bits>() * head_dim
    }

    fn rows<'a>(rows: &Rows<'a>) -> &'a [E::Bits] {
        bytemuck::cast_slice(slice_rows(rows.page, 0, Self::row_bytes(rows.head_dim), &rows.range))
    }

    fn run(kernel: RowKernel<E::Bits>, kernels: &Kernels, factors: &[f32], rows: &Rows<'_>, out: &mut [f32]) {
        let upcoming = bytemuck::try_cast_slice(rows.upcoming).unwrap_or_default();
        kernel(kernels, factors, Self::rows(rows), rows.head_dim, out, upcoming);
    }
}

impl<E: Element> Codec for Floats<E> {
    fn page_bytes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * Self::row_bytes(head_dim)
    }

    fn largest(&self) -> f32 {
        E::LARGEST
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let at = first * Self::row_bytes(head_dim);
        let page = &mut page[at..at + rows.len() * size_of::<E::Bits>()];
        (E::ENCODE)(kernels, rows, head_dim, bytemuck::cast_slice_mut(page));
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        (E::DECODE)(kernels, Self::rows(rows), rows.head_dim, out);
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        [slice_rows(page, 0, Self::row_bytes(head_dim), &rows), &[], &[]]
    }
}

impl<E: Element> KeyCodec for Floats<E> {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        out: &mut [f32],
    ) {
        Self::run(E::SCORES, kernels, queries, rows, out);
    }
}

impl<E: Element> ValueCodec for Floats<E> {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        acc: &mut [f32],
    ) {
        Self::run(E::ACCUMULATE, kernels, weights, rows, acc);
    }
}
