//! Two sequences from one.

use std::sync::Arc;

use super::Session;
use crate::error::Result;

impl Session {
    /// Another session after the same tokens, with the same model, team and method. Both go on as if each were alone, bit
    /// for bit; they share the pages of what they have in common, and dropping either leaves the other as it is (see
    /// [`crate::kv::KvCache::fork`]). The state of the attention method is built anew from the cache; a profile is not
    /// taken along, nor what the last step captured.
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
        let (model, team, rope) = (Arc::clone(&self.model), Arc::clone(&self.team), Arc::clone(&self.rope));
        let mut session = Self::with_cache(model, team, rope, cache, self.attention.spec().clone())?;
        if self.exact_top > 1 {
            session.set_exact_top(self.exact_top);
        }
        session.known.clone_from(&self.known);
        Ok(session)
    }
}
