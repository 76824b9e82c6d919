use std::ops::Range;
use std::sync::Arc;

use longbit_kernels::Kernels;
use longbit_sys::Team;

use super::step::{Cluster, excess};
use crate::attention::partial::{self, stride};
use crate::attention::{GroupQuery, HeadMethod, MethodShape, Place, Reader, Selection, method};
use crate::kv::{CacheShape, KvCache, KvHead, kv_dtype};
use crate::model::RopeTable;

const D: usize = 32;
const GROUP: usize = 2;

/// Numbers of a plain generator, the same everywhere, from -1 to 1.
fn numbers(seed: u32) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn rows(n: usize, seed: u32) -> Vec<f32> {
    let mut next = numbers(seed);
    (0..n * D).map(|_| next()).collect()
}

/// Rows about a mean that one of `topics` has, `noise` apart; neighbours often share it.
fn topical(n: usize, topics: usize, noise: f32, seed: u32) -> Vec<f32> {
    let means = rows(topics, 77);
    let (mut next, mut topic) = (numbers(seed), 0);
    let mut out = Vec::new();
    for _ in 0..n {
        if next() > 0.6 {
            topic = ((next() + 1.0) * 0.5 * topics as f32) as usize % topics;
        }
        out.extend(means[topic * D..(topic + 1) * D].iter().map(|m| m + noise * next()));
    }
    out
}

fn cache(keys: &[f32], values: &[f32]) -> KvCache {
    let capacity = keys.len() / D;
    let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity };
    let cache = KvCache::new(shape, kv_dtype("f32").unwrap(), Kernels::best()).unwrap();
    cache.head_mut(0, 0).append(keys, values).unwrap();
    cache
}

fn cluster(spec: &str, kv: &KvHead) -> Cluster {
    let dtype = kv_dtype("f32").unwrap();
    let shape = MethodShape { layers: 1, kv_heads: 1, head_dim: D, group: 1, dtype };
    let spec = method(&format!("cluster:{spec}")).unwrap();
    spec.check(&shape).unwrap();
    let mut cluster = Cluster::new(spec.params(), &shape);
    cluster.appended(kv, 0);
    cluster
}

/// Attention over `spans`, merged with `tail` if there is any.
fn outputs(kv: &KvHead, queries: &[f32], spans: &[Range<usize>], tail: &[f32]) -> Vec<f32> {
    let (mut reader, mut logits) = (Reader::default(), Vec::new());
    let query = GroupQuery { rows: queries, head_dim: D, position: kv.len() - 1 };
    let mut whole = vec![0.0; GROUP * stride(D)];
    reader.logits(query, kv, spans, &mut logits);
    reader.partial(kv, spans, &mut logits, &mut whole);
    if !tail.is_empty() {
        partial::merge(kv.kernels(), &mut whole, tail, D, &mut Vec::new());
    }
    let mut out = vec![0.0; GROUP * D];
    partial::finish(kv.kernels(), &whole, D, &mut out);
    out
}

/// The error of `spec` against attention to all, and how many tokens it read.
fn error(spec: &str, kv: &KvHead, queries: &[f32]) -> (f64, u64) {
    let exact = outputs(kv, queries, std::slice::from_ref(&(0..kv.len())), &[]);
    let mut out = Selection::default();
    let query = GroupQuery { rows: queries, head_dim: D, position: kv.len() - 1 };
    cluster(spec, kv).select(query, kv, &mut out);
    let ours = outputs(kv, queries, &out.spans, &out.tail);
    let square: f64 = ours.iter().zip(&exact).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let whole: f64 = exact.iter().map(|x| f64::from(*x).powi(2)).sum();
    ((square / whole).sqrt(), out.tokens() as u64 + out.tail_rows)
}

