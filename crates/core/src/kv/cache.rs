//! Paged storage of keys and values, one [`KvHead`] for each (layer, KV head).
//!
//! A page holds [`PAGE_TOKENS`] rows of keys or of values of one head. All pages come from one huge-page arena that is
//! mapped when the cache is made and touched only as rows arrive; the pages of one head lie one after another, so that
//! reading a head in order is one linear stream. A cache that begins with pages of another shares those, and has an
//! arena for the pages that follow, page after page of all heads: it is likely to need few of them.

use std::collections::VecDeque;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use longbit_kernels::Kernels;
use longbit_sys::{Arena, Segment};

use super::pool::{KvMemory, Memory, Page, PagePool};
use super::unit::{Lease, Unit};
use super::{KvDtype, KvHead, PAGE_TOKENS, SideDtype};
use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// Alignment slack of one page in the arena.
pub(super) const SLACK: usize = 64;

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
    kernels: &'static Kernels,
    pool: PagePool,
    heads: Vec<RwLock<KvHead>>,
    len: usize,
    /// What keeps the prefix that it began with from being evicted.
    lease: Option<Lease>,
}

/// Encoded pages that a head begins with: of the keys and of the values.
type Begun = [Vec<Page>; 2];

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// When `dtype` cannot store rows of this head dimension, or the address space for `shape` cannot be had (the message
    /// carries the number of bytes).
    pub fn new(shape: CacheShape, dtype: KvDtype, kernels: &'static Kernels) -> Result<Self> {
        Self::new_in(&PagePool::default(), shape, dtype, kernels)
    }

    /// As [`KvCache::new`], with its pages counted in `pool`.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub fn new_in(
        pool: &PagePool,
        shape: CacheShape,
        dtype: KvDtype,
        kernels: &'static Kernels,
    ) -> Result<Self> {
        dtype.check(shape.head_dim)?;
        let memory = memory(pool, shape, dtype, [0, 0], |_| Default::default())?;
        let heads = memory.into_iter().enumerate().map(|(i, memory)| {
            let place = [i / shape.kv_heads, i % shape.kv_heads];
            RwLock::new(KvHead::new(kernels, place, shape.head_dim, dtype, memory))
        });
        let heads = heads.collect();
        Ok(KvCache { shape, dtype, kernels, pool: pool.clone(), heads, len: 0, lease: None })
    }

    /// Another cache of the same tokens, in the same pool. It shares all pages; whichever of the two writes first to the one
    /// that is partly filled copies it. Rows that are kept exactly are copied here and now.
    ///
    /// # Errors
    /// When the address space for its further pages cannot be had, or heads hold different numbers of tokens.
    pub fn fork(&self) -> Result<KvCache> {
        self.check_len(self.len)?;
        let heads = self.read_heads();
        let settled = match heads.first() {
            Some(head) => head.sides().map(|side| side.settled()),
            None => [0, 0],
        };
        let memory = memory(&self.pool, self.shape, self.dtype, settled, |i| {
            heads[i].sides().map(|side| side.shared(self.len).collect())
        })?;
        let heads = heads.iter().zip(memory).map(|(head, memory)| RwLock::new(head.fork(memory))).collect();
        Ok(KvCache { heads, pool: self.pool.clone(), lease: self.lease.clone(), ..*self })
    }

    /// A cache of the tokens of `units`, which follow one another from the first token on and end where a sequence can go
    /// on.
    pub(super) fn resume(
        pool: &PagePool,
        shape: CacheShape,
        dtype: KvDtype,
        kernels: &'static Kernels,
        units: &[&Unit],
        lease: Lease,
    ) -> Result<Self> {
        let len = units.len() * PAGE_TOKENS;
        let settled = [dtype.keys, dtype.values].map(|side| side.codec().settled(len));
        let memory = memory(pool, shape, dtype, settled, |i| {
            [0, 1].map(|side| {
                let units = &units[..settled[side].div_ceil(PAGE_TOKENS)];
                units.iter().filter_map(|unit| unit.page(i, side)).collect()
            })
        })?;
        let (mut first, mut newest) = match (units.first(), units.last()) {
            (Some(first), Some(last)) => (first.first_exact(), last.newest_exact()),
            _ => Default::default(),
        };
        let mut heads = Vec::with_capacity(memory.len());
        for (i, memory) in memory.into_iter().enumerate() {
            let place = [i / shape.kv_heads, i % shape.kv_heads];
            let mut head = KvHead::new(kernels, place, shape.head_dim, dtype, memory);
            head.resume(len, &mut first, &mut newest);
            heads.push(RwLock::new(head));
        }
        Ok(KvCache { shape, dtype, kernels, pool: pool.clone(), heads, len, lease: Some(lease) })
    }

    /// Shape.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Number format.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Tokens that came so far; every head holds the rows of all of them, but for those that were evicted.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All heads, for reading.
    pub(super) fn read_heads(&self) -> Vec<RwLockReadGuard<'_, KvHead>> {
        self.heads.iter().map(|head| head.read().unwrap_or_else(|e| e.into_inner())).collect()
    }

    /// The head of (`layer`, `kv_head`), for reading.
    pub fn head(&self, layer: usize, kv_head: usize) -> RwLockReadGuard<'_, KvHead> {
        self.heads[layer * self.shape.kv_heads + kv_head].read().unwrap_or_else(|e| e.into_inner())
    }

    /// The head of (`layer`, `kv_head`), for appending.
    pub fn head_mut(&self, layer: usize, kv_head: usize) -> RwLockWriteGuard<'_, KvHead> {
        self.heads[layer * self.shape.kv_heads + kv_head].write().unwrap_or_else(|e| e.into_inner())
    }

    /// Records that every head now stands at `len` tokens, after rows were appended to all of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] when some head stands elsewhere.
    pub fn set_len(&mut self, len: usize) -> Result<()> {
        self.check_len(len)?;
        self.len = len;
        Ok(())
    }

    fn check_len(&self, len: usize) -> Result<()> {
        for (i, head) in self.heads.iter().enumerate() {
            let held = head.read().unwrap_or_else(|e| e.into_inner()).tokens();
            if held != len {
                let (layer, kv_head) = (i / self.shape.kv_heads, i % self.shape.kv_heads);
                return Err(Error::Invalid(format!(
                    "layer {layer}, KV head {kv_head} holds {held} tokens where {len} were expected"
                )));
            }
        }
        Ok(())
    }

    /// Forgets every token from position `len` on, in heads that hold more of them too.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for head in &mut self.heads {
            head.get_mut().unwrap_or_else(|e| e.into_inner()).truncate(len);
        }
    }

    /// Bytes of all cached rows.
    pub fn stored_bytes(&self) -> u64 {
        let one = CacheShape { layers: 1, kv_heads: 1, ..self.shape };
        self.read_heads().iter().map(|head| one.stored_bytes(self.dtype, head.len())).sum()
    }

    /// Whether the row of some token was evicted.
    pub fn has_evicted(&self) -> bool {
        self.read_heads().iter().any(|head| head.dropped() > 0)
    }

    /// What it holds, page by page. What is shared counts in full; see [`KvCache::pool`] for the sum over caches.
    pub fn memory(&self) -> KvMemory {
        let mut sum = KvMemory::default();
        for head in &self.heads {
            head.read().unwrap_or_else(|e| e.into_inner()).count(&mut sum);
        }
        sum
    }

    /// Where its pages are counted.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// The kernels that it works with.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }
}

