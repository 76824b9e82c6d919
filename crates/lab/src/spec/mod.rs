//! Experiment files: TOML, checked against what an engine offers.
//!
//! Nothing half-checked leaves this module: [`load`] returns an [`Experiment`] or the full list of complaints, each
//! with file, line, key and the nearest valid name.

pub mod kv;
pub mod named;
mod read;
mod settings;
mod sources;
pub mod units;
mod walk;

use std::path::{Path, PathBuf};

use longbit_protocol::{Capabilities, Measure, ModelSpec, TextFile, TraceFile};
use sha2::{Digest, Sha256};

use crate::plan::{ExperimentMeta, Gate, VerifySpec};
use crate::{LabError, Result};
pub use named::Named;
pub use units::MemoryLimit;

/// A checked experiment, before expansion.
#[derive(Clone, Debug, PartialEq)]
pub struct Experiment {
    /// In words.
    pub meta: ExperimentMeta,
    /// Directory of the file: paths in it are relative to this one.
    pub dir: PathBuf,
    /// The model of all cells; its path as the file writes it.
    pub model: ModelSpec,
    /// Workload with all its parameters; of a text or a trace with the first 12 digits of its SHA-256.
    pub workload: String,
    /// The text that cells decode, where the workload reads one.
    pub text: Option<TextPlan>,
    /// The trace that cells replay, where the workload names one; its path as the experiment file writes it.
    pub trace: Option<TraceFile>,
    /// Seed of the workload and of the order of cells.
    pub seed: u64,
    /// Axis `context`, tokens.
    pub contexts: Vec<usize>,
    /// Axis `threads`.
    pub threads: Vec<Threads>,
    /// Axis `batch`: tokens that a timed pass takes together.
    pub batches: Vec<usize>,
    /// Axis `kv_dtype`.
    pub kv_dtypes: Vec<String>,
    /// Axis `method`, parameters multiplied out.
    pub methods: Vec<Named>,
    /// Points that are not run.
    pub excludes: Vec<Exclude>,
    /// How each cell is measured.
    pub measure: Measure,
    /// See [`crate::plan::Plan::min_samples_p99`].
    pub min_samples_p99: u32,
    /// See [`crate::plan::Plan::max_drift_pct`].
    pub max_drift_pct: f64,
    /// Seconds without progress after which a worker is killed.
    pub cell_timeout_s: f64,
    /// Largest predicted resident memory.
    pub max_rss: MemoryLimit,
    /// What happens to a cell that is predicted to exceed it.
    pub on_exceed: OnExceed,
    /// Limits on the error.
    pub verify: Option<VerifySpec>,
    /// Thresholds of `check`.
    pub gate: Gate,
}

/// A text that cells decode.
#[derive(Clone, Debug, PartialEq)]
pub struct TextPlan {
    /// The file, its path as the experiment file writes it.
    pub file: TextFile,
    /// Longest context that is run through the model; longer ones are skipped.
    pub prefill_limit: usize,
}

/// A point of the axis `threads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// As many as the process may use CPUs, and this many more: `"all"`, `"all+1"`.
    All(usize),
    /// 1, 2, 4, … and as many as the process may use CPUs: `"1..all"`.
    Doubling,
    /// This many.
    Count(usize),
}

impl Threads {
    /// The numbers on a machine that allows `cpus`.
    pub fn resolve(self, cpus: usize) -> Vec<usize> {
        let cpus = cpus.max(1);
        match self {
            Threads::All(more) => vec![cpus.saturating_add(more)],
            Threads::Doubling => {
                (0..usize::BITS).map(|i| 1 << i).take_while(|&n| n < cpus).chain([cpus]).collect()
            }
            Threads::Count(n) => vec![n],
        }
    }
}

/// What happens to a cell whose predicted memory exceeds the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExceed {
    /// It becomes a skipped row, with the number.
    #[default]
    Skip,
    /// The whole run is refused.
    Refuse,
}

/// Points that are not run: a cell that matches every list that is not empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exclude {
    /// Contexts.
    pub contexts: Vec<usize>,
    /// Thread counts.
    pub threads: Vec<Threads>,
    /// Batches.
    pub batches: Vec<usize>,
    /// KV dtypes.
    pub kv_dtypes: Vec<String>,
    /// Methods: bare names (all parameters), or with all parameters.
    pub methods: Vec<String>,
    /// Why.
    pub reason: String,
}

/// Reads and checks an experiment file.
///
/// # Errors
/// [`LabError::Io`] when it cannot be read, [`LabError::Invalid`] with every complaint otherwise.
pub fn load(path: &Path, capabilities: &Capabilities) -> Result<Experiment> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            return Err(LabError::invalid("the file is not UTF-8 text", path.display().to_string(), ""));
        }
        Err(e) => return Err(LabError::io("read", path, e)),
    };
    let mut experiment = parse(&path.display().to_string(), &group_of(path), &text, capabilities)?;
    experiment.meta.file = relative(path);
    Ok(experiment)
}

/// The path as seen from the working directory; empty outside of it, where it would mean nothing to others.
fn relative(path: &Path) -> String {
    if path.is_relative() {
        return path.display().to_string();
    }
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).map(|p| p.display().to_string()).unwrap_or_default()
}

/// `path`, which an experiment file in `dir` names, as the programs started from here can open it.
pub fn resolve(dir: &Path, path: &str) -> String {
    if path.is_empty() { String::new() } else { dir.join(path).to_string_lossy().into_owned() }
}

/// Checks the text of an experiment file. `file` is used in messages, and its directory for paths.
///
/// # Errors
/// [`LabError::Invalid`] with every complaint.
pub fn parse(file: &str, group: &str, text: &str, capabilities: &Capabilities) -> Result<Experiment> {
    let mut experiment = read::read(file, text, capabilities).map_err(LabError::Invalid)?;
    experiment.meta.group = group.to_owned();
    experiment.meta.file_sha256 = hex(&Sha256::digest(text.as_bytes()));
    Ok(experiment)
}

/// The folder below `experiments/`, `main` when the file is directly in it; elsewhere the name of its folder.
fn group_of(path: &Path) -> String {
    let full = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let folders: Vec<String> = full
        .parent()
        .into_iter()
        .flat_map(Path::components)
        .map(|c| c.as_os_str().to_string_lossy().into_owned())
        .collect();
    let below = match folders.iter().rposition(|f| f == "experiments") {
        Some(at) => folders[at + 1..].join("-"),
        None => String::new(),
    };
    let group: String = below
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' })
        .collect();
    if group.is_empty() { "main".to_owned() } else { group }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests;
