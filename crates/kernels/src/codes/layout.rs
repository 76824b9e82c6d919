//! Packing of codes into rows, and back.

use super::{CODE_BLOCK, CodeBits, CodeShape, Rows, SEGMENT, SEGMENT_BLOCKS};
use crate::Kernels;
use crate::vector::F32x16;

/// Four-byte lanes of a block.
const WORDS: usize = CODE_BLOCK / 4;

/// The position of number `i` in a padded row of `padded` (see the module).
pub const fn position(padded: usize, i: usize) -> usize {
    let first = i / SEGMENT * SEGMENT;
    let left = padded - first;
    let blocks = if left < SEGMENT { left / CODE_BLOCK } else { SEGMENT_BLOCKS };
    let i = i - first;
    first + 4 * ((i % CODE_BLOCK / 4) * blocks + i / CODE_BLOCK) + i % 4
}

/// The bytes of a segment brought from the order of numbers into that of positions.
#[inline(always)]
fn to_positions<const B: usize>(numbers: &[u8; SEGMENT], out: &mut [u8; SEGMENT]) {
    for w in 0..WORDS {
        for b in 0..B {
            let (to, from) = (4 * (w * B + b), 4 * (b * WORDS + w));
            out[to..to + 4].copy_from_slice(&numbers[from..from + 4]);
        }
    }
}

/// The same, for what is left of a row: at most 128 numbers, padded with zeros. Returns the length of the segment.
#[inline(always)]
fn segment_positions(numbers: &[i8], out: &mut [u8; SEGMENT]) -> usize {
    let mut padded = [0u8; SEGMENT];
    for (to, &from) in padded.iter_mut().zip(numbers) {
        *to = from as u8;
    }
    let blocks = numbers.len().div_ceil(CODE_BLOCK);
    match blocks {
        1 => to_positions::<1>(&padded, out),
        2 => to_positions::<2>(&padded, out),
        3 => to_positions::<3>(&padded, out),
        _ => to_positions::<4>(&padded, out),
    }
    blocks * CODE_BLOCK
}

