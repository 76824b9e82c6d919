//! Scores of rows of codes, number by number.

use crate::{QueryBits, Scales};

/// The elements of a query of [`crate::Kernels::quantize_queries`], and its step.
pub fn quantize_query(bits: QueryBits, x: &[f32]) -> (Vec<i32>, f32) {
    if x.iter().any(|x| !x.is_finite()) {
        return (vec![0; x.len()], f32::NAN);
    }
    let most = match bits {
        QueryBits::Sixteen => 32512.0f32,
        QueryBits::Eight => 127.0,
    };
    let largest = x.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    let factor = most / largest;
    (x.iter().map(|&x| (x * factor).round_ties_even() as i32).collect(), largest / most)
}

/// The score of one query of [`quantize_query`] against row `t`, whose codes are `row`.
pub fn code_score(v: &[i32], step: f32, row: &[i8], scales: Scales<'_>, t: usize) -> f32 {
    let dot = |from: usize, to: usize| -> f32 {
        let sum: i64 = (from..to.min(row.len())).map(|i| i64::from(row[i]) * i64::from(v[i])).sum();
        sum as f32 * step
    };
    match scales {
        Scales::One => dot(0, row.len()),
        Scales::Row(scales) => dot(0, row.len()) * scales[t],
        Scales::Block(scales) => {
            let blocks = row.len().div_ceil(32);
            let p =
                |b: usize| if b < blocks { dot(32 * b, 32 * b + 32) * scales[t * blocks + b] } else { 0.0 };
            let segment = |s: usize| (p(4 * s) + p(4 * s + 1)) + (p(4 * s + 2) + p(4 * s + 3));
            (1..row.len().div_ceil(128)).fold(segment(0), |sum, s| sum + segment(s))
        }
    }
}
