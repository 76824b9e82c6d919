//! Five trits a byte: packing, and the products of every instruction set against the oracle on the 2-bit matrix.

use longbit_kernels::{Isa, Kernels, TRIT_COLS, TernaryShape, TritShape, oracle};
use proptest::prelude::*;

fn tables() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().into_iter().map(|isa| Kernels::for_isa(isa).expect("an available set has a table"))
}

fn scrambled(i: usize) -> i8 {
    (i.wrapping_mul(0x9e37_79b9).wrapping_add(12345) >> 7) as i8
}

/// One matrix in both layouts, the second repacked from the first in two pieces.
struct Both {
    bits: TernaryShape,
    two_bit: Vec<u8>,
    shape: TritShape,
    data: Vec<u8>,
}

impl Both {
    fn repacked(bits: TernaryShape, two_bit: Vec<u8>) -> Both {
        let shape = TritShape::from(bits);
        let mut data = vec![0xee; shape.bytes()];
        let middle = shape.tiles() / 3;
        let (low, high) = data.split_at_mut(middle * shape.tile_bytes());
        shape.repack(bits, &two_bit, 0..middle, low);
        shape.repack(bits, &two_bit, middle..shape.tiles(), high);
        Both { bits, two_bit, shape, data }
    }

    fn random(rows: usize, cols: usize, seed: u64) -> Both {
        let bits = TernaryShape { rows, cols };
        let mut two_bit = vec![0; bits.bytes()];
        bits.fill_random(0..bits.tiles(), seed, &mut two_bit);
        Both::repacked(bits, two_bit)
    }

    fn constant(rows: usize, cols: usize, weight: i8) -> Both {
        let bits = TernaryShape { rows, cols };
        let mut two_bit = vec![0; bits.bytes()];
        bits.pack(0..bits.tiles(), |_, _| weight, &mut two_bit);
        Both::repacked(bits, two_bit)
    }

    fn check(&self, tokens: usize, code: impl Fn(usize) -> i8) {
        let (shape, bits) = (self.shape, self.bits);
        let padded = |cols: usize| -> Vec<i8> {
            let one = |t: usize| {
                let code = &code;
                (0..cols).map(move |c| if c < shape.cols { code(t * shape.cols + c) } else { 0 })
            };
            (0..tokens).flat_map(one).collect()
        };
        let (codes, codes_of_bits) = (padded(shape.padded_cols()), padded(bits.padded_cols()));
        let one = |t: usize| &codes[t * shape.padded_cols()..][..shape.padded_cols()];
        let sums: Vec<i32> = (0..tokens).map(|t| one(t).iter().map(|&c| i32::from(c)).sum()).collect();
        let scales: Vec<f32> = (0..tokens).map(|t| 0.01 + t as f32 * 0.003).collect();
        let all = shape.tiles();
        for tiles in [0..all, all / 3..all, 0..all / 2] {
            let rows = shape.rows_of(&tiles);
            let mut want = vec![0.0; tokens * rows];
            let data = &self.two_bit;
            oracle::ternary_gemm(bits, data, tiles.clone(), &codes_of_bits, &scales, &mut want);
            for k in tables() {
                let mut got = vec![f32::NAN; tokens * rows];
                k.trit_gemm(shape, &self.data, tiles.clone(), tokens, &codes, &sums, &scales, &mut got);
                assert!(got == want, "{} gemm {shape:?} {tiles:?} tokens {tokens}", k.isa());
                got.fill(f32::NAN);
                for t in 0..tokens {
                    let out = &mut got[t * rows..][..rows];
                    k.trit_gemv(shape, &self.data, tiles.clone(), one(t), sums[t], scales[t], out);
                }
                assert!(got == want, "{} gemv {shape:?} {tiles:?} token by token", k.isa());
            }
        }
    }
}

#[test]
fn products_agree_on_awkward_shapes() {
    let shapes =
        [(1, 1), (4, 320), (5, 319), (7, 321), (3, 600), (64, 640), (6, 1281), (13, 2560), (9, 6912)];
    for (rows, cols) in shapes {
        let both = Both::random(rows, cols, 3);
        for tokens in [1, 2, 3, 5, 8] {
            both.check(tokens, scrambled);
        }
    }
}

/// More expanded rows than stay in a cache: the results come in pieces.
#[test]
fn pieces_have_no_seam() {
    Both::random(1200, 1024, 5).check(2, scrambled);
    Both::random(700, 2560, 6).check(1, scrambled);
    Both::random(5, 700, 6).check(40, scrambled);
}

#[test]
fn extreme_values_do_not_wrap() {
    for cols in [319, 2560, 6912] {
        for weight in [1, -1] {
            let both = Both::constant(6, cols, weight);
            for code in [127, -128] {
                both.check(3, |_| code);
                both.check(1, |i| if i % 3 == 0 { -128 } else { code });
            }
        }
    }
}

