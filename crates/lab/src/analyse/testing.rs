//! A synthetic run for the tests: plan, machine and log of a small sweep with plausible numbers, seeded.

use std::collections::BTreeMap;

use longbit_protocol::{
    Machine, Measure, ModelSpec, Outcome, Probe, Quality, Reads, Ready, Sample, SeedSpread, Status,
    Toolchain, Traffic,
};

use super::interval::SplitMix64;
use crate::plan::{ExperimentMeta, Gate, Plan, PlannedCell, Predicted, RunLimits, SCHEMA};
use crate::record::Record;
use crate::run::store::Line;

pub(crate) const CONTEXTS: [usize; 7] = [2048, 4096, 8192, 16384, 32768, 65536, 98304];
const WEIGHTS: u64 = 1_178_000_000;
const ROW: u64 = 76_800;

/// What to build: axes and how fast the machine is.
pub(crate) struct Sweep {
    pub(crate) contexts: Vec<usize>,
    pub(crate) kv_dtypes: Vec<&'static str>,
    pub(crate) methods: Vec<(&'static str, &'static [(&'static str, &'static str)])>,
    pub(crate) threads: Vec<usize>,
    pub(crate) seed: u64,
    /// Quality is that of logits.
    pub(crate) text: bool,
}

impl Default for Sweep {
    fn default() -> Self {
        Sweep {
            contexts: CONTEXTS.to_vec(),
            kv_dtypes: vec!["bf16", "int8"],
            methods: vec![
                ("dense", &[]),
                ("window", &[("sinks", "4"), ("window", "1024")]),
                ("quest", &[("budget", "2048"), ("page", "16")]),
            ],
            threads: vec![2],
            seed: 1,
            text: false,
        }
    }
}

/// Bytes of a row relative to bf16, and the error that the format alone causes.
fn format_of(kv: &str) -> (f64, f64) {
    match kv {
        "f32" => (2.0, 0.0),
        "int8" => (0.53, 0.006),
        "int4" => (0.28, 0.08),
        _ => (1.0, 0.0021),
    }
}

/// Tokens read and error at a context.
fn behaviour(method: &str, params: &BTreeMap<String, String>, context: usize) -> (u64, f64) {
    let get = |k: &str, d: usize| params.get(k).and_then(|v| v.parse().ok()).unwrap_or(d);
    let far = (context as f64 / 2048.0).log2();
    match method {
        "window" => (context.min(get("window", 1024) + 4) as u64, 0.25 + 0.09 * far),
        "quest" => (context.min(get("budget", 1024)) as u64, 0.02 + 0.02 * far),
        "h2o" => (context.min(512) as u64, 0.1 + 0.05 * far),
        _ => (context as u64, 0.0),
    }
}

impl Sweep {
    pub(crate) fn build(&self) -> (Plan, Machine, Vec<Line>) {
        let measure = Measure {
            reps: 6,
            gen_tokens: 64,
            warmup_tokens: 8,
            quality_steps: 4,
            seeds: 1,
            pin: true,
            probe_bytes: 1 << 30,
        };
        let model =
            ModelSpec { preset: "bitnet-2b-4t".into(), head: "bf16".into(), seed: 1, ..ModelSpec::default() };
        let (mut cells, mut cohorts) = (Vec::new(), Vec::new());
        for &context in &self.contexts {
            for kv in &self.kv_dtypes {
                let mut cohort = Vec::new();
                for (method, params) in &self.methods {
                    for &threads in &self.threads {
                        let params: BTreeMap<String, String> =
                            params.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
                        let string = crate::plan::method_string(method, &params);
                        let name = format!(
                            "context/long/context={context}/threads={threads}/kv={kv}/method={string}"
                        );
                        let id = format!(
                            "{:016x}",
                            SplitMix64(name.bytes().fold(7, |h, b| h * 31 % 1_000_003 + u64::from(b)))
                                .next_u64()
                        );
                        cohort.push(cells.len());
                        cells.push(PlannedCell {
                            id,
                            name,
                            model: model.clone(),
                            context,
                            threads,
                            batch: 1,
                            kv_dtype: kv.to_string(),
                            method: method.to_string(),
                            method_params: params,
                            workload: if self.text { "text:sha256=0123456789ab" } else { "mix" }.into(),
                            text: None,
                            trace: None,
                            seed: 1,
                            predicted: Predicted { rss_bytes: 3 << 30, ..Predicted::default() },
                            skip: None,
                        });
                    }
                }
                cohorts.push(cohort);
            }
        }
        let plan = Plan {
            schema: SCHEMA,
            experiment: ExperimentMeta {
                group: "context".into(),
                name: "long".into(),
                question: "Which method keeps its 2k speed?".into(),
                analysis: "Dense slows down as the cache outgrows the weights.".into(),
                file: String::new(),
                file_sha256: "ab".repeat(32),
            },
            plan_hash: "0123456789abcdef".into(),
            git_sha: "0123456789abcdef0123456789abcdef01234567".into(),
            git_dirty: Some(false),
            run_id: "20260131T120000Z-0123456-89abcdef".into(),
            created_utc: "2026-01-31T12:00:00Z".into(),
            machine_id: "89abcdef01234567".into(),
            machine_class: "fedcba9876543210".into(),
            engine: "longbit".into(),
            isa: "avx512vnni".into(),
            flags: Vec::new(),
            engine_version: "0.1.0".into(),
            measure,
            min_samples_p99: 299,
            max_drift_pct: 2.0,
            gate: Gate::default(),
            verify: None,
            prefill_limit: None,
            limits: RunLimits { cell_timeout_s: 1800.0, max_rss_bytes: 14 << 30 },
            cells,
            cohorts,
        };
        let machine = Machine {
            machine_id: plan.machine_id.clone(),
            machine_class: plan.machine_class.clone(),
            cpu_model: Some("Example CPU".into()),
            cpus_allowed: 2,
            memory_bytes: 16 << 30,
            os: "Linux 6.1".into(),
            warnings: vec!["no frequency governor is visible".into()],
            probes: vec![Probe { threads: 2, gb_s: 20.5, round: 0 }],
            toolchain: Toolchain {
                git_sha: plan.git_sha.clone(),
                git_dirty: Some(false),
                rustc: "rustc 1.95.0".into(),
                target: "x86_64-unknown-linux-gnu".into(),
                profile: "release".into(),
            },
            ..Machine::default()
        };
        let lines = self.lines(&plan);
        (plan, machine, lines)
    }

