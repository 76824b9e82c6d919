//! The driver of one instruction set of pairs: heads by fours, segments, stretches of rows, passes.

use super::super::ahead::LINE;
use super::super::{CodeBits, CodeShape, Rows, SEGMENT, Scales};
use super::finish::finish;
use super::lanes::{BARE, EIGHT, FOUR, HEADS, Lanes, PLANES, THREE, TWO, format_of};
use super::prepare::{Factors, Prepare, Weights};
use std::mem::MaybeUninit;

/// Rows of a stretch: with their weights they stay in a first-level cache from one pass to the next.
pub(super) const STRETCH: usize = 128;

/// Rows that are widened at a time.
const WIDENED: usize = 64;

/// Where the codes of a segment of a stretch lie.
#[derive(Clone, Copy)]
struct Source {
    row: *const u8,
    low: *const u8,
    /// Bytes from one row to the next.
    stride: usize,
    /// Rows, at least one.
    n: usize,
    /// The rows of the next stretch, to be requested; null if they are not known.
    later: *const u8,
}

/// Sums of `H` heads: the only ones, or those of the upper plane and those of the lower.
struct Sums<V, const H: usize> {
    upper: [[V; 4]; H],
    lower: [[V; 4]; H],
}

/// Where the sums of all passes over a segment go.
#[derive(Clone, Copy)]
struct Place {
    /// `[head][SEGMENT]`, of as many heads as a pass has.
    sums: *mut [i32; SEGMENT],
    /// There are none yet.
    first: bool,
}

/// How the weights of a pass lie.
const ROWS: u8 = 0;
const BLOCKS: u8 = 1;
const THIRDS: u8 = 2;

/// Adds four rows, at the offsets `at`, to the sums of a pass.
///
/// # Safety
/// As [`pass`]; the rows are there, and `weights` has those of group `g`.
#[inline(always)]
unsafe fn group<V: Lanes, const FORMAT: u8, const H: usize, const WEIGHTS: u8, const SINGLE: bool>(
    source: &Source,
    at: [usize; 4],
    table: V,
    weights: *const i16,
    (g, pass): (usize, usize),
    acc: &mut Sums<V, H>,
) {
    // The even bytes of a word become the first pair: the second row stands third.
    let at = [at[0], at[2], at[1], at[3]];
    let (rows, low) = (at.map(|at| source.row.wrapping_add(at)), at.map(|at| source.low.wrapping_add(at)));
    // SAFETY: the offsets are those of rows.
    let pairs = unsafe { V::pairs::<FORMAT, SINGLE>(rows, low, pass, table, V::TURNED && WEIGHTS == BLOCKS) };
    for h in 0..H {
        for p in 0..2 {
            let acc = if V::PLANES && p == 1 { &mut acc.lower[h] } else { &mut acc.upper[h] };
            for s in 0..V::SUMS[usize::from(SINGLE)] {
                let (c, j) = V::place(pass, s);
                // SAFETY: weights has those of this group for H heads.
                let w = unsafe {
                    match WEIGHTS {
                        ROWS => V::everywhere(weights.add(Weights::of_row(g, h, p))),
                        BLOCKS if V::TURNED => {
                            V::four_everywhere(weights.add(Weights::of_blocks(g, h, p, H)))
                        }
                        BLOCKS => V::everywhere(weights.add(Weights::of_blocks(g, h, p, H) + 2 * j)),
                        _ => V::thirds(weights.add(Weights::of_blocks(g, h, p, H)), c, j),
                    }
                };
                acc[s] = acc[s].dot(pairs[p][s], w);
            }
        }
    }
}

/// Adds a stretch to the sums of one pass, of `H` heads.
///
/// # Safety
/// `source` has `n` rows with a segment of `FORMAT` each, `weights` and `sums` those of `H` heads; the instruction set is
/// enabled.
#[inline(always)]
unsafe fn pass<V: Lanes, const FORMAT: u8, const H: usize, const WEIGHTS: u8, const SINGLE: bool>(
    source: Source,
    table: V,
    weights: &Weights,
    (pass, share): (usize, usize),
    sums: Place,
) {
    let mut acc = Sums { upper: [[V::zero(); 4]; H], lower: [[V::zero(); 4]; H] };
    let (stride, n, words) = (source.stride, source.n, weights.words());
    for g in 0..n.div_ceil(4) {
        let t = 4 * g;
        let at = if t + 4 <= n {
            [t * stride, (t + 1) * stride, (t + 2) * stride, (t + 3) * stride]
        } else {
            // Weights beyond the last row are zero.
            [t * stride, (t + 1).min(n - 1) * stride, (t + 2).min(n - 1) * stride, (n - 1) * stride]
        };
        if !source.later.is_null() {
            for i in 0..share {
                V::request(source.later.wrapping_add(t * stride + (pass * share + i) * LINE));
            }
        }
        // SAFETY: rows below n.
        unsafe { group::<V, FORMAT, H, WEIGHTS, SINGLE>(&source, at, table, words, (g, pass), &mut acc) };
    }
    for h in 0..H {
        for s in 0..V::SUMS[usize::from(SINGLE)] {
            let (c, j) = V::place(pass, s);
            let (upper, lower) = (acc.upper[h][s], acc.lower[h][s]);
            let sum = if V::PLANES { upper.join(lower) } else { upper };
            // SAFETY: a segment of sums has a register there, written by the first stretch.
            unsafe {
                let place = sums.sums.add(h).cast::<i32>().add((c * 4 + j) * V::LANES).cast::<u8>();
                let sum = if sums.first { sum } else { V::load(place).add(sum) };
                sum.store(place);
            }
        }
    }
}

