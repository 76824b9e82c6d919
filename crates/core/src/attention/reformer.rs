//! `reformer`: exact attention over the tokens in the query's hash buckets (Reformer, arXiv 2001.04451), a weak baseline.
//!
//! Each of `rounds` rounds hashes a vector to the largest of `[x R; -x R]` for a random `R`; the query reads the newest
//! `chunk` tokens of its bucket in each round (its own chunk of 64 and the one before it, in the authors' sorted lists), the
//! union over rounds and heads, sinks and recent tokens.
//!
//! Reformer trains with one vector for query and key; with separate ones, and without training, the tokens of a query's
//! bucket need not be those of largest weight. What differs beside that: `R` is made of Hadamard rotations and keys lose a
//! running mean ([`super::lsh`]); hashes need no unit length, for the largest entry does not depend on it. The number of
//! buckets is fixed by the room of the cache, twice a power of two so that a bucket has about `bucket` tokens of a full one.
//! Tokens after the last complete page of 256 are read exactly.
//!
//! State: 2 bytes a token and round, scanned from the newest page back until every head has its chunk, and 4 bytes a number
//! and page. Each head compares for itself: 32 comparisons a token for four heads and eight rounds, 16 an instruction, for
//! 16 bytes. A bucket rarely has the chunk's 128 tokens, so the scan seldom ends early; lists of tokens by bucket would read
//! a thousandth of it, and cost a random access a list.

use longbit_kernels::Kernels;

use super::lsh::{KeyPages, Rotations};
use super::params::ParamSpec;
use super::{GroupQuery, HeadMethod, Method, MethodShape, Params, Place, Predicted, Selection, TokenSet};
use crate::kv::{KvHead, PAGE_TOKENS};

pub(super) const METHOD: Method = Method {
    name: "reformer",
    summary: "tokens in the query's hash buckets (Reformer, arXiv 2001.04451); a weak baseline without its training",
    params: &[
        ParamSpec::int("rounds", "hash rounds", [1, 64], "8"),
        ParamSpec::int("bucket", "tokens of a bucket when the cache is full, about", [8, 1 << 16], "64"),
        ParamSpec::int("chunk", "newest tokens of a bucket read in a round", [1, 1 << 20], "128"),
        ParamSpec::sinks("4"),
        ParamSpec::local("128"),
        ParamSpec::seed("of the hashes"),
    ],
    settings: true,
    evicts: false,
    check: |_, shape| check(shape),
    make: |p, place| Box::new(Reformer::new(p, place)),
    predict: |p, n, shape| {
        let of_buckets = p.int("rounds") * p.int("chunk").min(p.int("bucket"));
        let codes = 2 * p.int("rounds") * n;
        Predicted {
            rows: (p.int("sinks") + p.int("local") + PAGE_TOKENS / 2 + of_buckets).min(n),
            state_bytes: codes + n / PAGE_TOKENS * shape.head_dim * 4,
            read_bytes: codes,
        }
    },
};

/// What rotations need.
pub(super) fn check(shape: &MethodShape) -> Result<(), String> {
    match shape.head_dim.is_power_of_two() {
        true => Ok(()),
        false => Err(format!(
            "its hashes rotate keys by Hadamard matrices, whose size is a power of two, and a row has {} numbers: use a \
             method without hashes",
            shape.head_dim
        )),
    }
}

struct Reformer {
    rounds: usize,
    bucket: usize,
    chunk: usize,
    sinks: usize,
    local: usize,
    seed: u64,
    dim: usize,
    /// Half the buckets; 0 before the room of the cache is known.
    half: usize,
    rotations: Rotations,
    pages: KeyPages,
    /// `[pages][rounds][PAGE_TOKENS]`.
    codes: Vec<u16>,
    rows: Vec<f32>,
    turned: Vec<f32>,
    set: TokenSet,
}

impl Reformer {
    fn new(p: &Params, place: &Place<'_>) -> Self {
        let (dim, sinks) = (place.shape.head_dim, p.int("sinks"));
        Reformer {
            rounds: p.int("rounds"),
            bucket: p.int("bucket"),
            chunk: p.int("chunk"),
            sinks,
            local: p.int("local"),
            seed: p.int("seed") as u64,
            dim,
            half: 0,
            rotations: Rotations::new(0, dim, 0),
            pages: KeyPages::new(place.shape.dtype, dim, sinks),
            codes: Vec::new(),
            rows: Vec::new(),
            turned: Vec::new(),
            set: TokenSet::default(),
        }
    }

    /// The buckets of `x` in all rounds.
    fn hash(&mut self, kv: &KvHead, x: &[f32], mut to: impl FnMut(usize, u16)) {
        self.rotations.project(kv.kernels(), x, &mut self.turned);
        let width = self.half.next_multiple_of(self.dim);
        for (round, turned) in self.turned.chunks_exact(width).enumerate() {
            let (mut best, mut bucket) = (-1.0, 0);
            for (i, &x) in turned[..self.half].iter().enumerate() {
                if x.abs() > best {
                    (best, bucket) = (x.abs(), if x < 0.0 { i + self.half } else { i });
                }
            }
            to(round, bucket as u16);
        }
    }
}

