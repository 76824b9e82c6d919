//! Sums of stored rows, weighted for a group of query heads.
//!
//! Two heads at a time gather whole rows of up to 128 columns in registers, a few rows at a time; then the same rows,
//! from the first-level cache, are added to the next two heads.

use super::ahead::{DISTANCE, Upcoming, unknown};
use crate::vector::{Element, F32x16, LANES};

/// Adds `n` weighted rows to `G` accumulators, over `C` pairs of vectors.
///
/// # Safety
/// `weights` is readable at `h * stride + t` for `t < n`; rows and accumulators have those columns at a pitch of `d`.
#[inline(always)]
unsafe fn accumulate_tile<V: F32x16, E: Element, const G: usize, const C: usize>(
    (weights, stride): (*const f32, usize),
    rows: *const E,
    (n, d): (usize, usize),
    out: *mut f32,
) {
    const TWO: usize = 2 * LANES;
    let mut acc = [[[V::splat(0.0); 2]; C]; G];
    // SAFETY: the caller vouches for every place.
    unsafe {
        for h in 0..G {
            for c in 0..C {
                let from = out.add(h * d + c * TWO);
                acc[h][c] = [V::load(from), V::load(from.add(LANES))];
            }
        }
        let end = unknown(rows.add(n * d));
        let (mut row, mut weight) = (rows, weights);
        while row < end {
            let mut w = [V::splat(0.0); G];
            for h in 0..G {
                w[h] = V::splat(*weight.add(h * stride));
            }
            for c in 0..C {
                let [x, y] = E::load_two::<V>(row.add(c * TWO));
                for h in 0..G {
                    let [a, b] = acc[h][c];
                    acc[h][c] = [w[h].mul_add(x, a), w[h].mul_add(y, b)];
                }
            }
            (row, weight) = (row.add(d), weight.add(1));
        }
        for h in 0..G {
            for c in 0..C {
                let to = out.add(h * d + c * TWO);
                acc[h][c][0].store(to);
                acc[h][c][1].store(to.add(LANES));
            }
        }
    }
}

/// [`accumulate_tile`] over all columns of `G` heads.
///
/// # Safety
/// `weights` is readable at `h * stride + t` for `t < n`, `rows` for `n * d`, `out` is writable for `G * d` elements.
#[inline(always)]
unsafe fn accumulate_heads<V: F32x16, E: Element, const G: usize>(
    (weights, stride): (*const f32, usize),
    rows: *const E,
    (n, d): (usize, usize),
    out: *mut f32,
) {
    // SAFETY: the columns j.. of each part end at or before d; the caller vouches for the rest.
    unsafe {
        let mut j = 0;
        while V::WIDE && j + 8 * LANES <= d {
            accumulate_tile::<V, E, G, 4>((weights, stride), rows.add(j), (n, d), out.add(j));
            j += 8 * LANES;
        }
        while V::WIDE && j + 4 * LANES <= d {
            accumulate_tile::<V, E, G, 2>((weights, stride), rows.add(j), (n, d), out.add(j));
            j += 4 * LANES;
        }
        while j + 2 * LANES <= d {
            accumulate_tile::<V, E, G, 1>((weights, stride), rows.add(j), (n, d), out.add(j));
            j += 2 * LANES;
        }
        while j < d {
            let columns = LANES.min(d - j);
            for h in 0..G {
                let out = std::slice::from_raw_parts_mut(out.add(h * d + j), columns);
                let mut acc = crate::vector::load_tail::<V>(out, 0.0);
                for t in 0..n {
                    let at = rows.add(t * d + j);
                    let x = if columns == LANES { E::load::<V>(at) } else { E::load_n::<V>(at, columns) };
                    acc = V::splat(*weights.add(h * stride + t)).mul_add(x, acc);
                }
                crate::vector::store_tail(acc, out);
            }
            j += LANES;
        }
    }
}

#[inline(always)]
pub(super) fn accumulate<V: F32x16, E: Element>(
    weights: &[f32],
    rows: &[E],
    d: usize,
    acc: &mut [f32],
    upcoming: &[E],
) {
    let (g, n) = (acc.len() / d, rows.len() / d);
    assert!(weights.len() >= g * n && rows.len() >= n * d && acc.len() >= g * d);
    let upcoming = Upcoming::of(upcoming);
    let row = d * size_of::<E>();
    // So few that the stream of the first two heads stops only for a moment while the others have their turn.
    let block = (DISTANCE / row).max(1);
    for t in (0..n).step_by(block) {
        let some = block.min(n - t);
        let mut h = 0;
        // SAFETY: h < g, t + some <= n, and the lengths were checked above.
        unsafe {
            let rows = rows.as_ptr().add(t * d);
            upcoming.request::<V, E>(rows, (n - t) * row, some * row);
            while h < g {
                let weights = (weights.as_ptr().add(h * n + t), n);
                let out = acc.as_mut_ptr().add(h * d);
                if g - h == 1 {
                    accumulate_heads::<V, E, 1>(weights, rows, (some, d), out);
                } else {
                    accumulate_heads::<V, E, 2>(weights, rows, (some, d), out);
                }
                h += 2;
            }
        }
    }
}
