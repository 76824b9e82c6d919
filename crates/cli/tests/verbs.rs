//! Every verb from the outside: help, exit codes, formats.

#![forbid(unsafe_code)]

mod common;

use common::*;

const VERBS: [&str; 14] = [
    "run",
    "plan",
    "verify",
    "machine",
    "list",
    "cmp",
    "check",
    "report",
    "logits",
    "generate",
    "perplexity",
    "profile",
    "convert",
    "inspect",
];

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
fn plan_says_which_cells_lie_beyond_the_trained_positions() {
    let dir = tempfile::tempdir().expect("a folder");
    let plan = |contexts: Vec<usize>| {
        let file = Experiment { contexts, text: true, ..Experiment::default() }.write(dir.path());
        run(dir.path(), &["plan", file]).expect(0).out
    };
    // The tiny checkpoint says 256; a token to warm up and eight timed ones come after the context.
    assert!(!plan(vec![128, 247]).contains("beyond"));
    let note = "2 of 4 cells are beyond the 256 positions that the model was trained for";
    assert!(plan(vec![128, 248]).contains(note));
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
    run(dir.path(), &["check", "before", "before"]).expect(0);
}
