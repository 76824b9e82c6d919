//! Masks against their formulas, estimates against what was planted.

use std::sync::Arc;

use longbit_sys::Team;

use super::{Decision, PATTERNS, PREFILL_SETTINGS, Pattern, Scorer, Seen};
use crate::attention::{Kind, MethodSpec, Prompt};
use crate::kv::{CacheShape, KvCache, KvHead, kv_dtype};
use crate::model::{HeadFormat, Model, preset};
use crate::rng::mix;
use crate::session::{Session, SessionOptions};

const D: usize = 32;
const GROUP: usize = 2;

fn pattern(settings: &str) -> Box<dyn Pattern> {
    MethodSpec::parse(&format!("dense:{settings}")).unwrap().prefill().unwrap()
}

fn cache(rows: usize) -> KvCache {
    let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: rows };
    KvCache::new(shape, kv_dtype("f32").unwrap(), longbit_kernels::Kernels::best()).unwrap()
}

/// Numbers of mean 0 between -1 and 1.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (mix(seed, i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Which rows each token of `tokens` sees.
fn seen(
    pattern: &dyn Pattern,
    decision: &Decision,
    kv: &KvHead,
    tokens: std::ops::Range<usize>,
) -> Vec<Vec<usize>> {
    let mut rows = Seen::default();
    tokens
        .map(|token| {
            rows.of(Some(pattern), token, 1, decision, kv);
            let mut spans = Vec::new();
            rows.by(Some(pattern), token, kv, &mut spans);
            spans.into_iter().flatten().collect()
        })
        .collect()
}

#[test]
fn the_setting_names_the_table() {
    let Kind::Choice(words) = PREFILL_SETTINGS[0].kind else { panic!("prefill is a choice") };
    let names: Vec<_> = PATTERNS.iter().map(|p| p.name).collect();
    assert_eq!(words[1..], names);
    // Every setting but the first two belongs to a pattern.
    for setting in &PREFILL_SETTINGS[2..] {
        let taken = |p: &super::PatternEntry| p.settings.iter().any(|(name, _)| *name == setting.name);
        assert!(PATTERNS.iter().any(taken), "{}", setting.name);
    }
}

#[test]
fn masks_are_those_of_their_formulas() {
    let cache = cache(512);
    cache.head_mut(0, 0).append(&vec![0.0; 300 * D], &vec![0.0; 300 * D]).unwrap();
    let kv = cache.head(0, 0);
    let none = Decision::default();
    for (sinks, window) in [(0, 1), (0, 40), (3, 1), (10, 37), (40, 40), (100, 7), (5, 1000), (1000, 1)] {
        let settings = format!("prefill_sinks={sinks},prefill_window={window}");
        let all = seen(&*pattern(&format!("prefill=window,{settings}")), &none, &kv, 0..300);
        for (i, rows) in all.iter().enumerate() {
            let mask: Vec<usize> = (0..=i).filter(|&j| i - j < window || j < sinks).collect();
            assert_eq!(*rows, mask, "{settings}, token {i}");
        }
        let all = seen(&*pattern(&format!("prefill=ashape,{settings}")), &none, &kv, 0..300);
        for (i, rows) in all.iter().enumerate() {
            let near = |j: usize| i / 64 - j / 64 <= window.div_ceil(64);
            let mask: Vec<usize> = (0..=i).filter(|&j| near(j) || j / 64 < sinks.div_ceil(64)).collect();
            assert_eq!(*rows, mask, "blocks, {settings}, token {i}");
        }
    }
}

