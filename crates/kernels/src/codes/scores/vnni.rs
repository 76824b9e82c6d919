//! Scores with AVX-512 VNNI: the quarters of a half segment meet one head each, in four rotations, and registers hold the
//! queries, so that no byte has to be repeated.
//!
//! For 128 numbers and four heads a token costs sixteen products of words with queries of 16 bits, eight of bytes with 8,
//! six operations that bring the heads of four rotations together, and a quarter of the nine that turn four tokens into
//! sums; words take four operations more. Two planes of bytes in place of words, with quarters repeated by shuffles, were
//! a tenth slower, broadcasts by loads slower yet, and so was a register for each head, whose sums are longer.

use super::super::ahead::{LINE, request};
use super::super::avx512::{BARE, EIGHT, FOUR, PLANES, Reader, THREE, TWO, dot_add, segment_bytes};
use super::super::query::{HEADS, QUARTERS, QuerySegment};
use super::super::{CodeBits, QueryBits, SEGMENT, Scales};
use super::{QueryCodes, ScoreTable, Work};
use std::arch::x86_64::*;

pub(crate) static TABLE: ScoreTable = ScoreTable { wide: false, quantize, scores };

/// Tokens that every group of four heads meets before the next ones: they stay in the first-level cache.
const CHUNK: usize = 256;
/// Tokens whose sums are joined.
const TOKENS: usize = 4;
/// Bytes by which requests run ahead of the reading.
const AHEAD: usize = 8192;
/// The same in a lower plane, of which no more is known than the rows that are read.
const AHEAD_LOW: usize = 2048;

