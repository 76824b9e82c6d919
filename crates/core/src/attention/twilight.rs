//! `twilight`: as many tokens as hold a share of the attention, by a copy of the keys at 4 bits.
//!
//! Twilight (arXiv 2502.02770). Stage 1 is any selector with a large budget: here the labels of
//! [`super::doublesparsity`] (one of the authors' two; the other is Quest), the `budget` best tokens of every query
//! head, or none. Stage 2 estimates the logits of what is left from keys at 4 bits, with the least and the largest
//! number of each token as the ends of the range; in each head the fewest tokens with the share `p` of the softmax
//! survive, and the group attends exactly to the union.
//!
//! Differences: the exact share is found by [`super::Chooser`] where the authors bisect a threshold; the first two
//! layers were dense there (`dense_layers=first2`). Where the KV dtype stores the upper four bits of the keys apart
//! (`planes8`) those are read and no copy is kept. What is left out is not estimated: the softmax is renormalised
//! over the survivors. Keys that are rotated suit stage 2 (their range is narrow) and not the labels. Tokens that a
//! format still keeps exactly, its newest, are always read.
//!
//! State: `head_dim / 2 + 4` bytes a token (68 for 128 numbers; none for `planes8`), and 12 of labels. A step reads
//! the labels and 68 bytes of each candidate: 0.18 GB and at most 0.08 GB a query head of the group for 150 heads of
//! 98,304 tokens; without stage 1, 1.0 GB and the time of a softmax over everything.
//!
//! What is read says little about the time. The labels cost what they cost `doublesparsity`. A candidate costs a group of
//! four 512 products of bytes (7.5 a byte), the copy of its row, which lies apart from others, four exponentials, and the
//! search of the share: a sum, eight rough sums and a comparison, then one by one what lies above a bound, at most a factor
//! of four below the last weight that counts.

use std::ops::Range;

use longbit_kernels::{CodeBits, CodeShape, Kernels, QueryBits, QueryCodes, Rows, Scales};

use super::approximate::{Room, push_span, with_room};
use super::choose::union;
use super::columns::{self, INDICES, round_nibbles};
use super::doublesparsity::{CHANNELS, Labels, check_channels};
use super::params::{Kind, ParamSpec};
use super::{GroupQuery, HeadMethod, Method, Predicted, Reader, Selection};
use crate::kv::{KvHead, SideDtype};

pub(super) const METHOD: Method = Method {
    name: "twilight",
    summary: "the fewest tokens with a share of the softmax, estimated from 4-bit keys (Twilight, arXiv 2502.02770)",
    params: &[
        ParamSpec {
            name: "p",
            summary: "share of the softmax that the tokens read have",
            kind: Kind::Float { min: 0.0, max: 1.0 },
            default: "0.85",
        },
        ParamSpec {
            name: "stage1",
            summary: "what chooses the candidates",
            kind: Kind::Choice(&["labels", "none"]),
            default: "labels",
        },
        ParamSpec {
            name: "budget",
            summary: "candidates that labels choose for each query head",
            kind: Kind::Int { min: 1, max: 1 << 24 },
            default: "8192",
        },
        CHANNELS,
    ],
    settings: true,
    evicts: false,
    check: |p, shape| match p.word("stage1") {
        "labels" => check_channels(p.int("channels"), shape.head_dim),
        _ => Ok(()),
    },
    make: |p, place| {
        let (d, keys) = (place.shape.head_dim, place.shape.dtype.keys);
        let copied = keys.key_codec().upper().is_none();
        Box::new(Twilight {
            p: p.float("p") as f32,
            budget: p.int("budget"),
            keys,
            labels: (p.word("stage1") == "labels").then(|| Labels::new(p.int("channels"), keys)),
            copy: copied.then(|| Copy4::new(d)),
            reader: Reader::default(),
        })
    },
    predict: |p, context, shape| {
        let copied = shape.dtype.keys.key_codec().upper().is_none();
        let row =
            CodeShape { dims: shape.head_dim, bits: CodeBits::Four }.row_bytes() + if copied { 4 } else { 2 };
        let copy = if copied { row * context } else { 0 };
        let labels = columns::read_bytes(CodeBits::Four, p.int("channels"), context);
        let candidates = match p.word("stage1") {
            "none" => context,
            _ => union(p.int("budget"), shape.group, context),
        };
        let (state_bytes, read_bytes) = match p.word("stage1") {
            "none" => (copy, row * context),
            _ if p.int("budget") >= context => (copy + labels, row * context),
            _ => (copy + labels, labels + candidates * row),
        };
        // Depends on the data; the authors' average of 1.6 % of the candidates is for longer prompts than most.
        let chosen = 64 + candidates / 24;
        Predicted { rows: union(chosen, shape.group, context), state_bytes, read_bytes }
    },
};

