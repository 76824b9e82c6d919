//! Five ternary codes in a byte: the digits of a number in base 3, stored as the fixed-point fraction
//! `ceil(number * 256 / 243)`, so that multiplying by three brings out one digit after the other.

/// What brings digit `k` to the front, the most significant being digit 0.
pub(super) const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

/// The most significant digit of a byte.
#[inline(always)]
pub(super) const fn first(byte: u8) -> u8 {
    ((byte as u16 * 3) >> 8) as u8
}

/// The byte of five digits, each at most 2, the most significant first.
pub(super) fn byte(digit: impl Fn(usize) -> u8) -> u8 {
    let number = (0..5).fold(0, |number, k| number * 3 + u16::from(digit(k)));
    // The largest number is 242, and its byte 255.
    (number * 256).div_ceil(243) as u8
}

/// The five digits of every byte, one a byte, the least significant in the lowest.
pub(super) static LEAST_FIRST: [u64; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut k = 0;
        while k < 5 {
            let digit = first((byte as u8).wrapping_mul(POWERS[4 - k]));
            table[byte] |= (digit as u64) << (8 * k);
            k += 1;
        }
        byte += 1;
    }
    table
};
