//! Scores with AVX-512 VNNI: a quarter of a segment is broadcast to four heads, and sixteen registers hold the queries.
//!
//! For 128 numbers and four heads in two planes a token costs sixteen products, two operations to join the planes, and a
//! quarter of the nine that turn four tokens into sums. Products are the limit where there is one unit for them.

use super::super::avx512::{EIGHT, FOUR, PLANES, Reader, THREE, TWO};
use super::super::query::{HEADS, QUARTERS, QuerySegment};
use super::super::{CodeBits, QueryBits, SEGMENT, Scales};
use super::{MOST_SEGMENTS, QueryCodes, ScoreTable, Work};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

pub(crate) static TABLE: ScoreTable = ScoreTable { wide: false, quantize, scores };

/// Tokens whose bytes are made before they meet the queries.
const CHUNK: usize = 16;
/// Tokens whose sums are joined.
const FOUR_TOKENS: usize = 4;

/// Rows as biased bytes: `[segment][token][position]`.
#[repr(C, align(64))]
struct Scratch(MaybeUninit<[[[u8; SEGMENT]; CHUNK]; MOST_SEGMENTS]>);

impl Scratch {
    #[inline(always)]
    fn row(&mut self, s: usize, t: usize) -> *mut u8 {
        // Within the array as s < 4 and t < 16.
        self.0.as_mut_ptr().cast::<u8>().wrapping_add((s * CHUNK + t) * SEGMENT)
    }
}

