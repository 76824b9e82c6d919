//! The sixteen lanes as two 256-bit registers. The contract of the module above makes every call sound: these methods
//! run only inside entries compiled with `avx2,fma,f16c`, which a detection token guards.

use super::F32x16;
use std::arch::x86_64::*;

/// Lanes 0 to 7 and lanes 8 to 15.
#[derive(Clone, Copy)]
pub(crate) struct A16(__m256, __m256);

/// Widens 16 binary16.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen(x: __m256i) -> A16 {
    A16(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x)))
}

/// 16 codes of E4M3 as binary16 of a 256th of their value.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn e4m3_to_f16(codes: __m128i) -> __m256i {
    // Both upper bits are the sign, then come the seven others of the code. Adding one to those changes bit 14 where
    // all are set; elsewhere the difference clears it. (An addition and a subtraction run where no multiplication does;
    // on Zen 4 a three-way logic instruction, which could replace two of these, would take the place of one.)
    let word = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(codes));
    let carried = _mm256_add_epi16(word, _mm256_set1_epi16(0x80));
    _mm256_sub_epi16(word, _mm256_and_si256(carried, _mm256_set1_epi16(0x4000)))
}

/// 16 codes of E5M2 as binary16.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn e5m2_to_f16(codes: __m128i) -> __m256i {
    _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(codes))
}

impl F32x16 for A16 {
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        let v = unsafe { _mm256_set1_ps(x) };
        A16(v, v)
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> A16 {
        // SAFETY: AVX is present; the caller gives 16 readable elements.
        unsafe { A16(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: AVX is present; the caller gives 16 writable elements.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }

    #[inline(always)]
    fn add(self, o: A16) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe { A16(_mm256_add_ps(self.0, o.0), _mm256_add_ps(self.1, o.1)) }
    }

    #[inline(always)]
    fn sub(self, o: A16) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe { A16(_mm256_sub_ps(self.0, o.0), _mm256_sub_ps(self.1, o.1)) }
    }

