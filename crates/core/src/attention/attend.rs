//! The shared kernel: exact attention of a query group over a chunk of tokens, in any KV dtype.
//!
//! A chunk is what [`super::tasks`] cuts: the unit of work, one softmax, and gives one partial.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::partial::stride;
use crate::kv::{KvHead, KvRun, KvScratch, PAGE_TOKENS};

/// Tokens that are read in one call.
#[derive(Clone)]
pub(crate) enum Read<'a> {
    /// Tokens one after another, and the first of them.
    Run(KvRun<'a>, usize),
    /// Short pieces that lie apart, and how many tokens they are together.
    Scattered(&'a KvHead, &'a [Range<usize>], usize),
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
                return Some(Read::Run(kv.run(&first), first.start));
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
                return Some(Read::Scattered(kv, some, some.iter().map(Range::len).sum()));
            }
        }
    })
}

impl<'a> Read<'a> {
    /// Tokens.
    pub(crate) fn len(&self) -> usize {
        match self {
            Read::Run(run, _) => run.len(),
            Read::Scattered(_, _, tokens) => *tokens,
        }
    }

    /// Logits `[group][tokens]` of `queries`, for which `scratch` has been prepared.
    pub(crate) fn score(&self, queries: &[f32], upcoming: &[u8], scratch: &mut KvScratch, out: &mut [f32]) {
        match self {
            Read::Run(run, _) => run.scores(queries, upcoming, scratch, out),
            Read::Scattered(kv, pieces, _) => kv.scores_scattered(queries, pieces, scratch, out),
        }
    }

    /// As [`Read::score`], less `offsets` `[group]`, and the largest of each head without them.
    fn score_apart(
        &self,
        queries: &[f32],
        upcoming: &[u8],
        scratch: &mut KvScratch,
        (out, largest, offsets): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        match self {
            Read::Run(run, _) => run.scores_apart(queries, upcoming, scratch, (out, largest, offsets)),
            Read::Scattered(kv, ..) => {
                self.score(queries, upcoming, scratch, out);
                offsets.fill(0.0);
                for (largest, scores) in largest.iter_mut().zip(out.chunks_exact(self.len())) {
                    *largest = kv.kernels().max(scores);
                }
            }
        }
    }

    /// Adds the values, weighted by `weights` `[group][tokens]`, to `sums`; `masses` are the sums of the weights, if they
    /// are known.
    pub(crate) fn accumulate(
        &self,
        weights: &[f32],
        masses: Option<&[f32]>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        sums: &mut [f32],
    ) {
        match self {
            Read::Run(run, _) => run.accumulate(weights, masses, upcoming, scratch, sums),
            Read::Scattered(kv, pieces, _) => kv.accumulate_scattered(weights, pieces, scratch, sums),
        }
    }

    /// Bytes of keys and of values.
    pub(crate) fn bytes(&self) -> [usize; 2] {
        match self {
            Read::Run(run, _) => {
                [run.key_parts(), run.value_parts()].map(|parts| parts.iter().map(|part| part.len()).sum())
            }
            Read::Scattered(kv, pieces, _) => kv.scattered_bytes(pieces),
        }
    }

    /// The pieces of memory of a run; scattered rows are not requested ahead.
    pub(crate) fn parts(&self, values: bool) -> [&'a [u8]; 4] {
        match self {
            Read::Run(run, _) if values => run.value_parts(),
            Read::Run(run, _) => run.key_parts(),
            Read::Scattered(..) => [&[]; 4],
        }
    }
}

/// Numbers that [`score_chunk`] writes for the reads of a chunk: logits, what is added to those of each head, and the largest
/// without it.
pub(crate) fn weights_len(reads: &[Read<'_>], group: usize) -> usize {
    reads.iter().map(|read| group * (read.len() + 2)).sum()
}

/// What [`score_chunk`] has for the first read of `rest`: logits `[group][tokens]`, then offsets, then the largest.
fn split<'a>(rest: &mut &'a mut [f32], group: usize, tokens: usize) -> [&'a mut [f32]; 3] {
    let (logits, others) = std::mem::take(rest).split_at_mut(group * tokens);
    let (offsets, others) = others.split_at_mut(group);
    let (largest, others) = others.split_at_mut(group);
    *rest = others;
    [logits, offsets, largest]
}

/// Bytes of what comes next that kernels have requested when they end; some have less.
const REQUESTED: usize = 8192;
/// Bytes to request before the exponentials of a page of a head.
const WHILE_EXP: usize = 1024;

