//! Filling the cache from a workload or a trace, and exact attention on the very same rows.
//!
//! Each (layer, KV head) is one task. As a block of rows is generated or read it is encoded into the cache and, still in
//! f32, attended by the queries of the first decode steps: the exact partials that every method and KV dtype is held
//! against cost one pass and no copy. Block partials are f32, their merge is f64.

use longbit::kv::{KvHead, KvScratch};
use longbit::workload::{BLOCK, HeadType, HeadWorkload, PROMPT_QUERIES, Workload};
use longbit::{ModelConfig, Session, Supplied};
use longbit_sys::Team;
use sha2::{Digest, Sha256};
use std::sync::Mutex;

use crate::reads::{Scope, Softmax};
use crate::replay::{self, Replay, Statistics};
use crate::{WorkerError, hex};

/// Exact attention of one (layer, KV head): for each compared step and query head, the partial over the context.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExactHead {
    /// `[steps][group]`.
    partials: Vec<Partial64>,
    /// Largest difference between the logits that attention sees, `q . k / sqrt(head_dim)` with the rows as they are cached,
    /// and those of the rows as they were made; over steps, query heads and tokens.
    pub(crate) logit_error: f64,
    /// The exact softmax of all tokens, `[steps][group]`, of the steps and layers for which it is kept.
    pub(crate) softmax: Vec<Softmax>,
}

/// A softmax partial in f64.
#[derive(Clone, Debug)]
struct Partial64 {
    max: f64,
    sum: f64,
    acc: Vec<f64>,
}

impl Partial64 {
    fn empty(head_dim: usize) -> Self {
        Partial64 { max: f64::NEG_INFINITY, sum: 0.0, acc: vec![0.0; head_dim] }
    }

    /// Adds tokens whose largest logit is `max`, with `sum` and `acc` relative to it.
    fn merge(&mut self, max: f64, sum: f64, acc: &[f32]) {
        let new = self.max.max(max);
        let (keep, add) = ((self.max - new).exp(), (max - new).exp());
        self.max = new;
        self.sum = self.sum * keep + sum * add;
        for (a, b) in self.acc.iter_mut().zip(acc) {
            *a = *a * keep + f64::from(*b) * add;
        }
    }
}

/// Where rows come from.
pub(crate) enum Source<'a> {
    /// A generator.
    Workload(&'a Workload),
    /// A recorded trace.
    Trace(Replay),
}

/// What made the rows of a filled cache.
pub(crate) enum Origin {
    /// Head generators.
    Workload {
        /// `[layers * kv_heads]`.
        heads: Vec<HeadWorkload>,
        /// Type of each head.
        types: Vec<HeadType>,
    },
    /// A recorded trace, with the statistics of some heads.
    Trace(Replay, Vec<Statistics>),
}

/// What filling a cache gave.
pub(crate) struct Filled {
    /// Who made the rows.
    pub(crate) origin: Origin,
    /// Queries, keys and values of each decode step.
    pub(crate) steps: Vec<Supplied>,
    /// Exact attention, `[layers * kv_heads]`.
    pub(crate) exact: Vec<ExactHead>,
    /// SHA-256 over the SHA-256s of all heads' rows.
    pub(crate) sha256: String,
}

/// What one task makes.
#[derive(Default)]
struct Slot {
    head: Option<HeadWorkload>,
    /// Queries, keys, values, each `[steps][…]`.
    steps: [Vec<f32>; 3],
    exact: ExactHead,
    statistics: Option<Statistics>,
    digest: [u8; 32],
}

