//! `magicpig`: attention estimated from the tokens whose hashes meet the query's (MagicPIG, arXiv 2410.16179).
//!
//! Keys are hashed by random signs, `bits` of them in each of `tables` tables. A head samples the tokens that meet its query
//! in at least `hits` tables; the angle between query and centred key gives the probability `P` of that, and the logit of a
//! sampled token becomes `z - ln(P + 1e-4)`, so that sums over the sample estimate sums over all tokens:
//! `P = 1 - (1-p)^L - L p (1-p)^(L-1)` for two of `L` tables, `p = (1 - angle / pi)^bits`. Sinks and the newest tokens are
//! read exactly: `local`, or all after the last complete page of 256 where they are more (the authors' generation buffer).
//! The rows that any head of the group samples are read once; each head counts its own.
//!
//! Differs from the authors' method:
//! - Signs come from Hadamard rotations and not from a Gaussian matrix ([`super::lsh`]), which costs less than
//!   a tenth of the arithmetic and no memory. `P` is that of independent signs; those of one rotation are not, and where most tokens are
//!   sampled, sums come out about 1 % large.
//! - The mean that is taken off a key is that of all keys from the sinks to the end of its page, and not of the whole prompt;
//!   `z` keeps `q . mean`, so nothing but the sample depends on it.
//! - The probability `P + 1e-4` is 1 at most, so that reading everything (`hits=0`) is exact.
//! - The authors attend densely in layers 0 and 16 of 32: here that is `dense_layers=0+16`, and it is off unless asked for.
//!
//! State ([`super::signatures`]): `index=tables` 2 bytes a token and table and 1025 offsets of 2 bytes a table and 4096
//! tokens, of which a head reads a list a table; `index=packed` `bits * tables / 8` bytes a token, all scanned, once for the group.
//! Both: 4 bytes a token (length of the centred key) and 4 bytes a number and page.
//!
//! Time does not follow these bytes. A list has `4096 / 2^bits` tokens, 4 by default: 8 bytes, and 4 of offsets, each in a
//! line of 64 that nothing expects, so memory moves ten times what is counted; a group of four at 98,304 tokens visits
//! 14,400 lists a KV head. Counts of tables are then compared one by one, four a token. Packed hashes are read in order
//! instead, 188 bytes a token for 150 tables of 10 bits, with 14,000 operations on words of 64 tokens for a group of four.

use std::cell::Cell;
use std::ops::Range;

use super::choose::union;
use super::lsh::KeyPages;
use super::params::ParamSpec;
use super::partial::stride;
use super::signatures::{Signatures, WORDS};
use super::{GroupQuery, HeadMethod, Method, Params, Place, Predicted, Reader, Selection};
use crate::kv::{KvHead, PAGE_TOKENS};

pub(super) const METHOD: Method = Method {
    name: "magicpig",
    summary: "importance sampling by locality-sensitive hashes (MagicPIG, arXiv 2410.16179)",
    params: &[
        ParamSpec::int("bits", "signs a hash", [1, 12], "10"),
        ParamSpec::int("tables", "hash tables", [1, 1024], "150"),
        ParamSpec::int(
            "hits",
            "tables that must agree for a token to be sampled; 0 samples all",
            [0, 2],
            "2",
        ),
        ParamSpec::sinks("4"),
        ParamSpec::local("64"),
        ParamSpec::choice(
            "index",
            "lists of tokens by hash, or packed hashes that are scanned",
            &["tables", "packed"],
            "tables",
        ),
        ParamSpec::seed("of the hashes"),
    ],
    settings: true,
    evicts: false,
    check: |_, shape| super::reformer::check(shape),
    make: |p, place| Box::new(MagicPig::new(p, place)),
    predict: |p, n, shape| {
        let (bits, tables) = (p.int("bits"), p.int("tables"));
        let (state, read) = Signatures::predict(bits, tables, p.word("index") == "tables", n);
        // Of keys at right angles to the query.
        let sampled = sampling_probability(0.0, bits, tables, p.int("hits")) * n as f64;
        let sums = n / PAGE_TOKENS * shape.head_dim * 4;
        Predicted {
            rows: (p.int("sinks")
                + p.int("local")
                + PAGE_TOKENS / 2
                + union(sampled as usize, shape.group, n))
            .min(n),
            state_bytes: state + sums + 4 * n,
            read_bytes: read + sums,
        }
    },
};

/// What the authors add to a probability before they divide by it.
const FLOOR: f64 = 1e-4;

