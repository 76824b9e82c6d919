//! One side, keys or values, of one (layer, KV head): encoded pages, and rows that are kept exactly.
//!
//! Token `t` lies in one of three places: the first [`SideDtype::exact_first`] tokens and the newest ones, which the codec
//! has not settled, are kept exactly; the others are encoded in page `t / PAGE_TOKENS`. Which tokens are settled, and
//! every encoded byte, depend on nothing but the rows and how many there are: appending one by one, in pieces or all
//! at once gives the same bytes.
//!
//! Here is what happens to the rows; `exact` has those that are kept exactly, `centre` the means of pages, `read` what
//! attention asks for.

mod centre;
mod exact;
mod read;

pub(super) use exact::{EXACT, exact_row_bytes};
pub(super) use read::Place;

use longbit_kernels::Kernels;
use longbit_sys::Segment;

use super::pool::{KvMemory, Memory, Move, Page};
use super::{Codec, PAGE_TOKENS, SideDtype};
use crate::error::Result;

pub(super) struct Side {
    dtype: SideDtype,
    head_dim: usize,
    memory: Memory,
    /// Cached tokens.
    len: usize,
    /// Tokens of which the pages hold the rows.
    settled: usize,
    /// Oldest token whose row the ring holds.
    ring_from: usize,
    /// The exact rows of tokens from here on may be those that a page gave back.
    true_until: usize,
    /// Sums of the decoded rows of the page that the last settled token lies in; of a centred side.
    sums: Vec<f32>,
    /// Settled tokens that `sums` takes into account; none after a rewind.
    summed: Option<usize>,
    /// Pages that have their mean.
    means: usize,
    /// Rows on their way from the ring.
    room: Vec<f32>,
    /// Decoded rows.
    room2: Vec<f32>,
    /// Rows less their mean.
    less: Vec<f32>,
}

/// Rows of room that stay from one append to the next: a prompt would leave as much in every head as its chunks are long.
const KEPT_ROWS: usize = 4;

/// Room for rows of `d` numbers, given back if it is more than a step needs.
pub(super) fn kept(room: Vec<f32>, d: usize) -> Vec<f32> {
    if room.capacity() > KEPT_ROWS * d { Vec::new() } else { room }
}

impl Side {
    pub(super) fn new(dtype: SideDtype, head_dim: usize, memory: Memory) -> Self {
        let sums = if dtype.centre() { vec![0.0; head_dim] } else { Vec::new() };
        Side {
            dtype,
            head_dim,
            memory,
            len: 0,
            settled: 0,
            ring_from: 0,
            true_until: usize::MAX,
            sums,
            summed: None,
            means: 0,
            room: Vec::new(),
            room2: Vec::new(),
            less: Vec::new(),
        }
    }

    pub(super) fn dtype(&self) -> SideDtype {
        self.dtype
    }

    /// Tokens that there may be.
    pub(super) fn capacity(&self) -> usize {
        self.memory.capacity() * PAGE_TOKENS
    }

    pub(super) fn memory(self) -> Memory {
        self.memory
    }

    #[cfg(test)]
    pub(super) fn held_pages(&self) -> &[Page] {
        self.memory.pages()
    }

    /// Adds what it holds to `sum`.
    pub(super) fn count(&self, sum: &mut KvMemory) {
        self.memory.count(sum);
    }

