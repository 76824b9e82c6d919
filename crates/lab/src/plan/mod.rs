//! What is going to be measured: the cells of an experiment with their predicted cost, as stored in `plan.json`.

mod expand;
mod make;

use std::collections::BTreeMap;

use longbit_protocol::{Measure, ModelSpec, TextFile, TraceFile};
use serde::{Deserialize, Serialize};

use crate::spec::units::show_bytes;

pub use expand::{Filter, Selection, cell_id, expand, select};
pub(crate) use make::quoted;
pub use make::{PlanOptions, disk_bytes, outline, predict};

/// Version of `plan.json` and of the lines of `samples.jsonl`.
pub const SCHEMA: u32 = 1;

/// An expanded experiment. Written before the first sample and never changed afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The experiment in words.
    pub experiment: ExperimentMeta,
    /// 16 hexadecimal digits over everything that decides what is measured.
    pub plan_hash: String,
    /// Commit of the binary, or `unknown`.
    pub git_sha: String,
    /// The work tree differed from that commit; none where git was not there.
    pub git_dirty: Option<bool>,
    /// Stamp, commit and machine, e.g. `20260131T120000Z-0123456-89abcdef`.
    pub run_id: String,
    /// When the plan was made, RFC 3339 UTC.
    pub created_utc: String,
    /// See [`longbit_protocol::Machine::machine_id`].
    pub machine_id: String,
    /// See [`longbit_protocol::Machine::machine_class`].
    pub machine_class: String,
    /// Engine name.
    pub engine: String,
    /// Engine version.
    pub engine_version: String,
    /// Instruction set of the kernels; empty in plans of before it was stored.
    #[serde(default)]
    pub isa: String,
    /// Flags that chose the cells and how they are measured, each with its value; empty when there were none.
    #[serde(default)]
    pub flags: Vec<String>,
    /// How each cell is measured.
    pub measure: Measure,
    /// Below this many timed tokens the p99 columns stay empty.
    pub min_samples_p99: u32,
    /// A cell whose second half of repetitions differs from the first by more (percent) is not steady.
    pub max_drift_pct: f64,
    /// Thresholds of `check`.
    pub gate: Gate,
    /// Limits on the error of the cells.
    pub verify: Option<VerifySpec>,
    /// Longest context that is run through the model, where cells decode a text.
    #[serde(default)]
    pub prefill_limit: Option<usize>,
    /// Caps of the run.
    pub limits: RunLimits,
    /// The cells, in stable order.
    pub cells: Vec<PlannedCell>,
    /// Indices into `cells`: those that share model, context, KV dtype and workload, and a worker. Where one worker could not
    /// hold the states of all of them there are several. Skipped cells are in none.
    pub cohorts: Vec<Vec<usize>>,
}

impl Plan {
    /// Tokens that a cell decodes beyond its context, at the most: timed ones with those to warm up, or compared ones.
    pub(crate) fn headroom(&self) -> usize {
        (self.measure.gen_tokens + self.measure.warmup_tokens).max(self.measure.quality_steps) as usize
    }

    /// A sentence on the cells that have more threads than the `cpus` of this machine; none without such cells.
    pub fn beyond_cpus(&self, cpus: usize) -> Option<String> {
        let run = self.cells.iter().filter(|c| c.skip.is_none());
        let cost = oversubscribed(run.map(|c| c.threads).max()?, cpus)?;
        Some(format!("{cost}; --set threads={cpus} leaves such cells out"))
    }

    /// A sentence for each cohort that was split, for the states of all its methods would not fit in memory together.
    pub fn splits(&self) -> Vec<String> {
        let first = |cohort: &Vec<usize>| cohort.first().map(|&i| &self.cells[i]);
        let same = |a: &Vec<usize>, b: &Vec<usize>| match (first(a), first(b)) {
            (Some(a), Some(b)) => a.shares_cache(b),
            _ => false,
        };
        let parts = self.cohorts.chunk_by(same).filter(|parts| parts.len() > 1);
        let said = parts.filter_map(|parts| {
            let cell = first(&parts[0])?;
            let sizes: Vec<String> = parts
                .iter()
                .filter_map(|part| Some((part.len(), first(part)?.predicted.worker_rss_bytes)))
                .map(|(cells, bytes)| (cells, show_bytes(bytes)))
                .enumerate()
                .map(|(i, (n, bytes))| format!("{n}{} with {bytes}", if i == 0 { " cells" } else { "" }))
                .collect();
            Some(format!(
                "context {}, {}: the states of all cells do not fit in {} together, so workers follow one another, each of \
                 which fills the cache: {}. Cells of different workers are not interleaved.",
                cell.context,
                cell.kv_dtype,
                show_bytes(self.limits.max_rss_bytes),
                sizes.join(", ")
            ))
        });
        said.collect()
    }

