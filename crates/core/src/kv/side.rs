//! One side, keys or values, of one (layer, KV head): encoded pages, and rows that are kept exactly.
//!
//! Token `t` lies in one of three places: the first [`SideDtype::exact_first`] tokens and the newest ones, which the codec
//! has not settled, are kept exactly; the others are encoded in page `t / PAGE_TOKENS`. Which tokens are settled, and
//! every encoded byte, depend on nothing but the rows and how many there are: appending one by one, in pieces or all
//! at once gives the same bytes.

use std::ops::Range;
use std::sync::Arc;

use longbit_kernels::Kernels;
use longbit_sys::Segment;

use super::dtype::exact_row_bytes;
use super::f16::F16;
use super::floats::Floats;
use super::pool::{KvMemory, Memory, Move, Page};
use super::{Codec, KeyCodec, KvScratch, PAGE_TOKENS, Rows, SideDtype, ValueCodec};
use crate::error::Result;

/// How rows are kept that are not encoded.
pub(super) static EXACT: Floats<F16> = Floats::NEW;

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

/// Where the rows of a run lie.
struct Place<'a> {
    exact: bool,
    rows: Rows<'a>,
    /// The mean that was taken off, bfloat16.
    mean: Option<&'a [u16]>,
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
    pub(super) fn held_pages(&self) -> &[Arc<Page>] {
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

    fn ring(&self) -> usize {
        self.dtype.exact_recent()
    }

    /// Row of the exact memory in which the ring keeps `token`.
    fn ring_row(&self, token: usize) -> usize {
        self.dtype.exact_first() + token % self.ring()
    }

    /// Where the run that begins at `start` ends at the latest, as far as this side is concerned.
    pub(super) fn cut(&self, start: usize) -> usize {
        let mut end = (start / PAGE_TOKENS + 1) * PAGE_TOKENS;
        let first = self.dtype.exact_first();
        if start < first {
            end = end.min(first);
        } else if start < self.settled {
            end = end.min(self.settled);
        } else if self.ring() > 0 {
            end = end.min((start / self.ring() + 1) * self.ring());
        }
        end
    }

    fn place(&self, run: &Range<usize>) -> Place<'_> {
        debug_assert!(run.end <= self.len && run.end <= self.cut(run.start), "{run:?}");
        let exact = |row: usize| Place {
            exact: true,
            rows: self.rows(&self.memory.exact, row..row + run.len()),
            mean: None,
        };
        if run.start < self.dtype.exact_first() {
            exact(run.start)
        } else if run.start >= self.settled {
            exact(self.ring_row(run.start))
        } else {
            let page = run.start / PAGE_TOKENS;
            let row = run.start % PAGE_TOKENS;
            Place {
                exact: false,
                rows: self.rows(self.encoded(page), row..row + run.len()),
                mean: self.dtype.centre().then(|| self.mean(page)),
            }
        }
    }

    fn rows<'a>(&self, page: &'a [u8], range: Range<usize>) -> Rows<'a> {
        Rows { page, range, head_dim: self.head_dim, upcoming: &[] }
    }

    /// The rows of a page.
    pub(super) fn encoded(&self, page: usize) -> &[u8] {
        &self.memory.page(page)[..self.codec().page_bytes(self.head_dim)]
    }

    /// The mean of a page of a centred side, bfloat16.
    pub(super) fn mean(&self, page: usize) -> &[u16] {
        bytemuck::cast_slice(&self.memory.page(page)[self.codec().page_bytes(self.head_dim)..])
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
            EXACT.encode(kernels, &rows[..take * d], d, &mut self.memory.exact, self.len);
        }
        if self.ring() == 0 {
            self.len += n;
            self.encode(kernels, rows);
            return;
        }
        // As many at a time as the ring can take up without losing a row that is not settled.
        for rows in rows.chunks((self.ring() - self.codec().unsettled()) * d) {
            for row in rows.chunks_exact(d) {
                let at = self.ring_row(self.len);
                EXACT.encode(kernels, row, d, &mut self.memory.exact, at);
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
            let row = self.ring_row(token);
            EXACT.decode(kernels, &self.rows(&self.memory.exact, row..row + 1), out);
        }
        self.encode(kernels, &room);
        self.room = room;
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

    /// Encodes `rows` within a page, less its mean.
    fn encode_in_page(&mut self, kernels: &Kernels, rows: &[f32], page: usize, row: usize) {
        let (d, codec) = (self.head_dim, self.codec());
        let (bytes, mean) = self.memory.page_mut(page).split_at_mut(codec.page_bytes(d));
        if !self.dtype.centre() {
            codec.encode(kernels, rows, d, bytes, row);
            return;
        }
        let mean: &[u16] = bytemuck::cast_slice(mean);
        self.less.clear();
        for row in rows.chunks_exact(d) {
            self.less.extend(row.iter().zip(mean).map(|(&x, &m)| x - widen(m)));
        }
        codec.encode(kernels, &self.less, d, bytes, row);
    }

    /// Gives a page of a centred side its mean, unless it has it from before a rewind: that of the rows of the page before it,
    /// as they are read; of the rows kept exactly for the first page.
    fn begin_page(&mut self, kernels: &Kernels, page: usize) {
        let start = page * PAGE_TOKENS;
        let exact = page == 0 && self.codec().group() == 1;
        if page >= self.means {
            let rows = if page == 0 { self.dtype.exact_first() } else { PAGE_TOKENS };
            if page == 0 {
                self.sums.fill(0.0);
                self.add_exact_first(kernels);
            } else if self.summed != Some(start) {
                self.sum_page(kernels, page - 1);
            }
            let at = self.codec().page_bytes(self.head_dim);
            let mean: &mut [u16] = bytemuck::cast_slice_mut(&mut self.memory.page_mut(page)[at..]);
            for (m, sum) in mean.iter_mut().zip(&mut self.sums) {
                let mut bits = [0u16];
                kernels.f32_to_bf16(&[*sum / rows as f32], &mut bits);
                *m = bits[0];
            }
            self.means = page + 1;
        }
        self.sums.fill(0.0);
        if exact {
            self.add_exact_first(kernels);
        }
        self.summed = Some(self.settled);
    }

    /// Sums of all rows of a page.
    fn sum_page(&mut self, kernels: &Kernels, page: usize) {
        let unread = if page == 0 && self.codec().group() == 1 { self.dtype.exact_first() } else { 0 };
        self.sums.fill(0.0);
        if unread > 0 {
            self.add_exact_first(kernels);
        }
        self.add_to_sums(kernels, page * PAGE_TOKENS + unread..(page + 1) * PAGE_TOKENS);
    }

    fn add_exact_first(&mut self, kernels: &Kernels) {
        let mut row = vec![0.0; self.head_dim];
        for token in 0..self.dtype.exact_first() {
            EXACT.decode(kernels, &self.rows(&self.memory.exact, token..token + 1), &mut row);
            self.sums.iter_mut().zip(&row).for_each(|(sum, x)| *sum += x);
        }
    }

    /// Adds the encoded rows `tokens`, which lie in one page, as they are read.
    fn add_to_sums(&mut self, kernels: &Kernels, tokens: Range<usize>) {
        let d = self.head_dim;
        let page = tokens.start / PAGE_TOKENS;
        let row = tokens.start % PAGE_TOKENS;
        let mut room = std::mem::take(&mut self.room2);
        room.resize(tokens.len() * d, 0.0);
        let rows = self.rows(self.encoded(page), row..row + tokens.len());
        self.codec().decode(kernels, &rows, &mut room);
        let mut sums = std::mem::take(&mut self.sums);
        let mean = self.mean(page);
        for row in room.chunks_exact(d) {
            for ((sum, &x), &m) in sums.iter_mut().zip(row).zip(mean) {
                *sum += x + widen(m);
            }
        }
        self.sums = sums;
        self.room2 = room;
        self.summed = Some(tokens.end);
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
                let at = self.ring_row(token);
                EXACT.encode(kernels, row, d, &mut self.memory.exact, at);
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
    pub(super) fn shared(&self, tokens: usize) -> impl Iterator<Item = Arc<Page>> {
        (0..tokens.div_ceil(PAGE_TOKENS)).map_while(|page| self.page(page))
    }

    /// A page, to be shared, if any of its rows is encoded.
    pub(super) fn page(&self, page: usize) -> Option<Arc<Page>> {
        (page * PAGE_TOKENS < self.settled).then(|| self.memory.share(page))
    }

    /// Tokens of which the pages hold the rows.
    pub(super) fn settled(&self) -> usize {
        self.settled
    }

    /// Whether the exact rows are known that a sequence of the first `len` tokens keeps.
    pub(super) fn knows_exact(&self, len: usize) -> bool {
        let settled = self.codec().settled(len);
        len <= self.len.min(self.true_until)
            && (settled == len || self.ring_from <= settled)
            && self.dtype.exact_first() <= len
    }

    /// Writes the first exact rows to `out`.
    pub(super) fn first_exact(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(
            &self.memory.exact[..self.dtype.exact_first() * exact_row_bytes(self.head_dim)],
        );
    }

    /// Writes the newest exact rows of a sequence of the first `len` tokens to `out`, which must be known.
    pub(super) fn newest_exact(&self, len: usize, out: &mut Vec<u8>) {
        for token in self.codec().settled(len)..len {
            out.extend_from_slice(&self.memory.exact[self.ring_bytes(token)]);
        }
    }

    fn ring_bytes(&self, token: usize) -> Range<usize> {
        let bytes = exact_row_bytes(self.head_dim);
        let at = self.ring_row(token) * bytes;
        at..at + bytes
    }

    /// Makes an empty side one of `len` tokens, whose pages its memory holds; takes their exact rows off the front of
    /// `first` and `newest`, as [`Side::first_exact`] and [`Side::newest_exact`] wrote them.
    pub(super) fn resume(&mut self, len: usize, first: &mut &[u8], newest: &mut &[u8]) {
        let bytes = exact_row_bytes(self.head_dim);
        let (mine, rest) = first.split_at(self.dtype.exact_first() * bytes);
        *first = rest;
        self.memory.exact[..mine.len()].copy_from_slice(mine);
        (self.len, self.settled) = (len, self.codec().settled(len));
        if self.ring() > 0 {
            self.ring_from = self.settled;
        }
        for token in self.settled..len {
            let (row, rest) = newest.split_at(bytes);
            *newest = rest;
            let at = self.ring_bytes(token);
            self.memory.exact[at].copy_from_slice(row);
        }
        self.means = self.settled.div_ceil(PAGE_TOKENS);
    }

    /// Decodes `tokens` into `out`, `[tokens][head_dim]`, rotated if this side is.
    pub(super) fn decode(&self, kernels: &Kernels, tokens: Range<usize>, out: &mut [f32]) {
        let (d, mut start, mut out) = (self.head_dim, tokens.start, out);
        while start < tokens.end {
            let run = start..tokens.end.min(self.cut(start));
            let (rows, rest) = out.split_at_mut(run.len() * d);
            let place = self.place(&run);
            let codec: &dyn Codec = if place.exact { &EXACT } else { self.codec() };
            codec.decode(kernels, &place.rows, rows);
            if let Some(mean) = place.mean {
                for row in rows.chunks_exact_mut(d) {
                    row.iter_mut().zip(mean).for_each(|(x, &m)| *x += widen(m));
                }
            }
            (start, out) = (run.end, rest);
        }
    }

    /// The bytes that reading `run` touches.
    pub(super) fn parts(&self, run: &Range<usize>) -> impl Iterator<Item = &[u8]> {
        let place = self.place(run);
        let codec: &dyn Codec = if place.exact { &EXACT } else { self.codec() };
        let parts = codec.parts(place.rows.page, place.rows.range, self.head_dim);
        parts.into_iter().chain(place.mean.map(bytemuck::cast_slice)).filter(|part| !part.is_empty())
    }

    /// See [`super::KvHead::scores`].
    pub(super) fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        run: &Range<usize>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let place = self.place(run);
        let codec: &dyn KeyCodec = if place.exact { &EXACT } else { self.dtype.key_codec() };
        codec.scores(kernels, queries, &Rows { upcoming, ..place.rows }, scratch, out);
        self.add_mean(kernels, queries, place.mean, scratch, out);
    }

    /// Adds to scores `[group][n]` what the mean of the page was taken off for.
    fn add_mean(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        mean: Option<&[u16]>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let Some(mean) = mean else { return };
        scratch.mean.resize(self.head_dim, 0.0);
        kernels.bf16_to_f32(mean, &mut scratch.mean);
        scratch.group.clear();
        scratch
            .group
            .extend(queries.chunks_exact(self.head_dim).map(|query| kernels.dot(query, &scratch.mean)));
        kernels.add_to_rows(out, &scratch.group);
    }

    /// As [`Side::parts`], of what [`Side::upper_scores`] reads.
    pub(super) fn upper_parts(&self, run: &Range<usize>) -> impl Iterator<Item = &[u8]> {
        let Place { exact, rows, mean } = self.place(run);
        let parts = match self.dtype.key_codec().upper() {
            Some(upper) if !exact => upper.parts(rows.page, rows.range, self.head_dim),
            _ if exact => EXACT.parts(rows.page, rows.range, self.head_dim),
            _ => self.codec().parts(rows.page, rows.range, self.head_dim),
        };
        parts.into_iter().chain(mean.map(bytemuck::cast_slice)).filter(|part| !part.is_empty())
    }

    /// See [`super::KvHead::upper_scores`].
    pub(super) fn upper_scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        run: &Range<usize>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        (steps, out): (&mut [f32], &mut [f32]),
    ) {
        let place = self.place(run);
        let upper = if place.exact { None } else { self.dtype.key_codec().upper() };
        let Some(upper) = upper else {
            steps.fill(0.0);
            return self.scores(kernels, queries, run, upcoming, scratch, out);
        };
        upper.scores(kernels, queries, &Rows { upcoming, ..place.rows }, scratch, steps, out);
        self.add_mean(kernels, queries, place.mean, scratch, out);
    }

    /// See [`super::KvHead::accumulate`].
    pub(super) fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        run: &Range<usize>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let place = self.place(run);
        let codec: &dyn ValueCodec = if place.exact { &EXACT } else { self.dtype.value_codec() };
        codec.accumulate(kernels, weights, &Rows { upcoming, ..place.rows }, scratch, acc);
        if let Some(mean) = place.mean {
            scratch.mean.resize(self.head_dim, 0.0);
            kernels.bf16_to_f32(mean, &mut scratch.mean);
            for (weights, acc) in weights.chunks_exact(run.len()).zip(acc.chunks_exact_mut(self.head_dim)) {
                let sum = kernels.sum(weights);
                kernels.scale_add(acc, 1.0, &scratch.mean, sum);
            }
        }
    }
}

fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
