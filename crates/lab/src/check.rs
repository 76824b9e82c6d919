//! The verb `check`: what HEAD changed against BASE, with verdicts and an exit code.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use longbit_protocol::is_not_finite;
use serde::Serialize;

use crate::analyse::compare::{Change, Comparison, Gap, METRICS, Metric, Side, Verdict, compare};
use crate::analyse::label::{NOT_FINITE, digits, fixed};
use crate::analyse::{Results, stats, summarise};
use crate::emit::table::Rows;
use crate::emit::{Format, json};
use crate::plan::Gate;
use crate::record::Record;
use crate::{Exit, LabError, Result};

/// What `check` is asked.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// Result before: a results directory, a directory with `cells.csv`, or a `cells.csv`.
    pub base: PathBuf,
    /// Result after.
    pub head: PathBuf,
    /// Inconclusive verdicts give exit code 5.
    pub strict: bool,
    /// Compare results of different machine classes; advisory, never exit code 3.
    pub allow_machine_mismatch: bool,
    /// Thresholds; none takes those of HEAD's plan (then BASE's, then the defaults).
    pub gate: Option<Gate>,
    /// Confidence of the intervals.
    pub confidence: f64,
    /// How to print.
    pub format: Format,
    /// Colours in the table.
    pub color: bool,
}

impl Default for CheckOptions {
    fn default() -> Self {
        CheckOptions {
            base: PathBuf::new(),
            head: PathBuf::new(),
            strict: false,
            allow_machine_mismatch: false,
            gate: None,
            confidence: 0.95,
            format: Format::default(),
            color: false,
        }
    }
}

/// A result as `check` reads it.
struct Loaded {
    side: Side,
    gate: Option<Gate>,
    /// Machine classes of its rows.
    classes: BTreeSet<String>,
}

fn load(path: &Path) -> Result<Loaded> {
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    if path.is_dir() && dir.join("plan.json").is_file() {
        let results = Results::read(dir)?;
        let side = Side { records: results.records(), times: summarise::token_times(&results.lines) };
        return Ok(Loaded {
            side,
            gate: Some(results.plan.gate),
            classes: [results.plan.machine_class].into(),
        });
    }
    let csv = if path.is_dir() { path.join("cells.csv") } else { path.to_path_buf() };
    if !csv.is_file() {
        return Err(LabError::invalid(
            format!("{} holds neither plan.json nor cells.csv", path.display()),
            "",
            "name a results directory or a cells.csv",
        ));
    }
    let records = Record::read_csv(&csv)?;
    let classes = records.iter().map(|r| r.machine_class.clone()).collect();
    Ok(Loaded { side: Side { records, times: BTreeMap::new() }, gate: None, classes })
}

/// The whole answer, as printed in JSON.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Verdicts count only as advice: the machines differ.
    pub advisory: bool,
    /// Thresholds used, in percent or absolute as their names say.
    pub gate: Gate,
    /// Verdicts by word.
    pub counts: BTreeMap<&'static str, usize>,
    /// For each timed metric, the smallest change that could have been shown: best and median over cells, as shares.
    pub detectable: BTreeMap<&'static str, (f64, f64)>,
    /// The changes and what could not be compared.
    #[serde(flatten)]
    pub comparison: Comparison,
}

/// Compares two results without printing.
///
/// # Errors
/// [`LabError::Invalid`] when a path holds no result or the machine classes differ and that is not allowed; what reading
/// says otherwise.
pub fn report(options: &CheckOptions) -> Result<Report> {
    let (base, head) = (load(&options.base)?, load(&options.head)?);
    if !(options.confidence > 0.0 && options.confidence < 1.0) {
        return Err(LabError::invalid(
            format!("confidence {} is not between 0 and 1", options.confidence),
            "",
            "",
        ));
    }
    // A side without rows has no class; one whose rows come from several cannot be held against anything.
    let known = !base.classes.is_empty() && !head.classes.is_empty();
    let differ = known && base.classes.union(&head.classes).count() > 1;
    if differ && !options.allow_machine_mismatch {
        let name = |c: &BTreeSet<String>| c.iter().cloned().collect::<Vec<_>>().join("`, `");
        return Err(LabError::invalid(
            format!(
                "the results come from different kinds of machine: BASE `{}`, HEAD `{}`",
                name(&base.classes),
                name(&head.classes)
            ),
            "machine_class",
            "measure both on one machine, or pass --allow-machine-mismatch for advice without a verdict",
        ));
    }
    let gate = options.gate.or(head.gate).or(base.gate).unwrap_or_default();
    let comparison = compare(&base.side, &head.side, &gate, options.confidence);
    let mut counts = BTreeMap::new();
    for change in &comparison.changes {
        *counts.entry(change.verdict.as_str()).or_insert(0) += 1;
    }
    let mut detectable = BTreeMap::new();
    for metric in METRICS.iter().filter(|m| m.timed()) {
        let found: Vec<f64> =
            comparison.changes.iter().filter(|c| c.metric == *metric).filter_map(|c| c.detectable).collect();
        if let Some(range) = stats::min(&found).zip(stats::median(&found)) {
            detectable.insert(metric.name(), range);
        }
    }
    Ok(Report { advisory: differ, gate, counts, detectable, comparison })
}

