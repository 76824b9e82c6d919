//! `int4`: 4 bits and a bfloat16 scale for 32 numbers, rows rotated and centred. 72 bytes for 128 numbers, and one for the
//! mean of the page.
//!
//! A block is first rounded as q4_0 does, in steps of its number of the largest magnitude by -8, then its scale becomes the
//! one that fits the codes best, `sum x q / sum q^2`, within a sixteenth, and numbers are rounded again. Rotated rows are nearly Gaussian, so that blocks waste no range on one channel.
//! Error: at most 18.5 % of the block's largest magnitude, in the rotated row: where seven of the shortest steps stand for
//! eight of the first.

use longbit_kernels::{CodeBits, Kernels, QueryBits};

use super::KvFormat;
use super::coded::{Coded, MOST_DIMS, Rounding, ScaleBits, Scaling, inverse};
use super::q_0::{FROM_8, extremes};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "int4",
    summary: "4 bits, a fitted bfloat16 scale for 32 numbers, rotated and centred; error at most 18.5 % of the block's largest",
    keys: &Coded::<Int4>::NEW,
    values: &Coded::<Int4>::NEW,
    rotate: true,
    centre: true,
};

struct Int4;

const BLOCK: usize = 32;
/// How far the fitted scale may be from the first one.
const NEAR: f32 = 1.0 / 16.0;

impl Rounding for Int4 {
    const BITS: CodeBits = CodeBits::Four;
    const SCALING: Scaling = Scaling::Block;
    const SCALE: ScaleBits = ScaleBits::Bf16;
    const QUERY: QueryBits = QueryBits::Eight;
    const TABLE: [i8; 16] = FROM_8;

    fn round(kernels: &Kernels, row: &[f32], codes: &mut [i8], scales: &mut [u16]) {
        let n = row.len() / BLOCK;
        let [mut first, mut factors] = [[0.0; MOST_DIMS / BLOCK]; 2];
        let (first, factors) = (&mut first[..n], &mut factors[..n]);
        extremes(kernels, row, first);
        for (first, factor) in first.iter_mut().zip(&mut *factors) {
            *first /= -8.0;
            *factor = inverse(*first);
        }
        kernels.round_codes(row, BLOCK, &[], factors, [-8, 7], codes);
        let blocks = row.chunks_exact(BLOCK).zip(codes.chunks_exact(BLOCK)).zip(&*first);
        for (((block, codes), first), factor) in blocks.zip(&mut *factors) {
            let (mut product, mut square) = (0.0f32, 0.0f32);
            for (x, &q) in block.iter().zip(codes) {
                let q = f32::from(q);
                product += x * q;
                square += q * q;
            }
            // A lone giant among small numbers would give up too much of itself.
            let fitted = (product * inverse(square) / first).clamp(1.0 - NEAR, 1.0 + NEAR);
            *factor = if fitted.is_nan() { *first } else { fitted * first };
        }
        kernels.f32_to_bf16(factors, scales);
        for (factor, &bits) in factors.iter_mut().zip(&*scales) {
            *factor = inverse(f32::from_bits(u32::from(bits) << 16));
        }
        kernels.round_codes(row, BLOCK, &[], factors, [-8, 7], codes);
        codes.iter_mut().for_each(|code| *code += 8);
    }
}
