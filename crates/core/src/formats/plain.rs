//! Floats as they are: f32, f16 and bf16, little-endian.

use half::f16;

pub(super) fn f32_row(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b));
}

pub(super) fn f16_row(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f32());
}

pub(super) fn bf16_row(bytes: &[u8], out: &mut [f32]) {
    let widen = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(o, b)| *o = widen(b));
}
