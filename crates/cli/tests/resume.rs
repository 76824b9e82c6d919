//! A sweep that is killed at any moment goes on where it was: no row is lost, doubled or half-written.

#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::*;
use longbit_lab::record::COLUMNS;
use rustix::process::Signal;

/// Columns that may differ between two runs of one plan: times, what the machine did meanwhile, and stamps. Every other
/// column must repeat; a new one belongs here only when a clock or the operating system measures it.
const TIMINGS: &[&str] = &[
    "run_id",
    "fill_ns",
    "decode_tok_s",
    "tpot_p50_ns",
    "tpot_p90_ns",
    "tpot_p99_ns",
    "tpot_p99_hi95_ns",
    "tpot_mean_ns",
    "tpot_mad_ns",
    "tpot_min_ns",
    "tpot_max_ns",
    "tpot_p50_lo95_ns",
    "tpot_p50_hi95_ns",
    "drift_pct",
    "steady",
    "outliers",
    "achieved_gb_s",
    "probe_gb_s",
    "roofline_fraction",
    "rss_peak_bytes",
    "user_ns",
    "sys_ns",
    "invol_switches",
    "major_faults",
    "steal_pct",
    "throttled_ms",
    "psi_cpu_pct",
    "khz_min",
    "khz_max",
    "started_utc",
    "wall_ms",
    "append_ns",
    "index_build_ns",
];

/// Some seconds of work in four cohorts of two cells.
fn sweep() -> Experiment {
    Experiment {
        contexts: vec![256, 512],
        kv_dtypes: vec!["f32", "bf16"],
        reps: 40,
        gen_tokens: 50,
        rest: "[verify]\nrel_l2_max = 0.05\nmethods = [\"dense\"]\n".to_owned(),
        ..Experiment::default()
    }
}

/// Asserts that two runs of one plan agree in every column that is not a timing, row by row.
#[track_caller]
fn assert_same_but_timings(undisturbed: &Path, drilled: &Path) {
    let (a, b) = (cells(undisturbed), cells(drilled));
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        for column in COLUMNS.iter().map(|c| c.name).filter(|c| !TIMINGS.contains(c)) {
            assert_eq!(a[column], b[column], "{column} of {} {}", a["context_tokens"], a["method"]);
        }
    }
    let ids: std::collections::BTreeSet<&str> = b.iter().map(|r| r["cell_id"].as_str()).collect();
    assert_eq!(ids.len(), b.len(), "a cell stands twice");
}

/// SplitMix64: the moments of a failing drill can be had again.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[test]
fn every_column_is_a_timing_or_exact() {
    let names: Vec<&str> = COLUMNS.iter().map(|c| c.name).collect();
    for timing in TIMINGS {
        assert!(names.contains(timing), "{timing} is no column any more");
    }
    // What the comparison is about: none of these may drift into the list above.
    for exact in [
        "cell_id",
        "status",
        "error",
        "context_tokens",
        "threads",
        "kv_dtype",
        "method",
        "method_params",
        "isa",
        "model_sha256",
        "fill_sha256",
        "reps",
        "tokens_timed",
        "tokens_warmup",
        "rel_l2_p50",
        "rel_l2_p95",
        "rel_l2_max",
        "cosine_min",
        "cosine_mean",
        "needle_accuracy",
        "kl_nats",
        "kl_nats_max",
        "top1_agreement",
        "logit_cosine_mean",
        "logit_cosine_min",
        "nll_nats",
        "nll_reference_nats",
        "quality_steps",
        "kv_bytes_stored",
        "kv_bytes_read_per_token",
        "index_bytes_read_per_token",
        "rows_read_per_token",
        "weight_bytes_per_token",
        "rss_predicted_bytes",
        "machine_id",
    ] {
        assert!(names.contains(&exact) && !TIMINGS.contains(&exact), "{exact}");
    }
}

