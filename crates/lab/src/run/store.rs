//! `samples.jsonl`: one JSON object a line, appended and never rewritten. Everything else is derived from it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use longbit_protocol::{Outcome, Probe, Quality, Ready, Sample, Status};
use serde::{Deserialize, Serialize};

use crate::plan::SCHEMA;
use crate::{LabError, Result};

/// One line of `samples.jsonl`. On disk each also carries `"v":1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum Line {
    /// A worker built its model and filled its cache.
    Ready {
        /// Index into `Plan::cohorts`.
        cohort: usize,
        /// Worker process of this cohort, from 0, counted over all runs into the directory.
        attempt: u32,
        /// What stood.
        ready: Box<Ready>,
    },
    /// Bandwidth measured beside the samples.
    Probe {
        /// Index into `Plan::cohorts`.
        cohort: usize,
        /// Worker process.
        attempt: u32,
        /// The measurement.
        probe: Probe,
    },
    /// Quality of one cell.
    Quality {
        /// The record.
        quality: Box<Quality>,
    },
    /// One timed repetition.
    Sample {
        /// Index into `Plan::cohorts`.
        cohort: usize,
        /// Worker process.
        attempt: u32,
        /// The repetition.
        sample: Box<Sample>,
    },
    /// A cell that could not be measured. A later `Done` of the same cell (`--retry-failed`) overrides it.
    Failed {
        /// Which, how and why.
        outcome: Outcome,
    },
    /// A cell has everything that the plan asks for.
    Done {
        /// The cell.
        cell: String,
        /// Repetitions that stand.
        reps: u32,
    },
}

#[derive(Serialize)]
struct OutLine<'a> {
    v: u32,
    #[serde(flatten)]
    line: &'a Line,
}

#[derive(Deserialize)]
struct InLine {
    v: u32,
    #[serde(flatten)]
    line: Line,
}

/// Reads a log. A missing file is an empty log; a torn last line is ignored; of two samples with the same cell and
/// repetition, or two quality records of a cell, the first stands.
///
/// # Errors
/// [`LabError::Io`] when the file cannot be read, [`LabError::Data`] when a line that is not the last is damaged or a
/// line has another version.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(LabError::io("read", path, e)),
    };
    parse(path, &bytes).map(|(lines, _)| lines)
}

/// The lines, and how many bytes of the input they take (less than all when the last line is torn).
fn parse(path: &Path, bytes: &[u8]) -> Result<(Vec<Line>, usize)> {
    let mut lines = Vec::new();
    let (mut samples, mut qualities) = (HashSet::new(), HashSet::new());
    let mut whole = 0;
    for (i, raw) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        // Only a line that ends counts: its end is the last byte of the single write that made it.
        let Some(text) = raw.strip_suffix(b"\n") else { break };
        whole += raw.len();
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let parsed: InLine = serde_json::from_slice(text).map_err(|e| {
            LabError::data(
                path,
                Some(i + 1),
                format!("not a line of samples.jsonl ({e}); remove it to go on"),
            )
        })?;
        if parsed.v != SCHEMA {
            let what = format!("line of version {}, this binary reads {SCHEMA}", parsed.v);
            return Err(LabError::data(path, Some(i + 1), what));
        }
        let fresh = match &parsed.line {
            Line::Sample { sample, .. } => samples.insert((sample.cell.clone(), sample.rep)),
            Line::Quality { quality } => qualities.insert(quality.cell.clone()),
            _ => true,
        };
        if fresh {
            lines.push(parsed.line);
        }
    }
    Ok((lines, whole))
}

/// What a log says about one cell.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CellState {
    /// Repetitions recorded.
    pub reps: BTreeSet<u32>,
    /// Time of all tokens of those repetitions.
    pub timed_ns: u64,
    /// Quality recorded.
    pub quality: bool,
    /// How it ended: `Ok` for done, otherwise the status of the failure; none when unfinished.
    pub end: Option<Status>,
}

impl CellState {
    /// Counts a repetition, once.
    pub fn add(&mut self, sample: &Sample) {
        if self.reps.insert(sample.rep) {
            let spent = sample.tok_ns.iter().fold(0, |sum: u64, ns| sum.saturating_add(*ns));
            self.timed_ns = self.timed_ns.saturating_add(spent);
        }
    }

