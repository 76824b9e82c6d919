//! Dot products of a group of query heads with stored rows.
//!
//! With 32 wide registers and rows of 128, four heads meet a row at once: the queries of two stay in sixteen registers,
//! those of the others are read again for every row. Other shapes read all queries again.

use super::ahead::{Upcoming, unknown};
use crate::vector::{Element, F32x16, LANES};
use std::mem::MaybeUninit;

/// Vectors of a row whose queries are kept in registers.
const KEPT: usize = 8;
/// Heads whose queries are kept.
const KEPT_HEADS: usize = 2;
/// Rows that more than four heads go through in turn: 4 KiB of bfloat16.
const ROW_BLOCK: usize = 16;

/// Queries of four heads, so that no vector of them lies in two cache lines.
#[repr(align(64))]
struct Queries([MaybeUninit<f32>; 4 * KEPT * LANES]);

/// Multiplies by the factor of the element, if it has one.
#[inline(always)]
fn factored<V: F32x16, E: Element>(x: V) -> V {
    if E::FACTOR == 1.0 { x } else { x.mul(V::splat(E::FACTOR)) }
}

/// The dot products of `G` queries with `N` rows, `G * N <= 16`, into `out[h * stride + r]`. With `FIXED`, `d` is [`KEPT`] vectors,
/// and the queries are multiplied by the factor of the element. `P` rows, which divides `N`, are read side by side.
///
/// # Safety
/// `q` is readable for `G` heads of `d`, `rows` for `N * d` elements, and `out` is writable at those places.
#[inline(always)]
unsafe fn score_tile<
    V: F32x16,
    E: Element,
    const G: usize,
    const N: usize,
    const P: usize,
    const FIXED: bool,
>(
    q: *const f32,
    rows: *const E,
    d: usize,
    (out, stride): (*mut f32, usize),
) {
    let d = if FIXED { KEPT * LANES } else { d };
    let mut kept = [[V::splat(0.0); KEPT]; KEPT_HEADS];
    // In memory: the registers hold queries.
    let mut flat = [MaybeUninit::<V>::uninit(); 16];
    for sum in &mut flat[G * N..] {
        sum.write(V::splat(0.0));
    }
    // SAFETY: every range of columns ends at or before d; the caller vouches for d elements of each query and row, and
    // for the places in out. The loop writes the first G * N sums; the others were written before.
    unsafe {
        if FIXED {
            for h in 0..G.min(KEPT_HEADS) {
                for c in 0..KEPT {
                    kept[h][c] = V::load(q.add(h * d + c * LANES));
                }
            }
        }
        let end = unknown(rows.add(N * d));
        let (mut row, mut to) = (rows, flat.as_mut_ptr().cast::<V>());
        while row < end {
            let mut acc = [[V::splat(0.0); G]; P];
            let mut j = 0;
            while j + 2 * LANES <= d {
                let mut x = [[V::splat(0.0); 2]; P];
                for p in 0..P {
                    x[p] = E::load_two::<V>(row.add(p * d + j));
                    if !FIXED {
                        x[p] = [factored::<V, E>(x[p][0]), factored::<V, E>(x[p][1])];
                    }
                }
                for h in 0..G {
                    let q = q.add(h * d + j);
                    let keep = FIXED && h < KEPT_HEADS;
                    let a = if keep { kept[h][j / LANES] } else { V::load(q) };
                    let b = if keep { kept[h][j / LANES + 1] } else { V::load(q.add(LANES)) };
                    for p in 0..P {
                        acc[p][h] = x[p][1].mul_add(b, x[p][0].mul_add(a, acc[p][h]));
                    }
                }
                j += 2 * LANES;
            }
            if !FIXED && j + LANES <= d {
                for p in 0..P {
                    let x = factored::<V, E>(E::load(row.add(p * d + j)));
                    for h in 0..G {
                        acc[p][h] = x.mul_add(V::load(q.add(h * d + j)), acc[p][h]);
                    }
                }
                j += LANES;
            }
            if !FIXED && j < d {
                for p in 0..P {
                    let x = factored::<V, E>(E::load_n(row.add(p * d + j), d - j));
                    for h in 0..G {
                        acc[p][h] = x.mul_add(f32::load_n(q.add(h * d + j), d - j), acc[p][h]);
                    }
                }
            }
            for p in 0..P {
                for h in 0..G {
                    *to.add(h * N + p) = acc[p][h];
                }
            }
            (row, to) = (row.add(P * d), to.add(P));
        }
        let flat = flat.as_ptr().cast::<[V; 16]>().read();
        let mut sums = [0.0; 16];
        if V::WIDE && G * N > 8 {
            sums = V::sum16(flat);
        } else {
            for i in 0..(G * N).div_ceil(4) {
                let four = V::sum4([flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3]]);
                sums[4 * i..4 * i + 4].copy_from_slice(&four);
            }
        }
        for h in 0..G {
            std::ptr::copy_nonoverlapping(sums.as_ptr().add(h * N), out.add(h * stride), N);
        }
    }
}

