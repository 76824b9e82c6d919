//! Cells on a recorded trace: its rows fill the cache and its last tokens are the decode steps, in place of a generator.
//!
//! Rows are read from the mapped file block by block, head by head; nothing of it is held in memory but the queries, keys
//! and values of the decode steps. A repetition that takes more steps than the trace has begins again with the first one,
//! at the context, while the clock stands.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use longbit::workload::{HeadStatistics, Overlap};
use longbit::{Session, Trace};
use longbit_protocol::{Job, TraceFile};

use crate::WorkerError;

/// Name of the workload.
pub(crate) const NAME: &str = "file";

/// Name of the preset that takes its shape from the trace.
pub(crate) const PRESET: &str = "trace";

/// Whether a job's workload is a trace: `file:` with what identifies it.
pub(crate) fn is_workload(workload: &str) -> bool {
    workload.split(':').next() == Some(NAME)
}

/// The trace of a job, once it is known to be the one that was planned; none where it replays none.
pub(crate) fn open(job: &Job) -> Result<Option<Trace>, WorkerError> {
    let file = match (&job.trace, is_workload(&job.workload)) {
        (Some(file), true) => file,
        (None, true) => {
            return Err(WorkerError::Request(
                "the workload file needs a trace: workload.name = \"file:PATH\"".into(),
            ));
        }
        (_, false) => return Ok(None),
    };
    let trace = mapped(file)?;
    // Of the bytes that are mapped and read from here on, whatever the path names later.
    let found = trace.sha256();
    if found != file.sha256 {
        return Err(WorkerError::Request(format!(
            "{} has changed since the run was planned: its SHA-256 is {found}, planned was {}; restore it, or start anew \
             with --fresh",
            file.path, file.sha256
        )));
    }
    Ok(Some(trace))
}

/// The trace, its layout checked, its identity not.
pub(crate) fn mapped(file: &TraceFile) -> Result<Trace, longbit::Error> {
    Trace::open(Path::new(&file.path))
}

/// Checks that `compared` steps can be compared, and a method be told `wanted` queries of the prompt; the decode steps
/// that the trace has at `context`.
pub(crate) fn check(
    trace: &Trace,
    context: usize,
    compared: usize,
    wanted: usize,
) -> Result<usize, longbit::Error> {
    let (steps, prompt) = trace.steps_at(context)?;
    let shape = trace.shape();
    if compared > steps {
        let least = shape.tokens.saturating_sub(compared);
        let help = match shape.steps >= compared {
            true => format!("a context of {least} or less has them, or lower measure.quality_steps"),
            false => "lower measure.quality_steps, or record more steps".to_owned(),
        };
        return Err(longbit::Error::Invalid(format!(
            "{} has {steps} decode steps at a context of {context}, and measure.quality_steps = {compared} are compared; {help}",
            trace.path().display()
        )));
    }
    if wanted > prompt {
        let more = match shape.split_at(shape.context().saturating_add(wanted)) {
            Some((steps, _)) => {
                format!("a context of {} has them, and leaves {steps} decode steps", shape.context() + wanted)
            }
            None => "record more steps".to_owned(),
        };
        return Err(longbit::Error::Invalid(format!(
            "the method looks at the last {wanted} queries of the prompt, and {} has {prompt} before a context of {context}; \
             {more}, or ask the method for fewer",
            trace.path().display()
        )));
    }
    Ok(steps)
}

/// A trace at a context.
#[derive(Debug)]
pub(crate) struct Replay {
    trace: Trace,
    context: usize,
    /// Decode steps from there on.
    pub(crate) steps: usize,
}

impl Replay {
    pub(crate) fn new(trace: Trace, context: usize, compared: usize) -> Result<Self, WorkerError> {
        let steps = check(&trace, context, compared, 0)?;
        Ok(Replay { trace, context, steps })
    }

    /// Appends queries, keys and values of the decode steps `steps` of a (layer, KV head).
    pub(crate) fn steps(
        &self,
        layer: usize,
        kv_head: usize,
        steps: Range<usize>,
        out: &mut [Vec<f32>; 3],
    ) -> Result<(), WorkerError> {
        let tokens = self.context + steps.start..self.context + steps.end;
        let mut rows = Vec::new();
        for step in steps {
            self.queries(layer, kv_head, self.context + step, &mut rows)?;
            out[0].extend_from_slice(&rows);
        }
        self.trace.keys(layer, kv_head, tokens.clone(), &mut rows)?;
        out[1].extend_from_slice(&rows);
        self.trace.values(layer, kv_head, tokens, &mut rows)?;
        out[2].extend_from_slice(&rows);
        Ok(())
    }

