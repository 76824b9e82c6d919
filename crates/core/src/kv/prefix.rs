//! Prefixes that sequences may begin with: a radix tree over runs of tokens, in whole pages.
//!
//! A node holds a run of [`Unit`]s, each the pages of [`PAGE_TOKENS`] tokens in all layers and heads; its children go on
//! with different tokens. Prefixes are found page by page, a node is split where sequences part, and what was not used
//! for longest is evicted first, from the tail (RadixAttention, arXiv 2312.07104; the pages of vLLM, arXiv 2309.06180).
//! Time is a count of calls, so that the same calls evict the same pages.

use std::collections::BTreeMap;

use longbit_kernels::Kernels;

use super::pool::{Page, PagePool, give_back};
use super::unit::{Lease, Unit};
use super::{CacheShape, KvCache, KvDtype, PAGE_TOKENS};
use crate::error::{Error, Result};

const ROOT: usize = 0;

#[derive(Default)]
struct Node {
    parent: usize,
    /// By the tokens of their first unit.
    children: BTreeMap<Box<[u32]>, usize>,
    /// None in the root and in a node that is free.
    units: Vec<Unit>,
    lease: Lease,
    /// When it was last used.
    stamp: u64,
}

/// What a [`PrefixTree`] holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixMemory {
    /// Tokens, whole pages of them; tokens that several prefixes begin with count once.
    pub tokens: u64,
    /// Runs of tokens between two places where prefixes part or end.
    pub nodes: u64,
    /// How many of those a living sequence began with.
    pub leased: u64,
    /// Pages.
    pub pages: u64,
    /// How many of them sequences hold too.
    pub shared_pages: u64,
    /// Bytes of all pages.
    pub page_bytes: u64,
    /// Bytes of rows that are kept exactly.
    pub exact_bytes: u64,
}

/// Pages of finished or running sequences, found by their tokens.
///
/// All rows under the same tokens must be the same: those of one model, computed alike. [`crate::PrefixCache`] sees to
/// that for sessions; this tree knows caches only.
pub struct PrefixTree {
    pool: PagePool,
    shape: CacheShape,
    dtype: KvDtype,
    kernels: &'static Kernels,
    budget: u64,
    /// Bytes of all units.
    bytes: u64,
    clock: u64,
    nodes: Vec<Node>,
    free: Vec<usize>,
}

impl PrefixTree {
    /// An empty tree of prefixes for caches of `shape` (whatever their capacity) and `dtype`, which holds about `budget`
    /// bytes at most: more only as long as living sequences began with all of it.
    ///
    /// # Errors
    /// When `dtype` cannot store rows of this head dimension.
    pub fn new(shape: CacheShape, dtype: KvDtype, kernels: &'static Kernels, budget: u64) -> Result<Self> {
        dtype.check(shape.head_dim)?;
        let pool = PagePool::default();
        let nodes = vec![Node::default()];
        Ok(PrefixTree { pool, shape, dtype, kernels, budget, bytes: 0, clock: 0, nodes, free: Vec::new() })
    }

    /// Where its pages are counted, and those of the caches that it makes.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Number format of the rows.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// The first tokens of `tokens` that a cache from [`PrefixTree::cache`] begins with: how many, in whole pages.
    pub fn longest(&self, tokens: &[u32]) -> usize {
        self.deepest(tokens).map_or(0, |(node, units)| self.nodes[node].units[units - 1].end())
    }

    /// A cache for `capacity` tokens, counted in the pool of this tree, that begins with the longest known prefix of
    /// `tokens`: its length says how many of them it holds. While the cache lives, or a fork of it, that prefix stays.
    ///
    /// # Errors
    /// More tokens than the capacity, or memory that cannot be had.
    pub fn cache(&mut self, tokens: &[u32], capacity: usize) -> Result<KvCache> {
        if tokens.len() > capacity {
            return Err(Error::CacheFull { capacity, wanted: tokens.len() });
        }
        let shape = CacheShape { capacity, ..self.shape };
        let Some((node, units)) = self.deepest(tokens) else {
            return KvCache::new_in(&self.pool, shape, self.dtype, self.kernels);
        };
        let node = self.split(node, units);
        let path = self.touch(node);
        let units: Vec<&Unit> = path.iter().flat_map(|&node| &self.nodes[node].units).collect();
        let lease = self.nodes[node].lease.clone();
        KvCache::resume(&self.pool, shape, self.dtype, self.kernels, &units, lease)
    }

