//! The shared kernel: exact attention of a query group over a chunk of tokens, in any KV dtype.
//!
//! Spans are cut at multiples of [`CHUNK_TOKENS`]. A chunk is the unit of work and gives one partial; partials merge in
//! token order. Neither depends on the number of threads or on how a prompt was cut, so neither do the bits.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::partial::stride;
use crate::kv::{KvHead, PAGE_TOKENS};

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

/// Attends `queries` (`[group][head_dim]`, scaled) to the tokens of `pieces`, in order, and writes the partials of the
/// group. `next` is what will be attended afterwards, if it is of the same head: its keys are requested in time.
/// `scratch` grows as needed and keeps nothing.
pub(crate) fn attend_chunk(
    kernels: &Kernels,
    queries: &[f32],
    kv: &KvHead,
    pieces: &[Range<usize>],
    next: Option<&Range<usize>>,
    scratch: &mut Vec<f32>,
    partials: &mut [f32],
) {
    let d = kv.head_dim();
    let group = queries.len() / d;
    scratch.resize(group * (PAGE_TOKENS + d), 0.0);
    let (weights, accumulators) = scratch.split_at_mut(group * PAGE_TOKENS);
    accumulators.fill(0.0);
    super::partial::clear(partials, d);
    let after = next.cloned().map(KvHead::runs).and_then(|mut runs| runs.next());
    let mut runs = pieces.iter().cloned().flat_map(KvHead::runs).peekable();
    while let Some(run) = runs.next() {
        let n = run.len();
        let weights = &mut weights[..group * n];
        kv.scores(queries, &run, weights);
        for (h, logits) in weights.chunks_exact_mut(n).enumerate() {
            let partial = &mut partials[h * stride(d)..];
            let max = partial[0].max(kernels.max(logits));
            let rescale = Kernels::exp(partial[0] - max);
            let sum = kernels.exp_sum(logits, max);
            partial[1] = partial[1].mul_add(rescale, sum);
            if rescale != 1.0 {
                kernels.scale(&mut accumulators[h * d..(h + 1) * d], rescale);
            }
            partial[0] = max;
        }
        kv.accumulate(weights, &run, runs.peek().or(after.as_ref()), accumulators);
    }
    for (partial, acc) in partials.chunks_exact_mut(stride(d)).zip(accumulators.chunks_exact(d)) {
        partial[2..].copy_from_slice(acc);
    }
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
