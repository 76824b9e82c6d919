//! `topk`, `topp`, `threshold`, `entropy`: oracles, which choose tokens by their true weights.
//!
//! They read every key to decide, so they save no more than values; what they show is the most that choosing can do at a
//! number of tokens. (The masks of a notebook on dynamic sparse attention; oracle top-k and top-p as in Twilight,
//! arXiv 2502.02770, and vAttention, arXiv 2510.05688.) With `w` the softmax of a head over all `n` tokens:
//! - `topk`: the `k` largest; `k=0` takes the notebook's 256, 512, 1024 or 2048 for contexts up to 4k, 8k, 32k and beyond;
//! - `topp`: the fewest that hold the share `p` of the weight;
//! - `threshold`: `z >= z_max + ln tau`, the relative form of the notebook's `w > 0.01`. That form keeps nothing of a flat
//!   head and falls back to the largest weight; the largest is always kept here;
//! - `entropy`: `k = n (min + (max - min) H / ln n)` with the entropy `H` of `w`.
//!
//! Each head chooses for itself and the group reads the union. `tail=none` renormalises over it, as the notebook does.
//! `tail=mean` adds the true mass of every head outside of the union, times the mean value of all tokens ([`ValueSums`]):
//! the fair bound for methods that estimate their tail. Bytes: all keys, then keys and values of the union.
//!
//! Oracles are not meant to be fast. Beside its 256 bytes of bfloat16 key a token costs four scores, copied, maximised and
//! exponentiated, and what choosing takes: a pass for maxima and one for what lies above a bound (`topk`), three for sums
//! (`topp`), or, where more than about a twentieth of the context is kept (`entropy`), two passes that bin one score at a
//! time. All that runs while memory is idle, and the rows of the union, which lie apart, come on top.

use std::cell::Cell;

use super::choose::union;
use super::params::{Kind, ParamSpec};
use super::partial::stride;
use super::value_sums::ValueSums;
use super::{
    Chooser, GroupQuery, HeadMethod, Method, MethodShape, Params, Place, Predicted, Reader, Selection,
    TokenSet,
};
use crate::kv::KvHead;

const SINKS: ParamSpec = ParamSpec::sinks("0");
const LOCAL: ParamSpec = ParamSpec {
    name: "local",
    summary: "most recent tokens always read, the newest included",
    kind: Kind::Int { min: 0, max: 1 << 24 },
    default: "0",
};
const TAIL: ParamSpec = ParamSpec {
    name: "tail",
    summary: "what stands for the rest: nothing, or its true mass with the mean value of all tokens",
    kind: Kind::Choice(&["none", "mean"]),
    default: "none",
};

const fn share(name: &'static str, summary: &'static str, default: &'static str) -> ParamSpec {
    ParamSpec { name, summary, kind: Kind::Float { min: 0.0, max: 1.0 }, default }
}

pub(super) const TOPK: Method = Method {
    name: "topk",
    summary: "oracle: the largest weights of each head, known from reading every key",
    params: &[
        ParamSpec {
            name: "k",
            summary: "tokens a head; 0: by the share, or else 256, 512, 1024, 2048 for contexts to 4k, 8k, 32k, beyond",
            kind: Kind::Int { min: 0, max: 1 << 24 },
            default: "0",
        },
        share("share", "tokens a head as a share of the context; 0: by k", "0"),
        SINKS,
        LOCAL,
        TAIL,
    ],
    settings: true,
    evicts: false,
    check: |p, _| match p.int("k") > 0 && p.float("share") > 0.0 {
        true => Err("k and share both say how many tokens to keep: give one of them".into()),
        false => Ok(()),
    },
    make: |p, place| Oracle::boxed(Rule::Count { k: p.int("k"), share: p.float("share") }, p, place),
    // The token that asks is there too.
    predict: |p, n, shape| predict(p, n, shape, count(p.int("k"), p.float("share"), n + 1)),
};

