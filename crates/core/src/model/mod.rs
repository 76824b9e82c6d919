//! Models: shapes, weights in the layout that the kernels read, and presets with seeded synthetic weights. Models on
//! disk are the business of [`crate::checkpoint`].

pub(crate) mod build;
mod config;
mod presets;
mod rope;
mod synthetic;
mod weights;

pub use config::{Activation, ModelConfig};
pub use presets::{PRESETS, Preset, preset};
pub use rope::RopeTable;
pub use weights::{Head, HeadFormat, Layer, Model, ModelBytes, Table, TableFormat, TernaryLinear};
