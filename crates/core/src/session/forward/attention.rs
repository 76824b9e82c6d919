//! Attention of a pass: rows of the new tokens go into the cache, then every (KV head, tokens) task makes a partial, and
//! the partials of a head are merged.

use std::ops::Range;

use longbit_sys::Worker;

use super::super::profile::Op;
use super::super::scratch::{BLOCK_TOKENS, Private};
use super::Pass;
use crate::attention::{
    CHUNK_TOKENS, GroupQuery, Selection, chunks, first_of, gather_chunk, partial, score_chunk,
};

/// Tasks of a head whose keys are read before their values: each change from one to the other costs a moment in which
/// memory waits. It changes no bits.
const TOGETHER: usize = 4;

/// The tasks of a thread: as many tokens for each as whole tasks allow.
fn share_by_tokens(
    tasks: &[(usize, Range<usize>)],
    pieces: &[Range<usize>],
    worker: &Worker<'_>,
) -> Range<usize> {
    let tokens = |task: &(usize, Range<usize>)| -> usize {
        pieces[task.1.clone()].iter().map(|piece| piece.len()).sum()
    };
    let total: usize = tasks.iter().map(tokens).sum();
    let (mut before, mut range) = (0, 0..0);
    for task in tasks {
        let tokens = tokens(task);
        // A task belongs to the thread in whose share of all tokens its middle lies.
        let owner = (2 * before + tokens) * worker.count() / (2 * total).max(1);
        range.start += usize::from(owner < worker.index());
        range.end += usize::from(owner <= worker.index());
        before += tokens;
    }
    range
}

