//! Jobs on recorded traces, of a shape that no preset has: what their quality means, and what is refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use longbit::{Trace, TraceFormat, TraceRows, TraceShape, write_trace};
use longbit_protocol::{
    CellJob, Estimate, EstimateRequest, Event, Fill, Job, Limits, Measure, ModelSpec, PROTOCOL, Quality,
    Ready, Request, Sample, Status, TraceFile,
};

const SHAPE: TraceShape =
    TraceShape { layers: 3, heads: 6, kv_heads: 2, head_dim: 32, tokens: 300, steps: 20 };
/// Twelve queries of the prompt, and eight decode steps.
const CONTEXT: usize = 292;

/// Keys of four directions, token by token; queries look for one of them at a step, and for the next at the next, and for
/// its later tokens a little more than for its earlier ones.
fn rows() -> TraceRows {
    let d = SHAPE.head_dim;
    let noise = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7 & 0xffff) as f32 / 65_536.0 - 0.5;
    let row = |seed: usize, loud: usize, by: f32| -> Vec<f32> {
        (0..d).map(|j| noise(seed * d + j) + if j == loud % d { by } else { 0.0 }).collect()
    };
    let kv = SHAPE.layers * SHAPE.kv_heads * SHAPE.tokens;
    TraceRows {
        shape: SHAPE,
        keys: (0..kv).flat_map(|i| row(i, i % 4, 4.0 + (i % SHAPE.tokens) as f32 / 600.0)).collect(),
        values: (0..kv).flat_map(|i| row(i + 1_000_003, i % 7, 1.0)).collect(),
        queries: (0..SHAPE.layers * SHAPE.heads * SHAPE.steps)
            .flat_map(|i| row(i + 2_000_003, i % 4, 6.0))
            .collect(),
    }
}

/// A folder of a test's own.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("trace").join(test);
        std::fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }

    fn write(&self, rows: &TraceRows) -> TraceFile {
        let path = self.0.join("t.safetensors");
        let metadata = HashMap::from([("rope_theta".to_string(), "500000".to_string())]);
        write_trace(&path, rows, TraceFormat::F32, metadata).unwrap();
        of(&path)
    }
}

fn of(path: &Path) -> TraceFile {
    TraceFile { path: path.to_str().unwrap().into(), sha256: Trace::open(path).unwrap().sha256() }
}

fn job(trace: TraceFile, kv: &str, methods: &[&str]) -> Job {
    let cells = methods.iter().enumerate().map(|(i, method)| CellJob {
        id: format!("cell{i}"),
        threads: 1,
        method: method.to_string(),
        batch: 1,
        first_rep: 0,
        quality_done: false,
    });
    Job {
        protocol: PROTOCOL,
        model: ModelSpec { preset: "trace".into(), head: "bf16".into(), seed: 1, ..ModelSpec::default() },
        context: CONTEXT,
        kv_dtype: kv.into(),
        workload: format!("file:sha256={}", &trace.sha256[..12]),
        text: None,
        trace: Some(trace),
        seed: 3,
        cells: cells.collect(),
        measure: Measure {
            reps: 2,
            gen_tokens: 12,
            warmup_tokens: 1,
            quality_steps: 4,
            seeds: 1,
            pin: false,
            probe_bytes: 1 << 20,
        },
        limits: Limits::default(),
    }
}

fn ask(request: &Request) -> (u8, Vec<Event>) {
    let request = serde_json::to_string(request).unwrap();
    let mut out = Vec::new();
    let code = longbit_worker::serve(request.as_bytes(), &mut out);
    let text = String::from_utf8(out).unwrap();
    (code, text.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
}

fn run(job: Job) -> (u8, Vec<Event>) {
    ask(&Request::Measure(Box::new(job)))
}

fn quality<'e>(events: &'e [Event], cell: &str) -> &'e Quality {
    let find = |e: &'e Event| if let Event::Quality(q) = e { Some(&**q) } else { None };
    events.iter().filter_map(find).find(|q| q.cell == cell).unwrap_or_else(|| panic!("{cell}: {events:?}"))
}

fn ready(events: &[Event]) -> &Ready {
    events.iter().find_map(|e| if let Event::Ready(r) = e { Some(&**r) } else { None }).unwrap()
}

fn samples<'e>(events: &'e [Event], cell: &'e str) -> impl Iterator<Item = &'e Sample> {
    events.iter().filter_map(move |e| match e {
        Event::Sample(s) if s.cell == cell => Some(&**s),
        _ => None,
    })
}

