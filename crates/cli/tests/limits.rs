//! A cell that breaks a limit, or its worker, becomes a row with that status; everything else is measured all the same.

#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

mod common;

use std::collections::BTreeSet;

use common::*;
use rustix::process::Signal;

/// Enough work in a cell that a worker can be met while it measures.
fn three_cohorts() -> Experiment {
    Experiment { contexts: vec![128, 256, 512], reps: 30, gen_tokens: 100, ..Experiment::default() }
}

/// Identities of the cells of a context, from the plan.
fn ids(out: &std::path::Path, context: u64) -> BTreeSet<String> {
    let plan: serde_json::Value = serde_json::from_str(&get(&out.join("plan.json"))).expect("a plan");
    let cells = plan["cells"].as_array().expect("cells").iter();
    cells
        .filter(|c| c["context"].as_u64() == Some(context))
        .map(|c| c["id"].as_str().expect("an id").to_owned())
        .collect()
}

/// Identities of the cells that a line of this kind closes.
fn closed(out: &std::path::Path, kind: &str) -> BTreeSet<String> {
    let of = |l: &serde_json::Value| match kind {
        "failed" => l["outcome"]["cell"].as_str().map(str::to_owned),
        _ => l["cell"].as_str().map(str::to_owned),
    };
    log(out).iter().filter(|l| l["line"] == kind).filter_map(of).collect()
}

#[test]
fn a_cell_over_its_time_and_one_over_its_memory_become_rows() {
    let dir = tempfile::tempdir().expect("a folder");
    // Dense attention over 268 MB a token takes many times the limit; all else takes a small part of it.
    let sweep = Experiment {
        contexts: vec![256, 65_536, 1 << 20],
        kv_dtypes: vec!["f32"],
        reps: 1,
        gen_tokens: 1200,
        cell_timeout: "5s",
        max_rss: "1GiB",
        ..Experiment::default()
    };
    let file = sweep.write(dir.path());
    let ran = measure(dir.path(), file, "out", &[]).expect(6);
    let found = statuses(&dir.path().join("out"));
    let status = |cell: &str| found[cell].0.as_str();
    assert_eq!(found.len(), 6);
    for cell in ["256 dense", "256 window", "65536 window"] {
        assert_eq!(status(cell), "ok", "{cell}: {found:?}");
    }
    assert_eq!(found["65536 dense"].0, "timeout", "{found:?}");
    assert!(found["65536 dense"].1.contains("no progress for 5 s (limits.cell_timeout)"), "{found:?}");
    for cell in ["1048576 dense", "1048576 window"] {
        assert_eq!(status(cell), "skipped");
        assert!(
            found[cell].1.starts_with("predicted 4.")
                && found[cell].1.contains("GB exceeds the limit 1.1 GB"),
            "{found:?}"
        );
    }
    // The quality of the cell was measured before its time was up, but a row that failed shows no speed.
    let rows = cells(&dir.path().join("out"));
    let row = rows.iter().find(|r| r["status"] == "timeout").expect("the row");
    assert_eq!(row["decode_tok_s"], "");
    assert!(ran.out.contains("timeout") && ran.out.contains("skipped"), "{}", ran.out);

    // The failure stands: without being asked nothing is tried again.
    let before = get(&dir.path().join("out/samples.jsonl"));
    measure(dir.path(), file, "out", &[]).expect(6);
    assert_eq!(get(&dir.path().join("out/samples.jsonl")), before);
    run(dir.path(), &["report", "out"]).expect(6);
}

#[test]
fn a_worker_without_address_space_is_a_row_oom() {
    let dir = tempfile::tempdir().expect("a folder");
    // The cache of the second context takes 4.3 GB of address space. The plan is made under a limit that allows it; what
    // a run may use is said anew each time, and the second run may use less than the cache.
    let sweep = Experiment {
        contexts: vec![256, 1 << 20],
        kv_dtypes: vec!["f32"],
        max_rss: "64GiB",
        reps: 40,
        gen_tokens: 200,
        ..Experiment::default()
    };
    let file = sweep.write(dir.path());
    let out = dir.path().join("out");
    let mut group = Group::start(longbit(dir.path(), &["run", file, "--out", "out", "--no-progress"]));
    wait_for("the plan", || out.join("plan.json").exists().then_some(()));
    group.kill();
    let ran = measure(dir.path(), file, "out", &["--max-rss", "1GiB"]).expect(6);
    let found = statuses(&out);
    for method in ["dense", "window"] {
        assert_eq!(found[&format!("256 {method}")].0, "ok", "{found:?}");
        let (status, error) = &found[&format!("1048576 {method}")];
        assert_eq!(status, "oom", "{found:?}");
        assert!(error.contains("cannot map") && error.contains("bytes of memory"), "{error}");
    }
    assert!(ran.out.contains("oom"), "{}", ran.out);
}