impl Pass<'_> {
    /// Rotates and appends the keys and values of one KV head, rotates its queries, and lets the method decide.
    pub(super) fn append(&self, p: &mut Private, l: usize, kv_head: usize) {
        let config = &self.model.config;
        let (d, group, n) = (config.head_dim, config.group(), self.tokens.len());
        let (q_rows, kv_rows) = (config.q_rows(), config.kv_rows());
        let kernels = self.kernels();
        let scale = 1.0 / (d as f32).sqrt();
        let width = group * d;
        p.row.resize(n * d, 0.0);
        p.row2.resize(n * d, 0.0);
        let mut queries = self.scratch.queries.write(kv_head);
        for j in 0..n {
            let keys = &mut p.row[j * d..(j + 1) * d];
            let values = &mut p.row2[j * d..(j + 1) * d];
            let query = &mut queries[j * width..(j + 1) * width];
            if let Some(supplied) = self.supplied {
                let at = (l * config.kv_heads + kv_head) * d;
                query.copy_from_slice(&supplied.queries[at * group..(at + d) * group]);
                keys.copy_from_slice(&supplied.keys[at..at + d]);
                values.copy_from_slice(&supplied.values[at..at + d]);
            } else {
                let qkv = &self.scratch.qkv;
                qkv.gather(j, n, kv_head * width..(kv_head + 1) * width, query);
                qkv.gather(j, n, q_rows + kv_head * d..q_rows + (kv_head + 1) * d, keys);
                let first = q_rows + kv_rows + kv_head * d;
                qkv.gather(j, n, first..first + d, values);
                let at = self.position + j;
                let (cos, sin) = (self.rope.cos(at..at + 1), self.rope.sin(at..at + 1));
                for head in query.chunks_exact_mut(d).chain(std::iter::once(keys)) {
                    kernels.rope(head, cos, sin);
                }
            }
            kernels.scale(query, scale);
        }
        let mut kv = self.cache.head_mut(l, kv_head);
        kv.rotate_queries(&mut queries[..n * width]);
        if let Err(error) = kv.append(&p.row[..n * d], &p.row2[..n * d]) {
            // The session takes the whole pass back; until then this head serves what it has.
            self.scratch.fail(error);
            self.scratch.selections[kv_head].write().unwrap_or_else(|e| e.into_inner()).clear();
            return;
        }
        let mut state = self.attention.head(l, kv_head);
        state.appended(&kv, self.position);
        if n == 1 {
            let mut selection = self.scratch.selections[kv_head].write().unwrap_or_else(|e| e.into_inner());
            selection.clear();
            match self.decoding {
                true => {
                    state.select(GroupQuery { rows: &queries[..width], head_dim: d }, &kv, &mut selection)
                }
                false => selection.spans.push(0..kv.len()),
            }
            let bytes = selection.spans.iter().map(|span| kv.read_bytes(span.clone()) as u64).sum();
            self.scratch.count(bytes, selection.index_bytes, selection.tokens() as u64);
        }
    }

    /// Lists the tasks of all KV heads: runs of pieces of at most [`CHUNK_TOKENS`] tokens together.
    fn list_tasks(
        &self,
        heads: Range<usize>,
        pieces: &mut Vec<Range<usize>>,
        tasks: &mut Vec<(usize, Range<usize>)>,
    ) {
        pieces.clear();
        tasks.clear();
        for kv_head in heads {
            let selection = &self.scratch.selections[kv_head];
            let selection: &Selection = &selection.read().unwrap_or_else(|e| e.into_inner());
            let mut held = CHUNK_TOKENS;
            for piece in chunks(&selection.spans) {
                if held + piece.len() > CHUNK_TOKENS {
                    tasks.push((kv_head, pieces.len()..pieces.len()));
                    held = 0;
                }
                held += piece.len();
                pieces.push(piece);
                if let Some((_, range)) = tasks.last_mut() {
                    range.end = pieces.len();
                }
            }
        }
    }

    /// Whether every KV head is a single task, so that the thread which appended to it can also serve it: two barriers a
    /// layer cost more than an uneven share of so little.
    pub(super) fn heads_are_single_tasks(&self) -> bool {
        self.tokens.len() == 1 && self.position < CHUNK_TOKENS
    }

    pub(super) fn decode_attention(&self, worker: &Worker<'_>, p: &mut Private, l: usize) {
        let (s, kernels, d) = (self.scratch, self.kernels(), self.model.config.head_dim);
        let (mut pieces, mut tasks) = (std::mem::take(&mut p.pieces), std::mem::take(&mut p.tasks));
        let heads = self.model.config.kv_heads;
        let alone = self.heads_are_single_tasks();
        let owned = worker.range(heads);
        self.list_tasks(if alone { owned.clone() } else { 0..heads }, &mut pieces, &mut tasks);
        let mine = if alone { 0..tasks.len() } else { share_by_tokens(&tasks, &pieces, worker) };
        // The partials of a thread that is alone with its heads begin at the first of them, one each.
        let base = if alone { owned.start } else { 0 };
        let group = self.model.config.group();
        p.weights.resize(TOGETHER * CHUNK_TOKENS * group, 0.0);
        let mut slot = mine.start;
        while slot < mine.end {
            let kv_head = tasks[slot].0;
            let last = mine.end.min(slot + TOGETHER);
            let last = last.min(slot + tasks[slot..].partition_point(|task| task.0 == kv_head));
            let queries = s.queries.read_stripe(kv_head);
            let queries = &queries[..group * d];
            let kv = self.cache.head(l, kv_head);
            let of = |slot: usize| &pieces[tasks[slot].1.clone()];
            // What a thread reads first of a task of the same head.
            let first = |slot: usize| {
                let task = tasks[..mine.end].get(slot).filter(|task| task.0 == kv_head);
                task.and_then(|task| kv.runs(pieces[task.1.start].clone()).next())
            };
            kv.prepare(queries, &mut p.kv);
            for i in slot..last {
                let next = if i + 1 < last { first(i + 1) } else { None };
                let upcoming = match (next, first(slot)) {
                    (Some(next), _) => first_of(kv.key_parts(&next)),
                    (None, Some(back)) => first_of(kv.value_parts(&back)),
                    (None, None) => &[],
                };
                let weights = &mut p.weights[(i - slot) * CHUNK_TOKENS * group..];
                let mut partials = s.partials.write(base + i);
                score_chunk(queries, &kv, of(i), upcoming, &mut p.kv, weights, &mut partials);
            }
            for i in slot..last {
                let upcoming = match first(i + 1) {
                    Some(next) if i + 1 < last => first_of(kv.value_parts(&next)),
                    Some(next) => first_of(kv.key_parts(&next)),
                    None => &[],
                };
                let weights = &p.weights[(i - slot) * CHUNK_TOKENS * group..];
                let mut partials = s.partials.write(base + i);
                gather_chunk(&kv, of(i), upcoming, weights, &mut p.kv, &mut p.attend, &mut partials);
            }
            slot = last;
        }
        p.clock.lap(Op::Attention, || {
            let bytes = |(kv_head, range): &(usize, Range<usize>)| -> usize {
                let kv = self.cache.head(l, *kv_head);
                pieces[range.clone()].iter().map(|piece| kv.read_bytes(piece.clone())).sum()
            };
            tasks[mine].iter().map(bytes).sum()
        });
        if !alone {
            self.barrier(worker, p);
        }
        let slot_len = group * partial::stride(d);
        p.partials.resize(slot_len, 0.0);
        for kv_head in owned {
            partial::clear(&mut p.partials, d);
            // The tasks of a head follow one another.
            let first = base + tasks.partition_point(|task| task.0 < kv_head);
            let last = base + tasks.partition_point(|task| task.0 <= kv_head);
            let partials = s.partials.read_range(first * slot_len..last * slot_len);
            partial::merge(kernels, &mut p.partials, &partials, d, &mut p.factors);
            let selection = s.selections[kv_head].read().unwrap_or_else(|e| e.into_inner());
            if !selection.tail.is_empty() {
                partial::merge(kernels, &mut p.partials, &selection.tail, d, &mut p.factors);
            }
            let mut out = s.attn.write(kv_head);
            partial::finish(kernels, &p.partials, d, &mut out);
            self.cache.head(l, kv_head).restore_outputs(&mut out);
            if self.capture {
                s.capture(l * self.model.config.kv_heads + kv_head, &out);
            }
        }
        (p.pieces, p.tasks) = (pieces, tasks);
        p.clock.lap(Op::Merge, || 0);
    }

    /// Causal attention of all tokens, chunk by chunk so that a chunk's rows stay in cache for a block of queries.
    pub(super) fn prefill_attention(&self, worker: &Worker<'_>, p: &mut Private, l: usize) {
        let (s, kernels, config) = (self.scratch, self.kernels(), &self.model.config);
        let (d, n) = (config.head_dim, self.tokens.len());
        let width = config.group() * d;
        let slot = config.group() * partial::stride(d);
        let blocks = n.div_ceil(BLOCK_TOKENS);
        // Later blocks see more tokens: dealt out one by one, the latest first, every thread gets the same work.
        for task in (worker.index()..config.kv_heads * blocks).step_by(worker.count()) {
            let (kv_head, block) = (task % config.kv_heads, blocks - 1 - task / config.kv_heads);
            let mine = block * BLOCK_TOKENS..n.min((block + 1) * BLOCK_TOKENS);
            let kv = self.cache.head(l, kv_head);
            let queries = s.queries.read();
            let queries = &queries[kv_head * s.tokens() * width..];
            p.partials.resize((BLOCK_TOKENS + 1) * slot, 0.0);
            p.weights.resize(CHUNK_TOKENS * config.group(), 0.0);
            let (part, running) = p.partials.split_at_mut(slot);
            partial::clear(running, d);
            // A head that refused a row holds fewer.
            let seen = 0..kv.len().min(self.position + mine.end);
            for chunk in chunks(std::slice::from_ref(&seen)) {
                for (i, j) in mine.clone().enumerate() {
                    let visible = chunk.start..chunk.end.min(self.position + j + 1);
                    if visible.is_empty() {
                        continue;
                    }
                    let query = &queries[j * width..(j + 1) * width];
                    let visible = [visible];
                    kv.prepare(query, &mut p.kv);
                    score_chunk(query, &kv, &visible, &[], &mut p.kv, &mut p.weights, part);
                    gather_chunk(&kv, &visible, &[], &p.weights, &mut p.kv, &mut p.attend, part);
                    let running = &mut running[i * slot..(i + 1) * slot];
                    partial::merge(kernels, running, part, d, &mut p.factors);
                }
            }
            let mut out = s.attn.write(kv_head * s.blocks + block);
            for i in 0..mine.len() {
                partial::finish(
                    kernels,
                    &running[i * slot..(i + 1) * slot],
                    d,
                    &mut out[i * width..(i + 1) * width],
                );
            }
            kv.restore_outputs(&mut out[..mine.len() * width]);
        }
        p.clock.lap(Op::Attention, || 0);
    }

    /// The attention output of one token, heads one after another.
    pub(super) fn gather_heads(&self, token: usize, row: &mut [f32]) {
        let (s, config) = (self.scratch, &self.model.config);
        let width = config.group() * config.head_dim;
        let block_len = BLOCK_TOKENS.min(s.tokens()) * width;
        let attn = s.attn.read();
        for (kv_head, out) in row.chunks_exact_mut(width).enumerate() {
            let block = kv_head * s.blocks + token / BLOCK_TOKENS;
            let at = block * block_len + token % BLOCK_TOKENS * width;
            out.copy_from_slice(&attn[at..at + width]);
        }
    }
}
