//! What the benches share: the measured read bandwidth that every figure stands beside, and an attention-only model.

#![forbid(unsafe_code)]

use std::sync::Arc;

use criterion::Criterion;
use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::workload::{BLOCK, HeadShape, Workload, WorkloadSpec};
use longbit::{HeadFormat, Model, ModelConfig, Session, SessionOptions, Supplied, preset};
use longbit_sys::{ReadProbe, Team, allowed_cpus};

/// Buffer of the bandwidth probe: larger than the last-level cache of any machine in sight.
const PROBE_BYTES: usize = 1 << 30;

/// Thread counts worth measuring here: one, and all.
pub fn thread_counts() -> Vec<usize> {
    let all = allowed_cpus().map_or(1, |cpus| cpus.len());
    if all > 1 { vec![1, all] } else { vec![1] }
}

/// A pinned team.
///
/// # Panics
/// When threads cannot be had: there is nothing to measure then.
pub fn team(threads: usize) -> Arc<Team> {
    Arc::new(Team::new(threads, true).unwrap_or_else(|e| panic!("{e}")))
}

/// The probe.
///
/// # Panics
/// When its memory cannot be had.
pub fn probe() -> ReadProbe {
    ReadProbe::new(sized(PROBE_BYTES >> 10) << 10).unwrap_or_else(|e| panic!("{e}"))
}

/// Criterion with its defaults, after one line on the bandwidth of this machine at this hour: compare GiB/s with it.
pub fn criterion() -> Criterion {
    let probe = probe();
    for threads in thread_counts() {
        let gb_s = probe.measure(&team(threads));
        println!(
            "measured read bandwidth, {threads} thread(s): {gb_s:.1} GB/s = {:.1} GiB/s",
            gb_s * 1e9 / 1_073_741_824.0
        );
    }
    Criterion::default()
}

/// The shape that the figures are about; a fraction of it in a smoke test.
///
/// # Panics
/// When the preset is gone.
pub fn model_2b() -> ModelConfig {
    let config = preset("bitnet-2b-4t").unwrap_or_else(|e| panic!("{e}"));
    if smoke() {
        ModelConfig { hidden: 256, intermediate: 512, vocab: 32_000, layers: 2, ..config }
    } else {
        config
    }
}

/// Whether this program runs under `cargo test`, which only asks whether the benches still work: everything is small then,
/// and nothing is worth reading.
pub fn smoke() -> bool {
    !std::env::args().any(|arg| arg == "--bench")
}

/// `full`, or a size that takes no time in a smoke test: bytes, rows, tokens or rounds.
pub fn sized(full: usize) -> usize {
    if smoke() { full.min(1 << 10) } else { full }
}

/// A session of `model` with `context` tokens of arbitrary rows cached, and room for 256 more.
///
/// # Panics
/// When memory cannot be had.
pub fn filled_session(model: Arc<Model>, context: usize, kv: &str, threads: usize) -> Session {
    let make = || -> longbit::Result<Session> {
        let options = SessionOptions { capacity: context + 256, kv: kv_dtype(kv)?, method: method("dense")? };
        let mut session = Session::new(model, team(threads), options)?;
        let config = session.model().config.clone();
        let rows: Vec<f32> =
            (0..1024 * 128).map(|i| ((i * 2_654_435_761usize) >> 7 & 1023) as f32 / 512.0 - 1.0).collect();
        for head in 0..config.layers * config.kv_heads {
            let mut kv = session.cache().head_mut(head / config.kv_heads, head % config.kv_heads);
            let mut left = context;
            while left > 0 {
                let n = left.min(1024) * config.head_dim;
                kv.append(&rows[..n], &rows[..n])?;
                left -= left.min(1024);
            }
        }
        session.cache_mut().set_len(context)?;
        session.refresh();
        Ok(session)
    };
    make().unwrap_or_else(|e| panic!("{e}"))
}