/// The most columns that are allowed, each at its extreme: the bound of the accumulators.
#[test]
fn the_widest_matrix_is_exact() {
    let cols = 1 << 22;
    let both = Both::constant(1, cols, 1);
    for code in [127, -128] {
        let mut codes = vec![code; both.shape.padded_cols()];
        codes[cols..].fill(0);
        for k in tables() {
            let mut out = [0.0];
            let sum = cols as i32 * i32::from(code);
            k.trit_gemv(both.shape, &both.data, 0..1, &codes, sum, 1.0, &mut out);
            assert_eq!(out, [sum as f32], "{}", k.isa());
        }
    }
}

#[test]
fn no_columns_make_zeros() {
    let shape = TritShape { rows: 5, cols: 0 };
    for k in tables() {
        let mut out = [7.0; 10];
        k.trit_gemv(shape, &[], 0..2, &[], 0, 1.0, &mut out[..5]);
        k.trit_gemm(shape, &[], 1..2, 5, &[], &[0; 5], &[1.0; 5], &mut out[5..]);
        assert_eq!(out, [0.0; 10]);
        k.trit_gemm(TritShape { rows: 3, cols: 7 }, &[0; 256], 0..1, 0, &[], &[], &[], &mut []);
    }
}

#[test]
fn the_layout_is_as_documented() {
    let shape = TritShape { rows: 2560, cols: 6912 };
    assert_eq!((shape.padded_cols(), shape.tiles(), shape.tile_bytes()), (7040, 640, 5632));
    assert_eq!(TritShape { rows: 1, cols: 2560 }.padded_cols(), 8 * TRIT_COLS, "nothing is padded");
    // Byte j of a unit has the columns base + 64 g + j: low bits name the first four, the top bits the fifth.
    let shape = TritShape { rows: 5, cols: 640 };
    let mut data = vec![0; shape.bytes()];
    let at = |row: usize, col: usize| {
        row / 4 * shape.tile_bytes() + col / 320 * 256 + row % 4 * 64 + col % 320 % 64
    };
    let mut zero = vec![0; shape.bytes()];
    shape.pack(0..2, |_, _| 0, &mut zero);
    for (row, col) in [(0, 0), (3, 65), (4, 319), (2, 320), (4, 639), (1, 511)] {
        shape.pack(0..2, |r, c| i8::from((r, c) == (row, col)), &mut data);
        let changed: Vec<_> = (0..data.len()).filter(|&i| data[i] != zero[i]).collect();
        assert_eq!(changed, [at(row, col)], "row {row} column {col}");
    }
}

#[test]
fn packing_repacking_and_unpacking_agree() {
    for (rows, cols) in [(1, 1), (3, 63), (4, 320), (5, 257), (7, 321), (8, 1280), (13, 1300), (30, 700)] {
        let weight = |r: usize, c: usize| (scrambled(r * cols + c) as u8 % 3) as i8 - 1;
        let bits = TernaryShape { rows, cols };
        let mut two_bit = vec![0; bits.bytes()];
        bits.pack(0..bits.tiles(), weight, &mut two_bit);
        let both = Both::repacked(bits, two_bit);
        let mut want = vec![0; both.data.len()];
        let mut asked = 0;
        let counted = |r, c| {
            asked += 1;
            weight(r, c)
        };
        both.shape.pack(0..both.shape.tiles(), counted, &mut want);
        assert!(both.data == want, "{rows}x{cols}");
        assert_eq!(asked, rows * cols, "each weight of the model once");
        for r in 0..rows {
            let mut codes = vec![9; cols];
            both.shape.unpack_row(&want, r, &mut codes);
            let codes: Vec<_> = codes.into_iter().map(|code| code as i8 - 1).collect();
            assert_eq!(
                codes,
                (0..cols).map(|c| weight(r, c)).collect::<Vec<_>>(),
                "row {r} of {rows}x{cols}"
            );
        }
    }
}

#[test]
#[should_panic(expected = "a weight of code 3")]
fn a_code_of_three_is_no_trit() {
    let bits = TernaryShape { rows: 4, cols: 256 };
    let mut two_bit = vec![0b01_01_01_01; bits.bytes()];
    two_bit[200] |= 0b11 << 4;
    Both::repacked(bits, two_bit);
}

/// Bytes that are no code come from a damaged file at worst: they count as zeros, alike everywhere.
#[test]
fn bytes_that_are_no_code_are_zeros() {
    let shape = TritShape { rows: 4, cols: 320 };
    let codes: Vec<i8> = (0..320).map(scrambled).collect();
    let sum = codes.iter().map(|&c| i32::from(c)).sum();
    for byte in 243..=255 {
        for k in tables() {
            let mut out = [7.0; 4];
            k.trit_gemv(shape, &[byte; 256], 0..1, &codes, sum, 1.0, &mut out);
            assert_eq!(out, [0.0; 4], "{} byte {byte}", k.isa());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn products_agree_on_any_shape(rows in 1usize..24, cols in 1usize..1700, tokens in 1usize..7, seed: u64) {
        Both::random(rows, cols, seed).check(tokens, |i| scrambled(i ^ seed as usize));
    }
}
