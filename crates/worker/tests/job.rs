//! A whole job on the tiny model: what an engine promises about its events.

use longbit_protocol::{
    CellJob, Event, Fill, Job, Limits, Measure, ModelSpec, PROTOCOL, Quality, Ready, Request, Sample, Status,
};

fn job(kv: &str, methods: &[&str], measure: Measure) -> Job {
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
        model: ModelSpec { preset: "tiny".into(), head: "bf16".into(), seed: 1, ..ModelSpec::default() },
        context: 1000,
        kv_dtype: kv.into(),
        workload: "mix".into(),
        text: None,
        trace: None,
        seed: 3,
        cells: cells.collect(),
        measure,
        limits: Limits::default(),
    }
}

fn measure(reps: u32) -> Measure {
    Measure {
        reps,
        gen_tokens: 5,
        warmup_tokens: 2,
        quality_steps: 3,
        seeds: 1,
        pin: false,
        probe_bytes: 1 << 20,
    }
}

fn run(job: Job) -> (u8, Vec<Event>) {
    let request = serde_json::to_string(&Request::Measure(Box::new(job))).unwrap();
    let mut out = Vec::new();
    let code = longbit_worker::serve(request.as_bytes(), &mut out);
    let text = String::from_utf8(out).unwrap();
    (code, text.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
}

fn samples(events: &[Event]) -> Vec<&Sample> {
    events.iter().filter_map(|e| if let Event::Sample(s) = e { Some(&**s) } else { None }).collect()
}

fn quality<'e>(events: &'e [Event], cell: &str) -> &'e Quality {
    let find = |e: &'e Event| if let Event::Quality(q) = e { Some(&**q) } else { None };
    events.iter().filter_map(find).find(|q| q.cell == cell).unwrap()
}

fn ready(events: &[Event]) -> &Ready {
    events.iter().find_map(|e| if let Event::Ready(r) = e { Some(&**r) } else { None }).unwrap()
}

#[test]
fn every_cell_has_its_repetitions_its_quality_and_its_traffic() {
    let (code, events) = run(job("bf16", &["dense", "window:sinks=4,window=64"], measure(3)));
    assert_eq!(code, 0, "{:?}", events.last());
    assert_eq!(events.last(), Some(&Event::End));
    let samples = samples(&events);
    for cell in ["cell0", "cell1"] {
        let reps: Vec<_> = samples.iter().filter(|s| s.cell == cell).map(|s| s.rep).collect();
        assert_eq!(reps, [0, 1, 2]);
    }
    assert!(samples.iter().all(|s| s.tok_ns.len() == 5 && s.tok_ns.iter().all(|&ns| ns > 0)));
    // 4 layers x 2 KV heads; the cache grows by one a step and is rewound after each repetition.
    let rows = |cell| samples.iter().find(|s| s.cell == cell).unwrap().traffic.rows;
    assert_eq!(rows("cell0"), (0..5).map(|i| 8 * (1000 + 3 + i)).sum::<u64>());
    assert_eq!(rows("cell1"), 5 * 8 * 68);
    let dense = quality(&events, "cell0");
    assert_eq!((dense.steps, dense.outputs), (3, 3 * 4 * 4));
    let [p50, p95, max] = [dense.rel_l2_p50, dense.rel_l2_p95, dense.rel_l2_max].map(Option::unwrap);
    assert!(max > 0.0 && p95 < 0.01 && dense.cosine_min.unwrap() > 0.999);
    assert!(p50 <= p95 && p95 <= max);
    // Generated inputs have no text, so there is nothing that a next token could be held against.
    assert!(dense.kl_nats.is_none() && dense.top1_agreement.is_none() && dense.logit_cosine_mean.is_none());
    let [p5, mean] = [dense.cosine_p5, dense.cosine_mean].map(Option::unwrap);
    assert!(dense.cosine_min.unwrap() <= p5 && p5 <= 1.0 && mean <= 1.0);
    // Half a unit in the last of 8 bits for each of the 64 products of a logit, divided by 8.
    let logits = dense.attention_logit_error_max.unwrap();
    assert!((1e-4..0.5).contains(&logits), "{logits}");
    let window = quality(&events, "cell1");
    assert!(window.rel_l2_p50.unwrap() > 10.0 * p50);
    // What is not read is stored all the same.
    assert_eq!(window.attention_logit_error_max, Some(logits));
    // Everything is read, or the first and the last tokens.
    let [all, few] = [dense, window].map(|q| q.reads.unwrap());
    assert_eq!((all.samples, few.samples), (3 * 4 * 4, 3 * 4 * 4));
    assert!(all.captured_mass_p5 > 1.0 - 1e-5 && all.tail_mass_error_p95 < 1e-5, "{all:?}");
    assert_eq!((all.top_recall_p5, dense.density_read), (1.0, Some(1.0)));
    assert!(few.captured_mass_p50 < 1.0 && few.captured_mass_p5 <= few.captured_mass_p50, "{few:?}");
    // A window assumes nothing of the rest.
    assert!((few.tail_mass_error_p50 - (1.0 - few.captured_mass_p50)).abs() < 0.2, "{few:?}");
    assert!(few.top_recall_mean < 1.0 && few.top_recall_p5 <= few.top_recall_mean);
    let density = window.density_read.unwrap();
    assert!((density - 68.0 / 1002.0).abs() < 1e-4, "{density}");
    // What is needed does not depend on what is read; a group needs what any of its heads does.
    assert_eq!((all.top_density_head, all.top_density_group), (few.top_density_head, few.top_density_group));
    assert!(0.0 < all.top_density_head && all.top_density_head < all.top_density_group);
    assert!(dense.seeds.is_none() && samples.iter().all(|s| s.index_build_ns.is_some()));
    assert!(ready(&events).append_ns.unwrap() > 0);
    assert_eq!(ready(&events).kv_bytes_stored, 1000 * 8 * 2 * 64 * 2);
}

