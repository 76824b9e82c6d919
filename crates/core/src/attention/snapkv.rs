//! `snapkv`: when a prompt ends, keeps the rows that its last queries look at, and those queries' own; what is generated
//! stays.
//!
//! SnapKV (arXiv 2404.14469). A row's score is the softmax weight that the last `window` queries give it, summed over them
//! and averaged over the query heads of the group (as kvpress does for shared heads), then pooled over `kernel`
//! neighbours; the largest `capacity - window` of the rows before the window remain. The pooling counts what lies beyond
//! either end as zeros, as the authors' does. `ada` is AdaKV's safeguard (arXiv 2407.11550): each head of a layer keeps that share of
//! its capacity by its own scores, and the rest goes to whichever heads have the largest ones; 1, the default, is SnapKV
//! itself, 0.2 AdaKV. Heads then hold different numbers of rows, together as many as before.
//!
//! Cost: none at a decode step, which reads every row that is left. Until a prompt ends its last queries.

use std::sync::Arc;

use super::evict::{self, Board, Eyes, LastQueries, Occasion, Retained, largest, to_spans};
use super::params::ParamSpec;
use super::{GroupQuery, HeadMethod, Method, Predicted, Prompt, Selection};
use crate::kv::KvHead;

pub(super) const METHOD: Method = Method {
    name: "snapkv",
    summary: "keeps of a prompt what its last queries look at (SnapKV, arXiv 2404.14469; AdaKV, arXiv 2407.11550)",
    params: &[
        ParamSpec::int(
            "capacity",
            "rows kept of a prompt, the window included; the average of a layer's heads",
            [1, 1 << 24],
            "2048",
        ),
        ParamSpec::int("window", "last tokens of a prompt, whose queries score the others", [1, 8192], "64"),
        ParamSpec::int("kernel", "neighbours that scores are pooled over, odd", [1, 255], "5"),
        ParamSpec::choice("pool", "how scores are pooled", &["avg", "max"], "avg"),
        ParamSpec::float(
            "ada",
            "share of its capacity that a head is sure of; the rest goes to the largest scores of the layer",
            [0.0, 1.0],
            "1",
        ),
    ],
    settings: true,
    evicts: true,
    check: |p, shape| {
        evict::check(p, shape)?;
        if p.int("window") > p.int("capacity") {
            return Err("the window is larger than the capacity that it is part of".into());
        }
        match p.int("kernel") % 2 {
            1 => Ok(()),
            _ => Err("kernel is even, so it has no middle: use an odd one".into()),
        }
    },
    make: |p, _| {
        Box::new(SnapKv {
            rest: p.int("capacity") - p.int("window"),
            window: p.int("window"),
            kernel: p.int("kernel"),
            pool_max: p.word("pool") == "max",
            ada: p.float("ada"),
            last: LastQueries::new(p.int("window")),
            scored: None,
            board: Arc::new(Board::new(1)),
            kv_head: 0,
        })
    },
    predict: |p, context, _| Predicted::rows(p.int("capacity").min(context)),
};

struct SnapKv {
    /// Rows kept before the window.
    rest: usize,
    window: usize,
    kernel: usize,
    pool_max: bool,
    ada: f64,
    last: LastQueries,
    /// How many tokens had come when rows were scored; their scores are on the board.
    scored: Option<usize>,
    board: Arc<Board>,
    kv_head: usize,
}

impl SnapKv {
    fn pooled(&self, scores: &[f32]) -> Vec<f32> {
        let half = self.kernel / 2;
        let around = |i: usize| &scores[i.saturating_sub(half)..(i + half + 1).min(scores.len())];
        let pool = |i: usize| match self.pool_max {
            true => around(i).iter().copied().fold(0.0, f32::max),
            false => around(i).iter().sum::<f32>() / self.kernel as f32,
        };
        (0..scores.len()).map(pool).collect()
    }
}

/// Which rows each head of a layer keeps, given the scores of all: the largest `rest * heads` of them together, of each head
/// the largest `ada * rest` for sure. Ascending.
fn share(scores: &[Arc<Vec<f32>>], rest: usize, ada: f64) -> Vec<Vec<usize>> {
    let sure = (rest as f64 * ada) as usize;
    let mut kept: Vec<Vec<usize>> = Vec::with_capacity(scores.len());
    let mut open = Vec::new();
    for (head, own) in scores.iter().enumerate() {
        let all = own.iter().copied().enumerate().map(|(row, score)| (score, row)).collect();
        let most = if sure == rest { rest } else { rest * scores.len() };
        let ranked = largest(all, most);
        let (safe, others) = ranked.split_at(sure.min(ranked.len()));
        kept.push(safe.iter().map(|x| x.1).collect());
        open.extend(others.iter().map(|&(score, row)| (score, (head, row))));
    }
    let taken: usize = kept.iter().map(Vec::len).sum();
    for (_, (head, row)) in largest(open, (rest * scores.len()).saturating_sub(taken)) {
        kept[head].push(row);
    }
    kept.iter_mut().for_each(|rows| rows.sort_unstable());
    kept
}

impl HeadMethod for SnapKv {
    fn appended(&mut self, _: &KvHead, _: usize) {
        // Every head of the layer has seen what stood there.
        if let Some(tokens) = self.scored.take() {
            self.board.take_off(self.kv_head, tokens);
        }
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.last.truncate(kv.tokens());
        self.scored = None;
    }

    fn select(&mut self, _: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        out.spans.push(0..kv.len());
    }

    fn state_bytes(&self) -> usize {
        self.last.bytes()
    }

    fn prompt_queries(&self) -> usize {
        self.window
    }

    fn prompted(&mut self, prompt: Prompt<'_>) {
        self.last.push(prompt);
    }

    fn weigh(&mut self, kv: &KvHead) {
        self.scored = None;
        if self.last.len() == 0 {
            return;
        }
        let before = kv.len().saturating_sub(self.window);
        let mut scores = vec![0.0; before];
        let group = self.last.group as f32;
        self.last.weigh(&mut Eyes::default(), kv, |position, weights| {
            let rows = kv.row_of(position + 1);
            for weights in weights.chunks_exact(rows) {
                scores.iter_mut().zip(weights).for_each(|(score, weight)| *score += weight / group);
            }
        });
        self.last.forget();
        self.board.put(self.kv_head, kv.tokens(), self.pooled(&scores));
        self.scored = Some(kv.tokens());
    }

    fn compact(&mut self, kv: &KvHead, when: Occasion, out: &mut Retained) -> bool {
        let (Occasion::PromptOver, Some(tokens)) = (when, self.scored) else { return false };
        let before = kv.len().saturating_sub(self.window);
        let Some(scores) = self.board.all(tokens) else { return false };
        if scores.iter().all(|scores| scores.len() <= self.rest) {
            return false;
        }
        let kept = share(&scores, self.rest, self.ada);
        to_spans(kept[self.kv_head].iter().copied().chain(before..kv.len()), &mut out.keep);
        true
    }

    fn meet(&mut self, board: &Arc<Board>, kv_head: usize) {
        (self.board, self.kv_head) = (Arc::clone(board), kv_head);
    }

    fn fork(&self) -> Option<Box<dyn HeadMethod>> {
        Some(Box::new(SnapKv { last: self.last.clone(), board: Arc::clone(&self.board), ..*self }))
    }
}
