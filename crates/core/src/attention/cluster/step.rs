//! A decode step: masses of clusters, which of them are read, and the tail.

use std::ops::Range;

use longbit_kernels::codes::MOST_ROWS;
use longbit_kernels::{Kernels, QueryBits, QueryCodes, Rows, Scales};

use super::Shape;
use super::index::{CodeRows, Index};
use crate::attention::partial::{self, stride};
use crate::attention::{Chooser, GroupQuery, HeadMethod, MethodShape, Params, Reader, Selection, TokenSet};
use crate::kv::{KvDtype, KvHead};

/// Clusters with less than this share of the mass, for every head of the group, count with the mean value of their segment.
const NEGLIGIBLE: f32 = 2e-4;
/// Share of the mass of the sinks that does not count when masses are compared.
const SINK_DISCOUNT: f32 = 0.95;
/// Largest variance in an expected error: beyond it the choice is clear.
const MOST_VARIANCE: f32 = 7.0;
/// Limits of the factor of the tail.
const CALIBRATION: [f32; 2] = [0.5, 2.0];

/// The state of a (layer, KV head).
pub(super) struct Cluster {
    p: f32,
    cap: f32,
    /// Threshold of the expected error, where that chooses.
    tau: Option<f32>,
    local: usize,
    calibrate: f32,
    dtype: KvDtype,
    pub(super) index: Index,
    reader: Reader,
    query: QueryCodes,
    /// Logits, then weights, of what the method reads itself.
    logits: Vec<f32>,
    /// Logarithms of the masses of clusters, then masses over that of the reference: `[group][clusters]`.
    pub(super) masses: Vec<f32>,
    /// Variances of logits in clusters, then what a choice compares.
    scores: Vec<f32>,
    samples: Vec<f32>,
    chosen: Vec<u32>,
    chooser: Chooser,
    /// Clusters that some head wants.
    union: TokenSet,
    /// Clusters that are read.
    picked: Vec<u32>,
    totals: Vec<Total>,
    tokens: TokenSet,
    spans: Vec<Range<usize>>,
    factors: Vec<f32>,
    runs: Vec<Range<usize>>,
    some: Vec<f32>,
    /// Clusters whose values are read, and these.
    near: Vec<usize>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    floors: Vec<f32>,
    /// Partials of clusters that are not read, and of those that are where the method attends to them.
    rest: Vec<f32>,
    read: Vec<f32>,
}

/// What a head compares masses with.
#[derive(Clone, Copy)]
struct Total {
    /// The logarithm that masses are taken over.
    reference: f32,
    /// Mass of the clusters.
    clusters: f32,
    /// All mass, without that of the sinks.
    all: f32,
    /// Mass of the clusters that are read, as estimated.
    read: f32,
}

impl Cluster {
    pub(super) fn new(p: &Params, shape: &MethodShape) -> Self {
        Cluster {
            p: p.float("p") as f32,
            cap: p.float("cap") as f32,
            tau: (p.word("by") == "error").then(|| p.float("tau") as f32),
            local: p.int("local"),
            calibrate: p.float("calibrate") as f32,
            dtype: shape.dtype,
            index: Index::new(Shape::new(p, shape.head_dim)),
            reader: Reader::default(),
            query: QueryCodes::default(),
            logits: Vec::new(),
            masses: Vec::new(),
            scores: Vec::new(),
            samples: Vec::new(),
            chosen: Vec::new(),
            chooser: Chooser::default(),
            union: TokenSet::default(),
            picked: Vec::new(),
            totals: Vec::new(),
            tokens: TokenSet::default(),
            spans: Vec::new(),
            factors: Vec::new(),
            runs: Vec::new(),
            some: Vec::new(),
            near: Vec::new(),
            codes: Vec::new(),
            scales: Vec::new(),
            sums: Vec::new(),
            floors: Vec::new(),
            rest: Vec::new(),
            read: Vec::new(),
        }
    }

