//! Cached rows that a method reads itself: logits of tokens, and softmax partials of them under weights of its own.
//!
//! Whatever it reads it counts, so that a method reports its traffic by asking. Layout of logits and weights:
//! `[group][tokens]`, the tokens of all spans one after another.

use std::ops::Range;

use super::attend::request;
use super::partial::stride;
use super::{GroupQuery, Selection, reads};
use crate::kv::{KvHead, KvScratch};

/// Reads cached rows, and counts them.
#[derive(Default)]
pub struct Reader {
    scratch: KvScratch,
    run: Vec<f32>,
    sums: Vec<f32>,
    bytes: u64,
}

impl Reader {
    /// Logits of the tokens of `spans`, ascending and disjoint: `out` becomes `[group][tokens]`.
    pub fn logits(&mut self, query: GroupQuery<'_>, kv: &KvHead, spans: &[Range<usize>], out: &mut Vec<f32>) {
        let group = query.group();
        let tokens: usize = spans.iter().map(Range::len).sum();
        out.clear();
        out.resize(group * tokens, 0.0);
        kv.prepare(query.rows, &mut self.scratch);
        let (mut at, mut ahead) = (0, reads(kv, spans).skip(1));
        for read in reads(kv, spans) {
            let next = ahead.next().map(|next| next.parts(false));
            self.run.resize(group * read.len(), 0.0);
            let upcoming = next.map_or(&[][..], |next| request(kv.kernels(), &next));
            read.score(query.rows, upcoming, &mut self.scratch, &mut self.run);
            for (all, some) in out.chunks_exact_mut(tokens).zip(self.run.chunks_exact(read.len())) {
                all[at..at + read.len()].copy_from_slice(some);
            }
            at += read.len();
            self.bytes += read.bytes()[0] as u64;
        }
    }

    /// Logits of the tokens of `spans`, estimated from the upper part of the keys alone ([`KvHead::upper_scores`]): `out`
    /// becomes `[group][tokens]`, `steps` `[tokens]`.
    pub fn upper_logits(
        &mut self,
        query: GroupQuery<'_>,
        kv: &KvHead,
        spans: &[Range<usize>],
        steps: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        let group = query.group();
        let tokens: usize = spans.iter().map(Range::len).sum();
        // Every place is written.
        out.resize(group * tokens, 0.0);
        steps.resize(tokens, 0.0);
        kv.prepare_upper(query.rows, &mut self.scratch);
        let runs = || spans.iter().cloned().flat_map(|span| kv.runs(span));
        let (mut at, mut ahead) = (0, runs().skip(1));
        for run in runs() {
            let next = ahead.next();
            let upcoming = next.as_ref().and_then(|next| kv.upper_parts(next).next()).unwrap_or_default();
            self.run.resize(group * run.len(), 0.0);
            let steps = &mut steps[at..at + run.len()];
            kv.upper_scores(query.rows, &run, upcoming, &mut self.scratch, steps, &mut self.run);
            for (all, some) in out.chunks_exact_mut(tokens).zip(self.run.chunks_exact(run.len())) {
                all[at..at + run.len()].copy_from_slice(some);
            }
            at += run.len();
            self.bytes += kv.upper_parts(&run).map(<[u8]>::len).sum::<usize>() as u64;
        }
    }

    /// Turns logits `[group][tokens]` of the tokens of `spans` into weights, in place, and writes the partials of the group
    /// over them to `out`. A logit of negative infinity leaves a token out for its head.
    pub fn partial(&mut self, kv: &KvHead, spans: &[Range<usize>], logits: &mut [f32], out: &mut [f32]) {
        let (d, kernels) = (kv.head_dim(), kv.kernels());
        let group = out.len() / stride(d);
        let tokens = logits.len() / group.max(1);
        super::partial::clear(out, d);
        if tokens == 0 {
            return;
        }
        for (partial, logits) in out.chunks_exact_mut(stride(d)).zip(logits.chunks_exact_mut(tokens)) {
            let max = kernels.max(logits);
            if max == f32::NEG_INFINITY {
                logits.fill(0.0);
                continue;
            }
            (partial[0], partial[1]) = (max, kernels.exp_sum(logits, max));
        }
        kv.watch().note(spans, logits);
        self.sums.clear();
        self.sums.resize(group * d, 0.0);
        self.accumulate(kv, spans, logits);
        for (partial, sums) in out.chunks_exact_mut(stride(d)).zip(self.sums.chunks_exact(d)) {
            partial[2..].copy_from_slice(sums);
        }
    }

