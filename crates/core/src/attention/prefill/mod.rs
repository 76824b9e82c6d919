//! Attention patterns of prompts: which cached tokens the queries of a prefill see. They combine with every method, for that
//! serves decode steps alone.
//!
//! A [`Pattern`] answers for one (layer, KV head) and [`TILE`] neighbouring tokens with spans of positions; what lies after a
//! token is never seen, and a token always sees itself. The query heads of a group share what they see: a pattern that
//! looks at queries adds up the weights of all of them. Exact attention over the spans is that of `attend`, cut at
//! the same places, so a pattern that sees everything gives the bits of dense attention.
//!
//! A dynamic pattern decides once for a block of tokens, at multiples of [`Pattern::block`] from the first position, and from
//! the queries of that block alone. `Session` cuts its passes where blocks end, so neither the chunk nor the number of threads
//! changes a decision. Where one call of `prefill` ends within a block and another goes on there, each decides for its own
//! tokens of the block, from them: calls are part of the result, chunks are not. A decision looks at all queries of its block, so
//! it knows a little of the tokens that follow one (as the authors' do); their keys and values stay unseen.
//!
//! Nothing is kept between blocks: a pattern has no state that forks or rewinds could spoil. Where rows were evicted, spans
//! are positions all the same, and what is left of them is seen.

mod block_sparse;
#[cfg(test)]
mod tests;
mod vertical_slash;
mod window;

use std::ops::Range;

use super::{Kind, ParamSpec, Params, Prompt};
use crate::kv::{KvHead, KvScratch};

/// Tokens that share the spans of a pattern; tiles begin at multiples of it.
pub const TILE: usize = 16;

/// What a pattern decided for a block of tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// Positions that all tokens of the block see: ascending, disjoint.
    pub spans: Vec<Range<usize>>,
    /// Distances: a token sees what lies so far before it. Ascending.
    pub distances: Vec<usize>,
}

impl Decision {
    /// Forgets everything but the memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.distances.clear();
    }
}

/// Which cached tokens the queries of a prompt see.
pub trait Pattern: Send + Sync {
    /// Tokens of a block that is decided on together, a multiple of [`TILE`]; none for a mask of positions alone.
    fn block(&self) -> Option<usize> {
        None
    }

    /// Decides for the tokens of one block, whose rows are cached; `out` arrives cleared.
    fn decide(&self, queries: Prompt<'_>, kv: &KvHead, scorer: &mut Scorer, out: &mut Decision) {
        let _ = (queries, kv, scorer, out);
    }

    /// The positions that tokens of `tile` see, ascending and disjoint; `out` arrives cleared. Those after a token may be
    /// among them and are not seen.
    fn see(&self, tile: Range<usize>, decision: &Decision, out: &mut Vec<Range<usize>>);

    /// Positions that `token` does not see, though they are among those of its tile.
    fn hidden(&self, token: usize) -> Range<usize> {
        let _ = token;
        0..0
    }
}

/// A pattern as the table lists it.
pub struct PatternEntry {
    /// Name, the value of the setting `prefill`.
    pub name: &'static str,
    /// One line, with the source.
    pub summary: &'static str,
    /// Settings that it takes, with what they are where they are `auto`.
    pub settings: &'static [(&'static str, usize)],
    /// Makes it of those, in their order.
    make: fn(&[usize]) -> Box<dyn Pattern>,
}

/// Every pattern but dense.
pub static PATTERNS: &[PatternEntry] =
    &[window::WINDOW, window::ASHAPE, vertical_slash::PATTERN, block_sparse::PATTERN];

/// The word for no pattern.
pub const DENSE: &str = "dense";

const fn auto(name: &'static str, summary: &'static str, range: [u64; 2]) -> ParamSpec {
    ParamSpec::int(name, summary, range, "auto")
}

/// Settings of the prompt's attention, which every method takes. What is `auto` is as the pattern's authors have it.
pub static PREFILL_SETTINGS: &[ParamSpec] = &[
    ParamSpec {
        name: "prefill",
        summary: "what tokens of a prompt see: everything, a window, sinks and a window in blocks (A-shape), estimated columns \
                  and diagonals, estimated blocks",
        kind: Kind::Choice(&[DENSE, "window", "ashape", "vslash", "blocks"]),
        default: DENSE,
    },
    ParamSpec {
        name: "prefill_dense_layers",
        summary: "layers in which tokens of a prompt see everything",
        kind: Kind::Layers,
        default: "none",
    },
    auto("prefill_sinks", "first tokens that are always seen", [0, 1 << 20]),
    auto("prefill_window", "most recent tokens that are always seen, its own included", [1, 1 << 24]),
    auto("prefill_columns", "vslash: tokens that a block of 128 sees, sinks included", [0, 1 << 24]),
    auto(
        "prefill_slashes",
        "vslash: distances at which a block of 128 sees, the window included",
        [1, 1 << 24],
    ),
    auto("prefill_probes", "vslash: queries of a block of 128 that are estimated with", [1, 128]),
    auto("prefill_blocks", "blocks: blocks of 64 that a block of 64 sees, itself included", [1, 1 << 18]),
];

