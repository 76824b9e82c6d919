//! Conversion between `f32` and the 8-bit floats of the Open Compute Project (OCP 8-bit Floating Point Specification 1.0):
//! E4M3 (FN: no infinity, one NaN of each sign) and E5M2 (the upper byte of a binary16).
//!
//! Rounding to nearest is within half a unit in the last place: a relative error of at most 1/16 (E4M3) or 1/8 (E5M2)
//! above the smallest normal number, an absolute one of at most 2^-10 or 2^-17 below it.

use crate::Kernels;
use crate::vector::{E4m3, E5m2, Element, F32x16, LANES, store, store_tail};

/// An 8-bit float format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp8 {
    /// Four bits of exponent, three of mantissa: up to 448, normal from 2^-6, in steps of 2^-9 below.
    E4m3,
    /// Five bits of exponent, two of mantissa: up to 57344, normal from 2^-14, in steps of 2^-16 below.
    E5m2,
}

impl Fp8 {
    /// The largest number that a code stands for.
    pub fn largest(self) -> f32 {
        match self {
            Fp8::E4m3 => 448.0,
            Fp8::E5m2 => 57344.0,
        }
    }
}

/// The code of a number, for a format of `MANTISSA` bits of mantissa and exponents from `-BIAS`: `LARGEST` and `NAN` are
/// codes, of a positive sign.
#[inline(always)]
fn code<const MANTISSA: u32, const BIAS: u32, const LARGEST: u32, const NAN: u32>(x: f32) -> u8 {
    let dropped = 23 - MANTISSA;
    let offset = (127 - BIAS) << MANTISSA;
    let (sign, magnitude) = (x.to_bits() >> 24 & 0x80, x.to_bits() & 0x7fff_ffff);
    // What would round beyond the largest number saturates; so it may as well do so before.
    let within = magnitude.min((LARGEST + offset) << dropped);
    let normal =
        ((within + (1 << (dropped - 1)) - 1 + (within >> dropped & 1)) >> dropped).wrapping_sub(offset);
    // A power of two whose last place is the smallest subnormal: the addition rounds.
    let large = f32::from_bits((128 - BIAS + dropped) << 23);
    let subnormal = (f32::from_bits(within) + large).to_bits().wrapping_sub(large.to_bits());
    let number = if within < (128 - BIAS) << 23 { subnormal } else { normal };
    (sign | if magnitude > 0x7f80_0000 { NAN } else { number }) as u8
}

#[inline(always)]
pub(crate) fn f32_to_e4m3<V: F32x16>(x: &[f32], out: &mut [u8]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = code::<3, 7, 0x7e, 0x7f>(x);
    }
}

#[inline(always)]
pub(crate) fn f32_to_e5m2<V: F32x16>(x: &[f32], out: &mut [u8]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = code::<2, 15, 0x7b, 0x7f>(x);
    }
}

#[inline(always)]
fn widen<V: F32x16, E: Element>(x: &[E], out: &mut [f32]) {
    let factor = V::splat(E::FACTOR);
    let ((x, last), (out, rest)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    for (x, out) in x.iter().zip(out) {
        // SAFETY: an array of 16 elements is readable for 16 elements.
        store(unsafe { E::load::<V>(x.as_ptr()) }.mul(factor), out);
    }
    // SAFETY: as many elements are readable as there are.
    store_tail(unsafe { E::load_n::<V>(last.as_ptr(), last.len()) }.mul(factor), rest);
}

#[inline(always)]
pub(crate) fn e4m3_to_f32<V: F32x16>(x: &[u8], out: &mut [f32]) {
    widen::<V, E4m3>(E4m3::of(x), out);
}

#[inline(always)]
pub(crate) fn e5m2_to_f32<V: F32x16>(x: &[u8], out: &mut [f32]) {
    widen::<V, E5m2>(E5m2::of(x), out);
}

impl Kernels {
    /// Rounds to codes of an 8-bit float, to nearest with ties to even. What is beyond the [largest](Fp8::largest) number,
    /// infinities too, saturates to it; NaN becomes a NaN of the same sign.
    pub fn f32_to_fp8(&self, format: Fp8, x: &[f32], out: &mut [u8]) {
        assert_eq!(x.len(), out.len(), "f32_to_fp8: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe {
            match format {
                Fp8::E4m3 => (self.float.f32_to_e4m3)(x, out),
                Fp8::E5m2 => (self.float.f32_to_e5m2)(x, out),
            }
        }
    }

    /// Widens codes of an 8-bit float, exactly; every one of the 256 codes.
    pub fn fp8_to_f32(&self, format: Fp8, x: &[u8], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "fp8_to_f32: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe {
            match format {
                Fp8::E4m3 => (self.float.e4m3_to_f32)(x, out),
                Fp8::E5m2 => (self.float.e5m2_to_f32)(x, out),
            }
        }
    }
}
