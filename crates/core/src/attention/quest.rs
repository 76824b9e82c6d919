//! `quest`: pages whose best key might matter, by the smallest and largest number of each channel (Quest, arXiv 2406.10774).
//!
//! No key of a page can have a larger logit than `u = sum_i max(q_i m_i, q_i M_i)`, with `m` and `M` the smallest and
//! largest numbers of its channels. The pages with the largest bounds are read, the page of the newest token always,
//! and the softmax is over what is read. Branch-free that is `max(q, 0) . M + max(-q, 0) . (-m)`: one dot product
//! of non-negative queries of `2 d` numbers with one row a page.
//!
//! Authors: pages of 16, a budget of 1024 tokens for each query head, the newest page included, at least 3 pages; the first
//! two layers dense, which is the setting `dense_layers=first2` here, for a table of methods has no defaults of settings.
//! Different here: the heads of a group read the union of their pages, up to as many times the budget as there are heads
//! (more exact at no more bytes than the authors' reading head by head). The bounds are signed bytes, rounded up, so
//! that they stay bounds, up to the rounding of the query to 16 bits (`max|q| / 65024` times the sum of magnitudes of
//! the row). The open page has no bounds, it is read; so are newest rows that a format has not settled yet, at the
//! expense of the budget.
//!
//! Bounds hold for keys as they are stored. Formats that rotate keys spread a large channel over all of them: the
//! bounds stay bounds and become looser, so that Quest does better with formats that do not (`+plain`).
//!
//! Cost a page: `2 d + 4` bytes, 260 for 128 numbers, against 8192 of its keys and values in bfloat16. Of arithmetic a
//! page costs a group of four 2,048 products of bytes (queries of 16 bits are two planes of them), 7.9 a byte: at 64 an
//! instruction, one a cycle, 32 cycles a page, or 24 GB/s of bounds a core at 3 GHz. The pages that are read, in runs of
//! 16 rows, are each a call for keys and one for values of 64 rows-times-heads.

use super::choose::union;
use super::params::ParamSpec;
use super::summary::{self, Blocks, CodeRows, Room};
use super::{GroupQuery, HeadMethod, Method, Params, Place, Predicted, Selection};
use crate::kv::{KvDtype, KvHead};

pub(super) const METHOD: Method = Method {
    name: "quest",
    summary: "pages by upper bounds of their logits, from the range of each channel (Quest, arXiv 2406.10774)",
    params: &[
        ParamSpec::int("page", "tokens of a page", [1, 4096], "16"),
        ParamSpec::int(
            "budget",
            "tokens read for each query head, the newest page included; at least 3 pages",
            [1, 1 << 24],
            "1024",
        ),
    ],
    settings: true,
    evicts: false,
    check: |_, shape| summary::check(shape, 2),
    make: |p, place| Box::new(Quest::new(p, place)),
    predict: |p, context, shape| {
        let (page, row) = (p.int("page"), CodeRows::row_bytes(2 * shape.head_dim));
        let blocks = blocks(p, shape.dtype).at(context);
        let state_bytes = blocks.count() * row;
        match plan(&blocks, page, pages(p), context) {
            Some((candidates, chosen)) => Predicted {
                rows: context - (candidates - union(chosen, shape.group, candidates)) * page,
                state_bytes,
                read_bytes: candidates * row,
            },
            None => Predicted { state_bytes, ..Predicted::rows(context) },
        }
    },
};

/// Pages that a head reads at least, the newest included.
const LEAST: usize = 3;

fn pages(p: &Params) -> usize {
    (p.int("budget") / p.int("page")).max(LEAST)
}

fn blocks(p: &Params, dtype: KvDtype) -> Blocks {
    Blocks::new(dtype, 0, p.int("page"), false)
}

/// How many pages, the first ones, are candidates, and how many of them a head reads; nothing where it reads all.
fn plan(blocks: &Blocks, page: usize, pages: usize, tokens: usize) -> Option<(usize, usize)> {
    let candidates = blocks.before(tokens.saturating_sub(1) / page * page);
    let chosen = pages.saturating_sub(tokens.div_ceil(page) - candidates).max(LEAST - 1);
    (chosen < candidates).then_some((candidates, chosen))
}

