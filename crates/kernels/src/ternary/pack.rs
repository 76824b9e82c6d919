//! The shape of a ternary matrix and the ways to fill one.

use super::{BLOCK_BYTES, BLOCK_COLS, TILE_ROWS, UNIT};
use std::ops::Range;

/// Four padding weights (code 1) in one byte.
const PADDING: u8 = 0b01_01_01_01;

/// Rows and columns of a ternary matrix, as the model has them. The layout pads both; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TernaryShape {
    /// Rows: outputs.
    pub rows: usize,
    /// Columns: inputs.
    pub cols: usize,
}

/// A packed weight with the code 3, which is no ternary weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the weight at row {row}, column {col} has code 3; ternary weights have codes 0 to 2: \
     the file is damaged or is not packed four rows to a byte"
)]
pub struct BadCode {
    /// Row of the weight in the matrix.
    pub row: usize,
    /// Column of the weight in the matrix.
    pub col: usize,
}

impl TernaryShape {
    /// Columns with padding, a multiple of [`BLOCK_COLS`]: the length of a vector of activation codes.
    pub fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(BLOCK_COLS)
    }

    /// Tiles of [`TILE_ROWS`] rows, the last one padded: the unit in which work is divided over threads.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one tile.
    pub fn tile_bytes(&self) -> usize {
        self.padded_cols() / BLOCK_COLS * BLOCK_BYTES
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
    }

    /// How many rows of the model a range of tiles has (the last tile of a matrix may be partly padding).
    ///
    /// # Panics
    /// The range is not within [`TernaryShape::tiles`].
    pub fn rows_of(&self, tiles: &Range<usize>) -> usize {
        assert!(tiles.start <= tiles.end && tiles.end <= self.tiles(), "tiles {tiles:?} of {self:?}");
        self.rows.min(tiles.end * TILE_ROWS).saturating_sub(tiles.start * TILE_ROWS)
    }

    /// Place of a weight: byte, and shift within it.
    fn place(&self, row: usize, col: usize) -> (usize, usize) {
        let (block, within) = (col / BLOCK_COLS, col % BLOCK_COLS);
        let unit = block * TILE_ROWS + row % TILE_ROWS;
        (row / TILE_ROWS * self.tile_bytes() + unit * UNIT + within % UNIT, within / UNIT * 2)
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
    pub fn pack(&self, tiles: Range<usize>, weight: impl Fn(usize, usize) -> i8, out: &mut [u8]) {
        self.check_out(&tiles, out);
        out.fill(PADDING);
        let first = tiles.start * TILE_ROWS;
        for row in first..self.rows.min(tiles.end * TILE_ROWS) {
            for col in 0..self.cols {
                let w = weight(row, col);
                assert!((-1..=1).contains(&w), "weight {w} at row {row}, column {col}");
                let (byte, shift) = self.place(row - first, col);
                out[byte] = out[byte] & !(3 << shift) | (((w + 1) as u8) << shift);
            }
        }
    }

    /// Packs `tiles` from whole rows of codes: `row(r, codes)` writes the codes `weight + 1` of row `r` of the model, one a
    /// byte, into `codes`, which has [`TernaryShape::cols`] entries.
    ///
    /// # Errors
    /// What `row` returns, and [`BadCode`] (as `E`) for a code above 2.
    ///
    /// # Panics
    /// `out` has the wrong length.
    pub fn pack_rows<E: From<BadCode>>(
        &self,
        tiles: Range<usize>,
        mut row: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
        out: &mut [u8],
    ) -> Result<(), E> {
        self.check_out(&tiles, out);
        // Codes of one row, padded to whole blocks with weights of zero.
        let mut codes = vec![1u8; self.padded_cols()];
        for (tile, out) in tiles.zip(out.chunks_exact_mut(self.tile_bytes().max(1))) {
            let rows = self.rows_of(&(tile..tile + 1));
            for in_tile in 0..TILE_ROWS {
                let r = tile * TILE_ROWS + in_tile;
                if in_tile < rows {
                    row(r, &mut codes[..self.cols])?;
                } else {
                    codes[..self.cols].fill(1);
                }
                let (blocks, _) = codes.as_chunks::<BLOCK_COLS>();
                let units =
                    out.chunks_exact_mut(BLOCK_BYTES).map(|block| &mut block[in_tile * UNIT..][..UNIT]);
                let mut bad = 0;
                for (columns, unit) in blocks.iter().zip(units) {
                    bad |= fold_unit(columns, 0, unit);
                }
                // Bits above the second would be dropped by the packing.
                if bad != 0 || codes.iter().fold(0, |all, code| all | code) > 3 {
                    let col = codes.iter().position(|&code| code > 2).unwrap_or_default();
                    return Err(BadCode { row: r, col }.into());
                }
            }
        }
        Ok(())
    }

    /// Writes the codes `weight + 1` of row `row` of a whole packed matrix into `codes`, `[cols]`.
    ///
    /// # Panics
    /// `row` does not exist, or a length is wrong.
    pub fn unpack_row(&self, data: &[u8], row: usize, codes: &mut [u8]) {
        assert!(row < self.rows, "row {row} of {self:?}");
        assert_eq!((data.len(), codes.len()), (self.bytes(), self.cols), "unpack_row of {self:?}");
        let tile = &data[row / TILE_ROWS * self.tile_bytes()..][..self.tile_bytes()];
        let units = tile.chunks_exact(BLOCK_BYTES).map(|block| &block[row % TILE_ROWS * UNIT..][..UNIT]);
        for (columns, unit) in codes.chunks_mut(BLOCK_COLS).zip(units) {
            for (group, columns) in columns.chunks_mut(UNIT).enumerate() {
                for (code, byte) in columns.iter_mut().zip(unit) {
                    *code = byte >> (2 * group) & 3;
                }
            }
        }
    }

    /// The weight at a row and column, in {-1, 0, 1}, of a whole packed matrix.
    pub fn unpack(&self, data: &[u8], row: usize, col: usize) -> i8 {
        assert!(row < self.rows && col < self.cols, "row {row}, column {col} of {self:?}");
        let (byte, shift) = self.place(row, col);
        (data[byte] >> shift & 3) as i8 - 1
    }

    /// Repacks from the layout of the Hugging Face checkpoints of BitNet: `packed` is `[rows / 4][cols]` bytes, and bits
    /// `2i`, `2i + 1` of `packed[r][c]` are the code of row `i * (rows / 4) + r`. `out` receives `tiles`.
    ///
    /// # Errors
    /// A weight has code 3; the first one found is named.
    ///
    /// # Panics
    /// `rows` is not a multiple of 4, or a length is wrong.
    pub fn repack_hf(&self, packed: &[u8], tiles: Range<usize>, out: &mut [u8]) -> Result<(), BadCode> {
        assert!(self.rows.is_multiple_of(4), "{} rows: four share a byte", self.rows);
        let quarter = self.rows / 4;
        assert_eq!(packed.len(), quarter * self.cols, "packed bytes of {self:?}");
        self.check_out(&tiles, out);
        for (tile, out) in tiles.zip(out.chunks_exact_mut(self.tile_bytes().max(1))) {
            for in_tile in 0..TILE_ROWS {
                let row = tile * TILE_ROWS + in_tile;
                let shift = row / quarter * 2;
                let source = &packed[row % quarter * self.cols..][..self.cols];
                let mut bad = 0;
                let (whole, rest) = source.as_chunks::<BLOCK_COLS>();
                let mut blocks =
                    out.chunks_exact_mut(BLOCK_BYTES).map(|block| &mut block[in_tile * UNIT..][..UNIT]);
                for (columns, unit) in whole.iter().zip(&mut blocks) {
                    bad |= fold_unit(columns, shift, unit);
                }
                if let Some(unit) = blocks.next() {
                    let mut columns = [PADDING; BLOCK_COLS];
                    columns[..rest.len()].copy_from_slice(rest);
                    bad |= fold_unit(&columns, shift, unit);
                }
                if bad != 0 {
                    let col = source.iter().position(|&byte| byte >> shift & 3 == 3).unwrap_or_default();
                    return Err(BadCode { row, col });
                }
            }
        }
        Ok(())
    }

    /// Fills `tiles` with seeded random weights, about a third each of -1, 0 and 1. The bytes depend on the seed and the
    /// tile alone: not on the machine, nor on how tiles are divided over threads. Padding stays padding.
    pub fn fill_random(&self, tiles: Range<usize>, seed: u64, out: &mut [u8]) {
        self.check_out(&tiles, out);
        for (tile, out) in tiles.zip(out.chunks_exact_mut(self.tile_bytes().max(1))) {
            let mut state = splitmix(seed ^ splitmix(tile as u64));
            for eight in out.chunks_exact_mut(8) {
                state = state.wrapping_add(GOLDEN);
                // The mixing of splitmix64; every byte of the result picks four weights.
                let bytes = splitmix_finish(state).to_le_bytes().map(|b| FOUR_WEIGHTS[usize::from(b)]);
                eight.copy_from_slice(&bytes);
            }
            self.pad(tile, out);
        }
    }

    /// Overwrites the padding of a tile.
    fn pad(&self, tile: usize, out: &mut [u8]) {
        let rows = self.rows_of(&(tile..tile + 1));
        for block in out.chunks_exact_mut(BLOCK_BYTES) {
            block[rows * UNIT..].fill(PADDING);
        }
        let used = self.cols % BLOCK_COLS;
        if used == 0 {
            return;
        }
        let Some(last) = out.chunks_exact_mut(BLOCK_BYTES).last() else { return };
        for unit in last.chunks_exact_mut(UNIT) {
            for (j, byte) in unit.iter_mut().enumerate() {
                for g in 0..4 {
                    if g * UNIT + j >= used {
                        *byte = *byte & !(3 << (2 * g)) | 1 << (2 * g);
                    }
                }
            }
        }
    }
}

