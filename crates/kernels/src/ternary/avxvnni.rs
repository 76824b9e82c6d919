//! The integer products with the 256-bit VNNI dot product: four bytes at a time straight into 32 bits.
//!
//! Stamped twice: with AVX-VNNI's encoding, for processors without AVX-512, and with that of AVX-512 VL, which has the
//! same meaning and lets processors of the other kind test the same body.

use super::TILE_ROWS;
use super::avx2::Y;
use super::lanes::ByteLanes;
use std::arch::x86_64::*;

/// Defines 32 bytes, or 8 sums of 32 bits, with the given dot product.
macro_rules! lanes {
    ($dot:ident) => {
        /// 32 bytes, or 8 sums of 32 bits.
        #[derive(Clone, Copy)]
        pub(super) struct V(__m256i);

        impl ByteLanes for V {
            const BYTES: usize = 32;
            // With the operands, all sixteen registers.
            const TOKENS: usize = 3;
            const MAX_BLOCKS: usize = usize::MAX;

            #[inline(always)]
            fn zero() -> V {
                V(Y::zero().0)
            }

            #[inline(always)]
            unsafe fn load(p: *const u8) -> V {
                // SAFETY: the caller's.
                V(unsafe { Y::load(p) }.0)
            }

            #[inline(always)]
            unsafe fn store(self, p: *mut u8) {
                // SAFETY: the caller's.
                unsafe { Y(self.0).store(p) }
            }

            #[inline(always)]
            fn codes<const G: usize>(self) -> V {
                V(Y(self.0).group::<G>())
            }

            #[inline(always)]
            fn scaled_codes<const G: usize>(self) -> V {
                // SAFETY: by the contract of the trait, AVX2 is enabled here.
                unsafe { V(_mm256_and_si256(self.0, _mm256_set1_epi8((3u8 << (2 * G)) as i8))) }
            }

            #[inline(always)]
            fn rescale(self) -> V {
                // SAFETY: by the contract of the trait, AVX2 is enabled here.
                unsafe { V(_mm256_srai_epi32::<2>(self.0)) }
            }

            #[inline(always)]
            fn dot(self, codes: V, activations: V) -> V {
                // SAFETY: by the contract of the trait, this dot product is enabled here.
                unsafe { V($dot(self.0, codes.0, activations.0)) }
            }

            #[inline(always)]
            fn widen(self) -> V {
                self
            }

            #[inline(always)]
            fn add(self, o: V) -> V {
                V(Y(self.0).add(Y(o.0)).0)
            }

            #[inline(always)]
            fn sum4(v: [V; TILE_ROWS]) -> __m128i {
                Y::sum_lanes([v[0].0, v[1].0, v[2].0, v[3].0])
            }
        }
    };
}

/// With AVX-VNNI.
mod vex {
    use super::*;
    use crate::ternary::lanes::{stamp_gemv, stamp_products, tile_sums};

    pub(crate) static TABLE: crate::ternary::TernaryTable = crate::ternary::TernaryTable { gemv, gemm };
    lanes!(_mm256_dpbusd_avx_epi32);
    stamp_gemv!("avx2,fma,avxvnni", V, tile_sums);
    stamp_products!("avx2,fma,avxvnni", V);
}

pub(crate) use vex::TABLE;
pub(super) use vex::dots;

/// With AVX-512 VL and VNNI, for tests.
#[cfg(test)]
mod evex {
    use super::*;
    use crate::ternary::lanes::{stamp_gemv, stamp_products, tile_sums};

    pub(crate) static TABLE: crate::ternary::TernaryTable = crate::ternary::TernaryTable { gemv, gemm };
    lanes!(_mm256_dpbusd_epi32);
    stamp_gemv!("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni", V, tile_sums);
    stamp_products!("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni", V);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ternary::{Activations, BLOCK_COLS, Tiles};
    use crate::{TernaryShape, isa::token, oracle};

    #[test]
    fn the_body_of_256_bits_agrees_with_the_oracle() {
        if token::Avx512Vnni::detect().is_none() {
            return;
        }
        // SAFETY: AVX-512 VNNI was detected, with VL.
        assert_eq!(unsafe { evex::dots(10) }, 10 * 12 * 32);
        for (rows, cols) in [(1, 1), (5, 255), (7, 257), (13, 2560), (9, 6912)] {
            let shape = TernaryShape { rows, cols };
            let padded = shape.padded_cols();
            for weight in [None, Some(1), Some(-1)] {
                let mut data = vec![0; shape.bytes()];
                match weight {
                    None => shape.fill_random(0..shape.tiles(), 5, &mut data),
                    Some(weight) => shape.pack(0..shape.tiles(), |_, _| weight, &mut data),
                }
                for tokens in [1, 2, 3, 4, 5, 131] {
                    let code = |i: usize| match weight {
                        None => (i * 89 + 17) as u8 as i8,
                        Some(_) => [-128, 127][i / padded % 2],
                    };
                    let codes: Vec<i8> =
                        (0..tokens * padded).map(|i| if i % padded < cols { code(i) } else { 0 }).collect();
                    let sums: Vec<i32> =
                        codes.chunks(padded).map(|t| t.iter().map(|&c| i32::from(c)).sum()).collect();
                    let scales: Vec<f32> = (0..tokens).map(|t| 0.5 + t as f32).collect();
                    let mut want = vec![0.0; tokens * rows];
                    oracle::ternary_gemm(shape, &data, 0..shape.tiles(), &codes, &scales, &mut want);
                    let tiles = Tiles { data: &data, blocks: padded / BLOCK_COLS, rows };
                    let activations = Activations { codes: &codes, sums: &sums, scales: &scales };
                    let mut got = vec![f32::NAN; tokens * rows];
                    // SAFETY: AVX-512 VNNI was detected, with VL.
                    unsafe { (evex::TABLE.gemm)(tiles, activations, &mut got) };
                    assert!(got == want, "{shape:?} {tokens} tokens, weights {weight:?}");
                }
            }
        }
    }
}
