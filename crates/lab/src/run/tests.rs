//! The scheduler against an engine that fails where it is told to.

use super::store::{CellState, Line, states};
use super::*;
use crate::engine::mock::{Fault, MockEngine, capabilities};
use longbit_protocol::{Quality, Toolchain};
use std::collections::BTreeSet;

const AXES: &str = "context = [1024, 2048]\nthreads = [1]\nkv_dtype = [\"bf16\"]\nmethod = [\"dense\", \"window\", \"topk\"]";
const MEASURE: &str = "[measure]\nreps = 3\ngen_tokens = 2\nprobe = \"1MiB\"";

struct Lab {
    dir: tempfile::TempDir,
    experiment: Experiment,
    options: RunOptions,
}

impl Lab {
    fn new(axes: &str, rest: &str) -> Lab {
        let text = format!(
            "schema = 1\n[experiment]\nname = \"x\"\nquestion = \"q\"\n[model]\npreset = \"tiny\"\n[workload]\nname = \"mix\"\n[axes]\n{axes}\n{rest}"
        );
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.toml");
        std::fs::write(&file, &text).unwrap();
        let experiment = spec::load(&file, &capabilities()).unwrap();
        let machine = Machine {
            machine_id: "0123456789abcdef".into(),
            machine_class: "fedcba9876543210".into(),
            cpus_allowed: 2,
            memory_available_bytes: 1 << 40,
            toolchain: Toolchain { git_sha: "a".repeat(40), ..Toolchain::default() },
            ..Machine::default()
        };
        let options =
            RunOptions { files: vec![file], machine: Some(machine), quiet: true, ..RunOptions::default() };
        Lab { dir, experiment, options }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn try_run(&self, engine: &MockEngine) -> Result<Exit> {
        measure(engine, &capabilities(), &self.experiment, &self.out(), &self.options, &mut Vec::new())
    }

    fn run(&self, engine: &MockEngine) -> Exit {
        self.try_run(engine).unwrap()
    }

    fn lines(&self) -> Vec<Line> {
        store::read(&self.out().join("samples.jsonl")).unwrap()
    }

    fn plan(&self) -> Plan {
        serde_json::from_slice(&std::fs::read(self.out().join("plan.json")).unwrap()).unwrap()
    }

    /// State of each cell by `context method`.
    fn states(&self) -> Vec<(String, CellState)> {
        let (plan, states) = (self.plan(), states(&self.lines()));
        let state = |id: &str| states.get(id).cloned().unwrap_or_default();
        plan.cells.iter().map(|c| (format!("{} {}", c.context, c.method), state(&c.id))).collect()
    }

    /// The failures, as `context method: status: reason`.
    fn failures(&self) -> Vec<String> {
        let plan = self.plan();
        let name = |id: &str| {
            let cell = plan.cells.iter().find(|c| c.id == id).unwrap();
            format!("{} {}", cell.context, cell.method)
        };
        let text = |l: &Line| match l {
            Line::Failed { outcome: o } => {
                Some(format!("{}: {}: {}", name(&o.cell), o.status.as_str(), o.error))
            }
            _ => None,
        };
        self.lines().iter().filter_map(text).collect()
    }
}

/// Every repetition in the log as it stands on disk, duplicates included.
fn raw_samples(path: &Path) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(path).unwrap();
    let samples = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    samples
        .filter(|v| v["line"] == "sample")
        .map(|v| (v["sample"]["cell"].as_str().unwrap().to_owned(), v["sample"]["rep"].as_u64().unwrap()))
        .collect()
}

