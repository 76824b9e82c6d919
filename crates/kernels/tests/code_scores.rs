//! Scores of rows of codes: every instruction set against the oracle, bit for bit.

use longbit_kernels::{CodeBits, CodeShape, Isa, Kernels, QueryBits, QueryCodes, Rows, Scales, oracle};
use proptest::prelude::*;

const DIMS: [usize; 11] = [8, 16, 32, 48, 64, 96, 128, 160, 248, 256, 512];
/// A codebook, consecutive codes, and those but for the last ones.
const TABLES: [[i8; 16]; 3] = [
    TABLE,
    [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7],
    [112, 113, 114, 115, 116, 117, 118, 119, 0, 1, 2, 3, 4, 5, 6, 9],
];
const TABLE: [i8; 16] = [-128, -93, -71, -50, -33, -20, -9, -1, 3, 12, 25, 41, 60, 80, 104, 127];

fn tables() -> Vec<&'static Kernels> {
    Isa::available().into_iter().filter_map(Kernels::for_isa).collect()
}

/// Pseudo-random numbers between -1 and 1.
fn floats(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

/// Codes of any value, or indices of any value.
fn random_codes(n: usize, seed: u64) -> Vec<i8> {
    floats(n, seed).iter().map(|x| (x * 128.0).floor().clamp(-128.0, 127.0) as i8).collect()
}

/// [`check_table`] for a codebook and for uniform steps.
fn check(shape: CodeShape, codes: &[i8], queries: &[f32], seed: u64) {
    for table in if shape.bits.is_signed() { &TABLES[..1] } else { &TABLES } {
        check_table(shape, table, codes, queries, seed);
    }
}

/// Packs `codes` (or indices), and compares the scores of `queries` with every kind of scale on every instruction set.
fn check_table(shape: CodeShape, table: &[i8; 16], codes: &[i8], queries: &[f32], seed: u64) {
    let (n, g) = (codes.len() / shape.dims, queries.len() / shape.dims);
    let low = if shape.bits == CodeBits::Planes { n * shape.row_bytes() } else { 0 };
    let (mut data, mut low) = (vec![0; n * shape.row_bytes()], vec![0; low]);
    Kernels::best().pack_codes(shape, codes, &mut data, &mut low);
    let rows = Rows { codes: &data, low: &low, table, upcoming: &data };
    let mut codes = vec![0; n * shape.dims];
    shape.unpack(rows, &mut codes);
    let (of_rows, of_blocks) = (floats(n, seed + 1), floats(n * shape.blocks(), seed + 2));
    for query_bits in [QueryBits::Sixteen, QueryBits::Eight] {
        let rounded: Vec<_> =
            queries.chunks(shape.dims).map(|q| oracle::quantize_query(query_bits, q)).collect();
        let kinds = [Scales::One, Scales::Row(&of_rows), Scales::Block(&of_blocks)];
        let wanted = kinds.map(|scales| {
            let mut wanted = Vec::new();
            for (v, step) in &rounded {
                for (t, row) in codes.chunks(shape.dims).enumerate() {
                    wanted.push(oracle::code_score(v, *step, row, scales, t));
                }
            }
            wanted
        });
        for k in tables() {
            let name = format!("{} {shape:?} {query_bits:?} {n} rows, {g} heads", k.isa());
            let mut query = QueryCodes::default();
            // What is left from other shapes must not matter.
            k.quantize_queries(
                CodeShape { dims: 256, bits: CodeBits::Eight },
                query_bits,
                &[1.0; 2560],
                &mut query,
            );
            k.quantize_queries(shape, query_bits, queries, &mut query);
            for (h, (v, step)) in rounded.iter().enumerate() {
                assert_eq!(bits(&query.steps()[h..=h]), bits(&[*step]), "{name}: step {h}");
                assert!((0..shape.dims).all(|i| query.code(h, i) == v[i]), "{name}: query {h}");
            }
            for (scales, wanted) in kinds.iter().zip(&wanted) {
                let mut out = vec![0.5; g * n];
                k.code_scores(shape, &query, rows, *scales, &mut out);
                assert!(bits(&out) == bits(wanted), "{name} {scales:?}\n{out:?}\n{wanted:?}");
                let (mut again, mut largest) = (vec![0.5; g * n], vec![7.0; g]);
                k.code_scores_and_largest(shape, &query, rows, *scales, (&mut again, &mut largest));
                let most: Vec<f32> = (0..g).map(|h| oracle::max(&wanted[h * n..(h + 1) * n])).collect();
                assert_eq!((bits(&again), bits(&largest)), (bits(wanted), bits(&most)), "{name} {scales:?}");
            }
        }
    }
}

#[test]
fn every_instruction_set_follows_the_oracle() {
    for bits in CodeBits::ALL {
        for dims in DIMS {
            for (i, n) in [1, 3, 4, 5, 17].into_iter().enumerate() {
                let (g, seed) = (1 + (dims / 8 + 2 * i) % 9, (dims + i) as u64);
                check(
                    CodeShape { dims, bits },
                    &random_codes(n * dims, seed),
                    &floats(g * dims, seed + 9),
                    seed,
                );
            }
        }
        for (n, g) in [(256, 4), (512, 1), (15, 9), (16, 8), (19, 5), (0, 4), (4, 0)] {
            check(CodeShape { dims: 128, bits }, &random_codes(n * 128, 1), &floats(g * 128, 2), 3);
        }
        for g in 1..=9 {
            check(CodeShape { dims: 128, bits }, &random_codes(6 * 128, g), &floats(g as usize * 128, 2), 3);
        }
    }
}

#[test]
fn the_largest_sums_do_not_wrap_or_saturate() {
    for bits in CodeBits::ALL {
        for dims in [128, 512] {
            for code in [-128i8, 127, 0, 15] {
                for sign in [1.0f32, -1.0] {
                    for near in [1.0, 127.0 / 32512.0, 32384.0 / 32512.0, 128.0 / 32512.0] {
                        let mut queries = vec![sign * near; 4 * dims];
                        queries.iter_mut().step_by(dims).for_each(|x| *x = sign);
                        check(CodeShape { dims, bits }, &vec![code; 5 * dims], &queries, 1);
                    }
                }
            }
        }
    }
}

#[test]
fn queries_of_every_size_and_of_no_size() {
    for special in
        [0.0, -0.0, 1e-40, -1e-38, 1e-31, f32::MAX, f32::MIN, f32::INFINITY, f32::NAN, f32::NEG_INFINITY]
    {
        for dims in [64, 128, 136] {
            let mut queries = floats(5 * dims, 4);
            queries[..dims].fill(special);
            queries[2 * dims + 7] = special;
            queries[3 * dims..4 * dims].iter_mut().for_each(|x| *x *= 1e-38);
            for bits in CodeBits::ALL {
                check(CodeShape { dims, bits }, &random_codes(6 * dims, 8), &queries, 5);
            }
        }
    }
}

#[test]
fn a_table_keeps_its_queries_when_it_is_told_fewer() {
    let shape = CodeShape { dims: 128, bits: CodeBits::Eight };
    for k in tables() {
        let (mut query, mut fresh) = (QueryCodes::default(), QueryCodes::default());
        let rows = vec![1u8; 3 * 128];
        k.quantize_queries(shape, QueryBits::Sixteen, &floats(8 * 128, 1), &mut query);
        k.quantize_queries(shape, QueryBits::Eight, &floats(3 * 128, 2), &mut query);
        k.quantize_queries(shape, QueryBits::Eight, &floats(3 * 128, 2), &mut fresh);
        let (mut a, mut b) = (vec![0.0; 9], vec![1.0; 9]);
        k.code_scores(shape, &query, Rows::bytes(&rows), Scales::One, &mut a);
        k.code_scores(shape, &fresh, Rows::bytes(&rows), Scales::One, &mut b);
        assert_eq!(bits(&a), bits(&b), "{}", k.isa());
    }
}

proptest! {
    #[test]
    fn a_score_is_near_that_of_the_floats(
        query in prop::collection::vec(-10f32..10.0, 128), codes in prop::collection::vec(any::<i8>(), 128)
    ) {
        let shape = CodeShape { dims: 128, bits: CodeBits::Eight };
        let k = Kernels::best();
        let mut data = vec![0; shape.row_bytes()];
        k.pack_codes(shape, &codes, &mut data, &mut []);
        let exact: f64 = query.iter().zip(&codes).map(|(&q, &c)| f64::from(q) * f64::from(c)).sum();
        let m = query.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
        for (bits, most) in [(QueryBits::Sixteen, 32512.0), (QueryBits::Eight, 127.0)] {
            let (mut planes, mut out) = (QueryCodes::default(), [0.0]);
            k.quantize_queries(shape, bits, &query, &mut planes);
            k.code_scores(shape, &planes, Rows::bytes(&data), Scales::One, &mut out);
            // Half a step an element, and the rounding of the result.
            let bound = 128.0 * 128.0 * m / most * 0.501 + exact.abs() * 1e-6;
            prop_assert!((f64::from(out[0]) - exact).abs() <= bound, "{bits:?}: {} {exact}", out[0]);
        }
    }
}
