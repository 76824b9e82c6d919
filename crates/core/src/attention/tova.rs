//! `tova`: evicts for good the row that the last query gave the least weight, over all heads of a layer.
//!
//! TOVA (arXiv 2401.06104), as in kvpress: weights are averaged over the query heads of a layer, all its KV heads evict the
//! same tokens, and the newest row stays. At the end of a prompt all but `budget` rows go by the weights of its last query. The heads of a
//! layer meet on a board: a step evicts by what all of them left there in the step before.
//!
//! Cost: 4 bytes of state a row, those on the board of as many rows a head, read by every head; and as much for rewinds.

use std::ops::Range;
use std::sync::Arc;

use super::evict::{self, Board, Budget, Evicting, Rule};
use super::params::ParamSpec;
use super::{Method, Predicted};

pub(super) const METHOD: Method = Method {
    name: "tova",
    summary: "evicts for good what the last query of a layer's heads weighs least (TOVA, arXiv 2401.06104)",
    params: &[ParamSpec::int("budget", "rows kept", [1, 1 << 24], "2048")],
    settings: true,
    evicts: true,
    check: evict::check,
    make: |p, _| Box::new(Evicting::new(Tova::new(p.int("budget")))),
    predict: |p, context, shape| {
        let rows = p.int("budget").min(context);
        let bytes = 4 * (rows + evict::SLACK / 2) * (1 + shape.kv_heads);
        Predicted { rows, state_bytes: 8 * (rows + evict::SLACK), read_bytes: bytes }
    },
};

#[derive(Clone)]
struct Tova {
    budget: usize,
    /// Scores are those of the query at this many tokens less one; what the board has for earlier ones does not count.
    until: usize,
    board: Arc<Board>,
    kv_head: usize,
}

impl Tova {
    fn new(budget: usize) -> Self {
        Tova { budget, until: 0, board: Arc::new(Board::new(1)), kv_head: 0 }
    }
}

impl Rule for Tova {
    fn budget(&self, _: usize) -> Budget {
        Budget { rows: self.budget, recent: 1 }
    }

    fn sample(&self) -> usize {
        1
    }

    fn saw(&mut self, position: usize, weights: &[f32], spans: &[Range<usize>], _: &mut [f32]) {
        let rows: usize = spans.iter().map(Range::len).sum();
        let mut sums = vec![0.0; rows];
        for weights in weights.chunks_exact(rows.max(1)) {
            sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight);
        }
        self.board.put(self.kv_head, position, sums);
    }

    fn between(&mut self, tokens: usize, scores: &mut [f32]) {
        if tokens <= self.until {
            return;
        }
        self.until = tokens;
        // Nobody has asked, as within a prompt, or some of the heads attend to everything.
        let Some(sums) = self.board.all(tokens - 1) else { return };
        let alive = scores.iter().filter(|score| **score != f32::INFINITY).count();
        if sums.iter().any(|sums| sums.len() != alive) {
            return;
        }
        let alive = scores.iter_mut().filter(|score| **score != f32::INFINITY);
        for (i, score) in alive.enumerate() {
            *score = sums.iter().map(|sums| sums[i]).sum();
        }
    }

    fn rewound(&mut self, tokens: usize) {
        self.until = tokens;
    }

    fn meet(&mut self, board: &Arc<Board>, kv_head: usize) {
        (self.board, self.kv_head) = (Arc::clone(board), kv_head);
    }
}