#[test]
fn an_undisturbed_run_measures_everything_once() {
    let lab = Lab::new(AXES, MEASURE);
    let engine = MockEngine::default();
    assert_eq!(lab.run(&engine), Exit::Ok);
    assert_eq!(engine.jobs.borrow().len(), 2);
    let full = CellState {
        reps: BTreeSet::from([0, 1, 2]),
        timed_ns: 6_000_006,
        quality: true,
        end: Some(Status::Ok),
    };
    assert_eq!(lab.states().len(), 6);
    assert!(lab.states().iter().all(|(_, s)| *s == full), "{:?}", lab.states());
    assert_eq!(lab.run(&engine), Exit::Ok);
    assert_eq!(engine.jobs.borrow().len(), 2, "a finished run starts no worker");
    assert_eq!(engine.sent.borrow().len(), 18);
}

#[test]
fn the_plan_stands_before_the_first_sample() {
    struct Peek<'a>(MockEngine, &'a Lab);
    impl Engine for Peek<'_> {
        fn capabilities(&self) -> Result<Capabilities> {
            self.0.capabilities()
        }
        fn estimate(
            &self,
            e: &[longbit_protocol::EstimateRequest],
        ) -> Result<Vec<longbit_protocol::Estimate>> {
            assert!(!self.1.out().exists(), "nothing is written before the plan is known to be possible");
            self.0.estimate(e)
        }
        fn probe(&self, t: &[usize], b: u64) -> Result<Vec<longbit_protocol::Probe>> {
            self.0.probe(t, b)
        }
        fn start(&self, job: &longbit_protocol::Job) -> Result<Box<dyn crate::engine::Running>> {
            assert_eq!(self.1.plan().cells.len(), 6);
            let machine: Machine =
                serde_json::from_slice(&std::fs::read(self.1.out().join("machine.json")).unwrap()).unwrap();
            assert_eq!(machine.probes.len(), 2);
            self.0.start(job)
        }
    }
    let lab = Lab::new(AXES, MEASURE);
    let engine = Peek(MockEngine::default(), &lab);
    let exit = measure(&engine, &capabilities(), &lab.experiment, &lab.out(), &lab.options, &mut Vec::new());
    assert_eq!(exit.unwrap(), Exit::Ok);
}

#[test]
fn resuming_after_a_kill_at_any_byte_gives_the_same_set() {
    let lab = Lab::new(
        "context = [64]\nthreads = [1]\nkv_dtype = [\"bf16\"]\nmethod = [\"dense\", \"window\"]",
        "[measure]\nreps = 2\ngen_tokens = 1\nprobe = \"1MiB\"",
    );
    lab.run(&MockEngine::default());
    let path = lab.out().join("samples.jsonl");
    let whole = std::fs::read(&path).unwrap();
    let want: BTreeSet<(String, u64)> = raw_samples(&path).into_iter().collect();
    let states = lab.states();
    assert_eq!(want.len(), 4);
    for cut in 0..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let kept = store::read(&path).unwrap().iter().filter(|l| matches!(l, Line::Sample { .. })).count();
        let engine = MockEngine::default();
        assert_eq!(lab.run(&engine), Exit::Ok, "cut at byte {cut}");
        let samples = raw_samples(&path);
        assert_eq!(samples.len(), 4, "cut at byte {cut}: doubled");
        assert_eq!(samples.into_iter().collect::<BTreeSet<_>>(), want, "cut at byte {cut}");
        assert_eq!(engine.sent.borrow().len(), 4 - kept, "cut at byte {cut}: measured again");
        assert_eq!(lab.states(), states, "cut at byte {cut}");
    }
}

