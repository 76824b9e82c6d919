//! A finished result from the outside: what `run` wrote, and what `cmp`, `check` and `report` make of it.

#![forbid(unsafe_code)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::*;

/// A result with enough repetitions for intervals, measured once for all tests; they change only copies.
static RESULT: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = Experiment { contexts: vec![256, 512], reps: 12, gen_tokens: 30, ..Experiment::default() };
    measure(dir.path(), sweep.write(dir.path()), "out", &[]).expect(0);
    dir
});

fn result() -> PathBuf {
    RESULT.path().join("out")
}

/// A copy of the log, plan and machine of the result, with the lines of the log changed.
fn doctored(
    dir: &Path,
    name: &str,
    change: impl Fn(serde_json::Value) -> Option<serde_json::Value>,
) -> PathBuf {
    let copy = dir.join(name);
    std::fs::create_dir(&copy).expect("a folder");
    for file in ["plan.json", "machine.json"] {
        std::fs::copy(result().join(file), copy.join(file)).expect("a copy");
    }
    let lines = log(&result()).into_iter().filter_map(change);
    let text: String = lines.map(|l| l.to_string() + "\n").collect();
    put(&copy.join("samples.jsonl"), &text);
    copy
}

#[test]
fn a_run_writes_what_it_promises() {
    let out = result();
    for file in [
        "plan.json",
        "machine.json",
        "samples.jsonl",
        "cells.csv",
        "percentiles.csv",
        "summary.md",
        "run.log",
    ] {
        assert!(!get(&out.join(file)).is_empty(), "{file}");
    }
    let plots: Vec<_> =
        std::fs::read_dir(out.join("plots")).expect("plots").map(|e| e.expect("an entry").path()).collect();
    for extension in ["svg", "png"] {
        let of = plots.iter().filter(|p| p.extension().is_some_and(|e| e == extension)).count();
        assert!(of >= 3, "{plots:?}");
    }
    let rows = cells(&out);
    assert_eq!(rows.len(), 4);
    for row in &rows {
        assert!(row["status"] == "ok" && row["reps"] == "12" && row["tokens_timed"] == "360", "{row:?}");
        assert!(!row["tpot_p99_ns"].is_empty(), "360 tokens are enough for a p99");
        let number = |name: &str| row[name].parse::<f64>().unwrap_or_else(|_| panic!("{name}: {row:?}"));
        assert!(number("probe_gb_s") > 0.0 && number("roofline_fraction") > 0.0);
        // A window reads its tokens; dense reads the context.
        let (rows_read, context) = (number("rows_read_per_token"), number("context_tokens"));
        let heads = 4.0 * 2.0;
        if row["method"] == "dense" {
            assert!(rows_read >= heads * context && rows_read <= heads * (context + 32.0), "{row:?}");
            assert!(number("rel_l2_max") < 0.05, "{row:?}");
        } else {
            assert!(rows_read <= heads * 70.0, "{row:?}");
        }
    }
}

#[test]
fn p99_stays_empty_below_its_number_of_samples() {
    let dir = tempfile::tempdir().expect("a folder");
    measure(dir.path(), Experiment::default().write(dir.path()), "out", &[]).expect(0);
    for row in cells(&dir.path().join("out")) {
        assert_eq!((row["tokens_timed"].as_str(), row["tpot_p99_ns"].as_str()), ("16", ""));
        assert!(!row["tpot_p50_ns"].is_empty());
    }
}

#[test]
fn dtypes_of_keys_and_values_go_all_the_way() {
    let dir = tempfile::tempdir().expect("a folder");
    let kv_dtypes = vec!["bf16", "k=f32,v=bf16", "v=f32+rotate, k=bf16"];
    let file = Experiment { kv_dtypes, methods: vec!["dense"], ..Experiment::default() }.write(dir.path());
    measure(dir.path(), file, "out", &[]).expect(0);
    let out = dir.path().join("out");
    let rows_of = |name: &str| {
        let found: Vec<_> = cells(&out).into_iter().filter(|r| r["kv_dtype"] == name).collect();
        assert_eq!(found.len(), 1, "{name}");
        found[0].clone()
    };
    let number =
        |row: &Row, name: &str| row[name].parse::<f64>().unwrap_or_else(|_| panic!("{name}: {row:?}"));
    let (plain, keys) = (rows_of("bf16"), rows_of("k=f32,v=bf16"));
    rows_of("k=bf16,v=f32+rotate");
    // 4 layers x 2 heads x 64 numbers, of 2 and 2, or 4 and 2 bytes.
    assert_eq!(plain["kv_bytes_stored_per_token"], "2048");
    assert_eq!(keys["kv_bytes_stored_per_token"], "3072");
    assert!(number(&plain, "attention_logit_error_max") > 0.0 && number(&plain, "append_ns") > 0.0);
    assert_eq!(keys["attention_logit_error_max"], "0");
    assert!(number(&keys, "rel_l2_p50") < number(&plain, "rel_l2_p50"));
    assert!(number(&keys, "cosine_min") <= number(&keys, "cosine_p5"));
    let summary = get(&out.join("summary.md"));
    for words in ["k=bf16,v=f32+rotate", "logit error", "kB stored", "append µs"] {
        assert!(summary.contains(words), "{words} is missing in:\n{summary}");
    }
    assert!(out.join("plots/error-bytes.svg").exists());
    // Narrowed by flags in another spelling, the plan has that cell alone.
    let only = ["plan", file, "--list", "--set", "kv_dtype=v=bf16,k=f32"];
    let listed = run(dir.path(), &only).expect(0).out;
    assert!(listed.lines().count() == 1 && listed.contains("/kv=k=f32,v=bf16/"), "{listed}");
    let text = run(dir.path(), &["cmp", "out"]).expect(0).out;
    assert!(text.contains("k=f32,v=bf16"), "{text}");
    let same = run(dir.path(), &["check", "out", "out"]).expect(0).out;
    assert!(!same.contains("regressed"), "{same}");
    measure(dir.path(), file, "out", &[]).expect(0);
    run(dir.path(), &["report", "--rebuild", "out"]).expect(0);
}

