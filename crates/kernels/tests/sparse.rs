//! Products of listed rows and of listed columns: every instruction set against the oracle.

use longbit_kernels::{ColumnShape, Isa, Kernels, RowShape, TernaryShape, oracle};
use proptest::prelude::*;

fn tables() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().into_iter().map(|isa| Kernels::for_isa(isa).expect("an available set has a table"))
}

fn scrambled(i: usize) -> i8 {
    (i.wrapping_mul(0x9e37_79b9).wrapping_add(12345) >> 7) as i8
}

/// About `percent` of the numbers below `count`, not in order.
fn some(count: usize, percent: usize, seed: usize) -> Vec<u32> {
    let chosen =
        (0..count).filter(|&i| (i ^ seed).wrapping_mul(0x9e37_79b9) >> 8 & 0xff < percent * 256 / 100);
    let mut list: Vec<_> = chosen.map(|i| i as u32).collect();
    if list.len() > 7 {
        list.swap(1, 6);
    }
    list
}

/// One matrix in the tile layout and the two layouts that are repacked from it, in two pieces each.
struct Layouts {
    shape: TernaryShape,
    data: Vec<u8>,
    rows: RowShape,
    by_row: Vec<u8>,
    columns: ColumnShape,
    by_column: Vec<u8>,
}

impl Layouts {
    fn new(shape: TernaryShape, data: Vec<u8>) -> Layouts {
        let TernaryShape { rows, cols } = shape;
        let (rows, columns) = (RowShape { rows, cols }, ColumnShape { rows, cols });
        let mut by_row = vec![0xee; rows.bytes()];
        let middle = rows.rows / 3;
        let (low, high) = by_row.split_at_mut(middle * rows.row_bytes());
        rows.repack(shape, &data, 0..middle, low);
        rows.repack(shape, &data, middle..rows.rows, high);
        let mut by_column = vec![0xee; columns.bytes()];
        let middle = columns.cols / 3;
        let (low, high) = by_column.split_at_mut(middle * columns.column_bytes());
        columns.repack(shape, &data, 0..middle, low);
        columns.repack(shape, &data, middle..columns.cols, high);
        Layouts { shape, data, rows, by_row, columns, by_column }
    }

    fn random(rows: usize, cols: usize, seed: u64) -> Layouts {
        let shape = TernaryShape { rows, cols };
        let mut data = vec![0; shape.bytes()];
        shape.fill_random(0..shape.tiles(), seed, &mut data);
        Layouts::new(shape, data)
    }

    fn constant(rows: usize, cols: usize, weight: i8) -> Layouts {
        let shape = TernaryShape { rows, cols };
        let mut data = vec![0; shape.bytes()];
        shape.pack(0..shape.tiles(), |_, _| weight, &mut data);
        Layouts::new(shape, data)
    }

    fn check_rows(&self, list: &[u32], code: impl Fn(usize) -> i8) {
        let shape = self.rows;
        let codes: Vec<i8> =
            (0..shape.padded_cols()).map(|c| if c < shape.cols { code(c) } else { 0 }).collect();
        let sum = codes.iter().map(|&c| i32::from(c)).sum();
        // What is not listed keeps its value.
        let mut want = vec![-3.5; shape.rows];
        oracle::ternary_rows(shape, &self.by_row, list, &codes, 0.013, &mut want);
        for k in tables() {
            let mut got = vec![-3.5; shape.rows];
            k.ternary_rows(shape, &self.by_row, list, &codes, sum, 0.013, &mut got);
            assert!(got == want, "{} {shape:?}, {} rows listed", k.isa(), list.len());
            if list.len() == shape.rows {
                k.ternary_gemv(self.shape, &self.data, 0..self.shape.tiles(), &codes, sum, 0.013, &mut got);
                assert!(got == want, "{} {shape:?}, as the whole product", k.isa());
            }
        }
    }

    fn check_columns(&self, list: &[u32], code: impl Fn(usize) -> i8) {
        let shape = self.columns;
        let codes: Vec<i8> = (0..shape.cols).map(code).collect();
        // Sums that are there already stay in.
        let before: Vec<i32> = (0..shape.padded_rows()).map(|i| i as i32 * 1001 - 77_777).collect();
        let mut want = before.clone();
        oracle::ternary_columns(shape, &self.by_column, list, &codes, &mut want);
        for k in tables() {
            let mut got = before.clone();
            k.ternary_columns(shape, &self.by_column, list, &codes, &mut got);
            assert!(got == want, "{} {shape:?}, {} columns listed", k.isa(), list.len());
        }
    }

    fn check(&self, seed: usize, code: impl Fn(usize) -> i8 + Copy) {
        for percent in [0, 7, 25, 60, 100] {
            self.check_rows(&some(self.shape.rows, percent, seed), code);
            self.check_columns(&some(self.shape.cols, percent, seed), code);
        }
        for few in 1..self.shape.rows.min(9) {
            self.check_rows(&some(self.shape.rows, 100, seed)[..few], code);
        }
        for few in 1..self.shape.cols.min(37) {
            self.check_columns(&some(self.shape.cols, 100, seed)[..few], code);
        }
    }
}