/// The probability that a key at an angle of cosine `cosine` to the query agrees with it in at least `hits` tables.
fn sampling_probability(cosine: f64, bits: usize, tables: usize, hits: usize) -> f64 {
    let sign = 1.0 - libm::acos(cosine.clamp(-1.0, 1.0)) / std::f64::consts::PI;
    let (p, n) = (libm::pow(sign, bits as f64), tables as f64);
    let none = libm::pow(1.0 - p, n);
    let one = n * p * libm::pow(1.0 - p, n - 1.0);
    match hits {
        0 => 1.0,
        1 => 1.0 - none,
        _ => (1.0 - none - one).max(0.0),
    }
}

/// Steps of the cosine in [`Surcharge`].
const STEPS: usize = 1024;

/// What is added to the logit of a sampled token, by the cosine of its angle to the query: straight lines between exact
/// values, within 1e-3 of them where a token is likely to be sampled.
struct Surcharge(Vec<f32>);

impl Surcharge {
    fn new(bits: usize, tables: usize, hits: usize) -> Self {
        let exact = |step: usize| {
            let cosine = step as f64 / (STEPS / 2) as f64 - 1.0;
            -libm::log((sampling_probability(cosine, bits, tables, hits) + FLOOR).min(1.0)) as f32
        };
        Surcharge((0..=STEPS).map(exact).collect())
    }

    fn at(&self, cosine: f32) -> f32 {
        let place = (cosine.clamp(-1.0, 1.0) + 1.0) * (STEPS / 2) as f32;
        let step = (place as usize).min(STEPS - 1);
        let [low, high] = [self.0[step], self.0[step + 1]];
        (high - low).mul_add(place - step as f32, low)
    }
}

/// Room that the states of a thread share.
#[derive(Default)]
struct Room {
    rows: Vec<f32>,
    marks: Vec<u64>,
    /// `[group][pages]`: the query times the sum of the keys up to the page.
    offsets: Vec<f32>,
    spans: Vec<Range<usize>>,
    logits: Vec<f32>,
}

thread_local! {
    static ROOM: Cell<Room> = Cell::default();
}

struct MagicPig {
    hits: usize,
    sinks: usize,
    local: usize,
    pages: KeyPages,
    signatures: Signatures,
    /// Of the centred keys of complete pages.
    lengths: Vec<f32>,
    surcharge: Surcharge,
    reader: Reader,
}

impl MagicPig {
    fn new(p: &Params, place: &Place<'_>) -> Self {
        let (bits, tables, hits) = (p.int("bits"), p.int("tables"), p.int("hits"));
        let (dim, sinks, listed) = (place.shape.head_dim, p.int("sinks"), p.word("index") == "tables");
        MagicPig {
            hits,
            sinks,
            local: p.int("local"),
            pages: KeyPages::new(place.shape.dtype, dim, sinks),
            signatures: Signatures::new(p.int("seed") as u64, dim, bits, tables, listed),
            lengths: Vec::new(),
            surcharge: Surcharge::new(bits, tables, hits),
            reader: Reader::default(),
        }
    }

    /// Hashes the pages that are not.
    fn index(&mut self, kv: &KvHead) {
        let (mut room, kernels) = (ROOM.take(), kv.kernels());
        self.pages.grow(kv, &mut room.rows);
        for page in self.signatures.pages()..self.pages.len() {
            self.pages.centred(kv, page, &mut room.rows);
            self.signatures.push(kernels, &room.rows);
            if page * PAGE_TOKENS == self.lengths.len() {
                let lengths = room.rows.chunks_exact(kv.head_dim()).map(|row| kernels.dot(row, row).sqrt());
                self.lengths.extend(lengths);
            }
        }
        ROOM.set(room);
    }

    /// Keeps of the marks those of tokens in `middle`, and collects in `spans` the tokens that any head samples.
    fn collect(marks: &mut [u64], heads: usize, middle: &Range<usize>, spans: &mut Vec<Range<usize>>) {
        spans.clear();
        let words = marks.len() / heads;
        for word in 0..words {
            let inside = |t: usize| middle.contains(&t);
            let (first, last) = (64 * word, 64 * word + 63);
            if !inside(first) || !inside(last) {
                let keep = (0..64).filter(|i| inside(first + i)).fold(0u64, |keep, i| keep | 1 << i);
                (0..heads).for_each(|head| marks[head * words + word] &= keep);
            }
            let mut any = (0..heads).fold(0, |any, head| any | marks[head * words + word]);
            while any != 0 {
                let token = first + any.trailing_zeros() as usize;
                match spans.last_mut() {
                    Some(span) if span.end == token => span.end += 1,
                    _ => spans.push(token..token + 1),
                }
                any &= any - 1;
            }
        }
    }
}

