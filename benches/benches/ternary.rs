//! Ternary matrix products of one core, for every matrix shape of a 2B model: bytes of packed weights a second for one
//! token, from caches and from memory, and multiply-adds a second for batches. `compute_wall` has the walls beside them.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longbit_benches::model_2b;
use longbit_kernels::{Isa, Kernels, TernaryShape};
use std::hint::black_box;

struct Product {
    shape: TernaryShape,
    data: Vec<u8>,
    codes: Vec<i8>,
    sums: Vec<i32>,
    scales: Vec<f32>,
    out: Vec<f32>,
}

impl Product {
    fn new(rows: usize, cols: usize, tokens: usize) -> Product {
        let shape = TernaryShape { rows, cols };
        let mut data = vec![0; shape.bytes()];
        shape.fill_random(0..shape.tiles(), 1, &mut data);
        let padded = shape.padded_cols();
        let mut codes = vec![0i8; tokens * padded];
        for (i, code) in codes.iter_mut().enumerate() {
            if i % padded < cols {
                *code = (i * 37 % 255) as u8 as i8;
            }
        }
        let sums = codes.chunks(padded).map(|token| token.iter().map(|&c| i32::from(c)).sum()).collect();
        Product { shape, data, codes, sums, scales: vec![0.01; tokens], out: vec![0.0; tokens * rows] }
    }

    fn gemv(&mut self, k: &Kernels) {
        let tiles = 0..self.shape.tiles();
        k.ternary_gemv(
            self.shape,
            &self.data,
            tiles,
            &self.codes,
            self.sums[0],
            0.01,
            black_box(&mut self.out),
        );
    }

    fn gemm(&mut self, k: &Kernels) {
        let (tiles, tokens) = (0..self.shape.tiles(), self.sums.len());
        let out = black_box(&mut self.out);
        k.ternary_gemm(self.shape, &self.data, tiles, tokens, &self.codes, &self.sums, &self.scales, out);
    }
}

fn tables() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().into_iter().filter_map(Kernels::for_isa)
}

/// The matrices of a 2B model, and one of a larger model whose width is a power of two.
fn shapes() -> [(usize, usize); 5] {
    let config = model_2b();
    let (hidden, kv, wide) = (config.hidden, config.kv_heads * config.head_dim, config.intermediate);
    [(hidden, hidden), (kv, hidden), (wide, hidden), (hidden, wide), (4096, 4096)]
}

/// One matrix over and over, for one token: from the second or third level of cache.
fn gemv(c: &mut Criterion) {
    let mut group = c.benchmark_group("ternary/gemv/cached");
    for (rows, cols) in shapes() {
        let mut product = Product::new(rows, cols, 1);
        group.throughput(Throughput::Bytes(product.data.len() as u64));
        for k in tables().filter(|k| k.isa() != Isa::Scalar) {
            group.bench_function(BenchmarkId::new(format!("{rows}x{cols}"), k.isa()), |b| {
                b.iter(|| product.gemv(k))
            });
        }
    }
}

/// As many down projections of a 2B model as make 620 MB: more than any last-level cache.
fn gemv_from_memory(c: &mut Criterion) {
    let mut group = c.benchmark_group("ternary/gemv/memory");
    group.sample_size(10);
    let (rows, cols) = (model_2b().hidden, model_2b().intermediate);
    let mut product = Product::new(140 * rows, cols, 1);
    group.throughput(Throughput::Bytes(product.data.len() as u64));
    for k in tables().filter(|k| k.isa() != Isa::Scalar) {
        group.bench_function(BenchmarkId::new(format!("140 of {rows}x{cols}"), k.isa()), |b| {
            b.iter(|| product.gemv(k))
        });
    }
}

/// Multiply-adds a second, for prefill and batches.
fn gemm(c: &mut Criterion) {
    let mut group = c.benchmark_group("ternary/gemm");
    group.sample_size(10);
    for (rows, cols) in shapes() {
        for tokens in [4, 64] {
            let mut product = Product::new(rows, cols, tokens);
            group.throughput(Throughput::Elements((rows * cols * tokens) as u64));
            for k in tables().filter(|k| k.isa() != Isa::Scalar) {
                let id = BenchmarkId::new(format!("{rows}x{cols} by {tokens} tokens"), k.isa());
                group.bench_function(id, |b| b.iter(|| product.gemm(k)));
            }
        }
    }
}

/// Filling a matrix, which every synthetic cell does.
fn fill(c: &mut Criterion) {
    let mut group = c.benchmark_group("ternary/fill");
    let shape = TernaryShape { rows: 512, cols: model_2b().hidden };
    let mut data = vec![0; shape.bytes()];
    group.throughput(Throughput::Bytes(data.len() as u64));
    group.bench_function("random", |b| {
        b.iter(|| shape.fill_random(0..shape.tiles(), 1, black_box(&mut data)));
    });
    let packed = vec![0b01_10_00_01; shape.rows / 4 * shape.cols];
    group.bench_function("repack", |b| {
        b.iter(|| shape.repack_hf(black_box(&packed), 0..shape.tiles(), &mut data));
    });
}

criterion_group! {
    name = benches;
    config = longbit_benches::criterion();
    targets = gemv, gemv_from_memory, gemm, fill
}
criterion_main!(benches);
