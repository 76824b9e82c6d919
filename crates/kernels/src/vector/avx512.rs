//! The sixteen lanes as one 512-bit register. The contract of the module above makes every call sound: these methods
//! run only inside entries compiled with AVX-512 F, BW, DQ and VL, which a detection token guards.

use super::F32x16;
use std::arch::x86_64::*;

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(crate) struct Z16(__m512);

impl Z16 {
    /// The lanes of a register.
    #[inline(always)]
    pub(crate) fn from_register(v: __m512) -> Z16 {
        Z16(v)
    }
}

/// The byte shuffle that widens 16 bfloat16 from two copies of their 32 bytes: each word into the upper half of a lane.
/// A byte shuffle stays within 128 bits, so the words 0 to 3, 8 to 11, 4 to 7, 12 to 15 come out in this order.
static WIDEN: [u8; 64] = {
    let mut index = [0x80; 64]; // a set top bit makes zero
    let mut lane = 0;
    while lane < 16 {
        let word = lane % 4 + if lane >= 8 { 4 } else { 0 };
        index[4 * lane + 2] = 2 * word as u8;
        index[4 * lane + 3] = 2 * word as u8 + 1;
        lane += 1;
    }
    index
};

/// The byte shuffle that moves 16 bytes, in each half of a register, to the upper halves of 16 words.
static UPPER: [u8; 64] = {
    let mut index = [0x80; 64];
    let mut word = 0;
    while word < 16 {
        index[2 * word + 1] = word as u8;
        word += 1;
    }
    index
};

/// The mask, out of sight of the optimiser. It would split a masked permutation into a permutation and an AND, and turn
/// blends, which have two ports, into shuffles, which have one.
#[inline(always)]
fn opaque_mask(mut mask: u32) -> u32 {
    // SAFETY: no instruction at all; it may be hoisted and repeated.
    unsafe {
        std::arch::asm!("/* {0:e} */", inout(reg) mask, options(pure, nomem, nostack, preserves_flags))
    };
    mask
}

/// The address, out of sight of the optimiser, which would replace a byte shuffle of known indices by two instructions.
#[inline(always)]
#[expect(clippy::pointers_in_nomem_asm_block, reason = "the address passes through; nothing is read there")]
fn opaque_table(table: &'static [u8; 64]) -> *const u8 {
    let mut p = table.as_ptr();
    // SAFETY: no instruction at all; it may be hoisted and repeated.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) p, options(pure, nomem, nostack, preserves_flags)) };
    p
}

/// One level of the fixed tree on two vectors at once: the halves of `a` at the given distance are added into one half
/// of the result, those of `b` into the other. A blend and a shuffle, or two shuffles where one would have to cross
/// lanes in two vectors: that takes twice the time on Zen 4.
macro_rules! fold {
    (8, $a:expr, $b:expr) => {{
        let (a, b) = ($a, $b);
        let mask = opaque_mask(0xff00) as u16;
        _mm512_add_ps(_mm512_mask_blend_ps(mask, a, b), _mm512_shuffle_f32x4::<0b01_00_11_10>(a, b))
    }};
    // The sums of neighbouring quarters of `a`, then those of `b`.
    (4, $a:expr, $b:expr) => {{
        let (a, b) = ($a, $b);
        let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
        _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
    }};
    (2, $a:expr, $b:expr) => {{
        let (a, b) = ($a, $b);
        let mask = opaque_mask(0xcccc) as u16;
        _mm512_add_ps(_mm512_mask_blend_ps(mask, a, b), _mm512_shuffle_ps::<0b01_00_11_10>(a, b))
    }};
    // The sums of neighbours in each quarter: two of `a`, two of `b`.
    (1, $a:expr, $b:expr) => {{
        let (a, b) = ($a, $b);
        let even = _mm512_shuffle_ps::<0b10_00_10_00>(a, b);
        _mm512_add_ps(even, _mm512_shuffle_ps::<0b11_01_11_01>(a, b))
    }};
}

