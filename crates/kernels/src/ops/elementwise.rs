//! Operations without a reduction: rotary embedding, the squared-ReLU gate, sums and scalings.

use crate::Kernels;
use crate::vector::F32x16;

#[inline(always)]
pub(crate) fn rope<V: F32x16>(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) {
    for (((a, b), &c), &s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let (x, y) = (*a, *b);
        *a = x.mul_add(c, -(y * s));
        *b = y.mul_add(c, x * s);
    }
}

#[inline(always)]
pub(crate) fn relu2_mul<V: F32x16>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        let positive = if g > 0.0 { g } else { 0.0 };
        *o = (positive * positive) * u;
    }
}

#[inline(always)]
pub(crate) fn add_assign<V: F32x16>(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[inline(always)]
pub(crate) fn mul_assign<V: F32x16>(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x *= y;
    }
}

#[inline(always)]
pub(crate) fn scale<V: F32x16>(x: &mut [f32], f: f32) {
    for x in x {
        *x *= f;
    }
}

#[inline(always)]
pub(crate) fn scale_add<V: F32x16>(acc: &mut [f32], f: f32, other: &[f32], g: f32) {
    for (a, &o) in acc.iter_mut().zip(other) {
        *a = o.mul_add(g, *a * f);
    }
}

#[inline(always)]
pub(crate) fn add_to_rows<V: F32x16>(rows: &mut [f32], y: &[f32]) {
    let n = rows.len() / y.len();
    for (row, &y) in rows.chunks_exact_mut(n).zip(y) {
        for x in row {
            *x += y;
        }
    }
}

#[inline(always)]
pub(crate) fn multiply_rows<V: F32x16>(rows: &[f32], factors: &[f32], out: &mut [f32]) {
    let d = factors.len();
    for (row, out) in rows.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
        for ((o, &x), &f) in out.iter_mut().zip(row).zip(factors) {
            *o = x * f;
        }
    }
}

impl Kernels {
    /// Rotary position embedding of one head in the half-rotation (NEOX) order: with `h = len / 2`, the pair
    /// `(a, b) = (head[i], head[i + h])` becomes `(fma(a, c, -(b * s)), fma(b, c, a * s))` for `c = cos[i]`,
    /// `s = sin[i]`. `cos` and `sin` have `h` entries.
    pub fn rope(&self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert!(head.len().is_multiple_of(2), "rope: a head of odd length {}", head.len());
        let half = head.len() / 2;
        assert_eq!((cos.len(), sin.len()), (half, half), "rope: cos and sin");
        let (a, b) = head.split_at_mut(half);
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.rope)(a, b, cos, sin) }
    }

    /// `out = max(gate, 0)^2 * up`, the gate of BitNet b1.58; the square is rounded first. A NaN gate counts as 0.
    pub fn relu2_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert_eq!(gate.len(), up.len(), "relu2_mul: gate and up");
        assert_eq!(gate.len(), out.len(), "relu2_mul: gate and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.relu2_mul)(gate, up, out) }
    }

    /// `x += y`.
    pub fn add_assign(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "add_assign: x and y");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.add_assign)(x, y) }
    }

    /// `x *= y`, element by element.
    pub fn mul_assign(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "mul_assign: x and y");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.mul_assign)(x, y) }
    }

    /// Adds `y[i]` to every number of row `i` of `rows`, of which there are as many as `y` has numbers.
    pub fn add_to_rows(&self, rows: &mut [f32], y: &[f32]) {
        assert!(!y.is_empty() && rows.len().is_multiple_of(y.len()), "add_to_rows: {} rows", y.len());
        if !rows.is_empty() {
            // SAFETY: this table was handed out against proof of its instruction set.
            unsafe { (self.float.add_to_rows)(rows, y) }
        }
    }

    /// Every row of `rows`, as long as `factors`, times `factors` number by number.
    pub fn multiply_rows(&self, rows: &[f32], factors: &[f32], out: &mut [f32]) {
        assert!(!factors.is_empty() && rows.len().is_multiple_of(factors.len()), "multiply_rows: whole rows");
        assert_eq!(rows.len(), out.len(), "multiply_rows: rows and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.multiply_rows)(rows, factors, out) }
    }

    /// `x *= f`.
    pub fn scale(&self, x: &mut [f32], f: f32) {
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.scale)(x, f) }
    }

    /// `acc = fma(other, g, acc * f)`: merges two partial attention sums.
    pub fn scale_add(&self, acc: &mut [f32], f: f32, other: &[f32], g: f32) {
        assert_eq!(acc.len(), other.len(), "scale_add: acc and other");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.scale_add)(acc, f, other, g) }
    }
}
