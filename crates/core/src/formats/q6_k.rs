//! Q6_K of llama.cpp: blocks of 256 numbers in 210 bytes, six bits a number. Source: `block_q6_K` in `ggml-common.h` and
//! `dequantize_row_q6_K` in `ggml-quants.c`.
//!
//! `low[128]`, `high[64]`, `scales[16]` (signed bytes), f16 `d`. Number `j` is `d * scales[j / 16] * (q - 32)`. Each half of
//! the block has 64 bytes of `low` and 32 of `high`; number `l + 32 * k` of a half (`l` in 0..32, `k` in 0..4) has its
//! lower four bits in byte `l + 32 * (k mod 2)` of `low`, in the low half of the byte for `k < 2`, and its upper two in
//! byte `l` of `high`, at bit `2 * k`.
//!
//! The encoder is our own (llama.cpp weights errors by the square of the number, ours are equal): for each sixteen numbers
//! it rounds with nine steps around (largest magnitude) / 32, fits the scale of each rounding by least squares, and keeps
//! the one with the least squared error. `d` makes the largest of the scales -128. An error is at most 1/14 of the largest
//! magnitude among the 256 numbers plus 2^-20 (half the least f16 times 32), and typically a fifth of that.

use super::q_0::largest;
use super::{Encoding, FormatError, block_scale, stored_scale};
use half::f16;

/// Numbers of a block.
const BLOCK: usize = 256;
/// Numbers that share a scale.
const GROUP: usize = 16;

/// Bytes of `low` and of `high` in a block.
const LOW: usize = 128;
const HIGH: usize = 64;

pub(super) fn row(bytes: &[u8], row: usize, out: &mut [f32]) -> Result<(), FormatError> {
    for (block, out) in bytes.as_chunks::<210>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let (low, rest) = block.split_at(LOW);
        let (high, rest) = rest.split_at(HIGH);
        let d = block_scale(Encoding::Q6K, row, [rest[GROUP], rest[GROUP + 1]])?;
        let halves = low.as_chunks::<64>().0.iter().zip(high.as_chunks::<32>().0);
        for (half, (out, (low, high))) in out.as_chunks_mut::<128>().0.iter_mut().zip(halves).enumerate() {
            for (k, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let low = &low[k % 2 * 32..][..32];
                for (l, o) in out.iter_mut().enumerate() {
                    let q = low[l] >> (k / 2 * 4) & 15 | (high[l] >> (2 * k) & 3) << 4;
                    let scale = rest[half * 8 + k * 2 + l / GROUP] as i8;
                    *o = d * f32::from(scale) * (f32::from(q) - 32.0);
                }
            }
        }
    }
    Ok(())
}

pub(super) fn encode(values: &[f32], out: &mut Vec<u8>) -> Result<(), FormatError> {
    for (i, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
        let (groups, _) = block.as_chunks::<GROUP>();
        let mut fitted = [0.0; GROUP];
        fitted.iter_mut().zip(groups).for_each(|(scale, group)| *scale = fit(group));
        let wanted = largest(&fitted).1 / -128.0;
        let mut d = f16::from_le_bytes(stored_scale(Encoding::Q6K, wanted, i * BLOCK, block)?);
        // Among subnormal halves the nearest may be far too small, and the largest scale out of reach.
        if d.to_f32().abs() * 128.5 < wanted.abs() * 128.0 {
            d = f16::from_bits(d.to_bits() + 1);
        }
        let d_wide = d.to_f32();
        let scales = fitted.map(|scale| if d_wide == 0.0 { 0 } else { (scale / d_wide).round() as i8 });
        let mut q = [0u8; BLOCK];
        for ((q, group), scale) in q.as_chunks_mut::<GROUP>().0.iter_mut().zip(groups).zip(scales) {
            let step = d_wide * f32::from(scale);
            *q = group.map(|x| {
                let steps = if step == 0.0 { 0.0 } else { x / step };
                (nearest(steps) + 32.0) as u8
            });
        }
        pack(&q, out);
        out.extend(scales.map(|scale| scale as u8));
        out.extend(d.to_le_bytes());
    }
    Ok(())
}

/// The scale with the least squared error of sixteen numbers in -32 to 31 steps; its sign puts the largest magnitude at
/// the end that reaches further.
fn fit(group: &[f32; GROUP]) -> f32 {
    let extreme = largest(group).1;
    // Far below what f16 reaches; the sums below would lose it.
    if extreme.abs() < 1e-12 {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0, extreme / -32.0);
    for quarter in -4..=4i16 {
        let inverse = -(32.0 + f32::from(quarter) * 0.25) / extreme;
        let (mut along, mut square) = (0.0, 0.0);
        for &x in group {
            let q = nearest(x * inverse);
            along += q * x;
            square += q * q;
        }
        // The squared error is the sum of all squares less this.
        let gain = along * along / square;
        if gain > best {
            (best, scale) = (gain, along / square);
        }
    }
    scale
}

/// The nearest of -32 to 31, ties to even. The large number leaves no bits for a fraction.
fn nearest(x: f32) -> f32 {
    const LARGE: f32 = 12_582_912.0;
    x.clamp(-32.0, 31.0) + LARGE - LARGE
}

fn pack(q: &[u8; BLOCK], out: &mut Vec<u8>) {
    let (halves, _) = q.as_chunks::<128>();
    for half in halves {
        out.extend((0..64).map(|j| half[j] & 15 | (half[j + 64] & 15) << 4));
    }
    for half in halves {
        out.extend((0..32).map(|l| (0..4).fold(0, |byte, k| byte | half[l + 32 * k] >> 4 << (2 * k))));
    }
}