/// A pattern of the prompt changes no step: the cache is the workload's. What it loses is told beside, and a batch runs with it.
#[test]
fn patterns_of_the_prompt_are_held_against_dense_prompts() {
    let methods = [
        "dense",
        "dense:prefill=window,prefill_sinks=4,prefill_window=64",
        "dense:prefill=window,prefill_sinks=4,prefill_window=2000",
        "dense:prefill=window,prefill_sinks=4,prefill_window=64,prefill_dense_layers=even",
        "window:sinks=4,window=64,prefill=blocks,prefill_blocks=4",
        "dense:prefill=vslash,prefill_columns=100,prefill_slashes=100",
        "h2o:budget=100,prefill=window",
    ];
    let mut wanted = job("int8+plain", &[&methods[..], &methods[1..2]].concat(), measure(1));
    wanted.cells[7].batch = 8;
    let (code, events) = run(wanted);
    assert_eq!(code, 0, "{:?}", events.last());
    let of = |cell: usize| quality(&events, &format!("cell{cell}"));
    assert!(of(0).prefill.is_none() && of(6).prefill.is_none());
    assert_eq!(of(1).rel_l2_p50, of(0).rel_l2_p50);
    let [few, all, half, blocks, slash] = [1, 2, 3, 4, 5].map(|cell| of(cell).prefill.unwrap());
    // Tokens 768 to 999 of 1000: the last whole block of 128 and what follows it.
    assert_eq!(few.outputs, 232 * 4 * 4);
    let causal = (769..=1000).sum::<u64>() as f64;
    assert!((few.density - 232.0 * 68.0 / causal).abs() < 1e-12, "{few:?}");
    assert!(few.rel_l2_p50 > 0.0 && few.rel_l2_p95 >= few.rel_l2_p50 && few.rel_l2_p95 < 10.0, "{few:?}");
    assert_eq!((all.rel_l2_p95, all.density), (0.0, 1.0));
    // Half of the layers are exact.
    assert!((half.density - (1.0 + few.density) / 2.0).abs() < 1e-12 && half.rel_l2_p50 == 0.0, "{half:?}");
    assert!(half.rel_l2_p95 > 0.0 && blocks.density < 0.3 && blocks.rel_l2_p50 > 0.0);
    assert!(slash.density < 1.0 && slash.rel_l2_p50 < few.rel_l2_p50, "{slash:?} {few:?}");
    let rows = |cell: &str| samples(&events).iter().find(|s| s.cell == cell).unwrap().traffic.rows;
    assert_eq!((rows("cell1"), rows("cell4")), (rows("cell0"), 5 * 8 * 68));
    assert_eq!(samples(&events).iter().find(|s| s.cell == "cell7").unwrap().tok_ns.len(), 1);
}

