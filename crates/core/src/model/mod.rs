//! Models: shapes, weights in the layout that the kernels read, and the two ways to get them: a preset with seeded
//! synthetic weights, or a checkpoint on disk.

mod build;
mod config;
mod hf;
mod presets;
mod rope;
mod synthetic;
mod weights;

use hf::read_text;

pub use config::{Activation, CheckpointConfig, ModelConfig, ScaleUse};
pub use presets::{PRESETS, Preset, preset};
pub use rope::RopeTable;
pub use weights::{Head, HeadFormat, Layer, Model, ModelBytes, Table, TernaryLinear};