impl Report {
    /// The exit code: 4 new verification failure, 3 regression, 6 missing cells, 5 inconclusive when `strict`, else 0.
    pub fn exit(&self, strict: bool) -> Exit {
        let has = |v: Verdict| self.comparison.changes.iter().any(|c| c.verdict == v);
        let when = |condition: bool, exit: Exit| if condition { exit } else { Exit::Ok };
        when(!self.comparison.verify_failed.is_empty(), Exit::VerifyFailed)
            .worst(when(has(Verdict::Regressed) && !self.advisory, Exit::Regressed))
            .worst(when(!self.comparison.missing.is_empty(), Exit::Incomplete))
            .worst(when(strict && has(Verdict::Inconclusive), Exit::Inconclusive))
    }

    /// Changes worth a row: all but exact figures that did not move at all.
    fn shown(&self) -> impl Iterator<Item = &Change> {
        self.comparison.changes.iter().filter(|c| c.metric.timed() || c.estimate != Some(0.0))
    }

    fn rows(&self) -> Rows {
        let head = ["verdict", "cell", "metric", "base", "head", "change", "interval", "threshold", "note"];
        let body = self.shown().map(|c| {
            let value = |v: f64| match c.metric {
                Metric::TpotP50 | Metric::TpotP99 => format!("{} ms", digits(v / 1e6)),
                Metric::KvBytesReadPerToken => format!("{} MB", digits(v / 1e6)),
                Metric::RelL2P50
                | Metric::CosineMean
                | Metric::KlNats
                | Metric::Top1Agreement
                | Metric::LogitCosineMean
                | Metric::NllNats => fixed(v, 5),
            };
            let change = |v: f64| signed(c.metric, v);
            vec![
                c.verdict.as_str().to_owned(),
                c.cell.clone(),
                c.metric.name().to_owned(),
                value(c.base),
                c.head.map_or(String::new(), value),
                c.estimate.map_or(String::new(), change),
                c.interval
                    .filter(|_| c.metric.timed())
                    .map_or(String::new(), |(lo, hi)| format!("{} to {}", change(lo), change(hi))),
                change(c.threshold).trim_start_matches('+').to_owned(),
                c.note.clone(),
            ]
        });
        Rows { head: head.map(str::to_owned).to_vec(), body: body.collect(), left: vec![0, 1, 2, 8] }
            .without_empty_columns()
    }

    fn gaps(&self) -> Rows {
        let kinds: [(&str, &[Gap]); 3] = [
            ("verify_failed", &self.comparison.verify_failed),
            ("missing", &self.comparison.missing),
            ("not compared", &self.comparison.others),
        ];
        let body = kinds.iter().flat_map(|(word, gaps)| {
            gaps.iter().map(move |g| {
                let state = |s: &Option<String>| s.clone().unwrap_or_else(|| "absent".to_owned());
                let reason = g.reason.replace('\n', " ");
                vec![(*word).to_owned(), g.cell.clone(), state(&g.base), state(&g.head), reason]
            })
        });
        let head = ["kind", "cell", "base", "head", "reason"];
        Rows { head: head.map(str::to_owned).to_vec(), body: body.collect(), left: vec![0, 1, 2, 3, 4] }
    }

