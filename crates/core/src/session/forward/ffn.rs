//! The feed-forward block of a pass.

use longbit_sys::Worker;

use super::super::profile::Op;
use super::super::scratch::Private;
use super::Pass;
use crate::model::{Activation, Layer};

impl Pass<'_> {
    /// Residual += down(act(gate, up)).
    pub(super) fn ffn_block(&self, worker: &Worker<'_>, p: &mut Private, layer: &Layer) {
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
}
