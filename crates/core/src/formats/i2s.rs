//! I2_S, the format of bitnet.cpp: the two-bit codes of the whole matrix, row after row, then one f32 scale and 28 bytes
//! of zero. Blocks of 128 codes in 32 bytes (files for x86) or 64 in 16 (files for ARM), first group in the high bits.
//! Both kinds carry the same type id. Source: `quantize_i2_s` in bitnet.cpp's `ggml-bitnet-mad.cpp`.

use super::two_bits::{HIGH_FIRST, Seen, pack, unpack};
use super::{Encoding, FormatError, I2sLayout, check_codes, positive};

impl I2sLayout {
    /// `x86` or `arm`, as flags, keys and messages write it.
    pub fn as_str(self) -> &'static str {
        match self {
            I2sLayout::X86 => "x86",
            I2sLayout::Arm => "arm",
        }
    }

    /// The layout called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        [I2sLayout::X86, I2sLayout::Arm].into_iter().find(|layout| layout.as_str() == name)
    }
}

/// The scale and what follows it.
const TAIL: usize = 32;

pub(super) fn bytes(layout: I2sLayout, rows: usize, cols: usize) -> Result<u64, FormatError> {
    let multiple = match layout {
        I2sLayout::X86 => 128,
        I2sLayout::Arm => 64,
    };
    let encoding = Encoding::I2s(layout).name();
    // The codes run on over the end of a row; a row that ends within a block could not be read alone.
    if !cols.is_multiple_of(multiple) {
        return Err(FormatError::Shape { encoding, unit: "columns", multiple, found: cols });
    }
    Ok((rows as u64).saturating_mul(cols as u64 / 4).saturating_add(TAIL as u64))
}

pub(super) fn codes(
    layout: I2sLayout,
    bytes: &[u8],
    row: usize,
    codes: &mut [u8],
) -> Result<Option<f32>, FormatError> {
    let (packed, tail) = bytes.split_at(bytes.len() - TAIL);
    let width = codes.len() / 4;
    let packed = &packed[row * width..][..width];
    let Seen { nonzero, bad } = match layout {
        I2sLayout::X86 => unpack::<32>(packed, HIGH_FIRST, codes),
        I2sLayout::Arm => unpack::<16>(packed, HIGH_FIRST, codes),
    };
    if bad {
        check_codes(row, codes)?;
    }
    let scale = f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
    nonzero.then(|| positive(Encoding::I2s(layout), row, scale)).transpose()
}

pub(super) fn encode(layout: I2sLayout, codes: &[u8], out: &mut Vec<u8>) {
    match layout {
        I2sLayout::X86 => pack::<32>(codes, HIGH_FIRST, out),
        I2sLayout::Arm => pack::<16>(codes, HIGH_FIRST, out),
    }
}

/// What stands after the codes of the last row.
pub(super) fn tail(scale: f32) -> [u8; TAIL] {
    let mut tail = [0; TAIL];
    tail[..4].copy_from_slice(&scale.to_le_bytes());
    tail
}
