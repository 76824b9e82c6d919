//! What the cells of a job run on: the model, the filled cache, and what each decode step is given.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use longbit::attention::{MethodSpec, method};
use longbit::kv::kv_dtype;
use longbit::workload::{
    HeadShape, HeadStatistics, HeadType, HeadWorkload, MIN_CONTEXT, Workload, WorkloadSpec,
};
use longbit::{Checkpoint, HeadFormat, Model, ModelConfig, Session, SessionOptions, Trace};
use longbit_protocol::{Fill, Job, Quality, Traffic};
use longbit_sys::Team;

use crate::capabilities::{compaction, open_options};
use crate::estimate;
use crate::fill::{self, Filled, Origin, Source};
use crate::measure::phase;
use crate::replay::{self, Replay};
use crate::text::{self, REFERENCE_KV, TextRun};
use crate::timing::Passes;
use crate::{Events, WorkerError, append, prefill, profile, quality};

/// A model with the tokens that it is to run, where it is to run any.
pub(crate) struct Built {
    model: Arc<Model>,
    /// Identifies the model.
    pub(crate) sha256: String,
    text: Option<TextRun>,
    trace: Option<Trace>,
}

/// What the decode steps of a job are given, and what their output is held against.
pub(crate) enum Inputs {
    /// Queries, keys and values of a generator, or of a trace.
    Generated(Box<Filled>),
    /// Tokens of a text.
    Text(TextRun),
    /// The model's own queries, keys and values, of tokens that mean nothing: after an empty cache, or a short one that
    /// such tokens filled.
    Own(Fill, String),
}

/// A session at the context of the job, with dense attention.
pub(crate) struct Prepared {
    pub(crate) session: Session,
    pub(crate) inputs: Inputs,
    /// Time to fill the cache.
    pub(crate) fill_ns: u64,
}

/// Builds or loads the model. Whatever can be refused is refused before the weights are read.
pub(crate) fn build(job: &Job, team: &Team) -> Result<Built, WorkerError> {
    let head = HeadFormat::parse(&job.model.head)?;
    let how = compaction(&job.model)?;
    let wants_text = text::is_workload(&job.workload);
    let trace = replay::open(job)?;
    if job.model.path.is_empty() {
        if wants_text {
            return Err(WorkerError::Request(
                "the workload text runs a real text through the model, so it needs a checkpoint; give model.path".into(),
            ));
        }
        let shape = estimate::shape(&job.model, trace.as_ref())?;
        check_trace(job, trace.as_ref(), &shape)?;
        let sha256 = Model::synthetic_sha256(&shape, head, job.model.seed);
        let model = Arc::new(Model::synthetic(shape, head, job.model.seed, team)?.compact(how, team)?);
        return Ok(Built { model, sha256, text: None, trace });
    }
    let checkpoint = Checkpoint::open(Path::new(&job.model.path), &open_options(&job.model)?)?;
    let sha256 = checkpoint.sha256()?;
    if !job.model.sha256.is_empty() && job.model.sha256 != sha256 {
        return Err(WorkerError::Request(format!(
            "{} is not the checkpoint that the experiment names: its SHA-256 is {sha256}, model.sha256 is {}",
            job.model.path, job.model.sha256
        )));
    }
    check_trace(job, trace.as_ref(), checkpoint.config())?;
    let text = match (&job.text, wants_text) {
        (Some(file), true) => Some(text::read(job, file, &checkpoint)?),
        (None, true) => {
            return Err(WorkerError::Request("the workload text needs a text; give workload.file".into()));
        }
        (_, false) => None,
    };
    Ok(Built { model: Arc::new(checkpoint.load(head, team)?.compact(how, team)?), sha256, text, trace })
}

/// Whether a model of shape `config` can replay the trace of the job at its context.
fn check_trace(job: &Job, trace: Option<&Trace>, config: &ModelConfig) -> Result<(), WorkerError> {
    let Some(trace) = trace else { return Ok(()) };
    trace.check_model(config)?;
    replay::check(trace, job.context, job.measure.quality_steps as usize, 0)?;
    Ok(())
}

/// Makes the session of a job and fills its cache.
pub(crate) fn prepare<W: Write>(
    job: &Job,
    built: Built,
    team: Arc<Team>,
    events: &mut Events<W>,
) -> Result<Prepared, WorkerError> {
    match (built.text, built.trace) {
        (Some(text), _) => decode_text(job, built.model, text, team, events),
        (None, Some(trace)) => replay_trace(job, built.model, trace, team, events),
        (None, None) => generate(job, built.model, team, events),
    }
}

