//! Measuring a plan: cohorts, retries, resuming, and the append-only log that is the truth.
//!
//! ```text
//! run(files) -> spec -> outline of the plan -> directory (fresh or resumed) -> Scheduler -> emit
//! ```
//! Ending the program at any moment loses at most the line that was being written; the next run goes on.

mod directory;
mod progress;
mod schedule;
pub mod store;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use longbit_protocol::{Capabilities, Machine, Status};

use crate::engine::Engine;
use crate::plan::{self, Plan, PlanOptions};
use crate::spec::{self, Experiment, MemoryLimit};
use crate::{Exit, LabError, Result, emit, machine};
use directory::{Directory, Found};
use progress::Progress;
use schedule::Scheduler;

/// What `run` is asked to do.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Experiment files; each gets a directory of its own.
    pub files: Vec<PathBuf>,
    /// Results directory; absent: `runs/<group>-<name>`. With several files it holds one folder for each.
    pub out: Option<PathBuf>,
    /// Removes an earlier result in the directory instead of going on with it.
    pub fresh: bool,
    /// What the flags change about the plan.
    pub plan: PlanOptions,
    /// Stops at the first cell that fails.
    pub fail_fast: bool,
    /// Measures cells again that failed in an earlier run into the directory.
    pub retry_failed: bool,
    /// Says nothing on standard error but errors.
    pub quiet: bool,
    /// Plain lines instead of a bar.
    pub no_progress: bool,
    /// Colours in the table.
    pub color: bool,
    /// The machine, where it is already known; otherwise it is gathered.
    pub machine: Option<Machine>,
}

