//! Number formats against bytes that numpy and gguf-py wrote, round trips on any shape, and bytes that lie.

use std::fs;
use std::path::Path;

use half::f16;
use longbit::formats::{
    EncodeError, Encoding, FormatError, I2sLayout, Matrix, encode_row, encode_ternary, holds_scale,
};
use proptest::prelude::*;

const X86: Encoding = Encoding::I2s(I2sLayout::X86);
const ARM: Encoding = Encoding::I2s(I2sLayout::Arm);
/// With the name of the golden file.
const TERNARY: [(Encoding, &str); 7] = [
    (Encoding::HfU8, "hf_u8"),
    (X86, "i2_s_x86"),
    (ARM, "i2_s_arm"),
    (Encoding::Tq1_0, "tq1_0"),
    (Encoding::Tq2_0, "tq2_0"),
    (Encoding::Iq1Bn, "iq1_bn"),
    (Encoding::Iq2Bn, "iq2_bn"),
];
const TABLES: [Encoding; 7] = [
    Encoding::F32,
    Encoding::F16,
    Encoding::Bf16,
    Encoding::Q4_0,
    Encoding::Q5_0,
    Encoding::Q8_0,
    Encoding::Q6K,
];
/// Scale of the golden matrices.
const SCALE: f32 = 0.40625;

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/quant_goldens").join(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(name: &str) -> Vec<f32> {
    golden(name).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Rows and columns of a golden array.
