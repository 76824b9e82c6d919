//! `blocks`: blocks of 64 tokens whose mean key suits the mean query of a block.
//!
//! The block-sparse pattern of MInference (arXiv 2407.02490): queries and keys are averaged over blocks of 64, and a block of
//! queries attends exactly to the 100 blocks with the largest products, here always with its own among them.
//!
//! Differences. The heads of a group share what they see: each head's products become a softmax over the blocks, and the sum
//! of those ranks them. The mean query is scored against every key and the logits are averaged, which is the product with
//! the mean key (but for rounding) in any number format and needs no summary beside the cache: nothing grows, is rewound
//! or forked. A block that is not full is averaged over the tokens it has.
//!
//! Cost. Deciding scores one query of 64 against all keys, a sixty-fourth of dense scores, and no values. Attending reads at most
//! 6,400 rows a token with the default, which is everything up to a prompt of 6,400 tokens.

use std::ops::Range;

use super::{Decision, Pattern, PatternEntry, Scorer, push};
use crate::attention::{Prompt, top_k};
use crate::kv::KvHead;

pub(super) const PATTERN: PatternEntry = PatternEntry {
    name: "blocks",
    summary: "blocks of 64 by their mean key and the mean query of 64 (block-sparse of MInference, arXiv 2407.02490)",
    settings: &[("prefill_blocks", 100)],
    make: |numbers| Box::new(BlockSparse { blocks: numbers[0] }),
};

/// Tokens of a block.
const BLOCK: usize = 64;

struct BlockSparse {
    blocks: usize,
}

impl Pattern for BlockSparse {
    fn block(&self) -> Option<usize> {
        Some(BLOCK)
    }

    fn decide(&self, queries: Prompt<'_>, kv: &KvHead, scorer: &mut Scorer, out: &mut Decision) {
        let width = queries.group * queries.head_dim;
        let (kernels, own) = (kv.kernels(), queries.first / BLOCK);
        let mut mean = vec![0.0f32; width];
        queries.rows.chunks_exact(width).for_each(|query| kernels.add_assign(&mut mean, query));
        kernels.scale(&mut mean, 1.0 / (queries.rows.len() / width).max(1) as f32);
        let bounds: Vec<usize> = (0..=own).map(|block| kv.row_of(block * BLOCK)).collect();
        let rows = bounds[own];
        let mut sums = vec![0.0f32; own];
        if rows > 0 {
            let mut means = Vec::with_capacity(own);
            for logits in scorer.logits(&mean, kv, rows).chunks_exact(rows) {
                means.clear();
                means.extend(bounds.windows(2).map(|block| match &logits[block[0]..block[1]] {
                    // Evicted: behind all others.
                    [] => f32::MIN / 2.0,
                    rows => rows.iter().sum::<f32>() / rows.len() as f32,
                }));
                let max = kernels.max(&means);
                let sum = kernels.exp_sum(&mut means, max);
                kernels.scale(&mut means, 1.0 / sum);
                kernels.add_assign(&mut sums, &means);
            }
        }
        let mut chosen = Vec::new();
        top_k(&sums, self.blocks - 1, &mut chosen);
        for &block in &chosen {
            push(&mut out.spans, block as usize * BLOCK..(block as usize + 1) * BLOCK);
        }
        push(&mut out.spans, own * BLOCK..(own + 1) * BLOCK);
    }

    fn see(&self, _: Range<usize>, decision: &Decision, out: &mut Vec<Range<usize>>) {
        out.extend_from_slice(&decision.spans);
    }
}
