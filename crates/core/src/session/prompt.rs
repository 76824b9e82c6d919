//! Prompts: running them through the model, and what a method is told of them.

use super::forward::{Tile, TileReads};
use super::scratch::Private;
use super::{Kind, Session, Want};
use crate::attention::prefill::{Decision, Pattern, TILE};
use crate::attention::{Occasion, Prompt, Retained};
use crate::error::{Error, Result};

/// What attention gives for the last tokens of a prompt; see [`Session::prompt_attention`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptAttention {
    /// `[tokens][group][head_dim]`.
    pub output: Vec<f32>,
    /// Rows that the tokens see, added up over them.
    pub seen: u64,
    /// Rows that there are for each of them, its own included, added up.
    pub causal: u64,
}

impl Session {
    /// Runs `tokens` through the model in chunks of [`Session::DEFAULT_CHUNK`]; returns the logits after the last one. They attend
    /// to everything before them, or to what the setting `prefill` of the method lets them see: then two calls are not one
    /// call of both, bit for bit, unless the first ends where a block of the [pattern](crate::attention::prefill) does.
    ///
    /// # Errors
    /// An unknown token, no token, or a full cache; nothing is changed then. A key or value that the cache cannot hold; the
    /// chunks before it stay.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.check(tokens)?;
        for chunk in self.cut(tokens, Self::DEFAULT_CHUNK) {
            self.pass(chunk, Kind::Prefill(Want::Last))?;
        }
        Ok(self.last_logits())
    }

    /// As [`Session::prefill`], with all tokens in one pass: what serving a batch of them together costs.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn prefill_at_once(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.check(tokens)?;
        self.pass(tokens, Kind::Prefill(Want::Last))?;
        Ok(self.last_logits())
    }

    /// Tokens that prefill takes at a time: enough to reuse a row of weights often, few enough for the caches.
    pub const DEFAULT_CHUNK: usize = 128;

    /// Runs `tokens` through the model `chunk` at a time and hands the logits of each chunk, `[chunk][vocab]`, to `each`. Where a
    /// pattern decides what blocks of tokens see, chunks end with blocks, and are one at the least.
    ///
    /// # Errors
    /// As [`Session::prefill`]; also a chunk of zero, and what `each` returns.
    pub fn each_logits<E: From<Error>>(
        &mut self,
        tokens: &[u32],
        chunk: usize,
        mut each: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        if chunk == 0 {
            return Err(Error::Invalid("the chunk must be at least one token".into()).into());
        }
        self.check(tokens)?;
        for piece in self.cut(tokens, chunk) {
            self.pass(piece, Kind::Prefill(Want::All))?;
            each(self.last_logits())?;
        }
        Ok(())
    }

    /// As [`Session::each_logits`], with all of them returned together, `[tokens][vocab]`.
    ///
    /// # Errors
    /// As [`Session::each_logits`].
    pub fn logits_of(&mut self, tokens: &[u32], chunk: usize) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        self.each_logits(tokens, chunk, |rows| {
            all.extend_from_slice(rows);
            Ok::<(), Error>(())
        })?;
        Ok(all)
    }

    /// Cuts tokens that come next into pieces of about `chunk`, none of which but the last ends within a block that a pattern
    /// decides on together: calls of [`Session::prefill`] for one after another are one call for all, bit for bit.
    pub fn cut<'t>(&self, tokens: &'t [u32], chunk: usize) -> Vec<&'t [u32]> {
        let (block, mut at, mut rest) = (self.attention.prefill_block(), self.len(), tokens);
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let end = at.saturating_add(chunk.max(block)) / block * block;
            let (piece, others) = rest.split_at(rest.len().min(end - at));
            (at, rest) = (end, others);
            pieces.push(piece);
        }
        pieces
    }

    /// How many of the last queries of a prompt the method wants to see: see [`Session::supply_prompt`].
    pub fn prompt_queries(&self) -> usize {
        let config = &self.model.config;
        let heads = (0..config.layers * config.kv_heads).map(|i| (i / config.kv_heads, i % config.kv_heads));
        heads.map(|(layer, head)| self.attention.head(layer, head).prompt_queries()).max().unwrap_or(0)
    }

    /// Tells the method the queries of the last tokens of a prompt that was filled in from outside: `[tokens][group][head_dim]`
    /// of one (layer, KV head), rotated, not scaled. Without this call for a head its rows have no scores.
    /// [`Session::end_prompt`] must follow. Prefill does both by itself.
    ///
    /// # Errors
    /// Rows that are not whole tokens, or more of them than are cached.
    pub fn supply_prompt(&self, layer: usize, kv_head: usize, queries: &[f32]) -> Result<()> {
        let rows = self.supplied_queries(layer, kv_head, queries)?;
        let (group, d) = (self.model.config.group(), self.model.config.head_dim);
        let n = rows.len() / (group * d);
        let prompt = Prompt { rows: &rows, group, head_dim: d, first: self.len() - n };
        self.attention.head(layer, kv_head).prompted(prompt);
        Ok(())
    }

    /// Queries of the last cached tokens as attention takes them.
    fn supplied_queries(&self, layer: usize, kv_head: usize, queries: &[f32]) -> Result<Vec<f32>> {
        let config = &self.model.config;
        let (group, d) = (config.group(), config.head_dim);
        let n = queries.len() / (group * d);
        if !queries.len().is_multiple_of(group * d) || n > self.len() {
            return Err(Error::Invalid(format!(
                "{} numbers are no queries of at most {} tokens of {} numbers each",
                queries.len(),
                self.len(),
                group * d
            )));
        }
        let mut rows = queries.to_vec();
        self.model.kernels.scale(&mut rows, 1.0 / (d as f32).sqrt());
        self.cache.head(layer, kv_head).rotate_queries(&mut rows);
        Ok(rows)
    }

    /// What the attention of a prefill gives at one (layer, KV head) for the last cached tokens, whose `queries` are
    /// `[tokens][group][head_dim]`, rotated, not scaled: with the method's pattern, or with `dense` as if there were none. The
    /// rows are those of the cache, whoever filled it, and nothing changes. A pattern that decides for blocks decides by those of
    /// the queries that lie in each, so the first should begin one.
    ///
    /// # Errors
    /// As [`Session::supply_prompt`].
    pub fn prompt_attention(
        &self,
        layer: usize,
        kv_head: usize,
        queries: &[f32],
        dense: bool,
    ) -> Result<PromptAttention> {
        let rows = self.supplied_queries(layer, kv_head, queries)?;
        let (group, head_dim) = (self.model.config.group(), self.model.config.head_dim);
        let width = group * head_dim;
        let first = self.len() - rows.len() / width;
        let prompt = |tokens: std::ops::Range<usize>| {
            let rows = &rows[(tokens.start - first) * width..(tokens.end - first) * width];
            Prompt { rows, group, head_dim, first: tokens.start }
        };
        let pattern = self.attention.prefill(layer).filter(|_| !dense);
        let block = pattern.and_then(Pattern::block).unwrap_or(TILE);
        let kv = self.cache.head(layer, kv_head);
        let (mut p, mut decision, mut at) = (Private::default(), Decision::default(), first);
        let mut found = PromptAttention { output: vec![0.0; rows.len()], ..PromptAttention::default() };
        while at < self.len() {
            let end = self.len().min(at / block * block + block);
            decision.clear();
            if let Some(pattern) = pattern {
                pattern.decide(prompt(at..end), &kv, &mut p.scorer, &mut decision);
            }
            while at < end {
                let stop = end.min(at / TILE * TILE + TILE);
                let tile = Tile { kv: &kv, pattern, decision: &decision, queries: prompt(at..stop) };
                let out = &mut found.output[(at - first) * width..(stop - first) * width];
                let TileReads { seen, causal, .. } = tile.attend(&mut p, out);
                found.seen += seen;
                found.causal += causal;
                at = stop;
            }
        }
        Ok(found)
    }

    /// Tells a method that evicts that the prompt is over: rows are scored, and the cache shrinks to what the method keeps.
    /// The next decode step does so by itself; this is for those who want to know when. No other method does anything.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn end_prompt(&mut self) -> Result<()> {
        if !self.attention.spec().evicts() {
            return Ok(());
        }
        let (heads, cache, attention) = (self.model.config.kv_heads, &self.cache, &self.attention);
        let count = self.model.config.layers * heads;
        self.team.run(|worker| {
            for i in worker.range(count) {
                let (layer, kv_head) = (i / heads, i % heads);
                attention.head(layer, kv_head).weigh(&cache.head(layer, kv_head));
            }
        });
        let failure = std::sync::Mutex::new(None);
        self.team.run(|worker| {
            let mut compaction = Retained::default();
            for i in worker.range(count) {
                let (layer, kv_head) = (i / heads, i % heads);
                let mut kv = cache.head_mut(layer, kv_head);
                let mut state = attention.head(layer, kv_head);
                compaction.clear();
                if state.compact(&kv, Occasion::PromptOver, &mut compaction)
                    && let Err(error) = compaction.apply(&mut kv)
                {
                    failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
                }
            }
        });
        self.prompting = false;
        self.rows_gone = true;
        self.known.clear();
        failure.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    }
}
