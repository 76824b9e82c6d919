//! The language-model head at the 2B shape: each format out of memory beside the read bandwidth of the same minute, then a
//! slice of it in the second-level cache.
//!
//! As in `memory_wall`, what counts out of memory is a ratio to a quantity that drifts, so operation and probe are
//! measured in turn (A B B A) and the median of the ratios is printed, and the time of one pass.
//! `HEAD_BENCH=wall`, `steps` or `cached` leaves the other parts out.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput};
use longbit::{HeadFormat, Model, ModelConfig, Session, SessionOptions};
use longbit_benches::{model_2b, probe, team, thread_counts};
use longbit_kernels::{BlockFormat, BlockShape, Isa, Kernels, Planes};
use longbit_sys::{ReadProbe, Segment, Shared, Team, share};

const SLICE: usize = 200;
/// Rounds of A B B A.
const ROUNDS: usize = 3;

/// Columns and rows of the head.
fn shape() -> (usize, usize) {
    let config = longbit_benches::model_2b();
    (config.hidden, config.vocab)
}

fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    (x[x.len() / 2] + x[(x.len() - 1) / 2]) / 2.0
}

/// Measures `operation`, which reads `bytes`, against the probe; prints one line.
fn line(name: &str, bytes: usize, probe: &ReadProbe, team: &Team, mut operation: impl FnMut()) {
    let mut timed = || {
        let clock = Instant::now();
        operation();
        clock.elapsed().as_secs_f64()
    };
    timed();
    let (mut ratios, mut times) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (a, b) = (probe.measure(team), timed());
        let (c, d) = (timed(), probe.measure(team));
        times.extend([b, c]);
        ratios.extend([bytes as f64 / b / 1e9 / a, bytes as f64 / c / 1e9 / d]);
    }
    let time = median(&mut times);
    println!(
        "{name:<28} {:>7} {:>8.1} {:>8.2} {:>7.1} {:>9.2}",
        team.threads(),
        bytes as f64 / 1e6,
        time * 1e3,
        bytes as f64 / time / 1e9,
        median(&mut ratios)
    );
}

/// The heads of every format, on huge pages as a model's are.
struct Heads {
    bf16: Segment,
    int8: Segment,
    blocks: Vec<(BlockShape, Segment)>,
    x: Vec<f32>,
}

impl Heads {
    fn new() -> Self {
        let (cols, rows) = shape();
        let memory = |bytes| Segment::new(bytes).unwrap_or_else(|e| panic!("{e}"));
        let mut bf16 = memory(2 * rows * cols);
        let mut state = 1u64;
        for w in bf16.as_mut_slice_of::<u16>() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *w = 0x3c00 | (state >> 40 & 0x81ff) as u16;
        }
        let mut int8 = memory(rows * cols);
        int8.iter_mut().enumerate().for_each(|(i, w)| *w = (i % 255) as u8);
        let blocks = BlockFormat::ALL
            .into_iter()
            .map(|format| {
                let shape = BlockShape { format, rows, cols };
                let mut data = memory(shape.bytes());
                Kernels::best().pack_blocks(shape, bf16.as_slice_of(), &mut data);
                (shape, data)
            })
            .collect();
        let x = (0..cols).map(|i| (i * 37 % 101) as f32 * 0.02 - 1.0).collect();
        Heads { bf16, int8, blocks, x }
    }
}

fn wall(heads: &Heads) {
    let (cols, rows) = shape();
    let (probe, scales) = (probe(), vec![0.01f32; rows]);
    println!(
        "{:<28} {:>7} {:>8} {:>8} {:>7} {:>9}",
        "out of memory", "threads", "MB", "ms", "GB/s", "fraction"
    );
    for threads in thread_counts() {
        let team = team(threads);
        let bounds: Vec<usize> = std::iter::once(0)
            .chain((0..threads).map(|w| rows.min(4 * share(rows.div_ceil(4), w, threads).end)))
            .collect();
        let out = Shared::striped(rows, &bounds, 0f32);
        let best = Kernels::best().isa();
        for k in Isa::available().into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar)
        {
            for (shape, data) in &heads.blocks {
                let name = format!("{:?} {}", shape.format, k.isa()).to_lowercase();
                line(&name, data.len(), &probe, &team, || {
                    team.run(|worker| {
                        let w = worker.index();
                        let mut planes = Planes::default();
                        k.quantize_planes(shape.format, &heads.x, &mut planes);
                        let tiles = bounds[w].div_ceil(4)..bounds[w + 1].div_ceil(4);
                        k.head_blocks(*shape, data, tiles, &planes, &mut out.write(w));
                    });
                });
            }
            if k.isa() != best {
                continue;
            }
            line(&format!("bf16 {best}"), heads.bf16.len(), &probe, &team, || {
                team.run(|worker| {
                    let w = worker.index();
                    let rows = &heads.bf16.as_slice_of::<u16>()[bounds[w] * cols..bounds[w + 1] * cols];
                    k.head_bf16(rows, &heads.x, &mut out.write(w));
                });
            });
            line(&format!("int8 {best}"), heads.int8.len() + 4 * rows, &probe, &team, || {
                team.run(|worker| {
                    let w = worker.index();
                    let mine = bounds[w]..bounds[w + 1];
                    let codes = &heads.int8.as_slice_of::<i8>()[mine.start * cols..mine.end * cols];
                    k.head_int8(codes, &scales[mine], &heads.x, &mut out.write(w));
                });
            });
        }
    }
}