/// All keys at 4 bits, token by token.
struct Copy4 {
    shape: CodeShape,
    codes: Vec<u8>,
    /// bfloat16: step and least number of each token.
    ranges: Vec<[u16; 2]>,
    query: QueryCodes,
    room: Vec<i8>,
    /// Of some tokens.
    ranges_of: Vec<[u16; 2]>,
    steps: Vec<f32>,
    lows: Vec<f32>,
    logits: Vec<f32>,
}

/// Tokens whose rows are brought together.
const TOGETHER: usize = 256;
/// Ranges between the one that is copied and the one that is requested.
const AHEAD: usize = 8;
/// Rows of it that are; those behind them the hardware expects.
const REQUESTED: usize = 4;

fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

impl Copy4 {
    fn new(head_dim: usize) -> Self {
        let shape = CodeShape { dims: head_dim, bits: CodeBits::Four };
        let (codes, ranges, query, room) = (Vec::new(), Vec::new(), QueryCodes::default(), vec![0; head_dim]);
        let (ranges_of, steps, lows, logits) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Copy4 { shape, codes, ranges, query, room, ranges_of, steps, lows, logits }
    }

    fn grow(&mut self, kv: &KvHead, until: usize) {
        let (d, bytes) = (kv.head_dim(), self.shape.row_bytes());
        let mut rows = Vec::new();
        while self.ranges.len() < until {
            let tokens = self.ranges.len()..until.min((self.ranges.len() / 64 + 1) * 64);
            rows.resize(tokens.len() * d, 0.0);
            kv.decode_keys(tokens, &mut rows);
            for row in rows.chunks_exact(d) {
                self.ranges.push(round_nibbles(row, &mut self.room));
                let at = self.codes.len();
                self.codes.resize(at + bytes, 0);
                kv.kernels().pack_codes(self.shape, &self.room, &mut self.codes[at..], &mut []);
            }
        }
    }

    fn truncate(&mut self, tokens: usize) {
        self.ranges.truncate(tokens);
        self.codes.truncate(tokens * self.shape.row_bytes());
    }

