//! `summary.md`: the answer in a sentence, the table, what is missing, the machine, and how to do it again.

use longbit_protocol::Machine;

use super::table;
use crate::analyse::label::distinct;
use crate::plan::{Plan, quoted};
use crate::record::Record;

/// The whole page.
pub fn summary(plan: &Plan, machine: &Machine, records: &[Record], sentence: &str, figures: &str) -> String {
    let e = &plan.experiment;
    let mut page = format!("# {}\n\n", e.full_name());
    let beyond = plan.beyond_training().unwrap_or_default();
    for text in [e.question.trim(), e.analysis.trim(), sentence, &beyond] {
        if !text.is_empty() {
            page.push_str(text);
            page.push_str("\n\n");
        }
    }
    page.push_str("## Cells\n\n");
    page.push_str(&cells(records));
    page.push_str(&reads(records));
    let gaps = table::gaps(records).markdown();
    if !gaps.is_empty() {
        page.push_str("\n## Skipped and failed\n\n");
        page.push_str(&gaps);
    }
    if !figures.is_empty() {
        page.push_str("\n## Figures\n\n");
        page.push_str(figures);
    }
    page.push_str("\n## Machine\n\n");
    page.push_str(&machine_table(machine));
    page.push_str("\n## How to reproduce\n\n");
    page.push_str(&reproduce(plan, machine));
    page
}

/// What the columns of the table mean; the explanation stands under it when the column does.
const LEGEND: [(&str, &str); 11] = [
    ("tok/s", "tok/s: timed tokens divided by their time."),
    ("median, 95 %", "median, 95 %: interval of the median speed over repetitions."),
    ("rel L2 p50", "rel L2: error of an attention output against exact f32 attention on the same inputs."),
    (
        "logit error",
        "logit error: largest difference of q.k/√d, as softmax sees it, between cached rows and exact ones, over all tokens, \
         heads and layers compared.",
    ),
    (
        "KL nats",
        "KL nats: divergence of the next-token distribution from that of dense attention over a bf16 cache on the same \
         text, mean over the compared steps; KL max: the largest.",
    ),
    ("top-1", "top-1: steps with the same most likely token."),
    ("perplexity", "perplexity: that of the text, relative to the reference."),
    ("KV MB/token", "KV MB/token: cached keys, values and indexes that a decode step reads."),
    ("kB stored", "kB stored: what the cache takes for each token."),
    (
        "append µs",
        "append µs: time to append the keys and values of one token to all layers and heads, with one thread.",
    ),
    ("of bandwidth", "of bandwidth: bytes read a second against a read probe with the same threads."),
];

/// The table of measured cells with its legend, and the full parameters of the methods.
pub fn cells(records: &[Record]) -> String {
    let rows = table::measured(records);
    if rows.body.is_empty() {
        return "No cell was measured.\n".to_owned();
    }
    let mut text = rows.markdown();
    let shown = LEGEND.iter().filter(|(column, _)| rows.head.iter().any(|h| h == column));
    let legend: Vec<&str> = shown.map(|(_, meaning)| *meaning).collect();
    text.push_str(&format!("\n{}\n", legend.join(" ")));
    let full = distinct(records.iter().filter(|r| !r.is_dense()).map(Record::method_string));
    let full: Vec<String> = full.into_iter().filter(|m| m.contains(':')).map(|m| format!("`{m}`")).collect();
    if !full.is_empty() {
        text.push_str(&format!("Methods in full: {}.\n", full.join(", ")));
    }
    text
}

/// What the columns of the table of reads mean.
const READS_LEGEND: [(&str, &str); 9] = [
    ("density", "density: rows attended of those in the cache, by the query heads of a group together."),
    (
        "needed, head",
        "needed: the fewest tokens that hold 95 % of the exact softmax mass, of a query head and of all heads of a group \
         together; whatever the method does.",
    ),
    ("mass p50", "mass: exact softmax mass of the attended tokens."),
    (
        "tail error p50",
        "tail error: what the method assumes of the mass of the rest, less what it is; without an assumption the mass missed.",
    ),
    ("recall", "recall: share of the needed tokens of a head that were attended."),
    (
        "index MB/token",
        "index MB/token: indexes and summaries that a decode step reads, beside the keys and values.",
    ),
    (
        "index ms",
        "index MB, ms: the method's state beside the cache, and the time to build it with one thread.",
    ),
    (
        "rel L2 over seeds",
        "over seeds: median relative L2, mean and standard deviation over seeds of a method that draws at random.",
    ),
    (
        "prefill density",
        "prefill: rows that the last tokens of the prompt see under the method's pattern, and relative L2 of their outputs against \
         dense attention over the same rows.",
    ),
];

