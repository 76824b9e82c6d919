//! `nsa`: compressed tokens everywhere, blocks chosen by them, and a window (Native Sparse Attention, arXiv 2502.11089),
//! untrained.
//!
//! The authors train three branches: tokens compressed from blocks of 32, one every 16; 16 blocks of 64 that the softmax
//! over the compressed tokens points at, summed over the heads of a group, the first block and the 2 newest among them; a
//! window of 512. Learned gates add them up. A model without those gates must not add three normalised branches; here they
//! are *one* softmax. Chosen blocks and the window are read exactly, and the rest stands in by compressed tokens, with as
//! much weight as it has tokens. Compression is the mean, of keys and of values.
//!
//! # Each token once
//! Compressed tokens overlap, so they cannot all join a softmax over tokens. But a mean of 32 every 16 is the mean of two
//! neighbours among means of 16 that do not overlap. These pieces are what is stored, as many rows as there are
//! compressed tokens. A compressed token's logit is the mean of the logits of its pieces; the softmax over compressed
//! tokens, and what it says of blocks, is the authors' (each adds its weight to a block once for every piece that they
//! share). In the output a piece outside of what is read counts `stride e^(q . mean key)` with its mean value: every token
//! counts once, and nothing of what is read leaks in.
//!
//! The window begins with a block, so it is up to `select - 1` tokens longer, and longer still where a format has not
//! settled its newest rows. What it holds is not chosen once more: blocks before it compete for the places that the first
//! and the local ones leave. The heads of a group share all choices, as the authors have it.
//!
//! Cost for 128 numbers: 132 bytes a piece for keys and as many for values, 16.5 a token; a step reads all of it but the
//! values of the window.

use longbit_kernels::Kernels;

use super::params::ParamSpec;
use super::summary::{self, Blocks, CodeRows, Room};
use super::{GroupQuery, HeadMethod, Method, MethodShape, Params, Place, Predicted, Selection};
use crate::kv::{KvDtype, KvHead};

pub(super) const METHOD: Method = Method {
    name: "nsa",
    summary: "compressed tokens, blocks chosen by them and a window in one softmax (NSA untrained, arXiv 2502.11089)",
    params: &[
        ParamSpec::int("block", "tokens of a compressed token", [1, 4096], "32"),
        ParamSpec::int("stride", "tokens from a compressed token to the next", [1, 4096], "16"),
        ParamSpec::int("select", "tokens of a block that is chosen", [1, 4096], "64"),
        ParamSpec::int("top", "blocks read, the first and the local ones included", [1, 1 << 20], "16"),
        ParamSpec::int(
            "local",
            "most recent blocks always read, that of the newest token included",
            [1, 1 << 20],
            "2",
        ),
        ParamSpec::int("window", "most recent tokens always read, the newest included", [1, 1 << 24], "512"),
    ],
    settings: true,
    evicts: false,
    check,
    make: |p, place| Box::new(Nsa::new(p, place)),
    predict: |p, context, shape| {
        let (sizes, row) = (Sizes::new(p), CodeRows::row_bytes(shape.head_dim));
        let pieces = sizes.pieces(shape.dtype).at(context);
        let state_bytes = 2 * pieces.count() * row;
        match sizes.outside(&pieces, context) {
            Some(outside) => Predicted {
                rows: context - (outside - sizes.chosen) * sizes.select,
                state_bytes,
                read_bytes: (pieces.count() + outside * sizes.pieces_a_block()) * row,
            },
            None => Predicted { state_bytes, ..Predicted::rows(context) },
        }
    },
};

fn check(p: &Params, shape: &MethodShape) -> Result<(), String> {
    summary::check(shape, 1)?;
    let stride = p.int("stride");
    for name in ["block", "select"] {
        let size = p.int(name);
        if !size.is_multiple_of(stride) {
            return Err(format!("{name}={size} is not a multiple of stride={stride}: choose one that is"));
        }
    }
    let (top, local) = (p.int("top"), p.int("local"));
    if top <= local {
        return Err(format!("top={top} leaves no place for the first block beside local={local}: raise top"));
    }
    Ok(())
}

struct Sizes {
    /// Pieces of a compressed token.
    overlap: usize,
    stride: usize,
    select: usize,
    local: usize,
    window: usize,
    /// Blocks outside the window that are read, the first included.
    chosen: usize,
}

impl Sizes {
    fn new(p: &Params) -> Self {
        let (stride, local) = (p.int("stride"), p.int("local"));
        Sizes {
            overlap: p.int("block") / stride,
            stride,
            select: p.int("select"),
            local,
            window: p.int("window"),
            chosen: p.int("top") - local,
        }
    }

    fn pieces(&self, dtype: KvDtype) -> Blocks {
        Blocks::new(dtype, 0, self.stride, true)
    }

    fn pieces_a_block(&self) -> usize {
        self.select / self.stride
    }

