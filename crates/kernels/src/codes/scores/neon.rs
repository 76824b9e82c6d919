//! Scores with NEON and the int8 dot products of `dotprod`: signed bytes on both sides, and the lanes of a product are the
//! blocks.

use super::super::query::{HEADS, QUARTERS};
use super::super::{QueryBits, SEGMENT};
use super::portable::{Dots, token_by_token};
use super::{QueryCodes, ScoreTable, Work};
use crate::ternary::neon::sdot;
use std::arch::aarch64::*;

pub(crate) static TABLE: ScoreTable = ScoreTable { wide: false, quantize, scores };

struct Neon;

impl Dots for Neon {
    #[inline(always)]
    fn look_up(bytes: &mut [u8; SEGMENT], table: &[i8; 16]) {
        // SAFETY: by the contract of the trait NEON is enabled; the table has 16 bytes, and so has a part of the 128.
        unsafe {
            let table = vreinterpretq_u8_s8(vld1q_s8(table.as_ptr()));
            for part in bytes.chunks_exact_mut(16) {
                vst1q_u8(part.as_mut_ptr(), vqtbl1q_u8(table, vld1q_u8(part.as_ptr())));
            }
        }
    }

    #[inline(always)]
    fn products(query: &QueryCodes, at: usize, codes: &[u8; SEGMENT]) -> [[i32; 4]; HEADS] {
        let segment = &query.segments[at];
        let both = query.bits == QueryBits::Sixteen;
        let mut sums = [[0; 4]; HEADS];
        // SAFETY: by the contract of the trait NEON and `dotprod` are enabled; a quarter has sixteen codes, and a head
        // sixteen places in each plane of it, and four sums.
        unsafe {
            let [mut hi, mut lo] = [[vdupq_n_s32(0); HEADS]; 2];
            for q in 0..QUARTERS {
                let codes = vreinterpretq_s8_u8(vld1q_u8(codes.as_ptr().add(16 * q)));
                for h in 0..HEADS {
                    hi[h] = sdot(hi[h], codes, vld1q_s8(segment.hi[q][h].as_ptr()));
                    if both {
                        lo[h] = sdot(lo[h], codes, vld1q_s8(segment.lo[q][h].as_ptr()));
                    }
                }
            }
            for h in 0..HEADS {
                let sum = if both { vaddq_s32(vshlq_n_s32::<8>(hi[h]), lo[h]) } else { hi[h] };
                vst1q_s32(sums[h].as_mut_ptr(), sum);
            }
        }
        sums
    }
}

#[target_feature(enable = "neon,dotprod")]
fn scores(work: Work<'_>, out: &mut [f32], largest: &mut [f32]) {
    token_by_token::<Neon>(work, out, largest);
}

#[target_feature(enable = "neon,dotprod")]
fn quantize(queries: &[f32], out: &mut QueryCodes) {
    super::super::query::quantize(queries, out, false);
}
