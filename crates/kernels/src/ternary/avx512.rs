//! The integer products with AVX-512 BW: bytes are multiplied into 16-bit pairs, which are summed in 16 bits for some
//! blocks.
//!
//! A pair sum is at most `2 * 2 * 128 = 512` in magnitude: 63 of them are within 16 bits. Fifteen blocks make 60.

use super::lanes::{ByteLanes, stamp_gemv, stamp_products, tile_sums};
use super::{TILE_ROWS, TernaryTable};
use std::arch::x86_64::*;

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

/// 64 bytes, or 32 sums of 16 bits, or 16 of 32.
#[derive(Clone, Copy)]
pub(super) struct Z(pub(super) __m512i);

impl Z {
    #[inline(always)]
    pub(super) fn group<const G: usize>(self) -> __m512i {
        // SAFETY: by the contract of the trait, AVX-512 BW is enabled here.
        unsafe {
            let shifted = match G {
                0 => self.0,
                1 => _mm512_srli_epi16::<2>(self.0),
                2 => _mm512_srli_epi16::<4>(self.0),
                _ => _mm512_srli_epi16::<6>(self.0),
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(3))
        }
    }

    /// Sums the lanes of four vectors.
    #[inline(always)]
    pub(super) fn sum_lanes(v: [__m512i; TILE_ROWS]) -> __m128i {
        // SAFETY: by the contract of the trait, AVX-512 BW is enabled here.
        unsafe {
            let t01 = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
            let t23 = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
            let q = _mm512_add_epi32(_mm512_unpacklo_epi64(t01, t23), _mm512_unpackhi_epi64(t01, t23));
            let h = _mm256_add_epi32(_mm512_castsi512_si256(q), _mm512_extracti64x4_epi64::<1>(q));
            _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256::<1>(h))
        }
    }
}

/// Turns the sums of codes into results: `(dot - sum) as f32 * scale`, for the rows that exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn finish(v: [__m512i; TILE_ROWS], sum: i32, scale: f32, out: &mut [f32]) {
    super::lanes::finish(Z::sum_lanes(v), sum, scale, out);
}

impl ByteLanes for Z {
    const BYTES: usize = 64;
    const TOKENS: usize = 6;
    const MAX_BLOCKS: usize = 15;

    #[inline(always)]
    fn zero() -> Z {
        // SAFETY: by the contract of the trait, AVX-512 BW is enabled here.
        unsafe { Z(_mm512_setzero_si512()) }
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Z {
        // SAFETY: the caller's; AVX-512 BW by the contract of the trait.
        unsafe { Z(_mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: the caller's; AVX-512 BW by the contract of the trait.
        unsafe { _mm512_storeu_si512(p.cast(), self.0) }
    }

    #[inline(always)]
    fn codes<const G: usize>(self) -> Z {
        Z(self.group::<G>())
    }

    #[inline(always)]
    fn dot(self, codes: Z, activations: Z) -> Z {
        // SAFETY: by the contract of the trait, AVX-512 BW is enabled here.
        unsafe { Z(_mm512_add_epi16(self.0, _mm512_maddubs_epi16(codes.0, activations.0))) }
    }

    #[inline(always)]
    fn widen(self) -> Z {
        // SAFETY: by the contract of the trait, AVX-512 BW is enabled here.
        unsafe { Z(_mm512_madd_epi16(self.0, _mm512_set1_epi16(1))) }
    }

    #[inline(always)]
    fn add(self, o: Z) -> Z {
        // SAFETY: by the contract of the trait, AVX-512 BW is enabled here.
        unsafe { Z(_mm512_add_epi32(self.0, o.0)) }
    }

    #[inline(always)]
    fn sum4(v: [Z; TILE_ROWS]) -> __m128i {
        Z::sum_lanes([v[0].0, v[1].0, v[2].0, v[3].0])
    }
}

stamp_gemv!("avx512f,avx512bw,avx512dq,avx512vl", Z, tile_sums);
stamp_products!("avx512f,avx512bw,avx512dq,avx512vl", Z);
