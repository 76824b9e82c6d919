//! The language-model head: a tall matrix in f32, bfloat16 or int8 times one vector, bound by memory.

use super::rows::rows_times;
use crate::Kernels;
use crate::vector::F32x16;

#[inline(always)]
pub(crate) fn head_bf16<V: F32x16>(rows: &[u16], x: &[f32], out: &mut [f32]) {
    rows_times::<V, u16>(rows, x, out);
}

/// Rows that lie anywhere: the next one is requested while one is summed.
#[inline(always)]
pub(crate) fn head_bf16_rows<V: F32x16>(table: &[u16], rows: &[u32], x: &[f32], out: &mut [f32]) {
    let k = x.len();
    for (i, (&row, out)) in rows.iter().zip(out).enumerate() {
        if let Some(&next) = rows.get(i + 1) {
            let start = table.as_ptr().wrapping_add(next as usize * k).cast::<u8>();
            for line in (0..2 * k).step_by(64) {
                V::prefetch(start.wrapping_add(line));
            }
        }
        rows_times::<V, u16>(&table[row as usize * k..][..k], x, std::slice::from_mut(out));
    }
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

    /// `out[i]` = the dot product of row `rows[i]` of the bfloat16 `table` with `x`, with the bits of
    /// [`Kernels::head_bf16`]. `table` `[n][k]`, `x` `[k]`, `out` as long as `rows`.
    ///
    /// # Panics
    /// There is no such row.
    pub fn head_bf16_rows(&self, table: &[u16], rows: &[u32], x: &[f32], out: &mut [f32]) {
        assert_eq!(rows.len(), out.len(), "head_bf16_rows: rows and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.head_bf16_rows)(table, rows, x, out) }
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
