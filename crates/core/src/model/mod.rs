//! Models: shapes, weights in the layout that the kernels read, and presets with seeded synthetic weights. Models on
//! disk are the business of [`crate::checkpoint`].

pub(crate) mod build;
mod compact;
mod config;
mod linear;
mod presets;
mod rope;
mod sparse;
mod synthetic;
pub(crate) mod two_stage;
mod weights;

pub use compact::Compaction;
pub use config::{Activation, ModelConfig};
pub use linear::{Packing, TernaryLinear};
pub use presets::{PRESETS, Preset, preset};
pub use rope::RopeTable;
pub use sparse::SparseFfn;
pub use two_stage::TwoStage;
pub use weights::{BlockMatrix, Head, HeadFormat, Layer, Model, ModelBytes, Table, TableFormat};
