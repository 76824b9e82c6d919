//! `expected`: keeps the rows that queries to come are expected to look at, by the distribution of those of the prompt.
//!
//! Expected Attention (arXiv 2510.00636), as in kvpress. Queries before rotation are taken for normal, with the mean `m` and
//! the covariance `S` of the last `sample` of the prompt; turned by the mean rotation of the next `future` positions they
//! give `m'` and `S'`. A row's score is `softmax(k m' + k S' k / 2)`, with queries scaled by `1 / sqrt(head_dim)`, averaged over
//! the query heads of the group, times the length of its value. The first `sinks` tokens stay and do not take part. What
//! exceeds `budget` goes when a prompt ends, and every `interval` decoded tokens. What differs: the distribution
//! stays that of the prompt (kvpress takes queries of the last 256 generated tokens), so a step keeps no state; positions
//! beyond those that the cache can hold are left out of the mean rotation.
//!
//! Cost: none at a decode step but rows that came since the last eviction; `head_dim^2` operations a row and query head when
//! rows go; `head_dim^2 + head_dim` numbers of state a query head. Rotated formats are turned back for the scores.

use std::sync::Arc;

use super::evict::{self, LastQueries, Occasion, Retained, largest, to_spans};
use super::params::ParamSpec;
use super::{GroupQuery, HeadMethod, Method, Predicted, Prompt, Selection};
use crate::kv::{KvHead, PAGE_TOKENS};
use crate::model::RopeTable;

pub(super) const METHOD: Method = Method {
    name: "expected",
    summary: "evicts what the prompt's queries, taken as normal, would look at least (Expected Attention, arXiv 2510.00636)",
    params: &[
        ParamSpec::int("budget", "rows left when rows are evicted", [1, 1 << 24], "2048"),
        ParamSpec::int("interval", "decoded tokens between evictions", [1, 1 << 20], "512"),
        ParamSpec::int("future", "positions to come that are averaged over", [1, 1 << 20], "512"),
        ParamSpec::int("sinks", "first tokens always kept; of the budget", [0, 1 << 20], "4"),
        ParamSpec::int(
            "sample",
            "last queries of a prompt that the distribution is taken from",
            [2, 8192],
            "512",
        ),
    ],
    settings: true,
    evicts: true,
    check: |p, shape| {
        evict::check(p, shape)?;
        match p.int("sinks") < p.int("budget") {
            true => Ok(()),
            false => Err("the budget is no larger than the sinks: raise it".into()),
        }
    },
    make: |p, place| {
        Box::new(Expected {
            budget: p.int("budget"),
            interval: p.int("interval"),
            future: p.int("future"),
            sinks: p.int("sinks"),
            last: LastQueries::new(p.int("sample")),
            rope: Arc::clone(place.rope),
            queries: Vec::new(),
            since: 0,
        })
    },
    predict: |p, context, shape| {
        let rows = (p.int("budget") + p.int("interval") / 2).min(context);
        let d = shape.head_dim;
        // Each query head has a mean and a covariance.
        Predicted { rows, state_bytes: 4 * (d * d + d) * shape.group, read_bytes: 0 }
    },
};

/// The distribution of a head's queries, scaled, before rotation.
#[derive(Clone)]
struct Normal {
    mean: Vec<f32>,
    /// `[head_dim][head_dim]`.
    covariance: Vec<f32>,
}

#[derive(Clone)]
struct Expected {
    budget: usize,
    interval: usize,
    future: usize,
    sinks: usize,
    last: LastQueries,
    rope: Arc<RopeTable>,
    /// Of each query head.
    queries: Vec<Normal>,
    /// Tokens when rows were evicted last.
    since: usize,
}

impl Expected {
    /// The distribution of the queries that were kept.
    fn learn(&mut self, kv: &KvHead) {
        let d = kv.head_dim();
        let (n, group) = (self.last.len(), self.last.group);
        let mut rows = std::mem::take(&mut self.last.rows);
        self.last.forget();
        if n < 2 {
            return;
        }
        kv.restore_keys(&mut rows);
        for (i, rows) in rows.chunks_exact_mut(group * d).enumerate() {
            let at = self.last.first + i;
            let (cos, sin) = (self.rope.cos(at..at + 1), self.rope.sin(at..at + 1));
            rows.chunks_exact_mut(d).for_each(|row| turn(row, cos, sin, -1.0));
        }
        self.queries =
            (0..group).map(|h| Normal::of(rows.chunks_exact(d).skip(h).step_by(group), n, d)).collect();
    }