    /// Keeps the pages of the first tokens of `cache`, which are `tokens`; then evicts what is too much. Returns how many
    /// of them a cache can now begin with: whole pages, as far as exact rows are known that its dtype may need there.
    /// (The newest exact rows are those around the end of `cache`, so that is where another sequence can go on.)
    ///
    /// # Errors
    /// A cache of another shape or dtype, or of fewer tokens. Nothing is changed then.
    pub fn insert(&mut self, tokens: &[u32], cache: &KvCache) -> Result<usize> {
        self.check(tokens, cache)?;
        let heads = cache.read_heads();
        let mut len = tokens.len() / PAGE_TOKENS * PAGE_TOKENS;
        while len > 0 && !heads.iter().flat_map(|h| h.sides()).all(|side| side.knows_exact(len)) {
            len -= PAGE_TOKENS;
        }
        let tokens = &tokens[..len];
        let mut end = ROOT;
        if let Some(&(node, units)) = self.walk(tokens).last() {
            end = self.split(node, units);
        }
        let mut old = Vec::new();
        for node in self.touch(end) {
            for unit in &mut self.nodes[node].units {
                self.bytes -= unit.bytes();
                old.extend(unit.refresh(&heads));
                self.bytes += unit.bytes();
            }
        }
        give_back(old);
        let known = self.nodes[end].units.last().map_or(0, Unit::end);
        if known < len {
            let blocks = tokens.chunks_exact(PAGE_TOKENS).enumerate().skip(known / PAGE_TOKENS);
            let units = blocks.map(|(i, block)| {
                let settled = self.settled((i + 1) * PAGE_TOKENS);
                Unit::new(&self.pool, &heads, i, block).resumable_by_itself(settled)
            });
            end = self.add(end, units.collect());
        }
        if let Some(unit) = self.nodes[end].units.last_mut() {
            self.bytes -= unit.bytes();
            unit.make_resumable(&self.pool, &heads);
            self.bytes += unit.bytes();
        }
        drop(heads);
        self.trim(self.budget);
        Ok(self.longest(tokens))
    }

    /// Changes the budget, and evicts what is too much.
    pub fn set_budget(&mut self, bytes: u64) {
        self.budget = bytes;
        self.trim(bytes);
    }

    /// Evicts what was not used for longest until no more than `bytes` are held, or sequences live that began with all of
    /// it. Returns how many bytes are held. Pages that a sequence holds too stay with it.
    pub fn trim(&mut self, bytes: u64) -> u64 {
        let mut pages = Vec::new();
        while self.bytes > bytes {
            let leaves = (ROOT + 1..self.nodes.len()).filter(|&i| self.is_evictable(i));
            // Of leaves used in the same call one lies on the path of the other, which is no leaf: stamps decide.
            let Some(leaf) = leaves.min_by_key(|&i| self.nodes[i].stamp) else { break };
            while self.bytes > bytes
                && let Some(unit) = self.nodes[leaf].units.pop()
            {
                self.bytes -= unit.bytes();
                pages.extend(unit.into_pages());
            }
            self.prune(leaf, &mut pages);
        }
        give_back(pages);
        self.bytes
    }

    /// What it holds.
    pub fn memory(&self) -> PrefixMemory {
        let mut sum = PrefixMemory::default();
        for node in self.nodes.iter().filter(|node| !node.units.is_empty()) {
            sum.nodes += 1;
            sum.leased += u64::from(node.lease.held());
            for unit in &node.units {
                sum.tokens += PAGE_TOKENS as u64;
                sum.exact_bytes += unit.exact_bytes();
                for page in unit.pages() {
                    sum.pages += 1;
                    sum.shared_pages += u64::from(page.is_shared());
                    sum.page_bytes += page.len() as u64;
                }
            }
        }
        sum
    }

    #[cfg(test)]
    pub(super) fn units(&self) -> impl Iterator<Item = &Unit> {
        self.nodes.iter().flat_map(|node| &node.units)
    }

    fn check(&self, tokens: &[u32], cache: &KvCache) -> Result<()> {
        let shape = |s: CacheShape| CacheShape { capacity: 0, ..s };
        if shape(cache.shape()) != shape(self.shape) || cache.dtype() != self.dtype {
            let say = |s: CacheShape, dtype| {
                format!("{} layers of {} heads of {} numbers in {dtype}", s.layers, s.kv_heads, s.head_dim)
            };
            return Err(Error::Invalid(format!(
                "a cache of {} does not fit among prefixes of {}",
                say(cache.shape(), cache.dtype()),
                say(self.shape, self.dtype)
            )));
        }
        if cache.has_evicted() {
            return Err(Error::Invalid("a cache that has evicted tokens is no prefix of another".into()));
        }
        if tokens.len() > cache.len() {
            let (n, held) = (tokens.len(), cache.len());
            return Err(Error::Invalid(format!("{n} tokens were given for a cache that holds {held}")));
        }
        Ok(())
    }

