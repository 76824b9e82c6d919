//! What must hold for every method, tested on a small cache. A method adds its line to [`CASES`].

use std::sync::Arc;

use longbit_kernels::Kernels;
use longbit_sys::Team;

use super::params::Kind;
use super::partial::stride;
use super::testing::{dense, distance, generator, outputs};
use super::{GroupQuery, HeadMethod, METHODS, MethodShape, Place, Selection, method};
use crate::error::Error;
use crate::kv::{CacheShape, KV_FORMATS, KvCache, kv_dtype};
use crate::model::RopeTable;

/// Of each method a specification that chooses among 700 tokens, and one that reads all of them; none where it never
/// does, with the reason beside it.
pub(crate) const CASES: &[(&str, Option<&str>)] = &[
    ("dense", Some("dense")),
    ("dense-skip:lost=0.5", Some("dense-skip:lost=0")),
    ("window:sinks=4,window=64", Some("window:window=1000")),
    ("window:sinks=4,window=64,reuse=3", Some("window:window=1000,reuse=3")),
    ("streaming:sinks=4,window=64", Some("streaming:window=1000")),
    ("longformer:window=64,dilation=2,global_every=50", Some("longformer:window=1000")),
    ("sparq:channels=8,k=40,local=10", Some("sparq:k=1000,local=1")),
    ("doublesparsity:channels=8,share=0.05,least=10", Some("doublesparsity:share=1")),
    ("twilight:p=0.6,stage1=none", Some("twilight:p=1")),
    ("twilight:p=0.6,budget=100,channels=8", Some("twilight:p=1,stage1=none")),
    ("bitplane:p=0.6,sinks=4,local=40", Some("bitplane:p=1,most=1")),
    ("bitplane:p=0.9,margin=0,means=global", Some("bitplane:sinks=1000")),
    ("bitplane:p=0.9,most=0.02,means=none", Some("bitplane:p=1,most=1,means=none")),
    ("cluster:sinks=4,local=16,segment=128,by=mass,cap=0.1", Some("cluster:segment=128,by=mass,p=1,cap=1")),
    ("cluster:sinks=4,local=16,segment=64,tau=0.01,calibrate=0.5", Some("cluster:local=1000")),
    ("window:window=8,dense_layers=even", Some("window:window=8,dense_layers=even")),
    ("topk:k=40", Some("topk:share=1")),
    ("topk:k=40,tail=mean,sinks=2,local=8", Some("topk:k=1000,tail=mean")),
    ("topp:p=0.5,tail=mean,sinks=4", Some("topp:p=1")),
    ("threshold:tau=0.1,tail=mean,local=4", Some("threshold:tau=0")),
    ("entropy:tail=mean,sinks=4", Some("entropy:min=1,max=1")),
    ("vattention", Some("vattention:base=1")),
    ("vattention:topk=none,block=8", Some("vattention:topk=none,block=8,base=1")),
    ("magicpig:bits=4,tables=40", Some("magicpig:hits=0")),
    ("magicpig:bits=4,tables=40,index=packed,reuse=2", Some("magicpig:local=1000")),
    ("reformer:local=8", Some("reformer:local=1000")),
    ("quest:budget=64", Some("quest:budget=1024")),
    ("quest:page=7,budget=50", Some("quest:page=7,budget=1024")),
    ("blocktopk:block=16,budget=64,local=32", Some("blocktopk")),
    ("blocktopk:block=10,budget=64,second=on,tail=mean,sinks=0,local=9", Some("blocktopk:tail=mean")),
    ("landmark:top=3", Some("landmark:top=20")),
    // One softmax for each block is not dense, whatever is read.
    ("landmark:block=20,top=3,local=2,softmax=grouped", None),
    ("nsa:top=4,window=64", Some("nsa")),
    ("nsa:block=24,stride=8,select=16,top=5,local=1,window=10", Some("nsa:window=1000")),
    // Here no prompt is ever over and no memory goes; `evict_tests` has what follows from those.
    ("h2o:budget=64", Some("h2o:budget=1000")),
    ("snapkv:capacity=64,window=16", Some("snapkv")),
    ("tova:budget=64", Some("tova:budget=1000")),
    ("expected:budget=64", Some("expected")),
    ("lru:budget=64", Some("lru:budget=1000")),
];

