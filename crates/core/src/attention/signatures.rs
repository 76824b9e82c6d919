//! Hash signatures of tokens, and which tokens agree with a query's in enough tables: the index of `magicpig`.
//!
//! A token has `bits` signs in each of `tables` hash tables. Two layouts:
//! - *packed*: by pages of 256 tokens, a row of 256 signs for each bit of each table. A table agrees with the query where
//!   none of its bits differs: `bits` loads of 64 tokens each; whether one, or two, tables agreed so far are two words of
//!   carries. `bits * tables / 8` bytes a token, all of which are scanned.
//! - *tables*: segments of 4096 tokens, in which each table lists its tokens by code, 2 bytes each, after `2^bits + 1`
//!   offsets. A query reads one list a table and counts in 4 kB. Tokens after the last whole segment are packed.
//!
//! Signs come from [`Rotations`]: bits of a table from different ones, so that they are close to independent.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::lsh::Rotations;
use crate::kv::PAGE_TOKENS;

/// Words of 64 tokens in a page.
pub(super) const WORDS: usize = PAGE_TOKENS / 64;
/// Tokens of a segment of tables.
pub(super) const SEGMENT: usize = 4096;
const PAGES: usize = SEGMENT / PAGE_TOKENS;

/// Tables of a segment.
struct Segment {
    /// `[tables][2^bits + 1]`: where in `tokens` of the table each code begins.
    starts: Vec<u16>,
    /// `[tables][SEGMENT]`: tokens by code, within the segment.
    tokens: Vec<u16>,
}

pub(super) struct Signatures {
    bits: usize,
    tables: usize,
    rotations: Rotations,
    listed: bool,
    segments: Vec<Segment>,
    /// `[pages][tables * bits][WORDS]` of the pages after the segments.
    packed: Vec<u64>,
    turned: Vec<f32>,
}

impl Signatures {
    /// Of rows of `dim` numbers; `listed` for the layout of tables.
    pub(super) fn new(seed: u64, dim: usize, bits: usize, tables: usize, listed: bool) -> Self {
        let rotations = Rotations::new(seed, dim, (bits * tables).div_ceil(dim).max(bits));
        let (segments, packed, turned) = (Vec::new(), Vec::new(), Vec::new());
        Signatures { bits, tables, rotations, listed, segments, packed, turned }
    }

    /// Words of a packed page.
    fn page_words(&self) -> usize {
        self.tables * self.bits * WORDS
    }

    /// Pages indexed.
    pub(super) fn pages(&self) -> usize {
        self.segments.len() * PAGES + self.packed.len() / self.page_words()
    }

    /// Forgets pages until there are no more than `pages`, or fewer where a segment breaks.
    pub(super) fn truncate(&mut self, pages: usize) {
        if pages < self.segments.len() * PAGES {
            self.segments.truncate(pages / PAGES);
            self.packed.clear();
        }
        let packed = pages - self.segments.len() * PAGES;
        self.packed.truncate(packed * self.page_words());
    }

    /// Passes every bit and its sign to `to`: bit `j` of table `l` is number `l * bits + j`.
    fn signs(&mut self, kernels: &Kernels, x: &[f32], mut to: impl FnMut(usize, bool)) {
        self.rotations.project(kernels, x, &mut self.turned);
        let (count, rotations) = (self.bits * self.tables, self.turned.len() / x.len());
        for (r, turned) in self.turned.chunks_exact(x.len()).enumerate() {
            for (bit, &x) in (r..count).step_by(rotations).zip(turned) {
                to(bit, x > 0.0);
            }
        }
    }

    /// Indexes the next page, `[PAGE_TOKENS][dim]`.
    pub(super) fn push(&mut self, kernels: &Kernels, rows: &[f32]) {
        let mut packed = std::mem::take(&mut self.packed);
        let at = packed.len();
        packed.resize(at + self.page_words(), 0);
        for (t, row) in rows.chunks_exact(rows.len() / PAGE_TOKENS).enumerate() {
            self.signs(kernels, row, |bit, sign| {
                packed[at + bit * WORDS + t / 64] |= u64::from(sign) << (t % 64);
            });
        }
        self.packed = packed;
        if self.listed && self.packed.len() == PAGES * self.page_words() {
            let segment = self.list();
            self.segments.push(segment);
            self.packed.clear();
        }
    }

