//! Trees of prefixes, held against a list of all prefixes.

use std::collections::{BTreeMap, BTreeSet};

use longbit_kernels::Kernels;
use proptest::prelude::*;

use super::fork_tests::{D, KV_HEADS, LAYERS, Text, cache, stored};
use super::lagging::all;
use super::tests::{bytes, rows};
use super::unit::Unit;
use super::*;
use crate::error::Error;

const SHAPE: CacheShape = CacheShape { layers: LAYERS, kv_heads: KV_HEADS, head_dim: D, capacity: 0 };

fn tree(dtype: KvDtype) -> PrefixTree {
    PrefixTree::new(SHAPE, dtype, Kernels::best(), u64::MAX).unwrap()
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).collect()
}

/// Where a sequence of `dtype` can go on at or before `len`, if only the pages are known.
fn by_pages(dtype: KvDtype, len: usize) -> usize {
    let whole = |l: &usize| [dtype.keys, dtype.values].iter().all(|side| side.codec().settled(*l) == *l);
    (0..=len / PAGE_TOKENS).rev().map(|page| page * PAGE_TOKENS).find(whole).unwrap_or(0)
}

#[test]
fn what_begins_with_a_prefix_stores_what_it_would_alone() {
    let n = 1390;
    let (a, b) = (Text::new(n, 20), Text::new(n, 21));
    for dtype in all() {
        for end in [200, 256, 513, 1100] {
            let label = format!("{dtype}, inserted at {end}");
            let mut tree = tree(dtype);
            let mut donor = tree.cache(&[], n).unwrap();
            a.append(&mut donor, end, 83);
            let whole = end / PAGE_TOKENS * PAGE_TOKENS;
            assert_eq!(tree.insert(&tokens(end), &donor).unwrap(), whole, "{label}");
            // The tree has pages of its own when the first sequence goes on, and when it is gone.
            b.append(&mut donor, end + 100, 100);
            drop(donor);
            for asked in [end + 200, whole, whole.saturating_sub(1), 255] {
                let mut next = tree.cache(&tokens(asked), n).unwrap();
                let reused = if asked >= whole { whole } else { by_pages(dtype, asked) };
                assert_eq!(next.len(), reused, "{label}, {asked} asked for");
                assert_eq!(tree.longest(&tokens(asked)), reused);
                assert!(stored(&next) == a.alone(dtype, reused), "{label}, {reused} reused");
                let other = a.turning(reused, &b);
                other.append(&mut next, reused + 290, 29);
                assert!(
                    stored(&next) == other.alone(dtype, reused + 290),
                    "{label}, {reused} reused, and on"
                );
            }
        }
    }
}

#[test]
fn a_prefix_grows_with_the_sequences_that_began_with_it() {
    let n = 1300;
    let text = Text::new(n, 22);
    for dtype in all() {
        let mut tree = tree(dtype);
        for end in [300, 700, 1290] {
            let mut cache = tree.cache(&tokens(end), n).unwrap();
            text.append(&mut cache, end, 57);
            tree.insert(&tokens(end), &cache).unwrap();
        }
        for (asked, reused) in [(1300, 1280), (600, 512), (400, 256)] {
            let mut cache = tree.cache(&tokens(asked), n).unwrap();
            assert_eq!(cache.len(), reused.max(by_pages(dtype, asked)), "{dtype}");
            text.append(&mut cache, n, 91);
            assert!(stored(&cache) == text.alone(dtype, n), "{dtype}, {reused} reused");
        }
        let memory = tree.memory();
        assert_eq!((memory.tokens, memory.nodes, memory.leased), (1280, 3, 0), "{dtype}");
        assert_eq!(
            memory.pages,
            (1280 / PAGE_TOKENS * 2 * LAYERS * KV_HEADS) as u64 - unsettled_pages(dtype, 1290)
        );
    }
}

/// Pages of the last tokens of whole pages that hold no encoded row yet.
fn unsettled_pages(dtype: KvDtype, end: usize) -> u64 {
    let of = |side: SideDtype| {
        end / PAGE_TOKENS - side.codec().settled(end).div_ceil(PAGE_TOKENS).min(end / PAGE_TOKENS)
    };
    ((of(dtype.keys) + of(dtype.values)) * LAYERS * KV_HEADS) as u64
}

#[test]
fn after_a_long_rewind_only_what_is_true_is_kept() {
    let n = 1300;
    let (a, b) = (Text::new(n, 23), Text::new(n, 24));
    for dtype in all() {
        let mut tree = tree(dtype);
        let mut donor = tree.cache(&[], n).unwrap();
        a.append(&mut donor, 1200, 100);
        donor.truncate(600);
        let text = a.turning(600, &b);
        text.append(&mut donor, 1100, 100);
        let kept = tree.insert(&tokens(1100), &donor).unwrap();
        drop(donor);
        let mut next = tree.cache(&tokens(1100), n).unwrap();
        assert_eq!(next.len(), kept);
        text.append(&mut next, 1150, 50);
        assert!(stored(&next) == text.alone(dtype, 1150), "{dtype}: {kept} kept");
    }
}

