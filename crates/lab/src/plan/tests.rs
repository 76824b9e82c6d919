//! Expansion, identities, skipping and narrowing.

use super::*;
use crate::analyse::testing;
use crate::engine::Engine;
use crate::engine::mock::{self, MockEngine};
use crate::spec::{self, Experiment, MemoryLimit, OnExceed};
use longbit_protocol::{EstimateRequest, Fill, Machine, Probe};
use std::path::Path;

fn experiment(axes: &str, rest: &str) -> Experiment {
    let text = format!(
        "schema = 1\n[experiment]\nname = \"x\"\nquestion = \"q\"\n[model]\npreset = \"tiny\"\n[workload]\nname = \"mix\"\n[axes]\n{axes}\n{rest}"
    );
    spec::parse("x.toml", "main", &text, &mock::capabilities()).unwrap()
}

fn machine() -> Machine {
    Machine { cpus_allowed: 2, memory_available_bytes: 10_000_000_000, ..Machine::default() }
}

const AXES: &str = "context = [1024, 2048]\nthreads = [1, \"all\", 9]\nkv_dtype = [\"bf16\", \"int8\"]\nmethod = [\"dense\", \"window\"]";

fn plan(axes: &str, rest: &str, options: &PlanOptions) -> Plan {
    let engine = MockEngine::default();
    let e = experiment(axes, rest);
    let mut plan = outline(&e, &engine.capabilities().unwrap(), &machine(), options).unwrap();
    let probes = [Probe { threads: 1, gb_s: 8.0, round: 0 }, Probe { threads: 2, gb_s: 12.0, round: 0 }];
    predict(&mut plan, &engine, e.on_exceed, &probes, Path::new("")).unwrap();
    plan
}

#[test]
fn axes_multiply_in_a_stable_order() {
    let plan = plan(AXES, "[measure]\nprobe = \"1MiB\"", &PlanOptions::default());
    assert_eq!(plan.cells.len(), 2 * 2 * 2 * 3);
    assert_eq!(plan.cells[0].name, "main/x/context=1024/threads=1/kv=bf16/method=dense");
    assert_eq!(plan.cells[4].name, "main/x/context=1024/threads=2/kv=bf16/method=window:sinks=4,window=1024");
    let skipped: Vec<&str> = plan.cells.iter().filter_map(|c| c.skip.as_deref()).collect();
    assert_eq!(skipped, ["9 threads on 2 CPUs: at most 4 a CPU are measured"; 8]);
    assert_eq!(
        plan.cohorts,
        [vec![0, 1, 3, 4], vec![6, 7, 9, 10], vec![12, 13, 15, 16], vec![18, 19, 21, 22]]
    );
    let ids: std::collections::BTreeSet<&str> = plan.cells.iter().map(|c| c.id.as_str()).collect();
    assert_eq!(ids.len(), plan.cells.len());
    assert!(ids.iter().all(|i| i.len() == 16 && i.bytes().all(|b| b.is_ascii_hexdigit())));
    assert!(plan.cells[1].predicted.seconds > 0.0 && plan.cells[2].predicted.seconds == 0.0);
    assert!(plan.cells[0].predicted.seconds > plan.cells[1].predicted.seconds);
}

#[test]
fn ids_are_stable_and_differ_at_the_third_decimal() {
    let of = |axes: &str, rest: &str| plan(axes, rest, &PlanOptions::default()).cells[0].id.clone();
    let axes = "context = 1024\nthreads = 1\nkv_dtype = \"bf16\"\nmethod = ";
    let base = of(&format!("{axes}\"topk:share=0.101\""), "");
    // Spelled out: a change here makes every stored result incomparable and has to be meant.
    assert_eq!(base, "58088260151f6ff1");
    assert_eq!(base, of(&format!("{axes}\"topk:share=0.1010\""), "[measure]\nreps = 9"));
    for (method, rest) in [
        ("topk:share=0.102", ""),
        ("topk", ""),
        ("dense", ""),
        ("topk:share=0.101", "[measure]\ngen_tokens = 65"),
        ("topk:share=0.101", "[measure]\nseed = 2"),
        ("topk:share=0.101", "[measure]\npin = false"),
    ] {
        assert_ne!(base, of(&format!("{axes}{method:?}"), rest), "{method} {rest}");
    }
    let default = of(&format!("{axes}\"window\""), "");
    assert_eq!(default, of(&format!("{axes}\"window:window=1024\""), ""));
}

