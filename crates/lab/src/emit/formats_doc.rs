//! docs/FORMATS.md, generated: the columns of `cells.csv` and the fields of the files beside it.

use super::percentiles;
use super::table::Rows;
use crate::record::COLUMNS;

/// The text of docs/FORMATS.md. A test holds the committed file to it.
pub fn formats_doc() -> String {
    let mut page = String::from(
        "# Formats\n\n<!-- Generated from the tables of crates/lab; `LONGBIT_BLESS=1 cargo test -p longbit-lab formats` \
         rewrites it. -->\n\nA results directory holds:\n\n",
    );
    page.push_str(&table(&["file", "written", "content"], &FILES, &[0, 1, 2]));
    page.push_str(
        "\nOnly `samples.jsonl` is measured; `cells.csv`, `percentiles.csv`, `summary.md` and `plots/` are rebuilt from it \
         with `plan.json` and `machine.json`, byte for byte, by `longbit report --rebuild DIR`, whatever commit measured it. \
         Derived files are written beside their place and renamed.\n",
    );
    page.push_str(
        "\n## cells.csv\n\nOne row for each planned cell, in the order of the plan, whatever became of it. Comma-separated, \
         UTF-8, a header line, quoted where needed. Units stand in the names. An empty field means \"not measured\": it is \
         never a zero and never NaN. Times and bytes are integers; other numbers have the shortest digits that read back \
         as the same number. Only rows with status ok, verify_failed or unstable (reserved) have timings.\n\n",
    );
    let columns: Vec<[&str; 4]> = COLUMNS.iter().map(|c| [c.name, c.unit, c.kind, c.meaning]).collect();
    page.push_str(&table(&["column", "unit", "type", "meaning"], &columns, &[0, 1, 2, 3]));
    page.push_str(
        "\nQuantiles are nearest-rank: always a value that was measured. The median of an even number is the mean of the \
         middle two. Token times are service times of a closed loop with one stream.\n",
    );
    page.push_str(
        "\n## percentiles.csv\n\nLatency curves from an HDR histogram with three significant digits; medians and verdicts \
         use the exact samples instead.\n\n",
    );
    let curve = percentiles::COLUMNS.map(|(name, meaning)| [name, meaning]);
    page.push_str(&table(&["column", "meaning"], &curve, &[0, 1]));
    page.push_str(
        "\n## samples.jsonl\n\nOne JSON object a line, appended with a single write and never rewritten. Each has `\"v\": 1` \
         and `line`, which names its kind. A torn last line is ignored; of two samples with the same cell and repetition \
         the first stands. A cell is complete only when a `done` or `failed` line closes it; the last of these stands.\n\n",
    );
    page.push_str(&table(&["line", "fields", "meaning"], &LINES, &[0, 1, 2]));
    page.push_str("\nFields of `sample`:\n\n");
    page.push_str(&table(&["field", "unit", "meaning"], &SAMPLE, &[0, 1, 2]));
    page.push_str(
        "\nFields of `quality` and `ready` that are not columns of cells.csv under the same name:\n\n",
    );
    page.push_str(&table(&["field", "meaning"], &OTHER, &[0, 1]));
    page.push_str("\n## plan.json\n\nWritten before the first sample and never changed.\n\n");
    page.push_str(&table(&["field", "meaning"], &PLAN, &[0, 1]));
    page.push_str("\nFields of a cell:\n\n");
    page.push_str(&table(&["field", "meaning"], &CELL, &[0, 1]));
    page.push_str(
        "\n## machine.json\n\nWhat the machine says of itself. Unknown is `null`, never a guess.\n\n",
    );
    page.push_str(&table(&["field", "meaning"], &MACHINE, &[0, 1]));
    page
}

fn table<const N: usize>(head: &[&str; N], body: &[[&str; N]], left: &[usize]) -> String {
    let mark = |c: usize, text: &str| if c == 0 { format!("`{text}`") } else { text.to_owned() };
    let row = |row: &[&str; N]| row.iter().enumerate().map(|(c, text)| mark(c, text)).collect();
    let head = head.iter().map(|h| (*h).to_owned()).collect();
    Rows { head, body: body.iter().map(row).collect(), left: left.to_vec() }.markdown()
}

