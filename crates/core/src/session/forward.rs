//! One pass of some tokens through the model, run by every thread of the team.
//!
//! Threads own tokens (norms, residual), rows (projections), KV heads (rotation, append, selection) and attention
//! tasks, each by a fixed range, and meet at a barrier where one kind of ownership hands over to the next. With a single
//! token every thread keeps the residual stream itself: repeating a norm costs less than another barrier.

use std::ops::Range;

use longbit_kernels::{Kernels, Quantized};
use longbit_sys::{Shared, Worker};

use super::Supplied;
use super::scratch::{ActBuffer, BLOCK_TOKENS, Private, Scratch};
use super::stage::{Acts, Stage};
use crate::attention::{Attention, CHUNK_TOKENS, GroupQuery, Selection, attend_chunk, chunks, partial};
use crate::kv::KvCache;
use crate::model::{Activation, Head, Layer, Model, RopeTable};

/// Which logits a pass computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Of the last token.
    Last,
    /// Of every token.
    All,
}

/// The residual stream laid open, for comparing layer by layer.
pub(super) struct Tracing<'a> {
    /// `[layers][tokens][hidden]`.
    pub(super) forced: Option<&'a [f32]>,
    /// `[layers][tokens][hidden]`, one stripe a (layer, token).
    pub(super) out: Shared<f32>,
}

/// Rows of the head that one thread keeps in cache while it goes through the tokens.
const HEAD_ROWS: usize = 64;

pub(super) struct Pass<'a> {
    pub(super) model: &'a Model,
    pub(super) cache: &'a KvCache,
    pub(super) attention: &'a Attention,
    pub(super) rope: &'a RopeTable,
    pub(super) scratch: &'a Scratch,
    pub(super) tokens: &'a [u32],
    /// Position of the first token.
    pub(super) position: usize,
    pub(super) supplied: Option<&'a Supplied>,
    pub(super) want: Want,
    /// A decode step, which the method serves; anything else is prefill, dense and causal, whatever its length.
    pub(super) decoding: bool,
    pub(super) capture: bool,
    pub(super) tracing: Option<&'a Tracing<'a>>,
}

