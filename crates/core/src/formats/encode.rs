//! From numbers and ternary codes to the bytes of a stored matrix.

use std::io::Write;

use half::f16;

use super::tq::Tq;
use super::{Encoding, FormatError, check_codes, i2s, iq_bn, plain, q_0, q6_k};

/// A matrix that could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The format cannot hold it.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The bytes could not be written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Appends the bytes of one row of `values` to `out`, in a format of numbers: [`Encoding::F32`], [`Encoding::F16`],
/// [`Encoding::Bf16`] (to the nearest, ties to even), [`Encoding::Q8_0`], [`Encoding::Q5_0`], [`Encoding::Q4_0`] (the bytes
/// of ggml's reference quantisers) or [`Encoding::Q6K`] (an encoder of our own). The rows of a matrix stand one after
/// another.
///
/// # Errors
/// [`FormatError::Ternary`], [`FormatError::Shape`], and [`FormatError::Value`] for a number that is not finite or too large
/// for the format; `out` is then as it was.
pub fn encode_row(encoding: Encoding, values: &[f32], out: &mut Vec<u8>) -> Result<(), FormatError> {
    encoding.bytes(1, values.len())?;
    if let Some(col) = values.iter().position(|x| !x.is_finite()) {
        return Err(FormatError::Value { encoding: encoding.name(), col, value: values[col] });
    }
    let before = out.len();
    let done = match encoding {
        Encoding::F32 => {
            plain::encode_f32(values, out);
            Ok(())
        }
        Encoding::F16 => plain::encode_f16(values, out),
        Encoding::Bf16 => plain::encode_bf16(values, out),
        Encoding::Q8_0 => q_0::encode_q8_0(values, out),
        Encoding::Q5_0 => q_0::encode_q5_0(values, out),
        Encoding::Q4_0 => q_0::encode_q4_0(values, out),
        Encoding::Q6K => q6_k::encode(values, out),
        Encoding::HfU8
        | Encoding::I2s(_)
        | Encoding::Tq1_0
        | Encoding::Tq2_0
        | Encoding::Iq1Bn
        | Encoding::Iq2Bn => Err(FormatError::Ternary { encoding: encoding.name() }),
    };
    done.inspect_err(|_| out.truncate(before))
}

/// Whether a ternary format keeps the bits of `scale`, a positive number: TQ1_0, TQ2_0 and IQ1_BN store scales as f16,
/// I2_S and IQ2_BN as f32. [`Encoding::HfU8`] keeps any, for its scale stands elsewhere. No other format has one.
pub fn holds_scale(encoding: Encoding, scale: f32) -> bool {
    let positive = scale.is_finite() && scale > 0.0;
    match encoding {
        Encoding::HfU8 => true,
        Encoding::I2s(_) | Encoding::Iq2Bn => positive,
        Encoding::Tq1_0 | Encoding::Tq2_0 | Encoding::Iq1Bn => {
            positive && f16::from_f32(scale).to_f32() == scale
        }
        Encoding::F32
        | Encoding::F16
        | Encoding::Bf16
        | Encoding::Q4_0
        | Encoding::Q5_0
        | Encoding::Q8_0
        | Encoding::Q6K => false,
    }
}

/// Writes a ternary matrix of `rows x cols` with one `scale` (not written by [`Encoding::HfU8`]) to `out`: exactly
/// [`Encoding::bytes`] bytes. `row(r, codes)` writes the codes `weight + 1` of row `r` into all of `codes`, `[cols]`; it is
/// asked once for each row, in order, and for [`Encoding::HfU8`] in the order `r`, `r + rows / 4`, `r + rows / 2`,
/// `r + 3 * rows / 4`.
///
/// # Errors
/// [`FormatError::NotTernary`], [`FormatError::Shape`], [`FormatError::ScaleLost`] where [`holds_scale`] says no,
/// [`FormatError::Code`] for a code above 2, and what `out` returns. Some bytes may have been written before the last two.
pub fn encode_ternary(
    encoding: Encoding,
    rows: usize,
    cols: usize,
    scale: f32,
    mut row: impl FnMut(usize, &mut [u8]),
    out: &mut impl Write,
) -> Result<(), EncodeError> {
    if !encoding.is_ternary() {
        return Err(FormatError::NotTernary { encoding: encoding.name() }.into());
    }
    encoding.bytes(rows, cols)?;
    if !holds_scale(encoding, scale) {
        return Err(FormatError::ScaleLost { encoding: encoding.name(), scale }.into());
    }
    let mut codes = vec![1; cols];
    let mut next = |r: usize, codes: &mut [u8]| {
        row(r, codes);
        check_codes(r, codes)
    };
    if encoding == Encoding::HfU8 {
        let quarter = rows / 4;
        let mut packed = vec![0u8; cols];
        for r in 0..quarter {
            packed.fill(0);
            for i in 0..4 {
                next(i * quarter + r, &mut codes)?;
                packed.iter_mut().zip(&codes).for_each(|(byte, code)| *byte |= code << (2 * i));
            }
            out.write_all(&packed)?;
        }
        return Ok(());
    }
    let mut packed = Vec::new();
    for r in 0..rows {
        next(r, &mut codes)?;
        packed.clear();
        match encoding {
            Encoding::I2s(layout) => i2s::encode(layout, &codes, &mut packed),
            Encoding::Tq1_0 => Tq::One.encode(&codes, scale, &mut packed),
            Encoding::Tq2_0 => Tq::Two.encode(&codes, scale, &mut packed),
            Encoding::Iq1Bn => iq_bn::encode_1(&codes, scale, &mut packed),
            Encoding::Iq2Bn => iq_bn::encode_2(&codes, scale, &mut packed),
            _ => return Err(FormatError::NotTernary { encoding: encoding.name() }.into()),
        }
        out.write_all(&packed)?;
    }
    if matches!(encoding, Encoding::I2s(_)) {
        out.write_all(&i2s::tail(scale))?;
    }
    Ok(())
}