pub(super) const TOPP: Method = Method {
    name: "topp",
    summary: "oracle: the fewest tokens with a share of each head's weight, known from reading every key",
    params: &[share("p", "share of the weight that is kept", "0.95"), SINKS, LOCAL, TAIL],
    settings: true,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, place| Oracle::boxed(Rule::Mass(p.float("p") as f32), p, place),
    // Depends on the data; about a tenth where heads are peaked.
    predict: |p, n, shape| predict(p, n, shape, n / 10),
};

pub(super) const THRESHOLD: Method = Method {
    name: "threshold",
    summary: "oracle: weights of at least a share of each head's largest, known from reading every key",
    params: &[
        share("tau", "least weight kept, as a share of the head's largest", "0.01"),
        SINKS,
        LOCAL,
        TAIL,
    ],
    settings: true,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, place| Oracle::boxed(Rule::Floor(p.float("tau") as f32), p, place),
    // Depends on the data; some tokens, at any context, where heads are peaked.
    predict: |p, n, shape| predict(p, n, shape, 64),
};

pub(super) const ENTROPY: Method = Method {
    name: "entropy",
    summary: "oracle: as many of each head's largest weights as its entropy asks for, known from reading every key",
    params: &[
        share("min", "share of the tokens kept at entropy 0", "0.1"),
        share("max", "share of the tokens kept where all weights are equal", "0.5"),
        SINKS,
        LOCAL,
        TAIL,
    ],
    settings: true,
    evicts: false,
    check: |p, _| match p.float("min") > p.float("max") {
        true => Err("min is above max: the share grows with the entropy from min to max".into()),
        false => Ok(()),
    },
    make: |p, place| Oracle::boxed(Rule::Entropy { min: p.float("min"), max: p.float("max") }, p, place),
    // Depends on the data; a quarter of the way from min to max is usual.
    predict: |p, n, shape| {
        let share = 0.75 * p.float("min") + 0.25 * p.float("max");
        predict(p, n, shape, (share * n as f64) as usize)
    },
};

/// Tokens that `topk` keeps of `n`.
fn count(k: usize, share: f64, n: usize) -> usize {
    match (k, n) {
        _ if share > 0.0 => (share * n as f64).ceil() as usize,
        (1.., _) => k,
        (_, ..=4096) => 256,
        (_, ..=8192) => 512,
        (_, ..=32_768) => 1024,
        _ => 2048,
    }
}

/// `chosen` are the tokens of one head.
fn predict(p: &Params, context: usize, shape: &MethodShape, chosen: usize) -> Predicted {
    let mean = p.word("tail") == "mean";
    Predicted {
        rows: (p.int("sinks") + p.int("local") + union(chosen, shape.group, context)).min(context),
        state_bytes: if mean { ValueSums::predicted_bytes(context, shape.head_dim) } else { 0 },
        read_bytes: shape.dtype.keys.read_bytes(shape.head_dim, context) as usize,
    }
}

/// What a head keeps.
enum Rule {
    Count { k: usize, share: f64 },
    Mass(f32),
    Floor(f32),
    Entropy { min: f64, max: f64 },
}

impl Rule {
    /// `weights` are `exp(logits - max)`, and `sum` is theirs.
    fn choose(
        &self,
        kv: &KvHead,
        (logits, weights): (&[f32], &[f32]),
        [max, sum]: [f32; 2],
        chooser: &mut Chooser,
        out: &mut Vec<u32>,
    ) {
        let (n, kernels) = (logits.len(), kv.kernels());
        match *self {
            Rule::Count { k, share } => chooser.top_k(kernels, logits, count(k, share, n), out),
            Rule::Mass(p) => chooser.top_p(kernels, weights, p, out),
            Rule::Floor(tau) => {
                out.clear();
                out.extend(weights.iter().zip(0..).filter(|(w, _)| **w >= tau).map(|(_, t)| t));
            }
            Rule::Entropy { min, max: most } => {
                let sum = f64::from(sum);
                // -sum p ln p with p = w / sum and ln w = z - max.
                let entropy =
                    libm::log(sum) - (f64::from(kernels.dot(weights, logits)) / sum - f64::from(max));
                let share = if n > 1 { (entropy / libm::log(n as f64)).clamp(0.0, 1.0) } else { 0.0 };
                let k = ((min + (most - min) * share) * n as f64) as usize;
                chooser.top_k(kernels, logits, k.clamp(1, n), out);
            }
        }
    }
}

