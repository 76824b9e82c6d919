//! Messages are compared whole: they are what a user works with.

use super::*;
use crate::engine::mock;

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
    assert_eq!(e.threads, [Threads::Count(1), Threads::All]);
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
            "context = [0, 2_048]",
            "context must be a whole number of tokens from 1 to 16777216, not 0\n   at: experiments/x.toml:14 (axes.context)",
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
