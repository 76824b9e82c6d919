//! The language-model head: a tall matrix in f32, bfloat16 or int8 times one vector, bound by memory.

use super::attention::{PLAIN, Upcoming, score_rows};
use crate::Kernels;
use crate::vector::{Element, F32x16};

/// Several rows run together: one row alone would wait for its own chain of additions.
#[inline(always)]
fn rows_times<V: F32x16, E: Element>(rows: &[E], x: &[f32], out: &mut [f32]) {
    let (n, k) = (out.len(), x.len());
    assert!(rows.len() >= n * k);
    // SAFETY: rows holds n * k elements, x holds k, and out holds n.
    unsafe {
        score_rows::<V, E, 1, 4, PLAIN>(
            x.as_ptr(),
            rows.as_ptr(),
            n,
            k,
            out.as_mut_ptr(),
            n,
            Upcoming::of(&[], k),
        )
    }
}

#[inline(always)]
pub(crate) fn head_bf16<V: F32x16>(rows: &[u16], x: &[f32], out: &mut [f32]) {
    rows_times::<V, u16>(rows, x, out);
}

#[inline(always)]
pub(crate) fn head_f32<V: F32x16>(rows: &[f32], x: &[f32], out: &mut [f32]) {
    rows_times::<V, f32>(rows, x, out);
}

#[inline(always)]
pub(crate) fn head_int8<V: F32x16>(rows: &[i8], scales: &[f32], x: &[f32], out: &mut [f32]) {
    rows_times::<V, i8>(rows, x, out);
    for (o, s) in out.iter_mut().zip(scales) {
        *o *= s;
    }
}

impl Kernels {
    /// `out[r]` = the dot product of f32 row `r` with `x`, in the 16-lane semantics. `rows` `[n][k]`, `x` `[k]`, `out`
    /// `[n]`.
    pub fn head_f32(&self, rows: &[f32], x: &[f32], out: &mut [f32]) {
        assert_eq!(rows.len(), x.len() * out.len(), "head_f32: rows, and x times out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.head_f32)(rows, x, out) }
    }

    /// `out[r]` = the dot product of bfloat16 row `r` with `x`, in the 16-lane semantics. `rows` `[n][k]`, `x` `[k]`,
    /// `out` `[n]`.
    pub fn head_bf16(&self, rows: &[u16], x: &[f32], out: &mut [f32]) {
        assert_eq!(rows.len(), x.len() * out.len(), "head_bf16: rows, and x times out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.head_bf16)(rows, x, out) }
    }

    /// `out[r]` = (the dot product of the int8 codes of row `r` with `x`, in the 16-lane semantics) `* scales[r]`.
    /// `rows` `[n][k]`, `scales` `[n]`, `x` `[k]`, `out` `[n]`.
    pub fn head_int8(&self, rows: &[i8], scales: &[f32], x: &[f32], out: &mut [f32]) {
        assert_eq!(rows.len(), x.len() * out.len(), "head_int8: rows, and x times out");
        assert_eq!(scales.len(), out.len(), "head_int8: scales and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.head_int8)(rows, scales, x, out) }
    }
}
