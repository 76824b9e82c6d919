//! Rows of small integer codes with one scale a row, or one for each block of 32 numbers: what most formats are.
//!
//! A page is its codes, `[rows][row]` as `longbit_kernels::codes` lays them out, in one array or two, and behind them the
//! scales, `[rows][scales]`, two bytes each. A format says how a row is rounded ([`Rounding`]); everything else is here.

use std::ops::Range;

use longbit_kernels::codes::{HIGH_NIBBLES, SIGNED_NIBBLES};
use longbit_kernels::{CodeBits, CodeShape, Kernels, QueryBits, Rows as CodeRows, Scales};

use super::{Codec, KeyCodec, KvScratch, PAGE_TOKENS, Rows, UpperKeys, ValueCodec, slice_rows};

/// How many scales a row has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scaling {
    Row,
    Block,
}

/// Which two bytes a scale is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ScaleBits {
    /// bfloat16: any scale, to 2^-8.
    Bf16,
    /// binary16, as llama.cpp has it.
    F16,
}

/// How a format rounds a row.
pub(super) trait Rounding: Send + Sync + 'static {
    const BITS: CodeBits;
    const SCALING: Scaling;
    const SCALE: ScaleBits;
    /// How finely queries are rounded that meet such rows.
    const QUERY: QueryBits;
    /// What an index stands for.
    const TABLE: [i8; 16] = SIGNED_NIBBLES;
    /// Largest magnitude of a number.
    const LARGEST: f32 = f32::MAX;

    /// Rounds a row: a code (or the index of one) for each number, and the bits of the scales.
    fn round(kernels: &Kernels, row: &[f32], codes: &mut [i8], scales: &mut [u16]);
}

/// The codec of a [`Rounding`].
pub(super) struct Coded<R>(pub(super) std::marker::PhantomData<R>);

impl<R: Rounding> Coded<R> {
    pub(super) const NEW: Self = Coded(std::marker::PhantomData);

    fn shape(head_dim: usize) -> CodeShape {
        CodeShape { dims: head_dim, bits: R::BITS }
    }

    /// The upper one of two planes.
    fn upper_shape(head_dim: usize) -> CodeShape {
        CodeShape { dims: head_dim, bits: CodeBits::Four }
    }

    fn scales_a_row(head_dim: usize) -> usize {
        match R::SCALING {
            Scaling::Row => 1,
            Scaling::Block => Self::shape(head_dim).blocks(),
        }
    }

    /// Arrays of codes.
    const PLANES: usize = if matches!(R::BITS, CodeBits::Planes) { 2 } else { 1 };

    /// Where the scales begin.
    fn scales_at(head_dim: usize) -> usize {
        Self::PLANES * PAGE_TOKENS * Self::shape(head_dim).row_bytes()
    }

    /// The codes, the lower plane and the scales of rows.
    fn split<'a>(page: &'a [u8], range: &Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        let row = Self::shape(head_dim).row_bytes();
        let low: &[u8] =
            if Self::PLANES == 2 { slice_rows(page, PAGE_TOKENS * row, row, range) } else { &[] };
        let scales = slice_rows(page, Self::scales_at(head_dim), 2 * Self::scales_a_row(head_dim), range);
        [slice_rows(page, 0, row, range), low, scales]
    }

    /// Rows as kernels read them, their scales widened into `floats`.
    fn stored<'a>(kernels: &Kernels, rows: &Rows<'a>, floats: &mut Vec<f32>) -> CodeRows<'a> {
        let [codes, low, scales] = Self::split(rows.page, &rows.range, rows.head_dim);
        Self::widen(kernels, scales, floats);
        CodeRows { codes, low, table: &R::TABLE, upcoming: rows.upcoming }
    }

    /// The scales of rows, widened into `out`.
    fn widen(kernels: &Kernels, scales: &[u8], out: &mut Vec<f32>) {
        let bits: &[u16] = bytemuck::cast_slice(scales);
        out.resize(bits.len(), 0.0);
        match R::SCALE {
            ScaleBits::Bf16 => kernels.bf16_to_f32(bits, out),
            ScaleBits::F16 => kernels.f16_to_f32(bits, out),
        }
    }

    fn scales(widened: &[f32]) -> Scales<'_> {
        match R::SCALING {
            Scaling::Row => Scales::Row(widened),
            Scaling::Block => Scales::Block(widened),
        }
    }
}

impl<R: Rounding> Codec for Coded<R> {
    fn page_bytes(&self, head_dim: usize) -> usize {
        Self::scales_at(head_dim) + PAGE_TOKENS * 2 * Self::scales_a_row(head_dim)
    }

    fn refuses(&self, head_dim: usize) -> Option<String> {
        let unit = if R::SCALING == Scaling::Block { 32 } else { 8 };
        refuse_unless_multiple(head_dim, unit)
    }

    fn largest(&self) -> f32 {
        R::LARGEST
    }