#[test]
fn the_plan_hash_covers_what_is_measured_and_nothing_else() {
    let of = |axes: &str, rest: &str, options: &PlanOptions| plan(axes, rest, options).plan_hash;
    let none = PlanOptions::default();
    let base = of(AXES, "", &none);
    assert_eq!(base, of(AXES, "[limits]\nmax_rss = \"9GiB\"\ncell_timeout = \"1s\"", &none));
    assert_ne!(base, of(AXES, "[measure]\nreps = 7", &none));
    assert_ne!(base, of(AXES, "[verify]\ncosine_min = 0.5", &none));
    assert_ne!(base, of(AXES, "", &PlanOptions { reps: Some(2), ..none.clone() }));
    let narrowed = Selection { set: vec!["context=1024".into()], ..Selection::default() };
    assert_ne!(base, of(AXES, "", &PlanOptions { selection: narrowed, ..none }));
}

#[test]
fn excluded_and_oversized_cells_are_skipped_with_the_number() {
    let rest = "[[exclude]]\ncontext = [2048]\nmethod = [\"dense\"]\nthreads = [\"all\"]\nreason = \"hours\"\n[limits]\nmax_rss = \"2.5GB\"";
    let axes = "context = [1024, 2048, 4096]\nthreads = [2]\nkv_dtype = [\"bf16\"]\nmethod = [\"dense\", \"window\", \"window:sinks=999\"]";
    let plan = plan(axes, rest, &PlanOptions::default());
    let skip = |i: usize| plan.cells[i].skip.as_deref();
    assert_eq!(skip(0), None);
    assert_eq!(skip(3), Some("excluded: hours"));
    assert_eq!(skip(5), Some("sinks exceed the context"));
    assert_eq!(skip(4), Some("predicted 3.1 GB exceeds the limit 2.5 GB (limits.max_rss)"));
    assert_eq!(skip(6), Some("predicted 5.2 GB exceeds the limit 2.5 GB (limits.max_rss)"));
    assert_eq!(plan.cohorts, [vec![0, 1]]);
    assert!(disk_bytes(&plan) > 1_000_000);
}

#[test]
fn refuse_names_every_cell_that_does_not_fit() {
    let engine = MockEngine::default();
    let e = experiment(AXES, "[limits]\non_exceed = \"refuse\"");
    let options = PlanOptions { max_rss: Some(MemoryLimit::Bytes(2_500_000_000)), ..PlanOptions::default() };
    let mut plan = outline(&e, &engine.capabilities().unwrap(), &machine(), &options).unwrap();
    let error = predict(&mut plan, &engine, OnExceed::Refuse, &[], Path::new("")).unwrap_err();
    assert_eq!(error.exit(), crate::Exit::Usage);
    assert_eq!(error.to_string().matches("context=2048").count(), 8, "{error}");
}

#[test]
fn flags_narrow_and_never_widen() {
    let capabilities = mock::capabilities();
    let cells = expand(&experiment(AXES, ""), 2).unwrap();
    let pick = |selection: &Selection| select(cells.clone(), selection, &capabilities);
    let set = |s: &str| Selection { set: vec![s.into()], ..Selection::default() };
    assert_eq!(pick(&set("context=1024")).unwrap().len(), 12);
    assert_eq!(pick(&set("method=dense,window:sinks=4,window=1024")).unwrap().len(), 24);
    assert_eq!(pick(&set("kv_dtype=int8")).unwrap().len(), 12);
    let error = pick(&set("context=4096")).unwrap_err().to_string();
    assert!(error.contains("4096 is not on the axis context") && error.contains("only narrow"), "{error}");
    assert!(pick(&set("contxt=1")).unwrap_err().to_string().contains("did you mean \"context\"?"));
    assert!(pick(&set("context")).is_err());
    let method = Selection { methods: vec!["window".into()], ..Selection::default() };
    assert_eq!(pick(&method).unwrap().len(), 12);
    let filters = |list: &[(&str, bool)]| {
        let filters = list.iter().map(|(t, not)| Filter { text: (*t).into(), not: *not }).collect();
        pick(&Selection { filters, ..Selection::default() }).map(|c| c.len())
    };
    assert_eq!(filters(&[("method=dense", false)]).unwrap(), 12);
    assert_eq!(filters(&[("method=dense", true)]).unwrap(), 12);
    assert_eq!(filters(&[("method=dense", false), ("kv=int8", true)]).unwrap(), 6);
    assert_eq!(filters(&[("method=dense", true), ("kv=int8", false)]).unwrap(), 18);
    assert!(filters(&[("nothing", false)]).is_err());
}

