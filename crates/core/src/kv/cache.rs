//! Paged storage of keys and values, one [`KvHead`] for each (layer, KV head).
//!
//! A page holds [`PAGE_TOKENS`] rows of keys or of values of one head. All pages come from one huge-page arena that is
//! mapped when the cache is made and touched only as rows arrive; the pages of one head lie one after another, so that
//! reading a head in order is one linear stream.

use std::ops::Range;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use longbit_kernels::Kernels;
use longbit_sys::{Arena, Segment};

use super::KvDtype;
use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// Rows a page.
pub const PAGE_TOKENS: usize = 256;
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

    /// Bytes of the rows of `tokens` tokens.
    pub fn row_bytes(&self, dtype: &dyn KvDtype, tokens: usize) -> u64 {
        let a_token = (self.layers * self.kv_heads) as u64 * 2 * dtype.row_bytes(self.head_dim) as u64;
        a_token.saturating_mul(tokens as u64)
    }

    /// Bytes that the cache maps: whole pages.
    pub fn mapped_bytes(&self, dtype: &dyn KvDtype) -> u64 {
        self.row_bytes(dtype, self.capacity.div_ceil(PAGE_TOKENS).saturating_mul(PAGE_TOKENS))
    }
}

/// The keys and values of one (layer, KV head).
pub struct KvHead {
    kernels: &'static Kernels,
    dtype: &'static dyn KvDtype,
    head_dim: usize,
    row_bytes: usize,
    keys: Vec<Segment>,
    values: Vec<Segment>,
    len: usize,
}

impl KvHead {
    /// Cached tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Numbers a row.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of one encoded row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.keys.len() * PAGE_TOKENS
    }

    /// Appends rows `[n][head_dim]` of keys and values.
    ///
    /// # Errors
    /// [`Error::CacheFull`]; nothing is appended then.
    pub fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<()> {
        let n = keys.len() / self.head_dim;
        let wanted = self.len + n;
        if wanted > self.capacity() {
            return Err(Error::CacheFull { capacity: self.capacity(), wanted });
        }
        let mut done = 0;
        while done < n {
            let (page, row) = ((self.len + done) / PAGE_TOKENS, (self.len + done) % PAGE_TOKENS);
            let take = (PAGE_TOKENS - row).min(n - done);
            let bytes = row * self.row_bytes..(row + take) * self.row_bytes;
            let rows = done * self.head_dim..(done + take) * self.head_dim;
            for (pages, source) in [(&mut self.keys, keys), (&mut self.values, values)] {
                self.dtype.encode(
                    self.kernels,
                    &source[rows.clone()],
                    self.head_dim,
                    &mut pages[page][bytes.clone()],
                );
            }
            done += take;
        }
        self.len = wanted;
        Ok(())
    }

    /// Forgets every token from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Splits `tokens` at page boundaries.
    pub fn runs(tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut start = tokens.start;
        std::iter::from_fn(move || {
            (start < tokens.end).then(|| {
                let end = tokens.end.min((start / PAGE_TOKENS + 1) * PAGE_TOKENS);
                let run = start..end;
                start = end;
                run
            })
        })
    }

    fn rows<'a>(&self, pages: &'a [Segment], run: &Range<usize>) -> &'a [u8] {
        debug_assert!(run.end <= self.len && run.start / PAGE_TOKENS == (run.end - 1) / PAGE_TOKENS);
        let first = run.start % PAGE_TOKENS;
        &pages[run.start / PAGE_TOKENS][first * self.row_bytes..(first + run.len()) * self.row_bytes]
    }

    /// Encoded keys of `run`, which lies within one page.
    pub fn key_rows(&self, run: &Range<usize>) -> &[u8] {
        self.rows(&self.keys, run)
    }

    /// Encoded values of `run`, which lies within one page.
    pub fn value_rows(&self, run: &Range<usize>) -> &[u8] {
        self.rows(&self.values, run)
    }

    /// Dot products of `queries` `[group][head_dim]` with the keys of `run` (one page): `out` is `[group][run]`. The rows
    /// of `upcoming`, which are read next, are requested from memory in time.
    pub fn scores(&self, queries: &[f32], run: &Range<usize>, out: &mut [f32], upcoming: &[u8]) {
        self.dtype.scores(self.kernels, queries, self.key_rows(run), self.head_dim, out, upcoming);
    }

    /// Adds the values of `run` (one page) weighted by `weights` `[group][run]` to `acc` `[group][head_dim]`. The rows of
    /// `upcoming`, which are read next, are requested from memory in time.
    pub fn accumulate(&self, weights: &[f32], run: &Range<usize>, acc: &mut [f32], upcoming: &[u8]) {
        self.dtype.accumulate(self.kernels, weights, self.value_rows(run), self.head_dim, acc, upcoming);
    }
}

