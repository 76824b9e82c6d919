//! The float operations of a decode step on one token's vectors, in the first-level cache: bytes read of one operand.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longbit_kernels::{Isa, Kernels};
use std::hint::black_box;

/// The feed-forward width of a 2B model.
fn width() -> usize {
    longbit_benches::model_2b().intermediate
}

fn vector(seed: usize) -> Vec<f32> {
    (0..width()).map(|i| ((i * 37 + seed) % 101) as f32 * 0.02 - 1.0).collect()
}

fn operations(c: &mut Criterion) {
    let (x, y) = (vector(0), vector(11));
    let mut out = vec![0.0f32; width()];
    let mut codes = vec![0i8; width()];
    let mut narrow = vec![0u16; width()];
    for k in Isa::available().into_iter().filter_map(Kernels::for_isa) {
        let mut group = c.benchmark_group("floats/L1");
        group.throughput(Throughput::Bytes(4 * width() as u64));
        macro_rules! op {
            ($name:literal, $call:expr) => {
                group.bench_function(BenchmarkId::new($name, k.isa()), |b| b.iter(|| $call));
            };
        }
        op!("dot", k.dot(black_box(&x), &y));
        op!("max", k.max(black_box(&x)));
        op!("rmsnorm", k.rmsnorm(black_box(&x), &y, 1e-5, &mut out));
        op!("relu2_mul", k.relu2_mul(black_box(&x), &y, &mut out));
        op!("silu_mul", k.silu_mul(black_box(&x), &y, &mut out));
        op!("exp_sum", {
            out.copy_from_slice(black_box(&x));
            k.exp_sum(&mut out, 1.0)
        });
        op!("add_assign", k.add_assign(&mut out, black_box(&x)));
        op!("scale_add", k.scale_add(&mut out, 0.5, black_box(&x), 0.5));
        op!("quantize_activations", k.quantize_activations(black_box(&x), &mut codes));
        op!("f32_to_bf16", k.f32_to_bf16(black_box(&x), &mut narrow));
        op!("bf16_to_f32", k.bf16_to_f32(black_box(&narrow), &mut out));
        group.throughput(Throughput::Bytes(4 * 128));
        op!("rope/128", k.rope(&mut out[..128], black_box(&x[..64]), &y[..64]));
    }
}

criterion_group! {
    name = benches;
    config = longbit_benches::criterion();
    targets = operations
}
criterion_main!(benches);
