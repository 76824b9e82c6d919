//! A session: a model, a KV cache and a thread team that turn tokens into logits.
//!
//! Every call enters the team once; inside, threads own fixed ranges of matrix rows, tokens and KV heads and meet at
//! barriers (`forward`). The result has the same bits for any number of threads, any prefill chunk and any
//! instruction set.

mod capture;
#[cfg(test)]
mod evict_tests;
mod fork;
mod forward;
#[cfg(test)]
mod method_tests;
mod prefix;
mod profile;
mod prompt;
mod scratch;
mod stage;
#[cfg(test)]
mod traffic_tests;
#[cfg(test)]
mod two_stage_tests;

use std::sync::Arc;

use longbit_sys::{Shared, Team};

use crate::attention::{Attention, MethodSpec, method};
use crate::error::{Error, Result};
use crate::kv::{CacheShape, KvCache, KvDtype, kv_dtype};
use crate::model::{Model, ModelConfig, RopeTable};
use capture::Capture;
pub use capture::Captured;
use forward::{Pass, Tracing, Want};
pub use prefix::PrefixCache;
pub use profile::{Op, OpTotal, Profile};
pub use prompt::PromptAttention;
use scratch::Scratch;

/// Bytes and rows that the attention of the last decode step read, summed over layers and KV heads, and what exact zeros
/// spared it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of cached keys and values.
    pub kv_bytes: u64,
    /// Bytes of indexes and summaries.
    pub index_bytes: u64,
    /// Cached tokens attended exactly.
    pub rows: u64,
    /// Bytes of feed-forward weights that were not read, for they meet zeros; see [`crate::Compaction::skip_zeros`].
    pub skipped_weight_bytes: u64,
}

fn lower_bounds(top: usize, team: &Team) -> Shared<f32> {
    let threads = team.threads();
    Shared::even(threads, top, threads, 0.0).named("lower bounds of logits")
}

/// Queries, keys and values of one decode step from outside the model: what its projections would have produced, after
/// rotation. Everything else of the step is computed as usual.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Supplied {
    /// `[layers][kv_heads][group][head_dim]`, rotated, not scaled.
    pub queries: Vec<f32>,
    /// `[layers][kv_heads][head_dim]`, rotated.
    pub keys: Vec<f32>,
    /// `[layers][kv_heads][head_dim]`.
    pub values: Vec<f32>,
}

/// What a new session is made of.
#[derive(Clone)]
pub struct SessionOptions {
    /// Tokens that the cache can hold.
    pub capacity: usize,
    /// Number format of cached keys and values.
    pub kv: KvDtype,
    /// Attention method of decode steps. Its setting `prefill` says what tokens of a prompt see: all before them, by default.
    pub method: MethodSpec,
}

impl Default for SessionOptions {
    /// 4096 tokens, bf16, dense.
    fn default() -> Self {
        fn known<T>(found: Result<T>) -> T {
            found.unwrap_or_else(|_| unreachable!("`bf16` and `dense` are in their tables"))
        }
        SessionOptions { capacity: 4096, kv: known(kv_dtype("bf16")), method: known(method("dense")) }
    }
}

/// What a pass is for.
enum Kind<'a> {
    /// Causal, any number of tokens.
    Prefill(Want),
    /// One token, served by the method.
    Decode { supplied: Option<&'a Supplied>, capture: bool },
}

/// A sequence being decoded.
pub struct Session {
    model: Arc<Model>,
    team: Arc<Team>,
    rope: Arc<RopeTable>,
    cache: KvCache,
    attention: Attention,
    decode: Scratch,
    prefill: Option<Scratch>,
    /// Logits of a pass of several tokens; those of one stay where the threads wrote them.
    logits: Vec<f32>,
    /// Whether the last pass took a single token.
    single: bool,
    traffic: Traffic,
    /// How many of the likeliest tokens a two-stage head finds exactly.
    exact_top: usize,
    /// See [`Pass`].
    lower_bounds: Shared<f32>,
    /// Rows of a two-stage head that the last pass scored with the bf16 table.
    rescored: u64,
    /// Passes, tokens and nanoseconds since a profile was started.
    profiled: Option<Profile>,
    /// See [`Session::known_tokens`].
    known: Vec<u32>,
    /// A method that evicts has yet to be told that the prompt is over.
    prompting: bool,
    /// Rows of the cache may have been evicted.
    rows_gone: bool,
}

