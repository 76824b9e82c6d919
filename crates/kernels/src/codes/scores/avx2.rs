//! Scores with AVX2: bytes widened to 16 bits against queries of 16 bits, so that nothing saturates.

use super::super::SEGMENT;
use super::super::query::{HEADS, QUARTERS};
use super::portable::{Dots, token_by_token};
use super::{QueryCodes, ScoreTable, Work};
use std::arch::x86_64::*;

pub(crate) static TABLE: ScoreTable = ScoreTable { wide: true, quantize, scores };

struct Wide;

impl Dots for Wide {
    #[inline(always)]
    fn look_up(bytes: &mut [u8; SEGMENT], table: &[i8; 16]) {
        // SAFETY: by the contract of the trait AVX2 is enabled; the table has 16 bytes and a register 32 of the 128.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            for part in bytes.chunks_exact_mut(32) {
                let p = part.as_mut_ptr().cast();
                _mm256_storeu_si256(p, _mm256_shuffle_epi8(table, _mm256_loadu_si256(p)));
            }
        }
    }

    #[inline(always)]
    fn products(query: &QueryCodes, at: usize, codes: &[u8; SEGMENT]) -> [[i32; 4]; HEADS] {
        let wide = &query.wide[at].0;
        let mut sums = [[0; 4]; HEADS];
        // SAFETY: by the contract of the trait AVX2 is enabled; a quarter has sixteen codes, and a head sixteen places in it.
        unsafe {
            let mut acc = [_mm256_setzero_si256(); HEADS];
            for q in 0..QUARTERS {
                let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().add(16 * q).cast()));
                for h in 0..HEADS {
                    let query = _mm256_load_si256(wide[q][h].as_ptr().cast());
                    acc[h] = _mm256_add_epi32(acc[h], _mm256_madd_epi16(codes, query));
                }
            }
            for h in [0, 2] {
                // Two lanes of a block lie side by side: `[h: b0 b1, h+1: b0 b1 | h: b2 b3, h+1: b2 b3]`.
                let two = _mm256_permute4x64_epi64::<0xd8>(_mm256_hadd_epi32(acc[h], acc[h + 1]));
                _mm256_storeu_si256(sums[h..h + 2].as_mut_ptr().cast(), two);
            }
        }
        sums
    }
}

#[target_feature(enable = "avx2,fma")]
fn scores(work: Work<'_>, out: &mut [f32], largest: &mut [f32]) {
    token_by_token::<Wide>(work, out, largest);
}

#[target_feature(enable = "avx2,fma")]
fn quantize(queries: &[f32], out: &mut QueryCodes) {
    super::super::query::quantize(queries, out, true);
}

/// The same body with the registers of AVX-512.
pub(crate) mod bw {
    use super::*;

    pub(crate) static TABLE: ScoreTable = ScoreTable { wide: true, quantize, scores };

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn scores(work: Work<'_>, out: &mut [f32], largest: &mut [f32]) {
        token_by_token::<Wide>(work, out, largest);
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn quantize(queries: &[f32], out: &mut QueryCodes) {
        super::super::super::query::quantize(queries, out, true);
    }
}
