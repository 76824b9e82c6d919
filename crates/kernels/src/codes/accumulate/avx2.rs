//! Weighted sums with AVX2, and with the dot products of AVX-VNNI: eight sums a register, and parts of a chunk in turn, so
//! that the sums of four heads take half of the sixteen registers.

use super::super::{CodeShape, Rows, Scales};
use super::lanes::{FOUR, Lanes, PLANES, THREE, TWO};
use super::pass::accumulate;
use super::prepare::Portable;
use std::arch::x86_64::*;

/// Shifts the words of `x` right.
#[inline]
#[target_feature(enable = "avx2")]
fn down(x: __m256i, bits: usize) -> __m256i {
    _mm256_srl_epi16(x, _mm_cvtsi32_si128(bits as i32))
}

/// The bytes of four rows beside each other, quarters `2 * part` and `2 * part + 1`, as words: those of the even bytes, then
/// of the odd ones.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs([a, b, c, d]: [__m256i; 4], part: usize) -> [[__m256i; 2]; 2] {
    let (ab, cd) = if part == 0 {
        (_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d))
    } else {
        (_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d))
    };
    let (x, y) = (_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd));
    let even = |x| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
    [[even(x), even(y)], [_mm256_srai_epi16::<8>(x), _mm256_srai_epi16::<8>(y)]]
}