    fn accumulate(&mut self, kv: &KvHead, spans: &[Range<usize>], weights: &[f32]) {
        let tokens: usize = spans.iter().map(Range::len).sum();
        let (mut at, mut ahead) = (0, reads(kv, spans).skip(1));
        for read in reads(kv, spans) {
            let next = ahead.next().map(|next| next.parts(true));
            self.run.clear();
            for weights in weights.chunks_exact(tokens) {
                self.run.extend_from_slice(&weights[at..at + read.len()]);
            }
            let upcoming = next.map_or(&[][..], |next| request(kv.kernels(), &next));
            read.accumulate(&self.run, None, upcoming, &mut self.scratch, &mut self.sums);
            at += read.len();
            self.bytes += read.bytes()[1] as u64;
        }
    }

    /// Moves the bytes counted so far to `out`.
    pub fn report(&mut self, out: &mut Selection) {
        out.read_bytes += std::mem::take(&mut self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::partial;
    use crate::attention::testing::noise;
    use crate::kv::{CacheShape, KvCache, kv_dtype};
    use longbit_kernels::Kernels;

    /// Partials of disjoint spans merge to that of all tokens, and every byte is counted once.
    #[test]
    fn partials_of_spans_are_attention_over_them() {
        const D: usize = 32;
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: 1024 };
        let cache = KvCache::new(shape, kv_dtype("f32").unwrap(), Kernels::best()).unwrap();
        let (keys, values, queries) = (noise(700 * D, 1), noise(700 * D, 2), noise(2 * D, 3));
        cache.head_mut(0, 0).append(&keys, &values).unwrap();
        let kv = cache.head(0, 0);
        let query = GroupQuery { rows: &queries, head_dim: D, position: 699 };
        let (mut reader, mut logits) = (Reader::default(), Vec::new());
        let mut whole = vec![0.0; 2 * stride(D)];
        partial::clear(&mut whole, D);
        for spans in [vec![0..3, 250..260, 699..700], vec![3..100, 100..250], vec![260..300, 300..699]] {
            let mut part = vec![0.0; 2 * stride(D)];
            reader.logits(query, &kv, &spans, &mut logits);
            reader.partial(&kv, &spans, &mut logits, &mut part);
            partial::merge(kv.kernels(), &mut whole, &part, D, &mut Vec::new());
        }
        let mut selection = Selection::default();
        reader.report(&mut selection);
        assert_eq!(selection.read_bytes, (2 * 700 * D * 4) as u64);
        let mut ours = vec![0.0; 2 * D];
        partial::finish(kv.kernels(), &whole, D, &mut ours);
        for (query, ours) in queries.chunks_exact(D).zip(ours.chunks_exact(D)) {
            let dot = |key: &[f32]| key.iter().zip(query).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let weights: Vec<f64> = keys.chunks_exact(D).map(|key| dot(key).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (i, ours) in ours.iter().enumerate() {
                let exact =
                    values.chunks_exact(D).zip(&weights).map(|(v, w)| f64::from(v[i]) * w).sum::<f64>() / sum;
                assert!((f64::from(*ours) - exact).abs() < 1e-5, "{ours} {exact}");
            }
        }
    }

    #[test]
    fn a_head_that_leaves_all_tokens_out_has_the_empty_partial() {
        const D: usize = 16;
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: 64 };
        let cache = KvCache::new(shape, kv_dtype("f32").unwrap(), Kernels::best()).unwrap();
        cache.head_mut(0, 0).append(&noise(4 * D, 1), &noise(4 * D, 2)).unwrap();
        let mut part = vec![1.0; 2 * stride(D)];
        let mut logits = [[f32::NEG_INFINITY; 2], [0.0; 2]].concat();
        Reader::default().partial(&cache.head(0, 0), &[1..2, 2..3], &mut logits, &mut part);
        assert_eq!((part[0], part[1]), (f32::NEG_INFINITY, 0.0));
        assert!(part[2..stride(D)].iter().all(|x| *x == 0.0));
        assert_eq!((part[stride(D)], part[stride(D) + 1]), (0.0, 2.0));
    }
}
