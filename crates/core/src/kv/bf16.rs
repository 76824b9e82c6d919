//! `bf16`: the upper half of an f32 (8 exponent, 7 mantissa bits), little-endian, rounded to nearest even.
//! Error: at most 2^-8 of each number.

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

    fn encode(&self, kernels: &Kernels, rows: &[f32], _: usize, out: &mut [u8]) {
        kernels.f32_to_bf16(rows, bytemuck::cast_slice_mut(out));
    }

    fn decode(&self, kernels: &Kernels, rows: &[u8], _: usize, out: &mut [f32]) {
        kernels.bf16_to_f32(bytemuck::cast_slice(rows), out);
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
        let upcoming = bytemuck::cast_slice(upcoming);
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
        let upcoming = bytemuck::cast_slice(upcoming);
        kernels.accumulate_bf16(weights, bytemuck::cast_slice(rows), head_dim, acc, upcoming);
    }
}