#[test]
fn a_dying_worker_costs_its_culprit_alone() {
    let lab = Lab::new(AXES, MEASURE);
    let engine = MockEngine::with(&[("window", Fault::Dies(1, 9))]);
    assert_eq!(lab.run(&engine), Exit::Incomplete);
    assert_eq!(
        lab.failures(),
        ["1024 window: oom: killed by signal 9", "2048 window: oom: killed by signal 9"]
    );
    for (name, state) in lab.states() {
        let want = if name.contains("window") { (1, Some(Status::Oom)) } else { (3, Some(Status::Ok)) };
        assert_eq!((state.reps.len(), state.end), want, "{name}");
    }
    // One worker for all three, then one for each; what stood was not measured again.
    assert_eq!(
        engine.jobs.borrow().iter().map(|j| j.cells.len()).collect::<Vec<_>>(),
        [3, 1, 1, 1, 3, 1, 1, 1]
    );
    assert_eq!(engine.jobs.borrow()[1].cells[0].first_rep, 2);
    assert_eq!(engine.sent.borrow().len(), raw_samples(&lab.out().join("samples.jsonl")).len());
    // Failed cells stay failed, unless asked for.
    let again = MockEngine::default();
    assert_eq!(lab.run(&again), Exit::Incomplete);
    assert!(again.jobs.borrow().is_empty());
    let retry = Lab { options: RunOptions { retry_failed: true, ..lab.options.clone() }, ..lab };
    assert_eq!(retry.run(&again), Exit::Ok);
    assert_eq!(again.sent.borrow().len(), 4);
}

/// The sizes of the jobs of a run in which processes of all three cells die early, and its failures.
fn early(numbers: std::ops::Range<usize>, signal: i32) -> (Vec<usize>, Vec<String>) {
    let lab = Lab::new(AXES, MEASURE);
    let fault = |method| (method, Fault::Early(numbers.clone(), signal));
    let engine = MockEngine::with(&["dense", "window", "topk"].map(fault));
    assert_eq!(lab.run(&engine), Exit::Incomplete);
    let sizes = engine.jobs.borrow().iter().map(|j| j.cells.len()).collect();
    (sizes, lab.failures())
}

#[test]
fn workers_that_somebody_ends_do_not_condemn_the_cells_that_follow() {
    // The worker of the cohort is ended before the cache stands, then that of its first cell, and of its second.
    for signal in [1, 2, 15] {
        let (sizes, failures) = early(0..3, signal);
        assert_eq!(sizes, [3, 1, 1, 1, 3]);
        let said = |method: &str| format!("1024 {method}: error: killed by signal {signal}");
        assert_eq!(failures, [said("dense"), said("window")]);
    }
    // Twice dead of themselves: the third cell would die the same way, another context need not.
    let (sizes, failures) = early(0..2, 9);
    assert_eq!((sizes.as_slice(), failures.len()), (&[3, 1, 3][..], 3));
    assert!(failures.iter().all(|f| f.starts_with("1024") && f.ends_with("oom: killed by signal 9")));
}

#[test]
fn one_early_death_after_a_cache_that_stood_is_not_the_end() {
    let lab = Lab::new(AXES, MEASURE);
    let engine = MockEngine::with(&[("window", Fault::Dies(1, 9)), ("dense", Fault::Early(1..2, 9))]);
    assert_eq!(lab.run(&engine), Exit::Incomplete);
    let sizes: Vec<usize> = engine.jobs.borrow().iter().map(|j| j.cells.len()).collect();
    assert_eq!(sizes, [3, 1, 1, 1, 3, 1, 1, 1]);
    let of = |name: &str| lab.states().into_iter().find(|(n, _)| n == name).unwrap().1.end;
    assert_eq!((of("1024 dense"), of("1024 topk")), (Some(Status::Oom), Some(Status::Ok)));
    assert_eq!(of("2048 dense"), Some(Status::Ok));
}

#[test]
fn a_hanging_cell_times_out() {
    let lab = Lab::new(AXES, &format!("{MEASURE}\n[limits]\ncell_timeout = \"90s\""));
    assert_eq!(lab.run(&MockEngine::with(&[("topk", Fault::Hangs(0))])), Exit::Incomplete);
    assert_eq!(lab.failures()[0], "1024 topk: timeout: no progress for 90 s (limits.cell_timeout)");
    assert_eq!(lab.failures().len(), 2);
    assert_eq!(lab.states().iter().filter(|(_, s)| s.end == Some(Status::Ok)).count(), 4);
}

