//! How attention reads a side: runs of rows that lie in one place each, their scores, weighted sums and bytes.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::super::dtype::FIRST;
use super::super::{Codec, KeyCodec, KvScratch, PAGE_TOKENS, Rows, ValueCodec};
use super::centre::widen;
use super::{EXACT, Side};

/// Where the rows of a run lie.
#[derive(Clone, Debug)]
pub(in crate::kv) struct Place<'a> {
    exact: bool,
    page: &'a [u8],
    /// Rows of the page.
    rows: Range<usize>,
    /// The bytes of them that are read, as [`Codec::parts`] has them.
    parts: [&'a [u8]; 3],
    /// The mean that was taken off, bfloat16.
    mean: Option<&'a [u16]>,
}

impl<'a> Place<'a> {
    /// Rows without a mean.
    fn new(codec: &dyn Codec, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> Self {
        let parts = codec.parts(page, rows.clone(), head_dim);
        Place { exact: false, page, rows, parts, mean: None }
    }

    /// Rows, at least one.
    pub(in crate::kv) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The bytes that reading the rows touches, in pieces, the largest first; some are empty.
    pub(in crate::kv) fn parts(&self) -> [&'a [u8]; 4] {
        let [a, b, c] = self.parts;
        [a, b, c, self.mean.map_or(&[], bytemuck::cast_slice)]
    }

    fn rows(&self, head_dim: usize, upcoming: &'a [u8]) -> Rows<'a> {
        Rows { page: self.page, range: self.rows.clone(), head_dim, upcoming }
    }
}

impl Side {
    /// First tokens that are a run of their own.
    pub(in crate::kv) fn first(&self) -> usize {
        if self.codec().first_apart() { FIRST } else { self.dtype.exact_first() }
    }

    /// Where the run that begins at `start` ends at the latest, as far as this side is concerned, where it is read with
    /// `other`.
    pub(in crate::kv) fn cut(&self, start: usize, other: &Side) -> usize {
        let end = self.together(start);
        // Rows of the other side that are encoded together have scales together, to be read once.
        if start < self.first() && other.codec().group() == 1 { end.min(self.first()) } else { end }
    }

    /// Where the rows from `start` on no longer lie in one place.
    fn together(&self, start: usize) -> usize {
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

    /// Requests what leads to the rows of `tokens`.
    pub(in crate::kv) fn request(&self, kernels: &Kernels, tokens: &Range<usize>) {
        self.memory.request(kernels, tokens.start / PAGE_TOKENS..tokens.end.div_ceil(PAGE_TOKENS));
    }

    /// Where the rows of `run` lie, which ends no later than [`Side::cut`] says.
    pub(in crate::kv) fn place(&self, run: &Range<usize>) -> Place<'_> {
        debug_assert!(run.end <= self.len && run.end <= self.together(run.start), "{run:?}");
        let exact = |row: usize| {
            let place = Place::new(&EXACT, &self.memory.exact, row..row + run.len(), self.head_dim);
            Place { exact: true, ..place }
        };
        if run.start < self.dtype.exact_first() {
            exact(run.start)
        } else if run.start >= self.settled {
            exact(self.ring_row(run.start))
        } else {
            let page = run.start / PAGE_TOKENS;
            let row = run.start % PAGE_TOKENS;
            let place = Place::new(self.codec(), self.encoded(page), row..row + run.len(), self.head_dim);
            Place { mean: self.dtype.centre().then(|| self.mean(page)), ..place }
        }
    }

    pub(super) fn rows<'a>(&self, page: &'a [u8], range: Range<usize>) -> Rows<'a> {
        Rows { page, range, head_dim: self.head_dim, upcoming: &[] }
    }

    /// Decodes `tokens` into `out`, `[tokens][head_dim]`, rotated if this side is.
    pub(in crate::kv) fn decode(&self, kernels: &Kernels, tokens: Range<usize>, out: &mut [f32]) {
        let (d, mut start, mut out) = (self.head_dim, tokens.start, out);
        while start < tokens.end {
            let run = start..tokens.end.min(self.together(start));
            let (rows, rest) = out.split_at_mut(run.len() * d);
            let place = self.place(&run);
            let codec: &dyn Codec = if place.exact { &EXACT } else { self.codec() };
            codec.decode(kernels, &place.rows(d, &[]), rows);
            if let Some(mean) = place.mean {
                for row in rows.chunks_exact_mut(d) {
                    row.iter_mut().zip(mean).for_each(|(x, &m)| *x += widen(m));
                }
            }
            (start, out) = (run.end, rest);
        }
    }

