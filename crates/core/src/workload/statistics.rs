//! Exact statistics of a head's attention, in f64 over the whole context.

use std::ops::Range;

use super::generator::Parts;
use super::geometry::rotate;
use super::queries::fixed_part;
use super::{BLOCK, HeadWorkload};

/// How the mass of one query lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadStatistics {
    /// Mass of token 0.
    pub sink_mass: f64,
    /// Mass of the last 128 tokens.
    pub recent_mass: f64,
    /// Mass of the heaviest hundredth of the tokens (sinks among them).
    pub top_percent_mass: f64,
    /// exp(entropy) in tokens.
    pub effective_tokens: f64,
    /// Share of the tokens in the smallest set with mass 0.95.
    pub density_95: f64,
    /// Mass of what is planted ([`super::Needle::positions`]); `None` if there is nothing.
    pub needle_mass: Option<f64>,
    /// Deviation over the context of the logits that the query's noise has with the keys' noise; `None` for the
    /// controls, which have no other part.
    pub noise_std: Option<f64>,
}

/// Shares of tokens that two sets of heaviest tokens have in common. A set is a fiftieth of the context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Overlap {
    /// Mean over the pairs of query heads of the group; `None` where there is one head.
    pub group: Option<f64>,
    /// Between this step and the next of one query head, mean over the heads; `None` at the last step.
    pub steps: Option<f64>,
}

impl HeadStatistics {
    /// Of the logits of one query, in token order. What only a generator knows is `None`.
    ///
    /// # Panics
    /// Without logits.
    pub fn of_logits(logits: &[f64]) -> Self {
        from_logits(logits, None)
    }
}

impl Overlap {
    /// Of the logits over the context, `[group][tokens]`, of the query heads of a group at a step and at the next.
    pub fn of_logits(now: &[Vec<f64>], next: Option<&[Vec<f64>]>) -> Self {
        let sets =
            |all: &[Vec<f64>]| -> Vec<Vec<u32>> { all.iter().map(|logits| heaviest(logits)).collect() };
        let now = sets(now);
        let pairs: Vec<f64> = (0..now.len())
            .flat_map(|a| (0..a).map(move |b| (a, b)))
            .map(|(a, b)| common(&now[a], &now[b]))
            .collect();
        let mean = |of: &[f64]| (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64);
        let steps = next.map(sets).and_then(|next| {
            let same: Vec<f64> = now.iter().zip(&next).map(|(a, b)| common(a, b)).collect();
            mean(&same)
        });
        Overlap { group: mean(&pairs), steps }
    }
}

impl HeadWorkload {
    /// Statistics of each query of the group at a step, `[group]`: exact softmax over the context and the rows of the
    /// steps up to this one. `rope(range)` gives cosines and sines `[range][d/2]` of those positions.
    ///
    /// Takes about a microsecond a token.
    ///
    /// # Panics
    /// If the step was not planned, or `rope` gives too few rows.
    pub fn statistics<'a>(
        &self,
        step: usize,
        mut rope: impl FnMut(Range<usize>) -> (&'a [f32], &'a [f32]),
    ) -> Vec<HeadStatistics> {
        let mut noise = vec![(0.0f64, 0.0f64); self.group()];
        let logits = self.logits(step, &mut rope, &mut noise);
        let planted = self.needle().map(|needle| &needle.positions[..]);
        let count = self.context() as f64;
        let stats = logits.iter().zip(noise).map(|(logits, (sum, square))| {
            let variance = square / count - (sum / count) * (sum / count);
            let noise_std = self.solved().map(|_| variance.max(0.0).sqrt());
            HeadStatistics { noise_std, ..from_logits(logits, planted) }
        });
        stats.collect()
    }

    /// How far the sets of heaviest tokens of different queries are the same. Takes as long as [`Self::statistics`] of
    /// two steps.
    ///
    /// # Panics
    /// If the step was not planned, or `rope` gives too few rows.
    pub fn overlap<'a>(
        &self,
        step: usize,
        mut rope: impl FnMut(Range<usize>) -> (&'a [f32], &'a [f32]),
    ) -> Overlap {
        let mut of = |step: usize| -> Vec<Vec<f64>> {
            let mut logits = self.logits(step, &mut rope, &mut []);
            logits.iter_mut().for_each(|logits| logits.truncate(self.context()));
            logits
        };
        let now = of(step);
        let next = (step + 1 < self.steps()).then(|| of(step + 1));
        Overlap::of_logits(&now, next.as_deref())
    }

    /// Logits of the context and of the steps up to this one, `[group][tokens]`. Where `noise` has room, the sums of the
    /// logits that the query's noise has with the keys' noise over the context, and of their squares, are added to it.
    fn logits<'a>(
        &self,
        step: usize,
        rope: &mut impl FnMut(Range<usize>) -> (&'a [f32], &'a [f32]),
        noise: &mut [(f64, f64)],
    ) -> Vec<Vec<f64>> {
        let (dim, group, context) = (self.head_dim(), self.group(), self.context());
        let root = (dim as f64).sqrt();
        let (mut key, mut value) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        let mut scratch = vec![0.0f32; group * dim];
        let mut queries = scratch.clone();
        let (cos, sin) = rope(context + step..context + step + 1);
        self.step(step, cos, sin, &mut queries, &mut key, &mut value);
        let noise_queries = self.noise_queries(step, cos, sin).filter(|_| !noise.is_empty());

        let mut logits = vec![Vec::with_capacity(context + step + 1); group];
        let (mut k, mut v) = (vec![0.0f32; BLOCK * dim], vec![0.0f32; BLOCK * dim]);
        for block in 0..self.blocks() {
            let rows = self.block_tokens(block) * dim;
            let start = block * BLOCK;
            let (cos, sin) = rope(start..start + rows / dim);
            self.block(block, cos, sin, &mut k[..rows], &mut v[..rows]);
            for key in k[..rows].chunks_exact(dim) {
                for (logits, query) in logits.iter_mut().zip(queries.chunks_exact(dim)) {
                    logits.push(wide_dot(query, key) / root);
                }
            }
            if let (Some(solved), Some(noise_queries)) = (self.solved(), &noise_queries) {
                solved.generator.keys(block, Parts::Noise, cos, sin, &mut k[..rows]);
                for key in k[..rows].chunks_exact(dim) {
                    for (sums, query) in noise.iter_mut().zip(noise_queries.chunks_exact(dim)) {
                        let z = wide_dot(query, key) / root;
                        *sums = (sums.0 + z, sums.1 + z * z);
                    }
                }
            }
        }
        for earlier in 0..=step {
            let position = context + earlier;
            let (cos, sin) = rope(position..position + 1);
            self.step(earlier, cos, sin, &mut scratch, &mut key, &mut value);
            for (logits, query) in logits.iter_mut().zip(queries.chunks_exact(dim)) {
                logits.push(wide_dot(query, &key) / root);
            }
        }
        logits
    }

    /// The noise of a step's queries, turned, `[group][d]`.
    fn noise_queries(&self, step: usize, cos: &[f32], sin: &[f32]) -> Option<Vec<f32>> {
        let solved = self.solved()?;
        let topics = self.topics(step)?;
        let dim = self.head_dim();
        let mut all = vec![0.0f32; self.group() * dim];
        let mut fixed = vec![0.0f32; dim];
        for (head, out) in all.chunks_exact_mut(dim).enumerate() {
            fixed_part(&solved.generator, &solved.gains, topics[head], &mut fixed);
            let query = &solved.trajectory.queries[(step * self.group() + head) * dim..][..dim];
            fixed.iter_mut().zip(query).for_each(|(value, q)| *value = q - *value);
            rotate(&fixed, cos, sin, out);
        }
        Some(all)
    }
}