fn shape(name: &str) -> (usize, usize) {
    let index: serde_json::Value = serde_json::from_slice(&golden("index.json")).unwrap();
    let side = |i: usize| index[name][1][i].as_u64().unwrap() as usize;
    (side(0), side(1))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn encode(encoding: Encoding, rows: usize, cols: usize, scale: f32, codes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let row = |r: usize, to: &mut [u8]| to.copy_from_slice(&codes[r * cols..][..cols]);
    encode_ternary(encoding, rows, cols, scale, row, &mut out).unwrap();
    out
}

fn numbers(encoding: Encoding, values: &[f32]) -> Vec<f32> {
    let mut bytes = Vec::new();
    encode_row(encoding, values, &mut bytes).unwrap();
    let mut out = vec![f32::NAN; values.len()];
    Matrix::new(encoding, 1, values.len(), &bytes).unwrap().dequantize_row(0, &mut out).unwrap();
    out
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// Spacing of halves around a number, at least that of the subnormal ones.
fn ulp_f16(x: f32) -> f32 {
    (x.abs() / 1024.0).max(6e-8)
}

/// A stream of pseudo-random numbers (splitmix64).
fn stream(mut state: u64) -> impl FnMut() -> u64 {
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[test]
fn numbers_of_the_goldens_are_equal_bit_for_bit() {
    let (rows, cols) = shape("emb_f32");
    for (encoding, name) in [
        (Encoding::Q8_0, "emb_q8_0"),
        (Encoding::Q4_0, "emb_q4_0"),
        (Encoding::Q5_0, "emb_q5_0"),
        (Encoding::Q6K, "emb_q6_k"),
    ] {
        let bytes = golden(&format!("{name}.bin"));
        let want = floats(&format!("{name}_deq.bin"));
        let matrix = Matrix::new(encoding, rows, cols, &bytes).unwrap();
        for r in 0..rows {
            let mut got = vec![f32::NAN; cols];
            matrix.dequantize_row(r, &mut got).unwrap();
            assert_eq!(bits(&got), bits(&want[r * cols..][..cols]), "{name} row {r}");
        }
    }
}

#[test]
fn encoders_write_the_bytes_of_the_goldens() {
    let cols = shape("emb_f32").1;
    let values = floats("emb_f32.bin");
    for (encoding, name) in [
        (Encoding::F32, "emb_f32"),
        (Encoding::Q8_0, "emb_q8_0"),
        (Encoding::Q4_0, "emb_q4_0"),
        (Encoding::Q5_0, "emb_q5_0"),
    ] {
        let mut bytes = Vec::new();
        for row in values.chunks(cols) {
            encode_row(encoding, row, &mut bytes).unwrap();
        }
        assert!(bytes == golden(&format!("{name}.bin")), "{name}");
    }
    let (rows, cols) = shape("ternary");
    let codes: Vec<u8> = golden("ternary.bin").iter().map(|w| w.wrapping_add(1)).collect();
    for (encoding, name) in TERNARY {
        let bytes = encode(encoding, rows, cols, SCALE, &codes);
        assert!(bytes == golden(&format!("{name}.bin")), "{name}");
        assert_eq!(encoding.bytes(rows, cols), Ok(bytes.len() as u64), "{name}");
    }
}

#[test]
fn ternary_weights_of_the_goldens_are_equal() {
    let (rows, cols) = shape("ternary");
    let weights: Vec<f32> = golden("ternary.bin").iter().map(|&w| f32::from(w as i8)).collect();
    for (encoding, name) in TERNARY {
        let bytes = golden(&format!("{name}.bin"));
        let matrix = Matrix::new(encoding, rows, cols, &bytes).unwrap();
        let inside = (encoding != Encoding::HfU8).then_some(SCALE);
        for (r, want) in weights.chunks(cols).enumerate() {
            let mut codes = vec![9; cols];
            assert_eq!(matrix.ternary_row(r, &mut codes), Ok(inside), "{name} row {r}");
            let got: Vec<f32> = codes.iter().map(|&code| f32::from(code) - 1.0).collect();
            assert_eq!(got, want, "{name} row {r}");
            let mut values = vec![f32::NAN; cols];
            matrix.dequantize_row(r, &mut values).unwrap();
            let want: Vec<f32> = want.iter().map(|w| w * inside.unwrap_or(1.0)).collect();
            assert_eq!(values, want, "{name} row {r}");
        }
    }
}

#[test]
fn floats_are_rounded_to_the_nearest_even() {
    let tie = 1.0 + 2f32.powi(-8);
    assert_eq!(numbers(Encoding::Bf16, &[tie, tie + 2f32.powi(-7)]), [1.0, 1.0 + 2f32.powi(-6)]);
    let tie = 1.0 + 2f32.powi(-11);
    assert_eq!(numbers(Encoding::F16, &[tie, tie + 2f32.powi(-10)]), [1.0, 1.0 + 2f32.powi(-9)]);
    assert_eq!(bits(&numbers(Encoding::F16, &[-0.0, 65504.0, 6e-8])), bits(&[-0.0, 65504.0, 2f32.powi(-24)]));
}

#[test]
fn every_half_is_widened() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut got = vec![0.5; 1 << 16];
    Matrix::new(Encoding::F16, 1, 1 << 16, &bytes).unwrap().dequantize_row(0, &mut got).unwrap();
    for (half, got) in (0..=u16::MAX).map(f16::from_bits).zip(got) {
        let want = half.to_f32();
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{half:?}: {got}");
    }
}

#[test]
fn q6_k_is_finer_than_q5_0_on_the_golden_rows() {
    let values = floats("emb_f32.bin");
    let rms = |encoding| {
        let error = |row: &[f32]| -> f64 {
            numbers(encoding, row).iter().zip(row).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        (values.chunks(512).map(error).sum::<f64>() / values.len() as f64).sqrt()
    };
    let (six, five, eight) = (rms(Encoding::Q6K), rms(Encoding::Q5_0), rms(Encoding::Q8_0));
    // Normal numbers: sixteen of them reach to 1.8 sigma, 31 steps of 0.057, whose uniform error is 0.016.
    assert!(six < 0.45 * five && six > eight, "q6_k {six}, q5_0 {five}, q8_0 {eight}");
    assert!((0.01..0.018).contains(&six), "q6_k {six}");
}

#[test]
fn zeros_stay_zeros_and_tiny_numbers_are_close() {
    for encoding in TABLES {
        assert!(numbers(encoding, &[0.0; 512]).iter().all(|x| *x == 0.0), "{}", encoding.name());
        for size in [f32::MIN_POSITIVE, 1e-44, 1e-20, 1e-7, 1e-5] {
            let values: Vec<f32> = (0..512).map(|i| size * (i as f32 / 256.0 - 1.0)).collect();
            let got = numbers(encoding, &values);
            let error = got.iter().zip(&values).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            // Half the smallest half times the codes that it is multiplied with.
            assert!(error <= 3e-8 * 128.0 && error <= size * 1.01, "{} {size}: {error}", encoding.name());
        }
    }
}

#[test]
fn what_cannot_be_written_is_refused_and_nothing_is_appended() {
    for encoding in TABLES {
        let name = encoding.name();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0; 256];
            values[77] = bad;
            let mut out = vec![1, 2, 3];
            let Err(FormatError::Value { encoding, col: 77, value }) =
                encode_row(encoding, &values, &mut out)
            else {
                panic!("{name} takes {bad}");
            };
            assert_eq!((encoding, value.to_bits(), out.as_slice()), (name, bad.to_bits(), &[1u8, 2, 3][..]));
        }
        // Finite, but it or its scale is not in f16; the first block fits.
        let mut values = vec![1.0; 512];
        values[300] = -3e38;
        let mut out = vec![7];
        let done = encode_row(encoding, &values, &mut out);
        if matches!(encoding, Encoding::F32 | Encoding::Bf16) {
            assert_eq!((done, out.len() as u64), (Ok(()), 1 + encoding.bytes(1, 512).unwrap()), "{name}");
        } else {
            let refused = FormatError::Value { encoding: name, col: 300, value: -3e38 };
            assert_eq!((done, out.len()), (Err(refused), 1), "{name}");
        }
    }
    let mut out = Vec::new();
    assert!(encode_row(Encoding::Bf16, &[f32::MAX], &mut out).is_err(), "rounds to infinity");
    for (encoding, _) in TERNARY {
        let refused = encode_row(encoding, &[0.0; 1024], &mut out);
        let name = encoding.name();
        match encoding {
            Encoding::HfU8 => assert!(matches!(refused, Err(FormatError::Shape { unit: "rows", .. }))),
            _ => assert_eq!(refused, Err(FormatError::Ternary { encoding: name })),
        }
    }
    assert!(out.is_empty());
}

#[test]
fn scales_are_kept_exactly_or_refused() {
    let third = 1.0 / 3.0;
    for (encoding, name) in TERNARY {
        let narrow = matches!(encoding, Encoding::Tq1_0 | Encoding::Tq2_0 | Encoding::Iq1Bn);
        let inside = encoding != Encoding::HfU8;
        assert!(holds_scale(encoding, 0.25) && holds_scale(encoding, 2f32.powi(-24)), "{name}");
        assert_eq!(holds_scale(encoding, third), !narrow, "{name}");
        for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(holds_scale(encoding, bad), !inside, "{name} {bad}");
        }
        let mut out = Vec::new();
        let done = encode_ternary(encoding, 4, 256, third, |_, codes| codes.fill(2), &mut out);
        if narrow {
            let want = FormatError::ScaleLost { encoding: encoding.name(), scale: third };
            assert!(matches!(done, Err(EncodeError::Format(e)) if e == want), "{name}");
            assert!(out.is_empty());
        } else {
            done.unwrap();
            let matrix = Matrix::new(encoding, 4, 256, &out).unwrap();
            assert_eq!(matrix.ternary_row(3, &mut [0; 256]), Ok(inside.then_some(third)), "{name}");
        }
    }
    for encoding in TABLES {
        assert!(!holds_scale(encoding, 0.25));
        let done = encode_ternary(encoding, 4, 256, 0.25, |_, _| {}, &mut Vec::new());
        let want = FormatError::NotTernary { encoding: encoding.name() };
        assert!(matches!(done, Err(EncodeError::Format(e)) if e == want));
        let bytes = vec![0; encoding.bytes(1, 256).unwrap() as usize];
        let matrix = Matrix::new(encoding, 1, 256, &bytes).unwrap();
        let want = FormatError::NotTernary { encoding: encoding.name() };
        assert_eq!((encoding.is_ternary(), matrix.ternary_row(0, &mut [0; 256])), (false, Err(want)));
    }
}

