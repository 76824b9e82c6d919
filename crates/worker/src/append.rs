//! How long appending one token to the cache takes, apart from everything else of a step.

use std::time::Instant;

use longbit::{Session, Supplied};

use crate::WorkerError;

/// Rounds; their median counts.
const ROUNDS: usize = 5;
/// Tokens of a round where the cache has room for them: whole groups of every format that encodes several tokens together, and no more than a
/// rewind gives back exactly.
const TOKENS: usize = 64;

/// Appends the keys and values of `steps`, over and over, to all heads, layer by layer as decoding does, and takes them back:
/// nanoseconds a token, all layers and heads together, with the calling thread alone. None of no steps.
///
/// # Errors
/// Rows that the cache cannot hold.
pub(crate) fn measure(session: &mut Session, steps: &[Supplied]) -> Result<Option<u64>, WorkerError> {
    let (context, shape) = (session.len(), session.cache().shape());
    let tokens = TOKENS.min(session.cache().head(0, 0).capacity() - context);
    if steps.is_empty() || tokens == 0 {
        return Ok(None);
    }
    let d = shape.head_dim;
    let mut rounds = [0u64; ROUNDS];
    for round in &mut rounds {
        let clock = Instant::now();
        for step in steps.iter().cycle().take(tokens) {
            let rows = step.keys.chunks_exact(d).zip(step.values.chunks_exact(d));
            for (i, (keys, values)) in rows.enumerate() {
                session.cache().head_mut(i / shape.kv_heads, i % shape.kv_heads).append(keys, values)?;
            }
        }
        *round = clock.elapsed().as_nanos() as u64 / tokens as u64;
        session.rewind(context);
    }
    rounds.sort_unstable();
    Ok(Some(rounds[ROUNDS / 2]))
}
