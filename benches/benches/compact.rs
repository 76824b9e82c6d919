//! Fewer bytes for the same product: weights at 1.6 bits, and lists of rows or columns, beside the whole 2-bit matrix.
//!
//! Not a criterion bench: as in `memory_wall`, every operation is measured in turn with the read bandwidth of the same
//! moment (A B C C B A), and medians of ratios are printed. `fraction` is the share of the read bandwidth in the bytes
//! that the operation has to read; `time` is relative to the first operation of its group, the whole 2-bit matrix.
//! Weights are larger than any last-level cache. Words after `--` choose the groups whose names contain one of them.

use std::time::Instant;

use longbit_benches::{probe, sized, team, thread_counts};
use longbit_kernels::{ColumnShape, Kernels, RowShape, TILE_ROWS, TernaryShape, TritShape};
use longbit_sys::{ReadProbe, Segment, Shared, Team, Worker, share};

/// Rounds of A B C C B A.
const ROUNDS: usize = 5;
/// Bytes of weights at two bits.
const BYTES: usize = 320 << 20;

/// What a worker does in one pass over all matrices; returns the bytes that it read.
type Pass<'a> = Box<dyn Fn(&Worker<'_>) -> usize + Sync + 'a>;

/// Measures the passes of one group against the probe and each other; prints a line each.
fn group(title: &str, matrices: usize, probe: &ReadProbe, team: &Team, passes: &[(String, Pass<'_>)]) {
    let timed = |pass: &Pass<'_>| {
        let bytes = std::sync::atomic::AtomicUsize::new(0);
        let clock = Instant::now();
        team.run(|worker| {
            bytes.fetch_add(pass(worker), std::sync::atomic::Ordering::Relaxed);
        });
        (clock.elapsed().as_secs_f64(), bytes.into_inner() as f64)
    };
    for (_, pass) in passes {
        timed(pass);
    }
    let mut figures = vec![[const { Vec::new() }; 4]; passes.len()];
    for _ in 0..ROUNDS {
        let before = probe.measure(team);
        let there: Vec<_> = passes.iter().map(|(_, pass)| timed(pass)).collect();
        let mut back: Vec<_> = passes.iter().rev().map(|(_, pass)| timed(pass)).collect();
        back.reverse();
        let after = probe.measure(team);
        for (way, read) in [(there, before), (back, after)] {
            for ((seconds, bytes), figures) in way.iter().zip(&mut figures) {
                let speed = bytes / seconds / 1e9;
                let all = [speed, speed / read, seconds / way[0].0, seconds / matrices as f64 * 1e6];
                figures.iter_mut().zip(all).for_each(|(list, figure)| list.push(figure));
            }
        }
    }
    for ((name, _), figures) in passes.iter().zip(&mut figures) {
        let [speed, fraction, time, micros] = figures.each_mut().map(|list| {
            list.sort_by(f64::total_cmp);
            (list[list.len() / 2] + list[(list.len() - 1) / 2]) / 2.0
        });
        let name = format!("{title}: {name}");
        println!("{name:<44} {:>7} {speed:>7.1} {fraction:>9.2} {micros:>9.1} {time:>6.2}", team.threads());
    }
}

/// Numbers within a range that a seeded draw chooses, about `percent` of them, ascending.
fn chosen(range: std::ops::Range<usize>, percent: usize, seed: usize) -> Vec<u32> {
    let drawn = |i: &usize| {
        let mixed = (i ^ seed << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33 & 0xffff
    };
    range.filter(|i| drawn(i) < percent * 0x1_0000 / 100).map(|i| i as u32).collect()
}

/// Matrices of a shape, in the tile layout.
fn matrices(shape: TernaryShape, builders: &Team) -> (usize, Segment) {
    let count = sized(BYTES).div_ceil(shape.bytes());
    let mut data = Segment::new(count * shape.bytes()).expect("memory");
    convert(count, shape.bytes(), &mut data, builders, |i, out| {
        shape.fill_random(0..shape.tiles(), i as u64, out);
    });
    (count, data)
}

/// Fills the matrices of a segment, those of one worker after those of another.
fn convert(
    count: usize,
    bytes: usize,
    out: &mut Segment,
    team: &Team,
    fill: impl Fn(usize, &mut [u8]) + Sync,
) {
    let parts: Vec<_> = out.chunks_exact_mut(bytes).map(std::sync::Mutex::new).collect();
    team.run(|worker| {
        for i in worker.range(count) {
            if let Ok(mut part) = parts[i].lock() {
                fill(i, &mut part);
            }
        }
    });
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |title: &str| words.is_empty() || words.iter().any(|word| title.contains(word.as_str()));
    let kernels = Kernels::from_env().unwrap_or_else(|e| panic!("{e}"));
    let probe = probe();
    let builders = team(*thread_counts().last().unwrap_or(&1));
    println!("{} (1.6 bits a weight are native: {})", kernels.isa(), kernels.trits_are_native());
    println!(
        "{:<44} {:>7} {:>7} {:>9} {:>9} {:>6}",
        "operation", "threads", "GB/s", "fraction", "us/matrix", "time"
    );
    for (rows, cols) in [(2560, 6912), (6912, 2560), (2560, 2560)] {
        let title = format!("trits {rows}x{cols}");
        if wanted(&title) {
            trits(&title, TernaryShape { rows, cols }, kernels, &probe, &builders);
        }
    }
    if wanted("rows") {
        rows(TernaryShape { rows: 6912, cols: 2560 }, kernels, &probe, &builders);
    }
    if wanted("columns") {
        columns(TernaryShape { rows: 2560, cols: 6912 }, kernels, &probe, &builders);
    }
}

/// The pass over whole matrices at two bits, which every group starts with.
fn whole<'a>(
    shape: TernaryShape,
    kernels: &'a Kernels,
    data: &'a [u8],
    codes: &'a [i8],
    out: &'a Shared<f32>,
) -> (String, Pass<'a>) {
    let pass = move |worker: &Worker<'_>| {
        let tiles = worker.range(shape.tiles());
        for matrix in data.chunks(shape.bytes()) {
            let mut out = out.write(worker.index());
            kernels.ternary_gemv(shape, matrix, tiles.clone(), codes, 7, 0.1, &mut out);
        }
        data.len() / shape.tiles() * tiles.len()
    };
    ("2 bits".into(), Box::new(pass))
}

