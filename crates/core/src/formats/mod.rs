//! Number formats of model files: how the bytes of a stored matrix become numbers or ternary codes, and back.
//!
//! One file a family of formats, opening with its bit layout and its source. A format knows rows and columns; what a tensor
//! is called and which model it belongs to is the business of [`crate::Checkpoint`].

use std::fmt;

use half::f16;

mod encode;
mod hf_u8;
mod i2s;
mod iq_bn;
mod plain;
mod q6_k;
mod q_0;
mod tq;
mod trits;
mod two_bits;

pub use encode::{EncodeError, encode_row, encode_ternary, holds_scale};
use tq::Tq;

/// Byte order of I2_S, which two families of files share under one type id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum I2sLayout {
    /// 128 weights in 32 bytes: files made on (and for) x86, as published for 2B-4T.
    X86,
    /// 64 weights in 16 bytes: files made on ARM.
    Arm,
}

impl I2sLayout {
    /// Every byte order.
    pub const ALL: [I2sLayout; 2] = [I2sLayout::X86, I2sLayout::Arm];
}

/// How the numbers of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Encoding {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Four rows a byte, the packed layout of Hugging Face checkpoints; ternary, its scale stands elsewhere.
    HfU8,
    /// Four bits and an f16 scale for 32 numbers: 4.5 bits a number.
    Q4_0,
    /// Five bits and an f16 scale for 32 numbers: 5.5 bits a number.
    Q5_0,
    /// Eight bits and an f16 scale for 32 numbers: 8.5 bits a number.
    Q8_0,
    /// Six bits, an int8 scale for 16 numbers and an f16 one for 256: 6.5625 bits a number.
    Q6K,
    /// Ternary, five weights a byte and an f16 scale for 256: 1.6875 bits a weight.
    Tq1_0,
    /// Ternary, four weights a byte and an f16 scale for 256: 2.0625 bits a weight.
    Tq2_0,
    /// Ternary, four weights a byte and one f32 scale for the matrix: 2 bits a weight.
    I2s(I2sLayout),
    /// Ternary, 64 weights in 13 bytes and an f16 scale for a row: 1.625 bits a weight.
    Iq1Bn,
    /// Ternary, four weights a byte and an f32 scale for a row: 2 bits a weight.
    Iq2Bn,
}

/// Numbers stored in blocks, which do not cross rows.
#[derive(Clone, Copy)]
struct Blocks {
    /// Numbers of a block.
    numbers: usize,
    /// Bytes of a block.
    bytes: usize,
    /// Bytes before the first block of a row.
    head: usize,
}

/// A stored matrix that is not what its format allows.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The shape does not fit the format.
    #[error("{encoding} stores {unit} in multiples of {multiple}; this matrix has {found}")]
    Shape {
        /// The format.
        encoding: &'static str,
        /// `rows`, `columns`.
        unit: &'static str,
        /// What divides it.
        multiple: usize,
        /// What it has.
        found: usize,
    },
    /// The bytes are more or fewer than the shape needs.
    #[error("{encoding} of {rows} x {cols} takes {expected} bytes; there are {found}")]
    Length {
        /// The format.
        encoding: &'static str,
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Bytes that the shape needs.
        expected: u64,
        /// Bytes given.
        found: usize,
    },
    /// A code that no ternary weight has.
    #[error(
        "the weight at row {row}, column {col} has code {code}, which is no ternary weight: the file is damaged, or \
         packed in another way than it says"
    )]
    Code {
        /// Row in the stored matrix.
        row: usize,
        /// Column.
        col: usize,
        /// The code found.
        code: u8,
    },
    /// Blocks of a row, or rows, that disagree about the scale.
    #[error(
        "row {row} has the scale {second} where {first} stands before it; a ternary matrix has one scale: this is no \
         b1.58 weight"
    )]
    Scales {
        /// Row in the stored matrix.
        row: usize,
        /// One scale.
        first: f32,
        /// Another.
        second: f32,
    },
    /// A scale that the format cannot have: not finite, or not positive where weights are ternary.
    #[error("row {row} has the scale {scale}, which {encoding} cannot have: the file is damaged")]
    Scale {
        /// The format.
        encoding: &'static str,
        /// Row in the stored matrix.
        row: usize,
        /// The scale found.
        scale: f32,
    },
    /// A scale that would be stored as another one.
    #[error(
        "{encoding} cannot hold the scale {scale} exactly: write the matrix as i2_s or iq2_bn, which can"
    )]
    ScaleLost {
        /// The format.
        encoding: &'static str,
        /// The scale to be written.
        scale: f32,
    },
    /// A number to be written that is not finite, or beyond the range of the format.
    #[error("the number {value} in column {col} cannot be written as {encoding}")]
    Value {
        /// The format.
        encoding: &'static str,
        /// Column.
        col: usize,
        /// The number.
        value: f32,
    },
    /// The format holds nothing but ternary weights.
    #[error("{encoding} holds ternary weights, not numbers")]
    Ternary {
        /// The format.
        encoding: &'static str,
    },
    /// The format holds no ternary weights.
    #[error("{encoding} holds no ternary weights")]
    NotTernary {
        /// The format.
        encoding: &'static str,
    },
}

