//! The two halves of attention over stored rows: scores of a group of query heads, and the weighted sum of values.
//!
//! The heads of a group are processed together, so that a row is read and widened once for up to four of them; rows
//! are taken in blocks that stay in the first-level cache while the rest of the work on them is done.

use crate::Kernels;
use crate::vector::{Element, F32x16, LANES};
use std::mem::MaybeUninit;

/// Rows per block: 64 rows of 128 bfloat16 are 16 KiB.
const ROW_BLOCK: usize = 64;

/// Bytes by which requests run ahead of the reading, at least.
const AHEAD_BYTES: usize = 2048;

/// What is read after these rows, for as many rows as it has, beside the row at hand.
pub(crate) struct Upcoming<E>(*const E, usize);

impl<E> Clone for Upcoming<E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Upcoming<E> {}

impl<E> Upcoming<E> {
    #[inline(always)]
    pub(crate) fn of(rows: &[E], d: usize) -> Self {
        Upcoming(rows.as_ptr(), rows.len() / d)
    }

    /// From `t` rows on.
    #[inline(always)]
    fn skip(self, t: usize, d: usize) -> Self {
        Upcoming(self.0.wrapping_add(t * d), self.1.saturating_sub(t))
    }

    /// The rows to request while `count` rows at `here` are read, of the `n` that are left: those that are read after
    /// all of these, so that memory works while scores turn into weights; without any, some rows further on; at the end
    /// those at hand, which costs nothing: what lies behind the last row may never be read.
    #[inline(always)]
    fn ahead(self, here: *const E, d: usize, n: usize, count: usize) -> *const E {
        if self.1 >= count {
            return self.0;
        }
        let rows = AHEAD_BYTES.div_ceil(d * size_of::<E>()) + 4;
        here.wrapping_add(if rows + 4 <= n { rows * d } else { 0 })
    }
}

/// Query values that [`Queries`] has room for: four heads of dimension 256.
const PREPARED: usize = 1024;

/// Queries brought into the order of the rows' lanes, aligned, and padded to whole lanes.
#[repr(align(64))]
struct Queries([MaybeUninit<f32>; PREPARED]);

impl Queries {
    /// Copies `g` heads of dimension `d`, at a pitch of `d` rounded up to 16.
    ///
    /// # Safety
    /// `q` is readable for `g * d` elements, and the padded heads are at most [`PREPARED`] elements.
    #[inline(always)]
    unsafe fn fill<V: F32x16, E: Element>(&mut self, q: *const f32, g: usize, d: usize) {
        let to = self.0.as_mut_ptr().cast::<f32>();
        let pitch = d.next_multiple_of(LANES);
        // SAFETY: h < g, and j + 16 <= d or the tail ends at d; the copy ends at g * pitch <= PREPARED.
        unsafe {
            for h in 0..g {
                let mut j = 0;
                while j < d {
                    let v = if j + LANES <= d {
                        V::load(q.add(h * d + j))
                    } else {
                        f32::load_n(q.add(h * d + j), d - j)
                    };
                    E::reorder(v).store(to.add(h * pitch + j));
                    j += LANES;
                }
            }
        }
    }
}

/// Queries as the caller has them.
pub(crate) const PLAIN: u8 = 0;
/// Queries from [`Queries`].
const READY: u8 = 1;