/// Fills the cache of `session` with `context` tokens, makes `steps` decode steps, and computes exact attention for the
/// first `compared` of them. `progress(done, total)` is told of finished heads.
pub(crate) fn fill(
    session: &mut Session,
    source: Source<'_>,
    context: usize,
    steps: usize,
    compared: usize,
    mut progress: impl FnMut(u64, u64) -> Result<(), WorkerError>,
) -> Result<Filled, WorkerError> {
    let config = session.model().config.clone();
    let team = session.team().clone();
    let count = config.layers * config.kv_heads;
    let slots: Vec<Mutex<Slot>> = (0..count).map(|_| Mutex::default()).collect();
    let failure: Mutex<Option<WorkerError>> = Mutex::new(None);
    // The statistics of a trace need the logits of a step.
    let attended = if let Source::Trace(_) = source { compared.max(1) } else { compared };
    let scope = Scope::new(&config, context, attended);
    let task = Task { session, config: &config, source: &source, context, steps, compared, attended, scope };
    // Some heads a thread at a time: often enough for a progress display, rarely enough to stay balanced.
    let batch = 4 * team.threads();
    for start in (0..count).step_by(batch) {
        let heads = start..count.min(start + batch);
        run_batch(&team, heads.clone(), |i| match task.run(i) {
            Ok(slot) => *slots[i].lock().unwrap_or_else(|e| e.into_inner()) = slot,
            Err(error) => drop(failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error)),
        });
        if let Some(error) = failure.lock().unwrap_or_else(|e| e.into_inner()).take() {
            return Err(error);
        }
        progress(heads.end as u64, count as u64)?;
    }
    session.cache_mut().set_len(context)?;
    session.refresh();
    let slots: Vec<Slot> =
        slots.into_iter().map(|s| s.into_inner().unwrap_or_else(|e| e.into_inner())).collect();
    Ok(collect(slots, &config, source, steps))
}

impl Filled {
    /// What the errors of a (layer, KV head) are listed under: the type that its generator gave it.
    pub(crate) fn kind(&self, i: usize) -> &str {
        match &self.origin {
            Origin::Workload { types, .. } => types[i].name(),
            Origin::Trace(..) => replay::PRESET,
        }
    }

    /// Share of the answer of a (layer, KV head) that `output` names, where something is planted.
    pub(crate) fn recall(&self, i: usize, output: &[f32]) -> Option<f64> {
        match &self.origin {
            Origin::Workload { heads, .. } => heads[i].recall(output),
            Origin::Trace(..) => None,
        }
    }
}

/// Tells the method of `session`, which stands at the filled context, as many of the prompt's last queries as it wants to see
/// and `heads` know.
pub(crate) fn supply_prompt(session: &Session, heads: &[HeadWorkload]) -> Result<(), WorkerError> {
    let config = &session.model().config;
    let positions =
        session.len() - session.prompt_queries().min(PROMPT_QUERIES).min(session.len())..session.len();
    if positions.is_empty() {
        return Ok(());
    }
    let (cos, sin) = (session.rope().cos(positions.clone()), session.rope().sin(positions.clone()));
    let failure: Mutex<Option<longbit::Error>> = Mutex::new(None);
    run_batch(session.team(), 0..heads.len(), |i| {
        let mut queries = vec![0.0; positions.len() * config.group() * config.head_dim];
        heads[i].prompt_queries(positions.clone(), cos, sin, &mut queries);
        if let Err(error) = session.supply_prompt(i / config.kv_heads, i % config.kv_heads, &queries) {
            failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
        }
    });
    failure.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), |error| Err(error.into()))
}

/// Runs `task` for each of `heads`, taken in turn by whichever thread is free.
pub(crate) fn run_batch(team: &Team, heads: std::ops::Range<usize>, task: impl Fn(usize) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(heads.start);
    team.run(|_| {
        loop {
            let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if i >= heads.end {
                return;
            }
            task(i);
        }
    });
}

struct Task<'a> {
    session: &'a Session,
    config: &'a ModelConfig,
    source: &'a Source<'a>,
    context: usize,
    steps: usize,
    compared: usize,
    /// Steps that exact attention is computed for.
    attended: usize,
    scope: Scope,
}

/// The rows of one (layer, KV head).
enum Rows<'a> {
    Workload(HeadWorkload),
    Trace(&'a Replay),
}