#[test]
fn a_slow_cell_that_goes_on_and_on_is_over_its_time_and_the_others_are_measured() {
    let lab = Lab::new(AXES, &format!("{MEASURE}\n[limits]\ncell_timeout = \"90s\""));
    let engine = MockEngine::with(&[("topk", Fault::Slow(40_000_000_000))]);
    assert_eq!(lab.run(&engine), Exit::Incomplete);
    assert_eq!(lab.failures().len(), 2);
    let first = &lab.failures()[0];
    assert!(
        first.starts_with("1024 topk: timeout: ") && first.contains("more than 90 s (limits.cell_timeout)"),
        "{first}"
    );
    for (name, state) in lab.states() {
        let slow = name.contains("topk");
        assert_eq!(state.end, Some(if slow { Status::Timeout } else { Status::Ok }), "{name}");
        assert!(!slow || state.reps.len() < 3, "{name} was measured to its end");
    }
    // The culprit's worker, and one for the two others together.
    assert_eq!(engine.jobs.borrow().iter().map(|j| j.cells.len()).collect::<Vec<_>>(), [3, 2, 3, 2]);
}

#[test]
fn a_cell_that_the_engine_fails_is_a_row() {
    let lab = Lab::new(AXES, MEASURE);
    let engine = MockEngine::with(&[("dense", Fault::Fails(1)), ("topk", Fault::Short)]);
    assert_eq!(lab.run(&engine), Exit::Incomplete);
    assert_eq!(engine.jobs.borrow().len(), 2, "nothing broke, nothing is retried");
    assert_eq!(
        lab.failures(),
        [
            "1024 topk: error: repetition 0 timed 1 of 2 tokens",
            "1024 dense: error: token 3 is NaN",
            "2048 topk: error: repetition 0 timed 1 of 2 tokens",
            "2048 dense: error: token 3 is NaN",
        ]
    );
}

#[test]
fn a_load_failure_in_the_middle_does_not_end_the_sweep() {
    let axes = AXES.replace("[\"bf16\"]", "[\"bf16\", \"int8\"]");
    let rest = format!(
        "{MEASURE}\n[[exclude]]\nmethod = [\"topk\"]\ncontext = [2048]\n[[exclude]]\nmethod = [\"topk\"]\nkv_dtype = [\"int8\"]"
    );
    let lab = Lab::new(&axes, &rest);
    let engine = MockEngine::with(&[("topk", Fault::Load(Status::Error))]);
    assert_eq!(lab.run(&engine), Exit::Incomplete);
    assert_eq!(engine.jobs.borrow().len(), 4, "a request that fails as a whole is not repeated");
    let failures = lab.failures();
    assert_eq!(failures.len(), 3, "{failures:?}");
    assert!(
        failures.iter().all(|f| f.starts_with("1024") && f.ends_with("error: the model cannot be loaded"))
    );
    assert_eq!(lab.states().iter().filter(|(_, s)| s.end == Some(Status::Ok)).count(), 6);
}

#[test]
fn fail_fast_stops_after_the_cohort() {
    let mut lab = Lab::new(AXES, MEASURE);
    lab.options.fail_fast = true;
    let engine = MockEngine::with(&[("dense", Fault::Fails(0))]);
    assert_eq!(lab.run(&engine), Exit::Incomplete);
    assert_eq!(engine.jobs.borrow().len(), 1);
}

#[test]
fn violated_limits_are_exit_four() {
    let verify = format!("{MEASURE}\n[verify]\ncosine_min = 0.99\nmethods = [\"window\"]");
    let bad = |m: &str| MockEngine::with(&[(m, Fault::Cosine(0.5))]);
    let lab = Lab::new(AXES, &verify);
    assert_eq!(lab.run(&bad("window")), Exit::VerifyFailed);
    assert_eq!(lab.run(&MockEngine::default()), Exit::VerifyFailed, "a resumed run says so too");
    assert_eq!(Lab::new(AXES, &verify).run(&bad("topk")), Exit::Ok, "topk is not under the limit");
    let stop = Lab::new(AXES, &format!("{verify}\non_fail = \"stop\""));
    let engine = bad("window");
    assert_eq!(stop.run(&engine), Exit::VerifyFailed);
    assert_eq!(engine.jobs.borrow().len(), 1);
    let quality = Quality { cosine_min: Some(f64::NAN), ..Quality::default() };
    let verify = lab.experiment.verify.as_ref().unwrap();
    assert!(crate::analyse::verify::verify_violation(verify, "window", Some(&quality)).is_some());
}