    /// Segments whose rows will not change any more and are older than the local window.
    fn complete(&self, len: usize) -> usize {
        let settled =
            self.dtype.keys.key_codec().settled(len).min(self.dtype.values.value_codec().settled(len));
        let shape = self.index.shape;
        settled.min(len.saturating_sub(self.local)).saturating_sub(shape.sinks) / shape.segment
    }

    fn update(&mut self, kv: &KvHead) {
        self.index.set(kv, self.complete(kv.len()));
    }

    /// Fills `masses` with logarithms of masses and `scores` with variances, `[group][clusters]`.
    pub(super) fn estimate(&mut self, query: GroupQuery<'_>, kernels: &Kernels) {
        let (index, d, group) = (&self.index, query.head_dim, query.group());
        let (codes, n) = (index.codes(), index.clusters());
        kernels.quantize_queries(codes, QueryBits::Sixteen, query.rows, &mut self.query);
        let scores = |rows: &CodeRows, out: &mut Vec<f32>| {
            out.resize(group * rows.scales.len(), 0.0);
            kernels.code_scores(codes, &self.query, Rows::bytes(&rows.codes), Scales::Row(&rows.scales), out);
        };
        scores(&index.keys, &mut self.masses);
        scores(&index.samples, &mut self.samples);
        self.scores.resize(group * n, 0.0);
        let energy = kernels.sum(&index.sample_energies).max(f32::MIN_POSITIVE);
        let samples = self.samples.chunks_exact(index.samples.scales.len());
        let heads = self.masses.chunks_exact_mut(n).zip(self.scores.chunks_exact_mut(n));
        for (((masses, variances), samples), query) in heads.zip(samples).zip(query.rows.chunks_exact(d)) {
            let ratio = kernels.dot(samples, samples) / energy;
            for (part, mean) in index.parts().zip(index.key_means.chunks_exact(d)) {
                let offset = kernels.dot(query, mean);
                let of = index.log_sizes[part.clone()].iter().zip(&index.energies[part.clone()]);
                let heads = masses[part.clone()].iter_mut().zip(&mut variances[part]);
                for ((mass, variance), (log_size, energy)) in heads.zip(of) {
                    *variance = ratio * energy;
                    *mass += offset + log_size + excess(*variance, *log_size);
                }
            }
        }
    }

    /// Turns logarithms of masses into masses, given the partials of what was read exactly, whose weights are in `logits`.
    fn sum_up(&mut self, kernels: &Kernels, exact: &[f32], d: usize) {
        let n = self.index.clusters();
        let group = exact.len() / stride(d);
        let sinks = self.index.shape.sinks;
        let weights = self.logits.chunks_exact(self.logits.len() / group);
        let heads = self.masses.chunks_exact_mut(n).zip(exact.chunks_exact(stride(d))).zip(weights);
        self.totals.clear();
        self.totals.extend(heads.map(|((masses, exact), weights)| {
            let reference = kernels.max(masses).max(exact[0]);
            let clusters = kernels.exp_sum(masses, reference);
            let counted = exact[1] - SINK_DISCOUNT * kernels.sum(&weights[..sinks]);
            let all = clusters + counted.max(0.0) * kernels.exp(exact[0] - reference);
            Total { reference, clusters, all: all.max(f32::MIN_POSITIVE), read: 0.0 }
        }));
    }

