//! What tokens of a prompt lose under the pattern that a method gives to prompts.
//!
//! A workload fills the cache from outside, so no prompt runs through the model. Here the last tokens of the context attend to it,
//! with the queries that the workload has for them, once under the pattern and once densely: over the same cached rows, so
//! that the difference is the pattern's alone, whatever the KV dtype.

use std::sync::Mutex;

use longbit::Session;
use longbit::workload::{HeadWorkload, PROMPT_QUERIES};
use longbit_protocol::PrefillQuality;

use crate::WorkerError;
use crate::fill::run_batch;
use crate::quality::{compare, quantile};

/// Tokens that blocks of patterns are made of; each is a divisor.
const BLOCK: usize = 128;
/// Query heads times tokens times rows that are compared in all, at the most: some seconds of a core.
const PAIRS: usize = 500_000_000;

/// The last whole block of a context and what follows of the next; all of a context that has none.
fn last_tokens(context: usize) -> std::ops::Range<usize> {
    let start = (context / BLOCK).saturating_sub(1) * BLOCK;
    start.max(context.saturating_sub(PROMPT_QUERIES))..context
}

/// As many layers as [`PAIRS`] allow, one at the least: one of each of as many equal parts of the stack, and not always at the
/// same place of it, for patterns may spare every second layer or every fourth.
fn some_layers(layers: usize, pairs_of_a_layer: usize) -> Vec<usize> {
    let count = (PAIRS / pairs_of_a_layer.max(1)).clamp(1, layers.max(1));
    let part = |i: usize| i * layers / count;
    // Multiples of the golden ratio fall everywhere alike.
    (0..count).map(|i| part(i) + (i + 1) * 618 % 1000 * (part(i + 1) - part(i)) / 1000).collect()
}

/// The comparison; none for a method whose prompts are dense, and for one that has evicted rows. The session must stand at the
/// filled context.
pub(crate) fn measure(
    session: &Session,
    heads: &[HeadWorkload],
) -> Result<Option<PrefillQuality>, WorkerError> {
    let spec = session.attention().spec();
    if spec.is_prefill_dense() || spec.evicts() {
        return Ok(None);
    }
    let config = &session.model().config;
    let positions = last_tokens(session.len());
    let pairs = config.heads.saturating_mul(positions.len()).saturating_mul(session.len());
    let layers = some_layers(config.layers, pairs);
    let (cos, sin) = (session.rope().cos(positions.clone()), session.rope().sin(positions.clone()));
    let results = Mutex::new((Vec::new(), 0, 0));
    let failure: Mutex<Option<longbit::Error>> = Mutex::new(None);
    run_batch(session.team(), 0..layers.len() * config.kv_heads, |task| {
        let (layer, head) = (layers[task / config.kv_heads], task % config.kv_heads);
        let mut queries = vec![0.0; positions.len() * config.group() * config.head_dim];
        heads[layer * config.kv_heads + head].prompt_queries(positions.clone(), cos, sin, &mut queries);
        let attended = |dense| session.prompt_attention(layer, head, &queries, dense);
        match attended(true).and_then(|exact| Ok((exact, attended(false)?))) {
            Ok((exact, ours)) => {
                let rows = exact.output.chunks_exact(config.head_dim);
                let errors: Vec<f64> = rows
                    .zip(ours.output.chunks_exact(config.head_dim))
                    .map(|(exact, ours)| {
                        let exact: Vec<f64> = exact.iter().map(|&x| f64::from(x)).collect();
                        compare(ours, &exact).relative_l2
                    })
                    .collect();
                let mut results = results.lock().unwrap_or_else(|e| e.into_inner());
                results.0.extend(errors);
                results.1 += ours.seen;
                results.2 += ours.causal;
            }
            Err(error) => drop(failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error)),
        }
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error.into());
    }
    let (mut errors, seen, causal) = results.into_inner().unwrap_or_else(|e| e.into_inner());
    errors.sort_by(f64::total_cmp);
    Ok(Some(PrefillQuality {
        outputs: errors.len() as u64,
        rel_l2_p50: quantile(&errors, 0.5),
        rel_l2_p95: quantile(&errors, 0.95),
        density: seen as f64 / (causal as f64).max(1.0),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_and_layers_lie_apart() {
        assert_eq!(
            [64, 128, 200, 8192, 8200].map(last_tokens),
            [0..64, 0..128, 0..200, 8064..8192, 8064..8200]
        );
        assert_eq!(some_layers(30, 1000), (0..30).collect::<Vec<_>>());
        assert_eq!(some_layers(30, 200_000_000), [9, 18]);
        assert_eq!(some_layers(30, 100_000_000), [3, 7, 17, 20, 24]);
        assert_eq!(some_layers(30, usize::MAX), [18]);
        assert_eq!(some_layers(4, 0), [0, 1, 2, 3]);
    }
}
