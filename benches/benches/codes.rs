//! Rows of small integer codes of 128 numbers, for groups of four query heads, in bytes of rows: from the second-level cache
//! for what the core can do, and from memory for what a long context sees.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longbit_kernels::codes::{HIGH_NIBBLES, SIGNED_NIBBLES};
use longbit_kernels::{CodeBits, CodeShape, Isa, Kernels, QueryBits, QueryCodes, Rows, Scales};
use longbit_sys::{Segment, Shared};
use std::hint::black_box;
use std::time::Duration;

const D: usize = 128;
/// Query heads of a group.
const HEADS: usize = 4;
/// Rows that the engine hands to a kernel at a time.
const PAGE: usize = longbit::kv::PAGE_TOKENS;
/// Bytes of rows that fit the second-level cache beside what else is there.
const L2: usize = 256 << 10;
/// Bytes of rows that no cache holds.
const MEMORY: usize = 512 << 20;

/// Which scales a run is measured with.
#[derive(Clone, Copy, Debug)]
enum Kind {
    One,
    Row,
    Block,
}

impl Kind {
    fn scales<'a>(self, rows: &'a [f32], blocks: &'a [f32]) -> Scales<'a> {
        match self {
            Kind::One => Scales::One,
            Kind::Row => Scales::Row(rows),
            Kind::Block => Scales::Block(blocks),
        }
    }
}

/// `n` rows in `bytes`, of which the second half is the lower plane where there is one.
fn rows(shape: CodeShape, bytes: &[u8]) -> Rows<'_> {
    match shape.bits {
        CodeBits::Eight => Rows::bytes(bytes),
        CodeBits::Planes => {
            let (high, low) = bytes.split_at(bytes.len() / 2);
            Rows::planes(high, low)
        }
        CodeBits::Four => Rows::indices(bytes, &SIGNED_NIBBLES),
        CodeBits::Three | CodeBits::Two => Rows::indices(bytes, &HIGH_NIBBLES),
    }
}

/// Rows that `bytes` hold.
fn count(shape: CodeShape, bytes: usize) -> usize {
    bytes / (shape.dims * if shape.bits == CodeBits::Planes { 8 } else { shape.bits.width() } / 8) / PAGE
        * PAGE
}

/// The rows from `first` on, a page of them.
fn page<'a>(shape: CodeShape, rows: Rows<'a>, first: usize) -> Rows<'a> {
    let bytes = first * shape.row_bytes()..(first + PAGE) * shape.row_bytes();
    let low = if rows.low.is_empty() { rows.low } else { &rows.low[bytes.clone()] };
    Rows { codes: &rows.codes[bytes], low, ..rows }
}

fn quick<'a>(
    c: &'a mut Criterion,
    name: &str,
) -> criterion::BenchmarkGroup<'a, criterion::measurement::WallTime> {
    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300));
    group
}

fn queries(k: &Kernels, shape: CodeShape, bits: QueryBits) -> QueryCodes {
    let queries: Vec<f32> = (0..HEADS * D).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
    let mut codes = QueryCodes::default();
    k.quantize_queries(shape, bits, &queries, &mut codes);
    codes
}

/// A byte pattern without runs.
fn fill(bytes: &mut [u8]) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = ((i * 89) >> 3) as u8;
    }
}

