//! How near each memory-bound operation comes to the read bandwidth of the same minute.
//!
//! Not a criterion bench: what counts is a ratio to a quantity that drifts, so operation and probe are measured in turn
//! (A B B A), and the median of the ratios is printed. Data are larger than any last-level cache.

use std::time::Instant;

use longbit::{HeadFormat, Model};
use longbit_benches::{attention_session, model_2b, probe, sized, team, thread_counts};
use longbit_kernels::TernaryShape;
use longbit_sys::{ReadProbe, Segment, Shared, Team};

/// Rounds of A B B A.
const ROUNDS: usize = 5;

/// Measures `operation`, which returns the bytes that it read, against the probe; prints one line.
fn line(name: &str, threads: usize, probe: &ReadProbe, team: &Team, mut operation: impl FnMut() -> u64) {
    let mut timed = || {
        let clock = Instant::now();
        let bytes = operation();
        bytes as f64 / clock.elapsed().as_secs_f64() / 1e9
    };
    timed();
    let (mut ratios, mut speeds, mut reads) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (a, b) = (probe.measure(team), timed());
        let (c, d) = (timed(), probe.measure(team));
        ratios.extend([b / a, c / d]);
        speeds.extend([b, c]);
        reads.extend([a, d]);
    }
    let median = |x: &mut Vec<f64>| {
        x.sort_by(f64::total_cmp);
        (x[x.len() / 2] + x[(x.len() - 1) / 2]) / 2.0
    };
    println!(
        "{name:<44} {threads:>7} {:>7.1} {:>10.1} {:>9.2}",
        median(&mut speeds),
        median(&mut reads),
        median(&mut ratios)
    );
}

fn main() {
    let probe = probe();
    println!("{:<44} {:>7} {:>7} {:>10} {:>9}", "operation", "threads", "GB/s", "read GB/s", "fraction");
    let config = model_2b();
    let shape = TernaryShape { rows: config.hidden, cols: config.intermediate };
    let builders = team(*thread_counts().last().unwrap_or(&1));
    let model = Model::synthetic(config, HeadFormat::Bf16, 1, &builders).expect("a model");
    let matrices = 140;
    // On huge pages, as a model's weights are.
    let mut data = Segment::new(matrices * shape.bytes()).expect("memory");
    for (i, matrix) in data.chunks_mut(shape.bytes()).enumerate() {
        shape.fill_random(0..shape.tiles(), i as u64, matrix);
    }
    let codes = vec![1i8; shape.padded_cols()];
    let x = vec![0.5f32; model.config.hidden];
    for threads in thread_counts() {
        let team = team(threads);
        let out = Shared::even(shape.tiles(), longbit_kernels::TILE_ROWS, threads, 0f32);
        line(
            &format!("ternary GEMV {}x{}, {matrices} matrices", shape.rows, shape.cols),
            threads,
            &probe,
            &team,
            || {
                team.run(|worker| {
                    let tiles = worker.range(shape.tiles());
                    for matrix in data.chunks(shape.bytes()) {
                        let mut out = out.write(worker.index());
                        let sum = shape.cols as i32;
                        model.kernels.ternary_gemv(shape, matrix, tiles.clone(), &codes, sum, 0.1, &mut out);
                    }
                });
                data.len() as u64
            },
        );
        let logits = Shared::even(model.config.vocab, 1, threads, 0f32);
        line(
            &format!("head bf16 {}x{}", model.config.vocab, model.config.hidden),
            threads,
            &probe,
            &team,
            || {
                team.run(|worker| {
                    let rows = bytemuck::cast_slice(model.embedding.bytes(worker.range(model.config.vocab)));
                    model.kernels.head_bf16(rows, &x, &mut logits.write(worker.index()));
                });
                (model.config.vocab * model.config.hidden * 2) as u64
            },
        );
        for kv in ["bf16", "f32"] {
            let context = sized(32_768);
            let (mut session, supplied) = attention_session(context, kv, threads);
            line(&format!("dense attention {kv}, 30 layers, 32k"), threads, &probe, &team, || {
                session.decode_supplied(0, &supplied, false).expect("a step");
                session.rewind(context);
                session.traffic().kv_bytes
            });
        }
    }
}
