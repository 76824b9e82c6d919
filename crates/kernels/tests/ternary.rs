//! Ternary packing, and the matrix products of every instruction set against the oracle: exact, so equal.

use longbit_kernels::{BadCode, Isa, Kernels, TernaryShape, oracle};
use proptest::prelude::*;

fn tables() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().into_iter().map(|isa| Kernels::for_isa(isa).expect("an available set has a table"))
}

fn random_matrix(shape: TernaryShape, seed: u64) -> Vec<u8> {
    let mut data = vec![0xff; shape.bytes()];
    shape.fill_random(0..shape.tiles(), seed, &mut data);
    data
}

/// Activation codes of some tokens, zero in the padding, and their sums.
fn activations(shape: TernaryShape, tokens: usize, code: impl Fn(usize) -> i8) -> (Vec<i8>, Vec<i32>) {
    let cols = shape.padded_cols();
    let mut codes = vec![0; tokens * cols];
    for t in 0..tokens {
        for c in 0..shape.cols {
            codes[t * cols + c] = code(t * shape.cols + c);
        }
    }
    let sums = (0..tokens).map(|t| codes[t * cols..][..cols].iter().map(|&c| i32::from(c)).sum()).collect();
    (codes, sums)
}

fn scrambled(i: usize) -> i8 {
    (i.wrapping_mul(0x9e37_79b9).wrapping_add(12345) >> 7) as i8
}

fn check(shape: TernaryShape, data: &[u8], tokens: usize, code: impl Fn(usize) -> i8) {
    let (codes, sums) = activations(shape, tokens, code);
    let scales: Vec<f32> = (0..tokens).map(|t| 0.01 + t as f32 * 0.003).collect();
    let all = shape.tiles();
    for tiles in [0..all, all / 3..all, 0..all / 2] {
        let rows = shape.rows_of(&tiles);
        let mut want = vec![0.0; tokens * rows];
        oracle::ternary_gemm(shape, data, tiles.clone(), &codes, &scales, &mut want);
        for k in tables() {
            let mut got = vec![f32::NAN; tokens * rows];
            k.ternary_gemm(shape, data, tiles.clone(), tokens, &codes, &sums, &scales, &mut got);
            assert!(got == want, "{} gemm {shape:?} {tiles:?} tokens {tokens}", k.isa());
            got.fill(f32::NAN);
            let cols = shape.padded_cols();
            for t in 0..tokens {
                let (codes, out) = (&codes[t * cols..][..cols], &mut got[t * rows..][..rows]);
                k.ternary_gemv(shape, data, tiles.clone(), codes, sums[t], scales[t], out);
            }
            assert!(got == want, "{} gemv {shape:?} {tiles:?} token by token", k.isa());
        }
    }
}

#[test]
fn products_agree_on_awkward_shapes() {
    for (rows, cols) in [(1, 1), (4, 256), (5, 255), (7, 257), (64, 640), (13, 2560), (9, 6912)] {
        let shape = TernaryShape { rows, cols };
        let data = random_matrix(shape, 3);
        for tokens in [1, 2, 3, 4, 5, 6, 7, 8, 11] {
            check(shape, &data, tokens, scrambled);
        }
    }
}

/// Enough tokens for unpacked weights, and enough rows for more than one row block.
#[test]
fn many_tokens_are_grouped_without_a_seam() {
    let shape = TernaryShape { rows: 6, cols: 6912 };
    for tokens in [80, 127, 128] {
        check(shape, &random_matrix(shape, 4), tokens, scrambled);
    }
    let shape = TernaryShape { rows: 150, cols: 2600 };
    check(shape, &random_matrix(shape, 5), 131, scrambled);
}

#[test]
fn extreme_values_do_not_wrap() {
    for cols in [255, 2560, 6912] {
        let shape = TernaryShape { rows: 6, cols };
        let mut data = vec![0; shape.bytes()];
        for weight in [1, -1] {
            shape.pack(0..shape.tiles(), |_, _| weight, &mut data);
            for code in [127, -128] {
                for tokens in [1, 3, 5, 128] {
                    check(shape, &data, tokens, |_| code);
                }
                check(shape, &data, 1, |i| if i % 3 == 0 { -128 } else { code });
            }
        }
    }
}

