//! From numbers to codes: largest magnitudes, rounding, and the common case of signed bytes with a scale a row or a block.
//!
//! Plain loops, compiled for each instruction set by the table of float operations. A number is rounded as
//! `round_half_even((x - offset) * factor)` and limited to the codes that there are, NaN to 0 (or to the nearest code).

use super::layout::pack_segment;
use super::{CODE_BLOCK, CodeBits, CodeShape, SEGMENT};
use crate::Kernels;
use crate::vector::F32x16;

/// What a smaller largest magnitude counts as none.
const NOTHING: f32 = 1e-30;

/// The largest magnitude; a NaN counts as larger than infinity, and is returned as a NaN.
#[inline(always)]
fn magnitude(x: &[f32]) -> f32 {
    let mut largest = 0u32;
    for x in x {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    f32::from_bits(largest)
}

#[inline(always)]
fn round(x: &[f32], offset: f32, factor: f32, limits: [f32; 2], codes: &mut [i8]) {
    for (code, &x) in codes.iter_mut().zip(x) {
        let v = ((x - offset) * factor).round_ties_even();
        let v = if v.is_nan() { 0.0 } else { v };
        let v = if v > limits[0] { v } else { limits[0] };
        let v = if v < limits[1] { v } else { limits[1] };
        // SAFETY: the limits are codes, so that v is within [-128, 127].
        *code = unsafe { v.to_int_unchecked::<i32>() } as i8;
    }
}

#[inline(always)]
pub(crate) fn magnitudes<V: F32x16>(x: &[f32], run: usize, out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x.chunks(run)) {
        *out = magnitude(x);
    }
}

#[inline(always)]
pub(crate) fn round_codes<V: F32x16>(
    x: &[f32],
    run: usize,
    offsets: &[f32],
    factors: &[f32],
    limits: [f32; 2],
    codes: &mut [i8],
) {
    for (i, (x, codes)) in x.chunks(run).zip(codes.chunks_mut(run)).enumerate() {
        round(x, offsets.get(i).map_or(0.0, |&o| o), factors[i], limits, codes);
    }
}

/// The factor and the scale for a largest magnitude.
#[inline(always)]
fn factor(largest: f32) -> [f32; 2] {
    // False for a NaN, whose scale is one too.
    if largest < NOTHING { [0.0, 0.0] } else { [127.0 / largest, largest / 127.0] }
}

#[inline(always)]
pub(crate) fn encode_int8<V: F32x16>(
    shape: CodeShape,
    blocks: bool,
    rows: &[f32],
    out: &mut [u8],
    low: &mut [u8],
    scales: &mut [f32],
) {
    let per_row = if blocks { shape.blocks() } else { 1 };
    for (t, row) in rows.chunks_exact(shape.dims).enumerate() {
        let scales = &mut scales[t * per_row..(t + 1) * per_row];
        let mut whole = 0.0;
        if !blocks {
            [whole, scales[0]] = factor(magnitude(row));
        }
        let mut at = t * shape.row_bytes();
        for (s, numbers) in row.chunks(SEGMENT).enumerate() {
            let mut codes = [0i8; SEGMENT];
            if blocks {
                for (b, (x, codes)) in
                    numbers.chunks(CODE_BLOCK).zip(codes.chunks_mut(CODE_BLOCK)).enumerate()
                {
                    let [factor, scale] = factor(magnitude(x));
                    scales[4 * s + b] = scale;
                    round(x, 0.0, factor, [-127.0, 127.0], codes);
                }
            } else {
                round(numbers, 0.0, whole, [-127.0, 127.0], &mut codes);
            }
            let low = if shape.bits == CodeBits::Planes { &mut low[at..] } else { &mut [][..] };
            at += pack_segment(shape.bits, &codes[..numbers.len()], &mut out[at..], low);
        }
    }
}

