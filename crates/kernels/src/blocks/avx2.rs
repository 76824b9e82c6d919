//! The block products with AVX2: bytes are multiplied into 16-bit pairs, of which two fit (`2 * 2 * 63 * 128 < 2^15`).
//! The sixteen lanes are two registers, the bytes 0 to 31 and 32 to 63 of each group.

use super::{BlockFormat, BlockTable, Blocks, GROUP, PlaneBlock};
use crate::TILE_ROWS;
use crate::vector::{A16, F32x16, load};
use std::arch::x86_64::*;

pub(crate) static TABLE: BlockTable = BlockTable { q6, q4 };

/// Bytes of a register.
const HALF: usize = 32;

/// Adds the products of four groups to 8 sums.
///
/// # Safety
/// `x` is readable for half a group at each of four places one group apart.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot(mut acc: __m256i, codes: [__m256i; 4], x: *const i8) -> __m256i {
    // SAFETY: passed on to the caller.
    unsafe {
        for g in [0, 2] {
            let pair = _mm256_maddubs_epi16(codes[g], _mm256_loadu_si256(x.add(g * GROUP).cast()));
            let next = _mm256_maddubs_epi16(codes[g + 1], _mm256_loadu_si256(x.add((g + 1) * GROUP).cast()));
            let pairs = _mm256_add_epi16(pair, next);
            acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
    acc
}

/// Half of the codes of the four groups of a unit.
///
/// # Safety
/// `unit` is readable for 32 bytes at each of its two or three parts.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn codes<const Q6: bool>(unit: *const u8) -> [__m256i; 4] {
    // SAFETY: passed on to the caller.
    unsafe {
        let a = _mm256_loadu_si256(unit.cast());
        let b = _mm256_loadu_si256(unit.add(GROUP).cast());
        if Q6 {
            let c = _mm256_loadu_si256(unit.add(2 * GROUP).cast());
            let six = _mm256_set1_epi8(63);
            let first = _mm256_and_si256(_mm256_srli_epi16::<6>(a), _mm256_set1_epi8(3));
            let second = _mm256_and_si256(_mm256_srli_epi16::<4>(b), _mm256_set1_epi8(3 << 2));
            let third = _mm256_and_si256(_mm256_srli_epi16::<2>(c), _mm256_set1_epi8(3 << 4));
            let all = _mm256_or_si256(_mm256_or_si256(first, second), third);
            [_mm256_and_si256(a, six), _mm256_and_si256(b, six), _mm256_and_si256(c, six), all]
        } else {
            let four = _mm256_set1_epi8(15);
            [a, _mm256_srli_epi16::<4>(a), b, _mm256_srli_epi16::<4>(b)].map(|c| _mm256_and_si256(c, four))
        }
    }
}

/// The lanes of the four rows of a tile, which is read in its order in memory.
///
/// # Safety
/// `tile` is readable for a tile of as many blocks as there are `planes`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_lanes<const Q6: bool>(
    format: BlockFormat,
    tile: *const u8,
    planes: &[PlaneBlock],
) -> [[f32; 16]; TILE_ROWS] {
    let units = tile.wrapping_add(format.header(planes.len()));
    let mut acc = [[_mm256_setzero_ps(); 2]; TILE_ROWS];
    for (b, planes) in planes.iter().enumerate() {
        let (hi, lo) = (planes.hi.as_flattened(), planes.lo.as_flattened());
        for (r, acc) in acc.iter_mut().enumerate() {
            let unit = units.wrapping_add((b * TILE_ROWS + r) * format.unit());
            // SAFETY: the arrays of a plane block have 64 bytes a group and 16 sums; the header has the scales of this
            // block, and the tile its units.
            unsafe {
                let scale = if Q6 {
                    let bits = tile.add(2 * (b * TILE_ROWS + r)).cast::<u16>().read_unaligned();
                    _mm256_set1_ps(f32::from_bits(u32::from(bits) << 16))
                } else {
                    let four = _mm_loadl_epi64(tile.add(8 * (b * TILE_ROWS + r)).cast());
                    let four = _mm_castsi128_ps(_mm_slli_epi32::<16>(_mm_cvtepu16_epi32(four)));
                    _mm256_set_m128(four, four)
                };
                for half in 0..2 {
                    let codes = codes::<Q6>(unit.add(half * HALF));
                    let start = _mm256_loadu_si256(planes.start.as_ptr().add(8 * half).cast());
                    let upper = dot(_mm256_setzero_si256(), codes, hi.as_ptr().add(half * HALF));
                    let lower = dot(start, codes, lo.as_ptr().add(half * HALF));
                    let sum = _mm256_add_epi32(_mm256_slli_epi32::<8>(upper), lower);
                    acc[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc[half]);
                }
            }
        }
    }
    let mut lanes = [[0.0; 16]; TILE_ROWS];
    for (lanes, acc) in lanes.iter_mut().zip(acc) {
        // SAFETY: eight lanes at 0 and at 8 of sixteen.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(8), acc[1]);
        }
    }
    lanes
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn product<const Q6: bool>(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
    let format = if Q6 { BlockFormat::Q6 } else { BlockFormat::Q4 };
    let tile_bytes = format.header(tiles.blocks) + tiles.blocks * TILE_ROWS * format.unit();
    let planes = &planes[..tiles.blocks];
    assert!(tiles.data.len() >= tiles.rows.div_ceil(TILE_ROWS) * tile_bytes);
    for (t, out) in out[..tiles.rows].chunks_mut(TILE_ROWS).enumerate() {
        // SAFETY: the assertion above leaves a whole tile here.
        let tile = unsafe { tiles.data.as_ptr().add(t * tile_bytes) };
        // SAFETY: it has as many blocks as there are planes.
        let lanes = unsafe { tile_lanes::<Q6>(format, tile, planes) };
        let [a, b, c, d] = &lanes;
        let sums = A16::sum4([load(a), load(b), load(c), load(d)]);
        for (o, sum) in out.iter_mut().zip(sums) {
            *o = sum * scale;
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q6(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
    product::<true>(tiles, planes, scale, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
    product::<false>(tiles, planes, scale, out);
}
