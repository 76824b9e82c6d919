//! Rounding weights to 16 bits with AVX-512: sixteen rows at a time, or four rows and four blocks.

use super::super::Scales;
use super::lanes::HEADS;
use super::prepare::{Factors, Prepare, Steps, Weights};
use std::arch::x86_64::*;
use std::ops::Range;

/// Rounds weights, four rows and four blocks to a register.
pub(super) struct Rounding;

/// Rows by blocks from blocks by rows (and back): lanes of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposition(blocks: usize) -> __m512i {
    const LANES: [[i32; 16]; 4] = {
        let mut all = [[0; 16]; 4];
        let mut i = 0;
        while i < 64 {
            let (blocks, b, k) = (i / 16 + 1, i % 16 / 4, i % 4);
            all[i / 16][i % 16] = (4 * k + b % blocks) as i32;
            i += 1;
        }
        all
    };
    // SAFETY: sixteen numbers.
    unsafe { _mm512_loadu_si512(LANES[blocks - 1].as_ptr().cast()) }
}

/// The scales of four rows from `t` on, `[block][row]`; rows that do not exist have zeros.
///
/// # Safety
/// `scales` are those of `factors`, `t < n`; `WHOLE`: rows have four blocks, and there are four rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn four_rows<const WHOLE: bool>(
    factors: &Factors<'_>,
    scales: &[f32],
    t: usize,
    order: __m512i,
) -> __m512i {
    let stride = factors.shape.blocks();
    let p = scales.as_ptr().wrapping_add(t * stride + factors.first_block);
    // SAFETY: four rows of four blocks follow each other, or the mask leaves the blocks of the segment in rows below n.
    unsafe {
        let rows = if WHOLE {
            _mm512_loadu_si512(p.cast())
        } else if stride == 4 {
            let some = if t + 4 <= factors.n { !0 } else { (1 << (4 * (factors.n - t))) - 1 };
            _mm512_maskz_loadu_epi32(some, p.cast())
        } else {
            let blocks = (1u8 << factors.blocks) - 1;
            let row = |k: usize| {
                let some = if t + k < factors.n { blocks } else { 0 };
                _mm_maskz_loadu_epi32(some, p.wrapping_add(k * stride).cast())
            };
            let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(0)), row(1));
            let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(2)), row(3));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        };
        _mm512_permutexvar_epi32(order, rows)
    }
}

/// The weights of head `h` and of four rows from `t` on, in every lane of 128 bits.
///
/// # Safety
/// `weights` has a head `h` of `n` rows, `t < n`; `WHOLE`: there are four rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn four_weights<const WHOLE: bool>(factors: &Factors<'_>, h: usize, t: usize) -> __m512 {
    let p = factors.weights.as_ptr().wrapping_add(h * factors.n + t);
    // SAFETY: the mask leaves rows below n.
    unsafe {
        let four = if WHOLE || t + 4 <= factors.n {
            _mm_loadu_ps(p)
        } else {
            _mm_maskz_loadu_ps((1 << (factors.n - t)) - 1, p)
        };
        _mm512_broadcast_f32x4(four)
    }
}

/// The weights of head `h` and of sixteen rows from `t` on, times the scales of rows.
///
/// # Safety
/// As [`four_weights`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn sixteen(factors: &Factors<'_>, h: usize, t: usize) -> __m512 {
    let some = if t + 16 <= factors.n { !0 } else { (1 << (factors.n - t)) - 1 };
    let p = factors.weights.as_ptr().wrapping_add(h * factors.n + t);
    // SAFETY: the mask leaves rows below n.
    unsafe {
        let w = _mm512_maskz_loadu_ps(some, p);
        match factors.scales {
            Scales::Row(scales) => {
                _mm512_mul_ps(w, _mm512_maskz_loadu_ps(some, scales.as_ptr().wrapping_add(t)))
            }
            _ => w,
        }
    }
}

/// Rounds the weights of groups of four rows, counted from row `start` on, times the scales of blocks, and adds them up.
///
/// # Safety
/// As [`four_rows`] and [`four_weights`]; `words` has room for the groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn of_blocks<const H: usize, const WHOLE: bool>(
    factors: &Factors<'_>,
    scales: &[f32],
    (start, groups): (usize, Range<usize>),
    inverses: &[__m512; H],
    words: *mut i16,
    sums: &mut [__m512i; H],
) {
    let (order, back) = (transposition(factors.blocks), transposition(4));
    for g in groups {
        let t = start + 4 * g;
        // SAFETY: the caller's; the words of a stretch end with those of its last group, of an even number of heads.
        unsafe {
            let s = _mm512_castsi512_ps(four_rows::<WHOLE>(factors, scales, t, order));
            for h in (0..H).step_by(2) {
                let mut q = [_mm512_setzero_si512(); 2];
                for i in 0..2.min(H - h) {
                    let u = _mm512_mul_ps(four_weights::<WHOLE>(factors, h + i, t), s);
                    q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(u, inverses[h + i]));
                    sums[h + i] = _mm512_add_epi32(sums[h + i], q[i]);
                }
                // In a lane of 128 bits, which is a block: the two halves of a head, then of the next.
                let both = _mm512_permutexvar_epi32(back, _mm512_packs_epi32(q[0], q[1]));
                _mm512_storeu_si512(words.add(Weights::of_blocks(g, h, 0, H)).cast(), both);
            }
        }
    }
}

