//! Attention of a pass that takes several tokens, and of a prompt's tokens in general: dense and causal, or what the session's
//! [pattern](crate::attention::prefill) lets them see.

use longbit_sys::Worker;

use super::super::profile::Op;
use super::super::scratch::{BLOCK_TOKENS, Private};
use super::Pass;
use crate::attention::prefill::{Decision, Pattern, TILE};
use crate::attention::tasks::{ORDER, cut};
use crate::attention::{Prompt, Selection, gather_chunk, partial, reads, score_chunk, weights_len};
use crate::kv::KvHead;

/// Neighbouring tokens of a prompt at one (layer, KV head).
pub(in crate::session) struct Tile<'a> {
    pub(in crate::session) kv: &'a KvHead,
    /// What they see; everything without one.
    pub(in crate::session) pattern: Option<&'a dyn Pattern>,
    /// What it decided for their block.
    pub(in crate::session) decision: &'a Decision,
    /// Their queries, no more than [`TILE`] between two multiples of it where there is a pattern.
    pub(in crate::session) queries: Prompt<'a>,
}

/// What the tokens of a tile read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::session) struct TileReads {
    /// Bytes of the rows that any of them sees.
    pub(in crate::session) bytes: usize,
    /// Rows, added up over the tokens.
    pub(in crate::session) seen: u64,
    /// The rows that there are for each, its own included, added up.
    pub(in crate::session) causal: u64,
}

impl Tile<'_> {
    /// Attention output of the tokens, `[tokens][group][head_dim]`: chunk by chunk, so that its rows stay in cache for all of
    /// them.
    pub(in crate::session) fn attend(&self, p: &mut Private, out: &mut [f32]) -> TileReads {
        let Tile { kv, pattern, decision, queries: Prompt { rows, group, head_dim: d, first } } = *self;
        let (kernels, width, slot) = (kv.kernels(), group * d, group * partial::stride(d));
        let tokens = rows.len() / width;
        p.partials.resize((tokens.max(BLOCK_TOKENS) + 1) * slot, 0.0);
        let (part, running) = p.partials.split_at_mut(slot);
        partial::clear(running, d);
        let mut counted = TileReads::default();
        p.seen.of(pattern, first, tokens, decision, kv);
        for span in p.seen.rows(first + tokens - 1, kv) {
            let runs = kv.runs(span);
            counted.bytes += runs
                .flat_map(|run| {
                    [
                        kv.key_parts(&run).map(<[u8]>::len).sum::<usize>(),
                        kv.value_parts(&run).map(<[u8]>::len).sum(),
                    ]
                })
                .sum::<usize>();
        }
        p.pieces.clear();
        p.tasks.clear();
        for j in 0..tokens {
            p.spans.clear();
            p.seen.by(pattern, first + j, kv, &mut p.spans);
            counted.seen += p.spans.iter().map(|span| span.len() as u64).sum::<u64>();
            counted.causal += kv.row_of(first + j + 1) as u64;
            ORDER.into_iter().for_each(|grain| cut(j, &p.spans, grain, &mut p.pieces, &mut p.tasks));
        }
        // The same task of all tokens, then the next: they lie close together.
        let tasks = |j: usize| {
            p.tasks.partition_point(|task| task.0 < j)..p.tasks.partition_point(|task| task.0 <= j)
        };
        let most = (0..tokens).map(|j| tasks(j).len()).max().unwrap_or(0);
        for i in 0..most {
            for (j, query) in rows.chunks_exact(width).enumerate() {
                let Some((_, pieces)) = p.tasks[tasks(j)].get(i) else { continue };
                let all: Vec<_> = reads(kv, &p.pieces[pieces.clone()]).collect();
                if p.weights.len() < weights_len(&all, group) {
                    p.weights.resize(weights_len(&all, group), 0.0);
                }
                kv.prepare(query, &mut p.kv);
                score_chunk(query, kv, &all, &[], &mut p.kv, &mut p.weights, part);
                gather_chunk(kv, &all, &[], &mut p.weights, &mut p.kv, &mut p.attend, part);
                let running = &mut running[j * slot..(j + 1) * slot];
                partial::merge(kernels, running, part, d, &mut p.factors);
            }
        }
        for (running, out) in running.chunks_exact(slot).zip(out.chunks_exact_mut(width)) {
            partial::finish(kernels, running, d, out);
        }
        kv.restore_outputs(out);
        counted
    }
}

