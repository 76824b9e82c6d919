//! Pages that several sequences may share, and the count of what they take.
//!
//! A page belongs to whoever holds it: sequences, and trees of prefixes. Nobody writes to a page that is held twice: the
//! writer puts a copy of its own in its place first. The last holder gives the memory back to the system.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use longbit_kernels::Kernels;
use longbit_sys::{Arena, Segment, SharedSegment};

use super::PAGE_TOKENS;
use super::cache::SLACK;
use crate::error::Result;

/// Counts the pages of caches that may share them; a clone counts the same ones. A page that many share is one page.
#[derive(Clone, Debug, Default)]
pub struct PagePool(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    pages: AtomicU64,
    page_bytes: AtomicU64,
    exact_bytes: AtomicU64,
    copies: AtomicU64,
}

/// What the caches of a pool take together, and the trees of prefixes that hold pages of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Pages, each counted once, however many share it.
    pub pages: u64,
    /// Bytes of those pages.
    pub page_bytes: u64,
    /// Bytes for rows that are kept exactly; they are never shared between sequences.
    pub exact_bytes: u64,
    /// Pages that were copied since the pool was made, for their writer shared them.
    pub copies: u64,
}

impl PagePool {
    /// What lives now.
    pub fn usage(&self) -> PoolUsage {
        let [pages, page_bytes, exact_bytes, copies] =
            [&self.0.pages, &self.0.page_bytes, &self.0.exact_bytes, &self.0.copies].map(|n| n.load(Relaxed));
        PoolUsage { pages, page_bytes, exact_bytes, copies }
    }

    /// Whether `other` counts the same pages.
    pub fn is(&self, other: &PagePool) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Counts `bytes` of exact rows for as long as the result lives.
    pub(super) fn exact(&self, bytes: usize) -> Tally {
        self.0.exact_bytes.fetch_add(bytes as u64, Relaxed);
        Tally { pool: self.clone(), bytes: bytes as u64, page: false }
    }

    fn page(&self, segment: Segment) -> Page {
        let bytes = segment.len() as u64;
        self.0.pages.fetch_add(1, Relaxed);
        self.0.page_bytes.fetch_add(bytes, Relaxed);
        SharedSegment::new(segment, Tally { pool: self.clone(), bytes, page: true })
    }
}

/// Counted in a pool until it is dropped.
pub(super) struct Tally {
    pool: PagePool,
    bytes: u64,
    page: bool,
}

impl Drop for Tally {
    fn drop(&mut self) {
        let counts = &self.pool.0;
        if self.page {
            counts.pages.fetch_sub(1, Relaxed);
            counts.page_bytes.fetch_sub(self.bytes, Relaxed);
        } else {
            counts.exact_bytes.fetch_sub(self.bytes, Relaxed);
        }
    }
}

/// [`PAGE_TOKENS`] encoded rows of one side of one (layer, KV head), and their mean if the side is centred.
pub(super) type Page = SharedSegment<Tally>;

/// Lets go of `pages`, and gives the memory of those that nobody else holds back to the system.
pub(super) fn give_back(pages: impl IntoIterator<Item = Page>) {
    Segment::release(unshared(pages).collect());
}

fn unshared(pages: impl IntoIterator<Item = Page>) -> impl Iterator<Item = Segment> {
    pages.into_iter().filter_map(Page::into_inner).map(|(segment, _)| segment)
}

/// The bytes of a page that nobody else holds.
fn own(page: &mut Page) -> &mut [u8] {
    match page.get_mut() {
        Some(bytes) => bytes,
        None => unreachable!("a page is written to while another sequence reads it"),
    }
}

/// Rows that move together: within a page, into a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    /// First row where they are.
    pub(super) from: usize,
    /// First row where they go; not behind `from`.
    pub(super) to: usize,
    pub(super) len: usize,
}

impl Move {
    fn page_from(&self) -> usize {
        self.from / PAGE_TOKENS
    }

    fn page_to(&self) -> usize {
        self.to / PAGE_TOKENS
    }

