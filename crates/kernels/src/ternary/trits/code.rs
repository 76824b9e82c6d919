//! The byte code of five trits, and its tables.
//!
//! Four trits make 81 combinations, and 243 = 3 * 81 codes fit a byte. They are numbered so that one lookup of 64 entries
//! (`vpermb`) decodes most bytes, and the fifth trit needs none:
//!
//! - The first 64 combinations have the codes `combination | fifth << 6`: the top two bits are the fifth trit itself,
//!   already scaled by 64, as a mask leaves it.
//! - The last 17 combinations have the codes `192 + 3 * (combination - 64) + fifth`: bytes of 192 and more are decoded by
//!   tables of their own.
//!
//! Bytes from [`UNUSED`] on are no code; they decode to zeros.

/// Combinations of four trits that a six-bit index names.
const DIRECT: usize = 64;
/// Combinations of four trits.
const COMBINATIONS: usize = 81;
/// The first byte of the combinations beyond [`DIRECT`].
pub(super) const ESCAPE: u8 = 192;
/// The first byte that is no code.
pub(super) const UNUSED: u8 = ESCAPE + 3 * (COMBINATIONS - DIRECT) as u8;
/// Four weights of zero as codes of two bits.
pub(super) const FOUR_ZEROS: u8 = 0b01_01_01_01;
/// What [`ENCODE`] has where a code of two bits is 3.
pub(super) const BAD: u8 = 0xff;
/// The byte of five weights of zero.
pub(super) const ZEROS: u8 = ENCODE[1 << 8 | FOUR_ZEROS as usize];

/// The four codes of two bits of a combination.
const fn four(combination: usize) -> u8 {
    let (mut rest, mut byte, mut g) = (combination, 0, 0);
    while g < 4 {
        byte |= ((rest % 3) as u8) << (2 * g);
        rest /= 3;
        g += 1;
    }
    byte
}

/// By the low six bits of a byte below [`ESCAPE`]: the first four trits, two bits each.
pub(super) static DIRECT_FOUR: [u8; 64] = {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        table[i] = four(i);
        i += 1;
    }
    table
};

/// By the low six bits of a byte from [`ESCAPE`] on: the first four trits, two bits each.
pub(super) static ESCAPED_FOUR: [u8; 64] = {
    let mut table = [FOUR_ZEROS; 64];
    let mut i = 0;
    while i < (UNUSED - ESCAPE) as usize {
        table[i] = four(DIRECT + i / 3);
        i += 1;
    }
    table
};

/// By the low six bits of a byte from [`ESCAPE`] on: the fifth trit in the top two bits.
pub(super) static ESCAPED_FIFTH: [u8; 64] = {
    let mut table = [1 << 6; 64];
    let mut i = 0;
    while i < (UNUSED - ESCAPE) as usize {
        table[i] = ((i % 3) as u8) << 6;
        i += 1;
    }
    table
};

/// The byte of each `fifth << 8 | four codes of two bits`, or [`BAD`].
pub(super) static ENCODE: [u8; 1024] = {
    let mut table = [BAD; 1024];
    let mut i = 0;
    while i < COMBINATIONS {
        let mut fifth = 0;
        while fifth < 3 {
            let byte = if i < DIRECT { i | fifth << 6 } else { ESCAPE as usize + 3 * (i - DIRECT) + fifth };
            table[fifth << 8 | four(i) as usize] = byte as u8;
            fifth += 1;
        }
        i += 1;
    }
    table
};

/// The first four trits of a byte, as codes of two bits, and the fifth as a code.
#[inline]
pub(super) fn decode(byte: u8) -> (u8, u8) {
    let index = usize::from(byte) % DIRECT;
    if byte < ESCAPE {
        (DIRECT_FOUR[index], byte >> 6)
    } else {
        (ESCAPED_FOUR[index], ESCAPED_FIFTH[index] >> 6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_and_the_rest_is_zeros() {
        let mut seen = [false; 256];
        for fifth in 0..3u8 {
            for i in 0..COMBINATIONS {
                let byte = ENCODE[usize::from(fifth) << 8 | usize::from(four(i))];
                assert!(byte < UNUSED && !seen[usize::from(byte)], "combination {i}, fifth {fifth}");
                seen[usize::from(byte)] = true;
                assert_eq!(decode(byte), (four(i), fifth));
            }
        }
        assert_eq!(seen.iter().filter(|&&seen| seen).count(), 243);
        for byte in UNUSED..=255 {
            assert_eq!(decode(byte), (FOUR_ZEROS, 1), "byte {byte}");
        }
        assert_eq!(decode(ZEROS), (FOUR_ZEROS, 1));
        for (i, &byte) in ENCODE.iter().enumerate() {
            assert_eq!(byte == BAD, (0..5).any(|g| i >> (2 * g) & 3 == 3), "codes {i:#x}");
        }
    }
}