struct Quest {
    page: usize,
    pages: usize,
    blocks: Blocks,
    /// `M`, then `-m`.
    bounds: CodeRows,
    queries: Vec<f32>,
    scores: Vec<f32>,
    room: Room,
}

impl Quest {
    fn new(p: &Params, place: &Place<'_>) -> Self {
        Quest {
            page: p.int("page"),
            pages: pages(p),
            blocks: blocks(p, place.shape.dtype),
            bounds: CodeRows::new(2 * place.shape.head_dim),
            queries: Vec::new(),
            scores: Vec::new(),
            room: Room::default(),
        }
    }

    /// The bounds of the first `n` pages, `[group][n]`, to `scores`.
    fn score(&mut self, query: GroupQuery<'_>, kv: &KvHead, n: usize) {
        self.queries.clear();
        for query in query.rows.chunks_exact(query.head_dim) {
            self.queries.extend(query.iter().map(|q| q.max(0.0)));
            self.queries.extend(query.iter().map(|q| (-q).max(0.0)));
        }
        self.bounds.scores(kv.kernels(), &self.queries, n, &mut self.room, &mut self.scores);
    }
}

impl HeadMethod for Quest {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        let d = kv.head_dim();
        for page in self.blocks.update(kv.len()) {
            self.room.rows.resize(self.page * d, 0.0);
            kv.decode_keys(self.blocks.tokens(page..page + 1), &mut self.room.rows);
            self.room.row.clear();
            self.room.row.resize(2 * d, f32::NEG_INFINITY);
            let (most, least) = self.room.row.split_at_mut(d);
            for row in self.room.rows.chunks_exact(d) {
                most.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(*x));
                least.iter_mut().zip(row).for_each(|(least, x)| *least = least.max(-x));
            }
            self.bounds.push_up(kv.kernels(), &self.room.row);
        }
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.blocks.update(kv.len());
        self.bounds.truncate(self.blocks.count());
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let Some((candidates, chosen)) = plan(&self.blocks, self.page, self.pages, kv.len()) else {
            out.spans.push(0..kv.len());
            return;
        };
        self.score(query, kv, candidates);
        self.room.choose(kv.kernels(), &self.scores, candidates, chosen);
        out.index_bytes = self.bounds.bytes(candidates) as u64;
        self.blocks.spans(&self.room.union, candidates * self.page..kv.len(), &mut out.spans);
    }

    fn state_bytes(&self) -> usize {
        self.bounds.state_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::testing::{cache, noise, select};
    use crate::attention::{MethodShape, Reader, method};
    use crate::kv::{KV_FORMATS, KvCache};
    use crate::model::RopeTable;
    use longbit_sys::Team;
    use std::sync::Arc;

    const D: usize = 64;

    fn quest(spec: &str, cache: &KvCache) -> Quest {
        let (shape, spec) = (MethodShape::of(cache), method(spec).unwrap());
        let rope = Arc::new(RopeTable::new(10_000.0, D, 8, &Team::new(1, false).unwrap()).unwrap());
        let mut quest = Quest::new(spec.params(), &Place { shape, layer: 0, kv_head: 0, rope: &rope });
        quest.appended(&cache.head(0, 0), 0);
        quest
    }

    /// For every format, and rotated and centred rows: no logit of a page is above its bound, as stored and as kernels
    /// compute it.
    #[test]
    fn no_logit_of_a_page_is_above_its_bound() {
        const N: usize = 600;
        let mut keys = noise(N * D, 1);
        // Channels with a mean, and giants.
        keys.iter_mut().enumerate().for_each(|(i, x)| *x += if i % 16 == 3 { 4.0 } else { 0.0 });
        keys.iter_mut().enumerate().filter(|(i, _)| i % 997 == 0).for_each(|(_, x)| *x *= 30.0);
        let names = KV_FORMATS.iter().map(|format| format.name.to_owned());
        let more = ["bf16+rotate+centre", "int8+rotate", "int4+plain", "kivi4+rotate", "lm2+centre"]
            .map(String::from);
        for dtype in names.chain(more) {
            let cache = cache(&dtype, D, &keys, &noise(N * D, 2));
            let kv = cache.head(0, 0);
            let mut quest = quest("quest", &cache);
            let pages = quest.blocks.count();
            assert!(pages >= 512 / 16 - 16, "{dtype}: {pages}");
            let mut stored = vec![0.0; pages * 16 * D];
            kv.decode_keys(0..pages * 16, &mut stored);
            for seed in 0..4 {
                let mut queries = noise(3 * D, 10 + seed);
                kv.rotate_queries(&mut queries);
                let query = GroupQuery { rows: &queries, head_dim: D, position: N - 1 };
                quest.score(query, &kv, pages);
                let (mut logits, all) = (Vec::new(), 0..pages * 16);
                Reader::default().logits(query, &kv, std::slice::from_ref(&all), &mut logits);
                for (h, query) in queries.chunks_exact(D).enumerate() {
                    let most = query.iter().fold(0.0f32, |m, q| m.max(q.abs()));
                    for (page, rows) in stored.chunks_exact(16 * D).enumerate() {
                        let bound = f64::from(quest.scores[h * pages + page]);
                        let largest = rows.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        // Queries are rounded to 16 bits: half a step for each of the 2 D stored bytes.
                        let slack = f64::from(most / 65024.0 * largest * 1.01) * 2.0 * D as f64;
                        for (t, row) in rows.chunks_exact(D).enumerate() {
                            let exact: f64 =
                                row.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum();
                            assert!(bound >= exact - slack, "{dtype}: {bound} {exact}");
                            let logit = f64::from(logits[h * pages * 16 + page * 16 + t]);
                            assert!(bound >= logit - 2.0 * slack, "{dtype}: {bound} {logit} {slack}");
                        }
                    }
                }
            }
        }
    }

    /// Where the keys of a page are one key, the bound is its logit, up to a step of the bytes in each number.
    #[test]
    fn the_bound_of_equal_keys_is_their_logit() {
        let row = noise(D, 1);
        let cache = cache("f32", D, &row.repeat(64), &row.repeat(64));
        let mut quest = quest("quest", &cache);
        let queries = noise(2 * D, 5);
        let query = GroupQuery { rows: &queries, head_dim: D, position: 63 };
        quest.score(query, &cache.head(0, 0), 4);
        for (query, bounds) in queries.chunks_exact(D).zip(quest.scores.chunks_exact(4)) {
            let logit: f32 = query.iter().zip(&row).map(|(q, k)| q * k).sum();
            let sum: f32 = query.iter().map(|q| q.abs()).sum();
            assert!(bounds.iter().all(|u| (-1e-3..sum / 126.0).contains(&(u - logit))), "{bounds:?} {logit}");
        }
    }

    /// Each head finds the page of its own needle, the group reads both, and the newest page.
    #[test]
    fn the_heads_of_a_group_read_the_union() {
        let (mut keys, values) = (noise(1000 * D, 1), noise(1000 * D, 2));
        keys[200 * D] = 50.0;
        keys[613 * D + 1] = 50.0;
        let cache = cache("bf16", D, &keys, &values);
        let mut quest = quest("quest:budget=32", &cache);
        let mut queries = vec![0.01; 2 * D];
        queries[0] = 1.0;
        queries[D + 1] = 1.0;
        let selection = select(&mut quest, &cache.head(0, 0), &queries);
        for needed in [192..208, 608..624, 992..1000] {
            assert!(
                selection.spans.iter().any(|s| s.start <= needed.start && needed.end <= s.end),
                "{needed:?}"
            );
        }
        assert!(selection.tokens() <= 2 * 32 + 8, "{:?}", selection.spans);
        assert_eq!(selection.index_bytes, 62 * (2 * 64 + 4));
    }
}
