//! The products of lists in plain Rust, which is also compiled for wider vectors.

use super::super::{BLOCK_COLS, UNIT};
use super::{Columns, Rows, SparseTable};

#[inline(always)]
fn rows_body(rows: Rows<'_>, codes: &[i8], sum: i32, scale: f32, out: &mut [f32]) {
    for &row in rows.listed {
        let row = row as usize;
        let line = &rows.data[row * rows.row_bytes..][..rows.row_bytes];
        let mut dot = 0;
        for (unit, a) in line.as_chunks::<UNIT>().0.iter().zip(codes.as_chunks::<BLOCK_COLS>().0) {
            for (g, a) in a.as_chunks::<UNIT>().0.iter().enumerate() {
                for (&w, &a) in unit.iter().zip(a) {
                    dot += i32::from(w >> (2 * g) & 3) * i32::from(a);
                }
            }
        }
        out[row] = (dot - sum) as f32 * scale;
    }
}

#[inline(always)]
fn columns_body(columns: Columns<'_>, codes: &[i8], sums: &mut [i32]) {
    for &column in columns.listed {
        let column = column as usize;
        let a = i32::from(codes[column]);
        let line = &columns.data[column * columns.column_bytes..][..columns.column_bytes];
        for (unit, sums) in line.as_chunks::<UNIT>().0.iter().zip(sums.as_chunks_mut::<BLOCK_COLS>().0) {
            for (g, sums) in sums.as_chunks_mut::<UNIT>().0.iter_mut().enumerate() {
                for (&w, sum) in unit.iter().zip(sums) {
                    *sum = sum.wrapping_add((i32::from(w >> (2 * g) & 3) - 1) * a);
                }
            }
        }
    }
}

/// Compiles both products under an attribute.
macro_rules! stamp {
    ($module:ident, $attribute:tt) => {
        mod $module {
            use super::*;

            # $attribute
            pub(super) fn rows(rows: Rows<'_>, codes: &[i8], sum: i32, scale: f32, out: &mut [f32]) {
                rows_body(rows, codes, sum, scale, out);
            }

            # $attribute
            pub(super) fn columns(columns: Columns<'_>, codes: &[i8], sums: &mut [i32]) {
                columns_body(columns, codes, sums);
            }
        }
    };
}

stamp!(portable, [inline]);
#[cfg(target_arch = "x86_64")]
stamp!(avx2, [target_feature(enable = "avx2,fma")]);
#[cfg(target_arch = "x86_64")]
stamp!(avx512, [target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]);

/// For every instruction set.
pub(crate) static PORTABLE: SparseTable = SparseTable { rows: portable::rows, columns: portable::columns };
/// The same, in 256-bit vectors.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX2: SparseTable = SparseTable { rows: avx2::rows, columns: avx2::columns };
/// The same, in 512-bit vectors.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX512: SparseTable = SparseTable { rows: avx512::rows, columns: avx512::columns };
