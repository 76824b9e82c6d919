//! The shape of a matrix of five trits a byte, and the ways between it and the 2-bit layout.

use super::super::{BLOCK_BYTES, TILE_ROWS, TernaryShape, UNIT};
use super::code::{BAD, ENCODE, FOUR_ZEROS, ZEROS, decode};
use super::{TRIT_COLS, UNIT_BYTES};
use std::ops::Range;

/// Units of five groups that have as many columns as [`CYCLE_BLOCKS`] blocks of four groups.
const CYCLE_UNITS: usize = 4;
/// Blocks of the 2-bit layout that have as many columns as [`CYCLE_UNITS`] units.
const CYCLE_BLOCKS: usize = 5;

/// Rows and columns of a ternary matrix at 1.6 bits a weight: five trits a byte, in tiles of [`TILE_ROWS`] rows as
/// [`TernaryShape`] has them. The layout pads both; see [`crate::ternary::trits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TritShape {
    /// Rows: outputs.
    pub rows: usize,
    /// Columns: inputs.
    pub cols: usize,
}

impl From<TernaryShape> for TritShape {
    fn from(shape: TernaryShape) -> TritShape {
        TritShape { rows: shape.rows, cols: shape.cols }
    }
}

impl TritShape {
    /// Columns with padding, a multiple of [`TRIT_COLS`]: the length of a vector of activation codes.
    pub fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(TRIT_COLS)
    }

    /// Tiles of [`TILE_ROWS`] rows, the last one padded: the unit in which work is divided over threads.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one tile.
    pub fn tile_bytes(&self) -> usize {
        self.padded_cols() / TRIT_COLS * UNIT_BYTES
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
    }

    /// How many rows of the model a range of tiles has (the last tile of a matrix may be partly padding).
    ///
    /// # Panics
    /// The range is not within [`TritShape::tiles`].
    pub fn rows_of(&self, tiles: &Range<usize>) -> usize {
        assert!(tiles.start <= tiles.end && tiles.end <= self.tiles(), "tiles {tiles:?} of {self:?}");
        self.rows.min(tiles.end * TILE_ROWS).saturating_sub(tiles.start * TILE_ROWS)
    }

    fn check_out(&self, tiles: &Range<usize>, out: &[u8]) {
        self.rows_of(tiles);
        assert_eq!(out.len(), tiles.len() * self.tile_bytes(), "bytes of tiles {tiles:?} of {self:?}");
    }

    /// Packs weights given one by one: `weight(row, col)` in {-1, 0, 1}, asked for rows and columns of the model.
    /// `out` receives `tiles`. For tests and small matrices.
    ///
    /// # Panics
    /// A weight is not -1, 0 or 1, or `out` has the wrong length.
    pub fn pack(&self, tiles: Range<usize>, mut weight: impl FnMut(usize, usize) -> i8, out: &mut [u8]) {
        self.check_out(&tiles, out);
        let mut codes = vec![1u8; self.padded_cols()];
        for (tile, out) in tiles.zip(out.chunks_exact_mut(self.tile_bytes().max(1))) {
            let rows = self.rows_of(&(tile..tile + 1));
            for in_tile in 0..TILE_ROWS {
                codes.fill(1);
                if in_tile < rows {
                    let row = tile * TILE_ROWS + in_tile;
                    for (col, code) in codes[..self.cols].iter_mut().enumerate() {
                        let w = weight(row, col);
                        assert!((-1..=1).contains(&w), "weight {w} at row {row}, column {col}");
                        *code = (w + 1) as u8;
                    }
                }
                let units = out.chunks_exact_mut(UNIT_BYTES).map(|unit| &mut unit[in_tile * UNIT..][..UNIT]);
                for (columns, unit) in codes.chunks_exact(TRIT_COLS).zip(units) {
                    for (j, byte) in unit.iter_mut().enumerate() {
                        let index =
                            (0..5).map(|g| usize::from(columns[g * UNIT + j]) << (2 * g)).sum::<usize>();
                        *byte = ENCODE[index];
                    }
                }
            }
        }
    }

    /// Repacks `tiles` from a whole matrix in the 2-bit layout. Reads and writes each byte once: a matrix of a model takes
    /// a few milliseconds, and ranges of tiles can be repacked by several threads.
    ///
    /// # Panics
    /// The shapes differ, a length is wrong, or a weight has code 3, which no way of packing lets through.
    pub fn repack(&self, from: TernaryShape, data: &[u8], tiles: Range<usize>, out: &mut [u8]) {
        assert_eq!(TritShape::from(from), *self, "repack");
        assert_eq!(data.len(), from.bytes(), "repack: bytes of the matrix {from:?}");
        self.check_out(&tiles, out);
        let sources = data.chunks_exact(from.tile_bytes().max(1)).skip(tiles.start);
        for (source, out) in sources.zip(out.chunks_exact_mut(self.tile_bytes().max(1))) {
            compress(source, out);
            let bad = out.iter().fold(false, |bad, &byte| bad | (byte == BAD));
            assert!(!bad, "repack: a weight of code 3 in the matrix {from:?}");
        }
    }

    /// Writes the codes `weight + 1` of row `row` of a whole packed matrix into `codes`, `[cols]`.
    ///
    /// # Panics
    /// `row` does not exist, or a length is wrong.
    pub fn unpack_row(&self, data: &[u8], row: usize, codes: &mut [u8]) {
        assert!(row < self.rows, "row {row} of {self:?}");
        assert_eq!((data.len(), codes.len()), (self.bytes(), self.cols), "unpack_row of {self:?}");
        let tile = &data[row / TILE_ROWS * self.tile_bytes()..][..self.tile_bytes()];
        let units = tile.chunks_exact(UNIT_BYTES).map(|unit| &unit[row % TILE_ROWS * UNIT..][..UNIT]);
        for (columns, unit) in codes.chunks_mut(TRIT_COLS).zip(units) {
            for (group, columns) in columns.chunks_mut(UNIT).enumerate() {
                for (code, &byte) in columns.iter_mut().zip(unit) {
                    let (four, fifth) = decode(byte);
                    *code = if group == 4 { fifth } else { four >> (2 * group) & 3 };
                }
            }
        }
    }
}

