//! Rounding the weights of heads to 16 bits, in the order in which passes read them.

use super::super::{CodeShape, Scales};
use super::lanes::HEADS;
use super::pass::STRETCH;
use super::{LARGEST, SMALLEST};
use std::mem::MaybeUninit;

/// What the weights of a segment are made of.
pub(super) struct Factors<'a> {
    /// `[heads of the pass][n]`.
    pub(super) weights: &'a [f32],
    pub(super) n: usize,
    pub(super) scales: Scales<'a>,
    pub(super) shape: CodeShape,
    /// The first block of the segment in a row.
    pub(super) first_block: usize,
    /// Blocks of the segment.
    pub(super) blocks: usize,
    /// Whether `bias` becomes the sum of all rows' weights, for [`super::lanes::BARE`].
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    pub(super) whole: bool,
}

impl Factors<'_> {
    /// The scales of rows `t` to `t + 4` in the blocks of the segment, `[block][row]`; absent blocks repeat those that there
    /// are, absent rows have 0.
    #[inline(always)]
    fn of_blocks(&self, scales: &[f32], t: usize) -> [f32; 16] {
        let mut out = [0.0; 16];
        let stride = self.shape.blocks();
        if let (4, Some(four)) = (stride, scales[t * stride..].first_chunk::<16>()) {
            for b in 0..4 {
                for k in 0..4 {
                    out[4 * b + k] = four[4 * k + b];
                }
            }
            return out;
        }
        for k in 0..4.min(self.n - t) {
            let row = &scales[(t + k) * stride + self.first_block..][..self.blocks];
            for b in 0..4 {
                out[4 * b + k] = row[b % self.blocks];
            }
        }
        out
    }
}

/// Words of a group of four rows and one head, with a scale a block.
const GROUP: usize = 16;

/// The rounded weights of a stretch. With a scale a block: `[group of four rows][head, an even number][half][block of
/// four][2]`; otherwise `[head][row of STRETCH]`. A half is two rows as words, or one plane of four rows as bytes.
///
/// Nothing else stands beside the words: a value that is known within one that is not made the compiler set them all.
#[repr(C, align(64))]
pub(super) struct Weights(MaybeUninit<[i16; STRETCH / 4 * GROUP * HEADS]>);

impl Weights {
    #[inline(always)]
    pub(super) fn new() -> Weights {
        Weights(MaybeUninit::uninit())
    }

    /// All words, of which those at [`Weights::of_blocks`] or [`Weights::of_row`] are set.
    #[inline(always)]
    pub(super) fn words(&self) -> *const i16 {
        self.0.as_ptr().cast()
    }

    #[inline(always)]
    pub(super) fn words_mut(&mut self) -> *mut i16 {
        self.0.as_mut_ptr().cast()
    }

    /// Where half `p` of head `h` of `heads` and of group `g` lies: 8 words.
    #[inline(always)]
    pub(super) fn of_blocks(g: usize, h: usize, p: usize, heads: usize) -> usize {
        (g * heads.next_multiple_of(2) + h) * GROUP + p * GROUP / 2
    }

    /// Where half `p` of head `h` and of group `g` lies: 2 words.
    #[inline(always)]
    pub(super) fn of_row(g: usize, h: usize, p: usize) -> usize {
        h * STRETCH + 4 * g + 2 * p
    }
}

/// The largest weights of a segment in its four blocks (all alike without scales of blocks) as what divides by them, and
/// as the step of the rounded weights.
pub(super) type Steps = ([[f32; 4]; HEADS], [[f32; 4]; HEADS]);

/// From the largest weight of each head and the largest scale of each block to [`Steps`].
#[inline(always)]
pub(super) fn steps(weights: [f32; HEADS], scales: [f32; 4]) -> Steps {
    let mut out = ([[0.0; 4]; HEADS], [[0.0; 4]; HEADS]);
    for h in 0..HEADS {
        for b in 0..4 {
            let m = weights[h] * scales[b];
            let m = if m > SMALLEST { m } else { SMALLEST };
            (out.0[h][b], out.1[h][b]) = (LARGEST / m, m / LARGEST);
        }
    }
    out
}

