//! `sparq`: the tokens that the largest channels of the query find, and the mean value for the rest.
//!
//! SparQ attention (arXiv 2312.04985, its code `ann_attention.py`). Of the queries the `channels` with the largest
//! `|q_i|`, summed over the group, meet the keys; the products are divided by `sqrt(|q_I|_1 / |q|_1)`, which makes up
//! for what is left out, so that their softmax is about as flat as the true one. The weights are summed over the
//! group, the `local` newest tokens are forced, and the `k` largest are attended exactly. With `a` the share of a
//! head's estimated weight that those have, its output is `a o + (1 - a) v`, `v` the mean of all values: a tail of
//! `(1 - a) / a` times their exact mass, for which their keys are read here once more.
//!
//! As in the authors' code `local` is a quarter of `k`, and both are counted together. Other than there the second
//! copy of the keys, channel by channel, is int8 with a bfloat16 scale a token: half the bytes, an error far below
//! that of the channels left out. Keys that are rotated have no large channels: it works, but needs more of them.
//! Tokens that a format still keeps exactly, its newest, are scored by their own keys.
//!
//! State: `head_dim + 2` bytes a token, and 1 kB for 256 tokens. A step reads `channels + 2` bytes of each token: 34
//! of 128 numbers a row, 0.5 GB for 150 heads of 98,304 tokens.
//!
//! A token costs 34 bytes and, in a group of four, 128 products of 16 bits (3.8 a byte; 32 an instruction), the copy of its
//! 32 codes from the chosen rows of its page, and four scores over which four passes go (maximum, exponential, total, sum
//! for the tail): 64 bytes of the third-level cache beside 34 from memory, and 72 operations of exponentials for 16 tokens.
//! So a step is bound by arithmetic, not by its bytes: an index of four bits would change little, scores that are finished
//! page by page, with a running maximum, more.

use std::ops::Range;

use longbit_kernels::CodeBits;

use super::approximate::{MeanValue, Room, push_spans, with_room};
use super::columns::{self, Columns};
use super::params::{Kind, ParamSpec};
use super::partial::{self, stride};
use super::{GroupQuery, HeadMethod, Method, Predicted, Reader, Selection, top_k};
use crate::kv::{KvDtype, KvHead};

pub(super) const METHOD: Method = Method {
    name: "sparq",
    summary: "top tokens by the largest channels of the query, the mean value for the rest (SparQ, arXiv 2312.04985)",
    params: &[
        ParamSpec {
            name: "channels",
            summary: "channels of the query that score the tokens (r)",
            kind: Kind::Int { min: 1, max: 512 },
            default: "32",
        },
        ParamSpec {
            name: "k",
            summary: "tokens read, the local ones included",
            kind: Kind::Int { min: 1, max: 1 << 24 },
            default: "128",
        },
        ParamSpec::local("32"),
    ],
    settings: true,
    evicts: false,
    check: |p, shape| {
        let (channels, d) = (p.int("channels"), shape.head_dim);
        if channels > d {
            return Err(format!("channels={channels}: rows have {d} numbers; give at most as many"));
        }
        if p.int("local") > p.int("k") {
            return Err(
                "local is more than k, which counts the local tokens too; raise k or lower local".into()
            );
        }
        Ok(())
    },
    make: |p, place| {
        let d = place.shape.head_dim;
        Box::new(Sparq {
            channels: p.int("channels"),
            k: p.int("k"),
            local: p.int("local"),
            dtype: place.shape.dtype,
            keys: Columns::new(CodeBits::Eight, d),
            mean: MeanValue::new(d),
            reader: Reader::default(),
            logits: Vec::new(),
        })
    },
    predict: |p, context, shape| {
        let (d, k) = (shape.head_dim, p.int("k").min(context));
        let scan = columns::read_bytes(CodeBits::Eight, p.int("channels"), context);
        let keys = shape.dtype.keys.read_bytes(d, k) as usize;
        Predicted {
            rows: k,
            state_bytes: columns::read_bytes(CodeBits::Eight, d, context)
                + 8 * d * (1 + context.div_ceil(256)),
            read_bytes: scan + keys + 8 * d,
        }
    },
};

struct Sparq {
    channels: usize,
    k: usize,
    local: usize,
    dtype: KvDtype,
    keys: Columns,
    mean: MeanValue,
    reader: Reader,
    /// Of the tokens that the index lacks, then of those that are read.
    logits: Vec<f32>,
}

/// Least share of the weight that what is read counts as having, so that a tail stays finite.
const LEAST_SHARE: f32 = 1e-6;

