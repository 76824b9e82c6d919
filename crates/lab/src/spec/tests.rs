//! Messages are compared whole: they are what a user works with.

use super::*;
use crate::engine::mock;
use crate::plan::expand;

const GOOD: &str = r#"schema = 1

[experiment]
name = "long"
question = "Which method keeps its speed?"

[model]
preset = "tiny"

[workload]
name = "mix"

[axes]
context = [1024, 2_048]
threads = [1, "all"]
kv_dtype = ["bf16"]
method = ["dense", "window", "window:window=8"]

[[method]]
name = "window"
params = { window = [256, 2048], sinks = [4] }

[[exclude]]
context = [2048]
method = ["dense"]
reason = "hours"

[measure]
reps = 3
max_drift = "3%"
probe = "64MiB"

[limits]
cell_timeout = "2m"
max_rss = "8GiB"
on_exceed = "refuse"

[verify]
cosine_min = 0.99
methods = ["window"]
on_fail = "stop"

[gate]
tpot_p50 = "7%"
rel_l2 = "0.001"
"#;

fn check(text: &str) -> Result<Experiment> {
    parse("experiments/x.toml", "main", text, &mock::capabilities())
}

/// The message after `from` was replaced by `to` in the good file.
fn message(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    check(&GOOD.replacen(from, to, 1)).expect_err(to).to_string()
}

#[test]
fn a_good_file() {
    let e = check(GOOD).unwrap();
    let methods: Vec<String> = e.methods.iter().map(Named::text).collect();
    assert_eq!(
        methods,
        ["dense", "window:sinks=4,window=256", "window:sinks=4,window=2048", "window:sinks=4,window=8"]
    );
    assert_eq!(e.contexts, [1024, 2048]);
    assert_eq!(e.threads, [Threads::Count(1), Threads::All(0)]);
    assert_eq!((e.measure.reps, e.measure.gen_tokens, e.measure.probe_bytes), (3, 64, 64 << 20));
    assert_eq!((e.max_drift_pct, e.cell_timeout_s, e.seed), (3.0, 120.0, 1));
    assert_eq!((e.max_rss, e.on_exceed), (MemoryLimit::Bytes(8 << 30), OnExceed::Refuse));
    assert_eq!((e.gate.tpot_p50_pct, e.gate.rel_l2_abs, e.gate.tpot_p99_pct), (7.0, 0.001, 15.0));
    assert_eq!(e.workload, "mix:needles=8,skew=0.5");
    assert_eq!(e.model.head, "bf16");
    assert_eq!(e.verify.unwrap().methods, ["window"]);
    assert_eq!(e.excludes[0].reason, "hours");
    assert_eq!(e.meta.file_sha256.len(), 64);
}

#[test]
fn complaints_name_file_line_key_and_the_nearest_name() {
    for (from, to, want) in [
        (
            "reps = 3",
            "repz = 3",
            "unknown key \"repz\"\n   at: experiments/x.toml:29 (measure.repz)\n help: did you mean \"reps\"?",
        ),
        (
            "\"dense\", \"window\", \"window:window=8\"",
            "\"windw\"",
            "unknown method \"windw\"\n   at: experiments/x.toml:17 (axes.method)\n help: did you mean \"window\"?",
        ),
        (
            "kv_dtype = [\"bf16\"]",
            "kv_dtype = [\n\"bf16\",\n\"bf17\"]",
            "unknown KV dtype \"bf17\"\n   at: experiments/x.toml:18 (axes.kv_dtype)\n help: did you mean \"bf16\"?",
        ),
        (
            "context = [1024, 2_048]",
            "context = [-1, 2_048]",
            "context must be a whole number of tokens from 0 to 16777216, not -1\n   at: experiments/x.toml:14 (axes.context)",
        ),
        (
            "window = [256, 2048]",
            "window = [256, 0]",
            "window=0 of method \"window\" is out of range\n   at: experiments/x.toml:21 (method.params.window)\n help: window: a whole number from 1 to 1048576 (recent tokens read)",
        ),
        (
            "sinks = [4]",
            "sink = [4]",
            "unknown parameter \"sink\" of method \"window\"\n   at: experiments/x.toml:21 (method.params.sink)\n help: did you mean \"sinks\"?",
        ),
        (
            "preset = \"tiny\"",
            "preset = \"tyny\"",
            "unknown preset \"tyny\"\n   at: experiments/x.toml:8 (model.preset)\n help: did you mean \"tiny\"?",
        ),
        (
            "name = \"mix\"",
            "name = \"mix:needle=3\"",
            "unknown parameter \"needle\" of workload \"mix\"\n   at: experiments/x.toml:11 (workload.name)\n help: did you mean \"needles\"?",
        ),
        (
            "max_rss = \"8GiB\"",
            "max_rss = \"8 parsec\"",
            "\"8 parsec\" is not a memory limit; write e.g. \"90%\" or \"8GiB\"\n   at: experiments/x.toml:35 (limits.max_rss)",
        ),
        (
            "context = [2048]\nmethod",
            "context = [4096]\nmethod",
            "4096 is not on the axis context\n   at: experiments/x.toml:24 (exclude.context)\n help: nothing would be excluded",
        ),
    ] {
        let text = message(from, to);
        // A changed axis makes other parts wrong too; the first complaint is the one asked for.
        assert_eq!(text.split("\nerror: ").next(), Some(want), "{text}");
    }
}

