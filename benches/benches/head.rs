//! The language-model head, in bytes of its matrix: whole from memory, and a slice from the second-level cache.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longbit_kernels::{Isa, Kernels};
use std::hint::black_box;

const SLICE: usize = 200;

/// Columns and rows of the head.
fn shape() -> (usize, usize) {
    let config = longbit_benches::model_2b();
    (config.hidden, config.vocab)
}

fn heads(c: &mut Criterion) {
    let (width, vocabulary) = shape();
    let x: Vec<f32> = (0..width).map(|i| (i % 101) as f32 * 0.02 - 1.0).collect();
    let mut out = vec![0.0f32; vocabulary];
    let scales = vec![0.01f32; vocabulary];
    let bf16: Vec<u16> = (0..vocabulary * width).map(|i| 0x3f00 + (i % 77) as u16).collect();
    let int8: Vec<i8> = (0..vocabulary * width).map(|i| (i % 255) as u8 as i8).collect();
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar) {
        for (place, rows) in [("L2", SLICE), ("memory", vocabulary)] {
            let mut group = c.benchmark_group(format!("head/{place}"));
            group.sample_size(10);
            group.throughput(Throughput::Bytes((2 * rows * width) as u64));
            group.bench_function(BenchmarkId::new("bf16", k.isa()), |b| {
                b.iter(|| k.head_bf16(&bf16[..rows * width], black_box(&x), &mut out[..rows]));
            });
            group.throughput(Throughput::Bytes((rows * width) as u64));
            group.bench_function(BenchmarkId::new("int8", k.isa()), |b| {
                b.iter(|| {
                    k.head_int8(&int8[..rows * width], &scales[..rows], black_box(&x), &mut out[..rows])
                });
            });
        }
    }
}

fn quantize(c: &mut Criterion) {
    let (width, _) = shape();
    let bf16: Vec<u16> = (0..SLICE * width).map(|i| 0x3f00 + (i % 77) as u16).collect();
    let (mut codes, mut scales) = (vec![0i8; bf16.len()], vec![0.0f32; SLICE]);
    let mut group = c.benchmark_group("head/quantize");
    group.throughput(Throughput::Bytes(2 * bf16.len() as u64));
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa) {
        group.bench_function(BenchmarkId::new("int8", k.isa()), |b| {
            b.iter(|| k.quantize_rows_int8(black_box(&bf16), width, &mut codes, &mut scales));
        });
    }
}

criterion_group! {
    name = benches;
    config = longbit_benches::criterion();
    targets = heads, quantize
}
criterion_main!(benches);