    /// A sentence on the cells whose text goes beyond the positions that the model was trained for; none without such cells.
    /// Generated inputs have statistics of their own at every position.
    pub fn beyond_training(&self) -> Option<String> {
        let run: Vec<_> = self.cells.iter().filter(|c| c.skip.is_none()).collect();
        let beyond = |c: &&&PlannedCell| {
            let trained = c.predicted.trained_positions;
            c.text.is_some() && trained > 0 && c.context + self.headroom() > trained
        };
        let trained = run.iter().find(beyond)?.predicted.trained_positions;
        Some(format!(
            "{} of {} cells are beyond the {trained} positions that the model was trained for: their divergence and \
             perplexity say little.",
            run.iter().filter(beyond).count(),
            run.len()
        ))
    }
}

/// The experiment in words.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExperimentMeta {
    /// Folder below `experiments/`, or `main`.
    pub group: String,
    /// Name, lower-case letters, digits and `-`.
    pub name: String,
    /// The question that it answers.
    pub question: String,
    /// What to expect and what would refute it.
    pub analysis: String,
    /// SHA-256 of the file.
    pub file_sha256: String,
    /// The file as it was named, relative to where the program was started; empty when it lay elsewhere.
    #[serde(default)]
    pub file: String,
}

impl ExperimentMeta {
    /// `group/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }
}

/// Thresholds beyond which `check` calls a change a regression.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gate {
    /// Median time per token, percent.
    pub tpot_p50_pct: f64,
    /// 99th percentile of the time per token, percent.
    pub tpot_p99_pct: f64,
    /// KV bytes read per token, percent (exact: 0).
    pub kv_bytes_pct: f64,
    /// Median relative L2 error, absolute.
    pub rel_l2_abs: f64,
    /// Mean cosine, absolute.
    pub cosine_abs: f64,
    /// Mean divergence of the next-token distribution, nats.
    pub kl_abs: f64,
    /// Share of steps whose most likely token is that of the reference, absolute.
    pub top1_abs: f64,
    /// Mean cosine of the logits, absolute.
    pub logit_cosine_abs: f64,
    /// Mean negative log-likelihood of the text, nats.
    pub nll_abs: f64,
}

impl Default for Gate {
    fn default() -> Self {
        Gate {
            tpot_p50_pct: 5.0,
            tpot_p99_pct: 15.0,
            kv_bytes_pct: 0.0,
            rel_l2_abs: 0.0005,
            cosine_abs: 0.001,
            kl_abs: 0.0005,
            top1_abs: 0.001,
            logit_cosine_abs: 0.001,
            nll_abs: 0.0005,
        }
    }
}

/// Limits on the error against exact attention, or against the reference where a text is decoded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VerifySpec {
    /// Smallest allowed `Quality::cosine_min`.
    pub cosine_min: Option<f64>,
    /// Largest allowed `Quality::rel_l2_max`.
    pub rel_l2_max: Option<f64>,
    /// Largest allowed `Quality::kl_nats_max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_nats_max: Option<f64>,
    /// Smallest allowed `Quality::top1_agreement`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1_min: Option<f64>,
    /// What a violation does.
    pub on_fail: OnFail,
    /// Methods (bare names) that it applies to; empty means all.
    pub methods: Vec<String>,
}

/// What a violated [`VerifySpec`] does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFail {
    /// The cell is measured, and its row says `verify_failed`.
    #[default]
    Mark,
    /// The run stops after the cohort.
    Stop,
}

