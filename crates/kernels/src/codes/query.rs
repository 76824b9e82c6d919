//! Queries as integers: what meets rows of codes in scores.
//!
//! A query is rounded to 16 bits, `v = round_half_even(x * (32512 / m))` with `m = max(max|x|, 1e-30)`, and kept as two
//! planes of signed bytes, `v = 256 * hi + lo` with `lo` from -128 to 127; or to 8 bits, `v = round_half_even(x * (127 /
//! m))`, in the upper plane alone, for half of the multiplications. A step is what one unit of `v` stands for: `m / 32512`
//! or `m / 127`. Where an element is not finite, the step is NaN and the codes are zero, so that all scores are NaN.
//!
//! Four heads and a segment of 128 positions are a [`QuerySegment`]; heads and positions that do not exist are zero. The
//! positions are always those of a whole segment: what is read from a shorter one is spread over them.

use super::{CODE_BLOCK, CodeShape, SEGMENT};
use crate::Kernels;

/// Heads of a segment: as many as have the sixteen bytes of a quarter in one register.
pub(crate) const HEADS: usize = 4;
/// Runs of sixteen positions in a segment: four lanes of four bytes, one of each block.
pub(crate) const QUARTERS: usize = SEGMENT / 16;
/// Largest magnitude of a query of two planes: its upper plane stays within a signed byte.
pub(crate) const LARGEST: f32 = 32512.0;
/// What a smaller largest element counts as, so that the quotient is finite.
pub(crate) const SMALLEST: f32 = 1e-30;

/// How finely queries are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum QueryBits {
    /// Two planes: the error of an element is 2^-16 of the largest one.
    #[default]
    Sixteen,
    /// One plane: 2^-8 of the largest one, and half of the multiplications.
    Eight,
}

impl QueryBits {
    /// Largest magnitude of `v`.
    pub(crate) const fn largest(self) -> f32 {
        match self {
            QueryBits::Sixteen => LARGEST,
            QueryBits::Eight => 127.0,
        }
    }
}

/// Four heads in 128 positions.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct QuerySegment {
    /// Upper bytes: `[quarter][head][position]`.
    pub(crate) hi: [[[i8; 16]; HEADS]; QUARTERS],
    /// Lower bytes; zero where there is one plane.
    pub(crate) lo: [[[i8; 16]; HEADS]; QUARTERS],
    /// `-128` times the sum of `v` over the positions of each `[head][block]`.
    pub(crate) bias: [[i32; 4]; HEADS],
}

impl QuerySegment {
    pub(crate) const ZERO: QuerySegment = QuerySegment {
        hi: [[[0; 16]; HEADS]; QUARTERS],
        lo: [[[0; 16]; HEADS]; QUARTERS],
        bias: [[0; 4]; HEADS],
    };
}

/// `v` itself, for multiplications of 16 bits: `[quarter][head][position]`.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct WideSegment(pub(crate) [[[i16; 16]; HEADS]; QUARTERS]);

/// Queries of a group of heads as integers; see the module. Kept from call to call for its memory.
#[derive(Clone, Default)]
pub struct QueryCodes {
    /// `[four heads][segment]`.
    pub(crate) segments: Vec<QuerySegment>,
    /// The same in 16 bits, where the instruction set reads that.
    pub(crate) wide: Vec<WideSegment>,
    /// Steps, padded with zeros to four heads.
    pub(crate) steps: Vec<f32>,
    pub(crate) heads: usize,
    pub(crate) dims: usize,
    pub(crate) bits: QueryBits,
}

impl QueryCodes {
    /// How many queries there are.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// What a unit of each query stands for.
    pub fn steps(&self) -> &[f32] {
        &self.steps[..self.heads]
    }

    /// Element `i` of query `h`, as rounded.
    ///
    /// # Panics
    /// There is no such element.
    pub fn code(&self, h: usize, i: usize) -> i32 {
        assert!(h < self.heads && i < self.dims, "query {h}, element {i}");
        let segment = &self.segments[h / HEADS * self.dims.div_ceil(SEGMENT) + i / SEGMENT];
        let p = super::position(SEGMENT, i % SEGMENT);
        let byte = |plane: &[[[i8; 16]; HEADS]; QUARTERS]| i32::from(plane[p / 16][h % HEADS][p % 16]);
        match self.bits {
            QueryBits::Sixteen => 256 * byte(&segment.hi) + byte(&segment.lo),
            QueryBits::Eight => byte(&segment.hi),
        }
    }