    fn lines(&self, plan: &Plan) -> Vec<Line> {
        let mut rng = SplitMix64(self.seed);
        let mut lines = Vec::new();
        for (cohort, members) in plan.cohorts.iter().enumerate() {
            let first = &plan.cells[members[0]];
            let (size, error) = format_of(&first.kv_dtype);
            let stored = (first.context as f64 * ROW as f64 * size) as u64;
            let ready = Ready {
                engine: "longbit".into(),
                engine_version: "0.1.0".into(),
                isa: "avx512-vnni".into(),
                model_sha256: "cd".repeat(32),
                weight_bytes_per_token: WEIGHTS,
                kv_bytes_stored: stored,
                fill_sha256: "ef".repeat(32),
                fill_ns: 1_000_000_000,
                append_ns: Some(12_345),
                ..Ready::default()
            };
            lines.push(Line::Ready { cohort, attempt: 0, ready: Box::new(ready) });
            for (round, gb_s) in [20.0, 40.0, 21.0].into_iter().enumerate() {
                for &threads in &self.threads {
                    let probe = Probe { threads, gb_s: gb_s * threads as f64 / 2.0, round: round as u32 };
                    lines.push(Line::Probe { cohort, attempt: 0, probe });
                }
            }
            for &m in members {
                let cell = &plan.cells[m];
                let (rows, far) = behaviour(&cell.method, &cell.method_params, cell.context);
                let density = rows as f64 / cell.context as f64;
                let draws = cell.method_params.contains_key("seed");
                let p50 = (error * error + far * far).sqrt();
                let cell = cell.id.clone();
                let quality = match self.text {
                    false => Quality {
                        cell,
                        steps: 4,
                        outputs: 4 * 30 * 20,
                        rel_l2_p50: Some(p50),
                        rel_l2_p95: Some(p50 * 2.2),
                        rel_l2_max: Some(p50 * 3.0),
                        cosine_mean: Some(1.0 - p50 * p50 / 2.0),
                        cosine_p5: Some(1.0 - p50 * p50 * 0.8),
                        cosine_min: Some(1.0 - p50 * p50),
                        attention_logit_error_max: Some(20.0 * error),
                        density_read: Some(density),
                        reads: Some(Reads {
                            samples: 4 * 30 * 20,
                            captured_mass_p50: density.sqrt(),
                            captured_mass_p5: density,
                            tail_mass_error_p50: 1.0 - density.sqrt(),
                            tail_mass_error_p95: 1.0 - density,
                            top_recall_mean: density.cbrt(),
                            top_recall_p5: density.sqrt(),
                            top_density_head: 0.02,
                            top_density_group: 0.05,
                        }),
                        seeds: draws.then_some(SeedSpread {
                            count: 5,
                            rel_l2_mean: p50 * 1.01,
                            rel_l2_sd: p50 * 0.1,
                        }),
                        ..Quality::default()
                    },
                    true => Quality {
                        cell,
                        steps: 64,
                        outputs: 64,
                        top1_agreement: Some(1.0 - p50 / 2.0),
                        kl_nats: Some(p50 * p50),
                        kl_nats_max: Some(6.0 * p50 * p50),
                        logit_cosine_mean: Some(1.0 - p50 * p50 / 2.0),
                        logit_cosine_min: Some(1.0 - p50 * p50),
                        nll_nats: Some(2.5 + p50 * p50),
                        nll_reference_nats: Some(2.5),
                        ..Quality::default()
                    },
                };
                lines.push(Line::Quality { quality: Box::new(quality) });
            }
            for rep in 0..plan.measure.reps {
                for (slot, &m) in members.iter().enumerate() {
                    let cell = &plan.cells[m];
                    let (rows, _) = behaviour(&cell.method, &cell.method_params, cell.context);
                    let kv = (rows as f64 * ROW as f64 * size) as u64;
                    let bytes = (WEIGHTS + kv) as f64 / (9.0 * cell.threads as f64);
                    let shift = 1.0 + 0.004 * rng.unit();
                    let tok_ns = (0..plan.measure.gen_tokens)
                        .map(|_| {
                            let burst = if rng.below(60) == 0 { 0.3 * rng.unit() } else { 0.0 };
                            (bytes * shift * (1.0 + 0.01 * rng.unit() + burst)) as u64
                        })
                        .collect();
                    let tokens = u64::from(plan.measure.gen_tokens);
                    let sample = Sample {
                        cell: cell.id.clone(),
                        rep,
                        round: rep,
                        slot: slot as u32,
                        t0: format!("2026-01-31T12:{rep:02}:{slot:02}Z"),
                        tok_ns,
                        rss_peak_bytes: Some(2 << 30),
                        index_bytes: if cell.method == "quest" { 240 * cell.context as u64 } else { 0 },
                        index_build_ns: Some(1_000_000 + u64::from(cell.method == "quest") * 5_000_000),
                        traffic: Traffic {
                            kv_bytes: kv * tokens,
                            index_bytes: if cell.method == "quest" {
                                240 * cell.context as u64 * tokens
                            } else {
                                0
                            },
                            rows: rows * 30 * 5 * tokens,
                        },
                        ..Sample::default()
                    };
                    lines.push(Line::Sample { cohort, attempt: 0, sample: Box::new(sample) });
                }
            }
            lines.extend(members.iter().map(|&m| Line::Done { cell: plan.cells[m].id.clone(), reps: 6 }));
        }
        lines
    }
}

