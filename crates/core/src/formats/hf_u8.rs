//! The packed layout of Hugging Face checkpoints: `[rows / 4][cols]` bytes; bits `2i`, `2i + 1` of byte `[r][c]` hold
//! the code (weight + 1) of row `i * rows / 4 + r`. Source: `pack_weights` of transformers' `integrations/bitnet.py`.

use super::{Encoding, FormatError, check_codes};

pub(super) fn bytes(rows: usize, cols: usize) -> Result<u64, FormatError> {
    if !rows.is_multiple_of(4) {
        return Err(FormatError::Shape {
            encoding: Encoding::HfU8.name(),
            unit: "rows",
            multiple: 4,
            found: rows,
        });
    }
    Ok((rows as u64 / 4).saturating_mul(cols as u64))
}

pub(super) fn codes(bytes: &[u8], rows: usize, row: usize, codes: &mut [u8]) -> Result<(), FormatError> {
    let (quarter, cols) = (rows / 4, codes.len());
    let shift = row / quarter * 2;
    let source = &bytes[row % quarter * cols..][..cols];
    codes.iter_mut().zip(source).for_each(|(code, byte)| *code = byte >> shift & 3);
    check_codes(row, codes)
}
