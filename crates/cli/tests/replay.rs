//! Recorded traces in the cells of the lab: what was captured is attended again, and what is wrong with a file is said.

#![forbid(unsafe_code)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::text::{TextModel, TextOptions};
use longbit::{Checkpoint, HeadFormat, OpenOptions, Session, SessionOptions, Supplied, Trace};
use longbit_sys::Team;

/// The trace of the fixtures: tokens, and the last of them whose queries it has.
const TOKENS: usize = 256;
const STEPS: usize = 96;

fn fixture() -> PathBuf {
    root().join("fixtures/traces/lighthouse.safetensors")
}

/// Captures the text of the fixtures with the tiny checkpoint.
fn capture(dir: &Path, name: &str, flags: &[&str]) -> Trace {
    let (model, text, out) = (checkpoint(), root().join("fixtures/text/lighthouse.txt"), dir.join(name));
    let fixed = ["capture", "--model", path(&model), "--prompt-file", path(&text), "--out", path(&out)];
    run(dir, &[&fixed, flags].concat()).expect(0);
    Trace::open(&out).expect("a trace")
}

/// The tiny checkpoint at a length, with dense attention over an f32 cache, and the tokens of the text.
struct Own {
    session: Session,
    tokens: Vec<u32>,
}

impl Own {
    fn new(tokens: usize) -> Self {
        let team = Arc::new(Team::new(1, false).expect("a team"));
        let checkpoint = Checkpoint::open(&checkpoint(), &OpenOptions::default()).expect("a checkpoint");
        let text = get(&root().join("fixtures/text/lighthouse.txt"));
        let tokenizer =
            TextModel::open(checkpoint.path(), &TextOptions::default()).expect("a tokenizer").tokenizer;
        let options = SessionOptions {
            capacity: tokens,
            kv: kv_dtype("f32").expect("known"),
            method: method("dense").expect("known"),
        };
        let model = Arc::new(checkpoint.load(HeadFormat::Bf16, &team).expect("a model"));
        let session = Session::new(model, team, options).expect("a session");
        Own { session, tokens: tokenizer.encode_up_to(&text, true, tokens).expect("tokens") }
    }

    /// Fills the cache with the first tokens of a trace.
    fn fill(&mut self, trace: &Trace, context: usize) {
        let shape = trace.shape();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (layer, head) in (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h))) {
            trace.keys(layer, head, 0..context, &mut keys).expect("keys");
            trace.values(layer, head, 0..context, &mut values).expect("values");
            self.session.cache().head_mut(layer, head).append(&keys, &values).expect("room");
        }
        self.session.cache_mut().set_len(context).expect("room");
        self.session.refresh();
    }
}

fn step(trace: &Trace, step: usize) -> Supplied {
    let (shape, mut all, mut some) = (trace.shape(), Supplied::default(), Vec::new());
    let token = shape.context() + step..shape.context() + step + 1;
    for (layer, head) in (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h))) {
        trace.queries(layer, head, step, &mut some).expect("queries");
        all.queries.extend_from_slice(&some);
        trace.keys(layer, head, token.clone(), &mut some).expect("keys");
        all.keys.extend_from_slice(&some);
        trace.values(layer, head, token.clone(), &mut some).expect("values");
        all.values.extend_from_slice(&some);
    }
    all
}