#[test]
fn wrong_codes_and_full_disks_end_the_writing() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    for (encoding, name) in TERNARY {
        let row = |r: usize, codes: &mut [u8]| {
            codes.fill(1);
            codes[200] = if r == 2 { 3 } else { 0 };
        };
        let done = encode_ternary(encoding, 4, 256, 1.0, row, &mut Vec::new());
        let want = FormatError::Code { row: 2, col: 200, code: 3 };
        assert!(matches!(done, Err(EncodeError::Format(e)) if e == want), "{name}");
        let done = encode_ternary(encoding, 4, 256, 1.0, |_, codes| codes.fill(0), &mut Full);
        let Err(EncodeError::Io(error)) = done else { panic!("{name}") };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }
}

#[test]
fn lengths_and_shapes_are_checked() {
    for encoding in TABLES.into_iter().chain(TERNARY.map(|(encoding, _)| encoding)) {
        let name = encoding.name();
        let bytes = encoding.bytes(8, 512).unwrap();
        let data = vec![0; bytes as usize + 1];
        for found in [0, data.len() - 2, data.len()] {
            let error = Matrix::new(encoding, 8, 512, &data[..found]).unwrap_err();
            let want = FormatError::Length { encoding: name, rows: 8, cols: 512, expected: bytes, found };
            assert_eq!(error, want, "{name}");
        }
        let matrix = Matrix::new(encoding, 8, 512, &data[..bytes as usize]).unwrap();
        assert_eq!(format!("{matrix:?}"), format!("{name} of 8 x 512"));
        // Beyond any memory: a number, not an overflow.
        let huge = encoding.bytes(usize::MAX & !255, usize::MAX & !255).unwrap();
        assert_eq!(huge, u64::MAX, "{name}");
        assert!(Matrix::new(encoding, usize::MAX & !255, usize::MAX & !255, &data).is_err());
    }
    for (encoding, unit, multiple) in [
        (Encoding::HfU8, "rows", 4),
        (X86, "columns", 128),
        (ARM, "columns", 64),
        (Encoding::Tq1_0, "columns", 256),
        (Encoding::Tq2_0, "columns", 256),
        (Encoding::Q6K, "columns", 256),
        (Encoding::Iq1Bn, "columns", 64),
        (Encoding::Iq2Bn, "columns", 64),
        (Encoding::Q4_0, "columns", 32),
        (Encoding::Q5_0, "columns", 32),
        (Encoding::Q8_0, "columns", 32),
    ] {
        let found = multiple + multiple / 2;
        let (rows, cols) = if unit == "rows" { (found, 256) } else { (4, found) };
        let want = FormatError::Shape { encoding: encoding.name(), unit, multiple, found };
        assert_eq!(encoding.bytes(rows, cols), Err(want.clone()));
        assert_eq!(Matrix::new(encoding, rows, cols, &[]).unwrap_err(), want);
    }
}