/// What ends a job that cannot be answered.
fn fatal(job: Job) -> String {
    let (code, events) = run(job);
    match events.last() {
        Some(Event::Fatal { status: Status::Error, error }) if code == 1 => error.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_trace_is_attended_as_it_was_recorded() {
    let folder = Folder::new("recorded");
    let trace = folder.write(&rows());
    let (code, events) = run(job(trace, "f32", &["dense", "window:sinks=4,window=32", "topk:k=64"]));
    assert_eq!((code, events.last()), (0, Some(&Event::End)), "{events:?}");
    let dense = quality(&events, "cell0");
    assert_eq!((dense.steps, dense.outputs), (4, 4 * 3 * 6));
    assert!(dense.rel_l2_max.unwrap() < 1e-5, "{dense:?}");
    assert!(dense.attention_logit_error_max.unwrap() < 1e-4);
    assert_eq!(dense.density_read, Some(1.0));
    let (window, top) = (quality(&events, "cell1"), quality(&events, "cell2"));
    // What queries look for is spread over the whole context: a window misses most of it, the best 64 tokens little.
    assert!(window.rel_l2_p50.unwrap() > 3.0 * top.rel_l2_p50.unwrap(), "{window:?} {top:?}");
    let reads = |q: &Quality| q.reads.unwrap();
    assert!(reads(dense).captured_mass_p5 > 0.9999 && reads(dense).top_recall_p5 == 1.0);
    assert!(reads(window).captured_mass_p50 < reads(top).captured_mass_p50);
    assert!(window.density_read.unwrap() < 0.15 && window.needle_accuracy.is_none());
    let ready = ready(&events);
    assert_eq!((ready.fill, ready.kv_bytes_stored), (Fill::Trace, 4 * 2 * 3 * 2 * 32 * CONTEXT as u64));
    let stat = |name: &str| ready.workload_stats[&format!("trace.{name}")];
    assert_eq!((stat("tokens"), stat("steps")), (300.0, 8.0));
    // Heads of a group look for one direction of the four, the next step for another.
    assert!(stat("sink_mass") < 0.1 && stat("density_95") < 0.5 && stat("effective_tokens") < 150.0);
    assert!(stat("group_overlap") > 0.15 && stat("step_overlap") < 0.2, "{:?}", ready.workload_stats);
}

/// Thirteen steps of a repetition go through the eight of the trace, and begin again with the first at the context.
#[test]
fn a_repetition_that_needs_more_steps_begins_again_at_the_context() {
    let folder = Folder::new("again");
    let (code, events) = run(job(folder.write(&rows()), "bf16", &["dense", "quest"]));
    assert_eq!(code, 0, "{events:?}");
    // 3 layers x 2 KV heads; one step to warm up.
    let rows: u64 = (1..13).map(|step| 6 * (CONTEXT as u64 + step % 8 + 1)).sum();
    let found: Vec<u64> = samples(&events, "cell0").map(|s| s.traffic.rows).collect();
    assert_eq!(found, [rows; 2]);
    assert!(samples(&events, "cell1").all(|s| s.tok_ns.len() == 12));
    // Quality comes before time, so that of a longer job is the same.
    let mut short = job(folder.write(&self::rows()), "bf16", &["dense", "quest"]);
    (short.measure.gen_tokens, short.measure.reps) = (2, 1);
    let (_, again) = run(short);
    assert_eq!(quality(&events, "cell1"), quality(&again, "cell1"));
    assert_eq!(ready(&events).fill_sha256, ready(&again).fill_sha256);
}

#[test]
fn figures_depend_on_neither_threads_nor_the_format_of_the_file() {
    let folder = Folder::new("formats");
    let mut rounded = rows();
    for numbers in [&mut rounded.keys, &mut rounded.values, &mut rounded.queries] {
        numbers.iter_mut().for_each(|x| *x = f32::from_bits(x.to_bits() & 0xffff_0000));
    }
    let mut one = job(folder.write(&rounded), "int8", &["dense", "quest"]);
    one.measure.reps = 0;
    let (_, events) = run(one.clone());
    let narrow = folder.0.join("narrow.safetensors");
    write_trace(&narrow, &rounded, TraceFormat::Bf16, HashMap::new()).unwrap();
    one.trace = Some(of(&narrow));
    one.cells.iter_mut().for_each(|c| c.threads = 2.min(longbit_sys::available_threads()));
    let (_, others) = run(one);
    assert_eq!(ready(&events).fill_sha256, ready(&others).fill_sha256);
    for cell in ["cell0", "cell1"] {
        assert_eq!(quality(&events, cell), quality(&others, cell));
    }
    assert!((1e-4..0.05).contains(&quality(&events, "cell0").rel_l2_p50.unwrap()));
}

/// A method that looks at the end of a prompt is given the queries that the trace has of it, or refused.
#[test]
fn methods_that_evict_see_the_recorded_queries_of_the_prompt() {
    let folder = Folder::new("evict");
    let trace = folder.write(&rows());
    let methods = ["dense", "snapkv:capacity=64,window=12", "snapkv:capacity=64,window=13", "tova:budget=64"];
    let (code, events) = run(job(trace.clone(), "bf16", &methods));
    assert_eq!(code, 0);
    let failed: Vec<&str> = events
        .iter()
        .filter_map(|e| match e {
            Event::Failed(outcome) if outcome.cell == "cell2" => Some(outcome.error.as_str()),
            Event::Failed(outcome) => panic!("{outcome:?}"),
            _ => None,
        })
        .collect();
    assert_eq!(failed.len(), 1);
    let says = "looks at the last 13 queries of the prompt";
    let more = "a context of 293 has them, and leaves 7 decode steps";
    assert!(failed[0].contains(says) && failed[0].contains(more), "{failed:?}");
    for cell in ["cell0", "cell1", "cell3"] {
        assert_eq!(samples(&events, cell).count(), 2);
    }
    // Twelve steps of 3 layers x 2 KV heads read what is left of the prompt, and up to eight tokens more.
    assert!(samples(&events, "cell1").all(|s| s.traffic.rows <= 12 * 6 * (64 + 8)));
    assert!(quality(&events, "cell1").rel_l2_p50.unwrap() > 0.01);
    // The plan says the same, before anything is filled.
    let estimate = |method: &str, context| estimate(&trace, method, context, 4);
    let refused = estimate("snapkv:capacity=64,window=13", CONTEXT).error.unwrap();
    assert!(refused.contains(more), "{refused}");
    assert_eq!(estimate("snapkv:capacity=64,window=12", CONTEXT).error, None);
    let vast = estimate("snapkv:capacity=640,window=64", CONTEXT).error.unwrap();
    assert!(vast.contains("record more steps, or ask the method for fewer"), "{vast}");
}

fn estimate(trace: &TraceFile, method: &str, context: usize, quality_steps: u32) -> Estimate {
    let request = EstimateRequest {
        model: ModelSpec { preset: "trace".into(), head: "bf16".into(), ..ModelSpec::default() },
        context,
        headroom: 13,
        kv_dtype: "bf16".into(),
        method: method.into(),
        threads: 1,
        batch: 1,
        fill: Fill::Trace,
        quality_steps,
        seeds: 1,
        text_bytes: 0,
        trace: Some(trace.clone()),
    };
    let (_, events) = ask(&Request::Estimate { entries: vec![request] });
    let Some(Event::Estimates { estimates }) = events.first() else { panic!("{events:?}") };
    estimates[0].clone()
}

#[test]
fn the_plan_counts_the_file_and_refuses_what_the_trace_cannot_give() {
    let folder = Folder::new("plan");
    let trace = folder.write(&rows());
    let file = std::fs::metadata(&trace.path).unwrap().len();
    let found = estimate(&trace, "dense", CONTEXT, 4);
    assert_eq!(found.error, None);
    assert!(found.scratch_bytes > file && found.fill_bytes == found.cache_bytes + file, "{found:?}");
    assert_eq!(found.kv_bytes_per_token, 2 * 2 * 3 * 2 * 32 * CONTEXT as u64);
    for (context, compared, says) in [
        (279, 4, "contexts that work: 280 to 299"),
        (300, 4, "contexts that work: 280 to 299"),
        (299, 4, "has 1 decode steps at a context of 299, and measure.quality_steps = 4 are compared"),
        (299, 4, "a context of 296 or less has them"),
        (280, 21, "lower measure.quality_steps, or record more steps"),
    ] {
        let error = estimate(&trace, "dense", context, compared).error.unwrap_or_default();
        assert!(error.contains(says), "{context} {compared}: {error}");
    }
}

#[test]
fn what_is_not_the_planned_trace_or_none_is_refused() {
    let folder = Folder::new("refused");
    let trace = folder.write(&rows());
    let path = PathBuf::from(&trace.path);
    let good = job(trace.clone(), "bf16", &["dense"]);

    let mut other = rows();
    other.values[77] += 1.0;
    folder.write(&other);
    let says = fatal(good.clone());
    assert!(says.contains("has changed since the run was planned") && says.contains(&trace.sha256), "{says}");

    other.keys[(3 * SHAPE.tokens + 41) * SHAPE.head_dim + 5] = f32::NAN;
    let broken = folder.write(&other);
    let says = fatal(job(broken, "bf16", &["dense"]));
    assert!(says.contains("tensor `k` holds NaN at [1, 1, 41, 5]"), "{says}");

    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let says = fatal(good.clone());
    assert!(says.contains("t.safetensors is not a valid safetensors file"), "{says}");
    std::fs::remove_file(&path).unwrap();
    assert!(fatal(good.clone()).contains("t.safetensors"));

    let says = fatal(Job { trace: None, ..good.clone() });
    assert!(says.contains("workload.name = \"file:PATH\""), "{says}");
    let says = fatal(Job { workload: "mix".into(), trace: None, ..good.clone() });
    assert!(says.contains("the preset trace has the shape of a trace"), "{says}");
    let tiny = ModelSpec { preset: "tiny".into(), ..good.model.clone() };
    let trace = folder.write(&rows());
    let says = fatal(Job { model: tiny, trace: Some(trace), ..good });
    for part in ["3 layers, the model 4", "32 numbers a head, the model 64", "model.preset = \"trace\""] {
        assert!(says.contains(part), "{says}");
    }
}