#[test]
fn dtypes_of_keys_and_values_are_names_like_any_other() {
    let axes = "context = [1024]\nthreads = [1]\nkv_dtype = [\"bf16\", \"v=bf16, k=f32\", \"k=int8+rotate,v=bf16\", \"int8\"]\nmethod = [\"dense\"]";
    let exclude = "[[exclude]]\nkv_dtype = [\"v=bf16,k=int8+rotate\"]\nreason = \"twice\"";
    let plan = plan(axes, exclude, &PlanOptions::default());
    let kv: Vec<&str> = plan.cells.iter().map(|c| c.kv_dtype.as_str()).collect();
    assert_eq!(kv, ["bf16", "k=f32,v=bf16", "k=int8+rotate,v=bf16", "int8"]);
    assert_eq!(plan.cells[1].name, "main/x/context=1024/threads=1/kv=k=f32,v=bf16/method=dense");
    let skipped: Vec<_> = plan.cells.iter().map(|c| c.skip.as_deref()).collect();
    assert_eq!(skipped, [None, None, Some("excluded: twice"), None]);
    let ids: std::collections::BTreeSet<&str> = plan.cells.iter().map(|c| c.id.as_str()).collect();
    assert_eq!((ids.len(), plan.cohorts.len()), (4, 3));
    // Flags split lists where dtypes end, take any spelling, and are given back as they were.
    let capabilities = mock::capabilities();
    let cells = expand(&experiment(axes, ""), 2).unwrap();
    let set = |s: &str| {
        let picked =
            select(cells.clone(), &Selection { set: vec![s.into()], ..Selection::default() }, &capabilities);
        picked.map(|cells| cells.into_iter().map(|c| c.kv_dtype).collect::<Vec<_>>())
    };
    assert_eq!(set("kv_dtype=k=f32,v=bf16").unwrap(), ["k=f32,v=bf16"]);
    assert_eq!(set("kv=int8,v=bf16,k=f32,bf16").unwrap(), ["bf16", "k=f32,v=bf16", "int8"]);
    assert_eq!(set("kv=k=f32,v=bf16,k=int8+rotate,v=bf16").unwrap().len(), 2);
    let error = set("kv=k=bf16,v=f32").unwrap_err().to_string();
    assert!(error.contains("k=bf16,v=f32 is not on the axis kv"), "{error}");
    let filter = Filter { text: "kv=k=f32,v=bf16/".into(), not: false };
    let picked = select(cells, &Selection { filters: vec![filter], ..Selection::default() }, &capabilities);
    assert_eq!(picked.unwrap().len(), 1);
    assert_eq!(quoted("kv=k=f32,v=bf16+rotate"), "kv=k=f32,v=bf16+rotate");
}

#[test]
fn a_plan_survives_json() {
    let plan = plan(AXES, "[verify]\nrel_l2_max = 0.1", &PlanOptions::default());
    let text = serde_json::to_string_pretty(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
}

#[test]
fn a_plan_of_impossible_cells_is_refused() {
    let engine = MockEngine::default();
    let axes = "context = [64]\nthreads = [1, 64]\nkv_dtype = [\"bf16\"]\nmethod = [\"window:sinks=999\"]";
    let e = experiment(axes, "");
    let mut plan = outline(&e, &engine.capabilities().unwrap(), &machine(), &PlanOptions::default()).unwrap();
    let error = predict(&mut plan, &engine, e.on_exceed, &[], Path::new("")).unwrap_err();
    assert!(error.to_string().starts_with("no cell can be measured: sinks exceed"), "{error}");
}

/// The plan of an experiment on a text with these words in it.
fn text_plan(text: &str, model: &str, workload: &str, options: &PlanOptions) -> (Plan, Vec<EstimateRequest>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), text).unwrap();
    std::fs::copy(dir.path().join("a.txt"), dir.path().join("b.txt")).unwrap();
    let file = dir.path().join("x.toml");
    let toml = format!(
        "schema = 1\n[experiment]\nname = \"x\"\nquestion = \"q\"\n[model]\npath = \"m\"\n{model}\n[workload]\nname = \"text\"\n{workload}\n[axes]\n{AXES}\n[measure]\nprobe = \"1MiB\""
    );
    std::fs::write(&file, toml).unwrap();
    let engine = MockEngine::default();
    let e = spec::load(&file, &mock::capabilities()).unwrap();
    let mut plan = outline(&e, &mock::capabilities(), &machine(), options).unwrap();
    predict(&mut plan, &engine, e.on_exceed, &[], &e.dir).unwrap();
    let asked = engine.asked.borrow().clone();
    (plan, asked)
}

