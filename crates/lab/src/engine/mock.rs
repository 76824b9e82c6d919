//! An engine without a model, for tests: it answers at once and fails where it is told to.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use longbit_protocol::{
    Capabilities, Estimate, EstimateRequest, Event, Fill, Job, KvDtypeInfo, MethodInfo, Outcome, ParamInfo,
    ParamKind, PresetInfo, Probe, Quality, Reads, Ready, Sample, SeedSpread, Status, Traffic, WorkloadInfo,
};

use super::{Engine, Next, Running};
use crate::Result;

/// What goes wrong with a method (bare name).
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The engine reports the cell as failed at this repetition.
    Fails(u32),
    /// It says nothing any more from this repetition.
    Hangs(u32),
    /// The process is killed by this signal at this repetition.
    Dies(u32, i32),
    /// The request fails before the cache stands, whenever this method is asked for.
    Load(Status),
    /// The processes of these numbers, counted from 0 over all that were started, are killed by this signal before the cache
    /// stands, if they serve the method.
    Early(Range<usize>, i32),
    /// The samples have fewer tokens than asked for.
    Short,
    /// A token takes this many nanoseconds.
    Slow(u64),
    /// The cosine is this.
    Cosine(f64),
}

/// See the module.
#[derive(Debug, Default)]
pub struct MockEngine {
    /// What goes wrong: `(method, fault)`.
    pub faults: Vec<(String, Fault)>,
    /// The configurations whose bytes were asked for.
    pub asked: RefCell<Vec<EstimateRequest>>,
    /// The jobs that were started.
    pub jobs: RefCell<Vec<Job>>,
    /// The repetitions that were sent: `(cell, rep)`.
    pub sent: Rc<RefCell<Vec<(String, u32)>>>,
}

/// What [`MockEngine`] offers.
pub fn capabilities() -> Capabilities {
    let int = |name: &str, summary: &str, min, max, default: &str| ParamInfo {
        name: name.into(),
        summary: summary.into(),
        kind: ParamKind::Int { min, max },
        default: default.into(),
        setting: false,
    };
    let method = |name: &str, params| MethodInfo { name: name.into(), summary: format!("{name}."), params };
    Capabilities {
        engine: "mock".into(),
        version: "1".into(),
        isa: "scalar".into(),
        presets: vec![
            PresetInfo {
                name: "tiny".into(),
                summary: "A toy.".into(),
                parameters: 1_000_000,
                shape: vec![("hidden".into(), 64)],
            },
            PresetInfo { name: "matrix:ROWSxCOLUMNS".into(), ..PresetInfo::default() },
        ],
        kv_dtypes: ["f32", "bf16", "int8"]
            .into_iter()
            .zip([32.0, 16.0, 8.25])
            .map(|(name, bits)| KvDtypeInfo { name: name.into(), summary: name.into(), bits_per_value: bits })
            .collect(),
        methods: vec![
            method("dense", vec![]),
            method(
                "window",
                vec![
                    int("sinks", "first tokens read", 0, 1024, "4"),
                    int("window", "recent tokens read", 1, 1 << 20, "1024"),
                ],
            ),
            method(
                "topk",
                vec![ParamInfo {
                    name: "share".into(),
                    summary: "share of the tokens read".into(),
                    kind: ParamKind::Float { min: 0.0, max: 1.0 },
                    default: "0.1".into(),
                    setting: false,
                }],
            ),
            method("draw", vec![int("seed", "of what is drawn", 0, 1 << 20, "0")]),
            method("keep", vec![]),
        ],
        workloads: vec![
            WorkloadInfo {
                name: "mix".into(),
                summary: "A mix.".into(),
                params: vec![
                    int("needles", "planted", 0, 100, "8"),
                    ParamInfo {
                        name: "skew".into(),
                        summary: "of the tail".into(),
                        kind: ParamKind::Float { min: 0.0, max: 2.0 },
                        default: "0.5".into(),
                        setting: false,
                    },
                ],
                ..WorkloadInfo::default()
            },
            WorkloadInfo {
                name: "text".into(),
                summary: "A text.".into(),
                reads_text: true,
                ..WorkloadInfo::default()
            },
            WorkloadInfo {
                name: "file".into(),
                summary: "A trace.".into(),
                replays: true,
                ..WorkloadInfo::default()
            },
            WorkloadInfo {
                name: "matrix".into(),
                summary: "A matrix.".into(),
                one_matrix: true,
                ..WorkloadInfo::default()
            },
        ],
        heads: vec!["bf16".into(), "int8".into()],
        i2s: vec!["x86".into(), "arm".into()],
        activations: vec!["relu2".into(), "silu".into()],
        weights: ["2bit", "1.6bit"].map(String::from).into(),
    }
}

