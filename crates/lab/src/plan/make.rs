//! Making a plan: cohorts, predictions, and what does not fit.

use std::collections::BTreeMap;
use std::path::Path;

use longbit_protocol::{
    Capabilities, Estimate, EstimateRequest, Fill, Machine, Measure, ModelSpec, Probe, TextFile, TraceFile,
};
use serde::Serialize;

use super::expand::{Selection, expand, select, short_hash};
use super::{Plan, PlannedCell, Predicted, RunLimits, SCHEMA, VerifySpec};
use crate::analyse::label::digits;
use crate::engine::Engine;
use crate::spec::units::show_bytes;
use crate::spec::{Experiment, MemoryLimit, OnExceed, resolve};
use crate::{Complaint, LabError, Result};

/// Read bandwidth that is assumed where none was measured, 10^9 bytes a second.
const ASSUMED_GB_S: f64 = 10.0;
/// Rate at which synthetic weights are generated or a file is loaded, and at which a cache is filled, bytes a second.
/// Rough on purpose: progress corrects it by what was observed.
const BUILD_BYTES_S: f64 = 0.5e9;
const FILL_BYTES_S: f64 = 0.25e9;
/// Rate at which the state of a method is built, or rows are weighed and evicted, in bytes of the cache a second. Measured with
/// two threads, by method: 0.1 to 5.
const STATE_BYTES_S: f64 = 0.7e9;
/// How much longer attention takes than reading its bytes at the measured bandwidth, and than reading those that decide what
/// else is read, which are few and are worked on hard. Measured with two threads from 8k to 96k tokens, by method: 1.5 to 3
/// for the former; for the latter 2 to 10, and several times that where an index is small.
const ATTEND: f64 = 2.0;
const DECIDE: f64 = 6.0;
/// Rate at which a thread runs a prompt through the model, multiply-adds a second; as rough.
const PREFILL_MACS_S: f64 = 6e10;

/// How many times longer a step takes with more threads than CPUs, roughly: barriers wait for time slices. Measured on two
/// CPUs: 1.1 to 1.3 for a 2B model with 3 to 8 threads, 2.7 for a tiny one with 3.
const OVERSUBSCRIBED: f64 = 1.5;

/// What the flags change about a plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlanOptions {
    /// Which cells.
    pub selection: Selection,
    /// Repetitions instead of those of the file; 0 measures quality alone.
    pub reps: Option<u32>,
    /// Seconds without progress after which a worker is killed, instead of that of the file.
    pub timeout_s: Option<f64>,
    /// Memory limit instead of that of the file.
    pub max_rss: Option<MemoryLimit>,
}

impl PlanOptions {
    /// The flags that give these options again, written for a shell.
    fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        let mut put = |flag: &str, value: &str| flags.push(format!("{flag} {}", quoted(value)));
        for filter in &self.selection.filters {
            put(if filter.not { "-F" } else { "-f" }, &filter.text);
        }
        self.selection.methods.iter().for_each(|m| put("-m", m));
        self.selection.set.iter().for_each(|s| put("--set", s));
        if let Some(reps) = self.reps {
            put("--reps", &reps.to_string());
        }
        match self.max_rss {
            Some(MemoryLimit::Bytes(bytes)) => put("--max-rss", &format!("{bytes}B")),
            Some(MemoryLimit::Percent(percent)) => put("--max-rss", &format!("{percent}%")),
            None => {}
        }
        flags
    }
}

/// A word as a shell takes it.
pub(crate) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// What decides the measurements of a plan, in the order in which it is hashed.
#[derive(Serialize)]
struct Decides<'a> {
    experiment: String,
    cells: Vec<&'a str>,
    measure: &'a Measure,
    min_samples_p99: u32,
    max_drift_pct: f64,
    verify: &'a Option<VerifySpec>,
    engine: &'a str,
    engine_version: &'a str,
    isa: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_limit: Option<usize>,
}

