//! The output head of a pass: logits of the last token, or of all.

use std::ops::Range;

use longbit_sys::Worker;

use super::super::profile::Op;
use super::super::scratch::Private;
use super::{Pass, Want};
use crate::model::Head;

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
            self.head_rows(worker, &p.row[..hidden]);
            p.clock.lap(Op::Head, || self.head_bytes(worker));
            return;
        }
        for (i, token) in self.owned(worker).enumerate() {
            normalise(&p.residual[i * hidden..(i + 1) * hidden], &mut s.normed.write(token));
        }
        self.barrier(worker, p);
        let wanted = self.wanted();
        self.head_rows(worker, &s.normed.read()[wanted.start * hidden..wanted.end * hidden]);
        p.clock.lap(Op::Head, || self.head_bytes(worker));
    }

    /// Bytes of the head that the thread reads.
    fn head_bytes(&self, worker: &Worker<'_>) -> usize {
        let rows = self.scratch.vocab[worker.index()].len();
        self.model.head_format.bytes(rows, self.model.config.hidden) as usize
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
    }
}