    /// Lists the clusters to read in `picked`, ascending, and takes their mass out of `masses`.
    fn choose(&mut self, kernels: &Kernels, context: usize) {
        let (index, n, picked) = (&self.index, self.index.clusters(), &mut self.picked);
        self.union.reset(n);
        let heads = self.masses.chunks_exact(n).zip(self.scores.chunks_exact_mut(n));
        for ((masses, scores), total) in heads.zip(&self.totals) {
            match self.tau {
                None => {
                    scores.copy_from_slice(masses);
                    let wanted = 1.0 - (1.0 - self.p) * total.all / total.clusters;
                    // Also false where there is no mass in clusters.
                    if wanted > 0.0 {
                        self.chooser.top_p(kernels, scores, wanted, &mut self.chosen);
                        self.chosen.iter().for_each(|&c| self.union.insert(c as usize));
                    }
                }
                Some(tau) => {
                    scores.iter_mut().for_each(|v| *v = v.min(MOST_VARIANCE));
                    kernels.exp_sum(scores, 0.0);
                    for ((score, mass), inverse) in scores.iter_mut().zip(masses).zip(&index.inverse_sizes) {
                        *score = mass * mass * (*score - 1.0).max(0.0) * inverse;
                    }
                    let limit = tau * total.all;
                    self.floors.clear();
                    self.floors.push(limit * limit);
                    kernels.runs_above(scores, &self.floors, 1, &mut self.runs);
                    self.runs.iter().for_each(|run| self.union.insert_range(run.clone()));
                }
            }
        }
        self.spans.clear();
        self.union.spans(&mut self.spans);
        picked.clear();
        picked.extend(self.spans.drain(..).flatten().map(|c| c as u32));
        let most = (self.cap * context as f32) as usize;
        if picked.iter().map(|&c| index.size(c as usize)).sum::<usize>() > most {
            let share = |c: u32| {
                let heads = self.scores.chunks_exact(n).zip(&self.totals);
                // Errors are squared.
                let power = if self.tau.is_some() { 2 } else { 1 };
                heads.map(|(scores, total)| scores[c as usize] / total.all.powi(power)).fold(0.0, f32::max)
            };
            // Shares are not negative: their bits are in their order.
            picked.sort_by_cached_key(|&c| (std::cmp::Reverse(share(c).to_bits()), c));
            let mut tokens = 0;
            let fits = |c: &&u32| {
                tokens += index.size(**c as usize);
                tokens <= most
            };
            let fit = picked.iter().take_while(fits).count();
            picked.truncate(fit);
            picked.sort_unstable();
        }
        for (masses, total) in self.masses.chunks_exact_mut(n).zip(&mut self.totals) {
            for &c in &*picked {
                total.read += std::mem::take(&mut masses[c as usize]);
            }
        }
    }

    /// The partials of the clusters that still have mass, into `rest`; returns the bytes of values read.
    fn tail(&mut self, kernels: &Kernels, d: usize) -> u64 {
        let (index, n, group) = (&self.index, self.index.clusters(), self.totals.len());
        let segments = index.segments();
        self.sums.clear();
        self.sums.resize(group * d, 0.0);
        self.some.clear();
        for masses in self.masses.chunks_exact(n) {
            self.some.extend(index.parts().map(|part| kernels.sum(&masses[part])));
        }
        kernels.accumulate_f32(&self.some, &index.value_means, d, &mut self.sums, &[]);
        self.rest.resize(group * stride(d), 0.0);
        partial::clear(&mut self.rest, d);
        for ((partial, total), masses) in
            self.rest.chunks_exact_mut(stride(d)).zip(&self.totals).zip(self.some.chunks_exact(segments))
        {
            (partial[0], partial[1]) = (total.reference, kernels.sum(masses));
        }
        self.floors.clear();
        self.floors.extend(self.totals.iter().map(|total| NEGLIGIBLE * total.all));
        kernels.runs_above(&self.masses, &self.floors, 1, &mut self.runs);
        // Rows that lie apart are brought together, so that few calls read them.
        let (codes, row) = (index.codes(), index.codes().row_bytes());
        let mut rows = self.runs.iter().cloned().flatten().peekable();
        let mut read = 0;
        while rows.peek().is_some() {
            self.near.clear();
            self.near.extend(rows.by_ref().take(MOST_ROWS));
            read += self.near.len();
            self.codes.clear();
            self.scales.clear();
            for &c in &self.near {
                self.codes.extend_from_slice(&index.values.codes[c * row..(c + 1) * row]);
                self.scales.push(index.values.scales[c]);
            }
            self.some.clear();
            for masses in self.masses.chunks_exact(n) {
                self.some.extend(self.near.iter().map(|&c| masses[c]));
            }
            let (rows, scales) = (Rows::bytes(&self.codes), Scales::Row(&self.scales));
            kernels.code_accumulate(codes, &self.some, rows, scales, &mut self.sums);
        }
        for (partial, sums) in self.rest.chunks_exact_mut(stride(d)).zip(self.sums.chunks_exact(d)) {
            partial[2..].copy_from_slice(sums);
        }
        (read * (row + 4)) as u64
    }
}

