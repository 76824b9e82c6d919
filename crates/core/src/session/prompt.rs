//! Prompts: running them through the model, and what a method is told of them.

use super::{Kind, Session, Want};
use crate::attention::{Occasion, Prompt, Retained};
use crate::error::{Error, Result};

impl Session {
    /// Runs `tokens` through the model in chunks of [`Session::DEFAULT_CHUNK`]; returns the logits after the last one.
    ///
    /// # Errors
    /// An unknown token, no token, or a full cache; nothing is changed then. A key or value that the cache cannot hold; the
    /// chunks before it stay.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.check(tokens)?;
        for chunk in tokens.chunks(Self::DEFAULT_CHUNK) {
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

    /// Runs `tokens` through the model `chunk` at a time and hands the logits of each chunk, `[chunk][vocab]`, to `each`.
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
        for piece in tokens.chunks(chunk) {
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
        let prompt = Prompt { rows: &rows, group, head_dim: d, first: self.len() - n };
        self.attention.head(layer, kv_head).prompted(prompt);
        Ok(())
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
