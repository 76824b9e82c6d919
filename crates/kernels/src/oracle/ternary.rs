//! Ternary products, weight by weight.

use crate::{ColumnShape, RowShape, TernaryShape};
use std::ops::Range;

/// As [`crate::Kernels::ternary_gemv`], without the shortcut over the sum of the codes.
pub fn ternary_gemv(
    shape: TernaryShape,
    data: &[u8],
    tiles: Range<usize>,
    codes: &[i8],
    scale: f32,
    out: &mut [f32],
) {
    for (i, o) in out.iter_mut().enumerate() {
        let row = tiles.start * crate::TILE_ROWS + i;
        let mut dot = 0i64;
        for (col, &code) in codes.iter().enumerate().take(shape.cols) {
            dot += i64::from(shape.unpack(data, row, col)) * i64::from(code);
        }
        *o = dot as f32 * scale;
    }
}

/// As [`crate::Kernels::ternary_gemm`], token by token.
pub fn ternary_gemm(
    shape: TernaryShape,
    data: &[u8],
    tiles: Range<usize>,
    codes: &[i8],
    scales: &[f32],
    out: &mut [f32],
) {
    let rows = shape.rows_of(&tiles);
    for (t, &scale) in scales.iter().enumerate() {
        let codes = &codes[t * shape.padded_cols()..(t + 1) * shape.padded_cols()];
        ternary_gemv(shape, data, tiles.clone(), codes, scale, &mut out[t * rows..(t + 1) * rows]);
    }
}

/// As [`crate::Kernels::ternary_rows`].
pub fn ternary_rows(shape: RowShape, data: &[u8], rows: &[u32], codes: &[i8], scale: f32, out: &mut [f32]) {
    for &row in rows {
        let mut dot = 0i64;
        for (col, &code) in codes.iter().enumerate().take(shape.cols) {
            dot += i64::from(shape.unpack(data, row as usize, col)) * i64::from(code);
        }
        out[row as usize] = dot as f32 * scale;
    }
}

/// As [`crate::Kernels::ternary_columns`].
pub fn ternary_columns(shape: ColumnShape, data: &[u8], columns: &[u32], codes: &[i8], sums: &mut [i32]) {
    for (row, sum) in sums.iter_mut().enumerate().take(shape.rows) {
        for &col in columns {
            *sum += i32::from(shape.unpack(data, row, col as usize)) * i32::from(codes[col as usize]);
        }
    }
}