#[test]
fn a_worker_that_crashes_at_every_try_is_a_row_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = three_cohorts();
    let file = sweep.write(dir.path());
    let out = dir.path().join("out");
    let mut group = Group::start(longbit(dir.path(), &["run", file, "--out", "out", "--no-progress"]));
    wait_for("the end of the first cohort", || {
        (out.join("plan.json").exists() && closed(&out, "done").is_superset(&ids(&out, 128))).then_some(())
    });
    let victims = ids(&out, 256);
    wait_for("the failure of every cell at 256 tokens", || {
        // A worker seen before the log is read belongs to this cohort as long as the log lacks one of its failures.
        let workers = group.workers();
        if closed(&out, "failed").is_superset(&victims) {
            return Some(());
        }
        workers.iter().for_each(|&pid| Group::signal(pid, Signal::SEGV));
        None
    });
    assert_eq!(group.code(), 6);
    let found = statuses(&out);
    for (cell, (status, error)) in &found {
        if cell.starts_with("256 ") {
            assert_eq!(status, "error", "{found:?}");
            assert!(error.contains("killed by signal 11"), "{error}");
        } else {
            assert_eq!(status, "ok", "{found:?}");
        }
    }

    // What failed can be measured later, into the same directory, and nothing else is measured again.
    measure(dir.path(), file, "out", &["--retry-failed"]).expect(0);
    assert!(statuses(&out).values().all(|(status, _)| status == "ok"));
    assert_each_repetition_once(&out, sweep.cells(), sweep.reps);
}

#[test]
fn the_cell_that_crashes_its_worker_is_the_only_row_lost() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = three_cohorts();
    let file = sweep.write(dir.path());
    let out = dir.path().join("out");
    let mut group = Group::start(longbit(dir.path(), &["run", file, "--out", "out", "--no-progress"]));
    // The worker of the cohort dies once its cache stands, then the worker of the cell that is tried first.
    for attempt in 0..2 {
        wait_for("a worker of the second cohort with its cache", || {
            let ready = |l: &serde_json::Value| {
                l["line"] == "ready" && l["cohort"] == 1 && l["attempt"].as_u64() == Some(attempt)
            };
            log(&out).iter().any(ready).then_some(())
        });
        group.workers().iter().for_each(|&pid| Group::signal(pid, Signal::ABORT));
    }
    assert_eq!(group.code(), 6);
    let found = statuses(&out);
    let lost: Vec<_> = found.iter().filter(|(_, (status, _))| status != "ok").collect();
    assert_eq!(lost.len(), 1, "{found:?}");
    assert_eq!((lost[0].0.as_str(), lost[0].1.0.as_str()), ("256 dense", "error"));
    assert!(lost[0].1.1.contains("killed by signal 6"), "{found:?}");
    let others: BTreeSet<String> = closed(&out, "done");
    assert_eq!(others.len(), sweep.cells() - 1);
}

#[test]
fn a_cell_with_far_more_threads_than_cpus_is_skipped_with_the_number() {
    let dir = tempfile::tempdir().expect("a folder");
    let text = Experiment::default().toml().replace("threads = [1]", "threads = [1, 4096]");
    put(&dir.path().join("small.toml"), &text);
    // Skipped is not failed.
    measure(dir.path(), "small.toml", "out", &[]).expect(0);
    let rows = cells(&dir.path().join("out"));
    let skipped: Vec<_> = rows.iter().filter(|r| r["status"] == "skipped").collect();
    assert_eq!((rows.len(), skipped.len()), (4, 2));
    for row in skipped {
        assert!(row["threads"] == "4096" && row["error"].starts_with("4096 threads on "), "{row:?}");
    }
}

#[test]
fn a_prompt_beyond_the_limit_is_a_row_with_its_work() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = Experiment { contexts: vec![128, 512], text: true, ..Experiment::default() };
    sweep.write(dir.path());
    let file = dir.path().join("small.toml");
    put(&file, &get(&file).replace("file = \"story.txt\"", "file = \"story.txt\"\nprefill_limit = 256"));
    let plan = run(dir.path(), &["plan", "small.toml"]).expect(0).out;
    for part in ["prefill", "TMAC", "contexts above 256 tokens (workload.prefill_limit)", "2 skipped"] {
        assert!(plan.contains(part), "{part} is missing in:\n{plan}");
    }
    let ran = measure(dir.path(), "small.toml", "out", &[]).expect(0);
    let found = statuses(&dir.path().join("out"));
    assert_eq!(found["128 dense"], ("ok".to_owned(), String::new()));
    for method in ["dense", "window"] {
        let (status, reason) = &found[&format!("512 {method}")];
        assert_eq!(status, "skipped");
        // 512 tokens, 4 layers of 589,824 weights and 256 numbers a query with 512 keys and values: 1.48e9 multiply-adds.
        let says = "a prompt of 512 tokens is longer than the limit of 256, and would take 0.00148 tera multiply-adds; \
                    raise workload.prefill_limit";
        assert!(reason.contains(says), "{reason}");
        assert!(ran.out.contains(says), "{}", ran.out);
    }
    assert!(cells(&dir.path().join("out")).iter().all(|r| r["fill"] != "synthetic"));
}
