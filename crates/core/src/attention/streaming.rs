//! `streaming`: the first tokens and the most recent ones, at positions within the cache (StreamingLLM, arXiv 2309.17453).
//!
//! The authors keep keys before rotation and turn each by its slot in the cache, the query by the last slot. Among the
//! recent tokens, whose slots follow one another, distances stay what they were: only the sinks come nearer to the query, by
//! as many positions as lie between them and the recent tokens. So the recent tokens are read as they are cached, and the
//! sinks are met by the query turned back by that many positions: the same logits, with keys cached once, after RoPE. With
//! `pos=orig` the sinks stay where they are (`window`).
//!
//! Nothing is evicted: the rows that are not read stay in the cache, so a rewind finds them, and memory is that of the
//! whole context. A decode step costs what the method's would: `sinks + window` rows, and a turn of the group's queries.

use std::sync::Arc;

use super::params::ParamSpec;
use super::partial::stride;
use super::{GroupQuery, HeadMethod, Method, Place, Predicted, Reader, Selection};
use crate::kv::KvHead;
use crate::model::RopeTable;

pub(super) const METHOD: Method = Method {
    name: "streaming",
    summary: "attention sinks and the most recent tokens, at positions within the cache (StreamingLLM, arXiv 2309.17453)",
    params: &[
        ParamSpec::sinks("4"),
        ParamSpec::int("window", "most recent tokens read, the newest included", [1, 1 << 24], "1020"),
        ParamSpec::choice(
            "pos",
            "positions of the sinks: their slots in the cache, or the original ones",
            &["cache", "orig"],
            "cache",
        ),
    ],
    settings: true,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, place| {
        Box::new(Streaming::new(p.int("sinks"), p.int("window"), p.word("pos") == "cache", place))
    },
    predict: |p, context, _| Predicted::rows((p.int("sinks") + p.int("window")).min(context)),
};

struct Streaming {
    sinks: usize,
    window: usize,
    /// What turned the queries, where they are to be turned back.
    rope: Option<Arc<RopeTable>>,
    /// Whether cached keys, and queries with them, are rotated after RoPE.
    rotated: bool,
    reader: Reader,
    turned: Vec<f32>,
    sines: Vec<f32>,
    logits: Vec<f32>,
}

impl Streaming {
    fn new(sinks: usize, window: usize, slots: bool, place: &Place<'_>) -> Self {
        Streaming {
            sinks,
            window,
            rope: slots.then(|| place.rope.clone()),
            rotated: place.shape.dtype.keys.rotate(),
            reader: Reader::default(),
            turned: Vec::new(),
            sines: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// The queries at positions earlier by `back`, in `turned`.
    fn turn(&mut self, query: GroupQuery<'_>, kv: &KvHead, rope: &RopeTable, back: usize) {
        let (d, kernels) = (query.head_dim, kv.kernels());
        self.turned.clear();
        self.turned.extend_from_slice(query.rows);
        if self.rotated {
            kernels.hadamard_unsigned(&mut self.turned, d);
        }
        // Backwards: the conjugate angles.
        let at = back..back + 1;
        self.sines.clear();
        self.sines.extend(rope.sin(at.clone()).iter().map(|sine| -sine));
        self.turned.chunks_exact_mut(d).for_each(|row| kernels.rope(row, rope.cos(at.clone()), &self.sines));
        if self.rotated {
            kernels.hadamard_signed(&mut self.turned, d);
        }
    }
}

impl HeadMethod for Streaming {
    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let recent = kv.len().saturating_sub(self.window);
        if recent <= self.sinks {
            out.spans.push(0..kv.len());
            return;
        }
        out.spans.push(recent..kv.len());
        if self.sinks == 0 {
            return;
        }
        let sinks = 0..self.sinks;
        let Some(rope) = self.rope.clone() else {
            out.spans.insert(0, sinks);
            return;
        };
        self.turn(query, kv, &rope, recent - self.sinks);
        let turned = GroupQuery { rows: &self.turned, ..query };
        self.reader.logits(turned, kv, std::slice::from_ref(&sinks), &mut self.logits);
        out.tail.resize(query.group() * stride(query.head_dim), 0.0);
        self.reader.partial(kv, &[sinks], &mut self.logits, &mut out.tail);
        self.reader.report(out);
        out.tail_rows = self.sinks as u64;
    }
}

#[cfg(test)]
mod tests {
    use longbit_kernels::Kernels;
    use longbit_sys::Team;

    use super::*;
    use crate::attention::testing::noise;
    use crate::attention::{MethodShape, method, partial};
    use crate::kv::{CacheShape, KvCache, kv_dtype};

    const D: usize = 64;
    const GROUP: usize = 2;

    fn rows(n: usize, seed: u32) -> Vec<f32> {
        noise(n * D, seed)
    }

    fn turned(row: &[f32], position: usize) -> Vec<f64> {
        let half = D / 2;
        let mut out = vec![0.0; D];
        for i in 0..half {
            let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / D as f64);
            let (a, b) = (f64::from(row[i]), f64::from(row[i + half]));
            (out[i], out[i + half]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
        }
        out
    }