const FILES: [[&str; 3]; 8] = [
    ["plan.json", "before the first sample", "the cells with their predicted cost, the gate, the limits"],
    ["machine.json", "before the first sample", "the machine and the build"],
    ["samples.jsonl", "while measuring", "every repetition with the time of each token"],
    ["run.log", "while measuring", "what happened, for people"],
    ["cells.csv", "derived", "one row a cell"],
    ["percentiles.csv", "derived", "latency curves"],
    ["summary.md", "derived", "sentence, tables, machine, how to reproduce"],
    ["plots/", "derived", "figures as SVG and PNG"],
];

const LINES: [[&str; 3]; 6] = [
    ["ready", "cohort, attempt, ready", "a worker built its model and filled its cache"],
    ["probe", "cohort, attempt, probe {threads, gb_s, round}", "read bandwidth measured beside the samples"],
    ["quality", "quality", "output of one cell against exact attention, or logits against the reference"],
    ["sample", "cohort, attempt, sample", "one timed repetition of a cell"],
    ["failed", "outcome {cell, status, error}", "a cell that could not be measured"],
    ["done", "cell, reps", "a cell has everything that the plan asks for"],
];

const SAMPLE: [[&str; 3]; 20] = [
    ["cell", "-", "cell_id"],
    ["rep", "-", "repetition, from 0"],
    ["round", "-", "round of the cohort"],
    ["slot", "-", "place in the round"],
    ["t0", "RFC 3339", "start, UTC"],
    ["tok_ns", "ns", "wall time of each timed token; of a batch, of each pass"],
    ["user_ns", "ns", "user time of the process during the repetition"],
    ["sys_ns", "ns", "system time"],
    ["nvcsw", "count", "voluntary context switches"],
    ["nivcsw", "count", "involuntary context switches"],
    ["minflt", "count", "minor page faults"],
    ["majflt", "count", "major page faults"],
    ["rss_peak_bytes", "bytes", "peak resident memory of the process so far"],
    ["steal_pct", "%", "CPU time stolen by the host, or null"],
    ["throttled_us", "us", "time throttled by the control group, or null"],
    ["psi_cpu_pct", "%", "pressure-stall share, or null"],
    ["khz", "kHz", "lowest and highest clock of a CPU, or null"],
    ["traffic", "bytes, rows", "kv_bytes, index_bytes and rows read, summed over the timed tokens"],
    ["index_bytes", "bytes", "state of the method at the end of the repetition"],
    ["index_build_ns", "ns", "time to build that state from the filled cache, once a worker, or null"],
];

const OTHER: [[&str; 2]; 9] = [
    ["quality.steps", "decode steps compared"],
    ["quality.outputs", "outputs compared: steps x layers x query heads, or steps where logits are compared"],
    [
        "quality.rel_l2_by_head",
        "median relative L2 error by head type of the workload; of a trace of all heads together",
    ],
    [
        "quality.reads",
        "samples, captured_mass_p50, captured_mass_p5, tail_mass_error_p50, tail_mass_error_p95, top_recall_mean, \
         top_recall_p5, top_density_head, top_density_group: what was read against exact softmax; absent where a text is \
         decoded",
    ],
    [
        "quality.seeds",
        "count, rel_l2_mean, rel_l2_sd: the spread over seeds; absent for methods that draw nothing",
    ],
    [
        "quality.prefill",
        "outputs, rel_l2_p50, rel_l2_p95, density: the prompt's last tokens under the method's pattern; absent where prompts are \
         dense, where rows were evicted, and where a text is decoded",
    ],
    ["ready.build_ns", "time to build or load the model"],
    ["ready.huge_page_bytes", "anonymous huge pages in use, or null"],
    [
        "ready.workload_stats",
        "statistics of the workload, by name; of a text its bytes and tokens; of a trace its bytes, tokens and steps too",
    ],
];

const PLAN: [[&str; 2]; 17] = [
    ["schema", "1"],
    ["experiment", "group, name, question, analysis, file_sha256, file (as it was named; empty outside)"],
    ["plan_hash", "16 hexadecimal digits over everything that decides what is measured"],
    ["git_sha, git_dirty", "commit of the binary; whether the work tree differed, or null"],
    ["run_id, created_utc", "stamp, commit and machine; when the plan was made"],
    ["machine_id, machine_class", "this very machine; machines that can be compared with it"],
    ["engine, engine_version", "the program that measures"],
    ["isa", "instruction set of its kernels"],
    ["flags", "the flags that chose the cells and how they are measured"],
    ["measure", "reps, gen_tokens, warmup_tokens, quality_steps, seeds (where not 1), pin, probe_bytes"],
    [
        "min_samples_p99, max_drift_pct",
        "below this many tokens p99 is empty; beyond this drift a cell is not steady",
    ],
    [
        "gate",
        "thresholds of check: tpot_p50_pct, tpot_p99_pct, kv_bytes_pct, rel_l2_abs, cosine_abs, kl_abs, top1_abs, \
         logit_cosine_abs, nll_abs",
    ],
    ["verify", "cosine_min, rel_l2_max, kl_nats_max, top1_min, on_fail (mark or stop), methods; or null"],
    ["prefill_limit", "longest context that a text is run through the model for; or null without a text"],
    ["limits", "cell_timeout_s, max_rss_bytes"],
    ["cells", "the cells, in stable order"],
    ["cohorts", "indices into cells: those that share model, context, KV dtype, workload and a worker"],
];