/// How an instruction set rounds weights.
pub(super) trait Prepare {
    /// # Safety
    /// The instruction set is enabled; the factors have `H` heads.
    unsafe fn largest<const H: usize>(factors: &Factors<'_>) -> Steps;

    /// Rounds the weights of rows `start` to `start + count` (a multiple of four but at the end of the rows), and adds those of
    /// rows 0 and 1 of each group to `bias`, or those of all rows with [`Factors::whole`], if the registers know
    /// [`super::lanes::BARE`].
    ///
    /// # Safety
    /// As [`Prepare::largest`]; `count` is at most [`STRETCH`], and the rows are there.
    unsafe fn prepare<const H: usize>(
        factors: &Factors<'_>,
        inverse: &[[f32; 4]; HEADS],
        start: usize,
        count: usize,
        out: &mut Weights,
        bias: &mut [[i32; 4]; HEADS],
    );
}

/// Plain loops, which the compiler vectorises. `PLANES`: halves are planes of bytes.
pub(super) struct Portable<const PLANES: bool>;

/// `round_half_even(u * inverse)`.
#[inline(always)]
pub(super) fn round(u: f32, inverse: f32) -> i32 {
    let v = u * inverse;
    let v = if v > -LARGEST { v } else { -LARGEST };
    let v = if v < LARGEST { v } else { LARGEST };
    // SAFETY: between -32512 and 32512, also what was no number.
    unsafe { v.round_ties_even().to_int_unchecked::<i32>() }
}

/// The two halves of the weights of four rows, as bits of 32.
#[inline(always)]
fn halves<const PLANES: bool>(q: &[i32; 4]) -> [u32; 2] {
    let (a, b, c, d) = (q[0] as u32, q[1] as u32, q[2] as u32, q[3] as u32);
    if PLANES {
        // The order of `Lanes::pairs`. With 128 added the upper byte is the nearest one.
        let bytes = |a: u32, b: u32, c: u32, d: u32| (a & 255) | (c & 255) << 8 | (b & 255) << 16 | d << 24;
        let upper = |x: u32| x.wrapping_add(128) >> 8;
        [bytes(upper(a), upper(b), upper(c), upper(d)), bytes(a, b, c, d)]
    } else {
        [(a & 0xffff) | b << 16, (c & 0xffff) | d << 16]
    }
}

/// The magnitude of each lane that is larger. Lane by lane.
#[inline(always)]
fn larger(lanes: &mut [f32; 16], u: &[f32; 16]) {
    for l in 0..16 {
        let u = u[l].abs();
        lanes[l] = if u > lanes[l] { u } else { lanes[l] };
    }
}

/// The largest magnitude.
#[inline(always)]
fn most(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for t in (0..x.len()).step_by(16) {
        larger(&mut lanes, &sixteen(x, t));
    }
    lanes.into_iter().fold(0.0, |m, x| if x > m { x } else { m })
}

/// Rows `t` to `t + 16` of what has `n` rows, zeros behind them.
#[inline(always)]
fn sixteen(x: &[f32], t: usize) -> [f32; 16] {
    if let Some(all) = x[t..].first_chunk::<16>() {
        return *all;
    }
    let mut out = [0.0; 16];
    out[..x.len() - t].copy_from_slice(&x[t..]);
    out
}

impl<const PLANES: bool> Portable<PLANES> {
    /// The weights of head `h` and of sixteen rows from `t` on, times the scales of rows.
    #[inline(always)]
    fn of_rows(factors: &Factors<'_>, h: usize, t: usize) -> [f32; 16] {
        let mut u = sixteen(&factors.weights[h * factors.n..][..factors.n], t);
        if let Scales::Row(scales) = factors.scales {
            let scales = sixteen(scales, t);
            for l in 0..16 {
                u[l] *= scales[l];
            }
        }
        u
    }