/// The sums of all columns that the kernels accept, at their largest, in accumulators of codes that are 64 times too
/// large.
#[test]
fn the_largest_matrix_does_not_wrap() {
    let shape = TernaryShape { rows: 3, cols: 1 << 22 };
    let mut data = vec![0b10_10_10_10; shape.bytes()];
    for weight in [1, -1] {
        if weight < 0 {
            data.fill(0);
        }
        for code in [127i8, -128] {
            let tokens = 3;
            let codes = vec![code; tokens * shape.cols];
            let sum = i32::from(code) << 22;
            let want = (weight * sum) as f32 * 0.5;
            for k in tables() {
                let mut got = vec![f32::NAN; tokens * 3];
                let (sums, scales) = (vec![sum; tokens], vec![0.5; tokens]);
                k.ternary_gemm(shape, &data, 0..1, tokens, &codes, &sums, &scales, &mut got);
                assert_eq!(got, [want; 9], "{} gemm, weights {weight}, codes {code}", k.isa());
                k.ternary_gemv(shape, &data, 0..1, &codes[..shape.cols], sum, 0.5, &mut got[..3]);
                assert_eq!(got, [want; 9], "{} gemv, weights {weight}, codes {code}", k.isa());
            }
        }
    }
}

#[test]
fn no_columns_make_zeros() {
    let shape = TernaryShape { rows: 5, cols: 0 };
    for k in tables() {
        let mut out = [7.0; 10];
        k.ternary_gemv(shape, &[], 0..2, &[], 0, 1.0, &mut out[..5]);
        k.ternary_gemm(shape, &[], 1..2, 5, &[], &[0; 5], &[1.0; 5], &mut out[5..]);
        assert_eq!(out, [0.0; 10]);
    }
}

#[test]
fn pack_and_unpack_are_inverse_and_padding_is_zero() {
    let shape = TernaryShape { rows: 7, cols: 300 };
    let weight = |r: usize, c: usize| ((r * 31 + c * 7) % 3) as i8 - 1;
    let mut data = vec![0xee; shape.bytes()];
    shape.pack(0..1, weight, &mut data[..shape.tile_bytes()]);
    shape.pack(1..2, weight, &mut data[shape.tile_bytes()..]);
    for r in 0..7 {
        for c in 0..300 {
            assert_eq!(shape.unpack(&data, r, c), weight(r, c), "row {r} column {c}");
        }
    }
    let padded = TernaryShape { rows: 8, cols: 512 };
    for r in 0..8 {
        for c in 0..512 {
            if r >= 7 || c >= 300 {
                assert_eq!(padded.unpack(&data, r, c), 0, "padding at row {r} column {c}");
            }
        }
    }
}

#[test]
fn whole_rows_are_packed_and_unpacked() {
    for (rows, cols) in [(1, 1), (3, 63), (4, 64), (5, 255), (7, 257), (8, 512), (13, 300), (30, 700)] {
        let shape = TernaryShape { rows, cols };
        let code = |r: usize, c: usize| (scrambled(r * cols + c) as u8) % 3;
        let (mut want, mut got) = (vec![0; shape.bytes()], vec![0xee; shape.bytes()]);
        shape.pack(0..shape.tiles(), |r, c| code(r, c) as i8 - 1, &mut want);
        let mut asked = Vec::new();
        let middle = shape.tiles() / 2;
        let (low, high) = got.split_at_mut(middle * shape.tile_bytes());
        for (tiles, out) in [(0..middle, low), (middle..shape.tiles(), high)] {
            let row = |r: usize, codes: &mut [u8]| -> Result<(), BadCode> {
                asked.push(r);
                assert_eq!(codes.len(), cols, "{shape:?}");
                codes.iter_mut().enumerate().for_each(|(c, to)| *to = code(r, c));
                Ok(())
            };
            shape.pack_rows(tiles, row, out).unwrap();
        }
        assert!(got == want, "{shape:?}");
        assert_eq!(asked, (0..rows).collect::<Vec<_>>(), "each row of the model once: {shape:?}");
        for r in 0..rows {
            let mut codes = vec![9; cols];
            shape.unpack_row(&got, r, &mut codes);
            assert_eq!(codes, (0..cols).map(|c| code(r, c)).collect::<Vec<_>>(), "row {r} of {shape:?}");
        }
    }
}

