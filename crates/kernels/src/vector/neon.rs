//! The sixteen lanes as four 128-bit registers. The contract of the module above makes every call sound: these methods
//! run only inside entries compiled with `neon,dotprod`, which a detection token guards.

use super::F32x16;
use std::arch::aarch64::*;

/// Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.
#[derive(Clone, Copy)]
pub(crate) struct N16(float32x4_t, float32x4_t, float32x4_t, float32x4_t);

/// One operation on each of the four registers of its arguments.
macro_rules! quarters {
    ($op:path: $($v:expr),+) => {
        // SAFETY: NEON is present (contract of `vector`).
        unsafe { N16($op($($v.0),+), $op($($v.1),+), $op($($v.2),+), $op($($v.3),+)) }
    };
}

/// `if a > b { a } else { b }`: the instruction for a maximum gives NaN where either is NaN, and orders the zeros.
#[inline]
#[target_feature(enable = "neon")]
fn greater(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

/// `if a < b { a } else { b }`.
#[inline]
#[target_feature(enable = "neon")]
fn lesser(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcltq_f32(a, b), a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn shl23(x: float32x4_t) -> float32x4_t {
    vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(x)))
}

/// Zero where `x < bound`, `y` elsewhere.
#[inline]
#[target_feature(enable = "neon")]
fn zero_where_less(y: float32x4_t, x: float32x4_t, bound: float32x4_t) -> float32x4_t {
    vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, bound)))
}

/// The first two levels of the fixed tree: lanes 8 apart, then lanes 4 apart.
#[inline]
#[target_feature(enable = "neon")]
fn to_four_lanes(v: N16) -> float32x4_t {
    vaddq_f32(vaddq_f32(v.0, v.2), vaddq_f32(v.1, v.3))
}

/// The third level for two vectors at once: lanes 2 apart, those of `a` into the lower half, of `b` into the upper.
#[inline]
#[target_feature(enable = "neon")]
fn to_two_lanes(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    let (a, b) = (vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b));
    vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b)))
}

/// The sum of those of four bits whose lane is not at most its floor.
#[inline]
#[target_feature(enable = "neon")]
fn marks(x: float32x4_t, floor: float32x4_t, bits: uint32x4_t) -> u32 {
    vaddvq_u32(vbicq_u32(bits, vcleq_f32(x, floor)))
}

/// Widens 16 binary16.
#[inline]
#[target_feature(enable = "neon")]
fn widen(low: uint16x8_t, high: uint16x8_t) -> N16 {
    let (low, high) = (vreinterpretq_f16_u16(low), vreinterpretq_f16_u16(high));
    N16(
        vcvt_f32_f16(vget_low_f16(low)),
        vcvt_high_f32_f16(low),
        vcvt_f32_f16(vget_low_f16(high)),
        vcvt_high_f32_f16(high),
    )
}

/// Eight codes of E4M3 as binary16 of a 256th of their value.
#[inline]
#[target_feature(enable = "neon")]
fn e4m3_to_f16(codes: int8x8_t) -> uint16x8_t {
    // Both upper bits are the sign, then come the seven others of the code. Adding one to those changes bit 14 where
    // all are set; elsewhere the difference clears it.
    let word = vreinterpretq_u16_s16(vshll_n_s8::<7>(codes));
    let carried = vaddq_u16(word, vdupq_n_u16(0x80));
    veorq_u16(word, vandq_u16(carried, vdupq_n_u16(0x4000)))
}