#[test]
fn ten_kills_lose_nothing_and_double_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = sweep();
    let file = sweep.write(dir.path());
    measure(dir.path(), file, "undisturbed", &[]).expect(0);
    let all = log(&dir.path().join("undisturbed")).len() as u64;

    let drilled = dir.path().join("drilled");
    let mut state = 20_260_131;
    let mut unfinished = 0;
    for kill in 0..10 {
        let mut group =
            Group::start(longbit(dir.path(), &["run", file, "--out", "drilled", "--no-progress"]));
        // Three moments anywhere in a start, the others after some lines more than the last run left. Together they
        // stay below the end of the sweep.
        if kill % 4 == 3 {
            std::thread::sleep(Duration::from_millis(random(&mut state) % 300));
        } else {
            let until = log(&drilled).len() as u64 + 1 + random(&mut state) % (all / 14);
            wait_for("the next lines of the log", || {
                (group.ended() || log(&drilled).len() as u64 >= until).then_some(())
            });
            std::thread::sleep(Duration::from_micros(random(&mut state) % 8000));
        }
        unfinished += usize::from(!group.ended());
        group.kill();
        // Whatever the moment: every line but the last is whole, and no repetition stands twice.
        assert!(repetitions(&drilled).values().all(|n| *n == 1), "after kill {kill}");
    }
    assert!(unfinished >= 8, "only {unfinished} of 10 kills met a running sweep; make the sweep longer");

    let last = measure(dir.path(), file, "drilled", &[]).expect(0);
    assert!(last.out.contains("wrote drilled/cells.csv"), "{}", last.out);
    assert_same_but_timings(&dir.path().join("undisturbed"), &drilled);
    assert_each_repetition_once(&drilled, sweep.cells(), sweep.reps);
    assert_eq!(cells(&drilled).len(), sweep.cells());

    // A finished sweep has nothing to measure: the log stays as it is, byte for byte.
    let before = get(&drilled.join("samples.jsonl"));
    measure(dir.path(), file, "drilled", &[]).expect(0);
    assert_eq!(get(&drilled.join("samples.jsonl")), before);
}

#[test]
fn a_text_goes_on_where_it_was_killed() {
    let dir = tempfile::tempdir().expect("a folder");
    let rest = "[verify]\nkl_nats_max = 0.01\nmethods = [\"dense\"]\n".to_owned();
    let sweep = Experiment { text: true, rest, ..sweep() };
    let file = sweep.write(dir.path());
    measure(dir.path(), file, "undisturbed", &[]).expect(0);
    let all = log(&dir.path().join("undisturbed")).len();
    let drilled = dir.path().join("drilled");
    let mut unfinished = 0;
    for kill in 1..=3 {
        let mut group =
            Group::start(longbit(dir.path(), &["run", file, "--out", "drilled", "--no-progress"]));
        wait_for("the next lines of the log", || {
            (group.ended() || log(&drilled).len() >= kill * all / 5).then_some(())
        });
        unfinished += usize::from(!group.ended());
        group.kill();
        assert!(repetitions(&drilled).values().all(|n| *n == 1), "after kill {kill}");
    }
    assert!(unfinished >= 2, "only {unfinished} of 3 kills met a running sweep; make the sweep longer");
    measure(dir.path(), file, "drilled", &[]).expect(0);
    assert_same_but_timings(&dir.path().join("undisturbed"), &drilled);
    assert_each_repetition_once(&drilled, sweep.cells(), sweep.reps);
    let rows = cells(&drilled);
    assert!(rows.iter().all(|r| r["status"] == "ok" && r["fill"] == "prefill" && r["rel_l2_p50"].is_empty()));
    let exact = rows.iter().filter(|r| r["kv_dtype"] == "bf16" && r["method"] == "dense");
    assert!(
        exact.clone().count() == 2
            && exact.clone().all(|r| r["kl_nats"] == "0" && r["top1_agreement"] == "1")
    );

    // Another text is another run, whatever its name.
    let story = dir.path().join("story.txt");
    put(&story, &format!("{}!", get(&story)));
    measure(dir.path(), file, "drilled", &[]).expect(2).says(&["holds another run: its plan is", "--fresh"]);
}

