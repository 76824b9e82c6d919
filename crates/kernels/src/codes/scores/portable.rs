//! Scores in plain Rust, and the frame that the narrower instruction sets share with it.

use super::super::layout::{Segment, spread};
use super::super::query::{HEADS, QUARTERS, QuerySegment, quantize};
use super::super::{CodeBits, SEGMENT};
use super::{MOST_SEGMENTS, QueryCodes, ScoreTable, Work, finish};

pub(crate) static TABLE: ScoreTable = ScoreTable { wide: false, quantize: queries, scores };

fn queries(queries: &[f32], out: &mut QueryCodes) {
    quantize(queries, out, false);
}

/// How an instruction set multiplies a token. The methods may be called only where it is enabled.
pub(super) trait Dots {
    /// Turns indices into the codes of a table of sixteen.
    fn look_up(bytes: &mut [u8; SEGMENT], table: &[i8; 16]);

    /// The products `[head][block]` of 128 codes with segment `at` of the queries.
    fn products(query: &QueryCodes, at: usize, codes: &[u8; SEGMENT]) -> [[i32; 4]; HEADS];
}

/// The scores, token by token, as [`ScoreTable::scores`].
#[inline(always)]
pub(super) fn token_by_token<D: Dots>(work: Work<'_>, out: &mut [f32], largest: &mut [f32]) {
    let (shape, query) = (work.shape, work.query);
    let segments = query.row_segments();
    let mut codes = [[0u8; SEGMENT]; MOST_SEGMENTS];
    for t in 0..work.n {
        for (s, codes) in codes[..segments].iter_mut().enumerate() {
            spread(Segment::new(shape, work.rows, t, s), codes);
            if !matches!(shape.bits, CodeBits::Eight | CodeBits::Planes) {
                D::look_up(codes, work.rows.table);
            }
        }
        for (group, steps) in query.steps.chunks_exact(HEADS).enumerate() {
            let mut sums = [[[0; 4]; HEADS]; MOST_SEGMENTS];
            for s in 0..segments {
                sums[s] = D::products(query, group * segments + s, &codes[s]);
            }
            let scores = finish(&work, t, steps, &sums[..segments]);
            for (h, score) in scores.into_iter().enumerate().take(query.heads - group * HEADS) {
                out[(group * HEADS + h) * work.n + t] = score;
                if let Some(largest) = largest.get_mut(group * HEADS + h) {
                    *largest = if score > *largest { score } else { *largest };
                }
            }
        }
    }
}

/// Plain Rust.
struct Plain;

impl Dots for Plain {
    #[inline(always)]
    fn look_up(bytes: &mut [u8; SEGMENT], table: &[i8; 16]) {
        for b in bytes {
            *b = table[usize::from(*b & 15)] as u8;
        }
    }

    #[inline(always)]
    fn products(query: &QueryCodes, at: usize, codes: &[u8; SEGMENT]) -> [[i32; 4]; HEADS] {
        let QuerySegment { hi, lo, .. } = &query.segments[at];
        let shift = match query.bits {
            super::super::QueryBits::Sixteen => 8,
            super::super::QueryBits::Eight => 0,
        };
        let mut sums = [[0; 4]; HEADS];
        for (q, codes) in codes.chunks_exact(16).enumerate().take(QUARTERS) {
            for h in 0..HEADS {
                for p in 0..16 {
                    let v = (i32::from(hi[q][h][p]) << shift) + i32::from(lo[q][h][p]);
                    sums[h][p / 4] += i32::from(codes[p] as i8) * v;
                }
            }
        }
        sums
    }
}

fn scores(work: Work<'_>, out: &mut [f32], largest: &mut [f32]) {
    token_by_token::<Plain>(work, out, largest);
}
