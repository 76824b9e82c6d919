//! Rows in blocks, number by number.

use super::{bf16_to_f32, tree};
use crate::BlockFormat;

/// The elements of [`crate::Kernels::quantize_planes`] and their scale.
pub fn quantize_planes(x: &[f32]) -> (Vec<i32>, f32) {
    if x.iter().any(|x| !x.is_finite()) {
        return (vec![0; x.len()], f32::NAN);
    }
    let largest = x.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    let inverse = 32512.0 / largest;
    (x.iter().map(|&x| (x * inverse).round_ties_even() as i32).collect(), largest / 32512.0)
}

/// The signed code and the scale of each weight of a bfloat16 row.
pub fn quantize_row(format: BlockFormat, row: &[u16]) -> Vec<(i32, f32)> {
    let steps = match format {
        BlockFormat::Q6 => 31.0f32,
        BlockFormat::Q4 | BlockFormat::Q4Dither => 7.0,
    };
    let group = |col: usize| match format {
        BlockFormat::Q6 => col / 256,
        BlockFormat::Q4 | BlockFormat::Q4Dither => col / 256 * 4 + col / 4 % 4,
    };
    let weight = |col: usize| {
        let w = bf16_to_f32(row[col]);
        if w.is_nan() { 0.0 } else { w }
    };
    let scale = |wanted: usize| {
        let largest =
            (0..row.len()).filter(|&c| group(c) == wanted).map(|c| weight(c).abs()).fold(0.0, f32::max);
        // The smallest bfloat16 that is not below the quotient.
        let quotient = largest / steps;
        let below = f32::from_bits(quotient.to_bits() & 0xffff_0000);
        if below < quotient { f32::from_bits(below.to_bits() + 0x1_0000) } else { below }
    };
    let scales: Vec<f32> = (0..4 * row.len().div_ceil(256)).map(scale).collect();
    (0..row.len())
        .map(|col| {
            let scale = scales[group(col)];
            let finite = scale > 0.0 && scale.is_finite();
            let dither = format.dither(col) as f32 / 8192.0;
            let code = (weight(col) / scale + dither).round_ties_even().clamp(-steps, steps);
            let code = if finite { code } else { (0.0 + dither).round_ties_even() };
            (code as i32, scale)
        })
        .collect()
}

/// The product of a row of [`quantize_row`] with `v` times `scale` of [`quantize_planes`].
pub fn head_blocks(format: BlockFormat, row: &[(i32, f32)], v: &[i32], scale: f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    for first in (0..row.len()).step_by(256) {
        let block = first..row.len().min(first + 256);
        for (l, lane) in lanes.iter_mut().enumerate() {
            // Columns of padding have the code of zero; the scale of a lane is that of any of its columns.
            let mine = || block.clone().filter(|col| col % 64 / 4 == l);
            let sum: i64 = mine().map(|col| i64::from(row[col].0) * i64::from(v[col])).sum();
            let dither: i64 = mine().map(|col| i64::from(format.dither(col)) * i64::from(v[col])).sum();
            let sum = sum - (dither + 4096).div_euclid(8192);
            let scale = mine().next().map_or(0.0, |col| row[col].1);
            *lane = (sum as f32).mul_add(scale, *lane);
        }
    }
    tree(lanes) * scale
}
