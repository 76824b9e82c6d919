//! Every verb from the outside: help, exit codes, formats.

#![forbid(unsafe_code)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::*;
use safetensors::{Dtype, SafeTensors};

const VERBS: [&str; 9] = ["run", "plan", "verify", "machine", "list", "cmp", "check", "report", "logits"];

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

fn path(p: &Path) -> &str {
    p.to_str().expect("a path in UTF-8")
}

#[test]
fn every_verb_explains_itself() {
    let here = std::env::temp_dir();
    let main = run(&here, &["--help"]).expect(0);
    assert!(main.err.is_empty(), "{}", main.err);
    for verb in VERBS {
        assert!(main.out.contains(&format!("\n  {verb} ")), "{verb} is missing in:\n{}", main.out);
        let help = run(&here, &[verb, "--help"]).expect(0);
        assert!(help.out.contains(&format!("Usage: longbit {verb}")) && help.err.is_empty(), "{help:?}");
    }
    assert!(main.out.contains("Exit codes:"));
    let version = run(&here, &["--version"]).expect(0);
    assert!(version.out.starts_with("longbit 0."), "{}", version.out);
}

#[test]
fn list_names_what_experiments_can_use() {
    let here = std::env::temp_dir();
    let text = run(&here, &["list"]).expect(0).out;
    for word in ["dense", "window", "sinks", "f32", "bf16", "bitnet-2b-4t", "tiny", "mix", "gaussian", "int8"]
    {
        assert!(text.contains(word), "{word} is missing in:\n{text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&run(&here, &["list", "--json"]).expect(0).out).expect("JSON");
    let names = |key: &str| -> Vec<String> {
        let items = json[key].as_array().expect("a list");
        items.iter().map(|i| i["name"].as_str().expect("a name").to_owned()).collect()
    };
    assert!(names("methods").contains(&"window".to_owned()));
    assert!(names("presets").contains(&"bitnet-2b-4t".to_owned()));
    assert!(names("kv_dtypes").contains(&"bf16".to_owned()));
}

#[test]
fn the_isa_is_data() {
    let here = std::env::temp_dir();
    let with = |isa: &str| -> Ran {
        longbit(&here, &["list", "--json"]).env("LONGBIT_ISA", isa).output().expect("it starts").into()
    };
    let json: serde_json::Value = serde_json::from_str(&with("scalar").expect(0).out).expect("JSON");
    assert_eq!(json["isa"], "scalar");
    let ran = with("mmx");
    assert!(ran.code != 0 && ran.err.contains("mmx") && ran.err.contains("scalar"), "{ran:?}");
}

#[test]
fn plan_predicts_and_writes_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = Experiment { contexts: vec![128, 256], ..Experiment::default() };
    let file = sweep.write(dir.path());
    let names = run(dir.path(), &["plan", file, "--list"]).expect(0).out;
    assert_eq!(names.lines().count(), sweep.cells());
    assert_eq!(names.lines().next(), Some("main/small/context=128/threads=1/kv=bf16/method=dense"));
    let some = run(dir.path(), &["plan", file, "--list", "-m", "dense", "-F", "context=256"]).expect(0).out;
    assert_eq!(some.lines().count(), 1, "{some}");
    let plans: serde_json::Value =
        serde_json::from_str(&run(dir.path(), &["plan", file, "--json"]).expect(0).out).expect("JSON");
    let cells = plans[0]["cells"].as_array().expect("cells");
    assert_eq!(cells.len(), sweep.cells());
    assert!(cells.iter().all(|c| c["predicted"]["rss_bytes"].as_u64() > Some(1 << 20)), "{cells:?}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("the folder").count(), 1);
}

#[test]
fn the_experiments_of_the_repository_plan() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut found = 0;
    for entry in std::fs::read_dir(root().join("experiments")).expect("experiments") {
        let file = entry.expect("an entry").path();
        if file.extension().is_some_and(|e| e == "toml") {
            let names = run(dir.path(), &["plan", path(&file), "--list"]).expect(0).out;
            assert!(names.lines().count() >= 2, "{}: {names}", file.display());
            found += 1;
        }
    }
    assert!(found >= 3, "smoke, quick and long are expected");
}

#[test]
fn verify_tells_pass_from_fail() {
    let dir = tempfile::tempdir().expect("a folder");
    let with = |rest: &str| {
        Experiment { rest: rest.to_owned(), ..Experiment::default() }.write(dir.path());
        run(dir.path(), &["verify", "small.toml"])
    };
    let good = with("[verify]\nrel_l2_max = 0.05\nmethods = [\"dense\"]\n").expect(0);
    assert!(good.out.contains("2 pass, 0 fail, 0 not measured"), "{}", good.out);
    let bad = with("[verify]\nrel_l2_max = 0.0000001\n").expect(4);
    assert!(
        bad.out.contains("FAIL: largest relative L2 error") && bad.out.contains("0 pass, 2 fail"),
        "{}",
        bad.out
    );
    with("").expect(2).says(&["no [verify]"]);
    assert_eq!(std::fs::read_dir(dir.path()).expect("the folder").count(), 1, "verify writes nothing here");
    // The same violation in a run: the cells are measured and marked.
    Experiment { rest: "[verify]\nrel_l2_max = 0.0000001\n".to_owned(), ..Experiment::default() }
        .write(dir.path());
    measure(dir.path(), "small.toml", "out", &[]).expect(4);
    let rows = cells(&dir.path().join("out"));
    assert!(rows.iter().all(|r| r["status"] == "verify_failed" && !r["decode_tok_s"].is_empty()), "{rows:?}");
}

#[test]
fn machine_is_one_json_document() {
    let ran = run(&std::env::temp_dir(), &["machine", "--json"]).expect(0);
    let json: serde_json::Value = serde_json::from_str(&ran.out).expect("JSON");
    assert!(json["cpus_allowed"].as_u64() >= Some(1));
    assert!(json["probes"][0]["gb_s"].as_f64() > Some(0.0), "{json}");
    assert_eq!(json["machine_class"].as_str().map(str::len), Some(16));
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

/// `longbit logits` on the tiny checkpoint with further arguments, and the bytes of the file it wrote.
fn logits(dir: &Path, name: &str, args: &[&str]) -> Vec<u8> {
    let (model, file) = (checkpoint(), dir.join(name));
    let all = [&["logits", "--model", path(&model), "--out", path(&file)], args].concat();
    run(dir, &all).expect(0);
    std::fs::read(file).expect("the file of logits")
}

#[test]
fn logits_do_not_depend_on_the_chunk() {
    let dir = tempfile::tempdir().expect("a folder");
    let ids: Vec<String> = (0..48u32).map(|i| (i * 37 % 512).to_string()).collect();
    let ids = ids.join(",");
    let one = logits(dir.path(), "one.safetensors", &["--tokens", &ids, "--chunk", "1", "--threads", "1"]);
    let all = logits(dir.path(), "all.safetensors", &["--tokens", &ids, "--chunk", "48"]);
    assert!(one == all, "chunks of 1 and of 48 differ");
    put(&dir.path().join("ids.txt"), &ids.replace(',', "\n"));
    assert!(one == logits(dir.path(), "file.safetensors", &["--tokens", "ids.txt"]), "a file of ids differs");
    let scalar: Ran = longbit(
        dir.path(),
        &["logits", "--model", path(&checkpoint()), "--tokens", &ids, "--out", "scalar.safetensors"],
    )
    .env("LONGBIT_ISA", "scalar")
    .output()
    .expect("it starts")
    .into();
    scalar.expect(0);
    assert!(one == std::fs::read(dir.path().join("scalar.safetensors")).expect("a file"), "the ISA shows");

    let file = SafeTensors::deserialize(&one).expect("safetensors");
    let tensor = file.tensor("logits").expect("the tensor");
    assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[48, 512][..]));
    let values: Vec<f32> = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert!(values.iter().all(|v| v.is_finite()));
    let rows: std::collections::BTreeSet<Vec<u32>> =
        values.chunks(512).map(|r| r.iter().map(|v| v.to_bits()).collect()).collect();
    assert_eq!(rows.len(), 48, "every position says something else");
    let left = std::fs::read_dir(dir.path()).expect("the folder").count();
    assert_eq!(left, 5, "nothing is left beside the files that were asked for");
}

