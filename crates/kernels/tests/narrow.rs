//! Binary16, 8-bit floats, the Hadamard transform and the runs of weights: against files that PyTorch wrote, and every
//! instruction set against the scalar oracle, bit for bit.

use longbit_kernels::{Fp8, Isa, Kernels, oracle};
use std::path::Path;

const FORMATS: [Fp8; 2] = [Fp8::E4m3, Fp8::E5m2];
const DIMS: [usize; 12] = [1, 4, 15, 16, 17, 32, 48, 64, 80, 100, 128, 131];
const ROWS: [usize; 5] = [1, 4, 9, 63, 70];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3.0).collect()
    }

    /// Codes whose value is finite, a tenth of them subnormal.
    fn codes(&mut self, format: Fp8, n: usize) -> Vec<u8> {
        let mut code = || {
            let code = self.next() as u8;
            let code = if self.next().is_multiple_of(10) { code & 0x87 } else { code };
            if oracle::fp8_to_f32(format, code).is_finite() { code } else { 0 }
        };
        (0..n).map(|_| code()).collect()
    }
}

fn tables() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().into_iter().map(|isa| Kernels::for_isa(isa).expect("an available set has a table"))
}

/// Equality of bits; any NaN equals any NaN.
#[track_caller]
fn same(k: &Kernels, what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{} {what}", k.isa());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let equal = g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
        assert!(equal, "{} {what} [{i}]: {g:e} is not {w:e}", k.isa());
    }
}

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/float_goldens").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn golden_floats(name: &str) -> Vec<f32> {
    golden(name).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[test]
fn codes_are_those_of_pytorch() {
    let x = golden_floats("x.bin");
    assert!(x.len() > 2000);
    let all: Vec<u8> = (0..=255).collect();
    for (format, name) in [(Fp8::E4m3, "e4m3"), (Fp8::E5m2, "e5m2")] {
        let codes = golden(&format!("{name}.bin"));
        let values = golden_floats(&format!("{name}_values.bin"));
        for k in tables() {
            let mut got = vec![1; x.len()];
            k.f32_to_fp8(format, &x, &mut got);
            for i in 0..x.len() {
                assert_eq!(got[i], codes[i], "{} {name} of {:e}", k.isa(), x[i]);
                assert_eq!(oracle::f32_to_fp8(format, x[i]), codes[i], "oracle {name} of {:e}", x[i]);
            }
            let mut wide = vec![1.0; 256];
            k.fp8_to_f32(format, &all, &mut wide);
            same(k, name, &wide, &values);
            let oracle: Vec<f32> = all.iter().map(|&code| oracle::fp8_to_f32(format, code)).collect();
            same(k, name, &oracle, &values);
        }
    }
    let halves: Vec<u16> = golden("f16.bin").as_chunks().0.iter().map(|&b| u16::from_le_bytes(b)).collect();
    for k in tables() {
        let mut got = vec![1; x.len()];
        k.f32_to_f16(&x, &mut got);
        for i in 0..x.len() {
            let nan = x[i].is_nan() && oracle::f16_to_f32(got[i]).is_nan();
            assert!(got[i] == halves[i] || nan, "{} f16 of {:e}: {:x}", k.isa(), x[i], got[i]);
        }
    }
}

#[test]
fn every_binary16_widens_and_comes_back() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let want: Vec<f32> = all.iter().map(|&x| oracle::f16_to_f32(x)).collect();
    for k in tables() {
        let (mut wide, mut back) = (vec![1.0; all.len()], vec![1; all.len()]);
        k.f16_to_f32(&all, &mut wide);
        same(k, "f16_to_f32", &wide, &want);
        k.f32_to_f16(&wide, &mut back);
        for (&x, &y) in all.iter().zip(&back) {
            let nan = x & 0x7fff > 0x7c00;
            assert_eq!(y, if nan { x | 0x200 } else { x }, "{}", k.isa());
        }
    }
}

#[test]
fn conversions_round_like_the_oracle_at_any_length() {
    let mut random = Random(3);
    for n in [0, 1, 15, 16, 17, 33, 100, 5000] {
        let x: Vec<f32> = (0..n).map(|_| f32::from_bits(random.next() as u32)).collect();
        let near: Vec<f32> =
            x.iter().map(|x| f32::from_bits(x.to_bits() & 0x8fff_ffff | 0x3000_0000)).collect();
        for (k, x) in tables().flat_map(|k| [(k, &x), (k, &near)]) {
            let mut halves = vec![1; n];
            k.f32_to_f16(x, &mut halves);
            assert_eq!(
                halves,
                x.iter().map(|&x| oracle::f32_to_f16(x)).collect::<Vec<_>>(),
                "{} {n}",
                k.isa()
            );
            for format in FORMATS {
                let mut codes = vec![1; n];
                k.f32_to_fp8(format, x, &mut codes);
                let want: Vec<u8> = x.iter().map(|&x| oracle::f32_to_fp8(format, x)).collect();
                assert_eq!(codes, want, "{} {format:?} {n}", k.isa());
                let mut wide = vec![1.0; n];
                k.fp8_to_f32(format, &codes, &mut wide);
                let want: Vec<f32> = codes.iter().map(|&c| oracle::fp8_to_f32(format, c)).collect();
                same(k, "fp8_to_f32", &wide, &want);
            }
        }
    }
}