impl F32x16 for N16 {
    // There are 32 registers, but sixteen lanes take four of them.
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> N16 {
        // SAFETY: NEON is present (contract of `vector`).
        let v = unsafe { vdupq_n_f32(x) };
        N16(v, v, v, v)
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> N16 {
        // SAFETY: NEON is present; the caller gives 16 readable elements.
        unsafe { N16(vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: NEON is present; the caller gives 16 writable elements.
        unsafe {
            vst1q_f32(p, self.0);
            vst1q_f32(p.add(4), self.1);
            vst1q_f32(p.add(8), self.2);
            vst1q_f32(p.add(12), self.3);
        }
    }

    #[inline(always)]
    fn add(self, o: N16) -> N16 {
        quarters!(vaddq_f32: self, o)
    }

    #[inline(always)]
    fn sub(self, o: N16) -> N16 {
        quarters!(vsubq_f32: self, o)
    }

    #[inline(always)]
    fn mul(self, o: N16) -> N16 {
        quarters!(vmulq_f32: self, o)
    }

    #[inline(always)]
    fn div(self, o: N16) -> N16 {
        quarters!(vdivq_f32: self, o)
    }

    #[inline(always)]
    fn mul_add(self, b: N16, c: N16) -> N16 {
        quarters!(vfmaq_f32: c, self, b)
    }

    #[inline(always)]
    fn abs(self) -> N16 {
        quarters!(vabsq_f32: self)
    }

    #[inline(always)]
    fn neg(self) -> N16 {
        quarters!(vnegq_f32: self)
    }

    #[inline(always)]
    fn max(self, o: N16) -> N16 {
        quarters!(greater: self, o)
    }

    #[inline(always)]
    fn min(self, o: N16) -> N16 {
        quarters!(lesser: self, o)
    }

    #[inline(always)]
    fn shl23(self) -> N16 {
        quarters!(shl23: self)
    }

    #[inline(always)]
    fn zero_where_less(self, x: N16, bound: N16) -> N16 {
        quarters!(zero_where_less: self, x, bound)
    }

    #[inline(always)]
    fn sum4(v: [N16; 4]) -> [f32; 4] {
        // SAFETY: NEON is present (contract of `vector`); an array of four is writable for four.
        unsafe {
            let p01 = to_two_lanes(to_four_lanes(v[0]), to_four_lanes(v[1]));
            let p23 = to_two_lanes(to_four_lanes(v[2]), to_four_lanes(v[3]));
            // What is left is one pair of neighbours for each vector.
            let mut out = [0.0; 4];
            vst1q_f32(out.as_mut_ptr(), vpaddq_f32(p01, p23));
            out
        }
    }

    #[inline(always)]
    unsafe fn load_woven(p: *const u16) -> [N16; 2] {
        // SAFETY: NEON is present; the caller gives 32 readable elements.
        unsafe {
            let mask = vdupq_n_u32(0xffff_0000);
            let a = vreinterpretq_u32_u16(vld1q_u16(p));
            let b = vreinterpretq_u32_u16(vld1q_u16(p.add(8)));
            let c = vreinterpretq_u32_u16(vld1q_u16(p.add(16)));
            let d = vreinterpretq_u32_u16(vld1q_u16(p.add(24)));
            let low = N16(
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(a)),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(b)),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(c)),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(d)),
            );
            let high = N16(
                vreinterpretq_f32_u32(vandq_u32(a, mask)),
                vreinterpretq_f32_u32(vandq_u32(b, mask)),
                vreinterpretq_f32_u32(vandq_u32(c, mask)),
                vreinterpretq_f32_u32(vandq_u32(d, mask)),
            );
            [low, high]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> N16 {
        // SAFETY: NEON is present; the caller gives 16 readable elements.
        unsafe {
            // Below each word a word of zeros: interleaving has every vector pipe, a widening shift only some.
            let zero = vdupq_n_u16(0);
            let (low, high) = (vld1q_u16(p), vld1q_u16(p.add(8)));
            N16(
                vreinterpretq_f32_u16(vzip1q_u16(zero, low)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, low)),
                vreinterpretq_f32_u16(vzip1q_u16(zero, high)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, high)),
            )
        }
    }

    #[inline(always)]
    #[expect(
        clippy::pointers_in_nomem_asm_block,
        reason = "a hint: the program cannot tell whether it was read"
    )]
    fn prefetch(p: *const u8) {
        // The intrinsic is not stable yet.
        // SAFETY: a prefetch of any address does not fault, and PRFM is part of AArch64.
        unsafe {
            std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) p, options(nomem, nostack, preserves_flags))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> N16 {
        // SAFETY: NEON is present; the caller gives 16 readable elements.
        unsafe {
            let bytes = vld1q_s8(p);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            N16(
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> N16 {
        // SAFETY: NEON is present; the caller gives 16 readable elements.
        unsafe { widen(vld1q_u16(p), vld1q_u16(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        // SAFETY: NEON is present; the caller gives 16 writable elements.
        unsafe {
            for (i, quarter) in [self.0, self.1, self.2, self.3].into_iter().enumerate() {
                vst1_u16(p.add(4 * i), vreinterpret_u16_f16(vcvt_f16_f32(quarter)));
            }
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> N16 {
        // SAFETY: NEON is present; the caller gives 16 readable elements.
        unsafe {
            let codes = vreinterpretq_s8_u8(vld1q_u8(p));
            widen(e4m3_to_f16(vget_low_s8(codes)), e4m3_to_f16(vget_high_s8(codes)))
        }
    }

    #[inline(always)]
    unsafe fn load_e5m2(p: *const u8) -> N16 {
        // SAFETY: NEON is present; the caller gives 16 readable elements.
        unsafe {
            let (zero, codes) = (vdupq_n_u8(0), vld1q_u8(p));
            widen(vreinterpretq_u16_u8(vzip1q_u8(zero, codes)), vreinterpretq_u16_u8(vzip2q_u8(zero, codes)))
        }
    }

    #[inline(always)]
    fn swap_lanes<const H: usize>(self) -> N16 {
        match H {
            8 => N16(self.2, self.3, self.0, self.1),
            4 => N16(self.1, self.0, self.3, self.2),
            2 => quarters!(vextq_f32::<2>: self, self),
            _ => quarters!(vrev64q_f32: self),
        }
    }

    #[inline(always)]
    fn not_at_most(self, floor: N16) -> u16 {
        // SAFETY: NEON is present (contract of `vector`).
        unsafe {
            let bits = vld1q_u32([1, 2, 4, 8].as_ptr());
            let low = marks(self.0, floor.0, bits) | marks(self.1, floor.1, bits) << 4;
            let high = marks(self.2, floor.2, bits) | marks(self.3, floor.3, bits) << 4;
            (low | high << 8) as u16
        }
    }

    #[inline(always)]
    unsafe fn equal_u16(p: *const u16, code: u16) -> u16 {
        // SAFETY: NEON is present (contract of `vector`); the caller gives 16 readable elements.
        unsafe {
            let (code, bits) = (vdupq_n_u16(code), vld1q_u16([1, 2, 4, 8, 16, 32, 64, 128].as_ptr()));
            let low = vaddvq_u16(vandq_u16(vceqq_u16(vld1q_u16(p), code), bits));
            let high = vaddvq_u16(vandq_u16(vceqq_u16(vld1q_u16(p.add(8)), code), bits));
            low | high << 8
        }
    }
}
