//! From the rows of a segment to its clusters.
//!
//! Euclidean k-means on the keys less their mean: what counts is how far logits spread within a cluster. Tokens meet
//! centroids as integers (rows of 8 bits, 8-bit centroids as the queries of `Kernels::code_scores`), which is exact enough
//! to choose among them, four times as fast as floats and the same everywhere; sums and means are floats in token order.
//! First centroids are tokens at even distances with a fixed jitter; a centroid that loses all tokens is set on the one
//! that lies farthest from its own.
//!
//! Work for a segment of 1,024 tokens of 128 numbers: 1024 * 64 * 128 * [`ITERATIONS`] = 42 M multiplications of bytes; for a
//! cache of 96k tokens and 150 heads 6e11.

use longbit_kernels::{CodeBits, CodeShape, Kernels, QueryBits, QueryCodes, Rows, Scales};

use super::Shape;
use crate::attention::top_k;

/// Rounds of k-means; more change nothing that can be measured.
const ITERATIONS: usize = 5;
/// Tokens that meet all centroids at a time: their scores stay in the second-level cache.
const BLOCK: usize = 256;
/// Tokens whose mean says what is usual around them.
const NEIGHBOURS: usize = 16;
/// In place of a cluster, for tokens that belong to none.
pub(super) const OUTLIER: u32 = u32::MAX;

/// Clusters of a segment, and the room to find them.
#[derive(Default)]
pub(super) struct Builder {
    /// Keys less their mean, `[segment][d]`.
    pub(super) keys: Vec<f32>,
    /// The mean.
    pub(super) mean: Vec<f32>,
    /// Of each token its cluster, or [`OUTLIER`].
    pub(super) cluster: Vec<u32>,
    /// Mean of each cluster, `[clusters][d]`; means nothing where there is no token.
    pub(super) centroids: Vec<f32>,
    /// Tokens of each cluster.
    pub(super) sizes: Vec<u32>,
    /// Sum of `|key - centroid|^2` of each cluster.
    pub(super) energies: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    squares: Vec<f32>,
    query: QueryCodes,
    halves: Vec<f32>,
    scores: Vec<f32>,
    best: Vec<f32>,
    chosen: Vec<u32>,
    pub(super) row: Vec<f32>,
}

/// Takes the mean of `rows`, `[n][d]`, off them and leaves it in `mean`.
pub(super) fn centre(kernels: &Kernels, rows: &mut [f32], d: usize, mean: &mut Vec<f32>) {
    mean.clear();
    mean.resize(d, 0.0);
    rows.chunks_exact(d).for_each(|row| kernels.add_assign(mean, row));
    kernels.scale(mean, d as f32 / rows.len() as f32);
    for row in rows.chunks_exact_mut(d) {
        row.iter_mut().zip(&*mean).for_each(|(x, m)| *x -= m);
    }
}

/// A fixed pseudo-random number (SplitMix64).
fn hash(x: usize) -> usize {
    let z = (x as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 33) as usize
}

impl Builder {
    /// Finds the clusters of `keys`, which are those of a segment, not centred yet.
    pub(super) fn run(&mut self, kernels: &Kernels, shape: &Shape) {
        let (d, n, clusters) = (shape.d, shape.segment, shape.clusters());
        centre(kernels, &mut self.keys, d, &mut self.mean);
        self.cluster.clear();
        self.cluster.resize(n, 0);
        self.leave_out(kernels, shape);
        let codes = CodeShape { dims: d, bits: CodeBits::Eight };
        self.codes.resize(n * codes.row_bytes(), 0);
        self.scales.resize(n, 0.0);
        kernels.encode_int8(codes, false, &self.keys, &mut self.codes, &mut [], &mut self.scales);
        self.squares.clear();
        self.squares.extend(self.keys.chunks_exact(d).map(|row| kernels.dot(row, row)));
        self.centroids.clear();
        for c in 0..clusters {
            let first = c * n / clusters + hash(c) % (n / clusters);
            let token = (first..n).chain(0..first).find(|&t| self.cluster[t] != OUTLIER).unwrap_or(first);
            self.centroids.extend_from_slice(&self.keys[token * d..(token + 1) * d]);
        }
        for iteration in 1..=ITERATIONS {
            self.assign(kernels, codes);
            self.update(kernels, d, clusters);
            if iteration < ITERATIONS {
                self.revive(d);
            }
        }
        self.energies.clear();
        self.energies.resize(clusters, 0.0);
        for t in 0..n {
            if self.cluster[t] != OUTLIER {
                self.residual(t, d);
                self.energies[self.cluster[t] as usize] += kernels.dot(&self.row, &self.row);
            }
        }
    }

    /// What a token of a cluster has beyond its centroid, in `row`.
    pub(super) fn residual(&mut self, token: usize, d: usize) {
        let c = self.cluster[token] as usize;
        let centroid = &self.centroids[c * d..(c + 1) * d];
        let key = &self.keys[token * d..(token + 1) * d];
        self.row.clear();
        self.row.extend(key.iter().zip(centroid).map(|(x, c)| x - c));
    }

