//! `blocktopk`: blocks of tokens by the mean of their keys (MoBA, arXiv 2502.13189; InfLLM, arXiv 2402.04617).
//!
//! The query meets one row a block, the mean key. The blocks with the largest product are read, `budget` tokens for each
//! query head, besides the first `sinks` and at least the last `local` tokens; blocks begin behind the sinks, so that no
//! token belongs to both. The heads of a group read the union of their blocks.
//!
//! What a block weighs is `sum e^z = B e^(mean z + var z / 2 + …)`: a mean alone misses blocks that matter by few of their
//! tokens. `second=on` adds half of `sum_i q_i^2 var_i`, the variance as far as the variances of channels tell it, for one
//! row more a block. It is a series cut off: blocks of two camps far apart are overrated by it.
//!
//! `tail=mean` lets unread blocks stand in the softmax by `B e^score` and the mean of their values, for another row a block;
//! `tail=none`, as the authors have it, renormalises over what is read.
//!
//! Different here: MoBA is trained, with larger blocks, and InfLLM has some keys of a block stand for it, chosen by
//! attention in prefill; a mean is what both come down to on a model that is trained for neither. Blocks of 64 and 1024
//! tokens of them are what NSA reads. Rows that a format has not settled yet are read.
//!
//! Cost a block of keys of 128 numbers: 132 bytes, and as many for variances and for values; of the values a step reads
//! those of the blocks outside the newest tokens.

use super::choose::union;
use super::params::ParamSpec;
use super::summary::{self, Blocks, CodeRows, Room};
use super::{GroupQuery, HeadMethod, Method, Params, Place, Predicted, Selection};
use crate::kv::{KvDtype, KvHead};

pub(super) const METHOD: Method = Method {
    name: "blocktopk",
    summary: "blocks by their mean keys (MoBA, arXiv 2502.13189; InfLLM, arXiv 2402.04617), with a tail of means if wanted",
    params: &[
        ParamSpec::int("block", "tokens of a block", [1, 4096], "64"),
        ParamSpec::int("budget", "tokens of chosen blocks read for each query head", [1, 1 << 24], "1024"),
        ParamSpec::choice(
            "second",
            "whether scores count the variance within a block",
            &["off", "on"],
            "off",
        ),
        ParamSpec::choice(
            "tail",
            "how unread blocks count: not at all, or by their mean value",
            &["none", "mean"],
            "none",
        ),
        ParamSpec::sinks("16"),
        ParamSpec::int(
            "local",
            "most recent tokens always read, the newest included; with the rest of the block they begin in",
            [1, 1 << 24],
            "128",
        ),
    ],
    settings: true,
    evicts: false,
    check: |p, shape| {
        summary::check(shape, 1)?;
        let (block, budget) = (p.int("block"), p.int("budget"));
        if budget < block {
            return Err(format!(
                "budget={budget} is less than a block of {block}: raise budget or lower block"
            ));
        }
        Ok(())
    },
    make: |p, place| Box::new(BlockTopK::new(p, place)),
    predict: |p, context, shape| {
        let row = CodeRows::row_bytes(shape.head_dim);
        let (keys, values) =
            (1 + usize::from(p.word("second") == "on"), usize::from(p.word("tail") == "mean"));
        let blocks = blocks(p, shape.dtype).at(context);
        let candidates = blocks.before(context.saturating_sub(p.int("local")));
        let chosen = p.int("budget") / p.int("block");
        let state_bytes = (keys + values) * blocks.count() * row;
        if candidates <= chosen {
            return Predicted { state_bytes, ..Predicted::rows(context) };
        }
        Predicted {
            rows: context - (candidates - union(chosen, shape.group, candidates)) * p.int("block"),
            state_bytes,
            read_bytes: (keys + values) * candidates * row,
        }
    },
};

fn blocks(p: &Params, dtype: KvDtype) -> Blocks {
    Blocks::new(dtype, p.int("sinks"), p.int("block"), p.word("tail") == "mean")
}

struct BlockTopK {
    local: usize,
    /// Blocks that a head reads.
    chosen: usize,
    /// Tokens of a block.
    size: usize,
    blocks: Blocks,
    means: CodeRows,
    /// Halves of variances.
    spreads: Option<CodeRows>,
    values: Option<CodeRows>,
    squares: Vec<f32>,
    scores: Vec<f32>,
    more: Vec<f32>,
    room: Room,
}

impl BlockTopK {
    fn new(p: &Params, place: &Place<'_>) -> Self {
        let rows = || CodeRows::new(place.shape.head_dim);
        BlockTopK {
            local: p.int("local"),
            chosen: p.int("budget") / p.int("block"),
            size: p.int("block"),
            blocks: blocks(p, place.shape.dtype),
            means: rows(),
            spreads: (p.word("second") == "on").then(rows),
            values: (p.word("tail") == "mean").then(rows),
            squares: Vec::new(),
            scores: Vec::new(),
            more: Vec::new(),
            room: Room::default(),
        }
    }

