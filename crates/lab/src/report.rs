//! The verb `report`: a result as Markdown, CSV or JSON, and the splicing of generated parts into a hand-written page.

use std::io::Write;
use std::path::{Component, Path, PathBuf};

use crate::analyse::{Results, sentence::sentence};
use crate::emit::{
    Format, choice, csv, formats, json, markdown, plot, table, terminal_table, write_all, write_file,
};
use crate::record::Record;
use crate::{Exit, LabError, Result};

/// What `report` is asked.
#[derive(Clone, Debug, Default)]
pub struct ReportOptions {
    /// Results directories; the first is meant where a marker names no experiment.
    pub results: Vec<PathBuf>,
    /// How to print, when nothing is spliced.
    pub format: Format,
    /// The page whose marked parts are rewritten.
    pub splice: Option<PathBuf>,
    /// Writes the derived files of each directory anew from its log, whatever commit measured it, instead of printing.
    pub rebuild: bool,
    /// Colours in the table.
    pub color: bool,
}

/// The parts that a page can take.
pub const PARTS: [&str; 8] =
    ["table", "formats", "reads", "choice", "figures", "machine", "sentence", "reproduce"];

struct Loaded {
    results: Results,
    records: Vec<Record>,
}

impl Loaded {
    /// Whether `name` is that of the experiment, alone or with its group, or of the directory.
    fn is_called(&self, name: &str) -> bool {
        let e = &self.results.plan.experiment;
        let directory = self.results.dir.file_name().and_then(|n| n.to_str());
        name == e.name || name == e.full_name() || directory == Some(name)
    }
}

/// Prints the results to `out`, or rewrites the marked parts of a page. Exit code 6 when cells failed or are unfinished,
/// otherwise 0.
///
/// # Errors
/// [`LabError::Invalid`] without a result, [`LabError::Data`] with the line of a marker that is not understood or not
/// closed, and what reading and writing say. The page is replaced whole or not at all.
pub fn report(options: &ReportOptions, out: &mut dyn Write) -> Result<Exit> {
    let mut loaded = Vec::new();
    let mut text = String::new();
    for dir in &options.results {
        if options.rebuild {
            for file in write_all(dir)?.files {
                text.push_str(&format!("wrote {}\n", file.display()));
            }
        }
        let results = Results::read(dir)?;
        let records = results.records();
        loaded.push(Loaded { results, records });
    }
    if loaded.is_empty() {
        return Err(LabError::invalid("no results directory given", "", "longbit report runs/main-speed"));
    }
    match &options.splice {
        Some(page) => text.push_str(&splice_page(page, &loaded)?),
        None if options.rebuild => {}
        None => text.push_str(&print(options, &loaded)?),
    }
    out.write_all(text.as_bytes()).map_err(LabError::Output)?;
    let whole = |r: &Record| r.measured() || r.status == longbit_protocol::Status::Skipped;
    Ok(if loaded.iter().flat_map(|l| &l.records).all(whole) { Exit::Ok } else { Exit::Incomplete })
}

fn print(options: &ReportOptions, loaded: &[Loaded]) -> Result<String> {
    let all = || loaded.iter().flat_map(|l| l.records.iter().cloned()).collect::<Vec<_>>();
    Ok(match options.format {
        Format::Csv => csv::to_string(&all()),
        Format::Json => json(&all())?,
        Format::Markdown => {
            let page = |l: &Loaded| {
                let figures = plot::figures(&l.records, &l.results.lines);
                let links = plot::links(&figures, &l.results.dir.join("plots"));
                markdown::summary(
                    &l.results.plan,
                    &l.results.machine,
                    &l.records,
                    &sentence(&l.records),
                    &links,
                )
            };
            loaded.iter().map(page).collect::<Vec<_>>().join("\n")
        }
        Format::Table => {
            let view = |l: &Loaded| {
                let name = l.results.plan.experiment.full_name();
                format!("{name}\n{}\n{}\n", terminal_table(&l.records, options.color), sentence(&l.records))
            };
            loaded.iter().map(view).collect::<Vec<_>>().join("\n")
        }
    })
}

