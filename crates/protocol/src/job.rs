//! What the runner asks of an engine.

use serde::{Deserialize, Serialize};

use crate::Fill;

/// One request, one engine process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// List presets, KV dtypes, methods and workloads. Answer: one [`crate::Event::Capabilities`].
    Capabilities,
    /// Predict bytes for each entry. Answer: one [`crate::Event::Estimates`], same order.
    Estimate {
        /// The configurations to predict.
        entries: Vec<EstimateRequest>,
    },
    /// Measure read bandwidth. Answer: one [`crate::Event::Probe`] a thread count.
    Probe {
        /// Thread counts to measure, in order.
        threads: Vec<usize>,
        /// Size of the buffer that is read; larger than the last-level cache to mean anything.
        bytes: u64,
    },
    /// Measure a cohort of cells. Answer: the events of [`crate::Event`] from `Ready` to `End`.
    Measure(Box<Job>),
}

/// Which model an engine builds or loads.
///
/// What is not given is left out of the JSON, so that the identity of a cell does not change when a field is added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Name of a preset (exact published shapes, seeded synthetic ternary weights), or empty when `path` is given.
    #[serde(default)]
    pub preset: String,
    /// A checkpoint directory or file, or empty for a preset. In a plan as the experiment file writes it, in a request as
    /// the engine can open it.
    #[serde(default)]
    pub path: String,
    /// Number format of the output head, e.g. `bf16` or `int8`.
    pub head: String,
    /// Seed of the synthetic weights.
    #[serde(default)]
    pub seed: u64,
    /// SHA-256 that the checkpoint must have, 64 lower-case hexadecimal digits; empty: any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sha256: String,
    /// Byte order of I2_S tensors, of [`crate::Capabilities::i2s`]; empty: as the file says.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub i2s: String,
    /// Feed-forward non-linearity, of [`crate::Capabilities::activations`]; empty: as the file says.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub activation: String,
    /// How the ternary weights are packed after loading, of [`crate::Capabilities::weights`]; empty: as they are loaded.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub weights: String,
}

/// A text file whose tokens fill the cache and are decoded, in place of generated queries, keys and values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextFile {
    /// The file, UTF-8. In a plan as the experiment file writes it, in a request as the engine can open it.
    pub path: String,
    /// SHA-256 of its bytes, lower-case hexadecimal; an engine refuses another text.
    pub sha256: String,
}

/// Largest text file (bytes) that is taken for one: it is read and tokenised whole.
pub const MAX_TEXT_BYTES: u64 = 64 << 20;

/// A recorded trace of attention that cells replay, in place of generated queries, keys and values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceFile {
    /// The file. In a plan as the experiment file writes it, in a request as the engine can open it.
    pub path: String,
    /// SHA-256 of its bytes, lower-case hexadecimal; an engine refuses another file.
    pub sha256: String,
}

/// Largest trace (bytes) that is taken for one: it is hashed whole, and never copied.
pub const MAX_TRACE_BYTES: u64 = 256 << 30;

/// A cohort: the cells that share model, context, KV dtype and workload, so that one cache fill serves them all and
/// their repetitions interleave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Must equal [`crate::PROTOCOL`].
    pub protocol: u32,
    /// The model all cells run.
    pub model: ModelSpec,
    /// Tokens in the KV cache when a decode step is timed.
    pub context: usize,
    /// KV dtype of all cells, e.g. `bf16`.
    pub kv_dtype: String,
    /// Where queries, keys and values come from, e.g. `mix`, `gaussian:…` or `file:sha256=…`.
    pub workload: String,
    /// The text, where the workload reads one (see [`crate::WorkloadInfo::reads_text`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextFile>,
    /// The trace, where the workload replays one (see [`crate::WorkloadInfo::replays`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceFile>,
    /// Seed of the workload and of the order of cells in a round.
    pub seed: u64,
    /// The cells, in the order of the plan.
    pub cells: Vec<CellJob>,
    /// How they are measured.
    pub measure: Measure,
    /// Caps that the engine sets on itself first.
    pub limits: Limits,
}

/// One cell of a cohort.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellJob {
    /// The cell's identity (hash of its canonical configuration), echoed in every event about it.
    pub id: String,
    /// Threads of the decode team.
    pub threads: usize,
    /// Method with its parameters, e.g. `window:sinks=4,window=1024`.
    pub method: String,
    /// Tokens that a timed pass takes together. 1 is a decode step; more are a prefill of as many tokens at the context, dense
    /// and causal, after which the cache is rewound, and their quality is not measured.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub batch: usize,
    /// Repetitions that an earlier run already recorded; the engine goes on with this one.
    #[serde(default)]
    pub first_rep: u32,
    /// Quality was recorded by an earlier run and is not measured again.
    #[serde(default)]
    pub quality_done: bool,
}

