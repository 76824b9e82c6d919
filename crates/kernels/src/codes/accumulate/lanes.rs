//! What a pass needs of registers of 16-bit pairs: one trait, implemented for each instruction set.

use super::super::CodeBits;

/// Heads of a pass.
pub(super) const HEADS: usize = 4;

/// The format of the bytes that a pass reads, as a constant argument.
pub(super) const EIGHT: u8 = 0;
pub(super) const FOUR: u8 = 1;
pub(super) const THREE: u8 = 2;
pub(super) const TWO: u8 = 3;
pub(super) const PLANES: u8 = 4;
/// Four bits whose codes are consecutive: the indices are as good as the codes.
pub(super) const BARE: u8 = 5;

/// The constant of a format.
pub(super) const fn format_of(bits: CodeBits) -> u8 {
    match bits {
        CodeBits::Eight => EIGHT,
        CodeBits::Four => FOUR,
        CodeBits::Three => THREE,
        CodeBits::Two => TWO,
        CodeBits::Planes => PLANES,
    }
}

/// A register of bytes, of pairs of 16-bit words, or of sums of 32 bits.
///
/// A *chunk* is `4 * LANES` positions, as many as a register has bytes. Interleaved with three other rows in lanes of 128
/// bits, its *quarter* `j` has positions `16 k + 4 j + e`: in a segment of 128, those of block `j`.
///
/// Every method may be called only where the instruction set of the implementation is enabled, and is inlined there.
pub(super) trait Lanes: Copy {
    /// Sums of a register.
    const LANES: usize;
    /// Registers of sums of a head in a pass over a whole segment, and over one of a single chunk.
    const SUMS: [usize; 2];
    /// What is added to the codes of the first two of four rows.
    const BIAS: i32;
    /// Whether the two halves of four rows' products are summed apart, as planes: 256 times the first and the second.
    const PLANES: bool;
    /// Whether passes know [`BARE`]: pairs are indices, with nothing added.
    const BARE: bool = false;
    /// Whether, under weights of blocks, `pairs` brings the blocks into the lanes of each 128 bits, so that one register of
    /// weights serves all sums; these are then transposed once.
    const TURNED: bool = false;

    /// Chunk and quarter of sum `s` of a pass.
    fn place(pass: usize, s: usize) -> (usize, usize);

    /// Requests a line into the second-level cache, where that has been found to help.
    #[inline(always)]
    fn request(line: *const u8) {
        let _ = line;
    }

    /// All zero.
    fn zero() -> Self;

    /// # Safety
    /// `p` is readable for a register.
    unsafe fn load(p: *const u8) -> Self;

    /// # Safety
    /// `p` is writable for a register.
    unsafe fn store(self, p: *mut u8);

    /// The table of codes, as the others want it.
    fn table(table: &[i8; 16]) -> Self;

    /// Codes of indices 0 to 15.
    fn look_up(table: Self, indices: Self) -> Self;

    /// Rows 0, 2, 1 and 3 of a group as pairs of words, `[rows 0 and 1, rows 2 and 3][sum]`, for the sums of a pass. Rows 0
    /// and 1 come with [`Lanes::BIAS`] added. With [`Lanes::PLANES`], twice the four bytes of the rows, in the order given.
    /// `SINGLE`: the segment has one chunk. `turn`: lane `j` of 128 bits has what is otherwise in register `j`.
    ///
    /// # Safety
    /// The rows (and `low`, for planes) are readable for a segment.
    unsafe fn pairs<const FORMAT: u8, const SINGLE: bool>(
        rows: [*const u8; 4],
        low: [*const u8; 4],
        pass: usize,
        table: Self,
        turn: bool,
    ) -> [[Self; 4]; 2];

    /// Four bytes everywhere: a pair of weights.
    ///
    /// # Safety
    /// `p` is readable for 4 bytes.
    unsafe fn everywhere(p: *const i16) -> Self;

    /// Four pairs of weights in every 128 bits; with [`Lanes::TURNED`].
    ///
    /// # Safety
    /// `p` is readable for 16 bytes.
    #[inline(always)]
    unsafe fn four_everywhere(p: *const i16) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::everywhere(p) }
    }

    /// Lane `j` of 128 bits of register `i` becomes lane `i` of register `j`; with [`Lanes::TURNED`].
    #[inline(always)]
    fn transposed(four: [Self; 4]) -> [Self; 4] {
        four
    }

    /// `acc[l] = fma((self[l] - taken) as f32, step, acc[l])`.
    ///
    /// # Safety
    /// `acc` is readable and writable for a register.
    unsafe fn add_scaled(self, taken: i32, step: f32, acc: *mut f32);

    /// Of four pairs of weights `[b0 b1 b2 -]` those of the blocks of chunk `c`, quarter `j` in a segment of three blocks.
    ///
    /// # Safety
    /// `p` is readable for 16 bytes.
    unsafe fn thirds(p: *const i16, c: usize, j: usize) -> Self;

    /// Adds the products of each pair (of four bytes, with [`Lanes::PLANES`]), modulo `2^32`.
    fn dot(self, a: Self, b: Self) -> Self;

    /// `256 * self + low`, modulo `2^32`: what planes come to.
    fn join(self, low: Self) -> Self;

    /// Sums of 32 bits, modulo `2^32`.
    fn add(self, other: Self) -> Self;
}