const A: &str = "file = \"a.txt\"";

#[test]
fn a_changed_text_or_checkpoint_is_another_plan_and_a_moved_one_is_not() {
    let of = |text: &str, model: &str, workload: &str| {
        let plan = text_plan(text, model, workload, &PlanOptions::default()).0;
        (plan.plan_hash.clone(), plan.cells[0].id.clone())
    };
    let base = of("words", "", A);
    assert_eq!(base, of("words", "", "file = \"b.txt\""));
    assert_eq!(base, of("words", "", &format!("{A}\nprefill_limit = 8192")));
    let declared = format!("sha256 = \"{}\"", "0".repeat(64));
    for other in [of("word", "", A), of("words", &declared, A), of("words", "i2s = \"x86\"", A)] {
        assert!(other.0 != base.0 && other.1 != base.1);
    }
    // The limit decides which cells are run, not what a cell is.
    let limited = of("words", "", &format!("{A}\nprefill_limit = 1024"));
    assert!(limited.0 != base.0 && limited.1 == base.1);
}

#[test]
fn a_context_above_the_limit_is_a_skipped_row_with_the_work() {
    let (plan, asked) =
        text_plan("words", "", &format!("{A}\nprefill_limit = 1024"), &PlanOptions::default());
    let of = |c: &PlannedCell| c.context == 2048 && c.threads <= 2;
    let skipped: Vec<&str> = plan.cells.iter().filter(|c| of(c)).filter_map(|c| c.skip.as_deref()).collect();
    let reason = "a prompt of 2048 tokens is longer than the limit of 1024, and would take 2.05 tera multiply-adds; \
                  raise workload.prefill_limit to run it";
    assert_eq!(skipped, [reason; 8]);
    assert_eq!(plan.cohorts, [vec![0, 1, 3, 4], vec![6, 7, 9, 10]]);
    assert_eq!(plan.cells[0].predicted.prefill_macs, 1_024_000_000_000);
    // 1.024e12 multiply-adds at 6e10 a second and thread, over the four cells of a cohort with two threads.
    assert!(plan.cells[0].predicted.seconds > 2.0, "{:?}", plan.cells[0].predicted);
    // The engine is given paths that it can open, the plan keeps those of the file.
    assert!(asked.iter().all(|e| e.fill == Fill::Prefill && e.model.path.ends_with("/m")));
    assert!(plan.cells.iter().all(|c| c.model.path == "m"));
    let text = plan.cells[0].text.as_ref().unwrap();
    assert_eq!((text.path.as_str(), text.sha256.len()), ("a.txt", 64));
    assert_eq!(plan.prefill_limit, Some(1024));
}

#[test]
fn a_trace_is_given_to_the_engine_where_it_can_open_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("t.bin"), [1, 2, 3]).unwrap();
    let file = dir.path().join("x.toml");
    let toml = format!(
        "schema = 1\n[experiment]\nname = \"x\"\nquestion = \"q\"\n[model]\npreset = \"tiny\"\n[workload]\nname = \"file:t.bin\"\n[axes]\n{AXES}\n[measure]\nprobe = \"1MiB\""
    );
    std::fs::write(&file, toml).unwrap();
    let engine = MockEngine::default();
    let e = spec::load(&file, &mock::capabilities()).unwrap();
    let mut plan = outline(&e, &mock::capabilities(), &machine(), &PlanOptions::default()).unwrap();
    predict(&mut plan, &engine, e.on_exceed, &[], &e.dir).unwrap();
    let there = dir.path().join("t.bin").display().to_string();
    let asked = engine.asked.borrow();
    assert!(!asked.is_empty() && asked.iter().all(|a| a.fill == Fill::Trace));
    assert!(asked.iter().all(|a| a.trace.as_ref().is_some_and(|t| t.path == there && t.sha256.len() == 64)));
    assert!(
        plan.cells.iter().all(|c| c.trace.as_ref().is_some_and(|t| t.path == "t.bin") && c.text.is_none())
    );
    let text = serde_json::to_string_pretty(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
}

