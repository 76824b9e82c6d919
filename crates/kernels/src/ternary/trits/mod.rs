//! Ternary weights at 1.6 bits: five trits a byte, for a fifth less to read than two bits a weight.
//!
//! # Layout
//! As the 2-bit layout, with 320 columns in the place of 256: rows are padded to [`TILE_ROWS`], columns to
//! [`TRIT_COLS`]; data order is `[tile of 4 rows][unit of 320 columns][row in tile]`, 64 bytes each. In a unit that starts
//! at column `base`, byte `j` holds the columns `base + 64 g + j` for `g` from 0 to 4: every group of 64 columns meets
//! consecutive activations without any shuffle. `code` has the numbering of the bytes: one lookup gives the first
//! four groups as codes of two bits, and the top bits of most bytes are the fifth. Padding has weight 0.
//!
//! Instruction sets without byte permutations of 64 entries expand a few tiles at a time into the 2-bit layout, and
//! so does every product of several tokens, where the expansion is shared by them.

mod code;
mod shape;
#[cfg(target_arch = "x86_64")]
pub(crate) mod vbmi;

pub use shape::TritShape;

use super::{MAX_COLS, TILE_ROWS, TernaryShape, UNIT};
use crate::Kernels;
use std::borrow::Cow;
use std::ops::Range;

/// Columns of a unit: five groups of 64.
pub const TRIT_COLS: usize = 320;
/// Bytes of one unit of one tile.
pub(crate) const UNIT_BYTES: usize = TILE_ROWS * UNIT;
/// Bytes of expanded weights that stay in the second-level cache between expansion and product.
const NEAR_BYTES: usize = 256 << 10;
/// Bytes of expanded weights when many tokens share them: then it matters more to write results in one go.
const FAR_BYTES: usize = 8 << 20;
/// From so many tokens on, [`FAR_BYTES`].
const MANY_TOKENS: usize = 32;

/// Consecutive tiles of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct TritTiles<'a> {
    /// Whole tiles.
    pub(crate) data: &'a [u8],
    /// Units of a tile.
    pub(crate) units: usize,
    /// Rows that exist; the last tile may have fewer than four.
    pub(crate) rows: usize,
}

