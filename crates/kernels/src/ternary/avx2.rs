//! The integer products with AVX2: bytes are multiplied into 16-bit pairs, which are summed in 16 bits for some blocks.
//!
//! A pair sum is at most `2 * 2 * 128 = 512` in magnitude: 63 of them are within 16 bits. Seven blocks make 56.

use super::TILE_ROWS;
use super::TernaryTable;
use super::lanes::{ByteLanes, stamp_gemv, stamp_products, tile_sums};
use std::arch::x86_64::*;

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

/// 32 bytes, or 16 sums of 16 bits, or 8 of 32.
#[derive(Clone, Copy)]
pub(super) struct Y(pub(super) __m256i);

impl Y {
    #[inline(always)]
    pub(super) fn group<const G: usize>(self) -> __m256i {
        // SAFETY: by the contract of the trait, AVX2 is enabled here.
        unsafe {
            let shifted = match G {
                0 => self.0,
                1 => _mm256_srli_epi16::<2>(self.0),
                2 => _mm256_srli_epi16::<4>(self.0),
                _ => _mm256_srli_epi16::<6>(self.0),
            };
            _mm256_and_si256(shifted, _mm256_set1_epi8(3))
        }
    }

    /// Sums the lanes of four vectors.
    #[inline(always)]
    pub(super) fn sum_lanes(v: [__m256i; TILE_ROWS]) -> __m128i {
        // SAFETY: by the contract of the trait, AVX2 is enabled here.
        unsafe {
            let t01 = _mm256_hadd_epi32(v[0], v[1]);
            let t23 = _mm256_hadd_epi32(v[2], v[3]);
            let q = _mm256_hadd_epi32(t01, t23);
            _mm_add_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q))
        }
    }
}

impl ByteLanes for Y {
    const BYTES: usize = 32;
    // A third token would need more than the sixteen registers, for the products of bytes go through one of their own.
    const TOKENS: usize = 2;
    const MAX_BLOCKS: usize = 7;

    #[inline(always)]
    fn zero() -> Y {
        // SAFETY: by the contract of the trait, AVX2 is enabled here.
        unsafe { Y(_mm256_setzero_si256()) }
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Y {
        // SAFETY: the caller's; AVX2 by the contract of the trait.
        unsafe { Y(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: the caller's; AVX2 by the contract of the trait.
        unsafe { _mm256_storeu_si256(p.cast(), self.0) }
    }

    #[inline(always)]
    fn codes<const G: usize>(self) -> Y {
        Y(self.group::<G>())
    }

    #[inline(always)]
    fn dot(self, codes: Y, activations: Y) -> Y {
        // SAFETY: by the contract of the trait, AVX2 is enabled here.
        unsafe { Y(_mm256_add_epi16(self.0, _mm256_maddubs_epi16(codes.0, activations.0))) }
    }

    #[inline(always)]
    fn widen(self) -> Y {
        // SAFETY: by the contract of the trait, AVX2 is enabled here.
        unsafe { Y(_mm256_madd_epi16(self.0, _mm256_set1_epi16(1))) }
    }

    #[inline(always)]
    fn add(self, o: Y) -> Y {
        // SAFETY: by the contract of the trait, AVX2 is enabled here.
        unsafe { Y(_mm256_add_epi32(self.0, o.0)) }
    }

    #[inline(always)]
    fn sum4(v: [Y; TILE_ROWS]) -> __m128i {
        Y::sum_lanes([v[0].0, v[1].0, v[2].0, v[3].0])
    }
}

stamp_gemv!("avx2,fma", Y, tile_sums);
stamp_products!("avx2,fma", Y);
