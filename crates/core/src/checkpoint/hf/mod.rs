//! Directories as Hugging Face lays them out: `config.json` beside `model.safetensors`, or beside several files that
//! `model.safetensors.index.json` lists.

mod config;
mod files;
mod weights;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::{Checkpoint, Container, OpenOptions};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use config::CheckpointConfig;
use files::Tensors;

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

/// Reads a text that describes a model, of at most `most` bytes.
fn read_text(path: &Path, most: u64) -> Result<String> {
    let fail = |source| Error::Read { path: path.into(), source };
    let refuse = |reason| Error::Config { path: path.into(), reason };
    // Asked before opening: to open a named pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        return Err(refuse("is not a regular file".into()));
    }
    let mut text = String::new();
    File::open(path).map_err(fail)?.take(most + 1).read_to_string(&mut text).map_err(fail)?;
    if text.len() as u64 > most {
        return Err(refuse(format!("has more than {most} bytes, the most that is read")));
    }
    Ok(text)
}
