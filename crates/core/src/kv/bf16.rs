//! `bf16`: the upper half of an f32 (8 exponent, 7 mantissa bits), little-endian, rounded to nearest even.
//! Error: at most 2^-8 of each number.
//!
//! A row is woven (`Kernels::weave_bf16`): in each group of 32 numbers the two halves alternate, so that sixteen words of
//! 32 bits widen into two vectors with one shift and one mask. What is left of a row keeps its order.

use longbit_kernels::Kernels;

use super::KvDtype;

pub(super) struct Bf16;

impl KvDtype for Bf16 {
    fn name(&self) -> &'static str {
        "bf16"
    }

    fn summary(&self) -> &'static str {
        "bfloat16, rounded to nearest even; relative error at most 2^-8"
    }

    fn row_bytes(&self, head_dim: usize) -> usize {
        2 * head_dim
    }

    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, out: &mut [u8]) {
        kernels.weave_bf16(rows, head_dim, bytemuck::cast_slice_mut(out));
    }

    fn decode(&self, kernels: &Kernels, rows: &[u8], head_dim: usize, out: &mut [f32]) {
        kernels.unweave_bf16(bytemuck::cast_slice(rows), head_dim, out);
    }

    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &[u8],
        head_dim: usize,
        out: &mut [f32],
        upcoming: &[u8],
    ) {
        let upcoming = bytemuck::try_cast_slice(upcoming).unwrap_or_default();
        kernels.scores_bf16(queries, bytemuck::cast_slice(rows), head_dim, out, upcoming);
    }

    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &[u8],
        head_dim: usize,
        acc: &mut [f32],
        upcoming: &[u8],
    ) {
        let upcoming = bytemuck::try_cast_slice(upcoming).unwrap_or_default();
        kernels.accumulate_bf16(weights, bytemuck::cast_slice(rows), head_dim, acc, upcoming);
    }
}
