//! Weighted sums with AVX-512: with VNNI two products a lane and an addition are one instruction, without it two.
//!
//! For four rows of 128 bytes and four heads with scales of blocks: 64 dot products, 16 shuffles to bring four rows side by
//! side and 16 that bring the blocks of a row into neighbouring lanes, so that a register of weights serves four sums; 16
//! operations to words, 32 loads, and 21 operations to round the weights. Two loads a product are free; what shares
//! their two ports is not: masked shuffles in place of the interleaving were slower from the second-level cache.

use super::super::ahead::request;
use super::super::avx512::dot_add;
use super::super::{CodeShape, Rows, Scales};
use super::lanes::{BARE, FOUR, Lanes, PLANES, THREE, TWO};
use super::pass::accumulate;
use super::rounding::Rounding;
use std::arch::x86_64::*;

/// 64 bytes of each of four rows.
///
/// # Safety
/// They are readable, `at` bytes behind the pointers.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_four(rows: [*const u8; 4], at: usize) -> [__m512i; 4] {
    // SAFETY: the caller's.
    unsafe { rows.map(|row| _mm512_loadu_si512(row.wrapping_add(at).cast())) }
}

/// 32 bytes of each of four rows, twice in a register.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn halves_twice(rows: [*const u8; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's.
    unsafe { rows.map(|row| _mm512_broadcast_i64x4(_mm256_loadu_si256(row.cast()))) }
}

/// Byte `4 b + e` of each 128 bits to place `4 e + b`, if asked.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn turned<const N: usize>(rows: [__m512i; N], turn: bool) -> [__m512i; N] {
    let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let order = _mm512_broadcast_i32x4(order);
    let mut rows = rows;
    if turn {
        for row in &mut rows {
            *row = _mm512_shuffle_epi8(*row, order);
        }
    }
    rows
}

/// Even and odd indices of packed pairs of nibbles as words: of the lower nibbles, then of the upper ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bare_words([a, b]: [__m512i; 2]) -> [[__m512i; 4]; 2] {
    let four = _mm512_set1_epi16(15);
    let lower = |x: __m512i| _mm512_and_si512(x, four);
    [
        [lower(a), lower(b), lower(_mm512_srli_epi16::<4>(a)), lower(_mm512_srli_epi16::<4>(b))],
        [
            lower(_mm512_srli_epi16::<8>(a)),
            lower(_mm512_srli_epi16::<8>(b)),
            _mm512_srli_epi16::<12>(a),
            _mm512_srli_epi16::<12>(b),
        ],
    ]
}

/// The bytes of four rows beside each other: quarters `2 * pass` and `2 * pass + 1`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleaved([a, b, c, d]: [__m512i; 4], pass: usize) -> [__m512i; 2] {
    let (ab, cd) = if pass == 0 {
        (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d))
    } else {
        (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d))
    };
    [_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd)]
}

/// Even bytes plus 128 and odd bytes, as words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn words(bytes: __m512i) -> [__m512i; 2] {
    // (bytes & 255) ^ 128.
    let even = _mm512_ternarylogic_epi32::<0x6a>(bytes, _mm512_set1_epi16(255), _mm512_set1_epi16(128));
    [even, _mm512_srai_epi16::<8>(bytes)]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn looked_up(indices: [__m512i; 4], table: __m512i) -> [__m512i; 4] {
    indices.map(|i| _mm512_shuffle_epi8(table, i))
}

/// From packed pairs of nibbles to the codes of the lower ones, then of the upper ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles([a, b]: [__m512i; 2], table: __m512i) -> [__m512i; 4] {
    let four = _mm512_set1_epi8(15);
    let all = [a, b, _mm512_srli_epi16::<4>(a), _mm512_srli_epi16::<4>(b)];
    looked_up(all.map(|x| _mm512_and_si512(x, four)), table)
}

/// The codes of two planes, those of lower nibbles, then of upper ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn joined(high: [__m512i; 2], low: [__m512i; 2]) -> [__m512i; 4] {
    let four = _mm512_set1_epi8(15);
    // Where the mask has ones the lower plane, elsewhere the upper.
    let lower = |i: usize| _mm512_ternarylogic_epi32::<0xca>(four, low[i], _mm512_slli_epi16::<4>(high[i]));
    let upper = |i: usize| _mm512_ternarylogic_epi32::<0xca>(four, _mm512_srli_epi16::<4>(low[i]), high[i]);
    [lower(0), lower(1), upper(0), upper(1)]
}

