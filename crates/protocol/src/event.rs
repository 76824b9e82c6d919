//! What an engine answers, one JSON line an event.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::{Capabilities, Estimate};

/// One line of an engine's standard output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Answer to `Capabilities`.
    Capabilities(Box<Capabilities>),
    /// Answer to `Estimate`.
    Estimates {
        /// One for each entry of the request.
        estimates: Vec<Estimate>,
    },
    /// Measured read bandwidth (answer to `Probe`, and once a thread count and round of a measurement).
    Probe(Probe),
    /// Something long goes on; for progress display only.
    Phase {
        /// What, e.g. `filling the cache`.
        what: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// The model stands and the cache is filled; samples follow.
    Ready(Box<Ready>),
    /// Quality of one cell.
    Quality(Box<Quality>),
    /// One timed repetition.
    Sample(Box<Sample>),
    /// A cell that cannot be measured; the others go on.
    Failed(Outcome),
    /// Every cell of the job was answered.
    End,
    /// The whole request failed.
    Fatal {
        /// `oom` when memory ran out, otherwise `error`.
        status: Status,
        /// What, where, and how to mend it.
        error: String,
    },
}

/// How a cell ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Measured.
    Ok,
    /// Not run: the plan predicted that it cannot fit.
    Skipped,
    /// Ran past its time limit.
    Timeout,
    /// Ran out of memory.
    Oom,
    /// Its output disagrees with the reference.
    VerifyFailed,
    /// Reserved for cells too noisy by a rule fixed beforehand; nothing gives it yet.
    Unstable,
    /// Anything else; the reason is beside it.
    Error,
}

impl Status {
    /// The word used in records, e.g. `verify_failed`.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Skipped => "skipped",
            Status::Timeout => "timeout",
            Status::Oom => "oom",
            Status::VerifyFailed => "verify_failed",
            Status::Unstable => "unstable",
            Status::Error => "error",
        }
    }
}

/// A cell's end, when it is not a full set of samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The cell.
    pub cell: String,
    /// How it ended.
    pub status: Status,
    /// The reason.
    pub error: String,
}

/// What stood when the samples began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// Engine name.
    pub engine: String,
    /// Engine version.
    pub engine_version: String,
    /// Instruction set in use.
    pub isa: String,
    /// SHA-256 that identifies the model (file, or preset, head and seed).
    pub model_sha256: String,
    /// Weights and head read by one decode step.
    pub weight_bytes_per_token: u64,
    /// Bytes of the filled cache (rows only, at `context` tokens).
    pub kv_bytes_stored: u64,
    /// How the cache was filled.
    pub fill: Fill,
    /// SHA-256 of the bytes of the filled cache; the same seed gives the same on every machine.
    pub fill_sha256: String,
    /// Time to build or load the model.
    pub build_ns: u64,
    /// Time to fill the cache, with the digest of its rows and, where a generator fills it, exact attention of the compared
    /// steps.
    pub fill_ns: u64,
    /// Time to append the keys and values of one token to every layer and head with one thread: encoding and writing, mean over
    /// some tokens, median of rounds; none where no generator supplies them.
    #[serde(default)]
    pub append_ns: Option<u64>,
    /// Bytes of anonymous huge pages in use, where the system says.
    #[serde(default)]
    pub huge_page_bytes: Option<u64>,
    /// Statistics of the workload, by name (see the workload's documentation).
    #[serde(default)]
    pub workload_stats: BTreeMap<String, f64>,
}

/// How a cache was filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// By a workload generator.
    #[default]
    Synthetic,
    /// By running the prompt through the model.
    Prefill,
    /// From a recorded trace.
    Trace,
    /// Not at all: it is empty, or there is none.
    None,
}

/// Measured read bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Threads that read.
    pub threads: usize,
    /// 10^9 bytes a second.
    pub gb_s: f64,
    /// Round of the measurement that it accompanies.
    #[serde(default)]
    pub round: u32,
}

/// Stands for an error, a divergence or a negative log-likelihood that is not finite, for which JSON has no number.
pub const NOT_FINITE: f64 = 1e150;