/// A code of 3 at a known place of the formats that have two-bit codes.
#[test]
fn a_code_of_three_is_named() {
    // Row 2 of 4, 512 columns; byte 5 of its row, the bits of its third group from the low end.
    for (encoding, at, col) in [
        (Encoding::HfU8, 5, 5),
        (X86, 2 * 128 + 5, 5 + 32),
        (ARM, 2 * 128 + 5, 5 + 16),
        (Encoding::Tq2_0, 2 * 132 + 5, 5 + 64),
        (Encoding::Iq2Bn, 2 * 132 + 4 + 5, 5 + 32),
    ] {
        let mut bytes = encode(encoding, 4, 512, 0.5, &[1; 4 * 512]);
        bytes[at] |= 0b11 << 4;
        let matrix = Matrix::new(encoding, 4, 512, &bytes).unwrap();
        let want = FormatError::Code { row: 2, col, code: 3 };
        assert_eq!(matrix.ternary_row(2, &mut [0; 512]), Err(want.clone()), "{}", encoding.name());
        assert_eq!(matrix.dequantize_row(2, &mut [0.0; 512]), Err(want), "{}", encoding.name());
        assert!(matrix.ternary_row(1, &mut [0; 512]).is_ok(), "{}", encoding.name());
    }
}

#[test]
fn blocks_must_agree_about_the_scale() {
    for (encoding, block) in [(Encoding::Tq1_0, 54), (Encoding::Tq2_0, 66)] {
        let name = encoding.name();
        // Two rows of three blocks; the middle one of row 0 is zeros, and so is all of row 1.
        let codes: Vec<u8> =
            (0..2 * 768).map(|i| if i < 256 || (512..768).contains(&i) { 2 } else { 1 }).collect();
        let mut bytes = encode(encoding, 2, 768, 0.5, &codes);
        let read = |bytes: &[u8], row| {
            let mut codes = vec![9; 768];
            let scale = Matrix::new(encoding, 2, 768, bytes).unwrap().ternary_row(row, &mut codes);
            scale.inspect(|_| assert!(codes.iter().all(|&code| code < 3), "{name}"))
        };
        assert_eq!((read(&bytes, 0), read(&bytes, 1)), (Ok(Some(0.5)), Ok(None)), "{name}");
        assert_eq!(bytes[2 * block - 2..2 * block], [0, 0], "{name}: a block of zeros has no scale");
        // The scale of zeros does not matter, whatever it is.
        bytes[2 * block - 2..2 * block].copy_from_slice(&f16::NAN.to_le_bytes());
        assert_eq!(read(&bytes, 0), Ok(Some(0.5)), "{name}");
        bytes[3 * block - 2..3 * block].copy_from_slice(&f16::from_f32(0.75).to_le_bytes());
        let want = FormatError::Scales { row: 0, first: 0.5, second: 0.75 };
        assert_eq!(read(&bytes, 0), Err(want), "{name}");
        // As numbers they are fine.
        let mut values = vec![f32::NAN; 768];
        Matrix::new(encoding, 2, 768, &bytes).unwrap().dequantize_row(0, &mut values).unwrap();
        let want: Vec<f32> = (0..768).map(|i| [0.5, 0.0, 0.75][i / 256]).collect();
        assert_eq!(values, want, "{name}");
    }
}