/// A checkpoint that is given its own recorded queries, keys and values says bit for bit what it said while they were
/// recorded, so its attention is the same, in every layer.
#[test]
fn what_was_captured_is_attended_again_bit_for_bit() {
    const LENGTH: usize = 60;
    const LAST: usize = 5;
    let dir = tempfile::tempdir().expect("a folder");
    let exact = capture(dir.path(), "exact.safetensors", &["--tokens", "60", "--steps", "5"]);
    let flags = ["--tokens", "60", "--steps", "5", "--format", "bf16"];
    let rounded = capture(dir.path(), "rounded.safetensors", &flags);
    let context = LENGTH - LAST;
    assert_eq!(exact.shape().context(), context);

    let mut own = Own::new(LENGTH);
    let tokens = own.tokens.clone();
    own.session.prefill(&tokens[..context]).expect("room");
    let mut said = Vec::new();
    for token in &tokens[context..] {
        said.push(own.session.decode(*token).expect("room").to_vec());
    }
    let (mut again, mut narrow) = (Own::new(LENGTH), Own::new(LENGTH));
    again.fill(&exact, context);
    narrow.fill(&rounded, context);
    for (i, said) in said.iter().enumerate() {
        let replayed = again.session.decode_supplied(tokens[context + i], &step(&exact, i), true);
        assert!(replayed.expect("room") == said, "step {i} says something else");
        // bfloat16 keeps eight bits of a key, a value and a query; which token it is makes no difference to attention.
        narrow.session.decode_supplied(7, &step(&rounded, i), true).expect("room");
        let (full, half) = (again.session.attention_output(), narrow.session.attention_output());
        let square = |of: &mut dyn Iterator<Item = f32>| of.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
        let difference = square(&mut full.iter().zip(&half).map(|(a, b)| a - b));
        assert!(difference > 0.0 && difference < 1e-4 * square(&mut full.iter().copied()), "step {i}");
    }
}

/// The trace of the fixtures is what the binary records, on every machine.
#[test]
fn the_fixture_is_what_capture_writes() {
    let dir = tempfile::tempdir().expect("a folder");
    let (tokens, steps) = (TOKENS.to_string(), STEPS.to_string());
    capture(dir.path(), "t.safetensors", &["--tokens", &tokens, "--steps", &steps, "--format", "bf16"]);
    let written = std::fs::read(dir.path().join("t.safetensors")).expect("a file");
    assert!(written == std::fs::read(fixture()).expect("the fixture"), "capture writes another file");
}

/// By KV dtype and method with its parameters.
fn by_cell(rows: Vec<Row>) -> BTreeMap<(String, String), Row> {
    rows.into_iter().map(|r| ((r["kv_dtype"].clone(), method_of(&r)), r)).collect()
}

fn method_of(row: &Row) -> String {
    let params: BTreeMap<String, String> = serde_json::from_str(&row["method_params"]).expect("JSON");
    let size = ["window", "k", "budget", "capacity"].iter().find_map(|key| params.get(*key));
    let size = if row["method"] == "snapkv" { params.get("capacity") } else { size };
    format!("{}{}", row["method"], size.map_or(String::new(), |n| format!(" {n}")))
}