/// Computes `out[row]` for some tiles: activation codes, their sum, the factor of the results.
pub(crate) type TritGemv = unsafe fn(TritTiles<'_>, &[i8], i32, f32, &mut [f32]);

/// The kernels of one instruction set. Calling an entry requires a processor that has the set.
pub(crate) struct TritTable {
    /// One token, where there is a kernel that reads this layout.
    pub(crate) gemv: Option<TritGemv>,
    /// Expands one tile into one tile of the 2-bit layout.
    pub(crate) expand: unsafe fn(&[u8], &mut [u8]),
}

/// For every instruction set.
pub(crate) static PORTABLE: TritTable = TritTable { gemv: None, expand: shape::expand };

impl Kernels {
    /// Whether [`Kernels::trit_gemv`] reads five trits a byte as fast as they come: elsewhere weights are expanded to two
    /// bits first, and a model is better kept in the 2-bit layout.
    pub fn trits_are_native(&self) -> bool {
        self.trits.gemv.is_some()
    }

    /// Ternary matrix times one vector, for some tiles: `out[r] = (sum over columns of weight * code) as f32 * scale`, the
    /// bits of [`Kernels::ternary_gemv`].
    ///
    /// `data` is the whole matrix (`shape.bytes()`), `codes` has `shape.padded_cols()` entries with zeros in the padding,
    /// `sum` is the sum of `codes`, and `out` has the rows of `tiles`. Exact before the final multiplication.
    #[expect(
        clippy::too_many_arguments,
        reason = "one operation on plain slices; a struct would only rename them"
    )]
    pub fn trit_gemv(
        &self,
        shape: TritShape,
        data: &[u8],
        tiles: Range<usize>,
        codes: &[i8],
        sum: i32,
        scale: f32,
        out: &mut [f32],
    ) {
        let Some(gemv) = self.trits.gemv else {
            return self.trit_gemm(shape, data, tiles, 1, codes, &[sum], &[scale], out);
        };
        assert_eq!(codes.len(), shape.padded_cols(), "trit_gemv: activation codes");
        let tiles = select(shape, data, tiles, out.len(), 1);
        if tiles.units == 0 {
            return out.fill(0.0);
        }
        // SAFETY: this table was handed out against proof of its instruction set, and the shapes agree.
        unsafe { gemv(tiles, codes, sum, scale, out) }
    }

    /// Ternary matrix times the vectors of several tokens, for some tiles, with the bits of [`Kernels::trit_gemv`] per
    /// token.
    ///
    /// `codes` `[tokens][padded_cols]` with the padding of this shape or of the [`TernaryShape`] of the same size, `sums`
    /// and `scales` `[tokens]`, `out` `[tokens][rows of tiles]`. Each weight is expanded once for all tokens.
    #[expect(
        clippy::too_many_arguments,
        reason = "one operation on plain slices; a struct would only rename them"
    )]
    pub fn trit_gemm(
        &self,
        shape: TritShape,
        data: &[u8],
        tiles: Range<usize>,
        tokens: usize,
        codes: &[i8],
        sums: &[i32],
        scales: &[f32],
        out: &mut [f32],
    ) {
        let usual = TernaryShape { rows: shape.rows, cols: shape.cols }.padded_cols();
        let stride = if codes.len() == tokens * usual { usual } else { shape.padded_cols() };
        assert_eq!(codes.len(), tokens * stride, "trit_gemm: activation codes");
        assert_eq!((sums.len(), scales.len()), (tokens, tokens), "trit_gemm: sums and scales");
        let some = select(shape, data, tiles, out.len(), tokens);
        if some.rows == 0 || tokens == 0 || some.units == 0 {
            return out.fill(0.0);
        }
        let bits = TernaryShape { rows: some.rows, cols: shape.cols };
        let codes = restride(codes, stride, bits.padded_cols());
        let most = if tokens < MANY_TOKENS { NEAR_BYTES } else { FAR_BYTES };
        let at_once = (most / bits.tile_bytes()).clamp(1, bits.tiles());
        let mut expanded = vec![0; at_once * bits.tile_bytes()];
        let mut results = vec![0.0; if at_once < bits.tiles() { tokens * at_once * TILE_ROWS } else { 0 }];
        for (i, source) in some.data.chunks(at_once * shape.tile_bytes()).enumerate() {
            let first = i * at_once * TILE_ROWS;
            let part = TernaryShape { rows: (some.rows - first).min(at_once * TILE_ROWS), cols: shape.cols };
            let expanded = &mut expanded[..part.bytes()];
            let pairs =
                source.chunks_exact(shape.tile_bytes()).zip(expanded.chunks_exact_mut(bits.tile_bytes()));
            for (tile, out) in pairs {
                // SAFETY: this table was handed out against proof of its instruction set.
                unsafe { (self.trits.expand)(tile, out) }
            }
            let all = 0..part.tiles();
            if tokens == 1 {
                let out = &mut out[first..first + part.rows];
                self.ternary_gemv(part, expanded, all, &codes, sums[0], scales[0], out);
            } else if part.rows == some.rows {
                self.ternary_gemm(part, expanded, all, tokens, &codes, sums, scales, out);
            } else {
                let results = &mut results[..tokens * part.rows];
                self.ternary_gemm(part, expanded, all, tokens, &codes, sums, scales, results);
                for (out, results) in out.chunks_exact_mut(some.rows).zip(results.chunks_exact(part.rows)) {
                    out[first..first + part.rows].copy_from_slice(results);
                }
            }
        }
    }
}

/// The activation codes of some tokens with another padding. Both lengths hold all columns of the model, and what lies
/// beyond is zeros.
fn restride(codes: &[i8], from: usize, to: usize) -> Cow<'_, [i8]> {
    if from == to {
        return codes.into();
    }
    if codes.len() == from && to <= from {
        return codes[..to].into();
    }
    let both = from.min(to);
    let mut all = vec![0; codes.len() / from * to];
    for (out, codes) in all.chunks_exact_mut(to).zip(codes.chunks_exact(from)) {
        out[..both].copy_from_slice(&codes[..both]);
    }
    all.into()
}

/// Checks the shapes and cuts the tiles out of the matrix.
fn select(shape: TritShape, data: &[u8], tiles: Range<usize>, out: usize, tokens: usize) -> TritTiles<'_> {
    assert_eq!(data.len(), shape.bytes(), "trit product: bytes of the matrix {shape:?}");
    assert!(shape.cols <= MAX_COLS, "trit product: {} columns; the sums are exact to {MAX_COLS}", shape.cols);
    let rows = shape.rows_of(&tiles);
    assert_eq!(out, rows * tokens, "trit product: results for tiles {tiles:?} and {tokens} tokens");
    let data = &data[tiles.start * shape.tile_bytes()..tiles.end * shape.tile_bytes()];
    TritTiles { data, units: shape.padded_cols() / TRIT_COLS, rows }
}