/// Measures the experiments, prints their tables on `out`, progress and warnings on `err`. 0, 4 when a cell violates
/// `[verify]`, 6 when cells failed; cells that the plan skips are not failures.
///
/// # Errors
/// [`LabError::Invalid`] for files, flags or a directory that holds something else, before anything is written;
/// [`LabError::Io`] when results cannot be written (what was measured before stays); [`LabError::Engine`].
pub fn run(
    engine: &dyn Engine,
    options: &RunOptions,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Exit> {
    let capabilities = engine.capabilities()?;
    let experiments = load_all(&options.files, &capabilities)?;
    let mut exit = Exit::Ok;
    for experiment in &experiments {
        let dir = directory_of(options, experiment, experiments.len() > 1);
        match measure(engine, &capabilities, experiment, &dir, options, err) {
            Ok(one) => exit = exit.worst(one),
            // What is wrong with one experiment does not stop the others.
            Err(error @ LabError::Invalid(_)) if experiments.len() > 1 && !options.fail_fast => {
                let _ = writeln!(err, "error: {error}");
                exit = exit.worst(error.exit());
                continue;
            }
            Err(error) => return Err(error),
        }
        let written = emit::write_all(&dir)?;
        if experiments.len() > 1 {
            writeln!(out, "{}", experiment.meta.full_name())?;
        }
        let table = match options.color {
            true => emit::terminal_table(&written.records, true),
            false => written.table,
        };
        writeln!(out, "{}\n", table.trim_end())?;
        for file in &written.files {
            writeln!(out, "wrote {}", file.display())?;
        }
        writeln!(out, "\n{}", written.sentence)?;
        if exit != Exit::Ok && options.fail_fast {
            break;
        }
    }
    out.flush()?;
    Ok(exit)
}

/// Reads all files before anything is measured, so that a mistake in the last one costs nothing.
///
/// # Errors
/// As [`spec::load`], with the complaints about all files together.
pub fn load_all(files: &[PathBuf], capabilities: &Capabilities) -> Result<Vec<Experiment>> {
    if files.is_empty() {
        return Err(LabError::invalid(
            "no experiment file was given",
            "",
            "e.g. experiments/smoke/tiny.toml",
        ));
    }
    let (mut experiments, mut complaints) = (Vec::<Experiment>::new(), Vec::new());
    for file in files {
        match spec::load(file, capabilities) {
            Ok(e) if experiments.iter().any(|other| other.meta.full_name() == e.meta.full_name()) => {
                let what = format!("two files are the experiment {}", e.meta.full_name());
                return Err(LabError::invalid(what, file.display().to_string(), "rename one of them"));
            }
            Ok(experiment) => experiments.push(experiment),
            Err(LabError::Invalid(more)) => complaints.extend(more),
            Err(other) => return Err(other),
        }
    }
    if complaints.is_empty() { Ok(experiments) } else { Err(LabError::Invalid(complaints)) }
}

fn directory_of(options: &RunOptions, experiment: &Experiment, several: bool) -> PathBuf {
    let name = format!("{}-{}", experiment.meta.group, experiment.meta.name);
    match &options.out {
        Some(out) if several => out.join(name),
        Some(out) => out.clone(),
        None => Path::new("runs").join(name),
    }
}

/// Plans one experiment or finds its plan in the directory, and measures what is not measured yet.
pub(crate) fn measure(
    engine: &dyn Engine,
    capabilities: &Capabilities,
    experiment: &Experiment,
    dir: &Path,
    options: &RunOptions,
    err: &mut dyn Write,
) -> Result<Exit> {
    let mut here = options.machine.clone().unwrap_or_else(machine::gather);
    let mut plan = plan::outline(experiment, capabilities, &here, &options.plan)?;
    let directory = match Directory::resume(dir, &plan, options.fresh)? {
        Found::Same(directory, mut stored) => {
            continued(dir, &stored, &plan, options.retry_failed)?;
            // Limits say how long to wait, not what is measured: those of today count. But what was planned fitted then,
            // and a share of the memory that is free now must not kill it.
            let asked = matches!(options.plan.max_rss.unwrap_or(experiment.max_rss), MemoryLimit::Bytes(_));
            let before = stored.limits.max_rss_bytes;
            stored.limits = plan.limits;
            if !asked {
                stored.limits.max_rss_bytes = before.max(plan.limits.max_rss_bytes);
            }
            let limit = stored.limits.max_rss_bytes;
            let skipped = |c: &&plan::PlannedCell| c.skip.is_some() && c.predicted.rss_bytes > before;
            let fits = stored.cells.iter().filter(skipped).filter(|c| c.predicted.rss_bytes <= limit).count();
            if fits > 0 && !options.quiet {
                let _ = writeln!(
                    err,
                    "warning: {fits} cells that the stored plan skipped for memory would fit the limit of today and stay \
                     skipped; --fresh plans anew"
                );
            }
            plan = *stored;
            // The same text or trace may lie elsewhere today.
            let text = experiment.text.as_ref().map(|t| &t.file);
            for cell in &mut plan.cells {
                (cell.text, cell.trace) = (text.cloned(), experiment.trace.clone());
            }
            directory
        }
        found @ (Found::Nothing | Found::Old(_)) => {
            let mut threads: BTreeSet<usize> = plan.cells.iter().map(|c| c.threads).collect();
            threads.extend([1, here.cpus_allowed]);
            // A team beyond the CPUs reads no faster than one that fits.
            threads.retain(|&t| t <= here.cpus_allowed);
            let threads: Vec<usize> = threads.into_iter().collect();
            let probes = machine::probe(&mut here, engine, &threads)?;
            plan::predict(&mut plan, engine, experiment.on_exceed, &probes, &experiment.dir)?;
            // The old result goes only now: what is refused, or fails, costs nothing.
            if let Found::Old(old) = found {
                old.clear()?;
            }
            Directory::create(dir, &plan, &here)?
        }
    };
    // What is said on the way is advice: a reader that is gone does not end a measurement.
    if !options.quiet {
        for warning in here.warnings.iter().chain(&plan.beyond_cpus(here.cpus_allowed)) {
            let _ = writeln!(err, "warning: {warning}");
        }
        if plan.git_dirty == Some(true) {
            let _ = writeln!(
                err,
                "warning: the work tree differs from commit {}; results name the commit alone",
                plan.git_sha
            );
        }
    }
    let (store, lines) = store::Store::open(&directory.samples())?;
    let progress = Progress::new(&plan, options, err);
    let mut scheduler = Scheduler::new(engine, &plan, store, &lines, directory, progress);
    scheduler.dir.clone_from(&experiment.dir);
    scheduler.fail_fast = options.fail_fast;
    scheduler.retry_failed = options.retry_failed;
    scheduler.run()
}

/// Refuses to measure further cells with sources that were changed where those of the result were not, or the other way.
/// A result that is complete may be written out by any binary of its commit.
fn continued(dir: &Path, stored: &Plan, plan: &Plan, retry_failed: bool) -> Result<()> {
    if stored.git_dirty == plan.git_dirty {
        return Ok(());
    }
    let log = dir.join("samples.jsonl");
    let lines = if log.exists() { store::read(&log)? } else { Vec::new() };
    let states = store::states(&lines);
    let left = wanted(stored).any(|i| {
        let end = states.get(&stored.cells[i].id).and_then(|s| s.end);
        end.is_none() || (retry_failed && end != Some(Status::Ok))
    });
    if !left {
        return Ok(());
    }
    let state = |dirty| match dirty {
        Some(true) => "changed",
        Some(false) => "those of its commit",
        None => "unknown to be changed or not",
    };
    let what = format!(
        "{} is unfinished and holds another run: its sources were {}, those of this program are {}",
        dir.display(),
        state(stored.git_dirty),
        state(plan.git_dirty)
    );
    let help = "--fresh removes that result and starts anew; --out DIR keeps it and writes elsewhere";
    Err(LabError::invalid(what, dir.join("plan.json").display().to_string(), help))
}

/// Whether a cell is part of the measurement at all.
fn wanted(plan: &Plan) -> impl Iterator<Item = usize> {
    plan.cohorts.iter().flatten().copied()
}

/// The exit code of a directory from the state of its cells.
fn exit_of(
    plan: &Plan,
    states: &std::collections::BTreeMap<String, store::CellState>,
    violated: bool,
) -> Exit {
    let complete =
        wanted(plan).all(|i| states.get(&plan.cells[i].id).and_then(|s| s.end) == Some(Status::Ok));
    let exit = if complete { Exit::Ok } else { Exit::Incomplete };
    if violated { exit.worst(Exit::VerifyFailed) } else { exit }
}

#[cfg(test)]
mod tests;
