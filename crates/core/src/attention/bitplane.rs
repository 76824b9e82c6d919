//! `bitplane`: the upper four bits of every key find the tokens that count; the rest stands in the tail by mean
//! values.
//!
//! Our own composition: keys in two planes of four bits (KV dtype `planes8`: int8, centred and rotated), the noise of
//! a scan of so few bits (RaBitQCache, arXiv 2606.31519), top-p (Twilight, arXiv 2502.02770), a mean value for what
//! is left out (SparQ, arXiv 2312.04985). The upper plane of all tokens between the sinks and the local ones is read,
//! with the middle of its steps in place of the lower bits. Such an estimate is at most half a step off in each
//! number, so within `step / 2 * |q|_1`, and typically `t = |q|_2 * step / sqrt(12)`, step being 16/127 of the
//! largest number of the key.
//!
//! In each query head the tokens survive that hold the share `p` of the estimated softmax, found with a histogram and
//! not by sorting, and those within `margin` times `t` below the last of them; but no more than the share `most` of
//! the context, for a diffuse head loses little by the tail and would read everything. The group attends exactly,
//! with both planes, to the union. What did not survive stands in the tail with its estimated weights, times `exp(t^2
//! / 2)` (the mean of the exponential of that noise), and the mean values of blocks of 64 tokens, or of all tokens.
//! Those means take in the survivors too, whose values are then counted a little twice.
//!
//! State: a bfloat16 row for 64 tokens (4 bytes a token for 128 numbers; 29 MB for 150 heads of 98,304 tokens, read
//! once a step). A step reads 66 bytes a token, 0.97 GB there, and 260 for each survivor. Of arithmetic a token costs
//! a head 128 products of bytes, a count and an exponential: 59 million of each a step. For a group of four that is 512
//! products (7.8 a byte), 8 instructions of 64, and more than as much for the scores: four counts, one at a time, and 72
//! operations of exponentials for 16 tokens, in five passes (80 bytes a token of cache beside 66 from memory). And heads agree
//! little on what survives: at `most=0.1` a group may read the exact rows of four tenths of the context, in short runs. So a
//! step is bound by arithmetic; `most=0.03` reads a third of the rows.

use longbit_kernels::Kernels;

use super::approximate::{Depths, MeanValue, Room, push_span, with_room};
use super::choose::union;
use super::params::{Kind, ParamSpec};
use super::partial::{self, stride};
use super::{GroupQuery, HeadMethod, Method, Predicted, Reader, Selection};
use crate::kv::{KvHead, SideDtype};

pub(super) const METHOD: Method = Method {
    name: "bitplane",
    summary: "top-p by the upper four bits of every key, mean values for the rest; needs the KV dtype planes8",
    params: &[
        ParamSpec {
            name: "p",
            summary: "share of the estimated softmax that is read exactly",
            kind: Kind::Float { min: 0.0, max: 1.0 },
            default: "0.98",
        },
        ParamSpec {
            name: "margin",
            summary: "typical errors of an estimate that a token may lie below the others",
            kind: Kind::Float { min: 0.0, max: 100.0 },
            default: "2",
        },
        ParamSpec {
            name: "most",
            summary: "share of the context that a query head reads at most",
            kind: Kind::Float { min: 0.0, max: 1.0 },
            default: "0.1",
        },
        ParamSpec::sinks("16"),
        ParamSpec::local("128"),
        ParamSpec {
            name: "means",
            summary: "mean values that stand for the rest: of 64 tokens, of all tokens, or none",
            kind: Kind::Choice(&["block", "global", "none"]),
            default: "block",
        },
    ],
    settings: true,
    evicts: false,
    check: |_, shape| match shape.dtype.keys.key_codec().upper() {
        Some(_) => Ok(()),
        None => Err(format!(
            "the keys of KV dtype `{}` have no upper plane that could be read alone; use `planes8`, or \
             `k=planes8,v=…` with other values",
            shape.dtype
        )),
    },
    make: |p, place| {
        let (d, values) = (place.shape.head_dim, place.shape.dtype.values);
        Box::new(BitPlane {
            p: p.float("p"),
            margin: p.float("margin") as f32,
            most: p.float("most"),
            sinks: p.int("sinks"),
            local: p.int("local"),
            values,
            means: match p.word("means") {
                "block" => Means::Block(Vec::new()),
                "global" => Means::Global(MeanValue::new(d)),
                _ => Means::None,
            },
            reader: Reader::default(),
        })
    },
    predict: |p, context, shape| {
        let always = (p.int("sinks") + p.int("local")).min(context);
        let scan = (shape.head_dim.next_multiple_of(32) / 2 + 2) * (context - always);
        // Nearly as many as may survive.
        let survive =
            union(((context - always) as f64 * p.float("most")) as usize, shape.group, context - always);
        let state_bytes = match p.word("means") {
            "block" => context / BLOCK * shape.head_dim * 2,
            "global" => 8 * shape.head_dim * (1 + context.div_ceil(256)),
            _ => 0,
        };
        let means = if p.word("means") == "block" { state_bytes } else { 0 };
        Predicted { rows: always + survive, state_bytes, read_bytes: scan + means }
    },
};

