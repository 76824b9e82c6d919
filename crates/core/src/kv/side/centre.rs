//! The means of the pages of a centred side. A page gets its mean when it begins, from the rows before it as they are
//! read, and keeps it behind its rows: `[head_dim]` bfloat16. Sums grow with the rows, in their order.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::super::PAGE_TOKENS;
use super::{Side, kept};

impl Side {
    /// The mean of a page of a centred side, bfloat16.
    pub(in crate::kv) fn mean(&self, page: usize) -> &[u16] {
        bytemuck::cast_slice(&self.memory.page(page)[self.codec().page_bytes(self.head_dim)..])
    }

    /// Encodes `rows` within a page, less its mean.
    pub(super) fn encode_in_page(&mut self, kernels: &Kernels, rows: &[f32], page: usize, row: usize) {
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
        self.less = kept(std::mem::take(&mut self.less), d);
    }

    /// Gives a page of a centred side its mean, unless it has it from before a rewind: that of the rows of the page before it,
    /// as they are read; of the rows kept exactly for the first page.
    pub(super) fn begin_page(&mut self, kernels: &Kernels, page: usize) {
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
            self.exact_row(kernels, token, &mut row);
            self.sums.iter_mut().zip(&row).for_each(|(sum, x)| *sum += x);
        }
    }

    /// Adds the encoded rows `tokens`, which lie in one page, as they are read.
    pub(super) fn add_to_sums(&mut self, kernels: &Kernels, tokens: Range<usize>) {
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
        self.room2 = kept(room, d);
        self.summed = Some(tokens.end);
    }
}

pub(super) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
