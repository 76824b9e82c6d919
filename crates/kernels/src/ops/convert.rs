//! Conversion between `f32` and bfloat16 (the upper half of an `f32`).

use crate::Kernels;
use crate::vector::F32x16;

#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    // Adding just under half a unit, plus the lowest kept bit, rounds to nearest with ties to even.
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quieted = (bits >> 16) | 0x40; // the carry could turn a NaN into infinity, so it is kept by force
    (if (bits & 0x7fff_ffff) > 0x7f80_0000 { quieted } else { rounded }) as u16
}

#[inline(always)]
pub(crate) fn f32_to_bf16<V: F32x16>(x: &[f32], out: &mut [u16]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = bf16_bits(x);
    }
}

#[inline(always)]
pub(crate) fn bf16_to_f32<V: F32x16>(x: &[u16], out: &mut [f32]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = f32::from_bits(u32::from(x) << 16);
    }
}

impl Kernels {
    /// Rounds to bfloat16 bits, to nearest with ties to even; overflow becomes infinity, NaN stays NaN (quiet).
    pub fn f32_to_bf16(&self, x: &[f32], out: &mut [u16]) {
        assert_eq!(x.len(), out.len(), "f32_to_bf16: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.f32_to_bf16)(x, out) }
    }

    /// Widens bfloat16 bits, exactly.
    pub fn bf16_to_f32(&self, x: &[u16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "bf16_to_f32: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.bf16_to_f32)(x, out) }
    }
}