/// Scores the tokens of `all`, the reads of a chunk, and writes the largest logit of each head to `partials`, nothing else of
/// them. For [`gather_chunk`] `weights` becomes `[read]`, each with the logits `[group][tokens]` but for what all tokens of
/// a head have alike, and that `[group]`, among others. `upcoming` are pieces of memory that are read next; `scratch` has
/// been prepared for `queries`.
///
/// # Panics
/// When `weights` is shorter than [`weights_len`].
pub(crate) fn score_chunk(
    queries: &[f32],
    kv: &KvHead,
    all: &[Read<'_>],
    upcoming: &[&[u8]],
    scratch: &mut KvScratch,
    weights: &mut [f32],
    partials: &mut [f32],
) {
    let (d, kernels) = (kv.head_dim(), kv.kernels());
    let group = queries.len() / d;
    for partial in partials.chunks_exact_mut(stride(d)) {
        partial[0] = f32::NEG_INFINITY;
    }
    let mut rest = weights;
    for (i, read) in all.iter().enumerate() {
        let [logits, offsets, largest] = split(&mut rest, group, read.len());
        let next = all.get(i + 1).map(|next| next.parts(false));
        let upcoming = request(kernels, next.as_ref().map_or(upcoming, |next| next));
        read.score_apart(queries, upcoming, scratch, (logits, largest, offsets));
        let heads = partials.chunks_exact_mut(stride(d)).zip(&*offsets).zip(&*largest);
        for ((partial, offset), largest) in heads {
            // Rounding keeps the order, so this is the largest of the sums.
            partial[0] = partial[0].max(largest + offset);
        }
    }
}

/// Turns what [`score_chunk`] left for a read, `logits` `[group][tokens]` and `offsets` `[group]`, into weights and their
/// sums, which are added to `partials`. `ahead` is requested meanwhile: exponentials read nothing from memory.
fn weigh(
    kernels: &Kernels,
    logits: &mut [f32],
    offsets: &mut [f32],
    mut ahead: &[u8],
    d: usize,
    partials: &mut [f32],
) {
    let tokens = logits.len() / offsets.len();
    let heads = partials.chunks_exact_mut(stride(d)).zip(logits.chunks_exact_mut(tokens));
    for ((partial, logits), offset) in heads.zip(offsets) {
        let some = ahead.len().min(WHILE_EXP);
        kernels.request(&ahead[..some]);
        ahead = &ahead[some..];
        *offset = kernels.exp_sum_offset(logits, *offset, partial[0]);
        partial[1] += *offset;
    }
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

/// Makes weights of what [`score_chunk`] left, and writes their sums and the values of `all` under them to `partials`: just
/// before they are used, so that a first-level cache has them. `sums` grows as needed and keeps nothing. `upcoming` are
/// pieces of memory that are read next.
pub(crate) fn gather_chunk(
    kv: &KvHead,
    all: &[Read<'_>],
    upcoming: &[&[u8]],
    weights: &mut [f32],
    scratch: &mut KvScratch,
    sums: &mut Vec<f32>,
    partials: &mut [f32],
) {
    let (d, kernels) = (kv.head_dim(), kv.kernels());
    let group = partials.len() / stride(d);
    for partial in partials.chunks_exact_mut(stride(d)) {
        partial[1] = 0.0;
    }
    sums.clear();
    sums.resize(group * d, 0.0);
    let mut rest = weights;
    // Of the first values the kernel of the keys has requested less.
    let mut requested = REQUESTED;
    for (i, read) in all.iter().enumerate() {
        let [weights, masses, _] = split(&mut rest, group, read.len());
        let [codes, ..] = read.parts(true);
        weigh(kernels, weights, masses, codes.get(requested..).unwrap_or_default(), d, partials);
        requested = 2 * REQUESTED;
        let next = all.get(i + 1).map(|next| next.parts(true));
        let upcoming = request(kernels, next.as_ref().map_or(upcoming, |next| next));
        read.accumulate(weights, Some(masses), upcoming, scratch, sums);
    }
    for (partial, acc) in partials.chunks_exact_mut(stride(d)).zip(sums.chunks_exact(d)) {
        partial[2..].copy_from_slice(acc);
    }
}

/// Tokens between two that are read which are read too rather than jumped over.
const NEAR: usize = 4;

/// As [`gather_chunk`], but of the values whose weight is above the floor of their head for some head. `floors` has one a
/// head, in terms of weights over the largest one of the chunk. Returns the bytes of values read.
pub(crate) fn gather_above(
    kv: &KvHead,
    all: &[Read<'_>],
    floors: &[f32],
    weights: &mut [f32],
    scratch: &mut KvScratch,
    sums: &mut Vec<f32>,
    partials: &mut [f32],
) -> usize {
    let (d, kernels) = (kv.head_dim(), kv.kernels());
    let group = partials.len() / stride(d);
    for partial in partials.chunks_exact_mut(stride(d)) {
        partial[1] = 0.0;
    }
    sums.clear();
    sums.resize(group * d, 0.0);
    let (mut kept, mut tokens, mut some, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut rest = weights;
    for read in all {
        let [weights, masses, _] = split(&mut rest, group, read.len());
        weigh(kernels, weights, masses, &[], d, partials);
        let Read::Run(run, first) = read else {
            read.accumulate(weights, None, &[], scratch, sums);
            bytes += read.bytes()[1];
            continue;
        };
        kernels.runs_above(weights, floors, NEAR, &mut kept);
        tokens.clear();
        tokens.extend(kept.iter().map(|kept| first + kept.start..first + kept.end));
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
            read.accumulate(&some, None, &[], scratch, sums);
            bytes += read.bytes()[1];
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
                read.score(&queries, &[], &mut scratch, &mut scores);
                assert_eq!(kv.take_observed(), read.bytes()[0] as u64, "{}", format.name);
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
                read.accumulate(&weights, None, &[], &mut scratch, &mut sums);
                assert_eq!(kv.take_observed(), read.bytes()[1] as u64, "{}", format.name);
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
}