#[test]
fn products_agree_on_awkward_shapes() {
    let shapes =
        [(1, 1), (4, 256), (5, 255), (7, 257), (64, 640), (255, 9), (256, 64), (257, 31), (600, 300)];
    for (rows, cols) in shapes {
        Layouts::random(rows, cols, 3).check(rows, scrambled);
    }
}

/// More rows than one stripe of sums has, and rows longer than what is requested ahead.
#[test]
fn large_matrices_have_no_seam() {
    Layouts::random(4300, 70, 4).check(1, scrambled);
    let wide = Layouts::random(40, 9000, 5);
    wide.check_rows(&some(40, 50, 2), scrambled);
    wide.check_columns(&some(9000, 25, 2), scrambled);
}

#[test]
fn extreme_values_do_not_wrap() {
    for (rows, cols) in [(6, 6912), (300, 2560)] {
        for weight in [1, 0, -1] {
            let layouts = Layouts::constant(rows, cols, weight);
            for code in [127, -128] {
                for percent in [30, 100] {
                    layouts.check_rows(&some(rows, percent, 1), |_| code);
                    layouts.check_columns(&some(cols, percent, 1), |_| code);
                    layouts.check_columns(&some(cols, percent, 1), |i| if i % 3 == 0 { -128 } else { code });
                }
            }
        }
    }
}

/// More columns, each at its extreme, than the scaled sums of a lane could take in one go.
#[test]
fn long_lists_of_columns_do_not_wrap() {
    let cols = 150_000;
    for weight in [1, -1] {
        let layouts = Layouts::constant(3, cols, weight);
        let list: Vec<u32> = (0..cols as u32).collect();
        for code in [127i8, -128] {
            let codes = vec![code; cols];
            for k in tables() {
                let mut sums = vec![5; 256];
                k.ternary_columns(layouts.columns, &layouts.by_column, &list, &codes, &mut sums);
                let want = 5 + i32::from(weight) * i32::from(code) * cols as i32;
                assert_eq!(sums[..3], [want; 3], "{}", k.isa());
                assert_eq!(sums[3..], [5; 253], "{}: padding", k.isa());
            }
        }
    }
}

#[test]
fn a_column_that_is_listed_twice_counts_twice() {
    let layouts = Layouts::random(300, 20, 8);
    layouts.check_columns(&[3, 3, 7, 3, 19, 0, 7], scrambled);
    layouts.check_rows(&[3, 3, 299, 3], scrambled);
}

#[test]
fn no_columns_make_zeros() {
    let (rows, columns) = (RowShape { rows: 5, cols: 0 }, ColumnShape { rows: 0, cols: 4 });
    for k in tables() {
        let mut out = [7.0; 5];
        k.ternary_rows(rows, &[], &[1, 4], &[], 0, 1.0, &mut out);
        assert_eq!(out, [7.0, 0.0, 7.0, 7.0, 0.0], "{}", k.isa());
        k.ternary_columns(columns, &[], &[0, 3], &[1; 4], &mut []);
    }
}

#[test]
fn layouts_hold_the_same_weights() {
    for (rows, cols) in [(1, 1), (5, 255), (258, 257), (300, 520)] {
        let layouts = Layouts::random(rows, cols, 9);
        for r in 0..rows {
            for c in 0..cols {
                let want = layouts.shape.unpack(&layouts.data, r, c);
                assert_eq!(layouts.rows.unpack(&layouts.by_row, r, c), want, "row {r}, column {c}");
                assert_eq!(layouts.columns.unpack(&layouts.by_column, r, c), want, "row {r}, column {c}");
            }
        }
    }
}

#[test]
fn a_row_or_column_that_does_not_exist_is_refused() {
    let layouts = Layouts::random(6, 5, 1);
    let k = Kernels::best();
    let rows = || {
        let mut out = [0.0; 6];
        k.ternary_rows(layouts.rows, &layouts.by_row, &[0, 6], &[0; 256], 0, 1.0, &mut out);
    };
    let columns = || k.ternary_columns(layouts.columns, &layouts.by_column, &[5], &[0; 5], &mut [0; 256]);
    for refused in [std::panic::catch_unwind(rows), std::panic::catch_unwind(columns)] {
        let message = *refused.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("is listed of"), "{message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn products_agree_on_any_shape(rows in 1usize..600, cols in 1usize..400, seed: u64, percent in 0usize..101) {
        let layouts = Layouts::random(rows, cols, seed);
        let code = |i: usize| scrambled(i ^ seed as usize);
        layouts.check_rows(&some(rows, percent, seed as usize), code);
        layouts.check_columns(&some(cols, percent, seed as usize), code);
    }
}
