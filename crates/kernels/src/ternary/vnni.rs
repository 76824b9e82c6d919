//! The integer products with AVX-512 VNNI: four bytes at a time straight into 32 bits.
//!
//! Groups are separated by a mask alone: the codes of group `g` are `4^g` too large (128 at most, an unsigned byte), and
//! their sums are shifted back exactly. For one token each group has accumulators of its own; several tokens need the
//! registers, so there group follows group (see `register_tile.rs`).

use super::avx512::Z;
use super::lanes::{ByteLanes, request, stamp_gemv, stamp_products};
use super::{BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, TernaryTable, UNIT};
use std::arch::x86_64::*;

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

/// 64 bytes, or 16 sums of 32 bits.
#[derive(Clone, Copy)]
struct V(__m512i);

impl ByteLanes for V {
    const BYTES: usize = 64;
    const TOKENS: usize = 6;
    const MAX_BLOCKS: usize = usize::MAX;

    #[inline(always)]
    fn zero() -> V {
        V(Z::zero().0)
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        // SAFETY: the caller's.
        V(unsafe { Z::load(p) }.0)
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: the caller's.
        unsafe { Z(self.0).store(p) }
    }

    #[inline(always)]
    fn codes<const G: usize>(self) -> V {
        V(Z(self.0).group::<G>())
    }

    #[inline(always)]
    fn scaled_codes<const G: usize>(self) -> V {
        // SAFETY: by the contract of the trait, AVX-512 is enabled here.
        unsafe { V(_mm512_and_si512(self.0, _mm512_set1_epi8((3u8 << (2 * G)) as i8))) }
    }

    #[inline(always)]
    fn rescale(self) -> V {
        // SAFETY: by the contract of the trait, AVX-512 is enabled here.
        unsafe { V(_mm512_srai_epi32::<2>(self.0)) }
    }

    #[inline(always)]
    fn dot(self, codes: V, activations: V) -> V {
        // SAFETY: by the contract of the trait, AVX-512 VNNI is enabled here.
        unsafe { V(_mm512_dpbusd_epi32(self.0, codes.0, activations.0)) }
    }

    #[inline(always)]
    fn widen(self) -> V {
        self
    }

    #[inline(always)]
    fn add(self, o: V) -> V {
        V(Z(self.0).add(Z(o.0)).0)
    }

    #[inline(always)]
    fn sum4(v: [V; TILE_ROWS]) -> __m128i {
        Z::sum_lanes([v[0].0, v[1].0, v[2].0, v[3].0])
    }
}

/// As [`super::lanes::tile_sums`], with accumulators for each group: four ANDs and four dot products for 256 weights.
///
/// # Safety
/// `tile` is readable for `blocks` blocks of weights, `codes` for `blocks` blocks of activations.
#[inline(always)]
unsafe fn tile_sums<L: ByteLanes, const AHEAD: bool>(
    tile: *const u8,
    blocks: usize,
    codes: *const i8,
) -> [L; TILE_ROWS] {
    let mut acc = [[L::zero(); 4]; TILE_ROWS];
    for block in 0..blocks {
        let mut a = [L::zero(); 4];
        for g in 0..4 {
            // SAFETY: block < blocks and g < 4: 64 codes of this block.
            a[g] = unsafe { L::load(codes.add(block * BLOCK_COLS + g * UNIT).cast()) };
        }
        for row in 0..TILE_ROWS {
            let unit = tile.wrapping_add(block * BLOCK_BYTES + row * UNIT);
            if AHEAD {
                request(unit.wrapping_add(PREFETCH_BYTES));
            }
            // SAFETY: block < blocks; a unit has 64 bytes.
            let w = unsafe { L::load(unit) };
            acc[row][0] = acc[row][0].dot(w.scaled_codes::<0>(), a[0]);
            acc[row][1] = acc[row][1].dot(w.scaled_codes::<1>(), a[1]);
            acc[row][2] = acc[row][2].dot(w.scaled_codes::<2>(), a[2]);
            acc[row][3] = acc[row][3].dot(w.scaled_codes::<3>(), a[3]);
        }
    }
    let mut sums = [L::zero(); TILE_ROWS];
    for row in 0..TILE_ROWS {
        for g in (0..4).rev() {
            // The sums of group 3 are 64 times too large, those of all groups so far 4 times those of the next.
            sums[row] = sums[row].rescale().add(acc[row][g]);
        }
    }
    sums
}

stamp_gemv!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", V, tile_sums);
stamp_products!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", V);
