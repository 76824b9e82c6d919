//! Where the time of a step goes, as the verb `profile` shows it: a table, CSV, JSON and a figure.
//!
//! The numbers come from an engine's own stopwatch; here operations are words. A row is the time that a thread spends in
//! an operation, mean over threads and steps, so that the rows of a part add up to its step.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::analyse::label::{context, digits, percent};
use crate::emit::table::Rows;
use crate::emit::{json, plot, write_file};
use crate::{LabError, Result};

/// What was profiled, and under which conditions.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Profile {
    /// Preset or path.
    pub model: String,
    /// Number format of the output head.
    pub head: String,
    /// Number format of cached keys and values.
    pub kv_dtype: String,
    /// Attention method with its parameters.
    pub method: String,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Threads of the team.
    pub threads: usize,
    /// Tokens in the cache when a step begins.
    pub context_tokens: usize,
    /// Read bandwidth with the same threads before the steps, 10^9 bytes a second.
    pub probe_before_gb_s: f64,
    /// And after them.
    pub probe_after_gb_s: f64,
    /// The kinds of step.
    pub parts: Vec<Part>,
}

/// One kind of step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Part {
    /// `decode` or `prefill`.
    pub name: String,
    /// Tokens that a step takes.
    pub tokens: u64,
    /// Steps measured.
    pub steps: u64,
    /// Wall time of a step, mean.
    pub step_ns: f64,
    /// Share of the threads' time in which they wait, start or stop.
    pub overhead: f64,
    /// The operations, in the order of a layer.
    pub rows: Vec<Row>,
}

/// One operation of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Short name, e.g. `attention`.
    pub operation: String,
    /// What it is.
    pub description: String,
    /// Nothing is computed: barriers, fork and join.
    pub waiting: bool,
    /// Calls a step and thread.
    pub calls: f64,
    /// Time a step, mean over threads.
    pub time_ns: f64,
    /// Bytes of weights, cached rows or head that a step reads.
    pub bytes: u64,
}

impl Row {
    /// 10^9 bytes a second; none for operations that read nothing to speak of.
    pub fn gb_s(&self) -> Option<f64> {
        (self.bytes > 0 && self.time_ns > 0.0).then(|| self.bytes as f64 / self.time_ns)
    }
}

impl Profile {
    /// Mean of the probes; none when neither measured anything.
    pub fn probe_gb_s(&self) -> Option<f64> {
        let mean = 0.5 * (self.probe_before_gb_s + self.probe_after_gb_s);
        (mean.is_finite() && mean > 0.0).then_some(mean)
    }

    /// Under which conditions, in one line.
    pub fn conditions(&self) -> String {
        format!(
            "{}, {} head · {} · {} KV · {} tokens in the cache · {} thread{} · {}",
            self.model,
            self.head,
            self.method,
            self.kv_dtype,
            context(self.context_tokens as u64),
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.isa
        )
    }

    /// The report for people.
    pub fn text(&self, color: bool) -> String {
        let mut text = format!("{}\n", self.conditions());
        text.push_str(&format!(
            "read bandwidth: {} GB/s before, {} GB/s after\n",
            digits(self.probe_before_gb_s),
            digits(self.probe_after_gb_s)
        ));
        for part in &self.parts {
            text.push_str(&format!("\n{}\n{}", part.title(), self.rows(part).terminal(color)));
            text.push_str(&format!(
                "fork, barriers and serial gaps: {} of the step\n",
                percent(part.overhead)
            ));
        }
        text
    }