/// The cache of a whole model.
pub struct KvCache {
    shape: CacheShape,
    dtype: &'static dyn KvDtype,
    heads: Vec<RwLock<KvHead>>,
    len: usize,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// When the address space for `shape` cannot be had; the message carries the number of bytes.
    pub fn new(shape: CacheShape, dtype: &'static dyn KvDtype, kernels: &'static Kernels) -> Result<Self> {
        let row_bytes = dtype.row_bytes(shape.head_dim);
        let pages = shape.capacity.div_ceil(PAGE_TOKENS);
        let page_bytes = PAGE_TOKENS * row_bytes;
        let bytes = pages
            .checked_mul(shape.layers * shape.kv_heads * 2)
            .and_then(|count| count.checked_mul(page_bytes.next_multiple_of(SLACK)))
            .ok_or(longbit_sys::SysError::TooLarge { len: shape.capacity, size: row_bytes })?;
        let mut arena = Arena::new(bytes, true)?;
        let mut take = || -> Result<Vec<Segment>> {
            (0..pages)
                .map(|_| match arena.take(page_bytes) {
                    Some(page) => Ok(page),
                    None => Ok(Segment::new(page_bytes)?),
                })
                .collect()
        };
        let mut heads = Vec::with_capacity(shape.layers * shape.kv_heads);
        for _ in 0..shape.layers * shape.kv_heads {
            heads.push(RwLock::new(KvHead {
                kernels,
                dtype,
                head_dim: shape.head_dim,
                row_bytes,
                keys: take()?,
                values: take()?,
                len: 0,
            }));
        }
        Ok(KvCache { shape, dtype, heads, len: 0 })
    }

    /// Shape.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Number format.
    pub fn dtype(&self) -> &'static dyn KvDtype {
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
            let held = head.read().unwrap_or_else(|e| e.into_inner()).len;
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

    /// Forgets every token from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for head in &mut self.heads {
            head.get_mut().unwrap_or_else(|e| e.into_inner()).truncate(len);
        }
    }

    /// Bytes of all cached rows.
    pub fn stored_bytes(&self) -> u64 {
        self.shape.row_bytes(self.dtype, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KV_DTYPES;

    #[test]
    fn runs_end_at_pages_and_cover() {
        let runs: Vec<_> = KvHead::runs(250..770).collect();
        assert_eq!(runs, [250..256, 256..512, 512..768, 768..770]);
        assert_eq!(KvHead::runs(5..5).count(), 0);
    }

    #[test]
    fn appending_in_pieces_gives_the_same_bytes() {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: 48, capacity: 600 };
        let kernels = Kernels::best();
        let rows: Vec<f32> = (0..600 * 48).map(|i| ((i * 37 % 1001) as f32 - 500.0) / 77.0).collect();
        for dtype in KV_DTYPES {
            let whole = KvCache::new(shape, *dtype, kernels).unwrap();
            whole.head_mut(0, 0).append(&rows, &rows).unwrap();
            for step in [1, 7, 255, 256, 257] {
                let pieces = KvCache::new(shape, *dtype, kernels).unwrap();
                for chunk in rows.chunks(step * 48) {
                    pieces.head_mut(0, 0).append(chunk, chunk).unwrap();
                }
                let (a, b) = (whole.head(0, 0), pieces.head(0, 0));
                for run in KvHead::runs(0..600) {
                    assert_eq!(a.key_rows(&run), b.key_rows(&run), "{} {step}", dtype.name());
                    assert_eq!(a.value_rows(&run), b.value_rows(&run));
                }
            }
        }
    }

    #[test]
    fn a_full_cache_refuses_and_keeps_what_it_has() {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: 16, capacity: 256 };
        let cache = KvCache::new(shape, KV_DTYPES[0], Kernels::best()).unwrap();
        let rows = vec![1.0; 200 * 16];
        cache.head_mut(0, 0).append(&rows, &rows).unwrap();
        let error = cache.head_mut(0, 0).append(&rows, &rows).unwrap_err();
        assert!(matches!(error, Error::CacheFull { capacity: 256, wanted: 400 }), "{error}");
        assert_eq!(cache.head(0, 0).len(), 200);
    }

    #[test]
    fn every_dtype_decodes_within_its_bound() {
        let kernels = Kernels::best();
        let rows: Vec<f32> = (0..64 * 3).map(|i| (i as f32 - 90.0) * 0.37).collect();
        for dtype in KV_DTYPES {
            let mut bytes = vec![0u8; 3 * dtype.row_bytes(64)];
            let mut back = vec![0.0f32; rows.len()];
            dtype.encode(kernels, &rows, 64, &mut bytes);
            dtype.decode(kernels, &bytes, 64, &mut back);
            let bound = if dtype.name() == "f32" { 0.0 } else { 1.0 / 256.0 };
            for (x, y) in rows.iter().zip(&back) {
                assert!((x - y).abs() <= bound * x.abs(), "{}: {x} -> {y}", dtype.name());
            }
        }
    }
}