/// Codes with bits above the second one too, in the whole and in the padded block, at the first column and the last.
#[test]
fn a_row_with_a_wrong_code_is_named() {
    let shape = TernaryShape { rows: 6, cols: 300 };
    let mut out = vec![0; shape.bytes()];
    for (bad_row, bad_col) in [(0, 0), (1, 255), (3, 256), (4, 77), (5, 299)] {
        for code in [3, 4, 5, 128, 253, 255] {
            let row = |r: usize, codes: &mut [u8]| -> Result<(), BadCode> {
                codes.fill((r % 3) as u8);
                if r == bad_row {
                    codes[bad_col..].fill(code);
                }
                Ok(())
            };
            let want = BadCode { row: bad_row, col: bad_col };
            assert_eq!(shape.pack_rows(0..2, row, &mut out), Err(want), "code {code}");
        }
    }
    let refused = BadCode { row: 9, col: 9 };
    let row = |r: usize, codes: &mut [u8]| {
        codes.fill(1);
        if r == 4 { Err(refused) } else { Ok(()) }
    };
    assert_eq!(shape.pack_rows(0..1, row, &mut out[..shape.tile_bytes()]), Ok(()));
    assert_eq!(shape.pack_rows(0..2, row, &mut out), Err(refused), "the error of the row itself");
}

#[test]
fn hugging_face_bytes_are_repacked() {
    for (rows, cols) in [(4, 3), (12, 256), (20, 300), (64, 640)] {
        let shape = TernaryShape { rows, cols };
        let weight = |r: usize, c: usize| (scrambled(r * cols + c) % 2).clamp(-1, 1);
        let mut packed = vec![0u8; rows / 4 * cols];
        for r in 0..rows {
            for c in 0..cols {
                packed[r % (rows / 4) * cols + c] |= ((weight(r, c) + 1) as u8) << (2 * (r / (rows / 4)));
            }
        }
        let (mut want, mut got) = (vec![0; shape.bytes()], vec![0xff; shape.bytes()]);
        shape.pack(0..shape.tiles(), weight, &mut want);
        let middle = shape.tiles() / 2;
        let (low, high) = got.split_at_mut(middle * shape.tile_bytes());
        shape.repack_hf(&packed, 0..middle, low).unwrap();
        shape.repack_hf(&packed, middle..shape.tiles(), high).unwrap();
        assert!(got == want, "{shape:?}");
    }
}

#[test]
fn a_code_of_three_is_named() {
    let shape = TernaryShape { rows: 8, cols: 300 };
    let mut packed = vec![0b01_01_01_01; 2 * 300];
    packed[300 + 277] |= 0b11 << 4;
    let mut out = vec![0; shape.bytes()];
    let error = shape.repack_hf(&packed, 0..2, &mut out).unwrap_err();
    assert_eq!(error, BadCode { row: 2 * 2 + 1, col: 277 });
    assert!(error.to_string().contains("row 5, column 277"), "{error}");
    assert_eq!(shape.repack_hf(&packed, 0..1, &mut out[..shape.tile_bytes()]), Ok(()));
}

#[test]
fn random_weights_are_balanced_and_independent_of_the_split() {
    let shape = TernaryShape { rows: 30, cols: 700 };
    let whole = random_matrix(shape, 9);
    let mut parts = vec![0; shape.bytes()];
    for tile in 0..shape.tiles() {
        let bytes = shape.tile_bytes();
        shape.fill_random(tile..tile + 1, 9, &mut parts[tile * bytes..(tile + 1) * bytes]);
    }
    assert!(whole == parts);
    assert!(whole != random_matrix(shape, 10));
    let mut counts = [0usize; 3];
    for r in 0..30 {
        for c in 0..700 {
            counts[(shape.unpack(&whole, r, c) + 1) as usize] += 1;
        }
    }
    for count in counts {
        assert!((6500..7500).contains(&count), "{counts:?} of 21000");
    }
    let padded = TernaryShape { rows: 32, cols: 768 };
    for (r, c) in [(0, 700), (29, 767), (30, 0), (31, 767), (31, 512)] {
        assert_eq!(padded.unpack(&whole, r, c), 0, "padding at row {r} column {c}");
    }
}

/// The first bytes of a seed: they may not change, for results name the seed.
#[test]
fn random_weights_are_the_same_on_every_machine() {
    let shape = TernaryShape { rows: 4, cols: 256 };
    let sum =
        random_matrix(shape, 1).iter().fold(0u64, |h, &b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    assert_eq!(sum, 13311470971276264510);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn products_agree_on_any_shape(rows in 1usize..24, cols in 1usize..1100, tokens in 1usize..10, seed: u64) {
        let shape = TernaryShape { rows, cols };
        check(shape, &random_matrix(shape, seed), tokens, |i| scrambled(i ^ seed as usize));
    }
}