/// What the methods read, with its heading and legend; empty where all read everything.
fn reads(records: &[Record]) -> String {
    let rows = table::reads(records);
    if rows.body.is_empty() {
        return String::new();
    }
    let shown = READS_LEGEND.iter().filter(|(column, _)| rows.head.iter().any(|h| h == column));
    let legend: Vec<&str> = shown.map(|(_, meaning)| *meaning).collect();
    format!("\n## What was read\n\n{}\n{}\n", rows.markdown(), legend.join(" "))
}

/// What the machine says of itself; what it does not say is shown as unknown.
pub fn machine_table(machine: &Machine) -> String {
    let unknown = || "unknown".to_owned();
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    let mut rows = vec![
        ("CPU", machine.cpu_model.clone().unwrap_or_else(unknown)),
        ("CPUs allowed", machine.cpus_allowed.to_string()),
        ("threads a core", machine.threads_per_core.map_or_else(unknown, |n| n.to_string())),
        ("sockets, NUMA nodes", {
            let show = |n: Option<usize>| n.map_or_else(unknown, |n| n.to_string());
            format!("{}, {}", show(machine.sockets), show(machine.numa_nodes))
        }),
        ("flags", machine.flags.join(" ")),
        (
            "caches",
            machine
                .caches
                .iter()
                .map(|(n, b)| format!("{n} {} KiB", b / 1024))
                .collect::<Vec<_>>()
                .join(", "),
        ),
        ("memory", gib(machine.memory_bytes)),
        ("system", machine.os.clone()),
        ("hypervisor", machine.hypervisor.clone().unwrap_or_else(unknown)),
        ("governor", machine.governor.clone().unwrap_or_else(unknown)),
        ("turbo", machine.turbo.map_or_else(unknown, |on| if on { "on".into() } else { "off".into() })),
        ("huge pages", machine.thp.clone().unwrap_or_else(unknown)),
        ("machine, class", format!("{}, {}", machine.machine_id, machine.machine_class)),
    ];
    for probe in &machine.probes {
        rows.push(("read bandwidth", format!("{:.1} GB/s with {} threads", probe.gb_s, probe.threads)));
    }
    rows.extend(machine.warnings.iter().map(|w| ("warning", w.clone())));
    let body = rows.into_iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| vec![k.to_owned(), v]).collect();
    table::Rows { head: vec!["".into(), "".into()], body, left: vec![0, 1] }.markdown()
}

/// The command, and what it was run with.
pub fn reproduce(plan: &Plan, machine: &Machine) -> String {
    let e = &plan.experiment;
    let file = match (e.file.is_empty(), e.group.as_str()) {
        (false, _) => quoted(&e.file),
        (true, "main") => format!("experiments/{}.toml", e.name),
        (true, _) => format!("experiments/{}.toml", e.full_name()),
    };
    let command = [vec![format!("longbit run {file}")], plan.flags.clone()].concat().join(" ");
    let dirty = match plan.git_dirty {
        Some(true) => " with uncommitted changes",
        Some(false) => "",
        None => " (whether the sources were changed is unknown)",
    };
    let m = &plan.measure;
    format!(
        "```sh\n{command}\n```\n\nCommit `{}`{dirty}, {} build, {}, {}; engine {} {}; plan \
         `{}`; {} repetitions of {} tokens after {} to warm up.\n",
        plan.git_sha,
        machine.toolchain.profile,
        machine.toolchain.rustc,
        machine.toolchain.target,
        plan.engine,
        plan.engine_version,
        plan.plan_hash,
        m.reps,
        m.gen_tokens,
        m.warmup_tokens,
    )
}