/// Caps of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunLimits {
    /// Seconds without a sample, a quality record or progress after which a worker is killed, and seconds that all
    /// repetitions of one cell may take.
    pub cell_timeout_s: f64,
    /// Largest allowed predicted resident memory of a worker, bytes.
    pub max_rss_bytes: u64,
}

/// One point of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedCell {
    /// 16 hexadecimal digits of the canonical configuration.
    pub id: String,
    /// For people: `group/experiment/context=8192/threads=2/kv=bf16/method=window:sinks=4,window=1024`.
    pub name: String,
    /// The model.
    pub model: ModelSpec,
    /// Cached tokens when a step is timed.
    pub context: usize,
    /// Threads of the decode team.
    pub threads: usize,
    /// Tokens that a timed pass takes together; 1 in plans of before it was stored.
    #[serde(default = "one")]
    pub batch: usize,
    /// KV dtype.
    pub kv_dtype: String,
    /// Attention method, bare name.
    pub method: String,
    /// All its parameters, defaults filled in.
    pub method_params: BTreeMap<String, String>,
    /// Workload with its parameters.
    pub workload: String,
    /// The text that is decoded, its path as the experiment file writes it.
    #[serde(default)]
    pub text: Option<TextFile>,
    /// The trace that is replayed, its path as the experiment file writes it.
    #[serde(default)]
    pub trace: Option<TraceFile>,
    /// Seed of the workload.
    pub seed: u64,
    /// Predicted cost.
    pub predicted: Predicted,
    /// Set when the cell is not run: the reason, with the number.
    pub skip: Option<String>,
}

fn one() -> usize {
    1
}

/// Predicted cost of a cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// Resident memory of a worker that serves this cell alone, bytes.
    pub rss_bytes: u64,
    /// Resident memory of the worker that serves the cell with the others of its cohort, bytes; 0 in skipped cells, and in plans
    /// of before it was stored.
    #[serde(default)]
    pub worker_rss_bytes: u64,
    /// The KV cache, bytes.
    pub kv_bytes_stored: u64,
    /// Weights and head read by a decode step, bytes.
    pub weight_bytes_per_token: u64,
    /// Cache and index read by a decode step, bytes.
    pub kv_bytes_per_token: u64,
    /// Multiply-adds of the prompts that the cell's worker runs through the model; 0 where a generator fills the cache.
    #[serde(default)]
    pub prefill_macs: u64,
    /// Positions that the model was trained for; 0 where that is not known.
    #[serde(default)]
    pub trained_positions: usize,
    /// Seconds of measurement, with the cell's share of building the model and filling the cache.
    pub seconds: f64,
}

impl PlannedCell {
    /// Whether one filled cache serves this cell and `other`.
    pub(crate) fn shares_cache(&self, other: &PlannedCell) -> bool {
        (&self.model, self.context, &self.kv_dtype, &self.workload, self.seed)
            == (&other.model, other.context, &other.kv_dtype, &other.workload, other.seed)
    }

    /// Whether its output is compared: that of decode steps is, that of a batch or of one matrix is not.
    pub fn compares(&self, measure: &Measure) -> bool {
        measure.quality_steps > 0 && self.batch == 1 && self.method != NO_METHOD
    }

    /// Method with its parameters as the engine takes it, e.g. `window:sinks=4,window=1024`.
    pub fn method_string(&self) -> String {
        method_string(&self.method, &self.method_params)
    }
}

/// What stands in place of a method and of a KV dtype where there is neither cache nor attention.
pub const NO_METHOD: &str = "-";

/// What more threads than CPUs cost, in words; none where all can run at once.
pub fn oversubscribed(threads: usize, cpus: usize) -> Option<String> {
    (threads > cpus).then(|| {
        format!(
            "{threads} threads on {cpus} CPU{}: each barrier waits for a time slice, so decoding gets slower with them, small \
             models several times",
            if cpus == 1 { "" } else { "s" }
        )
    })
}

/// `name:key=value,key=value`, or the bare name without parameters.
pub fn method_string(name: &str, params: &BTreeMap<String, String>) -> String {
    if params.is_empty() {
        return name.to_owned();
    }
    let params: Vec<String> = params.iter().map(|(k, v)| format!("{k}={v}")).collect();
    format!("{name}:{}", params.join(","))
}

#[cfg(test)]
mod tests;
