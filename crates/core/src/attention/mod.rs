//! Attention methods: which cached tokens a query reads, and what is assumed of the rest.
//!
//! A method answers [`HeadMethod::select`] for one (layer, KV head) and the query group that shares it: spans of tokens
//! to attend exactly, plus, if it estimates the rest, a tail partial a query head. Everything else is shared:
//! `attend` turns spans into [`partial`]s in any KV dtype and merges them on a tree that does not depend on
//! the number of threads. A new method is one file and one entry in [`METHODS`]; `docs/ARCHITECTURE.md` has the steps. What
//! tokens of a prompt see is another question, with a contract and a table of its own: [`prefill`].
//!
//! **Time and bytes.** A step ought to take what its bytes take. Methods whose step does more arithmetic than memory
//! waits for say how much in their documentation; what they share:
//! - A score a token and query head is four times as many numbers as there are tokens, 59 million a step for 150 heads of
//!   98,304 tokens and groups of four. They do not fit the second-level cache (1.5 MB a KV head), so each pass over them is 16
//!   bytes a token out of the third; an exponential is 18 operations of 16 lanes.
//! - Rows that lie apart are copied together before a kernel reads them (`kv/scattered.rs`): their bytes are touched three
//!   times, and a row of 256 bytes is four lines that the hardware does not expect.
//! - [`HeadMethod::select`] runs on the thread that owns the KV head. Five heads on `t` threads take `ceil(5 / t) / 5` of
//!   their sum: 0.6 in place of 0.5 on two threads, and no less than 0.2 on more than four. Scans split by token would need
//!   a barrier more a layer (10 us) and give back, on two threads, a tenth of that sum: at most a sixth of a step that does
//!   nothing but decide. That is left alone for the sake of one simple contract; with more threads than KV heads it would
//!   be the first thing to change.

mod approximate;
mod attend;
mod bitplane;
mod blocktopk;
mod choose;
mod cluster;
mod columns;
mod dense;
mod dense_skip;
mod doublesparsity;
mod evict;
mod expected;
mod h2o;
mod landmark;
#[cfg(test)]
pub(crate) mod laws;
mod layers;
mod longformer;
mod lru;
mod lsh;
mod magicpig;
mod nsa;
mod oracle;
mod params;
pub mod partial;
pub mod prefill;
mod quest;
mod reader;
mod record;
mod reformer;
mod reuse;
mod signatures;
mod snapkv;
mod sparq;
mod streaming;
mod summary;
pub(crate) mod tasks;
#[cfg(test)]
pub(crate) mod testing;
mod tova;
mod twilight;
mod value_sums;
mod vattention;
mod window;

pub(crate) use attend::{Read, gather_above, gather_chunk, reads, score_chunk, weights_len};
pub use choose::{Chooser, TokenSet, top_k, top_p};
/// Rows of a head that are evicted before their memory goes.
pub(crate) use evict::SLACK as EVICTION_SLACK;
pub use evict::{Board, Occasion, Retained};
pub use layers::Layers;
pub use params::{Kind, MethodSpec, ParamSpec, Params, SETTINGS};
pub use reader::Reader;
pub use record::Recording;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use longbit_sys::Team;

use crate::error::Result;
use crate::kv::{KvCache, KvDtype, KvHead};
use crate::model::{ModelConfig, RopeTable};

/// The query heads that share a KV head, rotated as its keys are and scaled by `1 / sqrt(head_dim)`.
#[derive(Clone, Copy, Debug)]
pub struct GroupQuery<'a> {
    /// `[group][head_dim]`.
    pub rows: &'a [f32],
    /// Numbers a row.
    pub head_dim: usize,
    /// Position of the token that asks; without eviction the last cached row is its own.
    pub position: usize,
}

impl GroupQuery<'_> {
    /// Query heads in the group.
    pub fn group(&self) -> usize {
        self.rows.len() / self.head_dim
    }
}

/// What a method decided for one decode step of one (layer, KV head).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// Tokens to attend exactly: ascending, disjoint.
    pub spans: Vec<Range<usize>>,
    /// The rest, estimated or attended by the method itself: nothing, or `group` partials as [`partial`] lays them out.
    pub tail: Vec<f32>,
    /// Values are left unread whose weight is below this share of the largest one of the head, for every head of the group;
    /// 0 reads all. Sums of weights still count them.
    pub skip_below: f32,
    /// Bytes of indexes and summaries that the decision read.
    pub index_bytes: u64,
    /// Bytes of cached rows that the method read itself, as [`Reader`] counts them.
    pub read_bytes: u64,
    /// Tokens that stand in `tail` by their own keys and values.
    pub tail_rows: u64,
}

