//! The sixteen lanes as one 512-bit register. The contract of the module above makes every call sound: these methods
//! run only inside entries compiled with AVX-512 F, BW, DQ and VL, which a detection token guards.

use super::F32x16;
use std::arch::x86_64::*;

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(crate) struct Z16(__m512);

/// For the widening of 32 bfloat16: a word of the source above each word of zero (even words are masked away).
static LOW_WORDS: [u16; 32] = widening(0);
static HIGH_WORDS: [u16; 32] = widening(16);

const fn widening(first: u16) -> [u16; 32] {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 16 {
        index[2 * i + 1] = first + i as u16;
        i += 1;
    }
    index
}

/// The lanes of the two-vector permutations in [`transposing_sum`]: bit 4 picks the second vector.
static SWAP_4: [i32; 16] = [4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27];
static SWAP_1: [i32; 16] = [1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30];

/// One level of the fixed tree on two vectors at once: the halves of `a` at the given distance are added into one half
/// of the result, those of `b` into the other. A blend and one permutation for two vectors.
macro_rules! fold {
    (8, $a:expr, $b:expr) => {
        _mm512_add_ps(_mm512_mask_blend_ps(0xff00, $a, $b), _mm512_shuffle_f32x4::<0b01_00_11_10>($a, $b))
    };
    (4, $a:expr, $b:expr, $swap:expr) => {
        _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, $a, $b), _mm512_permutex2var_ps($a, $swap, $b))
    };
    (2, $a:expr, $b:expr) => {
        _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, $a, $b), _mm512_shuffle_ps::<0b01_00_11_10>($a, $b))
    };
    (1, $a:expr, $b:expr, $swap:expr) => {
        _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, $a, $b), _mm512_permutex2var_ps($a, $swap, $b))
    };
}

/// Lane `i` of the result is the sum of the lanes of `v[i]` by the fixed tree.
#[inline(always)]
fn transposing_sum(v: [Z16; 16]) -> __m512 {
    // SAFETY: AVX-512 F is present (contract of `vector`); the index tables have 16 entries.
    unsafe {
        let swap4 = _mm512_loadu_si512(SWAP_4.as_ptr().cast());
        let swap1 = _mm512_loadu_si512(SWAP_1.as_ptr().cast());
        let mut p = [_mm512_setzero_ps(); 8];
        for i in 0..8 {
            p[i] = fold!(8, v[i].0, v[i + 8].0);
        }
        let mut q = [_mm512_setzero_ps(); 4];
        for i in 0..4 {
            q[i] = fold!(4, p[i], p[i + 4], swap4);
        }
        let r0 = fold!(2, q[0], q[2]);
        let r1 = fold!(2, q[1], q[3]);
        fold!(1, r0, r1, swap1)
    }
}

impl F32x16 for Z16 {
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Z16 {
        // SAFETY: AVX-512 F is present; the caller gives 16 readable elements.
        Z16(unsafe { _mm512_loadu_ps(p) })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: AVX-512 F is present; the caller gives 16 writable elements.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }

    #[inline(always)]
    fn add(self, o: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_add_ps(self.0, o.0) })
    }

    #[inline(always)]
    fn sub(self, o: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_sub_ps(self.0, o.0) })
    }

    #[inline(always)]
    fn mul(self, o: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_mul_ps(self.0, o.0) })
    }

    #[inline(always)]
    fn div(self, o: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_div_ps(self.0, o.0) })
    }

    #[inline(always)]
    fn mul_add(self, b: Z16, c: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn abs(self) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_abs_ps(self.0) })
    }

    #[inline(always)]
    fn neg(self) -> Z16 {
        // SAFETY: AVX-512 DQ is present (contract of `vector`).
        Z16(unsafe { _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)) })
    }

    #[inline(always)]
    fn max(self, o: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_max_ps(self.0, o.0) })
    }

    #[inline(always)]
    fn min(self, o: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_min_ps(self.0, o.0) })
    }

    #[inline(always)]
    fn shl23(self) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0))) })
    }

    #[inline(always)]
    fn zero_where_less(self, x: Z16, bound: Z16) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x.0, bound.0);
            Z16(_mm512_mask_mov_ps(self.0, less, _mm512_setzero_ps()))
        }
    }

    #[inline(always)]
    fn sum4(v: [Z16; 4]) -> [f32; 4] {
        // SAFETY: AVX-512 F, DQ and VL are present (contract of `vector`).
        unsafe {
            let swap4 = _mm512_loadu_si512(SWAP_4.as_ptr().cast());
            // [0 | 2] and [1 | 3] in halves, then quarters 0, 1, 2, 3, then each quarter by itself.
            let p0 = fold!(8, v[0].0, v[2].0);
            let p1 = fold!(8, v[1].0, v[3].0);
            let q = fold!(4, p0, p1, swap4);
            let r = _mm512_add_ps(q, _mm512_permute_ps::<0b01_00_11_10>(q));
            let s = _mm512_add_ps(r, _mm512_permute_ps::<0b10_11_00_01>(r));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
            out
        }
    }

    #[inline(always)]
    fn sum16(v: [Z16; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: AVX-512 F is present; `out` has 16 elements.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), transposing_sum(v)) };
        out
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Z16 {
        // SAFETY: AVX-512 F is present; the caller gives 16 readable elements.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Z16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn load2_bf16(p: *const u16) -> (Z16, Z16) {
        // SAFETY: AVX-512 BW is present; the caller gives 32 readable elements; the index tables have 32 entries.
        unsafe {
            // One instruction for sixteen values, where zero-extension and a shift would be two.
            let words = _mm512_loadu_si512(p.cast());
            let low = _mm512_loadu_si512(LOW_WORDS.as_ptr().cast());
            let high = _mm512_loadu_si512(HIGH_WORDS.as_ptr().cast());
            let low = _mm512_maskz_permutexvar_epi16(0xaaaa_aaaa, low, words);
            let high = _mm512_maskz_permutexvar_epi16(0xaaaa_aaaa, high, words);
            (Z16(_mm512_castsi512_ps(low)), Z16(_mm512_castsi512_ps(high)))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Z16 {
        // SAFETY: AVX-512 F is present; the caller gives 16 readable elements.
        Z16(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }
}
