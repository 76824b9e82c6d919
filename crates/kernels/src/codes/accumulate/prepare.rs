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
}

impl Factors<'_> {
    /// The scales of rows `t` to `t + 4` in the blocks of the segment, `[block][row]`; absent blocks repeat those that there
    /// are, absent rows have 0.
    #[inline(always)]
    fn of_blocks(&self, scales: &[f32], t: usize) -> [f32; 16] {
        let mut out = [0.0; 16];
        for k in 0..4.min(self.n - t) {
            let row = &scales[(t + k) * self.shape.blocks() + self.first_block..][..self.blocks];
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
#[repr(C, align(64))]
pub(super) struct Weights {
    words: MaybeUninit<[i16; STRETCH / 4 * GROUP * HEADS]>,
    pub(super) blocks: bool,
}

impl Weights {
    #[inline(always)]
    pub(super) fn new(blocks: bool) -> Weights {
        Weights { words: MaybeUninit::uninit(), blocks }
    }

    /// All words, of which those at [`Weights::of_blocks`] or [`Weights::of_row`] are set.
    #[inline(always)]
    pub(super) fn words(&self) -> *const i16 {
        self.words.as_ptr().cast()
    }

    #[inline(always)]
    pub(super) fn words_mut(&mut self) -> *mut i16 {
        self.words.as_mut_ptr().cast()
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

/// From the largest weights to [`Steps`].
#[inline(always)]
pub(super) fn steps(largest: [[f32; 4]; HEADS]) -> Steps {
    let mut out = ([[0.0; 4]; HEADS], [[0.0; 4]; HEADS]);
    for h in 0..HEADS {
        for b in 0..4 {
            let m = if largest[h][b] > SMALLEST { largest[h][b] } else { SMALLEST };
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
    /// rows 0 and 1 of each group to `bias`.
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
fn halves<const PLANES: bool>(q: [i32; 4]) -> [u32; 2] {
    if PLANES {
        // The order of `Lanes::pairs`.
        let q = [q[0], q[2], q[1], q[3]];
        let high = q.map(|q| ((q + 128) >> 8) as u8);
        [u32::from_le_bytes(high), u32::from_le_bytes(q.map(|q| q as u8))]
    } else {
        [[q[0], q[1]], [q[2], q[3]]].map(|[a, b]| a as u32 & 0xffff | (b as u32) << 16)
    }
}

impl<const PLANES: bool> Prepare for Portable<PLANES> {
    #[inline(always)]
    unsafe fn largest<const H: usize>(factors: &Factors<'_>) -> Steps {
        let mut largest = [[0.0f32; 4]; HEADS];
        let n = factors.n;
        for (h, weights) in factors.weights.chunks_exact(n).enumerate() {
            let mut lanes = [0.0f32; 16];
            let mut more = |l: usize, u: f32| lanes[l] = if u.abs() > lanes[l] { u.abs() } else { lanes[l] };
            match factors.scales {
                Scales::One => weights.iter().enumerate().for_each(|(t, &w)| more(t % 16, w)),
                Scales::Row(scales) => {
                    for (t, (w, s)) in weights.iter().zip(scales).enumerate() {
                        more(t % 16, w * s);
                    }
                }
                Scales::Block(scales) => {
                    for t in (0..n).step_by(4) {
                        let scales = factors.of_blocks(scales, t);
                        let mut w = [0.0; 4];
                        w[..4.min(n - t)].copy_from_slice(&weights[t..n.min(t + 4)]);
                        for l in 0..16 {
                            more(l, w[l % 4] * scales[l]);
                        }
                    }
                }
            }
            for l in 0..16 {
                let b = l / 4;
                largest[h][b] = largest[h][b].max(lanes[l]);
            }
            if !matches!(factors.scales, Scales::Block(_)) {
                largest[h] = [largest[h].into_iter().fold(0.0, f32::max); 4];
            }
        }
        steps(largest)
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
        for g in 0..count.div_ceil(4) {
            let t = start + 4 * g;
            let some = 4.min(factors.n - t);
            let scales = match factors.scales {
                Scales::Block(scales) => factors.of_blocks(scales, t),
                Scales::Row(scales) => {
                    let mut four = [0.0; 16];
                    four[..some].copy_from_slice(&scales[t..t + some]);
                    four
                }
                Scales::One => [1.0; 16],
            };
            for h in 0..H {
                let mut w = [0.0; 4];
                w[..some].copy_from_slice(&factors.weights[h * factors.n + t..][..some]);
                if out.blocks {
                    let mut q = [0i32; 16];
                    for l in 0..16 {
                        q[l] = round(w[l % 4] * scales[l], inverse[h][l / 4]);
                    }
                    for (b, q) in q.as_chunks::<4>().0.iter().enumerate() {
                        bias[h][b] = bias[h][b].wrapping_add(q[0] + q[1]);
                        for (p, half) in halves::<PLANES>(*q).into_iter().enumerate() {
                            // SAFETY: a group of the stretch, a head and a block below 4.
                            unsafe {
                                words
                                    .add(Weights::of_blocks(g, h, p, H) + 2 * b)
                                    .cast::<u32>()
                                    .write_unaligned(half)
                            };
                        }
                    }
                } else {
                    let q = [0, 1, 2, 3].map(|k| round(w[k] * scales[k], inverse[h][0]));
                    bias[h] = bias[h].map(|b| b.wrapping_add(q[0] + q[1]));
                    for (p, half) in halves::<PLANES>(q).into_iter().enumerate() {
                        // SAFETY: a group of the stretch and a head.
                        unsafe { words.add(Weights::of_row(g, h, p)).cast::<u32>().write_unaligned(half) };
                    }
                }
            }
        }
    }
}