/// The plan of an experiment without predictions: enough to tell whether a directory already holds it.
///
/// # Errors
/// [`LabError::Invalid`] when the flags leave nothing or would measure nothing.
pub fn outline(
    experiment: &Experiment,
    capabilities: &Capabilities,
    machine: &Machine,
    options: &PlanOptions,
) -> Result<Plan> {
    let e = experiment;
    let measure = Measure { reps: options.reps.unwrap_or(e.measure.reps), ..e.measure.clone() };
    if measure.reps == 0 && measure.quality_steps == 0 {
        return Err(LabError::invalid(
            "without repetitions and without quality steps nothing is measured",
            e.meta.full_name(),
            "set measure.quality_steps",
        ));
    }
    let prefill_limit = e.text.as_ref().map(|t| t.prefill_limit);
    let mut cells = select(expand(e, machine.cpus_allowed)?, &options.selection, capabilities)?;
    if measure.reps == 0 {
        for cell in cells.iter_mut().filter(|c| !c.compares(&measure)) {
            cell.skip.get_or_insert_with(|| "its output is not compared, and nothing is timed".to_owned());
        }
    }
    let plan_hash = short_hash(&Decides {
        experiment: e.meta.full_name(),
        cells: cells.iter().map(|c| c.id.as_str()).collect(),
        measure: &measure,
        min_samples_p99: e.min_samples_p99,
        max_drift_pct: e.max_drift_pct,
        verify: &e.verify,
        engine: &capabilities.engine,
        engine_version: &capabilities.version,
        isa: &capabilities.isa,
        prefill_limit,
    })?;
    let now = jiff::Timestamp::now();
    let git_sha = machine.toolchain.git_sha.clone();
    let sha7: String = git_sha.chars().take(7).collect();
    let id8: String = machine.machine_id.chars().take(8).collect();
    let limit = options.max_rss.unwrap_or(e.max_rss);
    Ok(Plan {
        schema: SCHEMA,
        experiment: e.meta.clone(),
        plan_hash,
        run_id: format!("{}-{sha7}-{id8}", now.strftime("%Y%m%dT%H%M%SZ")),
        git_sha,
        git_dirty: machine.toolchain.git_dirty,
        created_utc: now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        machine_id: machine.machine_id.clone(),
        machine_class: machine.machine_class.clone(),
        engine: capabilities.engine.clone(),
        engine_version: capabilities.version.clone(),
        isa: capabilities.isa.clone(),
        flags: options.flags(),
        measure,
        min_samples_p99: e.min_samples_p99,
        max_drift_pct: e.max_drift_pct,
        gate: e.gate,
        verify: e.verify.clone(),
        prefill_limit,
        limits: RunLimits {
            cell_timeout_s: options.timeout_s.unwrap_or(e.cell_timeout_s),
            max_rss_bytes: limit.resolve(machine.memory_available_bytes),
        },
        cohorts: cohorts(&cells),
        cells,
    })
}

