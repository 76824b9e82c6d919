//! Weighted sums of rows of codes, number by number.

use crate::Scales;

/// As [`crate::Kernels::code_accumulate`], from rows that are unpacked: `codes` `[n][dims]`, `acc` `[g][dims]`.
pub fn code_accumulate(codes: &[i8], dims: usize, weights: &[f32], scales: Scales<'_>, acc: &mut [f32]) {
    let (n, blocks) = (codes.len() / dims, dims.div_ceil(32));
    for (weights, acc) in weights.chunks(n).zip(acc.chunks_mut(dims)) {
        for (i, a) in acc.iter_mut().enumerate() {
            let scale = |t: usize| match scales {
                Scales::One => 1.0,
                Scales::Row(scales) => scales[t],
                Scales::Block(scales) => scales[t * blocks + i / 32],
            };
            let u = |t: usize| weights[t] * scale(t);
            let weight = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            let largest = (weight * (0..n).fold(0.0f32, |m, t| m.max(scale(t).abs()))).max(1e-30);
            let factor = 32512.0 / largest;
            let sum: i64 = (0..n)
                .map(|t| (u(t) * factor).round_ties_even() as i64 * i64::from(codes[t * dims + i]))
                .sum();
            *a = (sum as f32).mul_add(largest / 32512.0, *a);
        }
    }
}
