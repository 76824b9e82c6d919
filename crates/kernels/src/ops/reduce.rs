//! Reductions: the dot product of two vectors, the sum and the maximum of one.

use crate::Kernels;
use crate::vector::{F32x16, load, load_tail};

#[inline(always)]
pub(crate) fn dot<V: F32x16>(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_tail) = a.as_chunks();
    let (b, b_tail) = b.as_chunks();
    let mut acc = V::splat(0.0);
    for (a, b) in a.iter().zip(b) {
        acc = load::<V>(a).mul_add(load(b), acc);
    }
    if !a_tail.is_empty() {
        acc = load_tail::<V>(a_tail, 0.0).mul_add(load_tail(b_tail, 0.0), acc);
    }
    acc.sum()
}

#[inline(always)]
pub(crate) fn sum<V: F32x16>(x: &[f32]) -> f32 {
    let (x, tail) = x.as_chunks();
    let (mut acc, one) = (V::splat(0.0), V::splat(1.0));
    for x in x {
        acc = load::<V>(x).mul_add(one, acc);
    }
    if !tail.is_empty() {
        acc = load_tail::<V>(tail, 0.0).mul_add(one, acc);
    }
    acc.sum()
}

/// The largest element of |x| or of x; NaN is passed over.
#[inline(always)]
pub(crate) fn max_of<V: F32x16>(x: &[f32], absolute: bool) -> f32 {
    let (x, tail) = x.as_chunks();
    let mut acc = V::splat(f32::NEG_INFINITY);
    for x in x {
        let x = load::<V>(x);
        acc = (if absolute { x.abs() } else { x }).max(acc);
    }
    let mut lanes = [0.0; 16];
    crate::vector::store(acc, &mut lanes);
    let mut largest = f32::NEG_INFINITY;
    for &x in &lanes {
        largest = if x > largest { x } else { largest };
    }
    for &x in tail {
        let x = if absolute { x.abs() } else { x };
        largest = if x > largest { x } else { largest };
    }
    largest
}

#[inline(always)]
pub(crate) fn max<V: F32x16>(x: &[f32]) -> f32 {
    // Both zeros compare equal, so which of them wins would depend on the order: adding +0 leaves one zero.
    max_of::<V>(x, false) + 0.0
}

impl Kernels {
    /// The dot product of two vectors of the same length, in the 16-lane semantics.
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "dot: the two lengths");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.dot)(a, b) }
    }

    /// The sum of a vector: its dot product with ones.
    pub fn sum(&self, x: &[f32]) -> f32 {
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.sum)(x) }
    }

    /// The largest element, `-inf` for an empty slice. NaN is passed over, and a zero result is `+0.0`.
    pub fn max(&self, x: &[f32]) -> f32 {
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.max)(x) }
    }
}
