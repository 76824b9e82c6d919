//! What the tests of methods share: numbers, a cache of one head, a state, and what it leads to.

use std::sync::Arc;

use longbit_kernels::Kernels;
use longbit_sys::Team;

use super::partial::{self, stride};
use super::{GroupQuery, HeadMethod, MethodShape, Place, Reader, Selection, method};
use crate::kv::{CacheShape, KvCache, KvHead, kv_dtype};
use crate::model::RopeTable;

/// Numbers of a plain generator from -1 to 1, the same everywhere.
pub(super) fn generator(seed: u32) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// The first `n` numbers of a [`generator`].
pub(crate) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut next = generator(seed);
    (0..n).map(|_| next()).collect()
}

/// A cache of one head with these rows.
pub(super) fn cache(dtype: &str, d: usize, keys: &[f32], values: &[f32]) -> KvCache {
    let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: d, capacity: keys.len() / d };
    let cache = KvCache::new(shape, kv_dtype(dtype).unwrap(), Kernels::best()).unwrap();
    cache.head_mut(0, 0).append(keys, values).unwrap();
    cache
}

/// The state of `spec`, with what `cache` holds.
pub(super) fn state(spec: &str, cache: &KvCache) -> Box<dyn HeadMethod> {
    let shape = MethodShape::of(cache);
    let spec = method(spec).unwrap();
    spec.check(&shape).unwrap();
    let rope = RopeTable::new(10_000.0, shape.head_dim, 8, &Team::new(1, false).unwrap()).unwrap();
    let mut state = spec.make(&Place { shape, layer: 0, kv_head: 0, rope: &Arc::new(rope) });
    state.appended(&cache.head(0, 0), 0);
    state
}

/// What `state` decides for queries that are rotated as the keys are.
pub(super) fn select(state: &mut dyn HeadMethod, kv: &KvHead, queries: &[f32]) -> Selection {
    let mut out = Selection::default();
    let query = GroupQuery { rows: queries, head_dim: kv.head_dim(), position: kv.len() - 1 };
    state.select(query, kv, &mut out);
    out
}

/// The outputs that `selection` leads to.
pub(super) fn outputs(selection: &Selection, kv: &KvHead, queries: &[f32]) -> Vec<f32> {
    let d = kv.head_dim();
    let (mut reader, mut logits) = (Reader::default(), Vec::new());
    let query = GroupQuery { rows: queries, head_dim: d, position: kv.len() - 1 };
    let mut whole = vec![0.0; query.group() * stride(d)];
    reader.logits(query, kv, &selection.spans, &mut logits);
    reader.partial(kv, &selection.spans, &mut logits, &mut whole);
    if !selection.tail.is_empty() {
        partial::merge(kv.kernels(), &mut whole, &selection.tail, d, &mut Vec::new());
    }
    let mut out = vec![0.0; queries.len()];
    partial::finish(kv.kernels(), &whole, d, &mut out);
    out
}

/// Outputs when everything is read.
pub(super) fn dense(kv: &KvHead, queries: &[f32]) -> Vec<f32> {
    let spans = std::iter::once(0..kv.len()).collect();
    outputs(&Selection { spans, ..Selection::default() }, kv, queries)
}

/// The root of the mean square of what is apart, as a share of `b`.
pub(super) fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (apart / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}