/// Numbers a row; a power of two, so that every format and rotation can serve it.
const D: usize = 64;
const GROUP: usize = 2;
const CAPACITY: usize = 1024;
/// Formats of one kind each: floats, a scale a row, planes, rotated and centred blocks, channels of the newest tokens kept
/// exactly.
const DTYPES: [&str; 5] = ["f32", "bf16", "int8", "planes8", "kivi4"];

/// Rows of a plain generator with a mean, a slow drift and some giants, the same everywhere.
fn rows(n: usize, seed: u32) -> Vec<f32> {
    let mut next = generator(seed);
    (0..n * D)
        .map(|i| {
            let (token, channel) = (i / D, i % D);
            let giant = if (token * 7919 + seed as usize).is_multiple_of(61) { 3.0 } else { 1.0 };
            giant * next() + if channel % 16 == 3 { 1.5 } else { 0.1 * (token / 100) as f32 }
        })
        .collect()
}

struct Lab {
    cache: KvCache,
    rope: Arc<RopeTable>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Lab {
    fn new(dtype: &str) -> Self {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: CAPACITY };
        let team = Team::new(1, false).unwrap();
        Lab {
            cache: KvCache::new(shape, kv_dtype(dtype).unwrap(), Kernels::best()).unwrap(),
            rope: Arc::new(RopeTable::new(10_000.0, D, CAPACITY, &team).unwrap()),
            keys: rows(CAPACITY, 1),
            values: rows(CAPACITY, 2),
        }
    }

    fn state(&self, spec: &str) -> Box<dyn HeadMethod> {
        let shape = MethodShape::of(&self.cache);
        let spec = method(spec).unwrap();
        spec.check(&shape).unwrap();
        spec.make(&Place { shape, layer: 0, kv_head: 0, rope: &self.rope })
    }

    /// Appends until `len` tokens are cached, and tells `state`.
    fn grow(&self, state: &mut dyn HeadMethod, len: usize) {
        let mut kv = self.cache.head_mut(0, 0);
        let from = kv.len();
        kv.append(&self.keys[from * D..len * D], &self.values[from * D..len * D]).unwrap();
        state.appended(&kv, from);
    }

    fn rewind(&self, state: &mut dyn HeadMethod, len: usize) {
        let mut kv = self.cache.head_mut(0, 0);
        kv.truncate(len);
        state.truncated(&kv);
    }

    /// The queries of step `step`, as [`GroupQuery`] has them.
    fn queries(&self, step: u32) -> Vec<f32> {
        let mut queries = rows(GROUP, 100 + step);
        queries.iter_mut().for_each(|q| *q *= 0.7);
        self.cache.head(0, 0).rotate_queries(&mut queries);
        queries
    }

    /// What `state` decides at step `step`; it must be in order, and what it read itself must have been counted.
    fn select(&self, state: &mut dyn HeadMethod, step: u32) -> Selection {
        let kv = self.cache.head(0, 0);
        let queries = self.queries(step);
        let mut out = Selection::default();
        kv.take_observed();
        state.select(
            GroupQuery { rows: &queries, head_dim: D, position: kv.len().saturating_sub(1) },
            &kv,
            &mut out,
        );
        assert_eq!(out.read_bytes, kv.take_observed(), "bytes of rows that it read itself");
        assert!(out.spans.iter().all(|s| s.start < s.end && s.end <= kv.len()), "{:?}", out.spans);
        assert!(out.spans.windows(2).all(|w| w[0].end <= w[1].start), "{:?}", out.spans);
        assert!(out.tail.is_empty() || out.tail.len() == GROUP * stride(D));
        assert!(out.tail.iter().all(|x| !x.is_nan()));
        out
    }

