//! What an engine can do, as data: the runner checks experiments against it and `longbit list` prints it.

use serde::{Deserialize, Serialize};

/// Everything an engine offers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Name of the engine, e.g. `longbit`.
    pub engine: String,
    /// Its version; a result without one is refused.
    pub version: String,
    /// Instruction set that its kernels use on this machine.
    pub isa: String,
    /// Models with published shapes.
    pub presets: Vec<PresetInfo>,
    /// Number formats for cached keys and values.
    pub kv_dtypes: Vec<KvDtypeInfo>,
    /// Attention methods.
    pub methods: Vec<MethodInfo>,
    /// Workloads.
    pub workloads: Vec<WorkloadInfo>,
    /// Number formats of the output head.
    pub heads: Vec<String>,
    /// Byte orders of I2_S tensors that a user can name for files that do not tell.
    #[serde(default)]
    pub i2s: Vec<String>,
    /// Feed-forward non-linearities that a user can name for files that do not tell.
    #[serde(default)]
    pub activations: Vec<String>,
    /// Packings of ternary weights, as they are loaded first.
    #[serde(default)]
    pub weights: Vec<String>,
}

/// A model preset.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PresetInfo {
    /// Name, e.g. `bitnet-2b-4t`.
    pub name: String,
    /// One line.
    pub summary: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Shape, as `(name, value)` in reading order, e.g. `("hidden", 2560)`.
    pub shape: Vec<(String, u64)>,
}

/// A KV dtype.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KvDtypeInfo {
    /// Name, e.g. `bf16`.
    pub name: String,
    /// One line.
    pub summary: String,
    /// Bits stored for one cached number, scales included (head_dim 128).
    pub bits_per_value: f64,
}

/// An attention method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MethodInfo {
    /// Name, e.g. `window`.
    pub name: String,
    /// One line.
    pub summary: String,
    /// Its parameters with defaults.
    pub params: Vec<ParamInfo>,
}

/// A workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkloadInfo {
    /// Name, e.g. `mix`.
    pub name: String,
    /// One line.
    pub summary: String,
    /// Its parameters with defaults.
    pub params: Vec<ParamInfo>,
    /// It runs a text file through the model, so it needs one ([`crate::Job::text`]) and a checkpoint with a tokenizer.
    #[serde(default)]
    pub reads_text: bool,
    /// It replays a recorded file ([`crate::Job::trace`]), whose path stands in place of parameters: `file:PATH`.
    #[serde(default)]
    pub replays: bool,
    /// It times the product of one matrix and has neither cache nor attention: its cells have context 0, their KV dtype and
    /// method are `-`, and the model is a preset `matrix:ROWSxCOLS`.
    #[serde(default)]
    pub one_matrix: bool,
}

/// A parameter of a method or workload, written `name:key=value,key=value`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParamInfo {
    /// Key.
    pub name: String,
    /// One line, with the unit.
    pub summary: String,
    /// Type and range.
    pub kind: ParamKind,
    /// Default, as it would be written.
    pub default: String,
    /// A setting that every method takes: names leave it out where it has its default.
    #[serde(default)]
    pub setting: bool,
}

/// Type and range of a parameter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ParamKind {
    /// A whole number.
    Int {
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// A real number.
    Float {
        /// Smallest allowed.
        min: f64,
        /// Largest allowed.
        max: f64,
    },
    /// One of some words.
    Choice {
        /// The words.
        of: Vec<String>,
    },
    /// Layers by number or rule, joined by `+`.
    Layers,
}