#[test]
fn what_was_read_and_the_spread_of_seeds_reach_the_rows() {
    let axes = AXES.replace("[\"dense\", \"window\", \"topk\"]", "[\"dense\", \"draw:seed=3\"]");
    let lab = Lab::new(&axes, &format!("{MEASURE}\nseeds = 4"));
    let engine = MockEngine::default();
    assert_eq!(lab.run(&engine), Exit::Ok);
    assert!(engine.jobs.borrow().iter().all(|job| job.measure.seeds == 4));
    let records = crate::analyse::summarise::summarise(&lab.plan(), &Machine::default(), &lab.lines());
    for r in &records {
        assert_eq!((r.density_read, r.captured_mass_p50, r.reads_samples), (Some(0.25), Some(0.75), Some(8)));
        assert_eq!((r.index_build_ns, r.index_bytes_stored_per_token), (Some(5), Some(0.0)));
        let spread = (r.seeds, r.rel_l2_seed_mean, r.rel_l2_seed_sd);
        let expected =
            if r.method == "draw" { (Some(4), Some(0.5), Some(0.125)) } else { (None, None, None) };
        assert_eq!(spread, expected, "{}", r.method);
    }
}

#[test]
fn skipped_cells_are_not_failures() {
    let lab = Lab::new(&AXES.replace("[1]", "[1, 64]"), MEASURE);
    assert_eq!(lab.run(&MockEngine::default()), Exit::Ok);
    assert_eq!(lab.plan().cells.iter().filter(|c| c.skip.is_some()).count(), 6);
}

#[test]
fn another_plan_commit_or_machine_is_refused() {
    let lab = Lab::new(AXES, MEASURE);
    lab.run(&MockEngine::default());
    let before = std::fs::read(lab.out().join("samples.jsonl")).unwrap();
    let refused = |change: &dyn Fn(&mut RunOptions), word: &str| {
        let mut options = lab.options.clone();
        change(&mut options);
        let engine = MockEngine::default();
        let run = measure(&engine, &capabilities(), &lab.experiment, &lab.out(), &options, &mut Vec::new());
        let error = run.unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        let text = error.to_string();
        assert!(text.contains(&format!("its {word} is")) && text.contains("--fresh"), "{text}");
        assert!(engine.jobs.borrow().is_empty());
        assert_eq!(std::fs::read(lab.out().join("samples.jsonl")).unwrap(), before);
    };
    refused(&|o| o.plan.reps = Some(4), "plan");
    refused(&|o| o.machine.as_mut().unwrap().toolchain.git_sha = "b".repeat(40), "commit");
    refused(&|o| o.machine.as_mut().unwrap().machine_id = "other".into(), "machine");
}

#[test]
fn fresh_removes_only_what_longbit_wrote() {
    let mut lab = Lab::new(AXES, MEASURE);
    lab.run(&MockEngine::default());
    let mine = lab.out().join("notes.txt");
    std::fs::write(&mine, "keep").unwrap();
    std::fs::create_dir(lab.out().join("plots")).unwrap();
    std::fs::write(lab.out().join("plots/old.svg"), "x").unwrap();
    lab.options.fresh = true;
    lab.options.plan.reps = Some(2);
    let engine = MockEngine::default();
    assert_eq!(lab.run(&engine), Exit::Ok);
    assert_eq!((engine.sent.borrow().len(), lab.plan().measure.reps), (12, 2));
    assert!(mine.exists() && !lab.out().join("plots").exists());
}

