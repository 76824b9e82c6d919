//! One pass of some tokens through the model, run by every thread of the team.
//!
//! Threads own tokens (norms, residual), rows (projections), KV heads (rotation, append, selection) and attention
//! tasks, each by a fixed range, and meet at a barrier where one kind of ownership hands over to the next. With a single
//! token every thread keeps the residual stream itself, for repeating a norm costs less than another barrier, and takes rows
//! of a projection that others have not come to (`stage`).

mod ahead;
mod attention;
mod decode;
mod ffn;
mod head;
mod prefill;

use std::ops::Range;

use longbit_kernels::{Kernels, Quantized};
use longbit_sys::{Shared, Worker};

use super::Supplied;
use super::profile::{Clock, Op};
use super::scratch::{ActBuffer, Phase, Private, Scratch, room};
use super::stage::{Acts, Stage};
use crate::attention::Attention;
use crate::kv::KvCache;
use crate::model::{Layer, Model, RopeTable, TernaryLinear};
pub(super) use prefill::{Tile, TileReads};

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
    /// How many of the likeliest tokens a two-stage head finds exactly.
    pub(super) exact_top: usize,
    /// The largest lower bounds of each thread's rows of a two-stage head, `[thread][exact_top]`.
    pub(super) lower_bounds: &'a Shared<f32>,
    /// A decode step, which the method serves; anything else is prefill, whatever its length.
    pub(super) decoding: bool,
    pub(super) capture: bool,
    pub(super) tracing: Option<&'a Tracing<'a>>,
    /// Laps are taken.
    pub(super) profiling: bool,
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
        p.clock.begin(self.profiling);
        let hidden = self.model.config.hidden;
        p.residual.resize(self.owned(worker).len() * hidden, 0.0);
        for (i, token) in self.owned(worker).enumerate() {
            let id = self.tokens[token] as usize;
            self.model.embedding.read(self.kernels(), id, &mut p.residual[i * hidden..(i + 1) * hidden]);
        }
        p.clock
            .lap(Op::Embedding, || self.owned(worker).len() * hidden * self.model.embedding.format().size());
        for (l, layer) in self.model.layers.iter().enumerate() {
            if let Some(forced) = self.tracing.and_then(|t| t.forced) {
                let first = (l * self.tokens.len() + self.owned(worker).start) * hidden;
                let numbers = first..first + p.residual.len();
                p.residual.copy_from_slice(&forced[numbers]);
            }
            self.attention_block(worker, p, l, layer);
            self.ffn_block(worker, p, l, layer);
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
        let linears = [&layer.q, &layer.k, &layer.v];
        self.with_residual_acts(worker, p, &layer.input_norm, |acts, clock| {
            let read = self.stripes(worker, Phase::Qkv(l), &s.qkv, &linears, acts);
            clock.lap(Op::Qkv, || read);
        });
        self.barrier(worker, p);
        for kv_head in worker.range(self.model.config.kv_heads) {
            self.append(p, l, kv_head);
        }
        p.clock.lap(Op::Append, || 0);
        if !self.heads_are_single_tasks() {
            self.barrier(worker, p);
        }
        if self.tokens.len() == 1 {
            self.decode_attention(worker, p, l);
        } else {
            self.prefill_attention(worker, p, l);
        }
        self.barrier(worker, p);
        let norm = layer.attn_sub_norm.as_deref();
        let heads =
            |token: usize, room: &mut [f32], then: &mut dyn FnMut(&[f32])| self.with_heads(token, room, then);
        self.with_acts(worker, p, norm, &s.attn_acts, layer.o.shape.cols, heads, |acts, clock| {
            let read = self.stripes(worker, Phase::Output(l), &s.o, &[&layer.o], acts);
            clock.lap(Op::Output, || read);
        });
        self.barrier(worker, p);
        self.add_to_residual(worker, p, &s.o);
    }

    /// Quantised `norm(residual)` of all tokens, given to `then`.
    fn with_residual_acts(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        norm: &[f32],
        then: impl FnOnce(&Acts<'_>, &mut Clock),
    ) {
        let residual = std::mem::take(&mut p.residual);
        let first = self.owned(worker).start;
        let hidden = norm.len();
        let source = |token: usize, _: &mut [f32], then: &mut dyn FnMut(&[f32])| {
            then(&residual[(token - first) * hidden..(token - first + 1) * hidden]);
        };
        self.with_acts(worker, p, Some(norm), &self.scratch.hidden_acts, hidden, source, then);
        p.residual = residual;
    }

    /// Computes the rows of `linears` that the thread takes; returns the bytes of weights that it read.
    fn stripes(
        &self,
        worker: &Worker<'_>,
        phase: Phase,
        stage: &Stage,
        linears: &[&TernaryLinear],
        acts: &Acts<'_>,
    ) -> usize {
        let mut read = 0;
        for (nth, stripe) in self.scratch.stripes(phase, worker, stage.stripes()).enumerate() {
            stage.write(stripe, self.tokens.len(), |out| {
                stage.project(self.kernels(), stripe, linears, acts, out);
            });
            read += stage.bytes(stripe, linears);
            if nth == 0 {
                self.request_after(worker, phase);
            }
        }
        read
    }

    /// Waits for the other threads.
    fn barrier(&self, worker: &Worker<'_>, p: &mut Private) {
        worker.barrier();
        p.clock.lap(Op::Wait, || 0);
    }

    /// Normalises and quantises one row of `cols` numbers a token, which `source` gives to the function that it is called with
    /// (it may bring them together in the room that it gets), and gives all of them to `then`.
    /// A single token is quantised by every thread for itself; several are shared out and met at a barrier.
    #[allow(clippy::too_many_arguments, reason = "the one place where norms meet quantisation")]
    fn with_acts(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        norm: Option<&[f32]>,
        buffer: &ActBuffer,
        cols: usize,
        source: impl Fn(usize, &mut [f32], &mut dyn FnMut(&[f32])),
        then: impl FnOnce(&Acts<'_>, &mut Clock),
    ) {
        let kernels = self.kernels();
        let eps = self.model.config.rms_eps;
        let (gathered, normed) = (room(&mut p.row, cols), room(&mut p.row2, cols));
        let mut quantize = |token: usize, codes: &mut [i8]| -> Quantized {
            let mut quantized = Quantized { scale: 1.0, sum: 0 };
            source(token, gathered, &mut |row| {
                quantized = match norm {
                    Some(weight) => {
                        kernels.rmsnorm(row, weight, eps, normed);
                        kernels.quantize_activations(normed, codes)
                    }
                    None => kernels.quantize_activations(row, codes),
                };
            });
            quantized
        };
        if self.tokens.len() == 1 {
            let codes = room(&mut p.codes, TernaryLinear::room(cols));
            let quantized = [quantize(0, codes)];
            p.clock.lap(Op::Norm, || 0);
            then(&Acts { codes, quantized: &quantized }, &mut p.clock);
        } else {
            for token in self.owned(worker) {
                let quantized = quantize(token, &mut buffer.codes.write(token));
                buffer.quantized.write(token)[0] = quantized;
            }
            p.clock.lap(Op::Norm, || 0);
            self.barrier(worker, p);
            let n = self.tokens.len();
            let (codes, quantized) = (buffer.codes.read(), buffer.quantized.read());
            then(&Acts { codes: &codes[..n * buffer.padded], quantized: &quantized[..n] }, &mut p.clock);
        }
    }

    fn add_to_residual(&self, worker: &Worker<'_>, p: &mut Private, stage: &Stage) {
        let hidden = stage.rows();
        let gathered = room(&mut p.row, hidden);
        for (i, token) in self.owned(worker).enumerate() {
            let residual = &mut p.residual[i * hidden..(i + 1) * hidden];
            let mut add = |row: &[f32]| self.kernels().add_assign(residual, row);
            stage.with_rows(token, self.tokens.len(), gathered, &mut add);
        }
        p.clock.lap(Op::Residual, || 0);
    }
}
