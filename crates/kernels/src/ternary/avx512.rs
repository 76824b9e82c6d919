//! The integer products with AVX-512 BW: bytes are multiplied into 16-bit pairs, which go to 32 bits after every block.
//!
//! A pair sum is at most `2 * 2 * 128 = 512`, four groups make 2048: nothing wraps or saturates.

use super::{Activations, BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, TernaryTable, Tiles, UNIT};
use std::arch::x86_64::*;

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

/// Sums the lanes of four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn sum4(v: [__m512i; TILE_ROWS]) -> __m128i {
    let t01 = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    let t23 = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    let q = _mm512_add_epi32(_mm512_unpacklo_epi64(t01, t23), _mm512_unpackhi_epi64(t01, t23));
    let h = _mm256_add_epi32(_mm512_castsi512_si256(q), _mm512_extracti64x4_epi64::<1>(q));
    _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256::<1>(h))
}

/// Turns the sums of codes into results: `(dot - sum) as f32 * scale`, for the rows that exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn finish(v: [__m512i; TILE_ROWS], sum: i32, scale: f32, out: &mut [f32]) {
    let dots = _mm_sub_epi32(sum4(v), _mm_set1_epi32(sum));
    let scaled = _mm_mul_ps(_mm_cvtepi32_ps(dots), _mm_set1_ps(scale));
    if let Ok(four) = <&mut [f32; TILE_ROWS]>::try_from(&mut *out) {
        // SAFETY: an array of four is writable for four.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), scaled) };
        return;
    }
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile_sums<const T: usize>(
    tile: *const u8,
    blocks: usize,
    codes: *const i8,
) -> [[__m512i; TILE_ROWS]; T] {
    let three = _mm512_set1_epi8(3);
    let ones = _mm512_set1_epi16(1);
    let mut acc = [[_mm512_setzero_si512(); TILE_ROWS]; T];
    for block in 0..blocks {
        for row in 0..TILE_ROWS {
            let unit = tile.wrapping_add(block * BLOCK_BYTES + row * UNIT);
            // A request beyond the end of the matrix is harmless: prefetches do not fault.
            _mm_prefetch::<_MM_HINT_T1>(unit.wrapping_add(PREFETCH_BYTES).cast());
            // SAFETY: block < blocks; a unit has 64 bytes.
            let w = unsafe { _mm512_loadu_si512(unit.cast()) };
            let groups = [
                _mm512_and_si512(w, three),
                _mm512_and_si512(_mm512_srli_epi16::<2>(w), three),
                _mm512_and_si512(_mm512_srli_epi16::<4>(w), three),
                _mm512_and_si512(_mm512_srli_epi16::<6>(w), three),
            ];
            for t in 0..T {
                let mut pairs = _mm512_setzero_si512();
                for (g, &group) in groups.iter().enumerate() {
                    let at = t * blocks * BLOCK_COLS + block * BLOCK_COLS + g * UNIT;
                    // SAFETY: t < T, block < blocks and g < 4: 64 codes of this token and block.
                    let a = unsafe { _mm512_loadu_si512(codes.add(at).cast()) };
                    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(group, a));
                }
                acc[t][row] = _mm512_add_epi32(acc[t][row], _mm512_madd_epi16(pairs, ones));
            }
        }
    }
    acc
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn gemv(tiles: Tiles<'_>, activations: Activations<'_>, out: &mut [f32]) {
    gemm(tiles, activations, out);
}

stamp_gemm!("avx512f,avx512bw,avx512dq,avx512vl", tile_sums, 1 2 3 to 4);
