//! How far below the top numbers lie, counted in bins: what a threshold by rank or by mass is read from, without sorting.

use crate::Kernels;
use crate::vector::F32x16;

/// Bins.
pub const DEPTHS: usize = 1024;
/// Sets of bins that take turns, so that neighbours in the same bin need not wait for each other.
const TURNS: usize = 4;
/// Numbers whose bins are found before they are counted.
const STRIP: usize = 256;

#[inline(always)]
pub(crate) fn count_depths<V: F32x16>(x: &[f32], top: f32, per_unit: f32, counts: &mut [u32; DEPTHS]) {
    let mut turns = [[0u32; DEPTHS]; TURNS];
    let mut bins = [0u32; STRIP];
    for x in x.chunks(STRIP) {
        for (bin, x) in bins.iter_mut().zip(x) {
            let depth = (top - x) * per_unit;
            // A NaN is in the last bin.
            let depth = if depth < (DEPTHS - 1) as f32 { depth } else { (DEPTHS - 1) as f32 };
            let depth = if depth > 0.0 { depth } else { 0.0 };
            // SAFETY: within [0, DEPTHS).
            *bin = unsafe { depth.to_int_unchecked::<i32>() } as u32;
        }
        for (i, bin) in bins[..x.len()].iter().enumerate() {
            turns[i % TURNS][*bin as usize % DEPTHS] += 1;
        }
    }
    for (i, count) in counts.iter_mut().enumerate() {
        *count = turns.iter().map(|turn| turn[i]).sum();
    }
}

impl Kernels {
    /// Counts numbers by how far below `top` they lie: `counts[b]` becomes how many have `floor((top - x) * per_unit) = b`;
    /// above the top counts as bin 0, below the last bin, and NaN, as the last.
    pub fn count_depths(&self, x: &[f32], top: f32, per_unit: f32, counts: &mut [u32; DEPTHS]) {
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.count_depths)(x, top, per_unit, counts) }
    }
}
