//! What methods that evict share: scores of rows, which of them are gone, and the meeting place of the heads of a layer.
//!
//! A row that is evicted is never read again. Its memory goes when [`SLACK`] rows of a head are evicted, or when a prompt
//! ends: until then a rewind to where memory last went (the mark) finds every row and every score as they were, so what is
//! decoded after it repeats bit for bit. A rewind beyond the mark leaves evicted rows evicted. Before a step attends, it
//! evicts down to the budget, by the scores that the steps before it left: what it reads, its own row included, is the
//! budget, no more (the authors of most methods evict after the step and so hold one row more while it runs).
//!
//! Methods attend to the rows themselves, for they need the weights: keys are read once. A decode step scans the scores of
//! a head, 4 bytes a row, besides its rows.

mod board;
mod eyes;
mod ledger;
mod retained;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use board::Board;
pub(super) use eyes::{Eyes, LastQueries};
pub(super) use ledger::{largest, to_spans};
pub use retained::Retained;

use std::ops::Range;
use std::sync::Arc;

use super::params::Params;
use super::{GroupQuery, HeadMethod, MethodShape, Prompt, Selection};
use crate::error::Result;
use crate::kv::{KvHead, PAGE_TOKENS};
use ledger::Ledger;
use retained::merge;

/// Rows of a head that may be evicted and still in memory.
pub(crate) const SLACK: usize = PAGE_TOKENS;

/// Refuses what no method that evicts can do.
pub(super) fn check(params: &Params, shape: &MethodShape) -> Result<(), String> {
    if params.int("reuse") > 1 {
        return Err("a method that evicts decides anew at every step: leave `reuse` at 1".into());
    }
    shape.dtype.keys.rows_move()?;
    shape.dtype.values.rows_move()
}

/// When rows may be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Before the row of a decode step comes.
    Step,
    /// Before rows of a prompt come, which will see all rows that are there: what is evicted must go.
    Prompt,
    /// A prompt is over, and every head of the layer was told so.
    PromptOver,
}

/// How many rows a head keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Budget {
    pub(super) rows: usize,
    /// The newest ones that are never evicted, the newest of all included; of `rows`.
    pub(super) recent: usize,
}

/// How a method scores rows that are evicted one by one.
pub(super) trait Rule: Clone + Send + 'static {
    /// The budget, when a prompt of `context` tokens is over.
    fn budget(&self, context: usize) -> Budget;

    /// Queries of a prompt that it scores rows by.
    fn sample(&self) -> usize;

    /// The score of a row that comes at `position`.
    fn fresh(&self, position: usize) -> f32 {
        let _ = position;
        0.0
    }

    /// The query at `position` had `weights`, `[group][rows]`, on the rows of `spans`.
    fn saw(&mut self, position: usize, weights: &[f32], spans: &[Range<usize>], scores: &mut [f32]);

    /// `tokens` have come, and every head of the layer has seen them.
    fn between(&mut self, tokens: usize, scores: &mut [f32]) {
        let _ = (tokens, scores);
    }

    /// The cache was rewound to `tokens`, where no state was kept.
    fn rewound(&mut self, tokens: usize) {
        let _ = tokens;
    }

    fn meet(&mut self, board: &Arc<Board>, kv_head: usize) {
        let _ = (board, kv_head);
    }

    /// Whether what is evicted is merged into what remains.
    fn merges(&self) -> bool {
        false
    }
}

/// What a rewind finds again.
#[derive(Clone)]
struct Mark<R> {
    tokens: usize,
    ledger: Ledger,
    rule: R,
}

/// The state of a method that evicts one row a step.
pub(super) struct Evicting<R> {
    rule: R,
    budget: Option<Budget>,
    ledger: Ledger,
    last: LastQueries,
    mark: Option<Mark<R>>,
    /// Several rows came last: the mark is to be where they end.
    unmarked: bool,
    eyes: Eyes,
}

impl<R: Rule> Evicting<R> {
    pub(super) fn new(rule: R) -> Self {
        let last = LastQueries::new(rule.sample());
        let (ledger, eyes) = (Ledger::default(), Eyes::default());
        Evicting { rule, budget: None, ledger, last, mark: None, unmarked: true, eyes }
    }