/// Dot product in f64.
fn wide_dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Statistics of the softmax of logits in token order.
fn from_logits(logits: &[f64], planted: Option<&[usize]>) -> HeadStatistics {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut weights: Vec<f64> = logits.iter().map(|z| libm::exp(z - max)).collect();
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= total);
    let entropy: f64 = weights.iter().filter(|w| **w > 0.0).map(|w| -w * libm::log(*w)).sum();
    let (sink_mass, needle_mass) = (weights[0], planted.map(|all| all.iter().map(|at| weights[*at]).sum()));
    let recent_mass = weights.iter().rev().take(128).sum();
    weights.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut sum = 0.0;
    let kept = weights.iter().position(|w| {
        sum += w;
        sum >= 0.95
    });
    let count = weights.len();
    HeadStatistics {
        sink_mass,
        recent_mass,
        top_percent_mass: weights.iter().take(count / 100).sum(),
        effective_tokens: libm::exp(entropy),
        density_95: kept.map_or(count, |at| at + 1) as f64 / count as f64,
        needle_mass,
        noise_std: None,
    }
}

/// The heaviest fiftieth of the tokens, ascending; of equal ones the earlier.
fn heaviest(logits: &[f64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_unstable_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    order.truncate(logits.len().div_ceil(50));
    order.sort_unstable();
    order
}

/// Share of two ascending sets of one size that they have in common.
fn common(a: &[u32], b: &[u32]) -> f64 {
    a.iter().filter(|x| b.binary_search(x).is_ok()).count() as f64 / a.len() as f64
}

#[cfg(test)]
mod tests {
    use super::{common, from_logits, heaviest};

    #[test]
    fn statistics_of_a_known_softmax() {
        // Token 0 has half of the mass, the other 999 share the rest equally.
        let mut logits = vec![0.0; 1000];
        logits[0] = libm::log(999.0);
        let stats = from_logits(&logits, Some(&[17]));
        assert_eq!(heaviest(&[0.0, 3.0, 3.0, 1.0]), [1]);
        assert_eq!(common(&[1, 4, 7, 9], &[0, 4, 9, 11]), 0.5);
        assert!((stats.sink_mass - 0.5).abs() < 1e-12);
        assert!((stats.needle_mass.expect("given") - 0.5 / 999.0).abs() < 1e-12);
        assert!((stats.recent_mass - 64.0 / 999.0).abs() < 1e-12);
        assert!((stats.top_percent_mass - (0.5 + 4.5 / 999.0)).abs() < 1e-12);
        assert!((stats.density_95 - 0.901).abs() < 1e-3 + 1e-9, "{}", stats.density_95);
        assert!((stats.effective_tokens - 2.0 * 999.0f64.sqrt()).abs() < 1e-6, "{}", stats.effective_tokens);
    }
}