    /// The outputs that `selection` leads to, `[group][D]`, not rotated back.
    fn outputs(&self, selection: &Selection, step: u32) -> Vec<f32> {
        let kv = self.cache.head(0, 0);
        outputs(selection, &kv, &self.queries(step))
    }

    fn dense(&self, step: u32) -> Vec<f32> {
        let kv = self.cache.head(0, 0);
        dense(&kv, &self.queries(step))
    }
}

/// The specifications that can serve a format.
fn cases(dtype: &str) -> impl Iterator<Item = (&'static str, Option<&'static str>)> {
    let shape =
        MethodShape { layers: 1, kv_heads: 1, head_dim: D, group: 1, dtype: kv_dtype(dtype).unwrap() };
    CASES.iter().copied().filter(move |(spec, _)| method(spec).unwrap().check(&shape).is_ok())
}

#[test]
fn every_method_has_a_case() {
    for method in METHODS {
        let named = |text: &str| text.split(':').next() == Some(method.name);
        assert!(CASES.iter().any(|(spec, _)| named(spec)), "no case of {}", method.name);
    }
    for (spec, all) in CASES {
        assert!(DTYPES.iter().any(|d| cases(d).any(|(s, _)| s == *spec)), "no format for {spec}");
        assert!(all.is_none_or(|all| method(all).is_ok()), "{all:?}");
    }
}

/// In every number format that a method can serve, and in two together.
#[test]
fn reading_everything_is_dense() {
    for dtype in KV_FORMATS.iter().map(|format| format.name).chain(["int4+plain", "k=q8_0,v=lm4"]) {
        for (_, all) in cases(dtype) {
            let Some(all) = all else { continue };
            let lab = Lab::new(dtype);
            let mut state = lab.state(all);
            let lengths = if DTYPES.contains(&dtype) { &[1, 2, 300, 700][..] } else { &[300, 700] };
            for &len in lengths {
                lab.grow(&mut *state, len);
                let (step, selection) = (len as u32, lab.select(&mut *state, len as u32));
                let apart = distance(&lab.outputs(&selection, step), &lab.dense(step));
                assert!(apart < 1e-4, "{all} of {dtype}, {len} tokens: {apart}");
            }
        }
    }
}

/// An index that grew row by row or in pieces, or came back from a rewind, decides as one built at once.
/// What fails for `kivi4` alone may have taken rows that were not settled yet.
#[test]
fn grown_equals_rebuilt() {
    for dtype in DTYPES {
        for (spec, _) in cases(dtype) {
            let lab = Lab::new(dtype);
            let mut grown = lab.state(spec);
            for len in [1, 2, 3, 60, 256, 257, 500] {
                lab.grow(&mut *grown, len);
            }
            (501..=530).for_each(|len| lab.grow(&mut *grown, len));
            lab.rewind(&mut *grown, 505);
            for len in [507, 690, 700] {
                lab.grow(&mut *grown, len);
            }
            let fresh = Lab::new(dtype);
            let mut rebuilt = fresh.state(spec);
            fresh.grow(&mut *rebuilt, 700);
            for step in 0..4 {
                let len = 700 + step as usize;
                lab.grow(&mut *grown, len);
                fresh.grow(&mut *rebuilt, len);
                let (a, b) = (lab.select(&mut *grown, step), fresh.select(&mut *rebuilt, step));
                assert_eq!(a, b, "{spec} of {dtype}, step {step}");
            }
            assert_eq!(grown.state_bytes(), rebuilt.state_bytes(), "{spec} of {dtype}");
        }
    }
}

