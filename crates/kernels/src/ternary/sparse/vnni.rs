//! The products of lists with AVX-512 VNNI.
//!
//! Rows: one after another, as the product of a tile has them. Columns: the bytes of four columns are
//! interleaved, so that a double word holds four columns of the same rows and one dot-product instruction multiplies it
//! with the four activations; what differs between rows is the lane. Groups keep the scale `4^g` of their bits until the
//! sums are folded.

use super::super::avx512::finish;
use super::super::{BLOCK_COLS, TILE_ROWS, UNIT};
use super::{Columns, Rows, SparseTable};
use std::arch::x86_64::*;
use std::ops::Range;

pub(crate) static TABLE: SparseTable = SparseTable { rows, columns };

/// How far ahead of the arithmetic listed rows and columns are requested, at least, into the second-level cache.
const AHEAD: usize = 16384;
/// Columns that share one pass over the sums.
const GROUP: usize = 8;
/// Columns of one dot product.
const QUAD: usize = 4;
/// Blocks of 256 rows whose scaled sums are kept at hand: half of a usual first-level cache.
const STRIPE: usize = 16;
/// A lane takes at most `2^16` from four columns: so many columns do not overflow it.
const MOST_COLUMNS: usize = 1 << 16;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn rows(rows: Rows<'_>, codes: &[i8], sum: i32, scale: f32, out: &mut [f32]) {
    let blocks = rows.row_bytes / UNIT;
    let codes = &codes[..blocks * BLOCK_COLS];
    let line = |row: u32| rows.data[row as usize * rows.row_bytes..][..rows.row_bytes].as_ptr();
    let ahead = AHEAD.div_ceil(rows.row_bytes.max(1));
    for &row in &rows.listed[..ahead.min(rows.listed.len())] {
        for block in 0..blocks {
            _mm_prefetch::<_MM_HINT_T1>(line(row).wrapping_add(block * UNIT).cast());
        }
    }
    for (i, four) in rows.listed.chunks(TILE_ROWS).enumerate() {
        let mut sums = [_mm512_setzero_si512(); TILE_ROWS];
        for (k, (&row, sums)) in four.iter().zip(&mut sums).enumerate() {
            let row = line(row);
            // At the end of the list there is nothing to request but what is at hand.
            let next = rows.listed.get(i * TILE_ROWS + k + ahead).map_or(row, |&row| line(row));
            // SAFETY: every line was cut out with `blocks` units, and codes has a block of activations for each.
            *sums = unsafe { row_sums(row, next, blocks, codes.as_ptr()) };
        }
        let mut results = [0.0; TILE_ROWS];
        finish(sums, sum, scale, &mut results);
        for (&row, result) in four.iter().zip(results) {
            out[row as usize] = result;
        }
    }
}

/// One row for one token: lines in ascending order, for only then the hardware helps to fetch them.
///
/// # Safety
/// `line` is readable for `blocks` units, `codes` for `blocks` blocks of activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn row_sums(line: *const u8, next: *const u8, blocks: usize, codes: *const i8) -> __m512i {
    let masks = masks();
    let mut acc = [_mm512_setzero_si512(); 4];
    for block in 0..blocks {
        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(block * UNIT).cast());
        // SAFETY: block < blocks; a unit has 64 bytes.
        let w = unsafe { _mm512_loadu_si512(line.add(block * UNIT).cast()) };
        for g in 0..4 {
            // SAFETY: block < blocks and g < 4: 64 codes of this block.
            let a = unsafe { _mm512_loadu_si512(codes.add(block * BLOCK_COLS + g * UNIT).cast()) };
            acc[g] = _mm512_dpbusd_epi32(acc[g], _mm512_and_si512(w, masks[g]), a);
        }
    }
    let low = _mm512_add_epi32(acc[0], _mm512_srai_epi32::<2>(acc[1]));
    let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[2]), _mm512_srai_epi32::<6>(acc[3]));
    _mm512_add_epi32(low, high)
}

/// What separates the four groups of a byte.
#[inline]
#[target_feature(enable = "avx512f")]
fn masks() -> [__m512i; 4] {
    [_mm512_set1_epi8(3), _mm512_set1_epi8(3 << 2), _mm512_set1_epi8(3 << 4), _mm512_set1_epi8(-64)]
}

/// Sums of the 256 rows of a block, each `4^g` too large: `[g][part][lane]` has row `64 g + 16 (lane / 4) + 4 part +
/// lane % 4`, as interleaving leaves them.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Scaled([[[i32; 16]; 4]; 4]);

/// Some columns that share one pass over the sums.
struct Group {
    /// First bytes of the columns, padded with one of them.
    lines: [*const u8; GROUP],
    /// Four activations each, zero for the padding.
    activations: [i32; GROUP / QUAD],
    /// Dot products that are needed.
    quads: usize,
}

impl Group {
    fn new(columns: &Columns<'_>, listed: &[u32], codes: &[i8]) -> Group {
        let line =
            |c: u32| columns.data[c as usize * columns.column_bytes..][..columns.column_bytes].as_ptr();
        let mut lines = [line(listed[0]); GROUP];
        let mut a = [0u8; GROUP];
        for (i, &column) in listed[..listed.len().min(GROUP)].iter().enumerate() {
            lines[i] = line(column);
            a[i] = codes[column as usize] as u8;
        }
        let mut activations = [0; GROUP / QUAD];
        for (quad, a) in activations.iter_mut().zip(a.as_chunks::<QUAD>().0) {
            *quad = i32::from_le_bytes(*a);
        }
        Group { lines, activations, quads: listed.len().min(GROUP).div_ceil(QUAD) }
    }
}