impl Task<'_> {
    fn run(&self, i: usize) -> Result<Slot, WorkerError> {
        let (layer, kv_head) = (i / self.config.kv_heads, i % self.config.kv_heads);
        let (d, group) = (self.config.head_dim, self.config.group());
        let (rope, cache) = (self.session.rope(), self.session.cache());
        let rows = match self.source {
            Source::Workload(workload) => Rows::Workload(workload.calibrate(layer, kv_head)),
            Source::Trace(replay) => Rows::Trace(replay),
        };
        let room = |width: usize| Vec::with_capacity(self.steps * width);
        let mut slot = Slot { steps: [room(group * d), room(d), room(d)], ..Slot::default() };
        match &rows {
            Rows::Trace(replay) => replay.steps(layer, kv_head, 0..self.steps, &mut slot.steps)?,
            Rows::Workload(head) => {
                for step in 0..self.steps {
                    let at = self.context + step;
                    let (cos, sin) = (rope.cos(at..at + 1), rope.sin(at..at + 1));
                    let (mut q, mut k, mut v) = (vec![0.0; group * d], vec![0.0; d], vec![0.0; d]);
                    head.step(step, cos, sin, &mut q, &mut k, &mut v);
                    slot.steps[0].extend(q);
                    slot.steps[1].extend(k);
                    slot.steps[2].extend(v);
                }
            }
        }
        let mut exact = Exact::new(self, &slot.steps[0][..self.attended * group * d]);
        let (mut k, mut v) = (Vec::with_capacity(BLOCK * d), Vec::with_capacity(BLOCK * d));
        for (block, start) in (0..self.context).step_by(BLOCK).enumerate() {
            let tokens = start..self.context.min(start + BLOCK);
            match &rows {
                Rows::Trace(replay) => replay.block(layer, kv_head, tokens, &mut k, &mut v)?,
                Rows::Workload(head) => {
                    k.resize(tokens.len() * d, 0.0);
                    v.resize(tokens.len() * d, 0.0);
                    head.block(block, rope.cos(tokens.clone()), rope.sin(tokens), &mut k, &mut v);
                }
            }
            cache.head_mut(layer, kv_head).append(&k, &v)?;
            exact.add(&k, &v);
        }
        let stored = cache.head(layer, kv_head);
        slot.digest = digest(&stored);
        exact.hold_against(&stored);
        if self.scope.has(layer) && self.compared > 0 {
            exact.keep_softmax(&slot.steps, self.scope.steps);
        }
        match rows {
            Rows::Workload(head) => slot.head = Some(head),
            Rows::Trace(replay) => {
                replay.done(layer, kv_head);
                slot.statistics = self.scope.has(layer).then(|| exact.statistics(&slot.steps));
            }
        }
        slot.exact = exact.done;
        Ok(slot)
    }
}

/// SHA-256 over the SHA-256s of all heads' rows, lower-case hexadecimal.
pub(crate) fn rows_sha256(session: &Session) -> String {
    let config = &session.model().config;
    let heads = (0..config.layers * config.kv_heads).map(|i| (i / config.kv_heads, i % config.kv_heads));
    together(heads.map(|(layer, head)| digest(&session.cache().head(layer, head))))
}

fn together(digests: impl Iterator<Item = [u8; 32]>) -> String {
    let mut hash = Sha256::new();
    digests.for_each(|d| hash.update(d));
    hex(&hash.finalize())
}

fn digest(kv: &KvHead) -> [u8; 32] {
    let mut hash = Sha256::new();
    for run in kv.runs(0..kv.len()) {
        kv.key_parts(&run).chain(kv.value_parts(&run)).for_each(|part| hash.update(part));
    }
    hash.finalize().into()
}

