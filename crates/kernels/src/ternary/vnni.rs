//! The integer products with AVX-512 VNNI: four bytes at a time straight into 32 bits.
//!
//! For one token, groups are separated by a mask alone: group `g` is summed in an accumulator of its own with codes
//! that are `4^g` too large (128 at most, an unsigned byte), and shifted back exactly at the end of the tile.

use super::avx512::finish;
use super::{Activations, BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, TernaryTable, Tiles, UNIT};
use std::arch::x86_64::*;

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gemv(tiles: Tiles<'_>, activations: Activations<'_>, out: &mut [f32]) {
    let tile_bytes = tiles.blocks * BLOCK_BYTES;
    let codes = &activations.codes[..tiles.blocks * BLOCK_COLS];
    assert!(tiles.data.len() >= tiles.rows.div_ceil(TILE_ROWS) * tile_bytes);
    let (sum, scale) = (activations.sums[0], activations.scales[0]);
    for (tile, out) in out[..tiles.rows].chunks_mut(TILE_ROWS).enumerate() {
        // SAFETY: the assertion above leaves a whole tile here, and codes has a block of activations for each of its.
        let acc =
            unsafe { tile_sums(tiles.data.as_ptr().add(tile * tile_bytes), tiles.blocks, codes.as_ptr()) };
        finish(acc, sum, scale, out);
    }
}

/// The four rows of one tile for one token.
///
/// # Safety
/// `tile` is readable for `blocks` blocks of weights, `codes` for `blocks` blocks of activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile_sums(tile: *const u8, blocks: usize, codes: *const i8) -> [__m512i; TILE_ROWS] {
    let masks =
        [_mm512_set1_epi8(3), _mm512_set1_epi8(3 << 2), _mm512_set1_epi8(3 << 4), _mm512_set1_epi8(-64)];
    let mut acc = [[_mm512_setzero_si512(); 4]; TILE_ROWS];
    for block in 0..blocks {
        let mut a = [_mm512_setzero_si512(); 4];
        for g in 0..4 {
            // SAFETY: block < blocks and g < 4: 64 codes of this block.
            a[g] = unsafe { _mm512_loadu_si512(codes.add(block * BLOCK_COLS + g * UNIT).cast()) };
        }
        for row in 0..TILE_ROWS {
            let unit = tile.wrapping_add(block * BLOCK_BYTES + row * UNIT);
            // A request beyond the end of the matrix is harmless: prefetches do not fault.
            _mm_prefetch::<_MM_HINT_T1>(unit.wrapping_add(PREFETCH_BYTES).cast());
            // SAFETY: block < blocks; a unit has 64 bytes.
            let w = unsafe { _mm512_loadu_si512(unit.cast()) };
            for g in 0..4 {
                acc[row][g] = _mm512_dpbusd_epi32(acc[row][g], _mm512_and_si512(w, masks[g]), a[g]);
            }
        }
    }
    let mut sums = [_mm512_setzero_si512(); TILE_ROWS];
    for row in 0..TILE_ROWS {
        let low = _mm512_add_epi32(acc[row][0], _mm512_srai_epi32::<2>(acc[row][1]));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[row][2]), _mm512_srai_epi32::<6>(acc[row][3]));
        sums[row] = _mm512_add_epi32(low, high);
    }
    sums
}

/// One tile for `T` tokens, whose codes lie `blocks * 256` apart. Here a shift pays: it is shared by the tokens, and
/// leaves one accumulator for each row and token.
///
/// # Safety
/// `tile` is readable for `blocks` blocks, `codes` for `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn token_sums<const T: usize>(
    tile: *const u8,
    blocks: usize,
    codes: *const i8,
) -> [[__m512i; TILE_ROWS]; T] {
    let three = _mm512_set1_epi8(3);
    let mut acc = [[_mm512_setzero_si512(); TILE_ROWS]; T];
    for block in 0..blocks {
        let mut w = [_mm512_setzero_si512(); TILE_ROWS];
        for row in 0..TILE_ROWS {
            // SAFETY: block < blocks; a unit has 64 bytes.
            w[row] = unsafe { _mm512_loadu_si512(tile.add(block * BLOCK_BYTES + row * UNIT).cast()) };
        }
        for g in 0..4 {
            let mut a = [_mm512_setzero_si512(); T];
            for t in 0..T {
                let at = t * blocks * BLOCK_COLS + block * BLOCK_COLS + g * UNIT;
                // SAFETY: t < T, block < blocks and g < 4: 64 codes of this token and block.
                a[t] = unsafe { _mm512_loadu_si512(codes.add(at).cast()) };
            }
            for row in 0..TILE_ROWS {
                let codes = _mm512_and_si512(w[row], three);
                w[row] = _mm512_srli_epi16::<2>(w[row]);
                for t in 0..T {
                    acc[t][row] = _mm512_dpbusd_epi32(acc[t][row], codes, a[t]);
                }
            }
        }
    }
    acc
}

stamp_gemm!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", token_sums, 1 2 3 to 4);
