//! `int8`: signed bytes and one bfloat16 scale a row, the largest magnitude by 127, rounded up; rows rotated and centred.
//! 130 bytes for 128 numbers, and one for the mean of the page. `int8+plain` leaves rows as they are, for head dimensions
//! that are no power of two too.
//! Error: at most `1.008 / 254` of the largest magnitude of the row, rotated and less the mean.

use longbit_kernels::{CodeBits, Kernels, QueryBits};

use super::KvFormat;
use super::coded::{Coded, Rounding, ScaleBits, Scaling, bf16_up, inverse};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "int8",
    summary: "signed bytes, a bfloat16 scale a row, rotated and centred; error at most 0.4 % of the row's largest",
    keys: &Coded::<Int8>::NEW,
    values: &Coded::<Int8>::NEW,
    rotate: true,
    centre: true,
};

pub(super) struct Int8;

impl Rounding for Int8 {
    const BITS: CodeBits = CodeBits::Eight;
    const SCALING: Scaling = Scaling::Row;
    const SCALE: ScaleBits = ScaleBits::Bf16;
    const QUERY: QueryBits = QueryBits::Sixteen;

    fn round(kernels: &Kernels, row: &[f32], codes: &mut [i8], scales: &mut [u16]) {
        scales[0] = round_row(kernels, row, codes);
    }
}

/// Rounds a row to signed bytes; returns the bits of its scale.
pub(super) fn round_row(kernels: &Kernels, row: &[f32], codes: &mut [i8]) -> u16 {
    let mut largest = [0.0];
    kernels.magnitudes(row, row.len(), &mut largest);
    let (bits, scale) = bf16_up(largest[0] / 127.0);
    kernels.round_codes(row, row.len(), &[], &[inverse(scale)], [-128, 127], codes);
    bits
}