/// The dot products of `G` queries with `N` rows, `G * N <= 16`, into `out[h * stride + r]`. A head of dimension `d`
/// begins every `pitch`. `MODE` is [`PLAIN`] or [`READY`]. `ahead` are the
/// rows to request meanwhile. Without `TAIL`, `d` must be a multiple of 16:
/// then the accumulators go from the loop to the sum without leaving their registers.
///
/// # Safety
/// `q` is readable for `G` heads, `rows` for `N * d` elements, and `out` is writable at those places.
#[inline(always)]
unsafe fn score_tile<V, E, const G: usize, const N: usize, const MODE: u8, const TAIL: bool>(
    q: *const f32,
    (rows, ahead): (*const E, *const E),
    d: usize,
    out: *mut f32,
    stride: usize,
) where
    V: F32x16,
    E: Element,
{
    let pitch = if MODE == READY { d.next_multiple_of(LANES) } else { d };
    let mut acc = [[V::splat(0.0); N]; G];
    // SAFETY: j + 16 <= d, or the tail ends at d; the caller vouches for d elements of each query and row, for the
    // padding of prepared queries, and for the places in out.
    unsafe {
        let mut j = 0;
        while j + LANES <= d {
            let mut x = [V::splat(0.0); N];
            for r in 0..N {
                x[r] = E::load::<V>(rows.add(r * d + j));
                V::prefetch(ahead.wrapping_add(r * d + j).cast());
            }
            for h in 0..G {
                let q = V::load(q.add(h * pitch + j));
                let q = if MODE == READY { q } else { E::reorder(q) };
                for r in 0..N {
                    acc[h][r] = x[r].mul_add(q, acc[h][r]);
                }
            }
            j += LANES;
        }
        if TAIL && j < d {
            for r in 0..N {
                let x = E::load_n::<V>(rows.add(r * d + j), d - j);
                for h in 0..G {
                    let q = q.add(h * pitch + j);
                    let q = if MODE == READY { V::load(q) } else { E::reorder(f32::load_n(q, d - j)) };
                    acc[h][r] = x.mul_add(q, acc[h][r]);
                }
            }
        }
        let mut flat = [V::splat(0.0); 16];
        for h in 0..G {
            for r in 0..N {
                flat[h * N + r] = acc[h][r];
            }
        }
        let mut sums = [0.0; 16];
        if V::WIDE && G * N > 8 {
            sums = E::sum16(flat);
        } else {
            for i in 0..(G * N).div_ceil(4) {
                let four = E::sum4([flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3]]);
                sums[4 * i..4 * i + 4].copy_from_slice(&four);
            }
        }
        for h in 0..G {
            std::ptr::copy_nonoverlapping(sums.as_ptr().add(h * N), out.add(h * stride), N);
        }
    }
}

/// Scores of `G` heads against `n` rows, `N` rows at a time.
///
/// # Safety
/// As [`score_tile`], for `n` rows.
#[inline(always)]
pub(crate) unsafe fn score_rows<V, E, const G: usize, const N: usize, const MODE: u8>(
    q: *const f32,
    rows: *const E,
    n: usize,
    d: usize,
    out: *mut f32,
    stride: usize,
    upcoming: Upcoming<E>,
) where
    V: F32x16,
    E: Element,
{
    // SAFETY: t + N <= n, or t < n; the caller vouches for n rows.
    unsafe {
        let mut t = 0;
        if d.is_multiple_of(LANES) {
            while t + N <= n {
                let here = rows.add(t * d);
                score_tile::<V, E, G, N, MODE, false>(
                    q,
                    (here, upcoming.skip(t, d).ahead(here, d, n - t, N)),
                    d,
                    out.add(t),
                    stride,
                );
                t += N;
            }
        }
        while t < n {
            let here = rows.add(t * d);
            score_tile::<V, E, G, 1, MODE, true>(q, (here, here), d, out.add(t), stride);
            t += 1;
        }
    }
}

/// Picks the tile for up to four heads.
///
/// # Safety
/// As [`score_rows`], for the lesser of `g` and 4 heads.
#[inline(always)]
unsafe fn score_heads<V: F32x16, E: Element, const MODE: u8>(
    g: usize,
    q: *const f32,
    rows: *const E,
    (n, d): (usize, usize),
    (out, stride): (*mut f32, usize),
    upcoming: Upcoming<E>,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match (g, V::WIDE) {
            (1, true) => score_rows::<V, E, 1, 8, MODE>(q, rows, n, d, out, stride, upcoming),
            (1, false) => score_rows::<V, E, 1, 4, MODE>(q, rows, n, d, out, stride, upcoming),
            (2, true) => score_rows::<V, E, 2, 4, MODE>(q, rows, n, d, out, stride, upcoming),
            (2, false) => score_rows::<V, E, 2, 2, MODE>(q, rows, n, d, out, stride, upcoming),
            (3, true) => score_rows::<V, E, 3, 4, MODE>(q, rows, n, d, out, stride, upcoming),
            (3, false) => score_rows::<V, E, 3, 1, MODE>(q, rows, n, d, out, stride, upcoming),
            (_, true) => score_rows::<V, E, 4, 4, MODE>(q, rows, n, d, out, stride, upcoming),
            (_, false) => score_rows::<V, E, 4, 1, MODE>(q, rows, n, d, out, stride, upcoming),
        }
    }
}

