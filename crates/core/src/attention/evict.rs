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

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::params::Params;
use super::partial::stride;
use super::{GroupQuery, HeadMethod, MethodShape, Prompt, Reader, Selection};
use crate::error::Result;
use crate::kv::{KvHead, PAGE_TOKENS};

/// Rows of a head that may be evicted and still in memory.
pub(super) const SLACK: usize = PAGE_TOKENS;

/// Queries of a prompt that are scored together.
const TOGETHER: usize = 4;

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

/// What is to become of the rows of a head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compaction {
    /// Rows that remain: ascending, disjoint.
    pub keep: Vec<Range<usize>>,
    /// Rows, counted among those that remain, which others were merged into, ascending.
    merged: Vec<usize>,
    /// Their keys and values, `[merged][head_dim]`, rotated as they are stored.
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Compaction {
    /// Forgets everything but the memory.
    pub fn clear(&mut self) {
        self.keep.clear();
        self.merged.clear();
        self.keys.clear();
        self.values.clear();
    }

    /// Does it.
    ///
    /// # Errors
    /// As [`KvHead::retain`].
    pub fn apply(&self, kv: &mut KvHead) -> Result<()> {
        kv.retain(&self.keep)?;
        let d = kv.head_dim();
        for ((row, key), value) in
            self.merged.iter().zip(self.keys.chunks_exact(d)).zip(self.values.chunks_exact(d))
        {
            kv.replace(*row, key, value)?;
        }
        Ok(())
    }
}

/// Where the heads of a layer leave numbers for each other. What is left for one position is read at the next, so the
/// numbers of two positions are kept.
pub struct Board(Mutex<[Vec<Post>; 2]>);

#[derive(Clone, Default)]
struct Post {
    /// Which position the numbers are of, plus one; 0 before the first.
    when: usize,
    numbers: Arc<Vec<f32>>,
}

impl Board {
    pub(super) fn new(heads: usize) -> Self {
        Board(Mutex::new([vec![Post::default(); heads], vec![Post::default(); heads]]))
    }

    fn lock(&self) -> MutexGuard<'_, [Vec<Post>; 2]> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn copy(&self) -> Self {
        Board(Mutex::new(self.lock().clone()))
    }

    /// Leaves the numbers of `head` for `position`.
    pub(super) fn put(&self, head: usize, position: usize, numbers: Vec<f32>) {
        self.lock()[position % 2][head] = Post { when: position + 1, numbers: Arc::new(numbers) };
    }

    /// Takes what `head` left for `position` off.
    pub(super) fn take_off(&self, head: usize, position: usize) {
        self.lock()[position % 2][head] = Post::default();
    }

    /// The numbers of every head for `position`, if all have left them.
    pub(super) fn all(&self, position: usize) -> Option<Vec<Arc<Vec<f32>>>> {
        let posts = &self.lock()[position % 2];
        let whole = posts.iter().all(|post| post.when == position + 1);
        whole.then(|| posts.iter().map(|post| Arc::clone(&post.numbers)).collect())
    }
}

/// The last queries of a prompt, kept until it ends.
#[derive(Clone, Default)]
pub(super) struct LastQueries {
    most: usize,
    /// `[tokens][group][head_dim]`.
    pub(super) rows: Vec<f32>,
    /// Position of the first.
    pub(super) first: usize,
    pub(super) group: usize,
    head_dim: usize,
}

impl LastQueries {
    pub(super) fn new(most: usize) -> Self {
        LastQueries { most, ..Default::default() }
    }

    pub(super) fn most(&self) -> usize {
        self.most
    }

    fn width(&self) -> usize {
        (self.group * self.head_dim).max(1)
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len() / self.width()
    }

