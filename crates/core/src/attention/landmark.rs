//! `landmark`: blocks by a key that stands for them, as landmark tokens do (Landmark Attention, arXiv 2305.16300).
//!
//! The authors train a token after every 50 whose key stands for the block before it; a query reads the blocks with the
//! best landmarks, 5 for each head, and its own block. A model that has not been trained so has no landmarks: the mean key
//! of a block is an untrained stand-in here, and results say nothing about the trained method.
//!
//! `softmax=plain` is attention over the tokens read, renormalised. `softmax=grouped` is the authors': the tokens of the
//! own block and the landmarks of the blocks read share one softmax, and the weight of a landmark is dealt out by a softmax
//! within its block. A block then counts as one token, which suits trained landmarks alone.
//!
//! Different here: the heads of a group read the union of their blocks, and all attend to it; keys keep their positions
//! (the authors move retrieved blocks next to the local ones); `local` may hold more blocks than the own one; rows that a
//! format has not settled yet are read as part of it.
//!
//! Cost a block of keys of 128 numbers: 132 bytes, 2.6 a token.

use std::ops::Range;

use super::choose::union;
use super::params::ParamSpec;
use super::partial::stride;
use super::summary::{self, Blocks, CodeRows, Room};
use super::{GroupQuery, HeadMethod, Method, Params, Place, Predicted, Reader, Selection};
use crate::kv::{KvDtype, KvHead};

pub(super) const METHOD: Method = Method {
    name: "landmark",
    summary: "blocks by landmarks, untrained: mean keys stand for them (Landmark Attention, arXiv 2305.16300)",
    params: &[
        ParamSpec::int("block", "tokens of a block", [1, 4096], "50"),
        ParamSpec::int("top", "blocks read for each query head besides the local ones", [1, 1 << 20], "5"),
        ParamSpec::int(
            "local",
            "most recent blocks always read, that of the newest token included",
            [1, 1 << 20],
            "1",
        ),
        ParamSpec::choice(
            "softmax",
            "one over all tokens read, or the authors' of landmarks and within blocks",
            &["plain", "grouped"],
            "plain",
        ),
    ],
    settings: true,
    evicts: false,
    check: |_, shape| summary::check(shape, 1),
    make: |p, place| Box::new(Landmark::new(p, place)),
    predict: |p, context, shape| {
        let row = CodeRows::row_bytes(shape.head_dim);
        let blocks = blocks(p, shape.dtype).at(context);
        let (size, top) = (p.int("block"), p.int("top"));
        let candidates = candidates(&blocks, size, p.int("local"), context);
        let state_bytes = blocks.count() * row;
        let scored = candidates > top || p.word("softmax") == "grouped";
        Predicted {
            rows: context - candidates.saturating_sub(union(top, shape.group, candidates)) * size,
            state_bytes,
            read_bytes: if scored { candidates * row } else { 0 },
        }
    },
};

fn blocks(p: &Params, dtype: KvDtype) -> Blocks {
    Blocks::new(dtype, 0, p.int("block"), false)
}

/// How many blocks, the first ones, lie before the local ones.
fn candidates(blocks: &Blocks, size: usize, local: usize, tokens: usize) -> usize {
    blocks.before((tokens.div_ceil(size).saturating_sub(local)) * size)
}

struct Landmark {
    size: usize,
    top: usize,
    local: usize,
    grouped: bool,
    blocks: Blocks,
    landmarks: CodeRows,
    scores: Vec<f32>,
    logits: Vec<f32>,
    spans: Vec<Range<usize>>,
    reader: Reader,
    room: Room,
}

impl Landmark {
    fn new(p: &Params, place: &Place<'_>) -> Self {
        Landmark {
            size: p.int("block"),
            top: p.int("top"),
            local: p.int("local"),
            grouped: p.word("softmax") == "grouped",
            blocks: blocks(p, place.shape.dtype),
            landmarks: CodeRows::new(place.shape.head_dim),
            scores: Vec::new(),
            logits: Vec::new(),
            spans: Vec::new(),
            reader: Reader::default(),
            room: Room::default(),
        }
    }

    /// Attends to the tokens of `spans` under the grouped softmax. A token's logit less the log-sum-exp of its block is the
    /// logarithm of its weight within it; with the landmark's logit added, all of them share one softmax.
    fn grouped(&mut self, query: GroupQuery<'_>, kv: &KvHead, n: usize, out: &mut Selection) {
        self.reader.logits(query, kv, &self.spans, &mut self.logits);
        let kernels = kv.kernels();
        let tokens = self.logits.len() / query.group();
        for (h, logits) in self.logits.chunks_exact_mut(tokens).enumerate() {
            let read = (0..n).filter(|&block| self.room.union.contains(block));
            for (block, logits) in read.zip(logits.chunks_exact_mut(self.size)) {
                let max = kernels.max(logits);
                self.room.row.clear();
                self.room.row.extend_from_slice(logits);
                let sum = kernels.exp_sum(&mut self.room.row, max);
                let shift = self.scores[h * n + block] - (max + sum.ln());
                logits.iter_mut().for_each(|z| *z += shift);
            }
        }
        out.tail.resize(query.group() * stride(kv.head_dim()), 0.0);
        self.reader.partial(kv, &self.spans, &mut self.logits, &mut out.tail);
        self.reader.report(out);
        out.tail_rows = tokens as u64;
    }
}

