//! Number formats of half and a quarter of the width, the Hadamard transform, and runs of weights.

use super::{accumulate_f32, scores_f32};
use crate::Fp8;
use std::ops::Range;

/// Widens binary16 bits.
pub fn f16_to_f32(x: u16) -> f32 {
    half::f16::from_bits(x).to_f32_const()
}

/// Rounds to binary16 bits.
pub fn f32_to_f16(x: f32) -> u16 {
    half::f16::from_f32_const(x).to_bits()
}

/// What a code of an 8-bit float means.
pub fn fp8_to_f32(format: Fp8, code: u8) -> f32 {
    let (mantissa_bits, bias) = match format {
        Fp8::E4m3 => (3, 7),
        Fp8::E5m2 => (2, 15),
    };
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let exponent = i32::from((code & 0x7f) >> mantissa_bits);
    let mantissa = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    let magnitude = match (format, code & 0x7f) {
        (Fp8::E4m3, 0x7f) | (Fp8::E5m2, 0x7d..) => f64::NAN,
        (Fp8::E5m2, 0x7c) => f64::INFINITY,
        _ if exponent == 0 => mantissa * 2f64.powi(1 - bias),
        _ => (1.0 + mantissa) * 2f64.powi(exponent - bias),
    };
    (sign * magnitude) as f32
}

/// The code of the number nearest to `x`, the even one of two; the largest for what is beyond it.
pub fn f32_to_fp8(format: Fp8, x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let (last, nan) = match format {
        Fp8::E4m3 => (0x7e, 0x7f),
        Fp8::E5m2 => (0x7b, 0x7f),
    };
    if x.is_nan() {
        return sign | nan;
    }
    let magnitude = f64::from(x.abs().min(format.largest()));
    let distance = |code: u8| (f64::from(fp8_to_f32(format, code)) - magnitude).abs();
    let mut best = 0;
    for code in 1..=last {
        if distance(code) < distance(best) || distance(code) == distance(best) && code % 2 == 0 {
            best = code;
        }
    }
    sign | best
}

/// Dot products with binary16 rows.
pub fn scores_f16(queries: &[f32], rows: &[u16], d: usize, out: &mut [f32]) {
    let rows: Vec<f32> = rows.iter().map(|&x| f16_to_f32(x)).collect();
    scores_f32(queries, &rows, d, out);
}

/// Weighted sums of binary16 rows.
pub fn accumulate_f16(weights: &[f32], rows: &[u16], d: usize, acc: &mut [f32]) {
    let rows: Vec<f32> = rows.iter().map(|&x| f16_to_f32(x)).collect();
    accumulate_f32(weights, &rows, d, acc);
}

/// Dot products with rows of 8-bit floats, times the scales of the rows.
pub fn scores_fp8(
    format: Fp8,
    queries: &[f32],
    rows: &[u8],
    d: usize,
    scales: Option<&[f32]>,
    out: &mut [f32],
) {
    let n = rows.len() / d;
    let rows: Vec<f32> = rows.iter().map(|&x| fp8_to_f32(format, x)).collect();
    scores_f32(queries, &rows, d, out);
    for (i, o) in out.iter_mut().enumerate() {
        *o *= scales.map_or(1.0, |scales| scales[i % n]);
    }
}

/// Sums of rows of 8-bit floats, weighted by the weights times the scales of the rows.
pub fn accumulate_fp8(
    format: Fp8,
    weights: &[f32],
    rows: &[u8],
    d: usize,
    scales: Option<&[f32]>,
    acc: &mut [f32],
) {
    let n = rows.len() / d;
    let rows: Vec<f32> = rows.iter().map(|&x| fp8_to_f32(format, x)).collect();
    let scale = |t: usize| scales.map_or(1.0, |scales| scales[t]);
    let weights: Vec<f32> = weights.iter().enumerate().map(|(i, w)| w * scale(i % n)).collect();
    accumulate_f32(&weights, &rows, d, acc);
}

/// The normalised Walsh-Hadamard transform of one row.
pub fn hadamard(row: &mut [f32]) {
    let d = row.len();
    let mut stride = d / 2;
    while stride > 0 {
        for i in 0..d {
            if i & stride == 0 {
                (row[i], row[i + stride]) = (row[i] + row[i + stride], row[i] - row[i + stride]);
            }
        }
        stride /= 2;
    }
    for x in row {
        *x *= (1.0 / (d as f64).sqrt()) as f32;
    }
}

/// Ranges of tokens with a weight above its head's floor, joined over gaps of fewer than `min_gap` tokens.
pub fn runs_above(weights: &[f32], floors: &[f32], min_gap: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let n = weights.len().checked_div(floors.len()).unwrap_or(0);
    for t in 0..n {
        let counts = (0..floors.len()).any(|h| weights[h * n + t].is_nan() || weights[h * n + t] > floors[h]);
        match runs.last_mut() {
            Some(last) if counts && (t == last.end || t - last.end < min_gap) => last.end = t + 1,
            _ if counts => runs.push(t..t + 1),
            _ => {}
        }
    }
    runs
}

/// How many numbers lie in each bin below `top`.
pub fn count_depths(x: &[f32], top: f32, per_unit: f32) -> Vec<u32> {
    let mut counts = vec![0; crate::DEPTHS];
    let last = counts.len() - 1;
    for &x in x {
        let depth = (top - x) * per_unit;
        let bin = if depth.is_nan() { last } else { (depth as usize).min(last) };
        counts[bin] += 1;
    }
    counts
}

/// The largest of each of 16 groups a strip of 256 numbers, the first of equal ones.
pub fn maxima(x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NEG_INFINITY; x.len() / 256 * 16];
    for (i, &x) in x.iter().enumerate().take(out.len() * 16) {
        let most = &mut out[i / 256 * 16 + i % 16];
        *most = if x > *most { x } else { *most };
    }
    out
}

/// Sums of what is not below a bound, for each of four.
pub fn sums_from(x: &[f32], bounds: &[f32; 4]) -> [f32; 4] {
    bounds.map(|bound| {
        let mut lanes = [0.0f32; 16];
        for (i, &x) in x.iter().enumerate() {
            lanes[i % 16] += if x < bound { 0.0 } else { x };
        }
        super::tree(lanes)
    })
}

/// The sum in double precision, in 16 lanes.
pub fn sum_f64(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 16];
    for (i, &x) in x.iter().enumerate() {
        lanes[i % 16] += f64::from(x);
    }
    let half = |x: &[f64]| -> Vec<f64> {
        let (a, b) = x.split_at(x.len() / 2);
        a.iter().zip(b).map(|(a, b)| a + b).collect()
    };
    half(&half(&half(&half(&lanes))))[0]
}

/// Bits of the codes that are `code`, 64 a word.
pub fn marks_equal(codes: &[u16], code: u16) -> Vec<u64> {
    let mut marks = vec![0; codes.len() / 64];
    for (i, _) in codes.iter().enumerate().filter(|x| *x.1 == code) {
        marks[i / 64] |= 1 << (i % 64);
    }
    marks
}