    /// See [`crate::kv::KvHead::scores`].
    pub(in crate::kv) fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        place: &Place<'_>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let rows = place.rows(self.head_dim, upcoming);
        self.key_codec(place).scores(kernels, queries, &rows, scratch, out);
        self.add_mean(kernels, queries, place, scratch, out);
    }

    fn key_codec(&self, place: &Place<'_>) -> &'static dyn KeyCodec {
        if place.exact { &EXACT } else { self.dtype.key_codec() }
    }

    /// As [`Side::scores`], without what the mean of the page was taken off for, and the largest for each query.
    pub(in crate::kv) fn scores_less_mean(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        place: &Place<'_>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        out: (&mut [f32], &mut [f32]),
    ) {
        let rows = place.rows(self.head_dim, upcoming);
        self.key_codec(place).scores_and_largest(kernels, queries, &rows, scratch, out);
    }

    /// What [`Side::scores_less_mean`] leaves out for each query.
    pub(in crate::kv) fn scores_of_mean(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        place: &Place<'_>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let Some(mean) = place.mean else { return out.fill(0.0) };
        scratch.mean.resize(self.head_dim, 0.0);
        kernels.bf16_to_f32(mean, &mut scratch.mean);
        for (out, query) in out.iter_mut().zip(queries.chunks_exact(self.head_dim)) {
            *out = kernels.dot(query, &scratch.mean);
        }
    }

    /// Adds to scores `[group][n]` what the mean of the page was taken off for.
    fn add_mean(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        place: &Place<'_>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        if place.mean.is_some() {
            let mut group = std::mem::take(&mut scratch.group);
            group.resize(queries.len() / self.head_dim, 0.0);
            self.scores_of_mean(kernels, queries, place, scratch, &mut group);
            kernels.add_to_rows(out, &group);
            scratch.group = group;
        }
    }

    /// The pieces of memory of what [`Side::upper_scores`] reads.
    pub(in crate::kv) fn upper_parts(&self, run: &Range<usize>) -> impl Iterator<Item = &[u8]> {
        let mut place = self.place(run);
        if let (false, Some(upper)) = (place.exact, self.dtype.key_codec().upper()) {
            place.parts = upper.parts(place.page, place.rows.clone(), self.head_dim);
        }
        place.parts().into_iter().filter(|part| !part.is_empty())
    }

    /// See [`crate::kv::KvHead::upper_scores`].
    pub(in crate::kv) fn upper_scores(
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
            return self.scores(kernels, queries, &place, upcoming, scratch, out);
        };
        upper.scores(kernels, queries, &place.rows(self.head_dim, upcoming), scratch, steps, out);
        self.add_mean(kernels, queries, &place, scratch, out);
    }

    /// See [`super::super::KvRun::accumulate`].
    pub(in crate::kv) fn accumulate(
        &self,
        kernels: &Kernels,
        (weights, masses): (&[f32], Option<&[f32]>),
        place: &Place<'_>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let codec: &dyn ValueCodec = if place.exact { &EXACT } else { self.dtype.value_codec() };
        codec.accumulate(kernels, weights, &place.rows(self.head_dim, upcoming), scratch, acc);
        let Some(mean) = place.mean else { return };
        scratch.mean.resize(self.head_dim, 0.0);
        kernels.bf16_to_f32(mean, &mut scratch.mean);
        let each = weights.chunks_exact(place.rows.len());
        for (h, (weights, acc)) in each.zip(acc.chunks_exact_mut(self.head_dim)).enumerate() {
            let mass = masses.map_or_else(|| kernels.sum(weights), |masses| masses[h]);
            kernels.scale_add(acc, 1.0, &scratch.mean, mass);
        }
    }
}
