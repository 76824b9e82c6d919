//! The clusters of all segments, flat, in the order of the segments: arrays that a decode step reads from end to end.

use std::ops::Range;

use longbit_kernels::{CodeBits, CodeShape, Kernels};

use super::Shape;
use super::build::{Builder, OUTLIER, centre};
use crate::kv::KvHead;

/// Clusters of every segment that is complete.
pub(super) struct Index {
    pub(super) shape: Shape,
    /// Clusters up to the end of each segment.
    pub(super) ends: Vec<usize>,
    /// Means of keys less the mean of the segment, 8-bit rows with a scale.
    pub(super) keys: CodeRows,
    /// Means of values less the mean of the segment.
    pub(super) values: CodeRows,
    /// What some keys have beyond the mean of their cluster: as many a segment as [`Shape::samples`].
    pub(super) samples: CodeRows,
    /// Sum of the squares of the samples of each segment.
    pub(super) sample_energies: Vec<f32>,
    /// Logarithm of the number of tokens of each cluster.
    pub(super) log_sizes: Vec<f32>,
    /// One by the number of tokens of each cluster.
    pub(super) inverse_sizes: Vec<f32>,
    /// Mean of `|key - centroid|^2` over the tokens of each cluster.
    pub(super) energies: Vec<f32>,
    /// Where the tokens of each cluster begin in `members`.
    pub(super) starts: Vec<u32>,
    /// Means of the keys of each segment.
    pub(super) key_means: Vec<f32>,
    /// Means of the values of each segment.
    pub(super) value_means: Vec<f32>,
    /// Tokens by their place in the segment: `[segment]` tokens of it, cluster after cluster, outliers last.
    pub(super) members: Vec<u16>,
    builder: Builder,
}

/// Rows of 8 bits, each with a scale.
#[derive(Default)]
pub(super) struct CodeRows {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
}

impl CodeRows {
    fn push(&mut self, kernels: &Kernels, shape: CodeShape, row: &[f32]) {
        let at = self.codes.len();
        self.codes.resize(at + shape.row_bytes(), 0);
        let mut scale = [0.0];
        kernels.encode_int8(shape, false, row, &mut self.codes[at..], &mut [], &mut scale);
        self.scales.push(scale[0]);
    }

    fn truncate(&mut self, shape: CodeShape, rows: usize) {
        self.codes.truncate(rows * shape.row_bytes());
        self.scales.truncate(rows);
    }

    fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(&*self.scales)
    }
}

impl Index {
    pub(super) fn new(shape: Shape) -> Self {
        Index {
            shape,
            ends: Vec::new(),
            keys: CodeRows::default(),
            values: CodeRows::default(),
            samples: CodeRows::default(),
            sample_energies: Vec::new(),
            log_sizes: Vec::new(),
            inverse_sizes: Vec::new(),
            energies: Vec::new(),
            starts: Vec::new(),
            key_means: Vec::new(),
            value_means: Vec::new(),
            members: Vec::new(),
            builder: Builder::default(),
        }
    }

    pub(super) fn codes(&self) -> CodeShape {
        CodeShape { dims: self.shape.d, bits: CodeBits::Eight }
    }

    /// Segments.
    pub(super) fn segments(&self) -> usize {
        self.ends.len()
    }

    /// Clusters.
    pub(super) fn clusters(&self) -> usize {
        self.energies.len()
    }