fn trits(title: &str, bits: TernaryShape, kernels: &Kernels, probe: &ReadProbe, builders: &Team) {
    let (count, two_bit) = matrices(bits, builders);
    let shape = TritShape::from(bits);
    let mut data = Segment::new(count * shape.bytes()).expect("memory");
    convert(count, shape.bytes(), &mut data, builders, |i, out| {
        shape.repack(bits, &two_bit[i * bits.bytes()..][..bits.bytes()], 0..shape.tiles(), out);
    });
    let codes = vec![1i8; shape.padded_cols()];
    for threads in thread_counts() {
        let team = team(threads);
        let out = Shared::even(shape.tiles(), TILE_ROWS, threads, 0f32);
        let pass = |worker: &Worker<'_>| {
            let tiles = worker.range(shape.tiles());
            for matrix in data.chunks(shape.bytes()) {
                let mut out = out.write(worker.index());
                kernels.trit_gemv(shape, matrix, tiles.clone(), &codes, 7, 0.1, &mut out);
            }
            data.len() / shape.tiles() * tiles.len()
        };
        let passes = [
            whole(bits, kernels, &two_bit, &codes[..bits.padded_cols()], &out),
            ("1.6 bits".into(), Box::new(pass) as Pass<'_>),
        ];
        group(title, count, probe, &team, &passes);
    }
}

/// The lists of each worker for each matrix.
fn lists(units: usize, count: usize, threads: usize, percent: usize) -> Vec<Vec<Vec<u32>>> {
    let one = |worker: usize, matrix: usize| chosen(share(units, worker, threads), percent, matrix);
    (0..threads).map(|worker| (0..count).map(|matrix| one(worker, matrix)).collect()).collect()
}