/// Whether a figure of [`Quality`] is not finite, or a mean that holds [`NOT_FINITE`]. No finite logits or outputs give
/// one half as large.
pub fn is_not_finite(figure: f64) -> bool {
    !figure.is_finite() || figure.abs() >= 1e100
}

/// How far a cell is from exact: its attention outputs from exact f32 attention on the same queries, keys and values
/// where a generator supplies them, its logits from those of the reference where a text is decoded. The reference is dense
/// attention over a bf16 cache, with the same weights, head and tokens. Where a cell's output is not finite its errors are
/// [`NOT_FINITE`] and its cosine is -1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// The cell.
    pub cell: String,
    /// Decode steps compared.
    pub steps: u32,
    /// Outputs compared: steps x layers x query heads, or steps where logits are compared.
    pub outputs: u64,
    /// Relative L2 error of an attention output, median over outputs.
    #[serde(default)]
    pub rel_l2_p50: Option<f64>,
    /// 95th percentile.
    #[serde(default)]
    pub rel_l2_p95: Option<f64>,
    /// Largest.
    #[serde(default)]
    pub rel_l2_max: Option<f64>,
    /// Cosine of an attention output with the exact one, mean over outputs.
    #[serde(default)]
    pub cosine_mean: Option<f64>,
    /// 5th percentile.
    #[serde(default)]
    pub cosine_p5: Option<f64>,
    /// Smallest.
    #[serde(default)]
    pub cosine_min: Option<f64>,
    /// Largest difference of a logit that attention sees, `q . k / sqrt(head_dim)`, between rows as they are cached and as they
    /// were made: over compared steps, layers, query heads and all tokens of the context.
    #[serde(default)]
    pub attention_logit_error_max: Option<f64>,
    /// Median relative L2 error by head type of the workload.
    #[serde(default)]
    pub rel_l2_by_head: BTreeMap<String, f64>,
    /// How the rows that the method read lie against exact softmax; none where no generator supplies the queries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<Reads>,
    /// How the median relative L2 error varies with the seed of a method that draws at random; none for others, or where one
    /// seed was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seeds: Option<SeedSpread>,
    /// What tokens of a prompt give under the method's pattern; none where they see everything, and where no generator supplies
    /// their queries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<PrefillQuality>,
    /// Rows that a decode step attended, of those in the cache, mean over compared steps, layers and KV heads: the density
    /// of a query group, whose heads share what they read.
    #[serde(default)]
    pub density_read: Option<f64>,
    /// Share of needle outputs whose readout names the planted value, where the workload plants any.
    #[serde(default)]
    pub needle_accuracy: Option<f64>,
    /// Share of steps whose most likely token is that of the reference (of equals the lowest id).
    #[serde(default)]
    pub top1_agreement: Option<f64>,
    /// Kullback-Leibler divergence of the next-token distribution from that of the reference, KL(reference || cell), nats,
    /// mean over steps.
    #[serde(default)]
    pub kl_nats: Option<f64>,
    /// Largest.
    #[serde(default)]
    pub kl_nats_max: Option<f64>,
    /// Cosine of the logits with those of the reference, mean over steps.
    #[serde(default)]
    pub logit_cosine_mean: Option<f64>,
    /// Smallest.
    #[serde(default)]
    pub logit_cosine_min: Option<f64>,
    /// Negative log-likelihood of the token that really follows, nats, mean over steps.
    #[serde(default)]
    pub nll_nats: Option<f64>,
    /// The same of the reference.
    #[serde(default)]
    pub nll_reference_nats: Option<f64>,
}

/// Share of the softmax mass that the true top set of a query head holds; see [`Reads`].
pub const TOP_P: f64 = 0.95;

