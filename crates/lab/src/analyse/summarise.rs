//! From the log to one record a cell. Every planned cell appears exactly once, whatever became of it.

use std::collections::{BTreeMap, HashMap};

use longbit_protocol::{Fill, Machine, Outcome, Quality, Ready, Sample, Status};

use super::verify::verify_violation;
use super::{interval, stats};
use crate::plan::{Plan, PlannedCell, SCHEMA};
use crate::record::Record;
use crate::run::store::Line;

/// What the log holds about one cell.
#[derive(Default)]
struct CellLog<'a> {
    /// By repetition; the first record of a repetition stands.
    samples: BTreeMap<u32, (&'a Sample, (usize, u32))>,
    quality: Option<&'a Quality>,
    end: Option<End<'a>>,
}

/// The last word on a cell.
enum End<'a> {
    Done(u32),
    Failed(&'a Outcome),
}

/// The log by cell and by cohort.
#[derive(Default)]
struct Index<'a> {
    cells: HashMap<&'a str, CellLog<'a>>,
    ready: BTreeMap<(usize, u32), &'a Ready>,
    probes: HashMap<(usize, usize), Vec<f64>>,
}

impl<'a> Index<'a> {
    fn new(lines: &'a [Line]) -> Self {
        let mut index = Index::default();
        for line in lines {
            match line {
                Line::Ready { cohort, attempt, ready } => {
                    index.ready.insert((*cohort, *attempt), ready);
                }
                Line::Probe { cohort, probe, .. } => {
                    index.probes.entry((*cohort, probe.threads)).or_default().push(probe.gb_s);
                }
                Line::Quality { quality } => {
                    index.cells.entry(&quality.cell).or_default().quality.get_or_insert(quality);
                }
                Line::Sample { cohort, attempt, sample } => {
                    let cell = index.cells.entry(&sample.cell).or_default();
                    cell.samples.entry(sample.rep).or_insert((sample, (*cohort, *attempt)));
                }
                Line::Failed { outcome } => {
                    index.cells.entry(&outcome.cell).or_default().end = Some(End::Failed(outcome));
                }
                Line::Done { cell, reps } => {
                    index.cells.entry(cell).or_default().end = Some(End::Done(*reps));
                }
            }
        }
        index
    }
}

/// One record for each cell of `plan`, in its order.
pub fn summarise(plan: &Plan, machine: &Machine, lines: &[Line]) -> Vec<Record> {
    let index = Index::new(lines);
    let mut cohort_of = HashMap::new();
    for (number, members) in plan.cohorts.iter().enumerate() {
        for &cell in members {
            cohort_of.insert(cell, number);
        }
    }
    let empty = CellLog::default();
    let record = |(place, cell): (usize, &PlannedCell)| {
        let log = index.cells.get(cell.id.as_str()).unwrap_or(&empty);
        summarise_cell(plan, machine, cell, cohort_of.get(&place).copied(), log, &index)
    };
    plan.cells.iter().enumerate().map(record).collect()
}

/// The repetitions of every cell, by cell and in order of repetition: the wall time of each token in nanoseconds.
pub fn token_times(lines: &[Line]) -> BTreeMap<String, Vec<Vec<u64>>> {
    let by_cell = Index::new(lines).cells;
    by_cell
        .into_iter()
        .map(|(id, log)| (id.to_owned(), log.samples.values().map(|(s, _)| s.tok_ns.clone()).collect()))
        .collect()
}