/// Pairs of bits of bytes that stand in both halves: the first two quarters of the row, then the last two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bits_of_halves([a, b]: [__m512i; 2]) -> [__m512i; 4] {
    let halves = |low: i16, high: i16| {
        let low = _mm512_castsi256_si512(_mm256_set1_epi16(low));
        _mm512_inserti64x4::<1>(low, _mm256_set1_epi16(high))
    };
    let (first, last) = (halves(0, 2), halves(4, 6));
    let all = [
        _mm512_srlv_epi16(a, first),
        _mm512_srlv_epi16(b, first),
        _mm512_srlv_epi16(a, last),
        _mm512_srlv_epi16(b, last),
    ];
    all.map(|x| _mm512_and_si512(x, _mm512_set1_epi8(3)))
}

/// The indices of a row of three bits.
///
/// # Safety
/// `row` is readable for 48 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn three_bits(row: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        let x = _mm512_broadcast_i64x4(_mm256_loadu_si256(row.cast()));
        let [a, _, b, _] = bits_of_halves([x, x]);
        let upper = row.add(32).cast::<[u64; 2]>().read_unaligned();
        let four = _mm512_set1_epi8(4);
        [_mm512_mask_add_epi8(a, upper[0], a, four), _mm512_mask_add_epi8(b, upper[1], b, four)]
    }
}

