//! Cohort by cohort: one worker serves all unfinished cells; when it breaks, each is tried alone, so that the culprit
//! becomes a row and nothing else is lost.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use longbit_protocol::{
    CellJob, Event, Job, Limits, ModelSpec, Outcome, PROTOCOL, Quality, Sample, Status, TextFile, TraceFile,
};

use super::directory::Directory;
use super::progress::{Progress, short};
use super::store::{CellState, Line, Store, states};
use super::{exit_of, wanted};
use crate::analyse::verify::verify_violation;
use crate::engine::{Engine, Next, death, out_of_memory};
use crate::plan::{OnFail, Plan};
use crate::spec::resolve;
use crate::{Exit, Result};

/// Address space that a worker needs beside what the plan counts: its own code, stacks, allocator arenas.
const ADDRESS_SLACK: u64 = 2 << 30;

pub(super) struct Scheduler<'a> {
    engine: &'a dyn Engine,
    plan: &'a Plan,
    store: Store,
    directory: Directory,
    progress: Progress<'a>,
    states: BTreeMap<String, CellState>,
    /// Index of each planned cell by identity.
    index: BTreeMap<&'a str, usize>,
    /// Next number of a worker, by cohort.
    attempts: Vec<u32>,
    /// A cell violates `[verify]`.
    violated: bool,
    /// SHA-256 of the model that the log speaks of; empty before the first worker stood.
    model: String,
    /// Directory of the experiment file: paths of the plan are relative to it.
    pub(super) dir: PathBuf,
    /// See [`super::RunOptions::fail_fast`].
    pub(super) fail_fast: bool,
    /// See [`super::RunOptions::retry_failed`].
    pub(super) retry_failed: bool,
}

/// How a worker ended.
enum End {
    /// It said so.
    Finished,
    /// A cell was over its time and has its row; the worker was ended, the others go on in a new one.
    Overdue,
    /// It broke. `ready` tells whether the cache stood; before that the cells cannot differ.
    Broken { status: Status, error: String, ready: bool, cause: Cause },
}

/// What broke a worker.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// It said that the request cannot be served.
    Request,
    /// Somebody asked it to end, which says nothing about its cells.
    Stopped,
    /// It died, fell silent, or broke the protocol.
    Fault,
}

/// Signals with which a process is asked to end: hang-up, interrupt, quit, terminate. (The kernel's killer sends 9.)
const STOPS: [i32; 4] = [1, 2, 3, 15];

/// As many workers must die one after another before any of their cells had its turn, until the others are given up: what they
/// share is then to blame.
const HOPELESS: u32 = 2;

impl<'a> Scheduler<'a> {
    pub(super) fn new(
        engine: &'a dyn Engine,
        plan: &'a Plan,
        store: Store,
        lines: &[Line],
        directory: Directory,
        progress: Progress<'a>,
    ) -> Self {
        let mut attempts = vec![0; plan.cohorts.len()];
        let (mut violated, mut model) = (false, String::new());
        let index: BTreeMap<&str, usize> = wanted(plan).map(|i| (plan.cells[i].id.as_str(), i)).collect();
        for line in lines {
            if let Line::Ready { ready, .. } = line {
                model.clone_from(&ready.model_sha256);
            }
            match line {
                Line::Ready { cohort, attempt, .. }
                | Line::Sample { cohort, attempt, .. }
                | Line::Probe { cohort, attempt, .. } => {
                    if let Some(next) = attempts.get_mut(*cohort) {
                        *next = (*next).max(attempt.saturating_add(1));
                    }
                }
                Line::Quality { quality } => {
                    let method = index.get(quality.cell.as_str()).map(|&i| plan.cells[i].method.as_str());
                    violated |= method
                        .zip(plan.verify.as_ref())
                        .is_some_and(|(m, v)| verify_violation(v, m, Some(quality)).is_some());
                }
                Line::Failed { .. } | Line::Done { .. } => {}
            }
        }
        Scheduler {
            engine,
            plan,
            store,
            directory,
            progress,
            states: states(lines),
            index,
            attempts,
            violated,
            model,
            dir: PathBuf::new(),
            fail_fast: false,
            retry_failed: false,
        }
    }

