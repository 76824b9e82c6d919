//! `vattention`: sinks, recent and heavy tokens exactly, the rest from as many samples as an error bound asks for
//! (vAttention, arXiv 2510.05688; its adaptive sampling in xAlg-ai/sparse-attention-hub).
//!
//! Of the `r` tokens that are not read exactly, a base sample gives mean and standard deviation of `exp(z - max)`, hence the
//! denominator `D` and the number of samples `b = (Phi^-1(1 - delta) deviation r / (epsilon D))^2`, between the base's size
//! and `r`, for which the denominator lies within `epsilon` of the truth, on each side with probability `1 - delta`. Then `b`
//! samples are drawn, each of weight `r / b` in numerator and denominator. Defaults are the authors' 5 % configuration.
//!
//! - `topk=oracle` takes the heavy tokens from all keys, as the authors' strongest form does: it reads every key to decide,
//!   so what it shows is quality at a number of values. `topk=none` samples all but sinks and recent tokens, and reads no
//!   more than it samples.
//! - `block=1` draws tokens with replacement, as the paper does. Larger blocks draw runs of that many tokens, by systematic
//!   sampling from a random start: long reads in place of scattered rows. The deviation is then that of block sums.
//! - The heads of a group share the samples: as many as the head needs that needs most.
//! - When the bound asks for everything, everything is read exactly.
//!
//! The bound is that of normal sums whose deviation the base sample tells. Where few of the rest hold most of its weight, as
//! without the oracle, a small base underestimates it and the bound fails more often: logits of deviation 1.5 missed it in
//! 15 of 100 trials on each side, and not in 10, with a base of 5 %.
//!
//! Draws come from a counter hashed with seed, layer, KV head and position. No state. Bytes: all keys or those of the exact
//! part and the base sample, to decide; then keys and values of the exact part, and keys (without the oracle) and values of
//! the samples.
//!
//! The oracle scores every key where it decides, on the thread of the KV head (three fifths of the keys on one of two
//! threads), and reads those of the exact part again where it attends. A token costs it 512 multiply-adds of floats beside
//! its 256 bytes of bfloat16 key, 32 instructions of 16 lanes, and four scores that are copied and searched twice; samples
//! are rows that lie apart.

use std::cell::Cell;
use std::ops::Range;

use super::choose::union;
use super::params::{Kind, ParamSpec};
use super::partial::stride;
use super::{Chooser, GroupQuery, HeadMethod, Method, Params, Place, Predicted, Reader, Selection, TokenSet};
use crate::kv::KvHead;
use crate::rng::mix;

const fn share(name: &'static str, summary: &'static str, default: &'static str) -> ParamSpec {
    ParamSpec { name, summary, kind: Kind::Float { min: 0.0, max: 1.0 }, default }
}

pub(super) const METHOD: Method = Method {
    name: "vattention",
    summary: "heavy tokens exactly, the rest by samples until an error bound holds (vAttention, arXiv 2510.05688)",
    params: &[
        share("sinks", "first tokens read exactly, as a share of the context", "0.001"),
        share("local", "most recent tokens read exactly, as a share of the context", "0.001"),
        share("heavy", "tokens of largest weight a head read exactly, as a share of the context", "0.02"),
        ParamSpec {
            name: "topk",
            summary: "how the heavy tokens are known: from all keys, or not at all",
            kind: Kind::Choice(&["oracle", "none"]),
            default: "oracle",
        },
        share("base", "least number of samples, as a share of the rest", "0.01"),
        ParamSpec {
            name: "epsilon",
            summary: "relative error of the denominator",
            kind: Kind::Float { min: 0.001, max: 1.0 },
            default: "0.1",
        },
        ParamSpec {
            name: "delta",
            summary: "probability that the error is larger, on each side",
            kind: Kind::Float { min: 1e-6, max: 0.5 },
            default: "0.1",
        },
        ParamSpec {
            name: "block",
            summary: "neighbouring tokens drawn together; 1 draws tokens with replacement",
            kind: Kind::Int { min: 1, max: 256 },
            default: "1",
        },
        ParamSpec {
            name: "seed",
            summary: "of the draws",
            kind: Kind::Int { min: 0, max: 1 << 32 },
            default: "0",
        },
    ],
    settings: true,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, place| Box::new(VAttention::new(p, place)),
    predict: |p, n, shape| {
        let oracle = p.word("topk") == "oracle";
        let part = |name: &str| (p.float(name) * n as f64).ceil() as usize;
        let heavy = if oracle { union(part("heavy"), shape.group, n) } else { 0 };
        let exact = part("sinks") + part("local") + heavy;
        // How many samples there are depends on the data: twice the least.
        let (keys, d) = (shape.dtype.keys, shape.head_dim);
        let decides = if oracle { n } else { (exact + part("base")).min(n) };
        Predicted {
            rows: (exact + 2 * part("base")).min(n),
            state_bytes: 0,
            read_bytes: keys.read_bytes(d, decides) as usize,
        }
    },
};