fn generate<W: Write>(
    job: &Job,
    model: Arc<Model>,
    team: Arc<Team>,
    events: &mut Events<W>,
) -> Result<Prepared, WorkerError> {
    let measure = &job.measure;
    let largest = job.cells.iter().map(|c| c.batch).max().unwrap_or(1);
    let steps = measure.warmup_tokens.saturating_add(measure.gen_tokens).max(measure.quality_steps) as usize;
    let config = &model.config;
    let shape = HeadShape {
        layers: config.layers,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        rope_theta: config.rope_theta,
    };
    let spec = WorkloadSpec::parse(&job.workload)?;
    let options = SessionOptions {
        capacity: job.context.saturating_add(steps.max(largest)),
        kv: kv_dtype(&job.kv_dtype)?,
        method: method("dense")?,
    };
    if job.context < MIN_CONTEXT {
        let mut session = Session::new(model, team, options)?;
        let clock = Instant::now();
        profile::fill_to(&mut session, job.context, &mut |_: &str, _, _| Ok(()))?;
        let fill_ns = clock.elapsed().as_nanos() as u64;
        let fill = if job.context == 0 { Fill::None } else { Fill::Prefill };
        let sha256 = fill::rows_sha256(&session);
        return Ok(Prepared { session, inputs: Inputs::Own(fill, sha256), fill_ns });
    }
    let workload = Workload::new(&spec, &shape, job.context, steps, job.seed)?;
    let mut session = Session::new(model, team, options)?;
    let clock = Instant::now();
    let compared = measure.quality_steps as usize;
    let source = Source::Workload(&workload);
    let filled = fill::fill(&mut session, source, job.context, steps, compared, |done, total| {
        events.send(&phase("filling the cache", done, total))
    })?;
    let fill_ns = clock.elapsed().as_nanos() as u64;
    Ok(Prepared { session, inputs: Inputs::Generated(Box::new(filled)), fill_ns })
}

fn replay_trace<W: Write>(
    job: &Job,
    model: Arc<Model>,
    trace: Trace,
    team: Arc<Team>,
    events: &mut Events<W>,
) -> Result<Prepared, WorkerError> {
    let measure = &job.measure;
    let compared = measure.quality_steps as usize;
    let replay = Replay::new(trace, job.context, compared)?;
    let wanted = measure.warmup_tokens.saturating_add(measure.gen_tokens).max(measure.quality_steps) as usize;
    let steps = wanted.clamp(1, replay.steps);
    let largest = job.cells.iter().map(|c| c.batch).max().unwrap_or(1);
    let options = SessionOptions {
        capacity: job.context.saturating_add(steps.max(largest)),
        kv: kv_dtype(&job.kv_dtype)?,
        method: method("dense")?,
    };
    let mut session = Session::new(model, team, options)?;
    let clock = Instant::now();
    let source = Source::Trace(replay);
    let filled = fill::fill(&mut session, source, job.context, steps, compared, |done, total| {
        events.send(&phase("filling the cache from the trace", done, total))
    })?;
    let fill_ns = clock.elapsed().as_nanos() as u64;
    Ok(Prepared { session, inputs: Inputs::Generated(Box::new(filled)), fill_ns })
}

fn decode_text<W: Write>(
    job: &Job,
    model: Arc<Model>,
    mut text: TextRun,
    team: Arc<Team>,
    events: &mut Events<W>,
) -> Result<Prepared, WorkerError> {
    let compared = match job.cells.iter().all(|c| c.quality_done) {
        true => 0,
        false => job.measure.quality_steps as usize,
    };
    let apart = job.kv_dtype != REFERENCE_KV && compared > 0;
    if apart {
        // One cache at a time: the reference is gone before the cells' own is made.
        let mut reference = text.session(job, REFERENCE_KV, &model, &team)?;
        text.prefill(&mut reference, |done, total| {
            events.send(&phase("filling the cache of the reference", done, total))
        })?;
        text.take_reference(&mut reference, compared, |done, total| {
            events.send(&phase("decoding the reference", done, total))
        })?;
    }
    let mut session = text.session(job, &job.kv_dtype, &model, &team)?;
    let clock = Instant::now();
    text.prefill(&mut session, |done, total| events.send(&phase("filling the cache", done, total)))?;
    text.identify(&session);
    let fill_ns = clock.elapsed().as_nanos() as u64;
    if !apart {
        text.take_reference(&mut session, compared, |done, total| {
            events.send(&phase("decoding the reference", done, total))
        })?;
    }
    Ok(Prepared { session, inputs: Inputs::Text(text), fill_ns })
}