impl Drop for KvCache {
    /// Gives back what nobody shares, in one go: a map that nobody shares a page of goes in one piece.
    fn drop(&mut self) {
        let heads = std::mem::take(&mut self.heads).into_iter();
        let heads = heads.map(|head| head.into_inner().unwrap_or_else(|e| e.into_inner()));
        Segment::release(heads.flat_map(KvHead::into_memory).flat_map(Memory::into_unshared).collect());
    }
}

/// Memory for all heads of a cache of which `settled` tokens of keys and of values are encoded, in the pages that `begun`
/// returns; the last of them may be partly filled, and there is room for a copy of it.
fn memory(
    pool: &PagePool,
    shape: CacheShape,
    dtype: KvDtype,
    settled: [usize; 2],
    mut begun: impl FnMut(usize) -> Begun,
) -> Result<Vec<[Memory; 2]>> {
    let d = shape.head_dim;
    let (heads, sides) = (shape.layers * shape.kv_heads, [dtype.keys, dtype.values]);
    let capacity = shape.capacity.div_ceil(PAGE_TOKENS);
    let pages = settled.map(|tokens| capacity.saturating_sub(tokens / PAGE_TOKENS));
    let bytes_of = |side: usize| {
        let (page, exact) = (sides[side].page_bytes(d), sides[side].exact_bytes(d));
        pages[side].checked_mul(page.next_multiple_of(SLACK))?.checked_add(exact.next_multiple_of(SLACK))
    };
    let bytes = bytes_of(0)
        .zip(bytes_of(1))
        .and_then(|(keys, values)| keys.checked_add(values)?.checked_mul(heads))
        .ok_or(longbit_sys::SysError::TooLarge {
            len: shape.capacity,
            size: sides[0].page_bytes(d) + sides[1].page_bytes(d),
        })?;
    let mut arena = Arena::new(bytes, true)?;
    let mut take = |bytes: usize| -> Result<Segment> {
        match arena.take(bytes) {
            Some(segment) => Ok(segment),
            None => Ok(Segment::new(bytes)?),
        }
    };
    let mut spare: Vec<[VecDeque<Segment>; 2]> = (0..heads).map(|_| Default::default()).collect();
    let mut put = |head: usize, side: usize| -> Result<()> {
        spare[head][side].push_back(take(sides[side].page_bytes(d))?);
        Ok(())
    };
    let each = |head: usize| [(head, 0), (head, 1)];
    if settled == [0, 0] {
        // Head after head, for reading a long sequence in order.
        for (head, side) in (0..heads).flat_map(each) {
            (0..pages[side]).try_for_each(|_| put(head, side))?;
        }
    } else {
        // Page after page: the next tokens of a branch, usually few, touch few huge pages, not one a head and side.
        for page in 0..pages[0].max(pages[1]) {
            let wanted = (0..heads).flat_map(each).filter(|&(_, side)| page < pages[side]);
            wanted.into_iter().try_for_each(|(head, side)| put(head, side))?;
        }
    }
    let heads = spare.into_iter().enumerate().map(|(i, [keys, values])| {
        let [begun_keys, begun_values] = begun(i);
        let mut side = |side: SideDtype, begun, spare| -> Result<Memory> {
            let exact = take(side.exact_bytes(d))?;
            Ok(Memory::new(pool, capacity, side.page_bytes(d), begun, spare, exact))
        };
        Ok([side(dtype.keys, begun_keys, keys)?, side(dtype.values, begun_values, values)?])
    });
    heads.collect()
}