/// Tokens of a block.
const BLOCK: usize = 64;
/// Survivors between which fewer tokens lie are joined: a jump costs as much as reading them.
const NEAR: usize = 3;

/// What stands for values that are not read.
enum Means {
    /// Woven bfloat16, `[block][head_dim]`.
    Block(Vec<u16>),
    Global(MeanValue),
    None,
}

struct BitPlane {
    p: f64,
    margin: f32,
    most: f64,
    sinks: usize,
    local: usize,
    values: SideDtype,
    means: Means,
    reader: Reader,
}

impl BitPlane {
    /// Brings the means up to date with the settled values.
    fn update(&mut self, kv: &KvHead) {
        let (d, kernels) = (kv.head_dim(), kv.kernels());
        let settled = self.values.codec().settled(kv.len());
        match &mut self.means {
            Means::Block(means) => {
                means.truncate(settled / BLOCK * d);
                let mut rows = vec![0.0; BLOCK * d];
                for block in means.len() / d..settled / BLOCK {
                    kv.decode_values(block * BLOCK..(block + 1) * BLOCK, &mut rows);
                    let (sum, others) = rows.split_at_mut(d);
                    others.chunks_exact(d).for_each(|row| kernels.add_assign(sum, row));
                    kernels.scale(sum, 1.0 / BLOCK as f32);
                    means.resize((block + 1) * d, 0);
                    kernels.weave_bf16(sum, d, &mut means[block * d..]);
                }
            }
            Means::Global(mean) => mean.update(kv, settled),
            Means::None => {}
        }
    }

    /// The floors of the heads: survivors' estimates are above. `noise` is the mean of `step^2 / 12` over the tokens.
    fn floors(
        &self,
        kernels: &Kernels,
        query: GroupQuery<'_>,
        logits: &[f32],
        n: usize,
        noise: f32,
    ) -> Vec<f32> {
        let heads = query.rows.chunks_exact(query.head_dim).zip(logits.chunks_exact(n));
        let floor = |(row, logits): (&[f32], &[f32])| {
            let depths = Depths::of(kernels, logits);
            let error = (kernels.dot(row, row) * noise).sqrt();
            let wanted = depths.floor_of_mass(self.p) - self.margin * error;
            let cap = (self.most * n as f64) as usize;
            match cap {
                _ if self.most >= 1.0 => wanted,
                0 => f32::INFINITY,
                _ => wanted.max(depths.floor_of_count(cap).0),
            }
        };
        heads.map(floor).collect()
    }