#[test]
fn leases_keep_prefixes_and_the_rest_goes_back() {
    let text = Text::new(800, 25);
    for dtype in all() {
        let mut tree = tree(dtype);
        let pool = tree.pool().clone();
        let mut donor = tree.cache(&[], 800).unwrap();
        text.append(&mut donor, 780, 100);
        tree.insert(&tokens(780), &donor).unwrap();
        let held = tree.memory();
        assert_eq!(held.shared_pages, held.pages, "{dtype}");
        drop(donor);
        let memory = tree.memory();
        assert_eq!((memory.shared_pages, memory.leased, memory.tokens), (0, 0, 768), "{dtype}");
        let usage = pool.usage();
        let bytes = (memory.pages, memory.page_bytes, memory.exact_bytes);
        assert_eq!((usage.pages, usage.page_bytes, usage.exact_bytes), bytes, "{dtype}");
        let cache = tree.cache(&tokens(800), 800).unwrap();
        let fork = cache.fork().unwrap();
        drop(cache);
        assert_eq!(tree.memory().leased, 1);
        assert_eq!(tree.trim(0), memory.page_bytes + memory.exact_bytes, "{dtype}: a fork lives");
        drop(fork);
        assert_eq!(tree.trim(0), 0);
        assert_eq!((tree.memory(), tree.longest(&tokens(800))), (PrefixMemory::default(), 0));
        let usage = pool.usage();
        assert_eq!((usage.pages, usage.page_bytes, usage.exact_bytes), (0, 0, 0), "{dtype}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let bf16 = kv_dtype("bf16").unwrap();
    let mut tree = tree(bf16);
    let says = |result: crate::Result<usize>, what: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    says(tree.insert(&[], &cache(kv_dtype("k=f32,v=bf16").unwrap(), 300)), "in k=f32,v=bf16 does not fit");
    let shape = CacheShape { layers: 2, capacity: 300, ..SHAPE };
    let other = KvCache::new(shape, bf16, Kernels::best()).unwrap();
    says(tree.insert(&[], &other), "a cache of 2 layers of 2 heads of 32 numbers");
    says(tree.insert(&tokens(3), &cache(bf16, 300)), "3 tokens were given for a cache that holds 0");
    let error = tree.cache(&tokens(301), 300).err().unwrap();
    assert!(matches!(error, Error::CacheFull { capacity: 300, wanted: 301 }), "{error}");
    assert!(
        PrefixTree::new(
            CacheShape { head_dim: 24, ..SHAPE },
            kv_dtype("f32+rotate").unwrap(),
            Kernels::best(),
            0
        )
        .is_err()
    );
}

/// Tokens as names of pages: what a sequence of whole pages consists of.
type Path = Vec<u8>;

fn path_tokens(path: &[u8]) -> Vec<u32> {
    path.iter().flat_map(|&name| [u32::from(name); PAGE_TOKENS]).collect()
}

/// Appends the rows of `path` that `cache`, of one head, lacks; they depend on all that is before them.
fn grow(cache: &mut KvCache, path: &[u8]) {
    for page in cache.len() / PAGE_TOKENS..path.len() {
        let seed = path[..=page].iter().fold(1, |seed, &name| seed * 5 + u32::from(name));
        let (keys, values) = (rows(PAGE_TOKENS, 8, 2 * seed), rows(PAGE_TOKENS, 8, 2 * seed + 1));
        cache.head_mut(0, 0).append(&keys, &values).unwrap();
        cache.set_len((page + 1) * PAGE_TOKENS).unwrap();
    }
}

/// All prefixes in a list, with the time of their last use.
#[derive(Default)]
struct Model {
    clock: u64,
    stamps: BTreeMap<Path, u64>,
}

impl Model {
    fn longest(&self, path: &[u8]) -> usize {
        (1..=path.len()).take_while(|&n| self.stamps.contains_key(&path[..n])).count()
    }

    fn touch(&mut self, path: &[u8]) {
        self.clock += 1;
        for n in 1..=path.len() {
            self.stamps.insert(path[..n].to_vec(), self.clock);
        }
    }

    fn trim(&mut self, pages: usize, live: &[Live]) {
        while self.stamps.len() > pages {
            let tail = |path: &&Path| {
                let goes_on = self.stamps.keys().any(|p| p.len() > path.len() && p.starts_with(path));
                !goes_on && !live.iter().any(|l| l.lease == **path)
            };
            let Some(oldest) = self.stamps.keys().filter(tail).min_by_key(|p| self.stamps[*p]).cloned()
            else {
                return;
            };
            self.stamps.remove(&oldest);
        }
    }
}

/// Where the pages of a cache of one head are.
fn addresses(cache: &KvCache) -> Vec<usize> {
    let head = cache.head(0, 0);
    let pages = head.sides().into_iter().flat_map(|side| side.held_pages());
    pages.map(|page| page.as_ptr() as usize).collect()
}

struct Live {
    path: Path,
    lease: Path,
    cache: KvCache,
}

#[derive(Clone, Debug)]
enum Step {
    Start(Path),
    Insert(usize),
    Fork(usize, Path),
    Rewind(usize, usize),
    Drop(usize),
    Trim(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let path = |n| prop::collection::vec(0u8..3, n);
    prop_oneof![
        3 => path(0..5).prop_map(Step::Start),
        4 => any::<usize>().prop_map(Step::Insert),
        2 => (any::<usize>(), path(0..3)).prop_map(|(i, path)| Step::Fork(i, path)),
        1 => (any::<usize>(), 0usize..4).prop_map(|(i, n)| Step::Rewind(i, n)),
        2 => any::<usize>().prop_map(Step::Drop),
        1 => (0usize..8).prop_map(Step::Trim),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_tree_is_a_list_of_prefixes(budget in 3usize..12, steps in prop::collection::vec(step(), 1..80)) {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: 8, capacity: 0 };
        let dtype = kv_dtype("f32").unwrap();
        let unit = 2 * dtype.keys.page_bytes(8) as u64;
        let mut tree = PrefixTree::new(shape, dtype, Kernels::best(), budget as u64 * unit).unwrap();
        let (mut model, mut live) = (Model::default(), Vec::<Live>::new());
        for step in steps {
            match step {
                Step::Start(path) => {
                    let held = model.longest(&path);
                    prop_assert_eq!(tree.longest(&path_tokens(&path)), held * PAGE_TOKENS);
                    let mut cache = tree.cache(&path_tokens(&path), 8 * PAGE_TOKENS).unwrap();
                    prop_assert_eq!(cache.len(), held * PAGE_TOKENS);
                    model.touch(&path[..held]);
                    grow(&mut cache, &path);
                    live.push(Live { lease: path[..held].to_vec(), path, cache });
                }
                Step::Trim(pages) => {
                    tree.trim(pages as u64 * unit);
                    model.trim(pages, &live);
                }
                _ if live.is_empty() => {}
                Step::Insert(i) => {
                    let l = &live[i % live.len()];
                    let kept = tree.insert(&path_tokens(&l.path), &l.cache).unwrap();
                    model.touch(&l.path);
                    model.trim(budget, &live);
                    prop_assert_eq!(kept, model.longest(&l.path) * PAGE_TOKENS);
                }
                Step::Fork(i, more) => {
                    let l = &live[i % live.len()];
                    let path: Path = l.path.iter().chain(&more).copied().take(8).collect();
                    let mut cache = l.cache.fork().unwrap();
                    grow(&mut cache, &path);
                    live.push(Live { path, lease: l.lease.clone(), cache });
                }
                Step::Rewind(i, n) => {
                    let i = i % live.len();
                    live[i].cache.truncate(n * PAGE_TOKENS);
                    live[i].path.truncate(n);
                }
                Step::Drop(i) => {
                    live.swap_remove(i % live.len());
                }
            }
            let memory = tree.memory();
            prop_assert_eq!(memory.tokens as usize, model.stamps.len() * PAGE_TOKENS);
            prop_assert_eq!(memory.page_bytes, memory.tokens / PAGE_TOKENS as u64 * unit);
            prop_assert_eq!(memory.page_bytes, tree.trim(u64::MAX));
            // The pool counts each page once, whoever holds it.
            let mut pages = BTreeSet::new();
            for l in &live {
                pages.extend(addresses(&l.cache));
            }
            pages.extend(tree.units().flat_map(Unit::pages).map(|page| page.as_ptr() as usize));
            prop_assert_eq!(tree.pool().usage().pages, pages.len() as u64);
        }
        for l in live {
            let mut alone = KvCache::new(CacheShape { capacity: 2048, ..shape }, dtype, Kernels::best()).unwrap();
            grow(&mut alone, &l.path);
            prop_assert!(bytes(&l.cache.head(0, 0)) == bytes(&alone.head(0, 0)));
        }
        tree.trim(0);
        prop_assert_eq!(tree.pool().usage(), PoolUsage::default());
    }
}
