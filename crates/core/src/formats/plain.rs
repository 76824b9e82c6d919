//! Floats as they are: f32, f16 and bf16, little-endian. Encoders round to the nearest, ties to even.

use half::{bf16, f16};

use super::{Encoding, FormatError};

pub(super) fn f32_row(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b));
}

pub(super) fn f16_row(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(o, b)| *o = widen_f16(u16::from_le_bytes(*b)));
}

/// Widens without a branch or a look at the processor, so that loops over it become vector code; `half` does neither.
fn widen_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // Moves the bias of the exponent from 15 to 127; exact, also for subnormal numbers.
    let value = (f32::from_bits(magnitude) * 2f32.powi(112)).to_bits();
    let special = if magnitude >= 0x7c00 << 13 { 0x7f80_0000 } else { 0 };
    f32::from_bits(value | special | u32::from(bits & 0x8000) << 16)
}

pub(super) fn bf16_row(bytes: &[u8], out: &mut [f32]) {
    let widen = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(o, b)| *o = widen(b));
}

pub(super) fn encode_f32(values: &[f32], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + 4 * values.len(), 0);
    out[start..].as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(b, x)| *b = x.to_le_bytes());
}

pub(super) fn encode_f16(values: &[f32], out: &mut Vec<u8>) -> Result<(), FormatError> {
    encode(Encoding::F16, values, |x| f16::from_f32(x).to_bits(), f16::INFINITY.to_bits(), out)
}

pub(super) fn encode_bf16(values: &[f32], out: &mut Vec<u8>) -> Result<(), FormatError> {
    encode(Encoding::Bf16, values, |x| bf16::from_f32(x).to_bits(), bf16::INFINITY.to_bits(), out)
}

/// Narrows finite numbers, none of which may become `infinite`.
fn encode(
    encoding: Encoding,
    values: &[f32],
    narrow: impl Fn(f32) -> u16,
    infinite: u16,
    out: &mut Vec<u8>,
) -> Result<(), FormatError> {
    let start = out.len();
    out.resize(start + 2 * values.len(), 0);
    let mut overflow = false;
    for (b, &value) in out[start..].as_chunks_mut::<2>().0.iter_mut().zip(values) {
        let narrow = narrow(value);
        overflow |= narrow & 0x7fff == infinite;
        *b = narrow.to_le_bytes();
    }
    if !overflow {
        return Ok(());
    }
    let col = values.iter().position(|&x| narrow(x) & 0x7fff == infinite).unwrap_or_default();
    Err(FormatError::Value { encoding: encoding.name(), col, value: values[col] })
}