/// Attention under the mask of methods that say so, computed in f64 with the mask written out.
#[test]
fn a_window_is_softmax_under_its_mask() {
    let team = Arc::new(Team::new(1, false).unwrap());
    let model = Arc::new(Model::synthetic(preset("tiny").unwrap(), HeadFormat::Bf16, 1, &team).unwrap());
    let config = model.config.clone();
    let (d, group, n) = (config.head_dim, config.group(), 700);
    let (sinks, window) = (9, 130);
    let how =
        format!("dense:prefill=window,prefill_sinks={sinks},prefill_window={window},prefill_dense_layers=0");
    let options = SessionOptions {
        capacity: n,
        kv: kv_dtype("f32").unwrap(),
        method: MethodSpec::parse(&how).unwrap(),
    };
    let mut session = Session::new(model, team, options).unwrap();
    let (keys, values) = (noise(n * d, 1), noise(n * d, 2));
    for i in 0..config.layers * config.kv_heads {
        let (layer, head) = (i / config.kv_heads, i % config.kv_heads);
        session.cache_mut().head_mut(layer, head).append(&keys, &values).unwrap();
    }
    session.cache_mut().set_len(n).unwrap();
    session.refresh();
    let queries: Vec<f32> = noise(70 * group * d, 3).iter().map(|q| 8.0 * q).collect();
    for (layer, dense) in [(0, false), (1, true), (1, false)] {
        let found = session.prompt_attention(layer, 0, &queries, dense).unwrap();
        let full = dense || layer == 0;
        let (mut pairs, mut causal) = (0, 0);
        for (t, (query, out)) in
            queries.chunks_exact(group * d).zip(found.output.chunks_exact(group * d)).enumerate()
        {
            let i = n - 70 + t;
            let mask: Vec<usize> = (0..=i).filter(|&j| full || i - j < window || j < sinks).collect();
            pairs += mask.len() as u64;
            causal += i as u64 + 1;
            for (query, out) in query.chunks_exact(d).zip(out.chunks_exact(d)) {
                let logit = |j: usize| {
                    let key = &keys[j * d..(j + 1) * d];
                    let dot: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot / (d as f64).sqrt()
                };
                let weights: Vec<f64> = mask.iter().map(|&j| logit(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (c, out) in out.iter().enumerate() {
                    let exact: f64 =
                        mask.iter().zip(&weights).map(|(&j, w)| w * f64::from(values[j * d + c])).sum();
                    assert!((f64::from(*out) - exact / sum).abs() < 1e-5, "layer {layer}, token {i}");
                }
            }
        }
        assert_eq!((found.seen, found.causal), (pairs, causal));
    }
    assert!(session.prompt_attention(0, 0, &queries[1..], false).is_err());
}

/// Keys of noise with some that suit queries: `suits(token)` says how much of the direction of the queries a key has.
fn planted(n: usize, suits: impl Fn(usize) -> f32) -> KvCache {
    let cache = cache(n.next_multiple_of(256));
    let mut keys: Vec<f32> = noise(n * D, 5).iter().map(|k| 0.3 * k).collect();
    keys.chunks_exact_mut(D).enumerate().for_each(|(token, key)| key[0] += suits(token));
    cache.head_mut(0, 0).append(&keys, &noise(n * D, 6)).unwrap();
    cache
}

fn decide(pattern: &dyn Pattern, kv: &KvHead, queries: &[f32], first: usize) -> Decision {
    let mut decision = Decision::default();
    let queries = Prompt { rows: queries, group: GROUP, head_dim: D, first };
    pattern.decide(queries, kv, &mut Scorer::default(), &mut decision);
    decision
}

/// Queries that look along the first coordinate.
fn looking(n: usize) -> Vec<f32> {
    let mut queries: Vec<f32> = noise(n * GROUP * D, 7).iter().map(|q| 0.1 * q).collect();
    queries.chunks_exact_mut(D).for_each(|query| query[0] += 4.0);
    queries
}

#[test]
fn vertical_slash_finds_a_planted_column() {
    let (n, column) = (1000, 333);
    let cache = planted(n, |token| if token == column { 3.0 } else { 0.0 });
    let kv = cache.head(0, 0);
    let pattern =
        pattern("prefill=vslash,prefill_columns=12,prefill_sinks=2,prefill_slashes=5,prefill_window=5");
    let first = 896;
    let decision = decide(&*pattern, &kv, &looking(n - first), first);
    assert!(decision.spans.iter().any(|span| span.contains(&column)), "{:?}", decision.spans);
    assert_eq!(decision.spans.iter().map(|span| span.len()).sum::<usize>(), 12);
    assert_eq!((decision.spans[0].start, decision.distances.as_slice()), (0, &[0, 1, 2, 3, 4][..]));
    for (i, rows) in (first..n).zip(seen(&*pattern, &decision, &kv, first..n)) {
        assert!(rows.contains(&column) && rows.contains(&i) && rows.contains(&0) && rows.contains(&1));
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]) && rows.last() == Some(&i));
        // Five distances of a tile are twenty rows at the most.
        assert!(rows.len() <= 12 + 20, "{rows:?}");
    }
}

/// A diagonal: query `i` looks for what lies `far` before it, and nothing else.
#[test]
fn vertical_slash_finds_a_planted_diagonal() {
    let (n, far) = (1024, 357);
    let mut keys = noise(n * D, 5);
    let norm = |key: &mut [f32]| {
        let norm = key.iter().map(|x| x * x).sum::<f32>().sqrt();
        key.iter_mut().for_each(|x| *x /= norm);
    };
    keys.chunks_exact_mut(D).for_each(norm);
    let cache = cache(n);
    cache.head_mut(0, 0).append(&keys, &noise(n * D, 6)).unwrap();
    let kv = cache.head(0, 0);
    let first = n - 128;
    let query =
        |i: usize| keys[(i - far) * D..(i - far + 1) * D].iter().map(|k| 12.0 * k).collect::<Vec<_>>();
    let queries: Vec<f32> = (first..n).flat_map(|i| [query(i), query(i)].concat()).collect();
    let pattern = pattern(
        "prefill=vslash,prefill_columns=0,prefill_sinks=0,prefill_slashes=2,prefill_window=1,prefill_probes=8",
    );
    let decision = decide(&*pattern, &kv, &queries, first);
    assert_eq!((decision.distances.as_slice(), decision.spans.len()), (&[0, far][..], 0));
    for (i, rows) in (first..n).zip(seen(&*pattern, &decision, &kv, first..n)) {
        // The rows that the two diagonals cross within the tile of the token, as far as they are not after it.
        let tile = i / 16 * 16;
        let crossed: Vec<usize> = (tile - far..tile - far + 16).chain(tile..=i).collect();
        assert_eq!(rows, crossed, "token {i}");
    }
}