#[test]
fn scores_of_narrow_rows() {
    for d in DIMS {
        let mut random = Random(d as u64);
        for (g, n) in [1, 2, 3, 4, 9].into_iter().flat_map(|g| ROWS.map(|n| (g, n))) {
            let (queries, scales) = (random.floats(g * d), random.floats(n));
            let halves: Vec<u16> = random.floats(n * d).into_iter().map(oracle::f32_to_f16).collect();
            let (mut got, mut want) = (vec![1.0; g * n], vec![2.0; g * n]);
            oracle::scores_f16(&queries, &halves, d, &mut want);
            for k in tables() {
                k.scores_f16(&queries, &halves, d, &mut got, &halves);
                same(k, &format!("scores_f16 d={d} g={g} n={n}"), &got, &want);
            }
            for format in FORMATS {
                let rows = random.codes(format, n * d);
                for scales in [None, Some(scales.as_slice())] {
                    oracle::scores_fp8(format, &queries, &rows, d, scales, &mut want);
                    for k in tables() {
                        k.scores_fp8(format, &queries, &rows, d, scales, &mut got, &rows[..n / 2 * d]);
                        same(k, &format!("scores {format:?} d={d} g={g} n={n}"), &got, &want);
                    }
                }
            }
        }
    }
}

#[test]
fn sums_of_narrow_rows() {
    for d in DIMS {
        let mut random = Random(d as u64 + 50);
        for (g, n) in [1, 2, 3, 4, 9].into_iter().flat_map(|g| ROWS.map(|n| (g, n))) {
            let (weights, scales, start) = (random.floats(g * n), random.floats(n), random.floats(g * d));
            let halves: Vec<u16> = random.floats(n * d).into_iter().map(oracle::f32_to_f16).collect();
            let mut want = start.clone();
            oracle::accumulate_f16(&weights, &halves, d, &mut want);
            for k in tables() {
                let mut got = start.clone();
                k.accumulate_f16(&weights, &halves, d, &mut got, &halves);
                same(k, &format!("accumulate_f16 d={d} g={g} n={n}"), &got, &want);
            }
            for format in FORMATS {
                let rows = random.codes(format, n * d);
                for scales in [None, Some(scales.as_slice())] {
                    let mut want = start.clone();
                    oracle::accumulate_fp8(format, &weights, &rows, d, scales, &mut want);
                    for k in tables() {
                        let mut got = start.clone();
                        k.accumulate_fp8(format, &weights, &rows, d, scales, &mut got, &rows[..n / 2 * d]);
                        same(k, &format!("accumulate {format:?} d={d} g={g} n={n}"), &got, &want);
                    }
                }
            }
        }
    }
}

/// A NaN in a row reaches the scores of that row and the sums of that column, and nothing else.
#[test]
fn a_nan_of_8_bits_is_not_lost() {
    for (k, format) in tables().flat_map(|k| FORMATS.map(|format| (k, format))) {
        for code in [0x7f, 0xff] {
            for d in [128, 100] {
                let mut rows = vec![0x38; 8 * d];
                rows[3 * d + 70] = code;
                let (mut scores, mut sums) = (vec![0.0; 4 * 8], vec![0.0; 4 * d]);
                k.scores_fp8(format, &vec![1.0; 4 * d], &rows, d, None, &mut scores, &[]);
                k.accumulate_fp8(format, &[1.0; 4 * 8], &rows, d, None, &mut sums, &[]);
                assert!(scores.iter().enumerate().all(|(i, s)| s.is_nan() == (i % 8 == 3)), "{}", k.isa());
                assert!(sums.iter().enumerate().all(|(i, s)| s.is_nan() == (i % d == 70)), "{}", k.isa());
            }
        }
    }
}

#[test]
fn hadamard_is_the_oracle_on_every_set() {
    for d in (0..=11).map(|bits| 1 << bits) {
        for n in [0, 1, 3] {
            let x = Random(d as u64).floats(n * d);
            let mut want = x.clone();
            want.chunks_exact_mut(d).for_each(oracle::hadamard);
            for k in tables() {
                let mut got = x.clone();
                k.hadamard(&mut got, d);
                same(k, &format!("hadamard d={d} n={n}"), &got, &want);
            }
        }
    }
}