impl Encoding {
    /// Name, as files and people write it.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::F32 => "f32",
            Encoding::F16 => "f16",
            Encoding::Bf16 => "bf16",
            Encoding::HfU8 => "U8 packed",
            Encoding::Q4_0 => "q4_0",
            Encoding::Q5_0 => "q5_0",
            Encoding::Q8_0 => "q8_0",
            Encoding::Q6K => "q6_k",
            Encoding::Tq1_0 => "tq1_0",
            Encoding::Tq2_0 => "tq2_0",
            Encoding::I2s(I2sLayout::X86) => "i2_s (x86)",
            Encoding::I2s(I2sLayout::Arm) => "i2_s (arm)",
            Encoding::Iq1Bn => "iq1_bn",
            Encoding::Iq2Bn => "iq2_bn",
        }
    }

    /// The blocks of formats that have some.
    fn blocks(self) -> Option<Blocks> {
        let (numbers, bytes, head) = match self {
            Encoding::Q4_0 => (32, 18, 0),
            Encoding::Q5_0 => (32, 22, 0),
            Encoding::Q8_0 => (32, 34, 0),
            Encoding::Q6K => (256, 210, 0),
            Encoding::Tq1_0 => (tq::BLOCK, 54, 0),
            Encoding::Tq2_0 => (tq::BLOCK, 66, 0),
            Encoding::Iq1Bn => (64, 13, 2),
            Encoding::Iq2Bn => (64, 16, 4),
            Encoding::F32 | Encoding::F16 | Encoding::Bf16 | Encoding::HfU8 | Encoding::I2s(_) => {
                return None;
            }
        };
        Some(Blocks { numbers, bytes, head })
    }

    /// Whether [`Matrix::ternary_row`] works.
    pub fn is_ternary(self) -> bool {
        match self {
            Encoding::HfU8
            | Encoding::Tq1_0
            | Encoding::Tq2_0
            | Encoding::I2s(_)
            | Encoding::Iq1Bn
            | Encoding::Iq2Bn => true,
            Encoding::F32
            | Encoding::F16
            | Encoding::Bf16
            | Encoding::Q4_0
            | Encoding::Q5_0
            | Encoding::Q8_0
            | Encoding::Q6K => false,
        }
    }

    /// Bytes of a matrix of `rows x cols`.
    ///
    /// # Errors
    /// [`FormatError::Shape`] when the shape cannot be stored; a product beyond 64 bits saturates.
    pub fn bytes(self, rows: usize, cols: usize) -> Result<u64, FormatError> {
        if let Some(Blocks { numbers, bytes, head }) = self.blocks() {
            if !cols.is_multiple_of(numbers) {
                let encoding = self.name();
                return Err(FormatError::Shape { encoding, unit: "columns", multiple: numbers, found: cols });
            }
            let row = (cols as u64 / numbers as u64).saturating_mul(bytes as u64).saturating_add(head as u64);
            return Ok(row.saturating_mul(rows as u64));
        }
        match self {
            Encoding::HfU8 => hf_u8::bytes(rows, cols),
            Encoding::I2s(layout) => i2s::bytes(layout, rows, cols),
            _ => {
                let width = if self == Encoding::F32 { 4 } else { 2 };
                Ok((rows as u64).saturating_mul(cols as u64).saturating_mul(width))
            }
        }
    }
}

/// A stored matrix: its bytes are as many as its shape needs.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl fmt::Debug for Matrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} x {}", self.encoding.name(), self.rows, self.cols)
    }
}

impl<'a> Matrix<'a> {
    /// Wraps the `bytes` of a matrix.
    ///
    /// # Errors
    /// The shape cannot be stored in `encoding`, or takes another number of bytes.
    pub fn new(encoding: Encoding, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, FormatError> {
        let expected = encoding.bytes(rows, cols)?;
        if expected != bytes.len() as u64 {
            let found = bytes.len();
            return Err(FormatError::Length { encoding: encoding.name(), rows, cols, expected, found });
        }
        Ok(Matrix { encoding, rows, cols, bytes })
    }

    /// How it is stored.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The bytes of row `row`, for formats that store rows one after another in equal parts.
    fn row_bytes(&self, row: usize) -> &'a [u8] {
        let width = self.bytes.len() / self.rows;
        &self.bytes[row * width..(row + 1) * width]
    }

