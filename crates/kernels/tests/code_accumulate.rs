//! Weighted sums of rows of codes: every instruction set against the oracle, bit for bit.

use longbit_kernels::{CodeBits, CodeShape, Isa, Kernels, Rows, Scales, oracle};
use proptest::prelude::*;

const DIMS: [usize; 11] = [8, 16, 32, 48, 64, 80, 96, 128, 160, 224, 256];
/// Codes of both ends, a codebook, and consecutive codes.
const TABLES: [[i8; 16]; 3] = [
    [-128, 127, -128, -128, 127, 127, -128, 127, -128, 127, -128, -128, 127, 127, -128, 127],
    [-128, -93, -71, -50, -33, -20, -9, -1, 3, 12, 25, 41, 60, 80, 104, 127],
    [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7],
];

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

/// Codes of any value, or indices of any value.
fn random_codes(n: usize, seed: u64) -> Vec<i8> {
    floats(n, seed).iter().map(|x| (x * 128.0).floor().clamp(-128.0, 127.0) as i8).collect()
}

/// Packed rows.
struct Stored {
    shape: CodeShape,
    data: Vec<u8>,
    low: Vec<u8>,
    table: [i8; 16],
    /// What they stand for, `[n][dims]`.
    codes: Vec<i8>,
}

impl Stored {
    fn new(shape: CodeShape, codes: &[i8], table: [i8; 16]) -> Stored {
        let n = codes.len() / shape.dims;
        let mut data = vec![0; n * shape.row_bytes()];
        let mut low = vec![0; if shape.bits == CodeBits::Planes { data.len() } else { 0 }];
        Kernels::best().pack_codes(shape, codes, &mut data, &mut low);
        let mut codes = vec![0; n * shape.dims];
        shape.unpack(Rows { codes: &data, low: &low, table: &table, upcoming: &[] }, &mut codes);
        Stored { shape, data, low, table, codes }
    }

    fn rows(&self) -> Rows<'_> {
        Rows { codes: &self.data, low: &self.low, table: &self.table, upcoming: &self.data }
    }

    /// Compares every instruction set with the oracle.
    fn check(&self, weights: &[f32], scales: Scales<'_>, acc: &[f32]) {
        let mut wanted = acc.to_vec();
        oracle::code_accumulate(&self.codes, self.shape.dims, weights, scales, &mut wanted);
        for k in tables() {
            let mut got = acc.to_vec();
            k.code_accumulate(self.shape, weights, self.rows(), scales, &mut got);
            let differs = wanted.iter().zip(&got).position(|(a, b)| a.to_bits() != b.to_bits());
            let n = self.codes.len() / self.shape.dims;
            let kind = match scales {
                Scales::One => "none",
                Scales::Row(_) => "of rows",
                Scales::Block(_) => "of blocks",
            };
            let (isa, shape, heads) = (k.isa(), self.shape, weights.len() / n);
            assert_eq!(differs, None, "{isa} {shape:?}, {n} rows, {heads} heads, scales: {kind}");
        }
    }
}

/// Compares with every kind of scale; scales have both signs.
fn check(shape: CodeShape, n: usize, heads: usize, seed: u64) {
    let table = TABLES[(seed % 3) as usize];
    let stored = Stored::new(shape, &random_codes(n * shape.dims, seed), table);
    let weights = floats(heads * n, seed + 1);
    let (of_rows, of_blocks) = (floats(n, seed + 2), floats(n * shape.blocks(), seed + 3));
    let acc = floats(heads * shape.dims, seed + 4);
    for scales in [Scales::One, Scales::Row(&of_rows), Scales::Block(&of_blocks)] {
        stored.check(&weights, scales, &acc);
    }
}

#[test]
fn every_set_gives_the_bits_of_the_oracle() {
    let mut seed = 0;
    for (bits, dims) in CodeBits::ALL.into_iter().flat_map(|bits| DIMS.map(|dims| (bits, dims))) {
        for (n, heads) in [1, 3, 4, 5, 17, 64].into_iter().flat_map(|n| [1, 2, 3, 4, 7].map(|g| (n, g))) {
            seed += 1;
            check(CodeShape { dims, bits }, n, heads, seed);
        }
    }
}