    /// Tables of the packed pages, of which there is a segment: a counting sort each.
    fn list(&self) -> Segment {
        let codes = 1 << self.bits;
        let (mut starts, mut tokens) = (Vec::new(), vec![0; self.tables * SEGMENT]);
        let mut of_tokens = vec![0usize; SEGMENT];
        for (table, tokens) in tokens.chunks_exact_mut(SEGMENT).enumerate() {
            let mut ends = vec![0u16; codes + 1];
            for (t, code) in of_tokens.iter_mut().enumerate() {
                let page = &self.packed[t / PAGE_TOKENS * self.page_words()..];
                let word = |j: usize| page[(table * self.bits + j) * WORDS + t % PAGE_TOKENS / 64];
                *code = (0..self.bits).map(|j| ((word(j) >> (t % 64) & 1) as usize) << j).sum();
                ends[*code + 1] += 1;
            }
            (0..codes).for_each(|code| ends[code + 1] += ends[code]);
            starts.extend_from_slice(&ends);
            for (t, &code) in of_tokens.iter().enumerate() {
                tokens[usize::from(ends[code])] = t as u16;
                ends[code] += 1;
            }
        }
        Segment { starts, tokens }
    }

    /// Marks the tokens that agree with each of `queries`, `[group][dim]`, in at least `hits` tables (2 at most): `marks`
    /// becomes `[group][pages * WORDS]`. Returns the bytes of the index read.
    pub(super) fn agree(
        &mut self,
        kernels: &Kernels,
        queries: &[f32],
        dim: usize,
        hits: usize,
        marks: &mut Vec<u64>,
    ) -> u64 {
        let words = self.pages() * WORDS;
        marks.clear();
        marks.resize(queries.len() / dim * words, 0);
        if hits == 0 {
            marks.fill(u64::MAX);
            return 0;
        }
        let width = self.bits * self.tables;
        let mut signs = vec![0u64; queries.len() / dim * width];
        let mut bytes = (self.rotations.bytes() + 8 * self.packed.len()) as u64;
        for (query, signs) in queries.chunks_exact(dim).zip(signs.chunks_exact_mut(width)) {
            self.signs(kernels, query, |bit, sign| signs[bit] = if sign { u64::MAX } else { 0 });
        }
        for (signs, marks) in signs.chunks_exact(width).zip(marks.chunks_exact_mut(words.max(1))) {
            for (segment, marks) in self.segments.iter().zip(marks.chunks_exact_mut(SEGMENT / 64)) {
                bytes += segment.agree(signs, self.bits, hits, marks);
            }
        }
        // A page is read from memory once for all heads.
        let first = self.segments.len() * PAGES * WORDS;
        for (i, page) in self.packed.chunks_exact(self.page_words()).enumerate() {
            for (h, signs) in signs.chunks_exact(width).enumerate() {
                let at = h * words + first + i * WORDS;
                scan(page, signs, self.bits, hits, &mut marks[at..at + WORDS]);
            }
        }
        bytes
    }

    pub(super) fn bytes(&self) -> usize {
        let of_segment = |segment: &Segment| 2 * (segment.starts.len() + segment.tokens.len());
        self.rotations.bytes() + 8 * self.packed.len() + self.segments.iter().map(of_segment).sum::<usize>()
    }

    /// Bytes of the index at a context, and those that a decision reads of it, of lists those for one head.
    pub(super) fn predict(bits: usize, tables: usize, listed: bool, tokens: usize) -> (usize, usize) {
        let segments = if listed { tokens / SEGMENT } else { 0 };
        let packed = (tokens - segments * SEGMENT) * bits * tables / 8;
        let starts = segments * tables * 2 * ((1 << bits) + 1);
        let lists = segments * tables * 2 * SEGMENT;
        (packed + starts + lists, packed + segments * tables * 4 + (lists >> bits))
    }
}

impl Segment {
    /// The tokens of `table` with `code`.
    fn list(&self, table: usize, code: usize, codes: usize) -> &[u16] {
        let starts = &self.starts[table * (codes + 1) + code..][..2];
        let Range { start, end } = usize::from(starts[0])..usize::from(starts[1]);
        &self.tokens[table * SEGMENT + start..table * SEGMENT + end]
    }