#[inline(always)]
fn scores<V: F32x16, E: Element>(queries: &[f32], rows: &[E], d: usize, out: &mut [f32], upcoming: &[E]) {
    let (g, n) = (queries.len() / d, rows.len() / d);
    assert!(queries.len() >= g * d && rows.len() >= n * d && out.len() >= g * n);
    let mut room = Queries([MaybeUninit::uninit(); PREPARED]);
    // Eight heads alternate between two groups for every block, so that a block is read from memory once.
    let mut prepared = usize::MAX;
    for t in (0..n).step_by(ROW_BLOCK) {
        let block = ROW_BLOCK.min(n - t);
        let mut h = 0;
        while h < g {
            let heads = 4.min(g - h);
            // SAFETY: h < g, t + block <= n, and the lengths were checked above; the heads are prepared where they fit.
            unsafe {
                let q = queries.as_ptr().add(h * d);
                let rows = rows.as_ptr().add(t * d);
                let out = out.as_mut_ptr().add(h * n + t);
                let upcoming = Upcoming::of(upcoming, d).skip(t, d);
                if heads * d.next_multiple_of(LANES) <= PREPARED {
                    if prepared != h {
                        room.fill::<V, E>(q, heads, d);
                        prepared = h;
                    }
                    let q = room.0.as_ptr().cast();
                    score_heads::<V, E, READY>(heads, q, rows, (block, d), (out, n), upcoming);
                } else {
                    score_heads::<V, E, PLAIN>(heads, q, rows, (block, d), (out, n), upcoming);
                }
            }
            h += 4;
        }
    }
}