/// `experiments/trace.toml`, as it stands, through the real engine.
#[test]
fn the_example_measures_every_method_on_a_recorded_trace() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = root().join("experiments/trace.toml");
    let ran = measure(dir.path(), path(&file), "out", &["--reps", "1"]).expect(0);
    assert!(!ran.err.contains("error"), "{}", ran.err);
    let found = by_cell(cells(&dir.path().join("out")));
    assert_eq!(found.len(), 4 * 7);
    let figure = |kv: &str, method: &str, column: &str| -> f64 {
        let row = &found[&(kv.to_owned(), method.to_owned())];
        assert_eq!((row["status"].as_str(), row["fill"].as_str()), ("ok", "trace"), "{row:?}");
        row[column].parse().unwrap_or_else(|e| panic!("{kv} {method} {column}: {e}: {row:?}"))
    };
    let error = |kv: &str, method: &str| figure(kv, method, "rel_l2_p50");
    assert!(figure("f32", "dense", "rel_l2_max") < 1e-5);
    // The trace is in bfloat16, so that a bf16 cache holds it as it is.
    assert!(error("bf16", "dense") < 1e-4);
    assert!(
        error("bf16", "dense") < error("int8", "dense") && error("int8", "dense") < error("int4", "dense")
    );
    assert!(figure("f32", "dense", "captured_mass_p5") > 0.9999);
    for (fewer, more) in [("window 32", "window 92"), ("topk 36", "topk 96")] {
        assert!(error("f32", fewer) > error("f32", more), "{fewer}");
        assert!(figure("f32", fewer, "captured_mass_p50") < figure("f32", more, "captured_mass_p50"));
    }
    // Of as many tokens those with the largest weights hold the most.
    for other in ["window 92", "quest 96", "snapkv 96"] {
        let (best, mass) = (figure("f32", "topk 96", "captured_mass_p50"), "captured_mass_p50");
        assert!(best > figure("f32", other, mass), "{other}");
        assert!(figure("f32", other, "rel_l2_p50") > 0.01, "{other} reads not all");
    }
    assert!(figure("bf16", "dense", "decode_tok_s") > 0.0);
    let plan: serde_json::Value =
        serde_json::from_str(&get(&dir.path().join("out/plan.json"))).expect("JSON");
    let cell = &plan["cells"][0];
    assert_eq!(cell["trace"]["path"], "../fixtures/traces/lighthouse.safetensors");
    let name = format!("file:sha256={}", &cell["trace"]["sha256"].as_str().expect("text")[..12]);
    assert_eq!(cell["workload"], name);
    let log = get(&dir.path().join("out/samples.jsonl"));
    assert!(log.contains("\"trace.density_95\":") && log.contains("\"trace.sink_mass\":"), "{log}");
}

/// A small experiment on `trace.safetensors` beside it.
fn experiment(contexts: &[usize], methods: &[&str], preset: &str) -> String {
    Experiment { kv_dtypes: vec!["f32"], contexts: contexts.to_vec(), reps: 1, ..Experiment::default() }
        .toml()
        .replace("name = \"mix\"", "name = \"file:trace.safetensors\"")
        .replace("preset = \"tiny\"", &format!("preset = {preset:?}"))
        .replace("method = [\"dense\", \"window:sinks=4,window=64\"]", &format!("method = {methods:?}"))
}

/// What `scripts/write-trace.py` wrote replays, at contexts that it serves; others are rows with the reason.
#[test]
fn a_trace_of_another_framework_replays_at_its_contexts() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::copy(root().join("fixtures/traces/ramp.safetensors"), dir.path().join("trace.safetensors"))
        .expect("a copy");
    put(
        &dir.path().join("small.toml"),
        &experiment(&[20, 21, 22, 24], &["dense", "window:sinks=1,window=4"], "trace"),
    );
    measure(dir.path(), "small.toml", "out", &[]).expect(0);
    for row in cells(&dir.path().join("out")) {
        let context: usize = row["context_tokens"].parse().expect("a number");
        if (21..=22).contains(&context) {
            assert_eq!((row["status"].as_str(), row["fill"].as_str()), ("ok", "trace"), "{row:?}");
            let error: f64 = row["rel_l2_max"].parse().expect("a number");
            assert!((error < 1e-5) == (row["method"] == "dense"), "{row:?}");
        } else {
            assert_eq!(row["status"], "skipped");
            assert!(row["error"].contains("contexts that work: 21 to 23"), "{row:?}");
        }
    }
}

