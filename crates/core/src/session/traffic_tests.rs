//! What a decode step says that it read is what the cache saw being read, whatever the method.

use std::sync::Arc;

use longbit_sys::Team;

use super::{Session, SessionOptions};
use crate::attention::laws::CASES;
use crate::attention::{MethodShape, MethodSpec, method};
use crate::kv::{KvCache, kv_dtype};
use crate::model::{HeadFormat, Model, preset};

/// Formats of one kind each: rows that are read as they are, rows with scales beside them, and blocks that keep the newest
/// tokens exactly.
const DTYPES: [&str; 3] = ["bf16", "int8", "kivi4"];

fn each_head<T>(cache: &KvCache, of: impl Fn(usize, usize) -> T) -> Vec<T> {
    let shape = cache.shape();
    (0..shape.layers * shape.kv_heads).map(|i| of(i / shape.kv_heads, i % shape.kv_heads)).collect()
}

/// Rows of the cache that were read since it was last asked.
fn observed(session: &Session) -> u64 {
    let cache = session.cache();
    each_head(cache, |layer, head| cache.head(layer, head).take_observed()).iter().sum()
}

/// A session with `tokens` tokens in the cache, and the method at work on them.
pub(super) fn session(model: &Arc<Model>, threads: usize, dtype: &str, tokens: usize) -> Session {
    let team = Arc::new(Team::oversubscribed(threads).unwrap());
    let options = SessionOptions {
        capacity: 1024.max(tokens + 64),
        kv: kv_dtype(dtype).unwrap(),
        ..SessionOptions::default()
    };
    let mut session = Session::new(model.clone(), team, options).unwrap();
    let prompt: Vec<u32> = (0..tokens as u64).map(|i| (crate::rng::mix(5, i) % 100) as u32).collect();
    session.prefill(&prompt).unwrap();
    session
}

/// Decodes a few steps with `spec` and holds the count of each against the cache; payload and index apart.
fn check(session: &mut Session, spec: &MethodSpec, dtype: &str) {
    if spec.evicts() {
        return steps(&mut session.fork_with(spec.clone()).unwrap(), spec, dtype);
    }
    let before = session.len();
    let attention = session.attention_of(spec.clone()).unwrap();
    let other = session.swap_attention(attention);
    steps(session, spec, dtype);
    session.rewind(before);
    session.swap_attention(other);
}

fn steps(session: &mut Session, spec: &MethodSpec, dtype: &str) {
    for step in 0..3 {
        session.traced_pass(&[step], super::Kind::Decode { supplied: None, capture: true }, None).unwrap();
        let what = format!("{} of {dtype}, {} tokens, step {step}", spec.canonical(), session.len());
        let traffic = session.traffic();
        assert_eq!(traffic.kv_bytes, observed(session), "payload of {what}");
        let captured = each_head(session.cache(), |layer, head| session.captured(layer, head).unwrap());
        let index: u64 = captured.iter().map(|c| c.selection.index_bytes).sum();
        let rows: u64 = captured.iter().map(|c| c.selection.tokens() as u64 + c.selection.tail_rows).sum();
        assert_eq!((traffic.index_bytes, traffic.rows), (index, rows), "{what}");
        // What is not kept cannot be read; each query head reads it once at the most.
        let group = session.model().config.group() as u64;
        let state = session.attention().state_bytes();
        assert!(index <= group * state, "index of {what}: {index} of {state} bytes");
    }
}

#[test]
fn every_method_counts_what_the_cache_saw() {
    let team = Arc::new(Team::new(1, false).unwrap());
    let model = Arc::new(Model::synthetic(preset("tiny").unwrap(), HeadFormat::Bf16, 3, &team).unwrap());
    for dtype in DTYPES {
        // Below a chunk of tokens every head has one task, beyond it several.
        for tokens in [40, 700] {
            let mut session = session(&model, 2, dtype, tokens);
            observed(&session);
            let shape = MethodShape::of(session.cache());
            for (spec, _) in CASES {
                let spec = method(spec).unwrap();
                if spec.check(&shape).is_ok() {
                    check(&mut session, &spec, dtype);
                }
            }
        }
    }
}