#[test]
fn a_torn_line_is_cut_off_and_measured_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = Experiment::default();
    let file = sweep.write(dir.path());
    measure(dir.path(), file, "whole", &[]).expect(0);
    let whole = get(&dir.path().join("whole/samples.jsonl"));
    let is_sample = |l: &str| l.contains("\"line\":\"sample\"");
    let last = whole.lines().enumerate().filter(|(_, l)| is_sample(l)).last();
    let (sample, _) = last.expect("a sample");
    let upto: usize = whole.lines().take(sample).map(|l| l.len() + 1).sum();

    let torn = dir.path().join("torn");
    std::fs::create_dir(&torn).expect("a folder");
    for name in ["plan.json", "machine.json"] {
        std::fs::copy(dir.path().join("whole").join(name), torn.join(name)).expect("a copy");
    }
    put(&torn.join("samples.jsonl"), &whole[..upto + 100]);
    measure(dir.path(), file, "torn", &[]).expect(0);
    assert_same_but_timings(&dir.path().join("whole"), &torn);
    assert_each_repetition_once(&torn, sweep.cells(), sweep.reps);
    assert!(get(&torn.join("samples.jsonl")).starts_with(&whole[..upto]), "what stood was rewritten");
}

#[test]
fn an_interrupted_runner_leaves_cells_to_be_measured_and_none_that_failed() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = sweep();
    let file = sweep.write(dir.path());
    let out = dir.path().join("out");
    for (signal, all) in
        [(Signal::INT, true), (Signal::TERM, true), (Signal::TERM, false), (Signal::HUP, true)]
    {
        let before = log(&out).len();
        let mut group = Group::start(longbit(dir.path(), &["run", file, "--out", "out", "--no-progress"]));
        // Where the machine is busy the last of them may find the sweep finished.
        wait_for("lines of the log", || (group.ended() || log(&out).len() > before + 5).then_some(()));
        group.interrupt(signal, all);
        assert!(log(&out).iter().all(|l| l["line"] != "failed"), "{signal:?}");
    }
    measure(dir.path(), file, "out", &[]).expect(0);
    assert_each_repetition_once(&out, sweep.cells(), sweep.reps);
    assert!(cells(&out).iter().all(|r| r["status"] == "ok"), "{:?}", statuses(&out));
}

#[test]
fn a_worker_that_dies_is_replaced_and_the_sweep_completes() {
    replaced(Signal::KILL, "killed by signal 9");
}

#[test]
fn a_worker_that_is_told_to_end_is_replaced_and_the_sweep_completes() {
    replaced(Signal::TERM, "killed by signal 15");
}

/// Ends a worker with `signal`, as the log of the run then says.
fn replaced(signal: Signal, said: &str) {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = sweep();
    let file = sweep.write(dir.path());
    let out = dir.path().join("out");
    let mut group = Group::start(longbit(dir.path(), &["run", file, "--out", "out", "--no-progress"]));
    // In the middle of the second cohort, so that finished cells stand before and untouched ones behind.
    let samples = |cohort: u64| {
        log(&out).iter().filter(|l| l["line"] == "sample" && l["cohort"].as_u64() == Some(cohort)).count()
    };
    wait_for("samples of the second cohort", || (samples(1) >= 5).then_some(()));
    let workers = group.workers();
    assert!(!workers.is_empty(), "no worker runs");
    workers.iter().for_each(|&pid| Group::signal(pid, signal));
    assert_eq!(group.code(), 0);
    assert_each_repetition_once(&out, sweep.cells(), sweep.reps);
    assert!(cells(&out).iter().all(|r| r["status"] == "ok"), "{:?}", statuses(&out));
    let attempts =
        log(&out).iter().filter(|l| l["line"] == "ready" && l["cohort"].as_u64() == Some(1)).count();
    assert_eq!(attempts, 3, "one worker for both cells, then one for each");
    let note = get(&out.join("run.log"));
    assert!(note.contains(&format!("cohort 1: {said}")), "{note}");
}