#[test]
fn another_instruction_set_is_refused_by_name() {
    let lab = Lab::new(AXES, MEASURE);
    lab.run(&MockEngine::default());
    let other = Capabilities { isa: "avx2".into(), ..capabilities() };
    let run =
        measure(&MockEngine::default(), &other, &lab.experiment, &lab.out(), &lab.options, &mut Vec::new());
    let text = run.unwrap_err().to_string();
    assert!(text.contains("its instruction set is scalar, this one is avx2"), "{text}");
}

#[test]
fn changed_sources_finish_nothing_but_may_write_out() {
    let mut lab = Lab::new(AXES, MEASURE);
    let engine = MockEngine::with(&[("window", Fault::Fails(1))]);
    lab.run(&engine);
    lab.options.machine.as_mut().unwrap().toolchain.git_dirty = Some(true);
    assert_eq!(lab.run(&MockEngine::default()), Exit::Incomplete, "every cell has its end");
    lab.options.retry_failed = true;
    let text = lab.try_run(&MockEngine::default()).unwrap_err().to_string();
    assert!(text.contains("those of this program are changed") && text.contains("--fresh"), "{text}");
}

#[test]
fn a_larger_limit_says_that_skipped_cells_stay_skipped() {
    let mut lab = Lab::new(AXES, MEASURE);
    lab.run(&MockEngine::default());
    let costs: BTreeSet<u64> = lab.plan().cells.iter().map(|c| c.predicted.rss_bytes).collect();
    lab.options.fresh = true;
    lab.options.plan.max_rss = Some(MemoryLimit::Bytes(*costs.first().unwrap()));
    lab.run(&MockEngine::default());
    assert!(lab.plan().cells.iter().any(|c| c.skip.is_some()));
    lab.options.fresh = false;
    lab.options.quiet = false;
    lab.options.plan.max_rss = Some(MemoryLimit::Bytes(1 << 40));
    let mut err = Vec::new();
    let engine = MockEngine::default();
    measure(&engine, &capabilities(), &lab.experiment, &lab.out(), &lab.options, &mut err).unwrap();
    let text = String::from_utf8(err).unwrap();
    assert!(text.contains("stay skipped") && text.contains("--fresh"), "{text}");
}

#[test]
fn fresh_removes_nothing_before_the_new_run_is_possible() {
    let mut lab = Lab::new(AXES, &format!("{MEASURE}\n[limits]\non_exceed = \"refuse\""));
    lab.run(&MockEngine::default());
    let before = std::fs::read(lab.out().join("samples.jsonl")).unwrap();
    lab.options.fresh = true;
    lab.options.plan.max_rss = Some(crate::spec::MemoryLimit::Bytes(1));
    let error = lab.try_run(&MockEngine::default()).unwrap_err();
    assert!(error.to_string().contains("exceeds the limit"), "{error}");
    assert_eq!(std::fs::read(lab.out().join("samples.jsonl")).unwrap(), before);
    assert_eq!(lab.plan().cells.len(), 6);
}

#[test]
fn fresh_goes_on_where_removing_was_cut_short() {
    let mut lab = Lab::new(AXES, MEASURE);
    lab.run(&MockEngine::default());
    std::fs::remove_file(lab.out().join("plan.json")).unwrap();
    let error = lab.try_run(&MockEngine::default()).unwrap_err().to_string();
    assert!(error.contains("samples.jsonl") && error.contains("--fresh"), "{error}");
    lab.options.fresh = true;
    let engine = MockEngine::default();
    assert_eq!(lab.run(&engine), Exit::Ok);
    assert_eq!(engine.sent.borrow().len(), 18, "old samples do not count");
    std::fs::remove_file(lab.out().join("plan.json")).unwrap();
    std::fs::write(lab.out().join("thesis.tex"), "x").unwrap();
    assert!(lab.try_run(&MockEngine::default()).unwrap_err().to_string().contains("thesis.tex"));
    assert!(lab.out().join("samples.jsonl").exists());
}

