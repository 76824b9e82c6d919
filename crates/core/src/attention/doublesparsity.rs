//! `doublesparsity`: the tokens that a few channels of the keys find, the same channels at every step.
//!
//! Double Sparsity (arXiv 2408.07092, its code DoubleSparse). The `channels` of each head whose keys are largest, by
//! mean `|k_i|`, are kept once more as labels: 4 bits each, between the least and the largest of the token. Every
//! query head scores all labels and chooses the best `share` of the context, at least `least` tokens; the group
//! attends exactly to the union (more exact at no more bytes than its heads apart).
//!
//! The authors calibrate the channels offline, on a data set. Here they are those of the first 256 keys of the
//! context, and stay: deterministic, and the same for an index that grew and one that was rebuilt; until then
//! everything is read. The first two layers were dense there: `dense_layers=first2`. A head chooses up to an eighth
//! of its budget more, what comes close to the last token (see `approximate.rs`). Keys that are rotated have no large
//! channels: it works, but finds less.
//!
//! State and bytes of a scan: 8 and 4 bytes a token for 16 channels, 0.18 GB for 150 heads of 98,304 tokens. It is bound
//! by arithmetic: 64 products of 16 bits a token for a group of four (5.3 a byte), and four scores over which three passes
//! go (maximum, count, floor), 48 bytes of the third-level cache for 12 from memory; the count takes them one by one, a
//! cycle or more each. The rows that are read, a sixteenth of the context for each head, lie apart: each is 512 bytes in
//! eight lines that nothing expects, copied together and read again. Longer runs (blocks of labels) would lift that, and
//! find less.

use longbit_kernels::{CodeBits, Kernels};

use super::approximate::{Room, floor_of_largest, push_span, with_room};
use super::choose::union;
use super::columns::{self, Columns};
use super::params::{Kind, ParamSpec};
use super::{GroupQuery, HeadMethod, Method, Predicted, Selection, top_k};
use crate::kv::{KvHead, SideDtype};

pub(super) const METHOD: Method = Method {
    name: "doublesparsity",
    summary: "top tokens by 4-bit labels of a few heavy channels (Double Sparsity, arXiv 2408.07092)",
    params: &[
        CHANNELS,
        ParamSpec {
            name: "share",
            summary: "share of the context that each query head reads",
            kind: Kind::Float { min: 1e-6, max: 1.0 },
            default: "0.0625",
        },
        ParamSpec {
            name: "least",
            summary: "tokens that each query head reads at least",
            kind: Kind::Int { min: 1, max: 1 << 24 },
            default: "128",
        },
    ],
    settings: true,
    evicts: false,
    check: |p, shape| check_channels(p.int("channels"), shape.head_dim),
    make: |p, place| {
        Box::new(DoubleSparsity {
            share: p.float("share"),
            least: p.int("least"),
            labels: Labels::new(p.int("channels"), place.shape.dtype.keys),
        })
    },
    predict: |p, context, shape| {
        let labels = columns::read_bytes(CodeBits::Four, p.int("channels"), context);
        let tokens = (p.float("share") * context as f64) as usize;
        let rows = union(tokens.max(p.int("least")), shape.group, context);
        Predicted { rows, state_bytes: labels, read_bytes: labels }
    },
};

pub(super) const CHANNELS: ParamSpec = ParamSpec {
    name: "channels",
    summary: "channels of a key that labels keep",
    kind: Kind::Int { min: 1, max: 512 },
    default: "16",
};

/// # Errors
/// There are not so many channels.
pub(super) fn check_channels(channels: usize, head_dim: usize) -> Result<(), String> {
    match channels > head_dim {
        true => Err(format!("channels={channels}: rows have {head_dim} numbers; give at most as many")),
        false => Ok(()),
    }
}

/// Keys that the channels are chosen by.
const CALIBRATED: usize = 256;

/// A few channels of every key, the largest of the first ones.
pub(super) struct Labels {
    channels: usize,
    keys: SideDtype,
    /// Ascending; none before there are enough tokens.
    picked: Vec<u32>,
    columns: Columns,
}

impl Labels {
    pub(super) fn new(channels: usize, keys: SideDtype) -> Self {
        Labels { channels, keys, picked: Vec::new(), columns: Columns::new(CodeBits::Four, channels) }
    }

    /// Tokens that have a label.
    pub(super) fn tokens(&self) -> usize {
        self.columns.tokens()
    }

    pub(super) fn grow(&mut self, kv: &KvHead) {
        let (d, until) = (kv.head_dim(), self.keys.codec().settled(kv.len()));
        if until < CALIBRATED {
            return;
        }
        let mut rows = Vec::new();
        if self.picked.is_empty() {
            rows.resize(CALIBRATED * d, 0.0);
            kv.decode_keys(0..CALIBRATED, &mut rows);
            let mut sizes = vec![0.0; d];
            for row in rows.chunks_exact(d) {
                sizes.iter_mut().zip(row).for_each(|(size, x)| *size += x.abs());
            }
            top_k(&sizes, self.channels, &mut self.picked);
        }
        let mut label = vec![0.0; self.channels];
        while self.tokens() < until {
            let tokens = self.tokens()..until.min((self.tokens() / 64 + 1) * 64);
            rows.resize(tokens.len() * d, 0.0);
            kv.decode_keys(tokens, &mut rows);
            for row in rows.chunks_exact(d) {
                label.iter_mut().zip(&self.picked).for_each(|(x, &i)| *x = row[i as usize]);
                self.columns.push(&label);
            }
        }
    }

