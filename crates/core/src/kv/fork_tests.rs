//! Caches that share pages.

use longbit_kernels::Kernels;

use super::lagging::all;
use super::tests::{bytes, rows};
use super::*;

pub(super) const D: usize = 32;
pub(super) const LAYERS: usize = 1;
pub(super) const KV_HEADS: usize = 2;

pub(super) fn cache(dtype: KvDtype, capacity: usize) -> KvCache {
    let shape = CacheShape { layers: LAYERS, kv_heads: KV_HEADS, head_dim: D, capacity };
    KvCache::new(shape, dtype, Kernels::best()).unwrap()
}

/// Rows of a text: the keys and the values of token `t` in head `i` are row `t` of `text(i)`.
pub(super) struct Text(Vec<[Vec<f32>; 2]>);

impl Text {
    pub(super) fn new(n: usize, seed: u32) -> Self {
        let head = |i: u32| [rows(n, D, seed * 100 + 2 * i), rows(n, D, seed * 100 + 2 * i + 1)];
        Text((0..(LAYERS * KV_HEADS) as u32).map(head).collect())
    }

    /// `self` up to token `at`, then `other`.
    pub(super) fn turning(&self, at: usize, other: &Text) -> Text {
        let join = |a: &Vec<f32>, b: &Vec<f32>| [&a[..at * D], &b[at * D..]].concat();
        let heads = self.0.iter().zip(&other.0);
        Text(heads.map(|(a, b)| [join(&a[0], &b[0]), join(&a[1], &b[1])]).collect())
    }

    /// Appends the tokens up to `until` to `cache`.
    pub(super) fn append(&self, cache: &mut KvCache, until: usize, step: usize) {
        while cache.len() < until {
            let (from, to) = (cache.len(), until.min(cache.len() + step));
            for (i, [keys, values]) in self.0.iter().enumerate() {
                let mut head = cache.head_mut(i / KV_HEADS, i % KV_HEADS);
                head.append(&keys[from * D..to * D], &values[from * D..to * D]).unwrap();
            }
            cache.set_len(to).unwrap();
        }
    }

    /// All stored bytes of a cache that nobody shares after `n` tokens.
    pub(super) fn alone(&self, dtype: KvDtype, n: usize) -> Vec<Vec<u8>> {
        let mut cache = cache(dtype, n);
        self.append(&mut cache, n, 97);
        stored(&cache)
    }
}

pub(super) fn stored(cache: &KvCache) -> Vec<Vec<u8>> {
    (0..LAYERS * KV_HEADS).map(|i| bytes(&cache.head(i / KV_HEADS, i % KV_HEADS))).collect()
}

const TURNS: [usize; 5] = [0, 20, 256, 300, 512];

#[test]
fn both_branches_store_what_they_would_alone() {
    let n = 1000;
    let (a, b, c) = (Text::new(n, 1), Text::new(n, 2), Text::new(n, 3));
    for dtype in all() {
        for at in TURNS {
            let label = format!("{dtype}, forked at {at}");
            let (b, c) = (a.turning(at, &b), a.turning(at + 150, &c));
            let mut first = cache(dtype, n);
            a.append(&mut first, at, 61);
            let mut second = first.fork().unwrap();
            assert_eq!(second.len(), at);
            assert!(stored(&second) == stored(&first), "{label}");
            // One after the other, a token or a piece at a time.
            a.append(&mut first, at + 3, 1);
            b.append(&mut second, at + 280, 70);
            a.append(&mut first, at + 150, 50);
            let mut third = first.fork().unwrap();
            c.append(&mut third, at + 300, 30);
            a.append(&mut first, at + 200, 50);
            let fourth = second.fork().unwrap();
            for (cache, text, len) in
                [(&first, &a, 200), (&second, &b, 280), (&third, &c, 300), (&fourth, &b, 280)]
            {
                assert_eq!(cache.len(), at + len);
                assert!(stored(cache) == text.alone(dtype, at + len), "{label}, {len} on");
            }
            drop((first, second));
            let mut fourth = fourth;
            b.append(&mut fourth, at + 310, 30);
            c.append(&mut third, at + 310, 30);
            assert!(stored(&fourth) == b.alone(dtype, at + 310), "{label}, after its parents");
            assert!(stored(&third) == c.alone(dtype, at + 310), "{label}, after its parent");
        }
    }
}

#[test]
fn a_rewound_fork_leaves_the_parent_alone() {
    let n = 700;
    let (a, b) = (Text::new(n, 4), Text::new(n, 5));
    for dtype in all() {
        for (at, back) in [(600, 599), (600, 512), (600, 500), (300, 100), (256, 255), (40, 0)] {
            let mut parent = cache(dtype, n);
            a.append(&mut parent, at, 64);
            let before = stored(&parent);
            let mut fork = parent.fork().unwrap();
            fork.truncate(back);
            let other = a.turning(back, &b);
            other.append(&mut fork, n, 64);
            assert!(stored(&fork) == other.alone(dtype, n), "{dtype}: {at} -> {back}");
            assert!(stored(&parent) == before, "{dtype}: {at} -> {back}, the parent");
            parent.truncate(back);
            other.append(&mut parent, n, 64);
            assert!(stored(&parent) == stored(&fork), "{dtype}: {at} -> {back}, the parent as well");
        }
    }
}

