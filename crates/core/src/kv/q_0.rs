//! `q8_0` and `q4_0`: the blocks of 32 numbers of llama.cpp, an f16 scale each. Source: `quantize_row_q*_0_ref` in
//! `ggml-quants.c`; codes and scales are the same, the scales lie behind the codes of a page.
//!
//! `q8_0`: `d = max|x| / 127`, `q = round(x / d)`, 34 bytes a block. Error: at most `d / 2` and the rounding of `d`
//! (2^-11), so 0.45 % of the block's largest magnitude.
//! `q4_0`: `d` is the number of the largest magnitude by -8, `q = min(15, floor(x / d + 8.5))` stands for `(q - 8) d`, 18
//! bytes a block. Error: at most one `d` at the end that 7 steps do not reach, else `d / 2`: 12.6 % of the largest magnitude.

use longbit_kernels::{CodeBits, Kernels, QueryBits};

use super::KvFormat;
use super::coded::{Coded, MOST_DIMS, Rounding, ScaleBits, Scaling, inverse};

pub(super) const Q8_0: KvFormat = KvFormat {
    name: "q8_0",
    summary: "signed bytes, an f16 scale for 32 numbers (llama.cpp); error at most 0.45 % of the block's largest",
    keys: &Coded::<Bytes>::NEW,
    values: &Coded::<Bytes>::NEW,
    rotate: false,
    centre: false,
};

pub(super) const Q4_0: KvFormat = KvFormat {
    name: "q4_0",
    summary: "4 bits, an f16 scale for 32 numbers (llama.cpp); error at most 12.6 % of the block's largest",
    keys: &Coded::<Nibbles>::NEW,
    values: &Coded::<Nibbles>::NEW,
    rotate: false,
    centre: false,
};

const BLOCK: usize = 32;
/// The largest f16.
const F16_MAX: f32 = 65504.0;

struct Bytes;

impl Rounding for Bytes {
    const BITS: CodeBits = CodeBits::Eight;
    const SCALING: Scaling = Scaling::Block;
    const SCALE: ScaleBits = ScaleBits::F16;
    const QUERY: QueryBits = QueryBits::Sixteen;
    const LARGEST: f32 = 127.0 * F16_MAX;

    fn round(kernels: &Kernels, row: &[f32], codes: &mut [i8], scales: &mut [u16]) {
        let mut steps = [0.0; MOST_DIMS / BLOCK];
        let steps = &mut steps[..row.len() / BLOCK];
        kernels.magnitudes(row, BLOCK, steps);
        steps.iter_mut().for_each(|d| *d /= 127.0);
        kernels.f32_to_f16(steps, scales);
        let blocks = row.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK));
        for ((block, codes), &d) in blocks.zip(&*steps) {
            let inverse = inverse(d);
            for (code, x) in codes.iter_mut().zip(block) {
                // To the nearest, ties away from zero.
                let x = x * inverse;
                let whole = x as i32;
                let rest = x - whole as f32;
                *code = (whole + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)) as i8;
            }
        }
    }
}

struct Nibbles;

impl Rounding for Nibbles {
    const BITS: CodeBits = CodeBits::Four;
    const SCALING: Scaling = Scaling::Block;
    const SCALE: ScaleBits = ScaleBits::F16;
    const QUERY: QueryBits = QueryBits::Eight;
    const TABLE: [i8; 16] = FROM_8;
    const LARGEST: f32 = 8.0 * F16_MAX;

    fn round(kernels: &Kernels, row: &[f32], codes: &mut [i8], scales: &mut [u16]) {
        let mut steps = [0.0; MOST_DIMS / BLOCK];
        let steps = &mut steps[..row.len() / BLOCK];
        extremes(kernels, row, steps);
        steps.iter_mut().for_each(|d| *d /= -8.0);
        kernels.f32_to_f16(steps, scales);
        let blocks = row.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK));
        for ((block, codes), &d) in blocks.zip(&*steps) {
            let inverse = inverse(d);
            for (code, x) in codes.iter_mut().zip(block) {
                *code = ((x * inverse + 8.5) as u8).min(15) as i8;
            }
        }
    }
}

/// Indices 0 to 15 stand for -8 to 7.
pub(super) const FROM_8: [i8; 16] = [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7];

/// The first number of the largest magnitude of each block.
pub(super) fn extremes(kernels: &Kernels, row: &[f32], out: &mut [f32]) {
    kernels.magnitudes(row, BLOCK, out);
    for (out, block) in out.iter_mut().zip(row.chunks_exact(BLOCK)) {
        *out = block.iter().copied().find(|x| x.abs() == *out).unwrap_or_default();
    }
}
