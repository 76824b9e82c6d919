//! Conversion between `f32` and bfloat16 (the upper half of an `f32`).

use crate::Kernels;
use crate::vector::{F32x16, LANES};

/// Numbers of a group that is woven together.
const GROUP: usize = 2 * LANES;

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

/// Where the number at `j` of a row of `d` stands when the row is woven.
#[inline(always)]
fn woven(j: usize, d: usize) -> usize {
    let group = j / GROUP * GROUP;
    if group + GROUP > d { j } else { group + 2 * (j % (GROUP / 2)) + (j - group) / (GROUP / 2) }
}

#[inline(always)]
pub(crate) fn weave_bf16<V: F32x16>(x: &[f32], d: usize, out: &mut [u16]) {
    for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
        for (j, &x) in x.iter().enumerate() {
            out[woven(j, d)] = bf16_bits(x);
        }
    }
}

#[inline(always)]
pub(crate) fn unweave_bf16<V: F32x16>(x: &[u16], d: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
        for (j, out) in out.iter_mut().enumerate() {
            *out = f32::from_bits(u32::from(x[woven(j, d)]) << 16);
        }
    }
}

impl Kernels {
    /// Rounds rows of `d` numbers to bfloat16 like [`Kernels::f32_to_bf16`], each woven: in a group of 32, number `i` of
    /// the first half and number `i` of the second become the lower and the upper half of one 32-bit word. A shift and a
    /// mask then widen both halves at once, in their natural order. What is left of a row (`d % 32`) keeps its order.
    pub fn weave_bf16(&self, x: &[f32], d: usize, out: &mut [u16]) {
        assert!(d > 0 && x.len().is_multiple_of(d), "weave_bf16: {} numbers in rows of {d}", x.len());
        assert_eq!(x.len(), out.len(), "weave_bf16: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.weave_bf16)(x, d, out) }
    }

    /// The rows of which [`Kernels::weave_bf16`] made `x`, widened.
    pub fn unweave_bf16(&self, x: &[u16], d: usize, out: &mut [f32]) {
        assert!(d > 0 && x.len().is_multiple_of(d), "unweave_bf16: {} numbers in rows of {d}", x.len());
        assert_eq!(x.len(), out.len(), "unweave_bf16: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.unweave_bf16)(x, d, out) }
    }

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
