//! Conversion between `f32` and IEEE binary16: five bits of exponent, ten of mantissa, 65504 the largest number.

use crate::Kernels;
use crate::vector::{F32x16, LANES, load, load_tail, store, store_tail};

#[inline(always)]
pub(crate) fn f32_to_f16<V: F32x16>(x: &[f32], out: &mut [u16]) {
    let ((x, last), (out, rest)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    for (x, out) in x.iter().zip(out) {
        // SAFETY: an array of 16 elements is writable for 16 elements.
        unsafe { load::<V>(x).store_f16(out.as_mut_ptr()) }
    }
    let mut codes = [0; LANES];
    // SAFETY: as above.
    unsafe { load_tail::<V>(last, 0.0).store_f16(codes.as_mut_ptr()) }
    rest.copy_from_slice(&codes[..rest.len()]);
}

#[inline(always)]
pub(crate) fn f16_to_f32<V: F32x16>(x: &[u16], out: &mut [f32]) {
    let ((x, last), (out, rest)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    for (x, out) in x.iter().zip(out) {
        // SAFETY: an array of 16 elements is readable for 16 elements.
        store(unsafe { V::load_f16(x.as_ptr()) }, out);
    }
    let mut codes = [0; LANES];
    codes[..last.len()].copy_from_slice(last);
    // SAFETY: as above.
    store_tail(unsafe { V::load_f16(codes.as_ptr()) }, rest);
}

impl Kernels {
    /// Rounds to binary16 bits, to nearest with ties to even; overflow becomes infinity, NaN stays NaN (quiet).
    pub fn f32_to_f16(&self, x: &[f32], out: &mut [u16]) {
        assert_eq!(x.len(), out.len(), "f32_to_f16: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.f32_to_f16)(x, out) }
    }

    /// Widens binary16 bits, exactly.
    pub fn f16_to_f32(&self, x: &[u16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "f16_to_f32: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.f16_to_f32)(x, out) }
    }
}
