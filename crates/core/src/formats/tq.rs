//! TQ1_0 and TQ2_0, the ternary formats of llama.cpp: blocks of 256 weights with an f16 scale `d` at the end. Source:
//! `block_tq1_0`, `block_tq2_0` in `ggml-common.h` and their quantisers in `ggml-quants.c`.
//!
//! TQ2_0, 66 bytes: two halves of 32 bytes with 128 two-bit codes each, first group in the low bits; `d`.
//!
//! TQ1_0, 54 bytes, five codes a byte: 32 bytes for the codes `j + 32 * k` (`k` in 0..5) of the first 160; 16 bytes for
//! the codes `j + 16 * k` of the next 80; 4 bytes for the codes `j + 4 * k` (`k` in 0..4) of the last 16; `d`. The codes
//! of a byte are the digits of a number in base 3, the first one the most significant (with a fifth digit of zero in the
//! last 4 bytes), stored as `ceil(number * 256 / 243)`. Code `k` is `(byte * 3^k mod 256) * 3 / 256`: every byte decodes
//! to codes of 0 to 2, also the 13 that no encoder writes.

use super::two_bits::{LOW_FIRST, Seen, pack, unpack};
use super::{Encoding, FormatError, check_codes, positive, trits};
use half::f16;

/// Weights of a block.
pub(super) const BLOCK: usize = 256;

/// Which of the two.
#[derive(Clone, Copy)]
pub(super) enum Tq {
    One,
    Two,
}

impl Tq {
    fn encoding(self) -> Encoding {
        match self {
            Tq::One => Encoding::Tq1_0,
            Tq::Two => Encoding::Tq2_0,
        }
    }

    /// Bytes of the codes of a block.
    fn packed(self) -> usize {
        match self {
            Tq::One => 52,
            Tq::Two => 64,
        }
    }

    /// Unpacks each block of a row in turn; `each` gets the codes, and the scale if one of them is not zero.
    fn blocks(
        self,
        bytes: &[u8],
        row: usize,
        codes: &mut [u8],
        mut each: impl FnMut(usize, &[u8], Option<f32>) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let blocks = bytes.chunks_exact(self.packed() + 2).zip(codes.as_chunks_mut::<BLOCK>().0);
        let mut bad = false;
        for (i, (block, codes)) in blocks.enumerate() {
            let (packed, d) = block.split_at(self.packed());
            let seen = match self {
                Tq::One => unpack_trits(packed, codes),
                Tq::Two => unpack::<32>(packed, LOW_FIRST, codes),
            };
            bad |= seen.bad;
            // A damaged code is reported below, in place of what its block says of the scale.
            let d = (seen.nonzero && !seen.bad).then(|| f16::from_le_bytes([d[0], d[1]]).to_f32());
            each(i, codes, d.map(|d| positive(self.encoding(), row, d)).transpose()?)?;
        }
        if bad { check_codes(row, codes) } else { Ok(()) }
    }

    pub(super) fn codes(
        self,
        bytes: &[u8],
        row: usize,
        codes: &mut [u8],
    ) -> Result<Option<f32>, FormatError> {
        let mut scale = None;
        self.blocks(bytes, row, codes, |_, _, d| match (scale, d) {
            (Some(first), Some(second)) if first != second => Err(FormatError::Scales { row, first, second }),
            _ => {
                scale = scale.or(d);
                Ok(())
            }
        })?;
        Ok(scale)
    }

    /// Each block by its own scale: they need not agree.
    pub(super) fn dequantize(self, bytes: &[u8], row: usize, out: &mut [f32]) -> Result<(), FormatError> {
        let mut codes = vec![0; out.len()];
        self.blocks(bytes, row, &mut codes, |i, codes, d| {
            let d = d.unwrap_or(0.0);
            let out = out[i * BLOCK..].iter_mut();
            out.zip(codes).for_each(|(o, &code)| *o = (f32::from(code) - 1.0) * d);
            Ok(())
        })
    }

    /// As llama.cpp writes it: a block of zeros has the scale zero.
    pub(super) fn encode(self, codes: &[u8], scale: f32, out: &mut Vec<u8>) {
        for block in codes.as_chunks::<BLOCK>().0 {
            match self {
                Tq::One => pack_trits(block, out),
                Tq::Two => pack::<32>(block, LOW_FIRST, out),
            }
            let d = if block.iter().all(|&code| code == 1) { 0.0 } else { scale };
            out.extend(f16::from_f32(d).to_le_bytes());
        }
    }
}

/// Bytes, and digits of each, of the three parts of a block of TQ1_0.
const PARTS: [(usize, usize); 3] = [(32, 5), (16, 5), (4, 4)];

#[inline(always)]
fn unpack_trits(mut packed: &[u8], codes: &mut [u8; BLOCK]) -> Seen {
    let mut rest = codes.as_mut_slice();
    for (width, digits) in PARTS {
        let (bytes, after) = packed.split_at(width);
        packed = after;
        let (part, after) = rest.split_at_mut(width * digits);
        rest = after;
        for (codes, power) in part.chunks_exact_mut(width).zip(trits::POWERS) {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code = trits::first(byte.wrapping_mul(power));
            }
        }
    }
    Seen { nonzero: codes.iter().fold(0, |all, code| all | code ^ 1) != 0, bad: false }
}

fn pack_trits(block: &[u8; BLOCK], out: &mut Vec<u8>) {
    let mut rest = block.as_slice();
    for (width, digits) in PARTS {
        let (part, after) = rest.split_at(width * digits);
        rest = after;
        for j in 0..width {
            out.push(trits::byte(|k| if k < digits { part[j + width * k] } else { 0 }));
        }
    }
}
