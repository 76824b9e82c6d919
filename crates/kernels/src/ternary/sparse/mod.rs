//! Ternary products that skip zeros exactly: one token, and only the rows or the columns that a list names.
//!
//! A gate of ReLU² makes most inputs of the next matrix exactly zero, and the same zeros make rows of the sibling matrix
//! needless. What is not listed is not read, so that time follows the list.
//!
//! # Layouts
//! Both have two bits a weight, with the code `weight + 1`, in units of 64 bytes; padding has code 1.
//! - [`RowShape`]: `[row][block of 256 columns]`. Byte `j` of a block that starts at column `base` holds the columns `base +
//!   64 g + j` in its bit pairs `g` from low to high, as a unit of the tile layout does.
//! - [`ColumnShape`]: `[column][block of 256 rows]`, the same with rows in the place of columns.

mod scalar;
mod shape;
#[cfg(target_arch = "x86_64")]
pub(crate) mod vnni;

pub(crate) use scalar::PORTABLE;
#[cfg(target_arch = "x86_64")]
pub(crate) use scalar::{AVX2, AVX512};
pub use shape::{ColumnShape, RowShape};

use super::MAX_COLS;
use crate::Kernels;

/// The listed rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// The whole matrix.
    pub(crate) data: &'a [u8],
    /// Bytes of a row, a multiple of 64.
    pub(crate) row_bytes: usize,
    /// Rows that exist.
    pub(crate) listed: &'a [u32],
}

/// The listed columns of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    /// The whole matrix.
    pub(crate) data: &'a [u8],
    /// Bytes of a column, a multiple of 64.
    pub(crate) column_bytes: usize,
    /// Columns that exist.
    pub(crate) listed: &'a [u32],
}

/// Computes `out[row]` for the listed rows: activation codes, their sum, the factor of the results.
pub(crate) type RowProduct = unsafe fn(Rows<'_>, &[i8], i32, f32, &mut [f32]);
/// Adds the listed columns times their activation codes to the sums of all rows.
pub(crate) type ColumnProduct = unsafe fn(Columns<'_>, &[i8], &mut [i32]);

/// The kernels of one instruction set. Calling an entry requires a processor that has the set.
pub(crate) struct SparseTable {
    /// The product of listed rows.
    pub(crate) rows: RowProduct,
    /// The product of listed columns.
    pub(crate) columns: ColumnProduct,
}

impl Kernels {
    /// Listed rows of a ternary matrix times one vector: `out[r] = (sum over columns of weight * code) as f32 * scale` for
    /// every `r` in `rows`; other results are left as they are. The bits of [`Kernels::ternary_gemv`].
    ///
    /// `data` is the whole matrix (`shape.bytes()`), `codes` has `shape.padded_cols()` entries with zeros in the padding,
    /// `sum` is the sum of `codes`, and `out` has `shape.rows` entries. Rows may be listed in any order; near ones in
    /// ascending order are read fastest.
    ///
    /// # Panics
    /// A length is wrong, or a listed row does not exist.
    #[expect(
        clippy::too_many_arguments,
        reason = "one operation on plain slices; a struct would only rename them"
    )]
    pub fn ternary_rows(
        &self,
        shape: RowShape,
        data: &[u8],
        rows: &[u32],
        codes: &[i8],
        sum: i32,
        scale: f32,
        out: &mut [f32],
    ) {
        assert_eq!(data.len(), shape.bytes(), "ternary_rows: bytes of the matrix {shape:?}");
        assert_eq!(codes.len(), shape.padded_cols(), "ternary_rows: activation codes");
        assert_eq!(out.len(), shape.rows, "ternary_rows: results");
        assert!(
            shape.cols <= MAX_COLS,
            "ternary_rows: {} columns; the sums are exact to {MAX_COLS}",
            shape.cols
        );
        check_list(rows, shape.rows);
        let rows = Rows { data, row_bytes: shape.row_bytes(), listed: rows };
        // SAFETY: this table was handed out against proof of its instruction set; the shapes agree and the rows exist.
        unsafe { (self.sparse.rows)(rows, codes, sum, scale, out) }
    }

    /// Adds listed columns of a ternary matrix times their activation codes: `sums[r] += sum over the listed columns c of
    /// weight[r][c] * codes[c]`, exactly.
    ///
    /// `data` is the whole matrix (`shape.bytes()`), `codes` has `shape.cols` entries, and `sums` has
    /// `shape.padded_rows()` entries, of which those in the padding do not change. A column that is listed twice counts
    /// twice. Several threads take a list and sums each, and the sums are added.
    ///
    /// # Panics
    /// A length is wrong, or a listed column does not exist.
    pub fn ternary_columns(
        &self,
        shape: ColumnShape,
        data: &[u8],
        columns: &[u32],
        codes: &[i8],
        sums: &mut [i32],
    ) {
        assert_eq!(data.len(), shape.bytes(), "ternary_columns: bytes of the matrix {shape:?}");
        assert_eq!(codes.len(), shape.cols, "ternary_columns: activation codes");
        assert_eq!(sums.len(), shape.padded_rows(), "ternary_columns: sums");
        check_list(columns, shape.cols);
        let columns = Columns { data, column_bytes: shape.column_bytes(), listed: columns };
        // SAFETY: this table was handed out against proof of its instruction set; the shapes agree and the columns exist.
        unsafe { (self.sparse.columns)(columns, codes, sums) }
    }
}

fn check_list(list: &[u32], count: usize) {
    let beyond = list.iter().fold(0, |most, &i| i.max(most));
    assert!(list.is_empty() || (beyond as usize) < count, "number {beyond} is listed of {count}");
}