#[test]
fn a_foreign_directory_and_a_second_writer_are_refused() {
    let lab = Lab::new(AXES, MEASURE);
    std::fs::create_dir(lab.out()).unwrap();
    std::fs::write(lab.out().join("thesis.tex"), "x").unwrap();
    let error = lab.try_run(&MockEngine::default()).unwrap_err();
    assert!(error.to_string().contains("thesis.tex"), "{error}");
    std::fs::remove_file(lab.out().join("thesis.tex")).unwrap();
    // What a start that was cut short leaves behind is no obstacle.
    std::fs::write(lab.out().join("machine.json"), "{}").unwrap();
    lab.run(&MockEngine::default());
    let log = std::fs::File::open(lab.out().join("run.log")).unwrap();
    log.lock().unwrap();
    assert!(lab.try_run(&MockEngine::default()).unwrap_err().to_string().contains("another run is writing"));
}

#[test]
fn unwritable_results_are_an_error_with_path_and_cause() {
    let mut lab = Lab::new(AXES, MEASURE);
    lab.options.out = Some("/dev/null/out".into());
    let dir = Path::new("/dev/null/out");
    let error =
        measure(&MockEngine::default(), &capabilities(), &lab.experiment, dir, &lab.options, &mut Vec::new());
    let error = error.unwrap_err();
    assert_eq!(error.exit(), Exit::Tool);
    assert!(error.to_string().contains("/dev/null/out"), "{error}");
}

#[test]
fn mistakes_in_any_file_stop_everything_first() {
    let lab = Lab::new(AXES, MEASURE);
    let bad = lab.dir.path().join("bad.toml");
    std::fs::write(&bad, "schema = 1\nmodle = 3\n").unwrap();
    let mut options = lab.options.clone();
    options.files.push(bad);
    options.out = Some(lab.out());
    let engine = MockEngine::default();
    let error = run(&engine, &options, &mut Vec::new(), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("bad.toml:2 (modle)"), "{error}");
    assert!(!lab.out().exists() && engine.jobs.borrow().is_empty());
    options.files = vec![lab.options.files[0].clone(); 2];
    assert!(run(&engine, &options, &mut Vec::new(), &mut Vec::new()).is_err());
}

#[test]
fn progress_is_one_line_a_cohort() {
    let mut lab = Lab::new(AXES, MEASURE);
    lab.options.quiet = false;
    lab.options.no_progress = true;
    let mut err = Vec::new();
    let engine = MockEngine::default();
    measure(&engine, &capabilities(), &lab.experiment, &lab.out(), &lab.options, &mut err).unwrap();
    let text = String::from_utf8(err).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(
        lines[0].starts_with("[1/2] context=1024 kv=bf16: 3 of 3 cells measured, last 1000.00 tok/s")
            || lines[0].contains("last 999.00"),
        "{text}"
    );
}

/// The whole way: two experiments, one of which cannot be, with everything that is derived from the log.
#[test]
fn run_prints_the_table_and_writes_what_it_names() {
    let lab = Lab::new(AXES, MEASURE);
    let text = std::fs::read_to_string(&lab.options.files[0]).unwrap();
    let bad = text
        .replace("name = \"x\"", "name = \"bad\"")
        .replace("\"dense\", \"window\", \"topk\"", "\"window:sinks=999\"");
    let file = lab.dir.path().join("bad.toml");
    std::fs::write(&file, bad).unwrap();
    let mut options = RunOptions { out: Some(lab.out()), ..lab.options.clone() };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    assert_eq!(run(&MockEngine::default(), &options, &mut out, &mut err).unwrap(), Exit::Ok);
    let text = String::from_utf8(out).unwrap();
    let wrote: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("wrote ")).collect();
    assert!(
        wrote.iter().any(|f| f.ends_with("cells.csv")) && wrote.iter().all(|f| Path::new(f).exists()),
        "{text}"
    );
    assert!(err.is_empty());
    options.files.insert(0, file);
    options.out = Some(lab.dir.path().join("both"));
    let exit = run(&MockEngine::default(), &options, &mut Vec::new(), &mut err).unwrap();
    assert_eq!(exit, Exit::Usage);
    assert!(String::from_utf8(err).unwrap().contains("no cell can be measured"));
    assert!(
        lab.dir.path().join("both/main-x/cells.csv").exists()
            && !lab.dir.path().join("both/main-bad").exists()
    );
}