fn scores_from_l2(c: &mut Criterion) {
    let mut bytes = vec![0u8; L2];
    fill(&mut bytes);
    let scales = vec![0.01f32; PAGE * 4];
    let mut out = vec![0.0f32; HEADS * PAGE];
    for bits in CodeBits::ALL {
        let shape = CodeShape { dims: D, bits };
        let rows = rows(shape, &bytes);
        let n = count(shape, L2);
        let mut group = quick(c, &format!("codes/L2/scores/{bits:?}"));
        group.throughput(Throughput::Bytes(L2 as u64));
        for k in Isa::available().into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar)
        {
            for query_bits in [QueryBits::Sixteen, QueryBits::Eight] {
                let query = queries(k, shape, query_bits);
                for kind in [Kind::One, Kind::Row, Kind::Block] {
                    let scales = kind.scales(&scales[..PAGE], &scales);
                    let name = format!("{query_bits:?}/{kind:?}");
                    group.bench_function(BenchmarkId::new(name, k.isa()), |b| {
                        b.iter(|| {
                            for first in (0..n).step_by(PAGE) {
                                k.code_scores(shape, &query, page(shape, rows, first), scales, &mut out);
                            }
                        });
                    });
                }
            }
        }
    }
    black_box(&out);
}

fn scores_from_memory(c: &mut Criterion) {
    let size = longbit_benches::sized(MEMORY >> 10) << 10;
    let mut bytes = Segment::new(size).expect("memory");
    fill(&mut bytes);
    let scales = vec![0.01f32; PAGE * 4];
    let k = Kernels::best();
    for threads in longbit_benches::thread_counts() {
        let team = longbit_benches::team(threads);
        let mut group = quick(c, &format!("codes/memory/scores/{threads} thread(s)"));
        group.throughput(Throughput::Bytes(size as u64));
        for bits in CodeBits::ALL {
            let shape = CodeShape { dims: D, bits };
            let rows = rows(shape, &bytes);
            let n = count(shape, size);
            let out = Shared::even(threads, HEADS * PAGE, threads, 0.0f32);
            for query_bits in [QueryBits::Sixteen, QueryBits::Eight] {
                let query = queries(k, shape, query_bits);
                for kind in [Kind::Row, Kind::Block] {
                    let scales = kind.scales(&scales[..PAGE], &scales);
                    group.bench_function(format!("{bits:?}/{query_bits:?}/{kind:?}"), |b| {
                        b.iter(|| {
                            team.run(|worker| {
                                let mut out = out.write(worker.index());
                                for first in worker.range(n / PAGE).map(|page| page * PAGE) {
                                    k.code_scores(shape, &query, page(shape, rows, first), scales, &mut out);
                                }
                            });
                        });
                    });
                }
            }
        }
    }
}

/// Weights of a page, as a softmax has them: a few large ones.
fn weights() -> Vec<f32> {
    (0..HEADS * PAGE).map(|i| 1.0 / (1 + i * 7919 % 1009) as f32).collect()
}

fn sums_from_l2(c: &mut Criterion) {
    let mut bytes = vec![0u8; L2];
    fill(&mut bytes);
    let (scales, weights) = (vec![0.01f32; PAGE * 4], weights());
    let mut acc = vec![0.0f32; HEADS * D];
    for bits in CodeBits::ALL {
        let shape = CodeShape { dims: D, bits };
        let rows = rows(shape, &bytes);
        let n = count(shape, L2);
        let mut group = quick(c, &format!("codes/L2/sums/{bits:?}"));
        group.throughput(Throughput::Bytes(L2 as u64));
        for k in Isa::available().into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar)
        {
            for kind in [Kind::One, Kind::Row, Kind::Block] {
                let scales = kind.scales(&scales[..PAGE], &scales);
                group.bench_function(BenchmarkId::new(format!("{kind:?}"), k.isa()), |b| {
                    b.iter(|| {
                        for first in (0..n).step_by(PAGE) {
                            k.code_accumulate(shape, &weights, page(shape, rows, first), scales, &mut acc);
                        }
                    });
                });
            }
        }
    }
    // What a sparse reader pays for a few rows.
    let mut group = quick(c, "codes/L2/sums/few rows of 8 bits, scales of blocks");
    let k = Kernels::best();
    let shape = CodeShape { dims: D, bits: CodeBits::Eight };
    for n in [1, 4, 16] {
        group.bench_function(n.to_string(), |b| {
            let rows = Rows::bytes(&bytes[..n * shape.row_bytes()]);
            let scales = Scales::Block(&scales[..n * 4]);
            b.iter(|| k.code_accumulate(shape, &weights[..HEADS * n], rows, scales, &mut acc));
        });
    }
    black_box(&acc);
}

