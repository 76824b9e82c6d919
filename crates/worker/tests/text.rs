//! A job that decodes a real text with the tiny checkpoint: what its quality means, and what is refused.

use std::path::PathBuf;
use std::sync::Arc;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::text::{TextModel, TextOptions};
use longbit::{Checkpoint, HeadFormat, OpenOptions, Session, SessionOptions};
use longbit_protocol::{
    CellJob, Event, Fill, Job, Limits, Measure, ModelSpec, PROTOCOL, Quality, Ready, Request, Sample, Status,
    TextFile,
};
use longbit_sys::Team;
use sha2::{Digest, Sha256};

const CONTEXT: usize = 300;

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)
}

fn path(p: &std::path::Path) -> String {
    p.to_str().unwrap().to_owned()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn text_file(file: &std::path::Path) -> TextFile {
    TextFile { path: path(file), sha256: hex(&std::fs::read(file).unwrap()) }
}

/// Two threads where there are two CPUs.
fn several() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(2))
}

/// One cell for each `(method, threads)`.
fn job(kv: &str, cells: &[(&str, usize)]) -> Job {
    let cells = cells.iter().enumerate().map(|(i, (method, threads))| CellJob {
        id: format!("cell{i}"),
        threads: *threads,
        method: method.to_string(),
        batch: 1,
        first_rep: 0,
        quality_done: false,
    });
    let text = text_file(&fixture("text/lighthouse.txt"));
    Job {
        protocol: PROTOCOL,
        model: ModelSpec {
            path: path(&fixture("hf_bitnet/offline")),
            head: "bf16".into(),
            ..ModelSpec::default()
        },
        context: CONTEXT,
        kv_dtype: kv.into(),
        workload: format!("text:sha256={}", &text.sha256[..12]),
        text: Some(text),
        trace: None,
        seed: 3,
        cells: cells.collect(),
        measure: Measure {
            reps: 2,
            gen_tokens: 5,
            warmup_tokens: 2,
            quality_steps: 24,
            seeds: 1,
            pin: false,
            probe_bytes: 1 << 20,
        },
        limits: Limits::default(),
    }
}