/// Requests the columns of a list line after line, in their order in memory: only then the hardware helps to fetch them.
struct Requests<'a> {
    columns: Columns<'a>,
    listed: std::slice::Iter<'a, u32>,
    /// The line to request next, and the end of its column.
    bytes: Range<*const u8>,
    /// Bytes of a column that are needed.
    wanted: Range<usize>,
}

impl<'a> Requests<'a> {
    fn new(columns: Columns<'a>, listed: &'a [u32], wanted: Range<usize>) -> Requests<'a> {
        Requests { columns, listed: listed.iter(), bytes: std::ptr::null()..std::ptr::null(), wanted }
    }

    /// The next line, or none at the end of the list.
    #[inline(always)]
    fn next_line(&mut self) -> *const u8 {
        if self.bytes.start == self.bytes.end {
            let Some(&column) = self.listed.next() else { return self.bytes.start };
            let line = &self.columns.data[column as usize * self.columns.column_bytes..];
            self.bytes = line[self.wanted.clone()].as_ptr_range();
        }
        let line = self.bytes.start;
        self.bytes.start = line.wrapping_add(UNIT);
        line
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn columns(columns: Columns<'_>, codes: &[i8], sums: &mut [i32]) {
    let blocks = columns.column_bytes / UNIT;
    for listed in columns.listed.chunks(MOST_COLUMNS) {
        let total: i32 = listed.iter().map(|&c| i32::from(codes[c as usize])).sum();
        for first in (0..blocks).step_by(STRIPE) {
            let stripe = first..blocks.min(first + STRIPE);
            let wanted = stripe.start * UNIT..stripe.end * UNIT;
            let mut scaled = [Scaled([[[0; 16]; 4]; 4]); STRIPE];
            let mut far = Requests::new(columns, listed, wanted.clone());
            let mut near = Requests::new(columns, listed, wanted.clone());
            for _ in 0..AHEAD / UNIT + GROUP * stripe.len() {
                _mm_prefetch::<_MM_HINT_T1>(far.next_line().cast());
            }
            for _ in 0..GROUP * stripe.len() {
                near.next_line();
            }
            for listed in listed.chunks(GROUP) {
                let group = Group::new(&columns, listed, codes);
                for (block, scaled) in stripe.clone().zip(&mut scaled) {
                    for _ in 0..GROUP {
                        _mm_prefetch::<_MM_HINT_T1>(far.next_line().cast());
                        _mm_prefetch::<_MM_HINT_T0>(near.next_line().cast());
                    }
                    // SAFETY: every line was cut out with `blocks` units, and `block` is one of them.
                    unsafe { block_sums(&group, block * UNIT, scaled) }
                }
            }
            for (scaled, sums) in scaled.iter().zip(sums[first * BLOCK_COLS..].as_chunks_mut().0) {
                fold(scaled, total, sums);
            }
        }
    }
}

/// Adds the columns of a group to the sums of one block of rows.
///
/// # Safety
/// Each line of `group` has 64 bytes at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block_sums(group: &Group, at: usize, sums: &mut Scaled) {
    let masks = masks();
    let mut acc = [[_mm512_setzero_si512(); 4]; 4];
    for g in 0..4 {
        for part in 0..4 {
            // SAFETY: sixteen sums.
            acc[g][part] = unsafe { _mm512_load_si512(sums.0[g][part].as_ptr().cast()) };
        }
    }
    for quad in 0..group.quads {
        let mut c = [_mm512_setzero_si512(); QUAD];
        for i in 0..QUAD {
            // SAFETY: the caller says that 64 bytes are there.
            c[i] = unsafe { _mm512_loadu_si512(group.lines[quad * QUAD + i].add(at).cast()) };
        }
        let a = _mm512_set1_epi32(group.activations[quad]);
        let (low01, high01) = (_mm512_unpacklo_epi8(c[0], c[1]), _mm512_unpackhi_epi8(c[0], c[1]));
        let (low23, high23) = (_mm512_unpacklo_epi8(c[2], c[3]), _mm512_unpackhi_epi8(c[2], c[3]));
        let parts = [
            _mm512_unpacklo_epi16(low01, low23),
            _mm512_unpackhi_epi16(low01, low23),
            _mm512_unpacklo_epi16(high01, high23),
            _mm512_unpackhi_epi16(high01, high23),
        ];
        for part in 0..4 {
            for g in 0..4 {
                let codes = _mm512_and_si512(parts[part], masks[g]);
                acc[g][part] = _mm512_dpbusd_epi32(acc[g][part], codes, a);
            }
        }
    }
    for g in 0..4 {
        for part in 0..4 {
            // SAFETY: sixteen sums.
            unsafe { _mm512_store_si512(sums.0[g][part].as_mut_ptr().cast(), acc[g][part]) };
        }
    }
}

/// Adds the sums of a block of rows, at their true scale and order and for weights in the place of codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn fold(scaled: &Scaled, total: i32, sums: &mut [i32; BLOCK_COLS]) {
    for (g, (scaled, sums)) in scaled.0.iter().zip(sums.as_chunks_mut::<UNIT>().0).enumerate() {
        for (i, four) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let scaled = &scaled[i % 4][i / 4 * 4..][..4];
            for (sum, scaled) in four.iter_mut().zip(scaled) {
                *sum = sum.wrapping_add((scaled >> (2 * g)).wrapping_sub(total));
            }
        }
    }
}