    fn first_apart(&self) -> bool {
        true
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let (shape, count) = (Self::shape(head_dim), Self::scales_a_row(head_dim));
        let row_bytes = shape.row_bytes();
        let (high, rest) = page.split_at_mut(PAGE_TOKENS * row_bytes);
        let (low, scales) = rest.split_at_mut((Self::PLANES - 1) * PAGE_TOKENS * row_bytes);
        let scales: &mut [u16] = bytemuck::cast_slice_mut(&mut scales[..PAGE_TOKENS * 2 * count]);
        let mut codes = [0i8; MOST_DIMS];
        let codes = &mut codes[..head_dim];
        for (i, row) in (first..).zip(rows.chunks_exact(head_dim)) {
            R::round(kernels, row, codes, &mut scales[i * count..(i + 1) * count]);
            let bytes = i * row_bytes..(i + 1) * row_bytes;
            let low = if Self::PLANES == 2 { &mut low[bytes.clone()] } else { &mut [][..] };
            kernels.pack_codes(shape, codes, &mut high[bytes], low);
        }
    }

    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        let d = rows.head_dim;
        let [codes, low, scales] = Self::split(rows.page, &rows.range, d);
        let mut widened = Vec::new();
        Self::widen(kernels, scales, &mut widened);
        let mut unpacked = vec![0i8; out.len()];
        let stored = CodeRows { codes, low, table: &R::TABLE, upcoming: &[] };
        kernels.unpack_codes(Self::shape(d), stored, &mut unpacked);
        let block = if R::SCALING == Scaling::Block { 32 } else { d };
        let blocks = out.chunks_exact_mut(d).flat_map(|row| row.chunks_mut(block));
        let codes = unpacked.chunks_exact(d).flat_map(|row| row.chunks(block));
        for ((out, codes), &scale) in blocks.zip(codes).zip(&widened) {
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = f32::from(code) * scale);
        }
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        Self::split(page, &rows, head_dim)
    }
}

impl<R: Rounding> KeyCodec for Coded<R> {
    fn prepare(&self, kernels: &Kernels, queries: &[f32], head_dim: usize, scratch: &mut KvScratch) {
        kernels.quantize_queries(Self::shape(head_dim), R::QUERY, queries, &mut scratch.query);
    }

    fn scores(
        &self,
        kernels: &Kernels,
        _: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let stored = Self::stored(kernels, rows, &mut scratch.floats);
        let scales = Self::scales(&scratch.floats);
        kernels.code_scores(Self::shape(rows.head_dim), &scratch.query, stored, scales, out);
    }

    fn scores_and_largest(
        &self,
        kernels: &Kernels,
        _: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        out: (&mut [f32], &mut [f32]),
    ) {
        let stored = Self::stored(kernels, rows, &mut scratch.floats);
        let scales = Self::scales(&scratch.floats);
        kernels.code_scores_and_largest(Self::shape(rows.head_dim), &scratch.query, stored, scales, out);
    }

    fn upper(&self) -> Option<&'static dyn UpperKeys> {
        (Self::PLANES == 2).then_some(&Self::NEW)
    }
}

/// Of two planes the upper one, a row of four bits. The lower four bits are 0 to 15: in the middle, 7.5.
impl<R: Rounding> UpperKeys for Coded<R> {
    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        let [codes, _, scales] = Self::split(page, &rows, head_dim);
        [codes, scales, &[]]
    }

    fn prepare(&self, kernels: &Kernels, queries: &[f32], head_dim: usize, scratch: &mut KvScratch) {
        // 2^-8 of the largest element is little beside half a step of the codes.
        kernels.quantize_queries(Self::upper_shape(head_dim), QueryBits::Eight, queries, &mut scratch.query);
        scratch.query_sums.clear();
        scratch.query_sums.extend(queries.chunks_exact(head_dim).map(|query| kernels.sum(query)));
    }

    fn scores(
        &self,
        kernels: &Kernels,
        _: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        steps: &mut [f32],
        out: &mut [f32],
    ) {
        let [codes, _, scales] = Self::split(rows.page, &rows.range, rows.head_dim);
        Self::widen(kernels, scales, &mut scratch.floats);
        let stored = CodeRows { codes, low: &[], table: &HIGH_NIBBLES, upcoming: rows.upcoming };
        let scales = Scales::Row(&scratch.floats);
        kernels.code_scores(Self::upper_shape(rows.head_dim), &scratch.query, stored, scales, out);
        for (sum, out) in scratch.query_sums.iter().zip(out.chunks_exact_mut(rows.range.len())) {
            kernels.scale_add(out, 1.0, &scratch.floats, 7.5 * sum);
        }
        steps.copy_from_slice(&scratch.floats);
        kernels.scale(steps, 16.0);
    }
}

impl<R: Rounding> ValueCodec for Coded<R> {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let stored = Self::stored(kernels, rows, &mut scratch.floats);
        let scales = Self::scales(&scratch.floats);
        kernels.code_accumulate(Self::shape(rows.head_dim), weights, stored, scales, acc);
    }
}

/// Longest row.
pub(super) const MOST_DIMS: usize = 512;

/// Why rows of `head_dim` numbers cannot be stored in units of `unit`, or nothing.
pub(super) fn refuse_unless_multiple(head_dim: usize, unit: usize) -> Option<String> {
    if head_dim > MOST_DIMS {
        return Some(format!("rows of {head_dim} numbers are longer than {MOST_DIMS}; use bf16"));
    }
    (!head_dim.is_multiple_of(unit)).then(|| {
        format!("rows of {head_dim} numbers are not whole blocks of {unit}; use bf16, or int8+plain where that is a multiple of 8")
    })
}

/// The largest magnitude of a row.
pub(super) fn largest(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// To the nearest whole number with ties to even, of magnitudes up to 2^22, in a way that becomes vector code everywhere.
pub(super) fn round_even(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + SHIFT) - SHIFT
}

/// The least bfloat16 that is not below `x`, which is finite and not negative, as bits and as a number.
pub(super) fn bf16_up(x: f32) -> (u16, f32) {
    let bits = (x.to_bits().saturating_add(0xffff) >> 16) as u16;
    (bits, f32::from_bits(u32::from(bits) << 16))
}

/// `1 / x`, or zero where that is not finite: numbers so small become zeros.
pub(super) fn inverse(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}
