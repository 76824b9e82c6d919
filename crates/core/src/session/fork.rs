//! Two sequences from one.

use std::sync::Arc;

use super::Session;
use crate::attention::{Attention, MethodSpec};
use crate::error::Result;
use crate::kv::KvCache;

impl Session {
    /// Another session after the same tokens, with the same model, team and method. Both go on as if each were alone, bit
    /// for bit; they share the pages of what they have in common, and dropping either leaves the other as it is (see
    /// [`crate::kv::KvCache::fork`]). The state of the attention method is built anew from the cache, or copied if it is
    /// more than the cache shows; a profile is not taken along, nor what the last step captured.
    ///
    /// # Errors
    /// When memory cannot be had.
    ///
    /// ```
    /// # use longbit::{HeadFormat, Model, Session, SessionOptions, preset};
    /// # let team = std::sync::Arc::new(longbit_sys::Team::new(1, false)?);
    /// # let model = Model::synthetic(preset("tiny")?, HeadFormat::Bf16, 1, &team)?;
    /// # let options = SessionOptions { capacity: 64, ..Default::default() };
    /// let mut session = Session::new(model.into(), team, options)?;
    /// session.prefill(&[1, 2, 3])?;
    /// let mut other = session.fork()?;
    /// assert_eq!(session.decode(4)?, other.decode(4)?);
    /// assert_ne!(session.decode(5)?, other.decode(6)?);
    /// # Ok::<(), longbit::Error>(())
    /// ```
    pub fn fork(&self) -> Result<Session> {
        let cache = self.cache.fork()?;
        let attention = self.attention.fork(&cache, &self.rope, &self.team)?;
        let mut session = self.beside(cache, attention)?;
        (session.prompting, session.rows_gone) = (self.prompting, self.rows_gone);
        session.known.clone_from(&self.known);
        Ok(session)
    }

    /// As [`Session::fork`], to go on with another method. For a method that evicts, the last queries of the prompt are
    /// computed again as far as the tokens are [known](Session::known_tokens) and no others follow them; else give them with
    /// [`Session::supply_prompt`], without which nothing but the order of the rows decides what is kept.
    ///
    /// # Errors
    /// As [`Session::fork`]; also a method that cannot serve the model or the number format of the cache.
    pub fn fork_with(&self, method: MethodSpec) -> Result<Session> {
        let cache = self.cache.fork()?;
        let attention = Attention::new(method, &cache, &self.rope, &self.team)?;
        let mut session = self.beside(cache, attention)?;
        session.rows_gone = self.rows_gone;
        if self.known.len() < self.len() {
            return Ok(session);
        }
        let wanted = session.prompt_queries().min(self.len());
        if wanted > 0 {
            let (before, again) = self.known.split_at(self.len() - wanted);
            session.rewind(before.len());
            // The rows are to be those that are there, which dense attention gave.
            let pattern = session.attention.swap_prefill(None);
            session.prefill(again)?;
            session.attention.swap_prefill(pattern);
        }
        session.known.clone_from(&self.known);
        Ok(session)
    }

    fn beside(&self, cache: KvCache, attention: Attention) -> Result<Session> {
        let (model, team, rope) = (Arc::clone(&self.model), Arc::clone(&self.team), Arc::clone(&self.rope));
        let mut session = Self::with_cache(model, team, rope, cache, attention);
        if self.exact_top > 1 {
            session.set_exact_top(self.exact_top);
        }
        Ok(session)
    }
}