/// A session whose decode step is attention and little else: the heads of a 2B model over 30 layers on a residual stream
/// of 256, with `context` tokens of arbitrary rows cached.
///
/// # Panics
/// When memory cannot be had.
pub fn attention_session(context: usize, kv: &str, threads: usize) -> (Session, Supplied) {
    let config = ModelConfig {
        name: "attention only".into(),
        vocab: 256,
        hidden: 256,
        intermediate: 256,
        ..model_2b()
    };
    let model = Model::synthetic(config.clone(), HeadFormat::Bf16, 1, &team(threads));
    let session = filled_session(Arc::new(model.unwrap_or_else(|e| panic!("{e}"))), context, kv, threads);
    let numbers = config.layers * config.kv_heads * config.head_dim;
    let supplied = Supplied {
        queries: vec![0.01; numbers * config.group()],
        keys: vec![0.01; numbers],
        values: vec![0.01; numbers],
    };
    (session, supplied)
}

/// Steps of a workload that are made.
const STEPS: usize = 4;

/// A session whose decode step is attention and little else, as [`attention_session`], but of `layers` layers with the rows
/// of the workload `mix`; and the queries and rows of its next steps.
///
/// # Panics
/// When memory cannot be had.
pub fn workload_session(context: usize, kv: &str, threads: usize, layers: usize) -> (Session, Vec<Supplied>) {
    let name = "attention only".into();
    let config = ModelConfig { name, vocab: 256, hidden: 256, intermediate: 256, layers, ..model_2b() };
    let make = || -> longbit::Result<(Session, Vec<Supplied>)> {
        let team = team(threads);
        let model = Arc::new(Model::synthetic(config.clone(), HeadFormat::Bf16, 1, &team)?);
        let options = SessionOptions { capacity: context + 256, kv: kv_dtype(kv)?, method: method("dense")? };
        let mut session = Session::new(model, team, options)?;
        let ModelConfig { heads, kv_heads, head_dim, rope_theta, .. } = config;
        let shape = HeadShape { layers, heads, kv_heads, head_dim, rope_theta };
        let spec = WorkloadSpec::parse("mix").unwrap_or_else(|e| panic!("{e}"));
        let workload = Workload::new(&spec, &shape, context, STEPS, 1).unwrap_or_else(|e| panic!("{e}"));
        let numbers = layers * kv_heads * head_dim;
        let group = config.group();
        let mut steps: Vec<Supplied> = (0..STEPS)
            .map(|_| Supplied {
                queries: vec![0.0; numbers * group],
                keys: vec![0.0; numbers],
                values: vec![0.0; numbers],
            })
            .collect();
        let (mut k, mut v) = (vec![0.0; BLOCK * head_dim], vec![0.0; BLOCK * head_dim]);
        for head in 0..layers * kv_heads {
            let rope = session.rope();
            let rows = workload.calibrate(head / kv_heads, head % kv_heads);
            let mut cache = session.cache().head_mut(head / kv_heads, head % kv_heads);
            for (block, start) in (0..context).step_by(BLOCK).enumerate() {
                let tokens = start..context.min(start + BLOCK);
                let (k, v) = (&mut k[..tokens.len() * head_dim], &mut v[..tokens.len() * head_dim]);
                rows.block(block, rope.cos(tokens.clone()), rope.sin(tokens), k, v);
                cache.append(k, v)?;
            }
            let own = head * head_dim..(head + 1) * head_dim;
            let asked = own.start * group..own.end * group;
            for (i, step) in steps.iter_mut().enumerate() {
                let at = context + i..context + i + 1;
                let (cos, sin) = (rope.cos(at.clone()), rope.sin(at));
                let (keys, values) = (&mut step.keys[own.clone()], &mut step.values[own.clone()]);
                rows.step(i, cos, sin, &mut step.queries[asked.clone()], keys, values);
            }
        }
        session.cache_mut().set_len(context)?;
        session.refresh();
        Ok((session, steps))
    };
    make().unwrap_or_else(|e| panic!("{e}"))
}