    #[inline(always)]
    fn mul(self, o: A16) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe { A16(_mm256_mul_ps(self.0, o.0), _mm256_mul_ps(self.1, o.1)) }
    }

    #[inline(always)]
    fn div(self, o: A16) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe { A16(_mm256_div_ps(self.0, o.0), _mm256_div_ps(self.1, o.1)) }
    }

    #[inline(always)]
    fn mul_add(self, b: A16, c: A16) -> A16 {
        // SAFETY: FMA is present (contract of `vector`).
        unsafe { A16(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }

    #[inline(always)]
    fn abs(self) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            A16(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
        }
    }

    #[inline(always)]
    fn neg(self) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            A16(_mm256_xor_ps(sign, self.0), _mm256_xor_ps(sign, self.1))
        }
    }

    #[inline(always)]
    fn max(self, o: A16) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe { A16(_mm256_max_ps(self.0, o.0), _mm256_max_ps(self.1, o.1)) }
    }

    #[inline(always)]
    fn min(self, o: A16) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe { A16(_mm256_min_ps(self.0, o.0), _mm256_min_ps(self.1, o.1)) }
    }

    #[inline(always)]
    fn shl23(self) -> A16 {
        // SAFETY: AVX2 is present (contract of `vector`).
        unsafe {
            A16(
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.0))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.1))),
            )
        }
    }

    #[inline(always)]
    fn zero_where_less(self, x: A16, bound: A16) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe {
            A16(
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, bound.0), self.0),
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, bound.1), self.1),
            )
        }
    }

    #[inline(always)]
    fn sum4(v: [A16; 4]) -> [f32; 4] {
        // SAFETY: AVX2 is present (contract of `vector`).
        unsafe {
            let s = [
                _mm256_add_ps(v[0].0, v[0].1),
                _mm256_add_ps(v[1].0, v[1].1),
                _mm256_add_ps(v[2].0, v[2].1),
                _mm256_add_ps(v[3].0, v[3].1),
            ];
            // Distance 4: the two 128-bit halves of two vectors at once; vectors 0 and 2, then 1 and 3.
            let p02 = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(s[0], s[2]),
                _mm256_permute2f128_ps::<0x31>(s[0], s[2]),
            );
            let p13 = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(s[1], s[3]),
                _mm256_permute2f128_ps::<0x31>(s[1], s[3]),
            );
            // Distance 2, then 1. The sums of vectors 0, 1 | 2, 3 end in lanes 0, 2 | 4, 6.
            let q = _mm256_add_ps(
                _mm256_shuffle_ps::<0b01_00_01_00>(p02, p13),
                _mm256_shuffle_ps::<0b11_10_11_10>(p02, p13),
            );
            let r = _mm256_add_ps(q, _mm256_permute_ps::<0b10_11_00_01>(q));
            let low = _mm256_castps256_ps128(r);
            let high = _mm256_extractf128_ps::<1>(r);
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), _mm_shuffle_ps::<0b10_00_10_00>(low, high));
            out
        }
    }

    #[inline(always)]
    unsafe fn load_woven(p: *const u16) -> [A16; 2] {
        // SAFETY: AVX2 is present; the caller gives 32 readable elements.
        unsafe {
            let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast()));
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let low = (_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b));
            let high = (_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
            [
                A16(_mm256_castsi256_ps(low.0), _mm256_castsi256_ps(low.1)),
                A16(_mm256_castsi256_ps(high.0), _mm256_castsi256_ps(high.1)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> A16 {
        // SAFETY: AVX2 is present; the caller gives 16 readable elements.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            A16(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch of any address does not fault, and SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> A16 {
        // SAFETY: AVX2 is present; the caller gives 16 readable elements.
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()));
            A16(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> A16 {
        // SAFETY: F16C is present; the caller gives 16 readable elements.
        unsafe { widen(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: F16C is present; the caller gives 16 writable elements.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1));
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> A16 {
        // SAFETY: AVX2 and F16C are present; the caller gives 16 readable elements.
        unsafe { widen(e4m3_to_f16(_mm_loadu_si128(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_e5m2(p: *const u8) -> A16 {
        // SAFETY: AVX2 and F16C are present; the caller gives 16 readable elements.
        unsafe { widen(e5m2_to_f16(_mm_loadu_si128(p.cast()))) }
    }

    #[inline(always)]
    fn swap_lanes<const H: usize>(self) -> A16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe {
            match H {
                8 => A16(self.1, self.0),
                4 => A16(
                    _mm256_permute2f128_ps::<1>(self.0, self.0),
                    _mm256_permute2f128_ps::<1>(self.1, self.1),
                ),
                2 => A16(
                    _mm256_permute_ps::<0b01_00_11_10>(self.0),
                    _mm256_permute_ps::<0b01_00_11_10>(self.1),
                ),
                _ => A16(
                    _mm256_permute_ps::<0b10_11_00_01>(self.0),
                    _mm256_permute_ps::<0b10_11_00_01>(self.1),
                ),
            }
        }
    }

    #[inline(always)]
    fn not_at_most(self, floor: A16) -> u16 {
        // SAFETY: AVX is present (contract of `vector`).
        unsafe {
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(self.0, floor.0));
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(self.1, floor.1));
            (low | high << 8) as u16
        }
    }

    #[inline(always)]
    unsafe fn equal_u16(p: *const u16, code: u16) -> u16 {
        // SAFETY: AVX2 is present (contract of `vector`); the caller gives 16 readable elements.
        unsafe {
            let equal = _mm256_cmpeq_epi16(_mm256_loadu_si256(p.cast()), _mm256_set1_epi16(code as i16));
            let (low, high) = (_mm256_castsi256_si128(equal), _mm256_extracti128_si256::<1>(equal));
            _mm_movemask_epi8(_mm_packs_epi16(low, high)) as u16
        }
    }
}
