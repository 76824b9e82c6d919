//! Weighted sums with NEON and the int8 dot products of `dotprod`: here weights are two planes of bytes, four rows at a time,
//! since products of words would take an instruction for every four of them.

use super::super::{CodeShape, Rows, Scales};
use super::lanes::{FOUR, Lanes, PLANES, THREE, TWO};
use super::prepare::Portable;
use std::arch::aarch64::*;

/// Adds the dot products of four neighbouring bytes to each 32-bit lane. Its intrinsic is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction belongs to `dotprod`, and touches these three registers only.
    unsafe {
        std::arch::asm!(
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// 16 bytes, or 4 sums.
#[derive(Clone, Copy)]
struct Q(uint8x16_t);

impl Q {
    fn sums(self) -> int32x4_t {
        // SAFETY: every AArch64 has NEON.
        unsafe { vreinterpretq_s32_u8(self.0) }
    }

    fn of(sums: int32x4_t) -> Q {
        // SAFETY: every AArch64 has NEON.
        unsafe { Q(vreinterpretq_u8_s32(sums)) }
    }

    /// The signed codes of chunk `c` of a whole segment of a row.
    ///
    /// # Safety
    /// As [`Lanes::pairs`].
    #[inline(always)]
    unsafe fn codes<const FORMAT: u8>(row: *const u8, low: *const u8, c: usize, table: Q) -> Q {
        // SAFETY: by the contract of the trait; a segment has 128, 64, 48 or 32 bytes, and c is below 8.
        unsafe {
            let (four, three) = (vdupq_n_u8(15), vdupq_n_u8(3));
            match FORMAT {
                FOUR => {
                    let x = vshlq_u8(Q::load(row.add(16 * (c % 4))).0, vdupq_n_s8(-(c as i8 / 4 * 4)));
                    Q::look_up(table, Q(vandq_u8(x, four)))
                }
                TWO | THREE => {
                    let x = vshlq_u8(Q::load(row.add(16 * (c % 2))).0, vdupq_n_s8(-(c as i8 / 2 * 2)));
                    let x = vandq_u8(x, three);
                    if FORMAT == TWO {
                        return Q::look_up(table, Q(x));
                    }
                    let upper = row.add(32 + 2 * c).cast::<[u8; 2]>().read_unaligned();
                    let bytes = vcombine_u8(vdup_n_u8(upper[0]), vdup_n_u8(upper[1]));
                    let bits = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
                    let set = vandq_u8(vtstq_u8(bytes, bits), vdupq_n_u8(4));
                    Q::look_up(table, Q(vorrq_u8(x, set)))
                }
                PLANES => {
                    let at = 16 * (c % 4);
                    let (high, low) = (Q::load(row.add(at)).0, Q::load(low.add(at)).0);
                    let shift = c as i8 / 4 * 4;
                    let high = vshlq_u8(high, vdupq_n_s8(4 - shift));
                    let low = vshlq_u8(low, vdupq_n_s8(-shift));
                    Q(vbslq_u8(four, low, high))
                }
                _ => Q::load(row.add(16 * c)),
            }
        }
    }
}

// SAFETY of all blocks below: by the contract of the trait, the instruction set is enabled; what is read and written is the
// caller's.
impl Lanes for Q {
    const LANES: usize = 4;
    const SUMS: [usize; 2] = [2, 2];
    const BIAS: i32 = 0;
    const PLANES: bool = true;

    /// Two quarters of a chunk.
    #[inline(always)]
    fn place(pass: usize, s: usize) -> (usize, usize) {
        (pass / 2, pass % 2 * 2 + s)
    }

    #[inline(always)]
    fn zero() -> Q {
        // SAFETY: see above.
        unsafe { Q(vdupq_n_u8(0)) }
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Q {
        // SAFETY: see above.
        unsafe { Q(vld1q_u8(p)) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: see above.
        unsafe { vst1q_u8(p, self.0) }
    }

    #[inline(always)]
    fn table(table: &[i8; 16]) -> Q {
        // SAFETY: see above; the table has 16 bytes.
        unsafe { Q::load(table.as_ptr().cast()) }
    }

    #[inline(always)]
    fn look_up(table: Q, indices: Q) -> Q {
        // SAFETY: see above.
        unsafe { Q(vqtbl1q_u8(table.0, indices.0)) }
    }

    #[inline(always)]
    unsafe fn pairs<const FORMAT: u8, const SINGLE: bool>(
        rows: [*const u8; 4],
        low: [*const u8; 4],
        pass: usize,
        table: Q,
        _: bool,
    ) -> [[Q; 4]; 2] {
        let mut codes = [table.0; 4];
        // SAFETY: see above.
        unsafe {
            for k in 0..4 {
                codes[k] = Q::codes::<FORMAT>(rows[k], low[k], pass / 2, table).0;
            }
            let [a, b, c, d] = codes;
            let (ab, cd) = if pass.is_multiple_of(2) {
                (vzip1q_u8(a, b), vzip1q_u8(c, d))
            } else {
                (vzip2q_u8(a, b), vzip2q_u8(c, d))
            };
            let (ab, cd) = (vreinterpretq_u16_u8(ab), vreinterpretq_u16_u8(cd));
            let first = Q(vreinterpretq_u8_u16(vzip1q_u16(ab, cd)));
            let second = Q(vreinterpretq_u8_u16(vzip2q_u16(ab, cd)));
            [[first, second, first, second]; 2]
        }
    }

    #[inline(always)]
    unsafe fn everywhere(p: *const i16) -> Q {
        // SAFETY: see above.
        unsafe { Q(vreinterpretq_u8_u32(vdupq_n_u32(p.cast::<u32>().read_unaligned()))) }
    }

    #[inline(always)]
    unsafe fn add_scaled(self, taken: i32, step: f32, acc: *mut f32) {
        // SAFETY: see above.
        unsafe {
            let sum = vcvtq_f32_s32(vsubq_s32(self.sums(), vdupq_n_s32(taken)));
            vst1q_f32(acc, vfmaq_f32(vld1q_f32(acc), sum, vdupq_n_f32(step)));
        }
    }

    #[inline(always)]
    unsafe fn thirds(p: *const i16, c: usize, j: usize) -> Q {
        // Four lanes of one quarter are one word of a block.
        // SAFETY: see above.
        unsafe { Q::everywhere(p.add((4 * c + j) % 3 * 2)) }
    }

    #[inline(always)]
    fn dot(self, a: Q, b: Q) -> Q {
        // SAFETY: see above.
        unsafe { Q::of(sdot(self.sums(), vreinterpretq_s8_u8(a.0), vreinterpretq_s8_u8(b.0))) }
    }

    #[inline(always)]
    fn join(self, low: Q) -> Q {
        // SAFETY: see above.
        unsafe { Q::of(vaddq_s32(vshlq_n_s32::<8>(self.sums()), low.sums())) }
    }

    #[inline(always)]
    fn add(self, other: Q) -> Q {
        // SAFETY: see above.
        unsafe { Q::of(vaddq_s32(self.sums(), other.sums())) }
    }
}

/// See [`super::Accumulate`].
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn accumulate(
    shape: CodeShape,
    weights: &[f32],
    rows: Rows<'_>,
    scales: Scales<'_>,
    acc: &mut [f32],
) {
    // SAFETY: the lengths agree, and the instruction sets are enabled here.
    unsafe { super::pass::accumulate::<Q, Portable<true>>(shape, weights, rows, scales, acc) }
}