fn sums_from_memory(c: &mut Criterion) {
    let size = longbit_benches::sized(MEMORY >> 10) << 10;
    let mut bytes = Segment::new(size).expect("memory");
    fill(&mut bytes);
    let (scales, weights) = (vec![0.01f32; PAGE * 4], weights());
    let k = Kernels::best();
    for threads in longbit_benches::thread_counts() {
        let team = longbit_benches::team(threads);
        let mut group = quick(c, &format!("codes/memory/sums/{threads} thread(s)"));
        group.throughput(Throughput::Bytes(size as u64));
        for bits in CodeBits::ALL {
            let shape = CodeShape { dims: D, bits };
            let rows = rows(shape, &bytes);
            let n = count(shape, size);
            let acc = Shared::even(threads, HEADS * D, threads, 0.0f32);
            for kind in [Kind::Row, Kind::Block] {
                let scales = kind.scales(&scales[..PAGE], &scales);
                group.bench_function(format!("{bits:?}/{kind:?}"), |b| {
                    b.iter(|| {
                        team.run(|worker| {
                            let mut acc = acc.write(worker.index());
                            for first in worker.range(n / PAGE).map(|page| page * PAGE) {
                                k.code_accumulate(
                                    shape,
                                    &weights,
                                    page(shape, rows, first),
                                    scales,
                                    &mut acc,
                                );
                            }
                        });
                    });
                });
            }
        }
    }
}

/// Queries of four heads: once a step, or once for 32 tokens where channels have scales of their own.
fn queries_and_encoding(c: &mut Criterion) {
    let numbers: Vec<f32> = (0..HEADS * D).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
    let mut codes = QueryCodes::default();
    let mut group = quick(c, "codes/queries");
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa) {
        for bits in [QueryBits::Sixteen, QueryBits::Eight] {
            group.bench_function(BenchmarkId::new(format!("{bits:?}"), k.isa()), |b| {
                let shape = CodeShape { dims: D, bits: CodeBits::Eight };
                b.iter(|| k.quantize_queries(shape, bits, black_box(&numbers), &mut codes));
            });
        }
    }
    group.finish();
    let mut group = quick(c, "codes/encode 4 rows");
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa) {
        for blocks in [false, true] {
            let shape = CodeShape { dims: D, bits: CodeBits::Eight };
            let mut out = vec![0u8; HEADS * shape.row_bytes()];
            let mut scales = vec![0.0; HEADS * if blocks { 4 } else { 1 }];
            let name = if blocks { "int8, scales of blocks" } else { "int8, scales of rows" };
            group.bench_function(BenchmarkId::new(name, k.isa()), |b| {
                b.iter(|| k.encode_int8(shape, blocks, black_box(&numbers), &mut out, &mut [], &mut scales));
            });
        }
    }
    group.finish();
    let mut group = quick(c, "codes/pack 4 rows");
    let numbers: Vec<i8> = (0..HEADS * D).map(|i| i as i8).collect();
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa) {
        for bits in CodeBits::ALL {
            let shape = CodeShape { dims: D, bits };
            let mut out = vec![0u8; HEADS * shape.row_bytes()];
            let mut low = vec![0u8; if bits == CodeBits::Planes { out.len() } else { 0 }];
            group.bench_function(BenchmarkId::new(format!("{bits:?}"), k.isa()), |b| {
                b.iter(|| k.pack_codes(shape, black_box(&numbers), &mut out, &mut low));
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = longbit_benches::criterion();
    targets = scores_from_l2, scores_from_memory, sums_from_l2, sums_from_memory, queries_and_encoding
}
criterion_main!(benches);
