//! Sums of the cached values, for methods that assume the mean of all tokens for those that they do not read.
//!
//! Rows are added as they are stored, in token order: single precision within a page, double precision from page to page.
//! Rows that a format has not settled yet are read when the mean is asked for. Cost: 4 bytes a number and page (2 bytes a
//! token at 128 numbers), of which a decision reads the total and the open page.

use super::partial::stride;
use super::{Reader, Selection};
use crate::kv::{KvDtype, KvHead, PAGE_TOKENS, SideDtype};

pub(super) struct ValueSums {
    values: SideDtype,
    /// Of complete pages, `[pages][head_dim]`; kept for rewinds.
    pages: Vec<f32>,
    /// Of all complete pages.
    total: Vec<f64>,
    /// Of the settled tokens of the open page.
    open: Vec<f32>,
    /// Tokens summed.
    tokens: usize,
    rows: Vec<f32>,
}

impl ValueSums {
    pub(super) fn new(dtype: KvDtype, head_dim: usize) -> Self {
        let (total, open) = (vec![0.0; head_dim], vec![0.0; head_dim]);
        ValueSums { values: dtype.values, pages: Vec::new(), total, open, tokens: 0, rows: Vec::new() }
    }

    /// Takes up what was appended to `kv`.
    pub(super) fn grow(&mut self, kv: &KvHead) {
        self.add(kv, self.values.codec().settled(kv.len()));
    }

    /// Goes back to what `kv` still holds.
    pub(super) fn shrink(&mut self, kv: &KvHead) {
        let until = self.values.codec().settled(kv.len());
        if until >= self.tokens {
            return;
        }
        let (pages, d) = (until / PAGE_TOKENS, self.open.len());
        self.pages.truncate(pages * d);
        self.total.fill(0.0);
        for page in self.pages.chunks_exact(d) {
            self.total.iter_mut().zip(page).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        self.open.fill(0.0);
        self.tokens = pages * PAGE_TOKENS;
        self.add(kv, until);
    }

    fn add(&mut self, kv: &KvHead, until: usize) {
        let d = self.open.len();
        while self.tokens < until {
            let end = until.min((self.tokens / PAGE_TOKENS + 1) * PAGE_TOKENS);
            self.rows.resize((end - self.tokens) * d, 0.0);
            kv.decode_values(self.tokens..end, &mut self.rows);
            for row in self.rows.chunks_exact(d) {
                kv.kernels().add_assign(&mut self.open, row);
            }
            self.tokens = end;
            if end.is_multiple_of(PAGE_TOKENS) {
                self.total.iter_mut().zip(&self.open).for_each(|(sum, &x)| *sum += f64::from(x));
                self.pages.extend_from_slice(&self.open);
                self.open.fill(0.0);
            }
        }
    }

    /// Writes the mean value of all tokens of `kv`, of which there is one at least, to `mean`; counts what that reads.
    pub(super) fn mean(&self, kv: &KvHead, reader: &mut Reader, mean: &mut Vec<f32>, out: &mut Selection) {
        let d = self.open.len();
        let mut newest = vec![0.0; stride(d)];
        let unsettled = self.tokens..kv.len();
        if !unsettled.is_empty() {
            // Weights of one: the sum.
            let mut logits = vec![0.0; unsettled.len()];
            reader.partial(kv, std::slice::from_ref(&unsettled), &mut logits, &mut newest);
        }
        let n = kv.len() as f64;
        mean.clear();
        for ((&total, &open), &newest) in self.total.iter().zip(&self.open).zip(&newest[2..]) {
            mean.push(((total + f64::from(open) + f64::from(newest)) / n) as f32);
        }
        out.index_bytes += (d * (size_of::<f64>() + size_of::<f32>())) as u64;
    }

    pub(super) fn bytes(&self) -> usize {
        (self.pages.len() + self.open.len()) * size_of::<f32>() + self.total.len() * size_of::<f64>()
    }

    /// [`ValueSums::bytes`] at a context.
    pub(super) fn predicted_bytes(context: usize, head_dim: usize) -> usize {
        head_dim * (context / PAGE_TOKENS * size_of::<f32>() + size_of::<f32>() + size_of::<f64>())
    }
}
