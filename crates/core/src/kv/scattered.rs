//! Tokens that lie apart, brought together: their rows are copied into one page and read there as one run.
//!
//! A kernel is called for many rows at once; for a single row the call costs more than the row. A copy costs its bytes
//! once more, out of cache into cache. Rows can be moved where each stands alone: not where several tokens are encoded
//! together, and not where they are kept exactly, which are few and lie together.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::side::Side;
use super::{Codec, KvHead, KvScratch, PAGE_TOKENS, Rows};

/// Alignment of the page that rows are copied to (bytes): that of pages in the cache.
const ALIGNMENT: usize = 64;

/// Where the parts of a row lie in a page: the first byte for row 0, the bytes from row to row, and those of a row.
type Layout = [(usize, usize, usize); 3];

/// Pieces between the one that is copied and the one that is requested: a core has no more than a few dozen lines under way.
const AHEAD: usize = 8;

/// The layout of a codec whose rows stand alone, found by asking it for the first two rows of `page`; what there is comes
/// first.
fn layout(codec: &dyn Codec, page: &[u8], head_dim: usize) -> Layout {
    let offset = |part: &[u8]| (part.as_ptr() as usize).wrapping_sub(page.as_ptr() as usize);
    let (first, second) = (codec.parts(page, 0..1, head_dim), codec.parts(page, 1..2, head_dim));
    let mut layout = Layout::default();
    let parts = first.into_iter().zip(second).filter(|part| !part.0.is_empty());
    for (place, (first, second)) in layout.iter_mut().zip(parts) {
        *place = (offset(first), offset(second) - offset(first), first.len());
    }
    layout
}

impl Side {
    /// The tokens whose rows can be moved one by one.
    fn standing_alone(&self) -> Range<usize> {
        if self.codec().group() == 1 { self.first()..self.settled() } else { 0..0 }
    }

    /// Copies the rows of `pieces` to the first slots of `page`. Rows that lie apart are not what the hardware expects next,
    /// so they are requested some pieces ahead.
    fn collect(&self, kernels: &Kernels, pieces: &[Range<usize>], page: &mut [u8]) {
        let layout = layout(self.codec(), page, self.head_dim());
        let layout = &layout[..layout.iter().take_while(|part| part.2 > 0).count()];
        let request = |piece: &Range<usize>| {
            let from = self.encoded(piece.start / PAGE_TOKENS);
            for &(start, stride, bytes) in layout {
                let at = start + piece.start % PAGE_TOKENS * stride;
                kernels.request(&from[at..at + bytes]);
            }
        };
        pieces.iter().take(AHEAD).for_each(request);
        let mut slot = 0;
        for (i, piece) in pieces.iter().enumerate() {
            pieces.get(i + AHEAD).into_iter().for_each(request);
            let mut token = piece.start;
            while token < piece.end {
                let (from, row) = (self.encoded(token / PAGE_TOKENS), token % PAGE_TOKENS);
                let n = (piece.end - token).min(PAGE_TOKENS - row);
                for &(start, stride, bytes) in layout {
                    let (source, target) = (start + row * stride, start + slot * stride);
                    if stride == bytes {
                        page[target..target + n * bytes].copy_from_slice(&from[source..source + n * bytes]);
                        continue;
                    }
                    for i in 0..n {
                        let (source, target) = (source + i * stride, target + i * stride);
                        page[target..target + bytes].copy_from_slice(&from[source..source + bytes]);
                    }
                }
                (token, slot) = (token + n, slot + n);
            }
        }
    }