/// Repacks one tile from the 2-bit layout; a code 3 makes the byte [`BAD`].
fn compress(source: &[u8], out: &mut [u8]) {
    out.fill(ZEROS);
    let cycles = out.chunks_mut(CYCLE_UNITS * UNIT_BYTES);
    for (units, blocks) in cycles.zip(source.chunks(CYCLE_BLOCKS * BLOCK_BYTES)) {
        for row in 0..TILE_ROWS {
            let mut b = [[FOUR_ZEROS; UNIT]; CYCLE_BLOCKS];
            for (b, block) in b.iter_mut().zip(blocks.chunks_exact(BLOCK_BYTES)) {
                b.copy_from_slice(&block[row * UNIT..][..UNIT]);
            }
            let mut four = [[0u8; UNIT]; CYCLE_UNITS];
            let mut fifth = [[0u8; UNIT]; CYCLE_UNITS];
            for j in 0..UNIT {
                let b = [b[0][j], b[1][j], b[2][j], b[3][j], b[4][j]];
                four[0][j] = b[0];
                fifth[0][j] = b[1] & 3;
                four[1][j] = b[1] >> 2 | b[2] << 6;
                fifth[1][j] = b[2] >> 2 & 3;
                four[2][j] = b[2] >> 4 | b[3] << 4;
                fifth[2][j] = b[3] >> 4 & 3;
                four[3][j] = b[3] >> 6 | b[4] << 2;
                fifth[3][j] = b[4] >> 6;
            }
            for (i, unit) in units.chunks_exact_mut(UNIT_BYTES).enumerate() {
                for (j, byte) in unit[row * UNIT..][..UNIT].iter_mut().enumerate() {
                    *byte = ENCODE[usize::from(fifth[i][j]) << 8 | usize::from(four[i][j])];
                }
            }
        }
    }
}

/// Expands one tile into the 2-bit layout, which may have more columns of padding or fewer. `decode` splits a unit into
/// the codes of its first four groups, two bits each, and the codes of the fifth.
#[inline(always)]
pub(super) fn expand_with(
    tile: &[u8],
    out: &mut [u8],
    decode: impl Fn(&[u8; UNIT], &mut [u8; UNIT], &mut [u8; UNIT]),
) {
    out.fill(FOUR_ZEROS);
    let cycles = out.chunks_mut(CYCLE_BLOCKS * BLOCK_BYTES);
    for (blocks, units) in cycles.zip(tile.chunks(CYCLE_UNITS * UNIT_BYTES)) {
        for row in 0..TILE_ROWS {
            let mut four = [[FOUR_ZEROS; UNIT]; CYCLE_UNITS];
            let mut fifth = [[1u8; UNIT]; CYCLE_UNITS];
            for (i, unit) in units.chunks_exact(UNIT_BYTES).enumerate() {
                if let Some(unit) = unit[row * UNIT..].first_chunk() {
                    decode(unit, &mut four[i], &mut fifth[i]);
                }
            }
            let mut b = [[0u8; UNIT]; CYCLE_BLOCKS];
            for j in 0..UNIT {
                b[0][j] = four[0][j];
                b[1][j] = fifth[0][j] | four[1][j] << 2;
                b[2][j] = four[1][j] >> 6 | fifth[1][j] << 2 | four[2][j] << 4;
                b[3][j] = four[2][j] >> 4 | fifth[2][j] << 4 | four[3][j] << 6;
                b[4][j] = four[3][j] >> 2 | fifth[3][j] << 6;
            }
            for (block, b) in blocks.chunks_exact_mut(BLOCK_BYTES).zip(&b) {
                block[row * UNIT..][..UNIT].copy_from_slice(b);
            }
        }
    }
}

/// [`expand_with`] by the tables, byte for byte.
pub(super) fn expand(tile: &[u8], out: &mut [u8]) {
    expand_with(tile, out, |unit, four, fifth| {
        for (j, &byte) in unit.iter().enumerate() {
            (four[j], fifth[j]) = decode(byte);
        }
    });
}
