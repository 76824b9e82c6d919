//! Number formats of model files: how the bytes of a stored matrix become numbers or ternary codes, and back.
//!
//! One file a format, opening with its bit layout and its source. A format knows rows and columns; what a tensor is
//! called and which model it belongs to is the business of [`crate::checkpoint`].

mod hf_u8;
mod plain;

/// Byte order of I2_S, which two families of files share under one type id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum I2sLayout {
    /// 128 weights in 32 bytes: files made on (and for) x86, as published for 2B-4T.
    X86,
    /// 64 weights in 16 bytes: files made on ARM.
    Arm,
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
    /// A row whose blocks disagree about the scale.
    #[error(
        "row {row} has blocks with the scales {first} and {second}; a ternary matrix has one scale: this is no b1.58 \
         weight"
    )]
    Scales {
        /// Row in the stored matrix.
        row: usize,
        /// One scale.
        first: f32,
        /// Another.
        second: f32,
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
        }
    }

    /// Whether [`Matrix::ternary_row`] works.
    pub fn is_ternary(self) -> bool {
        matches!(self, Encoding::HfU8)
    }

    /// Bytes of a matrix of `rows x cols`.
    ///
    /// # Errors
    /// [`FormatError::Shape`] when the shape cannot be stored; a product beyond 64 bits saturates.
    pub fn bytes(self, rows: usize, cols: usize) -> Result<u64, FormatError> {
        let numbers = (rows as u64).saturating_mul(cols as u64);
        match self {
            Encoding::F32 => Ok(numbers.saturating_mul(4)),
            Encoding::F16 | Encoding::Bf16 => Ok(numbers.saturating_mul(2)),
            Encoding::HfU8 => hf_u8::bytes(rows, cols),
        }
    }
}

/// A stored matrix: its bytes are as many as its shape needs.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
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

    /// Writes row `row` as f32 into `out`, `[cols]`. Formats whose scale stands elsewhere give -1, 0 and 1.
    ///
    /// # Errors
    /// [`FormatError::Code`], for damaged ternary formats.
    ///
    /// # Panics
    /// There is no such row, or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<(), FormatError> {
        assert!(row < self.rows && out.len() == self.cols, "row {row}, {} numbers of {self:?}", out.len());
        match self.encoding {
            Encoding::F32 => plain::f32_row(self.row_bytes(row), out),
            Encoding::F16 => plain::f16_row(self.row_bytes(row), out),
            Encoding::Bf16 => plain::bf16_row(self.row_bytes(row), out),
            Encoding::HfU8 => {
                let mut codes = vec![0; self.cols];
                self.ternary_row(row, &mut codes)?;
                out.iter_mut().zip(codes).for_each(|(o, code)| *o = f32::from(code) - 1.0);
            }
        }
        Ok(())
    }

    /// Writes the codes `weight + 1` of row `row` into `codes`, `[cols]`; returns the row's scale where the format has
    /// one inside the row and the row has a weight other than zero.
    ///
    /// # Errors
    /// [`FormatError::Code`], [`FormatError::Scales`], [`FormatError::NotTernary`].
    ///
    /// # Panics
    /// There is no such row, or `codes` has another length.
    pub fn ternary_row(&self, row: usize, codes: &mut [u8]) -> Result<Option<f32>, FormatError> {
        assert!(row < self.rows && codes.len() == self.cols, "row {row}, {} codes of {self:?}", codes.len());
        match self.encoding {
            Encoding::HfU8 => hf_u8::codes(self.bytes, self.rows, row, codes).map(|()| None),
            Encoding::F32 | Encoding::F16 | Encoding::Bf16 => {
                Err(FormatError::NotTernary { encoding: self.encoding.name() })
            }
        }
    }
}

/// The first code above 2, as an error.
fn check_codes(row: usize, codes: &[u8]) -> Result<(), FormatError> {
    if codes.iter().fold(0, |worst, &code| worst.max(code)) <= 2 {
        return Ok(());
    }
    let col = codes.iter().position(|&code| code > 2).unwrap_or_default();
    Err(FormatError::Code { row, col, code: codes[col] })
}
