//! The shared kernel: exact attention of a query group over a chunk of tokens, in any KV dtype.
//!
//! Spans are cut at multiples of [`CHUNK_TOKENS`]. A chunk is the unit of work, one softmax, and gives one partial;
//! partials merge in token order. Neither depends on the number of threads or on how a prompt was cut, so neither do the bits.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::partial::stride;
use crate::kv::{KvHead, KvScratch};

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

/// Scores the tokens of `pieces`, at most a chunk together, and writes largest logit and sum of weights of each head to
/// `partials`. `weights` becomes `[run][group][tokens]` for [`gather_chunk`]. `upcoming` are pieces of memory that are read next;
/// `scratch` has been prepared for `queries`.
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
    super::partial::clear(partials, d);
    let runs = || pieces.iter().cloned().flat_map(|piece| kv.runs(piece));
    let mut ahead = runs().skip(1);
    let mut rest = &mut *weights;
    for run in runs() {
        let (logits, others) = rest.split_at_mut(group * run.len());
        rest = others;
        let next = ahead.next().map(|next| parts_of(kv.key_parts(&next)));
        let upcoming = request(kernels, next.as_ref().map_or(upcoming, |next| next));
        kv.scores(queries, &run, upcoming, scratch, logits);
        for (partial, logits) in partials.chunks_exact_mut(stride(d)).zip(logits.chunks_exact(run.len())) {
            partial[0] = partial[0].max(kernels.max(logits));
        }
    }
    let mut rest = weights;
    for run in runs() {
        let (logits, others) = rest.split_at_mut(group * run.len());
        rest = others;
        for (partial, logits) in partials.chunks_exact_mut(stride(d)).zip(logits.chunks_exact_mut(run.len()))
        {
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
fn request<'a>(kernels: &Kernels, upcoming: &[&'a [u8]]) -> &'a [u8] {
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
    let runs = || pieces.iter().cloned().flat_map(|piece| kv.runs(piece));
    let mut ahead = runs().skip(1);
    let mut rest = weights;
    for run in runs() {
        let (weights, others) = rest.split_at(group * run.len());
        rest = others;
        let next = ahead.next().map(|next| parts_of(kv.value_parts(&next)));
        let upcoming = request(kv.kernels(), next.as_ref().map_or(upcoming, |next| next));
        kv.accumulate(weights, &run, upcoming, scratch, sums);
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
    let (mut kept, mut some, mut bytes) = (Vec::new(), Vec::new(), 0);
    let mut rest = weights;
    for run in pieces.iter().cloned().flat_map(|piece| kv.runs(piece)) {
        let (weights, others) = rest.split_at(group * run.len());
        rest = others;
        kernels.runs_above(weights, floors, NEAR, &mut kept);
        for kept in &kept {
            some.clear();
            for weights in weights.chunks_exact(run.len()) {
                some.extend_from_slice(&weights[kept.clone()]);
            }
            let tokens = run.start + kept.start..run.start + kept.end;
            kv.accumulate(&some, &tokens, &[], scratch, sums);
            bytes += kv.value_parts(&tokens).map(<[u8]>::len).sum::<usize>();
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

    #[test]
    fn chunks_are_cut_at_fixed_places() {
        let cut: Vec<_> = chunks(&[0..4, 300..1500]).collect();
        assert_eq!(cut, [0..4, 300..512, 512..1024, 1024..1500]);
    }
}