    fn rows(&self) -> impl Iterator<Item = &CodeRows> {
        std::iter::once(&self.means).chain(&self.spreads).chain(&self.values)
    }

    /// The scores of the first `n` blocks, `[group][n]`, to `scores`.
    fn score(&mut self, query: GroupQuery<'_>, kv: &KvHead, n: usize) {
        let kernels = kv.kernels();
        self.means.scores(kernels, query.rows, n, &mut self.room, &mut self.scores);
        if let Some(spreads) = &self.spreads {
            self.squares.clear();
            self.squares.extend(query.rows.iter().map(|q| q * q));
            spreads.scores(kernels, &self.squares, n, &mut self.room, &mut self.more);
            kernels.add_assign(&mut self.scores, &self.more);
        }
    }

    /// The blocks that are not in the union of `room`, by their means.
    fn tail(&mut self, kv: &KvHead, n: usize, out: &mut Selection) {
        let Some(values) = &self.values else { return };
        let size = (self.size as f32).ln();
        for scores in self.scores.chunks_exact_mut(n) {
            for (block, score) in scores.iter_mut().enumerate() {
                *score = if self.room.union.contains(block) { f32::NEG_INFINITY } else { *score + size };
            }
        }
        values.partial(kv.kernels(), &mut self.scores, n, &mut self.room, &mut out.tail);
        out.index_bytes += values.bytes(n) as u64;
    }
}