#[test]
fn scales_that_are_none_are_named() {
    // Where the scale of row 1 of 4 x 512 stands.
    for (encoding, at, wide) in [
        (X86, 512, true),
        (ARM, 512, true),
        (Encoding::Iq2Bn, 132, true),
        (Encoding::Iq1Bn, 106, false),
        (Encoding::Tq1_0, 2 * 108 - 2, false),
        (Encoding::Tq2_0, 2 * 132 - 2, false),
        (Encoding::Q4_0, 9 * 32, false),
        (Encoding::Q5_0, 11 * 32, false),
        (Encoding::Q8_0, 17 * 32, false),
        (Encoding::Q6K, 3 * 210 - 2, false),
    ] {
        let name = encoding.name();
        let good = if encoding.is_ternary() {
            encode(encoding, 4, 512, 0.5, &[2; 4 * 512])
        } else {
            let mut bytes = Vec::new();
            (0..4).for_each(|_| encode_row(encoding, &[-1.0; 512], &mut bytes).unwrap());
            bytes
        };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5, 0.0] {
            let mut bytes = good.clone();
            if wide {
                bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
            } else {
                bytes[at..at + 2].copy_from_slice(&f16::from_f32(bad).to_le_bytes());
            }
            let matrix = Matrix::new(encoding, 4, 512, &bytes).unwrap();
            let done = matrix.dequantize_row(1, &mut [0.0; 512]);
            if bad.is_finite() && !encoding.is_ternary() {
                assert_eq!(done, Ok(()), "{name}: numbers may have a scale of {bad}");
                continue;
            }
            let named = |error: &FormatError| {
                matches!(error, FormatError::Scale { encoding, row: 1, scale }
                    if *encoding == name && (*scale == bad || scale.is_nan() && bad.is_nan()))
            };
            assert!(done.as_ref().is_err_and(named), "{name} {bad}: {done:?}");
            if encoding.is_ternary() {
                let done = matrix.ternary_row(1, &mut [0; 512]);
                assert!(done.as_ref().is_err_and(named), "{name} {bad}: {done:?}");
            }
        }
    }
}