    /// Numbers a row.
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    pub(super) fn codec(&self) -> &'static dyn Codec {
        self.dtype.codec()
    }

    /// The rows of a page.
    pub(super) fn encoded(&self, page: usize) -> &[u8] {
        &self.memory.page(page)[..self.codec().page_bytes(self.head_dim)]
    }

    /// Makes the pages that [`Side::append`] of `n` rows writes to this side's own.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub(super) fn make_room(&mut self, n: usize) -> Result<()> {
        self.memory.make_room(self.settled..self.codec().settled(self.len + n))
    }

    /// Appends `rows`, `[n][head_dim]`; the caller has checked that they fit and are finite, and has made room for them.
    pub(super) fn append(&mut self, kernels: &Kernels, rows: &[f32]) {
        let d = self.head_dim;
        let n = rows.len() / d;
        let first = self.dtype.exact_first();
        if self.len < first {
            let take = n.min(first - self.len);
            self.keep_exactly(kernels, &rows[..take * d], self.len);
        }
        if self.ring() == 0 {
            self.len += n;
            self.encode(kernels, rows);
            return;
        }
        // As many at a time as the ring can take up without losing a row that is not settled.
        for rows in rows.chunks((self.ring() - self.codec().unsettled()) * d) {
            for row in rows.chunks_exact(d) {
                self.keep_exactly(kernels, row, self.ring_row(self.len));
                self.len += 1;
            }
            self.ring_from = self.ring_from.max(self.len.saturating_sub(self.ring()));
            self.settle(kernels);
        }
    }

    /// Encodes what has become settled, from the ring.
    fn settle(&mut self, kernels: &Kernels) {
        let d = self.head_dim;
        let until = self.codec().settled(self.len);
        if until <= self.settled {
            return;
        }
        let mut room = std::mem::take(&mut self.room);
        room.clear();
        room.resize((until - self.settled) * d, 0.0);
        for (token, out) in (self.settled..until).zip(room.chunks_exact_mut(d)) {
            self.exact_row(kernels, self.ring_row(token), out);
        }
        self.encode(kernels, &room);
        self.room = kept(room, d);
    }

    /// Encodes `rows` of the tokens that follow the settled ones.
    fn encode(&mut self, kernels: &Kernels, rows: &[f32]) {
        let (d, codec, centre) = (self.head_dim, self.codec(), self.dtype.centre());
        // Rows that are only ever read where they are kept exactly; a group is encoded whole.
        let unread = if codec.group() == 1 { self.dtype.exact_first() } else { 0 };
        let mut rest = rows;
        while !rest.is_empty() {
            let (page, row) = (self.settled / PAGE_TOKENS, self.settled % PAGE_TOKENS);
            let end = if self.settled < unread { unread } else { (page + 1) * PAGE_TOKENS };
            let (rows, others) = rest.split_at((end - self.settled).min(rest.len() / d) * d);
            rest = others;
            let n = rows.len() / d;
            if self.settled >= unread {
                if centre && (row == 0 || self.settled == unread) {
                    self.begin_page(kernels, page);
                }
                self.encode_in_page(kernels, rows, page, row);
            }
            let before = self.settled;
            self.settled += n;
            if centre && before >= unread {
                match self.summed {
                    Some(summed) if summed == before => self.add_to_sums(kernels, before..self.settled),
                    _ => self.summed = None,
                }
            }
        }
    }

    /// Forgets every token from `len` on.
    pub(super) fn truncate(&mut self, kernels: &Kernels, len: usize) {
        if len >= self.len {
            return;
        }
        let until = self.codec().settled(len);
        // Rows that are exact again but have left the ring come back from the pages, as they are read there.
        let lost = until..self.settled.min(len).min(self.ring_from).max(until);
        if !lost.is_empty() {
            let d = self.head_dim;
            let mut rows = vec![0.0; lost.len() * d];
            self.decode(kernels, lost.clone(), &mut rows);
            for (token, row) in lost.zip(rows.chunks_exact(d)) {
                self.keep_exactly(kernels, row, self.ring_row(token));
            }
            self.ring_from = until;
            self.true_until = until.min(self.true_until);
        }
        if len <= self.true_until {
            self.true_until = usize::MAX;
        }
        (self.len, self.settled) = (len, until);
        // The page that goes on keeps its mean, which comes from rows before it.
        let pages = if len < self.dtype.exact_first() { 0 } else { until / PAGE_TOKENS + 1 };
        let kept = self.memory.truncate(until.div_ceil(PAGE_TOKENS));
        self.means = self.means.min(pages).min(kept);
        self.summed = None;
    }

    /// The same rows in `memory`, which begins with [`Side::shared`] pages of this side.
    pub(super) fn fork(&self, mut memory: Memory) -> Side {
        memory.exact.copy_from_slice(&self.memory.exact);
        let mut side = Side::new(self.dtype, self.head_dim, memory);
        (side.len, side.settled, side.ring_from) = (self.len, self.settled, self.ring_from);
        side.true_until = self.true_until;
        side.sums.copy_from_slice(&self.sums);
        side.summed = self.summed;
        side.means = self.means.min(self.settled.div_ceil(PAGE_TOKENS));
        side
    }

    /// Memory for [`Side::retain`].
    ///
    /// # Errors
    /// When it cannot be had; nothing is changed then.
    pub(super) fn fresh_pages(&mut self, moves: &[Move]) -> Result<Vec<Option<Segment>>> {
        self.memory.fresh_pages(moves)
    }

    /// Leaves the rows that `moves` lists, byte for byte; [`SideDtype::rows_move`] has said that they may.
    pub(super) fn retain(&mut self, moves: &[Move], fresh: Vec<Option<Segment>>) {
        let (codec, d) = (self.codec(), self.head_dim);
        self.memory.retain(moves, fresh, |page, rows| {
            codec.parts(page, rows, d).map(|part| match part.is_empty() {
                true => 0..0,
                false => {
                    let at = part.as_ptr() as usize - page.as_ptr() as usize;
                    at..at + part.len()
                }
            })
        });
        self.len = moves.iter().map(|run| run.len).sum();
        self.settled = self.len;
    }

    /// Writes another row in the place of `row`, rotated if this side is; rows must be allowed to move.
    ///
    /// # Errors
    /// When there is no memory for the copy of a shared page.
    pub(super) fn replace(&mut self, kernels: &Kernels, row: usize, numbers: &[f32]) -> Result<()> {
        let (page, at) = (row / PAGE_TOKENS, row % PAGE_TOKENS);
        self.memory.make_own(page)?;
        let codec = self.dtype.codec();
        codec.encode(kernels, numbers, self.head_dim, self.memory.page_mut(page), at);
        Ok(())
    }

    /// The pages that a sequence shares that begins with the first `tokens` tokens, which are cached.
    pub(super) fn shared(&self, tokens: usize) -> impl Iterator<Item = Page> {
        (0..tokens.div_ceil(PAGE_TOKENS)).map_while(|page| self.page(page))
    }

    /// A page, to be shared, if any of its rows is encoded.
    pub(super) fn page(&self, page: usize) -> Option<Page> {
        (page * PAGE_TOKENS < self.settled).then(|| self.memory.share(page))
    }

    /// Tokens of which the pages hold the rows.
    pub(super) fn settled(&self) -> usize {
        self.settled
    }
}
