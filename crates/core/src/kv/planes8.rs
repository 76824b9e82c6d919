//! `planes8`: keys as [`super::int8`] has them, but in two planes of four bits: `code = 16 high + low`
//! with `high` from -8 to 7 and `low` from 0 to 15. A reader of the upper plane alone has half the bytes and sees each code
//! to a step of 16. Values are int8. Error as for int8.

use longbit_kernels::{CodeBits, Kernels, QueryBits};

use super::KvFormat;
use super::coded::{Coded, Rounding, ScaleBits, Scaling};
use super::int8::{Int8, round_row};

pub(super) const FORMAT: KvFormat = KvFormat {
    name: "planes8",
    summary: "int8 with keys in an upper and a lower plane of four bits; error as int8",
    keys: &Coded::<Planes8>::NEW,
    values: &Coded::<Int8>::NEW,
    rotate: true,
    centre: true,
};

struct Planes8;

impl Rounding for Planes8 {
    const BITS: CodeBits = CodeBits::Planes;
    const SCALING: Scaling = Scaling::Row;
    const SCALE: ScaleBits = ScaleBits::Bf16;
    const QUERY: QueryBits = QueryBits::Sixteen;

    fn round(kernels: &Kernels, row: &[f32], codes: &mut [i8], scales: &mut [u16]) {
        scales[0] = round_row(kernels, row, codes);
    }
}
