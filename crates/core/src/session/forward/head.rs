//! The output head of a pass: logits of the last token, or of all.

use std::ops::Range;

use longbit_sys::Worker;

use longbit_kernels::TILE_ROWS;

use super::super::profile::Op;
use super::super::scratch::{Phase, Private, room};
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
            normalise(&p.residual, room(&mut p.row, hidden));
            let row = std::mem::take(&mut p.row);
            self.head_rows(worker, p, &row[..hidden]);
            p.row = row;
            return;
        }
        for (i, token) in self.owned(worker).enumerate() {
            normalise(&p.residual[i * hidden..(i + 1) * hidden], &mut s.normed.write(token));
        }
        self.barrier(worker, p);
        let wanted = self.wanted();
        self.head_rows(worker, p, &s.normed.read()[wanted.start * hidden..wanted.end * hidden]);
    }

    /// Ends the lap of the head, which read `rows` rows in its own format and scored others exactly.
    fn lap_head(&self, p: &mut Private, rows: usize) {
        let hidden = self.model.config.hidden;
        let rescored = p.rescored as usize;
        p.clock.lap(Op::Head, || match self.model.head {
            Head::TwoStage(_) if rows == 0 => 2 * rescored * hidden,
            _ => self.model.head_format.bytes(rows, hidden) as usize,
        });
    }

    /// Logits of the rows that the thread takes, for the rows of `normed`.
    fn head_rows(&self, worker: &Worker<'_>, p: &mut Private, normed: &[f32]) {
        p.rescored = 0;
        if let Head::TwoStage(head) = &self.model.head
            && self.want == Want::Last
            && self.exact_top < self.model.config.vocab
        {
            return self.two_stage(worker, p, head, normed);
        }
        let (s, hidden) = (self.scratch, self.model.config.hidden);
        if let Head::Blocks(matrix) = &self.model.head
            && normed.len() == hidden
        {
            self.kernels().quantize_planes(matrix.shape.format, normed, &mut p.planes);
        }
        let mut taken = 0;
        for stripe in s.stripes(Phase::Head, worker, s.vocab.len()) {
            self.score_stripe(p, stripe, normed);
            taken += s.vocab[stripe].len();
        }
        if let Head::TwoStage(_) = &self.model.head {
            p.rescored = (taken * normed.len() / hidden) as u64;
            taken = 0;
        }
        self.lap_head(p, taken);
    }

    /// Logits of one stripe of the vocabulary for the rows of `normed`.
    fn score_stripe(&self, p: &mut Private, stripe: usize, normed: &[f32]) {
        let (s, kernels, hidden) = (self.scratch, self.kernels(), self.model.config.hidden);
        let share = s.vocab[stripe].clone();
        let mut out = s.logits.write(stripe);
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
                        if normed.len() > hidden {
                            kernels.quantize_planes(matrix.shape.format, x, &mut p.planes);
                        }
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

    /// Coarse scores of the rows that the thread takes, for one token, and the bf16 logits of those that can be among the
    /// likeliest. All other rows keep their coarse score: with its bound it is below the k-th of all lower bounds, so it is
    /// below the k-th largest logit.
    fn two_stage(&self, worker: &Worker<'_>, p: &mut Private, head: &TwoStage, x: &[f32]) {
        let (s, kernels, top) = (self.scratch, self.kernels(), self.exact_top);
        let table = head.own.as_ref().unwrap_or(&self.model.embedding);
        kernels.quantize_planes(head.coarse.shape.format, x, &mut p.planes);
        // Every thread has the same activations and so the same certificate, or none.
        let Some(certificate) = Certificate::new(head.coarse.shape, x, &p.planes) else {
            for stripe in s.stripes(Phase::Head, worker, s.vocab.len()) {
                self.score_stripe(p, stripe, x);
                p.rescored += s.vocab[stripe].len() as u64;
            }
            return self.lap_head(p, 0);
        };
        p.lower.clear();
        p.scored.clear();
        let mut taken = 0;
        for stripe in s.stripes(Phase::Head, worker, s.vocab.len()) {
            let rows = s.vocab[stripe].clone();
            // The last shares may be empty.
            let tiles = rows.start.div_ceil(TILE_ROWS)..rows.end.div_ceil(TILE_ROWS);
            let mut out = s.logits.write(stripe);
            let scores = &mut out[..rows.len()];
            kernels.head_blocks(head.coarse.shape, &head.coarse.data, tiles, &p.planes, scores);
            certificate.largest_lower(scores, &head.bounds[rows], top, &mut p.lower);
            taken += scores.len();
            p.scored.push(stripe);
        }
        // Fewer rows than asked for: there is nothing that the rest could be below of.
        p.lower.resize(top, f32::NEG_INFINITY);
        self.lower_bounds.write(worker.index()).copy_from_slice(&p.lower);
        self.lap_head(p, taken);
        self.barrier(worker, p);
        p.lower.clear();
        p.lower.extend_from_slice(&self.lower_bounds.read());
        let threshold = keep(&mut p.lower, top);
        let numbers = bytemuck::cast_slice(table.bytes(0..table.rows()));
        for &stripe in &p.scored {
            let rows = s.vocab[stripe].clone();
            let mut out = s.logits.write(stripe);
            let scores = &mut out[..rows.len()];
            p.survivors.clear();
            certificate.survivors(
                scores,
                &head.bounds[rows.clone()],
                threshold,
                rows.start,
                &mut p.survivors,
            );
            p.exact.resize(p.survivors.len(), 0.0);
            kernels.head_bf16_rows(numbers, &p.survivors, x, &mut p.exact);
            for (&row, &logit) in p.survivors.iter().zip(&p.exact) {
                scores[row as usize - rows.start] = logit;
            }
            p.rescored += p.survivors.len() as u64;
        }
        self.lap_head(p, 0);
    }

    /// Rows of a two-stage head that this pass scored with the bf16 table.
    pub(in super::super) fn rescored(&self) -> u64 {
        let private = |p: &std::sync::Mutex<Private>| p.lock().unwrap_or_else(|e| e.into_inner()).rescored;
        self.scratch.private.iter().map(private).sum()
    }

    /// Collects the wanted logits of several tokens, `[wanted][vocab]`, after the team has left. Those of a single token
    /// are in their place already: the stripes of `Scratch::logits` follow one another.
    pub(in super::super) fn logits(&self, out: &mut Vec<f32>) {
        let (s, vocab) = (self.scratch, self.model.config.vocab);
        if self.tokens.len() == 1 {
            return;
        }
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
