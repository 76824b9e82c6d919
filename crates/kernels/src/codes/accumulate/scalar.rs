//! Weighted sums in plain Rust: rows to bytes, then products of 32 bits.

use super::super::{CODE_BLOCK, CodeShape, Rows, Scales};
use super::prepare::round;
use super::{LARGEST, SMALLEST};

/// See [`super::Accumulate`].
pub(crate) fn accumulate(
    shape: CodeShape,
    weights: &[f32],
    rows: Rows<'_>,
    scales: Scales<'_>,
    acc: &mut [f32],
) {
    let (bytes, blocks) = (shape.row_bytes(), shape.blocks());
    let n = rows.codes.len() / bytes;
    let heads = weights.len() / n;
    let weight = |h: usize, t: usize, b: usize| match scales {
        Scales::One => weights[h * n + t],
        Scales::Row(scales) => weights[h * n + t] * scales[t],
        Scales::Block(scales) => weights[h * n + t] * scales[t * blocks + b],
    };
    let most = |x: &mut dyn Iterator<Item = f32>| x.fold(0.0, |m, x| if x.abs() > m { x.abs() } else { m });
    let largest: Vec<f32> = (0..heads * blocks)
        .map(|i| {
            let weight = most(&mut weights[i / blocks * n..][..n].iter().copied());
            let m = weight
                * match scales {
                    Scales::One => 1.0,
                    Scales::Row(scales) => most(&mut scales.iter().copied()),
                    Scales::Block(scales) => most(&mut scales[i % blocks..].iter().step_by(blocks).copied()),
                };
            if m > SMALLEST { m } else { SMALLEST }
        })
        .collect();
    let mut codes = vec![0i8; shape.dims];
    let mut sums = vec![0i32; heads * shape.dims];
    for t in 0..n {
        let plane = |x: &[u8]| t * bytes..x.len().min((t + 1) * bytes);
        let low = if rows.low.is_empty() { &[] } else { &rows.low[plane(rows.low)] };
        shape.unpack(Rows { codes: &rows.codes[plane(rows.codes)], low, ..rows }, &mut codes);
        for (h, sums) in sums.chunks_exact_mut(shape.dims).enumerate() {
            for (b, (sums, codes)) in sums.chunks_mut(CODE_BLOCK).zip(codes.chunks(CODE_BLOCK)).enumerate() {
                let q = round(weight(h, t, b), LARGEST / largest[h * blocks + b]);
                for (sum, &code) in sums.iter_mut().zip(codes) {
                    *sum = sum.wrapping_add(q * i32::from(code));
                }
            }
        }
    }
    for (i, (a, sum)) in acc.iter_mut().zip(sums).enumerate() {
        let m = largest[i / shape.dims * blocks + i % shape.dims / CODE_BLOCK];
        *a = (sum as f32).mul_add(m / LARGEST, *a);
    }
}
