//! Rows in blocks of few bits with integer dot products: the head at 6 or 4 bits a weight.
//!
//! # Weights
//! Rows are padded to [`TILE_ROWS`], columns to [`BLOCK_COLS`]. A tile of four rows is one linear stream: first its
//! scales, `[block][row][scale]` in bfloat16, padded with zeros to whole cache lines; then its codes, `[block][row]`, a
//! unit of 192 bytes (`q6`) or 128 bytes (`q4`) each. Columns of a block are numbered `64 g + j`: group `g` of 0 to 3
//! meets 64 consecutive activations without any shuffle.
//!
//! - `q6`: codes 1 to 63 stand for -31 to 31; one scale for a row of a block. A unit is three times 64 bytes; the low six
//!   bits of byte `j` of part `g` are column `64 g + j` for the groups 0 to 2, and the upper two bits of the three parts
//!   are bits 0-1, 2-3 and 4-5 of group 3: three groups are separated by a mask alone.
//! - `q4`: codes 1 to 15 stand for -7 to 7; four scales for a row of a block, scale `s` for the 64 columns with
//!   `j / 4 % 4 == s`. A unit is twice 64 bytes; byte `j` holds the groups 0 and 1, then 2 and 3, in its low and its high
//!   four bits. A scale that belongs to lanes costs no sum of its own.
//!
//! Tiles are read in their order in memory and nothing is requested ahead: hardware does that better for one linear
//! stream (`docs/decisions/head.md` has the measurements).
//!
//! A scale is the largest magnitude of its columns by 31 (or 7), rounded up to bfloat16, and a code is the nearest one,
//! so `|w - w^| <= scale / 2` but for the rounding of one division (a factor of `1 + 2^-23`).
//!
//! # Activations
//! A vector is rounded once a step to 16 bits, `v = round(x * 32512 / max|x|)`, and kept as two planes of signed
//! bytes, `v = 256 * hi + lo` ([`Planes`]): its relative error is 2^-16 of the largest element, and each plane is what
//! u8 x i8 instructions multiply.
//!
//! # Result
//! In lane `l` of 16, block by block in ascending order, `acc[l] = fma(sum as f32, scale, acc[l])` with the exact integer
//! `sum` of `code * v` over the columns with `j / 4 == l`; then the fixed tree, times the scale of the activations. So
//! every instruction set gives the same bits. The four-byte lanes are those of the instructions.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod pack;
pub(crate) mod scalar;

pub(crate) use pack::{pack_tiles, quantize_planes, square_sums};

use crate::{BLOCK_COLS, Kernels, TILE_ROWS};
use std::ops::Range;

/// Columns of a group: those that one register of weight bytes holds.
pub(crate) const GROUP: usize = 64;
/// Largest magnitude of a rounded activation: its upper plane stays within a signed byte.
pub(crate) const LARGEST: f32 = 32512.0;
/// Bytes that a tile's parts are padded to.
const LINE: usize = 64;

/// How many bits a weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    /// 6 bits, a scale for 256 columns.
    Q6,
    /// 4 bits, a scale for 64 columns.
    Q4,
}

impl BlockFormat {
    /// Both.
    pub const ALL: [BlockFormat; 2] = [BlockFormat::Q6, BlockFormat::Q4];

    /// The code of zero, which is also the number of steps to either side plus one.
    pub(crate) const fn zero(self) -> i32 {
        match self {
            BlockFormat::Q6 => 32,
            BlockFormat::Q4 => 8,
        }
    }

    /// Scales of a row of a block.
    pub(crate) const fn scales(self) -> usize {
        match self {
            BlockFormat::Q6 => 1,
            BlockFormat::Q4 => 4,
        }
    }

    /// Bytes of the codes of a row of a block.
    pub(crate) const fn unit(self) -> usize {
        match self {
            BlockFormat::Q6 => 192,
            BlockFormat::Q4 => 128,
        }
    }

    /// Bytes of the scales of a tile.
    pub(crate) const fn header(self, blocks: usize) -> usize {
        (2 * TILE_ROWS * self.scales() * blocks).next_multiple_of(LINE)
    }

    /// Which scale of a row of a block the column `j` of a group has.
    pub(crate) const fn scale_of(self, j: usize) -> usize {
        match self {
            BlockFormat::Q6 => 0,
            BlockFormat::Q4 => j / 4 % 4,
        }
    }
}

/// Rows and columns of a matrix in blocks, as the model has them. The layout pads both; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockShape {
    /// Number format.
    pub format: BlockFormat,
    /// Rows: outputs.
    pub rows: usize,
    /// Columns: inputs.
    pub cols: usize,
}

impl BlockShape {
    /// Blocks of a row.
    pub(crate) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK_COLS)
    }

    /// Tiles of [`TILE_ROWS`] rows, the last one padded: the unit in which work is divided over threads.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one tile.
    pub fn tile_bytes(&self) -> usize {
        let blocks = self.blocks();
        self.format.header(blocks) + blocks * TILE_ROWS * self.format.unit()
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
    }

    /// How many rows of the model a range of tiles has (the last tile of a matrix may be partly padding).
    ///
    /// # Panics
    /// The range is not within [`BlockShape::tiles`].
    pub fn rows_of(&self, tiles: &Range<usize>) -> usize {
        assert!(tiles.start <= tiles.end && tiles.end <= self.tiles(), "tiles {tiles:?} of {self:?}");
        self.rows.min(tiles.end * TILE_ROWS).saturating_sub(tiles.start * TILE_ROWS)
    }

    /// Row `row` of `data` (the whole matrix) as the numbers that its codes stand for, exactly: `code * scale`. `out` has
    /// `cols` places.
    pub fn read(&self, data: &[u8], row: usize, out: &mut [f32]) {
        assert_eq!((data.len(), out.len()), (self.bytes(), self.cols), "read: a row of {self:?}");
        let (tile, r) = (row / TILE_ROWS, row % TILE_ROWS);
        self.read_row(&data[tile * self.tile_bytes()..][..self.tile_bytes()], r, out);
    }
}

