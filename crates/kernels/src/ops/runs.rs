//! Which tokens have a weight that counts: ascending ranges, so that the values of all others need not be read.

use crate::Kernels;
use crate::vector::{F32x16, LANES, load, load_tail};
use std::ops::Range;

/// Tokens whose marks are gathered in a word.
const WORD: usize = 64;

/// Adds the runs of set bits of `marks`, of the tokens from `first`, to ascending ranges.
#[inline(always)]
fn add_runs(mut marks: u64, first: usize, min_gap: usize, runs: &mut Vec<Range<usize>>) {
    let mut at = first;
    while marks != 0 {
        let skipped = marks.trailing_zeros();
        let length = (marks >> skipped).trailing_ones();
        let start = at + skipped as usize;
        let end = start + length as usize;
        match runs.last_mut() {
            Some(last) if start - last.end < min_gap.max(1) => last.end = end,
            _ => runs.push(start..end),
        }
        marks = marks.checked_shr(skipped + length).unwrap_or(0);
        at = end;
    }
}

#[inline(always)]
pub(crate) fn runs_above<V: F32x16>(
    weights: &[f32],
    floors: &[f32],
    min_gap: usize,
    runs: &mut Vec<Range<usize>>,
) {
    let n = weights.len().checked_div(floors.len()).unwrap_or(0);
    runs.clear();
    for first in (0..n).step_by(WORD) {
        let some = WORD.min(n - first);
        let mut marks = 0;
        for (h, &floor) in floors.iter().enumerate() {
            let floor = V::splat(floor);
            let here = &weights[h * n + first..h * n + first + some];
            let (whole, rest) = here.as_chunks::<LANES>();
            for (i, w) in whole.iter().enumerate() {
                marks |= u64::from(load::<V>(w).not_at_most(floor)) << (i * LANES);
            }
            if !rest.is_empty() {
                // The padding is at most any floor but NaN, so what lies behind the end is masked.
                let last = load_tail::<V>(rest, f32::NEG_INFINITY).not_at_most(floor);
                marks |= u64::from(last & ((1 << rest.len()) - 1)) << (whole.len() * LANES);
            }
        }
        add_runs(marks, first, min_gap, runs);
    }
}

impl Kernels {
    /// The tokens of which at least one head's weight exceeds the floor of that head: `weights` `[g][n]`, `floors` `[g]`,
    /// into ascending ranges of `0..n` in `runs`, whose old content is dropped. Ranges that fewer than `min_gap` tokens
    /// lie between are joined, those tokens included. A NaN exceeds any floor, so that it is not lost.
    pub fn runs_above(&self, weights: &[f32], floors: &[f32], min_gap: usize, runs: &mut Vec<Range<usize>>) {
        let whole =
            if floors.is_empty() { weights.is_empty() } else { weights.len().is_multiple_of(floors.len()) };
        assert!(whole, "runs_above: {} weights of {} heads", weights.len(), floors.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.runs_above)(weights, floors, min_gap, runs) }
    }
}