/// x with P(Z < x) = p for a standard normal Z, by bisection.
fn normal_quantile(p: f64) -> f64 {
    let below = |x: f64| 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2) < p;
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if below(middle) { low = middle } else { high = middle }
    }
    high
}

/// What a decision needs room for; the states of a thread share it.
#[derive(Default)]
struct Room {
    /// Of all tokens, or of none.
    logits: Vec<f32>,
    some: Vec<f32>,
    chosen: Vec<u32>,
    chooser: Chooser,
    draws: Drawn,
}

thread_local! {
    static ROOM: Cell<Room> = Cell::default();
}

/// The tokens that are not read exactly, and items of them: runs of `block` tokens, of which the last may be shorter.
struct Rest {
    /// How many of the rest come before each run of them.
    before: Vec<usize>,
    runs: Vec<Range<usize>>,
    tokens: usize,
    block: usize,
}

impl Rest {
    fn new(n: usize, exact: &[Range<usize>], block: usize) -> Self {
        let mut rest = Rest { before: Vec::new(), runs: Vec::new(), tokens: 0, block };
        let ends = exact.iter().map(|span| span.start).chain([n]);
        let starts = [0].into_iter().chain(exact.iter().map(|span| span.end));
        for run in starts.zip(ends).map(|(start, end)| start..end).filter(|run| !run.is_empty()) {
            rest.before.push(rest.tokens);
            rest.tokens += run.len();
            rest.runs.push(run);
        }
        rest
    }

    fn items(&self) -> usize {
        self.tokens.div_ceil(self.block)
    }

    /// The tokens of `item`, in runs.
    fn item(&self, item: usize) -> impl Iterator<Item = Range<usize>> {
        let wanted = item * self.block..((item + 1) * self.block).min(self.tokens);
        let first = self.before.partition_point(|&before| before <= wanted.start) - 1;
        self.runs[first..].iter().zip(&self.before[first..]).map_while(move |(run, &before)| {
            let (from, to) = (wanted.start.max(before), wanted.end.min(before + run.len()));
            (from < to).then(|| run.start + from - before..run.start + to - before)
        })
    }
}

/// Some items of the rest, ascending.
#[derive(Default)]
struct Drawn {
    /// The item, and how often it was drawn.
    items: Vec<(usize, u32)>,
    spans: Vec<Range<usize>>,
    /// Of each token of the spans the number of its item in `items`.
    owner: Vec<u32>,
}

impl Drawn {
    /// Draws `m` items of `rest`.
    fn draw(&mut self, rest: &Rest, m: usize, key: u64) {
        let items = rest.items();
        self.items.clear();
        if rest.block == 1 {
            let one = |i: usize| ((u128::from(mix(key, i as u64)) * items as u128) >> 64) as usize;
            self.items.extend((0..m).map(|i| (one(i), 1)));
            self.items.sort_unstable();
            self.items.dedup_by(|next, kept| {
                let same = next.0 == kept.0;
                kept.1 += u32::from(same);
                same
            });
        } else {
            let start = (mix(key, 0) >> 11) as f64 / (1u64 << 53) as f64;
            let step = items as f64 / m as f64;
            self.items.extend((0..m).map(|i| ((((start + i as f64) * step) as usize).min(items - 1), 1)));
        }
        self.spans.clear();
        self.owner.clear();
        for (number, &(item, _)) in self.items.iter().enumerate() {
            for run in rest.item(item) {
                self.owner.extend(std::iter::repeat_n(number as u32, run.len()));
                match self.spans.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => self.spans.push(run),
                }
            }
        }
    }
}