    /// What each row from `sinks` on is expected to count.
    fn scores(&self, kv: &KvHead, sinks: usize) -> Vec<f32> {
        let (d, kernels, len) = (kv.head_dim(), kv.kernels(), kv.len());
        let ahead = kv.tokens()..(kv.tokens() + self.future).min(self.rope.len());
        let half = d / 2;
        let mean = |table: &[f32]| -> Vec<f32> {
            let mut sums = vec![0.0f64; half];
            for row in table.chunks_exact(half) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            sums.iter().map(|sum| (sum / ahead.len() as f64) as f32).collect()
        };
        let turned: Vec<Normal> = match ahead.is_empty() {
            true => self.queries.clone(),
            false => {
                let (cos, sin) = (mean(self.rope.cos(ahead.clone())), mean(self.rope.sin(ahead.clone())));
                self.queries.iter().map(|normal| normal.turned(&cos, &sin)).collect()
            }
        };
        let group = turned.len();
        let mut logits = vec![Vec::with_capacity(len - sinks); group];
        let mut lengths = Vec::with_capacity(len - sinks);
        let mut products = Vec::new();
        let mut dots = Vec::new();
        for start in (sinks..len).step_by(PAGE_TOKENS) {
            let rows = start..len.min(start + PAGE_TOKENS);
            let n = rows.len();
            let (mut keys, mut values) = (vec![0.0; n * d], vec![0.0; n * d]);
            kv.decode_keys(rows.clone(), &mut keys);
            kv.restore_keys(&mut keys);
            kv.decode_values(rows, &mut values);
            lengths.extend(values.chunks_exact(d).map(|value| kernels.dot(value, value).sqrt()));
            products.resize(d * n, 0.0);
            dots.resize(n, 0.0);
            for (normal, logits) in turned.iter().zip(&mut logits) {
                kernels.scores_f32(&normal.mean, &keys, d, &mut dots, &[]);
                // `[channel][token]` of S' k.
                kernels.scores_f32(&normal.covariance, &keys, d, &mut products, &[]);
                for (t, key) in keys.chunks_exact(d).enumerate() {
                    let square: f32 = key.iter().enumerate().map(|(i, k)| k * products[i * n + t]).sum();
                    logits.push(dots[t] + 0.5 * square);
                }
            }
        }
        let mut scores = vec![0.0; len - sinks];
        for logits in &mut logits {
            let largest = kernels.max(logits);
            let sum = kernels.exp_sum(logits, largest);
            kernels.scale_add(&mut scores, 1.0, logits, 1.0 / (sum * group as f32));
        }
        scores.iter_mut().zip(&lengths).for_each(|(score, length)| *score *= length);
        scores
    }
}

impl Normal {
    fn of<'a>(rows: impl Iterator<Item = &'a [f32]> + Clone, n: usize, d: usize) -> Self {
        let mut mean = vec![0.0f64; d];
        for row in rows.clone() {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / n as f64);
        }
        let mean: Vec<f32> = mean.into_iter().map(|m| m as f32).collect();
        let mut covariance = vec![0.0f32; d * d];
        for row in rows {
            let apart: Vec<f32> = row.iter().zip(&mean).map(|(x, m)| x - m).collect();
            for (line, x) in covariance.chunks_exact_mut(d).zip(&apart) {
                line.iter_mut().zip(&apart).for_each(|(c, y)| *c += x * y / (n - 1) as f32);
            }
        }
        Normal { mean, covariance }
    }

    /// That of the queries turned by a mean rotation.
    fn turned(&self, cos: &[f32], sin: &[f32]) -> Self {
        let d = self.mean.len();
        let mut normal = self.clone();
        turn(&mut normal.mean, cos, sin, 1.0);
        for _ in 0..2 {
            // Rows, then columns.
            normal.covariance.chunks_exact_mut(d).for_each(|row| turn(row, cos, sin, 1.0));
            let other = normal.covariance.clone();
            for (i, row) in normal.covariance.chunks_exact_mut(d).enumerate() {
                row.iter_mut().enumerate().for_each(|(j, x)| *x = other[j * d + i]);
            }
        }
        normal
    }
}

/// Turns a row as rotary embedding does, or with `sign` -1 back.
fn turn(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let (low, high) = row.split_at_mut(cos.len());
    for ((a, b), (&c, &s)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        let s = sign * s;
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

impl HeadMethod for Expected {
    fn truncated(&mut self, kv: &KvHead) {
        self.last.truncate(kv.tokens());
        self.since = self.since.min(kv.tokens());
    }

    fn select(&mut self, _: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        out.spans.push(0..kv.len());
    }

    fn state_bytes(&self) -> usize {
        let normal = |normal: &Normal| size_of::<f32>() * (normal.mean.len() + normal.covariance.len());
        self.last.bytes() + self.queries.iter().map(normal).sum::<usize>()
    }

    fn prompt_queries(&self) -> usize {
        self.last.most()
    }

    fn prompted(&mut self, prompt: Prompt<'_>) {
        self.last.push(prompt);
    }

    fn weigh(&mut self, kv: &KvHead) {
        self.learn(kv);
    }

    fn compact(&mut self, kv: &KvHead, when: Occasion, out: &mut Retained) -> bool {
        match when {
            Occasion::Step if kv.tokens() - self.since < self.interval => return false,
            Occasion::Prompt => return false,
            Occasion::Step | Occasion::PromptOver => {}
        }
        self.since = kv.tokens();
        if kv.len() <= self.budget || self.queries.is_empty() {
            return false;
        }
        let sinks = kv.row_of(self.sinks);
        let scores = self.scores(kv, sinks);
        let scores = scores.into_iter().enumerate().map(|(i, score)| (score, sinks + i)).collect();
        let mut kept: Vec<usize> = largest(scores, self.budget - sinks).iter().map(|x| x.1).collect();
        kept.sort_unstable();
        to_spans((0..sinks).chain(kept), &mut out.keep);
        true
    }

    fn fork(&self) -> Option<Box<dyn HeadMethod>> {
        Some(Box::new(self.clone()))
    }
}