    /// The moves that leave the rows `kept`, ascending and disjoint, one after another.
    pub(super) fn list(kept: &[Range<usize>]) -> Vec<Move> {
        let (mut moves, mut to) = (Vec::new(), 0);
        for span in kept {
            let mut from = span.start;
            while from < span.end {
                let room = (PAGE_TOKENS - from % PAGE_TOKENS).min(PAGE_TOKENS - to % PAGE_TOKENS);
                let len = room.min(span.end - from);
                moves.push(Move { from, to, len });
                (from, to) = (from + len, to + len);
            }
        }
        moves
    }
}

/// What one cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvMemory {
    /// Pages.
    pub pages: u64,
    /// How many of them others hold too.
    pub shared_pages: u64,
    /// Bytes of all pages.
    pub page_bytes: u64,
    /// Bytes of the shared ones.
    pub shared_bytes: u64,
    /// Bytes for rows that are kept exactly.
    pub exact_bytes: u64,
}

/// Memory of a side.
pub(super) struct Memory {
    pool: PagePool,
    /// Pages that hold tokens, each with its mean behind the rows; and what a rewind has left.
    pages: Vec<Page>,
    /// Pages to come, as they lie one after another.
    spare: VecDeque<Segment>,
    page_bytes: usize,
    /// Most pages that tokens may take.
    capacity: usize,
    /// The first rows, then a ring of the newest.
    pub(super) exact: Segment,
    _exact: Tally,
}

impl Memory {
    /// `pages`, which may be shared, then `spare` ones, and room for exact rows.
    pub(super) fn new(
        pool: &PagePool,
        capacity: usize,
        page_bytes: usize,
        pages: Vec<Page>,
        spare: VecDeque<Segment>,
        exact: Segment,
    ) -> Self {
        let _exact = pool.exact(exact.len());
        Memory { pool: pool.clone(), pages, spare, page_bytes, capacity, exact, _exact }
    }

