//! Methods that evict, on small caches: what is kept is what the definition says, and no more than the budget.

use std::sync::Arc;

use super::super::{MethodShape, Selection, method};
use super::testing::{D, GROUP, Layer, assert_output, keep};
use super::{Board, SLACK};
use crate::kv::kv_dtype;

/// One rule written out: scores of tokens, told of weights.
fn follow(
    spec: &str,
    budget: usize,
    recent: usize,
    sample: usize,
    fresh: impl Fn(usize) -> f64,
    saw: impl Fn(usize, &mut f64, [f64; GROUP], usize),
) {
    let mut layer = Layer::new(spec, "f32", 2);
    layer.prompt(300);
    let mut scores: Vec<Vec<(usize, f64)>> = vec![Vec::new(); 2];
    for (h, scores) in scores.iter_mut().enumerate() {
        scores.extend((0..300).map(|t| (t, fresh(t))));
        for position in 300 - sample..300 {
            let rows: Vec<usize> = (0..=position).collect();
            let weights = layer.weights(h, position, &rows);
            for t in rows {
                saw(position, &mut scores[t].1, [weights[0][t], weights[1][t]], position + 1);
            }
        }
        let kept = keep(scores, budget, recent);
        scores.retain(|x| kept.contains(&x.0));
        assert_eq!(layer.positions(h), kept, "{spec}: what is left of the prompt");
    }
    for position in 300..900 {
        let steps = layer.step();
        for (h, scores) in scores.iter_mut().enumerate() {
            scores.push((position, fresh(position)));
            let kept = keep(scores, budget, recent);
            scores.retain(|x| kept.contains(&x.0));
            assert_eq!(kept.len(), budget);
            assert_output(&layer, h, &steps[h], &kept);
            let weights = layer.weights(h, position, &kept);
            for (i, x) in scores.iter_mut().enumerate() {
                saw(position, &mut x.1, [weights[0][i], weights[1][i]], kept.len());
            }
            let held = layer.head(h).len();
            assert!(held <= budget + SLACK, "{held} rows in memory");
        }
    }
}

#[test]
fn h2o_keeps_the_heaviest_and_the_newest() {
    let sum = |_: usize, score: &mut f64, w: [f64; GROUP], _: usize| *score += w[0] + w[1];
    follow("h2o:sample=40,budget=60", 60, 30, 40, |_| 0.0, sum);
    // Shares of the context: 15 and 30 of 300.
    follow("h2o:heavy=0.05,recent=0.1", 45, 30, 128, |_| 0.0, sum);
}

#[test]
fn lru_evicts_what_was_not_used_for_longest() {
    follow(
        "lru:budget=50,above=2,sample=20",
        50,
        1,
        20,
        |t| t as f64,
        |at, score, w, n| {
            if w.iter().any(|w| *w > 2.0 / n as f64) {
                *score = at as f64;
            }
        },
    );
}

/// The heads of a layer keep the same tokens: those that the last query of both weighs most.
#[test]
fn tova_follows_the_last_query_of_all_heads() {
    let mut layer = Layer::new("tova:budget=40", "f32", 2);
    layer.prompt(300);
    let mut kept: Vec<usize> = (0..300).collect();
    let score = |layer: &Layer, position: usize, kept: &[usize]| -> Vec<f64> {
        let each = |h: usize| layer.weights(h, position, kept);
        let all: Vec<Vec<f64>> = (0..2).flat_map(each).collect();
        (0..kept.len()).map(|i| all.iter().map(|w| w[i]).sum()).collect()
    };
    for position in 299..700 {
        let scores = score(&layer, position, &kept);
        let scores: Vec<(usize, f64)> = kept.iter().copied().zip(scores).collect();
        if position == 299 {
            kept = keep(&scores, 40, 1);
            assert_eq!((layer.positions(0), layer.positions(1)), (kept.clone(), kept.clone()));
            kept.push(300);
            // The first step evicts by the scores of the prompt's last query.
            let mut scores: Vec<(usize, f64)> = scores.into_iter().filter(|x| kept.contains(&x.0)).collect();
            scores.push((300, 0.0));
            kept = keep(&scores, 40, 1);
        } else {
            let mut scores = scores;
            scores.push((position + 1, 0.0));
            kept = keep(&scores, 40, 1);
        }
        let steps = layer.step();
        (0..2).for_each(|h| assert_output(&layer, h, &steps[h], &kept));
    }
}