    fn settled(&self, len: usize) -> [usize; 2] {
        [self.dtype.keys, self.dtype.values].map(|side| side.codec().settled(len))
    }

    /// The nodes that `tokens` leads through, with how many of their units match: all, but for the last.
    fn walk(&self, tokens: &[u32]) -> Vec<(usize, usize)> {
        let blocks: Vec<&[u32]> = tokens.chunks_exact(PAGE_TOKENS).collect();
        let (mut rest, mut at, mut path) = (blocks.as_slice(), ROOT, Vec::new());
        while let Some(&next) = rest.first().and_then(|&block| self.nodes[at].children.get(block)) {
            let units = &self.nodes[next].units;
            let same = units.iter().zip(rest).take_while(|(unit, block)| unit.tokens() == **block).count();
            path.push((next, same));
            if same < units.len() {
                break;
            }
            (rest, at) = (&rest[same..], next);
        }
        path
    }

    /// The last unit that a sequence which begins with `tokens` can go on from: its node, and units up to it.
    fn deepest(&self, tokens: &[u32]) -> Option<(usize, usize)> {
        self.walk(tokens).into_iter().rev().find_map(|(node, same)| {
            let units = &self.nodes[node].units[..same];
            Some((node, units.iter().rposition(Unit::resumable)? + 1))
        })
    }

    /// Splits `node` behind its first `units`, unless it ends there; returns the node that does.
    fn split(&mut self, node: usize, units: usize) -> usize {
        if units == self.nodes[node].units.len() {
            return node;
        }
        // The rest stays where it is: it is what leases of this node are for.
        let rest = self.nodes[node].units.split_off(units);
        let first = std::mem::replace(&mut self.nodes[node].units, rest);
        let (parent, stamp) = (self.nodes[node].parent, self.nodes[node].stamp);
        let upper = self.place(Node { parent, units: first, stamp, ..Node::default() });
        self.nodes[node].parent = upper;
        self.link(upper, node);
        self.link(parent, upper);
        upper
    }

    fn link(&mut self, parent: usize, child: usize) {
        let key = self.nodes[child].units[0].tokens().into();
        self.nodes[parent].children.insert(key, child);
    }

    fn place(&mut self, node: Node) -> usize {
        if let Some(at) = self.free.pop() {
            self.nodes[at] = node;
            return at;
        }
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Makes a child of `parent`, used now.
    fn add(&mut self, parent: usize, units: Vec<Unit>) -> usize {
        self.bytes += units.iter().map(Unit::bytes).sum::<u64>();
        let node = self.place(Node { parent, units, stamp: self.clock, ..Node::default() });
        self.link(parent, node);
        node
    }

    /// Marks `node` and what leads to it as used now; returns all those nodes, from the first token on.
    fn touch(&mut self, node: usize) -> Vec<usize> {
        self.clock += 1;
        let mut path = Vec::new();
        let mut at = node;
        while at != ROOT {
            self.nodes[at].stamp = self.clock;
            path.push(at);
            at = self.nodes[at].parent;
        }
        path.reverse();
        path
    }

    fn is_evictable(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        !node.units.is_empty() && node.children.is_empty() && !node.lease.held()
    }

    /// Removes what no sequence can go on from at the end of `node`, `node` if nothing is left of it, and the same above it.
    fn prune(&mut self, node: usize, pages: &mut Vec<Page>) {
        let mut at = node;
        while at != ROOT && self.nodes[at].children.is_empty() && !self.nodes[at].lease.held() {
            while let Some(unit) = self.nodes[at].units.pop_if(|unit| !unit.resumable()) {
                self.bytes -= unit.bytes();
                pages.extend(unit.into_pages());
            }
            if !self.nodes[at].units.is_empty() {
                return;
            }
            let parent = std::mem::take(&mut self.nodes[at]).parent;
            self.free.push(at);
            self.nodes[parent].children.retain(|_, child| *child != at);
            at = parent;
        }
    }
}

impl Drop for PrefixTree {
    fn drop(&mut self) {
        let units = self.nodes.iter_mut().flat_map(|node| std::mem::take(&mut node.units));
        give_back(units.flat_map(Unit::into_pages));
    }
}
