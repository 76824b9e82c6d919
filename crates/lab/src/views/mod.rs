//! The views that need no results: `list`, `plan`, `machine`, and in a file of its own `verify`.

mod verify;

use std::io::Write;
use std::path::PathBuf;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use longbit_protocol::{Machine, ParamInfo, ParamKind};

use crate::analyse::label::digits;
use crate::engine::Engine;
use crate::plan::{Plan, PlanOptions, disk_bytes, outline, predict};
use crate::run;
use crate::spec::units::{show_bytes, show_seconds};
use crate::{Exit, Result, machine};

pub use verify::verify;

/// How a view is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Aligned text.
    #[default]
    Table,
    /// One JSON document.
    Json,
}

/// An aligned table; the columns in `right` hold numbers.
fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for &i in right {
        if let Some(column) = table.column_mut(i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

fn json<T: serde::Serialize>(value: &T, out: &mut dyn Write) -> Result<()> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

/// `list`: methods, KV dtypes, presets and workloads of an engine, with their parameters.
///
/// # Errors
/// [`crate::LabError::Engine`], [`crate::LabError::Output`].
pub fn list(engine: &dyn Engine, format: Format, out: &mut dyn Write) -> Result<Exit> {
    let c = engine.capabilities()?;
    if format == Format::Json {
        json(&c, out)?;
        return Ok(Exit::Ok);
    }
    writeln!(out, "{} {} ({})", c.engine, c.version, c.isa)?;
    let named = |items: Vec<(&str, &str, &[ParamInfo])>| {
        let mut rows = Vec::new();
        for (name, summary, params) in items {
            rows.push(vec![name.to_owned(), String::new(), String::new(), String::new(), summary.to_owned()]);
            for p in params.iter().filter(|p| !p.setting) {
                rows.push(vec![
                    String::new(),
                    p.name.clone(),
                    p.default.clone(),
                    range(&p.kind),
                    p.summary.clone(),
                ]);
            }
        }
        table(&["name", "parameter", "default", "range", ""], &[], rows)
    };
    let methods =
        c.methods.iter().map(|m| (m.name.as_str(), m.summary.as_str(), m.params.as_slice())).collect();
    writeln!(out, "\nMethods\n{}", named(methods))?;
    let all = c.methods.iter().flat_map(|m| &m.params).filter(|p| p.setting);
    let mut settings: Vec<&ParamInfo> = Vec::new();
    all.for_each(|p| {
        if settings.iter().all(|known| known.name != p.name) {
            settings.push(p);
        }
    });
    // Those that every method takes come last.
    let everywhere = |p: &ParamInfo| c.methods.iter().all(|m| m.params.iter().any(|own| own.name == p.name));
    let (common, some): (Vec<&ParamInfo>, Vec<_>) = settings.into_iter().partition(|p| everywhere(p));
    for (who, settings) in [("Methods that choose among the tokens", some), ("All methods", common)] {
        if settings.is_empty() {
            continue;
        }
        let rows = settings
            .iter()
            .map(|p| vec![p.name.clone(), p.default.clone(), range(&p.kind), p.summary.clone()]);
        let settings = table(&["setting", "default", "range", ""], &[], rows.collect());
        writeln!(out, "\n{who} also take\n{settings}")?;
    }
    let kv = c
        .kv_dtypes
        .iter()
        .map(|k| vec![k.name.clone(), format!("{:.2}", k.bits_per_value), k.summary.clone()]);
    writeln!(out, "\nKV dtypes\n{}", table(&["name", "bits/value", ""], &[1], kv.collect()))?;
    let presets = c.presets.iter().map(|p| {
        let shape: Vec<String> = p.shape.iter().map(|(k, v)| format!("{k} {v}")).collect();
        vec![p.name.clone(), p.parameters.to_string(), shape.join(", "), p.summary.clone()]
    });
    writeln!(out, "\nPresets\n{}", table(&["name", "parameters", "shape", ""], &[1], presets.collect()))?;
    let workloads =
        c.workloads.iter().map(|w| (w.name.as_str(), w.summary.as_str(), w.params.as_slice())).collect();
    writeln!(out, "\nWorkloads\n{}", named(workloads))?;
    writeln!(out, "\nHead formats: {}", c.heads.join(", "))?;
    let said = [("I2_S byte orders", &c.i2s), ("Activations", &c.activations)];
    for (what, words) in said.into_iter().filter(|(_, words)| !words.is_empty()) {
        writeln!(out, "{what} (for checkpoints that do not tell): {}", words.join(", "))?;
    }
    Ok(Exit::Ok)
}

fn range(kind: &ParamKind) -> String {
    match kind {
        ParamKind::Int { min, max: u64::MAX } => format!("{min}.."),
        ParamKind::Int { min, max } => format!("{min}..{max}"),
        ParamKind::Float { min, max } => format!("{min}..{max} (real)"),
        ParamKind::Choice { of } => of.join("|"),
        ParamKind::Layers => "layers".into(),
    }
}

/// What `plan` is asked to do.
#[derive(Clone, Debug, Default)]
pub struct PlanView {
    /// Experiment files.
    pub files: Vec<PathBuf>,
    /// What the flags change about the plan.
    pub plan: PlanOptions,
    /// Prints the names of the cells alone.
    pub list: bool,
    /// How.
    pub format: Format,
    /// The machine, where it is already known; otherwise it is gathered.
    pub machine: Option<Machine>,
}

/// `plan`: what `run` would measure, with predicted time, memory and disk. Writes nothing but `out`.
///
/// # Errors
/// As [`crate::run::run`], except that nothing is stored.
pub fn plan(engine: &dyn Engine, options: &PlanView, out: &mut dyn Write) -> Result<Exit> {
    let capabilities = engine.capabilities()?;
    let experiments = run::load_all(&options.files, &capabilities)?;
    let mut here = options.machine.clone().unwrap_or_else(machine::gather);
    let mut plans = Vec::new();
    for experiment in &experiments {
        plans.push(outline(experiment, &capabilities, &here, &options.plan)?);
    }
    if options.list {
        for cell in plans.iter().flat_map(|p| &p.cells) {
            writeln!(out, "{}", cell.name)?;
        }
        return Ok(Exit::Ok);
    }
    if here.probes.is_empty() {
        let threads = machine::probe_threads(here.cpus_allowed);
        machine::probe(&mut here, engine, &threads)?;
    }
    for (plan, experiment) in plans.iter_mut().zip(&experiments) {
        predict(plan, engine, experiment.on_exceed, &here.probes, &experiment.dir)?;
    }
    if options.format == Format::Json {
        json(&plans, out)?;
        return Ok(Exit::Ok);
    }
    for plan in &plans {
        plan_table(plan, here.cpus_allowed, out)?;
    }
    if plans.len() > 1 {
        let seconds: f64 = plans.iter().flat_map(|p| &p.cells).map(|c| c.predicted.seconds).sum();
        let disk: u64 = plans.iter().map(disk_bytes).sum();
        writeln!(out, "all together about {}, {} of disk", show_seconds(seconds), show_bytes(disk))?;
    }
    Ok(Exit::Ok)
}

fn plan_table(plan: &Plan, cpus: usize, out: &mut dyn Write) -> Result<()> {
    writeln!(
        out,
        "{} (plan {})\n{}\n",
        plan.experiment.full_name(),
        plan.plan_hash,
        plan.experiment.question
    )?;
    let prompts = plan.cells.iter().any(|c| c.predicted.prefill_macs > 0);
    let rows = plan.cells.iter().map(|c| {
        let p = &c.predicted;
        let shown = |text: String, known: bool| if known { text } else { String::new() };
        let mut row = vec![
            c.context.to_string(),
            match c.batch {
                1 => c.threads.to_string(),
                batch => format!("{}, batch {batch}", c.threads),
            },
            c.kv_dtype.clone(),
            c.method_string(),
            shown(show_seconds(p.seconds), c.skip.is_none()),
            shown(show_bytes(p.rss_bytes), p.rss_bytes > 0),
            shown(show_bytes(p.weight_bytes_per_token + p.kv_bytes_per_token), p.rss_bytes > 0),
            c.skip.as_ref().map(|s| format!("skipped: {s}")).unwrap_or_default(),
        ];
        if prompts {
            row.insert(7, format!("{} TMAC", digits(p.prefill_macs as f64 / 1e12)));
        }
        row
    });
    let mut header = vec!["context", "threads", "kv", "method", "time", "memory", "read/token", ""];
    if prompts {
        header.insert(7, "prefill");
    }
    let right: &[usize] = if prompts { &[0, 1, 4, 5, 6, 7] } else { &[0, 1, 4, 5, 6] };
    writeln!(out, "{}\n", table(&header, right, rows.collect()))?;
    if let Some(limit) = plan.prefill_limit {
        writeln!(
            out,
            "prefill: tera multiply-adds of running the text through the model, that of the reference included; the cells of \
             one KV dtype and context share it; contexts above {limit} tokens (workload.prefill_limit) are skipped\n"
        )?;
    }
    let slow = plan.beyond_cpus(cpus).map(|cost| format!("warning: {cost}"));
    for note in plan.splits().into_iter().chain(plan.beyond_training()).chain(slow) {
        writeln!(out, "{note}\n")?;
    }
    let measured: Vec<_> = plan.cells.iter().filter(|c| c.skip.is_none()).collect();
    let seconds: f64 = measured.iter().map(|c| c.predicted.seconds).sum();
    let peak = measured.iter().map(|c| c.predicted.worker_rss_bytes).max().unwrap_or(0);
    writeln!(
        out,
        "{} cells in {} cohorts, {} skipped; about {}, at most {} of memory (limit {}), {} of disk",
        measured.len(),
        plan.cohorts.len(),
        plan.cells.len() - measured.len(),
        show_seconds(seconds),
        show_bytes(peak),
        show_bytes(plan.limits.max_rss_bytes),
        show_bytes(disk_bytes(plan)),
    )?;
    Ok(())
}

/// `machine`: what this machine is, with its read bandwidth and what is likely to disturb a measurement.
///
/// # Errors
/// [`crate::LabError::Engine`], [`crate::LabError::Output`].
pub fn machine(engine: &dyn Engine, format: Format, out: &mut dyn Write) -> Result<Exit> {
    let mut here = machine::gather();
    let threads = machine::probe_threads(here.cpus_allowed);
    machine::probe(&mut here, engine, &threads)?;
    if format == Format::Json {
        json(&here, out)?;
        return Ok(Exit::Ok);
    }
    machine_table(&here, out)?;
    Ok(Exit::Ok)
}

fn machine_table(m: &Machine, out: &mut dyn Write) -> Result<()> {
    let unknown = || "unknown".to_owned();
    let text = |v: &Option<String>| v.clone().unwrap_or_else(unknown);
    let number = |v: Option<usize>| v.map_or_else(unknown, |v| v.to_string());
    let caches: Vec<String> = m.caches.iter().map(|(n, b)| format!("{n} {} KiB", b >> 10)).collect();
    let t = &m.toolchain;
    let dirty = match t.git_dirty {
        Some(true) => ", changed",
        Some(false) => "",
        None => ", unknown whether changed",
    };
    let mut rows = vec![
        ("machine", m.machine_id.clone()),
        ("class", m.machine_class.clone()),
        ("cpu", text(&m.cpu_model)),
        ("family-model-stepping", text(&m.cpu_signature)),
        ("microcode", text(&m.microcode)),
        ("flags", m.flags.join(" ")),
        ("cpus allowed", m.cpus_allowed.to_string()),
        ("threads per core", number(m.threads_per_core)),
        ("sockets", number(m.sockets)),
        ("NUMA nodes", number(m.numa_nodes)),
        ("caches", if caches.is_empty() { unknown() } else { caches.join(", ") }),
        ("memory", show_bytes(m.memory_bytes)),
        ("memory available", show_bytes(m.memory_available_bytes)),
        ("group memory limit", m.cgroup_memory_max_bytes.map_or_else(|| "none".to_owned(), show_bytes)),
        ("group CPU limit", m.cgroup_cpu_max.map_or_else(|| "none".to_owned(), |c| format!("{c:.1} CPUs"))),
        ("system", m.os.clone()),
        ("hypervisor", m.hypervisor.clone().unwrap_or_else(|| "none shows itself".to_owned())),
        ("governor", text(&m.governor)),
        ("turbo", m.turbo.map_or_else(unknown, |t| if t { "on" } else { "off" }.to_owned())),
        ("huge pages", text(&m.thp)),
        ("commit", format!("{}{dirty}", t.git_sha)),
        ("built", format!("{}, {}, {}", t.rustc, t.target, t.profile)),
    ];
    for p in &m.probes {
        let name = if p.threads == m.probes[0].threads { "read bandwidth" } else { "" };
        let plural = if p.threads == 1 { "" } else { "s" };
        rows.push((name, format!("{:.1} GB/s with {} thread{plural}", p.gb_s, p.threads)));
    }
    for (i, warning) in m.warnings.iter().enumerate() {
        rows.push((if i == 0 { "warnings" } else { "" }, warning.clone()));
    }
    let width = rows.iter().map(|(k, _)| k.len()).max().unwrap_or(0);
    for (key, value) in rows {
        writeln!(out, "{key:width$}  {value}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::mock::MockEngine;
    use longbit_protocol::Capabilities;

    pub(super) fn file(rest: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.toml");
        let text = format!(
            "schema = 1\n[experiment]\nname = \"x\"\nquestion = \"Which?\"\n[model]\npreset = \"tiny\"\n[workload]\nname = \"mix\"\n[axes]\ncontext = [1024]\nthreads = [1, 64]\nkv_dtype = [\"bf16\"]\nmethod = [\"dense\", \"window\"]\n{rest}"
        );
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    pub(super) fn here() -> Option<Machine> {
        Some(Machine { cpus_allowed: 2, memory_available_bytes: 1 << 40, ..Machine::default() })
    }

    pub(super) fn shown(view: impl FnOnce(&mut dyn Write) -> Result<Exit>) -> (Exit, String) {
        let mut out = Vec::new();
        let exit = view(&mut out).unwrap();
        (exit, String::from_utf8(out).unwrap())
    }

    #[test]
    fn list_shows_parameters_with_defaults_and_ranges() {
        let engine = MockEngine::default();
        let (exit, text) = shown(|out| list(&engine, Format::Table, out));
        assert_eq!(exit, Exit::Ok);
        for part in ["window", "sinks", "0..1024", "0..1 (real)", "bf16", "16.00", "hidden 64", "needles"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let (_, text) = shown(|out| list(&engine, Format::Json, out));
        assert_eq!(serde_json::from_str::<Capabilities>(&text).unwrap(), crate::engine::mock::capabilities());
    }

    #[test]
    fn plan_shows_cost_and_skips() {
        let (_dir, path) = file("");
        let view = PlanView { files: vec![path], machine: here(), ..PlanView::default() };
        let (_, text) = shown(|out| plan(&MockEngine::default(), &view, out));
        assert!(text.contains("64 threads on 2 CPUs: at most 4 a CPU") && text.contains("Which?"), "{text}");
        assert!(text.contains("2 cells in 1 cohorts, 2 skipped; about "), "{text}");
        let names = PlanView { list: true, ..view.clone() };
        let (_, text) = shown(|out| plan(&MockEngine::default(), &names, out));
        assert_eq!(text.lines().next(), Some("main/x/context=1024/threads=1/kv=bf16/method=dense"));
        let as_json = PlanView { format: Format::Json, ..view };
        let (_, text) = shown(|out| plan(&MockEngine::default(), &as_json, out));
        assert_eq!(serde_json::from_str::<Vec<Plan>>(&text).unwrap()[0].cells.len(), 4);
    }

    #[test]
    fn machine_says_unknown_and_lists_bandwidth() {
        let (_, text) = shown(|out| machine(&MockEngine::default(), Format::Table, out));
        assert!(text.contains("read bandwidth") && text.contains("GB/s with 1 thread"), "{text}");
        let mut out = Vec::new();
        machine_table(&Machine::default(), &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("governor               unknown"));
        let (_, text) = shown(|out| machine(&MockEngine::default(), Format::Json, out));
        assert!(!serde_json::from_str::<Machine>(&text).unwrap().probes.is_empty());
    }
}