/// Steps of a model that is little else than its head, with the two-stage head and with those that read all rows: the
/// time of a step, and how many rows the two-stage head scored exactly.
fn steps() {
    const TOKENS: u32 = 32;
    let config = ModelConfig {
        name: "head only".into(),
        intermediate: 256,
        layers: 1,
        heads: 1,
        kv_heads: 1,
        ..model_2b()
    };
    let builders = team(thread_counts().into_iter().max().unwrap_or(1));
    println!("{:<28} {:>7} {:>4} {:>8} {:>9} {:>9}", "steps", "threads", "k", "ms", "rows", "most");
    for format in HeadFormat::ALL.into_iter().filter(|&format| format != HeadFormat::F32) {
        let clock = Instant::now();
        let model = Model::synthetic(config.clone(), format, 1, &builders).unwrap_or_else(|e| panic!("{e}"));
        let (model, built) = (Arc::new(model), clock.elapsed().as_secs_f64());
        println!(
            "{:<28} built in {built:.1} s, {} MB a step",
            format.as_str(),
            model.bytes().per_token / 1_000_000
        );
        let tops: &[usize] = if format.is_two_stage() { &[1, 5, 40] } else { &[1] };
        for (threads, &k) in thread_counts().into_iter().flat_map(|t| tops.iter().map(move |k| (t, k))) {
            let options = SessionOptions { capacity: 256, ..SessionOptions::default() };
            let session = Session::new(model.clone(), team(threads), options);
            let mut session = session.unwrap_or_else(|e| panic!("{e}"));
            session.set_exact_top(k);
            let (mut times, mut rows) = (Vec::new(), Vec::new());
            for token in 0..TOKENS {
                let clock = Instant::now();
                session.decode(token * 997 + 1).unwrap_or_else(|e| panic!("{e}"));
                times.push(clock.elapsed().as_secs_f64() * 1e3);
                rows.push(session.head_rows_rescored() as f64);
            }
            let most = rows.iter().copied().fold(0.0, f64::max);
            let (time, rows) = (median(&mut times), median(&mut rows));
            println!("{:<28} {threads:>7} {k:>4} {time:>8.2} {rows:>9.0} {most:>9.0}", format.as_str());
        }
    }
}

/// A slice of each head out of the second-level cache: what the arithmetic alone can do.
fn cached(c: &mut Criterion, heads: &Heads) {
    let (cols, _) = shape();
    let mut out = vec![0.0f32; SLICE];
    let (scales, mut planes) = (vec![0.01f32; SLICE], Planes::default());
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar) {
        let mut group = c.benchmark_group("head/L2");
        group.sample_size(10);
        group.throughput(Throughput::Bytes((2 * SLICE * cols) as u64));
        let bf16 = &heads.bf16.as_slice_of::<u16>()[..SLICE * cols];
        group.bench_function(BenchmarkId::new("bf16", k.isa()), |b| {
            b.iter(|| k.head_bf16(bf16, black_box(&heads.x), &mut out));
        });
        group.throughput(Throughput::Bytes((SLICE * cols) as u64));
        let int8 = &heads.int8.as_slice_of::<i8>()[..SLICE * cols];
        group.bench_function(BenchmarkId::new("int8", k.isa()), |b| {
            b.iter(|| k.head_int8(int8, &scales, black_box(&heads.x), &mut out));
        });
        for (shape, data) in &heads.blocks {
            let shape = BlockShape { rows: SLICE, ..*shape };
            let data = &data[..shape.bytes()];
            group.throughput(Throughput::Bytes(data.len() as u64));
            let name = format!("{:?}", shape.format).to_lowercase();
            group.bench_function(BenchmarkId::new(name, k.isa()), |b| {
                b.iter(|| {
                    k.quantize_planes(shape.format, black_box(&heads.x), &mut planes);
                    k.head_blocks(shape, data, 0..shape.tiles(), &planes, &mut out);
                });
            });
        }
        let name = BenchmarkId::new("pack q6", k.isa());
        let shape = BlockShape { format: BlockFormat::Q6, rows: SLICE, cols };
        let mut packed = vec![0; shape.bytes()];
        group.throughput(Throughput::Bytes((2 * SLICE * cols) as u64));
        group.bench_function(name, |b| b.iter(|| k.pack_blocks(shape, black_box(bf16), &mut packed)));
    }
}

fn main() {
    let heads = Heads::new();
    let only = std::env::var("HEAD_BENCH").unwrap_or_default();
    if matches!(only.as_str(), "" | "wall") {
        wall(&heads);
    }
    if matches!(only.as_str(), "" | "steps") {
        steps();
    }
    if matches!(only.as_str(), "" | "cached") {
        let mut criterion = longbit_benches::criterion().configure_from_args();
        cached(&mut criterion, &heads);
        criterion.final_summary();
    }
}
