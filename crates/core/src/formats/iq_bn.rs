//! IQ1_BN and IQ2_BN, the ternary formats of ik_llama.cpp: a scale at the head of each row, then blocks of 64 weights.
//! Source: `quantize_iq1_bn`, `quantize_iq2_bn` in ik_llama.cpp's `iqk_quantize.cpp`.
//!
//! IQ2_BN: f32 scale; 16 bytes a block of two-bit codes, first group in the low bits.
//!
//! IQ1_BN: f16 scale; 13 bytes a block. Of each sixteen weights, three bytes hold five codes each, the first one the
//! *least* significant digit in base 3; the sixteenth codes of the four groups share the last byte (with a fifth digit of
//! zero). A byte is `ceil(number * 256 / 243)`; every byte decodes to codes of 0 to 2, also the 13 that no encoder
//! writes.

use super::two_bits::{LOW_FIRST, pack, unpack};
use super::{Encoding, FormatError, check_codes, positive, trits};
use half::f16;

/// Weights of a block.
const BLOCK: usize = 64;
/// Bytes of a block of IQ1_BN.
const PACKED: usize = 13;

pub(super) fn codes_2(bytes: &[u8], row: usize, codes: &mut [u8]) -> Result<Option<f32>, FormatError> {
    let (scale, packed) = bytes.split_at(4);
    let seen = unpack::<16>(packed, LOW_FIRST, codes);
    if seen.bad {
        check_codes(row, codes)?;
    }
    let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
    seen.nonzero.then(|| positive(Encoding::Iq2Bn, row, scale)).transpose()
}

pub(super) fn encode_2(codes: &[u8], scale: f32, out: &mut Vec<u8>) {
    out.extend(scale.to_le_bytes());
    pack::<16>(codes, LOW_FIRST, out);
}

pub(super) fn codes_1(bytes: &[u8], row: usize, codes: &mut [u8]) -> Result<Option<f32>, FormatError> {
    const ZEROS: u128 = u128::from_le_bytes([1; 16]);
    let (scale, packed) = bytes.split_at(2);
    let mut nonzero = 0;
    for (block, codes) in packed.as_chunks::<PACKED>().0.iter().zip(codes.as_chunks_mut::<BLOCK>().0) {
        let mut last = trits::LEAST_FIRST[usize::from(block[PACKED - 1])];
        for (three, codes) in block.as_chunks::<3>().0.iter().zip(codes.as_chunks_mut::<16>().0) {
            let [a, b, c] = three.map(|byte| u128::from(trits::LEAST_FIRST[usize::from(byte)]));
            let sixteen = a | b << 40 | c << 80 | u128::from(last) << 120;
            last >>= 8;
            nonzero |= sixteen ^ ZEROS;
            *codes = sixteen.to_le_bytes();
        }
    }
    let scale = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
    (nonzero != 0).then(|| positive(Encoding::Iq1Bn, row, scale)).transpose()
}

pub(super) fn encode_1(codes: &[u8], scale: f32, out: &mut Vec<u8>) {
    out.extend(f16::from_f32(scale).to_le_bytes());
    for block in codes.as_chunks::<BLOCK>().0 {
        let (sixteens, _) = block.as_chunks::<16>();
        for five in sixteens.iter().flat_map(|sixteen| sixteen.as_chunks::<5>().0) {
            out.push(trits::byte(|k| five[4 - k]));
        }
        out.push(trits::byte(|k| if k == 0 { 0 } else { sixteens[4 - k][15] }));
    }
}
