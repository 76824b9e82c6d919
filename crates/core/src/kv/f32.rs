//! `f32`: four bytes a number, little-endian. Error: none.

use longbit_kernels::Kernels;

use super::KvDtype;

pub(super) struct F32;

impl KvDtype for F32 {
    fn name(&self) -> &'static str {
        "f32"
    }

    fn summary(&self) -> &'static str {
        "single precision; exact"
    }

    fn row_bytes(&self, head_dim: usize) -> usize {
        4 * head_dim
    }

    fn encode(&self, _: &Kernels, rows: &[f32], _: usize, out: &mut [u8]) {
        out.copy_from_slice(bytemuck::cast_slice(rows));
    }

    fn decode(&self, _: &Kernels, rows: &[u8], _: usize, out: &mut [f32]) {
        out.copy_from_slice(bytemuck::cast_slice(rows));
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
        kernels.scores_f32(queries, bytemuck::cast_slice(rows), head_dim, out, upcoming);
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
        kernels.accumulate_f32(weights, bytemuck::cast_slice(rows), head_dim, acc, upcoming);
    }
}
