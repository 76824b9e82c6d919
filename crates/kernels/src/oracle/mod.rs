//! The obvious code: every operation of [`crate::Kernels`] as plain loops over scalars, for tests to compare with.
//!
//! Nothing here shares code with the fast paths, and nothing is fast. Arguments and results are as in the methods of
//! the same name.

mod blocks;
mod code_accumulate;
mod codes;
mod floats;
mod ternary;

pub use blocks::{head_blocks, quantize_planes, quantize_row};
pub use code_accumulate::code_accumulate;
pub use codes::{code_score, quantize_query};
pub use floats::{
    accumulate_f16, accumulate_fp8, count_depths, f16_to_f32, f32_to_f16, f32_to_fp8, fp8_to_f32, hadamard,
    marks_equal, maxima, runs_above, scores_f16, scores_fp8, sum_f64, sums_from,
};
pub use ternary::{ternary_columns, ternary_gemm, ternary_gemv, ternary_rows};

/// The 16 lanes of a reduction, summed by the fixed tree.
fn tree(mut lanes: [f32; 16]) -> f32 {
    for i in 0..8 {
        lanes[i] += lanes[i + 8];
    }
    for i in 0..4 {
        lanes[i] += lanes[i + 4];
    }
    for i in 0..2 {
        lanes[i] += lanes[i + 2];
    }
    lanes[0] + lanes[1]
}

/// Widens bfloat16 bits.
pub fn bf16_to_f32(x: u16) -> f32 {
    half::bf16::from_bits(x).to_f32()
}

/// Rounds to bfloat16 bits.
pub fn f32_to_bf16(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

/// The dot product: padded with zeros to a multiple of 16, element `i` in lane `i % 16`, then the tree.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for i in 0..a.len().next_multiple_of(16) {
        let x = a.get(i).copied().unwrap_or(0.0);
        let y = b.get(i).copied().unwrap_or(0.0);
        lanes[i % 16] = x.mul_add(y, lanes[i % 16]);
    }
    tree(lanes)
}

/// The largest element that is a number, `-inf` if there is none.
pub fn max(x: &[f32]) -> f32 {
    let mut largest = f32::NEG_INFINITY;
    for &x in x {
        if x > largest {
            largest = x;
        }
    }
    if largest == 0.0 { 0.0 } else { largest }
}

/// The exponential, with the rounding of every step.
pub fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    if x < -87.336_54 {
        return 0.0;
    }
    let x = x.min(88.8);
    // The smallest n with x * log2(e) nearest, ties to even, as the addition of a large number rounds.
    let magic = 12_582_912.0 + 127.0;
    let n = x.mul_add(std::f32::consts::LOG2_E, magic) - magic;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 8.312_51e-3_f32;
    for c in [4.189_024_5e-2, 1.666_711_6e-1, 4.999_923e-1] {
        p = p.mul_add(r, c);
    }
    let y = p.mul_add(r * r, r + 1.0);
    let two_to_n = if n > 127.0 { f32::INFINITY } else { f32::from_bits(((n as i32 + 127) as u32) << 23) };
    y * two_to_n
}

/// Exponentials in place and their sum in 16 lanes.
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0; 16];
    for (i, x) in x.iter_mut().enumerate() {
        *x = exp(*x - shift);
        lanes[i % 16] += *x;
    }
    tree(lanes)
}

/// `(g / (1 + exp(-g))) * u`.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in 0..out.len() {
        out[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i];
    }
}

/// Root-mean-square normalisation.
pub fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for i in 0..out.len() {
        out[i] = x[i] * inverse * weight[i];
    }
}

/// Rotary embedding in the half-rotation order.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    for i in 0..half {
        let (a, b) = (head[i], head[i + half]);
        head[i] = a.mul_add(cos[i], -(b * sin[i]));
        head[i + half] = b.mul_add(cos[i], a * sin[i]);
    }
}

/// `max(g, 0)^2 * u`.
pub fn relu2_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in 0..out.len() {
        out[i] = if gate[i] > 0.0 { gate[i] * gate[i] * up[i] } else { 0.0 * up[i] };
    }
}

/// `acc = fma(other, g, acc * f)`.
pub fn scale_add(acc: &mut [f32], f: f32, other: &[f32], g: f32) {
    for i in 0..acc.len() {
        acc[i] = other[i].mul_add(g, acc[i] * f);
    }
}

