//! The shared kernel: exact attention of a query group over a chunk of tokens, in any KV dtype.
//!
//! Spans are cut at multiples of [`CHUNK_TOKENS`]. A chunk is the unit of work, one softmax, and gives one partial;
//! partials merge in token order. Neither depends on the number of threads or on how a prompt was cut, so neither do the bits.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::partial::stride;
use crate::kv::{KvHead, KvScratch, PAGE_TOKENS};

/// Tokens of a unit of work: large enough that its partial costs nothing beside its rows, small enough that five KV
/// heads at 2k tokens keep many threads busy.
pub(crate) const CHUNK_TOKENS: usize = 512;

/// Cuts `spans` at multiples of [`CHUNK_TOKENS`].
pub(crate) fn chunks(spans: &[Range<usize>]) -> impl Iterator<Item = Range<usize>> + '_ {
    spans.iter().flat_map(|span| {
        let (mut start, end) = (span.start, span.end);
        std::iter::from_fn(move || {
            (start < end).then(|| {
                let stop = end.min((start / CHUNK_TOKENS + 1) * CHUNK_TOKENS);
                let chunk = start..stop;
                start = stop;
                chunk
            })
        })
    })
}

/// Tokens that are read in one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Read<'a> {
    /// One of [`KvHead::runs`].
    Run(Range<usize>),
    /// Short pieces that lie apart, and how many tokens they are together.
    Scattered(&'a [Range<usize>], usize),
}

/// Longest piece that is brought together with others rather than read where it lies: from here on the calls for it cost
/// less than a copy.
const SHORT: usize = 8;

/// Splits `pieces`, ascending and disjoint, into reads, in order.
pub(crate) fn reads<'a>(kv: &'a KvHead, pieces: &'a [Range<usize>]) -> impl Iterator<Item = Read<'a>> {
    let (mut rest, mut run) = (pieces, 0..0);
    let apart = kv.scattered();
    std::iter::from_fn(move || {
        loop {
            if let Some(first) = kv.runs(run.clone()).next() {
                run.start = first.end;
                return Some(Read::Run(first));
            }
            let mut tokens = 0;
            let together = rest.iter().take_while(|piece| {
                tokens += piece.len();
                piece.len() <= SHORT
                    && tokens <= PAGE_TOKENS
                    && apart.start <= piece.start
                    && piece.end <= apart.end
            });
            let (some, others) = match together.count() {
                0 | 1 => rest.split_first().map(|(one, others)| {
                    run = one.clone();
                    (&rest[..0], others)
                })?,
                count => rest.split_at(count),
            };
            rest = others;
            if !some.is_empty() {
                return Some(Read::Scattered(some, some.iter().map(Range::len).sum()));
            }
        }
    })
}

impl Read<'_> {
    /// Tokens.
    pub(crate) fn len(&self) -> usize {
        match self {
            Read::Run(run) => run.len(),
            Read::Scattered(_, tokens) => *tokens,
        }
    }

    /// Logits `[group][tokens]` of `queries`, for which `scratch` has been prepared.
    pub(crate) fn score(
        &self,
        kv: &KvHead,
        queries: &[f32],
        upcoming: &[u8],
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        match self {
            Read::Run(run) => kv.scores(queries, run, upcoming, scratch, out),
            Read::Scattered(pieces, _) => kv.scores_scattered(queries, pieces, scratch, out),
        }
    }

    /// Adds the values, weighted by `weights` `[group][tokens]`, to `sums`.
    pub(crate) fn accumulate(
        &self,
        kv: &KvHead,
        weights: &[f32],
        upcoming: &[u8],
        scratch: &mut KvScratch,
        sums: &mut [f32],
    ) {
        match self {
            Read::Run(run) => kv.accumulate(weights, run, upcoming, scratch, sums),
            Read::Scattered(pieces, _) => kv.accumulate_scattered(weights, pieces, scratch, sums),
        }
    }

    /// Bytes of keys and of values.
    pub(crate) fn bytes(&self, kv: &KvHead) -> [usize; 2] {
        match self {
            Read::Run(run) => {
                let keys = kv.key_parts(run).map(<[u8]>::len).sum();
                [keys, kv.value_parts(run).map(<[u8]>::len).sum()]
            }
            Read::Scattered(pieces, _) => kv.scattered_bytes(pieces),
        }
    }

    /// The pieces of memory of a run; scattered rows are not requested ahead.
    pub(crate) fn parts<'k>(&self, kv: &'k KvHead, values: bool) -> [&'k [u8]; 4] {
        match self {
            Read::Run(run) if values => parts_of(kv.value_parts(run)),
            Read::Run(run) => parts_of(kv.key_parts(run)),
            Read::Scattered(..) => [&[]; 4],
        }
    }
}