const ONE: u8 = 0;
const ROW: u8 = 1;
const BLOCK: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scores(work: Work<'_>, out: &mut [f32], largest: &mut [f32]) {
    match work.query.bits {
        QueryBits::Sixteen => with_bits::<true>(work, out, largest),
        QueryBits::Eight => with_bits::<false>(work, out, largest),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn with_bits<const BOTH: bool>(work: Work<'_>, out: &mut [f32], largest: &mut [f32]) {
    match work.scales {
        Scales::One => with_scales::<BOTH, ONE>(work, &[], out, largest),
        Scales::Row(scales) => with_scales::<BOTH, ROW>(work, scales, out, largest),
        Scales::Block(scales) => with_scales::<BOTH, BLOCK>(work, scales, out, largest),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn with_scales<const BOTH: bool, const KIND: u8>(
    work: Work<'_>,
    scales: &[f32],
    out: &mut [f32],
    largest: &mut [f32],
) {
    let (n, blocks) = (work.n, work.shape.blocks());
    assert!(out.len() == work.query.heads * n);
    match KIND {
        ROW => assert!(scales.len() == n),
        BLOCK => assert!(scales.len() == n * blocks),
        _ => {}
    }
    let whole = if work.shape.dims == SEGMENT { n / TOKENS * TOKENS } else { 0 };
    let origin = Reader::new(work.shape, work.rows).origin();
    match work.shape.bits {
        CodeBits::Eight => segments_of_128::<BOTH, KIND, EIGHT>(work, scales, None, whole, out, largest),
        CodeBits::Four if origin.is_some() => {
            segments_of_128::<BOTH, KIND, { FOUR | BARE }>(work, scales, origin, whole, out, largest)
        }
        CodeBits::Four => segments_of_128::<BOTH, KIND, FOUR>(work, scales, None, whole, out, largest),
        CodeBits::Three if origin.is_some() => {
            segments_of_128::<BOTH, KIND, { THREE | BARE }>(work, scales, origin, whole, out, largest)
        }
        CodeBits::Three => segments_of_128::<BOTH, KIND, THREE>(work, scales, None, whole, out, largest),
        CodeBits::Two if origin.is_some() => {
            segments_of_128::<BOTH, KIND, { TWO | BARE }>(work, scales, origin, whole, out, largest)
        }
        CodeBits::Two => segments_of_128::<BOTH, KIND, TWO>(work, scales, None, whole, out, largest),
        CodeBits::Planes => segments_of_128::<BOTH, KIND, PLANES>(work, scales, None, whole, out, largest),
    }
    if whole < n {
        any::<BOTH, KIND>(work, scales, whole, out);
        for (largest, scores) in largest.iter_mut().zip(out.chunks_exact(n)) {
            for &score in &scores[whole..] {
                *largest = if score > *largest { score } else { *largest };
            }
        }
    }
}

/// Rows of 128 numbers from the first to `end`, a multiple of four.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn segments_of_128<const BOTH: bool, const KIND: u8, const BITS: u8>(
    work: Work<'_>,
    scales: &[f32],
    origin: Option<i32>,
    end: usize,
    out: &mut [f32],
    largest: &mut [f32],
) {
    let n = work.n;
    let reader = Reader::new(work.shape, work.rows);
    for first in (0..end).step_by(CHUNK) {
        for (group, segment) in work.query.segments.iter().enumerate() {
            let heads = HEADS.min(work.query.heads - group * HEADS);
            let step = steps(work.query, group);
            let query = Query::load::<BOTH>(segment, origin);
            let mut most = _mm512_set1_ps(f32::NEG_INFINITY);
            for t in (first..end.min(first + CHUNK)).step_by(TOKENS) {
                let (row, at) = (const { segment_bytes(BITS) }, t * const { segment_bytes(BITS) });
                let later = work.rows.later(at + AHEAD);
                if group == 0 && !later.is_null() {
                    for line in (0..TOKENS * row).step_by(LINE) {
                        request(later.wrapping_add(line));
                    }
                }
                if BITS == PLANES && group == 0 {
                    // From the rows' first on, once.
                    let start = if t == 0 { 0 } else { at + AHEAD_LOW };
                    for line in (start..at + AHEAD_LOW + TOKENS * row).step_by(LINE) {
                        request(work.rows.low.as_ptr().wrapping_add(line));
                    }
                }
                // SAFETY: four rows are left, of one segment.
                let dot = |j| query.products::<BOTH>(unsafe { reader.segment_at::<BITS>(at + j * row) });
                // Not a loop, which the compiler leaves one: sums would go through memory.
                let dots = [dot(0), dot(1), dot(2), dot(3)];
                // SAFETY: four rows of four blocks have their scales, and all heads the places of four rows.
                unsafe {
                    let sum = if KIND == BLOCK {
                        of_blocks(scales.as_ptr().add(4 * t), 4, 4, TOKENS, dots, step)
                    } else {
                        _mm512_castsi512_ps(pair(pair(dots[0], dots[1]), pair(dots[2], dots[3])))
                    };
                    let scores = finish::<KIND>(sum, step, scales.as_ptr().wrapping_add(t), TOKENS);
                    put(scores, out.as_mut_ptr().add(group * HEADS * n + t), n, heads, TOKENS);
                    // The second operand stays where the first is no number.
                    most = _mm512_max_ps(scores, most);
                }
            }
            let most = largest_of_heads(most);
            for (largest, most) in largest.iter_mut().skip(group * HEADS).zip(most) {
                *largest = if most > *largest { most } else { *largest };
            }
        }
    }
}

/// Rows of any length from `start` on.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn any<const BOTH: bool, const KIND: u8>(work: Work<'_>, scales: &[f32], start: usize, out: &mut [f32]) {
    let (n, blocks) = (work.n, work.shape.blocks());
    let reader = Reader::new(work.shape, work.rows);
    let segments = work.query.row_segments();
    for first in (start..n).step_by(CHUNK) {
        for (group, queries) in work.query.segments.chunks_exact(segments).enumerate() {
            let heads = HEADS.min(work.query.heads - group * HEADS);
            let step = steps(work.query, group);
            for t in (first..n.min(first + CHUNK)).step_by(TOKENS) {
                let left = (n - t).min(TOKENS);
                let mut sum = _mm512_setzero_ps();
                for (s, segment) in queries.iter().enumerate() {
                    let mut bytes = [[_mm512_setzero_si512(); 2]; TOKENS];
                    for j in 0..left {
                        // SAFETY: such a row is left.
                        bytes[j] = unsafe { reader.any_segment(t + j, s) };
                    }
                    let query = Query::load::<BOTH>(segment, None);
                    let mut dots = [query.bias; TOKENS];
                    for j in 0..TOKENS {
                        dots[j] = query.products::<BOTH>(bytes[j]);
                    }
                    sum = if KIND == BLOCK {
                        // SAFETY: the rows that are left have scales; a segment that is not the last has four blocks.
                        let new = unsafe {
                            let these = scales.as_ptr().add(t * blocks + 4 * s);
                            of_blocks(these, blocks, blocks - 4 * s, left, dots, step)
                        };
                        if s == 0 { new } else { _mm512_add_ps(sum, new) }
                    } else {
                        let new = pair(pair(dots[0], dots[1]), pair(dots[2], dots[3]));
                        _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sum), new))
                    };
                }
                // SAFETY: the rows that are left have scales, and all heads have their places.
                unsafe {
                    let scores = finish::<KIND>(sum, step, scales.as_ptr().wrapping_add(t), left);
                    put(scores, out.as_mut_ptr().add(group * HEADS * n + t), n, heads, left);
                }
            }
        }
    }
}

