//! The block products with AVX-512: with VNNI four bytes at a time straight into 32 bits, without it in 16-bit pairs,
//! of which two fit (`2 * 2 * 63 * 128 < 2^15`).
//!
//! A row of a block costs, at 6 bits, three loads, nine operations to separate the groups, eight dot products and five
//! for the sum: 22 for 192 bytes, so that two vector ports are idle half of the time at 8 bytes a cycle.

use super::{BlockFormat, BlockTable, Blocks, GROUP, PlaneBlock};
use crate::TILE_ROWS;
use crate::vector::{F32x16, Z16};
use std::arch::x86_64::*;

/// Stamps both products for one instruction set; `$dot` adds the products of four groups to 16 sums.
macro_rules! stamp {
    ($name:ident, $features:literal, $dot:item) => {
        pub(crate) mod $name {
            use super::*;

            pub(crate) static TABLE: BlockTable = BlockTable { q6, q4 };

            $dot

            /// The codes of the four groups of a unit.
            ///
            /// # Safety
            /// `unit` is readable for a unit of the format.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn codes<const Q6: bool>(unit: *const u8) -> [__m512i; 4] {
                // SAFETY: a unit has three or two times 64 bytes.
                unsafe {
                    let a = _mm512_loadu_si512(unit.cast());
                    let b = _mm512_loadu_si512(unit.add(GROUP).cast());
                    if Q6 {
                        let c = _mm512_loadu_si512(unit.add(2 * GROUP).cast());
                        let six = _mm512_set1_epi8(63);
                        // Bits of 16-bit shifts that cross a byte are masked away: `x ? y : z` is the truth table 0xca.
                        let low = _mm512_ternarylogic_epi32::<0xca>(
                            _mm512_set1_epi8(3),
                            _mm512_srli_epi16::<6>(a),
                            _mm512_srli_epi16::<4>(b),
                        );
                        let all = _mm512_ternarylogic_epi32::<0xca>(
                            _mm512_set1_epi8(15),
                            low,
                            _mm512_srli_epi16::<2>(c),
                        );
                        [a, b, c, all].map(|c| _mm512_and_si512(c, six))
                    } else {
                        let four = _mm512_set1_epi8(15);
                        [a, _mm512_srli_epi16::<4>(a), b, _mm512_srli_epi16::<4>(b)]
                            .map(|c| _mm512_and_si512(c, four))
                    }
                }
            }

            /// The lanes of the four rows of a tile.
            ///
            /// # Safety
            /// `tile` is readable for a tile of as many blocks as there are `planes`.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn tile_lanes<const Q6: bool>(
                format: BlockFormat,
                tile: *const u8,
                planes: &[PlaneBlock],
            ) -> [__m512; TILE_ROWS] {
                let units = tile.wrapping_add(format.header(planes.len()));
                let mut acc = [_mm512_setzero_ps(); TILE_ROWS];
                for (b, planes) in planes.iter().enumerate() {
                    // SAFETY: the arrays of a plane block have these lengths; the header has the scales of this block, and
                    // the tile its units.
                    unsafe {
                        let [mut hi, mut lo] = [[_mm512_setzero_si512(); 4]; 2];
                        for g in 0..4 {
                            hi[g] = _mm512_load_si512(planes.hi[g].as_ptr().cast());
                            lo[g] = _mm512_load_si512(planes.lo[g].as_ptr().cast());
                        }
                        let start = _mm512_load_si512(planes.start.as_ptr().cast());
                        // Four scales that repeat in the lanes, or sixteen.
                        let scales = if Q6 {
                            let four = _mm_loadl_epi64(tile.add(8 * b).cast());
                            let four = _mm_slli_epi32::<16>(_mm_cvtepu16_epi32(four));
                            _mm512_broadcast_f32x4(_mm_castsi128_ps(four))
                        } else {
                            let all = _mm256_loadu_si256(tile.add(32 * b).cast());
                            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(all)))
                        };
                        for r in 0..TILE_ROWS {
                            let unit = units.wrapping_add((b * TILE_ROWS + r) * format.unit());
                            let codes = codes::<Q6>(unit);
                            let upper = dot(_mm512_setzero_si512(), codes, hi);
                            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), dot(start, codes, lo));
                            let scale = match (Q6, r) {
                                (true, 0) => _mm512_permute_ps::<0x00>(scales),
                                (true, 1) => _mm512_permute_ps::<0x55>(scales),
                                (true, 2) => _mm512_permute_ps::<0xaa>(scales),
                                (true, _) => _mm512_permute_ps::<0xff>(scales),
                                (false, 0) => _mm512_shuffle_f32x4::<0x00>(scales, scales),
                                (false, 1) => _mm512_shuffle_f32x4::<0x55>(scales, scales),
                                (false, 2) => _mm512_shuffle_f32x4::<0xaa>(scales, scales),
                                (false, _) => _mm512_shuffle_f32x4::<0xff>(scales, scales),
                            };
                            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[r]);
                        }
                    }
                }
                acc
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn product<const Q6: bool>(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
                let format = if Q6 { BlockFormat::Q6 } else { BlockFormat::Q4 };
                let tile_bytes = format.header(tiles.blocks) + tiles.blocks * TILE_ROWS * format.unit();
                let planes = &planes[..tiles.blocks];
                assert!(tiles.data.len() >= tiles.rows.div_ceil(TILE_ROWS) * tile_bytes);
                for (t, out) in out[..tiles.rows].chunks_mut(TILE_ROWS).enumerate() {
                    // SAFETY: the assertion above leaves a whole tile here.
                    let tile = unsafe { tiles.data.as_ptr().add(t * tile_bytes) };
                    // SAFETY: it has as many blocks as there are planes.
                    let acc = unsafe { tile_lanes::<Q6>(format, tile, planes) };
                    let sums = Z16::sum4(acc.map(Z16::from_register));
                    for (o, sum) in out.iter_mut().zip(sums) {
                        *o = sum * scale;
                    }
                }
            }

            #[target_feature(enable = $features)]
            fn q6(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
                product::<true>(tiles, planes, scale, out);
            }

            #[target_feature(enable = $features)]
            fn q4(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
                product::<false>(tiles, planes, scale, out);
            }
        }
    };
}

stamp!(
    vnni,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni",
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn dot(mut acc: __m512i, codes: [__m512i; 4], x: [__m512i; 4]) -> __m512i {
        for g in 0..4 {
            acc = _mm512_dpbusd_epi32(acc, codes[g], x[g]);
        }
        acc
    }
);

stamp!(
    bw,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl",
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn dot(mut acc: __m512i, codes: [__m512i; 4], x: [__m512i; 4]) -> __m512i {
        for g in [0, 2] {
            let pair = _mm512_maddubs_epi16(codes[g], x[g]);
            let pairs = _mm512_add_epi16(pair, _mm512_maddubs_epi16(codes[g + 1], x[g + 1]));
            acc = _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
        }
        acc
    }
);