#[test]
fn cmp_puts_methods_side_by_side() {
    let out = result();
    let text = run(RESULT.path(), &["cmp", path(&out)]).expect(0).out;
    assert!(text.contains("dense") && text.contains("window"), "{text}");
    for row in rows(&run(RESULT.path(), &["cmp", path(&out), "--format", "csv"]).expect(0).out) {
        assert!(!row.is_empty());
    }
    let json = run(RESULT.path(), &["cmp", path(&out), "--format", "json"]).expect(0).out;
    serde_json::from_str::<serde_json::Value>(&json).expect("JSON");
}

#[test]
fn check_finds_a_slower_head_and_nothing_in_itself() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = result();
    let same = run(dir.path(), &["check", path(&base), path(&base)]).expect(0);
    assert!(!same.out.contains("regressed"), "{}", same.out);

    let slower = |factor: f64| {
        move |mut line: serde_json::Value| {
            if line["line"] == "sample" {
                for ns in line["sample"]["tok_ns"].as_array_mut().expect("token times") {
                    *ns = ((ns.as_f64().expect("ns") * factor) as u64).into();
                }
            }
            Some(line)
        }
    };
    let slow = doctored(dir.path(), "slow", slower(2.0));
    let ran = run(dir.path(), &["check", path(&base), path(&slow)]).expect(3);
    assert!(ran.out.contains("regressed") && ran.out.contains("tpot_p50"), "{}", ran.out);
    // The other way round it is better, and better is no failure.
    let ran = run(dir.path(), &["check", path(&slow), path(&base)]).expect(0);
    assert!(ran.out.contains("improved"), "{}", ran.out);
    let json = run(dir.path(), &["check", path(&base), path(&slow), "--format", "json"]).expect(3).out;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert!(json["counts"]["regressed"].as_u64() >= Some(4), "{json}");

    // A worse error is exact: no interval is needed.
    let worse = doctored(dir.path(), "worse", |mut line| {
        if line["line"] == "quality" {
            let value = line["quality"]["rel_l2_p50"].as_f64().expect("an error") + 0.01;
            line["quality"]["rel_l2_p50"] = value.into();
        }
        Some(line)
    });
    let ran = run(dir.path(), &["check", path(&base), path(&worse)]).expect(3);
    assert!(ran.out.contains("rel_l2_p50"), "{}", ran.out);
}

#[test]
fn check_refuses_unlike_machines_and_names_missing_cells() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = result();
    let gone = cells(&base)[0]["cell_id"].clone();
    let of = |line: &serde_json::Value| {
        ["sample", "quality"].iter().any(|k| line[k]["cell"] == gone.as_str())
            || line["cell"] == gone.as_str()
    };
    let part = doctored(dir.path(), "part", |line| (!of(&line)).then_some(line));
    let ran = run(dir.path(), &["check", path(&base), path(&part)]).expect(6);
    assert!(ran.out.contains("missing") && ran.out.contains("context=256"), "{}", ran.out);

    let other = doctored(dir.path(), "other", Some);
    let plan = get(&other.join("plan.json"));
    let mut plan: serde_json::Value = serde_json::from_str(&plan).expect("a plan");
    plan["machine_class"] = "ffffffffffffffff".into();
    put(&other.join("plan.json"), &plan.to_string());
    let pair = ["check", path(&base), path(&other)];
    run(dir.path(), &pair).expect(2).says(&["different kinds of machine", "--allow-machine-mismatch"]);
    let advice = run(dir.path(), &[&pair[..], &["--allow-machine-mismatch"]].concat()).expect(0);
    assert!(advice.out.contains("Advisory only"), "{}", advice.out);
}

