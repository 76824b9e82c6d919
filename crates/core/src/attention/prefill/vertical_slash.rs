//! `vslash`: some columns (tokens that all see) and some diagonals (distances at which each sees), estimated.
//!
//! The vertical-slash pattern of MInference (arXiv 2407.02490). A few queries are scored against every key before them; their
//! softmax weights, summed by token and by distance, name the columns and the diagonals that the block attends to exactly. The
//! first 30 tokens and the first 100 distances are always among them, as in the authors' code. Sizes default to 512 and 512
//! (those of The Sparse Frontier, arXiv 2504.17768); the authors search them for each head, up to 1000 and 6096.
//!
//! Differences. The authors estimate once, with the last 64 queries of the whole prompt, for one query head; then all queries see
//! what its end needs. Here each block of 128 tokens decides for itself, so that a prompt can be cut anywhere, with 16 of its own
//! queries (every eighth, and its last), and the heads of a group share the sum of their weights. A diagonal is seen by
//! tiles of 16 tokens, each of which sees all 16 rows that the diagonal crosses; the authors' kernel does so in blocks of 64.
//!
//! Cost. Deciding scores 16 of 128 queries against all keys, an eighth of the multiplications of dense scores, and no values.
//! Attending reads at most `columns + 16 slashes` rows a token; diagonals lie close together as a rule, and share rows.

use std::ops::Range;

use super::{Decision, Pattern, PatternEntry, Scorer, TILE, push};
use crate::attention::{Prompt, top_k};
use crate::kv::KvHead;

pub(super) const PATTERN: PatternEntry = PatternEntry {
    name: "vslash",
    summary: "columns and diagonals, estimated for blocks of 128 (vertical-slash of MInference, arXiv 2407.02490)",
    settings: &[
        ("prefill_columns", 512),
        ("prefill_slashes", 512),
        ("prefill_probes", 16),
        ("prefill_sinks", 30),
        ("prefill_window", 100),
    ],
    make: |numbers| {
        Box::new(VerticalSlash {
            columns: numbers[0].max(numbers[3]),
            slashes: numbers[1].max(numbers[4]),
            stride: BLOCK / numbers[2].clamp(1, BLOCK),
            sinks: numbers[3],
            window: numbers[4],
        })
    },
};

/// Tokens of a block.
const BLOCK: usize = 128;

struct VerticalSlash {
    columns: usize,
    slashes: usize,
    /// One query in so many is estimated with.
    stride: usize,
    sinks: usize,
    window: usize,
}

impl Pattern for VerticalSlash {
    fn block(&self) -> Option<usize> {
        Some(BLOCK)
    }

    fn decide(&self, queries: Prompt<'_>, kv: &KvHead, scorer: &mut Scorer, out: &mut Decision) {
        let width = queries.group * queries.head_dim;
        let (kernels, tokens) = (kv.kernels(), queries.rows.len() / width);
        let end = queries.first + tokens;
        let mut columns = vec![0.0f32; kv.row_of(end)];
        let mut slashes = vec![0.0f32; end];
        for (j, query) in queries.rows.chunks_exact(width).enumerate() {
            let token = queries.first + j;
            let probed = (token + 1).is_multiple_of(self.stride) || j + 1 == tokens;
            let rows = kv.row_of(token + 1);
            if !probed || rows == 0 {
                continue;
            }
            for logits in scorer.logits(query, kv, rows).chunks_exact_mut(rows) {
                let max = kernels.max(logits);
                let sum = kernels.exp_sum(logits, max);
                kernels.scale(logits, 1.0 / sum);
                kernels.add_assign(&mut columns[..rows], logits);
                if kv.dropped() == 0 {
                    let distances = slashes[..=token].iter_mut().rev();
                    distances.zip(&*logits).for_each(|(sum, weight)| *sum += weight);
                } else {
                    let weights = logits.iter().enumerate();
                    weights.for_each(|(row, weight)| slashes[token - kv.position_of(row)] += weight);
                }
            }
        }
        columns[..kv.row_of(self.sinks.min(end))].fill(f32::INFINITY);
        slashes[..self.window.min(end)].fill(f32::INFINITY);
        let mut chosen = Vec::new();
        top_k(&columns, self.columns, &mut chosen);
        for &row in &chosen {
            let position = kv.position_of(row as usize);
            push(&mut out.spans, position..position + 1);
        }
        top_k(&slashes, self.slashes, &mut chosen);
        out.distances.extend(chosen.iter().map(|&distance| distance as usize));
    }

    fn see(&self, tile: Range<usize>, decision: &Decision, out: &mut Vec<Range<usize>>) {
        // The farthest diagonal crosses the earliest rows.
        let slashes = decision.distances.iter().rev();
        let mut slashes =
            slashes.map(|d| tile.start.saturating_sub(*d)..(tile.start + TILE).saturating_sub(*d)).peekable();
        for column in decision.spans.iter().take_while(|column| column.start < tile.end) {
            while let Some(slash) = slashes.next_if(|slash| slash.start <= column.start) {
                push(out, slash);
            }
            push(out, column.clone());
        }
        slashes.for_each(|slash| push(out, slash));
    }
}