    /// Logits of the tokens of `spans`, `[group][tokens]`.
    fn logits(
        &mut self,
        kernels: &Kernels,
        query: GroupQuery<'_>,
        spans: &[Range<usize>],
        gathered: &mut Vec<u8>,
        out: &mut Vec<f32>,
    ) {
        let (bytes, all) = (self.shape.row_bytes(), spans.iter().map(Range::len).sum::<usize>());
        let sums: Vec<f32> = query.rows.chunks_exact(query.head_dim).map(|row| kernels.sum(row)).collect();
        kernels.quantize_queries(self.shape, QueryBits::Eight, query.rows, &mut self.query);
        out.resize(query.group() * all, 0.0);
        let (mut rest, mut at) = (spans.iter(), 0..0);
        let mut ahead = spans.iter().skip(AHEAD);
        for first in (0..all).step_by(TOGETHER) {
            let n = TOGETHER.min(all - first);
            gathered.clear();
            self.ranges_of.clear();
            while self.ranges_of.len() < n {
                if at.is_empty() {
                    let Some(next) = rest.next() else { break };
                    at = next.clone();
                    if let Some(next) = ahead.next() {
                        let next = next.start..next.end.min(next.start + REQUESTED);
                        kernels.request(&self.codes[next.start * bytes..next.end * bytes]);
                    }
                }
                let run = at.start..at.end.min(at.start + n - self.ranges_of.len());
                gathered.extend_from_slice(&self.codes[run.start * bytes..run.end * bytes]);
                self.ranges_of.extend_from_slice(&self.ranges[run.clone()]);
                at.start = run.end;
            }
            self.steps.clear();
            self.lows.clear();
            self.steps.extend(self.ranges_of.iter().map(|range| widen(range[0])));
            self.lows.extend(self.ranges_of.iter().map(|range| widen(range[1])));
            self.logits.resize(query.group() * n, 0.0);
            let rows = Rows::indices(gathered, &INDICES);
            let scales = Scales::Row(&self.steps);
            kernels.code_scores(self.shape, &self.query, rows, scales, &mut self.logits);
            for (h, logits) in self.logits.chunks_exact_mut(n).enumerate() {
                kernels.scale_add(logits, 1.0, &self.lows, sums[h]);
                out[h * all + first..h * all + first + n].copy_from_slice(logits);
            }
        }
    }

    fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.ranges.len()
    }
}

struct Twilight {
    p: f32,
    budget: usize,
    keys: SideDtype,
    labels: Option<Labels>,
    /// Absent where the cache can be read at 4 bits.
    copy: Option<Copy4>,
    reader: Reader,
}

/// Candidates between which fewer tokens lie are joined: a jump costs as much as reading them.
const NEAR: usize = 3;

impl Twilight {
    /// The tokens that stage 1 leaves, of the first `known`, as ranges in `room.runs`; returns the bytes it read.
    fn candidates(&self, kernels: &Kernels, query: GroupQuery<'_>, known: usize, room: &mut Room) -> usize {
        match &self.labels {
            Some(labels) if self.budget < labels.tokens() => {
                labels.choose(kernels, query, (self.budget, NEAR), room);
                labels.read_bytes()
            }
            _ => {
                room.runs.clear();
                push_span(0..known, &mut room.runs);
                0
            }
        }
    }

    /// Turns the estimated logits of `tokens` candidates into the survivors of any head, in `room.set`.
    fn survive(&self, kernels: &Kernels, tokens: usize, len: usize, room: &mut Room) {
        room.set.reset(len);
        for weights in room.logits.chunks_exact_mut(tokens) {
            let max = kernels.max(weights);
            kernels.exp_sum(weights, max);
            room.chooser.top_p(kernels, weights, self.p, &mut room.chosen);
            let (mut runs, mut before) = (room.runs.iter(), 0);
            let mut run = 0..0;
            for &i in &room.chosen {
                while i as usize >= before + run.len() {
                    before += run.len();
                    run = runs.next().cloned().unwrap_or(len..usize::MAX);
                }
                room.set.insert(run.start + i as usize - before);
            }
        }
    }
}

impl HeadMethod for Twilight {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        if let Some(copy) = &mut self.copy {
            copy.grow(kv, self.keys.codec().settled(kv.len()));
        }
        if let Some(labels) = &mut self.labels {
            labels.grow(kv);
        }
    }

    fn truncated(&mut self, kv: &KvHead) {
        if let Some(copy) = &mut self.copy {
            copy.truncate(self.keys.codec().settled(kv.len()));
        }
        if let Some(labels) = &mut self.labels {
            labels.shrink(kv);
        }
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let kernels = kv.kernels();
        let known = self.keys.codec().settled(kv.len());
        // Too few to choose among, or all wanted.
        if known <= 1 || kv.len() <= SHORT || self.p >= 1.0 {
            push_span(0..kv.len(), &mut out.spans);
            return;
        }
        with_room(|room| {
            let mut bytes = self.candidates(kernels, query, known, room);
            let tokens = room.runs.iter().map(Range::len).sum();
            let Room { runs, logits, steps, codes, .. } = room;
            match &mut self.copy {
                Some(copy) => {
                    copy.logits(kernels, query, runs, codes, logits);
                    bytes += tokens * (copy.shape.row_bytes() + 4);
                }
                None => self.reader.upper_logits(query, kv, runs, steps, logits),
            }
            out.index_bytes = bytes as u64;
            self.survive(kernels, tokens, kv.len(), room);
            room.set.insert_range(known..kv.len());
            room.set.spans(&mut out.spans);
        });
        self.reader.report(out);
    }

    fn state_bytes(&self) -> usize {
        self.copy.as_ref().map_or(0, Copy4::bytes) + self.labels.as_ref().map_or(0, Labels::bytes)
    }
}