    pub(super) fn shrink(&mut self, kv: &KvHead) {
        let until = self.keys.codec().settled(kv.len());
        if until < CALIBRATED {
            self.picked.clear();
        }
        self.columns.truncate(if until < CALIBRATED { 0 } else { until });
    }

    /// Logits from the labels, into `room.logits`, `[group][labels]`.
    pub(super) fn scan(&self, kernels: &Kernels, query: GroupQuery<'_>, room: &mut Room) {
        let rows = query.rows.chunks_exact(query.head_dim);
        let weights: Vec<f32> = rows.flat_map(|row| self.picked.iter().map(|&i| row[i as usize])).collect();
        let channels: Vec<u32> = (0..self.channels as u32).collect();
        let mut logits = std::mem::take(&mut room.logits);
        logits.resize(query.group() * self.tokens(), 0.0);
        self.columns.scan(kernels, (&channels, &weights), room, self.tokens(), &mut logits);
        room.logits = logits;
    }

    /// The best `budget` tokens of every head by their labels, about: the union as ranges in `room.runs`. Ranges fewer than
    /// `min_gap` tokens apart are joined.
    pub(super) fn choose(
        &self,
        kernels: &Kernels,
        query: GroupQuery<'_>,
        (budget, min_gap): (usize, usize),
        room: &mut Room,
    ) {
        self.scan(kernels, query, room);
        let floors: Vec<f32> = (room.logits.chunks_exact(self.tokens()))
            .map(|logits| floor_of_largest(kernels, logits, budget, &mut room.chooser))
            .collect();
        kernels.runs_above(&room.logits, &floors, min_gap, &mut room.runs);
    }

    /// Bytes that a scan reads.
    pub(super) fn read_bytes(&self) -> usize {
        self.columns.read_bytes(self.channels)
    }

    pub(super) fn bytes(&self) -> usize {
        self.columns.bytes() + 4 * self.picked.len()
    }
}

struct DoubleSparsity {
    share: f64,
    least: usize,
    labels: Labels,
}

impl HeadMethod for DoubleSparsity {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        self.labels.grow(kv);
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.labels.shrink(kv);
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let known = self.labels.tokens();
        let budget = ((self.share * kv.len() as f64) as usize).max(self.least);
        if budget >= known {
            out.spans.push(0..kv.len());
            return;
        }
        with_room(|room| {
            self.labels.choose(kv.kernels(), query, (budget, 1), room);
            out.spans.extend_from_slice(&room.runs);
        });
        // The newest, which a format still keeps exactly.
        push_span(known..kv.len(), &mut out.spans);
        out.index_bytes = self.labels.read_bytes() as u64;
    }

    fn state_bytes(&self) -> usize {
        self.labels.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{CacheShape, KvCache, kv_dtype};
    use longbit_kernels::Kernels;

    const D: usize = 32;

    /// Keys whose channels 3 and 17 are large, and query-aligned in a few tokens.
    #[test]
    fn heavy_channels_find_heavy_tokens() {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: 2048 };
        let cache = KvCache::new(shape, kv_dtype("bf16").unwrap(), Kernels::best()).unwrap();
        let mut state = 9u32;
        let mut keys: Vec<f32> = (0..2000 * D)
            .map(|i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
                if matches!(i % D, 3 | 17) { 4.0 * x } else { x / 4.0 }
            })
            .collect();
        let planted = [300, 301, 777, 1500];
        for (i, &token) in planted.iter().enumerate() {
            keys[token * D + 3] = if i < 2 { 9.0 } else { -9.0 };
            keys[token * D + 17] = 8.0;
        }
        cache.head_mut(0, 0).append(&keys, &keys).unwrap();
        let kv = cache.head(0, 0);
        let mut method = DoubleSparsity { share: 0.01, least: 4, labels: Labels::new(2, cache.dtype().keys) };
        method.appended(&kv, 0);
        assert_eq!(method.labels.picked, [3, 17]);
        let mut queries = [0.01; 2 * D];
        (queries[3], queries[17]) = (1.0, 1.0);
        (queries[D + 3], queries[D + 17]) = (-1.0, 1.0);
        let mut out = Selection::default();
        method.select(GroupQuery { rows: &queries, head_dim: D, position: 1999 }, &kv, &mut out);
        let read = |token: usize| out.spans.iter().any(|span| span.contains(&token));
        assert!(planted.into_iter().all(read), "{:?}", out.spans);
        // 20 tokens for each of two heads.
        assert!((20..=45).contains(&out.tokens()), "{}", out.tokens());
        assert_eq!(out.index_bytes, 2000 * (1 + 4));
    }
}