#[test]
fn every_byte_of_five_trits_decodes() {
    for (encoding, head, tail) in [(Encoding::Tq1_0, 0, 2), (Encoding::Iq1Bn, 2, 0)] {
        let scale = f16::from_f32(0.5).to_le_bytes();
        for byte in 0..=255 {
            let length = encoding.bytes(1, 256).unwrap() as usize;
            let mut bytes = vec![byte; length];
            bytes[..head].copy_from_slice(&scale[..head]);
            bytes[length - tail..].copy_from_slice(&scale[..tail]);
            let mut codes = [9; 256];
            let found = Matrix::new(encoding, 1, 256, &bytes).unwrap().ternary_row(0, &mut codes);
            let zeros = codes == [1; 256];
            assert_eq!(found, Ok((!zeros).then_some(0.5)), "{} {byte}", encoding.name());
            assert!(codes.iter().all(|&code| code < 3), "{} {byte}", encoding.name());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn ternary_matrices_round_trip(rows in 0usize..9, blocks in 0usize..6, seed: u64, scale in 1u16..0x7c00) {
        let scale = f16::from_bits(scale).to_f32();
        for (encoding, name) in TERNARY {
            let (rows, cols) = match encoding {
                Encoding::HfU8 => (4 * rows, 37 * blocks + 1),
                X86 => (rows, 128 * blocks),
                Encoding::Tq1_0 | Encoding::Tq2_0 => (rows, 256 * blocks),
                _ => (rows, 64 * blocks),
            };
            let mut next = stream(seed);
            // Every third row is zeros.
            let codes: Vec<u8> =
                (0..rows * cols).map(|i| if i / cols % 3 == 2 { 1 } else { (next() % 3) as u8 }).collect();
            let bytes = encode(encoding, rows, cols, scale, &codes);
            prop_assert_eq!(encoding.bytes(rows, cols), Ok(bytes.len() as u64));
            let matrix = Matrix::new(encoding, rows, cols, &bytes).unwrap();
            for (r, want) in codes.chunks(cols.max(1)).enumerate() {
                let mut got = vec![9; cols];
                let found = matrix.ternary_row(r, &mut got).unwrap();
                let zeros = want.iter().all(|&code| code == 1);
                prop_assert_eq!(found, (!zeros && encoding != Encoding::HfU8).then_some(scale), "{}", name);
                prop_assert_eq!(&got, want, "{}", name);
            }
        }
    }

    #[test]
    fn numbers_stay_within_the_bound(blocks in 0usize..4, seed: u64, size in -26i32..11, outliers in 0u64..4) {
        let mut next = stream(seed);
        let mut number = || {
            let x = (next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
            // Some blocks have a few numbers that dwarf the others.
            if next() % 64 < outliers { x * 30.0 } else { x }
        };
        let values: Vec<f32> = (0..256 * blocks).map(|_| number() * 2f32.powi(size)).collect();
        for encoding in TABLES {
            let block = if encoding == Encoding::Q6K { 256 } else { 32 };
            for (got, want) in numbers(encoding, &values).chunks(block).zip(values.chunks(block)) {
                let most = largest(want);
                for (got, want) in got.iter().zip(want) {
                    let bound = match encoding {
                        Encoding::F32 => 0.0,
                        Encoding::F16 => ulp_f16(*want) / 2.0,
                        Encoding::Bf16 => want.abs() / 256.0,
                        Encoding::Q8_0 => most / 127.0 * 0.5 + 64.0 * ulp_f16(most / 127.0),
                        Encoding::Q5_0 => most / 16.0 + 8.0 * ulp_f16(most / 16.0),
                        Encoding::Q4_0 => most / 8.0 + 4.0 * ulp_f16(most / 8.0),
                        _ => most / 14.0 + 2f32.powi(-20),
                    };
                    let name = encoding.name();
                    prop_assert!((got - want).abs() <= bound, "{name} {want}: {got}, of {most}, bound {bound}");
                }
            }
        }
    }

    #[test]
    fn hostile_bytes_are_read_or_refused(rows in 1usize..6, blocks in 0usize..4, seed: u64, ones: bool) {
        for encoding in TABLES.into_iter().chain(TERNARY.map(|(encoding, _)| encoding)) {
            let (rows, cols) = (4 * rows, 256 * blocks);
            let mut next = stream(seed);
            let length = encoding.bytes(rows, cols).unwrap();
            let bytes: Vec<u8> = (0..length).map(|_| if ones { 0xff } else { next() as u8 }).collect();
            let matrix = Matrix::new(encoding, rows, cols, &bytes).unwrap();
            for r in 0..rows {
                let (mut codes, mut values) = (vec![9; cols], vec![f32::NAN; cols]);
                let read = matrix.dequantize_row(r, &mut values);
                let plain = matches!(encoding, Encoding::F32 | Encoding::F16 | Encoding::Bf16);
                prop_assert!(read.is_err() || plain || values.iter().all(|x| x.is_finite()));
                match matrix.ternary_row(r, &mut codes) {
                    Ok(scale) => {
                        prop_assert!(codes.iter().all(|&code| code < 3));
                        prop_assert!(scale.is_none_or(|s| s.is_finite() && s > 0.0));
                    }
                    Err(error) => prop_assert!(!error.to_string().is_empty()),
                }
            }
        }
    }
}