    /// Measures what is not measured yet.
    pub(super) fn run(&mut self) -> Result<Exit> {
        if self.retry_failed {
            for state in self.states.values_mut().filter(|s| s.end.is_some_and(|e| e != Status::Ok)) {
                state.end = None;
            }
        }
        let left: usize = (0..self.plan.cohorts.len()).map(|c| self.pending(c).len()).sum();
        self.directory.note(&format!("run {}: {left} cells to measure", self.plan.run_id))?;
        let before: f64 = wanted(self.plan).map(|i| self.seconds_done(i)).sum();
        self.progress.resumed(before);
        let cohorts = self.plan.cohorts.len();
        for cohort in 0..cohorts {
            // A kill between the last sample of a cell and its `Done` leaves nothing to measure.
            for i in self.pending(cohort) {
                self.close(i)?;
            }
            let pending = self.pending(cohort);
            if !pending.is_empty() {
                let ended = self.cohort(cohort, &pending);
                if ended.is_err() {
                    self.progress.finish();
                }
                ended?;
                let cell = &self.plan.cells[pending[0]];
                let done = pending.iter().filter(|&&i| self.state(i).end == Some(Status::Ok)).count();
                self.progress.cohort(cohort + 1, cohorts, cell, done, pending.len());
            }
            if self.violated && self.plan.verify.as_ref().is_some_and(|v| v.on_fail == OnFail::Stop) {
                self.progress.say("stopped: a cell violates [verify], and on_fail is \"stop\"");
                break;
            }
            if self.fail_fast && self.any_failed() {
                self.progress.say("stopped: a cell failed, and --fail-fast was given");
                break;
            }
        }
        self.progress.finish();
        self.directory.note("finished")?;
        Ok(exit_of(self.plan, &self.states, self.violated))
    }

    fn any_failed(&self) -> bool {
        wanted(self.plan).any(|i| self.state(i).end.is_some_and(|e| e != Status::Ok))
    }

    fn state(&self, i: usize) -> CellState {
        self.states.get(&self.plan.cells[i].id).cloned().unwrap_or_default()
    }

    fn pending(&self, cohort: usize) -> Vec<usize> {
        self.plan.cohorts[cohort].iter().copied().filter(|&i| self.state(i).end.is_none()).collect()
    }

    fn wants_quality(&self, i: usize) -> bool {
        self.plan.cells[i].compares(&self.plan.measure)
    }

    /// Predicted seconds of one part of a cell: a repetition or the quality record.
    fn part_seconds(&self, i: usize) -> f64 {
        let parts = self.plan.measure.reps + u32::from(self.wants_quality(i));
        self.plan.cells[i].predicted.seconds / f64::from(parts.max(1))
    }

    fn seconds_done(&self, i: usize) -> f64 {
        let state = self.state(i);
        match state.end {
            Some(_) => self.plan.cells[i].predicted.seconds,
            None => self.part_seconds(i) * (state.reps.len() as f64 + f64::from(u8::from(state.quality))),
        }
    }