/// Status and reason of a cell.
fn verdict(plan: &Plan, cell: &PlannedCell, log: &CellLog<'_>) -> (Status, Option<String>) {
    if let Some(reason) = &cell.skip {
        return (Status::Skipped, Some(reason.clone()));
    }
    let wanted = plan.measure.reps;
    let found = log.samples.len();
    match &log.end {
        Some(End::Failed(outcome)) => (outcome.status, Some(outcome.error.clone())),
        None if found == 0 => (Status::Error, Some("not measured yet".to_owned())),
        None if found >= wanted as usize => (
            Status::Error,
            Some(format!("incomplete: {found} of {wanted} repetitions, but the cell was not closed")),
        ),
        None => (Status::Error, Some(format!("incomplete: {found} of {wanted} repetitions"))),
        // The closing line says more than the log holds: lines were lost, and the cell is not what it claims.
        Some(End::Done(reps)) if found < *reps as usize => (
            Status::Error,
            Some(format!("incomplete: {found} of {reps} repetitions, although the cell was closed")),
        ),
        Some(End::Done(_)) => {
            let tokens = plan.measure.passes(cell.batch).1;
            let short = log.samples.iter().find(|(_, (s, _))| s.tok_ns.len() != tokens);
            if let Some((rep, (sample, _))) = short {
                let n = sample.tok_ns.len();
                return (
                    Status::Error,
                    Some(format!("repetition {rep} has {n} timed tokens, expected {tokens}")),
                );
            }
            match plan
                .verify
                .as_ref()
                .filter(|_| cell.compares(&plan.measure))
                .and_then(|v| verify_violation(v, &cell.method, log.quality))
            {
                Some(why) => (Status::VerifyFailed, Some(why)),
                None => (Status::Ok, None),
            }
        }
    }
}

fn summarise_cell(
    plan: &Plan,
    machine: &Machine,
    cell: &PlannedCell,
    cohort: Option<usize>,
    log: &CellLog<'_>,
    index: &Index<'_>,
) -> Record {
    let (status, error) = verdict(plan, cell, log);
    let mut record = identity(plan, machine, cell, status, error);
    let samples: Vec<&Sample> = log.samples.values().map(|(s, _)| *s).collect();
    record.reps = samples.len() as u64;
    let batch = cell.batch as u64;
    record.tokens_timed = samples.iter().map(|s| s.tok_ns.len() as u64).sum::<u64>() * batch;
    record.tokens_warmup = record.reps * plan.measure.passes(cell.batch).0 as u64 * batch;

    // The worker that gave the first repetition, or the last one that served the cohort.
    let origin = log.samples.values().next().map(|(_, at)| *at);
    let ready = match (origin, cohort) {
        (Some(at), _) => index.ready.get(&at),
        (None, Some(c)) => index.ready.range((c, 0)..=(c, u32::MAX)).next_back().map(|(_, r)| r),
        (None, None) => None,
    };
    if let Some(ready) = ready {
        add_ready(&mut record, ready);
    }
    if let Some(quality) = log.quality {
        add_quality(&mut record, quality);
    }
    if record.measured() && !samples.is_empty() {
        add_times(&mut record, plan, &samples);
        // What a prefill reads is not counted.
        if cell.batch == 1 {
            add_traffic(&mut record, &samples);
        }
        add_process(&mut record, &samples);
        let probes = origin.map(|o| o.0).or(cohort).and_then(|c| index.probes.get(&(c, cell.threads)));
        add_bandwidth(&mut record, probes.map_or(&[], Vec::as_slice));
    }
    record
}

