//! Sums of stored rows, weighted for a group of query heads.
//!
//! Two heads at a time gather whole rows of up to 128 columns in registers, a few rows at a time; then the same rows,
//! from the first-level cache, are added to the next two heads. Where widening is dear, four heads gather half as many
//! columns, so that a number is widened once for all of them.

use super::ahead::{DISTANCE, Upcoming, unknown};
use crate::vector::{Element, F32x16, LANES};

/// Heads that meet a row at once, at most.
const HEADS: usize = 4;
/// Rows whose weights are scaled at a time.
const SCALED_ROWS: usize = 64;
static ONES: [f32; SCALED_ROWS] = [1.0; SCALED_ROWS];

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

/// Adds `n` weighted rows to `G` accumulators, over the last `columns` of `d`, at most [`LANES`].
///
/// # Safety
/// `weights` is readable at `h * stride + t` for `t < n`; `rows` are at the first of these columns of `n` rows of `d`, and
/// `out` of `G`.
#[inline(always)]
unsafe fn last_columns<V: F32x16, E: Element, const G: usize>(
    (weights, stride): (*const f32, usize),
    rows: *const E,
    (n, d): (usize, usize),
    columns: usize,
    out: *mut f32,
) {
    let mut acc = [V::splat(0.0); G];
    // As many rows may be read as whole vectors, with what follows them in further lanes, which nobody looks at.
    let followed = if (n - 1) * d + columns < LANES { 0 } else { ((n - 1) * d + columns - LANES) / d + 1 };
    // SAFETY: behind the first of the columns of row t lie (n - 1 - t) * d + columns elements: at least LANES for the
    // rows that are followed by enough; the caller vouches for the rest.
    unsafe {
        for h in 0..G {
            acc[h] = f32::load_n(out.add(h * d), columns);
        }
        for t in 0..n {
            let at = rows.add(t * d);
            let x = if t < followed { E::load::<V>(at) } else { E::load_n::<V>(at, columns) };
            for h in 0..G {
                acc[h] = V::splat(*weights.add(h * stride + t)).mul_add(x, acc[h]);
            }
        }
        for h in 0..G {
            crate::vector::store_tail(acc[h], std::slice::from_raw_parts_mut(out.add(h * d), columns));
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
        while V::WIDE && G <= 2 && j + 8 * LANES <= d {
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
            last_columns::<V, E, G>((weights, stride), rows.add(j), (n, d), columns, out.add(j));
            j += LANES;
        }
    }
}

/// Adds rows weighted by `weights`, each times its row's of `scales` if there are any, to `acc`.
#[inline(always)]
pub(super) fn accumulate<V: F32x16, E: Element>(
    weights: &[f32],
    scales: Option<&[f32]>,
    rows: &[E],
    d: usize,
    acc: &mut [f32],
    upcoming: &[E],
) {
    let (g, n) = (acc.len() / d, rows.len() / d);
    assert!(weights.len() >= g * n && rows.len() >= n * d && acc.len() >= g * d);
    assert!(scales.is_none_or(|scales| scales.len() >= n));
    let upcoming = Upcoming::of(upcoming);
    let row = d * size_of::<E>();
    let as_given = E::FACTOR == 1.0 && scales.is_none();
    let mut room = [0.0; HEADS * SCALED_ROWS];
    // So few that the stream of the first heads stops only for a moment while the others have their turn.
    let stop = if size_of::<E>() == 1 { 2 * DISTANCE } else { DISTANCE };
    let block = (stop / row).clamp(1, if as_given { DISTANCE } else { SCALED_ROWS });
    // With so few columns the sums of all heads fit.
    let heads = if d < 2 * LANES || V::WIDE && E::COSTLY { HEADS } else { 2 };
    for t in (0..n).step_by(block) {
        let some = block.min(n - t);
        let mut h = 0;
        // SAFETY: h < g, t + some <= n, and the lengths were checked above; the room has block weights of so many heads.
        unsafe {
            let rows = rows.as_ptr().add(t * d);
            upcoming.request::<V, E>(rows, (n - t) * row, some * row);
            while h < g {
                let out = acc.as_mut_ptr().add(h * d);
                let together = heads.min(g - h);
                let mut weights = (weights.as_ptr().add(h * n + t), n);
                if !as_given {
                    for i in 0..together {
                        let given = std::slice::from_raw_parts(weights.0.add(i * n), some);
                        let scaled = &mut room[i * SCALED_ROWS..i * SCALED_ROWS + some];
                        let scales = scales.map_or(&ONES[..some], |scales| &scales[t..t + some]);
                        for ((scaled, weight), scale) in scaled.iter_mut().zip(given).zip(scales) {
                            *scaled = weight * scale * E::FACTOR;
                        }
                    }
                    weights = (room.as_ptr(), SCALED_ROWS);
                }
                match together {
                    1 => accumulate_heads::<V, E, 1>(weights, rows, (some, d), out),
                    2 => accumulate_heads::<V, E, 2>(weights, rows, (some, d), out),
                    3 => accumulate_heads::<V, E, 3>(weights, rows, (some, d), out),
                    _ => accumulate_heads::<V, E, 4>(weights, rows, (some, d), out),
                }
                h += together;
            }
        }
    }
}