/// Cells whose method evicts have a cache of their own: each reads its budget at every step of every repetition, and the
/// others read what they read without them.
#[test]
fn cells_that_evict_leave_the_others_alone() {
    let (_, alone) = run(job("int8+plain", &["dense"], measure(1)));
    let methods = [
        "h2o:budget=100",
        "dense",
        "tova:budget=100",
        "snapkv:capacity=100,window=32,ada=0.2",
        "lru:budget=100",
    ];
    let mut wanted = job("int8+plain", &[&methods[..], &["expected:budget=100", "h2o"]].concat(), measure(2));
    wanted.cells[6].batch = 4;
    let (code, events) = run(wanted);
    assert_eq!(code, 0, "{:?}", events.last());
    let of = |cell: &str| -> Vec<u64> {
        samples(&events).iter().filter(|s| s.cell == cell).map(|s| s.traffic.rows).collect()
    };
    for cell in ["cell0", "cell2", "cell4"] {
        assert_eq!(of(cell), [5 * 8 * 100; 2], "{cell}");
    }
    // What is generated stays: two steps before the five that count.
    for cell in ["cell3", "cell5"] {
        assert_eq!(of(cell), [(0..5).map(|i| 8 * (100 + 3 + i)).sum::<u64>(); 2], "{cell}");
    }
    assert_eq!(of("cell6").len(), 2);
    assert_eq!(quality(&events, "cell1").rel_l2_p50, quality(&alone, "cell0").rel_l2_p50);
    for cell in ["cell0", "cell2", "cell3", "cell4", "cell5"] {
        let error = quality(&events, cell).rel_l2_p50.unwrap();
        assert!(error > 0.0 && error < 2.0, "{cell}: {error}");
    }
    // A format that rows cannot leave costs such a cell, and no other.
    let (code, events) = run(job("int4", &["dense", "tova"], measure(1)));
    assert_eq!(code, 0);
    let failed = events.iter().find_map(|e| if let Event::Failed(f) = e { Some(f) } else { None }).unwrap();
    assert!(failed.cell == "cell1" && failed.error.contains("cannot be evicted"), "{failed:?}");
    assert_eq!(samples(&events).len(), 1);
}

#[test]
fn f32_dense_attention_is_exact_to_rounding() {
    let (_, events) = run(job("f32", &["dense", "window:sinks=0,window=100000"], measure(0)));
    for cell in ["cell0", "cell1"] {
        let q = quality(&events, cell);
        assert!(q.rel_l2_max.unwrap() < 1e-5, "{q:?}");
        assert!(q.cosine_min.unwrap() > 1.0 - 1e-9);
        // The same products in the same order, of which nothing was rounded.
        assert_eq!(q.attention_logit_error_max, Some(0.0));
    }
    assert!(samples(&events).is_empty());
}

#[test]
fn keys_and_values_of_their_own_formats_have_errors_of_their_own() {
    let logits = |kv: &str| {
        let (code, events) = run(job(kv, &["dense"], measure(0)));
        assert_eq!((code, events.last()), (0, Some(&Event::End)), "{kv}");
        let q = quality(&events, "cell0").clone();
        (q.attention_logit_error_max.unwrap(), q.rel_l2_p50.unwrap(), ready(&events).kv_bytes_stored)
    };
    let (bf16, exact_keys, exact_values) = (logits("bf16"), logits("k=f32,v=bf16"), logits("k=bf16,v=f32"));
    // Logits come from keys alone, the error of an output from both.
    assert_eq!((exact_keys.0, exact_values.0), (0.0, bf16.0));
    assert!(exact_keys.1 < bf16.1 && exact_values.1 < bf16.1, "{bf16:?} {exact_keys:?} {exact_values:?}");
    assert_eq!((2 * exact_keys.2, exact_keys.2), (3 * bf16.2, exact_values.2));
    // Rotation and centring are undone on the way, and the newest tokens are compared as well.
    assert!(logits("f32+rotate").0 < 1e-4 && logits("bf16+rotate").0 < 0.5);
    let centred = logits("bf16+centre").0;
    assert!(centred > 0.0 && centred < 0.5, "{centred}");
}

