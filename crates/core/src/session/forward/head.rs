//! The output head of a pass: logits of the last token, or of all.

use std::ops::Range;

use longbit_sys::Worker;

use longbit_kernels::TILE_ROWS;

use super::super::profile::Op;
use super::super::scratch::Private;
use super::{Pass, Want};
use crate::model::two_stage::{Certificate, keep};
use crate::model::{Head, TwoStage};

/// Rows of the head that one thread keeps in cache while it goes through the tokens.
const HEAD_ROWS: usize = 64;

impl Pass<'_> {
    /// Tokens whose logits are wanted.
    fn wanted(&self) -> Range<usize> {
        match self.want {
            Want::Last => self.tokens.len() - 1..self.tokens.len(),
            Want::All => 0..self.tokens.len(),
        }
    }

    pub(super) fn head(&self, worker: &Worker<'_>, p: &mut Private) {
        let (s, kernels, model) = (self.scratch, self.kernels(), self.model);
        let hidden = model.config.hidden;
        let normalise =
            |row: &[f32], out: &mut [f32]| kernels.rmsnorm(row, &model.final_norm, model.config.rms_eps, out);
        if self.tokens.len() == 1 {
            p.row.resize(hidden, 0.0);
            normalise(&p.residual, &mut p.row[..hidden]);
            let row = std::mem::take(&mut p.row);
            self.head_rows(worker, p, &row[..hidden]);
            p.row = row;
            self.lap_head(worker, p);
            return;
        }
        for (i, token) in self.owned(worker).enumerate() {
            normalise(&p.residual[i * hidden..(i + 1) * hidden], &mut s.normed.write(token));
        }
        self.barrier(worker, p);
        let wanted = self.wanted();
        self.head_rows(worker, p, &s.normed.read()[wanted.start * hidden..wanted.end * hidden]);
        self.lap_head(worker, p);
    }

    /// Ends the lap of the head: its whole share, or of a two-stage head what followed the coarse scan.
    fn lap_head(&self, worker: &Worker<'_>, p: &mut Private) {
        let row = 2 * self.model.config.hidden;
        let rescored = p.rescored as usize;
        p.clock.lap(Op::Head, || match self.model.head {
            Head::TwoStage(_) => rescored * row,
            _ => self.head_bytes(worker),
        });
    }

    /// Bytes of the head that the thread reads.
    fn head_bytes(&self, worker: &Worker<'_>) -> usize {
        let rows = self.scratch.vocab[worker.index()].len();
        self.model.head_format.bytes(rows, self.model.config.hidden) as usize
    }

    /// Logits of the thread's share of the vocabulary for the rows of `normed`.
    fn head_rows(&self, worker: &Worker<'_>, p: &mut Private, normed: &[f32]) {
        let (s, kernels, hidden) = (self.scratch, self.kernels(), self.model.config.hidden);
        let share = s.vocab[worker.index()].clone();
        p.survivors.clear();
        p.exact.clear();
        p.rescored = 0;
        if let Head::TwoStage(head) = &self.model.head {
            if self.want == Want::Last && self.exact_top < self.model.config.vocab {
                return self.two_stage(worker, p, head, normed);
            }
            p.rescored = (share.len() * normed.len() / hidden) as u64;
        }
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
                    Head::TwoStage(head) => {
                        let table = head.own.as_ref().unwrap_or(&self.model.embedding);
                        table.times(kernels, start..start + rows, x, out);
                    }
                    Head::Blocks(matrix) => {
                        // Every block of rows begins with a tile, as the share does.
                        let tiles = start / TILE_ROWS..(start + rows).div_ceil(TILE_ROWS);
                        kernels.quantize_planes(matrix.shape.format, x, &mut p.planes);
                        kernels.head_blocks(matrix.shape, &matrix.data, tiles, &p.planes, out);
                    }
                    Head::Int8 { codes, scales } => {
                        let codes = bytemuck::cast_slice(&codes[start * hidden..(start + rows) * hidden]);
                        kernels.head_int8(codes, &scales[start..start + rows], x, out);
                    }
                }
            }
            start += rows;
        }
    }

    /// Coarse scores of the thread's share for one token, and the bf16 logits of those that can be among the likeliest.
    fn two_stage(&self, worker: &Worker<'_>, p: &mut Private, head: &TwoStage, x: &[f32]) {
        let (s, kernels, top) = (self.scratch, self.kernels(), self.exact_top);
        let table = head.own.as_ref().unwrap_or(&self.model.embedding);
        let share = s.vocab[worker.index()].clone();
        let mut out = s.logits.write(worker.index());
        let scores = &mut out[..share.len()];
        kernels.quantize_planes(head.coarse.shape.format, x, &mut p.planes);
        // Every thread has the same activations and so the same certificate, or none.
        let Some(certificate) = Certificate::new(head.coarse.shape, x, &p.planes) else {
            table.times(kernels, share.clone(), x, scores);
            p.rescored = share.len() as u64;
            return;
        };
        // The last shares may be empty.
        let tiles = share.start.div_ceil(TILE_ROWS)..share.end.div_ceil(TILE_ROWS);
        kernels.head_blocks(head.coarse.shape, &head.coarse.data, tiles, &p.planes, scores);
        let bounds = &head.bounds[share.clone()];
        certificate.largest_lower(scores, bounds, top, &mut p.lower);
        // Fewer rows than asked for: there is nothing that the rest could be below of.
        p.lower.resize(top, f32::NEG_INFINITY);
        self.lower_bounds.write(worker.index()).copy_from_slice(&p.lower);
        p.clock.lap(Op::Head, || self.head_bytes(worker));
        self.barrier(worker, p);
        p.lower.clear();
        p.lower.extend_from_slice(&self.lower_bounds.read());
        let threshold = keep(&mut p.lower, top);
        certificate.survivors(scores, bounds, threshold, share.start, &mut p.survivors);
        p.exact.resize(p.survivors.len(), 0.0);
        let rows = bytemuck::cast_slice(table.bytes(0..table.rows()));
        kernels.head_bf16_rows(rows, &p.survivors, x, &mut p.exact);
        p.rescored = p.survivors.len() as u64;
    }

    /// Rows of a two-stage head that this pass scored with the bf16 table.
    pub(in super::super) fn rescored(&self) -> u64 {
        let private = |p: &std::sync::Mutex<Private>| p.lock().unwrap_or_else(|e| e.into_inner()).rescored;
        self.scratch.private.iter().map(private).sum()
    }

    /// Puts the exact logits of a two-stage head over the coarse ones, which are held below the least of the likeliest.
    fn finish_two_stage(&self, out: &mut [f32]) {
        let threads: Vec<_> =
            self.scratch.private.iter().map(|p| p.lock().unwrap_or_else(|e| e.into_inner())).collect();
        let mut exact: Vec<f32> = threads.iter().flat_map(|p| p.exact.iter().copied()).collect();
        if exact.is_empty() {
            return;
        }
        if exact.len() >= self.exact_top {
            // A NaN is no limit: comparisons with it fail.
            let limit = keep(&mut exact, self.exact_top).next_down();
            for score in out.iter_mut() {
                *score = if *score > limit { limit } else { *score };
            }
        }
        for p in &threads {
            for (&row, &logit) in p.survivors.iter().zip(&p.exact) {
                out[row as usize] = logit;
            }
        }
    }

    /// Collects the wanted logits, `[wanted][vocab]`, after the team has left.
    pub(in super::super) fn logits(&self, out: &mut Vec<f32>) {
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
        if matches!(self.model.head, Head::TwoStage(_)) {
            self.finish_two_stage(out);
        }
    }
}