impl Selection {
    /// Forgets everything but the memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.tail.clear();
        self.skip_below = 0.0;
        (self.index_bytes, self.read_bytes, self.tail_rows) = (0, 0, 0);
    }

    /// Tokens attended exactly.
    pub fn tokens(&self) -> usize {
        self.spans.iter().map(Range::len).sum()
    }
}

/// Queries of the last tokens of a prompt, at one (layer, KV head).
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// `[tokens][group][head_dim]`, rotated and scaled as those of a [`GroupQuery`].
    pub rows: &'a [f32],
    /// Query heads in the group.
    pub group: usize,
    /// Numbers a row.
    pub head_dim: usize,
    /// Position of the first token.
    pub first: usize,
}

/// The state of a method for one (layer, KV head).
pub trait HeadMethod: Send {
    /// Rows `from..kv.len()` were appended; an index grows here, and must equal one rebuilt from the whole cache. So
    /// it takes rows only when they are settled ([`Codec::settled`](crate::kv::Codec::settled)): before, some formats keep
    /// them exactly.
    fn appended(&mut self, kv: &KvHead, from: usize) {
        let _ = (kv, from);
    }

    /// The cache was rewound to `kv.len()` tokens.
    fn truncated(&mut self, kv: &KvHead) {
        let _ = kv;
    }

    /// Decides what the query group reads of `kv`; `out` arrives cleared.
    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection);

    /// Bytes of this state.
    fn state_bytes(&self) -> usize {
        0
    }

    /// How many of the last queries of a prompt it wants to see; none unless it evicts.
    fn prompt_queries(&self) -> usize {
        0
    }

    /// Queries of tokens that a prompt has appended, those of later tokens in later calls.
    fn prompted(&mut self, prompt: Prompt<'_>) {
        let _ = prompt;
    }

    /// The prompt is over: scores its rows. What the heads of a layer have to tell each other they put on their board.
    fn weigh(&mut self, kv: &KvHead) {
        let _ = kv;
    }

    /// Asked before rows are appended: says whether rows are to be dropped, and which remain, in `out`, which arrives
    /// cleared. The caller then does so, before anything else.
    fn compact(&mut self, kv: &KvHead, when: Occasion, out: &mut Retained) -> bool {
        let _ = (kv, when, out);
        false
    }

    /// Where it meets the other heads of its layer, of which it is number `kv_head`.
    fn meet(&mut self, board: &Arc<Board>, kv_head: usize) {
        let _ = (board, kv_head);
    }

    /// A copy, if its state is more than what the cache shows.
    fn fork(&self) -> Option<Box<dyn HeadMethod>> {
        None
    }
}

/// What of a model and its cache decides whether a method can serve it.
#[derive(Clone, Copy, Debug)]
pub struct MethodShape {
    /// Layers.
    pub layers: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Numbers a row.
    pub head_dim: usize,
    /// Query heads that share a KV head, and with it what they read. It counts for predictions alone.
    pub group: usize,
    /// Number format of keys and values.
    pub dtype: KvDtype,
}

impl MethodShape {
    /// The shape of a model of `config` with a cache of `dtype`.
    pub fn new(config: &ModelConfig, dtype: KvDtype) -> Self {
        let ModelConfig { layers, kv_heads, head_dim, .. } = *config;
        MethodShape { layers, kv_heads, head_dim, group: config.group(), dtype }
    }

    /// The shape of `cache`, which does not know how many query heads share it: a group of one.
    pub fn of(cache: &KvCache) -> Self {
        let shape = cache.shape();
        let (layers, kv_heads, head_dim) = (shape.layers, shape.kv_heads, shape.head_dim);
        MethodShape { layers, kv_heads, head_dim, group: 1, dtype: cache.dtype() }
    }
}

/// Where a state works.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// Of the whole cache.
    pub shape: MethodShape,
    /// Layer.
    pub layer: usize,
    /// KV head.
    pub kv_head: usize,
    /// What turned queries and keys.
    pub rope: &'a Arc<RopeTable>,
}