impl Pass<'_> {
    fn kernels(&self) -> &'static Kernels {
        self.model.kernels
    }

    /// Tokens whose residual stream the thread keeps.
    fn owned(&self, worker: &Worker<'_>) -> Range<usize> {
        if self.tokens.len() == 1 { 0..1 } else { worker.range(self.tokens.len()) }
    }

    pub(super) fn run(&self, worker: &Worker<'_>) {
        let mut private = self.scratch.private[worker.index()].lock().unwrap_or_else(|e| e.into_inner());
        let p = &mut *private;
        let hidden = self.model.config.hidden;
        p.residual.resize(self.owned(worker).len() * hidden, 0.0);
        for (i, token) in self.owned(worker).enumerate() {
            let id = self.tokens[token] as usize;
            self.model.embedding.read(self.kernels(), id, &mut p.residual[i * hidden..(i + 1) * hidden]);
        }
        for (l, layer) in self.model.layers.iter().enumerate() {
            if let Some(forced) = self.tracing.and_then(|t| t.forced) {
                let first = (l * self.tokens.len() + self.owned(worker).start) * hidden;
                let numbers = first..first + p.residual.len();
                p.residual.copy_from_slice(&forced[numbers]);
            }
            self.attention_block(worker, p, l, layer);
            self.ffn_block(worker, p, layer);
            if let Some(tracing) = self.tracing {
                for (row, token) in p.residual.chunks_exact(hidden).zip(self.owned(worker)) {
                    tracing.out.write(l * self.tokens.len() + token).copy_from_slice(row);
                }
            }
        }
        self.head(worker, p);
    }

    /// Residual += O(attention(norm(residual))).
    fn attention_block(&self, worker: &Worker<'_>, p: &mut Private, l: usize, layer: &Layer) {
        let s = self.scratch;
        self.project_residual(worker, p, &layer.input_norm, &s.qkv, &[&layer.q, &layer.k, &layer.v]);
        worker.barrier();
        for kv_head in worker.range(self.model.config.kv_heads) {
            self.append(p, l, kv_head);
        }
        worker.barrier();
        if self.tokens.len() == 1 {
            self.decode_attention(worker, p, l);
        } else {
            self.prefill_attention(worker, p, l);
        }
        worker.barrier();
        let norm = layer.attn_sub_norm.as_deref();
        self.project(worker, p, norm, &s.attn_acts, &s.o, &[&layer.o], |token, row| {
            self.gather_heads(token, row)
        });
        worker.barrier();
        self.add_to_residual(worker, p, &s.o);
    }

    /// Residual += down(act(gate, up)).
    fn ffn_block(&self, worker: &Worker<'_>, p: &mut Private, layer: &Layer) {
        let (s, w, kernels, tokens) = (self.scratch, worker.index(), self.kernels(), self.tokens.len());
        let (mut gate, mut up) = (std::mem::take(&mut p.gate), std::mem::take(&mut p.up));
        let numbers = s.ffn.owned_rows(w) * tokens;
        gate.resize(numbers, 0.0);
        up.resize(numbers, 0.0);
        self.with_residual_acts(worker, p, &layer.post_norm, |acts| {
            s.ffn.project(kernels, w, &[&layer.gate], acts, &mut gate);
            s.ffn.project(kernels, w, &[&layer.up], acts, &mut up);
        });
        s.ffn.write(w, tokens, |out| match self.model.config.activation {
            Activation::Relu2 => kernels.relu2_mul(&gate, &up, out),
            Activation::Silu => kernels.silu_mul(&gate, &up, out),
        });
        (p.gate, p.up) = (gate, up);
        worker.barrier();
        let norm = layer.ffn_sub_norm.as_deref();
        self.project(worker, p, norm, &s.ffn_acts, &s.down, &[&layer.down], |token, row| {
            s.ffn.gather(token, tokens, 0..s.ffn.rows(), row);
        });
        worker.barrier();
        self.add_to_residual(worker, p, &s.down);
    }

    /// Quantised `norm(residual)` of all tokens, given to `then`.
    fn with_residual_acts(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        norm: &[f32],
        then: impl FnOnce(&Acts<'_>),
    ) {
        let residual = std::mem::take(&mut p.residual);
        let first = self.owned(worker).start;
        let hidden = norm.len();
        let source = |token: usize, row: &mut [f32]| {
            row.copy_from_slice(&residual[(token - first) * hidden..(token - first + 1) * hidden]);
        };
        self.with_acts(worker, p, Some(norm), &self.scratch.hidden_acts, hidden, source, then);
        p.residual = residual;
    }

    fn project_residual(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        norm: &[f32],
        stage: &Stage,
        linears: &[&crate::model::TernaryLinear],
    ) {
        let (w, tokens) = (worker.index(), self.tokens.len());
        self.with_residual_acts(worker, p, norm, |acts| {
            stage.write(w, tokens, |out| stage.project(self.kernels(), w, linears, acts, out));
        });
    }

    #[allow(clippy::too_many_arguments, reason = "one call site each for attention and feed-forward")]
    fn project(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        norm: Option<&[f32]>,
        buffer: &ActBuffer,
        stage: &Stage,
        linears: &[&crate::model::TernaryLinear],
        source: impl Fn(usize, &mut [f32]),
    ) {
        let (w, tokens) = (worker.index(), self.tokens.len());
        let cols = linears[0].shape.cols;
        self.with_acts(worker, p, norm, buffer, cols, source, |acts| {
            stage.write(w, tokens, |out| stage.project(self.kernels(), w, linears, acts, out));
        });
    }

    /// Normalises and quantises one row of `cols` numbers a token, taken from `source`, and gives all of them to `then`.
    /// A single token is quantised by every thread for itself; several are shared out and met at a barrier.
    #[allow(clippy::too_many_arguments, reason = "the one place where norms meet quantisation")]
    fn with_acts(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        norm: Option<&[f32]>,
        buffer: &ActBuffer,
        cols: usize,
        source: impl Fn(usize, &mut [f32]),
        then: impl FnOnce(&Acts<'_>),
    ) {
        let kernels = self.kernels();
        let eps = self.model.config.rms_eps;
        p.row.resize(cols, 0.0);
        p.row2.resize(cols, 0.0);
        let (row, normed) = (&mut p.row, &mut p.row2);
        let mut quantize = |token: usize, codes: &mut [i8]| -> Quantized {
            source(token, row);
            match norm {
                Some(weight) => {
                    kernels.rmsnorm(row, weight, eps, normed);
                    kernels.quantize_activations(normed, codes)
                }
                None => kernels.quantize_activations(row, codes),
            }
        };
        if self.tokens.len() == 1 {
            p.codes.resize(buffer.padded, 0);
            let quantized = [quantize(0, &mut p.codes)];
            then(&Acts { codes: &p.codes, quantized: &quantized });
        } else {
            for token in self.owned(worker) {
                let quantized = quantize(token, &mut buffer.codes.write(token));
                buffer.quantized.write(token)[0] = quantized;
            }
            worker.barrier();
            let n = self.tokens.len();
            let (codes, quantized) = (buffer.codes.read(), buffer.quantized.read());
            then(&Acts { codes: &codes[..n * buffer.padded], quantized: &quantized[..n] });
        }
    }

    fn add_to_residual(&self, worker: &Worker<'_>, p: &mut Private, stage: &Stage) {
        let hidden = stage.rows();
        p.row.resize(hidden, 0.0);
        for (i, token) in self.owned(worker).enumerate() {
            stage.gather(token, self.tokens.len(), 0..hidden, &mut p.row[..hidden]);
            self.kernels().add_assign(&mut p.residual[i * hidden..(i + 1) * hidden], &p.row[..hidden]);
        }
    }

    /// Rotates and appends the keys and values of one KV head, rotates its queries, and lets the method decide.
    fn append(&self, p: &mut Private, l: usize, kv_head: usize) {
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
        // Room was checked before the pass; a refusal leaves the head short, which `KvCache::set_len` reports.
        if kv.append(&p.row[..n * d], &p.row2[..n * d]).is_err() {
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
            let rows = selection.tokens() as u64;
            self.scratch.count(rows * 2 * kv.row_bytes() as u64, selection.index_bytes, rows);
        }
    }

    /// Lists the tasks of all KV heads: runs of pieces of at most [`CHUNK_TOKENS`] tokens together.
    fn list_tasks(&self, pieces: &mut Vec<Range<usize>>, tasks: &mut Vec<(usize, Range<usize>)>) {
        pieces.clear();
        tasks.clear();
        for (kv_head, selection) in self.scratch.selections.iter().enumerate() {
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

    fn decode_attention(&self, worker: &Worker<'_>, p: &mut Private, l: usize) {
        let (s, kernels, d) = (self.scratch, self.kernels(), self.model.config.head_dim);
        let (mut pieces, mut tasks) = (std::mem::take(&mut p.pieces), std::mem::take(&mut p.tasks));
        self.list_tasks(&mut pieces, &mut tasks);
        for slot in worker.range(tasks.len()) {
            let (kv_head, range) = tasks[slot].clone();
            let queries = s.queries.read();
            let width = self.model.config.group() * d;
            let queries = &queries[kv_head * width..(kv_head + 1) * width];
            let kv = self.cache.head(l, kv_head);
            let next = match tasks.get(slot + 1) {
                Some((head, range)) if *head == kv_head => pieces.get(range.start),
                _ => None,
            };
            let mut out = s.partials.write(slot);
            attend_chunk(kernels, queries, &kv, &pieces[range], next, &mut p.attend, &mut out);
        }
        worker.barrier();
        let slot_len = self.model.config.group() * partial::stride(d);
        p.partials.resize(slot_len, 0.0);
        for kv_head in worker.range(self.model.config.kv_heads) {
            partial::clear(&mut p.partials, d);
            let partials = s.partials.read();
            for slot in (0..tasks.len()).filter(|&t| tasks[t].0 == kv_head) {
                partial::merge(
                    kernels,
                    &mut p.partials,
                    &partials[slot * slot_len..(slot + 1) * slot_len],
                    d,
                );
            }
            let selection = s.selections[kv_head].read().unwrap_or_else(|e| e.into_inner());
            if !selection.tail.is_empty() {
                partial::merge(kernels, &mut p.partials, &selection.tail, d);
            }
            let mut out = s.attn.write(kv_head);
            partial::finish(kernels, &p.partials, d, &mut out);
            if self.capture {
                s.capture(l * self.model.config.kv_heads + kv_head, &out);
            }
        }
        (p.pieces, p.tasks) = (pieces, tasks);
    }

    /// Causal attention of all tokens, chunk by chunk so that a chunk's rows stay in cache for a block of queries.
    fn prefill_attention(&self, worker: &Worker<'_>, p: &mut Private, l: usize) {
        let (s, kernels, config) = (self.scratch, self.kernels(), &self.model.config);
        let (d, n) = (config.head_dim, self.tokens.len());
        let width = config.group() * d;
        let slot = config.group() * partial::stride(d);
        let blocks = n.div_ceil(BLOCK_TOKENS);
        for task in worker.range(config.kv_heads * blocks) {
            let (kv_head, block) = (task / blocks, task % blocks);
            let mine = block * BLOCK_TOKENS..n.min((block + 1) * BLOCK_TOKENS);
            let kv = self.cache.head(l, kv_head);
            let queries = s.queries.read();
            let queries = &queries[kv_head * s.tokens() * width..];
            p.partials.resize((BLOCK_TOKENS + 1) * slot, 0.0);
            let (part, running) = p.partials.split_at_mut(slot);
            partial::clear(running, d);
            let seen = 0..self.position + mine.end;
            for chunk in chunks(std::slice::from_ref(&seen)) {
                for (i, j) in mine.clone().enumerate() {
                    let visible = chunk.start..chunk.end.min(self.position + j + 1);
                    if visible.is_empty() {
                        continue;
                    }
                    let query = &queries[j * width..(j + 1) * width];
                    attend_chunk(kernels, query, &kv, &[visible], None, &mut p.attend, part);
                    partial::merge(kernels, &mut running[i * slot..(i + 1) * slot], part, d);
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
        }
    }

    /// The attention output of one token, heads one after another.
    fn gather_heads(&self, token: usize, row: &mut [f32]) {
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

    /// Tokens whose logits are wanted.
    fn wanted(&self) -> Range<usize> {
        match self.want {
            Want::Last => self.tokens.len() - 1..self.tokens.len(),
            Want::All => 0..self.tokens.len(),
        }
    }

    fn head(&self, worker: &Worker<'_>, p: &mut Private) {
        let (s, kernels, model) = (self.scratch, self.kernels(), self.model);
        let hidden = model.config.hidden;
        let normalise =
            |row: &[f32], out: &mut [f32]| kernels.rmsnorm(row, &model.final_norm, model.config.rms_eps, out);
        if self.tokens.len() == 1 {
            p.row.resize(hidden, 0.0);
            normalise(&p.residual, &mut p.row[..hidden]);
            self.head_rows(worker, &p.row[..hidden]);
            return;
        }
        for (i, token) in self.owned(worker).enumerate() {
            normalise(&p.residual[i * hidden..(i + 1) * hidden], &mut s.normed.write(token));
        }
        worker.barrier();
        let wanted = self.wanted();
        self.head_rows(worker, &s.normed.read()[wanted.start * hidden..wanted.end * hidden]);
    }

    /// Logits of the thread's share of the vocabulary for the rows of `normed`.
    fn head_rows(&self, worker: &Worker<'_>, normed: &[f32]) {
        let (s, kernels, hidden) = (self.scratch, self.kernels(), self.model.config.hidden);
        let share = s.vocab[worker.index()].clone();
        let mut out = s.logits.write(worker.index());
        let mut start = share.start;
        while start < share.end {
            // One token streams its whole share at once; several reuse a block of rows from cache.
            let rows = if normed.len() == hidden { share.len() } else { HEAD_ROWS.min(share.end - start) };
            for (j, x) in normed.chunks_exact(hidden).enumerate() {
                let at = j * share.len() + (start - share.start);
                let out = &mut out[at..at + rows];
                match &self.model.head {
                    Head::Tied => self.model.embedding.times(kernels, start..start + rows, x, out),
                    Head::Own(table) => table.times(kernels, start..start + rows, x, out),
                    Head::Int8 { codes, scales } => {
                        let codes = bytemuck::cast_slice(&codes[start * hidden..(start + rows) * hidden]);
                        kernels.head_int8(codes, &scales[start..start + rows], x, out);
                    }
                }
            }
            start += rows;
        }
    }

    /// Collects the wanted logits, `[wanted][vocab]`, after the team has left.
    pub(super) fn logits(&self, out: &mut Vec<f32>) {
        let (s, vocab) = (self.scratch, self.model.config.vocab);
        out.resize(self.wanted().len() * vocab, 0.0);
        let logits = s.logits.read();
        let mut stripe = 0;
        for share in &s.vocab {
            for (j, row) in out.chunks_exact_mut(vocab).enumerate() {
                let from = stripe + j * share.len();
                row[share.clone()].copy_from_slice(&logits[from..from + share.len()]);
            }
            stripe += share.len() * s.tokens();
        }
    }
}
