//! The workload generator keeps its promises: the same bytes everywhere and in any order, and the statistics that its
//! documentation states.

use longbit::workload::{
    BLOCK, HeadShape, HeadStatistics, HeadType, HeadWorkload, PROMPT_QUERIES, QUESTION, WORKLOADS, Workload,
    WorkloadSpec,
};
use sha2::{Digest, Sha256};

#[path = "workload/planted.rs"]
mod planted;
#[path = "workload/statistics.rs"]
mod statistics;

const D: usize = 128;

/// Cosines and sines `[len][d/2]`.
struct Rope {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    fn new(shape: &HeadShape, len: usize) -> Self {
        let half = shape.head_dim / 2;
        let (mut cos, mut sin) = (Vec::with_capacity(len * half), Vec::with_capacity(len * half));
        for position in 0..len {
            for i in 0..half {
                let frequency = 1.0 / libm::pow(shape.rope_theta, (2 * i) as f64 / shape.head_dim as f64);
                let (s, c) = libm::sincos(position as f64 * f64::from(frequency as f32));
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        Self { half, cos, sin }
    }

    fn rows(&self, range: std::ops::Range<usize>) -> (&[f32], &[f32]) {
        let range = range.start * self.half..range.end * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

fn shape(layers: usize, heads: usize, kv_heads: usize) -> HeadShape {
    HeadShape { layers, heads, kv_heads, head_dim: D, rope_theta: 500_000.0 }
}

fn plan(text: &str, shape: &HeadShape, context: usize, steps: usize, seed: u64) -> Workload {
    Workload::new(&WorkloadSpec::parse(text).expect(text), shape, context, steps, seed).expect(text)
}

/// Keys and values of a block.
fn block(head: &HeadWorkload, rope: &Rope, block: usize) -> (Vec<f32>, Vec<f32>) {
    let tokens = head.block_tokens(block);
    let (mut k, mut v) = (vec![0.0; tokens * head.head_dim()], vec![0.0; tokens * head.head_dim()]);
    let (cos, sin) = rope.rows(block * BLOCK..block * BLOCK + tokens);
    head.block(block, cos, sin, &mut k, &mut v);
    (k, v)
}

/// Queries, key and value of a step.
fn step(head: &HeadWorkload, rope: &Rope, step: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let d = head.head_dim();
    let (mut q, mut k, mut v) = (vec![0.0; head.group() * d], vec![0.0; d], vec![0.0; d]);
    let at = head.context() + step;
    let (cos, sin) = rope.rows(at..at + 1);
    head.step(step, cos, sin, &mut q, &mut k, &mut v);
    (q, k, v)
}

/// Keys and values of the whole context.
fn context(head: &HeadWorkload, rope: &Rope) -> (Vec<f32>, Vec<f32>) {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for b in 0..head.blocks() {
        let (k, v) = block(head, rope, b);
        keys.extend(k);
        values.extend(v);
    }
    (keys, values)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Softmax weights of a query over the keys.
fn softmax(query: &[f32], keys: &[f32]) -> Vec<f64> {
    let logits: Vec<f64> =
        keys.chunks_exact(query.len()).map(|k| dot(query, k) / (query.len() as f64).sqrt()).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|z| (z - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Weighted mean of the value rows.
fn output(weights: &[f64], values: &[f32], d: usize) -> Vec<f32> {
    let mut out = vec![0.0f64; d];
    for (w, row) in weights.iter().zip(values.chunks_exact(d)) {
        out.iter_mut().zip(row).for_each(|(o, v)| *o += w * f64::from(*v));
    }
    out.iter().map(|o| *o as f32).collect()
}

fn measure(head: &HeadWorkload, rope: &Rope, step: usize) -> Vec<HeadStatistics> {
    head.statistics(step, |range| rope.rows(range))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(s, n), v| (s + v, n + 1.0));
    sum / count
}

#[test]
fn the_bytes_of_a_seed_are_fixed() {
    let shape = shape(6, 8, 2);
    let rope = Rope::new(&shape, 5000);
    let digest = |specs: &[&str]| {
        let mut hash = Sha256::new();
        let mut eat = |rows: &[f32]| rows.iter().for_each(|x| hash.update(x.to_le_bytes()));
        for text in specs {
            let head = plan(text, &shape, 4900, 8, 42).calibrate(3, 1);
            for b in [0, 9, 19] {
                let (k, v) = block(&head, &rope, b);
                eat(&k);
                eat(&v);
            }
            let (q, k, v) = step(&head, &rope, 3);
            eat(&q);
            eat(&k);
            eat(&v);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let plain =
        ["mix", "needle:eta=1.5,placement=scrambled,values=iid", "heavy-hitter:eta=0", "gaussian", "onehot"];
    assert_eq!(digest(&plain), "5b847fcaf1362e536688c0bcd6127d89feb8d4a0b4f8ab9a87d84f210b97ca44");
    let planted = [
        "mix:steps=iid,group=alike,drift=yes",
        "needle:needles=4,distractors=many,hide=mean,channels=sparse",
        "needle:margin=4,depth=0.5,distractors=4,hide=outlier,channels=thin,outliers=yes,group=same",
        "aggregation:margin=0",
    ];
    assert_eq!(digest(&planted), "0b1c10d38760dab9da3b815c45687802b947d7e80ec1a3bb9da9fa29c4dc7ec5");
    // The queries of the prompt.
    let mut hash = Sha256::new();
    for text in ["content", "gaussian", "needle:needles=4"] {
        let head = plan(text, &shape, 4900, 8, 42).calibrate(3, 1);
        prompt(&head, &rope, 4860..4880).iter().for_each(|x| hash.update(x.to_le_bytes()));
    }
    let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest, "40973e8218e140ca479b8b98d2f04cff843028eb79d0505a1b0e34cc6947c721");
}

#[test]
fn rows_do_not_depend_on_the_order_of_calls_or_on_the_thread() {
    let shape = shape(2, 4, 1);
    let rope = Rope::new(&shape, 1100);
    let workload = plan("needle", &shape, 1000, 4, 5);
    let head = workload.calibrate(1, 0);
    let forward: Vec<_> = (0..4).map(|b| block(&head, &rope, b)).collect();
    let steps: Vec<_> = (0..4).map(|s| step(&head, &rope, s)).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let again = workload.calibrate(1, 0);
            for b in (0..4).rev() {
                assert!(step(&again, &rope, b) == steps[b], "step {b}");
                assert!(block(&again, &rope, b) == forward[b], "block {b}");
            }
        });
    });
    // A prefix of a block is the block's prefix; the last block is short.
    let (cos, sin) = rope.rows(0..7);
    let (mut k, mut v) = (vec![0.0; 7 * D], vec![0.0; 7 * D]);
    head.block(0, cos, sin, &mut k, &mut v);
    assert!(k == forward[0].0[..7 * D] && v == forward[0].1[..7 * D]);
    assert_eq!(head.block_tokens(3), 1000 - 768);
    assert_eq!(head.block_tokens(4), 0);
    // Heads, layers and seeds differ.
    assert!(block(&workload.calibrate(0, 0), &rope, 1) != forward[1]);
    assert!(block(&plan("needle", &shape, 1000, 4, 6).calibrate(1, 0), &rope, 1) != forward[1]);
}

#[test]
fn a_short_context_is_solved_exactly() {
    // All 8,192 tokens are taken as they are, and one step is one probe: what is solved must come out.
    let shape = shape(1, 4, 1);
    let rope = Rope::new(&shape, 8193);
    for text in ["sink", "peaked:eta=0", "diffuse:placement=scrambled", "heavy-hitter", "local"] {
        let workload = plan(text, &shape, 8192, 1, 3);
        let target = workload.head_type(0, 0).targets().expect("structured").sink_mass;
        let got = mean(measure(&workload.calibrate(0, 0), &rope, 0).iter().map(|s| s.sink_mass));
        assert!((got - target).abs() < 0.002, "{text}: sink mass {got} for {target}");
    }
    for text in ["needle", "needle:eta=0", "needle:eta=1.5,placement=scrambled"] {
        let head = plan(text, &shape, 8192, 1, 3).calibrate(0, 0);
        let odds = head.needle().expect("a needle head").log_odds.clone();
        assert_eq!(odds, [-2.0, 0.0, 2.0, 4.0]);
        for (stats, odds) in measure(&head, &rope, 0).iter().zip(odds) {
            let (got, target) = (stats.needle_mass.expect("a needle"), 1.0 / (1.0 + (-odds).exp()));
            assert!((got - target).abs() < 0.002, "{text}: needle mass {got} for {target}");
        }
    }
}

#[test]
fn noise_is_calibrated_after_rope_for_every_spectrum_and_placement() {
    let shape = shape(1, 4, 1);
    let rope = Rope::new(&shape, 12_000 + 4);
    for (text, slack) in [
        ("content", 0.04),
        ("content:eta=1.5", 0.06),
        ("content:placement=scrambled", 0.04),
        ("content:eta=1.5,placement=scrambled", 0.06),
    ] {
        let head = plan(text, &shape, 12_000, 4, 1).calibrate(0, 0);
        for stats in measure(&head, &rope, 3) {
            let std = stats.noise_std.expect("structured");
            assert!((std / 2.0 - 1.0).abs() < slack, "{text}: {std}");
        }
    }
}

/// tr(C)^2 / tr(C^2) of rows about their mean: how many directions they fill.
fn effective_rank(rows: &[f32]) -> f64 {
    let count = (rows.len() / D) as f64;
    let mut centre = vec![0.0f64; D];
    rows.chunks_exact(D)
        .for_each(|r| centre.iter_mut().zip(r).for_each(|(m, x)| *m += f64::from(*x) / count));
    let mut covariance = vec![0.0f64; D * D];
    for row in rows.chunks_exact(D) {
        let row: Vec<f64> = row.iter().zip(&centre).map(|(x, m)| f64::from(*x) - m).collect();
        for (line, a) in covariance.chunks_exact_mut(D).zip(&row) {
            line.iter_mut().zip(&row).for_each(|(c, b)| *c += a * b);
        }
    }
    let trace: f64 = (0..D).map(|i| covariance[i * D + i]).sum();
    trace * trace / covariance.iter().map(|c| c * c).sum::<f64>()
}

#[test]
fn placement_decides_the_rank_of_the_cached_keys() {
    let shape = shape(1, 4, 1);
    let rope = Rope::new(&shape, 8192);
    let rank = |text: &str| {
        let (k, _) = context(&plan(text, &shape, 8192, 1, 2).calibrate(0, 0), &rope);
        effective_rank(&k[4 * D..])
    };
    let (white, slow, scrambled) =
        (rank("diffuse:eta=0"), rank("diffuse:eta=1.5"), rank("diffuse:eta=1.5,placement=scrambled"));
    assert!(white > 70.0, "white {white}");
    assert!(slow < 20.0, "slow {slow}");
    assert!(scrambled > 2.5 * slow, "scrambled {scrambled} against slow {slow}");
}

#[test]
fn queries_move_slowly_and_share_topics() {
    let shape = shape(1, 4, 1);
    let rope = Rope::new(&shape, 2048 + 400);
    let head = plan("content", &shape, 2048, 400, 4).calibrate(0, 0);
    let topics: Vec<Vec<u8>> = (0..400).map(|s| head.topics(s).expect("structured").to_vec()).collect();
    let kept = mean(topics.windows(2).flat_map(|w| (0..4).map(|h| f64::from(u8::from(w[0][h] == w[1][h])))));
    assert!((0.88..0.99).contains(&kept), "topics kept from step to step: {kept}");
    let same = mean(
        topics
            .iter()
            .flat_map(|t| (0..4).flat_map(move |a| (0..a).map(move |b| f64::from(u8::from(t[a] == t[b]))))),
    );
    assert!((0.2..0.6).contains(&same), "pairs of a group with one topic: {same}");
    // Steps next to each other look alike, distant ones do not: compare the logits on one key set.
    let (keys, _) = block(&head, &rope, 3);
    let logits = |s: usize| -> Vec<f64> {
        let (q, ..) = step(&head, &rope, s);
        keys.chunks_exact(D).map(|k| dot(&q[..D], k)).collect()
    };
    let correlation = |a: &[f64], b: &[f64]| {
        let (x, y) = (mean(a.iter().copied()), mean(b.iter().copied()));
        let cross = |p: &[f64], m: f64, q: &[f64], n: f64| {
            p.iter().zip(q).map(|(u, v)| (u - m) * (v - n)).sum::<f64>()
        };
        cross(a, x, b, y) / (cross(a, x, a, x) * cross(b, y, b, y)).sqrt()
    };
    let near = mean((0..20).map(|i| correlation(&logits(i * 19), &logits(i * 19 + 1))));
    let far = mean((0..20).map(|i| correlation(&logits(i * 19), &logits((i * 19 + 200) % 400))));
    assert!(near > 0.6 && near > far + 0.25, "near {near} far {far}");
}

/// Queries of positions of the prompt, `[positions][group][d]`.
fn prompt(head: &HeadWorkload, rope: &Rope, positions: std::ops::Range<usize>) -> Vec<f32> {
    let mut out = vec![0.0; positions.len() * head.group() * head.head_dim()];
    let (cos, sin) = rope.rows(positions.clone());
    head.prompt_queries(positions, cos, sin, &mut out);
    out
}

#[test]
fn the_queries_of_the_prompt_run_on_into_the_steps() {
    let shape = shape(1, 4, 1);
    let n = 3000;
    let rope = Rope::new(&shape, n + 4);
    let (group, reach) = (4 * D, PROMPT_QUERIES);
    let cosine = |a: &[f32], b: &[f32]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    // Logits on the last keys, less their mean: queries that share the phasor alone must not look alike.
    let view = |head: &HeadWorkload, query: &[f32]| {
        let (keys, _) = block(head, &rope, head.blocks() - 2);
        let logits: Vec<f64> = keys.chunks_exact(D).map(|k| dot(query, k)).collect();
        let middle = mean(logits.iter().copied());
        logits.iter().map(|z| (z - middle) as f32).collect::<Vec<f32>>()
    };
    let (mut inside, mut across, mut far) = (Vec::new(), Vec::new(), Vec::new());
    for seed in 0..12 {
        let head = plan("content", &shape, n, 4, seed).calibrate(0, 0);
        let all = prompt(&head, &rope, n - reach..n);
        // A position's queries do not depend on which others are asked for.
        assert!(prompt(&head, &rope, n - 40..n - 8) == all[(reach - 40) * group..(reach - 8) * group]);
        assert!(prompt(&head, &rope, n - 7..n - 7).is_empty());
        let (first, ..) = step(&head, &rope, 0);
        let (second, ..) = step(&head, &rope, 1);
        for h in 0..4 {
            let at = |row: usize| &all[row * group + h * D..][..D];
            let (last, zero) = (view(&head, at(reach - 1)), view(&head, &first[h * D..][..D]));
            across.push(cosine(&last, &zero));
            inside.push(cosine(&zero, &view(&head, &second[h * D..][..D])));
            inside.push(cosine(&view(&head, at(500)), &view(&head, at(501))));
            far.push(cosine(&view(&head, at(0)), &zero));
        }
    }
    let [inside, across, far] = [inside, across, far].map(|all| mean(all.into_iter()));
    assert!((across - inside).abs() < 0.06, "across {across} inside {inside}");
    assert!(inside > 0.65 && far < 0.5, "inside {inside} far {far}");
    // Of a needle, the question asks: the last positions alone look at it.
    let head = plan("needle", &shape, n, 4, 5).calibrate(0, 0);
    let (keys, _) = context(&head, &rope);
    let at = head.needle().expect("a needle head").positions[0];
    let all = prompt(&head, &rope, n - reach..n);
    let mass = |row: usize| softmax(&all[row * group + 3 * D..][..D], &keys[..(n - reach + row) * D])[at];
    assert!(mean((reach - QUESTION..reach).map(mass)) > 0.8);
    assert!(mean((0..reach - QUESTION).step_by(31).map(mass)) < 0.01);
    // Controls have them too, and a context may be shorter than the reach.
    for text in ["gaussian", "uniform", "onehot", "local"] {
        let head = plan(text, &shape, 100, 1, 1).calibrate(0, 0);
        let all = prompt(&head, &rope, 0..100);
        assert!(
            all.iter().all(|x| x.is_finite()) && prompt(&head, &rope, 50..60) == all[50 * group..60 * group]
        );
    }
}

#[test]
fn values_follow_topics_or_not_and_the_first_value_is_small() {
    let shape = shape(1, 4, 1);
    let rope = Rope::new(&shape, 4096);
    let likeness = |text: &str| {
        let (_, v) = context(&plan(text, &shape, 4096, 1, 9).calibrate(0, 0), &rope);
        assert!((dot(&v[..D], &v[..D]).sqrt() - 0.05).abs() < 1e-4);
        let norm = mean(v.chunks_exact(D).skip(1).map(|r| dot(r, r).sqrt()));
        assert!((1.0..1.25).contains(&norm), "{text}: norm {norm}");
        mean(
            (1..4095)
                .filter(|t| t % BLOCK != BLOCK - 1)
                .map(|t| dot(&v[t * D..][..D], &v[(t + 1) * D..][..D])),
        )
    };
    // The mean's 0.25 in both, and 0.36 for a shared topic.
    let (topic, iid) = (likeness("content"), likeness("content:values=iid"));
    assert!((iid - 0.25).abs() < 0.02, "iid {iid}");
    assert!((topic - 0.61).abs() < 0.08, "topic {topic}");
}

#[test]
fn the_gaussian_control_reproduces_the_closed_forms() {
    // N(0, 1) logits, independent zero-mean values: keeping a set with share s of the sum of squared weights has
    // cosine sqrt(s); the top quarter has Phi(2 - 0.674), the top eighth Phi(2 - 1.150), any fixed 44 % has 0.44.
    let shape = shape(16, 8, 2);
    let n = 512;
    let rope = Rope::new(&shape, n + 4);
    let workload = plan("gaussian", &shape, n, 4, 1);
    let mut cosines = [Vec::new(), Vec::new(), Vec::new()];
    for layer in 0..16 {
        for kv in 0..2 {
            let head = workload.calibrate(layer, kv);
            let (keys, values) = context(&head, &rope);
            for s in 0..4 {
                let (queries, ..) = step(&head, &rope, s);
                for query in queries.chunks_exact(D) {
                    let weights = softmax(query, &keys);
                    let exact = output(&weights, &values, D);
                    let mut sorted = weights.clone();
                    sorted.sort_by(|a, b| b.total_cmp(a));
                    for (slot, keep) in [(0, n / 4), (1, n / 8), (2, 0)] {
                        let kept: Vec<f64> = weights
                            .iter()
                            .enumerate()
                            .map(|(t, w)| {
                                let inside = if keep > 0 { *w >= sorted[keep - 1] } else { t % 100 < 44 };
                                if inside { *w } else { 0.0 }
                            })
                            .collect();
                        let out = output(&kept, &values, D);
                        cosines[slot]
                            .push(dot(&out, &exact) / (dot(&out, &out) * dot(&exact, &exact)).sqrt());
                    }
                }
            }
        }
    }
    for (got, want) in cosines.iter().zip([0.953, 0.896, 0.663]) {
        let got = mean(got.iter().copied());
        assert!((got - want).abs() < 0.012, "{got} for {want}");
    }
}

#[test]
fn the_uniform_and_one_hot_controls_are_exact() {
    let shape = shape(1, 4, 2);
    let rope = Rope::new(&shape, 1025);
    let stats = measure(&plan("uniform", &shape, 1024, 1, 1).calibrate(0, 1), &rope, 0);
    assert!(stats.iter().all(|s| (s.effective_tokens - 1025.0).abs() < 1e-6), "{stats:?}");
    let head = plan("onehot", &shape, 1024, 1, 1).calibrate(0, 0);
    let (keys, _) = context(&head, &rope);
    let (queries, ..) = step(&head, &rope, 0);
    for query in queries.chunks_exact(D) {
        assert!(softmax(query, &keys)[512] > 1.0 - 1e-8);
    }
}

#[test]
fn the_mix_has_its_shares() {
    let shape = shape(30, 20, 5);
    let types = |seed: u64| -> Vec<HeadType> {
        let workload = plan("mix", &shape, 1024, 1, seed);
        (0..30).flat_map(|l| (0..5).map(move |h| (l, h))).map(|(l, h)| workload.head_type(l, h)).collect()
    };
    let all = types(1);
    assert!(all[..10].iter().all(|t| *t == HeadType::Diffuse), "layers 0 and 1");
    // 140 heads: every share is whole.
    for (head, count) in [
        (HeadType::Sink, 42),
        (HeadType::Local, 28),
        (HeadType::Content, 28),
        (HeadType::Peaked, 14),
        (HeadType::HeavyHitter, 14),
        (HeadType::Diffuse, 7),
        (HeadType::Needle, 7),
    ] {
        assert_eq!(all[10..].iter().filter(|t| **t == head).count(), count, "{}", head.name());
    }
    assert_eq!(types(1), all);
    assert_ne!(types(2), all);
    // The needles' depths differ from head to head.
    let workload = plan("mix", &shape, 1024, 1, 1);
    let depths: std::collections::BTreeSet<usize> = (0..150)
        .filter(|i| all[*i] == HeadType::Needle)
        .map(|i| workload.calibrate(i / 5, i % 5).needle().expect("needle").positions[0])
        .collect();
    assert_eq!(depths.len(), 5);
    // Two layers: none is set aside, and largest remainders fill up what is there.
    let small = plan("mix", &HeadShape { layers: 2, ..shape.clone() }, 1024, 1, 1);
    let sinks = (0..10).filter(|i| small.head_type(i / 5, i % 5) == HeadType::Sink).count();
    assert_eq!(sinks, 3);
}

#[test]
fn every_workload_is_finite_on_odd_shapes() {
    for (head_dim, heads, kv_heads, context_len, theta) in [
        (64, 2, 2, 16, 1e4),
        (96, 6, 2, 300, 1e4),
        (100, 3, 1, 9000, 5e5),
        (16, 1, 1, 257, 1e6),
        (256, 2, 1, 512, 1e4),
    ] {
        let shape = HeadShape { layers: 1, heads, kv_heads, head_dim, rope_theta: theta };
        let rope = Rope::new(&shape, context_len + 2);
        for info in WORKLOADS {
            for extra in match info.name {
                _ if info.params.is_empty() => &[""][..],
                "needle" => &[
                    "",
                    ":placement=scrambled,eta=1.5",
                    ":needles=4,distractors=many,hide=mean,channels=thin",
                ],
                _ => &["", ":placement=scrambled,eta=1.5", ":outliers=yes,drift=yes,group=same,steps=iid"],
            } {
                let text = format!("{}{extra}", info.name);
                let head = plan(&text, &shape, context_len, 2, 1).calibrate(0, kv_heads - 1);
                let (keys, values) = context(&head, &rope);
                let (q, k, v) = step(&head, &rope, 1);
                let finite =
                    [&keys, &values, &q, &k, &v].iter().all(|rows| rows.iter().all(|x| x.is_finite()));
                assert!(finite, "{text} at d = {head_dim}");
                assert!(q.iter().all(|x| x.abs() < 500.0), "{text} at d = {head_dim}: queries out of scale");
            }
        }
    }
}

#[test]
fn shapes_and_lengths_out_of_range_are_refused() {
    let good = shape(2, 4, 2);
    let spec = WorkloadSpec::parse("mix").expect("known");
    let refuse = |shape: &HeadShape, context: usize, steps: usize, hint: &str| {
        let error = Workload::new(&spec, shape, context, steps, 1).expect_err(hint).to_string();
        assert!(error.contains(hint), "{error}");
    };
    refuse(&HeadShape { layers: 0, ..good.clone() }, 1024, 1, "layers");
    refuse(&HeadShape { kv_heads: 3, ..good.clone() }, 1024, 1, "4 over 3");
    refuse(&HeadShape { kv_heads: 0, ..good.clone() }, 1024, 1, "4 over 0");
    refuse(&HeadShape { head_dim: 127, ..good.clone() }, 1024, 1, "127");
    refuse(&HeadShape { head_dim: 512, ..good.clone() }, 1024, 1, "512");
    refuse(&HeadShape { rope_theta: f64::NAN, ..good.clone() }, 1024, 1, "RoPE base");
    refuse(&good, 3, 1, "context");
    refuse(&good, 1024, 0, "decode steps");
    refuse(&good, 1024, 5000, "4096");
    assert!(Workload::new(&spec, &good, 1024, 1, 1).is_ok());
}