    /// The first repetition that is missing.
    pub fn next_rep(&self) -> u32 {
        (0..).find(|r| !self.reps.contains(r)).unwrap_or(u32::MAX)
    }
}

/// The state of every cell that a log mentions; the last `Done` or `Failed` of a cell stands.
pub fn states(lines: &[Line]) -> BTreeMap<String, CellState> {
    let mut states: BTreeMap<String, CellState> = BTreeMap::new();
    for line in lines {
        match line {
            Line::Sample { sample, .. } => {
                states.entry(sample.cell.clone()).or_default().add(sample);
            }
            Line::Quality { quality } => states.entry(quality.cell.clone()).or_default().quality = true,
            Line::Failed { outcome } => {
                states.entry(outcome.cell.clone()).or_default().end = Some(outcome.status);
            }
            Line::Done { cell, .. } => states.entry(cell.clone()).or_default().end = Some(Status::Ok),
            Line::Ready { .. } | Line::Probe { .. } => {}
        }
    }
    states
}

/// An open log: what it held, and the end to append to.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    file: File,
}

impl Store {
    /// Opens or creates the log, cuts off a torn last line, and returns the lines that stand.
    ///
    /// # Errors
    /// As [`read`], and when the file cannot be opened for writing.
    pub fn open(path: &Path) -> Result<(Store, Vec<Line>)> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|e| LabError::io("open", path, e))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| LabError::io("read", path, e))?;
        let (lines, whole) = parse(path, &bytes)?;
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(|e| LabError::io("truncate", path, e))?;
        }
        file.seek(SeekFrom::Start(whole as u64)).map_err(|e| LabError::io("seek in", path, e))?;
        Ok((Store { path: path.to_path_buf(), file }, lines))
    }

    /// Appends one line with a single write; a finished or failed cell is also flushed to the disk.
    ///
    /// # Errors
    /// [`LabError::Io`] with the path and the cause, e.g. a full disk. What was written before stays valid.
    pub fn append(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(&OutLine { v: SCHEMA, line }).map_err(|e| {
            LabError::data(&self.path, None, format!("a record cannot be written as JSON: {e}"))
        })?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(|e| LabError::io("append to", &self.path, e))?;
        if matches!(line, Line::Done { .. } | Line::Failed { .. }) {
            self.file.sync_data().map_err(|e| LabError::io("flush", &self.path, e))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rep: u32, slot: u32) -> Line {
        let sample = Sample { cell: "c".into(), rep, slot, tok_ns: vec![u64::MAX, 1], ..Sample::default() };
        Line::Sample { cohort: 0, attempt: 0, sample: Box::new(sample) }
    }

    #[test]
    fn torn_line_is_cut_off_and_the_first_duplicate_stands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        assert_eq!(read(&path).unwrap(), vec![]);
        let (mut store, _) = Store::open(&path).unwrap();
        for line in [sample(0, 1), sample(0, 2), sample(1, 3)] {
            store.append(&line).unwrap();
        }
        drop(store);
        let whole = std::fs::read(&path).unwrap();
        assert!(whole.starts_with(b"{\"v\":1,\"line\":\"sample\""), "{}", String::from_utf8_lossy(&whole));
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(read(&path).unwrap(), vec![sample(0, 1)]);
        let (mut store, lines) = Store::open(&path).unwrap();
        assert_eq!(lines, vec![sample(0, 1)]);
        store.append(&sample(1, 9)).unwrap();
        drop(store);
        let lines = read(&path).unwrap();
        assert_eq!(lines, vec![sample(0, 1), sample(1, 9)]);
        let state = &states(&lines)["c"];
        assert_eq!((state.next_rep(), state.quality, state.end), (2, false, None));
    }

    #[test]
    fn damage_in_the_middle_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        std::fs::write(&path, "{\"v\":1,\"line\":\"done\",\"cell\":\"c\",\"reps\":3}\n{oops}\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("samples.jsonl:2"), "{error}");
        std::fs::write(&path, "{\"v\":7,\"line\":\"done\",\"cell\":\"c\",\"reps\":3}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("version 7"));
    }
}