impl HeadMethod for MagicPig {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        self.index(kv);
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.pages.shrink(kv);
        self.lengths.truncate(self.pages.tokens());
        self.signatures.truncate(self.pages.len());
        self.index(kv);
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let (n, d, heads) = (kv.len(), query.head_dim, query.group());
        let sinks = self.sinks.min(n);
        let middle = sinks..self.pages.tokens().min(n.saturating_sub(self.local)).max(sinks);
        if middle.is_empty() {
            out.spans.push(0..n);
            return;
        }
        if sinks > 0 {
            out.spans.push(0..sinks);
        }
        out.spans.push(middle.end..n);
        let (mut room, kernels) = (ROOM.take(), kv.kernels());
        out.index_bytes += self.signatures.agree(kernels, query.rows, d, self.hits, &mut room.marks);
        Self::collect(&mut room.marks, heads, &middle, &mut room.spans);
        if !room.spans.is_empty() {
            let (pages, words) = (self.pages.len(), self.pages.len() * WORDS);
            room.offsets.resize(heads * pages, 0.0);
            kernels.scores_f32(query.rows, self.pages.sums(), d, &mut room.offsets, &[]);
            self.reader.logits(query, kv, &room.spans, &mut room.logits);
            let tokens = room.logits.len() / heads;
            for (h, logits) in room.logits.chunks_exact_mut(tokens).enumerate() {
                let row = &query.rows[h * d..(h + 1) * d];
                let length = kernels.dot(row, row).sqrt();
                let (marks, offsets) = (&room.marks[h * words..], &room.offsets[h * pages..]);
                for (logit, t) in logits.iter_mut().zip(room.spans.iter().cloned().flatten()) {
                    if marks[t / 64] >> (t % 64) & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                        continue;
                    }
                    let page = t / PAGE_TOKENS;
                    let inner = *logit - offsets[page] * self.pages.factor(page);
                    // A key that is its mean, or a query of zeros, has no angle.
                    let lengths = (length * self.lengths[t]).max(f32::MIN_POSITIVE);
                    *logit += self.surcharge.at(inner / lengths);
                }
            }
            out.tail.resize(heads * stride(d), 0.0);
            self.reader.partial(kv, &room.spans, &mut room.logits, &mut out.tail);
            out.tail_rows = tokens as u64;
            out.index_bytes += (self.pages.bytes() + 4 * tokens) as u64;
        }
        self.reader.report(out);
        ROOM.set(room);
    }

    fn state_bytes(&self) -> usize {
        self.signatures.bytes() + self.pages.bytes() + 4 * (self.lengths.len() + self.surcharge.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::testing;
    use crate::kv::KvCache;
    use crate::rng::mix;

    const D: usize = 64;

    fn noise(i: usize) -> f32 {
        let unit = |i| (mix(17, i as u64) >> 40) as f32 / (1 << 24) as f32;
        (unit(3 * i) + unit(3 * i + 1) + unit(3 * i + 2) - 1.5) * 2.0
    }

    /// Keys with a mean, and values that keys say something about.
    fn cache(n: usize) -> KvCache {
        let keys: Vec<f32> = (0..n * D).map(|i| noise(i) + if i % 8 == 0 { 1.0 } else { 0.0 }).collect();
        let values: Vec<f32> = (0..n * D).map(|i| 1.0 + keys[i] + noise(i + n * D)).collect();
        testing::cache("f32", D, &keys, &values)
    }

    fn queries() -> Vec<f32> {
        (0..2 * D).map(|i| 0.25 * noise(1_000_000 + i)).collect()
    }

    fn select(spec: &str, cache: &KvCache) -> Selection {
        testing::select(&mut *testing::state(spec, cache), &cache.head(0, 0), &queries())
    }

    /// Sum of weights and of weighted values of each head over `tokens`, `[2][1 + D]`.
    fn sums(cache: &KvCache, tokens: Range<usize>) -> Vec<f64> {
        let (kv, queries) = (cache.head(0, 0), queries());
        let (mut keys, mut values) = (vec![0.0; tokens.len() * D], vec![0.0; tokens.len() * D]);
        kv.decode_keys(tokens.clone(), &mut keys);
        kv.decode_values(tokens, &mut values);
        let mut out = vec![0.0; 2 * (1 + D)];
        for (query, out) in queries.chunks_exact(D).zip(out.chunks_exact_mut(1 + D)) {
            for (key, value) in keys.chunks_exact(D).zip(values.chunks_exact(D)) {
                let weight = libm::exp(key.iter().zip(query).map(|(a, b)| f64::from(a * b)).sum());
                out[0] += weight;
                out[1..].iter_mut().zip(value).for_each(|(sum, &v)| *sum += weight * f64::from(v));
            }
        }
        out
    }

    /// Over many hashes the estimates of numerator and denominator are those of dense attention.
    #[test]
    fn estimates_average_to_dense() {
        let n = 800;
        let cache = cache(n);
        let exact = sums(&cache, 4..n - 64);
        for (spec, seeds, slack) in [
            ("bits=4,tables=30", 150, 0.03),
            ("bits=3,tables=12,hits=1", 150, 0.03),
            ("bits=8,tables=150", 150, 0.05),
        ] {
            let (mut mean, mut squares, mut read) = (vec![0.0; exact.len()], vec![0.0; exact.len()], 0);
            for seed in 0..seeds {
                let out = select(&format!("magicpig:{spec},seed={seed}"), &cache);
                assert_eq!(out.spans, [0..4, n - 64..n]);
                read += out.tail_rows;
                let estimate = out.tail.chunks_exact(stride(D)).flat_map(|tail| {
                    let factor = f64::from(tail[0]).exp();
                    tail[1..].iter().map(move |&x| factor * f64::from(x))
                });
                for ((estimate, mean), square) in estimate.zip(&mut mean).zip(&mut squares) {
                    *mean += estimate / f64::from(seeds);
                    *square += estimate * estimate / f64::from(seeds);
                }
            }
            let share = read as f64 / f64::from(seeds) / 732.0;
            for h in 0..2 {
                let at = h * (1 + D);
                let error = ((squares[at] - mean[at] * mean[at]) / f64::from(seeds)).sqrt() / exact[at];
                let ratio = mean[at] / exact[at];
                println!("{spec}: sampled {share}, sum {ratio} +- {error}");
                assert!((ratio - 1.0).abs() < 4.0 * error && error < slack, "{spec}: {ratio} +- {error}");
                let apart = |a: &[f64], b: &[f64]| {
                    let square = |x: &f64| x * x;
                    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(&(a - b))).sum();
                    (apart / b.iter().map(square).sum::<f64>()).sqrt()
                };
                let apart = apart(&mean[at + 1..at + 1 + D], &exact[at + 1..at + 1 + D]);
                assert!(apart < 2.0 * slack, "{spec}: {apart}");
            }
        }
    }

    /// Both indexes sample the same tokens, beyond the first segment of tables too, and lists are less to read.
    #[test]
    fn both_indexes_sample_the_same() {
        let cache = cache(5000);
        let [mut lists, mut packed] = ["tables", "packed"]
            .map(|index| select(&format!("magicpig:bits=8,tables=24,index={index}"), &cache));
        assert!(lists.index_bytes < packed.index_bytes, "{} {}", lists.index_bytes, packed.index_bytes);
        (lists.index_bytes, packed.index_bytes) = (0, 0);
        assert_eq!(lists, packed);
        assert!(lists.tail_rows > 0 && lists.tail_rows < 1000, "{}", lists.tail_rows);
    }

    #[test]
    fn the_probability_is_that_of_two_tables() {
        // 0.98 % of keys at right angles with 10 bits and 150 tables, 3.5 % with 8 and 75.
        let at = |bits, tables| sampling_probability(0.0, bits, tables, 2);
        assert!((at(10, 150) - 0.0098).abs() < 2e-4 && (at(8, 75) - 0.035).abs() < 1e-3);
        assert_eq!(sampling_probability(1.0, 10, 150, 2), 1.0);
        let surcharge = Surcharge::new(10, 150, 2);
        for step in 0..997 {
            let cosine = -0.3 + 1.3 * step as f32 / 997.0;
            let exact = -libm::log(sampling_probability(f64::from(cosine), 10, 150, 2) + FLOOR).max(-20.0);
            let ours = f64::from(surcharge.at(cosine));
            assert!((ours - exact.max(0.0)).abs() < 1e-3, "{cosine}: {ours} {exact}");
        }
    }
}