/// Lane `i` of the result is the sum of the lanes of `v[i]` by the fixed tree.
#[inline(always)]
fn transposing_sum(v: [Z16; 16]) -> __m512 {
    // SAFETY: AVX-512 F is present (contract of `vector`).
    unsafe {
        let mut q = [_mm512_setzero_ps(); 4];
        for i in 0..4 {
            let [a, b, c, d] = [v[i].0, v[i + 4].0, v[i + 8].0, v[i + 12].0];
            q[i] = fold!(4, fold!(8, a, b), fold!(8, c, d));
        }
        fold!(1, fold!(2, q[0], q[1]), fold!(2, q[2], q[3]))
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
            // [0 | 1] and [2 | 3] in halves, then quarters 0, 1, 2, 3, then each quarter by itself.
            let p0 = fold!(8, v[0].0, v[1].0);
            let p1 = fold!(8, v[2].0, v[3].0);
            let q = fold!(4, p0, p1);
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
    unsafe fn load_woven(p: *const u16) -> [Z16; 2] {
        // SAFETY: AVX-512 F is present; the caller gives 32 readable elements.
        unsafe {
            let words = _mm512_loadu_si512(p.cast());
            let high = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [Z16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))), Z16(_mm512_castsi512_ps(high))]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Z16 {
        // SAFETY: AVX-512 BW is present; the caller gives 16 readable elements; the table has 64 bytes.
        unsafe {
            // One shuffle for sixteen values, where zero-extension and a shift would be two instructions.
            let twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()));
            let index = _mm512_loadu_si512(opaque_table(&WIDEN).cast());
            Z16(_mm512_castsi512_ps(_mm512_shuffle_epi8(twice, index)))
        }
    }

    #[inline(always)]
    fn reorder(self) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe { _mm512_shuffle_f32x4::<0b11_01_10_00>(self.0, self.0) })
    }

    #[inline(always)]
    fn sum4_reordered(v: [Z16; 4]) -> [f32; 4] {
        Z16::sum4([v[0].reorder(), v[1].reorder(), v[2].reorder(), v[3].reorder()])
    }

    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch of any address does not fault, and SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Z16 {
        // SAFETY: AVX-512 F is present; the caller gives 16 readable elements.
        Z16(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Z16 {
        // SAFETY: AVX-512 F is present; the caller gives 16 readable elements.
        Z16(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: AVX-512 F is present; the caller gives 16 writable elements.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Z16 {
        // SAFETY: AVX-512 F and VL are present; the caller gives 16 readable elements.
        unsafe {
            // As for AVX2; the difference is an exclusive or here.
            let word = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            let carried = _mm256_add_epi16(word, _mm256_set1_epi16(0x80));
            let half = _mm256_ternarylogic_epi64::<0b0111_1000>(word, carried, _mm256_set1_epi16(0x4000));
            Z16(_mm512_cvtph_ps(half))
        }
    }

    #[inline(always)]
    unsafe fn load_e5m2(p: *const u8) -> Z16 {
        // SAFETY: AVX-512 F and VL are present; the caller gives 16 readable elements; the table has 64 bytes.
        unsafe {
            // One shuffle, where zero-extension and a shift would be two instructions.
            let twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
            let index = _mm256_loadu_si256(opaque_table(&UPPER).cast());
            Z16(_mm512_cvtph_ps(_mm256_shuffle_epi8(twice, index)))
        }
    }

    #[inline(always)]
    fn swap_lanes<const H: usize>(self) -> Z16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        Z16(unsafe {
            match H {
                8 => _mm512_shuffle_f32x4::<0b01_00_11_10>(self.0, self.0),
                4 => _mm512_shuffle_f32x4::<0b10_11_00_01>(self.0, self.0),
                2 => _mm512_permute_ps::<0b01_00_11_10>(self.0),
                _ => _mm512_permute_ps::<0b10_11_00_01>(self.0),
            }
        })
    }

    #[inline(always)]
    fn not_at_most(self, floor: Z16) -> u16 {
        // SAFETY: AVX-512 F is present (contract of `vector`).
        unsafe { _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(self.0, floor.0) }
    }

    #[inline(always)]
    unsafe fn equal_u16(p: *const u16, code: u16) -> u16 {
        // SAFETY: AVX-512 BW and VL are present (contract of `vector`); the caller gives 16 readable elements.
        unsafe { _mm256_cmpeq_epi16_mask(_mm256_loadu_si256(p.cast()), _mm256_set1_epi16(code as i16)) }
    }
}
