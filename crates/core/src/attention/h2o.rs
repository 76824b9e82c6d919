//! `h2o`: keeps the newest rows and those that were attended to most so far; every step evicts one for good.
//!
//! H2O (arXiv 2306.14048). The score of a row is the sum of the softmax weights that queries gave it, here over the query
//! heads of the group; a budget is shared between the newest rows and the heaviest others, as in the authors' code 0.1 and
//! 0.1 of the context. What differs: the sums over a prompt are taken over its last `sample` queries, for those over all of
//! them cost the square of its length again (and favour old tokens the more the longer it is), and each of the `sample`
//! reads every key; a step evicts
//! before it attends, so the budget holds its own row. `merge=on` averages an evicted row into the kept row with the
//! nearest key by cosine, weighted by scores, in the spirit of CaM (ICML 2024) and D2O (arXiv 2406.13035), which merge at
//! every step and under a threshold; here rows are merged when their memory goes, at the latest 256 steps later, and of a
//! prompt as many as the budget.
//!
//! Cost: 4 bytes of state a row read and written a step, and as much for rewinds; until a prompt ends its last queries.

use std::ops::Range;

use super::evict::{self, Budget, Evicting, Rule};
use super::params::{ParamSpec, Params};
use super::{Method, Predicted};

pub(super) const METHOD: Method = Method {
    name: "h2o",
    summary: "evicts for good what had the least attention so far, but for the newest rows (H2O, arXiv 2306.14048)",
    params: &[
        ParamSpec::float(
            "heavy",
            "rows kept for the attention that they had, as a share of the context",
            [0.0, 1.0],
            "0.1",
        ),
        ParamSpec::float("recent", "newest rows kept, as a share of the context", [0.0, 1.0], "0.1"),
        ParamSpec::int(
            "budget",
            "rows kept, divided as heavy to recent; 0: the shares of the context",
            [0, 1 << 24],
            "0",
        ),
        ParamSpec::int("sample", "last queries of a prompt by which its rows are scored", [1, 8192], "128"),
        ParamSpec::choice(
            "merge",
            "average evicted rows into those with the nearest keys",
            &["off", "on"],
            "off",
        ),
    ],
    settings: true,
    evicts: true,
    check: |p, shape| {
        evict::check(p, shape)?;
        match p.float("heavy") + p.float("recent") > 0.0 {
            true => Ok(()),
            false => Err("heavy and recent are both 0, so nothing would be kept: raise one of them".into()),
        }
    },
    make: |p, _| Box::new(Evicting::new(H2o::new(p))),
    predict: |p, context, _| {
        let rows = H2o::new(p).budget(context).rows.min(context);
        Predicted { rows, state_bytes: 8 * (rows + evict::SLACK), read_bytes: 4 * (rows + evict::SLACK / 2) }
    },
};

#[derive(Clone)]
struct H2o {
    heavy: f64,
    recent: f64,
    budget: usize,
    sample: usize,
    merge: bool,
}

impl H2o {
    fn new(p: &Params) -> Self {
        H2o {
            heavy: p.float("heavy"),
            recent: p.float("recent"),
            budget: p.int("budget"),
            sample: p.int("sample"),
            merge: p.word("merge") == "on",
        }
    }
}

impl Rule for H2o {
    fn budget(&self, context: usize) -> Budget {
        let of = |share: f64| (share * context as f64).ceil() as usize;
        let (rows, recent) = match self.budget {
            0 => (of(self.heavy) + of(self.recent), of(self.recent)),
            n => (n, (n as f64 * self.recent / (self.heavy + self.recent)).round() as usize),
        };
        let rows = rows.max(1);
        Budget { rows, recent: recent.clamp(1, rows) }
    }

    fn sample(&self) -> usize {
        self.sample
    }

    fn saw(&mut self, _: usize, weights: &[f32], spans: &[Range<usize>], scores: &mut [f32]) {
        let rows: usize = spans.iter().map(Range::len).sum();
        for weights in weights.chunks_exact(rows.max(1)) {
            for (row, weight) in spans.iter().cloned().flatten().zip(weights) {
                scores[row] += weight;
            }
        }
    }

    fn merges(&self) -> bool {
        self.merge
    }
}