/// Absmax quantisation of a token: the scale and the sum of the codes.
pub fn quantize_activations(x: &[f32], codes: &mut [i8]) -> (f32, i32) {
    let mut absmax = 1e-5f32;
    for &x in x {
        absmax = absmax.max(x.abs());
    }
    let scale = 127.0 / absmax;
    codes.fill(0);
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = (x * scale).round_ties_even().clamp(-128.0, 127.0) as i8; // a NaN casts to 0
    }
    (scale, codes.iter().map(|&c| i32::from(c)).sum())
}

/// Absmax quantisation of bfloat16 rows.
pub fn quantize_rows_int8(rows: &[u16], k: usize, codes: &mut [i8], scales: &mut [f32]) {
    for (r, scale) in scales.iter_mut().enumerate() {
        let mut absmax = 0.0f32;
        for &x in &rows[r * k..(r + 1) * k] {
            absmax = absmax.max(bf16_to_f32(x).abs());
        }
        *scale = absmax / 127.0;
        let inverse = if absmax > 0.0 { 127.0 / absmax } else { 0.0 };
        for i in r * k..(r + 1) * k {
            codes[i] = (bf16_to_f32(rows[i]) * inverse).round_ties_even().clamp(-128.0, 127.0) as i8;
        }
    }
}

/// Dot products of `queries` `[g][d]` with `rows` `[n][d]`, into `out` `[g][n]`.
pub fn scores_f32(queries: &[f32], rows: &[f32], d: usize, out: &mut [f32]) {
    let n = rows.len() / d;
    for (i, o) in out.iter_mut().enumerate() {
        let (h, t) = (i / n, i % n);
        *o = dot(&queries[h * d..(h + 1) * d], &rows[t * d..(t + 1) * d]);
    }
}

/// Bfloat16 rows `[n][d]`, woven: in each whole group of 32 the halves alternate.
pub fn weave(rows: &[u16], d: usize) -> Vec<u16> {
    let mut out = rows.to_vec();
    for (row, out) in rows.chunks(d).zip(out.chunks_mut(d)) {
        for (group, out) in row.chunks_exact(32).zip(out.chunks_exact_mut(32)) {
            for i in 0..16 {
                out[2 * i] = group[i];
                out[2 * i + 1] = group[16 + i];
            }
        }
    }
    out
}

/// [`scores_f32`] for bfloat16 rows (not woven).
pub fn scores_bf16(queries: &[f32], rows: &[u16], d: usize, out: &mut [f32]) {
    scores_f32(queries, &widen(rows), d, out);
}

/// Adds rows `[n][d]` weighted by `weights` `[g][n]` to `acc` `[g][d]`.
pub fn accumulate_f32(weights: &[f32], rows: &[f32], d: usize, acc: &mut [f32]) {
    let n = rows.len() / d;
    for h in 0..acc.len() / d {
        for t in 0..n {
            for j in 0..d {
                acc[h * d + j] = weights[h * n + t].mul_add(rows[t * d + j], acc[h * d + j]);
            }
        }
    }
}

/// [`accumulate_f32`] for bfloat16 rows (not woven).
pub fn accumulate_bf16(weights: &[f32], rows: &[u16], d: usize, acc: &mut [f32]) {
    accumulate_f32(weights, &widen(rows), d, acc);
}

/// The head in f32.
pub fn head_f32(rows: &[f32], x: &[f32], out: &mut [f32]) {
    scores_f32(x, rows, x.len(), out);
}

/// The head in bfloat16.
pub fn head_bf16(rows: &[u16], x: &[f32], out: &mut [f32]) {
    scores_f32(x, &widen(rows), x.len(), out);
}

/// The head in int8.
pub fn head_int8(rows: &[i8], scales: &[f32], x: &[f32], out: &mut [f32]) {
    let rows: Vec<f32> = rows.iter().map(|&c| f32::from(c)).collect();
    scores_f32(x, &rows, x.len(), out);
    for (o, s) in out.iter_mut().zip(scales) {
        *o *= s;
    }
}

fn widen(x: &[u16]) -> Vec<f32> {
    x.iter().map(|&x| bf16_to_f32(x)).collect()
}