/// The columns that are known without a measurement; all others empty.
fn identity(
    plan: &Plan,
    machine: &Machine,
    cell: &PlannedCell,
    status: Status,
    error: Option<String>,
) -> Record {
    let model = if cell.model.path.is_empty() { &cell.model.preset } else { &cell.model.path };
    let built = &machine.toolchain;
    Record {
        schema_version: u64::from(SCHEMA),
        run_id: plan.run_id.clone(),
        cell_id: cell.id.clone(),
        experiment: plan.experiment.full_name(),
        status,
        error,
        context_tokens: cell.context as u64,
        threads: cell.threads as u64,
        kv_dtype: cell.kv_dtype.clone(),
        method: cell.method.clone(),
        // A map of texts always has a JSON form.
        method_params: serde_json::to_string(&cell.method_params).unwrap_or_default(),
        workload: cell.workload.clone(),
        model: model.clone(),
        head: cell.model.head.clone(),
        engine: plan.engine.clone(),
        engine_version: plan.engine_version.clone(),
        isa: None,
        model_sha256: None,
        fill: None,
        fill_sha256: None,
        seed: cell.seed,
        reps: 0,
        tokens_timed: 0,
        tokens_warmup: 0,
        fill_ns: None,
        decode_tok_s: None,
        tpot_p50_ns: None,
        tpot_p90_ns: None,
        tpot_p99_ns: None,
        tpot_p99_hi95_ns: None,
        tpot_mean_ns: None,
        tpot_mad_ns: None,
        tpot_min_ns: None,
        tpot_max_ns: None,
        tpot_p50_lo95_ns: None,
        tpot_p50_hi95_ns: None,
        drift_pct: None,
        steady: None,
        outliers: None,
        rel_l2_p50: None,
        rel_l2_p95: None,
        rel_l2_max: None,
        cosine_min: None,
        cosine_mean: None,
        needle_accuracy: None,
        top1_agreement: None,
        kl_nats: None,
        kv_bytes_stored: None,
        kv_bytes_read_per_token: None,
        index_bytes_read_per_token: None,
        index_bytes_stored: None,
        rows_read_per_token: None,
        weight_bytes_per_token: None,
        achieved_gb_s: None,
        probe_gb_s: None,
        roofline_fraction: None,
        rss_peak_bytes: None,
        rss_predicted_bytes: cell.predicted.worker_rss_bytes.max(cell.predicted.rss_bytes),
        user_ns: None,
        sys_ns: None,
        invol_switches: None,
        major_faults: None,
        steal_pct: None,
        throttled_ms: None,
        psi_cpu_pct: None,
        khz_min: None,
        khz_max: None,
        started_utc: None,
        wall_ms: None,
        machine_id: plan.machine_id.clone(),
        machine_class: plan.machine_class.clone(),
        git_sha: plan.git_sha.clone(),
        git_dirty: plan.git_dirty,
        rustc: built.rustc.clone(),
        target: built.target.clone(),
        profile: built.profile.clone(),
        kl_nats_max: None,
        logit_cosine_mean: None,
        logit_cosine_min: None,
        nll_nats: None,
        nll_reference_nats: None,
        quality_steps: None,
        batch: Some(cell.batch as u64),
        cosine_p5: None,
        attention_logit_error_max: None,
        kv_bytes_stored_per_token: None,
        append_ns: None,
        density_read: None,
        top95_density_head: None,
        top95_density_group: None,
        captured_mass_p50: None,
        captured_mass_p5: None,
        tail_mass_error_p50: None,
        tail_mass_error_p95: None,
        top95_recall_mean: None,
        top95_recall_p5: None,
        reads_samples: None,
        index_bytes_stored_per_token: None,
        index_build_ns: None,
        rel_l2_seed_mean: None,
        rel_l2_seed_sd: None,
        seeds: None,
        prefill_rel_l2_p50: None,
        prefill_rel_l2_p95: None,
        prefill_density: None,
    }
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn add_ready(record: &mut Record, ready: &Ready) {
    record.engine = ready.engine.clone();
    record.engine_version = ready.engine_version.clone();
    record.isa = text(&ready.isa);
    record.model_sha256 = text(&ready.model_sha256);
    record.fill_sha256 = text(&ready.fill_sha256);
    let fill = match ready.fill {
        Fill::Synthetic => "synthetic",
        Fill::Prefill => "prefill",
        Fill::Trace => "trace",
        Fill::None => "none",
    };
    record.fill = text(fill);
    record.fill_ns = Some(ready.fill_ns);
    record.kv_bytes_stored = Some(ready.kv_bytes_stored);
    let tokens = record.context_tokens;
    record.kv_bytes_stored_per_token = (tokens > 0).then(|| ready.kv_bytes_stored as f64 / tokens as f64);
    record.append_ns = ready.append_ns;
    record.weight_bytes_per_token = Some(ready.weight_bytes_per_token);
}

fn add_quality(record: &mut Record, quality: &Quality) {
    let known = |value: Option<f64>| value.and_then(finite);
    record.rel_l2_p50 = known(quality.rel_l2_p50);
    record.rel_l2_p95 = known(quality.rel_l2_p95);
    record.rel_l2_max = known(quality.rel_l2_max);
    record.cosine_min = known(quality.cosine_min);
    record.cosine_mean = known(quality.cosine_mean);
    record.cosine_p5 = known(quality.cosine_p5);
    record.attention_logit_error_max = known(quality.attention_logit_error_max);
    record.needle_accuracy = known(quality.needle_accuracy);
    record.top1_agreement = known(quality.top1_agreement);
    record.kl_nats = known(quality.kl_nats);
    record.kl_nats_max = known(quality.kl_nats_max);
    record.logit_cosine_mean = known(quality.logit_cosine_mean);
    record.logit_cosine_min = known(quality.logit_cosine_min);
    record.nll_nats = known(quality.nll_nats);
    record.nll_reference_nats = known(quality.nll_reference_nats);
    record.quality_steps = Some(u64::from(quality.steps));
    record.density_read = known(quality.density_read);
    if let Some(reads) = &quality.reads {
        record.top95_density_head = finite(reads.top_density_head);
        record.top95_density_group = finite(reads.top_density_group);
        record.captured_mass_p50 = finite(reads.captured_mass_p50);
        record.captured_mass_p5 = finite(reads.captured_mass_p5);
        record.tail_mass_error_p50 = finite(reads.tail_mass_error_p50);
        record.tail_mass_error_p95 = finite(reads.tail_mass_error_p95);
        record.top95_recall_mean = finite(reads.top_recall_mean);
        record.top95_recall_p5 = finite(reads.top_recall_p5);
        record.reads_samples = Some(reads.samples);
    }
    if let Some(seeds) = &quality.seeds {
        record.rel_l2_seed_mean = finite(seeds.rel_l2_mean);
        record.rel_l2_seed_sd = finite(seeds.rel_l2_sd);
        record.seeds = Some(u64::from(seeds.count));
    }
    if let Some(prefill) = &quality.prefill {
        record.prefill_rel_l2_p50 = finite(prefill.rel_l2_p50);
        record.prefill_rel_l2_p95 = finite(prefill.rel_l2_p95);
        record.prefill_density = finite(prefill.density);
    }
}

fn add_times(record: &mut Record, plan: &Plan, samples: &[&Sample]) {
    let ns = |value: f64| value.round() as u64;
    let times: Vec<f64> = samples.iter().flat_map(|s| &s.tok_ns).map(|&t| t as f64).collect();
    let sorted = stats::sorted(&times);
    let total: u64 = samples.iter().flat_map(|s| &s.tok_ns).sum();
    let medians: Vec<f64> = samples.iter().filter_map(|s| repetition_median(&s.tok_ns)).collect();
    record.decode_tok_s = (total > 0).then(|| record.tokens_timed as f64 / (total as f64 / 1e9));
    record.tpot_p50_ns = stats::median_of_sorted(&sorted).map(ns);
    record.tpot_p90_ns = stats::quantile_of_sorted(&sorted, 0.9).map(ns);
    if times.len() >= plan.min_samples_p99 as usize {
        record.tpot_p99_ns = stats::quantile_of_sorted(&sorted, stats::P99).map(ns);
    }
    record.tpot_p99_hi95_ns = interval::p99_upper_bound(&times).map(ns);
    record.tpot_mean_ns = stats::mean(&times).map(ns);
    record.tpot_mad_ns = stats::mad(&times).map(ns);
    record.tpot_min_ns = stats::min(&times).map(ns);
    record.tpot_max_ns = stats::max(&times).map(ns);
    if let Some(i) = interval::median_interval(&medians, 0.95) {
        record.tpot_p50_lo95_ns = Some(ns(i.lo));
        record.tpot_p50_hi95_ns = Some(ns(i.hi));
    }
    record.drift_pct = stats::drift_pct(&medians);
    record.steady = record.drift_pct.map(|d| d.abs() <= plan.max_drift_pct);
    record.outliers = stats::outliers(&times);
    record.wall_ms = Some(total as f64 / 1e6);
    record.started_utc =
        samples.iter().map(|s| s.t0.as_str()).filter(|t| !t.is_empty()).min().map(str::to_owned);
}

/// Median time per token of one repetition, in nanoseconds.
pub fn repetition_median(tok_ns: &[u64]) -> Option<f64> {
    stats::median(&tok_ns.iter().map(|&t| t as f64).collect::<Vec<_>>())
}

fn add_traffic(record: &mut Record, samples: &[&Sample]) {
    let tokens = record.tokens_timed;
    let per_token = |sum: u64| (tokens > 0).then(|| (sum + tokens / 2) / tokens);
    record.kv_bytes_read_per_token = per_token(samples.iter().map(|s| s.traffic.kv_bytes).sum());
    record.index_bytes_read_per_token = per_token(samples.iter().map(|s| s.traffic.index_bytes).sum());
    record.rows_read_per_token = per_token(samples.iter().map(|s| s.traffic.rows).sum());
    record.index_bytes_stored = samples.iter().map(|s| s.index_bytes).max();
    let context = record.context_tokens;
    record.index_bytes_stored_per_token =
        record.index_bytes_stored.filter(|_| context > 0).map(|bytes| bytes as f64 / context as f64);
    // A worker builds a state once, whatever it times with it.
    let mut built: Vec<u64> = samples.iter().filter_map(|s| s.index_build_ns).collect();
    built.dedup();
    let built: Vec<f64> = built.into_iter().map(|ns| ns as f64).collect();
    record.index_build_ns = stats::median(&built).map(|ns| ns.round() as u64);
}

fn add_process(record: &mut Record, samples: &[&Sample]) {
    // What no sample says stays empty: unknown is not zero.
    let sum = |f: fn(&Sample) -> Option<u64>| samples.iter().filter_map(|s| f(s)).reduce(u64::saturating_add);
    let some = |f: fn(&Sample) -> Option<f64>| samples.iter().filter_map(|s| f(s)).collect::<Vec<_>>();
    record.rss_peak_bytes = samples.iter().filter_map(|s| s.rss_peak_bytes).max().filter(|b| *b > 0);
    record.user_ns = sum(|s| s.user_ns);
    record.sys_ns = sum(|s| s.sys_ns);
    record.invol_switches = sum(|s| s.nivcsw);
    record.major_faults = sum(|s| s.majflt);
    record.steal_pct = stats::mean(&some(|s| s.steal_pct)).and_then(finite);
    record.psi_cpu_pct = stats::mean(&some(|s| s.psi_cpu_pct)).and_then(finite);
    let throttled: Vec<u64> = samples.iter().filter_map(|s| s.throttled_us).collect();
    record.throttled_ms = (!throttled.is_empty()).then(|| throttled.iter().sum::<u64>() as f64 / 1e3);
    record.khz_min = samples.iter().filter_map(|s| s.khz).map(|k| k.0).min();
    record.khz_max = samples.iter().filter_map(|s| s.khz).map(|k| k.1).max();
}

fn add_bandwidth(record: &mut Record, probes: &[f64]) {
    let bytes = record
        .weight_bytes_per_token
        .zip(record.kv_bytes_read_per_token)
        .map(|(w, kv)| w + kv + record.index_bytes_read_per_token.unwrap_or(0));
    let mean_ns =
        record.wall_ms.map(|ms| ms * 1e6 / record.tokens_timed.max(1) as f64).filter(|ns| *ns > 0.0);
    // Bytes per nanosecond are 10^9 bytes per second.
    record.achieved_gb_s = bytes.zip(mean_ns).map(|(b, ns)| b as f64 / ns);
    record.probe_gb_s = stats::median(probes).filter(|p| p.is_finite() && *p > 0.0);
    record.roofline_fraction = record.achieved_gb_s.zip(record.probe_gb_s).map(|(a, p)| a / p);
}

#[cfg(test)]
mod tests;
