//! How near the ternary products come to what bounds them, at every matrix shape of the 2B model: the int8 dot products
//! that the processor can do, or the bytes that it can read.
//!
//! Not a criterion bench: what counts are ratios to quantities that drift, so operation and probes are measured in turn
//! (A B B A), and the medians of the ratios are printed. Weights come from memory: matrix after matrix of a buffer that
//! is larger than the last-level cache, with a barrier after each, as in a model. Arguments choose shapes (`2560x6912`)
//! and numbers of tokens (`512`); `LONGBIT_ISA` the instruction set.
//!
//! `dots` is multiply-adds a second, over those of a loop of nothing but the instruction set's dot products; `reads` is
//! bytes of packed weights a second, over the read bandwidth; `roof` is the larger of the times that the two walls allow,
//! over the time taken.

use std::time::Instant;

use longbit_benches::{model_2b, sized, team, thread_counts};
use longbit_kernels::{Kernels, TILE_ROWS, TernaryShape};
use longbit_sys::{ReadProbe, Segment, Shared, Team};

/// Rounds of A B B A.
const ROUNDS: usize = 3;
const TOKENS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512];
/// All matrices of a shape.
const BYTES: usize = 256 << 20;
/// Multiply-adds of one timed operation, about; fewer where the matrices do not suffice.
const OPERATION: usize = 2_000_000_000;
/// Rounds of twelve dot products in one timed probe.
const PROBE: usize = 2_000_000;

/// The multiply-adds a second of all threads.
fn dot_rate(kernels: &Kernels, team: &Team) -> f64 {
    let clock = Instant::now();
    let done = std::sync::atomic::AtomicU64::new(0);
    team.run(|worker| {
        done.fetch_add(kernels.int8_dot_rate(sized(PROBE)), std::sync::atomic::Ordering::Relaxed);
        worker.barrier();
    });
    done.into_inner() as f64 / clock.elapsed().as_secs_f64()
}

fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    (x[x.len() / 2] + x[(x.len() - 1) / 2]) / 2.0
}

/// What the lines share.
struct Bench {
    kernels: &'static Kernels,
    probe: ReadProbe,
    data: Segment,
}

impl Bench {
    /// Measures one shape and number of tokens; prints one line.
    fn line(&self, shape: TernaryShape, tokens: usize, team: &Team, threads: usize) {
        // On its own lines, as the activations of a session are.
        let mut memory = Segment::new(tokens * shape.padded_cols()).expect("memory");
        let codes: &mut [i8] = memory.as_mut_slice_of();
        codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 37 % 255) as u8 as i8);
        let codes = &*codes;
        let sums: Vec<i32> =
            codes.chunks(shape.padded_cols()).map(|t| t.iter().map(|&c| i32::from(c)).sum()).collect();
        let scales = vec![0.01; tokens];
        let out = Shared::even(shape.tiles(), TILE_ROWS * tokens, threads, 0f32);
        let one = shape.rows * shape.cols * tokens;
        let matrices = (sized(OPERATION) / one).clamp(1, self.data.len() / shape.bytes());
        let mut next = 0;
        let mut timed = || {
            let clock = Instant::now();
            team.run(|worker| {
                let tiles = worker.range(shape.tiles());
                let mut out = out.write(worker.index());
                for i in 0..matrices {
                    let at = (next + i) % (self.data.len() / shape.bytes());
                    let matrix = &self.data[at * shape.bytes()..][..shape.bytes()];
                    let tiles = tiles.clone();
                    if let ([sum], [scale]) = (&sums[..], &scales[..]) {
                        self.kernels.ternary_gemv(shape, matrix, tiles, codes, *sum, *scale, &mut out);
                    } else {
                        self.kernels
                            .ternary_gemm(shape, matrix, tiles, tokens, codes, &sums, &scales, &mut out);
                    }
                    worker.barrier();
                }
            });
            next += matrices;
            matrices as f64 / clock.elapsed().as_secs_f64()
        };
        timed();
        let (mut dots, mut reads, mut roofs, mut speeds) = (vec![], vec![], vec![], vec![]);
        for _ in 0..ROUNDS {
            let probes = |order: bool| {
                let first = if order { 0.0 } else { self.probe.measure(team) };
                let rate = dot_rate(self.kernels, team);
                (rate, if order { self.probe.measure(team) } else { first } * 1e9)
            };
            let (a, b) = (probes(false), timed());
            let (c, d) = (timed(), probes(true));
            for ((rate, read), speed) in [(a, b), (d, c)] {
                let (dot, byte) = (speed * one as f64 / rate, speed * shape.bytes() as f64 / read);
                dots.push(dot);
                reads.push(byte);
                roofs.push(dot.max(byte));
                speeds.push(speed);
            }
        }
        let speed = median(&mut speeds);
        println!(
            "{:<10} {tokens:>7} {threads:>7} {:>9.1} {:>6.2} {:>7.1} {:>6.2} {:>6.2}",
            format!("{}x{}", shape.rows, shape.cols),
            speed * one as f64 / 1e9,
            median(&mut dots),
            speed * shape.bytes() as f64 / 1e9,
            median(&mut reads),
            median(&mut roofs),
        );
    }
}

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let (chosen_shapes, chosen_tokens): (Vec<&String>, Vec<&String>) =
        chosen.iter().partition(|a| a.contains('x'));
    let kernels = Kernels::from_env().unwrap_or_else(|e| panic!("{e}"));
    let config = model_2b();
    let (hidden, kv, wide) = (config.hidden, config.kv_heads * config.head_dim, config.intermediate);
    let mut data = Segment::new(sized(BYTES >> 10) << 10).expect("memory");
    // Any bytes will do for the arithmetic, which does not depend on the weights.
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = (i.wrapping_mul(0x9e37_79b9) >> 24) as u8 & 0b10_10_10_10;
    }
    let bench = Bench { kernels, probe: ReadProbe::new(sized(BYTES >> 10) << 10).expect("memory"), data };
    println!("instruction set {}", kernels.isa());
    println!(
        "{:<10} {:>7} {:>7} {:>9} {:>6} {:>7} {:>6} {:>6}",
        "shape", "tokens", "threads", "G mul-add", "dots", "GB/s", "reads", "roof"
    );
    for (rows, cols) in [(hidden, hidden), (kv, hidden), (wide, hidden), (hidden, wide)] {
        if !chosen_shapes.is_empty() && !chosen_shapes.iter().any(|s| **s == format!("{rows}x{cols}")) {
            continue;
        }
        for threads in thread_counts() {
            let team = team(threads);
            for tokens in TOKENS {
                if chosen_tokens.is_empty() || chosen_tokens.iter().any(|t| **t == tokens.to_string()) {
                    bench.line(TernaryShape { rows, cols }, tokens, &team, threads);
                }
            }
        }
    }
}