impl Sparq {
    /// Rough logits of all tokens, into `room.logits` `[group][tokens]`.
    fn scan(&mut self, query: GroupQuery<'_>, kv: &KvHead, room: &mut Room) {
        let (d, n) = (query.head_dim, kv.len());
        let mut sizes = vec![0.0; d];
        for row in query.rows.chunks_exact(d) {
            sizes.iter_mut().zip(row).for_each(|(size, q)| *size += q.abs());
        }
        let mut picked = Vec::new();
        top_k(&sizes, self.channels, &mut picked);
        let mut weights = Vec::with_capacity(query.group() * picked.len());
        for row in query.rows.chunks_exact(d) {
            let all: f32 = row.iter().map(|q| q.abs()).sum();
            let some: f32 = picked.iter().map(|&i| row[i as usize].abs()).sum();
            let flatten = if some > 0.0 { (all / some).sqrt() } else { 1.0 };
            weights.extend(picked.iter().map(|&i| row[i as usize] * flatten));
        }
        let mut logits = std::mem::take(&mut room.logits);
        logits.resize(query.group() * n, 0.0);
        self.keys.scan(kv.kernels(), (&picked, &weights), room, n, &mut logits);
        let known = self.keys.tokens();
        if known < n {
            self.reader.logits(query, kv, std::slice::from_ref(&(known..n)), &mut self.logits);
            for (all, some) in logits.chunks_exact_mut(n).zip(self.logits.chunks_exact(n - known)) {
                all[known..].copy_from_slice(some);
            }
        }
        room.logits = logits;
    }

    /// The tail of each head, for the exact mass of `spans` and the share that they have of its weights in `room`.
    fn tail(
        &mut self,
        query: GroupQuery<'_>,
        kv: &KvHead,
        spans: &[Range<usize>],
        room: &Room,
        out: &mut Vec<f32>,
    ) {
        let (d, kernels, n) = (query.head_dim, kv.kernels(), kv.len());
        out.resize(query.group() * stride(d), 0.0);
        partial::clear(out, d);
        self.reader.logits(query, kv, spans, &mut self.logits);
        let tokens = self.logits.len() / query.group();
        let parts = out.chunks_exact_mut(stride(d)).zip(self.logits.chunks_exact_mut(tokens));
        for ((part, exact), weights) in parts.zip(room.logits.chunks_exact(n)) {
            let all = kernels.sum(weights);
            let some: f32 = spans.iter().map(|span| kernels.sum(&weights[span.clone()])).sum();
            let share = if all > 0.0 { (some / all).clamp(LEAST_SHARE, 1.0) } else { 1.0 };
            let max = kernels.max(exact);
            let mass = kernels.exp_sum(exact, max) * (1.0 - share) / share;
            if mass > 0.0 {
                (part[0], part[1]) = (max, mass);
                self.mean.write(mass, &mut part[2..]);
            }
        }
    }
}