/// A block of 256 activations as two planes of signed bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct PlaneBlock {
    /// Upper bytes of the four groups.
    pub(crate) hi: [[i8; GROUP]; 4],
    /// Lower bytes.
    pub(crate) lo: [[i8; GROUP]; 4],
    /// Minus the sum of `256 * hi + lo` over the columns of each lane.
    pub(crate) minus: [i32; 16],
}

/// A vector of activations, rounded to 16 bits; see the module. Kept from step to step for its memory.
#[derive(Clone, Default)]
pub struct Planes {
    blocks: Vec<PlaneBlock>,
    cols: usize,
    scale: f32,
}

impl Planes {
    /// What one unit of [`Planes::codes`] stands for; NaN where the vector had an element that is not finite.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The rounded elements `v`, at most 32512 in magnitude: element `i` stands for `v[i] * scale`.
    pub fn codes(&self) -> impl Iterator<Item = i32> + '_ {
        let columns = self.blocks.iter().flat_map(|b| b.hi.as_flattened().iter().zip(b.lo.as_flattened()));
        columns.take(self.cols).map(|(&hi, &lo)| 256 * i32::from(hi) + i32::from(lo))
    }
}

/// Consecutive tiles of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    /// Whole tiles.
    pub(crate) data: &'a [u8],
    /// Blocks of a row.
    pub(crate) blocks: usize,
    /// Rows that exist; the last tile may have fewer than four.
    pub(crate) rows: usize,
}

/// A product of one format: tiles, activations and their scale, results. Calling it requires a processor that has the
/// instruction set of its table, and whole tiles and as many plane blocks as a row has.
pub(crate) type Product = unsafe fn(Blocks<'_>, &[PlaneBlock], f32, &mut [f32]);

/// The block products of one instruction set.
pub(crate) struct BlockTable {
    pub(crate) q6: Product,
    pub(crate) q4: Product,
}

impl Kernels {
    /// Rounds bfloat16 rows to blocks: `rows` `[n][shape.cols]`, `out` whole tiles for `n` rows, where `n` is a multiple of
    /// [`TILE_ROWS`] or less than one tile more. A NaN counts as zero; a row with an infinite number becomes NaN there.
    pub fn pack_blocks(&self, shape: BlockShape, rows: &[u16], out: &mut [u8]) {
        let n = rows.len() / shape.cols.max(1);
        assert_eq!(rows.len(), n * shape.cols, "pack_blocks: rows of {shape:?}");
        assert_eq!(out.len(), n.div_ceil(TILE_ROWS) * shape.tile_bytes(), "pack_blocks: tiles of {n} rows");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.pack_tiles)(shape, rows, out) }
    }

    /// `(sum of w^2, sum of (w - approximation)^2)` of a bfloat16 row, in 16 lanes of f64 and the fixed tree. Exact but
    /// for the rounding of the additions when the approximation is a row of [`BlockShape::read`].
    pub fn square_sums(&self, row: &[u16], approximation: &[f32]) -> (f64, f64) {
        assert_eq!(row.len(), approximation.len(), "square_sums: the two lengths");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.square_sums)(row, approximation) }
    }

    /// Rounds a vector to two planes of bytes: `v = round_half_even(x * (32512 / m))`, `m = max(max|x|, 1e-30)`, scale
    /// `m / 32512`. Where an element is not finite the scale is NaN, and so is every product.
    pub fn quantize_planes(&self, x: &[f32], planes: &mut Planes) {
        let zero = PlaneBlock { hi: [[0; GROUP]; 4], lo: [[0; GROUP]; 4], minus: [0; 16] };
        planes.blocks.resize(x.len().div_ceil(BLOCK_COLS), zero);
        planes.cols = x.len();
        // SAFETY: this table was handed out against proof of its instruction set.
        planes.scale = unsafe { (self.float.quantize_planes)(x, &mut planes.blocks) };
    }

    /// Rows of some tiles times one vector, as the module defines it. `data` is the whole matrix (`shape.bytes()`),
    /// `planes` are those of `shape.cols` activations, `out` has the rows of `tiles`.
    pub fn head_blocks(
        &self,
        shape: BlockShape,
        data: &[u8],
        tiles: Range<usize>,
        planes: &Planes,
        out: &mut [f32],
    ) {
        assert_eq!(data.len(), shape.bytes(), "head_blocks: bytes of the matrix {shape:?}");
        assert_eq!(planes.cols, shape.cols, "head_blocks: activations for {shape:?}");
        let rows = shape.rows_of(&tiles);
        assert_eq!(out.len(), rows, "head_blocks: results for tiles {tiles:?}");
        let data = &data[tiles.start * shape.tile_bytes()..tiles.end * shape.tile_bytes()];
        let blocks = Blocks { data, blocks: shape.blocks(), rows };
        let product = match shape.format {
            BlockFormat::Q6 => self.blocks.q6,
            BlockFormat::Q4 => self.blocks.q4,
        };
        // SAFETY: this table was handed out against proof of its instruction set, and the shapes agree.
        unsafe { product(blocks, &planes.blocks, planes.scale, out) }
    }
}