/// Scores of `n` rows of [`KEPT`] vectors against `g` heads, at most four.
///
/// # Safety
/// As [`score_tile`], for `n` rows.
#[inline(always)]
unsafe fn kept_rows<V: F32x16, E: Element, const G: usize, const N: usize>(
    queries: *const f32,
    (rows, n): (*const E, usize),
    (out, stride): (*mut f32, usize),
    upcoming: &Upcoming,
) {
    const D: usize = KEPT * LANES;
    let row = D * size_of::<E>();
    let mut room = Queries([MaybeUninit::uninit(); 4 * D]);
    let q = room.0.as_mut_ptr().cast::<f32>();
    let mut t = 0;
    // SAFETY: G heads fit the room; the rows t.. of a tile are within n.
    unsafe {
        for i in 0..G * KEPT {
            factored::<V, E>(V::load(queries.add(i * LANES))).store(q.add(i * LANES));
        }
        while t + N <= n {
            let here = rows.add(t * D);
            upcoming.request::<V, E>(here, (n - t) * row, N * row);
            if E::COSTLY && size_of::<E>() == 1 {
                score_tile::<V, E, G, N, 2, true>(q, here, D, (out.add(t), stride));
            } else {
                score_tile::<V, E, G, N, 1, true>(q, here, D, (out.add(t), stride));
            }
            t += N;
        }
        while t < n {
            score_tile::<V, E, G, 1, 1, true>(q, rows.add(t * D), D, (out.add(t), stride));
            t += 1;
        }
    }
}

/// [`score_tile`] for `g` heads of any dimension and `N` rows.
///
/// # Safety
/// As [`score_tile`].
#[inline(always)]
unsafe fn any_tile<V: F32x16, E: Element, const N: usize>(
    (q, g): (*const f32, usize),
    rows: *const E,
    d: usize,
    (out, stride): (*mut f32, usize),
) {
    let mut h = 0;
    // SAFETY: the heads h.. are within g.
    unsafe {
        while h < g {
            let (q, to) = (q.add(h * d), (out.add(h * stride), stride));
            match g - h {
                1 => score_tile::<V, E, 1, N, 1, false>(q, rows, d, to),
                2 => score_tile::<V, E, 2, N, 1, false>(q, rows, d, to),
                3 => score_tile::<V, E, 3, N, 1, false>(q, rows, d, to),
                _ => score_tile::<V, E, 4, N, 1, false>(q, rows, d, to),
            }
            h += 4;
        }
    }
}

#[inline(always)]
pub(super) fn scores<V: F32x16, E: Element>(
    queries: &[f32],
    rows: &[E],
    d: usize,
    out: &mut [f32],
    upcoming: &[E],
) {
    let (g, n) = (queries.len() / d, rows.len() / d);
    assert!(queries.len() >= g * d && rows.len() >= n * d && out.len() >= g * n);
    let upcoming = Upcoming::of(upcoming);
    let row = d * size_of::<E>();
    let (q, rows, out) = (queries.as_ptr(), rows.as_ptr(), out.as_mut_ptr());
    let fixed = V::WIDE && d == KEPT * LANES;
    // More than four heads take turns for every few rows, so that a row is read from memory once.
    let block = if fixed && g > 4 { ROW_BLOCK } else { n.max(1) };
    // SAFETY: heads and rows are within g and n, and the lengths were checked above.
    unsafe {
        for t in (0..n).step_by(block) {
            let some = block.min(n - t);
            let here = (rows.add(t * d), some);
            let mut h = 0;
            while fixed && h < g {
                let (q, out) = (q.add(h * d), (out.add(h * n + t), n));
                let last = t + some == n;
                let next = if last { upcoming } else { Upcoming::none() };
                match g - h {
                    1 => kept_rows::<V, E, 1, 8>(q, here, out, &next),
                    2 => kept_rows::<V, E, 2, 8>(q, here, out, &next),
                    3 => kept_rows::<V, E, 3, 4>(q, here, out, &next),
                    _ => kept_rows::<V, E, 4, 4>(q, here, out, &next),
                }
                h += 4;
            }
        }
        let mut t = 0;
        while !fixed && t < n {
            let some = if V::WIDE && t + 4 <= n { 4 } else { 1 };
            let (here, out) = (rows.add(t * d), (out.add(t), n));
            upcoming.request::<V, E>(here, (n - t) * row, some * row);
            if some == 4 {
                any_tile::<V, E, 4>((q, g), here, d, out);
            } else {
                any_tile::<V, E, 1>((q, g), here, d, out);
            }
            t += some;
        }
    }
}