/// Picks the codes at bits `shift` and `shift + 1` of 256 bytes and packs them into a unit, eight bytes at a time. The
/// result is not zero if a code is 3.
fn fold_unit(columns: &[u8; BLOCK_COLS], shift: usize, unit: &mut [u8]) -> u64 {
    const CODES: u64 = 0x0303_0303_0303_0303;
    let (columns, _) = columns.as_chunks::<8>();
    let mut bad = 0;
    for (j, eight) in unit.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let mut packed = 0;
        for g in 0..4 {
            let codes = u64::from_le_bytes(columns[g * UNIT / 8 + j]) >> shift & CODES;
            bad |= codes & codes >> 1;
            packed |= codes << (2 * g);
        }
        *eight = packed.to_le_bytes();
    }
    bad & 0x0101_0101_0101_0101
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// One step of splitmix64 (Steele, Lea and Flood 2014).
fn splitmix(x: u64) -> u64 {
    splitmix_finish(x.wrapping_add(GOLDEN))
}

fn splitmix_finish(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Four codes in {0, 1, 2} for each byte: its value, spread over the 81 combinations, written in base 3.
static FOUR_WEIGHTS: [u8; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut combination = i * 81 / 256;
        let mut g = 0;
        while g < 4 {
            table[i] |= ((combination % 3) as u8) << (2 * g);
            combination /= 3;
            g += 1;
        }
        i += 1;
    }
    table
};
