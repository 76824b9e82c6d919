//! Model files as people have them on disk: which tensors they hold, what those mean, and how they become a
//! [`Model`](crate::Model).
//!
//! A [`Checkpoint`] is opened first: the files are mapped, the configuration is read, and every tensor that the
//! architecture needs is found and checked against it, before any memory is asked for. `hf` and `gguf` know names and
//! conventions and end in one [`plan::WeightPlan`]; `load` builds the model from any plan.

mod ahead;
pub(crate) mod gguf;
mod hf;
mod inspect;
mod load;
mod master;
mod plan;

use std::path::{Path, PathBuf};

use longbit_sys::{FileMap, Team};

use crate::error::{Error, Result};
use crate::formats::{Encoding, I2sLayout};
use crate::gguf::{Header, shown};
use crate::model::{Activation, HeadFormat, Model, ModelConfig};
pub use inspect::{Listing, TensorEntry, list};
pub(crate) use plan::RowOrder;
use plan::{Span, WeightPlan};

/// What a file does not say about itself, said by the user.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Byte order of I2_S tensors, for files that do not tell.
    pub i2s: Option<I2sLayout>,
    /// Feed-forward non-linearity, for files that do not tell. Refused where the file says otherwise.
    pub activation: Option<Activation>,
}

/// Family of files.
#[derive(Debug)]
pub enum Container {
    /// A directory with `config.json` and one or more safetensors files.
    HuggingFace,
    /// One GGUF file, with its header.
    Gguf(Box<Header>),
}

/// GGUF files of a directory that are named in a message, at most.
const NAMED: usize = 4;

/// Whether `path` is to be read as a GGUF file: anything but a directory with a configuration.
///
/// # Errors
/// It is neither, and what it is instead.
fn is_file(path: &Path) -> Result<bool> {
    let found = std::fs::metadata(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let refuse = |reason| Err(Error::Config { path: path.into(), reason });
    if !found.is_dir() {
        return match path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
            true => refuse("holds weights without config.json: give the directory that has both".into()),
            false => Ok(true),
        };
    }
    // A link whose target is gone says so when it is opened.
    if path.join("config.json").symlink_metadata().is_err() {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut ggufs: Vec<String> = names.filter(|name| name.ends_with(".gguf")).collect();
        ggufs.sort();
        if !ggufs.is_empty() {
            let more = ggufs.len().saturating_sub(NAMED);
            let all = ggufs.iter().take(NAMED).map(|name| shown(name)).collect::<Vec<_>>().join(", ");
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            return refuse(format!(
                "holds no config.json, but GGUF files: {all}{more}; give the path of one of them"
            ));
        }
    }
    Ok(false)
}

/// A checkpoint on disk, opened and checked; its weights are read by [`Checkpoint::load`].
pub struct Checkpoint {
    path: PathBuf,
    container: Container,
    config: ModelConfig,
    /// The weight files, in the order of their names.
    files: Vec<FileMap>,
    plan: WeightPlan,
}

impl Checkpoint {
    /// Opens the checkpoint at `path`.
    ///
    /// # Errors
    /// Names the file, the tensor or key, and what was expected instead; a damaged file never panics.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        if is_file(path)? { gguf::open(path, options) } else { hf::open(path, options) }
    }

    /// The shape of the checkpoint at `path`. No weight is read, but for one question: where a GGUF file has a head of the
    /// type and size of its embedding, the two are compared up to the first difference.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], for the configuration.
    pub fn config_of(path: &Path, options: &OpenOptions) -> Result<ModelConfig> {
        if is_file(path)? { gguf::config(path, options) } else { hf::config(path, options) }
    }

    /// Directory or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Family of files.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// The shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The head format that holds the file's tables exactly.
    pub fn exact_head(&self) -> HeadFormat {
        match self.tables() {
            (Encoding::Bf16, None | Some(Encoding::Bf16)) => HeadFormat::Bf16,
            _ => HeadFormat::F32,
        }
    }

    /// How the embedding is stored, and a head of its own where there is one.
    pub fn tables(&self) -> (Encoding, Option<Encoding>) {
        (self.plan.embedding.encoding, self.plan.head.as_ref().map(|head| head.encoding))
    }

    /// Bytes of all weight files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.len() as u64).sum()
    }

    /// SHA-256 that identifies the checkpoint: of a single file its own, as `sha256sum` prints it; of a directory that
    /// of the lines which `sha256sum` prints in it for config.json and the weight files that are loaded.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn sha256(&self) -> Result<String> {
        let dir = matches!(self.container, Container::HuggingFace).then_some(self.path.as_path());
        inspect::sha256(dir, self.files.iter().map(Ok))
    }

    /// Reads the weights into a model, on all threads of `team`. Pages of the files are given back as they are used up,
    /// so that the process never holds much more than the model.
    ///
    /// # Errors
    /// Names the tensor that is damaged; also when memory cannot be had.
    pub fn load(&self, head: HeadFormat, team: &Team) -> Result<Model> {
        load::load(self, head, team)
    }

    fn bytes(&self, span: &Span) -> &[u8] {
        &self.files[span.file][span.range.clone()]
    }
}

impl Model {
    /// Opens and loads the checkpoint at `path`; see [`Checkpoint`] for what it may be.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Checkpoint::load`].
    pub fn load(path: &Path, head: HeadFormat, team: &Team) -> Result<Model> {
        Checkpoint::open(path, &OpenOptions::default())?.load(head, team)
    }
}
