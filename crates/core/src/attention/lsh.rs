//! What methods with locality-sensitive hashing share: cheap random rotations, and centred keys page by page.
//!
//! *Rotations.* `H D_r H D_b H D_a x` with the Walsh-Hadamard matrix `H` and diagonals `D` of random signs, of which the
//! first two are common to all rotations: `d log d` additions for `d` projections in place of `d^2` multiplications by a
//! Gaussian matrix, and nothing to read but signs. The projections of one rotation are orthogonal, not independent.
//!
//! *Centred keys.* Hashes tell keys apart that lie around the origin, so a mean is taken off. Here it is that of all keys
//! from the first token behind the sinks to the end of the page that the key lies in: rows alone decide it, so an index that
//! grew equals one that was rebuilt, and page by page it approaches the mean of the context. Pages are hashed when all their
//! keys are settled; the tokens after them are left to the caller.

use longbit_kernels::Kernels;

use crate::kv::{KvDtype, KvHead, PAGE_TOKENS, SideDtype};
use crate::rng::mix;

/// Random rotations of rows.
pub(super) struct Rotations {
    dim: usize,
    /// `[2 + rotations][dim]` of one and minus one.
    signs: Vec<f32>,
    turned: Vec<f32>,
}

impl Rotations {
    /// `count` rotations of rows of `dim` numbers, a power of two.
    pub(super) fn new(seed: u64, dim: usize, count: usize) -> Self {
        let sign = |i: usize| if mix(seed, i as u64) >> 63 == 1 { -1.0 } else { 1.0 };
        let signs = (0..(2 + count) * dim).map(sign).collect();
        Rotations { dim, signs, turned: Vec::new() }
    }

    /// All rotations of `x`: `out` becomes `[rotations][dim]`.
    pub(super) fn project(&mut self, kernels: &Kernels, x: &[f32], out: &mut Vec<f32>) {
        let (common, own) = self.signs.split_at(2 * self.dim);
        self.turned.clear();
        self.turned.extend_from_slice(x);
        for signs in common.chunks_exact(self.dim) {
            self.turned.iter_mut().zip(signs).for_each(|(x, sign)| *x *= sign);
            kernels.hadamard(&mut self.turned, self.dim);
        }
        out.clear();
        for signs in own.chunks_exact(self.dim) {
            out.extend(self.turned.iter().zip(signs).map(|(x, sign)| x * sign));
        }
        kernels.hadamard(out, self.dim);
    }

    pub(super) fn bytes(&self) -> usize {
        self.signs.len() * size_of::<f32>()
    }
}

/// The complete pages of the keys of a context, and the means that are taken off.
pub(super) struct KeyPages {
    keys: SideDtype,
    dim: usize,
    /// First tokens that no mean counts.
    sinks: usize,
    /// Sums of the keys from the first one behind the sinks to the end of each page, `[pages][dim]`.
    sums: Vec<f32>,
}

impl KeyPages {
    pub(super) fn new(dtype: KvDtype, dim: usize, sinks: usize) -> Self {
        KeyPages { keys: dtype.keys, dim, sinks, sums: Vec::new() }
    }

    /// Complete pages.
    pub(super) fn len(&self) -> usize {
        self.sums.len() / self.dim
    }

    /// Tokens of the complete pages.
    pub(super) fn tokens(&self) -> usize {
        self.len() * PAGE_TOKENS
    }

    fn settled(&self, kv: &KvHead) -> usize {
        self.keys.codec().settled(kv.len()) / PAGE_TOKENS
    }

    /// Takes up the pages that were completed. `rows` is room.
    pub(super) fn grow(&mut self, kv: &KvHead, rows: &mut Vec<f32>) {
        rows.resize(PAGE_TOKENS * self.dim, 0.0);
        for page in self.len()..self.settled(kv) {
            let first = page * PAGE_TOKENS;
            kv.decode_keys(first..first + PAGE_TOKENS, rows);
            let before = self.sums.len().saturating_sub(self.dim);
            self.sums.extend_from_within(before..);
            if page == 0 {
                self.sums.resize(self.dim, 0.0);
            }
            let sum = &mut self.sums[page * self.dim..];
            for row in rows.chunks_exact(self.dim).skip(self.sinks.saturating_sub(first)) {
                kv.kernels().add_assign(sum, row);
            }
        }
    }

    /// Goes back to the pages that `kv` still has.
    pub(super) fn shrink(&mut self, kv: &KvHead) {
        self.sums.truncate(self.settled(kv) * self.dim);
    }

    /// What the sum of `page` is multiplied by to be the mean.
    pub(super) fn factor(&self, page: usize) -> f32 {
        1.0 / ((page + 1) * PAGE_TOKENS).saturating_sub(self.sinks).max(1) as f32
    }

    /// The sums of all pages, `[pages][head_dim]`.
    pub(super) fn sums(&self) -> &[f32] {
        &self.sums
    }

    /// The keys of a complete `page` less their mean: `rows` becomes `[PAGE_TOKENS][head_dim]`.
    pub(super) fn centred(&self, kv: &KvHead, page: usize, rows: &mut Vec<f32>) {
        rows.resize(PAGE_TOKENS * self.dim, 0.0);
        kv.decode_keys(page * PAGE_TOKENS..(page + 1) * PAGE_TOKENS, rows);
        let (sum, factor) = (&self.sums[page * self.dim..(page + 1) * self.dim], self.factor(page));
        for row in rows.chunks_exact_mut(self.dim) {
            kv.kernels().scale_add(row, 1.0, sum, -factor);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.sums.len() * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rotations keep lengths, and their signs agree with probability `1 - angle / pi`.
    #[test]
    fn signs_of_rotations_measure_angles() {
        const D: usize = 64;
        let unit = |seed: u64, i: usize| (mix(seed, i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let x: Vec<f32> = (0..D).map(|i| unit(1, i)).collect();
        for mixed in [0.0f32, 0.3, 0.7, 0.95] {
            let y: Vec<f32> = (0..D).map(|i| mixed * x[i] + (1.0 - mixed) * unit(2, i)).collect();
            let kernels = Kernels::best();
            let cosine = kernels.dot(&x, &y) / (kernels.dot(&x, &x) * kernels.dot(&y, &y)).sqrt();
            let expected = 1.0 - libm::acos(f64::from(cosine)) / std::f64::consts::PI;
            let (mut a, mut b, mut agree) = (Vec::new(), Vec::new(), 0);
            for seed in 0..200 {
                let mut rotations = Rotations::new(seed, D, 3);
                rotations.project(kernels, &x, &mut a);
                rotations.project(kernels, &y, &mut b);
                let length = kernels.dot(&a, &a) / kernels.dot(&x, &x);
                assert!((length - 3.0).abs() < 1e-4);
                agree += a.iter().zip(&b).filter(|(a, b)| (**a > 0.0) == (**b > 0.0)).count();
            }
            let share = agree as f64 / (200 * 3 * D) as f64;
            assert!((share - expected).abs() < 0.01, "{mixed}: {share} {expected}");
        }
    }
}
