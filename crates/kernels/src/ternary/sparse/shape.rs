//! Shapes of matrices of which listed rows or columns are read, and their repacking from the tile layout.

use super::super::{BLOCK_BYTES, BLOCK_COLS, TILE_ROWS, TernaryShape, UNIT};
use std::ops::Range;

/// Four weights of zero in one byte.
const PADDING: u8 = 0b01_01_01_01;
/// The four bit pairs of a byte.
const PAIRS: usize = 4;

/// Rows and columns of a ternary matrix whose rows lie one after another. Columns are padded to [`BLOCK_COLS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowShape {
    /// Rows: outputs.
    pub rows: usize,
    /// Columns: inputs.
    pub cols: usize,
}

impl RowShape {
    /// Columns with padding, a multiple of [`BLOCK_COLS`]: the length of a vector of activation codes.
    pub fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(BLOCK_COLS)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.padded_cols() / PAIRS
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// The weight at a row and column, in {-1, 0, 1}, of a whole packed matrix.
    pub fn unpack(&self, data: &[u8], row: usize, col: usize) -> i8 {
        assert!(row < self.rows && col < self.cols, "row {row}, column {col} of {self:?}");
        weight(&data[row * self.row_bytes()..][..self.row_bytes()], col)
    }

    /// Copies `rows` from a whole matrix in the tile layout. Ranges of rows can be repacked by several threads.
    ///
    /// # Panics
    /// The shapes differ, the range is not within the rows, or a length is wrong.
    pub fn repack(&self, from: TernaryShape, data: &[u8], rows: Range<usize>, out: &mut [u8]) {
        assert_eq!(
            (from.rows, from.cols, data.len()),
            (self.rows, self.cols, from.bytes()),
            "repack {from:?}"
        );
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {self:?}");
        assert_eq!(out.len(), rows.len() * self.row_bytes(), "bytes of rows {rows:?} of {self:?}");
        for (row, out) in rows.zip(out.chunks_exact_mut(self.row_bytes().max(1))) {
            let tile = &data[row / TILE_ROWS * from.tile_bytes()..][..from.tile_bytes()];
            for (unit, block) in out.chunks_exact_mut(UNIT).zip(tile.chunks_exact(BLOCK_BYTES)) {
                unit.copy_from_slice(&block[row % TILE_ROWS * UNIT..][..UNIT]);
            }
        }
    }
}

/// Rows and columns of a ternary matrix whose columns lie one after another. Rows are padded to [`BLOCK_COLS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ColumnShape {
    /// Rows: outputs.
    pub rows: usize,
    /// Columns: inputs.
    pub cols: usize,
}

impl ColumnShape {
    /// Rows with padding, a multiple of [`BLOCK_COLS`]: the length of the sums.
    pub fn padded_rows(&self) -> usize {
        self.rows.next_multiple_of(BLOCK_COLS)
    }

    /// Bytes of one column.
    pub fn column_bytes(&self) -> usize {
        self.padded_rows() / PAIRS
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.cols * self.column_bytes()
    }

    /// The weight at a row and column, in {-1, 0, 1}, of a whole packed matrix.
    pub fn unpack(&self, data: &[u8], row: usize, col: usize) -> i8 {
        assert!(row < self.rows && col < self.cols, "row {row}, column {col} of {self:?}");
        weight(&data[col * self.column_bytes()..][..self.column_bytes()], row)
    }

    /// Transposes `columns` from a whole matrix in the tile layout. Ranges of columns can be repacked by several threads;
    /// ranges that start at multiples of [`BLOCK_COLS`] read nothing twice.
    ///
    /// # Panics
    /// The shapes differ, the range is not within the columns, or a length is wrong.
    pub fn repack(&self, from: TernaryShape, data: &[u8], columns: Range<usize>, out: &mut [u8]) {
        assert_eq!(
            (from.rows, from.cols, data.len()),
            (self.rows, self.cols, from.bytes()),
            "repack {from:?}"
        );
        assert!(columns.start <= columns.end && columns.end <= self.cols, "columns {columns:?} of {self:?}");
        assert_eq!(
            out.len(),
            columns.len() * self.column_bytes(),
            "bytes of columns {columns:?} of {self:?}"
        );
        // `[bit pair of the source][byte of the destination][byte of the source]`, one block of rows and columns.
        let mut square = vec![[[PADDING; UNIT]; UNIT]; PAIRS];
        for col_block in columns.start / BLOCK_COLS..columns.end.div_ceil(BLOCK_COLS) {
            for row_block in 0..self.padded_rows() / BLOCK_COLS {
                gather(from, data, row_block, col_block, &mut square);
                for (pair, square) in square.iter().enumerate() {
                    let first = col_block * BLOCK_COLS + pair * UNIT;
                    for col in columns.start.max(first)..columns.end.min(first + UNIT) {
                        let at = (col - columns.start) * self.column_bytes() + row_block * UNIT;
                        for (byte, line) in out[at..at + UNIT].iter_mut().zip(square) {
                            *byte = line[col - first];
                        }
                    }
                }
            }
        }
    }
}

/// Of a block of 256 rows and columns, gives each byte of every column what four rows have for it.
fn gather(
    from: TernaryShape,
    data: &[u8],
    row_block: usize,
    col_block: usize,
    square: &mut [[[u8; UNIT]; UNIT]],
) {
    for j in 0..UNIT {
        // The rows whose weights share byte `j` of a column.
        let mut rows = [[PADDING; UNIT]; PAIRS];
        for (g, unit) in rows.iter_mut().enumerate() {
            let row = row_block * BLOCK_COLS + g * UNIT + j;
            if row < from.rows {
                let at =
                    row / TILE_ROWS * from.tile_bytes() + col_block * BLOCK_BYTES + row % TILE_ROWS * UNIT;
                unit.copy_from_slice(&data[at..at + UNIT]);
            }
        }
        for (pair, square) in square.iter_mut().enumerate() {
            for (i, byte) in square[j].iter_mut().enumerate() {
                *byte = (0..PAIRS).fold(0, |byte, g| byte | (rows[g][i] >> (2 * pair) & 3) << (2 * g));
            }
        }
    }
}

/// The weight at a place of a row or column.
fn weight(line: &[u8], at: usize) -> i8 {
    let within = at % BLOCK_COLS;
    (line[at / BLOCK_COLS * UNIT + within % UNIT] >> (within / UNIT * 2) & 3) as i8 - 1
}