    /// Keys and values of `tokens` of the context; `k` and `v` are overwritten.
    pub(crate) fn block(
        &self,
        layer: usize,
        kv_head: usize,
        tokens: Range<usize>,
        k: &mut Vec<f32>,
        v: &mut Vec<f32>,
    ) -> Result<(), WorkerError> {
        self.trace.keys(layer, kv_head, tokens.clone(), k)?;
        Ok(self.trace.values(layer, kv_head, tokens, v)?)
    }

    /// Called when the rows of a (layer, KV head) have been read.
    pub(crate) fn done(&self, layer: usize, kv_head: usize) {
        self.trace.release(layer, kv_head);
    }

    /// The queries of the group at a token.
    fn queries(
        &self,
        layer: usize,
        kv_head: usize,
        token: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), WorkerError> {
        Ok(self.trace.queries(layer, kv_head, token - self.trace.shape().context(), out)?)
    }

    /// Tells the method of `session`, which stands at the context, the last queries of the prompt that it wants to see.
    pub(crate) fn supply_prompt(&self, session: &Session) -> Result<(), WorkerError> {
        let wanted = session.prompt_queries().min(session.len());
        if wanted == 0 {
            return Ok(());
        }
        check(&self.trace, self.context, 0, wanted)?;
        let shape = self.trace.shape();
        let (mut rows, mut all) = (Vec::new(), Vec::new());
        for (layer, kv_head) in (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h))) {
            all.clear();
            for token in self.context - wanted..self.context {
                self.queries(layer, kv_head, token, &mut rows)?;
                all.extend_from_slice(&rows);
            }
            session.supply_prompt(layer, kv_head, &all)?;
        }
        Ok(())
    }

    /// What is known of the trace, by name; `heads` are the statistics of some (layer, KV head)s.
    pub(crate) fn statistics(&self, heads: &[Statistics]) -> BTreeMap<String, f64> {
        let shape = self.trace.shape();
        let mean = |of: &dyn Fn(&HeadStatistics) -> f64| {
            let all: Vec<f64> = heads.iter().flat_map(|head| head.queries.iter().map(of)).collect();
            (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
        };
        let overlap = |of: fn(&Overlap) -> Option<f64>| {
            let all: Vec<f64> = heads.iter().filter_map(|head| of(&head.overlap)).collect();
            (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
        };
        let all = [
            ("bytes", Some(self.trace.bytes() as f64)),
            ("tokens", Some(shape.tokens as f64)),
            ("steps", Some(self.steps as f64)),
            ("sink_mass", mean(&|q| q.sink_mass)),
            ("recent_mass", mean(&|q| q.recent_mass)),
            ("top_percent_mass", mean(&|q| q.top_percent_mass)),
            ("effective_tokens", mean(&|q| q.effective_tokens)),
            ("density_95", mean(&|q| q.density_95)),
            ("group_overlap", overlap(|o| o.group)),
            ("step_overlap", overlap(|o| o.steps)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((format!("{PRESET}.{name}"), value?))).collect()
    }
}

/// How the attention of a (layer, KV head) lies at the first step, as a generator says it of its own.
#[derive(Clone, Debug)]
pub(crate) struct Statistics {
    /// One a query head of the group.
    queries: Vec<HeadStatistics>,
    overlap: Overlap,
}

impl Statistics {
    /// Of the logits `[step][group][tokens]` of the first step, with its own token, and of the context alone at the first
    /// steps (one or two).
    pub(crate) fn new(first: &[Vec<f64>], context: &[Vec<Vec<f64>>]) -> Self {
        let next = context.get(1).map(Vec::as_slice);
        Statistics {
            queries: first.iter().map(|logits| HeadStatistics::of_logits(logits)).collect(),
            overlap: Overlap::of_logits(context.first().map_or(&[], Vec::as_slice), next),
        }
    }
}
