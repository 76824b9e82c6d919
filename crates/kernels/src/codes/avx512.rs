//! Stored rows as bytes, with AVX-512: the codes of a segment plus 128, the unsigned operand of byte products; and the
//! product of words that scores and sums share.

use super::layout::{Segment, spread};
use super::{CodeBits, CodeShape, Rows, SEGMENT};
use std::arch::x86_64::*;

/// [`CodeBits`] as a constant of a compiled body.
pub(crate) const EIGHT: u8 = 0;
pub(crate) const FOUR: u8 = 1;
pub(crate) const THREE: u8 = 2;
pub(crate) const TWO: u8 = 3;
pub(crate) const PLANES: u8 = 4;
/// Added to the formats of indices: the table is left out, the indices themselves are the bytes.
pub(crate) const BARE: u8 = 8;

/// Bytes of a whole segment (of each plane).
pub(crate) const fn segment_bytes(bits: u8) -> usize {
    match bits & !BARE {
        EIGHT => SEGMENT,
        FOUR | PLANES => SEGMENT / 2,
        THREE => SEGMENT * 3 / 8,
        _ => SEGMENT / 4,
    }
}

/// Rows of one shape, ready to be read.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    shape: CodeShape,
    rows: Rows<'a>,
    /// The table plus 128, four times.
    table: __m512i,
}

impl<'a> Reader<'a> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(crate) fn new(shape: CodeShape, rows: Rows<'a>) -> Reader<'a> {
        // SAFETY: a table has sixteen bytes.
        let table = unsafe { _mm_loadu_si128(rows.table.as_ptr().cast()) };
        let table = _mm512_xor_si512(_mm512_broadcast_i32x4(table), _mm512_set1_epi8(-128));
        Reader { shape, rows, table }
    }

    /// The code of index 0 where the codes are consecutive, so that the indices are as good as the codes.
    pub(crate) fn origin(&self) -> Option<i32> {
        self.rows.consecutive(self.shape.bits)
    }

    /// The biased bytes of segment `s` of row `t`, whose positions are 128; bare indices with [`BARE`].
    ///
    /// # Safety
    /// There is such a row, with such a segment, and `BITS` are those of the shape.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) unsafe fn segment<const BITS: u8>(&self, t: usize, s: usize) -> [__m512i; 2] {
        // SAFETY: the caller's.
        unsafe { self.segment_at::<BITS>(t * self.shape.row_bytes() + s * segment_bytes(BITS)) }
    }

    /// As [`Reader::segment`], of the segment that begins `at` bytes behind the first.
    ///
    /// # Safety
    /// As there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) unsafe fn segment_at<const BITS: u8>(&self, at: usize) -> [__m512i; 2] {
        let flip = _mm512_set1_epi8(-128);
        let low = _mm512_set1_epi8(15);
        debug_assert!(at + segment_bytes(BITS) <= self.rows.codes.len());
        // SAFETY: a whole segment lies here, of 128, 64, 48 or 32 bytes, and in two planes the same in the lower one.
        unsafe {
            let codes = self.rows.codes.as_ptr().add(at);
            match BITS & !BARE {
                EIGHT => {
                    let a = _mm512_loadu_si512(codes.cast());
                    let b = _mm512_loadu_si512(codes.add(64).cast());
                    [_mm512_xor_si512(a, flip), _mm512_xor_si512(b, flip)]
                }
                FOUR => {
                    let x = _mm512_loadu_si512(codes.cast());
                    let a = _mm512_and_si512(x, low);
                    let b = _mm512_and_si512(_mm512_srli_epi16::<4>(x), low);
                    self.look_up::<BITS>([a, b])
                }
                PLANES => {
                    let hi = _mm512_loadu_si512(codes.cast());
                    let lo = _mm512_loadu_si512(self.rows.low.as_ptr().add(at).cast());
                    // `mask ? x : y` is the truth table 0xca.
                    let a = _mm512_ternarylogic_epi32::<0xca>(low, lo, _mm512_slli_epi16::<4>(hi));
                    let b = _mm512_ternarylogic_epi32::<0xca>(low, _mm512_srli_epi16::<4>(lo), hi);
                    [_mm512_xor_si512(a, flip), _mm512_xor_si512(b, flip)]
                }
                _ => {
                    let x = _mm512_broadcast_i64x4(_mm256_loadu_si256(codes.cast()));
                    let three = _mm512_set1_epi8(3);
                    let [p, q] = [_mm512_srlv_epi16(x, halves(0, 2)), _mm512_srlv_epi16(x, halves(4, 6))];
                    let [mut p, mut q] = [_mm512_and_si512(p, three), _mm512_and_si512(q, three)];
                    if BITS & !BARE == THREE {
                        let four = _mm512_set1_epi8(4);
                        let upper = codes.add(32).cast::<u64>();
                        p = _mm512_mask_add_epi8(p, upper.read_unaligned(), p, four);
                        q = _mm512_mask_add_epi8(q, upper.add(1).read_unaligned(), q, four);
                    }
                    self.look_up::<BITS>([p, q])
                }
            }
        }
    }

    /// The biased codes of indices, or the indices.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn look_up<const BITS: u8>(&self, [a, b]: [__m512i; 2]) -> [__m512i; 2] {
        if BITS & BARE != 0 {
            [a, b]
        } else {
            [_mm512_shuffle_epi8(self.table, a), _mm512_shuffle_epi8(self.table, b)]
        }
    }

    /// The biased bytes of a segment of any length and any format, at the positions of a whole one. Where a number does not
    /// exist the byte is that of an index 0, or of a code 0.
    ///
    /// # Safety
    /// There is such a row, with such a segment.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) unsafe fn any_segment(&self, t: usize, s: usize) -> [__m512i; 2] {
        if (s + 1) * SEGMENT <= self.shape.padded() {
            // SAFETY: the caller's row, with a whole segment.
            return unsafe {
                match self.shape.bits {
                    CodeBits::Eight => self.segment::<EIGHT>(t, s),
                    CodeBits::Four => self.segment::<FOUR>(t, s),
                    CodeBits::Three => self.segment::<THREE>(t, s),
                    CodeBits::Two => self.segment::<TWO>(t, s),
                    CodeBits::Planes => self.segment::<PLANES>(t, s),
                }
            };
        }
        let mut bytes = [0u8; SEGMENT];
        spread(Segment::new(self.shape, self.rows, t, s), &mut bytes);
        // SAFETY: there are 128 bytes.
        let [a, b] = unsafe {
            [_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_loadu_si512(bytes.as_ptr().add(64).cast())]
        };
        if self.shape.bits.is_signed() {
            let flip = _mm512_set1_epi8(-128);
            [_mm512_xor_si512(a, flip), _mm512_xor_si512(b, flip)]
        } else {
            self.look_up::<FOUR>([a, b])
        }
    }
}

/// `a` in the 16-bit lanes of the first half, `b` in the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn halves(a: i16, b: i16) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_set1_epi16(a), _mm256_set1_epi16(b))
}

/// Two products a lane and their sum, added. As an instruction of its own: the compiler would take it apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn dot_add(mut acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction belongs to AVX-512 VNNI, and touches these registers only.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {acc}, {a}, {b}",
            acc = inout(zmm_reg) acc,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}
