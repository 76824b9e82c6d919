//! What cannot be used is refused before anything is written, with the place and the way to mend it; what the disk
//! refuses is said, and what was measured before is kept.

#![forbid(unsafe_code)]

mod common;

use std::path::Path;

use common::*;

/// Runs an altered experiment file; asserts exit 2, the texts, and that nothing was written.
#[track_caller]
fn refused(text: &str, line: usize, says: &[&str]) {
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir.path().join("small.toml"), text);
    put(&dir.path().join("story.txt"), "Once upon a time.");
    let given = 2;
    let place = format!("at: small.toml:{line}");
    for verb in [&["run", "small.toml", "--out", "out"][..], &["plan", "small.toml"]] {
        let ran = run(dir.path(), verb).expect(2).says(&["error: "]).says(says);
        // The place ends its word or has the key behind it: line 2 is not line 23.
        let placed =
            |l: &str| l.trim().strip_prefix(&place).is_some_and(|r| r.is_empty() || r.starts_with(" ("));
        assert!(ran.err.lines().any(placed), "{place} is missing in:\n{}", ran.err);
        let left: Vec<_> = std::fs::read_dir(dir.path()).expect("the folder").collect();
        assert_eq!(left.len(), given, "{verb:?} wrote something: {left:?}");
    }
}

/// The default file with `old` replaced, and the line (from 1) where `new` then stands.
#[track_caller]
fn altered(old: &str, new: &str) -> (String, usize) {
    let text = Experiment::default().toml();
    let at = text.find(old).unwrap_or_else(|| panic!("{old:?} is not in the file:\n{text}"));
    (text.replacen(old, new, 1), 1 + text[..at].matches('\n').count())
}

#[track_caller]
fn refused_when(old: &str, new: &str, says: &[&str]) {
    let (text, line) = altered(old, new);
    refused(&text, line, says);
}

#[test]
fn unknown_keys_and_tables_are_named_with_the_nearest() {
    refused_when("reps = 2", "rep = 2", &["unknown key \"rep\"", "(measure.rep)", "did you mean \"reps\"?"]);
    refused_when("context =", "contexts =", &["unknown key \"contexts\"", "did you mean \"context\"?"]);
    refused_when("[limits]", "[limit]", &["unknown key \"limit\"", "did you mean \"limits\"?"]);
    refused_when("schema = 1", "schema = 9", &["schema 9 is not known", "schema = 1"]);
}

#[test]
fn unknown_names_are_named_with_the_nearest() {
    let methods = "\"dense\", \"window:sinks=4,window=64\"";
    refused_when(methods, "\"dens\"", &["unknown method \"dens\"", "did you mean \"dense\"?"]);
    refused_when(
        methods,
        "\"window:sink=4\"",
        &["unknown parameter \"sink\" of method \"window\"", "did you mean \"sinks\"?"],
    );
    refused_when(methods, "\"dense:budget=1\"", &["unknown parameter \"budget\"", "prefill_dense_layers"]);
    refused_when(methods, "\"window:window=many\"", &["window=many of method \"window\" is out of range"]);
    refused_when(
        "\"bf16\"]\nmethod",
        "\"bf61\"]\nmethod",
        &["unknown KV dtype \"bf61\"", "did you mean \"bf16\"?"],
    );
    refused_when("\"tiny\"", "\"tinny\"", &["unknown preset \"tinny\"", "did you mean \"tiny\"?"]);
    refused_when("\"tiny\"", "\"bitnet-2b\"", &["unknown preset \"bitnet-2b\"", "bitnet-2b-4t"]);
    refused_when(
        "name = \"mix\"",
        "name = \"mixx\"",
        &["unknown workload \"mixx\"", "did you mean \"mix\"?"],
    );
    refused_when(
        "name = \"mix\"",
        "name = \"mix:nosuch=1\"",
        &["unknown parameter \"nosuch\" of workload \"mix\""],
    );
    refused_when(
        "head = \"bf16\"",
        "head = \"int9\"",
        &["unknown number format \"int9\" of the head", "did you mean \"int8\"?"],
    );
}