fn run(job: Job) -> (u8, Vec<Event>) {
    let request = serde_json::to_string(&Request::Measure(Box::new(job))).unwrap();
    let mut out = Vec::new();
    let code = longbit_worker::serve(request.as_bytes(), &mut out);
    let text = String::from_utf8(out).unwrap();
    (code, text.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
}

/// Quality by cell, without the name of the cell.
fn qualities(events: &[Event]) -> Vec<Quality> {
    let of = |e: &Event| match e {
        Event::Quality(q) => Some(Quality { cell: String::new(), ..(**q).clone() }),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

fn ready(events: &[Event]) -> &Ready {
    for event in events {
        if let Event::Ready(ready) = event {
            return ready;
        }
    }
    panic!("{events:?}");
}

fn samples(events: &[Event]) -> Vec<&Sample> {
    events.iter().filter_map(|e| if let Event::Sample(s) = e { Some(&**s) } else { None }).collect()
}

fn fatal(job: Job) -> (Status, String) {
    let (code, events) = run(job);
    assert_eq!(code, 1);
    match events.last() {
        Some(Event::Fatal { status, error }) => (*status, error.clone()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_reference_loses_nothing_and_a_window_loses_more_than_a_format() {
    const CELLS: [(&str, usize); 2] = [("dense", 1), ("window:sinks=2,window=16", 1)];
    let (code, bf16) = run(job("bf16", &CELLS));
    assert_eq!((code, bf16.last()), (0, Some(&Event::End)), "{:?}", bf16.last());
    let [dense, window] = &qualities(&bf16)[..] else { panic!("{bf16:?}") };
    assert_eq!((dense.kl_nats, dense.kl_nats_max), (Some(0.0), Some(0.0)));
    assert_eq!((dense.logit_cosine_mean, dense.logit_cosine_min), (Some(1.0), Some(1.0)));
    assert_eq!((dense.top1_agreement, dense.nll_nats), (Some(1.0), dense.nll_reference_nats));
    assert_eq!((dense.steps, dense.outputs), (24, 24));
    // A model with random weights knows nothing of the text: about the entropy of 512 equal tokens, or worse.
    assert!(dense.nll_nats.unwrap() > 4.0, "{dense:?}");
    // Attention outputs are not compared: nothing supplies their exact inputs.
    assert!(dense.rel_l2_p50.is_none() && dense.cosine_mean.is_none() && dense.rel_l2_by_head.is_empty());
    let (_, f32) = run(job("f32", &CELLS[..1]));
    let [exact] = &qualities(&f32)[..] else { panic!("{f32:?}") };
    assert_eq!(exact.nll_reference_nats, dense.nll_reference_nats, "one reference for all KV dtypes");
    let (format, method) = (exact.kl_nats.unwrap(), window.kl_nats.unwrap());
    assert!(format > 0.0 && format < 0.01, "{exact:?}");
    assert!(method > 3.0 * format && window.kl_nats_max.unwrap() > method, "{window:?} against {exact:?}");
    assert!(
        window.top1_agreement < dense.top1_agreement && window.logit_cosine_min < Some(1.0),
        "{window:?}"
    );

    let r = ready(&bf16);
    assert_eq!((r.fill, r.kv_bytes_stored), (Fill::Prefill, 300 * 4 * 2 * 2 * 64 * 2));
    // The context, 24 compared steps and the token after the last; of the text no more is tokenised than that.
    assert_eq!(r.workload_stats["text.tokens"], 325.0);
    assert!(r.workload_stats["text.bytes"] > 4000.0);
    // Rows that the engine counted while it decoded the text: 4 layers x 2 KV heads.
    let rows: Vec<u64> =
        samples(&bf16).iter().filter(|s| s.cell == "cell1").map(|s| s.traffic.rows).collect();
    assert_eq!(rows, [5 * 8 * 18; 2]);
    // The reference of another KV dtype is filled first, with progress of its own.
    let phases = |events: &[Event]| -> Vec<(String, u64, u64)> {
        let of = |e: &Event| match e {
            Event::Phase { what, done, total } => Some((what.clone(), *done, *total)),
            _ => None,
        };
        events.iter().filter_map(of).collect()
    };
    let of = "filling the cache of the reference".to_owned();
    assert!(phases(&f32).contains(&(of.clone(), 256, 300)) && phases(&f32).contains(&(of, 300, 300)));
    assert!(!phases(&bf16).iter().any(|p| p.0.contains("cache of the reference")));
    assert!(phases(&bf16).contains(&("filling the cache".into(), 128, 300)));
}

#[test]
fn threads_and_repetitions_change_no_quality() {
    let window = "window:sinks=2,window=16";
    let all = qualities(&run(job("f32", &[(window, 1), (window, several())])).1);
    let mut once = job("f32", &[(window, several())]);
    once.measure.reps = 0;
    let again = qualities(&run(once).1);
    assert_eq!((all.len(), again.len()), (2, 1));
    assert!(all.iter().chain(&again).all(|q| *q == all[0]), "{all:?}\n{again:?}");
}

/// A pattern fills a cache of its own; the reference and the other cells stay dense.
#[test]
fn patterns_of_the_prompt_run_it_once_more() {
    let pattern = "dense:prefill=window,prefill_sinks=2,prefill_window=16";
    let cells = [
        "dense",
        pattern,
        "dense:prefill=window,prefill_window=300",
        "window:window=16,prefill=blocks,prefill_blocks=1",
    ];
    let (code, events) = run(job("bf16", &cells.map(|method| (method, 1))));
    assert_eq!(code, 0, "{:?}", events.last());
    let [dense, few, all, both] = &qualities(&events)[..] else { panic!("{events:?}") };
    assert_eq!((dense.kl_nats, all.kl_nats), (Some(0.0), Some(0.0)));
    assert!(few.kl_nats > Some(0.0) && both.kl_nats > Some(0.0));
    assert_eq!(few.nll_reference_nats, dense.nll_nats);
    // Steps of the pattern's cell are dense.
    assert_eq!((few.density_read, dense.density_read), (Some(1.0), Some(1.0)));
    assert!(few.prefill.is_none());
    let alone = run(job("bf16", &[(pattern, several())])).1;
    assert_eq!(qualities(&alone)[0].kl_nats, few.kl_nats);
    assert_eq!(ready(&alone).fill_sha256, ready(&events).fill_sha256);
}

#[test]
fn prefill_fills_what_decoding_one_by_one_fills() {
    let checkpoint = Checkpoint::open(&fixture("hf_bitnet/offline"), &OpenOptions::default()).unwrap();
    let tokenizer = TextModel::open(checkpoint.path(), &TextOptions::default()).unwrap().tokenizer;
    let text = std::fs::read_to_string(fixture("text/lighthouse.txt")).unwrap();
    let tokens = tokenizer.encode(&text, true).unwrap();
    let team = Arc::new(Team::new(1, false).unwrap());
    let model = Arc::new(checkpoint.load(HeadFormat::Bf16, &team).unwrap());
    for kv in ["bf16", "f32"] {
        let options =
            SessionOptions { capacity: CONTEXT, kv: kv_dtype(kv).unwrap(), method: method("dense").unwrap() };
        let mut session = Session::new(model.clone(), team.clone(), options).unwrap();
        for &token in &tokens[..CONTEXT] {
            session.decode(token).unwrap();
        }
        let mut all = Sha256::new();
        for (layer, head) in (0..4).flat_map(|layer| (0..2).map(move |head| (layer, head))) {
            let cached = session.cache().head(layer, head);
            let mut one = Sha256::new();
            for run in cached.runs(0..cached.len()) {
                cached.key_parts(&run).chain(cached.value_parts(&run)).for_each(|part| one.update(part));
            }
            all.update(one.finalize());
        }
        let one_by_one: String = all.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let mut filled = job(kv, &[("dense", several())]);
        (filled.measure.reps, filled.measure.quality_steps) = (1, 0);
        assert_eq!(ready(&run(filled).1).fill_sha256, one_by_one, "{kv}");
    }
}

#[test]
fn quality_with_a_two_stage_head_is_that_of_the_bf16_head() {
    let measured = ["bf16", "two-stage"].map(|head| {
        let mut job = job("bf16", &[("dense", 1), ("window:sinks=2,window=30", 1)]);
        job.model.head = head.into();
        let (code, events) = run(job);
        assert_eq!(code, 0, "{head}: {:?}", events.last());
        qualities(&events)
    });
    assert_eq!(measured[0].len(), 2);
    assert_eq!(measured[0], measured[1]);
}

#[test]
fn the_checkpoint_and_the_text_must_be_the_planned_ones() {
    let checkpoint = Checkpoint::open(&fixture("hf_bitnet/offline"), &OpenOptions::default()).unwrap();
    let sha256 = checkpoint.sha256().unwrap();
    let mut right = job("bf16", &[("dense", 1)]);
    right.model.sha256.clone_from(&sha256);
    let (code, events) = run(right.clone());
    assert_eq!((code, &ready(&events).model_sha256), (0, &sha256));
    let mut wrong = right.clone();
    wrong.model.sha256 = "0".repeat(64);
    let (status, error) = fatal(wrong);
    assert_eq!(status, Status::Error);
    assert!(error.contains(&sha256) && error.contains(&"0".repeat(64)), "{error}");

    let mut changed = right.clone();
    let planned = changed.text.as_mut().map(|t| std::mem::replace(&mut t.sha256, "1".repeat(64))).unwrap();
    let error = fatal(changed).1;
    assert!(
        error.contains(&planned) && error.contains(&"1".repeat(64)) && error.contains("--fresh"),
        "{error}"
    );

    let mut gone = right.clone();
    gone.text = Some(TextFile { path: "no/such.txt".into(), sha256: planned });
    assert!(fatal(gone).1.contains("cannot read no/such.txt"));
    let error = fatal(Job { text: None, ..right.clone() }).1;
    assert!(error.contains("workload.file"), "{error}");
    let mut preset = right.clone();
    preset.model = ModelSpec { preset: "tiny".into(), head: "bf16".into(), ..ModelSpec::default() };
    let error = fatal(preset).1;
    assert!(error.contains("model.path"), "{error}");
    let mut order = right;
    order.model.i2s = "mips".into();
    let error = fatal(order).1;
    assert!(error.contains("`mips`") && error.contains("x86, arm"), "{error}");
}

#[test]
fn a_text_that_is_too_short_is_refused_with_both_numbers() {
    let dir = std::env::temp_dir().join(format!("longbit-text-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("short.txt");
    std::fs::write(&file, "Too short.").unwrap();
    let mut short = job("bf16", &[("dense", 1)]);
    short.text = Some(text_file(&file));
    let (status, error) = fatal(short.clone());
    assert_eq!(status, Status::Error);
    // 300 of context, 24 compared steps and the token after the last.
    assert!(error.contains("needs 325") && error.contains("short.txt has "), "{error}");
    // One more token makes the difference: contexts are counted to the token.
    let tokens: usize = error.split("has ").nth(1).and_then(|t| t.split(' ').next()?.parse().ok()).unwrap();
    short.measure = Measure { quality_steps: 1, warmup_tokens: 0, gen_tokens: 2, ..short.measure };
    short.context = tokens - 2;
    assert_eq!(run(short.clone()).0, 0);
    short.context = tokens - 1;
    assert!(fatal(short).1.contains(&format!("needs {}", tokens + 1)));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn resuming_a_text_measures_only_what_is_missing() {
    let cells = [("dense", 1), ("window:sinks=2,window=16", 1)];
    let whole = qualities(&run(job("f32", &cells)).1);
    let mut partly = job("f32", &cells);
    partly.cells[0].first_rep = 1;
    partly.cells[0].quality_done = true;
    let (_, events) = run(partly.clone());
    let mut got: Vec<_> = samples(&events).iter().map(|s| (s.cell.clone(), s.rep)).collect();
    got.sort();
    let cell = |i: usize, rep| (format!("cell{i}"), rep);
    assert_eq!(got, [cell(0, 1), cell(1, 0), cell(1, 1)]);
    assert_eq!(qualities(&events), whole[1..]);
    // With no quality left to measure, no reference is made.
    partly.cells[1].quality_done = true;
    let (_, events) = run(partly);
    assert!(!events.iter().any(|e| matches!(e, Event::Phase { what, .. } if what.contains("reference"))));
}

/// The tiny checkpoint in `dir`, its last norm multiplied beyond what logits can be.
fn overflowing(dir: &std::path::Path) {
    std::fs::create_dir_all(dir).unwrap();
    for entry in std::fs::read_dir(fixture("hf_bitnet/offline")).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, dir.join(from.file_name().unwrap())).unwrap();
    }
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let norm = &tensors["model.norm.weight"];
    assert_eq!(norm["dtype"], "BF16");
    let at = |i: usize| 8 + header + norm["data_offsets"][i].as_u64().unwrap() as usize;
    let range = at(0)..at(1);
    // The largest bf16.
    bytes[range].as_chunks_mut::<2>().0.iter_mut().for_each(|b| *b = [0x7f, 0x7f]);
    std::fs::write(&file, bytes).unwrap();
}

#[test]
fn a_reference_that_is_not_finite_ends_the_job() {
    let dir = std::env::temp_dir().join(format!("longbit-overflow-{}", std::process::id()));
    overflowing(&dir);
    let mut broken = job("bf16", &[("dense", 1)]);
    broken.model.path = path(&dir);
    let (status, error) = fatal(broken);
    assert_eq!(status, Status::Error);
    assert!(error.contains("against the reference") && error.contains("not finite"), "{error}");
    std::fs::remove_dir_all(&dir).unwrap();
}