#[test]
fn cells_beyond_the_trained_positions_are_counted_to_the_token() {
    let (mut plan, ..) = testing::Sweep { text: true, ..testing::Sweep::default() }.build();
    let n = plan.cells.len();
    for cell in &mut plan.cells {
        cell.text = Some(TextFile { path: "a.txt".into(), sha256: String::new() });
    }
    assert_eq!(plan.beyond_training(), None, "the positions are not known");
    // 8 tokens to warm up and 64 timed ones.
    plan.cells.iter_mut().for_each(|c| c.predicted.trained_positions = c.context + 72);
    assert_eq!(plan.beyond_training(), None);
    plan.cells[3].predicted.trained_positions -= 1;
    let note = plan.beyond_training().unwrap();
    assert!(note.starts_with(&format!("1 of {n} cells are beyond the ")), "{note}");
    let page = crate::emit::markdown::summary(&plan, &Machine::default(), &[], "", "");
    assert!(page.contains(&note), "{page}");
    plan.cells[3].skip = Some("too long".into());
    assert_eq!(plan.beyond_training(), None);
    plan.cells[4].predicted.trained_positions = 1;
    plan.cells[4].text = None;
    assert_eq!(plan.beyond_training(), None, "a generator fills any position");
}

#[test]
fn more_threads_than_cpus_are_measured_and_said() {
    let axes = "context = 1024\nthreads = [\"1..all\", \"all+1\"]\nkv_dtype = \"bf16\"\nmethod = \"dense\"";
    let plan = plan(axes, "[measure]\nprobe = \"1MiB\"", &PlanOptions::default());
    let threads: Vec<usize> = plan.cells.iter().map(|c| c.threads).collect();
    assert_eq!(threads, [1, 2, 3]);
    assert!(plan.cells.iter().all(|c| c.skip.is_none()), "{:?}", plan.cells);
    let warning = plan.beyond_cpus(2).unwrap();
    assert!(warning.starts_with("3 threads on 2 CPUs: each barrier waits for a time slice"), "{warning}");
    assert!(warning.ends_with("--set threads=2 leaves such cells out"), "{warning}");
    assert_eq!(plan.beyond_cpus(3), None);
    assert!(plan.cells[2].predicted.seconds > plan.cells[1].predicted.seconds, "the wait is predicted");
}

#[test]
fn a_cohort_whose_states_do_not_fit_together_is_split_in_order() {
    // A cache of 1.024 GB and what goes with it, 0.512 GB for each `draw`, 0.1024 GB for `keep`; two threads share a state.
    let axes = "context = 1024\nthreads = [1, 2]\nkv_dtype = [\"bf16\", \"int8\"]\nmethod = [\"dense\", \"draw\", \"draw:seed=1\", \"keep\", \"draw:seed=2\"]";
    let of = |limit: u64| {
        let options = PlanOptions { max_rss: Some(MemoryLimit::Bytes(limit)), ..PlanOptions::default() };
        plan(axes, "[measure]\nprobe = \"1MiB\"", &options)
    };
    let whole = of(1 << 40);
    assert_eq!(whole.cohorts.iter().map(Vec::len).collect::<Vec<_>>(), [10, 10]);
    assert!(whole.splits().is_empty());
    let base = 1_000_000 + 1_024_000_000 + 1_000 + (1 << 20);
    let bytes =
        |plan: &Plan, i: usize| (plan.cells[i].predicted.rss_bytes, plan.cells[i].predicted.worker_rss_bytes);
    assert_eq!(bytes(&whole, 0), (base, base + 3 * 512_000_000 + 102_400_000));
    assert_eq!(bytes(&whole, 2).0, base + 512_000_000);

    let parts = of(2_200_000_000);
    assert_eq!(parts.cohorts, [vec![0, 1, 2, 3, 4, 5, 6, 7], vec![8, 9], (10..18).collect(), vec![18, 19]]);
    assert_eq!(bytes(&parts, 0).1, base + 2 * 512_000_000 + 102_400_000);
    assert_eq!(bytes(&parts, 9).1, base + 512_000_000);
    assert_eq!(parts.plan_hash, whole.plan_hash, "how cells are shared out is not what is measured");
    let notes = parts.splits();
    assert_eq!(notes.len(), 2);
    assert!(
        notes[0].starts_with("context 1024, bf16: ")
            && notes[0].contains("8 cells with 2.2 GB, 2 with 1.5 GB"),
        "{notes:?}"
    );
    // Each worker builds the model and fills the cache.
    let seconds = |plan: &Plan| plan.cells.iter().map(|c| c.predicted.seconds).sum::<f64>();
    assert!(seconds(&parts) > seconds(&whole) + 5.0);
    // Two threads of one method always stay together.
    let narrow = of(1_600_000_000);
    assert_eq!(narrow.cohorts.iter().map(Vec::len).collect::<Vec<_>>(), [4, 2, 2, 2, 4, 2, 2, 2]);
    assert!(narrow.cells.iter().all(|c| c.skip.is_none()));
    // What does not fit alone is a row.
    let small = of(1_100_000_000);
    assert_eq!(small.cells.iter().filter(|c| c.skip.is_some()).count(), 2 * 8);
}