fn snapkv_scores(layer: &Layer, head: usize, n: usize, window: usize, kernel: usize) -> Vec<f64> {
    let mut sums = vec![0.0; n - window];
    for position in n - window..n {
        let rows: Vec<usize> = (0..=position).collect();
        for weights in layer.weights(head, position, &rows) {
            sums.iter_mut().zip(&weights).for_each(|(sum, w)| *sum += w / GROUP as f64);
        }
    }
    let at = |i: isize| usize::try_from(i).ok().and_then(|i| sums.get(i)).copied().unwrap_or(0.0);
    let half = kernel as isize / 2;
    let pooled = |i: usize| (-half..=half).map(|k| at(i as isize + k)).sum::<f64>() / kernel as f64;
    (0..sums.len()).map(pooled).collect()
}

#[test]
fn snapkv_keeps_what_the_window_looks_at() {
    let mut layer = Layer::new("snapkv:capacity=50,window=10,kernel=7", "f32", 2);
    layer.prompt(400);
    for h in 0..2 {
        let scores = snapkv_scores(&layer, h, 400, 10, 7);
        let mut scores: Vec<(usize, f64)> = scores.into_iter().enumerate().collect();
        scores.extend((390..400).map(|t| (t, 0.0)));
        assert_eq!(layer.positions(h), keep(&scores, 50, 10));
    }
    for step in 1..=5 {
        assert!(layer.step().iter().all(|s| s.spans.len() == 1 && s.spans[0] == (0..50 + step)));
    }
    // A prompt no longer than the capacity stays whole.
    let mut short = Layer::new("snapkv:capacity=50,window=10,kernel=7", "f32", 2);
    short.prompt(50);
    assert_eq!((short.head(0).len(), short.head(1).dropped()), (50, 0));
}

/// Heads of a layer share what they keep by need, each sure of a part.
#[test]
fn adakv_gives_to_the_head_that_needs_it() {
    let mut layer = Layer::new("snapkv:capacity=60,window=10,kernel=1,ada=0.2", "f32", 2);
    // The second head looks at everything alike.
    layer.keys[1].iter_mut().for_each(|x| *x *= 0.01);
    layer.prompt(400);
    let (a, b) = (layer.head(0).len(), layer.head(1).len());
    assert_eq!(a + b, 120);
    assert!(b >= 10 + 10 && a > b, "{a} {b}");
    let mut all: Vec<(f64, usize, usize)> = (0..2)
        .flat_map(|h| {
            snapkv_scores(&layer, h, 400, 10, 1).into_iter().enumerate().map(move |(t, s)| (s, h, t))
        })
        .collect();
    all.sort_by(|x, y| y.0.total_cmp(&x.0));
    let sure = |h: usize| all.iter().filter(move |x| x.1 == h).take(10);
    let mut kept: Vec<(usize, usize)> = sure(0).chain(sure(1)).map(|x| (x.1, x.2)).collect();
    for x in &all {
        if kept.len() < 100 && !kept.contains(&(x.1, x.2)) {
            kept.push((x.1, x.2));
        }
    }
    for h in 0..2 {
        let mut mine: Vec<usize> = kept.iter().filter(|x| x.0 == h).map(|x| x.1).chain(390..400).collect();
        mine.sort_unstable();
        assert_eq!(layer.positions(h), mine);
    }
}

