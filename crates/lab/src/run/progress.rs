//! What a person sees while cells are measured: a bar on a terminal, one line a cohort elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use longbit_protocol::Sample;

use super::{RunOptions, wanted};
use crate::plan::{Plan, PlannedCell};
use crate::spec::units::show_seconds;

/// Steps of the bar for a predicted second.
const STEPS: f64 = 1000.0;

pub(super) struct Progress<'a> {
    bar: Option<ProgressBar>,
    err: &'a mut dyn Write,
    quiet: bool,
    /// Predicted seconds: of everything that is left to do, and of what was done since the start.
    left: f64,
    done: f64,
    started: Instant,
    last_tok_s: Option<f64>,
}

impl<'a> Progress<'a> {
    pub(super) fn new(plan: &Plan, options: &RunOptions, err: &'a mut dyn Write) -> Self {
        let left: f64 = wanted(plan).map(|i| plan.cells[i].predicted.seconds).sum();
        let show = !options.quiet && !options.no_progress && std::io::stderr().is_terminal();
        let bar = show.then(|| {
            let bar = ProgressBar::new((left * STEPS) as u64);
            if let Ok(style) =
                ProgressStyle::with_template("{bar:30} {percent:>3} %  {elapsed_precise}  {msg}")
            {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let quiet = options.quiet;
        Progress { bar, err, quiet, left, done: 0.0, started: Instant::now(), last_tok_s: None }
    }

    /// Work that an earlier run did: it is not left, and it says nothing about the speed of this one.
    pub(super) fn resumed(&mut self, seconds: f64) {
        self.left -= seconds;
        if let Some(bar) = &self.bar {
            bar.inc((seconds * STEPS) as u64);
            bar.reset_eta();
        }
    }

    /// Work is over, measured or given up.
    pub(super) fn advance(&mut self, seconds: f64) {
        self.left = (self.left - seconds).max(0.0);
        self.done += seconds;
        if let Some(bar) = &self.bar {
            bar.inc((seconds * STEPS) as u64);
        }
    }

    pub(super) fn sample(&mut self, cell: &PlannedCell, sample: &Sample, seconds: f64) {
        self.advance(seconds);
        let total: u64 = sample.tok_ns.iter().sum();
        self.last_tok_s = (total > 0).then(|| (sample.tok_ns.len() * cell.batch) as f64 * 1e9 / total as f64);
        if let Some(bar) = &self.bar {
            let speed = self.last_tok_s.map(|s| format!("  {s:.2} tok/s")).unwrap_or_default();
            bar.set_message(format!("{}  {}{speed}", self.eta(), short(cell)));
        }
    }

    pub(super) fn phase(&self, what: &str, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            let share = if total > 0 {
                format!(" {:.0} %", done as f64 * 100.0 / total as f64)
            } else {
                String::new()
            };
            bar.set_message(format!("{}  {what}{share}", self.eta()));
        }
    }

    /// Seconds left: the predictions, corrected by how long predicted work really took.
    fn eta(&self) -> String {
        let factor = if self.done > 0.0 { self.started.elapsed().as_secs_f64() / self.done } else { 1.0 };
        format!("about {} left", show_seconds(self.left * factor))
    }

    /// A cohort is over.
    pub(super) fn cohort(&mut self, number: usize, of: usize, cell: &PlannedCell, done: usize, cells: usize) {
        let speed = self.last_tok_s.map(|s| format!(", last {s:.2} tok/s")).unwrap_or_default();
        let line = format!(
            "[{number}/{of}] context={} kv={}: {done} of {cells} cells measured{speed}, {}",
            cell.context,
            cell.kv_dtype,
            self.eta()
        );
        if self.bar.is_none() {
            self.say(&line);
        }
    }

    /// A line that stays. A reader that is gone does not end a measurement.
    pub(super) fn say(&mut self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if !self.quiet => {
                let _ = writeln!(self.err, "{line}");
            }
            None => {}
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Context, threads, KV dtype and method of a cell.
pub(super) fn short(cell: &PlannedCell) -> String {
    let batch = if cell.batch == 1 { String::new() } else { format!(" batch {}", cell.batch) };
    format!("{} x{} {} {}{batch}", cell.context, cell.threads, cell.kv_dtype, cell.method_string())
}