/// Scores the tokens of `pieces`, at most a chunk together, and writes largest logit and sum of weights of each head to
/// `partials`, not the accumulators. `weights` becomes `[read][group][tokens]` for [`gather_chunk`]. `upcoming` are pieces of
/// memory that are read next; `scratch` has been prepared for `queries`.
///
/// # Panics
/// When `weights` is shorter than the group times the tokens.
pub(crate) fn score_chunk(
    queries: &[f32],
    kv: &KvHead,
    pieces: &[Range<usize>],
    upcoming: &[&[u8]],
    scratch: &mut KvScratch,
    weights: &mut [f32],
    partials: &mut [f32],
) {
    let (d, kernels) = (kv.head_dim(), kv.kernels());
    let group = queries.len() / d;
    // The accumulators are left to `gather_chunk`.
    for partial in partials.chunks_exact_mut(stride(d)) {
        (partial[0], partial[1]) = (f32::NEG_INFINITY, 0.0);
    }
    let mut ahead = reads(kv, pieces).skip(1);
    let mut rest = &mut *weights;
    for read in reads(kv, pieces) {
        let (logits, others) = rest.split_at_mut(group * read.len());
        rest = others;
        let next = ahead.next().map(|next| next.parts(kv, false));
        let upcoming = request(kernels, next.as_ref().map_or(upcoming, |next| next));
        read.score(kv, queries, upcoming, scratch, logits);
        for (partial, logits) in partials.chunks_exact_mut(stride(d)).zip(logits.chunks_exact(read.len())) {
            partial[0] = partial[0].max(kernels.max(logits));
        }
    }
    let mut rest = weights;
    for read in reads(kv, pieces) {
        let (logits, others) = rest.split_at_mut(group * read.len());
        rest = others;
        let heads = partials.chunks_exact_mut(stride(d)).zip(logits.chunks_exact_mut(read.len()));
        for (partial, logits) in heads {
            partial[1] += kernels.exp_sum(logits, partial[0]);
        }
    }
}

/// The pieces of memory of a run, the largest first; there are no more than these.
pub(crate) fn parts_of<'a>(mut parts: impl Iterator<Item = &'a [u8]>) -> [&'a [u8]; 4] {
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// Largest piece of memory that is requested whole: the scales of a run, which are read before its rows.
const SMALL: usize = 4096;

/// Requests the small pieces of `upcoming` and returns the first, which kernels request as they go on.
pub(super) fn request<'a>(kernels: &Kernels, upcoming: &[&'a [u8]]) -> &'a [u8] {
    let Some((first, others)) = upcoming.split_first() else { return &[] };
    for part in others.iter().filter(|part| part.len() <= SMALL) {
        kernels.request(part);
    }
    first
}

/// Adds the values of `pieces`, weighted by what [`score_chunk`] left, to the accumulators of `partials`. `sums` grows as
/// needed and keeps nothing. `upcoming` are pieces of memory that are read next.
pub(crate) fn gather_chunk(
    kv: &KvHead,
    pieces: &[Range<usize>],
    upcoming: &[&[u8]],
    weights: &[f32],
    scratch: &mut KvScratch,
    sums: &mut Vec<f32>,
    partials: &mut [f32],
) {
    let d = kv.head_dim();
    let group = partials.len() / stride(d);
    sums.clear();
    sums.resize(group * d, 0.0);
    let mut ahead = reads(kv, pieces).skip(1);
    let mut rest = weights;
    for read in reads(kv, pieces) {
        let (weights, others) = rest.split_at(group * read.len());
        rest = others;
        let next = ahead.next().map(|next| next.parts(kv, true));
        let upcoming = request(kv.kernels(), next.as_ref().map_or(upcoming, |next| next));
        read.accumulate(kv, weights, upcoming, scratch, sums);
    }
    for (partial, acc) in partials.chunks_exact_mut(stride(d)).zip(sums.chunks_exact(d)) {
        partial[2..].copy_from_slice(acc);
    }
}

/// Tokens between two that are read which are read too rather than jumped over.
const NEAR: usize = 4;