    fn agree(&self, signs: &[u64], bits: usize, hits: usize, marks: &mut [u64]) -> u64 {
        let mut counts = [0u8; SEGMENT];
        let mut bytes = 0;
        for (table, signs) in signs.chunks_exact(bits).enumerate() {
            let code = signs.iter().enumerate().map(|(j, sign)| ((sign & 1) as usize) << j).sum();
            let list = self.list(table, code, 1 << bits);
            for &token in list {
                let count = &mut counts[usize::from(token)];
                *count = count.saturating_add(1);
            }
            bytes += 2 * (2 + list.len() as u64);
        }
        for (mark, counts) in marks.iter_mut().zip(counts.chunks_exact(64)) {
            for (i, &count) in counts.iter().enumerate() {
                *mark |= u64::from(usize::from(count) >= hits) << i;
            }
        }
        bytes
    }
}

/// Marks the tokens of a packed page that agree with `signs` in at least `hits` tables, one or two.
fn scan(page: &[u64], signs: &[u64], bits: usize, hits: usize, marks: &mut [u64]) {
    let (mut once, mut twice) = ([0u64; WORDS], [0u64; WORDS]);
    for (table, signs) in page.chunks_exact(bits * WORDS).zip(signs.chunks_exact(bits)) {
        let mut differ = [0u64; WORDS];
        for (row, sign) in table.as_chunks::<WORDS>().0.iter().zip(signs) {
            for (differ, word) in differ.iter_mut().zip(row) {
                *differ |= word ^ sign;
            }
        }
        for ((once, twice), differ) in once.iter_mut().zip(&mut twice).zip(&differ) {
            *twice |= *once & !differ;
            *once |= !differ;
        }
    }
    marks.copy_from_slice(if hits == 1 { &once } else { &twice });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::mix;

    const D: usize = 16;

    fn rows(n: usize) -> Vec<f32> {
        (0..n * D).map(|i| (mix(8, i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// Both layouts mark what comparing all codes marks, across the border of a segment, and after a rewind.
    #[test]
    fn both_layouts_mark_what_comparing_marks() {
        let kernels = Kernels::best();
        let (bits, tables, pages) = (3, 7, PAGES + 2);
        let (rows, queries) = (rows(pages * PAGE_TOKENS), rows(2));
        let mut both = [false, true].map(|listed| Signatures::new(5, D, bits, tables, listed));
        let mut code = |x: &[f32]| {
            let mut code = vec![0u32; tables];
            both[0].signs(kernels, x, |bit, sign| code[bit / bits] |= u32::from(sign) << (bit % bits));
            code
        };
        let codes: Vec<_> = rows.chunks_exact(D).map(&mut code).collect();
        let of_queries: Vec<_> = queries.chunks_exact(D).map(&mut code).collect();
        let grow = |signatures: &mut Signatures| {
            for page in rows.chunks_exact(PAGE_TOKENS * D).skip(signatures.pages()) {
                signatures.push(kernels, page);
            }
        };
        both.iter_mut().for_each(grow);
        assert_eq!((both[0].segments.len(), both[1].segments.len()), (0, 1));
        for rewind in [pages, PAGES, PAGES - 1, 3] {
            for signatures in &mut both {
                signatures.truncate(rewind);
                assert!(signatures.pages() <= rewind);
                grow(signatures);
                for hits in [0, 1, 2] {
                    let mut marks = Vec::new();
                    signatures.agree(kernels, &queries, D, hits, &mut marks);
                    for (code, marks) in of_queries.iter().zip(marks.chunks_exact(pages * WORDS)) {
                        for (t, other) in codes.iter().enumerate() {
                            let agreed = code.iter().zip(other).filter(|(a, b)| a == b).count();
                            assert_eq!(marks[t / 64] >> (t % 64) & 1 == 1, agreed >= hits, "{t}");
                        }
                    }
                }
            }
        }
        let tokens = pages * PAGE_TOKENS;
        for (signatures, listed) in both.iter().zip([false, true]) {
            let predicted = Signatures::predict(bits, tables, listed, tokens).0;
            assert_eq!(signatures.bytes() - signatures.rotations.bytes(), predicted);
        }
    }
}