#[test]
fn axis_values_out_of_range_are_refused() {
    for (old, new, says) in [
        ("context = [128]", "context = [-1]", "context must be a whole number of tokens from 0 to"),
        ("context = [128]", "context = [99999999999]", "context must be a whole number of tokens from 0 to"),
        ("context = [128]", "context = [\"2k\"]", "context must be a whole number of tokens from 0 to"),
        ("context = [128]", "context = []", "the axis context is empty"),
        (
            "threads = [1]",
            "threads = [0]",
            "threads must be \"all\", \"all+1\", \"1..all\" or a whole number from 1 to",
        ),
        (
            "threads = [1]",
            "threads = [-2]",
            "threads must be \"all\", \"all+1\", \"1..all\" or a whole number from 1 to",
        ),
        (
            "threads = [1]",
            "threads = [\"most\"]",
            "threads must be \"all\", \"all+1\", \"1..all\" or a whole number from 1 to",
        ),
        ("probe = \"1MiB\"", "probe = \"1 parsec\"", "is not a size"),
        ("probe = \"1MiB\"", "probe = \"99999999TiB\"", "is not a size"),
        ("max_rss = \"8GiB\"", "max_rss = \"101%\"", "is not a share of the memory"),
        ("max_rss = \"8GiB\"", "max_rss = \"0GiB\"", "a limit of 0 bytes lets nothing run"),
        ("cell_timeout = \"60s\"", "cell_timeout = \"soon\"", "is not a duration"),
        ("reps = 2", "reps = 0", "reps must be a whole number from 1 to"),
        ("reps = 2", "reps = 2.5", "reps must be a whole number from 1 to"),
        ("quality_steps = 2", "quality_steps = -1", "quality_steps must be a whole number"),
        ("seed = 1", "seed = \"one\"", "seed must be a whole number"),
    ] {
        let (text, line) = altered(old, new);
        // A list without items has no place of its own; the complaint stands at its table.
        let line = if new.ends_with("[]") { line - 1 } else { line };
        refused(&text, line, &[says]);
    }
}

#[test]
fn every_mistake_of_a_file_is_told_at_once() {
    let text = Experiment::default().toml().replace("\"tiny\"", "\"tinny\"").replace("reps = 2", "rep = 2");
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir.path().join("small.toml"), &text);
    let ran = run(dir.path(), &["run", "small.toml"]).expect(2).says(&["tinny", "unknown key \"rep\""]);
    assert_eq!(ran.err.matches("error: ").count(), 2, "{}", ran.err);
    assert!(ran.out.is_empty() && !dir.path().join("runs").exists());
}

#[test]
fn text_that_is_not_toml_and_files_that_are_not_there() {
    let (text, line) = altered("reps = 2", "reps = = 2");
    refused(&text, line, &["not valid TOML"]);
    let dir = tempfile::tempdir().expect("a folder");
    run(dir.path(), &["run", "nowhere.toml"]).expect(1).says(&["cannot read nowhere.toml"]);
    std::fs::write(dir.path().join("bytes.toml"), [0xff, 0xfe, 0x00]).expect("a file");
    run(dir.path(), &["run", "bytes.toml"]).expect(2).says(&["not UTF-8"]);
    assert!(!dir.path().join("runs").exists());
}

#[test]
fn flags_are_checked_like_the_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = Experiment { contexts: vec![128, 256], ..Experiment::default() }.write(dir.path());
    for (flags, says) in [
        (&["--set", "context=512"][..], "512 is not on the axis context"),
        (&["--set", "contxt=128"], "did you mean \"context\"?"),
        (&["--set", "context"], "context"),
        (&["-m", "windw"], "windw"),
        (&["-f", "nothing-has-this-name"], "the filters leave no cell"),
        (&["--timeout", "soon"], "is not a duration"),
        (&["--max-rss", "plenty"], "is not a memory limit"),
        (&["--reps", "many"], "many"),
        (&["--no-such-flag"], "--no-such-flag"),
    ] {
        let all = [&["run", file, "--out", "out"], flags].concat();
        run(dir.path(), &all).expect(2).says(&[says]);
        assert!(!dir.path().join("out").exists(), "{flags:?}");
    }
    run(dir.path(), &["runn", file]).expect(2).says(&["'runn'", "'run'"]);
    run::<&str>(dir.path(), &[]).expect(2);
}

/// A finished small result in `out`.
fn finished(dir: &Path) -> &'static str {
    let file = Experiment::default().write(dir);
    measure(dir, file, "out", &[]).expect(0);
    file
}

