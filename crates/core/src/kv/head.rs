//! The keys and values of one (layer, KV head).

use std::ops::Range;

use longbit_kernels::Kernels;

use super::pool::{KvMemory, Memory, Move};
use super::side::{Side, kept};
use super::watch::Watch;
use super::{KvDtype, KvScratch};
use crate::error::{Error, Result};

/// The keys and values of one (layer, KV head).
///
/// Rows go in as the model makes them. What comes out, scores and decoded rows, is rotated where the dtype rotates:
/// [`KvHead::rotate_queries`] and [`KvHead::restore_outputs`] bring queries and outputs over and back.
pub struct KvHead {
    kernels: &'static Kernels,
    /// Layer and KV head, for messages.
    place: [usize; 2],
    head_dim: usize,
    keys: Side,
    values: Side,
    /// Rows.
    len: usize,
    /// Positions of the first rows, as far as rows before them were dropped once; ascending.
    positions: Vec<u32>,
    /// Tokens whose rows were dropped.
    dropped: usize,
    /// Rows on their way.
    room: Vec<f32>,
    /// Rows that a method attends itself.
    watch: Watch,
    /// Bytes of stored rows that were read, for tests.
    #[cfg(test)]
    observed: std::sync::atomic::AtomicU64,
}

impl KvHead {
    pub(super) fn new(
        kernels: &'static Kernels,
        place: [usize; 2],
        head_dim: usize,
        dtype: KvDtype,
        memory: [Memory; 2],
    ) -> Self {
        let [keys, values] = memory;
        KvHead {
            kernels,
            place,
            head_dim,
            keys: Side::new(dtype.keys, head_dim, keys),
            values: Side::new(dtype.values, head_dim, values),
            len: 0,
            positions: Vec::new(),
            dropped: 0,
            room: Vec::new(),
            watch: Watch::default(),
            #[cfg(test)]
            observed: Default::default(),
        }
    }

    /// The same rows in `memory`, which begins with the pages of this head.
    pub(super) fn fork(&self, memory: [Memory; 2]) -> Self {
        let [keys, values] = memory;
        KvHead {
            kernels: self.kernels,
            place: self.place,
            head_dim: self.head_dim,
            keys: self.keys.fork(keys),
            values: self.values.fork(values),
            len: self.len,
            positions: self.positions.clone(),
            dropped: self.dropped,
            room: Vec::new(),
            watch: Watch::default(),
            #[cfg(test)]
            observed: Default::default(),
        }
    }

    /// Makes an empty head one of `len` tokens; see [`Side::resume`].
    pub(super) fn resume(&mut self, len: usize, first: &mut &[u8], newest: &mut &[u8]) {
        for side in [&mut self.keys, &mut self.values] {
            side.resume(len, first, newest);
        }
        self.len = len;
    }

    /// The keys and the values.
    pub(super) fn sides(&self) -> [&Side; 2] {
        [&self.keys, &self.values]
    }

    /// The memory of both sides.
    pub(super) fn into_memory(self) -> [Memory; 2] {
        [self.keys.memory(), self.values.memory()]
    }

    /// Adds what it holds to `sum`.
    pub(super) fn count(&self, sum: &mut KvMemory) {
        self.sides().into_iter().for_each(|side| side.count(sum));
    }

    /// Cached rows: one a token, but for tokens that were evicted.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tokens that came so far: the position of the next one.
    pub fn tokens(&self) -> usize {
        self.len + self.dropped
    }

    /// Tokens whose rows were evicted.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// Position in the sequence of the token of `row`.
    pub fn position_of(&self, row: usize) -> usize {
        self.positions.get(row).map_or(row + self.dropped, |&position| position as usize)
    }

    /// How many rows are those of tokens before `position`: the row of that token, if it is cached.
    pub fn row_of(&self, position: usize) -> usize {
        match self.positions.last() {
            Some(&last) if position <= last as usize => {
                self.positions.partition_point(|&p| (p as usize) < position)
            }
            Some(_) => position.saturating_sub(self.dropped).clamp(self.positions.len(), self.len),
            None => position.min(self.len),
        }
    }

    /// Drops every row but `kept`, which are ascending and disjoint, and gives the memory back that is left over. The others
    /// keep their bytes, their order and their positions; pages that other sequences share are left to them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a format whose rows lean on each other, [`Error::Sys`] when there is no memory for pages in
    /// place of shared ones. Nothing is changed then.
    ///
    /// # Panics
    /// When `kept` are not rows, in order.
    pub fn retain(&mut self, kept: &[Range<usize>]) -> Result<()> {
        for side in self.sides() {
            side.dtype().rows_move().map_err(Error::Invalid)?;
        }
        let ordered = kept.windows(2).all(|pair| pair[0].end <= pair[1].start);
        assert!(ordered && kept.last().is_none_or(|last| last.end <= self.len), "{kept:?} of {}", self.len);
        let moves = Move::list(kept);
        let fresh = [self.keys.fresh_pages(&moves)?, self.values.fresh_pages(&moves)?];
        let [keys, values] = fresh;
        self.keys.retain(&moves, keys);
        self.values.retain(&moves, values);
        let tokens = self.tokens();
        self.positions = kept.iter().cloned().flatten().map(|row| self.position_of(row) as u32).collect();
        self.len = self.positions.len();
        self.dropped = tokens - self.len;
        Ok(())
    }

