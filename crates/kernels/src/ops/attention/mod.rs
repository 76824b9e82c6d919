//! The two halves of attention over stored rows: scores of a group of query heads, and the weighted sum of values.
//!
//! A row is read from memory once, in ascending order, and meets the heads of its group two at a time: so the sums of two
//! heads, or the queries, stay in registers. Work on a row of 128 numbers and four heads: 32 fused multiply-adds of 512
//! bits in each half, 64 cycles where a core does one a cycle (Zen 4), 32 where it does two. For bfloat16 that is 512
//! bytes in 64 cycles.
//!
//! Rows of binary16 and of 8-bit floats lie in their plain order: the processor widens binary16 beside its
//! multiply-adds, and a code of 8 bits becomes a binary16 by a shuffle (E5M2, whose codes are upper bytes of it) or in
//! four instructions (E4M3, a 256th of it; the factor is in the queries or the weights). A row of codes is half as many
//! bytes for the same multiply-adds, so the core is the limit, not memory.

mod accumulate;
mod ahead;
mod scores;

use crate::Kernels;
use crate::ops::fp8::Fp8;
use crate::vector::{E4m3, E5m2, F16, F32x16, Woven};
use accumulate::accumulate;
use scores::scores;

#[inline(always)]
pub(crate) fn scores_f32<V: F32x16>(
    queries: &[f32],
    rows: &[f32],
    d: usize,
    out: &mut [f32],
    upcoming: &[f32],
) {
    scores::<V, f32>(queries, rows, d, out, upcoming);
}

#[inline(always)]
pub(crate) fn scores_bf16<V: F32x16>(
    queries: &[f32],
    rows: &[u16],
    d: usize,
    out: &mut [f32],
    upcoming: &[u16],
) {
    scores::<V, Woven>(queries, Woven::of(rows), d, out, Woven::of(upcoming));
}

#[inline(always)]
pub(crate) fn accumulate_f32<V: F32x16>(
    weights: &[f32],
    rows: &[f32],
    d: usize,
    acc: &mut [f32],
    upcoming: &[f32],
) {
    accumulate::<V, f32>(weights, None, rows, d, acc, upcoming);
}

#[inline(always)]
pub(crate) fn accumulate_bf16<V: F32x16>(
    weights: &[f32],
    rows: &[u16],
    d: usize,
    acc: &mut [f32],
    upcoming: &[u16],
) {
    accumulate::<V, Woven>(weights, None, Woven::of(rows), d, acc, Woven::of(upcoming));
}

#[inline(always)]
pub(crate) fn scores_f16<V: F32x16>(
    queries: &[f32],
    rows: &[u16],
    d: usize,
    out: &mut [f32],
    upcoming: &[u16],
) {
    scores::<V, F16>(queries, F16::of(rows), d, out, F16::of(upcoming));
}

#[inline(always)]
pub(crate) fn accumulate_f16<V: F32x16>(
    weights: &[f32],
    rows: &[u16],
    d: usize,
    acc: &mut [f32],
    upcoming: &[u16],
) {
    accumulate::<V, F16>(weights, None, F16::of(rows), d, acc, F16::of(upcoming));
}

/// The two halves over rows of an 8-bit float.
macro_rules! fp8 {
    ($element:ident: $scores:ident, $accumulate:ident) => {
        #[inline(always)]
        pub(crate) fn $scores<V: F32x16>(
            queries: &[f32],
            rows: &[u8],
            d: usize,
            scales: Option<&[f32]>,
            out: &mut [f32],
            upcoming: &[u8],
        ) {
            scores::<V, $element>(queries, $element::of(rows), d, out, $element::of(upcoming));
            if let Some(scales) = scales.filter(|scales| !scales.is_empty()) {
                for scores in out.chunks_exact_mut(scales.len()) {
                    for (score, scale) in scores.iter_mut().zip(scales) {
                        *score *= scale;
                    }
                }
            }
        }

        #[inline(always)]
        pub(crate) fn $accumulate<V: F32x16>(
            weights: &[f32],
            scales: Option<&[f32]>,
            rows: &[u8],
            d: usize,
            acc: &mut [f32],
            upcoming: &[u8],
        ) {
            accumulate::<V, $element>(weights, scales, $element::of(rows), d, acc, $element::of(upcoming));
        }
    };
}
fp8!(E4m3: scores_e4m3, accumulate_e4m3);
fp8!(E5m2: scores_e5m2, accumulate_e5m2);

/// Checks `heads` `[g][d]`, `rows` `[n][d]` and `pairs` `[g][n]`.
fn check(op: &str, heads: usize, rows: usize, d: usize, pairs: usize) {
    assert!(d > 0, "{op}: a head dimension of 0");
    assert!(heads.is_multiple_of(d), "{op}: {heads} values of heads of dimension {d}");
    assert!(rows.is_multiple_of(d), "{op}: {rows} values of rows of dimension {d}");
    assert_eq!(pairs, heads / d * (rows / d), "{op}: the (head, row) pairs");
}