/// What a decode step reads and keeps for a (layer, KV head).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Predicted {
    /// Cached tokens whose keys and values are read. Where each query head chooses for itself, those of a group together, as
    /// `choose::union` expects them.
    pub rows: usize,
    /// Bytes of the state.
    pub state_bytes: usize,
    /// Bytes that deciding reads: of the state, or of cached keys.
    pub read_bytes: usize,
}

impl Predicted {
    /// A method that keeps nothing.
    pub const fn rows(rows: usize) -> Self {
        Predicted { rows, state_bytes: 0, read_bytes: 0 }
    }
}

/// An attention method, as the table lists it.
pub struct Method {
    /// Name, as in experiment files.
    pub name: &'static str,
    /// One line, with the source.
    pub summary: &'static str,
    /// Parameters with defaults.
    pub params: &'static [ParamSpec],
    /// Whether it takes the [`SETTINGS`] too; what reads everything has no use for them. All take the
    /// [`prefill::PREFILL_SETTINGS`].
    pub settings: bool,
    /// Whether it drops rows of the cache for good.
    pub evicts: bool,
    /// Says what contradicts what: parameters each other, the shape, the number format.
    check: fn(&Params, &MethodShape) -> Result<(), String>,
    /// Makes the state of one (layer, KV head).
    make: fn(&Params, &Place<'_>) -> Box<dyn HeadMethod>,
    /// What a decode step at a context reads, for predictions; values are read of as many tokens as keys.
    predict: fn(&Params, usize, &MethodShape) -> Predicted,
}

/// Every method.
pub static METHODS: &[Method] = &[
    dense::METHOD,
    dense_skip::METHOD,
    window::METHOD,
    streaming::METHOD,
    longformer::METHOD,
    landmark::METHOD,
    oracle::TOPK,
    oracle::TOPP,
    oracle::THRESHOLD,
    oracle::ENTROPY,
    magicpig::METHOD,
    reformer::METHOD,
    quest::METHOD,
    blocktopk::METHOD,
    nsa::METHOD,
    sparq::METHOD,
    doublesparsity::METHOD,
    twilight::METHOD,
    vattention::METHOD,
    cluster::METHOD,
    bitplane::METHOD,
    h2o::METHOD,
    snapkv::METHOD,
    tova::METHOD,
    expected::METHOD,
    lru::METHOD,
];

impl Method {
    /// Its own parameters, then the settings.
    pub fn all_params(&self) -> impl Iterator<Item = &'static ParamSpec> {
        let settings: &[ParamSpec] = if self.settings { SETTINGS } else { &[] };
        self.params.iter().chain(settings).chain(prefill::PREFILL_SETTINGS)
    }
}

impl MethodSpec {
    /// Whether it drops rows of the cache for good.
    pub fn evicts(&self) -> bool {
        self.method().evicts
    }

    /// The state of one (layer, KV head).
    pub fn make(&self, place: &Place<'_>) -> Box<dyn HeadMethod> {
        if self.is_dense(place.layer, place.shape.layers) {
            return Box::new(dense::Dense);
        }
        let state = (self.method().make)(self.params(), place);
        match self.reuse() {
            1 => state,
            steps => Box::new(reuse::Reuse::new(state, steps)),
        }
    }
}

/// A method at work on a whole cache: one state for each (layer, KV head).
pub struct Attention {
    spec: MethodSpec,
    kv_heads: usize,
    heads: Vec<Mutex<Box<dyn HeadMethod>>>,
    /// One a layer.
    boards: Vec<Arc<Board>>,
    prefill: Option<SparsePrefill>,
}

/// What tokens of a prompt see, and in which layers that is not everything.
type SparsePrefill = (Box<dyn prefill::Pattern>, Vec<bool>);

impl Attention {
    /// Fresh states, brought up to date with what `cache` holds, whose rows `rope` turned; `team` builds them.
    ///
    /// # Errors
    /// As [`MethodSpec::check`].
    pub fn new(spec: MethodSpec, cache: &KvCache, rope: &Arc<RopeTable>, team: &Team) -> Result<Self> {
        let shape = MethodShape::of(cache);
        spec.check(&shape)?;
        let sparse = |layer| !spec.is_prefill_dense_in(layer, shape.layers);
        let prefill = spec.prefill().map(|pattern| (pattern, (0..shape.layers).map(sparse).collect()));
        let (kv_heads, heads, boards) = (shape.kv_heads, Vec::new(), Vec::new());
        let mut attention = Attention { spec, kv_heads, heads, boards, prefill };
        attention.refresh(cache, rope, team);
        Ok(attention)
    }