#[test]
#[allow(clippy::single_range_in_vec_init, reason = "spans, of which there may be one")]
fn block_sparse_finds_planted_blocks() {
    let n = 1000;
    // Half of the tokens of block 3 suit, and a few of block 9, which its mean hides less than the noise of the others.
    let cache = planted(n, |token| match token / 64 {
        3 if token % 2 == 0 => 2.0,
        9 if token % 4 == 0 => 2.0,
        _ => 0.0,
    });
    let kv = cache.head(0, 0);
    let pattern = pattern("prefill=blocks,prefill_blocks=3");
    let decision = decide(&*pattern, &kv, &looking(40), 960);
    assert_eq!(decision.spans, [192..256, 576..640, 960..1024]);
    for (i, rows) in (960..n).zip(seen(&*pattern, &decision, &kv, 960..n)) {
        let mask: Vec<usize> = (0..=i).filter(|j| [3, 9, 15].contains(&(j / 64))).collect();
        assert_eq!(rows, mask);
    }
    // The first block sees itself, whatever it may see.
    assert_eq!(decide(&*pattern, &kv, &looking(64), 0).spans, vec![0..64]);
    assert_eq!(
        decide(&*self::pattern("prefill=blocks,prefill_blocks=1"), &kv, &looking(9), 70).spans,
        vec![64..128]
    );
}

/// What a head of the group alone looks for is seen by all of it.
#[test]
fn the_heads_of_a_group_share_what_they_see() {
    let (n, first) = (640, 512);
    let mut queries = vec![0.0; 128 * GROUP * D];
    // The heads look along coordinates of their own.
    for query in queries.chunks_exact_mut(GROUP * D) {
        query[0] = 6.0;
        query[D + 1] = 6.0;
    }
    let mut keys: Vec<f32> = noise(n * D, 5).iter().map(|k| 0.2 * k).collect();
    keys[100 * D] += 12.0;
    keys[300 * D + 1] += 12.0;
    let cache = cache(1024);
    cache.head_mut(0, 0).append(&keys, &keys).unwrap();
    let kv = cache.head(0, 0);
    let columns =
        pattern("prefill=vslash,prefill_columns=2,prefill_sinks=0,prefill_window=1,prefill_slashes=1");
    assert_eq!(decide(&*columns, &kv, &queries, first).spans, [100..101, 300..301]);
    let blocks = pattern("prefill=blocks,prefill_blocks=3");
    assert_eq!(decide(&*blocks, &kv, &queries[..64 * GROUP * D], first).spans, [64..128, 256..320, 512..576]);
}

/// Evicted rows are not seen, and what is left is seen by its position.
#[test]
fn positions_are_not_rows_where_rows_are_gone() {
    let n = 900;
    let cache = planted(n, |token| if token == 700 { 20.0 } else { 0.0 });
    cache.head_mut(0, 0).retain(&[0..10, 500..n]).unwrap();
    let kv = cache.head(0, 0);
    let position = |row: usize| kv.position_of(row);
    let none = Decision::default();
    let window = pattern("prefill=window,prefill_sinks=20,prefill_window=100");
    let mask = |i: usize, seen: &dyn Fn(usize) -> bool| -> Vec<usize> {
        (0..kv.len()).filter(|&row| position(row) <= i && seen(position(row))).collect()
    };
    for (i, rows) in (880..n).zip(seen(&*window, &none, &kv, 880..n)) {
        assert_eq!(rows, mask(i, &|j| j < 20 || i - j < 100));
    }
    let columns =
        pattern("prefill=vslash,prefill_columns=3,prefill_sinks=2,prefill_slashes=1,prefill_window=1");
    let decision = decide(&*columns, &kv, &looking(n - 896), 896);
    assert_eq!(decision.spans, [0..2, 700..701]);
    let blocks = pattern("prefill=blocks,prefill_blocks=2");
    let decision = decide(&*blocks, &kv, &looking(n - 896), 896);
    assert_eq!(decision.spans, [640..704, 896..960]);
    assert_eq!(
        seen(&*blocks, &decision, &kv, 896..897)[0],
        mask(896, &|j| (640..704).contains(&j) || j == 896)
    );
}