/// What the spread of logits, of this variance, in a cluster adds to the logarithm of its mass.
pub(super) fn excess(variance: f32, log_size: f32) -> f32 {
    // Both sides are computed, so that a loop of it has no branch.
    let frozen = (2.0 * log_size * variance).sqrt() - log_size;
    if variance < 2.0 * log_size { 0.5 * variance } else { frozen }
}

impl HeadMethod for Cluster {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        self.update(kv);
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.update(kv);
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let (kernels, d, len) = (kv.kernels(), query.head_dim, kv.len());
        if self.index.clusters() == 0 || (self.tau.is_none() && self.p >= 1.0 && self.cap >= 1.0) {
            out.spans.push(0..len);
            return;
        }
        // What is read anyhow: its mass is needed before anything is chosen.
        let shape = self.index.shape;
        self.tokens.reset(len);
        self.tokens.insert_range(0..shape.sinks);
        self.tokens.insert_range(shape.sinks + self.index.segments() * shape.segment..len);
        for segment in 0..self.index.segments() {
            self.index.outliers(segment).for_each(|t| self.tokens.insert(t));
        }
        self.spans.clear();
        self.tokens.spans(&mut self.spans);
        out.tail_rows = self.tokens.count() as u64;
        out.tail.resize(query.group() * stride(d), 0.0);
        self.reader.logits(query, kv, &self.spans, &mut self.logits);
        self.reader.partial(kv, &self.spans, &mut self.logits, &mut out.tail);

        self.estimate(query, kernels);
        self.sum_up(kernels, &out.tail, d);
        self.choose(kernels, len);
        self.tokens.reset(len);
        for &c in &self.picked {
            self.index.of(c as usize).for_each(|t| self.tokens.insert(t));
        }
        out.index_bytes = self.index.scanned() as u64 + self.tail(kernels, d);
        out.index_bytes += 2 * self.tokens.count() as u64 + 8 * self.picked.len() as u64;
        if self.calibrate == 0.0 {
            self.tokens.spans(&mut out.spans);
        } else {
            self.spans.clear();
            self.tokens.spans(&mut self.spans);
            out.tail_rows += self.tokens.count() as u64;
            self.read.resize(out.tail.len(), 0.0);
            self.reader.logits(query, kv, &self.spans, &mut self.logits);
            self.reader.partial(kv, &self.spans, &mut self.logits, &mut self.read);
            let heads = self.rest.chunks_exact_mut(stride(d)).zip(self.read.chunks_exact(stride(d)));
            for ((rest, read), total) in heads.zip(&self.totals) {
                let exact = read[1] * kernels.exp(read[0] - total.reference);
                if exact > 0.0 && total.read > 0.0 {
                    let factor = libm::powf(exact / total.read, self.calibrate);
                    kernels.scale(&mut rest[1..], factor.clamp(CALIBRATION[0], CALIBRATION[1]));
                }
            }
            partial::merge(kernels, &mut out.tail, &self.read, d, &mut self.factors);
        }
        partial::merge(kernels, &mut out.tail, &self.rest, d, &mut self.factors);
        self.reader.report(out);
    }

    fn state_bytes(&self) -> usize {
        self.index.bytes()
    }
}