    /// What holds for all rows: counts, what could be seen, and what the comparison is worth.
    pub fn summary(&self) -> String {
        let cells = {
            let mut ids: Vec<&str> = self.comparison.changes.iter().map(|c| c.cell_id.as_str()).collect();
            ids.sort_unstable();
            ids.dedup();
            ids.len()
        };
        let order = [Verdict::Regressed, Verdict::Improved, Verdict::Inconclusive, Verdict::Unchanged];
        let counts: Vec<String> = order
            .iter()
            .filter_map(|v| self.counts.get(v.as_str()).map(|n| format!("{n} {}", v.as_str())))
            .collect();
        let counts = if counts.is_empty() { "nothing to compare".to_owned() } else { counts.join(", ") };
        let mut text = format!("{cells} cells compared: {counts}.\n");
        let still = self.comparison.changes.len() - self.shown().count();
        if still > 0 {
            text.push_str(&format!(
                "{still} exact figures (bytes read, errors) are the same to the last digit.\n"
            ));
        }
        for (metric, (best, median)) in &self.detectable {
            text.push_str(&format!(
                "Smallest change this comparison could detect in {metric}: {:.1} % in the best cell, {:.1} % in the median \
                 cell.\n",
                best * 100.0,
                median * 100.0
            ));
        }
        if self.detectable.is_empty() && cells > 0 {
            text.push_str("No change of speed could be detected: too few repetitions for an interval.\n");
        }
        let (missing, failed) = (self.comparison.missing.len(), self.comparison.verify_failed.len());
        if missing > 0 {
            text.push_str(&format!("{missing} cells were measured in BASE and not in HEAD.\n"));
        }
        if failed > 0 {
            text.push_str(&format!("{failed} cells fail verification in HEAD and did not in BASE.\n"));
        }
        text.push_str("Unpaired: the two results were measured at different times.\n");
        if self.advisory {
            text.push_str("Advisory only: the results come from different kinds of machine.\n");
        }
        text
    }
}

/// `+5.2 %` for relative metrics, `+0.0021` for the others.
fn signed(metric: Metric, value: f64) -> String {
    if is_not_finite(value) {
        NOT_FINITE.to_owned()
    } else if metric.relative() {
        let percent = value * 100.0;
        // A single byte read more is a change, too; of a time, the first digit is enough.
        if !metric.timed() && percent != 0.0 && percent.abs() < 0.05 {
            format!("{percent:+.6} %")
        } else {
            format!("{percent:+.1} %")
        }
    } else {
        format!("{value:+.6}")
    }
}

