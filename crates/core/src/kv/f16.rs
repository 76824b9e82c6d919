//! `f16`: IEEE binary16 (5 exponent, 10 mantissa bits), little-endian, rounded to nearest even. Error: at most 2^-11 of each
//! number from 2^-14 on, 2^-25 below. Numbers from 65520 on, which would round to infinity, are refused.

use longbit_kernels::Kernels;

use super::KvFormat;
use super::floats::{Element, Floats, RowKernel};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "f16",
    summary: "binary16, rounded to nearest even; relative error at most 2^-11",
    keys: &Floats::<F16>::NEW,
    values: &Floats::<F16>::NEW,
    rotate: false,
    centre: false,
};

pub(super) struct F16;

impl Element for F16 {
    type Bits = u16;
    const LARGEST: f32 = 65519.0;
    const ENCODE: fn(&Kernels, &[f32], usize, &mut [u16]) =
        |kernels, rows, _, out| kernels.f32_to_f16(rows, out);
    const DECODE: fn(&Kernels, &[u16], usize, &mut [f32]) =
        |kernels, bits, _, out| kernels.f16_to_f32(bits, out);
    const SCORES: RowKernel<u16> = Kernels::scores_f16;
    const ACCUMULATE: RowKernel<u16> = Kernels::accumulate_f16;
}
