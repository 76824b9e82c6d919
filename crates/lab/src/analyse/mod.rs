//! Statistics of samples, and the summary of a cell: pure functions from the log to numbers.

use std::path::{Path, PathBuf};

use longbit_protocol::Machine;
use serde::de::DeserializeOwned;

use crate::plan::{Plan, SCHEMA};
use crate::record::Record;
use crate::run::store::{self, Line};
use crate::{LabError, Result};

pub mod compare;
pub mod interval;
pub mod label;
pub mod loss;
pub mod sentence;
pub mod stats;
pub mod summarise;
#[cfg(test)]
pub(crate) mod testing;
pub mod verify;

/// A results directory, read.
#[derive(Clone, Debug)]
pub struct Results {
    /// Where it was read from.
    pub dir: PathBuf,
    /// `plan.json`.
    pub plan: Plan,
    /// `machine.json`.
    pub machine: Machine,
    /// `samples.jsonl`.
    pub lines: Vec<Line>,
}

impl Results {
    /// Reads `plan.json`, `machine.json` and `samples.jsonl` of a results directory.
    ///
    /// # Errors
    /// [`LabError::Invalid`] when `dir` holds no plan, [`LabError::Io`] and [`LabError::Data`] for what cannot be read.
    pub fn read(dir: &Path) -> Result<Results> {
        let plan_path = dir.join("plan.json");
        if !plan_path.is_file() {
            return Err(LabError::invalid(
                format!("{} is not a results directory: it has no plan.json", dir.display()),
                "",
                "name the directory that `run` wrote, e.g. runs/main-speed",
            ));
        }
        let plan: Plan = read_json(&plan_path)?;
        if plan.schema != SCHEMA {
            let what = format!("plan of version {}, this binary reads {SCHEMA}", plan.schema);
            return Err(LabError::data(&plan_path, None, what));
        }
        let machine = read_json(&dir.join("machine.json"))?;
        let lines = store::read(&dir.join("samples.jsonl"))?;
        Ok(Results { dir: dir.to_path_buf(), plan, machine, lines })
    }

    /// One record for each planned cell, in the order of the plan.
    pub fn records(&self) -> Vec<Record> {
        summarise::summarise(&self.plan, &self.machine, &self.lines)
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|e| LabError::io("read", path, e))?;
    serde_json::from_slice(&text)
        .map_err(|e| LabError::data(path, Some(e.line()), format!("not readable: {e}")))
}