#[test]
fn logits_without_a_file_show_the_likeliest_tokens() {
    let dir = tempfile::tempdir().expect("a folder");
    let text =
        run(dir.path(), &["logits", "--model", path(&checkpoint()), "--tokens", "1,2,3"]).expect(0).out;
    assert_eq!(text.lines().count(), 4, "{text}");
}

#[test]
fn logits_refuse_what_they_cannot_use() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = checkpoint();
    let ask = |args: &[&str]| {
        let all = [&["logits", "--model", path(&model), "--out", "out.safetensors"], args].concat();
        run(dir.path(), &all)
    };
    ask(&["--tokens", "1,x"]).expect(2).says(&["1,x"]);
    ask(&["--tokens", ","]).expect(2).says(&["no token id"]);
    ask(&["--tokens", "99999999999"]).expect(2).says(&["99999999999", "not a token id"]);
    ask(&["--tokens", "gone.txt"]).expect(2).says(&["gone.txt"]);
    ask(&["--tokens", "1", "--kv", "bf61"]).expect(2).says(&["bf61", "bf16"]);
    ask(&["--tokens", "1", "--head", "int9"]).expect(2).says(&["int9", "int8"]);
    let unknown = ask(&["--tokens", "1,512"]).says(&["512"]);
    assert!(matches!(unknown.code, 1 | 2), "{unknown:?}");
    let chunk = ask(&["--tokens", "1", "--chunk", "0"]).says(&["chunk"]);
    assert!(matches!(chunk.code, 1 | 2), "{chunk:?}");
    let threads = ask(&["--tokens", "1", "--threads", "0"]).says(&["thread"]);
    assert!(matches!(threads.code, 1 | 2), "{threads:?}");
    let nowhere = run(dir.path(), &["logits", "--model", "gone", "--tokens", "1"]).says(&["gone"]);
    assert!(matches!(nowhere.code, 1 | 2), "{nowhere:?}");
    assert!(!dir.path().join("out.safetensors").exists());
}

