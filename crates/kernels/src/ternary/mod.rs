//! Ternary weights at 2 bits, and their exact integer products with int8 activations.
//!
//! # Layout
//! Rows are padded to [`TILE_ROWS`], columns to [`BLOCK_COLS`]. Data order is `[tile of 4 rows][block of 256 columns][row
//! in tile]`, each entry a unit of 64 bytes, so that a tile is one linear stream. A weight in {-1, 0, 1} is stored as
//! the code `weight + 1`; padding has code 1. In a unit that starts at column `base`, byte `j` holds the columns
//! `base + j`, `base + 64 + j`, `base + 128 + j`, `base + 192 + j` in its bit pairs from low to high: group `g` of a
//! unit meets 64 consecutive activations without any shuffle, and masking alone (no shift) separates the groups,
//! for the codes scaled by `4^g` still fit an unsigned byte.
//!
//! With codes `c = w + 1`, `sum(w * a) = sum(c * a) - sum(a)`.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avxvnni;
#[cfg(target_arch = "x86_64")]
mod blocking;
#[cfg(target_arch = "x86_64")]
mod gemm;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
mod pack;
mod rate;
#[cfg(target_arch = "x86_64")]
mod register_tile;
pub(crate) mod scalar;
pub mod sparse;
pub mod trits;
#[cfg(target_arch = "x86_64")]
pub(crate) mod vnni;

pub use pack::{BadCode, TernaryShape};
pub use sparse::{ColumnShape, RowShape};
pub use trits::{TRIT_COLS, TritShape};

use crate::Kernels;
use std::ops::Range;

/// Rows of a tile.
pub const TILE_ROWS: usize = 4;
/// Columns of a block.
pub const BLOCK_COLS: usize = 256;
/// Bytes of one row of one block.
pub(crate) const UNIT: usize = 64;
/// Bytes of one block of one tile.
pub(crate) const BLOCK_BYTES: usize = TILE_ROWS * UNIT;
/// More columns could overflow the 32-bit accumulators of scaled codes (128 * 128 * 4 a block and lane).
const MAX_COLS: usize = 1 << 22;

/// How far ahead of the arithmetic a stream of weights is requested where hardware prefetchers stop at every 4 KiB.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) const PREFETCH_BYTES: usize = 8192;

/// Consecutive tiles of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a> {
    /// Whole tiles.
    pub(crate) data: &'a [u8],
    /// Blocks of a tile.
    pub(crate) blocks: usize,
    /// Rows that exist; the last tile may have fewer than four.
    pub(crate) rows: usize,
}

/// The activations of some tokens.
#[derive(Clone, Copy)]
pub(crate) struct Activations<'a> {
    /// `[tokens][padded_cols]`.
    pub(crate) codes: &'a [i8],
    /// Sum of the codes of each token.
    pub(crate) sums: &'a [i32],
    /// Factor of the results of each token.
    pub(crate) scales: &'a [f32],
}

/// The integer kernels of one instruction set. Calling an entry requires a processor that has the set.
pub(crate) struct TernaryTable {
    /// One token; `out[row]`.
    pub(crate) gemv: unsafe fn(Tiles<'_>, Activations<'_>, &mut [f32]),
    /// Any number of tokens; `out[token][row]`.
    pub(crate) gemm: unsafe fn(Tiles<'_>, Activations<'_>, &mut [f32]),
}

impl Kernels {
    /// Ternary matrix times one vector, for some tiles: `out[r] = (sum over columns of weight * code) as f32 * scale`.
    ///
    /// `data` is the whole matrix (`shape.bytes()`), `codes` has `shape.padded_cols()` entries with zeros in the padding,
    /// `sum` is the sum of `codes`, and `out` has the rows of `tiles`. Exact before the final multiplication.
    #[expect(
        clippy::too_many_arguments,
        reason = "one operation on plain slices; a struct would only rename them"
    )]
    pub fn ternary_gemv(
        &self,
        shape: TernaryShape,
        data: &[u8],
        tiles: Range<usize>,
        codes: &[i8],
        sum: i32,
        scale: f32,
        out: &mut [f32],
    ) {
        assert_eq!(codes.len(), shape.padded_cols(), "ternary_gemv: activation codes");
        let tiles = select(shape, data, tiles, out.len(), 1);
        if tiles.blocks == 0 {
            return out.fill(0.0);
        }
        let activations = Activations { codes, sums: &[sum], scales: &[scale] };
        // SAFETY: this table was handed out against proof of its instruction set, and the shapes agree.
        unsafe { (self.ternary.gemv)(tiles, activations, out) }
    }

    /// Ternary matrix times the vectors of several tokens, for some tiles, with the bits of
    /// [`Kernels::ternary_gemv`] per token.
    ///
    /// `codes` `[tokens][padded_cols]`, `sums` and `scales` `[tokens]`, `out` `[tokens][rows of tiles]`. The weights are
    /// read from memory once; see `blocking.rs` for the rest of the way.
    #[expect(
        clippy::too_many_arguments,
        reason = "one operation on plain slices; a struct would only rename them"
    )]
    pub fn ternary_gemm(
        &self,
        shape: TernaryShape,
        data: &[u8],
        tiles: Range<usize>,
        tokens: usize,
        codes: &[i8],
        sums: &[i32],
        scales: &[f32],
        out: &mut [f32],
    ) {
        let cols = shape.padded_cols();
        assert_eq!(codes.len(), tokens * cols, "ternary_gemm: activation codes");
        assert_eq!((sums.len(), scales.len()), (tokens, tokens), "ternary_gemm: sums and scales");
        let tiles = select(shape, data, tiles, out.len(), tokens);
        if tiles.rows == 0 || tiles.blocks == 0 {
            return out.fill(0.0);
        }
        let activations = Activations { codes, sums, scales };
        // SAFETY: this table was handed out against proof of its instruction set, and the shapes agree.
        unsafe { (self.ternary.gemm)(tiles, activations, out) }
    }
}

/// Checks the shapes and cuts the tiles out of the matrix.
fn select(shape: TernaryShape, data: &[u8], tiles: Range<usize>, out: usize, tokens: usize) -> Tiles<'_> {
    assert_eq!(data.len(), shape.bytes(), "ternary product: bytes of the matrix {shape:?}");
    assert!(
        shape.cols <= MAX_COLS,
        "ternary product: {} columns; the sums are exact to {MAX_COLS}",
        shape.cols
    );
    let rows = shape.rows_of(&tiles);
    assert_eq!(out, rows * tokens, "ternary product: results for tiles {tiles:?} and {tokens} tokens");
    let data = &data[tiles.start * shape.tile_bytes()..tiles.end * shape.tile_bytes()];
    Tiles { data, blocks: shape.padded_cols() / BLOCK_COLS, rows }
}
