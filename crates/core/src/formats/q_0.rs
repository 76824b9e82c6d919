//! Q4_0, Q5_0 and Q8_0 of llama.cpp: blocks of 32 numbers that are integers times one f16 scale `d`. Source:
//! `quantize_row_q*_0_ref` and `dequantize_row_q*_0` in `ggml-quants.c`; the encoders give the same bytes.
//!
//! Q8_0, 34 bytes: `d`; 32 signed bytes `q`. A number is `d * q`.
//!
//! Q4_0, 18 bytes: `d`; 16 bytes, the low four bits of byte `j` for number `j`, the high ones for number `j + 16`. A number
//! is `d * (q - 8)`.
//!
//! Q5_0, 22 bytes: `d`; 32 bits, the fifth bit of number `j` at bit `j`; 16 bytes as in Q4_0. A number is `d * (q - 16)`.
//!
//! The largest magnitude of a block becomes -8, -16 or 127 steps, so that an error is at most half a step, and at most one
//! step (and the rounding of `d`) at the end that Q4_0 and Q5_0 cannot reach.

use super::{Encoding, FormatError, block_scale, stored_scale};

/// Numbers of a block.
const BLOCK: usize = 32;

pub(super) fn q8_0_row(bytes: &[u8], row: usize, out: &mut [f32]) -> Result<(), FormatError> {
    for (block, out) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = block_scale(Encoding::Q8_0, row, [block[0], block[1]])?;
        out.iter_mut().zip(&block[2..]).for_each(|(o, &q)| *o = f32::from(q as i8) * d);
    }
    Ok(())
}

pub(super) fn q4_0_row(bytes: &[u8], row: usize, out: &mut [f32]) -> Result<(), FormatError> {
    for (block, out) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = block_scale(Encoding::Q4_0, row, [block[0], block[1]])?;
        let (low, high) = out.split_at_mut(BLOCK / 2);
        for ((low, high), q) in low.iter_mut().zip(high).zip(&block[2..]) {
            *low = (f32::from(q & 15) - 8.0) * d;
            *high = (f32::from(q >> 4) - 8.0) * d;
        }
    }
    Ok(())
}

pub(super) fn q5_0_row(bytes: &[u8], row: usize, out: &mut [f32]) -> Result<(), FormatError> {
    for (block, out) in bytes.as_chunks::<22>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = block_scale(Encoding::Q5_0, row, [block[0], block[1]])?;
        let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        let (low, high) = out.split_at_mut(BLOCK / 2);
        for (j, ((low, high), q)) in low.iter_mut().zip(high).zip(&block[6..]).enumerate() {
            let bit = |j: usize| (fifth >> j & 1) as u8 * 16;
            *low = (f32::from(q & 15 | bit(j)) - 16.0) * d;
            *high = (f32::from(q >> 4 | bit(j + 16)) - 16.0) * d;
        }
    }
    Ok(())
}

pub(super) fn encode_q8_0(values: &[f32], out: &mut Vec<u8>) -> Result<(), FormatError> {
    for (i, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
        let d = largest(block).1.abs() / 127.0;
        out.extend(stored_scale(Encoding::Q8_0, d, i * BLOCK, block)?);
        let inverse = inverse(d);
        out.extend(block.map(|x| round(x * inverse) as u8));
    }
    Ok(())
}

pub(super) fn encode_q4_0(values: &[f32], out: &mut Vec<u8>) -> Result<(), FormatError> {
    for (i, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
        let d = largest(block).1 / -8.0;
        out.extend(stored_scale(Encoding::Q4_0, d, i * BLOCK, block)?);
        let inverse = inverse(d);
        let q = block.map(|x| ((x * inverse + 8.5) as u8).min(15));
        out.extend(nibbles(&q));
    }
    Ok(())
}

pub(super) fn encode_q5_0(values: &[f32], out: &mut Vec<u8>) -> Result<(), FormatError> {
    for (i, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
        let d = largest(block).1 / -16.0;
        out.extend(stored_scale(Encoding::Q5_0, d, i * BLOCK, block)?);
        let inverse = inverse(d);
        let q = block.map(|x| ((x * inverse + 16.5) as u8).min(31));
        let fifth = q.iter().rev().fold(0, |bits, q| bits << 1 | u32::from(q >> 4));
        out.extend(fifth.to_le_bytes());
        out.extend(nibbles(&q));
    }
    Ok(())
}

/// The low four bits of number `j` and of number `j + 16`.
fn nibbles(q: &[u8; BLOCK]) -> impl Iterator<Item = u8> {
    let (low, high) = q.split_at(BLOCK / 2);
    low.iter().zip(high).map(|(low, high)| low & 15 | high << 4)
}

/// Place and value of the first number with the largest magnitude; all are finite.
pub(super) fn largest(values: &[f32]) -> (usize, f32) {
    let magnitude = |x: &f32| x.to_bits() & 0x7fff_ffff;
    let most = values.iter().map(magnitude).fold(0, u32::max);
    let at = values.iter().position(|x| magnitude(x) == most).unwrap_or_default();
    (at, values.get(at).copied().unwrap_or(0.0))
}

/// To the nearest of -128 to 127, ties away from zero, in a way that becomes vector code on every processor.
fn round(x: f32) -> i8 {
    let whole = x as i32;
    let rest = x - whole as f32;
    (whole + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)) as i8
}

/// `1 / d`, or zero where that is not finite: a block of numbers beyond the reach of f16 becomes zeros.
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}