    /// The table of one part.
    pub fn rows(&self, part: &Part) -> Rows {
        let head =
            ["operation", "what", "calls", "ms", "share", "MB", "GB/s", "of bandwidth"].map(str::to_owned);
        let probe = self.probe_gb_s();
        let mut body: Vec<Vec<String>> = part
            .rows
            .iter()
            .filter(|r| r.calls > 0.0 || r.time_ns > 0.0)
            .map(|r| {
                let rate = r.gb_s();
                let whole = (r.calls - r.calls.round()).abs() < 1e-9;
                vec![
                    r.operation.clone(),
                    r.description.clone(),
                    if whole { format!("{:.0}", r.calls) } else { digits(r.calls) },
                    digits(r.time_ns / 1e6),
                    percent(r.time_ns / part.step_ns),
                    if r.bytes > 0 { digits(r.bytes as f64 / 1e6) } else { String::new() },
                    rate.map_or(String::new(), digits),
                    rate.zip(probe).map_or(String::new(), |(rate, probe)| percent(rate / probe)),
                ]
            })
            .collect();
        let bytes: u64 = part.rows.iter().map(|r| r.bytes).sum();
        let rate = (part.step_ns > 0.0).then(|| bytes as f64 / part.step_ns);
        body.push(vec![
            "step".to_owned(),
            String::new(),
            String::new(),
            digits(part.step_ns / 1e6),
            percent(1.0),
            digits(bytes as f64 / 1e6),
            rate.map_or(String::new(), digits),
            rate.zip(probe).map_or(String::new(), |(rate, probe)| percent(rate / probe)),
        ]);
        Rows { head: head.to_vec(), body, left: vec![0, 1] }
    }

    /// All parts, one row an operation; units in the column names.
    pub fn csv(&self) -> String {
        let head = [
            "part",
            "tokens",
            "steps",
            "operation",
            "description",
            "calls_per_step",
            "time_ns",
            "share",
            "bytes_per_step",
            "gb_s",
            "of_bandwidth",
        ];
        let probe = self.probe_gb_s();
        let number = |v: Option<f64>| v.map_or(String::new(), |v| v.to_string());
        let body: Vec<Vec<String>> = self
            .parts
            .iter()
            .flat_map(|part| {
                part.rows.iter().map(move |r| {
                    vec![
                        part.name.clone(),
                        part.tokens.to_string(),
                        part.steps.to_string(),
                        r.operation.clone(),
                        r.description.clone(),
                        r.calls.to_string(),
                        r.time_ns.round().to_string(),
                        (r.time_ns / part.step_ns.max(1.0)).to_string(),
                        r.bytes.to_string(),
                        number(r.gb_s()),
                        number(r.gb_s().zip(probe).map(|(rate, probe)| rate / probe)),
                    ]
                })
            })
            .collect();
        crate::emit::csv::table(&head.map(str::to_owned), &body)
    }

    /// Writes `profile.csv`, `profile.json`, `profile.svg` and `profile.png` into `dir`, which is made where it is missing.
    ///
    /// # Errors
    /// [`LabError::Io`] and [`LabError::Plot`] when one cannot be written; files appear whole or not at all.
    pub fn write(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(dir).map_err(|e| LabError::io("create", dir, e))?;
        let mut files = Vec::new();
        for (name, text) in [("profile.csv", self.csv()), ("profile.json", json(self)?)] {
            let path = dir.join(name);
            write_file(&path, text.as_bytes())?;
            files.push(path);
        }
        files.extend(plot::bars::write(&self.chart(), dir)?);
        Ok(files)
    }

    /// Bars of the operations' times, a panel a part.
    fn chart(&self) -> plot::bars::Chart {
        let panels = self.parts.iter().map(|part| plot::bars::Panel {
            title: part.title(),
            bars: part
                .rows
                .iter()
                .filter(|r| r.time_ns > 0.0)
                .map(|r| plot::bars::Bar {
                    label: r.description.clone(),
                    value: r.time_ns / 1e6,
                    note: format!(
                        "{} ms · {}{}",
                        digits(r.time_ns / 1e6),
                        percent(r.time_ns / part.step_ns),
                        r.gb_s().map_or(String::new(), |rate| format!(" · {} GB/s", digits(rate)))
                    ),
                    faint: r.waiting,
                })
                .collect(),
        });
        let probe = self.probe_gb_s().map_or(String::new(), |p| format!(" · reads {} GB/s", digits(p)));
        plot::bars::Chart {
            name: "profile".to_owned(),
            title: "Where the time of a step goes".to_owned(),
            subtitle: format!("{}{probe}", self.conditions()),
            unit: "Time a step, mean over threads (ms)".to_owned(),
            panels: panels.collect(),
        }
    }
}

