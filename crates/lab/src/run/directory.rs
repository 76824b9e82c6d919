//! A results directory: whose it is, what it holds, and what may be removed from it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use longbit_protocol::Machine;
use serde::Serialize;

use crate::plan::{Plan, SCHEMA};
use crate::{Complaint, LabError, Result, emit};

/// Files that Longbit writes into a results directory.
const OWN_FILES: [&str; 8] = [
    "plan.json",
    "machine.json",
    "samples.jsonl",
    "run.log",
    "cells.csv",
    "percentiles.csv",
    "summary.md",
    "verdicts.csv",
];

/// What stands where a run is to write.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing, or the remains of a start that was cut short.
    Nothing,
    /// A run of the same plan, commit and machine, with its plan.
    Same(Directory, Box<Plan>),
    /// What `--fresh` removes once the new run is known to be possible.
    Old(Directory),
}

/// An open results directory. While it is open no other run writes into it.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    log: File,
}

impl Directory {
    pub(super) fn samples(&self) -> PathBuf {
        self.path.join("samples.jsonl")
    }

    /// Adds a line to `run.log`, which people read when something went wrong.
    pub(super) fn note(&mut self, text: &str) -> Result<()> {
        let line = format!("{} {}\n", jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ"), text.trim_end());
        self.log
            .write_all(line.as_bytes())
            .map_err(|e| LabError::io("append to", self.path.join("run.log"), e))
    }

    /// Opens a directory that holds a run of the same plan, commit and machine, or one that `fresh` will clear. Removes
    /// nothing itself.
    pub(super) fn resume(path: &Path, plan: &Plan, fresh: bool) -> Result<Found> {
        let stored_at = path.join("plan.json");
        let text = match std::fs::read(&stored_at) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return match foreign(path, fresh)? {
                    true => Ok(Found::Old(Directory::open(path)?)),
                    false => Ok(Found::Nothing),
                };
            }
            Err(e) => return Err(LabError::io("read", &stored_at, e)),
        };
        if fresh {
            return Ok(Found::Old(Directory::open(path)?));
        }
        let help = "--fresh removes that result and starts anew; --out DIR keeps it and writes elsewhere";
        let stored: Plan = match serde_json::from_slice(&text) {
            Ok(stored) => stored,
            Err(e) => {
                let what = format!("plan.json of {} cannot be read by this version: {e}", path.display());
                return Err(LabError::invalid(what, stored_at.display().to_string(), help));
            }
        };
        // A plan of before the instruction set was stored is told from this one by its hash.
        let isa = if stored.isa.is_empty() { &plan.isa } else { &stored.isa };
        let differs = [
            ("schema", stored.schema.to_string(), SCHEMA.to_string()),
            ("instruction set", isa.clone(), plan.isa.clone()),
            ("plan", stored.plan_hash.clone(), plan.plan_hash.clone()),
            ("commit", stored.git_sha.clone(), plan.git_sha.clone()),
            ("machine", stored.machine_id.clone(), plan.machine_id.clone()),
        ];
        let complaints: Vec<Complaint> = differs
            .into_iter()
            .filter(|(_, was, is)| was != is)
            .map(|(word, was, is)| Complaint {
                what: format!("{} holds another run: its {word} is {was}, this one is {is}", path.display()),
                at: stored_at.display().to_string(),
                help: help.to_owned(),
            })
            .collect();
        if !complaints.is_empty() {
            return Err(LabError::Invalid(complaints));
        }
        Ok(Found::Same(Directory::open(path)?, Box::new(stored)))
    }

    /// Makes the directory with `machine.json` and, last, `plan.json`: from then on it is a result.
    pub(super) fn create(path: &Path, plan: &Plan, machine: &Machine) -> Result<Directory> {
        std::fs::create_dir_all(path).map_err(|e| LabError::io("create", path, e))?;
        let directory = Directory::open(path)?;
        write_json(&path.join("machine.json"), machine)?;
        write_json(&path.join("plan.json"), plan)?;
        Ok(directory)
    }

    fn open(path: &Path) -> Result<Directory> {
        let at = path.join("run.log");
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&at)
            .map_err(|e| LabError::io("open", &at, e))?;
        match log.try_lock() {
            Err(TryLockError::WouldBlock) => Err(LabError::invalid(
                format!("another run is writing into {}", path.display()),
                "",
                "wait for it, or choose another --out",
            )),
            // A file system without locks is no reason not to measure.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Directory { path: path.to_path_buf(), log }),
        }
    }

    /// Removes what Longbit wrote, `plan.json` first: a half-cleared directory is not a result.
    pub(super) fn clear(self) -> Result<()> {
        for name in OWN_FILES {
            remove(&self.path.join(name))?;
        }
        let plots = self.path.join("plots");
        for entry in std::fs::read_dir(&plots).into_iter().flatten().flatten() {
            let file = entry.path();
            if file.extension().is_some_and(|e| e == "svg" || e == "png") {
                remove(&file)?;
            }
        }
        let _ = std::fs::remove_dir(plots); // stays when something else is in it
        Ok(())
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(LabError::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Refuses a directory without a plan that holds anything but the remains of a start that was cut short. With `fresh` the
/// remains of a result that was half removed pass, too: true when there is something to remove.
fn foreign(path: &Path, fresh: bool) -> Result<bool> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(LabError::io("read", path, e)),
    };
    let mut remains = false;
    for entry in entries {
        let entry = entry.map_err(|e| LabError::io("read", path, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "machine.json" || name == "run.log" || name.starts_with(".writing-") {
            continue;
        }
        let own = OWN_FILES.contains(&name.as_str()) || name == "plots";
        remains |= own;
        if !(own && fresh) {
            let what =
                format!("{} is not a results directory: it holds {name} and no plan.json", path.display());
            let help = if own {
                "--fresh removes what is left there, or choose another --out"
            } else {
                "choose another --out"
            };
            return Err(LabError::invalid(what, "", help));
        }
    }
    Ok(remains)
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| LabError::data(path, None, format!("cannot be written as JSON: {e}")))?;
    text.push(b'\n');
    emit::write_file(path, &text)
}