/// Pages of `tokens` settled tokens of all heads: of the keys and of the values.
fn pages(dtype: KvDtype, tokens: usize) -> u64 {
    let of = |side: SideDtype| side.codec().settled(tokens).div_ceil(PAGE_TOKENS);
    ((of(dtype.keys) + of(dtype.values)) * LAYERS * KV_HEADS) as u64
}

#[test]
fn memory_is_counted_page_by_page() {
    let sides = (2 * LAYERS * KV_HEADS) as u64;
    let text = Text::new(1100, 6);
    for dtype in all() {
        let bytes = |keys: usize, values: usize| ((keys + values) * LAYERS * KV_HEADS) as u64;
        let exact = bytes(dtype.keys.exact_bytes(D), dtype.values.exact_bytes(D));
        for at in [0, 1, 256, 700, 1000] {
            let label = format!("{dtype} at {at}");
            let mut parent = cache(dtype, 1100);
            let pool = parent.pool().clone();
            assert_eq!(pool.usage(), PoolUsage { exact_bytes: exact, ..Default::default() }, "{label}");
            text.append(&mut parent, at, 256);
            let held = pages(dtype, at);
            let memory = parent.memory();
            assert_eq!((memory.pages, memory.shared_pages, memory.exact_bytes), (held, 0, exact), "{label}");
            let mut fork = parent.fork().unwrap();
            assert!(fork.pool().is(&pool));
            for cache in [&parent, &fork] {
                let memory = cache.memory();
                assert_eq!((memory.pages, memory.shared_pages), (held, held), "{label}");
                assert_eq!(memory.page_bytes, memory.shared_bytes, "{label}");
            }
            let usage = pool.usage();
            assert_eq!((usage.pages, usage.exact_bytes, usage.copies), (held, 2 * exact, 0), "{label}");
            // Settling some rows writes to one page a side: a new one at a page boundary, else a copy.
            let settled = |n: usize| [dtype.keys, dtype.values].map(|side| side.codec().settled(n));
            let (old, new) = (settled(at), settled(at + 64));
            let mut copies = 0;
            for side in [0, 1] {
                copies +=
                    sides / 2 * u64::from(new[side] > old[side] && !old[side].is_multiple_of(PAGE_TOKENS));
            }
            text.append(&mut fork, at + 64, 64);
            let grown = pages(dtype, at + 64) - held;
            let usage = pool.usage();
            assert_eq!((usage.copies, usage.pages), (copies, held + copies + grown), "{label}");
            assert_eq!(fork.memory().shared_pages, held - copies, "{label}");
            // Now the other one has those pages for itself, and writes without a copy.
            text.append(&mut parent, at + 64, 1);
            assert_eq!(pool.usage().copies, copies, "{label}");
            assert_eq!(pool.usage().pages, held + 2 * (copies + grown) - copies, "{label}");
            if dtype.keys.page_bytes(D) == dtype.values.page_bytes(D) {
                let usage = pool.usage();
                assert_eq!(usage.page_bytes, usage.pages * dtype.keys.page_bytes(D) as u64, "{label}");
            }
            drop(parent);
            assert_eq!(pool.usage().pages, pages(dtype, at + 64), "{label}");
            assert_eq!(fork.memory().shared_pages, 0);
            fork.truncate(0);
            drop(fork);
            let usage = pool.usage();
            assert_eq!((usage.pages, usage.page_bytes, usage.exact_bytes), (0, 0, 0), "{label}");
        }
    }
}

#[test]
fn forks_grow_on_their_own_threads() {
    let n = 900;
    let a = Text::new(n, 7);
    let dtype = kv_dtype("bf16").unwrap();
    let mut parent = cache(dtype, n);
    a.append(&mut parent, 300, 100);
    let texts: Vec<Text> = (0..4).map(|i| a.turning(300, &Text::new(n, 8 + i))).collect();
    let forks: Vec<KvCache> = texts.iter().map(|_| parent.fork().unwrap()).collect();
    std::thread::scope(|scope| {
        for (text, mut fork) in texts.iter().zip(forks) {
            scope.spawn(move || {
                text.append(&mut fork, n, 7);
                assert!(stored(&fork) == text.alone(dtype, n));
            });
        }
        a.append(&mut parent, n, 11);
    });
    assert!(stored(&parent) == a.alone(dtype, n));
    assert_eq!(parent.pool().usage().pages, pages(dtype, n));
}

#[test]
fn heads_of_different_lengths_cannot_fork() {
    let cache = cache(kv_dtype("f32").unwrap(), 100);
    cache.head_mut(0, 1).append(&[0.0; D], &[0.0; D]).unwrap();
    let error = cache.fork().err().unwrap().to_string();
    assert!(error.contains("layer 0, KV head 1 holds 1 tokens where 0 were expected"), "{error}");
}