    /// Most pages that tokens may take.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(super) fn page(&self, page: usize) -> &[u8] {
        &self.pages[page]
    }

    /// Requests what leads to the bytes of `pages`, as many as there are.
    pub(super) fn request(&self, kernels: &Kernels, pages: Range<usize>) {
        let all = self.pages.len();
        kernels.request_values(&self.pages[pages.start.min(all)..pages.end.min(all)]);
    }

    /// A page that [`Memory::make_room`] has made writable.
    pub(super) fn page_mut(&mut self, page: usize) -> &mut [u8] {
        own(&mut self.pages[page])
    }

    /// Makes the pages of the rows `tokens` writable, those before them kept: there is a page for each of them, and nobody
    /// else holds it.
    ///
    /// # Errors
    /// When memory cannot be had; what is cached stays as it was.
    pub(super) fn make_room(&mut self, tokens: Range<usize>) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        let first = tokens.start / PAGE_TOKENS;
        for page in first..tokens.end.div_ceil(PAGE_TOKENS) {
            if self.pages.get_mut(page).is_some_and(|page| !page.is_shared()) {
                continue;
            }
            let mut fresh = match self.spare.pop_front() {
                Some(segment) => segment,
                // A sequence that copies a page needs one more than it was made with.
                None => Segment::new(self.page_bytes)?,
            };
            let Some(shared) = self.pages.get_mut(page) else {
                self.pages.push(self.pool.page(fresh));
                continue;
            };
            if page == first && !tokens.start.is_multiple_of(PAGE_TOKENS) {
                fresh.copy_from_slice(shared);
                self.pool.0.copies.fetch_add(1, Relaxed);
            }
            give_back([std::mem::replace(shared, self.pool.page(fresh))]);
        }
        Ok(())
    }

    /// Lets go of shared pages behind the first `keep`; pages of its own stay, to be written again. Returns how many pages
    /// from the first on are as they were.
    pub(super) fn truncate(&mut self, keep: usize) -> usize {
        let shared = Page::is_shared;
        let behind = self.pages.iter().skip(keep);
        let kept = behind.take_while(|page| !shared(page)).count() + keep.min(self.pages.len());
        let (shared, own): (Vec<_>, Vec<_>) = self.pages.drain(kept..).partition(shared);
        self.pages.extend(own);
        give_back(shared);
        kept
    }

    /// Memory that [`Memory::retain`] needs: a fresh page for each that rows move into while others hold it.
    ///
    /// # Errors
    /// When memory cannot be had; what is cached stays as it was.
    pub(super) fn fresh_pages(&mut self, moves: &[Move]) -> Result<Vec<Option<Segment>>> {
        let count = moves.last().map_or(0, |run| run.page_to() + 1);
        let wanted: Vec<bool> = (0..count)
            .map(|page| {
                let stays = moves.iter().filter(|run| run.page_to() == page).all(|run| run.from == run.to);
                !stays && self.pages[page].is_shared()
            })
            .collect();
        // One map for all of them: many small ones would use up those that a process may have. Spare pages are left to the
        // tokens that follow.
        let fresh = wanted.iter().filter(|wanted| **wanted).count();
        let mut arena = Arena::new(fresh * self.page_bytes.next_multiple_of(SLACK), false)?;
        let page_bytes = self.page_bytes;
        let mut take = || match arena.take(page_bytes) {
            Some(segment) => Ok(segment),
            None => Segment::new(page_bytes),
        };
        wanted.into_iter().map(|wanted| Ok(if wanted { Some(take()?) } else { None })).collect()
    }

    /// Moves rows together, and gives the pages back that are left over. Pages in which nothing moves stay, shared or not.
    /// `parts` says where the bytes of some rows lie in a page.
    pub(super) fn retain(
        &mut self,
        moves: &[Move],
        mut fresh: Vec<Option<Segment>>,
        parts: impl Fn(&[u8], Range<usize>) -> [Range<usize>; 3],
    ) {
        for run in moves {
            let (to, from) = (run.to % PAGE_TOKENS, run.from % PAGE_TOKENS);
            let fresh = &mut fresh[run.page_to()];
            if run.from == run.to && fresh.is_none() {
                continue;
            }
            // Rows move towards the front, so what a page held has moved on before others move in.
            let (before, behind) = self.pages.split_at_mut(run.page_from());
            let whole = &behind[0];
            let pairs = parts(whole, to..to + run.len).into_iter().zip(parts(whole, from..from + run.len));
            let target = match (fresh, before.get_mut(run.page_to())) {
                (Some(fresh), _) => Some(&mut **fresh),
                (None, Some(page)) => Some(own(page)),
                (None, None) => None,
            };
            match target {
                Some(target) => {
                    pairs.for_each(|(to, from)| target[to].copy_from_slice(&whole[from]));
                }
                None => {
                    let pairs: Vec<_> = pairs.collect();
                    let page = own(&mut behind[0]);
                    pairs.into_iter().for_each(|(to, from)| page.copy_within(from, to.start));
                }
            }
        }
        let mut left = self.pages.split_off(fresh.len());
        for (page, segment) in self.pages.iter_mut().zip(fresh) {
            left.extend(segment.map(|segment| std::mem::replace(page, self.pool.page(segment))));
        }
        give_back(left);
    }

    /// Makes a page writable that holds rows.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub(super) fn make_own(&mut self, page: usize) -> Result<()> {
        if self.pages[page].is_shared() {
            let mut fresh = Segment::new(self.page_bytes)?;
            fresh.copy_from_slice(&self.pages[page]);
            self.pool.0.copies.fetch_add(1, Relaxed);
            give_back([std::mem::replace(&mut self.pages[page], self.pool.page(fresh))]);
        }
        Ok(())
    }

    /// Page `page`, to be shared.
    pub(super) fn share(&self, page: usize) -> Page {
        self.pages[page].clone()
    }

    #[cfg(test)]
    pub(super) fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// Adds what it holds to `sum`.
    pub(super) fn count(&self, sum: &mut KvMemory) {
        for page in &self.pages {
            let shared = u64::from(page.is_shared());
            sum.pages += 1;
            sum.shared_pages += shared;
            sum.page_bytes += page.len() as u64;
            sum.shared_bytes += shared * page.len() as u64;
        }
        sum.exact_bytes += self.exact.len() as u64;
    }

    /// All memory that nobody else holds.
    pub(super) fn into_unshared(self) -> impl Iterator<Item = Segment> {
        unshared(self.pages).chain(self.spare).chain([self.exact])
    }
}