/// All passes over a stretch.
///
/// # Safety
/// As [`pass`].
#[inline(always)]
unsafe fn passes<V: Lanes, const FORMAT: u8, const H: usize>(
    source: Source,
    table: V,
    (weights, blocks): (&Weights, bool),
    m: usize,
    sums: Place,
) {
    let chunks = m.div_ceil(4 * V::LANES);
    let single = FORMAT == EIGHT && chunks == 1;
    let count = chunks * 4 / V::SUMS[usize::from(single)];
    // The lines of four rows of the next stretch, in equal parts in each pass: memory never waits.
    let share = (4 * source.stride / LINE).div_ceil(count);
    for i in 0..count {
        // SAFETY: passed on to the caller.
        unsafe {
            match (blocks, m == 96 && FORMAT == EIGHT, single) {
                (false, _, false) => {
                    pass::<V, FORMAT, H, ROWS, false>(source, table, weights, (i, share), sums)
                }
                (true, false, false) => {
                    pass::<V, FORMAT, H, BLOCKS, false>(source, table, weights, (i, share), sums)
                }
                (true, true, _) => {
                    pass::<V, EIGHT, H, THIRDS, false>(source, table, weights, (i, share), sums)
                }
                (false, _, true) => pass::<V, EIGHT, H, ROWS, true>(source, table, weights, (i, share), sums),
                (true, false, true) => {
                    pass::<V, EIGHT, H, BLOCKS, true>(source, table, weights, (i, share), sums)
                }
            }
        }
    }
}

/// Brings the codes of a segment that is not whole to bytes, `stride` apart, for the passes over bytes.
///
/// # Safety
/// As [`pass`]; `out` has room for a register more than `n` strides.
#[inline(always)]
unsafe fn widen<V: Lanes>(bits: CodeBits, source: Source, m: usize, table: V, out: *mut u8, stride: usize) {
    for t in 0..source.n {
        let mut x = [0u8; SEGMENT];
        // SAFETY: a segment of m positions of row t.
        let (row, low) = unsafe {
            let at = t * source.stride;
            let bytes = m * bits.width() / 8;
            let row = std::slice::from_raw_parts(source.row.add(at), bytes);
            let low = match bits {
                CodeBits::Planes => std::slice::from_raw_parts(source.low.add(at), bytes),
                _ => &[],
            };
            (row, low)
        };
        match bits {
            CodeBits::Eight => x[..m].copy_from_slice(row),
            CodeBits::Four | CodeBits::Planes => {
                let (a, b) = x[..m].split_at_mut(m / 2);
                for ((a, b), &byte) in a.iter_mut().zip(b).zip(row) {
                    (*a, *b) = (byte & 15, byte >> 4);
                }
            }
            CodeBits::Two | CodeBits::Three => {
                for (shift, quarter) in [0, 2, 4, 6].into_iter().zip(x[..m].chunks_exact_mut(m / 4)) {
                    for (x, &byte) in quarter.iter_mut().zip(row) {
                        *x = byte >> shift & 3;
                    }
                }
            }
        }
        if bits == CodeBits::Three {
            for (eight, &upper) in x.as_chunks_mut::<8>().0.iter_mut().zip(&row[m / 4..]) {
                for (bit, x) in eight.iter_mut().enumerate() {
                    *x |= (upper >> bit & 1) << 2;
                }
            }
        }
        if bits == CodeBits::Planes {
            let (a, b) = x[..m].split_at_mut(m / 2);
            for ((a, b), &byte) in a.iter_mut().zip(b).zip(low) {
                (*a, *b) = (*a << 4 | (byte & 15), *b << 4 | byte >> 4);
            }
        }
        for at in (0..m).step_by(4 * V::LANES) {
            // SAFETY: x has 128 bytes and m is at most that; out has room for a register at the end.
            unsafe {
                let indices = V::load(x.as_ptr().add(at));
                let codes = if bits.is_signed() { indices } else { V::look_up(table, indices) };
                codes.store(out.add(t * stride + at));
            }
        }
    }
}