/// What a method read against the exact softmax of the same queries over the keys as they were made, for some (layer, KV
/// head)s and the first of the compared steps. A sample is one query head at one step; masses are shares of the whole
/// softmax. The top set of a sample is the fewest tokens that hold [`TOP_P`] of it.
///
/// The tokens of a sample are those of the cache at that step. Attended are those whose own rows entered the output: the spans
/// that the whole group attends, and rows that the method attends itself for this head. Its tail is what the method accounts
/// for itself, by an estimate or by rows under weights of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reads {
    /// Samples.
    pub samples: u64,
    /// Mass of the attended tokens, median over samples.
    pub captured_mass_p50: f64,
    /// 5th percentile.
    pub captured_mass_p5: f64,
    /// Mass that the method gives to its tail less the true mass of all tokens beyond the spans, without the sign: median.
    /// Without a tail it is what was missed.
    pub tail_mass_error_p50: f64,
    /// 95th percentile.
    pub tail_mass_error_p95: f64,
    /// Share of the tokens of the top set that were attended: mean.
    pub top_recall_mean: f64,
    /// 5th percentile.
    pub top_recall_p5: f64,
    /// Share of all tokens that are in the top set: mean.
    pub top_density_head: f64,
    /// Share of all tokens that are in the top set of any query head of a group: mean.
    pub top_density_group: f64,
}

/// Attention outputs of the last tokens of a prompt, under the pattern that a method gives to prompts, against dense attention on
/// the same queries and the same cached rows: for some layers and all of their query heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrefillQuality {
    /// Outputs compared: tokens x layers x query heads.
    pub outputs: u64,
    /// Relative L2 error of an output, median.
    pub rel_l2_p50: f64,
    /// 95th percentile.
    pub rel_l2_p95: f64,
    /// Rows that the tokens see, of those before them and their own.
    pub density: f64,
}

/// How a figure of a method that draws at random varies with its seed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SeedSpread {
    /// Seeds: 1 and those that follow.
    pub count: u32,
    /// Median relative L2 error, mean over seeds.
    pub rel_l2_mean: f64,
    /// Its standard deviation, of the sample.
    pub rel_l2_sd: f64,
}

/// Bytes and rows that the attention of a decode step really read, counted by the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes of cached keys and values.
    pub kv_bytes: u64,
    /// Bytes of indexes and summaries.
    pub index_bytes: u64,
    /// Cached tokens attended exactly, summed over layers and KV heads.
    pub rows: u64,
}

/// One timed repetition of a cell.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The cell.
    pub cell: String,
    /// Repetition, from 0.
    pub rep: u32,
    /// Round of the cohort.
    pub round: u32,
    /// Place in the round.
    pub slot: u32,
    /// Start, RFC 3339 UTC.
    pub t0: String,
    /// Wall time of each token; of a batch, of each pass.
    pub tok_ns: Vec<u64>,
    /// User time of the process during the repetition; this and what follows is none where the system does not say.
    #[serde(default)]
    pub user_ns: Option<u64>,
    /// System time of the process.
    #[serde(default)]
    pub sys_ns: Option<u64>,
    /// Voluntary context switches.
    #[serde(default)]
    pub nvcsw: Option<u64>,
    /// Involuntary context switches.
    #[serde(default)]
    pub nivcsw: Option<u64>,
    /// Minor page faults.
    #[serde(default)]
    pub minflt: Option<u64>,
    /// Major page faults.
    #[serde(default)]
    pub majflt: Option<u64>,
    /// Peak resident bytes of the process so far.
    #[serde(default)]
    pub rss_peak_bytes: Option<u64>,
    /// Share of CPU time stolen by the host during the repetition, percent; none where the system does not say.
    #[serde(default)]
    pub steal_pct: Option<f64>,
    /// Time throttled by the control group.
    #[serde(default)]
    pub throttled_us: Option<u64>,
    /// Pressure-stall share of the window, percent.
    #[serde(default)]
    pub psi_cpu_pct: Option<f64>,
    /// Lowest and highest clock of a CPU, kHz.
    #[serde(default)]
    pub khz: Option<(u64, u64)>,
    /// Attention traffic, summed over the timed tokens.
    pub traffic: Traffic,
    /// Bytes of method state at the end of the repetition.
    #[serde(default)]
    pub index_bytes: u64,
    /// Time to build that state from the filled cache with one thread, for all layers and KV heads; measured once a worker.
    #[serde(default)]
    pub index_build_ns: Option<u64>,
}
