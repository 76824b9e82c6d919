//! Keys stored channel by channel: a scan of some channels reads those alone.
//!
//! A page of 256 tokens is one row of 256 codes for each channel, as `longbit_kernels::codes` packs a row of 256
//! numbers, so that a scan is a weighted sum of rows: the queries are the weights, the tokens the columns. A token
//! has a scale for all its channels (and at four bits the least of them), bfloat16, so that it can be written when it
//! comes.

use longbit_kernels::codes::position;
use longbit_kernels::{CodeBits, CodeShape, Kernels, Rows, Scales};

use super::approximate::Room;

/// Tokens of a page.
const TOKENS: usize = 256;
/// The table of indices that are codes.
pub(super) const INDICES: [i8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Channels of all tokens.
pub(super) struct Columns {
    /// [`CodeBits::Eight`] or [`CodeBits::Four`].
    bits: CodeBits,
    channels: usize,
    /// `[page][channel][row]`.
    codes: Vec<u8>,
    /// bfloat16, `[token]`.
    steps: Vec<u16>,
    /// bfloat16, `[token]`; at four bits.
    lows: Vec<u16>,
    /// Of a token.
    room: Vec<i8>,
}

impl Columns {
    pub(super) fn new(bits: CodeBits, channels: usize) -> Self {
        let (codes, steps, lows) = (Vec::new(), Vec::new(), Vec::new());
        Columns { bits, channels, codes, steps, lows, room: vec![0; channels] }
    }

    fn shape(&self) -> CodeShape {
        CodeShape { dims: TOKENS, bits: self.bits }
    }

    fn page_bytes(&self) -> usize {
        self.channels * self.shape().row_bytes()
    }

    pub(super) fn tokens(&self) -> usize {
        self.steps.len()
    }

    /// Appends a token.
    pub(super) fn push(&mut self, row: &[f32]) {
        let (page, token) = (self.steps.len() / TOKENS, self.steps.len() % TOKENS);
        let (row_bytes, page_bytes) = (self.shape().row_bytes(), self.page_bytes());
        self.codes.resize((page + 1) * page_bytes, 0);
        let p = position(TOKENS, token);
        let page = &mut self.codes[page * page_bytes..];
        if self.bits == CodeBits::Eight {
            self.steps.push(round_signed(row, &mut self.room));
            for (column, &code) in page.chunks_exact_mut(row_bytes).zip(&self.room) {
                column[p] = code as u8;
            }
        } else {
            let [step, low] = round_nibbles(row, &mut self.room);
            self.steps.push(step);
            self.lows.push(low);
            // Segments of 128 positions are 64 bytes, the second half of the positions in the upper bits.
            let (at, shift) = (p / 128 * 64 + p % 64, p % 128 / 64 * 4);
            for (column, &code) in page.chunks_exact_mut(row_bytes).zip(&self.room) {
                column[at] = column[at] & (0xf0 >> shift) | (code as u8) << shift;
            }
        }
    }

    pub(super) fn truncate(&mut self, tokens: usize) {
        self.steps.truncate(tokens);
        self.lows.truncate(tokens);
        self.codes.truncate(tokens.div_ceil(TOKENS) * self.page_bytes());
    }

    /// Products of the channels `picked`, ascending, with `weights` `[group][picked]`: the first tokens of each row of
    /// `out`, `[group][stride]`.
    pub(super) fn scan(
        &self,
        kernels: &Kernels,
        (picked, weights): (&[u32], &[f32]),
        room: &mut Room,
        stride: usize,
        out: &mut [f32],
    ) {
        let (n, row_bytes, r) = (self.tokens(), self.shape().row_bytes(), picked.len());
        let Room { codes, sums, page: [steps, lows], .. } = room;
        for (p, page) in self.codes.chunks_exact(self.page_bytes()).enumerate() {
            let tokens = p * TOKENS..n.min((p + 1) * TOKENS);
            let next = self.codes.get((p + 1) * self.page_bytes()..).unwrap_or_default();
            let rows = if r == self.channels {
                page
            } else {
                codes.clear();
                for &channel in picked {
                    let at = channel as usize * row_bytes;
                    codes.extend_from_slice(&page[at..at + row_bytes]);
                    kernels.request(next.get(at..at + row_bytes).unwrap_or_default());
                }
                &codes[..]
            };
            let upcoming = if r == self.channels { next.get(..page.len()).unwrap_or_default() } else { &[] };
            sums.clear();
            sums.resize(weights.len() / r * TOKENS, 0.0);
            let rows = Rows { codes: rows, low: &[], table: &INDICES, upcoming };
            kernels.code_accumulate(self.shape(), weights, rows, Scales::One, sums);
            steps.resize(tokens.len(), 0.0);
            kernels.bf16_to_f32(&self.steps[tokens.clone()], steps);
            if !self.lows.is_empty() {
                lows.resize(tokens.len(), 0.0);
                kernels.bf16_to_f32(&self.lows[tokens.clone()], lows);
            }
            for (h, weights) in weights.chunks_exact(r).enumerate() {
                let out = &mut out[h * stride + tokens.start..h * stride + tokens.end];
                out.copy_from_slice(&sums[h * TOKENS..][..tokens.len()]);
                kernels.mul_assign(out, steps);
                if !self.lows.is_empty() {
                    kernels.scale_add(out, 1.0, lows, kernels.sum(weights));
                }
            }
        }
    }

    /// Bytes that a scan of `channels` reads.
    pub(super) fn read_bytes(&self, channels: usize) -> usize {
        read_bytes(self.bits, channels, self.tokens())
    }

    pub(super) fn bytes(&self) -> usize {
        self.codes.len() + 2 * (self.steps.len() + self.lows.len())
    }
}

/// Bytes that a scan of `channels` of `tokens` reads.
pub(super) fn read_bytes(bits: CodeBits, channels: usize, tokens: usize) -> usize {
    let numbers = if bits == CodeBits::Eight { 1 } else { 2 };
    (channels * tokens * bits.width()).div_ceil(8) + 2 * numbers * tokens
}

/// The least bfloat16 that is not below `x`.
fn up(x: f32) -> u16 {
    down_bits(-x) ^ 0x8000
}

/// The largest bfloat16 that is not above `x`.
fn down_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    (if x < 0.0 { bits.saturating_add(0xffff) } else { bits } >> 16) as u16
}

fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// `1 / x`, or zero where that is not finite: numbers so close become equal.
fn inverse(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// Rounds a row to signed bytes; returns its step, bfloat16. Error: half a step, `1.008 / 254` of the largest magnitude.
fn round_signed(row: &[f32], codes: &mut [i8]) -> u16 {
    let step = up(row.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0);
    let inverse = inverse(widen(step));
    codes.iter_mut().zip(row).for_each(|(code, x)| *code = (x * inverse).round_ties_even() as i8);
    step
}

/// Rounds a row to codes 0 to 15 between its least and its largest number; returns step and least number, bfloat16. Error:
/// half a step.
pub(super) fn round_nibbles(row: &[f32], codes: &mut [i8]) -> [u16; 2] {
    let (least, most) =
        row.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    let low = down_bits(least);
    let step = up((most - widen(low)) / 15.0);
    let (low_value, inverse) = (widen(low), inverse(widen(step)));
    for (code, x) in codes.iter_mut().zip(row) {
        *code = ((x - low_value) * inverse).round_ties_even().clamp(0.0, 15.0) as i8;
    }
    [step, low]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::testing::generator;

    fn rows(n: usize) -> Vec<f32> {
        let mut next = generator(3);
        (0..n).map(|i| next() + if i % 24 == 5 { 4.0 } else { 0.0 }).collect()
    }

    #[test]
    fn bfloat16_bounds() {
        for x in [0.0, 1.0, -1.0, 0.3, -0.3, 1e-30, -1e-30, 3e5, -3e5] {
            assert!(widen(up(x)) >= x && widen(down_bits(x)) <= x, "{x}");
            assert!(widen(up(x)) - widen(down_bits(x)) <= x.abs() / 100.0, "{x}");
        }
    }

    #[test]
    fn a_scan_of_channels_is_their_products() {
        const C: usize = 24;
        let kernels = Kernels::best();
        let rows = rows(600 * C);
        let weights = &rows[7..7 + 2 * C];
        for bits in [CodeBits::Eight, CodeBits::Four] {
            let mut columns = Columns::new(bits, C);
            rows.chunks_exact(C).for_each(|row| columns.push(row));
            // A rewind and other rows leave nothing behind.
            columns.truncate(300);
            (0..20).for_each(|_| columns.push(&[1.0; C]));
            columns.truncate(300);
            rows.chunks_exact(C).skip(300).for_each(|row| columns.push(row));
            for picked in [(0..C as u32).collect::<Vec<_>>(), vec![1, 5, 6, 23]] {
                let of = |h: usize| picked.iter().map(move |&c| weights[h * C + c as usize]);
                let weights: Vec<f32> = of(0).chain(of(1)).collect();
                let mut out = vec![f32::NAN; 2 * 601];
                columns.scan(kernels, (&picked, &weights), &mut Room::default(), 601, &mut out);
                for (h, out) in out.chunks_exact(601).enumerate() {
                    assert!(out[600].is_nan());
                    for (row, out) in rows.chunks_exact(C).zip(out) {
                        let exact: f32 = picked.iter().zip(of(h)).map(|(&c, w)| row[c as usize] * w).sum();
                        let mut codes = [0; C];
                        let step = widen(if bits == CodeBits::Eight {
                            round_signed(row, &mut codes)
                        } else {
                            round_nibbles(row, &mut codes)[0]
                        });
                        let bound = 0.502 * step * of(h).map(f32::abs).sum::<f32>() + 1e-2;
                        assert!((exact - out).abs() <= bound, "{bits:?} {exact} {out} {bound}");
                    }
                }
            }
            assert_eq!(columns.read_bytes(C), if bits == CodeBits::Eight { 600 * 26 } else { 600 * 16 });
        }
    }
}
