//! Sums of rows of codes under weights: the values of an attention step, in integers.
//!
//! # What is computed
//! For a query head `h`, a block `b` of 32 numbers and `n` rows, the weight of a row is `u[t] = weights[h][t] * scale[t][b]`
//! (or `scale[t]`, or the weight alone). With `m = max(max_t |weights[h][t]| * max_t |scale[t][b]|, 1e-30)`:
//!
//! ```text
//! q[t]      = round_half_even(u[t] * (32512 / m))
//! s[i]      = sum_t q[t] * code[t][i]                     exact: |s| <= 512 * 32512 * 128 < 2^31
//! acc[h][i] = fma(s[i] as f32, m / 32512, acc[h][i])
//! ```
//!
//! So the result is within `n * 128 * m / 65024` of the sum in real numbers, besides the rounding of floats, and it has the
//! same bits on every instruction set. The largest `|u[t]|` would do for `m` and be smaller, but finding it takes a product
//! for each weight and block: 3 % of a decode step with scales of blocks.
//!
//! # How
//! Weights are rounded to 16 bits once per call, so that a product of two rows at a time is one instruction (`vpdpwssd`, or
//! `vpmaddwd` and an addition): as many multiplications as two planes of bytes would take, with half of the accumulators,
//! and a pass serves four heads. Four rows are interleaved byte by byte in lanes of 128 bits, before indices are looked up;
//! by the order of positions each of the four registers that result belongs to one block of 32.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod finish;
mod lanes;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
mod pass;
mod prepare;
#[cfg(target_arch = "x86_64")]
mod rounding;
pub(crate) mod scalar;

use super::{CodeShape, Rows, Scales};
use crate::Kernels;

/// Rows of one call: the sums still fit 32 bits.
pub const MOST_ROWS: usize = 512;
/// What the largest weight becomes.
const LARGEST: f32 = 32512.0;
/// The largest weight counts as at least this, so that no quotient overflows.
const SMALLEST: f32 = 1e-30;

/// Shape, weights `[g][n]`, rows, scales, `acc` `[g][dims]`. Calling it requires a processor that has the instruction set
/// of its table, `0 < n <= MOST_ROWS` rows, and lengths that agree.
pub(crate) type Accumulate = unsafe fn(CodeShape, &[f32], Rows<'_>, Scales<'_>, &mut [f32]);

impl Kernels {
    /// Adds rows of codes under the weights of `g` heads to their sums, as the module defines it: `weights` `[g][n]`, `acc`
    /// `[g][shape.dims]`. Weights and scales are finite, and so is the product of the largest ones; where they are not,
    /// the sums of that head mean nothing.
    ///
    /// # Panics
    /// The lengths do not agree, `shape.dims` is not a multiple of 8, or there are more than [`MOST_ROWS`] rows.
    pub fn code_accumulate(
        &self,
        shape: CodeShape,
        weights: &[f32],
        rows: Rows<'_>,
        scales: Scales<'_>,
        acc: &mut [f32],
    ) {
        let n = shape.count(rows, "code_accumulate");
        scales.check(shape, n, "code_accumulate");
        assert!(n <= MOST_ROWS, "code_accumulate: {n} rows, at most {MOST_ROWS}");
        let heads = acc.len() / shape.dims;
        assert_eq!(acc.len(), heads * shape.dims, "code_accumulate: sums of {shape:?}");
        assert_eq!(weights.len(), heads * n, "code_accumulate: weights of {heads} heads, {n} rows");
        if n == 0 {
            return;
        }
        // SAFETY: this table was handed out against proof of its instruction set; the lengths agree.
        unsafe { (self.code_accumulate)(shape, weights, rows, scales, acc) }
    }
}