struct VAttention {
    sinks: f64,
    local: f64,
    /// None without the oracle.
    heavy: Option<f64>,
    base: f64,
    epsilon: f64,
    quantile: f64,
    block: usize,
    key: u64,
    set: TokenSet,
    reader: Reader,
}

impl VAttention {
    fn new(p: &Params, place: &Place<'_>) -> Self {
        let place = (place.layer as u64) << 32 | place.kv_head as u64;
        VAttention {
            sinks: p.float("sinks"),
            local: p.float("local"),
            heavy: (p.word("topk") == "oracle").then(|| p.float("heavy")),
            base: p.float("base"),
            epsilon: p.float("epsilon"),
            quantile: normal_quantile(1.0 - p.float("delta")),
            block: p.int("block"),
            key: mix(p.int("seed") as u64, place),
            set: TokenSet::default(),
            reader: Reader::default(),
        }
    }

    /// Logits of the tokens of `spans`: from those of all tokens if they are known, else from the cache.
    fn logits(
        &mut self,
        query: GroupQuery<'_>,
        kv: &KvHead,
        all: &[f32],
        spans: &[Range<usize>],
        out: &mut Vec<f32>,
    ) {
        if all.is_empty() {
            self.reader.logits(query, kv, spans, out);
            return;
        }
        out.clear();
        for all in all.chunks_exact(kv.len()) {
            spans.iter().for_each(|span| out.extend_from_slice(&all[span.clone()]));
        }
    }

    /// Chooses what is read exactly.
    fn choose(&mut self, query: GroupQuery<'_>, kv: &KvHead, room: &mut Room, out: &mut Selection) {
        let n = kv.len();
        let part = |share: f64| ((share * n as f64).ceil() as usize).min(n);
        let (first, last) = (part(self.sinks), n - part(self.local));
        self.set.reset(n);
        self.set.insert_range(0..first);
        self.set.insert_range(last..n);
        room.logits.clear();
        if let Some(heavy) = self.heavy {
            self.reader.logits(query, kv, std::slice::from_ref(&(0..n)), &mut room.logits);
            for logits in room.logits.chunks_exact(n).filter(|_| first < last) {
                room.chooser.top_k(kv.kernels(), &logits[first..last], part(heavy), &mut room.chosen);
                room.chosen.iter().for_each(|&token| self.set.insert(first + token as usize));
            }
        }
        self.set.spans(&mut out.spans);
    }

    /// How many items of `rest` to draw, from a base sample of `least` that `key` gives; all of them, or more, when the bound
    /// cannot be had from fewer.
    fn budget(
        &mut self,
        query: GroupQuery<'_>,
        kv: &KvHead,
        exact: &[Range<usize>],
        rest: &Rest,
        (least, key): (usize, u64),
        room: &mut Room,
    ) -> usize {
        let (kernels, items) = (kv.kernels(), rest.items() as f64);
        room.draws.draw(rest, least, key);
        let mut fixed = Vec::new();
        self.logits(query, kv, &room.logits, exact, &mut fixed);
        self.logits(query, kv, &room.logits, &room.draws.spans, &mut room.some);
        let (of_fixed, of_drawn) = (fixed.len() / query.group(), room.draws.owner.len());
        let mut sums = vec![0.0f64; room.draws.items.len()];
        let mut wanted = least as f64;
        for h in 0..query.group() {
            let fixed = &mut fixed[h * of_fixed..(h + 1) * of_fixed];
            let drawn = &mut room.some[h * of_drawn..(h + 1) * of_drawn];
            let max = kernels.max(fixed).max(kernels.max(drawn));
            let fixed = f64::from(kernels.exp_sum(fixed, max));
            kernels.exp_sum(drawn, max);
            sums.fill(0.0);
            for (&weight, &owner) in drawn.iter().zip(&room.draws.owner) {
                sums[owner as usize] += f64::from(weight);
            }
            let times =
                || sums.iter().zip(&room.draws.items).map(|(&sum, &(_, times))| (sum, f64::from(times)));
            let mean = times().map(|(sum, times)| sum * times).sum::<f64>() / least as f64;
            let squares = times().map(|(sum, times)| (sum - mean) * (sum - mean) * times).sum::<f64>();
            let deviation = (squares / (least as f64 - 1.0)).sqrt();
            let error = self.quantile * deviation * items / (self.epsilon * (fixed + items * mean));
            wanted = wanted.max(error * error);
        }
        wanted.ceil() as usize
    }
}