    /// The pages that `pieces` lie in, each with the slots of its tokens.
    fn pages<'a>(pieces: &'a [Range<usize>]) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
        let mut tokens = pieces.iter().cloned().flatten().enumerate().peekable();
        std::iter::from_fn(move || {
            let (start, token) = tokens.next()?;
            let (page, mut end) = (token / PAGE_TOKENS, start + 1);
            while tokens.next_if(|(_, token)| token / PAGE_TOKENS == page).is_some() {
                end += 1;
            }
            Some((page, start..end))
        })
    }

    /// Bytes that reading `pieces` together touches.
    fn scattered_bytes(&self, pieces: &[Range<usize>]) -> usize {
        let parts =
            |token: usize| self.codec().parts(self.encoded(token / PAGE_TOKENS), 0..1, self.head_dim());
        let row: usize = pieces.first().map_or(0, |p| parts(p.start).into_iter().map(<[u8]>::len).sum());
        let means = match self.dtype().centre() {
            true => Side::pages(pieces).map(|(page, _)| size_of_val(self.mean(page))).sum(),
            false => 0,
        };
        row * pieces.iter().map(Range::len).sum::<usize>() + means
    }

    fn scores_scattered(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        pieces: &[Range<usize>],
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        let d = self.head_dim();
        let n = out.len() / (queries.len() / d);
        let mut room = std::mem::take(&mut scratch.scattered);
        let page = room.page(self.codec().page_bytes(d));
        self.collect(kernels, pieces, page);
        let rows = Rows { page, range: 0..n, head_dim: d, upcoming: &[] };
        self.dtype().key_codec().scores(kernels, queries, &rows, scratch, out);
        scratch.scattered = room;
        if self.dtype().centre() {
            for (page, slots) in Side::pages(pieces) {
                let mean = self.widen_mean(kernels, page, scratch);
                for (query, out) in queries.chunks_exact(d).zip(out.chunks_exact_mut(n)) {
                    let more = kernels.dot(query, mean);
                    out[slots.clone()].iter_mut().for_each(|x| *x += more);
                }
            }
        }
    }

    fn accumulate_scattered(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        pieces: &[Range<usize>],
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let d = self.head_dim();
        let n = weights.len() / (acc.len() / d);
        let mut room = std::mem::take(&mut scratch.scattered);
        let page = room.page(self.codec().page_bytes(d));
        self.collect(kernels, pieces, page);
        let rows = Rows { page, range: 0..n, head_dim: d, upcoming: &[] };
        self.dtype().value_codec().accumulate(kernels, weights, &rows, scratch, acc);
        scratch.scattered = room;
        if self.dtype().centre() {
            for (page, slots) in Side::pages(pieces) {
                let mean = self.widen_mean(kernels, page, scratch);
                for (weights, acc) in weights.chunks_exact(n).zip(acc.chunks_exact_mut(d)) {
                    kernels.scale_add(acc, 1.0, mean, kernels.sum(&weights[slots.clone()]));
                }
            }
        }
    }

    fn widen_mean<'a>(&self, kernels: &Kernels, page: usize, scratch: &'a mut KvScratch) -> &'a [f32] {
        scratch.mean.resize(self.head_dim(), 0.0);
        kernels.bf16_to_f32(self.mean(page), &mut scratch.mean);
        &scratch.mean
    }
}

/// Memory for a page, aligned as pages of the cache are.
#[derive(Default)]
pub(super) struct Room(Vec<u8>);

impl Room {
    fn page(&mut self, bytes: usize) -> &mut [u8] {
        let wanted = bytes + ALIGNMENT;
        if self.0.len() < wanted {
            self.0.resize(wanted, 0);
        }
        let skip = self.0.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        &mut self.0[skip..skip + bytes]
    }
}

impl KvHead {
    /// The tokens whose rows [`KvHead::scores_scattered`] and [`KvHead::accumulate_scattered`] can read.
    pub fn scattered(&self) -> Range<usize> {
        let [keys, values] = self.sides().map(Side::standing_alone);
        keys.start.max(values.start)..keys.end.min(values.end)
    }

    /// As [`KvHead::scores`], of tokens that lie apart: at most [`PAGE_TOKENS`] together, each piece
    /// within [`KvHead::scattered`]. `out` is `[group][tokens]`, pieces one after another.
    pub fn scores_scattered(
        &self,
        queries: &[f32],
        pieces: &[Range<usize>],
        scratch: &mut KvScratch,
        out: &mut [f32],
    ) {
        #[cfg(test)]
        self.observe_bytes(self.scattered_bytes(pieces)[0]);
        self.sides()[0].scores_scattered(self.kernels(), queries, pieces, scratch, out);
    }

    /// As [`KvHead::accumulate`], of tokens that lie apart, as for [`KvHead::scores_scattered`]; `weights` is
    /// `[group][tokens]`.
    pub fn accumulate_scattered(
        &self,
        weights: &[f32],
        pieces: &[Range<usize>],
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        #[cfg(test)]
        self.observe_bytes(self.scattered_bytes(pieces)[1]);
        self.sides()[1].accumulate_scattered(self.kernels(), weights, pieces, scratch, acc);
    }

    /// Bytes of keys and of values that reading `pieces` together touches: rows, and the mean of each page once.
    pub fn scattered_bytes(&self, pieces: &[Range<usize>]) -> [usize; 2] {
        self.sides().map(|side| side.scattered_bytes(pieces))
    }
}
