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
    /// Mass of the planted token; `None` if there is none.
    pub needle_mass: Option<f64>,
    /// Deviation over the context of the logits that the query's noise has with the keys' noise; `None` for the
    /// controls, which have no other part.
    pub noise_std: Option<f64>,
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
        let (dim, group, context) = (self.head_dim(), self.group(), self.context());
        let root = (dim as f64).sqrt();
        let (mut key, mut value) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        let mut scratch = vec![0.0f32; group * dim];
        let mut queries = scratch.clone();
        let (cos, sin) = rope(context + step..context + step + 1);
        self.step(step, cos, sin, &mut queries, &mut key, &mut value);
        let noise_queries = self.noise_queries(step, cos, sin);

        let mut logits = vec![Vec::with_capacity(context + step + 1); group];
        let mut noise_sums = vec![(0.0f64, 0.0f64); group];
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
                    for (sums, query) in noise_sums.iter_mut().zip(noise_queries.chunks_exact(dim)) {
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
        let needle = self.needle().map(|needle| needle.position);
        logits
            .into_iter()
            .zip(noise_sums)
            .map(|(logits, (sum, square))| {
                let count = context as f64;
                let variance = square / count - (sum / count) * (sum / count);
                let noise_std = noise_queries.is_some().then(|| variance.max(0.0).sqrt());
                HeadStatistics { noise_std, ..from_logits(logits, needle) }
            })
            .collect()
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
fn from_logits(logits: Vec<f64>, needle: Option<usize>) -> HeadStatistics {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut weights: Vec<f64> = logits.iter().map(|z| libm::exp(z - max)).collect();
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= total);
    let entropy: f64 = weights.iter().filter(|w| **w > 0.0).map(|w| -w * libm::log(*w)).sum();
    let (sink_mass, needle_mass) = (weights[0], needle.map(|at| weights[at]));
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

#[cfg(test)]
mod tests {
    use super::from_logits;

    #[test]
    fn statistics_of_a_known_softmax() {
        // Token 0 has half of the mass, the other 999 share the rest equally.
        let mut logits = vec![0.0; 1000];
        logits[0] = libm::log(999.0);
        let stats = from_logits(logits, Some(17));
        assert!((stats.sink_mass - 0.5).abs() < 1e-12);
        assert!((stats.needle_mass.expect("given") - 0.5 / 999.0).abs() < 1e-12);
        assert!((stats.recent_mass - 64.0 / 999.0).abs() < 1e-12);
        assert!((stats.top_percent_mass - (0.5 + 4.5 / 999.0)).abs() < 1e-12);
        assert!((stats.density_95 - 0.901).abs() < 1e-3 + 1e-9, "{}", stats.density_95);
        assert!((stats.effective_tokens - 2.0 * 999.0f64.sqrt()).abs() < 1e-6, "{}", stats.effective_tokens);
    }
}