const CELL: [[&str; 2]; 11] = [
    ["id", "16 hexadecimal digits of the canonical configuration"],
    ["name", "for people and filters"],
    [
        "model",
        "preset or path (as the experiment file writes it), head, seed; sha256, i2s and activation where given",
    ],
    ["context, threads, batch, kv_dtype", "the point of the sweep"],
    ["method, method_params", "attention method with all its parameters"],
    ["workload, seed", "where queries, keys and values come from"],
    ["text", "path (as the experiment file writes it) and sha256 of the text that is decoded; or null"],
    ["trace", "the same of the trace that is replayed; or null"],
    [
        "predicted",
        "rss_bytes (of the cell alone), worker_rss_bytes (with the cells of its worker), kv_bytes_stored, weight_bytes_per_token, kv_bytes_per_token, prefill_macs, seconds",
    ],
    ["skip", "why the cell is not run, with the number; or null"],
    ["(order)", "context, KV dtype, method, threads, batch"],
];

const MACHINE: [[&str; 2]; 13] = [
    ["machine_id", "hash of what identifies this machine"],
    ["machine_class", "hash of what makes machines comparable: CPU model, flags, cores, memory"],
    ["cpu_model, cpu_signature, microcode", "name; family, model and stepping; microcode revision"],
    ["flags", "instruction sets that kernels can use"],
    ["cpus_allowed, threads_per_core, sockets, numa_nodes", "topology"],
    ["caches", "name and bytes"],
    ["memory_bytes, memory_available_bytes", "memory, and what is free within the control group's limit"],
    ["cgroup_memory_max_bytes, cgroup_cpu_max", "control-group limits: bytes, CPUs"],
    ["os, hypervisor", "system and kernel; hypervisor where one shows itself"],
    ["governor, turbo, thp", "frequency governor, turbo, transparent huge pages"],
    ["probes", "read bandwidth by threads"],
    ["warnings", "what is likely to disturb a measurement here"],
    ["toolchain", "git_sha, git_dirty, rustc, target, profile"],
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing;
    use serde_json::Value;
    use std::collections::BTreeSet;

    #[test]
    fn formats_page_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/FORMATS.md");
        if std::env::var_os("LONGBIT_BLESS").is_some() {
            std::fs::write(path, formats_doc()).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == formats_doc(),
            "docs/FORMATS.md is not what the tables say; run LONGBIT_BLESS=1 cargo test -p longbit-lab formats"
        );
    }

    /// Every name in the first column of a table, commas split.
    fn documented(rows: &[[&str; 2]]) -> BTreeSet<String> {
        rows.iter()
            .flat_map(|r| r[0].split(", "))
            .filter(|n| !n.starts_with('('))
            .map(str::to_owned)
            .collect()
    }

    fn keys(value: &Value) -> BTreeSet<String> {
        value.as_object().map(|o| o.keys().cloned().collect()).unwrap_or_default()
    }

    #[test]
    fn documented_fields_are_the_real_ones() {
        let (plan, machine, lines) = testing::with_gaps();
        let plan = serde_json::to_value(plan).unwrap();
        assert_eq!(keys(&plan), documented(&PLAN));
        assert_eq!(keys(&plan["cells"][0]), documented(&CELL));
        assert_eq!(keys(&serde_json::to_value(machine).unwrap()), documented(&MACHINE));
        let lines: Vec<Value> = lines.iter().map(|l| serde_json::to_value(l).unwrap()).collect();
        let kinds: BTreeSet<&str> = lines.iter().filter_map(|l| l["line"].as_str()).collect();
        assert_eq!(kinds, LINES.iter().map(|l| l[0]).collect());
        let sample = lines.iter().find(|l| l["line"] == "sample").unwrap();
        assert_eq!(keys(&sample["sample"]), SAMPLE.iter().map(|r| r[0].to_owned()).collect());
    }
}