    /// Clusters of each segment.
    pub(super) fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        self.ends.iter().scan(0, |start, &end| Some(std::mem::replace(start, end)..end))
    }

    /// First token of a segment.
    fn first(&self, segment: usize) -> usize {
        self.shape.sinks + segment * self.shape.segment
    }

    /// Tokens of cluster `c`.
    pub(super) fn size(&self, c: usize) -> usize {
        let start = self.starts[c] as usize;
        let outliers = (start / self.shape.segment + 1) * self.shape.segment - self.shape.outliers;
        let end = self.starts.get(c + 1).map_or(outliers, |next| outliers.min(*next as usize));
        end - start
    }

    fn tokens(&self, members: Range<usize>) -> impl Iterator<Item = usize> {
        let first = self.first(members.start / self.shape.segment);
        self.members[members].iter().map(move |&t| first + usize::from(t))
    }

    /// The tokens of cluster `c`, ascending.
    pub(super) fn of(&self, c: usize) -> impl Iterator<Item = usize> {
        let start = self.starts[c] as usize;
        self.tokens(start..start + self.size(c))
    }

    /// The tokens of a segment that belong to no cluster, ascending.
    pub(super) fn outliers(&self, segment: usize) -> impl Iterator<Item = usize> {
        let end = (segment + 1) * self.shape.segment;
        self.tokens(end - self.shape.outliers..end)
    }

    /// Makes it the clusters of `segments` whole segments of `kv`.
    pub(super) fn set(&mut self, kv: &KvHead, segments: usize) {
        if segments < self.segments() {
            self.truncate(segments);
        }
        let mut builder = std::mem::take(&mut self.builder);
        (self.segments()..segments).for_each(|segment| self.push(kv, segment, &mut builder));
        self.builder = builder;
    }

    fn truncate(&mut self, segments: usize) {
        let (codes, d) = (self.codes(), self.shape.d);
        self.ends.truncate(segments);
        let clusters = self.ends.last().copied().unwrap_or(0);
        self.keys.truncate(codes, clusters);
        self.values.truncate(codes, clusters);
        self.samples.truncate(codes, segments * self.shape.samples());
        self.sample_energies.truncate(segments);
        self.log_sizes.truncate(clusters);
        self.inverse_sizes.truncate(clusters);
        self.energies.truncate(clusters);
        self.starts.truncate(clusters);
        self.key_means.truncate(segments * d);
        self.value_means.truncate(segments * d);
        self.members.truncate(segments * self.shape.segment);
    }

    /// Adds the clusters of a segment, from its stored rows alone.
    fn push(&mut self, kv: &KvHead, segment: usize, b: &mut Builder) {
        let (kernels, d, n, codes) = (kv.kernels(), self.shape.d, self.shape.segment, self.codes());
        let tokens = self.first(segment)..self.first(segment) + n;
        b.keys.resize(n * d, 0.0);
        kv.decode_keys(tokens.clone(), &mut b.keys);
        b.run(kernels, &self.shape);
        let samples = self.shape.samples();
        for s in 0..samples {
            // Even distances, but no outliers.
            let token = (s * n / samples..n).find(|&t| b.cluster[t] != OUTLIER);
            match token {
                Some(token) => b.residual(token, d),
                None => b.row.fill(0.0),
            }
            self.samples.push(kernels, codes, &b.row);
            let energy = kernels.dot(&b.row, &b.row);
            if s == 0 {
                self.sample_energies.push(0.0);
            }
            self.sample_energies[segment] += energy;
        }
        self.key_means.extend_from_slice(&b.mean);
        // The keys are done with; their room takes the values.
        kv.decode_values(tokens, &mut b.keys);
        centre(kernels, &mut b.keys, d, &mut b.mean);
        self.value_means.extend_from_slice(&b.mean);
        for (c, &size) in b.sizes.iter().enumerate().filter(|x| *x.1 > 0) {
            self.keys.push(kernels, codes, &b.centroids[c * d..(c + 1) * d]);
            self.log_sizes.push(libm::logf(size as f32));
            self.inverse_sizes.push(1.0 / size as f32);
            self.energies.push(b.energies[c] / size as f32);
        }
        self.sort_members(b);
        b.centroids.fill(0.0);
        for (&c, value) in b.cluster.iter().zip(b.keys.chunks_exact(d)).filter(|x| *x.0 != OUTLIER) {
            kernels.add_assign(&mut b.centroids[c as usize * d..(c as usize + 1) * d], value);
        }
        for (mean, &size) in b.centroids.chunks_exact_mut(d).zip(&b.sizes).filter(|x| *x.1 > 0) {
            kernels.scale(mean, 1.0 / size as f32);
            self.values.push(kernels, codes, mean);
        }
        self.ends.push(self.energies.len());
    }

    /// Writes the tokens of a segment cluster after cluster, by counting.
    fn sort_members(&mut self, b: &Builder) {
        let base = self.members.len();
        let mut places = Vec::with_capacity(b.sizes.len());
        let mut at = base;
        for &size in &b.sizes {
            places.push(at);
            if size > 0 {
                self.starts.push(at as u32);
            }
            at += size as usize;
        }
        self.members.resize(base + b.cluster.len(), 0);
        for (t, &c) in b.cluster.iter().enumerate() {
            let place = if c == OUTLIER { &mut at } else { &mut places[c as usize] };
            self.members[*place] = t as u16;
            *place += 1;
        }
    }

    /// Bytes of a cluster that every decode step reads: its key, scale, sizes and energy.
    pub(super) fn scanned(&self) -> usize {
        self.clusters() * (self.codes().row_bytes() + 16)
            + self.samples.bytes()
            + size_of_val(&*self.sample_energies)
            + size_of_val(&*self.key_means)
            + size_of_val(&*self.value_means)
            + self.segments() * 2 * self.shape.outliers
    }

    /// Bytes of all.
    pub(super) fn bytes(&self) -> usize {
        let (floats, words) = (size_of::<f32>(), size_of::<u16>());
        self.keys.bytes()
            + self.values.bytes()
            + self.samples.bytes()
            + floats
                * (self.sample_energies.len()
                    + 2 * self.log_sizes.len()
                    + self.energies.len()
                    + self.starts.len())
            + floats * (self.key_means.len() + self.value_means.len())
            + words * self.members.len()
            + size_of_val(&*self.ends)
    }
}
