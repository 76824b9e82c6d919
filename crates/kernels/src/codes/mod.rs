//! Rows of small integer codes: what quantised keys and values are stored as, and integer products straight from them.
//!
//! # Layout
//! A row of `dims` numbers is padded to a multiple of 32 and cut into segments of 128; the last segment may have 32, 64
//! or 96. In a segment of `m` with `m / 32` blocks, number `i` stands at position `4 * ((i % 32 / 4) * (m / 32) + i / 32) +
//! i % 4`: in a segment of 128, four-byte lane `l` belongs to block `l % 4`, so that the scales of blocks of 32 cost no sum
//! of their own. A segment packs its positions as follows; segments of a row and rows of an array follow each other without
//! gaps, and may begin at any byte.
//!
//! - [`CodeBits::Eight`]: byte `p` is the code of position `p`, signed.
//! - [`CodeBits::Four`]: `m / 2` bytes, byte `j` = `index[j] | index[m/2 + j] << 4`.
//! - [`CodeBits::Two`]: `m / 4` bytes, byte `j` = `index[j] | index[m/4 + j] << 2 | index[m/2 + j] << 4 | index[3m/4 + j]
//!   << 6`.
//! - [`CodeBits::Three`]: the lower two bits as above, then `m / 8` bytes with the upper bit of position `p` at bit `p % 8`
//!   of byte `p / 8`.
//! - [`CodeBits::Planes`]: an 8-bit code in two arrays of four bits each, `code >> 4 & 15` and `code & 15`. The upper array
//!   alone is a row of [`CodeBits::Four`] with [`HIGH_NIBBLES`].
//!
//! Below 8 bits an index stands for a signed byte of a table of up to sixteen ([`Rows::table`]): uniform steps and
//! codebooks are read alike. Positions of padding hold 0 (as an index, too): what meets them is zero or is dropped.
//!
//! Scales lie elsewhere ([`Scales`]), so that a run of rows may begin at any row.

pub(crate) mod accumulate;
pub(crate) mod ahead;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod encode;
mod layout;
pub(crate) mod query;
pub(crate) mod scores;

pub use accumulate::MOST_ROWS;
pub(crate) use encode::{encode_int8, magnitudes, round_codes};
pub use layout::position;
pub(crate) use layout::{pack, unpack};
pub use query::{QueryBits, QueryCodes};

/// Numbers of a block: as many as share a scale of [`Scales::Block`], and the unit that rows are padded to.
pub const CODE_BLOCK: usize = 32;
/// Positions of a segment, but for the last one of a row.
pub(crate) const SEGMENT: usize = 128;
/// Blocks of a whole segment.
pub(crate) const SEGMENT_BLOCKS: usize = SEGMENT / CODE_BLOCK;

/// The table of indices that are the lower four bits of a signed code: 0 to 7, then -8 to -1.
pub const SIGNED_NIBBLES: [i8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1];
/// The table that reads the upper array of [`CodeBits::Planes`] alone: [`SIGNED_NIBBLES`] times 16.
pub const HIGH_NIBBLES: [i8; 16] = [0, 16, 32, 48, 64, 80, 96, 112, -128, -112, -96, -80, -64, -48, -32, -16];

/// How many bits a code has, and where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeBits {
    /// Signed bytes.
    Eight,
    /// Indices 0 to 15.
    Four,
    /// Indices 0 to 7.
    Three,
    /// Indices 0 to 3.
    Two,
    /// Signed bytes as two arrays of four bits.
    Planes,
}

impl CodeBits {
    /// Every one, from the widest to the narrowest, then [`CodeBits::Planes`].
    pub const ALL: [CodeBits; 5] =
        [CodeBits::Eight, CodeBits::Four, CodeBits::Three, CodeBits::Two, CodeBits::Planes];

    /// Bits that a number takes in an array.
    pub const fn width(self) -> usize {
        match self {
            CodeBits::Eight => 8,
            CodeBits::Four | CodeBits::Planes => 4,
            CodeBits::Three => 3,
            CodeBits::Two => 2,
        }
    }

    /// Whether what is stored is the code itself, and no index into a table.
    pub const fn is_signed(self) -> bool {
        matches!(self, CodeBits::Eight | CodeBits::Planes)
    }
}