    /// How many blocks, the first ones, lie before the window; nothing where all of them are read.
    fn outside(&self, pieces: &Blocks, tokens: usize) -> Option<usize> {
        let local = tokens.div_ceil(self.select).saturating_sub(self.local);
        let window = tokens.saturating_sub(self.window) / self.select;
        let outside = local.min(window).min(pieces.count() / self.pieces_a_block());
        (outside > self.chosen).then_some(outside)
    }
}

struct Nsa {
    sizes: Sizes,
    pieces: Blocks,
    keys: CodeRows,
    values: CodeRows,
    /// Logits of pieces, `[group][pieces]`.
    scores: Vec<f32>,
    /// Of a head: weights of compressed tokens.
    weights: Vec<f32>,
    /// Weights of compressed tokens, added up over the heads.
    sum: Vec<f32>,
    /// What the compressed tokens say of each piece.
    votes: Vec<f32>,
    blocks: Vec<f32>,
    logits: Vec<f32>,
    room: Room,
}

impl Nsa {
    fn new(p: &Params, place: &Place<'_>) -> Self {
        let (sizes, rows) = (Sizes::new(p), || CodeRows::new(place.shape.head_dim));
        Nsa {
            pieces: sizes.pieces(place.shape.dtype),
            sizes,
            keys: rows(),
            values: rows(),
            scores: Vec::new(),
            weights: Vec::new(),
            sum: Vec::new(),
            votes: Vec::new(),
            blocks: Vec::new(),
            logits: Vec::new(),
            room: Room::default(),
        }
    }

    /// What the softmax over compressed tokens gives to each of the first `outside` blocks, summed over the heads, to `blocks`;
    /// the first is beyond compare.
    fn vote(&mut self, kernels: &Kernels, outside: usize) {
        let (n, overlap) = (self.pieces.count(), self.sizes.overlap);
        let compressed = n.saturating_sub(overlap - 1);
        self.sum.clear();
        self.sum.resize(compressed, 0.0);
        for scores in self.scores.chunks_exact(n).filter(|_| compressed > 0) {
            self.weights.clear();
            self.weights.extend_from_slice(&scores[..compressed]);
            for next in 1..overlap {
                kernels.add_assign(&mut self.weights, &scores[next..next + compressed]);
            }
            kernels.scale(&mut self.weights, 1.0 / overlap as f32);
            let max = kernels.max(&self.weights);
            let total = kernels.exp_sum(&mut self.weights, max);
            kernels.scale_add(&mut self.sum, 1.0, &self.weights, 1.0 / total);
        }
        self.votes.clear();
        self.votes.resize(n, 0.0);
        for next in (0..overlap).filter(|_| compressed > 0) {
            kernels.add_assign(&mut self.votes[next..next + compressed], &self.sum);
        }
        self.blocks.clear();
        let pieces = self.votes.chunks_exact(self.sizes.pieces_a_block());
        self.blocks.extend(pieces.take(outside).map(|votes| votes.iter().sum::<f32>()));
        self.blocks[0] = f32::INFINITY;
    }

    /// The pieces of the first `outside` blocks that are not chosen, as one partial a head.
    fn tail(&mut self, kernels: &Kernels, outside: usize, out: &mut Selection) {
        let (per, size) = (self.sizes.pieces_a_block(), (self.sizes.stride as f32).ln());
        let n = outside * per;
        self.logits.clear();
        for scores in self.scores.chunks_exact(self.pieces.count()) {
            for (block, scores) in scores[..n].chunks_exact(per).enumerate() {
                let read = self.room.union.contains(block);
                self.logits.extend(scores.iter().map(|z| if read { f32::NEG_INFINITY } else { z + size }));
            }
        }
        self.values.partial(kernels, &mut self.logits, n, &mut self.room, &mut out.tail);
        out.index_bytes += self.values.bytes(n) as u64;
    }
}