#[test]
fn every_complaint_is_listed_at_once() {
    let text = check(&GOOD.replace("reps = 3", "repz = 3").replace("\"bf16\"", "\"bf61\"")).unwrap_err();
    assert_eq!(text.exit(), crate::Exit::Usage);
    assert_eq!(text.to_string().matches("   at: ").count(), 2, "{text}");
}

#[test]
fn wrong_documents_are_complaints_never_panics() {
    for (from, to) in [
        ("schema = 1", "schema = 2"),
        ("schema = 1\n", ""),
        ("name = \"long\"", "name = \"../up\""),
        ("name = \"long\"", ""),
        ("[axes]", "[axes"),
        ("[axes]", "[axles]"),
        ("preset = \"tiny\"", ""),
        ("preset = \"tiny\"", "preset = \"tiny\"\npath = \"x\""),
        ("preset = \"tiny\"", "preset = \"tiny\"\nhead = \"f99\""),
        ("threads = [1, \"all\"]", "threads = [1, \"some\"]"),
        ("threads = [1, \"all\"]", "threads = []"),
        ("context = [1024, 2_048]", "context = [-1]"),
        ("context = [1024, 2_048]", "context = 1.5"),
        ("reps = 3", "reps = 0"),
        ("reps = 3", "reps = 3\nquality_steps = 0"),
        ("reps = 3", "reps = 3\nseed = 2\n[workload.seed]"),
        ("reps = 3", "reps = 99999999999999999999"),
        ("cell_timeout = \"2m\"", "cell_timeout = 3"),
        ("cosine_min = 0.99", "cosine_min = \"high\""),
        ("cosine_min = 0.99", ""),
        ("methods = [\"window\"]", "methods = [\"dens\"]"),
        ("on_fail = \"stop\"", "on_fail = \"halt\""),
        ("[[method]]\nname = \"window\"", "[[method]]\nname = \"lsh\""),
        ("[[method]]\nname = \"window\"", "[method]\nname = \"window\""),
        ("context = [2048]\nmethod = [\"dense\"]\n", ""),
    ] {
        let text = message(from, to);
        assert!(text.contains("experiments/x.toml:"), "{to}: {text}");
    }
}

#[test]
fn any_truncation_of_a_file_is_handled() {
    for end in (0..GOOD.len()).step_by(3) {
        let _ = check(&GOOD[..end]);
    }
}

#[test]
fn groups_are_folders() {
    for (path, group) in [
        ("/a/experiments/x.toml", "main"),
        ("/a/experiments/context/x.toml", "context"),
        ("/a/experiments/a/b/x.toml", "a-b"),
        ("/tmp/x.toml", "main"),
    ] {
        assert_eq!(group_of(Path::new(path)), group, "{path}");
    }
}

/// A directory with the good file's experiment on a text, and the text beside it.
fn with_text(model: &str, workload: &str, verify: &str) -> (tempfile::TempDir, Result<Experiment>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), "Once upon a time.").unwrap();
    std::fs::write(dir.path().join("bad.txt"), b"ab\xff").unwrap();
    std::fs::write(dir.path().join("empty.txt"), "").unwrap();
    let text = GOOD
        .replace("preset = \"tiny\"", model)
        .replace("name = \"mix\"", workload)
        .replace("cosine_min = 0.99", verify);
    let path = dir.path().join("x.toml");
    std::fs::write(&path, text).unwrap();
    let loaded = load(&path, &mock::capabilities());
    (dir, loaded)
}

const MODEL: &str = "path = \"model\"";
const TEXT: &str = "name = \"text\"\nfile = \"a.txt\"";
const KL: &str = "kl_nats_max = 0.1\ntop1_min = 0.9";

