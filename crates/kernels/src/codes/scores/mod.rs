//! Scores: queries of a group of heads against stored rows of codes.
//!
//! Rows are turned into bytes, a few tokens at a time: the same bytes for every format. A quarter of sixteen of them then
//! meets all four heads of a register at once (`vnni`: each quarter of a register another head, four times); its four-byte
//! lanes are one of each block, so that a lane of the sum is the product of a block, and little is left to be summed across
//! lanes.
//!
//! # Result
//! With the exact integer product `dot` of a row (or of a block `b` of 32) and a query: `((dot as f32) * step) * scale`,
//! without the last factor where there are no scales. With scales of blocks, these are summed in each segment of four as
//! `(p0 + p1) + (p2 + p3)`, where blocks that do not exist are `+0.0`, and segments in ascending order. Every instruction
//! set gives the same bits.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod vnni;

use super::query::{HEADS, QueryCodes};
use super::{CodeShape, Rows, SEGMENT, Scales};
use crate::Kernels;

/// Most numbers of a row: `128 * 32512 * 512 < 2^31`.
pub(crate) const MOST_DIMS: usize = 512;
/// Segments of such a row.
pub(crate) const MOST_SEGMENTS: usize = MOST_DIMS / SEGMENT;

/// What is asked of a table; lengths agree.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) shape: CodeShape,
    pub(crate) rows: Rows<'a>,
    pub(crate) scales: Scales<'a>,
    pub(crate) query: &'a QueryCodes,
    /// How many rows.
    pub(crate) n: usize,
}

/// Scores of one instruction set.
pub(crate) struct ScoreTable {
    /// Whether queries are read as 16 bits.
    pub(crate) wide: bool,
    /// Fills the queries, whose buffers have their sizes.
    pub(crate) quantize: unsafe fn(&[f32], &mut QueryCodes),
    /// Writes the scores `[heads][n]`, and raises what is in the second slice to the largest score of each head, unless it
    /// is empty.
    pub(crate) scores: unsafe fn(Work<'_>, &mut [f32], &mut [f32]),
}

impl Kernels {
    /// Scores of `query` against `n` stored rows, into `out` `[heads][n]`, as the module defines them.
    ///
    /// # Panics
    /// Lengths do not agree, the queries are of other dimensions, or rows have more than 512 numbers.
    pub fn code_scores(
        &self,
        shape: CodeShape,
        query: &QueryCodes,
        rows: Rows<'_>,
        scales: Scales<'_>,
        out: &mut [f32],
    ) {
        self.scores_and_largest(shape, query, rows, scales, (out, &mut []));
    }

    /// As [`Kernels::code_scores`]; `largest` becomes [`Kernels::max`] of the scores of each head, which costs next to nothing
    /// here.
    ///
    /// # Panics
    /// As there, or `largest` has not one number a head.
    pub fn code_scores_and_largest(
        &self,
        shape: CodeShape,
        query: &QueryCodes,
        rows: Rows<'_>,
        scales: Scales<'_>,
        (out, largest): (&mut [f32], &mut [f32]),
    ) {
        assert_eq!(largest.len(), query.heads, "code_scores: the largest of {} heads", query.heads);
        largest.fill(f32::NEG_INFINITY);
        self.scores_and_largest(shape, query, rows, scales, (out, &mut *largest));
        // One zero of two, as `max` has it.
        largest.iter_mut().for_each(|x| *x += 0.0);
    }

    fn scores_and_largest(
        &self,
        shape: CodeShape,
        query: &QueryCodes,
        rows: Rows<'_>,
        scales: Scales<'_>,
        (out, largest): (&mut [f32], &mut [f32]),
    ) {
        let n = shape.count(rows, "code_scores");
        assert!(shape.dims <= MOST_DIMS, "code_scores: rows of {} numbers", shape.dims);
        assert_eq!(query.dims, shape.dims, "code_scores: queries for {shape:?}");
        assert_eq!(
            query.wide.is_empty(),
            !self.code_scores.wide || query.heads == 0,
            "code_scores: queries of another table"
        );
        assert_eq!(out.len(), query.heads * n, "code_scores: results of {n} rows");
        scales.check(shape, n, "code_scores");
        if n == 0 {
            return;
        }
        // SAFETY: this table was handed out against proof of its instruction set, and the lengths agree.
        unsafe { (self.code_scores.scores)(Work { shape, rows, scales, query, n }, out, largest) }
    }
}

/// One head of a group of four: scores of one token from the sums `[block]` of a segment that is not followed by others.
#[inline(always)]
fn total(sums: [i32; 4]) -> i32 {
    sums[0].wrapping_add(sums[1]).wrapping_add(sums[2].wrapping_add(sums[3]))
}

/// The scores of one token and four heads, from the sums `[segment][head][block]`.
#[inline(always)]
fn finish(work: &Work<'_>, t: usize, steps: &[f32], sums: &[[[i32; 4]; HEADS]]) -> [f32; HEADS] {
    let mut scores = [0.0f32; HEADS];
    match work.scales {
        Scales::One | Scales::Row(_) => {
            for h in 0..HEADS {
                let dot = sums.iter().fold(0i32, |dot, s| dot.wrapping_add(total(s[h])));
                scores[h] = dot as f32 * steps[h];
                if let Scales::Row(scales) = work.scales {
                    scores[h] *= scales[t];
                }
            }
        }
        Scales::Block(scales) => {
            let blocks = work.shape.blocks();
            for (s, sums) in sums.iter().enumerate() {
                let mut four = [0.0f32; 4];
                let these = &scales[t * blocks + 4 * s..(t + 1) * blocks];
                for (to, &from) in four.iter_mut().zip(these) {
                    *to = from;
                }
                for h in 0..HEADS {
                    let mut p = [0.0f32; 4];
                    for b in 0..4 {
                        p[b] = (sums[h][b] as f32 * steps[h]) * four[b];
                    }
                    let sum = (p[0] + p[1]) + (p[2] + p[3]);
                    scores[h] = if s == 0 { sum } else { scores[h] + sum };
                }
            }
        }
    }
    scores
}