    /// The weights of head `h` and of four rows from `t` on, times `scales` `[block][row]`.
    #[inline(always)]
    fn of_blocks(factors: &Factors<'_>, scales: &[f32; 16], h: usize, t: usize) -> [f32; 16] {
        let weights = &factors.weights[h * factors.n..][..factors.n];
        let mut four = [0.0; 4];
        if let Some(all) = weights[t..].first_chunk::<4>() {
            four = *all;
        } else {
            four[..factors.n - t].copy_from_slice(&weights[t..]);
        }
        let mut u = *scales;
        for l in 0..16 {
            u[l] *= four[l % 4];
        }
        u
    }
}

impl<const PLANES: bool> Prepare for Portable<PLANES> {
    #[inline(always)]
    unsafe fn largest<const H: usize>(factors: &Factors<'_>) -> Steps {
        let (n, mut weights, mut scales) = (factors.n, [0.0; HEADS], [1.0; 4]);
        for h in 0..H {
            weights[h] = most(&factors.weights[h * n..(h + 1) * n]);
        }
        match factors.scales {
            Scales::One => {}
            Scales::Row(all) => scales = [most(all); 4],
            Scales::Block(all) => {
                let mut lanes = [0.0f32; 16];
                for t in (0..n).step_by(4) {
                    larger(&mut lanes, &factors.of_blocks(all, t));
                }
                for (scale, lanes) in scales.iter_mut().zip(lanes.as_chunks::<4>().0) {
                    *scale = lanes.iter().fold(0.0, |m, &x| if x > m { x } else { m });
                }
            }
        }
        steps(weights, scales)
    }

    #[inline(always)]
    unsafe fn prepare<const H: usize>(
        factors: &Factors<'_>,
        inverse: &[[f32; 4]; HEADS],
        start: usize,
        count: usize,
        out: &mut Weights,
        bias: &mut [[i32; 4]; HEADS],
    ) {
        let words = out.words_mut();
        let mut q = [0i32; 16];
        if let Scales::Block(scales) = factors.scales {
            for g in 0..count.div_ceil(4) {
                let t = start + 4 * g;
                let scales = factors.of_blocks(scales, t);
                for h in 0..H {
                    let u = Self::of_blocks(factors, &scales, h, t);
                    for l in 0..16 {
                        q[l] = round(u[l], inverse[h][l / 4]);
                    }
                    for (b, q) in q.as_chunks::<4>().0.iter().enumerate() {
                        bias[h][b] = bias[h][b].wrapping_add(q[0] + q[1]);
                        let [first, last] = halves::<PLANES>(q);
                        // SAFETY: a group of the stretch, a head and a block below 4.
                        unsafe {
                            words
                                .add(Weights::of_blocks(g, h, 0, H) + 2 * b)
                                .cast::<u32>()
                                .write_unaligned(first);
                            words
                                .add(Weights::of_blocks(g, h, 1, H) + 2 * b)
                                .cast::<u32>()
                                .write_unaligned(last);
                        }
                    }
                }
            }
        } else {
            for t in (0..count).step_by(16) {
                for h in 0..H {
                    let u = Self::of_rows(factors, h, start + t);
                    for l in 0..16 {
                        q[l] = round(u[l], inverse[h][0]);
                    }
                    let mut sum = 0;
                    for (g, q) in q.as_chunks::<4>().0.iter().enumerate() {
                        sum += q[0] + q[1];
                        let [first, last] = halves::<PLANES>(q);
                        // SAFETY: a group of the stretch (of which the size is a multiple of 16) and a head.
                        unsafe {
                            words.add(Weights::of_row(t / 4 + g, h, 0)).cast::<u32>().write_unaligned(first);
                            words.add(Weights::of_row(t / 4 + g, h, 1)).cast::<u32>().write_unaligned(last);
                        }
                    }
                    for b in 0..4 {
                        bias[h][b] = bias[h][b].wrapping_add(sum);
                    }
                }
            }
        }
    }
}