/// Numbers of the settings that a pattern takes; the others that are not `auto` are refused.
fn resolve(params: &Params) -> Result<Option<(&'static PatternEntry, Vec<usize>)>, String> {
    let entry = PATTERNS.iter().find(|p| p.name == params.word("prefill"));
    let numbers = PREFILL_SETTINGS.iter().filter(|s| matches!(s.kind, Kind::Int { .. }));
    for setting in numbers.filter(|s| params.given(s.name)) {
        let name = setting.name;
        if entry.is_some_and(|e| e.settings.iter().any(|(own, _)| *own == name)) {
            continue;
        }
        let takers = PATTERNS.iter().filter(|p| p.settings.iter().any(|(own, _)| *own == name));
        let takers: Vec<_> = takers.map(|p| format!("prefill={}", p.name)).collect();
        return Err(format!(
            "{name} has no effect with prefill={}: leave it out, or choose {}",
            params.word("prefill"),
            takers.join(" or ")
        ));
    }
    let Some(entry) = entry else {
        return match params.layers("prefill_dense_layers").is_none() {
            true => Ok(None),
            false => Err("prefill_dense_layers has no effect with prefill=dense, where all layers are: leave it out, or \
                          choose a pattern, e.g. prefill=window"
                .into()),
        };
    };
    Ok(Some((entry, entry.settings.iter().map(|&(name, auto)| params.int_or(name, auto)).collect())))
}

/// Says what contradicts what.
pub(super) fn check(params: &Params) -> Result<(), String> {
    resolve(params).map(|_| ())
}

/// The pattern that was chosen; none where prompts are dense.
pub(super) fn make(params: &Params) -> Option<Box<dyn Pattern>> {
    resolve(params).ok().flatten().map(|(entry, numbers)| (entry.make)(&numbers))
}

/// Scores of cached rows, for patterns that look at them.
#[derive(Default)]
pub struct Scorer {
    kv: KvScratch,
    run: Vec<f32>,
    logits: Vec<f32>,
}

impl Scorer {
    /// Logits of `query`, `[group][head_dim]`, for the first `rows` rows: `[group][rows]`.
    pub fn logits(&mut self, query: &[f32], kv: &KvHead, rows: usize) -> &mut [f32] {
        let group = query.len() / kv.head_dim();
        self.logits.resize(group * rows, 0.0);
        kv.prepare(query, &mut self.kv);
        for run in kv.runs(0..rows) {
            self.run.resize(group * run.len(), 0.0);
            kv.scores(query, &run, &[], &mut self.kv, &mut self.run);
            for (all, part) in self.logits.chunks_exact_mut(rows).zip(self.run.chunks_exact(run.len())) {
                all[run.clone()].copy_from_slice(part);
            }
        }
        &mut self.logits[..group * rows]
    }
}

/// Adds a span that begins no earlier than those before it; what touches the last one becomes part of it.
fn push(out: &mut Vec<Range<usize>>, span: Range<usize>) {
    match out.last_mut() {
        _ if span.is_empty() => {}
        Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
        _ => out.push(span),
    }
}

/// What tokens of a tile see.
#[derive(Default)]
pub(crate) struct Seen {
    /// Positions.
    spans: Vec<Range<usize>>,
    /// Rows; spans between which all rows were evicted are one.
    rows: Vec<Range<usize>>,
}

impl Seen {
    /// The rows that `tokens` tokens from `first` on, to which `decision` applies, see by `pattern`: they lie in one tile. Dense
    /// attention has no tiles.
    pub(crate) fn of(
        &mut self,
        pattern: Option<&dyn Pattern>,
        first: usize,
        tokens: usize,
        decision: &Decision,
        kv: &KvHead,
    ) {
        self.spans.clear();
        let tile = first / TILE * TILE;
        match pattern {
            Some(pattern) => pattern.see(tile..tile + TILE, decision, &mut self.spans),
            None => self.spans.push(0..first + tokens),
        }
        let ordered = self.spans.windows(2).all(|pair| pair[0].end <= pair[1].start);
        debug_assert!(ordered, "{:?}", self.spans);
        self.rows.clear();
        let rows = self.spans.iter().map(|span| kv.row_of(span.start)..kv.row_of(span.end));
        rows.for_each(|rows| push(&mut self.rows, rows));
    }

    /// Spans of rows that any of the tokens sees, the last of which is at `last`.
    pub(crate) fn rows(&self, last: usize, kv: &KvHead) -> impl Iterator<Item = Range<usize>> {
        let end = kv.row_of(last + 1);
        self.rows.iter().map(move |span| span.start..span.end.min(end)).filter(|span| !span.is_empty())
    }

    /// Appends the rows that `token` sees to `out`.
    pub(crate) fn by(
        &self,
        pattern: Option<&dyn Pattern>,
        token: usize,
        kv: &KvHead,
        out: &mut Vec<Range<usize>>,
    ) {
        let hidden = pattern.map_or(0..0, |pattern| pattern.hidden(token));
        let hidden = match hidden.is_empty() {
            true => 0..0,
            false => kv.row_of(hidden.start)..kv.row_of(hidden.end),
        };
        for span in self.rows(token, kv) {
            let parts = match hidden.is_empty() {
                true => [span, 0..0],
                false => [span.start..span.end.min(hidden.start), span.start.max(hidden.end)..span.end],
            };
            out.extend(parts.into_iter().filter(|part| part.start < part.end));
        }
    }
}