impl Inputs {
    /// The passes of a cell of `batch` tokens from `context` on.
    pub(crate) fn passes<'a>(&'a self, session: &'a mut Session, context: usize, batch: usize) -> Steps<'a> {
        let vocab = session.model().config.vocab;
        let token = |i: usize| match self {
            Inputs::Text(text) => text.token(i),
            _ => quality::token(i, vocab),
        };
        let batch = if batch > 1 { (0..batch).map(token).collect() } else { Vec::new() };
        Steps { inputs: self, session, context, batch }
    }

    /// Decode steps after which a repetition begins again; none where there are as many as it wants.
    fn period(&self) -> Option<usize> {
        match self {
            Inputs::Generated(filled) => Some(filled.steps.len()),
            Inputs::Text(_) | Inputs::Own(..) => None,
        }
    }

    /// Decodes step `step` of a repetition; the logits stay in the session.
    fn decode(&self, session: &mut Session, step: usize) -> Result<(), WorkerError> {
        match self {
            Inputs::Generated(filled) => {
                let token = quality::token(step, session.model().config.vocab);
                session.decode_supplied(token, &filled.steps[step % filled.steps.len()], false)?;
            }
            Inputs::Text(text) => {
                session.decode(text.token(step))?;
            }
            Inputs::Own(..) => {
                session.decode(quality::token(step, session.model().config.vocab))?;
            }
        }
        Ok(())
    }

    /// Quality of the session's method over `steps` steps. The session must stand at the filled context, and stands there
    /// again afterwards.
    pub(crate) fn quality(
        &self,
        session: &mut Session,
        steps: usize,
        progress: &mut dyn FnMut(u64, u64) -> Result<(), WorkerError>,
    ) -> Result<Quality, WorkerError> {
        match self {
            Inputs::Generated(filled) => {
                // A trace has no queries of its prompt.
                let prefill = match &filled.origin {
                    Origin::Workload { heads, .. } => prefill::measure(session, heads)?,
                    Origin::Trace(..) => None,
                };
                Ok(Quality { prefill, ..quality::measure(session, filled, steps)? })
            }
            Inputs::Text(text) => text.compare(session, progress),
            Inputs::Own(..) => Err(WorkerError::Request(format!(
                "nothing is compared at a context of less than {MIN_CONTEXT} tokens; set measure.quality_steps = 0"
            ))),
        }
    }

    /// Tells the method of `session`, which stands at the filled context, the last queries of the prompt that it wants to see,
    /// where a generator or a trace has them: a text has run through the model.
    pub(crate) fn supply_prompt(&self, session: &Session) -> Result<(), WorkerError> {
        match self {
            Inputs::Generated(filled) => match &filled.origin {
                Origin::Workload { heads, .. } => fill::supply_prompt(session, heads),
                Origin::Trace(replay, _) => replay.supply_prompt(session),
            },
            Inputs::Text(_) | Inputs::Own(..) => Ok(()),
        }
    }

    /// Whether a prompt runs through the model for `method` alone.
    pub(crate) fn prefills(&self, method: &MethodSpec) -> bool {
        matches!(self, Inputs::Text(_)) && !method.is_prefill_dense()
    }

    /// A session for a cell whose prompt is not dense, which stands at the context: the text runs through the model once more, with
    /// that pattern. None where no text does: then all cells have the rows of `shared`.
    pub(crate) fn prefilled(
        &self,
        shared: &Session,
        method: &MethodSpec,
    ) -> Result<Option<Session>, WorkerError> {
        match self {
            Inputs::Text(text) if self.prefills(method) => {
                let options = SessionOptions {
                    capacity: shared.cache().shape().capacity,
                    kv: shared.cache().dtype(),
                    method: method.clone(),
                };
                let mut session = Session::new(shared.model().clone(), shared.team().clone(), options)?;
                text.prefill(&mut session, |_, _| Ok(()))?;
                Ok(Some(session))
            }
            _ => Ok(None),
        }
    }

    /// See [`append::measure`].
    pub(crate) fn append_ns(&self, session: &mut Session) -> Result<Option<u64>, WorkerError> {
        match self {
            Inputs::Generated(filled) => append::measure(session, &filled.steps),
            Inputs::Text(_) | Inputs::Own(..) => Ok(None),
        }
    }

