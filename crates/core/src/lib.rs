//! Ternary (BitNet b1.58) inference on CPUs.
//!
//! A [`Model`] is built from a preset or loaded from a checkpoint; a [`Session`] owns a KV cache and a thread team and
//! turns tokens into logits, with any KV dtype of [`kv::KV_FORMATS`] and any attention method of [`attention::METHODS`].
//! [`workload`] supplies queries, keys and values with stated statistics where no trained model is at hand, and
//! [`mod@reference`] is the readable forward pass that every fast path is held against.
//!
//! ```
//! use longbit::{HeadFormat, Model, Session, SessionOptions, preset};
//! let team = std::sync::Arc::new(longbit_sys::Team::new(1, false)?);
//! let model = Model::synthetic(preset("tiny")?, HeadFormat::Bf16, 1, &team)?;
//! let mut session = Session::new(model.into(), team.clone(), SessionOptions { capacity: 64, ..Default::default() })?;
//! session.prefill(&[1, 2, 3])?;
//! let logits = session.decode(4)?;
//! assert_eq!(logits.len(), 512);
//! # Ok::<(), longbit::Error>(())
//! ```

#![forbid(unsafe_code)]

pub mod attention;
mod checkpoint;
pub mod convert;
mod error;
mod estimate;
mod files;
pub mod formats;
pub mod gguf;
pub mod kv;
pub mod matrix;
mod model;
pub mod reference;
mod rng;
mod session;
pub mod text;
mod trace;
pub mod workload;

pub use checkpoint::{Checkpoint, Container, Listing, OpenOptions, TensorEntry, list};
pub use error::{Error, Result};
pub use estimate::{
    Footprint, PROCESS_BYTES, PlainShape, WeightFormat, footprint, largest_context, pass_bytes,
};
pub use model::{
    Activation, BlockMatrix, Compaction, Head, HeadFormat, Layer, Model, ModelBytes, ModelConfig, PRESETS,
    Packing, Preset, RopeTable, SparseFfn, Table, TableFormat, TernaryLinear, TwoStage, preset,
};
pub use session::{
    Captured, Op, OpTotal, PrefixCache, Profile, PromptAttention, Session, SessionOptions, Supplied, Traffic,
};
pub use trace::{Trace, TraceFormat, TraceRows, TraceShape, write_trace};

/// Name of the instruction set that models built in this process use: the best one, or what `LONGBIT_ISA` names.
///
/// # Errors
/// When the variable names what this machine lacks.
pub fn isa() -> Result<&'static str> {
    Ok(longbit_kernels::Kernels::from_env()?.isa().as_str())
}

/// Lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