fn one() -> usize {
    1
}

fn is_one(batch: &usize) -> bool {
    *batch == 1
}

fn one_seed() -> u32 {
    1
}

fn is_one_seed(seeds: &u32) -> bool {
    *seeds == 1
}

/// How a cell is measured. Fixed before the first sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// Repetitions a cell, interleaved over the cohort.
    pub reps: u32,
    /// Timed tokens a repetition; afterwards the cache is rewound to `context`. Passes of a batch are as many as hold them.
    pub gen_tokens: u32,
    /// Untimed tokens before them.
    pub warmup_tokens: u32,
    /// Decode steps whose output is compared: that of attention with exact attention on generated inputs, or the logits with
    /// those of the reference where a text is decoded; 0 measures no quality.
    pub quality_steps: u32,
    /// Seeds with which a method that draws at random, one with a parameter `seed`, is compared, beside its own: 1 to this
    /// many. 1 compares it as it is.
    #[serde(default = "one_seed", skip_serializing_if = "is_one_seed")]
    pub seeds: u32,
    /// Pin thread i of a team to the i-th allowed CPU.
    pub pin: bool,
    /// Buffer of the read-bandwidth probe that accompanies each round.
    pub probe_bytes: u64,
}

impl Measure {
    /// Untimed and timed passes of a repetition that take `batch` tokens each.
    pub fn passes(&self, batch: usize) -> (usize, usize) {
        let of = |tokens: u32| (tokens as usize).div_ceil(batch.max(1));
        (of(self.warmup_tokens), of(self.gen_tokens))
    }
}

/// Caps on an engine process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Address space (bytes) that the process may map.
    #[serde(default)]
    pub address_space_bytes: Option<u64>,
}

/// A configuration whose bytes are to be predicted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EstimateRequest {
    /// The model.
    pub model: ModelSpec,
    /// Cached tokens.
    pub context: usize,
    /// Tokens decoded beyond `context` before the cache is rewound.
    pub headroom: usize,
    /// KV dtype.
    pub kv_dtype: String,
    /// Method with parameters.
    pub method: String,
    /// Threads.
    pub threads: usize,
    /// See [`CellJob::batch`].
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub batch: usize,
    /// How the cache will be filled.
    #[serde(default)]
    pub fill: Fill,
    /// See [`Measure::quality_steps`].
    #[serde(default)]
    pub quality_steps: u32,
    /// See [`Measure::seeds`].
    #[serde(default = "one_seed", skip_serializing_if = "is_one_seed")]
    pub seeds: u32,
    /// Bytes of the text, where one fills the cache.
    #[serde(default)]
    pub text_bytes: u64,
    /// The trace, where one fills the cache; only its layout is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceFile>,
}

/// Predicted bytes of a configuration, or why it cannot be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Weights, head and tables.
    pub weight_bytes: u64,
    /// The KV cache at `context + headroom`.
    pub cache_bytes: u64,
    /// State of the method beside the cache.
    pub index_bytes: u64,
    /// Pages of the cache that the cell has for itself, beside the cache that all cells of a cohort share: a method that evicts
    /// works in a fork of it. 0 for others.
    #[serde(default)]
    pub forked_bytes: u64,
    /// Everything else the process touches.
    pub scratch_bytes: u64,
    /// Weights and head read by one decode step.
    pub weight_bytes_per_token: u64,
    /// Cache and index read by one decode step.
    pub kv_bytes_per_token: u64,
    /// The part of it that is read to decide what else is.
    #[serde(default)]
    pub decide_bytes_per_token: u64,
    /// Bytes that filling the cache computes and writes (to predict its time); 0 where a prompt fills it.
    pub fill_bytes: u64,
    /// Multiply-adds of the prompts that must run through the model: into the cells' own cache, and into that of the
    /// reference where the two differ; 0 where a generator fills the cache.
    #[serde(default)]
    pub prefill_macs: u64,
    /// Multiply-adds of one pass of a batch; 0 for a decode step.
    #[serde(default)]
    pub pass_macs: u64,
    /// Positions that the model was trained for; 0 where that is not known.
    #[serde(default)]
    pub trained_positions: usize,
    /// Set when the configuration is impossible; the numbers are then zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