impl MockEngine {
    /// With faults.
    pub fn with(faults: &[(&str, Fault)]) -> Self {
        let faults = faults.iter().map(|(m, f)| ((*m).to_owned(), f.clone())).collect();
        MockEngine { faults, ..MockEngine::default() }
    }

    fn fault(&self, method: &str) -> Option<Fault> {
        let name = method.split(':').next().unwrap_or_default();
        self.faults.iter().find(|(m, _)| m == name).map(|(_, f)| f.clone())
    }
}

impl Engine for MockEngine {
    fn capabilities(&self) -> Result<Capabilities> {
        Ok(capabilities())
    }

    fn estimate(&self, entries: &[EstimateRequest]) -> Result<Vec<Estimate>> {
        self.asked.borrow_mut().extend_from_slice(entries);
        let one = |e: &EstimateRequest| Estimate {
            weight_bytes: 1_000_000,
            cache_bytes: 1_000_000 * e.context as u64,
            // Half a cache, and a tenth of one.
            index_bytes: if e.method.starts_with("draw") { 500_000 * e.context as u64 } else { 0 },
            forked_bytes: if e.method.starts_with("keep") { 100_000 * e.context as u64 } else { 0 },
            scratch_bytes: 1_000,
            weight_bytes_per_token: 1_000_000,
            kv_bytes_per_token: 1_000 * e.context as u64,
            decide_bytes_per_token: 0,
            fill_bytes: 1_000_000 * e.context as u64,
            prefill_macs: if e.fill == Fill::Prefill { 1_000_000_000 * e.context as u64 } else { 0 },
            pass_macs: if e.batch > 1 { 1_000_000_000 * e.batch as u64 } else { 0 },
            trained_positions: 1000,
            error: e.method.contains("sinks=999").then(|| "sinks exceed the context".to_owned()),
        };
        Ok(entries.iter().map(one).collect())
    }

    fn probe(&self, threads: &[usize], _bytes: u64) -> Result<Vec<Probe>> {
        Ok(threads.iter().map(|&threads| Probe { threads, gb_s: 10.0 * threads as f64, round: 0 }).collect())
    }

    fn start(&self, job: &Job) -> Result<Box<dyn Running>> {
        self.jobs.borrow_mut().push(job.clone());
        let number = self.jobs.borrow().len() - 1;
        let mut next = VecDeque::new();
        let early = job.cells.iter().find_map(|c| match self.fault(&c.method) {
            Some(Fault::Early(numbers, signal)) if numbers.contains(&number) => Some(signal),
            _ => None,
        });
        let load = job.cells.iter().find_map(|c| match self.fault(&c.method) {
            Some(Fault::Load(status)) => Some(status),
            _ => None,
        });
        if let Some(status) = load {
            next.push_back(Next::Event(Event::Fatal { status, error: "the model cannot be loaded".into() }));
        } else if let Some(signal) = early {
            next.push_back(Next::Event(Event::Phase { what: "filling".into(), done: 1, total: 2 }));
            next.push_back(Next::Exited { code: None, signal: Some(signal), stderr_tail: String::new() });
        } else {
            self.script(job, &mut next);
        }
        Ok(Box::new(MockRun { next, sent: Rc::clone(&self.sent) }))
    }
}