#[test]
fn every_middle_token_is_in_one_cluster_or_an_outlier() {
    let n = 4 + 3 * 256 + 40;
    let mut keys = topical(n, 20, 0.3, 1);
    // Tokens that all are equal leave centroids without tokens.
    let same = keys[300 * D..301 * D].to_vec();
    (300..420).for_each(|t| keys[t * D..(t + 1) * D].copy_from_slice(&same));
    let cache = cache(&keys, &rows(n, 2));
    let kv = cache.head(0, 0);
    let index = cluster("sinks=4,segment=256,local=30,outliers=5", &kv).index;
    assert_eq!(index.segments(), 3);
    assert!(index.clusters() > 3 * 8 && index.clusters() <= 3 * 16);
    let mut seen = vec![0; n];
    for c in 0..index.clusters() {
        let tokens: Vec<usize> = index.of(c).collect();
        assert!(!tokens.is_empty() && tokens.windows(2).all(|w| w[0] < w[1]), "{tokens:?}");
        assert_eq!((tokens.len(), libm::logf(tokens.len() as f32)), (index.size(c), index.log_sizes[c]));
        tokens.into_iter().for_each(|t| seen[t] += 1);
    }
    for segment in 0..3 {
        index.outliers(segment).for_each(|t| seen[t] += 1);
    }
    assert!((0..n).all(|t| seen[t] == usize::from((4..4 + 3 * 256).contains(&t))), "{seen:?}");
    assert!(index.bytes() > 0);
}

/// A token that is like no other is kept apart.
#[test]
fn a_token_unlike_its_neighbours_is_an_outlier() {
    let n = 16 + 256 + 128;
    let mut keys = topical(n, 4, 0.1, 1);
    keys[200 * D..201 * D].iter_mut().for_each(|x| *x = -*x);
    let cache = cache(&keys, &rows(n, 2));
    let index = cluster("segment=256,outliers=16", &cache.head(0, 0)).index;
    assert!(index.outliers(0).any(|t| t == 200));
}

/// Where all keys of a cluster are equal there is nothing to estimate but a rounded mean.
#[test]
fn masses_are_exact_where_keys_are_equal() {
    let n = 16 + 512 + 128;
    let cache = cache(&topical(n, 6, 0.0, 3), &rows(n, 2));
    let kv = cache.head(0, 0);
    let queries = rows(GROUP, 5);
    let mut state = cluster("segment=512,outliers=0", &kv);
    let query = GroupQuery { rows: &queries, head_dim: D, position: n - 1 };
    state.estimate(query, kv.kernels());
    let clusters = state.index.clusters();
    let mut logits = Vec::new();
    Reader::default().logits(query, &kv, std::slice::from_ref(&(0..n)), &mut logits);
    for (masses, logits) in state.masses.chunks_exact(clusters).zip(logits.chunks_exact(n)) {
        for (c, mass) in masses.iter().enumerate() {
            let exact = state.index.of(c).map(|t| f64::from(logits[t]).exp()).sum::<f64>().ln();
            assert!((f64::from(*mass) - exact).abs() < 0.03, "cluster {c}: {mass} {exact}");
        }
    }
}

/// The second-order term: unbiased where logits spread a little, and never more than the tokens can realise.
#[test]
fn the_mass_of_spread_keys_is_nearly_right() {
    let n = 16 + 8192 + 128;
    let cache = cache(&topical(n, 40, 0.5, 3), &rows(n, 2));
    let kv = cache.head(0, 0);
    let queries: Vec<f32> = rows(GROUP, 5).iter().map(|q| 0.8 * q).collect();
    let mut state = cluster("outliers=0", &kv);
    let query = GroupQuery { rows: &queries, head_dim: D, position: n - 1 };
    state.estimate(query, kv.kernels());
    let mut logits = Vec::new();
    Reader::default().logits(query, &kv, std::slice::from_ref(&(16..16 + 8192)), &mut logits);
    let clusters = state.index.clusters();
    for (masses, logits) in state.masses.chunks_exact(clusters).zip(logits.chunks_exact(8192)) {
        let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        assert!((sum(masses) - sum(logits)).abs() < 0.1, "{} {}", sum(masses), sum(logits));
    }
    assert_eq!(excess(1.0, 3.0), 0.5);
    assert!((excess(6.0, 3.0) - 3.0).abs() < 1e-6 && excess(8.0, 3.0) < 4.0);
    assert_eq!(excess(0.0, 0.0), 0.0);
}

#[test]
fn constant_values_come_out_whatever_is_read() {
    let n = 3000;
    let values: Vec<f32> = (0..n).flat_map(|_| (0..D).map(|i| i as f32 - 7.5)).collect();
    let cache = cache(&topical(n, 30, 0.5, 3), &values);
    let kv = cache.head(0, 0);
    let queries = rows(GROUP, 5);
    for spec in [
        "by=mass,p=0",
        "by=mass,p=0.5",
        "tau=0.02",
        "by=mass,p=0.7,calibrate=0.5,outliers=0",
        "by=mass,cap=0.01",
    ] {
        let (apart, read) = error(&format!("{spec},segment=512"), &kv, &queries);
        assert!(apart < 1e-5, "{spec}: {apart}");
        assert!(read < n as u64, "{spec}");
    }
}

