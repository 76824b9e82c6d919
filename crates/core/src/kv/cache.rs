//! Paged storage of keys and values, one [`KvHead`] for each (layer, KV head).
//!
//! A page holds [`PAGE_TOKENS`] rows of keys or of values of one head. All pages come from one huge-page arena that is
//! mapped when the cache is made and touched only as rows arrive; the pages of one head lie one after another, so that
//! reading a head in order is one linear stream.

use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use longbit_kernels::Kernels;
use longbit_sys::{Arena, Segment};

use super::side::Memory;
use super::{KvDtype, KvHead, PAGE_TOKENS, SideDtype};
use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// Alignment slack of one page in the arena.
const SLACK: usize = 64;

/// What decides the size of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers.
    pub layers: usize,
    /// KV heads a layer.
    pub kv_heads: usize,
    /// Numbers a row.
    pub head_dim: usize,
    /// Tokens that fit.
    pub capacity: usize,
}

impl CacheShape {
    /// For `config` with room for `capacity` tokens.
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        CacheShape { layers: config.layers, kv_heads: config.kv_heads, head_dim: config.head_dim, capacity }
    }

    fn sides(&self) -> u64 {
        (self.layers * self.kv_heads) as u64
    }

    /// Bytes that `tokens` tokens take: their rows in pages, and what is kept exactly.
    pub fn stored_bytes(&self, dtype: KvDtype, tokens: usize) -> u64 {
        let side = |side: SideDtype| {
            let pages = (side.page_bytes(self.head_dim) as u64).saturating_mul(tokens as u64);
            pages.div_ceil(PAGE_TOKENS as u64).saturating_add(side.exact_bytes(self.head_dim) as u64)
        };
        self.sides().saturating_mul(side(dtype.keys).saturating_add(side(dtype.values)))
    }

    /// Bytes that attending to `tokens` tokens reads.
    pub fn read_bytes(&self, dtype: KvDtype, tokens: usize) -> u64 {
        let side = |side: SideDtype| side.read_bytes(self.head_dim, tokens);
        self.sides().saturating_mul(side(dtype.keys).saturating_add(side(dtype.values)))
    }

    /// Bytes that the cache maps: whole pages.
    pub fn mapped_bytes(&self, dtype: KvDtype) -> u64 {
        self.stored_bytes(dtype, self.capacity.div_ceil(PAGE_TOKENS).saturating_mul(PAGE_TOKENS))
    }
}

/// The cache of a whole model.
pub struct KvCache {
    shape: CacheShape,
    dtype: KvDtype,
    heads: Vec<RwLock<KvHead>>,
    len: usize,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// When `dtype` cannot store rows of this head dimension, or the address space for `shape` cannot be had (the message
    /// carries the number of bytes).
    pub fn new(shape: CacheShape, dtype: KvDtype, kernels: &'static Kernels) -> Result<Self> {
        dtype.check(shape.head_dim)?;
        let pages = shape.capacity.div_ceil(PAGE_TOKENS);
        let d = shape.head_dim;
        let bytes_of = |side: SideDtype| {
            pages
                .checked_mul(side.page_bytes(d).next_multiple_of(SLACK))?
                .checked_add(side.exact_bytes(d).next_multiple_of(SLACK))
        };
        let bytes = bytes_of(dtype.keys)
            .zip(bytes_of(dtype.values))
            .and_then(|(keys, values)| keys.checked_add(values)?.checked_mul(shape.layers * shape.kv_heads))
            .ok_or(longbit_sys::SysError::TooLarge {
                len: shape.capacity,
                size: dtype.keys.page_bytes(d) + dtype.values.page_bytes(d),
            })?;
        let mut arena = Arena::new(bytes, true)?;
        let mut take = |bytes: usize| -> Result<Segment> {
            match arena.take(bytes) {
                Some(segment) => Ok(segment),
                None => Ok(Segment::new(bytes)?),
            }
        };
        let mut memory = |side: SideDtype| -> Result<Memory> {
            Ok(Memory {
                pages: (0..pages).map(|_| take(side.page_bytes(d))).collect::<Result<_>>()?,
                exact: take(side.exact_bytes(d))?,
            })
        };
        let mut heads = Vec::with_capacity(shape.layers * shape.kv_heads);
        for i in 0..shape.layers * shape.kv_heads {
            let place = [i / shape.kv_heads, i % shape.kv_heads];
            let memory = [memory(dtype.keys)?, memory(dtype.values)?];
            heads.push(RwLock::new(KvHead::new(kernels, place, d, dtype, memory)));
        }
        Ok(KvCache { shape, dtype, heads, len: 0 })
    }

    /// Shape.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Number format.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Tokens that every head holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The head of (`layer`, `kv_head`), for reading.
    pub fn head(&self, layer: usize, kv_head: usize) -> RwLockReadGuard<'_, KvHead> {
        self.heads[layer * self.shape.kv_heads + kv_head].read().unwrap_or_else(|e| e.into_inner())
    }

    /// The head of (`layer`, `kv_head`), for appending.
    pub fn head_mut(&self, layer: usize, kv_head: usize) -> RwLockWriteGuard<'_, KvHead> {
        self.heads[layer * self.shape.kv_heads + kv_head].write().unwrap_or_else(|e| e.into_inner())
    }

    /// Records that every head now holds `len` tokens, after rows were appended to all of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] when some head holds another number.
    pub fn set_len(&mut self, len: usize) -> Result<()> {
        for (i, head) in self.heads.iter().enumerate() {
            let held = head.read().unwrap_or_else(|e| e.into_inner()).len();
            if held != len {
                let (layer, kv_head) = (i / self.shape.kv_heads, i % self.shape.kv_heads);
                return Err(Error::Invalid(format!(
                    "layer {layer}, KV head {kv_head} holds {held} tokens where {len} were expected"
                )));
            }
        }
        self.len = len;
        Ok(())
    }

    /// Forgets every token from `len` on, in heads that hold more of them too.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for head in &mut self.heads {
            head.get_mut().unwrap_or_else(|e| e.into_inner()).truncate(len);
        }
    }

    /// Bytes of all cached rows.
    pub fn stored_bytes(&self) -> u64 {
        self.shape.stored_bytes(self.dtype, self.len)
    }
}