/// The steps of a group, in the four lanes of each head.
#[inline]
#[target_feature(enable = "avx512f")]
fn steps(query: &QueryCodes, group: usize) -> __m512 {
    let four = &query.steps[group * HEADS..][..HEADS];
    // SAFETY: there are four.
    let four = unsafe { _mm_loadu_ps(four.as_ptr()) };
    let heads = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_permutexvar_ps(heads, _mm512_castps128_ps512(four))
}

/// The scores `[head][token]` of a segment from its products `[head][block]` of four tokens, of which `left` exist.
///
/// # Safety
/// `scales` is readable for `left` rows `stride` apart, of `blocks` but no more than four each.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn of_blocks(
    scales: *const f32,
    stride: usize,
    blocks: usize,
    left: usize,
    dots: [__m512i; TOKENS],
    step: __m512,
) -> __m512 {
    let mut p = [_mm512_setzero_ps(); TOKENS];
    for j in 0..TOKENS {
        // SAFETY: the caller's; a row that does not exist is the last one again.
        let scales = unsafe { four_scales(scales.add(j.min(left - 1) * stride), blocks) };
        p[j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots[j]), step), scales);
    }
    pair_ps(pair_ps(p[0], p[1]), pair_ps(p[2], p[3]))
}

/// Scores from what was summed `[head][token]`: integers, or with scales of blocks the scores.
///
/// # Safety
/// `scales` is readable for `left` of them, where they belong to rows.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn finish<const KIND: u8>(sum: __m512, step: __m512, scales: *const f32, left: usize) -> __m512 {
    if KIND == BLOCK {
        return sum;
    }
    let scores = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(sum)), step);
    // SAFETY: the caller's.
    if KIND == ROW { _mm512_mul_ps(scores, unsafe { four_scales(scales, left) }) } else { scores }
}

/// Stores scores `[head][token]`, as many as there are.
///
/// # Safety
/// `to` is writable for `left` tokens of each of `heads`, which are `n` apart.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn put(scores: __m512, to: *mut f32, n: usize, heads: usize, left: usize) {
    let scores = [
        _mm512_castps512_ps128(scores),
        _mm512_extractf32x4_ps::<1>(scores),
        _mm512_extractf32x4_ps::<2>(scores),
        _mm512_extractf32x4_ps::<3>(scores),
    ];
    // SAFETY: the caller's.
    unsafe {
        if left == TOKENS && heads == HEADS {
            for h in 0..HEADS {
                _mm_storeu_ps(to.add(h * n), scores[h]);
            }
            return;
        }
        for h in 0..HEADS {
            if h < heads {
                _mm_mask_storeu_ps(to.add(h * n), (1 << left) - 1, scores[h]);
            }
        }
    }
}