    /// The tail: `room.logits` `[group][n]` are those of the tokens from `first` on, negative infinity where they are read.
    fn tail(
        &mut self,
        query: GroupQuery<'_>,
        kv: &KvHead,
        (first, n): (usize, usize),
        noise: f32,
        room: &mut Room,
        out: &mut Selection,
    ) {
        let (d, kernels) = (query.head_dim, kv.kernels());
        let blocks = first / BLOCK..(first + n).div_ceil(BLOCK);
        out.tail.resize(query.group() * stride(d), 0.0);
        partial::clear(&mut out.tail, d);
        // Weights of blocks, `[group][blocks]`.
        room.total.clear();
        let heads = query.rows.chunks_exact(d).zip(room.logits.chunks_exact_mut(n));
        for ((row, logits), part) in heads.zip(out.tail.chunks_exact_mut(stride(d))) {
            let before = room.total.len();
            let max = kernels.max(logits);
            if max == f32::NEG_INFINITY {
                room.total.resize(before + blocks.len(), 0.0);
                continue;
            }
            let start = ((blocks.start + 1) * BLOCK - first).min(n);
            let (start, rest) = logits.split_at_mut(start);
            for block in std::iter::once(start).chain(rest.chunks_mut(BLOCK)) {
                room.total.push(kernels.exp_sum(block, max));
            }
            let weights = &mut room.total[before..];
            let correction = (0.5 * kernels.dot(row, row) * noise).min(1.0).exp();
            kernels.scale(weights, correction);
            (part[0], part[1]) = (max, kernels.sum(weights));
        }
        match &self.means {
            Means::Block(means) => {
                room.sums.clear();
                room.sums.resize(query.group() * d, 0.0);
                let rows = &means[blocks.start * d..blocks.end * d];
                kernels.accumulate_bf16(&room.total, rows, d, &mut room.sums, &[]);
                for (part, sums) in out.tail.chunks_exact_mut(stride(d)).zip(room.sums.chunks_exact(d)) {
                    part[2..].copy_from_slice(sums);
                }
                out.index_bytes += 2 * rows.len() as u64;
            }
            Means::Global(mean) => {
                for part in out.tail.chunks_exact_mut(stride(d)) {
                    let mass = part[1];
                    mean.write(mass, &mut part[2..]);
                }
                out.index_bytes += mean.read_bytes() as u64;
            }
            Means::None => {}
        }
    }
}

impl HeadMethod for BitPlane {
    fn appended(&mut self, kv: &KvHead, _: usize) {
        self.update(kv);
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.update(kv);
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let kernels = kv.kernels();
        // Tokens without a mean are always read.
        let local = match &self.means {
            Means::Block(means) => means.len() / query.head_dim * BLOCK,
            Means::Global(mean) => mean.tokens(),
            Means::None => kv.len(),
        };
        let local = local.min(kv.len().saturating_sub(self.local));
        if local <= self.sinks {
            push_span(0..kv.len(), &mut out.spans);
            return;
        }
        let (first, n) = (self.sinks, local - self.sinks);
        with_room(|room| {
            let Room { logits, steps, runs, .. } = room;
            self.reader.upper_logits(query, kv, std::slice::from_ref(&(first..local)), steps, logits);
            let noise = kernels.dot(steps, steps) / (12 * n) as f32;
            let floors = self.floors(kernels, query, logits, n, noise);
            kernels.runs_above(logits, &floors, NEAR, runs);
            push_span(0..first, &mut out.spans);
            for run in runs.iter() {
                push_span(first + run.start..first + run.end, &mut out.spans);
                logits.chunks_exact_mut(n).for_each(|logits| logits[run.clone()].fill(f32::NEG_INFINITY));
            }
            push_span(local..kv.len(), &mut out.spans);
            if !matches!(self.means, Means::None) {
                self.tail(query, kv, (first, n), noise, room, out);
            }
        });
        self.reader.report(out);
    }

    fn state_bytes(&self) -> usize {
        match &self.means {
            Means::Block(means) => 2 * means.len(),
            Means::Global(mean) => mean.bytes(),
            Means::None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{MethodShape, method};
    use crate::kv::{CacheShape, KvCache, kv_dtype};

    const D: usize = 128;
    const N: usize = 1500;

    fn rows(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n * D)
            .map(|i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
                x + if i % D == 7 { 3.0 } else { 0.0 }
            })
            .collect()
    }

