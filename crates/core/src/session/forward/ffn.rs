//! The feed-forward block of a pass.

use longbit_kernels::Quantized;
use longbit_sys::Worker;

use super::super::profile::Op;
use super::super::scratch::{Phase, Private, room};
use super::super::stage::stripes;
use super::Pass;
use crate::model::{Activation, Layer, SparseFfn};

/// Columns in small stripes, in percent of those that are added; see [`super::super::stage`].
const COLUMN_REST: usize = 25;
/// Columns of a small stripe: enough that the start of a product does not count.
const COLUMN_BLOCK: usize = 96;

impl Pass<'_> {
    /// Residual += down(act(gate, up)).
    pub(super) fn ffn_block(&self, worker: &Worker<'_>, p: &mut Private, l: usize, layer: &Layer) {
        match &layer.sparse {
            Some(sparse) if self.tokens.len() == 1 => self.sparse_ffn_block(worker, p, l, layer, sparse),
            _ => self.dense_ffn_block(worker, p, l, layer),
        }
    }

    fn dense_ffn_block(&self, worker: &Worker<'_>, p: &mut Private, l: usize, layer: &Layer) {
        let (s, kernels, tokens) = (self.scratch, self.kernels(), self.tokens.len());
        let (mut gate, mut up) = (std::mem::take(&mut p.gate), std::mem::take(&mut p.up));
        self.with_residual_acts(worker, p, &layer.post_norm, |acts, clock| {
            for (nth, stripe) in s.stripes(Phase::GateUp(l), worker, s.ffn.stripes()).enumerate() {
                let numbers = s.ffn.stripe_rows(stripe) * tokens;
                let (gate, up) = (room(&mut gate, numbers), room(&mut up, numbers));
                s.ffn.project(kernels, stripe, &[&layer.gate], acts, gate);
                s.ffn.project(kernels, stripe, &[&layer.up], acts, up);
                clock.lap(Op::GateUp, || {
                    s.ffn.bytes(stripe, &[&layer.gate]) + s.ffn.bytes(stripe, &[&layer.up])
                });
                s.ffn.write(stripe, tokens, |out| match self.model.config.activation {
                    Activation::Relu2 => kernels.relu2_mul(gate, up, out),
                    Activation::Silu => kernels.silu_mul(gate, up, out),
                });
                clock.lap(Op::Activation, || 0);
                if nth == 0 {
                    self.request_after(worker, Phase::GateUp(l));
                }
            }
        });
        (p.gate, p.up) = (gate, up);
        self.barrier(worker, p);
        let norm = layer.ffn_sub_norm.as_deref();
        let rows = |token: usize, room: &mut [f32], then: &mut dyn FnMut(&[f32])| {
            s.ffn.with_rows(token, tokens, room, then);
        };
        self.with_acts(worker, p, norm, &s.ffn_acts, layer.down.shape.cols, rows, |acts, clock| {
            let read = self.stripes(worker, Phase::Down(l), &s.down, &[&layer.down], acts);
            clock.lap(Op::Down, || read);
        });
        self.barrier(worker, p);
        self.add_to_residual(worker, p, &s.down);
    }

    /// The same bits for one token, without the rows of `up` and the columns of `down` that meet exact zeros.
    fn sparse_ffn_block(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        l: usize,
        layer: &Layer,
        sparse: &SparseFfn,
    ) {
        let (s, w, kernels) = (self.scratch, worker.index(), self.kernels());
        let (mut gates, mut ups) = (std::mem::take(&mut p.gate), std::mem::take(&mut p.up));
        let mut listed = std::mem::take(&mut p.listed);
        let up = room(&mut ups, sparse.rows.rows);
        self.with_residual_acts(worker, p, &layer.post_norm, |acts, clock| {
            let Quantized { scale, sum } = acts.quantized[0];
            let codes = &acts.codes[..sparse.rows.padded_cols()];
            let (gate_scale, up_scale) = (layer.gate.scale / scale, layer.up.scale / scale);
            for (nth, stripe) in s.stripes(Phase::GateUp(l), worker, s.ffn.stripes()).enumerate() {
                let mine = s.ffn.rows_of(stripe);
                let gate = room(&mut gates, mine.len());
                let mut read = match &sparse.gate {
                    None => {
                        s.ffn.project(kernels, stripe, &[&layer.gate], acts, gate);
                        s.ffn.bytes(stripe, &[&layer.gate])
                    }
                    Some((data, live)) => {
                        let of = |row: usize| live.partition_point(|&channel| (channel as usize) < row);
                        let live = &live[of(mine.start)..of(mine.end)];
                        up[mine.clone()].fill(0.0);
                        kernels.ternary_rows(sparse.rows, data, live, codes, sum, gate_scale, up);
                        gate.copy_from_slice(&up[mine.clone()]);
                        live.len() * sparse.rows.row_bytes()
                    }
                };
                // A gate that is no number counts as one that is open: it must reach the result.
                list_where(gate, |gate: f32| gate > 0.0 || gate.is_nan(), &mut listed);
                listed.iter_mut().for_each(|row| *row += mine.start as u32);
                up[mine.clone()].fill(0.0);
                kernels.ternary_rows(sparse.rows, &sparse.up, &listed, codes, sum, up_scale, up);
                read += listed.len() * sparse.rows.row_bytes();
                let whole = s.ffn.bytes(stripe, &[&layer.gate]) + s.ffn.bytes(stripe, &[&layer.up]);
                s.count_skipped(whole, read.min(whole));
                clock.lap(Op::GateUp, || read);
                s.ffn.write(stripe, 1, |out| kernels.relu2_mul(gate, &up[mine], out));
                clock.lap(Op::Activation, || 0);
                if nth == 0 {
                    self.request_after(worker, Phase::GateUp(l));
                }
            }
        });
        (p.gate, p.up) = (gates, ups);
        self.barrier(worker, p);

        let norm = layer.ffn_sub_norm.as_deref();
        let mut scale = 0.0;
        let source = |token: usize, room: &mut [f32], then: &mut dyn FnMut(&[f32])| {
            s.ffn.with_rows(token, 1, room, then);
        };
        let cols = sparse.columns.cols;
        self.with_acts(worker, p, norm, &s.ffn_acts, cols, source, |acts, clock| {
            let codes = &acts.codes[..cols];
            list_where(codes, |code| code != 0, &mut listed);
            // Who adds a column does not matter: the sums are integers.
            let parts = stripes(listed.len(), worker.count(), COLUMN_REST, COLUMN_BLOCK);
            let mut sums = s.down_sums.write(w);
            sums.fill(0);
            let mut read = 0;
            for (nth, part) in s.stripes(Phase::Down(l), worker, parts.len()).enumerate() {
                let some = &listed[parts[part].clone()];
                kernels.ternary_columns(sparse.columns, &sparse.down, some, codes, &mut sums);
                read += some.len() * sparse.columns.column_bytes();
                if nth == 0 {
                    self.request_after(worker, Phase::Down(l));
                }
            }
            scale = layer.down.scale / acts.quantized[0].scale;
            let whole = if w == 0 { layer.down.tile_bytes() * layer.down.shape.tiles() } else { 0 };
            s.count_skipped(whole, read);
            clock.lap(Op::Down, || read);
        });
        p.listed = listed;
        self.barrier(worker, p);
        let hidden = sparse.columns.rows;
        let row = room(&mut p.row, hidden);
        let sums = s.down_sums.read();
        let parts = sums.chunks_exact(sparse.columns.padded_rows());
        for (r, out) in row.iter_mut().enumerate() {
            *out = parts.clone().map(|part| part[r]).sum::<i32>() as f32 * scale;
        }
        kernels.add_assign(&mut p.residual, row);
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
