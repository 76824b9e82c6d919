//! A decode step of dense attention, in bytes of cached keys and values: 30 layers of the heads of a 2B model.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longbit_benches::{attention_session, criterion, thread_counts};

fn dense(c: &mut Criterion) {
    for kv in ["bf16", "f32"] {
        let mut group = c.benchmark_group(format!("attention/dense/{kv}"));
        group.sample_size(10);
        for context in [2048, 16_384] {
            for threads in thread_counts() {
                let (mut session, supplied) = attention_session(context, kv, threads);
                session.decode_supplied(0, &supplied, false).expect("a step");
                group.throughput(Throughput::Bytes(session.traffic().kv_bytes));
                session.rewind(context);
                group.bench_function(BenchmarkId::new(format!("{threads} threads"), context), |b| {
                    b.iter(|| {
                        session.decode_supplied(0, &supplied, false).expect("a step");
                        session.rewind(context);
                    });
                });
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = criterion();
    targets = dense
}
criterion_main!(benches);