#[test]
fn every_head_format_answers_a_job() {
    let heads = longbit_worker::capabilities().unwrap().heads;
    assert!(heads.iter().any(|h| h == "two-stage") && heads.iter().any(|h| h == "q4"), "{heads:?}");
    for head in heads {
        let mut job = job("bf16", &["dense"], measure(1));
        job.model.head.clone_from(&head);
        let (code, events) = run(job);
        assert_eq!((code, events.last()), (0, Some(&Event::End)), "{head}");
        assert_eq!(samples(&events).len(), 1, "{head}");
        assert!(ready(&events).weight_bytes_per_token > 0);
    }
}

#[test]
fn the_same_seed_fills_the_same_bytes() {
    let fill = |job| ready(&run(job).1).fill_sha256.clone();
    let first = fill(job("bf16", &["dense"], measure(0)));
    assert_eq!(first, fill(job("bf16", &["dense"], measure(0))));
    assert_ne!(first, fill(Job { seed: 4, ..job("bf16", &["dense"], measure(0)) }));
    // Recorded once; the same on every machine.
    assert_eq!(first, GOLDEN_FILL);
}

const GOLDEN_FILL: &str = "624fe282b925819df638b49e300294ddc276abe794fcfbddf32345ee9a91fa0a";

#[test]
fn resuming_measures_only_what_is_missing() {
    let mut partly = job("bf16", &["dense", "window:sinks=4,window=64"], measure(3));
    partly.cells[0].first_rep = 2;
    partly.cells[0].quality_done = true;
    partly.cells[1].first_rep = 3;
    let (_, events) = run(partly);
    let got: Vec<_> = samples(&events).iter().map(|s| (s.cell.clone(), s.rep)).collect();
    assert_eq!(got, [("cell0".to_string(), 2)]);
    let qualities: Vec<_> = events.iter().filter(|e| matches!(e, Event::Quality(_))).collect();
    assert_eq!(qualities.len(), 1);
}

#[test]
fn one_impossible_cell_does_not_cost_the_others() {
    let (code, events) = run(job("bf16", &["no-such-method", "dense"], measure(1)));
    assert_eq!(code, 0);
    let failed = events.iter().find_map(|e| if let Event::Failed(o) = e { Some(o) } else { None }).unwrap();
    assert_eq!((failed.cell.as_str(), failed.status), ("cell0", Status::Error));
    assert!(failed.error.contains("no-such-method") && failed.error.contains("window"));
    assert_eq!(samples(&events).len(), 1);
}