fn splice_page(page: &Path, loaded: &[Loaded]) -> Result<String> {
    let text = std::fs::read_to_string(page).map_err(|e| LabError::io("read", page, e))?;
    let at = |line: usize, what: String| LabError::data(page, Some(line), what);
    let (spliced, parts) =
        splice(&text, |name| part(name, page, loaded)).map_err(|(line, what)| at(line, what))?;
    if spliced != text {
        write_file(page, spliced.as_bytes())?;
    }
    Ok(format!("{}: {parts} parts up to date\n", page.display()))
}

/// The text of a part, `NAME` or `NAME:EXPERIMENT` (its name, group/name, or the name of the directory). `choice` chooses among all experiments that are
/// named, joined by `+`.
fn part(name: &str, page: &Path, loaded: &[Loaded]) -> Result<String, String> {
    let (kind, experiment) = match name.split_once(':') {
        Some((kind, experiment)) => (kind, Some(experiment.trim())),
        None => (name, None),
    };
    let named = |l: &&Loaded| experiment.is_none_or(|wanted| l.is_called(wanted));
    if kind.trim() == "choice" {
        let wanted: Vec<&str> =
            experiment.map_or(Vec::new(), |names| names.split('+').map(str::trim).collect());
        let all: Vec<Record> = loaded
            .iter()
            .filter(|l| wanted.is_empty() || wanted.iter().any(|name| l.is_called(name)))
            .flat_map(|l| l.records.iter().cloned())
            .collect();
        let rows = choice::choices(&all).markdown();
        return match rows.is_empty() {
            true => Err(format!("`{name}`: no result with both a speed and an error was given")),
            false => Ok(rows),
        };
    }
    let names =
        || loaded.iter().map(|l| l.results.plan.experiment.full_name()).collect::<Vec<_>>().join(", ");
    let Some(l) = loaded.iter().find(named) else {
        return Err(format!(
            "no result of experiment `{}` was given (given: {})",
            experiment.unwrap_or(""),
            names()
        ));
    };
    Ok(match kind.trim() {
        "formats" => formats::formats(&l.records).markdown(),
        "reads" => table::reads(&l.records).markdown(),
        "table" => {
            let gaps = table::gaps(&l.records).markdown();
            let gaps = if gaps.is_empty() { gaps } else { format!("\nSkipped and failed:\n\n{gaps}") };
            markdown::cells(&l.records) + &gaps
        }
        "figures" => {
            let plots = relative(&l.results.dir.join("plots"), page.parent().unwrap_or(Path::new("")));
            plot::links(&plot::figures(&l.records, &l.results.lines), &plots)
        }
        "machine" => markdown::machine_table(&l.results.machine),
        "sentence" => sentence(&l.records) + "\n",
        "reproduce" => markdown::reproduce(&l.results.plan, &l.results.machine),
        other => return Err(format!("unknown part `{other}`; there are {}", PARTS.join(", "))),
    })
}

/// `path` as seen from the directory `from`, where both are relative or both absolute; otherwise `path` itself.
fn relative(path: &Path, from: &Path) -> PathBuf {
    let normal = |p: &Path| {
        p.components()
            .filter(|c| *c != Component::CurDir)
            .map(|c| c.as_os_str().to_owned())
            .collect::<Vec<_>>()
    };
    let (path, from) = match (
        path.canonicalize(),
        if from.as_os_str().is_empty() { Path::new(".") } else { from }.canonicalize(),
    ) {
        (Ok(p), Ok(f)) => (p, f),
        _ => (path.to_path_buf(), from.to_path_buf()),
    };
    let (p, f) = (normal(&path), normal(&from));
    let shared = p.iter().zip(&f).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n("..".into(), f.len() - shared);
    up.chain(p[shared..].iter().cloned()).collect()
}