#[test]
fn a_checkpoint_of_the_same_shape_replays_and_another_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::copy(fixture(), dir.path().join("trace.safetensors")).expect("a copy");
    let text = experiment(&[192], &["dense"], "tiny");
    put(&dir.path().join("preset.toml"), &text);
    let model = format!("path = {:?}", checkpoint());
    put(&dir.path().join("path.toml"), &text.replace("preset = \"tiny\"", &model));
    put(&dir.path().join("large.toml"), &text.replace("\"tiny\"", "\"bitnet-2b-4t\""));
    put(
        &dir.path().join("none.toml"),
        &text.replace("\"tiny\"", "\"trace\"").replace("file:trace.safetensors", "mix"),
    );
    let mut outputs = Vec::new();
    for name in ["preset", "path"] {
        measure(dir.path(), &format!("{name}.toml"), name, &[]).expect(0);
        let row = cells(&dir.path().join(name)).remove(0);
        assert_eq!(row["status"], "ok", "{row:?}");
        outputs.push([row["rel_l2_p50"].clone(), row["rel_l2_max"].clone(), row["fill_sha256"].clone()]);
    }
    // Attention is that of the trace, whatever the weights around it.
    assert_eq!(outputs[0], outputs[1]);
    let says = [
        "no cell can be measured",
        "4 layers, the model 30",
        "2 KV heads, the model 5",
        "model.preset = \"trace\"",
    ];
    measure(dir.path(), "large.toml", "large", &[]).expect(2).says(&says);
    let says = ["the preset trace has the shape of a trace", "workload.name = \"file:PATH\""];
    measure(dir.path(), "none.toml", "none", &[]).expect(2).says(&says);
}

/// A damaged file costs its own cells and no others; one that changed is another plan.
#[test]
fn bad_files_cost_their_own_cells() {
    let dir = tempfile::tempdir().expect("a folder");
    let good = std::fs::read(fixture()).expect("the fixture");
    let header = u64::from_le_bytes(good[..8].try_into().expect("eight bytes")) as usize;
    let mut nan = good.clone();
    // The last number of a key of layer 0 and head 0: bf16.
    nan[8 + header + (101 * 64 - 1) * 2..][..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    std::fs::write(dir.path().join("nan.safetensors"), nan).expect("written");
    std::fs::write(dir.path().join("trace.safetensors"), &good).expect("written");
    let text = experiment(&[192], &["dense", "window:sinks=1,window=4"], "trace");
    put(&dir.path().join("good.toml"), &text);
    put(
        &dir.path().join("nan.toml"),
        &text.replace("file:trace", "file:nan").replace("\"small\"", "\"nan\""),
    );
    run(dir.path(), &["run", "nan.toml", "good.toml", "--out", "out", "--no-progress"]).expect(6);
    let rows = cells(&dir.path().join("out/main-nan"));
    assert!(rows.len() == 2 && rows.iter().all(|r| r["status"] == "error"), "{rows:?}");
    let error = &rows[0]["error"];
    assert!(error.contains("tensor `k` holds NaN at [0, 0, 100, 63]"), "{error}");
    let rows = cells(&dir.path().join("out/main-small"));
    assert!(rows.len() == 2 && rows.iter().all(|r| r["status"] == "ok"), "{rows:?}");

    // Cut off, or without steps: nothing is measured, and the reason is said.
    std::fs::write(dir.path().join("trace.safetensors"), &good[..good.len() / 2]).expect("written");
    measure(dir.path(), "good.toml", "cut", &[])
        .expect(2)
        .says(&["trace.safetensors is not a valid safetensors file"]);
    let said = String::from_utf8(good[8..8 + header].to_vec()).expect("JSON");
    let none = said.replace("[4,4,96,64]", "[4,4,0,64] ");
    assert_ne!(none, said);
    let stepless = [&good[..8], none.as_bytes(), &good[8 + header..]].concat();
    std::fs::write(dir.path().join("trace.safetensors"), stepless).expect("written");
    measure(dir.path(), "good.toml", "stepless", &[]).expect(2).says(&["trace.safetensors"]);

    // Another file in the place of the measured one is another plan.
    let mut other = good;
    *other.last_mut().expect("not empty") ^= 1;
    std::fs::write(dir.path().join("trace.safetensors"), other).expect("written");
    measure(dir.path(), "good.toml", "out/main-small", &[])
        .expect(2)
        .says(&["holds another run: its plan is"]);
    std::fs::remove_file(dir.path().join("trace.safetensors")).expect("it is there");
    measure(dir.path(), "good.toml", "x", &[]).expect(2).says(&[
        "cannot read",
        "good.toml:",
        "(workload.name)",
    ]);
}