#[test]
fn a_job_that_cannot_start_is_fatal_and_says_why() {
    let mut bad = job("bf16", &["dense"], measure(1));
    bad.protocol = 99;
    let mut unknown = job("fp3", &["dense"], measure(1));
    unknown.cells.truncate(1);
    let mut workload = job("bf16", &["dense"], measure(1));
    workload.workload = "mixed".into();
    let endless = Job { context: usize::MAX, ..job("bf16", &["dense"], measure(1)) };
    let wrapping = Job { context: 1 << 60, ..job("bf16", &["dense"], measure(1)) };
    let huge = Job { context: 1 << 30, ..job("bf16", &["dense"], measure(1)) };
    for (job, status, says) in [
        (bad, Status::Error, "protocol 99"),
        (unknown, Status::Error, "bf16"),
        (workload, Status::Error, "mix"),
        (huge, Status::Oom, "bytes"),
        (wrapping, Status::Error, "2^30"),
        (endless, Status::Error, "2^30"),
    ] {
        let (code, events) = run(job);
        assert_eq!(code, 1);
        let Some(Event::Fatal { status: got, error }) = events.last() else { panic!("{events:?}") };
        assert_eq!(*got, status, "{error}");
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_batch_is_a_pass_of_several_tokens_from_the_same_context() {
    let mut several = job("bf16", &["dense", "dense", "dense"], measure(2));
    several.cells[1].batch = 3;
    several.cells[2].batch = 40;
    let (code, events) = run(several);
    assert_eq!((code, events.last()), (0, Some(&Event::End)), "{events:?}");
    let samples = samples(&events);
    // Five timed tokens are two passes of three, or one of forty.
    for (cell, passes) in [("cell0", 5), ("cell1", 2), ("cell2", 1)] {
        let found: Vec<usize> = samples.iter().filter(|s| s.cell == cell).map(|s| s.tok_ns.len()).collect();
        assert_eq!(found, [passes; 2], "{cell}");
    }
    // Decode steps between batches read what they always read: the cache was rewound.
    let rows: Vec<u64> = samples.iter().filter(|s| s.cell == "cell0").map(|s| s.traffic.rows).collect();
    assert_eq!(rows, [(0..5).map(|i| 8 * (1000 + 3 + i)).sum::<u64>(); 2]);
    let compared: Vec<&str> = events
        .iter()
        .filter_map(|e| if let Event::Quality(q) = e { Some(q.cell.as_str()) } else { None })
        .collect();
    assert_eq!(compared, ["cell0"]);
}

#[test]
fn contexts_too_short_to_generate_are_empty_or_run_through_the_model() {
    for (context, fill) in [(0, Fill::None), (5, Fill::Prefill)] {
        let mut short =
            Job { context, ..job("bf16", &["dense", "dense"], Measure { quality_steps: 0, ..measure(1) }) };
        short.cells[1].batch = 64;
        let (code, events) = run(short);
        assert_eq!((code, events.last()), (0, Some(&Event::End)), "{events:?}");
        assert_eq!(ready(&events).fill, fill);
        let rows = samples(&events).iter().find(|s| s.cell == "cell0").unwrap().traffic.rows;
        assert_eq!(rows, (0..5).map(|i| 8 * (context as u64 + 3 + i)).sum::<u64>());
    }
    let (_, events) = run(Job { context: 0, ..job("bf16", &["dense"], measure(1)) });
    let failed = events.iter().find_map(|e| if let Event::Failed(o) = e { Some(o) } else { None }).unwrap();
    assert!(failed.error.contains("measure.quality_steps = 0"), "{}", failed.error);
}

#[test]
fn one_matrix_is_timed_without_a_cache() {
    let mut matrix = Job {
        context: 0,
        kv_dtype: "-".into(),
        workload: "matrix".into(),
        ..job("-", &["-", "-"], measure(2))
    };
    matrix.model.preset = "matrix:300x520".into();
    matrix.cells[1].batch = 4;
    matrix.cells[1].threads = longbit_sys::available_threads().min(2);
    let (code, events) = run(matrix.clone());
    assert_eq!((code, events.last()), (0, Some(&Event::End)), "{events:?}");
    let ready = ready(&events);
    // 75 tiles of 4 rows, 3 blocks of 256 columns at 2 bits.
    assert_eq!(
        (ready.fill, ready.weight_bytes_per_token, ready.kv_bytes_stored),
        (Fill::None, 75 * 3 * 256, 0)
    );
    let passes: Vec<_> = samples(&events).iter().map(|s| (s.cell.clone(), s.rep, s.tok_ns.len())).collect();
    for wanted in [("cell0", 0, 5), ("cell0", 1, 5), ("cell1", 0, 2), ("cell1", 1, 2)] {
        assert!(passes.contains(&(wanted.0.to_owned(), wanted.1, wanted.2)), "{passes:?}");
    }
    let fatal = |job: Job| match run(job).1.pop() {
        Some(Event::Fatal { error, .. }) => error,
        other => panic!("{other:?}"),
    };
    let of_model = Job { workload: "mix".into(), ..matrix.clone() };
    assert!(fatal(of_model).contains("matrix:4096x4096"));
    matrix.model.preset = "tiny".into();
    assert!(fatal(matrix).contains("matrix:4096x4096"));
}