impl Kernels {
    /// Plain dot products of `g` query heads with `n` rows: `queries` `[g][d]`, `rows` `[n][d]`, `out` `[g][n]`. Each in
    /// the 16-lane semantics. The caller has scaled the queries. Any `g`: the rows are read from memory once.
    /// `upcoming` are rows that will be read next (none is fine): they are requested from memory meanwhile, which
    /// changes no result.
    pub fn scores_f32(&self, queries: &[f32], rows: &[f32], d: usize, out: &mut [f32], upcoming: &[f32]) {
        check("scores_f32", queries.len(), rows.len(), d, out.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.scores_f32)(queries, rows, d, out, upcoming) }
    }

    /// [`Kernels::scores_f32`] for rows of [woven](Kernels::weave_bf16) bfloat16.
    pub fn scores_bf16(&self, queries: &[f32], rows: &[u16], d: usize, out: &mut [f32], upcoming: &[u16]) {
        check("scores_bf16", queries.len(), rows.len(), d, out.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.scores_bf16)(queries, rows, d, out, upcoming) }
    }

    /// Adds weighted rows: `acc[h][j] = fma(weights[h][t], rows[t][j], acc[h][j])` for ascending `t`. `weights`
    /// `[g][n]`, `rows` `[n][d]`, `acc` `[g][d]`, which is added to; `upcoming` as for [`Kernels::scores_f32`].
    pub fn accumulate_f32(&self, weights: &[f32], rows: &[f32], d: usize, acc: &mut [f32], upcoming: &[f32]) {
        check("accumulate_f32", acc.len(), rows.len(), d, weights.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.accumulate_f32)(weights, rows, d, acc, upcoming) }
    }

    /// [`Kernels::accumulate_f32`] for rows of [woven](Kernels::weave_bf16) bfloat16.
    pub fn accumulate_bf16(
        &self,
        weights: &[f32],
        rows: &[u16],
        d: usize,
        acc: &mut [f32],
        upcoming: &[u16],
    ) {
        check("accumulate_bf16", acc.len(), rows.len(), d, weights.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.accumulate_bf16)(weights, rows, d, acc, upcoming) }
    }

    /// [`Kernels::scores_f32`] for rows of binary16.
    pub fn scores_f16(&self, queries: &[f32], rows: &[u16], d: usize, out: &mut [f32], upcoming: &[u16]) {
        check("scores_f16", queries.len(), rows.len(), d, out.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.scores_f16)(queries, rows, d, out, upcoming) }
    }

    /// [`Kernels::accumulate_f32`] for rows of binary16.
    pub fn accumulate_f16(&self, weights: &[f32], rows: &[u16], d: usize, acc: &mut [f32], upcoming: &[u16]) {
        check("accumulate_f16", acc.len(), rows.len(), d, weights.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.accumulate_f16)(weights, rows, d, acc, upcoming) }
    }

    /// [`Kernels::scores_f32`] for rows of [8-bit floats](Kernels::f32_to_fp8), each score then multiplied by the scale of
    /// its row: `scales` `[n]`, or none. Queries must be below 2^119.
    #[expect(clippy::too_many_arguments, reason = "a kernel: shapes and buffers, each of its own kind")]
    pub fn scores_fp8(
        &self,
        format: Fp8,
        queries: &[f32],
        rows: &[u8],
        d: usize,
        scales: Option<&[f32]>,
        out: &mut [f32],
        upcoming: &[u8],
    ) {
        check("scores_fp8", queries.len(), rows.len(), d, out.len());
        let n = rows.len() / d;
        assert!(scales.is_none_or(|scales| scales.len() == n), "scores_fp8: a scale for each row");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe {
            match format {
                Fp8::E4m3 => (self.float.scores_e4m3)(queries, rows, d, scales, out, upcoming),
                Fp8::E5m2 => (self.float.scores_e5m2)(queries, rows, d, scales, out, upcoming),
            }
        }
    }

    /// [`Kernels::accumulate_f32`] for rows of [8-bit floats](Kernels::f32_to_fp8), each weight first multiplied by the
    /// scale of its row: `scales` `[n]`, or none. Products of the two must be below 2^119.
    #[expect(clippy::too_many_arguments, reason = "a kernel: shapes and buffers, each of its own kind")]
    pub fn accumulate_fp8(
        &self,
        format: Fp8,
        weights: &[f32],
        rows: &[u8],
        d: usize,
        scales: Option<&[f32]>,
        acc: &mut [f32],
        upcoming: &[u8],
    ) {
        check("accumulate_fp8", acc.len(), rows.len(), d, weights.len());
        let n = rows.len() / d;
        assert!(scales.is_none_or(|scales| scales.len() == n), "accumulate_fp8: a scale for each row");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe {
            match format {
                Fp8::E4m3 => (self.float.accumulate_e4m3)(weights, scales, rows, d, acc, upcoming),
                Fp8::E5m2 => (self.float.accumulate_e5m2)(weights, scales, rows, d, acc, upcoming),
            }
        }
    }
}
