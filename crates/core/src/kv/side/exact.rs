//! Rows that are kept exactly, as binary16: the first tokens, one row each, and behind them a ring of the newest ones,
//! in which token `t` has row `t % ring`. A sequence that goes on from shared pages brings its exact rows along.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::super::f16::F16;
use super::super::floats::Floats;
use super::super::{Codec, PAGE_TOKENS};
use super::Side;

/// How rows are kept that are not encoded.
pub(in crate::kv) static EXACT: Floats<F16> = Floats::NEW;

/// Bytes of a row that is kept exactly.
pub(in crate::kv) fn exact_row_bytes(head_dim: usize) -> usize {
    EXACT.page_bytes(head_dim) / PAGE_TOKENS
}

impl Side {
    pub(super) fn ring(&self) -> usize {
        self.dtype.exact_recent()
    }

    /// Row of the exact memory in which the ring keeps `token`.
    pub(super) fn ring_row(&self, token: usize) -> usize {
        self.dtype.exact_first() + token % self.ring()
    }

    fn ring_bytes(&self, token: usize) -> Range<usize> {
        let bytes = exact_row_bytes(self.head_dim);
        let at = self.ring_row(token) * bytes;
        at..at + bytes
    }

    /// Writes `rows`, `[n][head_dim]`, to the exact memory from row `at` on.
    pub(super) fn keep_exactly(&mut self, kernels: &Kernels, rows: &[f32], at: usize) {
        EXACT.encode(kernels, rows, self.head_dim, &mut self.memory.exact, at);
    }

    /// Reads a row of the exact memory into `out`.
    pub(super) fn exact_row(&self, kernels: &Kernels, row: usize, out: &mut [f32]) {
        EXACT.decode(kernels, &self.rows(&self.memory.exact, row..row + 1), out);
    }

    /// Whether the exact rows are known that a sequence of the first `len` tokens keeps.
    pub(in crate::kv) fn knows_exact(&self, len: usize) -> bool {
        let settled = self.codec().settled(len);
        len <= self.len.min(self.true_until)
            && (settled == len || self.ring_from <= settled)
            && self.dtype.exact_first() <= len
    }

    /// Writes the first exact rows to `out`.
    pub(in crate::kv) fn first_exact(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(
            &self.memory.exact[..self.dtype.exact_first() * exact_row_bytes(self.head_dim)],
        );
    }

    /// Writes the newest exact rows of a sequence of the first `len` tokens to `out`, which must be known.
    pub(in crate::kv) fn newest_exact(&self, len: usize, out: &mut Vec<u8>) {
        for token in self.codec().settled(len)..len {
            out.extend_from_slice(&self.memory.exact[self.ring_bytes(token)]);
        }
    }

    /// Makes an empty side one of `len` tokens, whose pages its memory holds; takes their exact rows off the front of
    /// `first` and `newest`, as [`Side::first_exact`] and [`Side::newest_exact`] wrote them.
    pub(in crate::kv) fn resume(&mut self, len: usize, first: &mut &[u8], newest: &mut &[u8]) {
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
}
