//! `bf16`: the upper half of an f32 (8 exponent, 7 mantissa bits), little-endian, rounded to nearest even.
//! Error: at most 2^-8 of each number.
//!
//! A row is woven (`Kernels::weave_bf16`): in each group of 32 numbers the two halves alternate, so that sixteen words of
//! 32 bits widen into two vectors with one shift and one mask. What is left of a row keeps its order.

use longbit_kernels::Kernels;

use super::KvFormat;
use super::floats::{Element, Floats, RowKernel};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "bf16",
    summary: "bfloat16, rounded to nearest even; relative error at most 2^-8",
    keys: &Floats::<Bf16>::NEW,
    values: &Floats::<Bf16>::NEW,
    rotate: false,
    centre: false,
};

struct Bf16;

impl Element for Bf16 {
    type Bits = u16;
    /// The largest number of bfloat16; what lies above might round to infinity.
    const LARGEST: f32 = f32::from_bits(0x7f7f_0000);
    const ENCODE: fn(&Kernels, &[f32], usize, &mut [u16]) = Kernels::weave_bf16;
    const DECODE: fn(&Kernels, &[u16], usize, &mut [f32]) = Kernels::unweave_bf16;
    const SCORES: RowKernel<u16> = Kernels::scores_bf16;
    const ACCUMULATE: RowKernel<u16> = Kernels::accumulate_bf16;
}