/// The largest of the four lanes of each head.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest_of_heads(scores: __m512) -> [f32; HEADS] {
    let two = _mm512_max_ps(scores, _mm512_permute_ps::<0b01_00_11_10>(scores));
    let one = _mm512_max_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
    let mut heads = [0.0; HEADS];
    let four = _mm512_maskz_compress_ps(0x1111, one);
    // SAFETY: four places.
    unsafe { _mm_storeu_ps(heads.as_mut_ptr(), _mm512_castps512_ps128(four)) };
    heads
}

/// Up to four scales, once for each head, and zeros.
///
/// # Safety
/// `p` is readable for `n` scales, but for no more than four.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn four_scales(p: *const f32, n: usize) -> __m512 {
    // SAFETY: the caller's.
    let four = unsafe { if n >= 4 { _mm_loadu_ps(p) } else { _mm_maskz_loadu_ps((1 << n) - 1, p) } };
    _mm512_broadcast_f32x4(four)
}

/// A segment of four heads in registers.
#[derive(Clone, Copy)]
struct Query {
    /// `[rotation]`: quarter `k` of a half for head `(k + rotation) % 4`. Of 16 bits the even and the odd numbers of the
    /// first half as words, then those of the second; of 8 bits the two halves.
    numbers: [[__m512i; 4]; HEADS],
    /// What sums begin with, for the bytes are not the codes.
    bias: __m512i,
}

/// The quarters of `plane` from `first` on, each of another head.
#[inline]
#[target_feature(enable = "avx512f")]
fn rotated(plane: &[[[i8; 16]; HEADS]; QUARTERS], first: usize, rotation: usize) -> __m512i {
    let part = |k: usize| plane[first + k][(k + rotation) % HEADS].as_ptr();
    let [a, b, c, d] = [part(0), part(1), part(2), part(3)];
    // SAFETY: sixteen bytes each.
    unsafe {
        let ab = _mm256_loadu2_m128i(b.cast(), a.cast());
        let cd = _mm256_loadu2_m128i(d.cast(), c.cast());
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(ab), cd)
    }
}

impl Query {
    /// `origin` is the code that bare indices begin with.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn load<const BOTH: bool>(segment: &QuerySegment, origin: Option<i32>) -> Query {
        let mut numbers = [[_mm512_setzero_si512(); 4]; HEADS];
        for r in 0..HEADS {
            for half in 0..2 {
                let hi = rotated(&segment.hi, 4 * half, r);
                if !BOTH {
                    numbers[r][half] = hi;
                    continue;
                }
                // 256 times the upper byte and the lower one, which has a sign.
                let lo = rotated(&segment.lo, 4 * half, r);
                let even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(lo));
                numbers[r][2 * half] = _mm512_add_epi16(_mm512_slli_epi16::<8>(hi), even);
                let upper = _mm512_and_si512(hi, _mm512_set1_epi16(-256));
                numbers[r][2 * half + 1] = _mm512_add_epi16(upper, _mm512_srai_epi16::<8>(lo));
            }
        }
        // SAFETY: sixteen sums.
        let bias = unsafe { _mm512_load_si512(segment.bias.as_ptr().cast()) };
        // The bias is -128 times the sum of the query.
        let bias = match origin {
            Some(origin) => _mm512_mullo_epi32(_mm512_srai_epi32::<7>(bias), _mm512_set1_epi32(-origin)),
            None => bias,
        };
        Query { numbers, bias }
    }

    /// The products `[head][block]` of a token.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn products<const BOTH: bool>(&self, bytes: [__m512i; 2]) -> __m512i {
        let mut acc = [self.bias, _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()];
        if BOTH {
            let words = |x| [_mm512_and_si512(x, _mm512_set1_epi16(255)), _mm512_srli_epi16::<8>(x)];
            let ([a, b], [c, d]) = (words(bytes[0]), words(bytes[1]));
            for (i, words) in [a, b, c, d].into_iter().enumerate() {
                for r in 0..HEADS {
                    acc[r] = dot_add(acc[r], words, self.numbers[r][i]);
                }
            }
        } else {
            for (i, bytes) in bytes.into_iter().enumerate() {
                for r in 0..HEADS {
                    acc[r] = _mm512_dpbusd_epi32(acc[r], bytes, self.numbers[r][i]);
                }
            }
        }
        let ahead = _mm512_add_epi32(acc[0], _mm512_shuffle_i32x4::<0x93>(acc[1], acc[1]));
        let two = _mm512_shuffle_i32x4::<0x4e>(acc[2], acc[2]);
        _mm512_add_epi32(ahead, _mm512_add_epi32(two, _mm512_shuffle_i32x4::<0x39>(acc[3], acc[3])))
    }
}