/// The score of Expected Attention, written out with a matrix for each position.
#[test]
fn expected_attention_is_its_definition() {
    let spec = "expected:budget=40,interval=64,future=30,sample=50";
    let mut layer = Layer::new(spec, "f32", 1);
    layer.prompt(300);
    let angle = |i: usize, at: usize| at as f64 / 10_000f64.powf(2.0 * i as f64 / D as f64);
    let turn = |x: &[f64], at: f64, sign: f64| -> Vec<f64> {
        let _ = at;
        let mut y = x.to_vec();
        for i in 0..D / 2 {
            let (s, c) = (sign * angle(i, at as usize)).sin_cos();
            (y[i], y[i + D / 2]) = (x[i] * c - x[i + D / 2] * s, x[i + D / 2] * c + x[i] * s);
        }
        y
    };
    let mut scores = vec![0.0; 300];
    for h in 0..GROUP {
        let queries: Vec<Vec<f64>> = (250..300)
            .map(|at| {
                let q: Vec<f64> =
                    Layer::query(0, at)[h * D..(h + 1) * D].iter().map(|x| f64::from(*x)).collect();
                turn(&q, at as f64, -1.0)
            })
            .collect();
        // The mean rotation of a vector is linear in it.
        let ahead = |x: &[f64]| -> Vec<f64> {
            let mut sum = vec![0.0; D];
            for at in 300..330 {
                turn(x, at as f64, 1.0).iter().zip(&mut sum).for_each(|(y, s)| *s += y / 30.0);
            }
            sum
        };
        let mean: Vec<f64> = (0..D).map(|i| queries.iter().map(|q| q[i]).sum::<f64>() / 50.0).collect();
        let apart: Vec<Vec<f64>> = queries
            .iter()
            .map(|q| ahead(&q.iter().zip(&mean).map(|(q, m)| q - m).collect::<Vec<_>>()))
            .collect();
        let mean = ahead(&mean);
        let logit = |t: usize| {
            let key: Vec<f64> = layer.keys[0][t * D..(t + 1) * D].iter().map(|x| f64::from(*x)).collect();
            let dot = |q: &[f64]| q.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>();
            dot(&mean) + 0.5 * apart.iter().map(|q| dot(q).powi(2)).sum::<f64>() / 49.0
        };
        let exp: Vec<f64> = (4..300).map(|t| logit(t).exp()).collect();
        let sum: f64 = exp.iter().sum();
        for (t, x) in (4..300).zip(exp) {
            let value = &layer.values[0][t * D..(t + 1) * D];
            let length = value.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            scores[t] += x / sum / GROUP as f64 * length;
        }
    }
    (0..4).for_each(|t| scores[t] = f64::INFINITY);
    let scores: Vec<(usize, f64)> = scores.into_iter().enumerate().collect();
    assert_eq!(layer.positions(0), keep(&scores, 40, 0));
    // Rows gather for an interval, then all but the budget go again.
    for step in 0..200 {
        layer.step();
        assert_eq!(layer.head(0).len(), 40 + step % 64 + 1);
    }
    // A rotated format keeps the same.
    let mut rotated = Layer::new(spec, "f32+rotate", 1);
    rotated.prompt(300);
    assert_eq!(rotated.positions(0), keep(&scores, 40, 0));
}

/// Steps since memory went repeat bit for bit, in every method; so does a fork.
#[test]
fn a_rewind_to_the_mark_repeats_the_bits() {
    for spec in [
        "h2o:budget=64",
        "h2o:budget=64,merge=on",
        "lru:budget=64",
        "tova:budget=64",
        "snapkv:capacity=64,window=16",
        "expected:budget=64",
    ] {
        let mut layer = Layer::new(spec, "int8+plain", 2);
        layer.prompt(700);
        let steps =
            |layer: &mut Layer, n: usize| -> Vec<Vec<Selection>> { (0..n).map(|_| layer.step()).collect() };
        let first = steps(&mut layer, 250);
        for n in [250, 3, 250] {
            layer.rewind(700);
            assert_eq!(layer.head(0).tokens(), 700);
            assert_eq!(steps(&mut layer, n), first[..n], "{spec}");
        }
        layer.rewind(700);
        let board = Arc::new(Board::new(2));
        for (h, state) in layer.states.iter_mut().enumerate() {
            *state = state.fork().unwrap();
            state.meet(&board, h);
        }
        assert_eq!(steps(&mut layer, 250), first, "{spec}, forked");
        // Beyond the mark what is gone is gone.
        steps(&mut layer, 300);
        layer.rewind(100);
        assert!(layer.head(0).len() <= 64 && layer.head(0).tokens() == 100, "{spec}");
        steps(&mut layer, 3);
    }
}