impl HeadMethod for VAttention {
    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let n = kv.len();
        if n == 0 {
            return;
        }
        let mut room = ROOM.take();
        self.choose(query, kv, &mut room, out);
        let rest = Rest::new(n, &out.spans, self.block);
        let items = rest.items();
        let least = ((self.base * items as f64).ceil() as usize).max(2);
        let key = mix(self.key, query.position as u64);
        let drawn = match least < items {
            true => self.budget(query, kv, &out.spans, &rest, (least, mix(key, 0)), &mut room),
            false => items,
        };
        if drawn >= items {
            out.spans.clear();
            out.spans.push(0..n);
        } else {
            room.draws.draw(&rest, drawn, mix(key, 1));
            let Room { logits, some, draws, .. } = &mut room;
            self.logits(query, kv, logits, &draws.spans, some);
            let tokens = draws.owner.len();
            // Few items are drawn more than once or twice.
            let most = draws.items.iter().map(|item| item.1).max().unwrap_or(0);
            let surcharge = |times: u32| libm::log(f64::from(times) * items as f64 / drawn as f64) as f32;
            let surcharges: Vec<f32> = (0..=most).map(surcharge).collect();
            for some in some.chunks_exact_mut(tokens) {
                for (logit, &owner) in some.iter_mut().zip(&draws.owner) {
                    *logit += surcharges[draws.items[owner as usize].1 as usize];
                }
            }
            out.tail.resize(query.group() * stride(query.head_dim), 0.0);
            self.reader.partial(kv, &draws.spans, some, &mut out.tail);
            out.tail_rows = tokens as u64;
        }
        self.reader.report(out);
        ROOM.set(room);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{MethodShape, method};
    use crate::kv::{CacheShape, KvCache, kv_dtype};
    use crate::model::RopeTable;
    use longbit_kernels::Kernels;
    use longbit_sys::Team;
    use std::sync::Arc;

    const D: usize = 16;
    const N: usize = 6000;