#[test]
fn a_damaged_checkpoint_is_an_error_that_names_the_tensor() {
    let dir = tempfile::tempdir().expect("a folder");
    let broken = dir.path().join("broken");
    std::fs::create_dir(&broken).expect("a folder");
    let whole = std::fs::read(checkpoint().join("model.safetensors")).expect("the checkpoint");
    let config = get(&checkpoint().join("config.json"));
    let ask = |bytes: &[u8], config: &str| {
        std::fs::write(broken.join("model.safetensors"), bytes).expect("a file");
        put(&broken.join("config.json"), config);
        let ran = run(dir.path(), &["logits", "--model", "broken", "--tokens", "1,2"]);
        assert!(matches!(ran.code, 1 | 2), "{ran:?}");
        assert!(!ran.err.contains("panicked") && ran.err.starts_with("error: "), "{}", ran.err);
        ran.err
    };
    let cut = ask(&whole[..whole.len() / 2], &config);
    assert!(cut.contains("model.safetensors"), "{cut}");
    let shape = ask(&whole, &config.replace("\"intermediate_size\": 512", "\"intermediate_size\": 1024"));
    assert!(shape.contains("model.layers.0.mlp."), "{shape}");
    let text = String::from_utf8_lossy(&whole[8..]).into_owned();
    let name = "model.layers.3.self_attn.o_proj.weight";
    assert!(text.contains(name), "the checkpoint holds other names than this test expects");
    let place = whole.windows(name.len()).position(|w| w == name.as_bytes()).expect("the name");
    let mut renamed = whole.clone();
    renamed[place + 13] = b'9'; // model.layers.9: as long, so that no offset moves
    let missing = ask(&renamed, &config);
    assert!(missing.contains(name) && missing.contains("is missing"), "{missing}");
    let config_cut = ask(&whole, &config[..config.len() / 2]);
    assert!(config_cut.contains("config.json"), "{config_cut}");
    ask(&[], &config);
}

#[test]
fn a_text_is_verified_compared_and_reported_by_its_logits() {
    let dir = tempfile::tempdir().expect("a folder");
    let limits =
        |methods: &str| format!("[verify]\nkl_nats_max = 0.000001\ntop1_min = 1\nmethods = [{methods}]\n");
    let with = |rest: String| Experiment { text: true, rest, reps: 6, ..Experiment::default() };
    let file = with(limits("\"window\"")).write(dir.path());
    let ran = run(dir.path(), &["verify", file]).expect(4);
    for part in ["KL mean", "FAIL: largest KL divergence", "verify.kl_nats_max", "1 pass, 1 fail"] {
        assert!(ran.out.contains(part), "{part} is missing in:\n{}", ran.out);
    }
    let file = with(limits("\"dense\"")).write(dir.path());
    run(dir.path(), &["verify", file]).expect(0);
    // From elsewhere the paths of the file mean the same.
    let there = dir.path().join(file);
    let elsewhere = tempfile::tempdir().expect("a folder");
    let ran = measure(elsewhere.path(), path(&there), path(&dir.path().join("before")), &[]).expect(0);
    assert!(ran.out.contains("KL divergence of the next token from dense bf16"), "{}", ran.out);
    let again = measure(dir.path(), file, "before", &[]).expect(0);
    assert!(again.out.contains("wrote before/cells.csv"), "{}", again.out);
    let before = dir.path().join("before");
    let cmp = run(dir.path(), &["cmp", "before"]).expect(0).out;
    assert!(cmp.contains("top-1") && cmp.contains("perplexity") && !cmp.contains("L2"), "{cmp}");
    let summary = get(&before.join("summary.md"));
    assert!(summary.contains("KL nats: divergence") && !summary.contains("rel L2"), "{summary}");
    let figure = get(&before.join("plots/error-speed.svg"));
    assert!(figure.contains("KL divergence of the next token (nats)"));
    // The same figures are no change, worse ones a regression, on any machine.
    let after = dir.path().join("after");
    std::fs::create_dir(&after).expect("a folder");
    for name in ["plan.json", "machine.json"] {
        std::fs::copy(before.join(name), after.join(name)).expect("a copy");
    }
    let worse = |line: &mut serde_json::Value| {
        if line["line"] == "quality" {
            let value = line["quality"]["kl_nats"].as_f64().expect("a divergence") + 0.01;
            line["quality"]["kl_nats"] = value.into();
        }
    };
    let mut lines = log(&before);
    lines.iter_mut().for_each(worse);
    put(&after.join("samples.jsonl"), &lines.iter().map(|l| l.to_string() + "\n").collect::<String>());
    let ran = run(dir.path(), &["check", "before", "after"]).expect(3);
    assert!(ran.out.contains("kl_nats") && ran.out.contains("regressed"), "{}", ran.out);
    assert!(run(dir.path(), &["check", "before", "before"]).code != 3);
}
