//! Rounding to 8-bit integers: activations per token (BitNet b1.58) and rows of a head.

use crate::Kernels;
use crate::vector::F32x16;

/// What belongs to a vector of int8 activation codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantized {
    /// `s = 127 / max(max|x|, 1e-5)`: a code is `x * s` rounded, so a sum of codes divided by `s` is a sum of `x`.
    pub scale: f32,
    /// The sum of all codes, which [`Kernels::ternary_gemv`] needs.
    pub sum: i32,
}

#[inline(always)]
fn round_codes(x: &[f32], s: f32, codes: &mut [i8]) {
    for (code, &x) in codes.iter_mut().zip(x) {
        let v = (x * s).round_ties_even();
        // Comparisons that fail for NaN; the cast itself then never saturates.
        let v = if v > -128.0 { v } else { -128.0 };
        let v = if v < 127.0 { v } else { 127.0 };
        let v = if (x * s).is_nan() { 0.0 } else { v };
        // SAFETY: v is an integer in [-128, 127].
        *code = unsafe { v.to_int_unchecked::<i32>() } as i8;
    }
}

#[inline(always)]
pub(crate) fn quantize_activations<V: F32x16>(x: &[f32], codes: &mut [i8]) -> Quantized {
    let absmax = super::reduce::max_of::<V>(x, true);
    let scale = 127.0 / if absmax > 1e-5 { absmax } else { 1e-5 };
    let (codes, padding) = codes.split_at_mut(x.len());
    round_codes(x, scale, codes);
    padding.fill(0);
    let mut sum = 0;
    for &code in codes.iter() {
        sum += i32::from(code);
    }
    Quantized { scale, sum }
}

#[inline(always)]
pub(crate) fn quantize_rows_int8<V: F32x16>(rows: &[u16], k: usize, codes: &mut [i8], scales: &mut [f32]) {
    let mut wide = [0.0f32; 256];
    for ((row, codes), scale) in rows.chunks_exact(k).zip(codes.chunks_exact_mut(k)).zip(scales) {
        // Without the sign, the order of bfloat16 bits is the order of the numbers; what is above infinity is NaN.
        let mut largest = 0u16;
        for &bits in row {
            let magnitude = bits & 0x7fff;
            largest = largest.max(if magnitude > 0x7f80 { 0 } else { magnitude });
        }
        let absmax = f32::from_bits(u32::from(largest) << 16);
        *scale = absmax / 127.0;
        let inverse = if absmax > 0.0 { 127.0 / absmax } else { 0.0 };
        for (row, codes) in row.chunks(wide.len()).zip(codes.chunks_mut(wide.len())) {
            let wide = &mut wide[..row.len()];
            super::convert::bf16_to_f32::<V>(row, wide);
            round_codes(wide, inverse, codes);
        }
    }
}

impl Kernels {
    /// Absmax int8 quantisation of one token's activations: `s = 127 / max(max|x|, 1e-5)`,
    /// `code = clamp(round_half_even(x * s), -128, 127)`, NaN gives 0. `codes` may be longer than `x` (the padded
    /// columns of a [`crate::TernaryShape`]); the rest is zeroed.
    pub fn quantize_activations(&self, x: &[f32], codes: &mut [i8]) -> Quantized {
        assert!(codes.len() >= x.len(), "quantize_activations: {} codes for {} values", codes.len(), x.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.quantize_activations)(x, codes) }
    }

    /// Absmax int8 quantisation of bfloat16 rows of length `k`: `scale = max|row| / 127`,
    /// `code = round_half_even(x * (127 / max|row|))`; a row of zeros has scale 0. `codes` is as long as `rows`,
    /// `scales` has one entry a row. NaN gives code 0.
    pub fn quantize_rows_int8(&self, rows: &[u16], k: usize, codes: &mut [i8], scales: &mut [f32]) {
        assert!(k > 0 && rows.len().is_multiple_of(k), "quantize_rows_int8: {} values, k {k}", rows.len());
        assert_eq!(rows.len(), codes.len(), "quantize_rows_int8: rows and codes");
        assert_eq!(rows.len() / k, scales.len(), "quantize_rows_int8: rows and scales");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.quantize_rows_int8)(rows, k, codes, scales) }
    }
}
