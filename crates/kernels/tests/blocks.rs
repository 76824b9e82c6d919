//! Rows at 6 and 4 bits: every instruction set against the oracle, bit for bit.

use longbit_kernels::{BlockFormat, BlockShape, Isa, Kernels, Planes, oracle};
use proptest::prelude::*;

const ROWS: [usize; 6] = [1, 3, 4, 5, 8, 13];
const COLS: [usize; 12] = [1, 4, 15, 63, 64, 65, 255, 256, 257, 300, 1000, 2560];

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

fn bf16(x: &[f32]) -> Vec<u16> {
    x.iter().map(|&x| oracle::f32_to_bf16(x)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

/// Packs, reads back and multiplies with every table, against the oracle.
fn check(format: BlockFormat, weights: &[u16], x: &[f32]) {
    let shape = BlockShape { format, rows: weights.len() / x.len(), cols: x.len() };
    let (v, scale) = oracle::quantize_planes(x);
    let rows: Vec<_> = weights.chunks(x.len()).map(|row| oracle::quantize_row(format, row)).collect();
    let expected: Vec<f32> = rows.iter().map(|row| oracle::head_blocks(format, row, &v, scale)).collect();
    let mut first: Option<Vec<u8>> = None;
    for k in tables() {
        let name = format!("{} {shape:?}", k.isa());
        let mut data = vec![0xff; shape.bytes()];
        k.pack_blocks(shape, weights, &mut data);
        assert!(*first.get_or_insert_with(|| data.clone()) == data, "{name}: bytes");
        let mut planes = Planes::default();
        k.quantize_planes(format, x, &mut planes);
        assert_eq!(bits(&[planes.scale()]), bits(&[scale]), "{name}: scale of the activations");
        assert!(planes.codes().eq(v.iter().copied()), "{name}: codes of the activations");
        let mut out = vec![0.0; shape.rows];
        k.head_blocks(shape, &data, 0..shape.tiles(), &planes, &mut out);
        assert_eq!(bits(&out), bits(&expected), "{name}: product");
        // Any tiles by themselves give the same.
        let some = shape.tiles() / 2..shape.tiles();
        let mut part = vec![0.0; shape.rows_of(&some)];
        k.head_blocks(shape, &data, some.clone(), &planes, &mut part);
        assert_eq!(bits(&part), bits(&expected[4 * some.start..]), "{name}: tiles {some:?}");
    }
    let data = first.unwrap();
    let mut row = vec![0.0; shape.cols];
    for (r, expected) in rows.iter().enumerate() {
        shape.read(&data, r, &mut row);
        let steps = |col: usize, code: i32| code as f32 - format.dither(col) as f32 / 8192.0;
        let expected: Vec<f32> =
            expected.iter().enumerate().map(|(col, &(code, scale))| steps(col, code) * scale).collect();
        assert_eq!(bits(&row), bits(&expected), "{shape:?}: row {r} read back");
    }
}

#[test]
fn every_instruction_set_follows_the_oracle() {
    for format in BlockFormat::ALL {
        for (i, &cols) in COLS.iter().enumerate() {
            for (j, &rows) in ROWS.iter().enumerate() {
                let seed = (10 * i + j) as u64;
                check(format, &bf16(&floats(rows * cols, seed)), &floats(cols, seed + 1000));
            }
        }
    }
}

#[test]
fn the_largest_sums_do_not_wrap_or_saturate() {
    let cols = 600;
    for format in BlockFormat::ALL {
        for signs in [[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0f32]] {
            for near in [1.0, 127.0 / 32512.0, 32384.0 / 32512.0, 128.0 / 32512.0f32] {
                let mut x = vec![signs[0] * near; cols];
                x[17] = 1.0;
                let weights = vec![oracle::f32_to_bf16(signs[1]); 5 * cols];
                check(format, &weights, &x);
            }
        }
    }
}

#[test]
fn numbers_of_every_size_and_none_at_all() {
    let special = [0.0, -0.0, 1e-40, -1e-38, f32::MAX, f32::MIN, 1e-30, 3.0, f32::INFINITY, f32::NAN];
    for format in BlockFormat::ALL {
        let cols = 300;
        let mut weights = floats(8 * cols, 5);
        for (i, w) in weights.iter_mut().enumerate() {
            match i / cols {
                0 => *w = 0.0,
                1 => *w *= 1e-39,
                2 => *w *= f32::MAX,
                3 if i % 50 == 0 => *w = special[i / 50 % special.len()],
                4 if i % cols == 100 => *w = 1e10,
                _ => {}
            }
        }
        let weights = bf16(&weights);
        check(format, &weights, &floats(cols, 6));
        check(format, &weights, &vec![0.0; cols]);
        for &value in &special {
            let mut x = floats(cols, 7);
            x[299] = value;
            check(format, &weights, &x);
        }
        let small: Vec<f32> = floats(cols, 8).iter().map(|x| x * 1e-38).collect();
        check(format, &weights, &small);
    }
}

proptest! {
    #[test]
    fn a_weight_is_off_by_half_a_step_at_the_most(
        row in prop::collection::vec(-1e3f32..1e3, 1..600), power in -30i32..30
    ) {
        let row: Vec<f32> = row.iter().map(|w| w * 2f32.powi(power)).collect();
        let row = bf16(&row);
        for (format, steps) in [(BlockFormat::Q6, 31.0), (BlockFormat::Q4, 7.0)] {
            let shape = BlockShape { format, rows: 1, cols: row.len() };
            let k = Kernels::best();
            let mut data = vec![0; shape.bytes()];
            k.pack_blocks(shape, &row, &mut data);
            let mut back = vec![0.0; row.len()];
            shape.read(&data, 0, &mut back);
            let codes = oracle::quantize_row(format, &row);
            for (i, (&w, &b)) in row.iter().zip(&back).enumerate() {
                let (w, b, scale) = (f64::from(oracle::bf16_to_f32(w)), f64::from(b), f64::from(codes[i].1));
                prop_assert!((w - b).abs() <= scale * (0.5 + 1e-6), "{format:?} {i}: {w} {b} {scale}");
                prop_assert!((b / scale).abs() <= steps || scale == 0.0);
            }
            let sums = k.square_sums(&row, &back);
            let exact = row.iter().zip(&back).fold((0.0, 0.0), |(s, e), (&w, &b)| {
                let (w, b) = (f64::from(oracle::bf16_to_f32(w)), f64::from(b));
                (s + w * w, e + (w - b) * (w - b))
            });
            for (got, want) in [(sums.0, exact.0), (sums.1, exact.1)] {
                prop_assert!((got - want).abs() <= 1e-12 * want, "{format:?}: {got} {want}");
            }
            for other in tables() {
                prop_assert!(other.square_sums(&row, &back) == sums, "{}", other.isa());
            }
        }
    }
}