fn collect(slots: Vec<Slot>, config: &ModelConfig, source: Source<'_>, steps: usize) -> Filled {
    let origin = match source {
        Source::Workload(workload) => {
            let heads = (0..slots.len()).map(|i| (i / config.kv_heads, i % config.kv_heads));
            let types = heads.map(|(layer, kv_head)| workload.head_type(layer, kv_head)).collect();
            Origin::Workload { heads: Vec::with_capacity(slots.len()), types }
        }
        Source::Trace(replay) => Origin::Trace(replay, Vec::new()),
    };
    let mut filled = Filled {
        origin,
        steps: vec![Supplied::default(); steps],
        exact: Vec::new(),
        sha256: together(slots.iter().map(|s| s.digest)),
    };
    let (d, width) = (config.head_dim, config.group() * config.head_dim);
    for supplied in &mut filled.steps {
        supplied.queries.reserve_exact(slots.len() * width);
        supplied.keys.reserve_exact(slots.len() * d);
        supplied.values.reserve_exact(slots.len() * d);
    }
    for slot in slots {
        for (step, supplied) in filled.steps.iter_mut().enumerate() {
            supplied.queries.extend_from_slice(&slot.steps[0][step * width..(step + 1) * width]);
            supplied.keys.extend_from_slice(&slot.steps[1][step * d..(step + 1) * d]);
            supplied.values.extend_from_slice(&slot.steps[2][step * d..(step + 1) * d]);
        }
        filled.exact.push(slot.exact);
        match &mut filled.origin {
            Origin::Workload { heads, .. } => heads.extend(slot.head),
            Origin::Trace(_, statistics) => statistics.extend(slot.statistics),
        }
    }
    filled
}

/// Exact attention in the making.
struct Exact<'a> {
    session: &'a Session,
    /// Scaled queries, `[attended][group][head_dim]`.
    queries: Vec<f32>,
    group: usize,
    head_dim: usize,
    /// Tokens of the context.
    context: usize,
    /// Tokens so far.
    seen: usize,
    done: ExactHead,
    /// Logits, `[attended][group][context]`.
    logits: Vec<f32>,
    weights: Vec<f32>,
    acc: Vec<f32>,
}

impl<'a> Exact<'a> {
    fn new(task: &Task<'a>, queries: &[f32]) -> Self {
        let (group, head_dim) = (task.config.group(), task.config.head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        Exact {
            session: task.session,
            queries: queries.iter().map(|q| q * scale).collect(),
            group,
            head_dim,
            context: task.context,
            seen: 0,
            done: ExactHead {
                partials: vec![Partial64::empty(head_dim); task.attended * group],
                ..ExactHead::default()
            },
            logits: vec![0.0; task.attended * group * task.context],
            weights: vec![0.0; group * BLOCK],
            acc: vec![0.0; group * head_dim],
        }
    }

    /// Adds one block of rows.
    fn add(&mut self, keys: &[f32], values: &[f32]) {
        let kernels = self.session.model().kernels;
        let (d, n) = (self.head_dim, keys.len() / self.head_dim);
        let weights = &mut self.weights[..self.group * n];
        let seen = self.seen..self.seen + n;
        self.seen = seen.end;
        let steps = self
            .queries
            .chunks_exact(self.group * d)
            .zip(self.done.partials.chunks_exact_mut(self.group))
            .zip(self.logits.chunks_exact_mut(self.group * self.context));
        for ((queries, partials), kept) in steps {
            kernels.scores_f32(queries, keys, d, weights, values);
            for (kept, logits) in kept.chunks_exact_mut(self.context).zip(weights.chunks_exact(n)) {
                kept[seen.clone()].copy_from_slice(logits);
            }
            self.acc.fill(0.0);
            let mut blocks = Vec::with_capacity(self.group);
            for logits in weights.chunks_exact_mut(n) {
                let max = kernels.max(logits);
                blocks.push((max, kernels.exp_sum(logits, max)));
            }
            kernels.accumulate_f32(weights, values, d, &mut self.acc, &[]);
            for ((partial, (max, sum)), acc) in partials.iter_mut().zip(blocks).zip(self.acc.chunks_exact(d))
            {
                partial.merge(f64::from(max), f64::from(sum), acc);
            }
        }
    }
}

impl Exact<'_> {
    /// Keeps the softmax of the first `steps` steps: over the context, and over the keys of the steps so far. `supplied` are
    /// queries, keys and values of the steps.
    fn keep_softmax(&mut self, supplied: &[Vec<f32>; 3], steps: usize) {
        let (d, [queries, keys, _]) = (self.head_dim, supplied);
        let scale = 1.0 / (d as f32).sqrt();
        for step in 0..steps {
            for h in 0..self.group {
                let i = step * self.group + h;
                let query = &queries[i * d..(i + 1) * d];
                let appended = keys[..(step + 1) * d].chunks_exact(d);
                let appended =
                    appended.map(|key| scale * query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>());
                let context = &self.logits[i * self.context..(i + 1) * self.context];
                self.done.softmax.push(Softmax::new(context.iter().copied().chain(appended).collect()));
            }
        }
    }