/// Stamps the registers of one instruction set, and its entry; `$dot` adds the products of pairs.
macro_rules! stamp {
    ($name:ident, $features:literal, $dot:ident) => {
        pub(crate) mod $name {
            use super::*;

            /// 32 bytes, 8 pairs of words or 8 sums.
            #[derive(Clone, Copy)]
            struct Y(__m256i);

            // SAFETY of all blocks below: by the contract of the trait, the instruction set is enabled; what is read and
            // written is the caller's.
            impl Lanes for Y {
                const LANES: usize = 8;
                const SUMS: [usize; 2] = [2, 2];
                const BIAS: i32 = 0;
                const PLANES: bool = false;

                /// Two quarters of a chunk.
                #[inline(always)]
                fn place(pass: usize, s: usize) -> (usize, usize) {
                    (pass / 2, pass % 2 * 2 + s)
                }

                #[inline(always)]
                fn zero() -> Y {
                    // SAFETY: see above.
                    unsafe { Y(_mm256_setzero_si256()) }
                }

                #[inline(always)]
                unsafe fn load(p: *const u8) -> Y {
                    // SAFETY: see above.
                    unsafe { Y(_mm256_loadu_si256(p.cast())) }
                }

                #[inline(always)]
                unsafe fn store(self, p: *mut u8) {
                    // SAFETY: see above.
                    unsafe { _mm256_storeu_si256(p.cast(), self.0) }
                }

                #[inline(always)]
                fn table(table: &[i8; 16]) -> Y {
                    // SAFETY: see above; the table has 16 bytes.
                    unsafe { Y(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()))) }
                }

                #[inline(always)]
                fn look_up(table: Y, indices: Y) -> Y {
                    // SAFETY: see above.
                    unsafe { Y(_mm256_shuffle_epi8(table.0, indices.0)) }
                }

                #[inline(always)]
                unsafe fn pairs<const FORMAT: u8, const SINGLE: bool>(
                    rows: [*const u8; 4],
                    low: [*const u8; 4],
                    pass: usize,
                    table: Y,
                    _: bool,
                ) -> [[Y; 4]; 2] {
                    let mut codes = [table.0; 4];
                    // SAFETY: see above.
                    unsafe {
                        for k in 0..4 {
                            codes[k] = Y::codes::<FORMAT>(rows[k], low[k], pass / 2, table).0;
                        }
                        let [first, last] = pairs(codes, pass % 2);
                        let (a, b) = ([Y(first[0]), Y(first[1])], [Y(last[0]), Y(last[1])]);
                        [[a[0], a[1], a[0], a[1]], [b[0], b[1], b[0], b[1]]]
                    }
                }

                #[inline(always)]
                unsafe fn everywhere(p: *const i16) -> Y {
                    // SAFETY: see above.
                    unsafe { Y(_mm256_set1_epi32(p.cast::<i32>().read_unaligned())) }
                }

                #[inline(always)]
                unsafe fn add_scaled(self, taken: i32, step: f32, acc: *mut f32) {
                    // SAFETY: see above.
                    unsafe {
                        let sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(self.0, _mm256_set1_epi32(taken)));
                        _mm256_storeu_ps(
                            acc,
                            _mm256_fmadd_ps(sum, _mm256_set1_ps(step), _mm256_loadu_ps(acc)),
                        );
                    }
                }

                #[inline(always)]
                unsafe fn thirds(p: *const i16, c: usize, j: usize) -> Y {
                    let lanes: [i32; 8] = std::array::from_fn(|l| ((8 * c + l / 4 * 4 + j) % 3) as i32);
                    // SAFETY: see above; the array has a register.
                    unsafe {
                        let four = _mm256_castsi128_si256(_mm_loadu_si128(p.cast()));
                        Y(_mm256_permutevar8x32_epi32(four, _mm256_loadu_si256(lanes.as_ptr().cast())))
                    }
                }

                #[inline(always)]
                fn dot(self, a: Y, b: Y) -> Y {
                    // SAFETY: see above.
                    unsafe { Y($dot(self.0, a.0, b.0)) }
                }

                #[inline(always)]
                fn join(self, low: Y) -> Y {
                    // SAFETY: see above.
                    unsafe { Y(_mm256_add_epi32(_mm256_slli_epi32::<8>(self.0), low.0)) }
                }

                #[inline(always)]
                fn add(self, other: Y) -> Y {
                    // SAFETY: see above.
                    unsafe { Y(_mm256_add_epi32(self.0, other.0)) }
                }
            }

            impl Y {
                /// The signed codes of chunk `c` of a segment of a row.
                ///
                /// # Safety
                /// As [`Lanes::pairs`].
                #[inline(always)]
                unsafe fn codes<const FORMAT: u8>(row: *const u8, low: *const u8, c: usize, table: Y) -> Y {
                    // SAFETY: see above: a segment has 128, 64, 48 or 32 bytes, and c is below 4.
                    unsafe {
                        let (four, three) = (_mm256_set1_epi8(15), _mm256_set1_epi8(3));
                        match FORMAT {
                            FOUR => {
                                let x = down(Y::load(row.add(32 * (c % 2))).0, c / 2 * 4);
                                Y::look_up(table, Y(_mm256_and_si256(x, four)))
                            }
                            TWO => Y::look_up(table, Y(_mm256_and_si256(down(Y::load(row).0, 2 * c), three))),
                            THREE => {
                                let x = _mm256_and_si256(down(Y::load(row).0, 2 * c), three);
                                let upper = row.add(32 + 4 * c).cast::<i32>().read_unaligned();
                                // Each of the four bytes eight times, then a bit of each.
                                let bytes = _mm256_shuffle_epi8(
                                    _mm256_set1_epi32(upper),
                                    _mm256_setr_epi64x(
                                        0,
                                        0x0101_0101_0101_0101,
                                        0x0202_0202_0202_0202,
                                        0x0303_0303_0303_0303,
                                    ),
                                );
                                let bits = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                                let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);
                                let x = _mm256_or_si256(x, _mm256_and_si256(set, _mm256_set1_epi8(4)));
                                Y::look_up(table, Y(x))
                            }
                            PLANES => {
                                let at = 32 * (c % 2);
                                let (high, low) = (Y::load(row.add(at)).0, Y::load(low.add(at)).0);
                                let high = if c < 2 { _mm256_slli_epi16::<4>(high) } else { high };
                                let low = _mm256_and_si256(down(low, c / 2 * 4), four);
                                Y(_mm256_or_si256(_mm256_andnot_si256(four, high), low))
                            }
                            _ => Y::load(row.add(32 * c)),
                        }
                    }
                }
            }

            /// See [`super::super::Accumulate`].
            #[target_feature(enable = $features)]
            pub(crate) fn accumulate(
                shape: CodeShape,
                weights: &[f32],
                rows: Rows<'_>,
                scales: Scales<'_>,
                acc: &mut [f32],
            ) {
                // SAFETY: the lengths agree, and the instruction sets are enabled here.
                unsafe { super::accumulate::<Y, Portable<false>>(shape, weights, rows, scales, acc) }
            }
        }
    };
}

/// Two products a lane, and an addition.
#[inline]
#[target_feature(enable = "avx2")]
fn multiply_add(acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
}

stamp!(plain, "avx2,fma,f16c", multiply_add);
stamp!(vnni, "avx2,fma,f16c,avxvnni", _mm256_dpwssd_avx_epi32);
