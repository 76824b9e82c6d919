//! `window` and `ashape`: sinks and a window.
//!
//! `window` is the mask of SWAA (arXiv 2512.10411): query `i` sees key `j <= i` if `i - j < window` or `j < sinks`, token by token.
//! With the method `dense` it is the paper's full-attention decode (`dense:prefill=window,…`); with the method `window` and the
//! same numbers it is sliding-window attention throughout; `prefill_dense_layers`, and for decode steps `dense_layers`,
//! interleave layers of full attention. The paper's recipes have windows of 2048, 4000 or 8000 and 10, 100 or 1000 sinks.
//! Its remaining ingredients (chain of thought, fine-tuning under the mask) are of the model, not of the engine.
//!
//! `ashape` is the A-shape of MInference (arXiv 2407.02490): the same mask in blocks of 64 tokens, as its kernel runs it. A block
//! of queries sees the blocks that hold sinks, and whole blocks before its own that reach over the window at the least. The authors'
//! search gives some heads this shape and others another; here it is one pattern for all heads of a layer.
//!
//! Neither looks at queries or keys, so neither costs anything to decide. A token attends to `sinks + window` rows.

use std::ops::Range;

use super::{Decision, Pattern, PatternEntry, push};

pub(super) const WINDOW: PatternEntry = PatternEntry {
    name: "window",
    summary: "the first tokens and the most recent, token by token (SWAA, arXiv 2512.10411)",
    settings: &[("prefill_sinks", 10), ("prefill_window", 2048)],
    make: |numbers| Box::new(Window { sinks: numbers[0], window: numbers[1] }),
};

pub(super) const ASHAPE: PatternEntry = PatternEntry {
    name: "ashape",
    summary: "the first tokens and the most recent, in blocks of 64 (A-shape of MInference, arXiv 2407.02490)",
    settings: &[("prefill_sinks", 128), ("prefill_window", 1024)],
    make: |numbers| Box::new(AShape { sinks: numbers[0], window: numbers[1] }),
};

struct Window {
    sinks: usize,
    window: usize,
}

impl Pattern for Window {
    fn see(&self, tile: Range<usize>, _: &Decision, out: &mut Vec<Range<usize>>) {
        push(out, 0..self.sinks);
        push(out, (tile.start + 1).saturating_sub(self.window)..tile.end);
    }

    fn hidden(&self, token: usize) -> Range<usize> {
        self.sinks..(token + 1).saturating_sub(self.window)
    }
}

/// Tokens of a block.
const BLOCK: usize = 64;

struct AShape {
    sinks: usize,
    window: usize,
}

impl Pattern for AShape {
    fn see(&self, tile: Range<usize>, _: &Decision, out: &mut Vec<Range<usize>>) {
        let own = tile.start / BLOCK * BLOCK;
        push(out, 0..self.sinks.next_multiple_of(BLOCK));
        push(out, own.saturating_sub(self.window.next_multiple_of(BLOCK))..tile.end);
    }
}