    /// Puts another key and value in the place of those of `row`; both are rotated if the stored ones are.
    ///
    /// # Errors
    /// As [`KvHead::retain`], and [`Error::Unstorable`].
    pub fn replace(&mut self, row: usize, key: &[f32], value: &[f32]) -> Result<()> {
        for side in self.sides() {
            side.dtype().rows_move().map_err(Error::Invalid)?;
        }
        self.check_storable(key, value, self.position_of(row))?;
        self.keys.replace(self.kernels, row, key)?;
        self.values.replace(self.kernels, row, value)
    }

    /// True when nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Numbers a row.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The kernels that it works with.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.keys.capacity()
    }

    /// Appends rows `[n][head_dim]` of keys and values.
    ///
    /// # Errors
    /// [`Error::CacheFull`], [`Error::Unstorable`] for a number that is not finite or larger than the format holds, or no
    /// memory for the copy of a shared page; nothing is appended then.
    pub fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<()> {
        let wanted = self.len + keys.len() / self.head_dim;
        if wanted > self.capacity() {
            return Err(Error::CacheFull { capacity: self.capacity(), wanted });
        }
        self.check_storable(keys, values, self.tokens())?;
        for side in [&mut self.keys, &mut self.values] {
            side.make_room(wanted - self.len)?;
        }
        for (side, rows) in [(&mut self.keys, keys), (&mut self.values, values)] {
            if side.dtype().rotate() {
                self.room.clear();
                self.room.extend_from_slice(rows);
                self.kernels.hadamard_signed(&mut self.room, self.head_dim);
                side.append(self.kernels, &self.room);
            } else {
                side.append(self.kernels, rows);
            }
        }
        self.room = kept(std::mem::take(&mut self.room), self.head_dim);
        self.len = wanted;
        Ok(())
    }

    /// Whether rows of the tokens from `position` on can be stored.
    fn check_storable(&self, keys: &[f32], values: &[f32], position: usize) -> Result<()> {
        for (side, rows, what) in [(&self.keys, keys, "key"), (&self.values, values, "value")] {
            let limit = side.dtype().largest(self.head_dim);
            if let Some(at) = rows.iter().position(|x| x.is_nan() || x.abs() > limit) {
                return Err(Error::Unstorable {
                    what,
                    layer: self.place[0],
                    kv_head: self.place[1],
                    position: position + at / self.head_dim,
                    value: rows[at],
                    dtype: side.dtype().to_string(),
                });
            }
        }
        Ok(())
    }

    /// Forgets every token from position `len` on; rows of earlier tokens that were evicted stay so. Rows of a format that keeps the newest tokens exactly come back exactly as long
    /// as no more than a page of tokens is forgotten since the most there were, else as the pages hold them.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.tokens() {
            return;
        }
        let rows = self.row_of(len);
        self.keys.truncate(self.kernels, rows);
        self.values.truncate(self.kernels, rows);
        self.len = rows;
        self.positions.truncate(rows);
        self.dropped = len - rows;
    }

    /// Splits `tokens` where pages end, rows lie elsewhere, or the first of a sequence are kept apart: the pieces that
    /// [`KvHead::scores`] and the others take.
    pub fn runs(&self, tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut start = tokens.start;
        std::iter::from_fn(move || {
            (start < tokens.end).then(|| {
                let (keys, values) = (&self.keys, &self.values);
                let end = tokens.end.min(keys.cut(start, values)).min(values.cut(start, keys));
                let run = start..end;
                start = end;
                run
            })
        })
    }

    /// Requests what leads to the rows of `tokens` from memory: a long context has more pages than the caches keep track of.
    pub(crate) fn request(&self, tokens: &Range<usize>) {
        for side in [&self.keys, &self.values] {
            side.request(self.kernels, tokens);
        }
    }

    /// The stored bytes of the keys of `run`, one of [`KvHead::runs`], in pieces: the largest first.
    pub fn key_parts(&self, run: &Range<usize>) -> impl Iterator<Item = &[u8]> {
        self.keys.place(run).parts().into_iter().filter(|part| !part.is_empty())
    }

    /// The stored bytes of the values of `run`, one of [`KvHead::runs`], in pieces: the largest first.
    pub fn value_parts(&self, run: &Range<usize>) -> impl Iterator<Item = &[u8]> {
        self.values.place(run).parts().into_iter().filter(|part| !part.is_empty())
    }

    /// Rows that a method attends itself, while they are watched.
    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
    }

    #[cfg(test)]
    fn observe<'a>(&self, parts: impl Iterator<Item = &'a [u8]>) {
        self.observe_bytes(parts.map(<[u8]>::len).sum());
    }

    #[cfg(test)]
    pub(super) fn observe_bytes(&self, bytes: usize) {
        self.observed.fetch_add(bytes as u64, std::sync::atomic::Ordering::Relaxed);
    }

    /// Bytes of stored rows that were read since it was last asked.
    #[cfg(test)]
    pub(crate) fn take_observed(&self) -> u64 {
        self.observed.swap(0, std::sync::atomic::Ordering::Relaxed)
    }

    /// Keeps what was read so far out of [`KvHead::take_observed`]: an index that grows reads rows too, which is no part of
    /// the traffic of a decision.
    #[cfg(test)]
    pub(crate) fn begin_observing(&self) {
        self.take_observed();
    }

    /// Decodes the keys of `tokens` into `out`, `[tokens][head_dim]`, rotated if they are.
    pub fn decode_keys(&self, tokens: Range<usize>, out: &mut [f32]) {
        #[cfg(test)]
        self.runs(tokens.clone()).for_each(|run| self.observe(self.key_parts(&run)));
        self.keys.decode(self.kernels, tokens, out);
    }

    /// Decodes the values of `tokens` into `out`, `[tokens][head_dim]`, rotated if they are.
    pub fn decode_values(&self, tokens: Range<usize>, out: &mut [f32]) {
        #[cfg(test)]
        self.runs(tokens.clone()).for_each(|run| self.observe(self.value_parts(&run)));
        self.values.decode(self.kernels, tokens, out);
    }

    /// Rotates `queries`, rows of `head_dim`, if the keys are rotated.
    pub fn rotate_queries(&self, queries: &mut [f32]) {
        if self.keys.dtype().rotate() {
            self.kernels.hadamard_signed(queries, self.head_dim);
        }
    }

    /// Rotates keys or queries, rows of `head_dim`, back if the keys are rotated.
    pub fn restore_keys(&self, rows: &mut [f32]) {
        if self.keys.dtype().rotate() {
            self.kernels.hadamard_unsigned(rows, self.head_dim);
        }
    }

    /// Rotates attention outputs, rows of `head_dim`, back if the values are rotated.
    pub fn restore_outputs(&self, outputs: &mut [f32]) {
        if self.values.dtype().rotate() {
            self.kernels.hadamard_unsigned(outputs, self.head_dim);
        }
    }

    /// Makes `scratch` ready for [`KvHead::scores`] of `queries`, `[group][head_dim]`, rotated if the keys are.
    pub fn prepare(&self, queries: &[f32], scratch: &mut KvScratch) {
        self.keys.dtype().key_codec().prepare(self.kernels, queries, self.head_dim, scratch);
    }

    /// Dot products of `queries` `[group][head_dim]`, those of the last [`KvHead::prepare`], with the keys of `run`, one of
    /// [`KvHead::runs`]: `out` is `[group][run]`. The bytes `upcoming`, which are read next, are requested from memory in
    /// time.
    pub fn scores(
        &self,
        queries: &[f32],
        run: &Range<usize>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        self.run(run).scores(queries, upcoming, scratch, out);
    }

    /// Whether the keys have an upper part that can be read alone.
    pub fn has_upper(&self) -> bool {
        self.keys.dtype().key_codec().upper().is_some()
    }

    /// The stored bytes that [`KvHead::upper_scores`] of `run` reads, in pieces: the largest first.
    pub fn upper_parts(&self, run: &Range<usize>) -> impl Iterator<Item = &[u8]> {
        self.keys.upper_parts(run)
    }

    /// As [`KvHead::prepare`], for [`KvHead::upper_scores`].
    pub fn prepare_upper(&self, queries: &[f32], scratch: &mut KvScratch) {
        match self.keys.dtype().key_codec().upper() {
            Some(upper) => upper.prepare(self.kernels, queries, self.head_dim, scratch),
            None => self.prepare(queries, scratch),
        }
    }

    /// As [`KvHead::scores`], from the upper part of the keys alone: estimates, at fewer bytes. `steps` `[run]` become what
    /// each number of a row is known to, within half of it; zero where the row was read whole.
    pub fn upper_scores(
        &self,
        queries: &[f32],
        run: &Range<usize>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        steps: &mut [f32],
        out: &mut [f32],
    ) {
        #[cfg(test)]
        self.observe(self.upper_parts(run));
        self.keys.upper_scores(self.kernels, queries, run, upcoming, scratch, (steps, out));
    }

    /// Adds the values of `run`, one of [`KvHead::runs`], weighted by `weights` `[group][run]`, to `acc`
    /// `[group][head_dim]`, rotated if they are. `upcoming` as for [`KvHead::scores`].
    pub fn accumulate(
        &self,
        weights: &[f32],
        run: &Range<usize>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        self.run(run).accumulate(weights, None, upcoming, scratch, acc);
    }
}