/// The shape of a row of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodeShape {
    /// Numbers of a row: a multiple of 8.
    pub dims: usize,
    /// How they are packed.
    pub bits: CodeBits,
}

impl CodeShape {
    /// Blocks of 32 numbers, the last one padded.
    pub const fn blocks(&self) -> usize {
        self.dims.div_ceil(CODE_BLOCK)
    }

    /// Positions of a row.
    pub const fn padded(&self) -> usize {
        self.blocks() * CODE_BLOCK
    }

    /// Bytes of a row; of [`CodeBits::Planes`], in each of the two arrays.
    pub const fn row_bytes(&self) -> usize {
        self.padded() * self.bits.width() / 8
    }

    /// How many rows there are, after a check of all lengths; `who` says in the message who asked.
    ///
    /// # Panics
    /// The arrays are not whole rows, or not the arrays of this shape.
    pub(crate) fn count(&self, rows: Rows<'_>, who: &str) -> usize {
        self.check(who);
        let n = rows.codes.len() / self.row_bytes().max(1);
        assert_eq!(rows.codes.len(), n * self.row_bytes(), "{who}: rows of {self:?}");
        let low = if self.bits == CodeBits::Planes { rows.codes.len() } else { 0 };
        assert_eq!(rows.low.len(), low, "{who}: lower plane of {self:?}");
        n
    }

    /// # Panics
    /// The number of dimensions is not one that rows can have.
    pub(crate) fn check(&self, who: &str) {
        assert!(self.dims > 0 && self.dims.is_multiple_of(8), "{who}: rows of {} numbers", self.dims);
    }
}

/// Stored rows of a [`CodeShape`], as kernels read them: `n` rows, which is what the length of the arrays says.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The rows; of [`CodeBits::Planes`], their upper halves.
    pub codes: &'a [u8],
    /// The lower halves of [`CodeBits::Planes`], otherwise empty.
    pub low: &'a [u8],
    /// What an index stands for; not read where the codes are signed. Entries beyond the largest index are not read.
    pub table: &'a [i8; 16],
    /// The bytes of the rows that are read next, where that is known: they are requested from memory in time.
    pub upcoming: &'a [u8],
}

impl<'a> Rows<'a> {
    /// Rows of [`CodeBits::Eight`].
    pub fn bytes(codes: &'a [u8]) -> Rows<'a> {
        Rows { codes, low: &[], table: &SIGNED_NIBBLES, upcoming: &[] }
    }

    /// Rows of indices into `table`.
    pub fn indices(codes: &'a [u8], table: &'a [i8; 16]) -> Rows<'a> {
        Rows { codes, low: &[], table, upcoming: &[] }
    }

    /// Rows of [`CodeBits::Planes`].
    pub fn planes(high: &'a [u8], low: &'a [u8]) -> Rows<'a> {
        Rows { codes: high, low, table: &SIGNED_NIBBLES, upcoming: &[] }
    }

    /// The code of index 0 where the codes of all indices are consecutive, so that indices are as good as codes.
    pub(crate) fn consecutive(&self, bits: CodeBits) -> Option<i32> {
        let origin = i32::from(self.table[0]);
        let mut codes = self.table.iter().zip(origin..).take(1 << bits.width());
        (!bits.is_signed() && codes.all(|(&code, i)| i32::from(code) == i)).then_some(origin)
    }

    /// The same rows, with those that are read next.
    #[must_use]
    pub fn before(self, upcoming: &'a [u8]) -> Rows<'a> {
        Rows { upcoming, ..self }
    }
}

/// The factors of stored rows.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// None: every factor is 1.
    One,
    /// One a row: `[n]`.
    Row(&'a [f32]),
    /// One for 32 numbers: `[n][blocks]`.
    Block(&'a [f32]),
}

impl Scales<'_> {
    /// # Panics
    /// There are not as many as `n` rows have.
    pub(crate) fn check(&self, shape: CodeShape, n: usize, who: &str) {
        match self {
            Scales::One => {}
            Scales::Row(scales) => assert_eq!(scales.len(), n, "{who}: scales of rows"),
            Scales::Block(scales) => assert_eq!(scales.len(), n * shape.blocks(), "{who}: scales of blocks"),
        }
    }
}
