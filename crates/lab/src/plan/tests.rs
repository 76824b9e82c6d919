//! Expansion, identities, skipping and narrowing.

use super::*;
use crate::engine::Engine;
use crate::engine::mock::{self, MockEngine};
use crate::spec::{self, Experiment, MemoryLimit, OnExceed};
use longbit_protocol::{Machine, Probe};

fn experiment(axes: &str, rest: &str) -> Experiment {
    let text = format!(
        "schema = 1\n[experiment]\nname = \"x\"\nquestion = \"q\"\n[model]\npreset = \"tiny\"\n[workload]\nname = \"mix\"\n[axes]\n{axes}\n{rest}"
    );
    spec::parse("x.toml", "main", &text, &mock::capabilities()).unwrap()
}

fn machine() -> Machine {
    Machine { cpus_allowed: 2, memory_available_bytes: 10_000_000_000, ..Machine::default() }
}

const AXES: &str = "context = [1024, 2048]\nthreads = [1, \"all\", 4]\nkv_dtype = [\"bf16\", \"int8\"]\nmethod = [\"dense\", \"window\"]";

fn plan(axes: &str, rest: &str, options: &PlanOptions) -> Plan {
    let engine = MockEngine::default();
    let e = experiment(axes, rest);
    let mut plan = outline(&e, &engine.capabilities().unwrap(), &machine(), options).unwrap();
    let probes = [Probe { threads: 1, gb_s: 8.0, round: 0 }, Probe { threads: 2, gb_s: 12.0, round: 0 }];
    predict(&mut plan, &engine, e.on_exceed, &probes).unwrap();
    plan
}

#[test]
fn axes_multiply_in_a_stable_order() {
    let plan = plan(AXES, "[measure]\nprobe = \"1MiB\"", &PlanOptions::default());
    assert_eq!(plan.cells.len(), 2 * 2 * 2 * 3);
    assert_eq!(plan.cells[0].name, "main/x/context=1024/threads=1/kv=bf16/method=dense");
    assert_eq!(plan.cells[4].name, "main/x/context=1024/threads=2/kv=bf16/method=window:sinks=4,window=1024");
    let skipped: Vec<&str> = plan.cells.iter().filter_map(|c| c.skip.as_deref()).collect();
    assert_eq!(skipped, ["needs 4 CPUs, 2 are allowed"; 8]);
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
    let error = predict(&mut plan, &engine, OnExceed::Refuse, &[]).unwrap_err();
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
    let error = predict(&mut plan, &engine, e.on_exceed, &[]).unwrap_err();
    assert!(error.to_string().starts_with("no cell can be measured: sinks exceed"), "{error}");
}