impl HeadMethod for Landmark {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        let (d, kernels) = (kv.head_dim(), kv.kernels());
        for block in self.blocks.update(kv.len()) {
            let Room { rows, row, .. } = &mut self.room;
            rows.resize(self.size * d, 0.0);
            kv.decode_keys(self.blocks.tokens(block..block + 1), rows);
            summary::mean(kernels, rows, d, row);
            self.landmarks.push(kernels, row);
        }
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.blocks.update(kv.len());
        self.landmarks.truncate(self.blocks.count());
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let candidates = candidates(&self.blocks, self.size, self.local, kv.len());
        self.room.union.reset(candidates);
        if candidates > self.top || self.grouped {
            self.landmarks.scores(kv.kernels(), query.rows, candidates, &mut self.room, &mut self.scores);
            self.room.choose(kv.kernels(), &self.scores, candidates, self.top);
            out.index_bytes = self.landmarks.bytes(candidates) as u64;
        } else {
            self.room.union.insert_range(0..candidates);
        }
        self.spans.clear();
        self.blocks.spans(&self.room.union, candidates * self.size..kv.len(), &mut self.spans);
        if self.grouped {
            self.grouped(query, kv, candidates, out);
        } else {
            out.spans.extend_from_slice(&self.spans);
        }
    }

    fn state_bytes(&self) -> usize {
        self.landmarks.state_bytes()
    }
}

#[cfg(test)]
mod tests {
    use crate::attention::testing::{cache, distance, noise, outputs, select, state};

    const D: usize = 64;

    /// The grouped softmax, written out: weights of landmarks, dealt out within their blocks.
    #[test]
    fn the_grouped_softmax_is_its_definition() {
        let (keys, values) = (noise(230 * D, 1), noise(230 * D, 2));
        let cache = cache("f32", D, &keys, &values);
        let (kv, queries) = (cache.head(0, 0), noise(2 * D, 3));
        let mut state = state("landmark:block=20,top=3,softmax=grouped", &cache);
        let selection = select(&mut *state, &kv, &queries);
        assert!(selection.spans.is_empty());
        assert_eq!(selection.index_bytes, 11 * (64 + 4));
        let ours = outputs(&selection, &kv, &queries);

        let dot =
            |query: &[f32], key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(q * k)).sum::<f64>();
        let mean = |block: usize| -> Vec<f32> {
            (0..D).map(|i| (0..20).map(|t| keys[(block * 20 + t) * D + i]).sum::<f32>() / 20.0).collect()
        };
        let landmarks: Vec<Vec<f32>> = (0..11).map(mean).collect();
        let mut read: Vec<usize> = Vec::new();
        for query in queries.chunks_exact(D) {
            let mut order: Vec<usize> = (0..11).collect();
            order.sort_by(|&a, &b| dot(query, &landmarks[b]).total_cmp(&dot(query, &landmarks[a])));
            read.extend(&order[..3]);
        }
        read.sort_unstable();
        read.dedup();
        assert_eq!(selection.tail_rows as usize, read.len() * 20 + 10);
        for (query, ours) in queries.chunks_exact(D).zip(ours.chunks_exact(D)) {
            let weight = |t: usize| dot(query, &keys[t * D..][..D]).exp();
            let local = 220..230;
            let own: f64 = local.clone().map(weight).sum();
            let all = own + read.iter().map(|&b| dot(query, &landmarks[b]).exp()).sum::<f64>();
            let mut exact = vec![0.0; D];
            let mut add = |t: usize, share: f64| {
                exact.iter_mut().zip(&values[t * D..][..D]).for_each(|(o, v)| *o += share * f64::from(*v));
            };
            local.for_each(|t| add(t, weight(t) / all));
            for &block in &read {
                let tokens = block * 20..(block + 1) * 20;
                let within: f64 = tokens.clone().map(weight).sum();
                tokens.for_each(|t| add(t, dot(query, &landmarks[block]).exp() / all * weight(t) / within));
            }
            let exact: Vec<f32> = exact.into_iter().map(|x| x as f32).collect();
            // Landmarks are stored as bytes.
            assert!(distance(ours, &exact) < 0.01, "{}", distance(ours, &exact));
        }
    }

    /// The block with the best mean key is read, and the local blocks, whole.
    #[test]
    fn the_best_block_and_the_local_ones_are_read() {
        let mut keys = noise(1030 * D, 1);
        keys[400 * D..450 * D].chunks_exact_mut(D).for_each(|key| key[5] += 3.0);
        let cache = cache("bf16", D, &keys, &noise(1030 * D, 2));
        let mut queries = vec![0.0; D];
        queries[5] = 1.0;
        for (local, spans) in [(1, [400..450, 1000..1030]), (3, [400..450, 900..1030])] {
            let mut state = state(&format!("landmark:top=1,local={local}"), &cache);
            assert_eq!(select(&mut *state, &cache.head(0, 0), &queries).spans, spans);
        }
    }
}