/// Adds `n` weighted rows to `G` accumulators, over `C * 16` columns.
///
/// # Safety
/// `weights` is readable at `h * stride + t` for `t < n`; rows and accumulators have those columns at a pitch of `d`.
#[inline(always)]
unsafe fn accumulate_tile<V: F32x16, E: Element, const G: usize, const C: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const E,
    (n, d): (usize, usize),
    out: *mut f32,
    upcoming: Upcoming<E>,
) {
    let mut acc = [[V::splat(0.0); C]; G];
    // SAFETY: the caller vouches for every place.
    unsafe {
        for h in 0..G {
            for c in 0..C {
                acc[h][c] = E::reorder(V::load(out.add(h * d + c * LANES)));
            }
        }
        for t in 0..n {
            let row = rows.add(t * d);
            let next = upcoming.skip(t, d).ahead(row, d, n - t, 1);
            let mut x = [V::splat(0.0); C];
            for c in 0..C {
                x[c] = E::load::<V>(row.add(c * LANES));
                V::prefetch(next.wrapping_add(c * LANES).cast());
            }
            for h in 0..G {
                let w = V::splat(*weights.add(h * stride + t));
                for c in 0..C {
                    acc[h][c] = w.mul_add(x[c], acc[h][c]);
                }
            }
        }
        for h in 0..G {
            for c in 0..C {
                E::reorder(acc[h][c]).store(out.add(h * d + c * LANES));
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
    weights: *const f32,
    stride: usize,
    rows: *const E,
    (n, d): (usize, usize),
    out: *mut f32,
    upcoming: Upcoming<E>,
) {
    // SAFETY: the columns j.. of each part end at or before d; the caller vouches for the rest.
    unsafe {
        let mut j = 0;
        while V::WIDE && j + 4 * LANES <= d {
            let upcoming = Upcoming(upcoming.0.wrapping_add(j), upcoming.1);
            accumulate_tile::<V, E, G, 4>(weights, stride, rows.add(j), (n, d), out.add(j), upcoming);
            j += 4 * LANES;
        }
        while j + LANES <= d {
            let upcoming = Upcoming(upcoming.0.wrapping_add(j), upcoming.1);
            accumulate_tile::<V, E, G, 1>(weights, stride, rows.add(j), (n, d), out.add(j), upcoming);
            j += LANES;
        }
        if j < d {
            for h in 0..G {
                let out = std::slice::from_raw_parts_mut(out.add(h * d + j), d - j);
                let mut acc = E::reorder(crate::vector::load_tail::<V>(out, 0.0));
                for t in 0..n {
                    let x = E::load_n::<V>(rows.add(t * d + j), d - j);
                    acc = V::splat(*weights.add(h * stride + t)).mul_add(x, acc);
                }
                crate::vector::store_tail(E::reorder(acc), out);
            }
        }
    }
}

#[inline(always)]
fn accumulate<V: F32x16, E: Element>(weights: &[f32], rows: &[E], d: usize, acc: &mut [f32], upcoming: &[E]) {
    let (g, n) = (acc.len() / d, rows.len() / d);
    assert!(weights.len() >= g * n && rows.len() >= n * d && acc.len() >= g * d);
    for t in (0..n).step_by(ROW_BLOCK) {
        let block = ROW_BLOCK.min(n - t);
        let mut h = 0;
        while h < g {
            // SAFETY: h < g, t + block <= n, and the lengths were checked above.
            unsafe {
                let weights = weights.as_ptr().add(h * n + t);
                let rows = rows.as_ptr().add(t * d);
                let out = acc.as_mut_ptr().add(h * d);
                let upcoming = Upcoming::of(upcoming, d).skip(t, d);
                match g - h {
                    1 => accumulate_heads::<V, E, 1>(weights, n, rows, (block, d), out, upcoming),
                    2 => accumulate_heads::<V, E, 2>(weights, n, rows, (block, d), out, upcoming),
                    3 => accumulate_heads::<V, E, 3>(weights, n, rows, (block, d), out, upcoming),
                    _ => accumulate_heads::<V, E, 4>(weights, n, rows, (block, d), out, upcoming),
                }
            }
            h += 4;
        }
    }
}

#[inline(always)]
pub(crate) fn scores_f32<V: F32x16>(
    queries: &[f32],
    rows: &[f32],
    d: usize,
    out: &mut [f32],
    upcoming: &[f32],
) {
    scores::<V, f32>(queries, rows, d, out, upcoming);
}

#[inline(always)]
pub(crate) fn scores_bf16<V: F32x16>(
    queries: &[f32],
    rows: &[u16],
    d: usize,
    out: &mut [f32],
    upcoming: &[u16],
) {
    scores::<V, u16>(queries, rows, d, out, upcoming);
}

#[inline(always)]
pub(crate) fn accumulate_f32<V: F32x16>(
    weights: &[f32],
    rows: &[f32],
    d: usize,
    acc: &mut [f32],
    upcoming: &[f32],
) {
    accumulate::<V, f32>(weights, rows, d, acc, upcoming);
}

#[inline(always)]
pub(crate) fn accumulate_bf16<V: F32x16>(
    weights: &[f32],
    rows: &[u16],
    d: usize,
    acc: &mut [f32],
    upcoming: &[u16],
) {
    accumulate::<V, u16>(weights, rows, d, acc, upcoming);
}

/// Checks `heads` `[g][d]`, `rows` `[n][d]` and `pairs` `[g][n]`.
fn check(op: &str, heads: usize, rows: usize, d: usize, pairs: usize) {
    assert!(d > 0, "{op}: a head dimension of 0");
    assert!(heads.is_multiple_of(d), "{op}: {heads} values of heads of dimension {d}");
    assert!(rows.is_multiple_of(d), "{op}: {rows} values of rows of dimension {d}");
    assert_eq!(pairs, heads / d * (rows / d), "{op}: the (head, row) pairs");
}

impl Kernels {
    /// Plain dot products of `g` query heads with `n` rows: `queries` `[g][d]`, `rows` `[n][d]`, `out` `[g][n]`. Each in
    /// the 16-lane semantics. The caller has scaled the queries. Any `g`; four at a time share the reading of a row.
    /// `upcoming` are rows that will be read next (none is fine): they are requested from memory meanwhile, which
    /// changes no result.
    pub fn scores_f32(&self, queries: &[f32], rows: &[f32], d: usize, out: &mut [f32], upcoming: &[f32]) {
        check("scores_f32", queries.len(), rows.len(), d, out.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.scores_f32)(queries, rows, d, out, upcoming) }
    }

    /// [`Kernels::scores_f32`] for rows of bfloat16 bits.
    pub fn scores_bf16(&self, queries: &[f32], rows: &[u16], d: usize, out: &mut [f32], upcoming: &[u16]) {
        check("scores_bf16", queries.len(), rows.len(), d, out.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.scores_bf16)(queries, rows, d, out, upcoming) }
    }

    /// Adds weighted rows: `acc[h][j] = fma(weights[h][t], rows[t][j], acc[h][j])` for ascending `t`. `weights`
    /// `[g][n]`, `rows` `[n][d]`, `acc` `[g][d]`, which is added to; `upcoming` as for [`Kernels::scores_f32`].
    pub fn accumulate_f32(&self, weights: &[f32], rows: &[f32], d: usize, acc: &mut [f32], upcoming: &[f32]) {
        check("accumulate_f32", acc.len(), rows.len(), d, weights.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.accumulate_f32)(weights, rows, d, acc, upcoming) }
    }

    /// [`Kernels::accumulate_f32`] for rows of bfloat16 bits.
    pub fn accumulate_bf16(
        &self,
        weights: &[f32],
        rows: &[u16],
        d: usize,
        acc: &mut [f32],
        upcoming: &[u16],
    ) {
        check("accumulate_bf16", acc.len(), rows.len(), d, weights.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.accumulate_bf16)(weights, rows, d, acc, upcoming) }
    }
}