    /// Writes row `row` as f32 into `out`, `[cols]`. Formats whose scale stands elsewhere give -1, 0 and 1. The blocks of a
    /// ternary format may differ in their scales here. Numbers of [`Encoding::F32`], [`Encoding::F16`] and
    /// [`Encoding::Bf16`] are given as they are, finite or not.
    ///
    /// # Errors
    /// [`FormatError::Code`] and [`FormatError::Scale`], for damaged files.
    ///
    /// # Panics
    /// There is no such row, or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<(), FormatError> {
        assert!(row < self.rows && out.len() == self.cols, "row {row}, {} numbers of {self:?}", out.len());
        match self.encoding {
            Encoding::F32 => plain::f32_row(self.row_bytes(row), out),
            Encoding::F16 => plain::f16_row(self.row_bytes(row), out),
            Encoding::Bf16 => plain::bf16_row(self.row_bytes(row), out),
            Encoding::Q4_0 => q_0::q4_0_row(self.row_bytes(row), row, out)?,
            Encoding::Q5_0 => q_0::q5_0_row(self.row_bytes(row), row, out)?,
            Encoding::Q8_0 => q_0::q8_0_row(self.row_bytes(row), row, out)?,
            Encoding::Q6K => q6_k::row(self.row_bytes(row), row, out)?,
            Encoding::Tq1_0 => Tq::One.dequantize(self.row_bytes(row), row, out)?,
            Encoding::Tq2_0 => Tq::Two.dequantize(self.row_bytes(row), row, out)?,
            Encoding::HfU8 | Encoding::I2s(_) | Encoding::Iq1Bn | Encoding::Iq2Bn => {
                let mut codes = vec![0; self.cols];
                let scale = self.ternary_row(row, &mut codes)?.unwrap_or(1.0);
                out.iter_mut().zip(codes).for_each(|(o, code)| *o = (f32::from(code) - 1.0) * scale);
            }
        }
        Ok(())
    }

    /// Writes the codes `weight + 1` of row `row` into `codes`, `[cols]`; returns the row's scale where the format has
    /// one inside and the row has a weight other than zero. The scale of zeros is not looked at.
    ///
    /// # Errors
    /// [`FormatError::Code`], [`FormatError::Scale`], [`FormatError::Scales`], [`FormatError::NotTernary`].
    ///
    /// # Panics
    /// There is no such row, or `codes` has another length.
    pub fn ternary_row(&self, row: usize, codes: &mut [u8]) -> Result<Option<f32>, FormatError> {
        assert!(row < self.rows && codes.len() == self.cols, "row {row}, {} codes of {self:?}", codes.len());
        match self.encoding {
            Encoding::HfU8 => hf_u8::codes(self.bytes, self.rows, row, codes).map(|()| None),
            Encoding::I2s(layout) => i2s::codes(layout, self.bytes, row, codes),
            Encoding::Tq1_0 => Tq::One.codes(self.row_bytes(row), row, codes),
            Encoding::Tq2_0 => Tq::Two.codes(self.row_bytes(row), row, codes),
            Encoding::Iq1Bn => iq_bn::codes_1(self.row_bytes(row), row, codes),
            Encoding::Iq2Bn => iq_bn::codes_2(self.row_bytes(row), row, codes),
            Encoding::F32
            | Encoding::F16
            | Encoding::Bf16
            | Encoding::Q4_0
            | Encoding::Q5_0
            | Encoding::Q8_0
            | Encoding::Q6K => Err(FormatError::NotTernary { encoding: self.encoding.name() }),
        }
    }
}

/// The scale of ternary weights that are not all zero, if it is one.
fn positive(encoding: Encoding, row: usize, scale: f32) -> Result<f32, FormatError> {
    if scale.is_finite() && scale > 0.0 {
        return Ok(scale);
    }
    Err(FormatError::Scale { encoding: encoding.name(), row, scale })
}

/// The scale of a block of numbers, which may be negative.
fn block_scale(encoding: Encoding, row: usize, bytes: [u8; 2]) -> Result<f32, FormatError> {
    let scale = f16::from_le_bytes(bytes).to_f32();
    if scale.is_finite() {
        Ok(scale)
    } else {
        Err(FormatError::Scale { encoding: encoding.name(), row, scale })
    }
}

/// The bytes of the scale of a `block` of numbers that starts at column `col`.
fn stored_scale(encoding: Encoding, scale: f32, col: usize, block: &[f32]) -> Result<[u8; 2], FormatError> {
    let stored = f16::from_f32(scale);
    if stored.is_finite() {
        return Ok(stored.to_le_bytes());
    }
    let (at, value) = q_0::largest(block);
    Err(FormatError::Value { encoding: encoding.name(), col: col + at, value })
}

/// The first code above 2, as an error.
fn check_codes(row: usize, codes: &[u8]) -> Result<(), FormatError> {
    if codes.iter().fold(0, |worst, &code| worst.max(code)) <= 2 {
        return Ok(());
    }
    let col = codes.iter().position(|&code| code > 2).unwrap_or_default();
    Err(FormatError::Code { row, col, code: codes[col] })
}
