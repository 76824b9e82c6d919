//! The controls: workloads whose answers are known in closed form.

use super::geometry::{Pairs, head_stream};
use super::rng::NormalTable;
use super::{HeadType, Workload, generator, purpose};

/// A control head. Rows are independent N(0, 1) and are not turned: the law is the same after any rotation.
#[derive(Debug, Clone)]
pub(super) struct Control {
    kind: HeadType,
    pairs: Pairs,
    group: usize,
    seed: u64,
    layer: usize,
    kv_head: usize,
    /// The token of the one-hot control, and its key's coordinates in the sink pairs.
    planted: Option<(usize, f32)>,
}

impl Control {
    pub(super) fn new(workload: &Workload, layer: usize, kv_head: usize, kind: HeadType) -> Self {
        let shape = &workload.shape;
        let pairs = Pairs::new(shape.head_dim);
        let planted = (kind == HeadType::OneHot).then(|| {
            // 20 above the others' log-sum-exp: they keep 2e-9 of the mass.
            let logit = libm::log(workload.context as f64) + 20.0;
            let along = logit * (shape.head_dim as f64).sqrt() / f64::from(generator::QUERY_SINK);
            (workload.context / 2, (along / (pairs.sink_len() as f64).sqrt()) as f32)
        });
        Self { kind, group: shape.group(), pairs, seed: workload.seed, layer, kv_head, planted }
    }

    /// Keys and values `[tokens][d]` of a block that starts at position `first`.
    pub(super) fn rows(&self, block: usize, first: usize, k: &mut [f32], v: &mut [f32]) {
        let table = NormalTable::get();
        head_stream(self.seed, self.layer, self.kv_head, purpose::KEY, block as u64).normals(table, k);
        head_stream(self.seed, self.layer, self.kv_head, purpose::VALUE, block as u64).normals(table, v);
        if self.kind == HeadType::Gaussian {
            return;
        }
        for (token, row) in k.chunks_exact_mut(2 * self.pairs.half).enumerate() {
            let level = self.planted.filter(|(at, _)| *at == first + token).map_or(0.0, |(_, level)| level);
            row[self.pairs.sink..self.pairs.half].fill(level);
        }
    }

    /// Queries `[group][d]` of a step, and the step's key and value `[d]`.
    pub(super) fn step(&self, step: usize, position: usize, q: &mut [f32], k: &mut [f32], v: &mut [f32]) {
        self.rows(generator::DECODE + step, position, k, v);
        self.queries(purpose::QUERY, step, q);
    }

    /// Queries `[group][d]` of a position of the prompt.
    pub(super) fn prompt_queries(&self, position: usize, q: &mut [f32]) {
        self.queries(purpose::PROMPT, position, q);
    }

    fn queries(&self, purpose: purpose::Purpose, place: usize, q: &mut [f32]) {
        if self.kind == HeadType::Gaussian {
            let mut stream = head_stream(self.seed, self.layer, self.kv_head, purpose, place as u64);
            stream.normals(NormalTable::get(), q);
            return;
        }
        // Only the sink pairs, where the keys are 0: not a zero query, which methods that normalise could not take.
        let level = generator::QUERY_SINK / (self.pairs.sink_len() as f32).sqrt();
        for row in q.chunks_exact_mut(2 * self.pairs.half).take(self.group) {
            row.fill(0.0);
            row[self.pairs.sink..self.pairs.half].fill(level);
        }
    }
}