    /// How the cache was filled.
    pub(crate) fn fill(&self) -> Fill {
        match self {
            Inputs::Generated(filled) => match filled.origin {
                Origin::Workload { .. } => Fill::Synthetic,
                Origin::Trace(..) => Fill::Trace,
            },
            Inputs::Text(_) => Fill::Prefill,
            Inputs::Own(fill, _) => *fill,
        }
    }

    /// SHA-256 over the SHA-256s of all heads' rows.
    pub(crate) fn fill_sha256(&self) -> &str {
        match self {
            Inputs::Generated(filled) => &filled.sha256,
            Inputs::Text(text) => &text.sha256,
            Inputs::Own(_, sha256) => sha256,
        }
    }

    /// What is known of the workload, by name.
    pub(crate) fn statistics(&self, session: &Session) -> BTreeMap<String, f64> {
        match self {
            Inputs::Generated(filled) => match &filled.origin {
                Origin::Workload { heads, types } => statistics(session, heads, types),
                Origin::Trace(replay, heads) => replay.statistics(heads),
            },
            Inputs::Text(text) => BTreeMap::from([
                ("text.bytes".to_owned(), text.file_bytes as f64),
                ("text.tokens".to_owned(), text.len() as f64),
            ]),
            Inputs::Own(..) => BTreeMap::new(),
        }
    }
}

/// The passes of one cell.
pub(crate) struct Steps<'a> {
    inputs: &'a Inputs,
    session: &'a mut Session,
    context: usize,
    /// Tokens of a pass that takes several; empty for decode steps.
    batch: Vec<u32>,
}

impl Passes for Steps<'_> {
    fn ready(&mut self, step: usize) {
        // A trace has so many steps and no more: the first follows the last, where it followed the context.
        if self.batch.is_empty() && step > 0 && self.inputs.period().is_some_and(|n| step.is_multiple_of(n)) {
            self.session.rewind(self.context);
        }
    }

    fn pass(&mut self, step: usize) -> Result<(), WorkerError> {
        if self.batch.is_empty() {
            return self.inputs.decode(self.session, step);
        }
        // Every pass has the same work: that at the context.
        self.session.rewind(self.context);
        self.session.prefill_at_once(&self.batch)?;
        Ok(())
    }

    fn traffic(&self) -> Traffic {
        if !self.batch.is_empty() {
            // Prefill does not count what it reads.
            return Traffic::default();
        }
        let read = self.session.traffic();
        Traffic { kv_bytes: read.kv_bytes, index_bytes: read.index_bytes, rows: read.rows }
    }

    fn rewind(&mut self) -> u64 {
        self.session.rewind(self.context);
        self.session.attention().state_bytes()
    }
}

/// How the mass of the first step's queries lies, and how far their heaviest tokens are those of the other heads of the
/// group and of the next step, for the first head of each type: means over its query group.
fn statistics(session: &Session, heads: &[HeadWorkload], types: &[HeadType]) -> BTreeMap<String, f64> {
    let mut stats = BTreeMap::new();
    for (i, head) in heads.iter().enumerate() {
        let kind = types[i].name();
        if types[..i].contains(&types[i]) {
            continue;
        }
        let rope = session.rope();
        let angles = |positions: std::ops::Range<usize>| (rope.cos(positions.clone()), rope.sin(positions));
        let queries = head.statistics(0, angles);
        let overlap = head.overlap(0, angles);
        let mean = |of: fn(&HeadStatistics) -> Option<f64>| {
            let known: Vec<f64> = queries.iter().filter_map(of).collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
        };
        let all = [
            ("sink_mass", mean(|q| Some(q.sink_mass))),
            ("recent_mass", mean(|q| Some(q.recent_mass))),
            ("top_percent_mass", mean(|q| Some(q.top_percent_mass))),
            ("effective_tokens", mean(|q| Some(q.effective_tokens))),
            ("density_95", mean(|q| Some(q.density_95))),
            ("planted_mass", mean(|q| q.needle_mass)),
            ("noise_std", mean(|q| q.noise_std)),
            ("group_overlap", overlap.group),
            ("step_overlap", overlap.steps),
        ];
        let known = all.into_iter().filter_map(|(name, value)| Some((format!("{kind}.{name}"), value?)));
        stats.extend(known);
    }
    stats
}
