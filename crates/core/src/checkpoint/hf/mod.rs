//! Directories as Hugging Face lays them out: `config.json` beside `model.safetensors`, or beside several files that
//! `model.safetensors.index.json` lists.

mod config;
mod files;
mod weights;

use std::path::Path;

use super::{Checkpoint, Container, OpenOptions};
use crate::error::Result;
use crate::files::read_text;
use crate::model::ModelConfig;
use config::CheckpointConfig;
use files::Tensors;
pub(super) use files::weight_files;

/// Largest `config.json` that is read (bytes).
const MAX_CONFIG: u64 = 1 << 20;

/// The shape, from `config.json` alone.
pub(super) fn config(dir: &Path, options: &OpenOptions) -> Result<ModelConfig> {
    Ok(read_config(dir, options)?.model)
}

pub(super) fn open(dir: &Path, options: &OpenOptions) -> Result<Checkpoint> {
    let config = read_config(dir, options)?;
    let tensors = Tensors::open(dir)?;
    let plan = weights::plan(&config, &tensors)?;
    Ok(Checkpoint {
        path: dir.to_path_buf(),
        container: Container::HuggingFace,
        config: config.model,
        files: tensors.into_files(),
        plan,
    })
}

fn read_config(dir: &Path, options: &OpenOptions) -> Result<CheckpointConfig> {
    let path = dir.join("config.json");
    CheckpointConfig::parse(&path, &read_text(&path, MAX_CONFIG)?, options)
}