#[test]
fn signs_turn_before_the_transform_and_back_after_it() {
    for d in (0..=11).map(|bits| 1 << bits) {
        // The transform of a row of ones shows the signs.
        let mut signs = vec![1.0; d];
        Kernels::best().hadamard_signed(&mut signs, d);
        Kernels::best().hadamard(&mut signs, d);
        signs.iter_mut().for_each(|s| *s = s.round());
        assert!(signs.iter().all(|s| s.abs() == 1.0), "{d}");
        if d >= 64 {
            let negative = signs.iter().filter(|&&s| s < 0.0).count();
            assert!((d * 3 / 8..d * 5 / 8).contains(&negative), "{negative} of {d}");
        }
        let x = Random(d as u64 + 9).floats(2 * d);
        let mut rotated: Vec<f32> = x.iter().zip(signs.iter().cycle()).map(|(x, s)| x * s).collect();
        rotated.chunks_exact_mut(d).for_each(oracle::hadamard);
        let mut back = rotated.clone();
        back.chunks_exact_mut(d).for_each(oracle::hadamard);
        back.iter_mut().zip(signs.iter().cycle()).for_each(|(x, s)| *x *= s);
        for k in tables() {
            let mut got = x.clone();
            k.hadamard_signed(&mut got, d);
            same(k, &format!("hadamard_signed d={d}"), &got, &rotated);
            k.hadamard_unsigned(&mut got, d);
            same(k, &format!("hadamard_unsigned d={d}"), &got, &back);
        }
        for (x, y) in x.iter().zip(&back) {
            assert!((x - y).abs() < 1e-5, "d={d}: {x} came back as {y}");
        }
    }
}

#[test]
fn hadamard_is_orthogonal_and_of_the_natural_order() {
    let k = Kernels::best();
    for d in [1, 2, 8, 16, 64, 128, 256, 1024] {
        let mut rows = vec![0.0; d * d];
        (0..d).for_each(|i| rows[i * d + i] = 1.0);
        k.hadamard(&mut rows, d);
        let unit = 1.0 / (d as f64).sqrt();
        for (i, row) in rows.chunks_exact(d).enumerate() {
            for (j, &x) in row.iter().enumerate() {
                let sign = if (i & j).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
                assert_eq!(x, (sign * unit) as f32, "d={d} [{i}][{j}]");
            }
        }
        let (x, y) = (Random(1).floats(d), Random(2).floats(d));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let (mut hx, mut hy) = (x.clone(), y.clone());
        k.hadamard(&mut hx, d);
        k.hadamard(&mut hy, d);
        assert!((dot(&x, &y) - dot(&hx, &hy)).abs() < 1e-4 * d as f64, "d={d}");
    }
}

#[test]
#[should_panic(expected = "no power of two")]
fn hadamard_of_another_dimension_panics() {
    Kernels::best().hadamard(&mut [0.0; 96], 96);
}

#[test]
fn runs_are_those_of_the_obvious_loop() {
    let mut random = Random(11);
    let mut runs = Vec::from([7..9, 12..13]);
    for n in [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 1000] {
        for (g, every) in [1, 2, 4, 5].into_iter().flat_map(|g| [1, 2, 5, 30, 200].map(|every| (g, every))) {
            let weights: Vec<f32> = (0..g * n)
                .map(|_| match random.next() % (2 * every) {
                    0 => f32::NAN,
                    1 => 2.0,
                    2 => 0.5, // just at a floor
                    _ => 0.1,
                })
                .collect();
            let floors: Vec<f32> = (0..g).map(|h| if h == 3 { f32::INFINITY } else { 0.5 }).collect();
            for min_gap in [0, 1, 2, 3, 8, 70, usize::MAX] {
                let want = oracle::runs_above(&weights, &floors, min_gap);
                for k in tables() {
                    k.runs_above(&weights, &floors, min_gap, &mut runs);
                    assert_eq!(runs, want, "{} n={n} g={g} every={every} min_gap={min_gap}", k.isa());
                }
            }
        }
    }
    for k in tables() {
        k.runs_above(&[], &[], 1, &mut runs);
        assert!(runs.is_empty());
        k.runs_above(&[1.0; 130], &[f32::NEG_INFINITY], 1, &mut runs);
        assert_eq!((runs.len(), runs[0].clone()), (1, 0..130));
        k.runs_above(&[f32::NEG_INFINITY; 130], &[f32::NEG_INFINITY], 1, &mut runs);
        assert!(runs.is_empty());
    }
}
