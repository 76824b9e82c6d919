//! `lm4`, `lm3`, `lm2`: the Lloyd-Max quantisers of a Gaussian for rotated rows (TurboQuant, arXiv 2504.19874, without its
//! second stage). A number of a row with root mean square `r` is rounded to the nearest of 16, 8 or 4 levels times `r`;
//! 66, 50 or 34 bytes for 128 numbers. Levels are kept in 127ths of the largest, which is within 0.4 % of it.
//! Mean square error of a Gaussian row: 0.95 %, 3.45 % and 11.75 % of its mean square.
//! Error of a number: at most half the widest gap between levels, or its distance from the outermost level, times `r`.

use longbit_kernels::{CodeBits, Kernels, QueryBits};

use super::KvFormat;
use super::coded::{Coded, Rounding, ScaleBits, Scaling, inverse};

const fn format<const BITS: usize>(
    name: &'static str,
    summary: &'static str,
    codec: &'static Coded<Lm<BITS>>,
) -> KvFormat {
    KvFormat { name, summary, keys: codec, values: codec, rotate: true, centre: false }
}

pub(super) const LM4: KvFormat = format(
    "lm4",
    "4-bit Lloyd-Max levels of a Gaussian, a scale a row, rotated (TurboQuant); mean square error 0.95 %",
    &Coded::<Lm<4>>::NEW,
);
pub(super) const LM3: KvFormat = format(
    "lm3",
    "3-bit Lloyd-Max levels of a Gaussian, a scale a row, rotated (TurboQuant); mean square error 3.5 %",
    &Coded::<Lm<3>>::NEW,
);
pub(super) const LM2: KvFormat = format(
    "lm2",
    "2-bit Lloyd-Max levels of a Gaussian, a scale a row, rotated (TurboQuant); mean square error 11.8 %",
    &Coded::<Lm<2>>::NEW,
);

/// Positive Lloyd-Max levels of the standard normal distribution (Max 1960, table I), the largest last.
const LEVELS_4: [f32; 8] = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326];
const LEVELS_3: [f32; 4] = [0.2451, 0.7560, 1.3439, 2.1520];
const LEVELS_2: [f32; 2] = [0.4528, 1.5104];

const fn positive<const BITS: usize>() -> &'static [f32] {
    match BITS {
        4 => &LEVELS_4,
        3 => &LEVELS_3,
        _ => &LEVELS_2,
    }
}

const fn largest_level<const BITS: usize>() -> f32 {
    positive::<BITS>()[positive::<BITS>().len() - 1]
}

/// Ascending levels in 127ths of the largest.
const fn table<const BITS: usize>() -> [i8; 16] {
    let (levels, half) = (positive::<BITS>(), positive::<BITS>().len());
    let (mut table, mut i) = ([0i8; 16], 0);
    while i < half {
        let code = (levels[i] / largest_level::<BITS>() * 127.0 + 0.5) as i8;
        table[half + i] = code;
        table[half - 1 - i] = -code;
        i += 1;
    }
    table
}

struct Lm<const BITS: usize>;

impl<const BITS: usize> Rounding for Lm<BITS> {
    const BITS: CodeBits = match BITS {
        4 => CodeBits::Four,
        3 => CodeBits::Three,
        _ => CodeBits::Two,
    };
    const SCALING: Scaling = Scaling::Row;
    const SCALE: ScaleBits = ScaleBits::Bf16;
    const QUERY: QueryBits = QueryBits::Eight;
    const TABLE: [i8; 16] = table::<BITS>();

    fn round(kernels: &Kernels, row: &[f32], codes: &mut [i8], scales: &mut [u16]) {
        let mean_square = kernels.dot(row, row) / row.len() as f32;
        kernels.f32_to_bf16(&[mean_square.sqrt() * largest_level::<BITS>() / 127.0], &mut scales[..1]);
        let inverse = inverse(f32::from_bits(u32::from(scales[0]) << 16));
        // Bounds between neighbouring levels, halfway.
        let (half, table) = (1 << (BITS - 1), Self::TABLE);
        for (code, x) in codes.iter_mut().zip(row) {
            let (size, mut index) = (x.abs() * inverse, 0);
            for i in 1..half {
                let bound = (i32::from(table[half + i - 1]) + i32::from(table[half + i])) as f32 / 2.0;
                index += i8::from(size > bound);
            }
            *code = if *x < 0.0 { half as i8 - 1 - index } else { half as i8 + index };
        }
    }
}
