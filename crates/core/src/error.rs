//! The one error type of the crate: what went wrong, where, and how to mend it.

use std::path::PathBuf;

/// Everything that can go wrong between a file on disk and a vector of logits.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The operating system refused something.
    #[error(transparent)]
    Sys(#[from] longbit_sys::SysError),
    /// `LONGBIT_ISA` asks for what this machine does not have.
    #[error(transparent)]
    Isa(#[from] longbit_kernels::IsaError),
    /// A text that describes a checkpoint (`config.json`, the index of its files) is malformed, or describes what this
    /// crate does not run.
    #[error("{path}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A checkpoint file is damaged as a container.
    #[error("{path} is not a valid safetensors file: {reason}")]
    Container {
        /// The file.
        path: PathBuf,
        /// What the parser saw.
        reason: String,
    },
    /// A GGUF file is damaged as a container, or a key has another type than it should.
    #[error("{path}: {source}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What the parser saw.
        source: crate::gguf::GgufError,
    },
    /// A file could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tensor is missing or does not fit the configuration.
    #[error("{path}: tensor `{tensor}` {reason}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is wrong with it and what was expected.
        reason: String,
    },
    /// A name that no table lists.
    #[error("there is no {kind} `{name}`{hint} known: {known}")]
    Unknown {
        /// What kind of name, e.g. `preset`.
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// Which name may have been meant: what stands between the name and the list.
        hint: String,
        /// The names that exist.
        known: String,
    },
    /// A parameter string such as `window:sinks=4` is malformed.
    #[error("`{text}`: {reason}")]
    Parameter {
        /// The whole string.
        text: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab} (ids 0 to {})", vocab - 1)]
    Token {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The model's output is not a distribution.
    #[error(
        "the model's output is not finite: the logit of token {token} is {value}; the weights are damaged or a number \
         format overflows: try f32 keys and values, or another copy of the model"
    )]
    NotFinite {
        /// The first token with such a logit.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// A key or a value that the KV cache cannot hold.
    #[error(
        "layer {layer}, KV head {kv_head}, position {position}: a {what} is {value}, which `{dtype}` cannot hold; {}",
        if value.is_finite() {
            "use a KV dtype with a wider range, such as bf16"
        } else {
            "the weights are damaged or a computation overflows"
        }
    )]
    Unstorable {
        /// `key` or `value`.
        what: &'static str,
        /// Layer.
        layer: usize,
        /// KV head of the layer.
        kv_head: usize,
        /// Position of the token.
        position: usize,
        /// The number.
        value: f32,
        /// The KV dtype of this side.
        dtype: String,
    },
    /// The KV cache is full.
    #[error(
        "the KV cache holds {capacity} tokens and {wanted} were asked for; make the session with a larger capacity"
    )]
    CacheFull {
        /// Tokens that fit.
        capacity: usize,
        /// Tokens needed.
        wanted: usize,
    },
    /// A request that makes no sense for this session.
    #[error("{0}")]
    Invalid(String),
}

/// Shorthand of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// [`Error::Unknown`] for `name`, which is none of `known`.
    pub fn unknown<'a>(kind: &'static str, name: &str, known: impl Iterator<Item = &'a str> + Clone) -> Self {
        let near = known
            .clone()
            .map(|k| (strsim::damerau_levenshtein(name, k), k))
            .min()
            .filter(|(distance, k)| *distance <= 1 + name.chars().count().min(k.chars().count()) / 3);
        Error::Unknown {
            kind,
            name: name.into(),
            hint: near.map_or_else(|| ";".into(), |(_, near)| format!(": did you mean `{near}`?")),
            known: known.collect::<Vec<_>>().join(", "),
        }
    }
}