fn rows(bits: TernaryShape, kernels: &Kernels, probe: &ReadProbe, builders: &Team) {
    let (count, two_bit) = matrices(bits, builders);
    let shape = RowShape { rows: bits.rows, cols: bits.cols };
    let mut data = Segment::new(count * shape.bytes()).expect("memory");
    convert(count, shape.bytes(), &mut data, builders, |i, out| {
        shape.repack(bits, &two_bit[i * bits.bytes()..][..bits.bytes()], 0..shape.rows, out);
    });
    let codes = vec![1i8; shape.padded_cols()];
    for threads in thread_counts() {
        let team = team(threads);
        let tiled = Shared::even(bits.tiles(), TILE_ROWS, threads, 0f32);
        let out = Shared::even(shape.rows, 1, threads, 0f32);
        let mut passes = vec![whole(bits, kernels, &two_bit, &codes, &tiled)];
        for percent in [100, 50, 20] {
            let mut lists = lists(shape.rows, count, threads, percent);
            for (worker, lists) in lists.iter_mut().enumerate() {
                // A worker has rows of its own and numbers them from its first.
                let first = share(shape.rows, worker, threads).start as u32;
                lists.iter_mut().flatten().for_each(|row| *row -= first);
            }
            let (out, data, codes) = (&out, &data, &codes);
            let pass = move |worker: &Worker<'_>| {
                let mine = worker.range(shape.rows);
                let part = RowShape { rows: mine.len(), ..shape };
                let bytes = mine.start * shape.row_bytes()..mine.end * shape.row_bytes();
                let mut out = out.write(worker.index());
                let lists = &lists[worker.index()];
                for (matrix, list) in data.chunks(shape.bytes()).zip(lists) {
                    kernels.ternary_rows(part, &matrix[bytes.clone()], list, codes, 7, 0.1, &mut out);
                }
                lists.iter().map(Vec::len).sum::<usize>() * shape.row_bytes()
            };
            passes.push((format!("{percent} % listed"), Box::new(pass)));
        }
        group(&format!("rows of {}x{}", shape.rows, shape.cols), count, probe, &team, &passes);
    }
}

fn columns(bits: TernaryShape, kernels: &Kernels, probe: &ReadProbe, builders: &Team) {
    let (count, two_bit) = matrices(bits, builders);
    let shape = ColumnShape { rows: bits.rows, cols: bits.cols };
    let mut data = Segment::new(count * shape.bytes()).expect("memory");
    convert(count, shape.bytes(), &mut data, builders, |i, out| {
        shape.repack(bits, &two_bit[i * bits.bytes()..][..bits.bytes()], 0..shape.cols, out);
    });
    let codes = vec![1i8; bits.padded_cols()];
    for threads in thread_counts() {
        let team = team(threads);
        let tiled = Shared::even(bits.tiles(), TILE_ROWS, threads, 0f32);
        let sums = Shared::even(threads, shape.padded_rows(), threads, 0i32);
        let mut passes = vec![whole(bits, kernels, &two_bit, &codes, &tiled)];
        for percent in [100, 50, 25, 10] {
            let lists = lists(shape.cols, count, threads, percent);
            let (sums, data, codes) = (&sums, &data, &codes[..shape.cols]);
            let pass = move |worker: &Worker<'_>| {
                let mut sums = sums.write(worker.index());
                let lists = &lists[worker.index()];
                for (matrix, list) in data.chunks(shape.bytes()).zip(lists) {
                    sums.fill(0);
                    kernels.ternary_columns(shape, matrix, list, codes, &mut sums);
                }
                lists.iter().map(Vec::len).sum::<usize>() * shape.column_bytes()
            };
            passes.push((format!("{percent} % listed"), Box::new(pass)));
        }
        group(&format!("columns of {}x{}", shape.rows, shape.cols), count, probe, &team, &passes);
    }
}