impl MockEngine {
    fn script(&self, job: &Job, next: &mut VecDeque<Next>) {
        let event = Next::Event;
        let exited = |signal| Next::Exited { code: None, signal: Some(signal), stderr_tail: String::new() };
        next.push_back(event(Event::Phase { what: "filling".into(), done: 1, total: 2 }));
        let ready = Ready { engine: "mock".into(), engine_version: "1".into(), ..Ready::default() };
        next.push_back(event(Event::Ready(Box::new(ready))));
        let mut gone: Vec<&str> = Vec::new();
        for round in 0..job.measure.reps {
            let mut threads: Vec<usize> = job.cells.iter().map(|c| c.threads).collect();
            threads.sort_unstable();
            threads.dedup();
            for threads in threads {
                next.push_back(event(Event::Probe(Probe { threads, gb_s: 9.5, round })));
            }
            for (slot, cell) in job.cells.iter().enumerate() {
                if round < cell.first_rep || gone.contains(&cell.id.as_str()) {
                    continue;
                }
                let fault = self.fault(&cell.method);
                let (mut tokens, mut ns) =
                    (job.measure.passes(cell.batch).1, 1_000_000 * cell.batch as u64 + u64::from(round));
                match fault {
                    Some(Fault::Fails(rep)) if rep == round => {
                        let outcome = Outcome {
                            cell: cell.id.clone(),
                            status: Status::Error,
                            error: "token 3 is NaN".into(),
                        };
                        next.push_back(event(Event::Failed(outcome)));
                        gone.push(&cell.id);
                        continue;
                    }
                    Some(Fault::Hangs(rep)) if rep == round => return next.push_back(Next::TimedOut),
                    Some(Fault::Dies(rep, signal)) if rep == round => return next.push_back(exited(signal)),
                    Some(Fault::Short) => tokens -= 1,
                    Some(Fault::Slow(slow)) => ns = slow,
                    _ => {}
                }
                next.push_back(event(Event::Sample(Box::new(Sample {
                    cell: cell.id.clone(),
                    rep: round,
                    round,
                    slot: slot as u32,
                    t0: "2026-01-31T12:00:00Z".into(),
                    tok_ns: vec![ns; tokens],
                    traffic: Traffic { kv_bytes: 1000, index_bytes: 0, rows: 10 },
                    index_build_ns: Some(5),
                    ..Sample::default()
                }))));
            }
        }
        for cell in &job.cells {
            if cell.quality_done
                || cell.batch > 1
                || cell.method == "-"
                || job.measure.quality_steps == 0
                || gone.contains(&cell.id.as_str())
            {
                continue;
            }
            let cosine = match self.fault(&cell.method) {
                Some(Fault::Cosine(cosine)) => cosine,
                _ => 1.0,
            };
            if job.text.is_some() {
                next.push_back(event(Event::Quality(Box::new(Quality {
                    cell: cell.id.clone(),
                    steps: job.measure.quality_steps,
                    outputs: u64::from(job.measure.quality_steps),
                    top1_agreement: Some(cosine),
                    kl_nats: Some((1.0 - cosine) / 2.0),
                    kl_nats_max: Some(1.0 - cosine),
                    ..Quality::default()
                }))));
                continue;
            }
            next.push_back(event(Event::Quality(Box::new(Quality {
                cell: cell.id.clone(),
                steps: job.measure.quality_steps,
                outputs: 8,
                cosine_mean: Some(cosine),
                cosine_min: Some(cosine),
                density_read: Some(0.25),
                reads: Some(Reads { samples: 8, captured_mass_p50: 0.75, ..Reads::default() }),
                seeds: (job.measure.seeds > 1 && cell.method.contains("seed=")).then_some(SeedSpread {
                    count: job.measure.seeds,
                    rel_l2_mean: 0.5,
                    rel_l2_sd: 0.125,
                }),
                ..Quality::default()
            }))));
        }
        next.push_back(event(Event::End));
    }
}

struct MockRun {
    next: VecDeque<Next>,
    sent: Rc<RefCell<Vec<(String, u32)>>>,
}

impl Running for MockRun {
    fn next(&mut self, _timeout: Duration) -> Next {
        let next = self.next.pop_front();
        if let Some(Next::Event(Event::Sample(sample))) = &next {
            self.sent.borrow_mut().push((sample.cell.clone(), sample.rep));
        }
        next.unwrap_or(Next::Exited { code: Some(0), signal: None, stderr_tail: String::new() })
    }

    fn kill(&mut self) {
        self.next.clear();
    }
}
