//! Sessions that begin with tokens which another session has computed.

use std::sync::Arc;

use longbit_sys::Team;

use super::{Session, SessionOptions};
use crate::attention::Attention;
use crate::error::{Error, Result};
use crate::kv::{CacheShape, KvDtype, PagePool, PrefixMemory, PrefixTree};
use crate::model::{Model, RopeTable};

/// The keys and values of prefixes that sessions of one model may begin with: a prompt that many share, or a conversation
/// that goes on. What is reused is whole pages of [`crate::kv::PAGE_TOKENS`] tokens; it is shared, never copied, and what
/// was not used for longest goes first when there is more than the budget.
///
/// A session that begins so goes on with the bits of one that computed those tokens itself. One whose prompts are not dense begins
/// with nothing, and has nothing to give. That holds for every method,
/// for only rows that exact attention gives are kept ([`Session::known_tokens`]), and none of a session that has evicted. With a KV dtype that keeps the newest
/// tokens exactly, a session can go on only from the last page boundary that another one had passed when it was inserted (so
/// insert one that ends where a shared prompt does), and rows depend on how the tokens were cut into passes: they are those
/// of the session that was inserted.
///
/// ```
/// use longbit::{HeadFormat, Model, PrefixCache, SessionOptions, preset};
/// let team = std::sync::Arc::new(longbit_sys::Team::new(1, false)?);
/// let model = std::sync::Arc::new(Model::synthetic(preset("tiny")?, HeadFormat::Bf16, 1, &team)?);
/// let options = SessionOptions { capacity: 1024, ..Default::default() };
/// let mut prefixes = PrefixCache::new(model.clone(), options.kv, 1 << 30)?;
///
/// let system: Vec<u32> = (0..300).collect();
/// let ask = |question: &[u32]| [&system, question].concat();
/// let first = ask(&[5, 6, 7]);
/// let mut session = prefixes.session(team.clone(), options.clone(), &first)?;
/// assert_eq!(session.len(), 0);
/// session.prefill(&first)?;
/// prefixes.insert(&session)?;
/// drop(session);
///
/// let second = ask(&[8, 9]);
/// let mut session = prefixes.session(team, options, &second)?;
/// assert_eq!(session.len(), 256);
/// let logits = session.prefill(&second[session.len()..].to_vec())?;
/// assert_eq!(logits.len(), 512);
/// # Ok::<(), longbit::Error>(())
/// ```
pub struct PrefixCache {
    model: Arc<Model>,
    tree: PrefixTree,
    /// Of the last session: most have the same capacity.
    rope: Option<Arc<RopeTable>>,
}

impl PrefixCache {
    /// An empty cache of prefixes for sessions of `model` with the KV dtype `kv`, which holds about `budget` bytes at most:
    /// more only as long as living sessions began with all of it.
    ///
    /// # Errors
    /// When `kv` cannot store the rows of this model.
    pub fn new(model: Arc<Model>, kv: KvDtype, budget: u64) -> Result<Self> {
        let tree = PrefixTree::new(CacheShape::new(&model.config, 0), kv, model.kernels, budget)?;
        Ok(PrefixCache { model, tree, rope: None })
    }

    /// A session that begins with the longest known prefix of `tokens`: [`Session::len`] says how many of them it holds, at
    /// least one less than all, and [`Session::prefill`] takes the others. While it lives, or a fork of it, that prefix is
    /// not evicted. Its pages are counted in [`PrefixCache::pool`].
    ///
    /// # Errors
    /// As [`Session::new`]; also another KV dtype than this cache's, or more tokens than the capacity.
    pub fn session(&mut self, team: Arc<Team>, options: SessionOptions, tokens: &[u32]) -> Result<Session> {
        let SessionOptions { capacity, kv, method } = options;
        if capacity == 0 {
            return Err(Error::Invalid("a session needs a capacity of at least one token".into()));
        }
        if kv != self.tree.dtype() {
            let held = self.tree.dtype();
            return Err(Error::Invalid(format!("a session of {kv} cannot begin with prefixes of {held}")));
        }
        if tokens.len() > capacity {
            return Err(Error::CacheFull { capacity, wanted: tokens.len() });
        }
        let len = capacity.next_multiple_of(crate::kv::PAGE_TOKENS);
        let rope = match &self.rope {
            Some(rope) if rope.len() == len => Arc::clone(rope),
            _ => Session::rope_for(&self.model, capacity, &team)?,
        };
        self.rope = Some(Arc::clone(&rope));
        // The logits after the last token are not kept: it is computed again. Rows of dense attention are not those that a
        // prompt with a pattern has.
        let most = if method.is_prefill_dense() { tokens.len().saturating_sub(1) } else { 0 };
        let cache = self.tree.cache(&tokens[..most], capacity)?;
        let known = tokens[..cache.len()].to_vec();
        let attention = Attention::new(method, &cache, &rope, &team)?;
        let mut session = Session::with_cache(Arc::clone(&self.model), team, rope, cache, attention);
        session.known = known;
        Ok(session)
    }

    /// How many of `tokens` a session would begin with.
    pub fn longest(&self, tokens: &[u32]) -> usize {
        self.tree.longest(&tokens[..tokens.len().saturating_sub(1)])
    }

    /// Keeps the pages of the [known tokens](Session::known_tokens) of `session`, then evicts what is too much. Returns how
    /// many of them can be reused now.
    ///
    /// # Errors
    /// A session of another model or KV dtype. Nothing is changed then.
    pub fn insert(&mut self, session: &Session) -> Result<usize> {
        if !Arc::ptr_eq(&self.model, &session.model) {
            return Err(Error::Invalid(
                "a session of another model has no place among these prefixes".into(),
            ));
        }
        self.tree.insert(&session.known, &session.cache)
    }

    /// Changes the budget, and evicts what is too much.
    pub fn set_budget(&mut self, bytes: u64) {
        self.tree.set_budget(bytes);
    }

    /// Evicts what was not used for longest until no more than `bytes` are held, or living sessions began with all of it.
    /// Returns how many bytes are held.
    pub fn trim(&mut self, bytes: u64) -> u64 {
        self.tree.trim(bytes)
    }

    /// What it holds.
    pub fn memory(&self) -> PrefixMemory {
        self.tree.memory()
    }

    /// Counts the pages that this cache holds, and those of the sessions that it began, each once.
    pub fn pool(&self) -> &PagePool {
        self.tree.pool()
    }
}