/// Logits and weights of a whole context: room that the states of a thread share.
#[derive(Default)]
struct Room {
    logits: Vec<f32>,
    weights: Vec<f32>,
    maxima: Vec<f32>,
    chosen: Vec<u32>,
    chooser: Chooser,
    mean: Vec<f32>,
}

thread_local! {
    static ROOM: Cell<Room> = Cell::default();
}

struct Oracle {
    rule: Rule,
    sinks: usize,
    local: usize,
    values: Option<ValueSums>,
    set: TokenSet,
    reader: Reader,
}

impl Oracle {
    fn boxed(rule: Rule, p: &Params, place: &Place<'_>) -> Box<dyn HeadMethod> {
        let values =
            (p.word("tail") == "mean").then(|| ValueSums::new(place.shape.dtype, place.shape.head_dim));
        let (set, reader) = (TokenSet::default(), Reader::default());
        Box::new(Oracle { rule, sinks: p.int("sinks"), local: p.int("local"), values, set, reader })
    }
}

impl HeadMethod for Oracle {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        if let Some(values) = &mut self.values {
            values.grow(kv);
        }
    }

    fn truncated(&mut self, kv: &KvHead) {
        if let Some(values) = &mut self.values {
            values.shrink(kv);
        }
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let (n, kernels) = (kv.len(), kv.kernels());
        if n == 0 {
            return;
        }
        let mut room = ROOM.take();
        self.reader.logits(query, kv, std::slice::from_ref(&(0..n)), &mut room.logits);
        room.weights.clone_from(&room.logits);
        room.maxima.clear();
        self.set.reset(n);
        self.set.insert_range(0..self.sinks);
        self.set.insert_range(n.saturating_sub(self.local)..n);
        for (logits, weights) in room.logits.chunks_exact(n).zip(room.weights.chunks_exact_mut(n)) {
            let max = kernels.max(logits);
            let sum = kernels.exp_sum(weights, max);
            room.maxima.push(max);
            self.rule.choose(kv, (logits, weights), [max, sum], &mut room.chooser, &mut room.chosen);
            room.chosen.iter().for_each(|&token| self.set.insert(token as usize));
        }
        self.set.spans(&mut out.spans);
        if let Some(values) = self.values.as_ref().filter(|_| out.tokens() < n) {
            values.mean(kv, &mut self.reader, &mut room.mean, out);
            for (weights, &max) in room.weights.chunks_exact_mut(n).zip(&room.maxima) {
                out.spans.iter().for_each(|span| weights[span.clone()].fill(0.0));
                let mass = kernels.sum(weights);
                out.tail.extend([max, mass]);
                out.tail.extend(room.mean.iter().map(|x| mass * x));
            }
            debug_assert_eq!(out.tail.len(), query.group() * stride(query.head_dim));
        }
        self.reader.report(out);
        ROOM.set(room);
    }

    fn state_bytes(&self) -> usize {
        self.values.as_ref().map_or(0, ValueSums::bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{method, testing};
    use crate::kv::{KvCache, kv_dtype};
    use crate::rng::mix;

    const D: usize = 16;

    /// Standard normals (Box and Muller).
    fn normals(n: usize, seed: u64) -> Vec<f64> {
        let unit = |i: usize| ((mix(seed, i as u64) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let radius = |i: usize| (-2.0 * libm::log(unit(2 * i))).sqrt();
        (0..n).map(|i| radius(i) * libm::cos(std::f64::consts::TAU * unit(2 * i + 1))).collect()
    }

    /// A cache in which head `h` of a group of two has the logits `logits[h]`, by way of channel `h`.
    fn cache(logits: [&[f64]; 2], values: &[f32]) -> KvCache {
        let n = logits[0].len();
        let mut keys = vec![0.0; n * D];
        for (t, key) in keys.chunks_exact_mut(D).enumerate() {
            (key[0], key[1]) = (logits[0][t] as f32, logits[1][t] as f32);
        }
        testing::cache("f32", D, &keys, values)
    }

    fn queries() -> Vec<f32> {
        let mut queries = vec![0.0; 2 * D];
        (queries[0], queries[D + 1]) = (1.0, 1.0);
        queries
    }

    fn select(spec: &str, cache: &KvCache) -> Selection {
        testing::select(&mut *testing::state(spec, cache), &cache.head(0, 0), &queries())
    }

    /// What both heads give, `[2][D]`.
    fn output(selection: &Selection, cache: &KvCache) -> Vec<f32> {
        testing::outputs(selection, &cache.head(0, 0), &queries())
    }

    /// The share of the weight of `logits` that `selection` reads.
    fn mass(selection: &Selection, logits: &[f64]) -> f64 {
        let weight = |t: usize| libm::exp(logits[t]);
        let read: f64 = selection.spans.iter().cloned().flatten().map(weight).sum();
        read / (0..logits.len()).map(weight).sum::<f64>()
    }

    fn scaled(x: &[f64], by: f64) -> Vec<f64> {
        x.iter().map(|x| x * by).collect()
    }

    #[test]
    fn top_p_holds_the_mass_of_every_head_and_hardly_more_of_a_single_one() {
        let n = 20_000;
        let (wide, narrow) = (scaled(&normals(n, 1), 1.0), scaled(&normals(n, 2), 2.0));
        let both = cache([&wide, &narrow], &vec![0.0; n * D]);
        for p in [0.5, 0.9, 0.95, 0.99] {
            let selection = select(&format!("topp:p={p}"), &both);
            assert!(mass(&selection, &wide) >= p - 1e-5 && mass(&selection, &narrow) >= p - 1e-5, "{p}");
        }
        let one = cache([&narrow, &narrow], &vec![0.0; n * D]);
        let selection = select("topp:p=0.9", &one);
        let held = mass(&selection, &narrow);
        assert!((0.9 - 1e-5..0.901).contains(&held), "{held}");
        // 1 - Phi(sigma - Phi^-1(p)) of the tokens.
        let density = selection.tokens() as f64 / n as f64;
        assert!((density - 0.2363).abs() < 0.02, "{density}");
    }

    #[test]
    fn the_mean_for_the_rest_is_exact_where_values_are_constant() {
        let n = 700;
        let (a, b) = (scaled(&normals(n, 3), 2.0), scaled(&normals(n, 4), 0.5));
        let values: Vec<f32> = (0..n).flat_map(|_| (0..D).map(|c| c as f32 - 3.5)).collect();
        let cache = cache([&a, &b], &values);
        for spec in [
            "topk:k=5,tail=mean",
            "topp:p=0.3,tail=mean",
            "threshold:tau=0.5,tail=mean",
            "entropy:min=0,max=0.1,tail=mean",
        ] {
            let selection = select(spec, &cache);
            assert!(selection.tokens() < n / 2 && selection.tail_rows == 0, "{spec}");
            for (x, exact) in output(&selection, &cache).iter().zip(values.iter().take(D).cycle()) {
                assert!((x - exact).abs() < 1e-5, "{spec}: {x} {exact}");
            }
            // The denominator is the true one.
            for (tail, logits) in selection.tail.chunks_exact(stride(D)).zip([&a, &b]) {
                let all: f64 = logits.iter().map(|z| libm::exp(*z)).sum();
                let rest = f64::from(tail[1]) * libm::exp(f64::from(tail[0]));
                let whole = rest / all + mass(&selection, logits);
                assert!((whole - 1.0).abs() < 1e-5, "{spec}: {whole}");
            }
        }
    }

    fn phi(x: f64) -> f64 {
        0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
    }

    /// With logits N(0, sigma^2) and independent values of mean 0, the top share rho, `z = Phi^-1(1 - rho)`, holds
    /// `Phi(sigma - z)` of the weight and the part `Phi(2 sigma - z)` of the sum of its squares, whose root is the cosine.
    #[test]
    fn gaussian_logits_follow_the_closed_form() {
        let n = 20_000;
        for (sigma, rho, z) in [(1.0, 0.05, 1.644_854), (1.0, 0.25, 0.674_490), (1.5, 0.02, 2.053_749)] {
            let logits = [normals(n, 11), normals(n, 12)].map(|x| scaled(&x, sigma));
            let values: Vec<f32> = normals(n * D, 13).iter().map(|x| *x as f32).collect();
            // The same logits for both heads, so that the union is what one of them keeps.
            let cache = cache([&logits[0], &logits[0]], &values);
            let selection = select(&format!("topk:share={rho}"), &cache);
            assert_eq!(selection.tokens(), (rho * n as f64).ceil() as usize);
            let held = mass(&selection, &logits[0]);
            assert!((held - phi(sigma - z)).abs() < 0.02, "mass {held}, {}", phi(sigma - z));
            let everything = Selection { spans: std::iter::once(0..n).collect(), ..Selection::default() };
            let (ours, exact) = (output(&selection, &cache), output(&everything, &cache));
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let cosine = dot(&ours, &exact) / (dot(&ours, &ours) * dot(&exact, &exact)).sqrt();
            let expected = phi(2.0 * sigma - z).sqrt();
            // Sixteen channels: the cosine of a sample has a deviation of about (1 - expected^2) / 4.
            let slack = 0.75 * (1.0 - expected * expected) + 0.01;
            assert!((cosine - expected).abs() < slack, "sigma {sigma}, share {rho}: {cosine} {expected}");
        }
    }

    #[test]
    fn the_entropy_of_gaussian_logits_decides_the_share() {
        // H = ln n - sigma^2 / 2.
        let n = 20_000;
        let logits = scaled(&normals(n, 21), 1.2);
        let selection = select("entropy:min=0.1,max=0.5", &cache([&logits, &logits], &vec![0.0; n * D]));
        let share = 0.1 + 0.4 * (1.0 - 0.72 / libm::log(n as f64));
        let ours = selection.tokens() as f64 / n as f64;
        assert!((ours - share).abs() < 0.002, "{ours} {share}");
        // Equal weights: the most; a single one: the least.
        let (flat, mut peak) = (vec![1.0; n], vec![0.0; n]);
        peak[77] = 60.0;
        let tokens = |z: &[f64]| select("entropy", &cache([z, z], &vec![0.0; n * D])).tokens();
        assert_eq!((tokens(&flat), tokens(&peak)), (n / 2, n / 10));
    }

    #[test]
    fn the_threshold_is_relative_and_keeps_the_largest() {
        let mut logits = vec![0.0; 300];
        (logits[5], logits[100], logits[200]) = (10.0, 5.5, 5.3);
        let cache = cache([&logits, &logits], &vec![0.0; 300 * D]);
        // ln 0.01 = -4.605.
        assert_eq!(select("threshold:tau=0.01", &cache).spans, [5..6, 100..101]);
        assert_eq!(select("threshold:tau=1", &cache).spans, std::iter::once(5..6).collect::<Vec<_>>());
    }

    #[test]
    fn contradictions_are_refused() {
        let dtype = kv_dtype("bf16").unwrap();
        let shape = MethodShape { layers: 1, kv_heads: 1, head_dim: D, group: 1, dtype };
        for (spec, says) in
            [("topk:k=5,share=0.1", "give one of them"), ("entropy:min=0.6", "min is above max")]
        {
            let message = method(spec).unwrap().check(&shape).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
        assert_eq!([4096, 5000, 32_768, 98_304].map(|n| count(0, 0.0, n)), [256, 512, 1024, 2048]);
    }
}