/// Sums of neighbouring lanes: of each four, two of `a`, then two of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_ps(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b))
}

/// The same of integers.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair(a: __m512i, b: __m512i) -> __m512i {
    let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
    let [x, y] = [_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b)];
    _mm512_add_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y))
}

/// Queries with AVX-512: packing in lanes of sixteen bytes brings the four blocks of a quarter side by side.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize(queries: &[f32], out: &mut QueryCodes) {
    if out.dims != SEGMENT {
        return super::super::query::quantize(queries, out, false);
    }
    let both = out.bits == QueryBits::Sixteen;
    for (h, query) in queries.chunks_exact(out.dims).enumerate() {
        let (group, head) = (h / HEADS, h % HEADS);
        let segment = &mut out.segments[group];
        let load = |i: usize| {
            // SAFETY: a query has 128 numbers, and i < 8.
            unsafe { _mm512_loadu_ps(query.as_ptr().add(16 * i)) }
        };
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut largest = _mm512_setzero_si512();
        for i in 0..8 {
            let bits = _mm512_and_si512(_mm512_castps_si512(load(i)), magnitude);
            largest = _mm512_max_epu32(largest, bits);
        }
        let found = super::super::query::factor(_mm512_reduce_max_epu32(largest), out.bits);
        let (factor, step) = found.unwrap_or((0.0, f32::NAN));
        out.steps[h] = step;
        let factor = _mm512_set1_ps(factor);
        let mut bias = _mm_setzero_si128();
        for half in 0..2 {
            let mut v = [_mm512_setzero_si512(); 4];
            for b in 0..4 {
                let x = load(2 * b + half);
                v[b] = _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
                if found.is_none() {
                    v[b] = _mm512_setzero_si512();
                }
            }
            // In each lane of sixteen bytes: four numbers of block 0, four of block 1; and of the blocks 2 and 3.
            let [a, b] = [_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3])];
            let ones = _mm512_set1_epi16(1);
            let zero = _mm512_setzero_si512();
            let (hi, lo) = if both {
                let round = _mm512_set1_epi16(128);
                let upper = [a, b].map(|v| _mm512_srai_epi16::<8>(_mm512_add_epi16(v, round)));
                let lower = [a, b].map(|v| _mm512_and_si512(v, _mm512_set1_epi16(255)));
                (_mm512_packs_epi16(upper[0], upper[1]), _mm512_packus_epi16(lower[0], lower[1]))
            } else {
                (_mm512_packs_epi16(a, b), zero)
            };
            // Sums of pairs of 16 bits, of two pairs, and of the four lanes: one a block.
            let [a, b] = [_mm512_madd_epi16(a, ones), _mm512_madd_epi16(b, ones)];
            let sums = pair(a, b);
            let sums = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64::<1>(sums));
            let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
            bias = _mm_add_epi32(bias, sums);
            for (plane, bytes) in [(&mut segment.hi, hi), (&mut segment.lo, lo)] {
                let quarters = [
                    _mm512_castsi512_si128(bytes),
                    _mm512_extracti32x4_epi32::<1>(bytes),
                    _mm512_extracti32x4_epi32::<2>(bytes),
                    _mm512_extracti32x4_epi32::<3>(bytes),
                ];
                for (quarter, bytes) in plane[4 * half..4 * half + 4].iter_mut().zip(quarters) {
                    // SAFETY: sixteen places.
                    unsafe { _mm_storeu_si128(quarter[head].as_mut_ptr().cast(), bytes) };
                }
            }
        }
        let bias = _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32::<7>(bias));
        // SAFETY: four places.
        unsafe { _mm_storeu_si128(segment.bias[head].as_mut_ptr().cast(), bias) };
    }
}