impl HeadMethod for BlockTopK {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        let (d, kernels) = (kv.head_dim(), kv.kernels());
        for block in self.blocks.update(kv.len()) {
            let tokens = self.blocks.tokens(block..block + 1);
            let Room { rows, row, .. } = &mut self.room;
            rows.resize(tokens.len() * d, 0.0);
            if let Some(values) = &mut self.values {
                kv.decode_values(tokens.clone(), rows);
                summary::mean(kernels, rows, d, row);
                values.push(kernels, row);
            }
            kv.decode_keys(tokens, rows);
            summary::mean(kernels, rows, d, row);
            self.means.push(kernels, row);
            if let Some(spreads) = &mut self.spreads {
                for x in rows.chunks_exact_mut(d) {
                    x.iter_mut().zip(&*row).for_each(|(x, mean)| *x = (*x - mean) * (*x - mean) / 2.0);
                }
                summary::mean(kernels, rows, d, row);
                spreads.push(kernels, row);
            }
        }
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.blocks.update(kv.len());
        let count = self.blocks.count();
        self.means.truncate(count);
        self.spreads.iter_mut().chain(&mut self.values).for_each(|rows| rows.truncate(count));
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let candidates = self.blocks.before(kv.len().saturating_sub(self.local));
        if candidates <= self.chosen {
            out.spans.push(0..kv.len());
            return;
        }
        self.score(query, kv, candidates);
        self.room.choose(kv.kernels(), &self.scores, candidates, self.chosen);
        out.index_bytes = self.means.bytes(candidates) as u64;
        out.index_bytes += self.spreads.as_ref().map_or(0, |rows| rows.bytes(candidates)) as u64;
        let middle = self.blocks.tokens(0..candidates);
        summary::join(0..middle.start, &mut out.spans);
        self.blocks.spans(&self.room.union, middle.end..kv.len(), &mut out.spans);
        self.tail(kv, candidates, out);
    }

    fn state_bytes(&self) -> usize {
        self.rows().map(CodeRows::state_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use crate::attention::method;
    use crate::attention::testing::{cache, dense, distance, noise, outputs, select, state};

    const D: usize = 64;

    /// Whole numbers up to 127: rows that signed bytes hold exactly, scaled to logits of a few.
    fn whole(n: usize, seed: u32, scale: f32) -> Vec<f32> {
        let mut rows: Vec<f32> = noise(n * D, seed).iter().map(|x| (x * 127.0).round() * scale).collect();
        rows.chunks_exact_mut(D).for_each(|row| row[0] = 127.0 * scale);
        rows
    }

    /// Every row `times` times.
    fn repeated(rows: &[f32], times: usize) -> Vec<f32> {
        rows.chunks_exact(D).flat_map(|row| row.repeat(times)).collect()
    }

    /// Blocks of equal rows lose nothing by their means, so the tail is exact; without it much is missing.
    #[test]
    fn a_tail_of_blocks_of_equal_rows_is_exact() {
        let keys = repeated(&whole(20, 1, 0.01), 32);
        let values = repeated(&whole(20, 2, 1.0), 32);
        let cache = cache("f32", D, &keys, &values);
        let (kv, queries) = (cache.head(0, 0), noise(3 * D, 5));
        let dense = dense(&kv, &queries);
        for (second, tail, most, least) in
            [("off", "mean", 1e-3, 0.0), ("on", "mean", 1e-3, 0.0), ("off", "none", 2.0, 0.1)]
        {
            let spec = format!("blocktopk:block=32,budget=32,second={second},tail={tail},sinks=0,local=32");
            let selection = select(&mut *state(&spec, &cache), &kv, &queries);
            assert!(selection.tokens() <= 4 * 32, "{:?}", selection.spans);
            let apart = distance(&outputs(&selection, &kv, &queries), &dense);
            assert!((least..most).contains(&apart), "{spec}: {apart}");
        }
    }

    /// Sinks are no part of a block: with a tail of means, too, they are read once.
    #[test]
    fn sinks_are_read_once_and_blocks_begin_behind_them() {
        let mut keys = repeated(&whole(20, 1, 0.01), 32);
        let mut values = repeated(&whole(20, 2, 1.0), 32);
        keys.splice(0..0, noise(5 * D, 7));
        values.splice(0..0, noise(5 * D, 8));
        let cache = cache("f32", D, &keys, &values);
        let (kv, queries) = (cache.head(0, 0), noise(2 * D, 5));
        let spec = "blocktopk:block=32,budget=32,tail=mean,sinks=5,local=1";
        let selection = select(&mut *state(spec, &cache), &kv, &queries);
        assert_eq!(selection.spans[0].start, 0);
        assert!(selection.tokens() <= 5 + 3 * 32 && selection.spans.len() >= 2);
        assert!(distance(&outputs(&selection, &kv, &queries), &dense(&kv, &queries)) < 1e-3);
    }

    /// Two camps of keys with the mean of nothing weigh more than equal keys a little above nothing: the variance says so.
    #[test]
    fn the_second_order_ranks_by_mass() {
        const BLOCK: usize = 16;
        // Along the query: +2 and -2 in the first block, 0.5 in the second, then nothing.
        let along = |t: usize| -> f32 {
            match t / BLOCK {
                0 if t.is_multiple_of(2) => 2.0,
                0 => -2.0,
                1 => 0.5,
                _ => 0.0,
            }
        };
        let mut keys = vec![0.0; 8 * BLOCK * D];
        keys.chunks_exact_mut(D).enumerate().for_each(|(t, key)| key[3] = along(t));
        let mass = |block: usize| (0..BLOCK).map(|t| along(block * BLOCK + t).exp()).sum::<f32>();
        assert!(mass(0) > 1.5 * mass(1));
        let cache = cache("f32", D, &keys, &noise(8 * BLOCK * D, 1));
        let (kv, mut queries) = (cache.head(0, 0), vec![0.0; D]);
        queries[3] = 1.0;
        for (second, chosen) in [("off", BLOCK..2 * BLOCK), ("on", 0..BLOCK)] {
            let spec = format!("blocktopk:block=16,budget=16,second={second},sinks=0,local=16");
            let selection = select(&mut *state(&spec, &cache), &kv, &queries);
            assert_eq!(selection.spans, [chosen, 7 * BLOCK..8 * BLOCK], "{spec}");
        }
    }

    /// For normal logits, which many channels make, the second order is the whole: scores are logarithms of masses.
    #[test]
    fn scores_with_the_second_order_are_closer_to_the_mass() {
        let keys = noise(640 * D, 1);
        let cache = cache("f32", D, &keys, &keys);
        let (kv, queries) = (cache.head(0, 0), noise(D, 9));
        let error = |second: &str| {
            // Scores become the logits of the tail: what all other tokens weigh, by the method, less what they do.
            let spec = format!("blocktopk:block=64,budget=64,second={second},tail=mean,sinks=0,local=1");
            let selection = select(&mut *state(&spec, &cache), &kv, &queries);
            let logit = |key: &[f32]| key.iter().zip(&queries).map(|(k, q)| k * q).sum::<f32>();
            let read = |t: &usize| selection.spans.iter().any(|span| span.contains(t));
            let exact: f32 = (0..640).filter(|t| !read(t)).map(|t| logit(&keys[t * D..][..D]).exp()).sum();
            (selection.tail[0] + selection.tail[1].ln() - exact.ln()).abs()
        };
        let (first, second) = (error("off"), error("on"));
        assert!(second < 0.3 * first && first > 1.0, "{first} {second}");
    }

    #[test]
    fn a_budget_below_a_block_is_refused() {
        let cache = cache("bf16", D, &noise(D, 1), &noise(D, 2));
        let spec = method("blocktopk:block=128,budget=100").unwrap();
        let message = spec.check(&crate::attention::MethodShape::of(&cache)).unwrap_err().to_string();
        assert!(message.contains("budget=100 is less than a block of 128"), "{message}");
    }
}