const BEGIN: &str = "<!-- BEGIN longbit:";
const END: &str = "<!-- END longbit:";
const CLOSE: &str = "-->";

/// Rewrites what stands between `<!-- BEGIN longbit: NAME -->` and `<!-- END longbit: NAME -->`, each alone on its line.
/// Markers inside fenced code are text. Gives the new page and the number of parts, or the line and what is wrong there.
fn splice(
    text: &str,
    mut part: impl FnMut(&str) -> Result<String, String>,
) -> std::result::Result<(String, usize), (usize, String)> {
    let mut out = String::with_capacity(text.len());
    let mut open: Option<(usize, String)> = None;
    let (mut fenced, mut parts) = (false, 0);
    for (i, raw) in text.split_inclusive('\n').enumerate() {
        let line = i + 1;
        let trimmed = raw.trim();
        let marker =
            |prefix: &str| trimmed.strip_prefix(prefix).and_then(|r| r.strip_suffix(CLOSE)).map(str::trim);
        if open.is_none() && (trimmed.starts_with("```") || trimmed.starts_with("~~~")) {
            fenced = !fenced;
        }
        match (&open, marker(BEGIN).filter(|_| !fenced), marker(END).filter(|_| !fenced)) {
            (None, Some(name), _) => {
                let body = part(name).map_err(|what| (line, what))?;
                out.push_str(raw);
                if !raw.ends_with('\n') {
                    out.push('\n');
                }
                // Blank lines around: Markdown needs them between a comment and a table.
                out.push('\n');
                out.push_str(body.trim_end());
                out.push_str("\n\n");
                open = Some((line, name.to_owned()));
                parts += 1;
            }
            (Some((from, name)), Some(inner), _) => {
                return Err((
                    line,
                    format!("`{inner}` begins inside `{name}` of line {from}, which has no END before"),
                ));
            }
            (Some((from, name)), None, Some(end)) if end != name => {
                return Err((line, format!("END of `{end}`, but `{name}` of line {from} is open")));
            }
            (Some(_), None, Some(_)) => {
                out.push_str(raw);
                open = None;
            }
            (None, None, Some(end)) => return Err((line, format!("END of `{end}` without a BEGIN"))),
            (Some(_), None, None) => {} // the old text
            (None, None, None) => out.push_str(raw),
        }
    }
    match open {
        Some((line, name)) => Err((line, format!("`{name}` has no `{END} {name} {CLOSE}`"))),
        None => Ok((out, parts)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing;

    fn echo(name: &str) -> Result<String, String> {
        if name == "bad" { Err("unknown part `bad`".into()) } else { Ok(format!("[{name}]\n")) }
    }

    #[test]
    fn only_the_marked_parts_change() {
        let page = "# Title\n<!-- BEGIN longbit: table -->\nold\n<!-- END longbit: table -->\ntext\n\
                    <!-- BEGIN longbit: sentence:long -->\n<!-- END longbit: sentence:long -->\nend";
        let (once, parts) = splice(page, echo).unwrap();
        assert_eq!(parts, 2);
        assert!(once.starts_with(
            "# Title\n<!-- BEGIN longbit: table -->\n\n[table]\n\n<!-- END longbit: table -->\ntext\n"
        ));
        assert!(once.contains("[sentence:long]") && once.ends_with("\nend") && !once.contains("old"));
        assert_eq!(splice(&once, echo).unwrap().0, once, "a second time changes nothing");
    }

    #[test]
    fn wrong_markers_are_named_with_their_line() {
        let cases = [
            ("a\n<!-- BEGIN longbit: table -->\n", 2, "no `<!-- END longbit: table -->`"),
            ("<!-- END longbit: table -->\n", 1, "without a BEGIN"),
            (
                "<!-- BEGIN longbit: table -->\n<!-- END longbit: machine -->\n",
                2,
                "`table` of line 1 is open",
            ),
            ("<!-- BEGIN longbit: table -->\n<!-- BEGIN longbit: machine -->\n", 2, "begins inside `table`"),
            ("\n\n<!-- BEGIN longbit: bad -->\n<!-- END longbit: bad -->\n", 3, "unknown part"),
        ];
        for (page, line, words) in cases {
            let (at, what) = splice(page, echo).unwrap_err();
            assert!(at == line && what.contains(words), "{page}: {at} {what}");
        }
        let fenced = "```\n<!-- BEGIN longbit: table -->\n```\n";
        assert_eq!(splice(fenced, echo).unwrap(), (fenced.to_owned(), 0));
    }

    #[test]
    fn a_page_takes_every_part_and_is_safe_on_errors() {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path().join("results/context-long");
        let (plan, machine, lines) = testing::with_gaps();
        testing::write(&results, &plan, &machine, &lines);
        let page = dir.path().join("REPORT.md");
        let body: String = PARTS
            .iter()
            .map(|p| {
                format!("<!-- BEGIN longbit: {p}:context/long -->\n<!-- END longbit: {p}:context/long -->\n")
            })
            .collect();
        std::fs::write(&page, &body).unwrap();
        let options =
            ReportOptions { results: vec![results], splice: Some(page.clone()), ..Default::default() };
        let mut out = Vec::new();
        assert_eq!(report(&options, &mut out).unwrap(), Exit::Incomplete);
        assert!(String::from_utf8(out).unwrap().contains("8 parts"));
        let text = std::fs::read_to_string(&page).unwrap();
        for words in [
            "](results/context-long/plots/speed.svg)",
            "At 96k tokens",
            "Example CPU",
            "longbit run",
            "| oom",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
        std::fs::write(&page, text.replace("sentence:context/long", "sentence:other")).unwrap();
        let before = std::fs::read(&page).unwrap();
        let error = report(&options, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("no result of experiment `other`") && error.contains("REPORT.md:"), "{error}");
        assert_eq!(std::fs::read(&page).unwrap(), before);
    }

    #[test]
    fn derived_files_are_rebuilt_from_the_log_of_any_commit() {
        let dir = tempfile::tempdir().unwrap();
        let (mut plan, machine, lines) = testing::with_gaps();
        plan.git_sha = "f".repeat(40);
        testing::write(dir.path(), &plan, &machine, &lines);
        std::fs::write(dir.path().join("cells.csv"), "status\n").unwrap();
        let log = std::fs::read(dir.path().join("samples.jsonl")).unwrap();
        let options = ReportOptions { results: vec![dir.path().into()], rebuild: true, ..Default::default() };
        let mut out = Vec::new();
        assert_eq!(report(&options, &mut out).unwrap(), Exit::Incomplete);
        assert!(String::from_utf8(out).unwrap().contains("cells.csv"));
        assert_eq!(Record::read_csv(&dir.path().join("cells.csv")).unwrap().len(), 42);
        assert_eq!(std::fs::read(dir.path().join("samples.jsonl")).unwrap(), log);
    }

    #[test]
    fn every_format_is_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let (plan, machine, lines) = testing::with_gaps();
        testing::write(dir.path(), &plan, &machine, &lines);
        let print = |format| {
            let options = ReportOptions { results: vec![dir.path().into()], format, ..Default::default() };
            let mut out = Vec::new();
            report(&options, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&print(Format::Json)).unwrap().len(), 42);
        let csv = print(Format::Csv);
        assert_eq!(::csv::Reader::from_reader(csv.as_bytes()).records().filter(|r| r.is_ok()).count(), 42);
        assert!(print(Format::Markdown).starts_with("# context/long\n"));
        assert!(print(Format::Table).contains("At 96k tokens"));
        let none = report(&ReportOptions::default(), &mut Vec::new()).unwrap_err();
        assert_eq!(none.exit(), Exit::Usage);
    }
}