#[test]
fn long_runs_and_many_heads() {
    for (i, bits) in CodeBits::ALL.into_iter().enumerate() {
        for (dims, n, heads) in [(128, 255, 5), (128, 256, 6), (96, 300, 8), (128, 512, 4), (64, 509, 9)] {
            check(CodeShape { dims, bits }, n, heads, i as u64);
        }
    }
}

#[test]
fn weights_of_any_size_and_codes_at_the_ends() {
    let n = 512;
    for bits in [CodeBits::Eight, CodeBits::Four, CodeBits::Planes] {
        let shape = CodeShape { dims: 128, bits };
        for code in [-128i8, 127] {
            // Indices of -128 have the first code of the table, those of 127 the last.
            let mut table = TABLES[1];
            (table[0], table[15]) = (-128, -128);
            let stored = Stored::new(shape, &vec![code; n * shape.dims], table);
            let mut one_huge = vec![1e-9f32; n];
            one_huge[77] = 1e9;
            let denormal: Vec<f32> = (0..n).map(|t| f32::from_bits(t as u32 * 1001)).collect();
            // 1e-30 is where the step stops to shrink.
            let small: Vec<f32> = (0..n).map(|t| 2e-30 / t as f32).map(|w| w.min(1e-30)).collect();
            let alternating: Vec<f32> = (0..n).map(|t| if t % 4 < 2 { 1.0 } else { -1.0 }).collect();
            for w in [vec![1.0; n], vec![0.0; n], vec![-3e38; n], one_huge, denormal, small, alternating] {
                stored.check(&w, Scales::One, &floats(shape.dims, 5));
                stored.check(&w, Scales::Row(&vec![-1.0; n]), &floats(shape.dims, 6));
                stored.check(&w, Scales::Block(&vec![1.0; n * 4]), &floats(shape.dims, 7));
            }
        }
    }
}

#[test]
fn nothing_is_added_without_rows_or_weight() {
    let shape = CodeShape { dims: 64, bits: CodeBits::Eight };
    let stored = Stored::new(shape, &random_codes(6 * 64, 1), TABLES[0]);
    let start = floats(128, 3);
    for k in tables() {
        let mut acc = start.clone();
        k.code_accumulate(shape, &[], Rows::bytes(&[]), Scales::One, &mut acc);
        k.code_accumulate(shape, &[0.0; 12], stored.rows(), Scales::One, &mut acc);
        assert_eq!(acc, start, "{}", k.isa());
    }
}

#[test]
#[should_panic(expected = "513 rows")]
fn more_rows_than_sums_can_hold_are_refused() {
    let shape = CodeShape { dims: 8, bits: CodeBits::Eight };
    let rows = vec![0; 513 * 32];
    Kernels::best().code_accumulate(shape, &[0.0; 513], Rows::bytes(&rows), Scales::One, &mut [0.0; 8]);
}

proptest! {
    /// Weights of 16 bits are off by half a step at most, and nothing else is rounded but floats.
    #[test]
    fn the_error_is_within_the_bound(n in 1usize..300, heads in 1usize..6, seed in 0u64..1000, power in 1i32..8) {
        let shape = CodeShape { dims: 96, bits: CodeBits::Eight };
        let stored = Stored::new(shape, &random_codes(n * shape.dims, seed), TABLES[0]);
        let weights: Vec<f32> = floats(heads * n, seed + 1).iter().map(|w| w.abs().powi(power)).collect();
        let scales = floats(n * 3, seed + 2);
        let mut acc = vec![0.0; heads * shape.dims];
        Kernels::best().code_accumulate(shape, &weights, stored.rows(), Scales::Block(&scales), &mut acc);
        for (i, a) in acc.iter().enumerate() {
            let (h, i) = (i / shape.dims, i % shape.dims);
            let (mut sum, mut weight, mut scale) = (0.0, 0.0f64, 0.0f64);
            for t in 0..n {
                let [w, s] = [weights[h * n + t], scales[t * 3 + i / 32]].map(f64::from);
                (weight, scale) = (weight.max(w.abs()), scale.max(s.abs()));
                let u = w * s;
                sum += u * f64::from(stored.codes[t * shape.dims + i]);
            }
            // The products and the result are floats: 2^-24 of each term, and of the sum.
            let bound = n as f64 * 128.0 * (weight * scale) * (1.0 / 65024.0 + 3.0 / f64::from(1 << 24));
            prop_assert!((f64::from(*a) - sum).abs() <= bound, "{a} {sum} {bound}");
        }
    }
}