/// Predicts every cell through the engine, skips what cannot fit, cannot be or takes a prompt beyond the limit, and forms
/// the cohorts anew. `dir` is the directory of the experiment file.
///
/// # Errors
/// [`LabError::Engine`], and [`LabError::Invalid`] when the engine calls every cell impossible, or when a cell exceeds
/// the limit and the experiment says `refuse`.
pub fn predict(
    plan: &mut Plan,
    engine: &dyn Engine,
    on_exceed: OnExceed,
    probes: &[Probe],
    dir: &Path,
) -> Result<()> {
    let (measure, headroom) = (plan.measure.clone(), plan.headroom());
    // A text that cannot be read any more is the worker's to report.
    let bytes = |t: &TextFile| std::fs::metadata(resolve(dir, &t.path)).map_or(0, |m| m.len());
    let entry = |c: &PlannedCell| EstimateRequest {
        model: ModelSpec { path: resolve(dir, &c.model.path), ..c.model.clone() },
        context: c.context,
        headroom,
        kv_dtype: c.kv_dtype.clone(),
        method: c.method_string(),
        threads: c.threads,
        batch: c.batch,
        fill: match (&c.text, &c.trace) {
            (Some(_), _) => Fill::Prefill,
            (None, Some(_)) => Fill::Trace,
            (None, None) => Fill::Synthetic,
        },
        quality_steps: if c.compares(&measure) { measure.quality_steps } else { 0 },
        seeds: measure.seeds,
        text_bytes: c.text.as_ref().map_or(0, bytes),
        trace: c.trace.as_ref().map(|t| TraceFile { path: resolve(dir, &t.path), ..t.clone() }),
    };
    let entries: Vec<EstimateRequest> = plan.cells.iter().map(entry).collect();
    let estimates = engine.estimate(&entries)?;
    let limit = plan.limits.max_rss_bytes;
    let given: Vec<bool> = plan.cells.iter().map(|c| c.skip.is_some()).collect();
    let mut refused = Vec::new();
    for (cell, estimate) in plan.cells.iter_mut().zip(&estimates) {
        if let Some(error) = &estimate.error {
            cell.skip.get_or_insert_with(|| error.clone());
            continue;
        }
        cell.predicted = Predicted {
            rss_bytes: shared_bytes(estimate, &measure).saturating_add(own_bytes(estimate)),
            worker_rss_bytes: 0,
            kv_bytes_stored: estimate.cache_bytes,
            weight_bytes_per_token: estimate.weight_bytes_per_token,
            kv_bytes_per_token: estimate.kv_bytes_per_token,
            prefill_macs: estimate.prefill_macs,
            trained_positions: estimate.trained_positions,
            seconds: 0.0,
        };
        if let Some(allowed) = plan.prefill_limit.filter(|&allowed| cell.context > allowed) {
            let work = digits(estimate.prefill_macs as f64 / 1e12);
            cell.skip.get_or_insert_with(|| {
                format!(
                    "a prompt of {} tokens is longer than the limit of {allowed}, and would take {work} tera multiply-adds; \
                     raise workload.prefill_limit to run it",
                    cell.context
                )
            });
        }
        if cell.predicted.rss_bytes > limit && cell.skip.is_none() {
            let (need, have) = (show_bytes(cell.predicted.rss_bytes), show_bytes(limit));
            let reason = format!("predicted {need} exceeds the limit {have} (limits.max_rss)");
            if on_exceed == OnExceed::Refuse {
                let help = "drop the cell, raise limits.max_rss, or set on_exceed = \"skip\"";
                refused.push(Complaint {
                    what: reason.clone(),
                    at: cell.name.clone(),
                    help: help.to_owned(),
                });
            }
            cell.skip = Some(reason);
        }
    }
    // One cell that cannot be is a row; when none can, the mistake lies in what they share, e.g. the model's path.
    let open = |i: &usize| !given[*i];
    if let Some(first) = (0..given.len()).find(open).and_then(|i| estimates[i].error.as_ref())
        && (0..given.len()).filter(open).all(|i| estimates[i].error.is_some())
    {
        let what = format!("no cell can be measured: {first}");
        return Err(LabError::invalid(
            what,
            plan.experiment.full_name(),
            "check [model], [workload] and [axes]",
        ));
    }
    if !refused.is_empty() {
        return Err(LabError::Invalid(refused));
    }
    let need = |group: &[usize], cells: &[PlannedCell]| worker_bytes(group, cells, &estimates, &measure);
    plan.cohorts = cohorts(&plan.cells)
        .iter()
        .flat_map(|cohort| split(cohort, |group| need(group, &plan.cells) <= limit))
        .collect();
    for cohort in plan.cohorts.clone() {
        let bytes = need(&cohort, &plan.cells);
        cohort.iter().for_each(|&i| plan.cells[i].predicted.worker_rss_bytes = bytes);
        let shared = cohort.first().map_or(0.0, |&i| {
            let e = &estimates[i];
            let threads = cohort.iter().map(|&i| plan.cells[i].threads).max().unwrap_or(1);
            e.weight_bytes as f64 / BUILD_BYTES_S
                + e.fill_bytes as f64 / FILL_BYTES_S
                + e.prefill_macs as f64 / (PREFILL_MACS_S * threads as f64)
        });
        for &i in &cohort {
            let share = shared / cohort.len() as f64;
            plan.cells[i].predicted.seconds =
                share + seconds(&estimates[i], &measure, &plan.cells[i], probes);
        }
    }
    Ok(())
}