#[test]
fn a_text_is_named_by_its_hash_and_found_from_the_file() {
    let sha = "A".repeat(64);
    let model = format!("{MODEL}\nsha256 = \"{sha}\"\ni2s = \"arm\"\nactivation = \"silu\"");
    let (dir, e) = with_text(&model, &format!("{TEXT}\nprefill_limit = 4096"), KL);
    let e = e.unwrap();
    let text = e.text.unwrap();
    assert_eq!(text.file.sha256, hex(&Sha256::digest("Once upon a time.")));
    assert_eq!(e.workload, format!("text:sha256={}", &text.file.sha256[..12]));
    assert_eq!((text.file.path.as_str(), text.prefill_limit), ("a.txt", 4096));
    assert_eq!((e.model.path.as_str(), e.model.sha256), ("model", sha.to_lowercase()));
    assert_eq!((e.model.i2s.as_str(), e.model.activation.as_str()), ("arm", "silu"));
    assert_eq!(e.dir, dir.path());
    assert_eq!(resolve(&e.dir, "a.txt"), dir.path().join("a.txt").to_str().unwrap());
    assert_eq!((resolve(&e.dir, "/b"), resolve(&e.dir, "")), ("/b".to_owned(), String::new()));
    let verify = e.verify.unwrap();
    assert_eq!((verify.kl_nats_max, verify.top1_min, verify.rel_l2_max), (Some(0.1), Some(0.9), None));
    let (_dir, e) = with_text(MODEL, TEXT, KL);
    assert_eq!(e.unwrap().text.unwrap().prefill_limit, 8192);
}

#[test]
fn what_a_text_needs_is_asked_for_with_its_place() {
    let other = "cosine_min = 0.99";
    for (model, workload, verify, want) in [
        ("preset = \"tiny\"", TEXT, KL, "x.toml:11 (workload.name)\n help: [model] path"),
        (MODEL, "name = \"text\"", KL, "file is missing\n   at: "),
        (
            MODEL,
            "name = \"text\"\nfile = \"b.txt\"",
            KL,
            "x.toml:12 (workload.file)\n help: a path is relative to",
        ),
        (MODEL, "name = \"text\"\nfile = \"\"", KL, "file is empty"),
        (MODEL, "name = \"text\"\nfile = \".\"", KL, "is not a file"),
        (MODEL, "name = \"text\"\nfile = \"bad.txt\"", KL, "not UTF-8 text: wrong at byte 2"),
        (MODEL, "name = \"text\"\nfile = \"empty.txt\"", KL, "empty.txt is empty"),
        (
            MODEL,
            &format!("{TEXT}\nprefil_limit = 1"),
            KL,
            "x.toml:13 (workload.prefil_limit)\n help: did you mean \"prefill_limit\"?",
        ),
        (MODEL, &format!("{TEXT}\nprefill_limit = 0"), KL, "prefill_limit must be a whole number from 1"),
        (MODEL, "name = \"mix\"\nfile = \"a.txt\"", other, "reads no text, so it has no file"),
        (MODEL, "name = \"mix\"\nprefill_limit = 9", other, "reads no text, so it has no prefill_limit"),
        (MODEL, TEXT, other, "cosine_min limits what this workload does not measure"),
        (MODEL, TEXT, "", "give kl_nats_max or top1_min"),
        (MODEL, "name = \"mix\"", KL, "kl_nats_max limits what this workload does not measure"),
        (&format!("{MODEL}\nsha256 = \"abc\""), TEXT, KL, "\"abc\" is not a SHA-256\n   at: "),
        (
            &format!("{MODEL}\nsha256 = \"{}\"", "g".repeat(64)),
            TEXT,
            KL,
            "x.toml:9 (model.sha256)\n help: 64 hexadecimal",
        ),
        (&format!("{MODEL}\ni2s = \"x68\""), TEXT, KL, "x.toml:9 (model.i2s)\n help: did you mean \"x86\"?"),
        (&format!("{MODEL}\nactivation = \"gelu\""), TEXT, KL, "\"gelu\" is not a value of activation"),
        ("preset = \"tiny\"\ni2s = \"x86\"", "name = \"mix\"", other, "i2s speaks of a checkpoint"),
    ] {
        let error = with_text(model, workload, verify).1.expect_err(want);
        assert_eq!(error.exit(), crate::Exit::Usage);
        assert!(error.to_string().contains(want), "{want}\n--- got\n{error}");
    }
}

const TRACE: &str = "name = \"file:a.txt\"";

