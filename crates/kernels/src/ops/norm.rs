//! Root-mean-square normalisation (Zhang and Sennrich 2019), as Llama and BitNet use it.

use crate::Kernels;
use crate::vector::F32x16;

#[inline(always)]
pub(crate) fn rmsnorm<V: F32x16>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = super::reduce::dot::<V>(x, x) / x.len() as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = (x * inverse) * w;
    }
}

impl Kernels {
    /// `out = (x * inv) * weight` with `inv = 1 / sqrt(sum(x^2) / len + eps)`, the sum in the 16-lane semantics,
    /// everything in `f32`. All of the same length.
    pub fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), weight.len(), "rmsnorm: x and weight");
        assert_eq!(x.len(), out.len(), "rmsnorm: x and out");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.rmsnorm)(x, weight, eps, out) }
    }
}
