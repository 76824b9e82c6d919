//! What a threshold among many numbers is searched with: maxima of groups, sums of what reaches a bound, marks of equal
//! codes. A pass of each costs a fraction of a pass that sorts into bins, which is one number at a time.

use crate::Kernels;
use crate::vector::{F32x16, LANES, load, load_tail, store};

/// Numbers of a strip, and of the groups in it.
const STRIP: usize = 256;

#[inline(always)]
pub(crate) fn maxima<V: F32x16>(x: &[f32], out: &mut [f32]) {
    for (strip, out) in x.as_chunks::<STRIP>().0.iter().zip(out.as_chunks_mut::<LANES>().0) {
        let mut most = V::splat(f32::NEG_INFINITY);
        for x in strip.as_chunks::<LANES>().0 {
            most = load::<V>(x).max(most);
        }
        store(most, out);
    }
}

#[inline(always)]
pub(crate) fn sums_from<V: F32x16>(x: &[f32], bounds: &[f32; 4]) -> [f32; 4] {
    let (whole, rest) = x.as_chunks::<LANES>();
    let bounds = [V::splat(bounds[0]), V::splat(bounds[1]), V::splat(bounds[2]), V::splat(bounds[3])];
    let mut sums = [V::splat(0.0); 4];
    for x in whole {
        let x = load::<V>(x);
        for j in 0..4 {
            sums[j] = sums[j].add(x.zero_where_less(x, bounds[j]));
        }
    }
    if !rest.is_empty() {
        let x = load_tail::<V>(rest, 0.0);
        for j in 0..4 {
            sums[j] = sums[j].add(x.zero_where_less(x, bounds[j]));
        }
    }
    V::sum4(sums)
}

#[inline(always)]
pub(crate) fn sum_f64<V: F32x16>(x: &[f32]) -> f64 {
    let (whole, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f64; LANES];
    for x in whole {
        for l in 0..LANES {
            lanes[l] += f64::from(x[l]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x);
    }
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn marks_equal<V: F32x16>(codes: &[u16], code: u16, marks: &mut [u64]) {
    for (codes, marks) in codes.as_chunks::<64>().0.iter().zip(marks) {
        let mut word = 0;
        for (i, codes) in codes.as_chunks::<LANES>().0.iter().enumerate() {
            // SAFETY: an array of 16 elements is readable for 16 elements.
            word |= u64::from(unsafe { V::equal_u16(codes.as_ptr(), code) }) << (i * LANES);
        }
        *marks = word;
    }
}

impl Kernels {
    /// The largest number of each of 16 groups a whole strip of 256, in `out`, which becomes as long as that takes:
    /// `out[16 s + l]` is the first of the largest of `x[256 s + 16 j + l]`, passing over NaN, negative infinity if there is
    /// none. What is left behind the last whole strip has no group.
    pub fn maxima(&self, x: &[f32], out: &mut Vec<f32>) {
        out.resize(x.len() / STRIP * LANES, 0.0);
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.maxima)(x, out) }
    }

    /// For each bound the sum of the numbers of `x` that are not below it, in 16 lanes.
    pub fn sums_from(&self, x: &[f32], bounds: &[f32; 4]) -> [f32; 4] {
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.sums_from)(x, bounds) }
    }

    /// The sum of `x` in double precision: element `i` goes to lane `i % 16`, and the lanes are summed by the fixed tree.
    pub fn sum_f64(&self, x: &[f32]) -> f64 {
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.sum_f64)(x) }
    }

    /// Marks the codes that are `code`: bit `i % 64` of `marks[i / 64]`.
    ///
    /// # Panics
    /// There are not 64 codes a word of marks.
    pub fn marks_equal(&self, codes: &[u16], code: u16, marks: &mut [u64]) {
        assert_eq!(codes.len(), 64 * marks.len(), "marks_equal: {} words of marks", marks.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.marks_equal)(codes, code, marks) }
    }
}