#[test]
fn a_trace_is_named_by_its_hash_and_found_from_the_file() {
    let other = "cosine_min = 0.99";
    let (dir, e) = with_text("preset = \"tiny\"", TRACE, other);
    let e = e.unwrap();
    let trace = e.trace.clone().unwrap();
    assert_eq!(trace.sha256, hex(&Sha256::digest("Once upon a time.")));
    assert_eq!(e.workload, format!("file:sha256={}", &trace.sha256[..12]));
    assert_eq!((trace.path.as_str(), e.text.is_none()), ("a.txt", true));
    // What decides a cell is the bytes: all of their hash, and not where they lie.
    let id = |e: &Experiment| expand(e, 1).unwrap()[0].id.clone();
    std::fs::create_dir(dir.path().join("b")).unwrap();
    std::fs::rename(dir.path().join("a.txt"), dir.path().join("b/c: d.bin")).unwrap();
    let file = dir.path().join("x.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("file:a.txt", "file: b/c: d.bin")).unwrap();
    let moved = load(&file, &mock::capabilities()).unwrap();
    assert_eq!((id(&moved), moved.trace.as_ref().unwrap().path.as_str()), (id(&e), "b/c: d.bin"));
    std::fs::write(dir.path().join("b/c: d.bin"), vec![7; 3 << 20]).unwrap();
    let changed = load(&file, &mock::capabilities()).unwrap();
    assert_eq!(changed.trace.as_ref().unwrap().sha256, hex(&Sha256::digest(vec![7; 3 << 20])));
    let mut longer = e.clone();
    longer.trace = Some(TraceFile { sha256: format!("{}0", &trace.sha256[..63]), ..trace });
    assert!(id(&changed) != id(&e) && id(&longer) != id(&e));
}

#[test]
fn what_a_trace_needs_is_asked_for_with_its_place() {
    let (tiny, other) = ("preset = \"tiny\"", "cosine_min = 0.99");
    for (workload, verify, want) in [
        ("name = \"file\"", other, "the workload \"file\" needs a file\n   at: "),
        ("name = \"file: \"", other, "x.toml:11 (workload.name)\n help: name = \"file:PATH\""),
        ("name = \"file:no.bin\"", other, "x.toml:11 (workload.name)\n help: a path is relative to"),
        ("name = \"file:.\"", other, "is not a file"),
        ("name = \"file:empty.txt\"", other, "empty.txt is empty"),
        (
            &format!("{TRACE}\nfile = \"a.txt\""),
            other,
            "the workload \"file\" reads no text, so it has no file",
        ),
        (&format!("{TRACE}\nprefill_limit = 9"), other, "so it has no prefill_limit"),
        (TRACE, KL, "kl_nats_max limits what this workload does not measure"),
        ("name = \"fil:a.txt\"", other, "in workload \"fil:a.txt\" is not key=value"),
    ] {
        let error = with_text(tiny, workload, verify).1.expect_err(want);
        assert!(error.to_string().contains(want), "{want}\n--- got\n{error}");
    }
}

#[test]
fn thread_counts_follow_the_machine() {
    let of = |text: &str| check(&GOOD.replacen("[1, \"all\"]", text, 1)).map(|e| e.threads);
    let threads = of("[\"1..all\", \"all\", \"all+2\", 7]").unwrap();
    assert_eq!(threads, [Threads::Doubling, Threads::All(0), Threads::All(2), Threads::Count(7)]);
    let resolved = |t: Threads| [1, 2, 6, 8].map(|cpus| t.resolve(cpus));
    assert_eq!(resolved(Threads::Doubling), [vec![1], vec![1, 2], vec![1, 2, 4, 6], vec![1, 2, 4, 8]]);
    assert_eq!(resolved(Threads::All(2)), [vec![3], vec![4], vec![8], vec![10]]);
    for wrong in ["[\"all+\"]", "[\"all+5000\"]", "[\"most\"]", "[0]"] {
        assert!(of(wrong).unwrap_err().to_string().contains("\"1..all\""), "{wrong}");
    }
}

#[test]
fn one_matrix_has_no_axes_of_a_cache() {
    let file = "schema = 1\n[experiment]\nname = \"m\"\nquestion = \"?\"\n[model]\npreset = \"matrix:8x8\"\n[workload]\nname = \"matrix\"\n[axes]\nthreads = 1\nbatch = [1, 64]\n";
    let e = check(file).unwrap();
    assert_eq!((e.contexts, e.batches, e.kv_dtypes), (vec![0], vec![1, 64], vec!["-".to_owned()]));
    assert_eq!((e.methods.len(), e.methods[0].text().as_str()), (1, "-"));
    let text = check(&format!("{file}kv_dtype = \"bf16\"\n")).unwrap_err().to_string();
    assert!(text.contains("kv_dtype means nothing where one matrix is timed"), "{text}");
    for (wrong, says) in [("batch = 0", "from 1 to 65536"), ("batch = []", "the axis batch is empty")] {
        let text = check(&file.replace("batch = [1, 64]", wrong)).unwrap_err().to_string();
        assert!(text.contains(says), "{text}");
    }
}
