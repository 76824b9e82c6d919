//! The feed-forward block of a pass.

use longbit_kernels::Quantized;
use longbit_sys::Worker;

use super::super::profile::Op;
use super::super::scratch::Private;
use super::Pass;
use crate::model::{Activation, Layer, SparseFfn};

impl Pass<'_> {
    /// Residual += down(act(gate, up)).
    pub(super) fn ffn_block(&self, worker: &Worker<'_>, p: &mut Private, layer: &Layer) {
        match &layer.sparse {
            Some(sparse) if self.tokens.len() == 1 => self.sparse_ffn_block(worker, p, layer, sparse),
            _ => self.dense_ffn_block(worker, p, layer),
        }
    }

    fn dense_ffn_block(&self, worker: &Worker<'_>, p: &mut Private, layer: &Layer) {
        let (s, w, kernels, tokens) = (self.scratch, worker.index(), self.kernels(), self.tokens.len());
        let (mut gate, mut up) = (std::mem::take(&mut p.gate), std::mem::take(&mut p.up));
        let numbers = s.ffn.owned_rows(w) * tokens;
        gate.resize(numbers, 0.0);
        up.resize(numbers, 0.0);
        self.with_residual_acts(worker, p, &layer.post_norm, |acts| {
            s.ffn.project(kernels, w, &[&layer.gate], acts, &mut gate);
            s.ffn.project(kernels, w, &[&layer.up], acts, &mut up);
        });
        p.clock.lap(Op::GateUp, || s.ffn.bytes(w, &[&layer.gate]) + s.ffn.bytes(w, &[&layer.up]));
        s.ffn.write(w, tokens, |out| match self.model.config.activation {
            Activation::Relu2 => kernels.relu2_mul(&gate, &up, out),
            Activation::Silu => kernels.silu_mul(&gate, &up, out),
        });
        (p.gate, p.up) = (gate, up);
        p.clock.lap(Op::Activation, || 0);
        self.barrier(worker, p);
        let norm = layer.ffn_sub_norm.as_deref();
        self.project(worker, p, Op::Down, norm, &s.ffn_acts, &s.down, &[&layer.down], |token, row| {
            s.ffn.gather(token, tokens, 0..s.ffn.rows(), row);
        });
        self.barrier(worker, p);
        self.add_to_residual(worker, p, &s.down);
    }

    /// The same bits for one token, without the rows of `up` and the columns of `down` that meet exact zeros.
    fn sparse_ffn_block(&self, worker: &Worker<'_>, p: &mut Private, layer: &Layer, sparse: &SparseFfn) {
        let (s, w, kernels) = (self.scratch, worker.index(), self.kernels());
        let mine = s.ffn.rows_of(w);
        let (mut gate, mut up) = (std::mem::take(&mut p.gate), std::mem::take(&mut p.up));
        let mut listed = std::mem::take(&mut p.listed);
        gate.resize(mine.len(), 0.0);
        up.resize(sparse.rows.rows, 0.0);
        let mut read = 0;
        self.with_residual_acts(worker, p, &layer.post_norm, |acts| {
            let Quantized { scale, sum } = acts.quantized[0];
            let codes = &acts.codes[..sparse.rows.padded_cols()];
            match &sparse.gate {
                None => {
                    s.ffn.project(kernels, w, &[&layer.gate], acts, &mut gate);
                    read = s.ffn.bytes(w, &[&layer.gate]);
                }
                Some((data, live)) => {
                    let of = |row: usize| live.partition_point(|&channel| (channel as usize) < row);
                    let live = &live[of(mine.start)..of(mine.end)];
                    up[mine.clone()].fill(0.0);
                    let scale = layer.gate.scale / scale;
                    kernels.ternary_rows(sparse.rows, data, live, codes, sum, scale, &mut up);
                    gate.copy_from_slice(&up[mine.clone()]);
                    read = live.len() * sparse.rows.row_bytes();
                }
            }
            // A gate that is no number counts as one that is open: it must reach the result.
            list_where(&gate, |gate: f32| gate > 0.0 || gate.is_nan(), &mut listed);
            listed.iter_mut().for_each(|row| *row += mine.start as u32);
            up[mine.clone()].fill(0.0);
            let scale = layer.up.scale / scale;
            kernels.ternary_rows(sparse.rows, &sparse.up, &listed, codes, sum, scale, &mut up);
            let up_bytes = listed.len() * sparse.rows.row_bytes();
            let whole = s.ffn.bytes(w, &[&layer.gate]) + s.ffn.bytes(w, &[&layer.up]);
            s.count_skipped(whole.saturating_sub(read + up_bytes));
            read += up_bytes;
        });
        p.clock.lap(Op::GateUp, || read);
        s.ffn.write(w, 1, |out| kernels.relu2_mul(&gate, &up[mine], out));
        (p.gate, p.up) = (gate, up);
        p.clock.lap(Op::Activation, || 0);
        self.barrier(worker, p);

        let norm = layer.ffn_sub_norm.as_deref();
        let mut scale = 0.0;
        let source = |token: usize, row: &mut [f32]| s.ffn.gather(token, 1, 0..s.ffn.rows(), row);
        let cols = sparse.columns.cols;
        self.with_acts(worker, p, norm, &s.ffn_acts, cols, source, |acts| {
            let codes = &acts.codes[..cols];
            list_where(codes, |code| code != 0, &mut listed);
            let share = &listed[worker.range(listed.len())];
            let mut sums = s.down_sums.write(w);
            sums.fill(0);
            kernels.ternary_columns(sparse.columns, &sparse.down, share, codes, &mut sums);
            scale = layer.down.scale / acts.quantized[0].scale;
            read = share.len() * sparse.columns.column_bytes();
            s.count_skipped(s.down.bytes(w, &[&layer.down]).saturating_sub(read));
        });
        p.listed = listed;
        p.clock.lap(Op::Down, || read);
        self.barrier(worker, p);
        let hidden = sparse.columns.rows;
        p.row.resize(hidden, 0.0);
        let sums = s.down_sums.read();
        let parts = sums.chunks_exact(sparse.columns.padded_rows());
        for (r, out) in p.row[..hidden].iter_mut().enumerate() {
            *out = parts.clone().map(|part| part[r]).sum::<i32>() as f32 * scale;
        }
        kernels.add_assign(&mut p.residual, &p.row[..hidden]);
        p.clock.lap(Op::Residual, || 0);
    }
}

/// The places that `keep` keeps, ascending.
fn list_where<T: Copy>(values: &[T], keep: impl Fn(T) -> bool, listed: &mut Vec<u32>) {
    listed.resize(values.len(), 0);
    let mut count = 0;
    for (place, &value) in values.iter().enumerate() {
        // Written always and kept if it counts: half of the gates are open, and no branch could guess which.
        listed[count] = place as u32;
        count += usize::from(keep(value));
    }
    listed.truncate(count);
}