    /// How attention lies at the first step, over the context and the token of the step, and how far the heaviest tokens of
    /// the context are those of the other heads and of the next step.
    fn statistics(&self, supplied: &[Vec<f32>; 3]) -> Statistics {
        let (d, [queries, keys, _]) = (self.head_dim, supplied);
        let root = (d as f64).sqrt();
        let steps: Vec<Vec<Vec<f64>>> = self
            .logits
            .chunks_exact(self.group * self.context)
            .take(2)
            .map(|step| {
                step.chunks_exact(self.context).map(|l| l.iter().copied().map(f64::from).collect()).collect()
            })
            .collect();
        let mut first = steps.first().cloned().unwrap_or_default();
        for (logits, query) in first.iter_mut().zip(queries.chunks_exact(d)) {
            let own: f64 = query.iter().zip(&keys[..d]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            logits.push(own / root);
        }
        Statistics::new(&first, &steps)
    }

    /// Compares the logits with those of the rows that `stored` holds, computed as attention does.
    fn hold_against(&mut self, stored: &KvHead) {
        let d = self.head_dim;
        let (mut scratch, mut out) = (KvScratch::default(), Vec::new());
        let steps = self
            .queries
            .chunks_exact_mut(self.group * d)
            .zip(self.logits.chunks_exact(self.group * self.context));
        for (queries, exact) in steps {
            stored.rotate_queries(queries);
            stored.prepare(queries, &mut scratch);
            for run in stored.runs(0..self.context) {
                out.resize(self.group * run.len(), 0.0);
                stored.scores(queries, &run, &[], &mut scratch, &mut out);
                for (ours, exact) in out.chunks_exact(run.len()).zip(exact.chunks_exact(self.context)) {
                    let pairs = ours.iter().zip(&exact[run.clone()]);
                    let worst = pairs.map(|(a, b)| f64::from(a - b).abs()).fold(0.0, f64::max);
                    self.done.logit_error = self.done.logit_error.max(worst);
                }
            }
        }
    }
}

impl ExactHead {
    /// Exact outputs of decode step `step`, `[group][head_dim]`: the context, and the rows of steps `0..=step`.
    pub(crate) fn outputs(&self, step: usize, i: usize, steps: &[Supplied], head_dim: usize) -> Vec<f64> {
        let group = self.partials.len().checked_div(steps.len()).unwrap_or(0);
        let at = i * head_dim;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let mut out = Vec::with_capacity(group * head_dim);
        for h in 0..group {
            let mut partial = self.partials[step * group + h].clone();
            let query = &steps[step].queries[(i * group + h) * head_dim..][..head_dim];
            for appended in &steps[..=step] {
                let key = &appended.keys[at..at + head_dim];
                let logit: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                partial.merge(logit * scale, 1.0, &appended.values[at..at + head_dim]);
            }
            out.extend(partial.acc.iter().map(|a| a / partial.sum));
        }
        out
    }
}