const ONE: u8 = 0;
const ROW: u8 = 1;
const BLOCK: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scores(work: Work<'_>, out: &mut [f32]) {
    match work.query.bits {
        QueryBits::Sixteen => planes::<true>(work, out),
        QueryBits::Eight => planes::<false>(work, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn planes<const BOTH: bool>(work: Work<'_>, out: &mut [f32]) {
    match work.scales {
        Scales::One => chunks::<BOTH, ONE>(work, &[], out),
        Scales::Row(scales) => chunks::<BOTH, ROW>(work, scales, out),
        Scales::Block(scales) => chunks::<BOTH, BLOCK>(work, scales, out),
    }
}

/// Writes the bytes of tokens `first..first + count` of segment `s`.
///
/// # Safety
/// There are these tokens, at most [`CHUNK`], and `BITS` are those of the shape.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack<const BITS: u8>(
    reader: &Reader<'_>,
    scratch: &mut Scratch,
    s: usize,
    first: usize,
    count: usize,
) {
    for t in 0..count {
        let to = scratch.row(s, t);
        // SAFETY: the caller's token; a row of the scratch has 128 bytes.
        unsafe {
            let [a, b] = reader.segment::<BITS>(first + t, s);
            _mm512_store_si512(to.cast(), a);
            _mm512_store_si512(to.add(64).cast(), b);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn chunks<const BOTH: bool, const KIND: u8>(work: Work<'_>, scales: &[f32], out: &mut [f32]) {
    let reader = Reader::new(work.shape, work.rows);
    let segments = work.query.row_segments();
    let mut scratch = Scratch(MaybeUninit::uninit());
    for first in (0..work.n).step_by(CHUNK) {
        let count = CHUNK.min(work.n - first);
        for s in 0..segments {
            // SAFETY: first + count <= n, s is a segment of a row, and the bits are matched.
            unsafe {
                match work.shape.bits {
                    CodeBits::Eight => unpack::<EIGHT>(&reader, &mut scratch, s, first, count),
                    CodeBits::Four => unpack::<FOUR>(&reader, &mut scratch, s, first, count),
                    CodeBits::Three => unpack::<THREE>(&reader, &mut scratch, s, first, count),
                    CodeBits::Two => unpack::<TWO>(&reader, &mut scratch, s, first, count),
                    CodeBits::Planes => unpack::<PLANES>(&reader, &mut scratch, s, first, count),
                }
            }
            for t in count..count.next_multiple_of(FOUR_TOKENS) {
                // SAFETY: count <= 16, and what is not a multiple of four is below it.
                unsafe { scratch.row(s, t).write_bytes(0, SEGMENT) };
            }
        }
        for (group, steps) in work.query.steps.chunks_exact(HEADS).enumerate() {
            let mut sums = [_mm512_setzero_si512(); CHUNK / FOUR_TOKENS];
            // SAFETY: four steps.
            let step = unsafe { _mm_loadu_ps(steps.as_ptr()) };
            // One step in the four lanes of each head.
            let spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let step = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(step));
            for s in 0..segments {
                let block = ScaleBlock { scales, blocks: work.shape.blocks(), first, n: work.n, s };
                let segment = &work.query.segments[group * segments + s];
                // SAFETY: the scratch has the bytes of this segment for whole fours of tokens.
                unsafe { fours::<BOTH, KIND>(&mut scratch, segment, count, step, block, &mut sums) };
            }
            let heads = HEADS.min(work.query.heads - group * HEADS);
            for (i, &sum) in sums.iter().enumerate().take(count.div_ceil(FOUR_TOKENS)) {
                let t = first + FOUR_TOKENS * i;
                let left = (work.n - t).min(FOUR_TOKENS);
                let scores = match KIND {
                    BLOCK => _mm512_castsi512_ps(sum),
                    _ => _mm512_mul_ps(_mm512_cvtepi32_ps(sum), step),
                };
                let scores = if KIND == ROW {
                    let mut four = [0.0f32; FOUR_TOKENS];
                    // SAFETY: an array of four; the whole four are within the scales where they are read at once.
                    let four = unsafe {
                        if left == FOUR_TOKENS {
                            _mm_loadu_ps(scales[t..t + FOUR_TOKENS].as_ptr())
                        } else {
                            four[..left].copy_from_slice(&scales[t..]);
                            _mm_loadu_ps(four.as_ptr())
                        }
                    };
                    _mm512_mul_ps(scores, _mm512_broadcast_f32x4(four))
                } else {
                    scores
                };
                let scores = [
                    _mm512_castps512_ps128(scores),
                    _mm512_extractf32x4_ps::<1>(scores),
                    _mm512_extractf32x4_ps::<2>(scores),
                    _mm512_extractf32x4_ps::<3>(scores),
                ];
                for h in 0..heads {
                    let out = &mut out[(group * HEADS + h) * work.n + t..][..left];
                    // SAFETY: four places, in the results or in an array.
                    unsafe {
                        if left == FOUR_TOKENS {
                            _mm_storeu_ps(out.as_mut_ptr(), scores[h]);
                        } else {
                            let mut four = [0.0f32; FOUR_TOKENS];
                            _mm_storeu_ps(four.as_mut_ptr(), scores[h]);
                            out.copy_from_slice(&four[..left]);
                        }
                    }
                }
            }
        }
    }
}

/// Where the scales of a chunk and a segment lie.
#[derive(Clone, Copy)]
struct ScaleBlock<'a> {
    scales: &'a [f32],
    blocks: usize,
    first: usize,
    n: usize,
    s: usize,
}

impl ScaleBlock<'_> {
    /// The scales of token `t` of the chunk, once for each head. Beyond the rows they are those of the last one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn load(&self, t: usize) -> __m512 {
        let row = (self.first + t).min(self.n - 1);
        let these = &self.scales[row * self.blocks + 4 * self.s..(row + 1) * self.blocks];
        let four = if let Some(four) = these.first_chunk::<4>() {
            // SAFETY: four scales.
            unsafe { _mm_loadu_ps(four.as_ptr()) }
        } else {
            // SAFETY: those that there are.
            unsafe { _mm_maskz_loadu_ps((1 << these.len()) - 1, these.as_ptr()) }
        };
        _mm512_broadcast_f32x4(four)
    }
}

/// Adds to the sums of a chunk, four tokens a register as `[head][token]`: exact integers, or with scales of blocks the
/// scores themselves.
///
/// # Safety
/// The scratch has the bytes of this segment for `count` tokens, in whole fours.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn fours<const BOTH: bool, const KIND: u8>(
    scratch: &mut Scratch,
    query: &QuerySegment,
    count: usize,
    step: __m512,
    block: ScaleBlock<'_>,
    sums: &mut [__m512i; CHUNK / FOUR_TOKENS],
) {
    let [mut hi, mut lo] = [[_mm512_setzero_si512(); QUARTERS]; 2];
    for q in 0..QUARTERS {
        // SAFETY: four heads of sixteen bytes.
        unsafe {
            hi[q] = _mm512_load_si512(query.hi[q].as_ptr().cast());
            if BOTH {
                lo[q] = _mm512_load_si512(query.lo[q].as_ptr().cast());
            }
        }
    }
    // SAFETY: sixteen sums.
    let bias = unsafe { _mm512_load_si512(query.bias.as_ptr().cast()) };
    for (i, sum) in sums.iter_mut().enumerate().take(count.div_ceil(FOUR_TOKENS)) {
        let mut dots = [bias; FOUR_TOKENS];
        for j in 0..FOUR_TOKENS {
            let row = scratch.row(block.s, FOUR_TOKENS * i + j);
            let mut upper = _mm512_setzero_si512();
            for q in 0..QUARTERS {
                // SAFETY: a row of the scratch has eight quarters.
                let bytes = unsafe { _mm512_broadcast_i32x4(_mm_load_si128(row.add(16 * q).cast())) };
                if BOTH {
                    upper = _mm512_dpbusd_epi32(upper, bytes, hi[q]);
                    dots[j] = _mm512_dpbusd_epi32(dots[j], bytes, lo[q]);
                } else {
                    dots[j] = _mm512_dpbusd_epi32(dots[j], bytes, hi[q]);
                }
            }
            if BOTH {
                dots[j] = _mm512_add_epi32(dots[j], _mm512_slli_epi32::<8>(upper));
            }
        }
        if KIND == BLOCK {
            let mut p = [_mm512_setzero_ps(); FOUR_TOKENS];
            for j in 0..FOUR_TOKENS {
                let scales = block.load(FOUR_TOKENS * i + j);
                p[j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots[j]), step), scales);
            }
            let four = _mm512_add_ps(even(p[0], p[1]), odd(p[0], p[1]));
            let more = _mm512_add_ps(even(p[2], p[3]), odd(p[2], p[3]));
            let new = _mm512_add_ps(even(four, more), odd(four, more));
            let new = if block.s == 0 { new } else { _mm512_add_ps(_mm512_castsi512_ps(*sum), new) };
            *sum = _mm512_castps_si512(new);
        } else {
            let four = pair(dots[0], dots[1]);
            let more = pair(dots[2], dots[3]);
            *sum = _mm512_add_epi32(*sum, pair(four, more));
        }
    }
}

/// Lanes 0 and 2 of each four of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn even(a: __m512, b: __m512) -> __m512 {
    _mm512_shuffle_ps::<0x88>(a, b)
}

/// Lanes 1 and 3 of each four of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn odd(a: __m512, b: __m512) -> __m512 {
    _mm512_shuffle_ps::<0xdd>(a, b)
}

/// Sums of neighbouring lanes: of each four, two of `a`, then two of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair(a: __m512i, b: __m512i) -> __m512i {
    let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
    _mm512_add_epi32(_mm512_castps_si512(even(a, b)), _mm512_castps_si512(odd(a, b)))
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize(queries: &[f32], out: &mut QueryCodes) {
    super::super::query::quantize(queries, out, false);
}
