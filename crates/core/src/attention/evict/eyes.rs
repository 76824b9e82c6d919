//! What methods that evict look at: the weights of the last queries of a prompt, and of the query of a step.

use std::ops::Range;

use super::super::partial::stride;
use super::super::{GroupQuery, Prompt, Reader, Selection};
use crate::kv::KvHead;

/// Queries of a prompt that are scored together.
const TOGETHER: usize = 4;

/// The last queries of a prompt, kept until it ends.
#[derive(Clone, Default)]
pub(in crate::attention) struct LastQueries {
    most: usize,
    /// `[tokens][group][head_dim]`.
    pub(in crate::attention) rows: Vec<f32>,
    /// Position of the first.
    pub(in crate::attention) first: usize,
    pub(in crate::attention) group: usize,
    head_dim: usize,
}

impl LastQueries {
    pub(in crate::attention) fn new(most: usize) -> Self {
        LastQueries { most, ..Default::default() }
    }

    pub(in crate::attention) fn most(&self) -> usize {
        self.most
    }

    fn width(&self) -> usize {
        (self.group * self.head_dim).max(1)
    }

    pub(in crate::attention) fn len(&self) -> usize {
        self.rows.len() / self.width()
    }

    pub(in crate::attention) fn push(&mut self, prompt: Prompt<'_>) {
        if self.rows.is_empty() || prompt.first != self.first + self.len() {
            self.rows.clear();
            (self.first, self.group, self.head_dim) = (prompt.first, prompt.group, prompt.head_dim);
        }
        self.rows.extend_from_slice(prompt.rows);
        let more = self.len().saturating_sub(self.most);
        self.rows.drain(..more * self.width());
        self.first += more;
    }

    /// Forgets those from position `tokens` on.
    pub(in crate::attention) fn truncate(&mut self, tokens: usize) {
        let keep = tokens.saturating_sub(self.first) * self.width();
        self.rows.truncate(keep);
    }

    pub(in crate::attention) fn forget(&mut self) {
        self.rows = Vec::new();
    }

    /// Hands `each` the softmax weights of every query over the rows up to its own: its position, and `[group][rows]`.
    pub(in crate::attention) fn weigh(
        &self,
        eyes: &mut Eyes,
        kv: &KvHead,
        mut each: impl FnMut(usize, &[f32]),
    ) {
        let (d, kernels) = (self.head_dim, kv.kernels());
        let mut position = self.first;
        let mut some = Vec::new();
        for rows in self.rows.chunks(TOGETHER * self.width()) {
            let n = rows.len() / self.width();
            let all = kv.row_of(position + n);
            if all > 0 {
                let query = GroupQuery { rows, head_dim: d, position: position + n - 1 };
                eyes.reader.logits(query, kv, std::slice::from_ref(&(0..all)), &mut eyes.weights);
                for (i, logits) in eyes.weights.chunks_exact(self.group * all).enumerate() {
                    let seen = kv.row_of(position + i + 1);
                    some.clear();
                    for logits in logits.chunks_exact(all) {
                        let from = some.len();
                        some.extend_from_slice(&logits[..seen]);
                        let weights = &mut some[from..];
                        let sum = kernels.exp_sum(weights, kernels.max(weights));
                        kernels.scale(weights, 1.0 / sum);
                    }
                    if seen > 0 {
                        each(position + i, &some);
                    }
                }
            }
            position += n;
        }
        // No decode step read this.
        eyes.reader.report(&mut Selection::default());
    }

    pub(in crate::attention) fn bytes(&self) -> usize {
        self.rows.len() * size_of::<f32>()
    }
}

/// What attends.
#[derive(Default)]
pub(in crate::attention) struct Eyes {
    reader: Reader,
    pub(super) spans: Vec<Range<usize>>,
    /// `[group][tokens]`.
    pub(super) weights: Vec<f32>,
}

impl Eyes {
    /// Attends to `self.spans`; leaves the softmax weights in `self.weights`.
    pub(super) fn attend(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let stride = stride(query.head_dim);
        self.reader.logits(query, kv, &self.spans, &mut self.weights);
        out.tail.resize(query.group() * stride, 0.0);
        self.reader.partial(kv, &self.spans, &mut self.weights, &mut out.tail);
        self.reader.report(out);
        let tokens = self.weights.len() / query.group();
        out.tail_rows = tokens as u64;
        for (weights, partial) in
            self.weights.chunks_exact_mut(tokens.max(1)).zip(out.tail.chunks_exact(stride))
        {
            kv.kernels().scale(weights, if partial[1] > 0.0 { 1.0 / partial[1] } else { 0.0 });
        }
    }
}