    /// The definition, from rows before RoPE: the tokens in the cache are turned by their slots, the query by the last slot.
    fn defined(kept: &[usize], keys: &[f32], values: &[f32], query: &[f32]) -> Vec<f64> {
        let query = turned(query, kept.len() - 1);
        let logit = |(slot, &t): (usize, &usize)| -> f64 {
            turned(&keys[t * D..(t + 1) * D], slot).iter().zip(&query).map(|(k, q)| k * q).sum()
        };
        let weights: Vec<f64> = kept.iter().enumerate().map(|x| logit(x).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let value =
            |i: usize| kept.iter().zip(&weights).map(|(t, w)| f64::from(values[t * D + i]) * w).sum::<f64>();
        (0..D).map(|i| value(i) / sum).collect()
    }

    /// `[group][D]` of a method on a cache of `len` tokens, restored, and its selection.
    fn ours(
        dtype: &str,
        spec: &str,
        len: usize,
        keys: &[f32],
        values: &[f32],
        queries: &[f32],
    ) -> (Vec<f32>, Selection) {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: len };
        let cache = KvCache::new(shape, kv_dtype(dtype).unwrap(), Kernels::best()).unwrap();
        let rope = Arc::new(RopeTable::new(10_000.0, D, len, &Team::new(1, false).unwrap()).unwrap());
        let turn = |row: &[f32], t: usize| turned(row, t).into_iter().map(|x| x as f32).collect::<Vec<_>>();
        let keys: Vec<f32> =
            keys.chunks_exact(D).take(len).enumerate().flat_map(|(t, k)| turn(k, t)).collect();
        let mut queries: Vec<f32> = queries.chunks_exact(D).flat_map(|q| turn(q, len - 1)).collect();
        cache.head_mut(0, 0).append(&keys, &values[..len * D]).unwrap();
        let kv = cache.head(0, 0);
        kv.rotate_queries(&mut queries);
        let place = Place { shape: MethodShape::of(&cache), layer: 0, kv_head: 0, rope: &rope };
        let query = GroupQuery { rows: &queries, head_dim: D, position: len - 1 };
        let mut selection = Selection::default();
        method(spec).unwrap().make(&place).select(query, &kv, &mut selection);
        let (mut reader, mut logits) = (Reader::default(), Vec::new());
        let mut whole = vec![0.0; GROUP * stride(D)];
        reader.logits(query, &kv, &selection.spans, &mut logits);
        reader.partial(&kv, &selection.spans, &mut logits, &mut whole);
        if !selection.tail.is_empty() {
            partial::merge(kv.kernels(), &mut whole, &selection.tail, D, &mut Vec::new());
        }
        let mut out = vec![0.0; GROUP * D];
        partial::finish(kv.kernels(), &whole, D, &mut out);
        kv.restore_outputs(&mut out);
        (out, selection)
    }

    fn apart(ours: &[f32], exact: &[f64]) -> f64 {
        let square: f64 = ours.iter().zip(exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
        (square / exact.iter().map(|x| x * x).sum::<f64>()).sqrt()
    }

    #[test]
    fn it_is_the_definition_with_keys_turned_to_their_slots() {
        let (keys, values) = (rows(500, 1), rows(500, 2));
        let queries: Vec<f32> = rows(GROUP, 3).iter().map(|q| 0.6 * q).collect();
        for (dtype, bound) in
            [("f32", 1e-4), ("f32+rotate", 1e-4), ("bf16+rotate+centre", 0.01), ("int8", 0.02)]
        {
            for (len, sinks, window) in [(500, 4, 60), (500, 1, 1), (37, 4, 32), (36, 4, 32), (500, 0, 60)] {
                let spec = format!("streaming:sinks={sinks},window={window}");
                let (out, selection) = ours(dtype, &spec, len, &keys, &values, &queries);
                let kept: Vec<usize> = (0..len).filter(|&t| t < sinks || t + window >= len).collect();
                assert_eq!(selection.tokens() + selection.tail_rows as usize, kept.len(), "{spec}");
                for (query, out) in queries.chunks_exact(D).zip(out.chunks_exact(D)) {
                    let apart = apart(out, &defined(&kept, &keys, &values, query));
                    assert!(apart < bound, "{spec} of {dtype}, {len} tokens: {apart}");
                }
            }
        }
    }

    /// It makes a difference, and original positions are those of `window`.
    #[test]
    fn original_positions_are_the_plain_window() {
        let (keys, values, queries) = (rows(500, 1), rows(500, 2), rows(GROUP, 3));
        let of = |spec| ours("f32", spec, 500, &keys, &values, &queries);
        let (orig, window) = (of("streaming:window=60,pos=orig"), of("window:window=60"));
        assert_eq!(orig, window);
        let cache = of("streaming:window=60").0;
        let exact: Vec<f64> = orig.0.iter().map(|x| f64::from(*x)).collect();
        assert!(apart(&cache, &exact) > 0.01);
    }
}