    /// Marks the tokens that are least like their neighbours: the largest sums of squares of what they have beyond the mean
    /// of the tokens around them, each channel by its variance.
    fn leave_out(&mut self, kernels: &Kernels, shape: &Shape) {
        if shape.outliers == 0 {
            return;
        }
        let d = shape.d;
        let mut apart = self.keys.clone();
        let mut mean = Vec::new();
        apart.chunks_mut(NEIGHBOURS * d).for_each(|block| centre(kernels, block, d, &mut mean));
        let mut variance = vec![0.0f32; d];
        for row in apart.chunks_exact(d) {
            variance.iter_mut().zip(row).for_each(|(v, x)| *v += x * x);
        }
        for v in &mut variance {
            *v = if *v > 0.0 { v.recip() } else { 0.0 };
        }
        let novelty = |row: &[f32]| -> f32 { row.iter().zip(&variance).map(|(x, v)| x * x * v).sum() };
        self.best.clear();
        self.best.extend(apart.chunks_exact(d).map(novelty));
        top_k(&self.best, shape.outliers, &mut self.chosen);
        self.chosen.iter().for_each(|&t| self.cluster[t as usize] = OUTLIER);
    }

    /// Gives each token the centroid that is nearest; `best` becomes `key . centroid - |centroid|^2 / 2`.
    fn assign(&mut self, kernels: &Kernels, shape: CodeShape) {
        let row = shape.row_bytes();
        let square = |c: &[f32]| 0.5 * kernels.dot(c, c);
        self.halves.clear();
        self.halves.extend(self.centroids.chunks_exact(shape.dims).map(square));
        kernels.quantize_queries(shape, QueryBits::Eight, &self.centroids, &mut self.query);
        self.best.clear();
        self.best.resize(self.cluster.len(), f32::NEG_INFINITY);
        self.chosen.clear();
        self.chosen.resize(self.cluster.len(), 0);
        for (b, best) in self.best.chunks_mut(BLOCK).enumerate() {
            let tokens = b * BLOCK..b * BLOCK + best.len();
            self.scores.resize(self.halves.len() * best.len(), 0.0);
            let rows = Rows::bytes(&self.codes[tokens.start * row..tokens.end * row]);
            let scales = Scales::Row(&self.scales[tokens.clone()]);
            kernels.code_scores(shape, &self.query, rows, scales, &mut self.scores);
            let chosen = &mut self.chosen[tokens];
            for (c, (scores, half)) in self.scores.chunks_exact(best.len()).zip(&self.halves).enumerate() {
                for ((best, chosen), score) in best.iter_mut().zip(&mut *chosen).zip(scores) {
                    let score = score - half;
                    *chosen = if score > *best { c as u32 } else { *chosen };
                    *best = if score > *best { score } else { *best };
                }
            }
        }
        for (cluster, chosen) in self.cluster.iter_mut().zip(&self.chosen) {
            *cluster = if *cluster == OUTLIER { OUTLIER } else { *chosen };
        }
    }

    /// Sizes and means of the clusters; one without tokens keeps its centroid.
    fn update(&mut self, kernels: &Kernels, d: usize, clusters: usize) {
        self.sizes.clear();
        self.sizes.resize(clusters, 0);
        self.cluster.iter().filter(|c| **c != OUTLIER).for_each(|&c| self.sizes[c as usize] += 1);
        for (centroid, _) in self.centroids.chunks_exact_mut(d).zip(&self.sizes).filter(|x| *x.1 > 0) {
            centroid.fill(0.0);
        }
        for (&c, key) in self.cluster.iter().zip(self.keys.chunks_exact(d)).filter(|x| *x.0 != OUTLIER) {
            kernels.add_assign(&mut self.centroids[c as usize * d..(c as usize + 1) * d], key);
        }
        for (centroid, &size) in self.centroids.chunks_exact_mut(d).zip(&self.sizes).filter(|x| *x.1 > 0) {
            kernels.scale(centroid, 1.0 / size as f32);
        }
    }

    /// Sets centroids without tokens on the tokens that are farthest from theirs.
    fn revive(&mut self, d: usize) {
        let empty: Vec<usize> = (0..self.sizes.len()).filter(|&c| self.sizes[c] == 0).collect();
        if empty.is_empty() {
            return;
        }
        for ((best, square), &c) in self.best.iter_mut().zip(&self.squares).zip(&self.cluster) {
            *best = if c == OUTLIER { f32::NEG_INFINITY } else { square - 2.0 * *best };
        }
        top_k(&self.best, empty.len(), &mut self.chosen);
        for (c, &token) in empty.into_iter().zip(&self.chosen) {
            let key = token as usize * d..(token as usize + 1) * d;
            self.centroids[c * d..(c + 1) * d].copy_from_slice(&self.keys[key]);
        }
    }
}