/// Rows of a key that is there twice become their mean.
#[test]
fn merging_averages_rows_with_the_same_key() {
    let mut layer = Layer::new("h2o:budget=20,merge=on,sample=32", "f32", 1);
    // Token t and token t + 100 have the same key.
    for t in 0..100 {
        let key = layer.keys[0][t * D..(t + 1) * D].to_vec();
        layer.keys[0][(t + 100) * D..(t + 101) * D].copy_from_slice(&key);
    }
    layer.prompt(200);
    let plain = {
        let mut plain = Layer::new("h2o:budget=20,sample=32", "f32", 1);
        plain.keys = layer.keys.clone();
        plain.prompt(200);
        plain
    };
    assert_eq!(layer.positions(0), plain.positions(0), "the same rows are kept");
    let (kv, kept) = (layer.head(0), layer.positions(0));
    let mut averaged = 0;
    for (row, &t) in kept.iter().enumerate() {
        let mut value = vec![0.0; D];
        kv.decode_values(row..row + 1, &mut value);
        averaged += usize::from(value != layer.values[0][t * D..(t + 1) * D]);
    }
    assert!(averaged > 0 && averaged <= kept.len(), "{averaged} rows were merged into");
}

/// A token that every query looks at is never evicted; one that none does goes.
#[test]
fn a_needle_survives() {
    for spec in [
        "h2o:budget=64,sample=32",
        "lru:budget=64",
        "tova:budget=64",
        "snapkv:capacity=64,window=16,kernel=1",
    ] {
        let mut layer = Layer::new(spec, "bf16", 1);
        // The needle's key is what every query of the prompt's end has most of.
        let mut needle = vec![0.0; D];
        for at in 650..760 {
            for query in Layer::query(0, at).chunks_exact(D) {
                needle.iter_mut().zip(query).for_each(|(n, q)| *n += q);
            }
        }
        let query = Layer::query(0, 699);
        needle.iter_mut().zip(&query[..D]).for_each(|(n, q)| *n = 0.5 * *n + 8.0 * q);
        layer.keys[0][123 * D..124 * D].copy_from_slice(&needle);
        layer.prompt(700);
        assert!(layer.positions(0).contains(&123), "{spec}");
        assert!(layer.head(0).len() == 64 && layer.cache.memory().pages == 2, "{spec}");
    }
}

#[test]
fn what_cannot_be_evicted_from_is_refused() {
    for (spec, dtype, says) in [
        ("h2o", "int4", "less the mean of their page"),
        ("tova", "kivi4", "cannot be evicted"),
        ("lru", "k=bf16,v=planes8", "`planes8`"),
        ("snapkv", "int8-channel", "share their scales"),
        ("expected:reuse=2", "bf16", "reuse"),
        ("h2o:heavy=0,recent=0", "bf16", "both 0"),
        ("snapkv:capacity=10", "bf16", "the window is larger"),
        ("snapkv:kernel=4", "bf16", "even"),
        ("expected:budget=3", "bf16", "sinks"),
    ] {
        let shape =
            MethodShape { layers: 1, kv_heads: 1, head_dim: 64, group: 1, dtype: kv_dtype(dtype).unwrap() };
        let message = method(spec).unwrap().check(&shape).unwrap_err().to_string();
        assert!(message.contains(says), "{spec} of {dtype}: {message}");
    }
}