#[test]
fn a_result_of_another_plan_commit_or_machine_is_refused_unless_afresh() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = finished(dir.path());
    let plan = dir.path().join("out/plan.json");
    let original = get(&plan);
    let samples = get(&dir.path().join("out/samples.jsonl"));
    let refused = |word: &str, flags: &[&str]| {
        let before = get(&plan);
        measure(dir.path(), file, "out", flags).expect(2).says(&[
            &format!("out holds another run: its {word} is "),
            "plan.json",
            "--fresh",
        ]);
        assert_eq!(get(&plan), before);
        assert_eq!(get(&dir.path().join("out/samples.jsonl")), samples);
    };
    refused("plan", &["--reps", "3"]);
    for (word, field) in [("commit", "git_sha"), ("machine", "machine_id"), ("plan", "plan_hash")] {
        let mut other: serde_json::Value = serde_json::from_str(&original).expect("a plan");
        other[field] = "0123456789abcdef".into();
        put(&plan, &other.to_string());
        refused(word, &[]);
    }
    put(&plan, "{ this is no plan");
    measure(dir.path(), file, "out", &[]).expect(2).says(&["cannot be read by this version", "--fresh"]);

    measure(dir.path(), file, "out", &["--fresh"]).expect(0);
    assert_ne!(get(&dir.path().join("out/samples.jsonl")), samples);
    assert_eq!(cells(&dir.path().join("out")).len(), 2);
}

#[test]
fn a_folder_that_is_no_result_is_never_touched() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = Experiment::default().write(dir.path());
    std::fs::create_dir(dir.path().join("out")).expect("a folder");
    put(&dir.path().join("out/thesis.tex"), "years of work");
    for flags in [&[][..], &["--fresh"]] {
        measure(dir.path(), file, "out", flags).expect(2).says(&["thesis.tex", "choose another --out"]);
        assert_eq!(std::fs::read_dir(dir.path().join("out")).expect("it").count(), 1);
    }
    for verb in [&["report", "out"][..], &["cmp", "out"], &["check", "out", "out"], &["report", "gone"]] {
        run(dir.path(), verb).expect(2);
    }
}

#[test]
fn an_output_that_cannot_be_written_is_reported_with_path_and_cause() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = Experiment::default().write(dir.path());
    // Below a regular file not even the superuser can make a folder.
    put(&dir.path().join("occupied"), "a file");
    measure(dir.path(), file, "occupied/out", &[]).expect(1).says(&["occupied/out", "Not a directory"]);
    assert_eq!(get(&dir.path().join("occupied")), "a file");
    run(
        dir.path(),
        &["logits", "--model", checkpoint().to_str().expect("a path"), "--tokens", "1", "--out"]
            .iter()
            .chain(&["occupied/logits.safetensors"])
            .collect::<Vec<_>>(),
    )
    .expect(1)
    .says(&["occupied/logits", "Not a directory"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_is_reported_and_what_was_measured_is_kept() {
    let dir = tempfile::tempdir().expect("a folder");
    let sweep = Experiment { reps: 30, gen_tokens: 50, ..Experiment::default() };
    let file = sweep.write(dir.path());
    // Files of this process cannot grow beyond 48 blocks of 512 bytes; the write that would is cut off in its middle.
    let mut limited = std::process::Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 48; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_longbit")])
        .args(["run", file, "--out", "out", "--no-progress"])
        .current_dir(dir.path());
    clean(&mut limited);
    let ran: Ran = limited.output().expect("a shell").into();
    ran.expect(1).says(&["cannot append to out/samples.jsonl", "File too large"]);
    let out = dir.path().join("out");
    let kept = log(&out);
    assert!(kept.iter().any(|l| l["line"] == "sample"), "nothing was kept");
    let torn = get(&out.join("samples.jsonl"));
    assert!(!torn.ends_with('\n'), "the last write was not cut off; the test proves nothing");
    let whole = &torn[..=torn.rfind('\n').expect("a line")];
    // What was measured can be read already, and is what a later run goes on from.
    run(dir.path(), &["report", "out"]).expect(6);
    measure(dir.path(), file, "out", &[]).expect(0);
    assert!(get(&out.join("samples.jsonl")).starts_with(whole), "what stood was rewritten");
    assert_each_repetition_once(&out, sweep.cells(), sweep.reps);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_device_is_reported_before_anything_is_measured() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = finished(dir.path());
    let run_log = dir.path().join("out/run.log");
    let before = get(&dir.path().join("out/samples.jsonl"));
    std::fs::remove_file(&run_log).expect("the log is there");
    std::os::unix::fs::symlink("/dev/full", &run_log).expect("a link");
    measure(dir.path(), file, "out", &[]).expect(1).says(&["out/run.log", "No space left on device"]);
    assert_eq!(get(&dir.path().join("out/samples.jsonl")), before);
}

#[test]
fn a_damaged_log_is_named_with_its_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = finished(dir.path());
    let samples = dir.path().join("out/samples.jsonl");
    let text = get(&samples);
    let (first, rest) = text.split_once('\n').expect("two lines");
    put(&samples, &format!("{first}\n{{oops\n{rest}"));
    measure(dir.path(), file, "out", &[]).expect(1).says(&["samples.jsonl:2", "remove it to go on"]);
    put(&samples, &text);
    measure(dir.path(), file, "out", &[]).expect(0);
}

#[test]
fn what_a_text_needs_is_asked_for_with_its_line() {
    let text = Experiment { text: true, ..Experiment::default() }.toml();
    let refused_when = |old: &str, new: &str, says: &[&str]| {
        let at = text.find(old).unwrap_or_else(|| panic!("{old:?} is not in the file:\n{text}"));
        refused(&text.replacen(old, new, 1), 1 + text[..at].matches('\n').count(), says);
    };
    let path = format!("path = {:?}", checkpoint());
    refused_when(
        "file = \"story.txt\"",
        "fille = \"story.txt\"",
        &["unknown key \"fille\"", "did you mean \"file\"?"],
    );
    refused_when(
        "file = \"story.txt\"",
        "file = \"gone.txt\"",
        &["cannot read gone.txt", "relative to the directory"],
    );
    let table = "[workload]\nname = \"text\"\n";
    refused_when(&format!("{table}file = \"story.txt\""), table, &["file is missing"]);
    refused_when(
        &path,
        &format!("sha256 = \"12\"\n{path}"),
        &["\"12\" is not a SHA-256", "64 hexadecimal digits"],
    );
    let preset = text.replacen(&path, "preset = \"tiny\"", 1);
    let at = preset.find("name = \"text\"").expect("the workload");
    refused(
        &preset,
        1 + preset[..at].matches('\n').count(),
        &["runs a text through a checkpoint", "[model] path"],
    );
}

#[test]
fn another_checkpoint_than_the_declared_one_is_not_measured() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = Experiment { text: true, ..Experiment::default() }.write(dir.path());
    let whole = get(&dir.path().join(file));
    let declared = "12".repeat(32);
    put(&dir.path().join(file), &whole.replacen("head =", &format!("sha256 = \"{declared}\"\nhead ="), 1));
    measure(dir.path(), file, "out", &[]).expect(6);
    let rows = cells(&dir.path().join("out"));
    assert!(rows.iter().all(|r| r["status"] == "error" && r["error"].contains(&declared)), "{rows:?}");
    let found = rows[0]["error"].split("SHA-256 is ").nth(1).expect("the hash found")[..64].to_owned();
    put(&dir.path().join(file), &whole.replacen("head =", &format!("sha256 = \"{found}\"\nhead ="), 1));
    measure(dir.path(), file, "right", &[]).expect(0);
    assert!(cells(&dir.path().join("right")).iter().all(|r| r["model_sha256"] == found));
}