impl HeadMethod for Nsa {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        let (d, kernels) = (kv.head_dim(), kv.kernels());
        for piece in self.pieces.update(kv.len()) {
            let tokens = self.pieces.tokens(piece..piece + 1);
            let Room { rows, row, .. } = &mut self.room;
            rows.resize(tokens.len() * d, 0.0);
            kv.decode_keys(tokens.clone(), rows);
            summary::mean(kernels, rows, d, row);
            self.keys.push(kernels, row);
            kv.decode_values(tokens, rows);
            summary::mean(kernels, rows, d, row);
            self.values.push(kernels, row);
        }
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.pieces.update(kv.len());
        self.keys.truncate(self.pieces.count());
        self.values.truncate(self.pieces.count());
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let Some(outside) = self.sizes.outside(&self.pieces, kv.len()) else {
            out.spans.push(0..kv.len());
            return;
        };
        let (kernels, n) = (kv.kernels(), self.pieces.count());
        self.keys.scores(kernels, query.rows, n, &mut self.room, &mut self.scores);
        out.index_bytes = self.keys.bytes(n) as u64;
        self.vote(kernels, outside);
        self.room.choose(kernels, &self.blocks, outside, self.sizes.chosen);
        let first = out.spans.len();
        self.room.union.spans(&mut out.spans);
        for span in &mut out.spans[first..] {
            *span = span.start * self.sizes.select..span.end * self.sizes.select;
        }
        summary::join(outside * self.sizes.select..kv.len(), &mut out.spans);
        self.tail(kernels, outside, out);
    }

    fn state_bytes(&self) -> usize {
        self.keys.state_bytes() + self.values.state_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::method;
    use crate::attention::testing::{cache, dense, distance, noise, outputs, select, state};

    const D: usize = 64;

    /// Rows that signed bytes hold exactly, each `times` times.
    fn repeated(n: usize, times: usize, seed: u32, scale: f32) -> Vec<f32> {
        let mut rows: Vec<f32> = noise(n * D, seed).iter().map(|x| (x * 127.0).round() * scale).collect();
        rows.chunks_exact_mut(D).for_each(|row| row[0] = 127.0 * scale);
        rows.chunks_exact(D).flat_map(|row| row.repeat(times)).collect()
    }

    /// Pieces of equal rows lose nothing, so every token counts once and as much as it weighs, at any end of the context.
    #[test]
    fn a_tail_of_pieces_of_equal_rows_is_exact() {
        let (keys, values) = (repeated(50, 16, 1, 0.01), repeated(50, 16, 2, 1.0));
        for tokens in [800, 799, 777] {
            let cache = cache("f32", D, &keys[..tokens * D], &values[..tokens * D]);
            let (kv, queries) = (cache.head(0, 0), noise(3 * D, 5));
            for spec in [
                "nsa:top=4,window=100",
                "nsa:block=16,top=3,window=1",
                "nsa:block=64,select=32,top=5,window=64",
            ] {
                let selection = select(&mut *state(spec, &cache), &kv, &queries);
                assert!(selection.tokens() < 400, "{spec}: {:?}", selection.spans);
                let apart = distance(&outputs(&selection, &kv, &queries), &dense(&kv, &queries));
                assert!(apart < 1e-3, "{spec}, {tokens} tokens: {apart}");
            }
        }
    }

    /// The votes are those of the authors' sum over compressed tokens and the pieces that they share with a block.
    #[test]
    fn blocks_get_the_softmax_over_compressed_tokens() {
        const N: usize = 640;
        let (keys, cache) = (noise(N * D, 1), cache("f32", D, &noise(N * D, 1), &noise(N * D, 2)));
        let (kv, queries) = (cache.head(0, 0), noise(2 * D, 3));
        let spec = method("nsa:top=4,window=64").unwrap();
        let sizes = Sizes::new(spec.params());
        let mut state = state("nsa:top=4,window=64", &cache);
        let selection = select(&mut *state, &kv, &queries);
        let mut votes = [0.0f64; 10];
        for query in queries.chunks_exact(D) {
            let logit = |j: usize| -> f64 {
                let mean =
                    |i: usize| (16 * j..16 * j + 32).map(|t| f64::from(keys[t * D + i])).sum::<f64>() / 32.0;
                query.iter().enumerate().map(|(i, q)| f64::from(*q) * mean(i)).sum()
            };
            let weights: Vec<f64> = (0..39).map(|j| logit(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (block, votes) in votes.iter_mut().enumerate() {
                for m in 0..4 {
                    for n in 0..2 {
                        let j = (4 * block + m).checked_sub(n);
                        *votes += j.and_then(|j| weights.get(j)).map_or(0.0, |w| w / sum);
                    }
                }
            }
        }
        // The first block and the best one of the others outside the two local ones.
        assert_eq!(sizes.chosen, 2);
        let best = (1..8).max_by(|&a, &b| votes[a].total_cmp(&votes[b])).unwrap();
        let chosen: Vec<usize> =
            selection.spans.iter().flat_map(|s| s.clone()).step_by(64).map(|t| t / 64).collect();
        assert_eq!(chosen, [0, best, 8, 9]);
        // Pieces are stored as bytes, so votes differ a little.
        assert_eq!(votes.iter().filter(|v| **v > 0.97 * votes[best]).count(), 1, "{votes:?}");
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let cache = cache("bf16", D, &noise(D, 1), &noise(D, 2));
        for (text, says) in [
            ("nsa:stride=24", "block=32 is not a multiple of stride=24"),
            ("nsa:select=72", "select=72 is not a multiple of stride=16"),
            ("nsa:top=2", "raise top"),
        ] {
            let message = method(text).unwrap().check(&MethodShape::of(&cache)).unwrap_err().to_string();
            assert!(message.contains(says), "{text}: {message}");
        }
    }
}