impl Pass<'_> {
    /// Queries of `tokens` of the pass at a KV head.
    fn prompt<'q>(&self, queries: &'q [f32], kv_head: usize, tokens: std::ops::Range<usize>) -> Prompt<'q> {
        let config = &self.model.config;
        let (group, head_dim) = (config.group(), config.head_dim);
        let (width, first) = (group * head_dim, kv_head * self.scratch.tokens());
        let rows = &queries[(first + tokens.start) * width..(first + tokens.end) * width];
        Prompt { rows, group, head_dim, first: self.position + tokens.start }
    }

    /// Lets the pattern of a layer decide for every block of the tokens, one block of a KV head a task.
    pub(super) fn decide_prefill(&self, worker: &Worker<'_>, p: &mut Private, l: usize) {
        let Some(pattern) = self.attention.prefill(l) else { return };
        let Some(size) = pattern.block() else { return };
        let (s, n, heads) = (self.scratch, self.tokens.len(), self.model.config.kv_heads);
        let first = self.position / size;
        let blocks = (self.position + n).div_ceil(size) - first;
        let queries = s.queries.read();
        for task in (worker.index()..heads * blocks).step_by(worker.count()) {
            let (kv_head, block) = (task % heads, task / heads);
            let start = ((first + block) * size).saturating_sub(self.position);
            let tokens = start..n.min((first + block + 1) * size - self.position);
            let mut decision =
                s.decisions[kv_head * s.most_decisions + block].write().unwrap_or_else(|e| e.into_inner());
            decision.clear();
            let kv = self.cache.head(l, kv_head);
            pattern.decide(self.prompt(&queries, kv_head, tokens), &kv, &mut p.scorer, &mut decision);
        }
        drop(queries);
        p.clock.lap(Op::Append, || 0);
        self.barrier(worker, p);
    }

    /// What the only token of a pass, which is one of a prompt, sees. `query` is that of a KV head.
    pub(super) fn see_alone(
        &self,
        p: &mut Private,
        l: usize,
        query: &[f32],
        kv: &KvHead,
        out: &mut Selection,
    ) {
        let config = &self.model.config;
        let pattern = self.attention.prefill(l);
        let mut decision = Decision::default();
        if let Some(pattern) = pattern {
            let queries = Prompt {
                rows: query,
                group: config.group(),
                head_dim: config.head_dim,
                first: self.position,
            };
            pattern.decide(queries, kv, &mut p.scorer, &mut decision);
        }
        p.seen.of(pattern, self.position, 1, &decision, kv);
        p.seen.by(pattern, self.position, kv, &mut out.spans);
    }

    /// Attention of all tokens.
    pub(super) fn prefill_attention(&self, worker: &Worker<'_>, p: &mut Private, l: usize) {
        let (s, config) = (self.scratch, &self.model.config);
        let (n, width) = (self.tokens.len(), config.group() * config.head_dim);
        self.decide_prefill(worker, p, l);
        let pattern = self.attention.prefill(l);
        let size = pattern.and_then(Pattern::block);
        let (none, mut bytes) = (Decision::default(), 0);
        let blocks = n.div_ceil(BLOCK_TOKENS);
        // Later blocks see more tokens: dealt out one by one, the latest first, every thread gets the same work.
        for task in (worker.index()..config.kv_heads * blocks).step_by(worker.count()) {
            let (kv_head, block) = (task % config.kv_heads, blocks - 1 - task / config.kv_heads);
            let mine = block * BLOCK_TOKENS..n.min((block + 1) * BLOCK_TOKENS);
            let kv = self.cache.head(l, kv_head);
            let queries = s.queries.read();
            let mut out = s.attn.write(kv_head * s.blocks + block);
            let mut start = mine.start;
            while start < mine.end {
                // Tiles of a pattern begin at multiples of their size, tasks wherever the pass does.
                let end = match pattern {
                    Some(_) => mine.end.min((self.position + start) / TILE * TILE + TILE - self.position),
                    None => mine.end,
                };
                let decision = size.map(|size| (self.position + start) / size - self.position / size);
                let decision = decision.map(|place| {
                    s.decisions[kv_head * s.most_decisions + place].read().unwrap_or_else(|e| e.into_inner())
                });
                let tile = Tile {
                    kv: &kv,
                    pattern,
                    decision: decision.as_deref().unwrap_or(&none),
                    queries: self.prompt(&queries, kv_head, start..end),
                };
                let rows = (start - mine.start) * width..(end - mine.start) * width;
                bytes += tile.attend(p, &mut out[rows]).bytes;
                start = end;
            }
        }
        p.clock.lap(Op::Attention, || bytes);
    }
}
