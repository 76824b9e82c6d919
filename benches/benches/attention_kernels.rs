//! The two halves of attention over stored rows of 128 columns, in bytes of rows: from the second-level cache for what the
//! core can do, and from memory for what a long context sees.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longbit_kernels::{Fp8, Isa, Kernels};
use std::hint::black_box;

const D: usize = 128;
/// Rows that the engine hands to a kernel at a time.
const PAGE: usize = longbit::kv::PAGE_TOKENS;

fn tables() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar)
}

/// Both halves over rows of each float format, as many bytes as `n` bfloat16 rows have, page by page, for groups of query
/// heads.
fn measure(c: &mut Criterion, place: &str, n: usize, groups: &[usize]) {
    let narrow: Vec<u16> = (0..n * D).map(|i| 0x3f00 + (i % 77) as u16).collect();
    let wide = vec![0.5f32; n / 2 * D];
    // Codes of numbers near one, in both formats; the bytes of bfloat16 above are those of binary16 near two.
    let bytes: Vec<u8> = (0..2 * n * D).map(|i| 0x3a + (i % 7) as u8).collect();
    let scales = vec![0.5f32; PAGE];
    for &g in groups {
        let queries = vec![0.25f32; g * D];
        let mut weights = vec![0.125f32; g * PAGE];
        let mut acc = vec![0.0f32; g * D];
        let mut group = c.benchmark_group(format!("attention/{place}/{g} heads"));
        group.sample_size(10);
        group.throughput(Throughput::Bytes((n * D * 2) as u64));
        for k in tables() {
            group.bench_function(BenchmarkId::new("scores_bf16", k.isa()), |b| {
                b.iter(|| {
                    narrow.chunks(PAGE * D).for_each(|p| k.scores_bf16(&queries, p, D, &mut weights, &[]))
                });
            });
            weights.fill(0.125);
            group.bench_function(BenchmarkId::new("accumulate_bf16", k.isa()), |b| {
                b.iter(|| {
                    narrow.chunks(PAGE * D).for_each(|p| k.accumulate_bf16(&weights, p, D, &mut acc, &[]))
                });
            });
            group.bench_function(BenchmarkId::new("scores_f16", k.isa()), |b| {
                b.iter(|| {
                    narrow.chunks(PAGE * D).for_each(|p| k.scores_f16(&queries, p, D, &mut weights, &[]))
                });
            });
            weights.fill(0.125);
            group.bench_function(BenchmarkId::new("accumulate_f16", k.isa()), |b| {
                b.iter(|| {
                    narrow.chunks(PAGE * D).for_each(|p| k.accumulate_f16(&weights, p, D, &mut acc, &[]))
                });
            });
            for (format, name) in [(Fp8::E4m3, "e4m3"), (Fp8::E5m2, "e5m2")] {
                group.bench_function(BenchmarkId::new(format!("scores_{name}"), k.isa()), |b| {
                    b.iter(|| {
                        bytes.chunks(PAGE * D).for_each(|p| {
                            k.scores_fp8(format, &queries, p, D, Some(&scales), &mut weights, &[])
                        })
                    });
                });
                weights.fill(0.125);
                group.bench_function(BenchmarkId::new(format!("accumulate_{name}"), k.isa()), |b| {
                    b.iter(|| {
                        bytes.chunks(PAGE * D).for_each(|p| {
                            k.accumulate_fp8(format, &weights, p, D, Some(&scales), &mut acc, &[])
                        })
                    });
                });
            }
            group.bench_function(BenchmarkId::new("scores_f32", k.isa()), |b| {
                b.iter(|| {
                    wide.chunks(PAGE * D).for_each(|p| k.scores_f32(&queries, p, D, &mut weights, &[]))
                });
            });
            weights.fill(0.125);
            group.bench_function(BenchmarkId::new("accumulate_f32", k.isa()), |b| {
                b.iter(|| {
                    wide.chunks(PAGE * D).for_each(|p| k.accumulate_f32(&weights, p, D, &mut acc, &[]))
                });
            });
        }
        black_box(&acc);
    }
}

fn from_l2(c: &mut Criterion) {
    measure(c, "L2", 2048, &[1, 2, 4, 8]);
}

/// 512 MiB of rows.
fn from_memory(c: &mut Criterion) {
    measure(c, "memory", longbit_benches::sized(2 << 20), &[4]);
}

criterion_group! {
    name = benches;
    config = longbit_benches::criterion();
    targets = from_l2, from_memory
}
criterion_main!(benches);