impl Part {
    /// E.g. `decode step, mean of 50: 42.1 ms, 23.7 tok/s`.
    pub fn title(&self) -> String {
        let what = match self.name.as_str() {
            "decode" => "decode step".to_owned(),
            name => format!("{name} of {} tokens", self.tokens),
        };
        let rate = self.tokens as f64 * 1e9 / self.step_ns.max(1.0);
        format!("{what}, mean of {}: {} ms, {} tok/s", self.steps, digits(self.step_ns / 1e6), digits(rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        let row = |operation: &str, calls, time_ns, bytes, waiting| Row {
            operation: operation.into(),
            description: format!("what {operation} is"),
            waiting,
            calls,
            time_ns,
            bytes,
        };
        let rows = vec![
            row("down", 30.0, 6e6, 132_000_000, false),
            row("merge", 0.0, 0.0, 0, false),
            row("norm", 60.5, 1e6, 0, false),
            row("wait", 300.0, 0.75e6, 0, true),
            row("fork", 1.0, 0.25e6, 0, true),
        ];
        let part = Part { name: "decode".into(), tokens: 1, steps: 50, step_ns: 8e6, overhead: 0.125, rows };
        let mut prefill = Part { name: "prefill".into(), tokens: 512, steps: 3, ..part.clone() };
        prefill.rows.truncate(1);
        Profile {
            model: "preset:tiny".into(),
            head: "bf16".into(),
            kv_dtype: "bf16".into(),
            method: "dense".into(),
            isa: "scalar".into(),
            threads: 2,
            context_tokens: 8192,
            probe_before_gb_s: 31.0,
            probe_after_gb_s: 33.0,
            parts: vec![part, prefill],
        }
    }

    #[test]
    fn the_table_has_a_row_an_operation_and_a_line_of_overhead() {
        let text = profile().text(false);
        let line = |word: &str| text.lines().find(|l| l.starts_with(word)).unwrap_or_default().to_owned();
        assert!(text.starts_with("preset:tiny, bf16 head · dense · bf16 KV · 8k tokens"), "{text}");
        assert!(text.contains("decode step, mean of 50: 8.00 ms, 125 tok/s"), "{text}");
        assert!(text.contains("prefill of 512 tokens, mean of 3: 8.00 ms, 64000 tok/s"), "{text}");
        // 132 MB in 6 ms are 22 GB/s, of a probe of 32.
        let down = line("down");
        assert!(down.contains("75 %") && down.contains("22.0") && down.ends_with("69 %"), "{down}");
        assert!(line("norm").contains("60.5") && !text.contains("merge"), "{text}");
        assert!(line("step").contains("100 %"), "{text}");
        assert_eq!(text.matches("fork, barriers and serial gaps: 12 % of the step").count(), 2, "{text}");
    }

    #[test]
    fn files_hold_what_the_table_says() {
        let dir = tempfile::tempdir().unwrap();
        let profile = profile();
        let files = profile.write(&dir.path().join("new")).unwrap();
        let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["profile.csv", "profile.json", "profile.svg", "profile.png"]);
        let read = |i: usize| std::fs::read_to_string(&files[i]).unwrap();
        let mut csv = csv::Reader::from_reader(read(0).as_bytes().to_vec().leak() as &[u8]);
        let rows: Vec<_> = csv.records().map(|r| r.unwrap()).collect();
        assert_eq!(rows.len(), 6);
        assert_eq!((&rows[0][3], &rows[0][6], &rows[0][9]), ("down", "6000000", "22"));
        assert_eq!((&rows[3][3], &rows[3][9]), ("wait", ""));
        let json: serde_json::Value = serde_json::from_str(&read(1)).unwrap();
        assert_eq!(json["parts"][0]["rows"][0]["bytes"], 132_000_000);
        let svg = read(2);
        assert!(svg.contains("<title>") && svg.contains("what down is") && svg.contains("22.0 GB/s"));
        assert!(std::fs::read(&files[3]).unwrap().starts_with(b"\x89PNG"));
        profile.write(&dir.path().join("new")).unwrap();
        assert_eq!(svg, read(2), "the same numbers give the same bytes");
    }
}
