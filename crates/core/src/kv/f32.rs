//! `f32`: four bytes a number, little-endian. Error: none.

use longbit_kernels::Kernels;

use super::KvFormat;
use super::floats::{Element, Floats, RowKernel};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "f32",
    summary: "single precision; exact",
    keys: &Floats::<F32>::NEW,
    values: &Floats::<F32>::NEW,
    rotate: false,
    centre: false,
};

struct F32;

impl Element for F32 {
    type Bits = f32;
    const LARGEST: f32 = f32::MAX;
    const ENCODE: fn(&Kernels, &[f32], usize, &mut [f32]) = |_, rows, _, out| out.copy_from_slice(rows);
    const DECODE: fn(&Kernels, &[f32], usize, &mut [f32]) = |_, bits, _, out| out.copy_from_slice(bits);
    const SCORES: RowKernel<f32> = Kernels::scores_f32;
    const ACCUMULATE: RowKernel<f32> = Kernels::accumulate_f32;
}