#[test]
fn report_gives_csv_json_and_parts_of_a_page() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = result();
    let csv = run(dir.path(), &["report", path(&out), "--format", "csv"]).expect(0).out;
    assert_eq!(csv, get(&out.join("cells.csv")), "one result as CSV is its cells.csv");
    assert_eq!(rows(&csv).len(), 4);
    let json = run(dir.path(), &["report", path(&out), "--format", "json"]).expect(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json.as_array().map(Vec::len), Some(4));

    let page = dir.path().join("PAGE.md");
    let hand = "# By hand\n\n<!-- BEGIN longbit: table -->\nold\n<!-- END longbit: table -->\n\nText that stays.\n\n\
                <!-- BEGIN longbit: figures -->\n<!-- END longbit: figures -->\n\
                <!-- BEGIN longbit: sentence:small -->\n<!-- END longbit: sentence:small -->\n";
    put(&page, hand);
    let ran = run(dir.path(), &["report", path(&out), "--splice", "PAGE.md"]).expect(0);
    assert!(ran.out.contains("3 parts"), "{}", ran.out);
    let spliced = get(&page);
    assert!(
        spliced.starts_with("# By hand\n")
            && spliced.contains("\nText that stays.\n")
            && !spliced.contains("\nold\n")
    );
    assert!(spliced.contains("| dense") && spliced.contains("plots/speed.svg"), "{spliced}");
    run(dir.path(), &["report", path(&out), "--splice", "PAGE.md"]).expect(0);
    assert_eq!(get(&page), spliced, "splicing twice changes nothing");

    let wrong = hand.replace("longbit: table", "longbit: tabel");
    put(&page, &wrong);
    run(dir.path(), &["report", path(&out), "--splice", "PAGE.md"]).expect(1).says(&[
        "PAGE.md:3",
        "tabel",
        "table",
    ]);
    assert_eq!(get(&page), wrong, "a page is replaced whole or not at all");
}

#[test]
fn a_reader_that_leaves_does_not_change_the_exit_code() {
    let dir = tempfile::tempdir().expect("a folder");
    let slower = doctored(dir.path(), "slower", |mut line| {
        if let Some(tokens) = line.pointer_mut("/sample/tok_ns").and_then(|t| t.as_array_mut()) {
            tokens.iter_mut().for_each(|t| *t = (t.as_u64().unwrap_or(0) * 3).into());
        }
        Some(line)
    });
    // Both ends of the reader are closed before the program starts: its first write fails.
    let deaf = |args: &[&str]| {
        let (reader, out) = std::io::pipe().expect("a pipe");
        drop(reader);
        let (reader, err) = std::io::pipe().expect("a pipe");
        drop(reader);
        let status = longbit(dir.path(), args).stdout(out).stderr(err).status().expect("it starts");
        status.code().expect("no signal ends it")
    };
    assert_eq!(deaf(&["check", path(&result()), path(&slower)]), 3);
    assert_eq!(deaf(&["report", path(&result())]), 0);
    let rest = "[verify]\ncosine_min = 0.999999999\nmethods = [\"window\"]\n".to_owned();
    let file = Experiment { rest, ..Experiment::default() }.write(dir.path());
    assert_eq!(deaf(&["run", file, "--out", "strict"]), 4);
    assert!(dir.path().join("strict/cells.csv").exists());
    assert_eq!(deaf(&["run", "absent.toml"]), 1);
}

#[test]
fn colour_is_never_forced_on_a_reader() {
    let out = result();
    let views: [&[&str]; 4] = [&["report"], &["cmp"], &["check", path(&out)], &["report", "--format", "csv"]];
    let escapes = |args: &[&str], no_color: bool| {
        let mut command = longbit(RESULT.path(), args);
        if no_color {
            command.env("NO_COLOR", "1");
        }
        let ran: Ran = command.output().expect("it starts").into();
        ran.out.contains('\x1b') || ran.err.contains('\x1b')
    };
    for view in views {
        let args = [view, &[path(&out)]].concat();
        assert!(!escapes(&[&args[..], &["--color", "never"]].concat(), false), "{view:?}");
        assert!(!escapes(&args, true) && !escapes(&args, false), "{view:?}: not a terminal");
    }
    for args in [&["--help"][..], &["run", "gone.toml"], &["report", "gone"], &["list"], &["no-such-verb"]] {
        assert!(!escapes(args, true), "{args:?}");
        assert!(!escapes(&[args, &["--color", "never"]].concat(), false), "{args:?}");
    }
    assert!(escapes(&["report", "gone", "--color", "always"], false), "`always` is meant");
}
