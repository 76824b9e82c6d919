//! What a decode step reads between two projections, requested while weights still stream.
//!
//! Norm weights and the cached rows of a head are a few tens of KB a layer and cold in every step. Read where they are needed,
//! they come one after another while nothing else uses the memory; requested between a thread's own rows and the rest of
//! the phase before, they are a part of its stream. No byte more is read.

use longbit_sys::Worker;

use super::super::scratch::Phase;
use super::Pass;

/// Bytes of the keys, and of the values, of a head that are requested before its queries are known.
const ROWS: usize = 16 << 10;

impl Pass<'_> {
    /// Requests what the thread reads between `phase` and the next projection.
    pub(super) fn request_after(&self, worker: &Worker<'_>, phase: Phase) {
        // Several tokens take so long that it does not count.
        if self.tokens.len() > 1 {
            return;
        }
        let (kernels, layers) = (self.kernels(), &self.model.layers);
        let norm = match phase {
            Phase::Qkv(l) => {
                self.request_heads(worker, l);
                layers[l].attn_sub_norm.as_deref()
            }
            Phase::Output(l) => Some(&layers[l].post_norm[..]),
            Phase::GateUp(l) => layers[l].ffn_sub_norm.as_deref(),
            Phase::Down(l) => {
                Some(layers.get(l + 1).map_or(&self.model.final_norm[..], |layer| &layer.input_norm))
            }
            Phase::Head => None,
        };
        kernels.request(bytemuck::cast_slice(norm.unwrap_or_default()));
    }

    /// Requests the first rows of the thread's KV heads, if it will attend to them and they are few enough that every method
    /// reads about all of them.
    fn request_heads(&self, worker: &Worker<'_>, l: usize) {
        if !self.heads_are_single_tasks() {
            return;
        }
        for kv_head in worker.range(self.model.config.kv_heads) {
            let kv = self.cache.head(l, kv_head);
            // The first tokens may be a run of their own.
            for run in kv.runs(0..kv.len()).take(2) {
                for part in kv.key_parts(&run).chain(kv.value_parts(&run)) {
                    self.kernels().request(&part[..part.len().min(ROWS)]);
                }
            }
        }
    }
}