/// Seconds of timed and untimed tokens, of the comparison with the reference, and of the probes.
fn seconds(e: &Estimate, measure: &Measure, cell: &PlannedCell, probes: &[Probe]) -> f64 {
    let threads = cell.threads;
    let rate = 1e9 * bandwidth(probes, threads);
    let fits = probes.iter().map(|p| p.threads).max().is_none_or(|most| threads <= most);
    let slower = if fits { 1.0 } else { OVERSUBSCRIBED };
    let rows = e.kv_bytes_per_token.saturating_sub(e.decide_bytes_per_token) as f64;
    let attention = ATTEND * rows + DECIDE * e.decide_bytes_per_token as f64;
    let token = slower * (e.weight_bytes_per_token as f64 + attention) / rate;
    // The reference of a text decodes the same token; that of generated inputs was attended while the cache was filled, but
    // what was read is held against weights of all tokens.
    let reference = if e.prefill_macs > 0 { token } else { e.cache_bytes as f64 / rate };
    let compared = token + reference;
    let (warmup, timed) = measure.passes(cell.batch);
    let pass = token.max(slower * e.pass_macs as f64 / (PREFILL_MACS_S * threads as f64));
    let quality_steps = if cell.compares(measure) { measure.quality_steps } else { 0 };
    let seeds = if cell.method_params.contains_key("seed") { measure.seeds } else { 1 };
    let states = if quality_steps > 0 { f64::from(seeds.max(1)) } else { 1.0 };
    let state = if own_bytes(e) > 0 { e.cache_bytes as f64 / STATE_BYTES_S } else { 0.0 };
    states * state
        + f64::from(measure.reps) * (warmup + timed) as f64 * pass
        + f64::from(quality_steps) * f64::from(seeds) * compared
        + f64::from(measure.reps) * measure.probe_bytes as f64 / rate
}

/// Bandwidth with the nearest thread count that was measured and is not larger, else the smallest measured.
fn bandwidth(probes: &[Probe], threads: usize) -> f64 {
    let usable = || probes.iter().filter(|p| p.gb_s.is_finite() && p.gb_s > 0.0);
    let below = usable().filter(|p| p.threads <= threads).max_by_key(|p| p.threads);
    below.or_else(|| usable().min_by_key(|p| p.threads)).map_or(ASSUMED_GB_S, |p| p.gb_s)
}

/// Bytes that a worker has once, however many cells it serves.
fn shared_bytes(e: &Estimate, measure: &Measure) -> u64 {
    let parts = [e.cache_bytes, e.scratch_bytes, measure.probe_bytes];
    parts.into_iter().fold(e.weight_bytes, u64::saturating_add)
}

/// Bytes that a worker has for each of its methods, all at once, for their repetitions take turns.
fn own_bytes(e: &Estimate) -> u64 {
    e.index_bytes.saturating_add(e.forked_bytes)
}

/// Resident memory of a worker that serves the cells of `group`: cells of one method share its state.
fn worker_bytes(group: &[usize], cells: &[PlannedCell], estimates: &[Estimate], measure: &Measure) -> u64 {
    let shared = group.iter().map(|&i| shared_bytes(&estimates[i], measure)).max().unwrap_or(0);
    let mut states: BTreeMap<String, u64> = BTreeMap::new();
    for &i in group {
        let bytes = states.entry(cells[i].method_string()).or_default();
        *bytes = own_bytes(&estimates[i]).max(*bytes);
    }
    states.into_values().fold(shared, u64::saturating_add)
}

/// Cuts `cohort`, in its order, where a worker that serves all before the cut and the next cell would not fit.
fn split(cohort: &[usize], fits: impl Fn(&[usize]) -> bool) -> Vec<Vec<usize>> {
    let mut parts: Vec<Vec<usize>> = Vec::new();
    for &i in cohort {
        if let Some(part) = parts.last_mut() {
            part.push(i);
            if fits(part) {
                continue;
            }
            part.pop();
        }
        // A cell that does not fit alone was skipped before.
        parts.push(vec![i]);
    }
    parts
}

/// Indices of the cells that share a worker. Skipped cells are in none.
fn cohorts(cells: &[PlannedCell]) -> Vec<Vec<usize>> {
    let mut found: Vec<Vec<usize>> = Vec::new();
    for (i, cell) in cells.iter().enumerate().filter(|(_, c)| c.skip.is_none()) {
        match found.iter_mut().find(|g| g.first().is_some_and(|&j| cell.shares_cache(&cells[j]))) {
            Some(group) => group.push(i),
            None => found.push(vec![i]),
        }
    }
    found
}

/// Bytes that the results of a plan take on disk, roughly: the log and what is derived from it.
pub fn disk_bytes(plan: &Plan) -> u64 {
    let cells = plan.cells.iter().filter(|c| c.skip.is_none()).count() as u64;
    let sample = 600 + 9 * u64::from(plan.measure.gen_tokens);
    cells * (u64::from(plan.measure.reps) * sample + 2_500) + 1_000_000
}