/// The larger magnitude of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn larger(a: __m512, b: __m512) -> __m512 {
    _mm512_range_ps::<0b1011>(a, b)
}

/// The largest magnitude.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn most(x: &[f32]) -> f32 {
    let mut lanes = [_mm512_setzero_ps(); 2];
    let (pairs, rest) = x.as_chunks::<32>();
    for pair in pairs {
        for (i, lanes) in lanes.iter_mut().enumerate() {
            // SAFETY: half of 32 numbers.
            *lanes = larger(*lanes, unsafe { _mm512_loadu_ps(pair.as_ptr().add(16 * i)) });
        }
    }
    let mut most = _mm512_reduce_max_ps(larger(lanes[0], lanes[1]));
    for x in rest {
        most = if x.abs() > most { x.abs() } else { most };
    }
    most
}

// SAFETY of all blocks below: by the contract of the trait, the instruction set is enabled, and the rows are there.
impl Prepare for Rounding {
    #[inline(always)]
    unsafe fn largest<const H: usize>(factors: &Factors<'_>) -> Steps {
        let (n, mut weights, mut scales) = (factors.n, [0.0; HEADS], [1.0; 4]);
        // SAFETY: see above.
        unsafe {
            for h in 0..H {
                weights[h] = most(&factors.weights[h * n..(h + 1) * n]);
            }
            match factors.scales {
                Scales::One => {}
                Scales::Row(all) => scales = [most(all); 4],
                Scales::Block(all) => {
                    let (order, mut lanes) = (transposition(factors.blocks), _mm512_setzero_ps());
                    let whole = if factors.shape.blocks() == 4 { n / 4 * 4 } else { 0 };
                    for t in (0..whole).step_by(4) {
                        let rows = four_rows::<true>(factors, all, t, order);
                        lanes = larger(lanes, _mm512_castsi512_ps(rows));
                    }
                    for t in (whole..n).step_by(4) {
                        let rows = four_rows::<false>(factors, all, t, order);
                        lanes = larger(lanes, _mm512_castsi512_ps(rows));
                    }
                    let lanes = larger(lanes, _mm512_permute_ps::<0b01_00_11_10>(lanes));
                    let lanes = larger(lanes, _mm512_permute_ps::<0b10_11_00_01>(lanes));
                    // The first lane of each quarter.
                    let four = _mm512_maskz_compress_ps(0x1111, lanes);
                    _mm_storeu_ps(scales.as_mut_ptr(), _mm512_castps512_ps128(four));
                }
            }
        }
        super::prepare::steps(weights, scales)
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
        // SAFETY: see above; the words of a stretch end with those of its last group, of an even number of heads.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); H];
            let mut inverses = [_mm512_setzero_ps(); H];
            let each = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
            for h in 0..H {
                let four = _mm512_castps128_ps512(_mm_loadu_ps(inverse[h].as_ptr()));
                inverses[h] = _mm512_permutexvar_ps(each, four);
            }
            if let Scales::Block(scales) = factors.scales {
                let groups = count.div_ceil(4);
                let whole = if factors.shape.blocks() == 4 { count / 4 } else { 0 };
                of_blocks::<H, true>(factors, scales, (start, 0..whole), &inverses, words, &mut sums);
                of_blocks::<H, false>(factors, scales, (start, whole..groups), &inverses, words, &mut sums);
                for h in 0..H {
                    let mut pairs = _mm512_add_epi32(sums[h], _mm512_shuffle_epi32::<0b10_11_00_01>(sums[h]));
                    if factors.whole {
                        pairs = _mm512_add_epi32(pairs, _mm512_shuffle_epi32::<0b01_00_11_10>(pairs));
                    }
                    let four = _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, pairs));
                    let at = bias[h].as_mut_ptr().cast();
                    _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), four));
                }
            } else {
                for t in (0..count).step_by(16) {
                    for h in 0..H {
                        let u = sixteen(factors, h, start + t);
                        let q = _mm512_cvtps_epi32(_mm512_mul_ps(u, inverses[h]));
                        sums[h] = _mm512_add_epi32(sums[h], q);
                        let to = words.add(Weights::of_row(0, h, 0) + t);
                        _mm256_storeu_si256(to.cast(), _mm512_cvtsepi32_epi16(q));
                    }
                }
                for h in 0..H {
                    // Rows 0 and 1 of each group of four.
                    let some = if factors.whole { 0xffff } else { 0x3333 };
                    let sum = _mm512_mask_reduce_add_epi32(some, sums[h]);
                    bias[h] = bias[h].map(|b| b.wrapping_add(sum));
                }
            }
        }
    }
}
