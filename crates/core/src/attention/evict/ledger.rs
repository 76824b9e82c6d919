//! Rows and their scores: which of them go, which remain.

use std::ops::Range;

use super::{Retained, SLACK};

/// Rows, and what they are worth.
#[derive(Clone, Default)]
pub(in crate::attention) struct Ledger {
    /// Of each row, infinite for one that is evicted.
    pub(in crate::attention) scores: Vec<f32>,
    /// Evicted rows still in memory with the scores that they had, in the order in which they went.
    pub(super) dead: Vec<(usize, f32)>,
}

impl Ledger {
    pub(super) fn bytes(&self) -> usize {
        self.scores.len() * size_of::<f32>() + self.dead.len() * size_of::<(usize, f32)>()
    }

    /// Rows that are not evicted.
    pub(in crate::attention) fn alive(&self) -> usize {
        self.scores.len() - self.dead.len()
    }

    /// Evicts until `budget` rows are left, the lowest scores first, of equal ones the newest; none of `spared`.
    pub(in crate::attention) fn evict_to(&mut self, budget: usize, spared: impl Fn(usize) -> bool) {
        let excess = self.alive().saturating_sub(budget);
        if excess == 0 {
            return;
        }
        let scores = self.scores.iter().copied().enumerate();
        let candidates = scores.filter(|&(row, score)| score != f32::INFINITY && !spared(row));
        let order = |a: &(usize, f32), b: &(usize, f32)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
        let first = self.dead.len();
        if excess == 1 {
            self.dead.extend(candidates.min_by(order));
        } else {
            let mut candidates: Vec<_> = candidates.collect();
            candidates.sort_unstable_by(order);
            self.dead.extend(candidates.into_iter().take(excess));
        }
        for &(row, _) in &self.dead[first..] {
            self.scores[row] = f32::INFINITY;
        }
    }

    /// Writes the rows that are not evicted to `out`, as spans.
    pub(in crate::attention) fn spans(&self, out: &mut Vec<Range<usize>>) {
        out.clear();
        let alive = self.scores.iter().enumerate().filter(|(_, score)| **score != f32::INFINITY);
        to_spans(alive.map(|(row, _)| row), out);
    }

    /// Lists what remains, and forgets the others.
    pub(in crate::attention) fn compact(&mut self, out: &mut Retained) {
        self.spans(&mut out.keep);
        self.scores.retain(|score| *score != f32::INFINITY);
        self.scores.shrink_to(self.scores.len() + 2 * SLACK);
        self.dead.clear();
    }

    pub(super) fn truncate(&mut self, rows: usize) {
        self.scores.truncate(rows);
        self.dead.retain(|&(row, _)| row < rows);
    }
}

/// The `n` largest of `scores`, which are `(score, key)`: those first, of equal ones the lowest key.
pub(in crate::attention) fn largest<K: Ord + Copy>(mut scores: Vec<(f32, K)>, n: usize) -> Vec<(f32, K)> {
    let order = |a: &(f32, K), b: &(f32, K)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if n < scores.len() {
        scores.select_nth_unstable_by(n, order);
        scores.truncate(n);
    }
    scores.sort_unstable_by(order);
    scores
}

/// Ascending rows as spans.
pub(in crate::attention) fn to_spans(rows: impl Iterator<Item = usize>, out: &mut Vec<Range<usize>>) {
    for row in rows {
        match out.last_mut() {
            Some(last) if last.end == row => last.end += 1,
            _ => out.push(row..row + 1),
        }
    }
}