#[test]
fn seeds_take_time_where_something_is_drawn_and_leave_identities_alone() {
    let axes = "context = 1024\nthreads = 1\nkv_dtype = \"bf16\"\nmethod = [\"window\", \"draw\"]";
    let of = |seeds: &str| {
        let rest = format!("[measure]\nquality_steps = 4\nprobe = \"1MiB\"\n{seeds}");
        plan(axes, &rest, &PlanOptions::default())
    };
    let (one, said, many) = (of(""), of("seeds = 1"), of("seeds = 5"));
    assert_eq!((one.measure.seeds, many.measure.seeds), (1, 5));
    assert_eq!(one.plan_hash, said.plan_hash);
    assert_ne!(one.plan_hash, many.plan_hash);
    let ids = |plan: &Plan| plan.cells.iter().map(|c| c.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&one), ids(&many));
    assert_eq!(one.cells[0].predicted.seconds, many.cells[0].predicted.seconds, "a window draws nothing");
    assert!(many.cells[1].predicted.seconds > one.cells[1].predicted.seconds);
}

#[test]
fn batches_are_cells_of_their_own_and_leave_identities_alone() {
    let axes = "context = [0, 1024]\nthreads = 1\nkv_dtype = \"bf16\"\nmethod = \"dense\"";
    let rest = "[measure]\nquality_steps = 2\nprobe = \"1MiB\"";
    let plain = plan(axes, rest, &PlanOptions::default());
    let with = plan(&format!("{axes}\nbatch = [1, 32, 384]"), rest, &PlanOptions::default());
    let ids = |plan: &Plan, batch| -> Vec<String> {
        plan.cells.iter().filter(|c| c.batch == batch).map(|c| c.id.clone()).collect()
    };
    assert_eq!(ids(&plain, 1), ids(&with, 1));
    assert_eq!(with.cells.len(), 6);
    assert_eq!(with.cells[1].name, "main/x/context=0/threads=1/kv=bf16/method=dense/batch=32");
    assert_eq!(with.cohorts, [vec![0, 1, 2], vec![3, 4, 5]], "one cache serves all batches");
    assert!(with.cells[0].compares(&with.measure) && !with.cells[1].compares(&with.measure));
    assert!(with.cells[2].predicted.seconds > with.cells[1].predicted.seconds);
    let narrowed = Selection { set: vec!["batch=32".into()], ..Selection::default() };
    let batches = format!("{axes}\nbatch = [1, 32, 384]");
    let one = plan(&batches, rest, &PlanOptions { selection: narrowed, ..PlanOptions::default() });
    assert!(one.cells.len() == 2 && one.cells.iter().all(|c| c.batch == 32));
    let excluded = format!("{rest}\n[[exclude]]\nbatch = [384]");
    assert_eq!(plan(&batches, &excluded, &PlanOptions::default()).cohorts[0].len(), 2);
    // Where nothing is timed only decode steps are left.
    let untimed = plan(&batches, rest, &PlanOptions { reps: Some(0), ..PlanOptions::default() });
    assert_eq!(untimed.cells.iter().filter(|c| c.skip.is_none()).count(), 2);
}