impl HeadMethod for Sparq {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        let d = kv.head_dim();
        let until = self.dtype.keys.codec().settled(kv.len());
        let mut rows = Vec::new();
        while self.keys.tokens() < until {
            let tokens = self.keys.tokens()..until.min((self.keys.tokens() / 64 + 1) * 64);
            rows.resize(tokens.len() * d, 0.0);
            kv.decode_keys(tokens, &mut rows);
            rows.chunks_exact(d).for_each(|row| self.keys.push(row));
        }
        self.mean.update(kv, self.dtype.values.codec().settled(kv.len()));
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.keys.truncate(self.dtype.keys.codec().settled(kv.len()));
        self.mean.update(kv, self.dtype.values.codec().settled(kv.len()));
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let (n, kernels) = (kv.len(), kv.kernels());
        if n <= self.k {
            out.spans.push(0..n);
            return;
        }
        with_room(|room| {
            self.scan(query, kv, room);
            out.index_bytes = (self.keys.read_bytes(self.channels) + self.mean.read_bytes()) as u64;
            room.total.clear();
            room.total.resize(n, 0.0);
            for logits in room.logits.chunks_exact_mut(n) {
                let max = kernels.max(logits);
                let sum = kernels.exp_sum(logits, max);
                kernels.scale_add(&mut room.total, 1.0, logits, 1.0 / sum);
            }
            room.total[n - self.local..].fill(f32::INFINITY);
            room.chooser.top_k(kernels, &room.total, self.k, &mut room.chosen);
            push_spans(room.chosen.iter().map(|&t| t as usize), &mut out.spans);
            if self.mean.tokens() > 0 {
                self.tail(query, kv, &out.spans, room, &mut out.tail);
            }
        });
        self.reader.report(out);
    }

    fn state_bytes(&self) -> usize {
        self.keys.bytes() + self.mean.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{MethodShape, method};
    use crate::kv::{CacheShape, KvCache, kv_dtype};
    use longbit_kernels::Kernels;

    const D: usize = 32;

    fn rows(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n * D)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn cache(keys: &[f32], values: &[f32]) -> KvCache {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: 1024 };
        let cache = KvCache::new(shape, kv_dtype("f32").unwrap(), Kernels::best()).unwrap();
        cache.head_mut(0, 0).append(keys, values).unwrap();
        cache
    }

    fn state(kv: &KvHead, channels: usize, k: usize, local: usize) -> Sparq {
        let mut state = Sparq {
            channels,
            k,
            local,
            dtype: kv_dtype("f32").unwrap(),
            keys: Columns::new(CodeBits::Eight, D),
            mean: MeanValue::new(D),
            reader: Reader::default(),
            logits: Vec::new(),
        };
        state.appended(kv, 0);
        state
    }

    /// With all channels nothing is left out: the logits are those of the keys, to half a step of their codes.
    #[test]
    fn all_channels_give_the_logits() {
        let (keys, queries) = (rows(600, 1), rows(2, 2));
        let cache = cache(&keys, &keys);
        let kv = cache.head(0, 0);
        let query = GroupQuery { rows: &queries, head_dim: D, position: 599 };
        let mut room = Room::default();
        state(&kv, D, 64, 8).scan(query, &kv, &mut room);
        for (query, logits) in queries.chunks_exact(D).zip(room.logits.chunks_exact(600)) {
            let size: f32 = query.iter().map(|q| q.abs()).sum();
            for (key, logit) in keys.chunks_exact(D).zip(logits) {
                let exact: f32 = key.iter().zip(query).map(|(k, q)| k * q).sum();
                let most = key.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                assert!((exact - logit).abs() <= 1.02 / 254.0 * most * size + 1e-3, "{exact} {logit}");
            }
        }
    }

    /// The mean stands for what is not read: where all values are alike, so is the output.
    #[test]
    fn constant_values_come_out() {
        let (keys, queries) = (rows(500, 1), rows(2, 2));
        let cache = cache(&keys, &[1.5; 500 * D]);
        let kv = cache.head(0, 0);
        let query = GroupQuery { rows: &queries, head_dim: D, position: 499 };
        let mut out = Selection::default();
        state(&kv, 4, 20, 5).select(query, &kv, &mut out);
        assert_eq!(out.tokens(), 20);
        assert_eq!(out.spans.last().map(|s| s.end), Some(500));
        assert!(out.spans.last().unwrap().len() >= 5);
        // Bytes: 4 channels and a scale of 500 tokens, the mean, and the keys of those read.
        assert_eq!((out.index_bytes, out.read_bytes), (500 * 6 + 8 * D as u64, 20 * D as u64 * 4));
        let mut shares = Vec::new();
        let mut reader = Reader::default();
        let mut logits = Vec::new();
        reader.logits(query, &kv, &out.spans, &mut logits);
        let mut parts = vec![0.0; 2 * stride(D)];
        reader.partial(&kv, &out.spans, &mut logits, &mut parts);
        for (part, tail) in parts.chunks_exact(stride(D)).zip(out.tail.chunks_exact(stride(D))) {
            assert_eq!(part[0], tail[0]);
            shares.push(part[1] / (part[1] + tail[1]));
        }
        // Most of the weight of such flat logits is in what was not read.
        assert!(shares.iter().all(|a| (0.04..0.5).contains(a)), "{shares:?}");
        partial::merge(kv.kernels(), &mut parts, &out.tail, D, &mut Vec::new());
        let mut output = vec![0.0; 2 * D];
        partial::finish(kv.kernels(), &parts, D, &mut output);
        assert!(output.iter().all(|x| (x - 1.5).abs() < 1e-5), "{output:?}");
    }

    #[test]
    fn contradictions_are_refused() {
        let dtype = kv_dtype("bf16").unwrap();
        let shape = MethodShape { layers: 1, kv_heads: 1, head_dim: 64, group: 1, dtype };
        for (text, says) in [("sparq:channels=65", "64 numbers"), ("sparq:k=8,local=9", "raise k")] {
            let error = method(text).unwrap().check(&shape).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