/// Contexts that are read whole.
const SHORT: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{CacheShape, KvCache, kv_dtype};

    const D: usize = 32;
    const N: usize = 900;

    fn rows(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n * D)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn twilight(p: f32, budget: Option<usize>, keys: SideDtype) -> Twilight {
        Twilight {
            p,
            budget: budget.unwrap_or(1),
            keys,
            labels: budget.map(|_| Labels::new(8, keys)),
            copy: keys.key_codec().upper().is_none().then(|| Copy4::new(D)),
            reader: Reader::default(),
        }
    }

    /// In every head the survivors have the share of the softmax over the candidates; the estimates are those of keys at 4
    /// bits.
    #[test]
    fn survivors_have_the_share() {
        let (keys, queries) = (rows(N, 1), rows(3, 2));
        for (dtype, budget) in [("f32", None), ("f32", Some(300)), ("planes8", None), ("planes8", Some(300))]
        {
            let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: 1024 };
            let cache = KvCache::new(shape, kv_dtype(dtype).unwrap(), Kernels::best()).unwrap();
            cache.head_mut(0, 0).append(&keys, &keys).unwrap();
            let (kv, kernels) = (cache.head(0, 0), Kernels::best());
            let mut queries = queries.clone();
            kv.rotate_queries(&mut queries);
            let query = GroupQuery { rows: &queries, head_dim: D, position: N - 1 };
            let mut read = Vec::new();
            for p in [0.2, 0.85, 0.999] {
                let mut state = twilight(p, budget, cache.dtype().keys);
                state.appended(&kv, 0);
                let mut out = Selection::default();
                state.select(query, &kv, &mut out);
                read.push(out.tokens());
                let mut room = Room::default();
                state.candidates(kernels, query, N, &mut room);
                let candidates = room.runs.clone();
                let (mut logits, mut steps) = (Vec::new(), Vec::new());
                match &mut state.copy {
                    Some(copy) => copy.logits(kernels, query, &candidates, &mut Vec::new(), &mut logits),
                    None => state.reader.upper_logits(query, &kv, &candidates, &mut steps, &mut logits),
                }
                let tokens: Vec<usize> = candidates.into_iter().flatten().collect();
                assert!(out.spans.iter().cloned().flatten().all(|t| tokens.contains(&t)));
                let mut exact = vec![0.0; N * D];
                kv.decode_keys(0..N, &mut exact);
                for (query, logits) in queries.chunks_exact(D).zip(logits.chunks_exact(tokens.len())) {
                    let (mut all, mut some) = (0.0, 0.0);
                    for (t, logit) in tokens.iter().zip(logits) {
                        let dot: f32 = exact[t * D..][..D].iter().zip(query).map(|(k, q)| k * q).sum();
                        let size: f32 = query.iter().map(|q| q.abs()).sum();
                        assert!((dot - logit).abs() <= 2.2 / 15.0 / 2.0 * size + 0.05, "{dot} {logit}");
                        let weight = f64::from(*logit).exp();
                        all += weight;
                        some += if out.spans.iter().any(|s| s.contains(t)) { weight } else { 0.0 };
                    }
                    assert!(some >= f64::from(p) * all * (1.0 - 1e-5), "{dtype} {budget:?}: {some} of {all}");
                }
            }
            assert!(read[0] < read[1] && read[1] < read[2], "{read:?}");
        }
    }
}
