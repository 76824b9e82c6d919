//! Dot products of a group of query heads with stored rows.
//!
//! With 32 wide registers and rows of 128, two heads of the group stay in sixteen registers while eight rows go by, one
//! after another; then the same rows, from the first-level cache, meet the next two heads. Other shapes read the queries
//! again for every row.

use super::ahead::{Upcoming, unknown};
use crate::vector::{Element, F32x16, LANES};
use std::mem::MaybeUninit;

/// Vectors of a row whose queries are kept in registers.
const KEPT: usize = 8;

/// The dot products of `G` queries with `N` rows, `G * N <= 16`, into `out[h * stride + r]`. With `FIXED`, `d` is [`KEPT`] vectors.
///
/// # Safety
/// `q` is readable for `G` heads of `d`, `rows` for `N * d` elements, and `out` is writable at those places.
#[inline(always)]
unsafe fn score_tile<V: F32x16, E: Element, const G: usize, const N: usize, const FIXED: bool>(
    q: *const f32,
    rows: *const E,
    d: usize,
    (out, stride): (*mut f32, usize),
) {
    let d = if FIXED { KEPT * LANES } else { d };
    let mut kept = [[V::splat(0.0); KEPT]; G];
    // In memory: the registers hold queries.
    let mut flat = [MaybeUninit::<V>::uninit(); 16];
    for sum in &mut flat[G * N..] {
        sum.write(V::splat(0.0));
    }
    // SAFETY: every range of columns ends at or before d; the caller vouches for d elements of each query and row, and
    // for the places in out. The loop writes the first G * N sums; the others were written before.
    unsafe {
        if FIXED {
            for h in 0..G {
                for c in 0..KEPT {
                    kept[h][c] = V::load(q.add(h * d + c * LANES));
                }
            }
        }
        let end = unknown(rows.add(N * d));
        let (mut row, mut to) = (rows, flat.as_mut_ptr().cast::<V>());
        while row < end {
            let mut acc = [V::splat(0.0); G];
            let mut j = 0;
            while j + 2 * LANES <= d {
                let [x, y] = E::load_two::<V>(row.add(j));
                for h in 0..G {
                    let q = q.add(h * d + j);
                    let a = if FIXED { kept[h][j / LANES] } else { V::load(q) };
                    let b = if FIXED { kept[h][j / LANES + 1] } else { V::load(q.add(LANES)) };
                    acc[h] = y.mul_add(b, x.mul_add(a, acc[h]));
                }
                j += 2 * LANES;
            }
            if !FIXED && j + LANES <= d {
                let x = E::load::<V>(row.add(j));
                for h in 0..G {
                    acc[h] = x.mul_add(V::load(q.add(h * d + j)), acc[h]);
                }
                j += LANES;
            }
            if !FIXED && j < d {
                let x = E::load_n::<V>(row.add(j), d - j);
                for h in 0..G {
                    acc[h] = x.mul_add(f32::load_n(q.add(h * d + j), d - j), acc[h]);
                }
            }
            for h in 0..G {
                *to.add(h * N) = acc[h];
            }
            (row, to) = (row.add(d), to.add(1));
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

/// [`score_tile`] for `g` heads, `N` rows and rows of [`KEPT`] vectors.
///
/// # Safety
/// As [`score_tile`].
#[inline(always)]
unsafe fn kept_tile<V: F32x16, E: Element>(
    (q, g): (*const f32, usize),
    rows: *const E,
    (out, stride): (*mut f32, usize),
) {
    const D: usize = KEPT * LANES;
    let mut h = 0;
    // SAFETY: h < g or h + 2 <= g; eight rows twice are those of the caller.
    unsafe {
        while h + 2 <= g {
            let (q, out) = (q.add(h * D), out.add(h * stride));
            score_tile::<V, E, 2, 8, true>(q, rows, D, (out, stride));
            h += 2;
        }
        if h < g {
            let (q, out) = (q.add(h * D), out.add(h * stride));
            score_tile::<V, E, 1, 8, true>(q, rows, D, (out, stride));
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
                1 => score_tile::<V, E, 1, N, false>(q, rows, d, to),
                2 => score_tile::<V, E, 2, N, false>(q, rows, d, to),
                3 => score_tile::<V, E, 3, N, false>(q, rows, d, to),
                _ => score_tile::<V, E, 4, N, false>(q, rows, d, to),
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
    let (q, row) = ((queries.as_ptr(), g), d * size_of::<E>());
    let mut t = 0;
    // SAFETY: the rows t.. of a tile are within n, and the lengths were checked above.
    unsafe {
        while t < n {
            let fixed = V::WIDE && d == KEPT * LANES && t + 8 <= n;
            let some = if fixed {
                8
            } else if V::WIDE && t + 4 <= n {
                4
            } else {
                1
            };
            let here = rows.as_ptr().add(t * d);
            let out = (out.as_mut_ptr().add(t), n);
            upcoming.request::<V, E>(here, (n - t) * row, some * row);
            if fixed {
                kept_tile::<V, E>(q, here, out);
            } else if some == 4 {
                any_tile::<V, E, 4>(q, here, d, out);
            } else {
                any_tile::<V, E, 1>(q, here, d, out);
            }
            t += some;
        }
    }
}