/// As [`gather_chunk`], but of the values whose weight is above the floor of their head for some head. `floors` has one a
/// head, in terms of the weights that [`score_chunk`] left. Returns the bytes of values read.
pub(crate) fn gather_above(
    kv: &KvHead,
    pieces: &[Range<usize>],
    floors: &[f32],
    weights: &[f32],
    scratch: &mut KvScratch,
    sums: &mut Vec<f32>,
    partials: &mut [f32],
) -> usize {
    let (d, kernels) = (kv.head_dim(), kv.kernels());
    let group = partials.len() / stride(d);
    sums.clear();
    sums.resize(group * d, 0.0);
    let (mut kept, mut tokens, mut some, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut rest = weights;
    for read in reads(kv, pieces) {
        let (weights, others) = rest.split_at(group * read.len());
        rest = others;
        let Read::Run(run) = &read else {
            read.accumulate(kv, weights, &[], scratch, sums);
            bytes += read.bytes(kv)[1];
            continue;
        };
        kernels.runs_above(weights, floors, NEAR, &mut kept);
        tokens.clear();
        tokens.extend(kept.iter().map(|kept| run.start + kept.start..run.start + kept.end));
        let mut at = 0;
        for read in reads(kv, &tokens) {
            let (from, mut taken) = (at, 0);
            while taken < read.len() {
                taken += kept[at].len();
                at += 1;
            }
            some.clear();
            for weights in weights.chunks_exact(run.len()) {
                kept[from..at].iter().for_each(|slots| some.extend_from_slice(&weights[slots.clone()]));
            }
            read.accumulate(kv, &some, &[], scratch, sums);
            bytes += read.bytes(kv)[1];
        }
    }
    for (partial, acc) in partials.chunks_exact_mut(stride(d)).zip(sums.chunks_exact(d)) {
        partial[2..].copy_from_slice(acc);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{CacheShape, KV_FORMATS, KvCache, kv_dtype};

    /// Rows of every format that lie apart score as they do where they lie, bit for bit, and their weighted sum is that of
    /// the decoded rows; each token is read once, and what cannot be moved is read where it lies.
    #[test]
    fn scattered_rows_are_those_of_the_cache() {
        const D: usize = 64;
        let numbers = |n: usize, seed: usize| -> Vec<f32> {
            (0..n * D).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 500.0 - 2.0).collect()
        };
        let pieces: Vec<Range<usize>> = [0..1, 3..4, 5..40, 41..42, 50..53, 255..257, 258..260, 300..301]
            .into_iter()
            .chain((310..600).step_by(3).map(|t| t..t + 1))
            .chain([610..640, 690..691, 698..700])
            .collect();
        let listed: Vec<usize> = pieces.iter().cloned().flatten().collect();
        for format in KV_FORMATS {
            let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: D, capacity: 768 };
            let cache = KvCache::new(shape, kv_dtype(format.name).unwrap(), Kernels::best()).unwrap();
            cache.head_mut(0, 0).append(&numbers(700, 1), &numbers(700, 2)).unwrap();
            let kv = cache.head(0, 0);
            let queries = numbers(3, 3);
            let mut scratch = KvScratch::default();
            kv.prepare(&queries, &mut scratch);
            let (mut seen, mut scattered) = (0, 0);
            let (mut sums, mut exact) = (vec![0.0; 3 * D], vec![0.0f64; 3 * D]);
            for read in reads(&kv, &pieces) {
                let n = read.len();
                let tokens = &listed[seen..seen + n];
                let mut scores = vec![0.0; 3 * n];
                kv.take_observed();
                read.score(&kv, &queries, &[], &mut scratch, &mut scores);
                assert_eq!(kv.take_observed(), read.bytes(&kv)[0] as u64, "{}", format.name);
                for (i, &token) in tokens.iter().enumerate() {
                    let mut alone = [0.0; 3];
                    kv.scores(&queries, &(token..token + 1), &[], &mut scratch, &mut alone);
                    assert_eq!(
                        alone,
                        [scores[i], scores[n + i], scores[2 * n + i]],
                        "{} {token}",
                        format.name
                    );
                }
                kv.take_observed();
                let weights: Vec<f32> = (0..3 * n).map(|i| 1.0 / (1 + (seen + i) % 7) as f32).collect();
                read.accumulate(&kv, &weights, &[], &mut scratch, &mut sums);
                assert_eq!(kv.take_observed(), read.bytes(&kv)[1] as u64, "{}", format.name);
                let mut row = vec![0.0; D];
                for (i, &token) in tokens.iter().enumerate() {
                    kv.decode_values(token..token + 1, &mut row);
                    for h in 0..3 {
                        let weight = f64::from(weights[h * n + i]);
                        exact[h * D..].iter_mut().zip(&row).for_each(|(e, x)| *e += weight * f64::from(*x));
                    }
                }
                seen += n;
                scattered += usize::from(matches!(read, Read::Scattered(..)));
            }
            assert_eq!(seen, listed.len(), "{}", format.name);
            let grouped = format.name.starts_with("kivi") || format.name == "int8-channel";
            assert_eq!(scattered == 0, grouped, "{}: {scattered} reads of scattered rows", format.name);
            let norm = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
            let apart = sums.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
            assert!(apart < 1e-3 * norm, "{}: {}", format.name, apart / norm);
        }
    }

    #[test]
    fn chunks_are_cut_at_fixed_places() {
        let cut: Vec<_> = chunks(&[0..4, 300..1500]).collect();
        assert_eq!(cut, [0..4, 300..512, 512..1024, 1024..1500]);
    }
}
