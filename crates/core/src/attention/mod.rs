//! Attention methods: which cached tokens a query reads, and what is assumed of the rest.
//!
//! A method answers [`HeadMethod::select`] for one (layer, KV head) and the query group that shares it: spans of tokens
//! to attend exactly, plus, if it estimates the rest, a tail partial a query head. Everything else is shared:
//! `attend` turns spans into [`partial`]s in any KV dtype and merges them on a tree that does not depend on
//! the number of threads. A new method is one file and one line in [`METHODS`].

mod attend;
mod dense;
mod dense_skip;
mod params;
pub mod partial;
mod window;

pub(crate) use attend::{CHUNK_TOKENS, chunks, gather_above, gather_chunk, parts_of, score_chunk};
pub use params::{Kind, MethodSpec, ParamSpec, Params};

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use crate::error::Result;
use crate::kv::{KvCache, KvHead};

/// The query heads that share a KV head, rotated and scaled by `1 / sqrt(head_dim)`.
#[derive(Clone, Copy, Debug)]
pub struct GroupQuery<'a> {
    /// `[group][head_dim]`.
    pub rows: &'a [f32],
    /// Numbers a row.
    pub head_dim: usize,
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
    /// The estimated rest: nothing, or `group` partials as [`partial`] lays them out.
    pub tail: Vec<f32>,
    /// Values are left unread whose weight is below this share of the largest one of the head, for every head of the group;
    /// 0 reads all. Sums of weights still count them.
    pub skip_below: f32,
    /// Bytes of indexes and summaries that the decision read.
    pub index_bytes: u64,
}

impl Selection {
    /// Forgets everything but the memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.tail.clear();
        self.skip_below = 0.0;
        self.index_bytes = 0;
    }

    /// Tokens attended exactly.
    pub fn tokens(&self) -> usize {
        self.spans.iter().map(Range::len).sum()
    }
}

/// The state of a method for one (layer, KV head).
pub trait HeadMethod: Send {
    /// Rows `from..kv.len()` were appended; an index grows here, and must equal one rebuilt from the whole cache.
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
}

/// An attention method, as the table lists it.
pub struct Method {
    /// Name, as in experiment files.
    pub name: &'static str,
    /// One line, with the source.
    pub summary: &'static str,
    /// Parameters with defaults.
    pub params: &'static [ParamSpec],
    /// Makes the state of one (layer, KV head).
    make: fn(&Params) -> Box<dyn HeadMethod>,
    /// Tokens that a step reads exactly at a context, for predictions.
    reads: fn(&Params, usize) -> usize,
}

/// Every method.
pub static METHODS: &[Method] = &[dense::METHOD, dense_skip::METHOD, window::METHOD];

impl MethodSpec {
    /// The state of one (layer, KV head).
    pub fn make(&self) -> Box<dyn HeadMethod> {
        (self.method().make)(self.params())
    }

    /// Tokens that a decode step reads exactly at `context`, for predictions.
    pub fn predicted_reads(&self, context: usize) -> usize {
        (self.method().reads)(self.params(), context)
    }
}

/// A method at work on a whole cache: one state for each (layer, KV head).
pub struct Attention {
    spec: MethodSpec,
    kv_heads: usize,
    heads: Vec<Mutex<Box<dyn HeadMethod>>>,
}

impl Attention {
    /// Fresh states, brought up to date with what `cache` holds.
    pub fn new(spec: MethodSpec, cache: &KvCache) -> Self {
        let shape = cache.shape();
        let heads = (0..shape.layers * shape.kv_heads)
            .map(|i| {
                let mut state = spec.make();
                let kv = cache.head(i / shape.kv_heads, i % shape.kv_heads);
                if !kv.is_empty() {
                    state.appended(&kv, 0);
                }
                Mutex::new(state)
            })
            .collect();
        Attention { spec, kv_heads: shape.kv_heads, heads }
    }

    /// Which method, with all parameters.
    pub fn spec(&self) -> &MethodSpec {
        &self.spec
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