/// The heads of one pass, `weights` `[H][n]`, `acc` `[H][dims]`.
///
/// # Safety
/// As [`super::Accumulate`]; the instruction set of `V` is enabled.
#[inline(always)]
unsafe fn heads<V: Lanes, P: Prepare, const H: usize>(
    shape: CodeShape,
    weights: &[f32],
    rows: Rows<'_>,
    scales: Scales<'_>,
    acc: &mut [f32],
) {
    let (n, stride, table) = (weights.len() / H, shape.row_bytes(), V::table(rows.table));
    let mut first = 0;
    while first < shape.padded() {
        let m = SEGMENT.min(shape.padded() - first);
        // Indices that stand for consecutive codes are multiplied themselves: the sum of the weights makes up for it.
        let origin = if V::BARE && m == SEGMENT && shape.bits == CodeBits::Four {
            rows.consecutive(shape.bits)
        } else {
            None
        };
        let factors = Factors {
            weights,
            n,
            scales,
            shape,
            first_block: first / 32,
            blocks: m / 32,
            whole: origin.is_some(),
        };
        // SAFETY: the instruction set is enabled.
        let (inverse, step) = unsafe { P::largest::<H>(&factors) };
        let mut room = MaybeUninit::<[[i32; SEGMENT]; HEADS]>::uninit();
        if m < SEGMENT {
            // Not all of them are written.
            room.write([[0; SEGMENT]; HEADS]);
        }
        let all = room.as_mut_ptr().cast::<[i32; SEGMENT]>();
        let mut bias = [[0i32; 4]; HEADS];
        let (mut prepared, by_block) = (Weights::new(), matches!(scales, Scales::Block(_)));
        let direct = m == SEGMENT || (shape.bits == CodeBits::Eight && m.is_multiple_of(4 * V::LANES));
        let mut bytes = MaybeUninit::<[u8; WIDENED * SEGMENT + 64]>::uninit();
        let mut start = 0;
        while start < n {
            let count = if direct { STRETCH } else { WIDENED }.min(n - start);
            let later = if first == 0 { rows.later((start + count) * stride) } else { std::ptr::null() };
            // SAFETY: rows start to start + count are there, and first is the beginning of a segment.
            unsafe {
                P::prepare::<H>(&factors, &inverse, start, count, &mut prepared, &mut bias);
                let at = start * stride + first * shape.bits.width() / 8;
                let low = if rows.low.is_empty() { std::ptr::null() } else { rows.low.as_ptr().add(at) };
                let mut source = Source { row: rows.codes.as_ptr().add(at), low, stride, n: count, later };
                let sums = Place { sums: all, first: start == 0 };
                let mut format = if origin.is_some() { BARE } else { format_of(shape.bits) };
                if !direct {
                    let (out, stride) = (bytes.as_mut_ptr().cast::<u8>(), m.next_multiple_of(64));
                    widen::<V>(shape.bits, source, m, table, out, stride);
                    source = Source { row: out, low: out, stride, n: count, later };
                    format = EIGHT;
                }
                match format {
                    BARE => passes::<V, BARE, H>(source, table, (&prepared, by_block), m, sums),
                    FOUR => passes::<V, FOUR, H>(source, table, (&prepared, by_block), m, sums),
                    THREE => passes::<V, THREE, H>(source, table, (&prepared, by_block), m, sums),
                    TWO => passes::<V, TWO, H>(source, table, (&prepared, by_block), m, sums),
                    PLANES => passes::<V, PLANES, H>(source, table, (&prepared, by_block), m, sums),
                    _ => passes::<V, EIGHT, H>(source, table, (&prepared, by_block), m, sums),
                }
            }
            start += count;
        }
        for (h, acc) in acc.chunks_exact_mut(shape.dims).enumerate() {
            let some = &mut acc[first..shape.dims.min(first + m)];
            let taken = bias[h].map(|b| b.wrapping_mul(origin.map_or(V::BIAS, |origin| -origin)));
            let turned = V::TURNED && by_block && m != 96;
            // SAFETY: the passes have written the sums of this head, and the instruction set is enabled.
            unsafe { finish::<V>(&mut *all.add(h), turned, &step[h], &taken, m / 32, some) };
        }
        first += m;
    }
}

/// See [`super::Accumulate`].
///
/// # Safety
/// As there; the instruction sets of `V` and `P` are enabled.
#[inline(always)]
pub(super) unsafe fn accumulate<V: Lanes, P: Prepare>(
    shape: CodeShape,
    weights: &[f32],
    rows: Rows<'_>,
    scales: Scales<'_>,
    acc: &mut [f32],
) {
    let n = rows.codes.len() / shape.row_bytes();
    for (weights, acc) in weights.chunks(HEADS * n).zip(acc.chunks_mut(HEADS * shape.dims)) {
        // SAFETY: passed on to the caller.
        unsafe {
            match weights.len() / n {
                1 => heads::<V, P, 1>(shape, weights, rows, scales, acc),
                2 => heads::<V, P, 2>(shape, weights, rows, scales, acc),
                3 => heads::<V, P, 3>(shape, weights, rows, scales, acc),
                _ => heads::<V, P, 4>(shape, weights, rows, scales, acc),
            }
        }
    }
}