    pub(super) fn push(&mut self, prompt: Prompt<'_>) {
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
    pub(super) fn truncate(&mut self, tokens: usize) {
        let keep = tokens.saturating_sub(self.first) * self.width();
        self.rows.truncate(keep);
    }

    pub(super) fn forget(&mut self) {
        self.rows = Vec::new();
    }

    /// Hands `each` the softmax weights of every query over the rows up to its own: its position, and `[group][rows]`.
    pub(super) fn weigh(&self, eyes: &mut Eyes, kv: &KvHead, mut each: impl FnMut(usize, &[f32])) {
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

    pub(super) fn bytes(&self) -> usize {
        self.rows.len() * size_of::<f32>()
    }
}

/// What attends.
#[derive(Default)]
pub(super) struct Eyes {
    reader: Reader,
    spans: Vec<Range<usize>>,
    /// `[group][tokens]`.
    weights: Vec<f32>,
}

impl Eyes {
    /// Attends to `self.spans`; leaves the softmax weights in `self.weights`.
    fn attend(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
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

/// Rows, and what they are worth.
#[derive(Clone, Default)]
pub(super) struct Ledger {
    /// Of each row, infinite for one that is evicted.
    pub(super) scores: Vec<f32>,
    /// Evicted rows still in memory with the scores that they had, in the order in which they went.
    dead: Vec<(usize, f32)>,
}

impl Ledger {
    /// Rows that are not evicted.
    pub(super) fn alive(&self) -> usize {
        self.scores.len() - self.dead.len()
    }

    /// Evicts until `budget` rows are left, the lowest scores first, of equal ones the newest; none of `spared`.
    pub(super) fn evict_to(&mut self, budget: usize, spared: impl Fn(usize) -> bool) {
        let excess = self.alive().saturating_sub(budget);
        if excess == 0 {
            return;
        }
        let scores = self.scores.iter().copied().enumerate();
        let candidates = scores.filter(|&(row, score)| score != f32::INFINITY && !spared(row));
        let order = |a: &(usize, f32), b: &(usize, f32)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
        let first = self.dead.len();
        if excess == 1 {
            self.dead.extend(candidates.min_by(order));
        } else {
            let mut candidates: Vec<_> = candidates.collect();
            candidates.sort_unstable_by(order);
            self.dead.extend(candidates.into_iter().take(excess));
        }
        for &(row, _) in &self.dead[first..] {
            self.scores[row] = f32::INFINITY;
        }
    }

    /// Writes the rows that are not evicted to `out`, as spans.
    pub(super) fn spans(&self, out: &mut Vec<Range<usize>>) {
        out.clear();
        let alive = self.scores.iter().enumerate().filter(|(_, score)| **score != f32::INFINITY);
        to_spans(alive.map(|(row, _)| row), out);
    }

    /// Lists what remains, and forgets the others.
    pub(super) fn compact(&mut self, out: &mut Compaction) {
        self.spans(&mut out.keep);
        self.scores.retain(|score| *score != f32::INFINITY);
        self.dead.clear();
    }

    fn truncate(&mut self, rows: usize) {
        self.scores.truncate(rows);
        self.dead.retain(|&(row, _)| row < rows);
    }
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
        let ledger =
            |l: &Ledger| l.scores.len() * size_of::<f32>() + l.dead.len() * size_of::<(usize, f32)>();
        let mark = self.mark.as_ref().map_or(0, |mark| ledger(&mark.ledger));
        ledger(&self.ledger) + mark + self.last.bytes()
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
        self.budget = Some(self.rule.budget(kv.tokens()));
    }

    fn compact(&mut self, kv: &KvHead, when: Occasion, out: &mut Compaction) -> bool {
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

/// The least score that counts, so that rows which nobody looked at have a mean too.
const LEAST: f32 = 1e-6;

/// Merges the rows `dead` into those of `out.keep` whose keys point most nearly the same way: the mean of both keys and of
/// both values, weighted by scores. No more than as many as remain, those with the largest scores.
fn merge(kv: &KvHead, mut dead: Vec<(usize, f32)>, scores: &[f32], out: &mut Compaction) {
    let (d, kernels) = (kv.head_dim(), kv.kernels());
    let kept: Vec<usize> = out.keep.iter().cloned().flatten().collect();
    dead.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    dead.truncate(kept.len());
    let decode = |rows: &[usize], keys: bool| {
        let mut all = vec![0.0; rows.len() * d];
        for (&row, to) in rows.iter().zip(all.chunks_exact_mut(d)) {
            match keys {
                true => kv.decode_keys(row..row + 1, to),
                false => kv.decode_values(row..row + 1, to),
            }
        }
        all
    };
    let rows: Vec<usize> = dead.iter().map(|x| x.0).collect();
    let (keys, mine) = (decode(&kept, true), decode(&rows, true));
    let lengths: Vec<f32> = keys.chunks_exact(d).map(|key| kernels.dot(key, key).sqrt().max(LEAST)).collect();
    let mut into: Vec<(usize, usize)> = Vec::with_capacity(dead.len());
    let mut dots = vec![0.0; kept.len()];
    for (i, key) in mine.chunks_exact(d).enumerate() {
        kernels.scores_f32(key, &keys, d, &mut dots, &[]);
        let nearest = dots.iter().zip(&lengths).map(|(dot, length)| dot / length).enumerate();
        into.extend(nearest.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map(|(row, _)| (row, i)));
    }
    into.sort_unstable();
    let values = decode(&rows, false);
    for same in into.chunk_by(|a, b| a.0 == b.0) {
        let row = same[0].0;
        let own = scores[kept[row]].max(LEAST);
        let total: f32 = own + same.iter().map(|&(_, i)| dead[i].1.max(LEAST)).sum::<f32>();
        let mut key = keys[row * d..(row + 1) * d].to_vec();
        let mut value = decode(&kept[row..row + 1], false);
        for x in [&mut key, &mut value] {
            kernels.scale(x, own / total);
        }
        for &(_, i) in same {
            let share = dead[i].1.max(LEAST) / total;
            kernels.scale_add(&mut key, 1.0, &mine[i * d..(i + 1) * d], share);
            kernels.scale_add(&mut value, 1.0, &values[i * d..(i + 1) * d], share);
        }
        out.merged.push(row);
        out.keys.extend(key);
        out.values.extend(value);
    }
}

/// The `n` largest of `scores`, which are `(score, key)`: those first, of equal ones the lowest key.
pub(super) fn largest<K: Ord + Copy>(mut scores: Vec<(f32, K)>, n: usize) -> Vec<(f32, K)> {
    let order = |a: &(f32, K), b: &(f32, K)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if n < scores.len() {
        scores.select_nth_unstable_by(n, order);
        scores.truncate(n);
    }
    scores.sort_unstable_by(order);
    scores
}

/// Ascending rows as spans.
pub(super) fn to_spans(rows: impl Iterator<Item = usize>, out: &mut Vec<Range<usize>>) {
    for row in rows {
        match out.last_mut() {
            Some(last) if last.end == row => last.end += 1,
            _ => out.push(row..row + 1),
        }
    }
}