/// The default sweep.
pub(crate) fn results() -> (Plan, Machine, Vec<Line>) {
    Sweep::default().build()
}

/// Records of the default sweep, with a skipped and a failed cell among them.
pub(crate) fn records() -> Vec<Record> {
    let (plan, machine, lines) = with_gaps();
    super::summarise::summarise(&plan, &machine, &lines)
}

/// The default sweep, its last cell skipped and the one before it failed.
pub(crate) fn with_gaps() -> (Plan, Machine, Vec<Line>) {
    let (mut plan, machine, mut lines) = results();
    let n = plan.cells.len();
    let (skipped, failed) = (plan.cells[n - 1].id.clone(), plan.cells[n - 2].id.clone());
    plan.cells[n - 1].skip = Some("predicted 15.1 GB exceeds the limit 13.8 GB (limits.max_rss)".into());
    if let Some(last) = plan.cohorts.last_mut() {
        last.pop();
    }
    lines.retain(|l| match l {
        Line::Sample { sample, .. } => sample.cell != skipped,
        Line::Quality { quality } => quality.cell != skipped,
        Line::Done { cell, .. } => *cell != skipped && *cell != failed,
        _ => true,
    });
    let error = "worker killed by signal 9 while decoding, memory 13.9 GB".into();
    lines.push(Line::Failed { outcome: Outcome { cell: failed, status: Status::Oom, error } });
    (plan, machine, lines)
}

/// Writes a results directory.
pub(crate) fn write(dir: &std::path::Path, plan: &Plan, machine: &Machine, lines: &[Line]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("plan.json"), serde_json::to_vec(plan).unwrap()).unwrap();
    std::fs::write(dir.join("machine.json"), serde_json::to_vec(machine).unwrap()).unwrap();
    let _ = std::fs::remove_file(dir.join("samples.jsonl"));
    let (mut store, _) = crate::run::store::Store::open(&dir.join("samples.jsonl")).unwrap();
    for line in lines.iter().filter(|l| !matches!(l, Line::Done { .. } | Line::Failed { .. })) {
        store.append(line).unwrap();
    }
    // Closing lines are flushed to the disk one by one: few of them are enough here.
    let text: String = lines
        .iter()
        .filter(|l| matches!(l, Line::Done { .. } | Line::Failed { .. }))
        .map(|l| format!("{{\"v\":1,{}\n", &serde_json::to_string(l).unwrap()[1..]))
        .collect();
    use std::io::Write;
    drop(store);
    let mut file = std::fs::OpenOptions::new().append(true).open(dir.join("samples.jsonl")).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}