#[test]
fn a_text_shorter_than_the_context_is_an_error_with_both_numbers() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = Experiment { text: true, ..Experiment::default() }.write(dir.path());
    put(&dir.path().join("story.txt"), "A short story.");
    measure(dir.path(), file, "out", &[]).expect(6);
    let rows = cells(&dir.path().join("out"));
    // 128 of context, then 1 and 8 tokens a repetition.
    assert!(
        rows.iter().all(|r| r["error"].contains("tokens") && r["error"].contains("needs 137")),
        "{rows:?}"
    );
}

#[test]
fn a_checkpoint_that_changed_is_not_mixed_into_a_result() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = dir.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    for entry in std::fs::read_dir(checkpoint()).expect("the checkpoint") {
        let from = entry.expect("an entry").path();
        std::fs::copy(&from, model.join(from.file_name().expect("a name"))).expect("a copy");
    }
    let sweep = Experiment { text: true, kv_dtypes: vec!["bf16", "f32"], ..Experiment::default() };
    let file = sweep.write(dir.path());
    let given = get(&dir.path().join(file)).replacen(&format!("{:?}", checkpoint()), "\"model\"", 1);
    put(&dir.path().join(file), &given);
    measure(dir.path(), file, "out", &[]).expect(0);
    // As if it had been stopped after the first cohort.
    let samples = dir.path().join("out/samples.jsonl");
    let log = get(&samples);
    let second = log.lines().position(|l| l.contains("\"cohort\":1")).expect("a second cohort");
    put(&samples, &log.lines().take(second).map(|l| l.to_owned() + "\n").collect::<String>());
    let config = model.join("config.json");
    put(&config, &(get(&config) + "\n"));
    measure(dir.path(), file, "out", &[]).expect(6).says(&["model has changed", "--fresh"]);
    let rows = cells(&dir.path().join("out"));
    let ok: Vec<_> = rows.iter().map(|r| (r["kv_dtype"].as_str(), r["status"].as_str())).collect();
    assert_eq!(ok, [("bf16", "ok"), ("bf16", "ok"), ("f32", "error"), ("f32", "error")]);
}