    fn cache(dtype: &str, values: &[f32]) -> KvCache {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: 2048 };
        let cache = KvCache::new(shape, kv_dtype(dtype).unwrap(), Kernels::best()).unwrap();
        cache.head_mut(0, 0).append(&rows(N, 1), values).unwrap();
        cache
    }

    fn queries(kv: &KvHead) -> Vec<f32> {
        let mut queries = rows(3, 2);
        queries.iter_mut().for_each(|q| *q *= 0.4);
        kv.rotate_queries(&mut queries);
        queries
    }

    fn select(text: &str, cache: &KvCache, query: GroupQuery<'_>) -> Selection {
        let rope = std::sync::Arc::new(
            crate::model::RopeTable::new(10_000.0, D, 8, &longbit_sys::Team::new(1, false).unwrap()).unwrap(),
        );
        let place =
            crate::attention::Place { shape: MethodShape::of(cache), layer: 0, kv_head: 0, rope: &rope };
        let mut state = method(text).unwrap().make(&place);
        state.appended(&cache.head(0, 0), 0);
        let mut out = Selection::default();
        state.select(query, &cache.head(0, 0), &mut out);
        out
    }

    /// Half a step a number, and half a step of the queries, which are rounded to 8 bits; and the typical error is what it
    /// says.
    #[test]
    fn estimates_are_within_their_bound() {
        for dtype in ["planes8", "planes8+plain"] {
            let cache = cache(dtype, &rows(N, 3));
            let kv = cache.head(0, 0);
            let queries = queries(&kv);
            let query = GroupQuery { rows: &queries, head_dim: D, position: N - 1 };
            let (mut exact, mut rough, mut steps) = (Vec::new(), Vec::new(), Vec::new());
            let (mut reader, span) = (Reader::default(), 5..N);
            reader.logits(query, &kv, std::slice::from_ref(&span), &mut exact);
            reader.upper_logits(query, &kv, std::slice::from_ref(&span), &mut steps, &mut rough);
            let n = N - 5;
            let noise = kv.kernels().dot(&steps, &steps) / (12 * n) as f32;
            for (h, row) in queries.chunks_exact(D).enumerate() {
                let size: f32 = row.iter().map(|q| q.abs()).sum();
                let most = row.iter().fold(0.0f32, |m, q| m.max(q.abs()));
                let mut squares = 0.0;
                for t in 0..n {
                    let apart = exact[h * n + t] - rough[h * n + t];
                    let rounding = most / 254.0 * 8.0 * steps[t] * D as f32;
                    assert!(
                        apart.abs() <= 7.5 / 16.0 * steps[t] * size + rounding + 1e-3,
                        "{dtype} {t} {apart}"
                    );
                    squares += apart * apart;
                }
                let (seen, stated) =
                    ((squares / n as f32).sqrt(), (kv.kernels().dot(row, row) * noise).sqrt());
                assert!((0.8..1.25).contains(&(seen / stated)), "{dtype}: {seen} {stated}");
            }
        }
    }

    #[test]
    fn constant_values_come_out() {
        let cache = cache("k=planes8,v=f32", &[-0.75; N * D]);
        let kv = cache.head(0, 0);
        let queries = queries(&kv);
        let query = GroupQuery { rows: &queries, head_dim: D, position: N - 1 };
        for means in ["block", "global"] {
            let out = select(&format!("bitplane:p=0.5,means={means}"), &cache, query);
            assert!((144..700).contains(&out.tokens()), "{}", out.tokens());
            for part in out.tail.chunks_exact(stride(D)) {
                assert!(part[1] > 0.0);
                assert!(part[2..].iter().all(|x| (x / part[1] + 0.75).abs() < 1e-5), "{part:?}");
            }
        }
    }

    /// Values that settle later than keys have their means later.
    #[test]
    fn values_that_are_not_settled_are_read() {
        let cache = cache("k=planes8,v=kivi4", &rows(N, 3));
        let queries = queries(&cache.head(0, 0));
        let select = |cache: &KvCache| {
            let query = GroupQuery { rows: &queries, head_dim: D, position: cache.head(0, 0).len() - 1 };
            select("bitplane:p=0.5,local=1", cache, query)
        };
        let settled = cache.dtype().values.codec().settled(N);
        let last = select(&cache).spans.last().cloned().unwrap();
        assert!(settled < N - 1 && last.start <= settled / BLOCK * BLOCK && last.end == N, "{last:?}");
        let mut state = BitPlane {
            p: 0.5,
            margin: 2.0,
            most: 0.1,
            sinks: 16,
            local: 1,
            values: cache.dtype().values,
            means: Means::Block(Vec::new()),
            reader: Reader::default(),
        };
        let grown = KvCache::new(cache.shape(), cache.dtype(), Kernels::best()).unwrap();
        for (key, value) in rows(N, 1).chunks_exact(D).zip(rows(N, 3).chunks_exact(D)) {
            let mut kv = grown.head_mut(0, 0);
            kv.append(key, value).unwrap();
            state.appended(&kv, kv.len() - 1);
        }
        let query = GroupQuery { rows: &queries, head_dim: D, position: N - 1 };
        let mut out = Selection::default();
        state.select(query, &grown.head(0, 0), &mut out);
        assert_eq!(out, select(&cache));
    }

    /// Between a tenth of everything and everything the output changes little: the tail makes up for it.
    #[test]
    fn the_tail_makes_up_for_what_is_not_read() {
        let values: Vec<f32> =
            rows(N, 3).iter().enumerate().map(|(i, x)| x * 0.3 + (i / D / 200) as f32).collect();
        let cache = cache("planes8", &values);
        let kv = cache.head(0, 0);
        let queries = queries(&kv);
        let query = GroupQuery { rows: &queries, head_dim: D, position: N - 1 };
        let output = |out: &Selection| {
            let (mut reader, mut logits, mut whole) =
                (Reader::default(), Vec::new(), vec![0.0; 3 * stride(D)]);
            reader.logits(query, &kv, &out.spans, &mut logits);
            reader.partial(&kv, &out.spans, &mut logits, &mut whole);
            partial::merge(kv.kernels(), &mut whole, &out.tail, D, &mut Vec::new());
            let mut output = vec![0.0; 3 * D];
            partial::finish(kv.kernels(), &whole, D, &mut output);
            output
        };
        let all = output(&select("bitplane:p=1,most=1", &cache, query));
        let error = |text: &str| {
            let out = select(text, &cache, query);
            let ours = output(&out);
            let apart: f32 = ours.iter().zip(&all).map(|(a, b)| (a - b) * (a - b)).sum();
            let size: f32 = all.iter().map(|b| b * b).sum();
            ((apart / size).sqrt(), out)
        };
        let (block, out) = error("bitplane:most=0.05");
        let (global, _) = error("bitplane:most=0.05,means=global");
        let (none, _) = error("bitplane:most=0.05,means=none");
        assert!(block < 0.5 * global && global < none && block < 0.05, "{block} {global} {none}");
        // 66 bytes of every token in between (two bytes of them in whole rows), pages' means besides.
        let n = (N / 64 * 64).min(N - 128) - 16;
        let plane = (n - 16) * 66 + 16 * 256 + 6 * 256;
        assert_eq!(out.read_bytes, plane as u64);
        assert_eq!(out.index_bytes, (((n + 16).div_ceil(64)) * 2 * D) as u64);
    }

    #[test]
    fn other_formats_are_refused() {
        let dtype = kv_dtype("int8").unwrap();
        let shape = MethodShape { layers: 1, kv_heads: 1, head_dim: D, group: 1, dtype };
        let error = method("bitplane").unwrap().check(&shape).unwrap_err().to_string();
        assert!(error.contains("use `planes8`") && error.contains("int8"), "{error}");
        let dtype = kv_dtype("k=planes8,v=kivi4").unwrap();
        assert!(method("bitplane").unwrap().check(&MethodShape { dtype, ..shape }).is_ok());
    }
}