    fn cohort(&mut self, cohort: usize, pending: &[usize]) -> Result<()> {
        let mut pending = pending.to_vec();
        let (status, error, ready, cause) = loop {
            match self.attempt(cohort, &pending)? {
                End::Finished => return self.unanswered(cohort),
                End::Overdue => pending = self.pending(cohort),
                End::Broken { status, error, ready, cause } => break (status, error, ready, cause),
            }
            if pending.is_empty() || self.fail_fast {
                return Ok(());
            }
        };
        let left = self.pending(cohort);
        self.directory.note(&format!("cohort {cohort}: {error}"))?;
        // Without a cache no cell had its turn, and a request that fails as a whole fails again.
        if left.len() <= 1 || (cause == Cause::Request && !ready) {
            return self.fail_all(&left, status, &error);
        }
        let early = |ready: bool, cause: Cause| !ready && cause != Cause::Stopped;
        let mut deaths = u32::from(early(ready, cause));
        self.progress
            .say(&format!("worker: {error}; its {} unfinished cells are tried one by one", left.len()));
        for (n, &i) in left.iter().enumerate() {
            if self.fail_fast && self.any_failed() {
                break;
            }
            match self.attempt(cohort, &[i])? {
                End::Finished => {
                    deaths = 0;
                    self.unanswered_cell(i)?;
                }
                End::Overdue => deaths = 0,
                End::Broken { status, error, ready, cause } => {
                    self.directory
                        .note(&format!("cohort {cohort}, {}: {error}", short(&self.plan.cells[i])))?;
                    if self.state(i).end.is_none() {
                        self.fail(i, status, &error)?;
                    }
                    deaths = if early(ready, cause) { deaths + 1 } else { 0 };
                    if deaths >= HOPELESS || (cause == Cause::Request && !ready) {
                        return self.fail_all(&left[n + 1..], status, &error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Cells that the engine passed over without a word.
    fn unanswered(&mut self, cohort: usize) -> Result<()> {
        for i in self.pending(cohort) {
            self.unanswered_cell(i)?;
        }
        Ok(())
    }

    fn unanswered_cell(&mut self, i: usize) -> Result<()> {
        let state = self.state(i);
        if state.end.is_some() {
            return Ok(());
        }
        let (have, reps) = (state.reps.len(), self.plan.measure.reps);
        let quality = if self.wants_quality(i) && !state.quality { ", and no quality record" } else { "" };
        self.fail(i, Status::Error, &format!("the engine ended after {have} of {reps} repetitions{quality}"))
    }

    /// Why an unfinished cell has had its time: its repetitions so far took longer than the limit of a cell.
    fn overdue(&self, i: usize, limit: Duration) -> Option<String> {
        let state = self.state(i);
        let spent = Duration::from_nanos(state.timed_ns);
        (state.end.is_none() && spent > limit).then(|| {
            format!(
                "{} of {} repetitions took {:.1} s, more than {} s (limits.cell_timeout)",
                state.reps.len(),
                self.plan.measure.reps,
                spent.as_secs_f64(),
                self.plan.limits.cell_timeout_s
            )
        })
    }

    fn fail_all(&mut self, cells: &[usize], status: Status, error: &str) -> Result<()> {
        cells.iter().try_for_each(|&i| self.fail(i, status, error))
    }

    fn fail(&mut self, i: usize, status: Status, error: &str) -> Result<()> {
        let cell = &self.plan.cells[i];
        let rest = cell.predicted.seconds - self.seconds_done(i);
        let outcome = Outcome { cell: cell.id.clone(), status, error: error.to_owned() };
        self.store.append(&Line::Failed { outcome })?;
        self.states.entry(cell.id.clone()).or_default().end = Some(status);
        self.progress.advance(rest);
        self.progress.say(&format!("{}: {}: {error}", status.as_str(), short(cell)));
        Ok(())
    }

    /// One worker for these cells.
    fn attempt(&mut self, cohort: usize, cells: &[usize]) -> Result<End> {
        let attempt = self.attempts[cohort];
        self.attempts[cohort] += 1;
        let job = self.job(cells);
        let mut running = self.engine.start(&job)?;
        let limit = Duration::try_from_secs_f64(self.plan.limits.cell_timeout_s).unwrap_or(Duration::MAX);
        let mut since = Instant::now();
        let mut at = (String::new(), 0);
        let mut ready = false;
        let broken =
            |status, error: String, ready| Ok(End::Broken { status, error, ready, cause: Cause::Fault });
        loop {
            let event = match running.next(limit.saturating_sub(since.elapsed())) {
                Next::Event(event) => event,
                Next::TimedOut => {
                    running.kill();
                    let seconds = self.plan.limits.cell_timeout_s;
                    return broken(
                        Status::Timeout,
                        format!("no progress for {seconds} s (limits.cell_timeout)"),
                        ready,
                    );
                }
                Next::Garbled(what) => {
                    running.kill();
                    return broken(Status::Error, what, ready);
                }
                Next::Exited { code, signal, stderr_tail } => {
                    let status = died_of(code, signal, &stderr_tail);
                    if !stderr_tail.trim().is_empty() {
                        self.directory.note(&format!("standard error of the worker:\n{stderr_tail}"))?;
                    }
                    let stopped = signal.is_some_and(|signal| STOPS.contains(&signal));
                    let cause = if stopped { Cause::Stopped } else { Cause::Fault };
                    let error = death(code, signal, &stderr_tail);
                    return Ok(End::Broken { status, error, ready, cause });
                }
            };
            // Only what brings the job nearer to its end counts as progress.
            let progressed = match &event {
                Event::Phase { what, done, .. } => {
                    let now = (what.clone(), *done);
                    std::mem::replace(&mut at, now.clone()) != now
                }
                Event::Probe(_) => false,
                _ => true,
            };
            if progressed {
                since = Instant::now();
            }
            match event {
                Event::Phase { what, done, total } => self.progress.phase(&what, done, total),
                Event::Ready(r) => {
                    if !self.model.is_empty() && self.model != r.model_sha256 {
                        running.kill();
                        let error = format!(
                            "the model has changed since the result was begun: its SHA-256 is {}, it was {}; restore it, or \
                             start anew with --fresh",
                            r.model_sha256, self.model
                        );
                        let (status, cause) = (Status::Error, Cause::Request);
                        return Ok(End::Broken { status, error, ready, cause });
                    }
                    self.model.clone_from(&r.model_sha256);
                    ready = true;
                    self.store.append(&Line::Ready { cohort, attempt, ready: r })?;
                }
                Event::Probe(probe) => self.store.append(&Line::Probe { cohort, attempt, probe })?,
                Event::Sample(sample) => {
                    let cell = self.find(cells, &sample.cell);
                    if let Err(error) = self.sample(cohort, attempt, cells, *sample)? {
                        running.kill();
                        return broken(Status::Error, error, ready);
                    }
                    if let Some(i) = cell
                        && let Some(error) = self.overdue(i, limit)
                    {
                        running.kill();
                        self.fail(i, Status::Timeout, &error)?;
                        return Ok(End::Overdue);
                    }
                }
                Event::Quality(quality) => {
                    if let Err(error) = self.quality(cells, *quality)? {
                        running.kill();
                        return broken(Status::Error, error, ready);
                    }
                }
                Event::Failed(outcome) => match self.find(cells, &outcome.cell) {
                    Some(i) if self.state(i).end.is_none() => self.fail(i, outcome.status, &outcome.error)?,
                    Some(_) => {}
                    None => return broken(Status::Error, stranger(&outcome.cell), ready),
                },
                Event::End => return Ok(End::Finished),
                Event::Fatal { status, error } => {
                    return Ok(End::Broken { status, error, ready, cause: Cause::Request });
                }
                Event::Capabilities(_) | Event::Estimates { .. } => {
                    let error = "the engine answered a question that was not asked".to_owned();
                    return broken(Status::Error, error, ready);
                }
            }
        }
    }

    fn job(&self, cells: &[usize]) -> Job {
        let first = &self.plan.cells[cells[0]];
        Job {
            protocol: PROTOCOL,
            model: ModelSpec { path: resolve(&self.dir, &first.model.path), ..first.model.clone() },
            context: first.context,
            kv_dtype: first.kv_dtype.clone(),
            workload: first.workload.clone(),
            text: first.text.as_ref().map(|t| TextFile { path: resolve(&self.dir, &t.path), ..t.clone() }),
            trace: first.trace.as_ref().map(|t| TraceFile { path: resolve(&self.dir, &t.path), ..t.clone() }),
            seed: first.seed,
            cells: cells
                .iter()
                .map(|&i| {
                    let (cell, state) = (&self.plan.cells[i], self.state(i));
                    CellJob {
                        id: cell.id.clone(),
                        threads: cell.threads,
                        batch: cell.batch,
                        method: cell.method_string(),
                        first_rep: state.next_rep().min(self.plan.measure.reps),
                        quality_done: state.quality,
                    }
                })
                .collect(),
            measure: self.plan.measure.clone(),
            limits: Limits { address_space_bytes: Some(self.address_space(cells)) },
        }
    }

    /// Addresses that the worker of `cells` may map: states that grow take up to twice the addresses of what they hold.
    fn address_space(&self, cells: &[usize]) -> u64 {
        let predicted = || cells.iter().map(|&i| self.plan.cells[i].predicted);
        let together = predicted().map(|p| p.worker_rss_bytes).max().unwrap_or(0);
        let least = predicted().map(|p| p.rss_bytes).min().unwrap_or(0);
        let room = self.plan.limits.max_rss_bytes.saturating_add(ADDRESS_SLACK);
        room.saturating_add(together.saturating_sub(least))
    }

    fn find(&self, cells: &[usize], id: &str) -> Option<usize> {
        self.index.get(id).copied().filter(|i| cells.contains(i))
    }

    /// Records a repetition. The inner error is a breach of the protocol.
    fn sample(
        &mut self,
        cohort: usize,
        attempt: u32,
        cells: &[usize],
        sample: Sample,
    ) -> Result<Result<(), String>> {
        let Some(i) = self.find(cells, &sample.cell) else { return Ok(Err(stranger(&sample.cell))) };
        let state = self.state(i);
        if state.end.is_some() || state.reps.contains(&sample.rep) || sample.rep >= self.plan.measure.reps {
            return Ok(Ok(()));
        }
        // Fewer tokens than asked for is a failure that looks like a fast success.
        let (have, want) = (sample.tok_ns.len(), self.plan.measure.passes(self.plan.cells[i].batch).1);
        if have != want {
            let of = if self.plan.cells[i].batch == 1 { "tokens" } else { "passes" };
            let error = format!("repetition {} timed {have} of {want} {of}", sample.rep);
            return self.fail(i, Status::Error, &error).map(Ok);
        }
        let seconds = self.part_seconds(i);
        self.progress.sample(&self.plan.cells[i], &sample, seconds);
        self.states.entry(self.plan.cells[i].id.clone()).or_default().add(&sample);
        self.store.append(&Line::Sample { cohort, attempt, sample: Box::new(sample) })?;
        self.close(i).map(Ok)
    }

    /// Records the quality of a cell. The inner error is a breach of the protocol.
    fn quality(&mut self, cells: &[usize], quality: Quality) -> Result<Result<(), String>> {
        let Some(i) = self.find(cells, &quality.cell) else { return Ok(Err(stranger(&quality.cell))) };
        let state = self.state(i);
        if state.end.is_some() || state.quality {
            return Ok(Ok(()));
        }
        let cell = &self.plan.cells[i];
        let verify = self.plan.verify.as_ref();
        if let Some(why) = verify.and_then(|v| verify_violation(v, &cell.method, Some(&quality))) {
            self.violated = true;
            self.progress.say(&format!("verify_failed: {}: {why}", short(cell)));
        }
        self.progress.advance(self.part_seconds(i));
        self.store.append(&Line::Quality { quality: Box::new(quality) })?;
        self.states.entry(cell.id.clone()).or_default().quality = true;
        self.close(i).map(Ok)
    }

    /// Writes `Done` once a cell has everything that the plan asks for.
    fn close(&mut self, i: usize) -> Result<()> {
        let state = self.state(i);
        let reps = self.plan.measure.reps;
        if state.end.is_none() && state.next_rep() >= reps && (state.quality || !self.wants_quality(i)) {
            let cell = self.plan.cells[i].id.clone();
            self.store.append(&Line::Done { cell: cell.clone(), reps })?;
            self.states.entry(cell).or_default().end = Some(Status::Ok);
        }
        Ok(())
    }
}

fn stranger(id: &str) -> String {
    format!("the engine answered about cell {id:?}, which is not in its job")
}

/// Memory exhaustion shows itself in two ways: the allocator aborts and says so, or the kernel kills without a word.
fn died_of(code: Option<i32>, signal: Option<i32>, stderr_tail: &str) -> Status {
    let says_so = out_of_memory(stderr_tail).is_some();
    // 9 is SIGKILL; a shell between would report it as 128 + 9. The runner's own kill is reported as a time-out.
    if says_so || signal == Some(9) || code == Some(137) { Status::Oom } else { Status::Error }
}