    /// A cache whose logits are those of `logit` for a query of one in channel 0; values are one.
    fn cache(logit: impl Fn(usize) -> f64) -> KvCache {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: N };
        let cache = KvCache::new(shape, kv_dtype("f32").unwrap(), Kernels::best()).unwrap();
        let mut keys = vec![0.0; N * D];
        keys.chunks_exact_mut(D).enumerate().for_each(|(t, key)| key[0] = logit(t) as f32);
        cache.head_mut(0, 0).append(&keys, &vec![1.0; N * D]).unwrap();
        cache
    }

    fn gauss(t: usize) -> f64 {
        normal_quantile(((mix(5, t as u64) >> 11) as f64 + 0.5) / (1u64 << 53) as f64)
    }

    /// The denominators that `trials` positions give as a share of the true one, and the tokens read on average.
    fn denominators(spec: &str, cache: &KvCache, trials: usize) -> (Vec<f64>, f64) {
        let shape = MethodShape::of(cache);
        let rope = Arc::new(RopeTable::new(10_000.0, D, 16, &Team::new(1, false).unwrap()).unwrap());
        let mut state = method(spec).unwrap().make(&Place { shape, layer: 0, kv_head: 0, rope: &rope });
        let (kv, mut query) = (cache.head(0, 0), vec![0.0; D]);
        query[0] = 1.0;
        let (mut reader, mut logits) = (Reader::default(), Vec::new());
        let mut sum_of = |query: GroupQuery<'_>, spans: &[Range<usize>]| -> f64 {
            reader.logits(query, &kv, spans, &mut logits);
            logits.iter().map(|z| libm::exp(f64::from(*z))).sum()
        };
        let mut tokens = 0;
        let shares = (0..trials).map(|position| {
            let query = GroupQuery { rows: &query, head_dim: D, position };
            let mut out = Selection::default();
            state.select(query, &kv, &mut out);
            tokens += out.tokens() + out.tail_rows as usize;
            let tail =
                if out.tail.is_empty() { 0.0 } else { f64::from(out.tail[1]) * f64::from(out.tail[0]).exp() };
            // Values of one: the numerator is the denominator.
            assert!(out.tail.get(2).is_none_or(|x| (x / out.tail[1] - 1.0).abs() < 1e-5));
            (sum_of(query, &out.spans) + tail) / sum_of(query, std::slice::from_ref(&(0..N)))
        });
        let shares: Vec<f64> = shares.collect();
        (shares, tokens as f64 / trials as f64)
    }

    #[test]
    fn denominators_lie_within_epsilon_as_often_as_promised() {
        let (wide, narrow) = (cache(|t| 1.5 * gauss(t)), cache(|t| 0.75 * gauss(t)));
        for (spec, cache) in [
            ("vattention", &wide),
            // With the heaviest tokens among the rest, of `wide`, a base sample too often misses what makes the deviation.
            ("vattention:topk=none,base=0.05,epsilon=0.05", &narrow),
            ("vattention:block=8,base=0.05", &wide),
            ("vattention:epsilon=0.05,delta=0.05,base=0.02", &wide),
        ] {
            let params = method(spec).unwrap();
            let (epsilon, delta) = (params.params().float("epsilon"), params.params().float("delta"));
            let (shares, tokens) = denominators(spec, cache, 300);
            let above = shares.iter().filter(|x| **x > 1.0 + epsilon).count() as f64 / 300.0;
            let below = shares.iter().filter(|x| **x < 1.0 - epsilon).count() as f64 / 300.0;
            let mean = shares.iter().sum::<f64>() / 300.0;
            println!("{spec}: above {above}, below {below}, mean {mean}, tokens {tokens}");
            assert!(above <= delta + 0.04 && below <= delta + 0.04, "{spec}: {above} above, {below} below");
            assert!((mean - 1.0).abs() < 0.02, "{spec}: {mean}");
            assert!(tokens < 0.75 * N as f64, "{spec}: {tokens} of {N}");
        }
    }

    #[test]
    fn flat_weights_need_no_more_than_the_base_and_peaked_ones_do() {
        let (shares, flat) = denominators("vattention", &cache(|_| 0.0), 20);
        assert!(shares.iter().all(|x| (x - 1.0).abs() < 1e-5), "{shares:?}");
        assert!(flat < 0.033 * N as f64, "{flat}");
        let (_, peaked) = denominators("vattention:topk=none", &cache(|t| 3.0 * gauss(t)), 20);
        assert!(peaked > 5.0 * flat, "{peaked} {flat}");
    }

    #[test]
    fn items_cover_the_rest_once() {
        for block in [1, 3, 8] {
            let rest = Rest::new(50, &[0..2, 10..11, 17..30, 49..50], block);
            let all: Vec<usize> = (0..rest.items()).flat_map(|i| rest.item(i)).flatten().collect();
            let expected: Vec<usize> = (2..10).chain(11..17).chain(30..49).collect();
            assert_eq!(all, expected);
            for m in 2..rest.items() {
                let mut drawn = Drawn::default();
                drawn.draw(&rest, m, 9);
                assert_eq!(drawn.items.iter().map(|x| x.1 as usize).sum::<usize>(), m);
                assert_eq!(drawn.spans.iter().map(Range::len).sum::<usize>(), drawn.owner.len());
                assert!(drawn.items.windows(2).all(|w| w[0].0 < w[1].0));
            }
        }
        assert!(Rest::new(4, std::slice::from_ref(&(0..4)), 1).items() == 0);
    }

    #[test]
    fn quantiles_of_the_normal_distribution() {
        for (p, x) in [(0.5, 0.0), (0.9, 1.281_551_6), (0.95, 1.644_853_6), (0.01, -2.326_347_9)] {
            assert!((normal_quantile(p) - x).abs() < 1e-6, "{p}");
        }
    }
}