/// Stamps the registers of one instruction set, and its entry; `$dot` adds the products of pairs.
macro_rules! stamp {
    ($name:ident, $features:literal, $dot:ident) => {
        pub(crate) mod $name {
            use super::*;

            /// 64 bytes, 16 pairs of words or 16 sums.
            #[derive(Clone, Copy)]
            struct Z(__m512i);

            // SAFETY of all blocks below: by the contract of the trait, the instruction set is enabled; what is read and
            // written is the caller's.
            impl Lanes for Z {
                const LANES: usize = 16;
                const SUMS: [usize; 2] = [4, 2];
                const BIAS: i32 = 128;
                const PLANES: bool = false;
                const BARE: bool = true;
                const TURNED: bool = true;

                /// Two quarters of both chunks.
                #[inline(always)]
                fn place(pass: usize, s: usize) -> (usize, usize) {
                    (s / 2, 2 * pass + s % 2)
                }

                #[inline(always)]
                fn request(line: *const u8) {
                    request(line);
                }

                #[inline(always)]
                fn zero() -> Z {
                    // SAFETY: see above.
                    unsafe { Z(_mm512_setzero_si512()) }
                }

                #[inline(always)]
                unsafe fn load(p: *const u8) -> Z {
                    // SAFETY: see above.
                    unsafe { Z(_mm512_loadu_si512(p.cast())) }
                }

                #[inline(always)]
                unsafe fn store(self, p: *mut u8) {
                    // SAFETY: see above.
                    unsafe { _mm512_storeu_si512(p.cast(), self.0) }
                }

                #[inline(always)]
                fn table(table: &[i8; 16]) -> Z {
                    // SAFETY: see above; the table has 16 bytes.
                    unsafe { Z(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()))) }
                }

                #[inline(always)]
                fn look_up(table: Z, indices: Z) -> Z {
                    // SAFETY: see above.
                    unsafe { Z(_mm512_shuffle_epi8(table.0, indices.0)) }
                }

                #[inline(always)]
                unsafe fn pairs<const FORMAT: u8, const SINGLE: bool>(
                    rows: [*const u8; 4],
                    low: [*const u8; 4],
                    pass: usize,
                    table: Z,
                    turn: bool,
                ) -> [[Z; 4]; 2] {
                    let mut all = [[table; 4]; 2];
                    // SAFETY: see above.
                    unsafe {
                        if FORMAT == BARE {
                            let both = bare_words(interleaved(turned(load_four(rows, 0), turn), pass));
                            for s in 0..4 {
                                (all[0][s], all[1][s]) = (Z(both[0][s]), Z(both[1][s]));
                            }
                            return all;
                        }
                        let quarters = match FORMAT {
                            FOUR => nibbles(interleaved(turned(load_four(rows, 0), turn), pass), table.0),
                            PLANES => {
                                let high = interleaved(turned(load_four(rows, 0), turn), pass);
                                joined(high, interleaved(turned(load_four(low, 0), turn), pass))
                            }
                            TWO => {
                                let rows = turned(halves_twice(rows), turn);
                                let low = bits_of_halves(interleaved(rows, pass));
                                looked_up(low, table.0)
                            }
                            THREE => {
                                let mut four = [[table.0; 4]; 2];
                                for k in 0..4 {
                                    let three = turned(three_bits(rows[k]), turn);
                                    (four[0][k], four[1][k]) = (three[0], three[1]);
                                }
                                let [a, b] = [interleaved(four[0], pass), interleaved(four[1], pass)];
                                looked_up([a[0], a[1], b[0], b[1]], table.0)
                            }
                            _ => {
                                let a = interleaved(turned(load_four(rows, 0), turn), pass);
                                let b = if SINGLE {
                                    a
                                } else {
                                    interleaved(turned(load_four(rows, 64), turn), pass)
                                };
                                [a[0], a[1], b[0], b[1]]
                            }
                        };
                        for s in 0..Z::SUMS[usize::from(SINGLE)] {
                            let [first, last] = words(quarters[s]);
                            (all[0][s], all[1][s]) = (Z(first), Z(last));
                        }
                    }
                    all
                }

                #[inline(always)]
                unsafe fn everywhere(p: *const i16) -> Z {
                    // SAFETY: see above.
                    unsafe { Z(_mm512_set1_epi32(p.cast::<i32>().read_unaligned())) }
                }

                #[inline(always)]
                unsafe fn four_everywhere(p: *const i16) -> Z {
                    // SAFETY: see above.
                    unsafe { Z(_mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()))) }
                }

                #[inline(always)]
                fn transposed([a, b, c, d]: [Z; 4]) -> [Z; 4] {
                    // SAFETY: see above.
                    unsafe {
                        let [ab, cd] = [_mm512_unpacklo_epi32(a.0, b.0), _mm512_unpacklo_epi32(c.0, d.0)];
                        let [ef, gh] = [_mm512_unpackhi_epi32(a.0, b.0), _mm512_unpackhi_epi32(c.0, d.0)];
                        [
                            Z(_mm512_unpacklo_epi64(ab, cd)),
                            Z(_mm512_unpackhi_epi64(ab, cd)),
                            Z(_mm512_unpacklo_epi64(ef, gh)),
                            Z(_mm512_unpackhi_epi64(ef, gh)),
                        ]
                    }
                }

                #[inline(always)]
                unsafe fn add_scaled(self, taken: i32, step: f32, acc: *mut f32) {
                    // SAFETY: see above.
                    unsafe {
                        let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(self.0, _mm512_set1_epi32(taken)));
                        _mm512_storeu_ps(
                            acc,
                            _mm512_fmadd_ps(sum, _mm512_set1_ps(step), _mm512_loadu_ps(acc)),
                        );
                    }
                }

                #[inline(always)]
                unsafe fn thirds(p: *const i16, c: usize, j: usize) -> Z {
                    let lanes: [i32; 16] = std::array::from_fn(|l| ((16 * c + l / 4 * 4 + j) % 3) as i32);
                    // SAFETY: see above; the array has a register.
                    unsafe {
                        let four = _mm512_castsi128_si512(_mm_loadu_si128(p.cast()));
                        Z(_mm512_permutexvar_epi32(_mm512_loadu_si512(lanes.as_ptr().cast()), four))
                    }
                }

                #[inline(always)]
                fn dot(self, a: Z, b: Z) -> Z {
                    // SAFETY: see above.
                    unsafe { Z($dot(self.0, a.0, b.0)) }
                }

                #[inline(always)]
                fn join(self, low: Z) -> Z {
                    // SAFETY: see above.
                    unsafe { Z(_mm512_add_epi32(_mm512_slli_epi32::<8>(self.0), low.0)) }
                }

                #[inline(always)]
                fn add(self, other: Z) -> Z {
                    // SAFETY: see above.
                    unsafe { Z(_mm512_add_epi32(self.0, other.0)) }
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
                unsafe { super::accumulate::<Z, Rounding>(shape, weights, rows, scales, acc) }
            }
        }
    };
}

/// Two products a lane, and an addition.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn multiply_add(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(acc, _mm512_madd_epi16(a, b))
}

stamp!(bw, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl", multiply_add);
stamp!(vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", dot_add);
