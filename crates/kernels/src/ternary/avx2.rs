//! The integer products with AVX2: bytes are multiplied into 16-bit pairs, which go to 32 bits after every half unit.
//!
//! A pair sum is at most `2 * 2 * 128 = 512`, four groups make 2048: nothing wraps or saturates.

use super::{Activations, BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, TernaryTable, Tiles, UNIT};
use std::arch::x86_64::*;

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

/// Turns the sums of codes into results: `(dot - sum) as f32 * scale`, for the rows that exist.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn finish(v: [__m256i; TILE_ROWS], sum: i32, scale: f32, out: &mut [f32]) {
    let t01 = _mm256_hadd_epi32(v[0], v[1]);
    let t23 = _mm256_hadd_epi32(v[2], v[3]);
    let q = _mm256_hadd_epi32(t01, t23);
    let dots = _mm_add_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q));
    let dots = _mm_sub_epi32(dots, _mm_set1_epi32(sum));
    let scaled = _mm_mul_ps(_mm_cvtepi32_ps(dots), _mm_set1_ps(scale));
    let mut four = [0.0; TILE_ROWS];
    // SAFETY: an array of four is writable for four.
    unsafe { _mm_storeu_ps(four.as_mut_ptr(), scaled) };
    out.copy_from_slice(&four[..out.len()]);
}

/// One tile for `T` tokens, whose codes lie `blocks * 256` apart.
///
/// # Safety
/// `tile` is readable for `blocks` blocks, `codes` for `T` tokens.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_sums<const T: usize>(
    tile: *const u8,
    blocks: usize,
    codes: *const i8,
) -> [[__m256i; TILE_ROWS]; T] {
    let three = _mm256_set1_epi8(3);
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_si256(); TILE_ROWS]; T];
    for block in 0..blocks {
        for half in [0, UNIT / 2] {
            for row in 0..TILE_ROWS {
                let unit = tile.wrapping_add(block * BLOCK_BYTES + row * UNIT + half);
                if half == 0 {
                    // A request beyond the end of the matrix is harmless: prefetches do not fault.
                    _mm_prefetch::<_MM_HINT_T1>(unit.wrapping_add(PREFETCH_BYTES).cast());
                }
                // SAFETY: block < blocks; half a unit has 32 bytes.
                let mut w = unsafe { _mm256_loadu_si256(unit.cast()) };
                let mut pairs = [_mm256_setzero_si256(); T];
                for g in 0..4 {
                    let group = _mm256_and_si256(w, three);
                    w = _mm256_srli_epi16::<2>(w);
                    for t in 0..T {
                        let at = t * blocks * BLOCK_COLS + block * BLOCK_COLS + g * UNIT + half;
                        // SAFETY: t < T, block < blocks and g < 4: 32 codes of this token and block.
                        let a = unsafe { _mm256_loadu_si256(codes.add(at).cast()) };
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(group, a));
                    }
                }
                for t in 0..T {
                    acc[t][row] = _mm256_add_epi32(acc[t][row], _mm256_madd_epi16(pairs[t], ones));
                }
            }
        }
    }
    acc
}

// Two tokens at a time: sixteen registers hold no more.
stamp_gemm!("avx2,fma", tile_sums, 1 to 2);

#[target_feature(enable = "avx2,fma")]
fn gemv(tiles: Tiles<'_>, activations: Activations<'_>, out: &mut [f32]) {
    gemm(tiles, activations, out);
}
