//! The language-model head, in bytes of its matrix: whole from memory, and a slice from the second-level cache.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longbit_kernels::{Isa, Kernels};
use std::hint::black_box;

const WIDTH: usize = 2560;
/// Vocabulary of the Llama 3 tokenizer.
const VOCABULARY: usize = 128_256;
const SLICE: usize = 200;

fn heads(c: &mut Criterion) {
    let x: Vec<f32> = (0..WIDTH).map(|i| (i % 101) as f32 * 0.02 - 1.0).collect();
    let mut out = vec![0.0f32; VOCABULARY];
    let scales = vec![0.01f32; VOCABULARY];
    let bf16: Vec<u16> = (0..VOCABULARY * WIDTH).map(|i| 0x3f00 + (i % 77) as u16).collect();
    let int8: Vec<i8> = (0..VOCABULARY * WIDTH).map(|i| (i % 255) as u8 as i8).collect();
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar) {
        for (place, rows) in [("L2", SLICE), ("memory", VOCABULARY)] {
            let mut group = c.benchmark_group(format!("head/{place}"));
            group.sample_size(10);
            group.throughput(Throughput::Bytes((2 * rows * WIDTH) as u64));
            group.bench_function(BenchmarkId::new("bf16", k.isa()), |b| {
                b.iter(|| k.head_bf16(&bf16[..rows * WIDTH], black_box(&x), &mut out[..rows]));
            });
            group.throughput(Throughput::Bytes((rows * WIDTH) as u64));
            group.bench_function(BenchmarkId::new("int8", k.isa()), |b| {
                b.iter(|| {
                    k.head_int8(&int8[..rows * WIDTH], &scales[..rows], black_box(&x), &mut out[..rows])
                });
            });
        }
    }
}

fn quantize(c: &mut Criterion) {
    let bf16: Vec<u16> = (0..SLICE * WIDTH).map(|i| 0x3f00 + (i % 77) as u16).collect();
    let (mut codes, mut scales) = (vec![0i8; bf16.len()], vec![0.0f32; SLICE]);
    let mut group = c.benchmark_group("head/quantize");
    group.throughput(Throughput::Bytes(2 * bf16.len() as u64));
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa) {
        group.bench_function(BenchmarkId::new("int8", k.isa()), |b| {
            b.iter(|| k.quantize_rows_int8(black_box(&bf16), WIDTH, &mut codes, &mut scales));
        });
    }
}

criterion_group! {
    name = benches;
    config = longbit_benches::criterion();
    targets = heads, quantize
}
criterion_main!(benches);