impl Session {
    /// An empty session.
    ///
    /// # Errors
    /// When memory for the cache cannot be had, the capacity is zero, or the method cannot serve the model or the format.
    pub fn new(model: Arc<Model>, team: Arc<Team>, options: SessionOptions) -> Result<Self> {
        if options.capacity == 0 {
            return Err(Error::Invalid("a session needs a capacity of at least one token".into()));
        }
        let shape = CacheShape::new(&model.config, options.capacity);
        let cache = KvCache::new(shape, options.kv, model.kernels)?;
        let rope = Self::rope_for(&model, options.capacity, &team)?;
        let attention = Attention::new(options.method, &cache, &rope, &team)?;
        Ok(Self::with_cache(model, team, rope, cache, attention))
    }

    fn rope_for(model: &Model, capacity: usize, team: &Team) -> Result<Arc<RopeTable>> {
        let len = capacity.next_multiple_of(crate::kv::PAGE_TOKENS);
        Ok(Arc::new(RopeTable::new(model.config.rope_theta, model.config.head_dim, len, team)?))
    }

    /// A session that goes on from what `cache` holds.
    fn with_cache(
        model: Arc<Model>,
        team: Arc<Team>,
        rope: Arc<RopeTable>,
        cache: KvCache,
        attention: Attention,
    ) -> Self {
        let decode = Scratch::new(&model.config, team.threads(), 1, rope.len());
        let lower_bounds = lower_bounds(1, &team);
        Session {
            model,
            team,
            rope,
            cache,
            attention,
            decode,
            prefill: None,
            logits: Vec::new(),
            single: false,
            traffic: Traffic::default(),
            exact_top: 1,
            lower_bounds,
            rescored: 0,
            profiled: None,
            known: Vec::new(),
            prompting: false,
            rows_gone: false,
        }
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The team.
    pub fn team(&self) -> &Arc<Team> {
        &self.team
    }

    /// Cosines and sines of the positions that the cache can hold.
    pub fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// The cache, to be filled from outside; afterwards call [`Session::refresh`].
    pub fn cache_mut(&mut self) -> &mut KvCache {
        self.known.clear();
        &mut self.cache
    }

    /// Tokens cached.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// The first tokens of the sequence, as far as the rows of the cache are those that exact attention gives for them: they
    /// were prefilled densely, or decoded with the method `dense`. Rows from outside end it.
    pub fn known_tokens(&self) -> &[u32] {
        &self.known
    }

    /// The attention method's state.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// What the attention of the last decode step read.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// How many rows of a two-stage head the last pass scored with the bf16 table, for all its tokens together; 0 for any
    /// other head.
    pub fn head_rows_rescored(&self) -> u64 {
        self.rescored
    }

    /// Makes [`Session::decode`] and [`Session::prefill`] on a two-stage head return the `top` likeliest tokens exactly,
    /// at the least 1, the default: their places and their logits are those of the bf16 head, bit for bit, and every
    /// other logit is below them. With as many as the vocabulary (or [`usize::MAX`]) all logits are those of the
    /// bf16 head. No effect with any other head.
    pub fn set_exact_top(&mut self, top: usize) {
        self.exact_top = top.clamp(1, self.model.config.vocab.max(1));
        self.lower_bounds = lower_bounds(self.lower_bounds_a_thread(), &self.team);
    }

    /// Lower bounds that a thread tells the others; none where all rows are scored exactly.
    fn lower_bounds_a_thread(&self) -> usize {
        if self.exact_top < self.model.config.vocab { self.exact_top } else { 1 }
    }

    /// Builds the attention state anew from the whole cache.
    pub fn refresh(&mut self) {
        self.attention.refresh(&self.cache, &self.rope, &self.team);
    }

    /// States of another method for this cache, up to date with what it holds; see [`Session::swap_attention`].
    ///
    /// # Errors
    /// A method that cannot serve the model or the number format of the cache, or one that evicts, for it would take from
    /// the rows of the others: see [`Session::fork_with`].
    pub fn attention_of(&self, method: MethodSpec) -> Result<Attention> {
        if method.evicts() {
            let reason = "a method that evicts needs a cache of its own: fork the session with it".into();
            return Err(Error::Parameter { text: method.canonical(), reason });
        }
        Attention::new(method, &self.cache, &self.rope, &self.team)
    }

    /// Puts `attention` in place and returns the state that was there. It must have been built for this cache at its
    /// present length.
    pub fn swap_attention(&mut self, attention: Attention) -> Attention {
        std::mem::replace(&mut self.attention, attention)
    }

    /// Goes on with another team.
    pub fn set_team(&mut self, team: Arc<Team>) {
        if team.threads() != self.team.threads() {
            let capacity = self.cache.shape().capacity.next_multiple_of(crate::kv::PAGE_TOKENS);
            self.decode = Scratch::new(&self.model.config, team.threads(), 1, capacity);
            self.prefill = None;
            self.lower_bounds = lower_bounds(self.lower_bounds_a_thread(), &team);
        }
        self.team = team;
    }

    /// Forgets every token from position `len` on. What a method evicted before it stays evicted, but for rows that
    /// steps evicted since a prompt ended, or since the last 256 rows went: a rewind to there takes those back.
    pub fn rewind(&mut self, len: usize) {
        self.cache.truncate(len);
        self.rows_gone &= len > 0;
        self.attention.truncated(&self.cache);
        self.known.truncate(len);
    }

    /// Appends `token` and returns the logits of the next one, `[vocab]`; on a two-stage head see
    /// [`Session::set_exact_top`].
    ///
    /// # Errors
    /// An unknown token, a full cache, or a key or value that the cache cannot hold; nothing is changed then.
    pub fn decode(&mut self, token: u32) -> Result<&[f32]> {
        self.check(&[token])?;
        self.pass(&[token], Kind::Decode { supplied: None, capture: false })?;
        Ok(self.last_logits())
    }

    /// As [`Session::decode`], with queries, keys and values from outside. With `capture`,
    /// [`Session::attention_output`] afterwards holds what attention returned, and [`Session::captured`] how.
    ///
    /// # Errors
    /// As [`Session::decode`]; also buffers of another shape than the model's.
    pub fn decode_supplied(&mut self, token: u32, supplied: &Supplied, capture: bool) -> Result<&[f32]> {
        self.check(&[token])?;
        let config = &self.model.config;
        let rows = config.layers * config.kv_heads * config.head_dim;
        let lengths = [supplied.queries.len(), supplied.keys.len(), supplied.values.len()];
        if lengths != [rows * config.group(), rows, rows] {
            return Err(Error::Invalid(format!(
                "supplied queries, keys and values have {lengths:?} numbers; the model needs {:?}",
                [rows * config.group(), rows, rows]
            )));
        }
        self.pass(&[token], Kind::Decode { supplied: Some(supplied), capture })?;
        Ok(self.last_logits())
    }

    /// The residual stream after each layer, `[layers][tokens][hidden]`, with the stream before each layer replaced by
    /// `forced` (`[layers][tokens][hidden]`) where that is given: teacher forcing, to compare layer by layer with
    /// another implementation.
    ///
    /// # Errors
    /// As [`Session::prefill`]; also fewer than two tokens, or `forced` of another length.
    pub fn trace_layers(&mut self, tokens: &[u32], forced: Option<&[f32]>) -> Result<Vec<f32>> {
        self.check(tokens)?;
        let config = &self.model.config;
        let numbers = config.layers * tokens.len() * config.hidden;
        if tokens.len() < 2 || forced.is_some_and(|f| f.len() != numbers) {
            return Err(Error::Invalid(format!(
                "a trace needs two tokens or more and {numbers} forced numbers"
            )));
        }
        let stripes = config.layers * tokens.len();
        let trace =
            Tracing { forced, out: Shared::even(stripes, config.hidden, stripes, 0.0).named("trace") };
        self.traced_pass(tokens, Kind::Prefill(Want::Last), Some(&trace))?;
        let out = trace.out.read().to_vec();
        Ok(out)
    }

    /// What attention returned in the last captured step, `[layers][heads][head_dim]`.
    pub fn attention_output(&self) -> Vec<f32> {
        self.decode.capture.get().map(Capture::outputs).unwrap_or_default()
    }

    /// What the last captured step did in (`layer`, `kv_head`); none before the first, or where there is no such head.
    pub fn captured(&self, layer: usize, kv_head: usize) -> Option<Captured> {
        let ModelConfig { layers, kv_heads, .. } = self.model.config;
        let known = layer < layers && kv_head < kv_heads;
        Some(self.decode.capture.get().filter(|_| known)?.head(layer * kv_heads + kv_head))
    }

    /// The logits of the last pass.
    fn last_logits(&mut self) -> &[f32] {
        if self.single { self.decode.logits.as_mut_slice() } else { &self.logits }
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.model.config.vocab;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        if tokens.is_empty() {
            return Err(Error::Invalid("at least one token is needed".into()));
        }
        let wanted = self.len() + tokens.len();
        let capacity = self.cache.shape().capacity;
        if wanted > capacity {
            return Err(Error::CacheFull { capacity, wanted });
        }
        Ok(())
    }

    fn pass(&mut self, tokens: &[u32], kind: Kind<'_>) -> Result<()> {
        self.traced_pass(tokens, kind, None)
    }

    fn traced_pass(&mut self, tokens: &[u32], kind: Kind<'_>, tracing: Option<&Tracing<'_>>) -> Result<()> {
        if self.prompting && matches!(kind, Kind::Decode { .. }) {
            self.end_prompt()?;
        }
        let (decoding, want, supplied, capture) = match kind {
            Kind::Prefill(want) => (false, want, None, false),
            Kind::Decode { supplied, capture } => (true, Want::Last, supplied, capture),
        };
        let config = &self.model.config;
        let capacity = self.rope.len();
        if tokens.len() > 1 && self.prefill.as_ref().is_none_or(|s| s.tokens() < tokens.len()) {
            self.prefill = Some(Scratch::new(config, self.team.threads(), tokens.len(), capacity));
        }
        let scratch = match &self.prefill {
            Some(scratch) if tokens.len() > 1 => scratch,
            _ => &self.decode,
        };
        if capture {
            scratch.capture.get_or_init(|| Capture::new(config));
        }
        let pass = Pass {
            model: &self.model,
            cache: &self.cache,
            attention: &self.attention,
            rope: &self.rope,
            scratch,
            tokens,
            position: self.cache.len(),
            supplied,
            want,
            exact_top: self.exact_top,
            lower_bounds: &self.lower_bounds,
            decoding,
            capture,
            tracing,
            profiling: self.profiled.is_some(),
        };
        let clock = self.profiled.is_some().then(std::time::Instant::now);
        // What a pass that panicked had counted does not belong to this one.
        scratch.take_traffic();
        scratch.reset_queues();
        self.single = tokens.len() == 1;
        self.team.run(|worker| pass.run(worker));
        if let Some(error) = scratch.take_failure() {
            self.rewind(self.cache.len());
            return Err(error);
        }
        pass.logits(&mut self.logits);
        self.rescored = pass.rescored();
        if let (Some(profile), Some(clock)) = (&mut self.profiled, clock) {
            profile.passes += 1;
            profile.tokens += tokens.len() as u64;
            profile.wall_nanos += clock.elapsed().as_nanos() as u64;
        }
        if decoding {
            self.traffic = scratch.take_traffic();
        }
        let before = self.cache.len();
        self.cache.set_len(before + tokens.len())?;
        let forced = tracing.is_some_and(|tracing| tracing.forced.is_some());
        let evicts = self.attention.spec().evicts();
        self.prompting |= evicts && !decoding;
        self.rows_gone |= evicts && decoding;
        let spec = self.attention.spec();
        let dense = if decoding { spec.method().name == "dense" } else { spec.is_prefill_dense() };
        let exact = !self.rows_gone && dense;
        if exact && !forced && supplied.is_none() && self.known.len() == before {
            self.known.extend_from_slice(tokens);
        }
        Ok(())
    }
}