    fn set_mark(&mut self, tokens: usize) {
        self.mark = Some(Mark { tokens, ledger: self.ledger.clone(), rule: self.rule.clone() });
    }

    fn evict(&mut self, kv: &KvHead) {
        let budget = *self.budget.get_or_insert_with(|| self.rule.budget(kv.tokens()));
        let recent = kv.len().saturating_sub(budget.recent);
        self.ledger.evict_to(budget.rows, |row| row >= recent);
    }
}

impl<R: Rule> HeadMethod for Evicting<R> {
    fn appended(&mut self, kv: &KvHead, from: usize) {
        let before = kv.tokens() - (kv.len() - from);
        self.rule.between(before, &mut self.ledger.scores);
        let one = kv.len() - from == 1;
        if one && self.unmarked {
            self.set_mark(before);
        }
        self.unmarked = !one;
        let fresh = (from..kv.len()).map(|row| self.rule.fresh(kv.position_of(row)));
        self.ledger.scores.extend(fresh);
    }

    fn truncated(&mut self, kv: &KvHead) {
        let tokens = kv.tokens();
        self.last.truncate(tokens);
        match &self.mark {
            Some(mark) if mark.tokens == tokens => {
                self.ledger.clone_from(&mark.ledger);
                self.rule.clone_from(&mark.rule);
            }
            mark => {
                let beyond = mark.as_ref().is_none_or(|mark| mark.tokens > tokens);
                self.ledger.truncate(kv.len());
                self.rule.rewound(tokens);
                if beyond {
                    self.set_mark(tokens);
                }
            }
        }
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        self.evict(kv);
        self.ledger.spans(&mut self.eyes.spans);
        self.eyes.attend(query, kv, out);
        out.index_bytes = (self.ledger.scores.len() * size_of::<f32>()) as u64;
        self.rule.saw(query.position, &self.eyes.weights, &self.eyes.spans, &mut self.ledger.scores);
    }

    fn state_bytes(&self) -> usize {
        let mark = self.mark.as_ref().map_or(0, |mark| mark.ledger.bytes());
        self.ledger.bytes() + mark + self.last.bytes()
    }

    fn prompt_queries(&self) -> usize {
        self.last.most()
    }

    fn prompted(&mut self, prompt: Prompt<'_>) {
        self.last.push(prompt);
    }

    fn weigh(&mut self, kv: &KvHead) {
        let (rule, scores) = (&mut self.rule, &mut self.ledger.scores);
        self.last.weigh(&mut self.eyes, kv, |position, weights| {
            let rows = kv.row_of(position + 1);
            rule.saw(position, weights, std::slice::from_ref(&(0..rows)), scores);
        });
        self.last.forget();
        // Several queries over the whole prompt take far more room than the steps that follow.
        self.eyes = Eyes::default();
        self.budget = Some(self.rule.budget(kv.tokens()));
    }

    fn compact(&mut self, kv: &KvHead, when: Occasion, out: &mut Retained) -> bool {
        self.rule.between(kv.tokens(), &mut self.ledger.scores);
        match when {
            Occasion::Step if self.ledger.dead.len() < SLACK => return false,
            Occasion::Prompt if self.ledger.dead.is_empty() => return false,
            Occasion::Step | Occasion::Prompt => {}
            Occasion::PromptOver => self.evict(kv),
        }
        let some = !self.ledger.dead.is_empty();
        if some {
            let dead = std::mem::take(&mut self.ledger.dead);
            self.ledger.spans(&mut out.keep);
            if self.rule.merges() {
                merge(kv, dead, &self.ledger.scores, out);
            }
            self.ledger.compact(out);
        }
        self.set_mark(kv.tokens());
        self.unmarked = false;
        some
    }

    fn meet(&mut self, board: &Arc<Board>, kv_head: usize) {
        self.rule.meet(board, kv_head);
        if let Some(mark) = &mut self.mark {
            mark.rule.meet(board, kv_head);
        }
    }

    fn fork(&self) -> Option<Box<dyn HeadMethod>> {
        Some(Box::new(Evicting {
            rule: self.rule.clone(),
            budget: self.budget,
            ledger: self.ledger.clone(),
            last: self.last.clone(),
            mark: self.mark.clone(),
            unmarked: self.unmarked,
            eyes: Eyes::default(),
        }))
    }
}