    /// Segments of a query.
    pub(crate) fn row_segments(&self) -> usize {
        self.dims.div_ceil(SEGMENT)
    }

    fn resize(&mut self, heads: usize, dims: usize, bits: QueryBits, wide: bool) {
        (self.heads, self.dims, self.bits) = (heads, dims, bits);
        let groups = heads.div_ceil(HEADS);
        let n = groups * self.row_segments();
        // What is beyond the heads and dims of now must be zero, and what is within is written.
        if !heads.is_multiple_of(HEADS) || !dims.is_multiple_of(SEGMENT) {
            self.segments.clear();
            self.wide.clear();
        }
        self.segments.resize(n, QuerySegment::ZERO);
        if wide {
            self.wide.resize(n, WideSegment([[[0; 16]; HEADS]; QUARTERS]));
        } else {
            self.wide.clear();
        }
        self.steps.clear();
        self.steps.resize(groups * HEADS, 0.0);
    }
}

/// The factor and the step for a query whose largest magnitude has the bits `largest`; `None` where that is not finite.
#[inline(always)]
pub(crate) fn factor(largest: u32, bits: QueryBits) -> Option<(f32, f32)> {
    let m = f32::from_bits(largest);
    // Bits above those of infinity are NaN, which is not finite either.
    m.is_finite().then(|| {
        let m = if m > SMALLEST { m } else { SMALLEST };
        (bits.largest() / m, m / bits.largest())
    })
}

/// One head at a time in plain Rust, for every instruction set that has nothing better.
pub(crate) fn quantize(queries: &[f32], out: &mut QueryCodes, wide: bool) {
    let row_segments = out.row_segments();
    let bits = out.bits;
    for (h, query) in queries.chunks_exact(out.dims).enumerate() {
        let largest = query.iter().fold(0, |m, x| (x.to_bits() & 0x7fff_ffff).max(m));
        let (factor, step) = factor(largest, bits).unwrap_or((f32::NAN, f32::NAN));
        out.steps[h] = step;
        for (s, numbers) in query.chunks(SEGMENT).enumerate() {
            let mut v = [0i32; SEGMENT];
            for (v, &x) in v.iter_mut().zip(numbers) {
                // A NaN, whatever its origin, becomes 0 by the cast.
                *v = (x * factor).round_ties_even() as i32;
            }
            let at = h / HEADS * row_segments + s;
            let (head, segment) = (h % HEADS, &mut out.segments[at]);
            let mut sums = [0i32; 4];
            for q in 0..QUARTERS {
                for l in 0..4 {
                    for e in 0..4 {
                        let v = v[l * CODE_BLOCK + 4 * q + e];
                        let (hi, lo) = match bits {
                            QueryBits::Sixteen => ((v + 128) >> 8, v as i8),
                            QueryBits::Eight => (v, 0),
                        };
                        segment.hi[q][head][4 * l + e] = hi as i8;
                        segment.lo[q][head][4 * l + e] = lo;
                        if wide {
                            out.wide[at].0[q][head][4 * l + e] = v as i16;
                        }
                        sums[l] += v;
                    }
                }
            }
            segment.bias[head] = sums.map(|sum| sum.wrapping_mul(-128));
        }
    }
}

impl Kernels {
    /// Rounds queries `[g][shape.dims]` to integers, as the module of [`QueryCodes`] says.
    ///
    /// # Panics
    /// The length is not that of whole queries, or `shape.dims` is not a multiple of 8.
    pub fn quantize_queries(&self, shape: CodeShape, bits: QueryBits, queries: &[f32], out: &mut QueryCodes) {
        shape.check("quantize_queries");
        let heads = queries.len() / shape.dims;
        assert_eq!(queries.len(), heads * shape.dims, "quantize_queries: queries for {shape:?}");
        out.resize(heads, shape.dims, bits, self.code_scores.wide);
        // SAFETY: this table was handed out against proof of its instruction set, and the buffers have their sizes.
        unsafe { (self.code_scores.quantize)(queries, out) }
    }
}
