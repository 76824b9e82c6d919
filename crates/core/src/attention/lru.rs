//! `lru`: evicts for good the row that no query has used for longest.
//!
//! The replacement policy of caches, as a baseline: a row is used when it comes, and when a query head of the group gives
//! it more than `above` times the mean weight of the rows read. With rows that are never used it is a sliding window;
//! sinks, which every query uses, stay. The rows of a prompt are used by its last `sample` queries.
//!
//! Cost: as `h2o`.

use std::ops::Range;

use super::evict::{self, Budget, Evicting, Rule};
use super::params::ParamSpec;
use super::{Method, Predicted};

pub(super) const METHOD: Method = Method {
    name: "lru",
    summary: "evicts for good the row that had no notable weight for longest",
    params: &[
        ParamSpec::int("budget", "rows kept", [1, 1 << 24], "2048"),
        ParamSpec::float("above", "a weight above this many times the mean one is a use", [0.0, 1e6], "1"),
        ParamSpec::int("sample", "last queries of a prompt that use its rows", [1, 8192], "128"),
    ],
    settings: true,
    evicts: true,
    check: evict::check,
    make: |p, _| {
        let (budget, above, sample) = (p.int("budget"), p.float("above") as f32, p.int("sample"));
        Box::new(Evicting::new(Lru { budget, above, sample }))
    },
    predict: |p, context, _| {
        let rows = p.int("budget").min(context);
        Predicted { rows, state_bytes: 8 * (rows + evict::SLACK), read_bytes: 4 * (rows + evict::SLACK / 2) }
    },
};

#[derive(Clone)]
struct Lru {
    budget: usize,
    above: f32,
    sample: usize,
}

impl Rule for Lru {
    fn budget(&self, _: usize) -> Budget {
        Budget { rows: self.budget, recent: 1 }
    }

    fn sample(&self) -> usize {
        self.sample
    }

    /// The score is the position of the last use.
    fn fresh(&self, position: usize) -> f32 {
        position as f32
    }

    fn saw(&mut self, position: usize, weights: &[f32], spans: &[Range<usize>], scores: &mut [f32]) {
        let rows: usize = spans.iter().map(Range::len).sum();
        let floor = self.above / rows.max(1) as f32;
        for weights in weights.chunks_exact(rows.max(1)) {
            for (row, _) in spans.iter().cloned().flatten().zip(weights).filter(|(_, w)| **w > floor) {
                if scores[row] != f32::INFINITY {
                    scores[row] = position as f32;
                }
            }
        }
    }
}
