//! Blocks of two-bit codes, which I2_S, TQ2_0 and IQ2_BN share: `G` bytes hold `4 * G` codes, and byte `j` holds the
//! codes `j`, `j + G`, `j + 2 * G` and `j + 3 * G` of its block. The formats differ in `G` and in which end of the byte
//! comes first. Eight bytes at a time; a code is `weight + 1`.

/// Shifts of the four groups when the first stands in the low bits.
pub(super) const LOW_FIRST: [u32; 4] = [0, 2, 4, 6];
/// Shifts of the four groups when the first stands in the high bits.
pub(super) const HIGH_FIRST: [u32; 4] = [6, 4, 2, 0];

/// What a run of codes contains.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    /// A code other than 1.
    pub nonzero: bool,
    /// A code of 3.
    pub bad: bool,
}

/// Unpacks whole blocks: `codes` has four entries for each of the `bytes`, a multiple of `G`.
#[inline(always)]
pub(super) fn unpack<const G: usize>(bytes: &[u8], shifts: [u32; 4], codes: &mut [u8]) -> Seen {
    const PICK: u64 = 0x0303_0303_0303_0303;
    const ONES: u64 = 0x5555_5555_5555_5555;
    let (mut nonzero, mut bad) = (0, 0);
    for (block, codes) in bytes.chunks_exact(G).zip(codes.chunks_exact_mut(4 * G)) {
        for (j, eight) in block.as_chunks::<8>().0.iter().enumerate() {
            let word = u64::from_le_bytes(*eight);
            nonzero |= word ^ ONES;
            bad |= word & word >> 1;
            for (group, shift) in shifts.into_iter().enumerate() {
                codes[group * G + 8 * j..][..8].copy_from_slice(&(word >> shift & PICK).to_le_bytes());
            }
        }
    }
    Seen { nonzero: nonzero != 0, bad: bad & ONES != 0 }
}

/// Packs whole blocks of codes, none above 2.
pub(super) fn pack<const G: usize>(codes: &[u8], shifts: [u32; 4], out: &mut Vec<u8>) {
    for block in codes.chunks_exact(4 * G) {
        for j in 0..G {
            out.push((0..4).fold(0, |byte, group| byte | block[group * G + j] << shifts[group]));
        }
    }
}