    /// As [`Attention::new`] for a fork of the cache that this one serves: states that are more than the cache shows are
    /// copied.
    ///
    /// # Errors
    /// As [`MethodSpec::check`].
    pub fn fork(&self, cache: &KvCache, rope: &Arc<RopeTable>, team: &Team) -> Result<Self> {
        let mut fork = Attention::new(self.spec.clone(), cache, rope, team)?;
        fork.boards = self.boards.iter().map(|board| Arc::new(board.copy())).collect();
        for (i, state) in self.heads.iter().enumerate() {
            if let Some(mut copy) = state.lock().unwrap_or_else(|e| e.into_inner()).fork() {
                copy.meet(&fork.boards[i / self.kv_heads], i % self.kv_heads);
                fork.heads[i] = Mutex::new(copy);
            }
        }
        Ok(fork)
    }

    /// Fresh states in place of the present ones, for the same cache.
    pub fn refresh(&mut self, cache: &KvCache, rope: &Arc<RopeTable>, team: &Team) {
        let shape = MethodShape::of(cache);
        self.boards = (0..shape.layers).map(|_| Arc::new(Board::new(shape.kv_heads))).collect();
        let fresh = |i: usize| {
            let (layer, kv_head) = (i / shape.kv_heads, i % shape.kv_heads);
            let mut state = self.spec.make(&Place { shape, layer, kv_head, rope });
            state.meet(&self.boards[layer], kv_head);
            Mutex::new(state)
        };
        self.heads = (0..shape.layers * shape.kv_heads).map(fresh).collect();
        // Indexes of some methods take a while, and not the same for every head.
        let next = AtomicUsize::new(0);
        team.run(|_| {
            loop {
                let i = next.fetch_add(1, Relaxed);
                let Some(state) = self.heads.get(i) else { return };
                let kv = cache.head(i / shape.kv_heads, i % shape.kv_heads);
                if !kv.is_empty() {
                    state.lock().unwrap_or_else(|e| e.into_inner()).appended(&kv, 0);
                }
            }
        });
    }

    /// Which method, with all parameters.
    pub fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    /// What tokens of a prompt see in `layer`; none where they see everything.
    pub fn prefill(&self, layer: usize) -> Option<&dyn prefill::Pattern> {
        let (pattern, sparse) = self.prefill.as_ref()?;
        sparse.get(layer).is_some_and(|sparse| *sparse).then_some(&**pattern)
    }

    /// Puts another pattern in the place of the present one, which it returns; none is dense.
    pub(crate) fn swap_prefill(&mut self, pattern: Option<SparsePrefill>) -> Option<SparsePrefill> {
        std::mem::replace(&mut self.prefill, pattern)
    }

    /// Tokens of a block of a prompt that a pattern decides on together, for passes must not cut it; 1 where nothing is.
    pub fn prefill_block(&self) -> usize {
        self.prefill.as_ref().and_then(|(pattern, _)| pattern.block()).unwrap_or(1)
    }

    /// The state of (`layer`, `kv_head`).
    pub fn head(&self, layer: usize, kv_head: usize) -> MutexGuard<'_, Box<dyn HeadMethod>> {
        self.heads[layer * self.kv_heads + kv_head].lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Tells every state that `cache` was rewound.
    pub fn truncated(&mut self, cache: &KvCache) {
        for (i, state) in self.heads.iter_mut().enumerate() {
            let kv = cache.head(i / self.kv_heads, i % self.kv_heads);
            state.get_mut().unwrap_or_else(|e| e.into_inner()).truncated(&kv);
        }
    }

    /// Bytes of all states.
    pub fn state_bytes(&self) -> u64 {
        let bytes =
            |m: &Mutex<Box<dyn HeadMethod>>| m.lock().unwrap_or_else(|e| e.into_inner()).state_bytes();
        self.heads.iter().map(|m| bytes(m) as u64).sum()
    }
}

/// Parses `name` or `name:key=value,…` against [`METHODS`].
///
/// # Errors
/// [`crate::Error::Unknown`] or [`crate::Error::Parameter`], naming what exists.
pub fn method(text: &str) -> Result<MethodSpec> {
    MethodSpec::parse(text)
}
