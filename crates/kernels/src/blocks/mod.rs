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
//! - `q4-dither`: as `q4`, with subtractive dither ([`BlockFormat::dither`]): a column's dither `d`, a fixed pseudo-random
//!   number between -1/2 and 1/2 that all rows share, is added before the rounding and taken off afterwards, so code `c`
//!   stands for `c - 8 - d` steps. A weight is still off by half a step at the most, but by an amount that is uniform and
//!   independent of the weight and of the other columns. Since all rows share `d`, it costs one sum a step, not one a row.
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
//! `sum` of `code * v` over the columns with `j / 4 == l` (with dither less `floor(sum of d * v + 1/2)`); then the fixed tree, times the scale of the activations. So
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
/// The numbers of `q4-dither` are those of this seed for ever: rows are packed at load, but a file could hold them.
const DITHER_SEED: u64 = 0x4c6f_6e67_6269_7400;
/// Bytes that a tile's parts are padded to.
const LINE: usize = 64;

/// How a weight is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    /// 6 bits, a scale for 256 columns.
    Q6,
    /// 4 bits, a scale for 64 columns.
    Q4,
    /// 4 bits, a scale for 64 columns, rounded with subtractive dither.
    Q4Dither,
}

impl BlockFormat {
    /// All.
    pub const ALL: [BlockFormat; 3] = [BlockFormat::Q6, BlockFormat::Q4, BlockFormat::Q4Dither];

    /// The dither of a column in units of [`BlockFormat::DITHER_UNIT`] steps: an odd number between -4095 and 4095, so
    /// that all of them are equally likely and none is a tie. 0 for formats without dither.
    pub const fn dither(self, column: usize) -> i32 {
        match self {
            BlockFormat::Q6 | BlockFormat::Q4 => 0,
            BlockFormat::Q4Dither => {
                // SplitMix64 (Steele, Lea, Flood 2014) at this place of its stream.
                let z = (column as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(DITHER_SEED);
                let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                (((z ^ (z >> 31)) >> 52) as i32) * 2 - 4095
            }
        }
    }

    /// The share of a step that one unit of [`BlockFormat::dither`] is.
    pub const DITHER_UNIT: f32 = 1.0 / 8192.0;

    /// The code of zero, which is also the number of steps to either side plus one.
    pub(crate) const fn zero(self) -> i32 {
        match self {
            BlockFormat::Q6 => 32,
            BlockFormat::Q4 | BlockFormat::Q4Dither => 8,
        }
    }

    /// Scales of a row of a block.
    pub(crate) const fn scales(self) -> usize {
        match self {
            BlockFormat::Q6 => 1,
            BlockFormat::Q4 | BlockFormat::Q4Dither => 4,
        }
    }

    /// Bytes of the codes of a row of a block.
    pub(crate) const fn unit(self) -> usize {
        match self {
            BlockFormat::Q6 => 192,
            BlockFormat::Q4 | BlockFormat::Q4Dither => 128,
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
            BlockFormat::Q4 | BlockFormat::Q4Dither => j / 4 % 4,
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

    /// The scales of row `row` of `data` (the whole matrix): one or four for each 256 columns.
    pub fn scales(&self, data: &[u8], row: usize) -> impl Iterator<Item = f32> {
        assert_eq!(data.len(), self.bytes(), "scales: the matrix {self:?}");
        let (tile, r, n) = (row / TILE_ROWS, row % TILE_ROWS, self.format.scales());
        let header = &data[tile * self.tile_bytes()..];
        (0..self.blocks()).flat_map(move |b| pack::scales(header, n, b * TILE_ROWS + r))
    }

    /// Row `row` of `data` (the whole matrix) as the numbers that its codes stand for, exactly: `(code - dither) * scale`.
    /// `out` has `cols` places.
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
    /// What the sum of each lane starts with: minus the code of zero, and the dither, times `256 * hi + lo`.
    pub(crate) start: [i32; 16],
}

/// A vector of activations, rounded to 16 bits; see the module. Kept from step to step for its memory.
#[derive(Clone, Default)]
pub struct Planes {
    blocks: Vec<PlaneBlock>,
    cols: usize,
    scale: f32,
    /// Which rows they are for.
    format: Option<BlockFormat>,
    /// The dither of each column, padding included.
    dither: Vec<i16>,
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

    /// Rounds a vector to two planes of bytes for rows of `format`: `v = round_half_even(x * (32512 / m))`, `m = max(max|x|, 1e-30)`, scale
    /// `m / 32512`. Where an element is not finite the scale is NaN, and so is every product.
    pub fn quantize_planes(&self, format: BlockFormat, x: &[f32], planes: &mut Planes) {
        let zero = PlaneBlock { hi: [[0; GROUP]; 4], lo: [[0; GROUP]; 4], start: [0; 16] };
        if planes.format != Some(format) || planes.cols != x.len() {
            let columns = x.len().next_multiple_of(BLOCK_COLS);
            planes.dither = (0..columns).map(|column| format.dither(column) as i16).collect();
            planes.format = Some(format);
        }
        planes.blocks.resize(x.len().div_ceil(BLOCK_COLS), zero);
        planes.cols = x.len();
        // SAFETY: this table was handed out against proof of its instruction set.
        planes.scale =
            unsafe { (self.float.quantize_planes)(x, format.zero(), &planes.dither, &mut planes.blocks) };
    }

    /// Rows of some tiles times one vector, as the module defines it. `data` is the whole matrix (`shape.bytes()`),
    /// `planes` are those of `shape.cols` activations for `shape.format`, `out` has the rows of `tiles`.
    pub fn head_blocks(
        &self,
        shape: BlockShape,
        data: &[u8],
        tiles: Range<usize>,
        planes: &Planes,
        out: &mut [f32],
    ) {
        assert_eq!(data.len(), shape.bytes(), "head_blocks: bytes of the matrix {shape:?}");
        let activations = (planes.format, planes.cols);
        assert_eq!(activations, (Some(shape.format), shape.cols), "head_blocks: activations for {shape:?}");
        let rows = shape.rows_of(&tiles);
        assert_eq!(out.len(), rows, "head_blocks: results for tiles {tiles:?}");
        let data = &data[tiles.start * shape.tile_bytes()..tiles.end * shape.tile_bytes()];
        let blocks = Blocks { data, blocks: shape.blocks(), rows };
        let product = match shape.format {
            BlockFormat::Q6 => self.blocks.q6,
            BlockFormat::Q4 | BlockFormat::Q4Dither => self.blocks.q4,
        };
        // SAFETY: this table was handed out against proof of its instruction set, and the shapes agree.
        unsafe { product(blocks, &planes.blocks, planes.scale, out) }
    }
}