impl HeadMethod for Reformer {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        if self.half == 0 {
            self.half = (kv.capacity() / self.bucket / 2).clamp(1, 1 << 14).next_power_of_two();
            let count = self.rounds * self.half.div_ceil(self.dim);
            self.rotations = Rotations::new(self.seed, self.dim, count);
        }
        let mut rows = std::mem::take(&mut self.rows);
        let from = self.pages.len();
        self.pages.grow(kv, &mut rows);
        for page in from..self.pages.len() {
            self.pages.centred(kv, page, &mut rows);
            let mut codes = std::mem::take(&mut self.codes);
            let at = codes.len();
            codes.resize(at + self.rounds * PAGE_TOKENS, 0);
            for (t, row) in rows.chunks_exact(self.dim).enumerate() {
                self.hash(kv, row, |round, code| codes[at + round * PAGE_TOKENS + t] = code);
            }
            self.codes = codes;
        }
        self.rows = rows;
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.pages.shrink(kv);
        self.codes.truncate(self.pages.tokens() * self.rounds);
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let (n, rounds) = (kv.len(), self.rounds);
        let mut set = std::mem::take(&mut self.set);
        set.reset(n);
        set.insert_range(0..self.sinks);
        set.insert_range(self.pages.tokens().min(n.saturating_sub(self.local))..n);
        let mut wanted = vec![0u16; if self.codes.is_empty() { 0 } else { query.group() * rounds }];
        if !wanted.is_empty() {
            for (head, wanted) in query.rows.chunks_exact(self.dim).zip(wanted.chunks_exact_mut(rounds)) {
                self.hash(kv, head, |round, code| wanted[round] = code);
            }
            out.index_bytes += self.rotations.bytes() as u64;
        }
        // How many tokens every head still takes from its bucket.
        let mut left = vec![self.chunk; wanted.len()];
        for page in (0..self.pages.len()).rev() {
            for round in 0..rounds {
                let heads = || (round..left.len()).step_by(rounds);
                if heads().all(|head| left[head] == 0) {
                    continue;
                }
                let at = (page * rounds + round) * PAGE_TOKENS;
                let codes = &self.codes[at..at + PAGE_TOKENS];
                out.index_bytes += size_of_val(codes) as u64;
                for head in heads() {
                    if left[head] > 0 {
                        take(
                            kv.kernels(),
                            codes,
                            wanted[head],
                            page * PAGE_TOKENS,
                            &mut left[head],
                            &mut set,
                        );
                    }
                }
            }
        }
        set.spans(&mut out.spans);
        self.set = set;
    }

    fn state_bytes(&self) -> usize {
        2 * self.codes.len() + self.pages.bytes() + self.rotations.bytes()
    }
}

/// Adds to `set` the newest of `codes` that are `code`, `left` at most; the first of them is token `first`.
fn take(kernels: &Kernels, codes: &[u16], code: u16, first: usize, left: &mut usize, set: &mut TokenSet) {
    let mut marks = [0u64; PAGE_TOKENS / 64];
    kernels.marks_equal(codes, code, &mut marks);
    for (word, mut marks) in marks.into_iter().enumerate().rev() {
        while marks != 0 && *left > 0 {
            let newest = 63 - marks.leading_zeros() as usize;
            set.insert(first + word * 64 + newest);
            marks ^= 1 << newest;
            *left -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::method;
    use crate::attention::testing::{cache, select, state};
    use crate::kv::kv_dtype;
    use crate::rng::mix;

    const D: usize = 32;

    /// A query finds the keys that point where it points, and about one token in a bucket's share of the others.
    #[test]
    fn keys_near_the_query_are_found() {
        let n = 4096;
        let noise = |i: usize| (mix(3, i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let mut keys: Vec<f32> = (0..n * D).map(noise).collect();
        let query: Vec<f32> = (0..D).map(|i| noise(n * D + i)).collect();
        let planted = [300, 1111, 2500];
        for t in planted {
            let key = &mut keys[t * D..(t + 1) * D];
            key.iter_mut().zip(&query).for_each(|(k, q)| *k = 0.05 * *k + q);
        }
        let cache = cache("f32", D, &keys, &keys);
        let kv = cache.head(0, 0);
        let mut full = state("reformer:local=1,sinks=0", &cache);
        let out = select(&mut *full, &kv, &query);
        for t in planted {
            assert!(out.spans.iter().any(|span| span.contains(&t)), "{t}: {:?}", out.spans);
        }
        // 64 buckets, eight rounds: an eighth of the tokens if they are independent.
        let share = out.tokens() as f64 / n as f64;
        assert!((0.02..0.3).contains(&share), "{share}");
        assert_eq!(full.state_bytes() as u64, 16 * 4096 + 4 * (16 * D as u64) + 4 * (2 + 8) * D as u64);
        let short = select(&mut *state("reformer:local=1,sinks=0,chunk=4", &cache), &kv, &query);
        assert!(short.tokens() <= 33 && short.index_bytes < out.index_bytes, "{}", short.tokens());
    }

    #[test]
    fn rows_that_no_rotation_fits_are_refused() {
        let shape =
            MethodShape { layers: 1, kv_heads: 1, head_dim: 96, group: 1, dtype: kv_dtype("bf16").unwrap() };
        let message = method("reformer").unwrap().check(&shape).unwrap_err().to_string();
        assert!(message.contains("power of two"), "{message}");
    }
}
