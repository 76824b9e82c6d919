//! What a tree of prefixes keeps of [`PAGE_TOKENS`] tokens: their pages, and the exact rows that a sequence needs to go on
//! after them.

use std::ops::Deref;
use std::sync::Arc;

use super::pool::{Page, PagePool, Tally};
use super::{KvHead, PAGE_TOKENS};

/// Held by the sequences that began with a prefix, which is not evicted meanwhile.
#[derive(Clone, Default)]
pub(super) struct Lease(Arc<()>);

impl Lease {
    /// Whether anybody but the tree holds it.
    pub(super) fn held(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// Rows that are kept exactly, of all heads: of each the keys, then the values.
struct Exact {
    bytes: Box<[u8]>,
    _tally: Tally,
}

impl Exact {
    fn new(pool: &PagePool, bytes: Vec<u8>) -> Self {
        Exact { _tally: pool.exact(bytes.len()), bytes: bytes.into() }
    }
}

/// A page of tokens with the pages of all heads.
pub(super) struct Unit {
    tokens: Box<[u32]>,
    /// Tokens from the first of the sequence to the last of the unit.
    end: usize,
    /// `[heads][keys, values]`; none where nothing is settled yet.
    pages: Vec<[Option<Page>; 2]>,
    /// How many rows of the pages are encoded, of the keys and of the values.
    filled: [usize; 2],
    /// Of the first unit: the first rows of the sequence.
    first: Option<Exact>,
    /// The newest rows of a sequence that ends here, if a sequence can go on from here that needs any.
    newest: Option<Exact>,
    /// Whether a sequence can go on from here.
    resumable: bool,
}

impl Unit {
    /// Unit `index` of a sequence whose cache is `heads`.
    pub(super) fn new<H: Deref<Target = KvHead>>(
        pool: &PagePool,
        heads: &[H],
        index: usize,
        tokens: &[u32],
    ) -> Self {
        let mut unit = Unit {
            tokens: tokens.into(),
            end: (index + 1) * PAGE_TOKENS,
            pages: vec![[None, None]; heads.len()],
            filled: [0, 0],
            first: None,
            newest: None,
            resumable: false,
        };
        unit.refresh(heads);
        if index == 0 {
            let mut bytes = Vec::new();
            heads.iter().for_each(|head| head.sides().iter().for_each(|side| side.first_exact(&mut bytes)));
            unit.first = Some(Exact::new(pool, bytes));
        }
        unit
    }

    /// Takes the pages of `heads`, the same tokens, where more of their rows are encoded; returns those that it had.
    pub(super) fn refresh<H: Deref<Target = KvHead>>(&mut self, heads: &[H]) -> Vec<Page> {
        let start = self.end - PAGE_TOKENS;
        let mut old = Vec::new();
        for side in [0, 1] {
            let settled = heads.first().map_or(0, |head| head.sides()[side].settled());
            let filled = settled.clamp(start, self.end) - start;
            if filled > self.filled[side] {
                self.filled[side] = filled;
                for (pages, head) in self.pages.iter_mut().zip(heads) {
                    let page = head.sides()[side].page(start / PAGE_TOKENS);
                    old.extend(std::mem::replace(&mut pages[side], page));
                }
            }
        }
        old
    }

    /// Makes it one that a sequence can go on from, with what `heads` knows; they know the exact rows.
    pub(super) fn make_resumable<H: Deref<Target = KvHead>>(&mut self, pool: &PagePool, heads: &[H]) {
        if !self.resumable {
            let mut bytes = Vec::new();
            for side in heads.iter().flat_map(|head| head.sides()) {
                side.newest_exact(self.end, &mut bytes);
            }
            self.newest = (!bytes.is_empty()).then(|| Exact::new(pool, bytes));
            self.resumable = true;
        }
    }

    /// Marks it as one that a sequence can go on from if that takes no more than pages.
    pub(super) fn resumable_by_itself(mut self, settled: [usize; 2]) -> Self {
        self.resumable |= settled == [self.end; 2];
        self
    }

    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn end(&self) -> usize {
        self.end
    }

    pub(super) fn resumable(&self) -> bool {
        self.resumable
    }

    /// The page of a head and side, if any of its rows are encoded.
    pub(super) fn page(&self, head: usize, side: usize) -> Option<Page> {
        self.pages[head][side].clone()
    }

    /// See [`super::side::Side::first_exact`]; of all heads.
    pub(super) fn first_exact(&self) -> &[u8] {
        self.first.as_ref().map_or(&[], |exact| &exact.bytes)
    }

    /// See [`super::side::Side::newest_exact`]; of all heads.
    pub(super) fn newest_exact(&self) -> &[u8] {
        self.newest.as_ref().map_or(&[], |exact| &exact.bytes)
    }

    pub(super) fn pages(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter().flatten().flatten()
    }

    /// Its pages, to be given back.
    pub(super) fn into_pages(self) -> impl Iterator<Item = Page> {
        self.pages.into_iter().flatten().flatten()
    }

    /// Bytes of its exact rows.
    pub(super) fn exact_bytes(&self) -> u64 {
        (self.first_exact().len() + self.newest_exact().len()) as u64
    }

    /// Bytes of all that it holds.
    pub(super) fn bytes(&self) -> u64 {
        self.pages().map(|page| page.len() as u64).sum::<u64>() + self.exact_bytes()
    }
}