#[test]
fn batches_are_measured_in_passes_and_not_compared() {
    let axes = "context = 1024\nthreads = 1\nbatch = [1, 2, 32]\nkv_dtype = \"bf16\"\nmethod = \"dense\"";
    let measure = MEASURE.replace("gen_tokens = 2", "gen_tokens = 4\nwarmup_tokens = 3");
    let lab = Lab::new(axes, &format!("{measure}\n[verify]\ncosine_min = 0.5"));
    let engine = MockEngine::default();
    assert_eq!(lab.run(&engine), Exit::Ok);
    let quality: Vec<bool> = lab.states().iter().map(|(_, s)| s.quality).collect();
    assert_eq!(quality, [true, false, false]);
    assert!(lab.states().iter().all(|(_, s)| s.end == Some(Status::Ok)));
    let records = emit::write_all(&lab.out()).unwrap().records;
    let figures = |r: &crate::record::Record| (r.batch_tokens(), r.tokens_timed, r.tokens_warmup);
    let found: Vec<_> = records.iter().map(figures).collect();
    // Three repetitions of 4 passes of 1, of 2 passes of 2, of 1 pass of 32; warm-ups likewise.
    assert_eq!(found, [(1, 12, 9), (2, 12, 12), (32, 96, 96)]);
    assert!(records.iter().all(|r| r.status == Status::Ok), "nothing is verified that is not compared");
    // A pass takes 1 ms a token.
    assert!(records.iter().all(|r| (r.decode_tok_s.unwrap() - 1000.0).abs() < 1.0), "{records:?}");
    assert!(records[2].kv_bytes_read_per_token.is_none() && records[2].achieved_gb_s.is_none());
    let summary = std::fs::read_to_string(lab.out().join("summary.md")).unwrap();
    assert!(summary.contains("| batch |") && summary.contains("](plots/batch.svg)"), "{summary}");
    assert!(summary.contains("A pass over 32 tokens at 1k tokens of context gives "), "{summary}");
}

#[test]
fn a_matrix_is_measured_without_a_cache() {
    let text = "schema = 1\n[experiment]\nname = \"x\"\nquestion = \"q\"\n[model]\npreset = \"matrix:8x8\"\n[workload]\nname = \"matrix\"\n[axes]\nthreads = [1, 2]\nbatch = [1, 64]\n[measure]\nreps = 2\ngen_tokens = 64\nprobe = \"1MiB\"";
    let mut lab = Lab::new(AXES, MEASURE);
    std::fs::write(&lab.options.files[0], text).unwrap();
    lab.experiment = spec::load(&lab.options.files[0], &capabilities()).unwrap();
    let engine = MockEngine::default();
    assert_eq!(lab.run(&engine), Exit::Ok);
    assert_eq!(engine.jobs.borrow().len(), 1, "one worker serves all threads and batches");
    assert!(engine.asked.borrow().iter().all(|e| e.quality_steps == 0 && e.method == "-" && e.context == 0));
    let written = emit::write_all(&lab.out()).unwrap();
    assert!(written.records.iter().all(|r| r.kv_dtype == "-" && r.method == "-" && r.rel_l2_p50.is_none()));
    assert!(
        written.sentence.starts_with("The product of matrix:8x8 with 2 threads takes "),
        "{}",
        written.sentence
    );
    let summary = std::fs::read_to_string(lab.out().join("summary.md")).unwrap();
    assert!(summary.contains("plots/matrix-threads.svg") && !summary.contains("| context |"), "{summary}");
}