/// Compares, prints to `out`, and gives the exit code (see [`Report::exit`]).
///
/// # Errors
/// As [`report`], and [`LabError::Output`].
pub fn check(options: &CheckOptions, out: &mut dyn Write) -> Result<Exit> {
    let report = report(options)?;
    let (rows, gaps) = (report.rows(), report.gaps());
    let text = match options.format {
        Format::Json => json(&report)?,
        Format::Csv => rows.csv(),
        Format::Markdown => [rows.markdown(), gaps.markdown(), report.summary()]
            .into_iter()
            .filter(|t| !t.is_empty())
            .collect::<Vec<_>>()
            .join("\n"),
        Format::Table => {
            let show = |rows: &Rows| {
                if rows.body.is_empty() { String::new() } else { rows.terminal(options.color) + "\n" }
            };
            show(&rows) + &show(&gaps) + &report.summary()
        }
    };
    out.write_all(text.as_bytes()).map_err(LabError::Output)?;
    Ok(report.exit(options.strict))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing::{self, Sweep};
    use crate::run::store::Line;

    fn small(seed: u64) -> Sweep {
        Sweep { contexts: vec![2048, 8192], kv_dtypes: vec!["bf16"], seed, ..Sweep::default() }
    }

    /// Two results of the same sweep; `change` alters the second.
    fn pair(
        change: impl FnOnce(&mut crate::plan::Plan, &mut Vec<Line>),
    ) -> (tempfile::TempDir, CheckOptions) {
        let dir = tempfile::tempdir().unwrap();
        let (base, head) = (dir.path().join("base"), dir.path().join("head"));
        let (plan, machine, lines) = small(1).build();
        testing::write(&base, &plan, &machine, &lines);
        let (mut plan, machine, mut lines) = small(2).build();
        change(&mut plan, &mut lines);
        testing::write(&head, &plan, &machine, &lines);
        let options = CheckOptions { base, head, ..CheckOptions::default() };
        (dir, options)
    }

    fn slow(lines: &mut [Line], percent: u64) {
        for line in lines {
            if let Line::Sample { sample, .. } = line {
                sample.tok_ns.iter_mut().for_each(|t| *t = *t * percent / 100);
            }
        }
    }

    fn run(options: &CheckOptions) -> (Exit, String) {
        let mut out = Vec::new();
        let exit = check(options, &mut out).unwrap();
        (exit, String::from_utf8(out).unwrap())
    }

    #[test]
    fn no_difference_is_zero() {
        let (_dir, options) = pair(|_, _| {});
        let (exit, text) = run(&options);
        assert_eq!(exit, Exit::Ok, "{text}");
        assert!(
            text.contains("6 cells compared")
                && text.contains("Smallest change this comparison could detect"),
            "{text}"
        );
        let same = CheckOptions { head: options.base.clone(), strict: true, ..options };
        let (exit, text) = run(&same);
        assert!(exit == Exit::Ok || text.contains("inconclusive"), "{text}");
    }

    #[test]
    fn a_slower_head_is_three_and_a_faster_one_zero() {
        let (_dir, options) = pair(|_, lines| slow(lines, 115));
        let (exit, text) = run(&options);
        assert_eq!(exit, Exit::Regressed);
        assert!(text.lines().nth(1).unwrap().starts_with("regressed"), "{text}");
        let (_dir, options) = pair(|_, lines| slow(lines, 80));
        let (exit, text) = run(&options);
        assert_eq!(exit, Exit::Ok);
        assert!(text.contains("improved"), "{text}");
    }

    #[test]
    fn one_row_of_another_machine_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = testing::records();
        let put = |name: &str, records: &[Record]| {
            let path = dir.path().join(name);
            std::fs::write(&path, crate::emit::csv::to_string(records)).unwrap();
            path
        };
        let base = put("base.csv", &records);
        records.last_mut().unwrap().machine_class = "0000000000000001".into();
        let options = CheckOptions { base, head: put("head.csv", &records), ..CheckOptions::default() };
        let text = check(&options, &mut Vec::new()).unwrap_err().to_string();
        assert!(text.contains("`0000000000000001`, `fedcba9876543210`"), "{text}");
    }

    #[test]
    fn other_machines_are_refused_or_advisory() {
        let (_dir, options) = pair(|plan, lines| {
            plan.machine_class = "0000000000000001".into();
            slow(lines, 300);
        });
        let error = check(&options, &mut Vec::new()).unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        let text = error.to_string();
        assert!(text.contains("fedcba9876543210") && text.contains("0000000000000001"), "{text}");
        let (exit, text) = run(&CheckOptions { allow_machine_mismatch: true, ..options });
        assert_eq!(exit, Exit::Ok);
        assert!(text.contains("regressed") && text.contains("Advisory only"), "{text}");
    }

    #[test]
    fn vanished_cells_are_six() {
        let (_dir, options) = pair(|plan, lines| {
            let id = plan.cells[0].id.clone();
            lines.retain(|l| !matches!(l, Line::Done { cell, .. } if *cell == id));
        });
        let (exit, text) = run(&options);
        assert_eq!(exit, Exit::Incomplete);
        assert!(
            text.contains("missing") && text.contains("6 of 6 repetitions, but the cell was not closed"),
            "{text}"
        );
    }

    #[test]
    fn new_verification_failures_are_four() {
        let (_dir, options) = pair(|plan, _| {
            plan.verify = Some(crate::plan::VerifySpec { rel_l2_max: Some(0.1), ..Default::default() });
        });
        assert_eq!(run(&options).0, Exit::VerifyFailed);
    }

    #[test]
    fn strict_turns_cannot_tell_into_five() {
        let (_dir, options) = pair(|_, _| {});
        // The tail of 384 tokens cannot be known to 1 %.
        let gate = Some(Gate { tpot_p99_pct: 1.0, ..Gate::default() });
        let options = CheckOptions { gate, ..options };
        let (exit, text) = run(&options);
        assert!(exit == Exit::Ok && text.contains("inconclusive"), "{text}");
        assert_eq!(run(&CheckOptions { strict: true, ..options }).0, Exit::Inconclusive);
    }

    #[test]
    fn a_stored_table_can_be_the_base() {
        let (dir, options) = pair(|_, lines| slow(lines, 140));
        let records = Results::read(&options.base).unwrap().records();
        let stored = dir.path().join("cells.csv");
        std::fs::write(&stored, crate::emit::csv::to_string(&records)).unwrap();
        let (exit, text) = run(&CheckOptions { base: stored, format: Format::Markdown, ..options.clone() });
        assert_eq!(exit, Exit::Regressed, "{text}");
        assert!(text.contains("interval from the stored ends"), "{text}");
        let error = check(&CheckOptions { base: dir.path().join("nothing"), ..options }, &mut Vec::new())
            .unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
    }

    #[test]
    fn json_is_json() {
        let (_dir, options) = pair(|_, lines| slow(lines, 115));
        let (_, text) = run(&CheckOptions { format: Format::Json, ..options });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["changes"][0]["verdict"], "regressed");
        assert!(value["counts"]["regressed"].as_u64() > Some(0));
    }
}