impl Kernels {
    /// The largest magnitude of each run of `run` numbers of `x`, the last of which may be shorter; NaN where a run has one.
    ///
    /// # Panics
    /// `out` has not one place for each run.
    pub fn magnitudes(&self, x: &[f32], run: usize, out: &mut [f32]) {
        assert_eq!(out.len(), x.len().div_ceil(run), "magnitudes: runs of {run}");
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.magnitudes)(x, run, out) }
    }

    /// `round_half_even((x - offset) * factor)` within `limits`, with a factor for each run of `run` numbers and, where
    /// `offsets` are not empty, an offset. NaN gives the code nearest to 0. The codes go to [`Kernels::pack_codes`].
    ///
    /// # Panics
    /// Lengths do not agree.
    pub fn round_codes(
        &self,
        x: &[f32],
        run: usize,
        offsets: &[f32],
        factors: &[f32],
        limits: [i8; 2],
        codes: &mut [i8],
    ) {
        assert_eq!(x.len(), codes.len(), "round_codes: numbers and codes");
        assert_eq!(factors.len(), x.len().div_ceil(run), "round_codes: runs of {run}");
        assert!(offsets.is_empty() || offsets.len() == factors.len(), "round_codes: offsets and factors");
        let limits = limits.map(f32::from);
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.round_codes)(x, run, offsets, factors, limits, codes) }
    }

    /// Encodes rows `[n][shape.dims]` as signed bytes from -127 to 127 ([`CodeBits::Eight`] or [`CodeBits::Planes`]) with a
    /// scale a row, or with `blocks` one for 32 numbers: `code = round_half_even(x * (127 / m))`, `scale = m / 127` with
    /// `m = max|x|`; where `m` is below 1e-30, both are zero. Numbers are finite; a scale is NaN where one was NaN, and
    /// infinite where one was infinite. `out` and `low` are as for [`Kernels::pack_codes`].
    ///
    /// # Panics
    /// Lengths do not agree, or the shape is not one of 8-bit codes.
    pub fn encode_int8(
        &self,
        shape: CodeShape,
        blocks: bool,
        rows: &[f32],
        out: &mut [u8],
        low: &mut [u8],
        scales: &mut [f32],
    ) {
        shape.check("encode_int8");
        assert!(shape.bits.is_signed(), "encode_int8: {shape:?}");
        let n = rows.len() / shape.dims;
        assert_eq!(rows.len(), n * shape.dims, "encode_int8: rows of {shape:?}");
        assert_eq!(out.len(), n * shape.row_bytes(), "encode_int8: bytes of {n} rows");
        let lower = if shape.bits == CodeBits::Planes { out.len() } else { 0 };
        assert_eq!(low.len(), lower, "encode_int8: lower plane of {n} rows");
        assert_eq!(
            scales.len(),
            n * if blocks { shape.blocks() } else { 1 },
            "encode_int8: scales of {n} rows"
        );
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.encode_int8)(shape, blocks, rows, out, low, scales) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::codes::Rows;

    fn tables() -> impl Iterator<Item = &'static Kernels> {
        Isa::available().into_iter().filter_map(Kernels::for_isa)
    }

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 100.0 - 5.0).collect()
    }

    #[test]
    fn bytes_are_the_nearest_multiples_of_their_scale() {
        for (dims, bits) in [8, 40, 64, 128, 136, 256]
            .into_iter()
            .flat_map(|d| [CodeBits::Eight, CodeBits::Planes].map(|b| (d, b)))
        {
            let shape = CodeShape { dims, bits };
            let mut rows = numbers(4 * dims);
            rows[dims..2 * dims].fill(0.0);
            rows[2 * dims..3 * dims].iter_mut().for_each(|x| *x *= 1e-36);
            for blocks in [false, true] {
                let run = if blocks { 32 } else { dims };
                for k in tables() {
                    let mut out = vec![0; 4 * shape.row_bytes()];
                    let mut low = vec![0; if bits == CodeBits::Planes { out.len() } else { 0 }];
                    let mut scales = vec![-1.0; 4 * dims.div_ceil(run)];
                    k.encode_int8(shape, blocks, &rows, &mut out, &mut low, &mut scales);
                    let mut codes = vec![0; rows.len()];
                    shape.unpack(Rows { codes: &out, low: &low, table: &[0; 16], upcoming: &[] }, &mut codes);
                    for (t, row) in rows.chunks(dims).enumerate() {
                        for (b, x) in row.chunks(run).enumerate() {
                            let m = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                            let (scale, factor) = if m < 1e-30 { (0.0, 0.0) } else { (m / 127.0, 127.0 / m) };
                            assert_eq!(
                                scales[t * dims.div_ceil(run) + b].to_bits(),
                                scale.to_bits(),
                                "{} {shape:?}",
                                k.isa()
                            );
                            for (i, x) in x.iter().enumerate() {
                                let code = codes[t * dims + b * run + i];
                                assert_eq!(
                                    f32::from(code),
                                    (x * factor).round_ties_even(),
                                    "{} {shape:?}",
                                    k.isa()
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_has_offsets_and_limits() {
        let x = numbers(77);
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5, 1.5, 2.5, -0.5];
        for k in tables() {
            let mut found = vec![0.0; 4];
            k.magnitudes(&x, 20, &mut found);
            let wanted: Vec<f32> =
                x.chunks(20).map(|x| x.iter().fold(0.0f32, |m, x| m.max(x.abs()))).collect();
            assert_eq!(found, wanted, "{}", k.isa());
            let mut codes = vec![99; 77];
            k.round_codes(&x, 20, &[-5.0; 4], &[1.5, 0.7, 2.0, 3.0], [0, 15], &mut codes);
            for (i, &code) in codes.iter().enumerate() {
                let v = (x[i] + 5.0) * [1.5, 0.7, 2.0, 3.0][i / 20];
                assert_eq!(f32::from(code), v.round_ties_even().clamp(0.0, 15.0), "{} {i}", k.isa());
            }
            let mut codes = [99; 7];
            k.round_codes(&special, 7, &[], &[1.0], [-8, 7], &mut codes);
            assert_eq!(codes, [0, 7, -8, 0, 2, 2, 0], "{}", k.isa());
        }
    }
}