/// Four bits: the halves of a segment in the halves of its bytes, after a shift.
#[inline(always)]
fn nibbles<const SHIFT: u32>(x: &[u8], out: &mut [u8]) {
    let (a, b) = x.split_at(out.len());
    for ((o, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *o = (a >> SHIFT & 15) | (b >> SHIFT << 4);
    }
}

#[inline(always)]
fn pairs(x: &[u8], out: &mut [u8]) {
    let quarter = out.len();
    let (x, y) = x.split_at(2 * quarter);
    let ((a, b), (c, d)) = (x.split_at(quarter), y.split_at(quarter));
    for j in 0..quarter {
        out[j] = (a[j] & 3) | (b[j] & 3) << 2 | (c[j] & 3) << 4 | d[j] << 6;
    }
}

/// Packs the numbers of one segment: its bytes are the first of `out` (and of `low`). Returns how many they are.
#[inline(always)]
pub(crate) fn pack_segment(bits: CodeBits, numbers: &[i8], out: &mut [u8], low: &mut [u8]) -> usize {
    let mut x = [0u8; SEGMENT];
    let m = segment_positions(numbers, &mut x);
    let x = &x[..m];
    match bits {
        CodeBits::Eight => out[..m].copy_from_slice(x),
        CodeBits::Four => nibbles::<0>(x, &mut out[..m / 2]),
        CodeBits::Two => pairs(x, &mut out[..m / 4]),
        CodeBits::Three => {
            let (lower, upper) = out[..3 * m / 8].split_at_mut(m / 4);
            pairs(x, lower);
            for (o, eight) in upper.iter_mut().zip(x.chunks_exact(8)) {
                *o = 0;
                for (bit, &index) in eight.iter().enumerate() {
                    *o |= (index >> 2 & 1) << bit;
                }
            }
        }
        CodeBits::Planes => {
            nibbles::<4>(x, &mut out[..m / 2]);
            nibbles::<0>(x, &mut low[..m / 2]);
        }
    }
    m * bits.width() / 8
}

/// The bytes of one segment of a row.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    bits: CodeBits,
    /// Positions.
    len: usize,
    codes: &'a [u8],
    low: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Segment `s` of row `t`.
    #[inline(always)]
    pub(crate) fn new(shape: CodeShape, rows: Rows<'a>, t: usize, s: usize) -> Segment<'a> {
        let len = SEGMENT.min(shape.padded() - s * SEGMENT);
        let (first, bytes) = (s * SEGMENT * shape.bits.width() / 8, len * shape.bits.width() / 8);
        let at = t * shape.row_bytes() + first;
        let low = if shape.bits == CodeBits::Planes { &rows.low[at..at + bytes] } else { &[] };
        Segment { bits: shape.bits, len, codes: &rows.codes[at..at + bytes], low }
    }
}

/// Signed codes, or indices, of a segment at the positions of a whole one: what does not exist is zero.
#[inline(always)]
pub(crate) fn spread(segment: Segment<'_>, out: &mut [u8; SEGMENT]) {
    let Segment { bits, len: m, codes, low } = segment;
    let mut x = [0u8; SEGMENT];
    match bits {
        CodeBits::Eight => x[..m].copy_from_slice(codes),
        CodeBits::Four => {
            let (a, b) = x[..m].split_at_mut(m / 2);
            for ((a, b), &byte) in a.iter_mut().zip(b).zip(codes) {
                (*a, *b) = (byte & 15, byte >> 4);
            }
        }
        CodeBits::Planes => {
            let (a, b) = x[..m].split_at_mut(m / 2);
            for (((a, b), &hi), &lo) in a.iter_mut().zip(b).zip(codes).zip(low) {
                (*a, *b) = (hi << 4 | (lo & 15), (hi & 0xf0) | lo >> 4);
            }
        }
        CodeBits::Two | CodeBits::Three => {
            let (lower, upper) = codes.split_at(m / 4);
            for (quarter, x) in x[..m].chunks_exact_mut(m / 4).enumerate() {
                for (x, &byte) in x.iter_mut().zip(lower) {
                    *x = byte >> (2 * quarter) & 3;
                }
            }
            for (eight, &byte) in x.chunks_exact_mut(8).zip(upper) {
                for (bit, x) in eight.iter_mut().enumerate() {
                    *x |= (byte >> bit & 1) << 2;
                }
            }
        }
    }
    match m / CODE_BLOCK {
        1 => to_whole::<1>(&x, out),
        2 => to_whole::<2>(&x, out),
        3 => to_whole::<3>(&x, out),
        _ => *out = x,
    }
}

/// From the positions of a segment of `B` blocks to those of a whole one.
#[inline(always)]
fn to_whole<const B: usize>(x: &[u8; SEGMENT], out: &mut [u8; SEGMENT]) {
    *out = [0; SEGMENT];
    for w in 0..WORDS {
        out[4 * w * SEGMENT_BLOCKS..][..4 * B].copy_from_slice(&x[4 * w * B..][..4 * B]);
    }
}

/// Packs `rows` `[n][dims]`; compiled for each instruction set by the table of float operations.
#[inline(always)]
pub(crate) fn pack<V: F32x16>(shape: CodeShape, rows: &[i8], out: &mut [u8], low: &mut [u8]) {
    let bytes = shape.row_bytes();
    for (t, row) in rows.chunks_exact(shape.dims).enumerate() {
        let mut at = t * bytes;
        for numbers in row.chunks(SEGMENT) {
            let low = if shape.bits == CodeBits::Planes { &mut low[at..] } else { &mut [][..] };
            at += pack_segment(shape.bits, numbers, &mut out[at..], low);
        }
    }
}

/// The codes of rows, `out` `[n][dims]`; compiled for each instruction set.
#[inline(always)]
pub(crate) fn unpack<V: F32x16>(shape: CodeShape, rows: Rows<'_>, out: &mut [i8]) {
    for (t, row) in out.chunks_exact_mut(shape.dims).enumerate() {
        for (s, numbers) in row.chunks_mut(SEGMENT).enumerate() {
            let (mut x, mut all) = ([0u8; SEGMENT], [0u8; SEGMENT]);
            spread(Segment::new(shape, rows, t, s), &mut x);
            for w in 0..WORDS {
                for b in 0..SEGMENT_BLOCKS {
                    let (from, to) = (4 * (w * SEGMENT_BLOCKS + b), 4 * (b * WORDS + w));
                    all[to..to + 4].copy_from_slice(&x[from..from + 4]);
                }
            }
            if shape.bits.is_signed() {
                numbers.iter_mut().zip(&all).for_each(|(code, &x)| *code = x as i8);
            } else {
                numbers.iter_mut().zip(&all).for_each(|(code, &x)| *code = rows.table[usize::from(x & 15)]);
            }
        }
    }
}

impl CodeShape {
    /// The codes of rows, `out` `[n][dims]`: number by number, for tests and for what is not hot.
    ///
    /// # Panics
    /// The lengths do not agree.
    pub fn unpack(&self, rows: Rows<'_>, out: &mut [i8]) {
        let n = self.count(rows, "unpack");
        assert_eq!(out.len(), n * self.dims, "unpack: codes of {n} rows");
        for (t, row) in out.chunks_exact_mut(self.dims).enumerate() {
            for (i, code) in row.iter_mut().enumerate() {
                *code = self.code(rows, t, i);
            }
        }
    }

    /// The code of number `i` of row `t`.
    pub(crate) fn code(&self, rows: Rows<'_>, t: usize, i: usize) -> i8 {
        let first = i / SEGMENT * SEGMENT;
        let m = SEGMENT.min(self.padded() - first);
        let p = position(self.padded(), i) - first;
        let at = t * self.row_bytes() + first * self.bits.width() / 8;
        let nibble = |x: &[u8]| x[at + p % (m / 2)] >> (4 * (p / (m / 2))) & 15;
        let pair = || rows.codes[at + p % (m / 4)] >> (2 * (p / (m / 4))) & 3;
        match self.bits {
            CodeBits::Eight => rows.codes[at + p] as i8,
            CodeBits::Four => rows.table[usize::from(nibble(rows.codes))],
            CodeBits::Two => rows.table[usize::from(pair())],
            CodeBits::Three => {
                let upper = rows.codes[at + m / 4 + p / 8] >> (p % 8) & 1;
                rows.table[usize::from(pair() | upper << 2)]
            }
            CodeBits::Planes => (nibble(rows.codes) << 4 | nibble(rows.low)) as i8,
        }
    }
}

impl Kernels {
    /// The codes of rows, `out` `[n][shape.dims]`, as [`CodeShape::unpack`] gives them.
    ///
    /// # Panics
    /// The lengths do not agree.
    pub fn unpack_codes(&self, shape: CodeShape, rows: Rows<'_>, out: &mut [i8]) {
        let n = shape.count(rows, "unpack_codes");
        assert_eq!(out.len(), n * shape.dims, "unpack_codes: codes of {n} rows");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.unpack_codes)(shape, rows, out) }
    }

    /// Packs codes, or the indices of codes, into rows: `codes` `[n][shape.dims]`, `out` `[n][shape.row_bytes()]`, `low` the
    /// same where `shape` has two planes and otherwise empty. Bits beyond those of the format are ignored.
    ///
    /// # Panics
    /// The lengths do not agree, or `shape.dims` is not a multiple of 8.
    pub fn pack_codes(&self, shape: CodeShape, codes: &[i8], out: &mut [u8], low: &mut [u8]) {
        shape.check("pack_codes");
        let n = codes.len() / shape.dims;
        assert_eq!(codes.len(), n * shape.dims, "pack_codes: rows of {shape:?}");
        assert_eq!(out.len(), n * shape.row_bytes(), "pack_codes: bytes of {n} rows");
        let lower = if shape.bits == CodeBits::Planes { out.len() } else { 0 };
        assert_eq!(low.len(), lower, "pack_codes: lower plane of {n} rows");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.pack_codes)(shape, codes, out, low) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::codes::HIGH_NIBBLES;

    const DIMS: [usize; 9] = [8, 16, 32, 48, 64, 96, 128, 160, 256];

    #[test]
    fn positions_are_a_permutation_with_a_block_in_every_fourth_lane() {
        for dims in DIMS.into_iter().chain([24, 40, 120, 136, 224, 512]) {
            let padded = CodeShape { dims, bits: CodeBits::Eight }.padded();
            let mut seen: Vec<usize> = (0..padded).map(|i| position(padded, i)).collect();
            seen.sort_unstable();
            assert!(seen.iter().enumerate().all(|(p, &q)| p == q), "{dims}");
        }
        for i in 0..256 {
            assert_eq!(position(256, i) % SEGMENT / 4 % 4, i % SEGMENT / 32, "{i}");
            assert_eq!(position(256, i) % 4, i % 4);
        }
    }

    #[test]
    fn rows_come_back_from_their_bytes() {
        let table: [i8; 16] = std::array::from_fn(|i| (i as i8 - 7) * 9 - (i as i8 % 3));
        for k in Isa::available().into_iter().filter_map(Kernels::for_isa) {
            for (dims, bits) in DIMS.into_iter().flat_map(|d| CodeBits::ALL.map(|b| (d, b))) {
                let shape = CodeShape { dims, bits };
                let n = 5;
                // Only the bits of an index count.
                let codes: Vec<i8> = (0..n * dims).map(|i| (i * 89 + i / dims * 31 + 17) as i8).collect();
                let mask = if bits.is_signed() { 255 } else { (1 << bits.width()) - 1 };
                let wanted: Vec<i8> = codes
                    .iter()
                    .map(|&c| if bits.is_signed() { c } else { table[usize::from(c as u8 & mask)] })
                    .collect();
                let mut out = vec![0xff; n * shape.row_bytes()];
                let mut low = vec![0xff; if bits == CodeBits::Planes { out.len() } else { 0 }];
                k.pack_codes(shape, &codes, &mut out, &mut low);
                let mut back = vec![0; n * dims];
                shape.unpack(Rows { codes: &out, low: &low, table: &table, upcoming: &[] }, &mut back);
                assert!(back == wanted, "{} {shape:?}", k.isa());
                back.fill(99);
                k.unpack_codes(
                    shape,
                    Rows { codes: &out, low: &low, table: &table, upcoming: &[] },
                    &mut back,
                );
                assert!(back == wanted, "{} {shape:?}", k.isa());
                if bits == CodeBits::Planes {
                    let shape = CodeShape { dims, bits: CodeBits::Four };
                    shape.unpack(Rows::indices(&out, &HIGH_NIBBLES), &mut back);
                    assert!(back.iter().zip(&codes).all(|(&b, &c)| b == (c & -16)), "{} {shape:?}", k.isa());
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_bits_that_the_module_says() {
        let shape = |bits| CodeShape { dims: 64, bits };
        let codes: Vec<i8> = (0..64).map(|i| i as i8 % 8).collect();
        let k = Kernels::best();
        let mut out = vec![0; 64];
        k.pack_codes(shape(CodeBits::Eight), &codes, &mut out, &mut []);
        // Two blocks: the words of both take turns.
        assert_eq!(out[..16], [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]);
        let mut out = vec![0; 24];
        k.pack_codes(shape(CodeBits::Three), &codes, &mut out, &mut []);
        assert_eq!(out[..5], [0b0000_0000, 0b0101_0101, 0b1010_1010, 0b1111_1111, 0b0000_0000]);
        assert_eq!(out[16..], [0, 0xff, 0, 0xff, 0, 0xff, 0, 0xff]);
    }
}