#[test]
fn the_error_falls_with_what_is_read() {
    let n = 16 + 4 * 1024 + 128;
    let cache = cache(&topical(n, 60, 0.5, 3), &topical(n, 60, 0.5, 3));
    let kv = cache.head(0, 0);
    let queries: Vec<f32> = rows(GROUP, 5).iter().map(|q| 1.5 * q).collect();
    let ladder = |specs: &[&str]| {
        let of = |spec: &&str| error(&format!("{spec},segment=1024,cap=1"), &kv, &queries);
        let errors: Vec<_> = specs.iter().map(of).collect();
        for (w, spec) in errors.windows(2).zip(&specs[1..]) {
            assert!(w[1].0 <= w[0].0 && w[1].1 > w[0].1, "{spec}: {errors:?}");
        }
        errors
    };
    let mass = ladder(&["by=mass,p=0.3", "by=mass,p=0.8", "by=mass", "by=mass,p=0.99"]);
    assert!(mass[3].0 < 0.03 && mass[0].0 > 5.0 * mass[3].0, "{mass:?}");
    ladder(&["tau=0.05", "tau=0.005", "tau=0.0005"]);
    let capped = error("by=mass,p=0.99,segment=1024,cap=0.05,outliers=0", &kv, &queries);
    assert!(capped.1 <= (16 + 128 + n / 20) as u64, "{capped:?}");
}

#[test]
fn segments_are_found_again_after_a_rewind_and_settings_that_contradict_are_refused() {
    let n = 16 + 3 * 256 + 64;
    let cache = cache(&topical(n, 20, 0.3, 1), &rows(n, 2));
    let mut state = cluster("segment=256,local=64", &cache.head(0, 0));
    assert_eq!(state.index.segments(), 3);
    let whole = (state.state_bytes(), state.index.keys.codes.clone(), state.index.members.clone());
    cache.head_mut(0, 0).truncate(n - 1);
    state.truncated(&cache.head(0, 0));
    assert_eq!(state.index.segments(), 2);
    let row = vec![0.5; D];
    cache.head_mut(0, 0).append(&row, &row).unwrap();
    state.appended(&cache.head(0, 0), n - 1);
    assert_eq!(whole, (state.state_bytes(), state.index.keys.codes.clone(), state.index.members.clone()));

    let dtype = kv_dtype("f32").unwrap();
    for (spec, head_dim, says) in [
        ("cluster:segment=64,size=40", 64, "two clusters"),
        ("cluster:segment=64,outliers=17", 64, "a quarter"),
        ("cluster", 20, "multiple of 8"),
        ("cluster", 1024, "at most 512"),
    ] {
        let shape = MethodShape { layers: 1, kv_heads: 1, head_dim, group: 1, dtype };
        let message = method(spec).unwrap().check(&shape).unwrap_err().to_string();
        assert!(message.contains(says), "{spec}: {message}");
    }
}

/// What is predicted is about what happens.
#[test]
fn predictions_are_near() {
    let n = 16 + 4 * 512 + 300;
    let cache = cache(&topical(n, 60, 0.5, 3), &rows(n, 2));
    let kv = cache.head(0, 0);
    let team = Team::new(1, false).unwrap();
    let rope = Arc::new(RopeTable::new(10_000.0, D, 8, &team).unwrap());
    let shape = MethodShape::of(&cache);
    let spec = method("cluster:segment=512").unwrap();
    let mut state = spec.make(&Place { shape, layer: 0, kv_head: 0, rope: &rope });
    state.appended(&kv, 0);
    let predicted = spec.predict(n, &shape);
    let (ours, bytes) = (predicted.state_bytes as f64, state.state_bytes() as f64);
    assert!((ours / bytes - 1.0).abs() < 0.1, "{ours} {bytes}");
    let mut out = Selection::default();
    let queries = rows(GROUP, 5);
    state.select(GroupQuery { rows: &queries, head_dim: D, position: n - 1 }, &kv, &mut out);
    let ratio = out.index_bytes as f64 / predicted.read_bytes as f64;
    assert!((0.6..1.6).contains(&ratio), "{ratio}");
}
