//! Everything derived from the log: CSV, Markdown, figures. Nothing here is measured, so all of it can be rebuilt.

use std::path::{Path, PathBuf};

use crate::analyse::{Results, sentence::sentence};
use crate::record::Record;
use crate::{LabError, Result};

pub mod choice;
pub mod csv;
pub mod formats;
pub mod formats_doc;
pub mod markdown;
pub mod percentiles;
pub mod plot;
pub mod table;

pub use formats_doc::formats_doc;

/// How a view is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Aligned columns for a terminal.
    #[default]
    Table,
    /// Markdown.
    Markdown,
    /// Comma-separated rows.
    Csv,
    /// One JSON document.
    Json,
}

/// What [`write_all`] wrote and what it says.
#[derive(Clone, Debug)]
pub struct Written {
    /// The files, in the order in which they were written.
    pub files: Vec<PathBuf>,
    /// One record a planned cell.
    pub records: Vec<Record>,
    /// One sentence that says what the numbers show.
    pub sentence: String,
    /// The table of cells for a terminal, without colours (see [`terminal_table`] for colours).
    pub table: String,
}

/// Rebuilds `cells.csv`, `percentiles.csv`, `summary.md` and `plots/` of a results directory from `plan.json`,
/// `machine.json` and `samples.jsonl`. The same log gives the same bytes.
///
/// # Errors
/// What [`Results::read`] says; [`LabError::Io`] and [`LabError::Plot`] when a file cannot be written. Files appear
/// whole or not at all.
pub fn write_all(dir: &Path) -> Result<Written> {
    let results = Results::read(dir)?;
    let records = results.records();
    let sentence = sentence(&records);
    let mut files = Vec::new();
    let mut put = |name: &str, text: &str| -> Result<()> {
        let path = dir.join(name);
        write_file(&path, text.as_bytes())?;
        files.push(path);
        Ok(())
    };
    put("cells.csv", &csv::to_string(&records))?;
    put("percentiles.csv", &percentiles::to_string(&records, &results.lines))?;
    let plots = plot::write_figures(&dir.join("plots"), &records, &results.lines)?;
    let links = plot::links(&plots.figures, Path::new("plots"));
    put("summary.md", &markdown::summary(&results.plan, &results.machine, &records, &sentence, &links))?;
    files.extend(plots.files);
    let table = terminal_table(&records, false);
    Ok(Written { files, records, sentence, table })
}

/// The table of measured cells, then that of the others, for a terminal.
pub fn terminal_table(records: &[Record], color: bool) -> String {
    let (measured, gaps) = (table::measured(records), table::gaps(records));
    let mut text = if measured.body.is_empty() { String::new() } else { measured.terminal(color) };
    if !gaps.body.is_empty() {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&gaps.terminal(color));
    }
    text
}

/// Writes beside the target and renames, so that a reader sees the old file or the new one.
///
/// # Errors
/// [`LabError::Io`] with the path that failed.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let written = std::fs::write(&temporary, bytes).map_err(|e| LabError::io("write", &temporary, e));
    commit(written, &temporary, path)
}

/// A JSON document with a line feed at the end.
pub(crate) fn json<T: serde::Serialize>(value: &T) -> Result<String> {
    let text = serde_json::to_string_pretty(value);
    text.map(|t| t + "\n").map_err(|e| LabError::Output(std::io::Error::other(e)))
}

/// Name beside `path` with the same extension (an encoder may choose by it) that is renamed when whole.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".writing-{}-{name}", std::process::id()))
}

/// Renames a file that was written in full; removes it otherwise.
pub(crate) fn commit(written: Result<()>, temporary: &Path, path: &Path) -> Result<()> {
    let done =
        written.and_then(|()| std::fs::rename(temporary, path).map_err(|e| LabError::io("write", path, e)));
    if done.is_err() {
        let _ = std::fs::remove_file(temporary); // best effort: the error that matters is returned
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing;
    use longbit_protocol::Status;

    #[test]
    fn rebuilding_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (plan, machine, lines) = testing::with_gaps();
        testing::write(dir.path(), &plan, &machine, &lines);
        let first = write_all(dir.path()).unwrap();
        let read = |f: &PathBuf| std::fs::read(f).unwrap();
        let before: Vec<Vec<u8>> = first.files.iter().map(read).collect();
        for file in &first.files {
            assert!(!read(file).is_empty(), "{}", file.display());
            std::fs::remove_file(file).unwrap();
        }
        let second = write_all(dir.path()).unwrap();
        assert_eq!(first.files, second.files);
        assert_eq!(before, second.files.iter().map(read).collect::<Vec<_>>());
        assert_eq!(Record::read_csv(&dir.path().join("cells.csv")).unwrap(), second.records);
        assert_eq!(second.records.iter().filter(|r| r.status == Status::Oom).count(), 1);
        let summary = std::fs::read_to_string(dir.path().join("summary.md")).unwrap();
        for text in [
            "## Skipped and failed",
            "worker killed by signal 9",
            "longbit run experiments/context/long.toml",
        ] {
            assert!(summary.contains(text), "{text}");
        }
        let leftovers: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .filter_map(|e| e.ok().map(|e| e.file_name().to_string_lossy().into_owned()))
            .filter(|n| n.starts_with('.'))
            .collect();
        assert!(leftovers.is_empty(), "{leftovers:?}");
    }

    #[test]
    fn nothing_measured_is_still_a_result() {
        let dir = tempfile::tempdir().unwrap();
        let (plan, machine, _) = testing::results();
        testing::write(dir.path(), &plan, &machine, &[]);
        let written = write_all(dir.path()).unwrap();
        assert_eq!(written.records.len(), plan.cells.len());
        assert!(written.sentence.starts_with("No cell was measured."));
        assert!(written.table.contains("not measured yet"));
        let text = std::fs::read_to_string(dir.path().join("cells.csv")).unwrap();
        assert_eq!(text.lines().count(), 1 + plan.cells.len());
    }

    #[test]
    fn a_directory_without_a_plan_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_all(dir.path()).unwrap_err();
        assert!(error.to_string().contains("plan.json"), "{error}");
        assert_eq!(error.exit(), crate::Exit::Usage);
    }
}