/// Asking again after a rewind gives the same answers: nothing of the steps in between stays.
#[test]
fn a_rewind_repeats_the_decisions() {
    for (spec, _) in cases("bf16") {
        let lab = Lab::new("bf16");
        let mut state = lab.state(spec);
        lab.grow(&mut *state, 640);
        let steps = |state: &mut dyn HeadMethod| -> Vec<Selection> {
            (0..6)
                .map(|step| {
                    lab.grow(state, 641 + step as usize);
                    lab.select(state, step)
                })
                .collect()
        };
        let first = steps(&mut *state);
        lab.rewind(&mut *state, 640);
        assert_eq!(first, steps(&mut *state), "{spec}");
    }
}

/// Contexts of one token, and shorter than whatever is always read.
#[test]
fn short_contexts_are_read_whole() {
    for dtype in DTYPES {
        for (spec, _) in cases(dtype) {
            let lab = Lab::new(dtype);
            let mut state = lab.state(spec);
            for len in 1..5 {
                lab.grow(&mut *state, len);
                let selection = lab.select(&mut *state, len as u32);
                let (ours, dense) = (lab.outputs(&selection, len as u32), lab.dense(len as u32));
                assert!(distance(&ours, &dense) < 1e-4, "{spec} of {dtype}, {len} tokens");
            }
        }
    }
}

/// After a rewind to an empty cache, and from one that was told of before any row came, all is as if nothing had been.
#[test]
fn an_empty_cache_leaves_no_trace() {
    for dtype in DTYPES {
        for (spec, _) in cases(dtype) {
            let (lab, fresh) = (Lab::new(dtype), Lab::new(dtype));
            let (mut state, mut other) = (lab.state(spec), fresh.state(spec));
            lab.grow(&mut *state, 0);
            lab.rewind(&mut *state, 0);
            lab.grow(&mut *state, 300);
            lab.select(&mut *state, 1);
            lab.rewind(&mut *state, 0);
            for len in [1, 280, 600] {
                lab.grow(&mut *state, len);
                fresh.grow(&mut *other, len);
                let (a, b) = (lab.select(&mut *state, 2), fresh.select(&mut *other, 2));
                assert_eq!(a, b, "{spec} of {dtype}, {len} tokens");
            }
        }
    }
}

/// Every parameter at both ends of its range, the others at their defaults: the method says what contradicts, or serves
/// contexts of one token, of some and of several pages, and its prediction overflows nowhere.
#[test]
fn the_ends_of_every_range_serve_or_are_refused() {
    for method in METHODS {
        // Some need codes in planes, others rows that can move.
        let serves = |dtype: &&str| {
            super::method(method.name).unwrap().check(&MethodShape::of(&Lab::new(dtype).cache)).is_ok()
        };
        let dtype = ["bf16", "planes8"].into_iter().find(serves).unwrap();
        for param in method.all_params() {
            let ends = match param.kind {
                Kind::Int { min, max } => vec![min.to_string(), max.to_string()],
                Kind::Float { min, max } => vec![min.to_string(), max.to_string()],
                Kind::Choice(words) => words.iter().map(|word| word.to_string()).collect(),
                Kind::Layers => vec!["none".into(), "0".into()],
            };
            for end in ends {
                let text = format!("{}:{}={end}", method.name, param.name);
                let lab = Lab::new(dtype);
                let shape = MethodShape::of(&lab.cache);
                let spec = match super::method(&text).and_then(|spec| spec.check(&shape).map(|()| spec)) {
                    Ok(spec) => spec,
                    Err(error) => {
                        assert!(matches!(error, Error::Parameter { .. }), "{text}: {error}");
                        continue;
                    }
                };
                for context in [0, 1, 100, 1 << 20] {
                    assert!(spec.predict(context, &shape).rows <= context, "{text} at {context}");
                }
                let mut state = spec.make(&Place { shape, layer: 0, kv_head: 0, rope: &lab.rope });
                for len in [1, 2, 40, 600] {
                    lab.grow(&mut *state, len);
                    let outputs = lab.outputs(&lab.select(&mut *state, 3), 3);
                    assert!(outputs.iter().all(|x| x.is_finite()), "{text}, {len} tokens");
                }
            }
        }
    }
}
