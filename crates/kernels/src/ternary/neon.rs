//! The integer products with NEON and the int8 dot products of `dotprod`: four bytes at a time straight into 32 bits.
//!
//! Codes are 0, 1 or 2, so they are the same as signed bytes, which is what the instruction multiplies. For one token,
//! groups 1 and 2 are separated by a mask alone: each is summed in an accumulator of its own with codes that are 4 or
//! 16 times too large (32 at most), and shifted back exactly at the end of the tile. Group 3 would be too large for a
//! signed byte; a shift alone brings it down to the scale of group 0.

use super::{Activations, BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, TernaryTable, Tiles, UNIT};
use crate::vector::{F32x16, N16};
use std::arch::aarch64::*;

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

/// Bytes of a register.
const WIDTH: usize = 16;
/// Tokens of a register tile: sixteen accumulators, four registers of weights and four of activations, of 32.
const MOST_TOKENS: usize = 4;
/// Activation codes of the tokens that one pass over the weights serves: half of a usual second-level cache.
const TOKEN_GROUP_BYTES: usize = 512 << 10;

/// Adds the dot products of four neighbouring bytes to each 32-bit lane. Its intrinsic is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
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

/// The codes of a group, which are the same as signed and as unsigned bytes.
#[inline]
#[target_feature(enable = "neon")]
fn signed(codes: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(codes)
}

/// Turns the sums of codes into results: `(dot - sum) as f32 * scale`, for the rows that exist.
#[inline]
#[target_feature(enable = "neon")]
fn finish(v: [int32x4_t; TILE_ROWS], sum: i32, scale: f32, out: &mut [f32]) {
    let dots = vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
    let scaled = vmulq_n_f32(vcvtq_f32_s32(vsubq_s32(dots, vdupq_n_s32(sum))), scale);
    if let Ok(four) = <&mut [f32; TILE_ROWS]>::try_from(&mut *out) {
        // SAFETY: an array of four is writable for four.
        unsafe { vst1q_f32(four.as_mut_ptr(), scaled) };
        return;
    }
    let mut four = [0.0; TILE_ROWS];
    // SAFETY: an array of four is writable for four.
    unsafe { vst1q_f32(four.as_mut_ptr(), scaled) };
    out.copy_from_slice(&four[..out.len()]);
}

#[target_feature(enable = "neon,dotprod")]
fn gemv(tiles: Tiles<'_>, activations: Activations<'_>, out: &mut [f32]) {
    let tile_bytes = tiles.blocks * BLOCK_BYTES;
    let codes = &activations.codes[..tiles.blocks * BLOCK_COLS];
    assert!(tiles.data.len() >= tiles.rows.div_ceil(TILE_ROWS) * tile_bytes);
    let (sum, scale) = (activations.sums[0], activations.scales[0]);
    for (tile, out) in out[..tiles.rows].chunks_mut(TILE_ROWS).enumerate() {
        // SAFETY: the assertion above leaves a whole tile here, and codes has a block of activations for each of its.
        let acc =
            unsafe { tile_sums(tiles.data.as_ptr().add(tile * tile_bytes), tiles.blocks, codes.as_ptr()) };
        finish(acc, sum, scale, out);
    }
}

/// The four rows of one tile for one token.
///
/// # Safety
/// `tile` is readable for `blocks` blocks of weights, `codes` for `blocks` blocks of activations.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile_sums(tile: *const u8, blocks: usize, codes: *const i8) -> [int32x4_t; TILE_ROWS] {
    let masks = [vdupq_n_u8(3), vdupq_n_u8(3 << 2), vdupq_n_u8(3 << 4)];
    let mut acc = [[vdupq_n_s32(0); 3]; TILE_ROWS];
    for block in 0..blocks {
        for row in 0..TILE_ROWS {
            // A request beyond the end of the matrix is harmless: prefetches do not fault.
            N16::prefetch(tile.wrapping_add(block * BLOCK_BYTES + row * UNIT + PREFETCH_BYTES));
        }
        for part in (0..UNIT).step_by(WIDTH) {
            let mut a = [vdupq_n_s8(0); 4];
            for g in 0..4 {
                // SAFETY: block < blocks, g < 4 and part + 16 <= 64: 16 codes of this block.
                a[g] = unsafe { vld1q_s8(codes.add(block * BLOCK_COLS + g * UNIT + part)) };
            }
            for row in 0..TILE_ROWS {
                // SAFETY: block < blocks; a unit has 64 bytes.
                let w = unsafe { vld1q_u8(tile.add(block * BLOCK_BYTES + row * UNIT + part)) };
                for g in 0..3 {
                    acc[row][g] = sdot(acc[row][g], signed(vandq_u8(w, masks[g])), a[g]);
                }
                acc[row][0] = sdot(acc[row][0], signed(vshrq_n_u8::<6>(w)), a[3]);
            }
        }
    }
    let mut sums = [vdupq_n_s32(0); TILE_ROWS];
    for row in 0..TILE_ROWS {
        let [low, middle, high] = acc[row];
        sums[row] = vsraq_n_s32::<4>(vsraq_n_s32::<2>(low, middle), high);
    }
    sums
}

/// One tile for `T` tokens, whose codes lie `blocks * 256` apart. Here a shift pays: it is shared by the tokens, and
/// leaves one accumulator for each row and token.
///
/// # Safety
/// `tile` is readable for `blocks` blocks, `codes` for `T` tokens.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn token_sums<const T: usize>(
    tile: *const u8,
    blocks: usize,
    codes: *const i8,
) -> [[int32x4_t; TILE_ROWS]; T] {
    let three = vdupq_n_u8(3);
    let mut acc = [[vdupq_n_s32(0); TILE_ROWS]; T];
    for block in 0..blocks {
        for part in (0..UNIT).step_by(WIDTH) {
            let mut w = [vdupq_n_u8(0); TILE_ROWS];
            for row in 0..TILE_ROWS {
                // SAFETY: block < blocks; a unit has 64 bytes.
                w[row] = unsafe { vld1q_u8(tile.add(block * BLOCK_BYTES + row * UNIT + part)) };
            }
            // Written out: the compiler leaves a loop over the groups, with a branch for each.
            macro_rules! group {
                ($g:literal, $w:ident => $group:expr) => {
                    let mut a = [vdupq_n_s8(0); T];
                    for t in 0..T {
                        let at = t * blocks * BLOCK_COLS + block * BLOCK_COLS + $g * UNIT + part;
                        // SAFETY: t < T, block < blocks, g < 4, part + 16 <= 64: 16 codes of this token and block.
                        a[t] = unsafe { vld1q_s8(codes.add(at)) };
                    }
                    for row in 0..TILE_ROWS {
                        let $w = w[row];
                        let group = signed($group);
                        for t in 0..T {
                            acc[t][row] = sdot(acc[t][row], group, a[t]);
                        }
                    }
                };
            }
            group!(0, w => vandq_u8(w, three));
            group!(1, w => vandq_u8(vshrq_n_u8::<2>(w), three));
            group!(2, w => vandq_u8(vshrq_n_u8::<4>(w), three));
            group!(3, w => vshrq_n_u8::<6>(w));
        }
    }
    acc
}

/// `T` tokens of one tile, into `out[token][row]`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn tile_tokens<const T: usize>(
    tiles: &Tiles<'_>,
    activations: &Activations<'_>,
    tile: usize,
    t: usize,
    out: &mut [f32],
) {
    let cols = tiles.blocks * BLOCK_COLS;
    let data = &tiles.data[tile * tiles.blocks * BLOCK_BYTES..][..tiles.blocks * BLOCK_BYTES];
    let codes = &activations.codes[t * cols..][..T * cols];
    // SAFETY: data is one tile and codes are T tokens.
    let acc = unsafe { token_sums::<T>(data.as_ptr(), tiles.blocks, codes.as_ptr()) };
    let rows = tile * TILE_ROWS..tiles.rows.min((tile + 1) * TILE_ROWS);
    for (i, acc) in acc.into_iter().enumerate() {
        let out = &mut out[(t + i) * tiles.rows..][rows.clone()];
        finish(acc, activations.sums[t + i], activations.scales[t + i], out);
    }
}

#[target_feature(enable = "neon,dotprod")]
fn gemm(tiles: Tiles<'_>, activations: Activations<'_>, out: &mut [f32]) {
    let tokens = activations.sums.len();
    let cols = tiles.blocks * BLOCK_COLS;
    let group = (TOKEN_GROUP_BYTES / cols.max(1)).next_multiple_of(MOST_TOKENS).max(MOST_TOKENS);
    for start in (0..tokens).step_by(group) {
        let end = tokens.min(start + group);
        for tile in 0..tiles.rows.div_ceil(TILE_ROWS) {
            for t in (start..end).step_by(MOST_TOKENS) {
                match end - t {
                    1 => tile_tokens::<1>(&tiles, &activations, tile, t, out),
                    2 => tile_tokens::<2>(&tiles, &activations, tile, t, out),
                    3 => tile_tokens::<3>(&tiles, &activations, tile, t, out),
                    _ => tile_tokens::<MOST_TOKENS>(&tiles, &activations, tile, t, out),
                }
            }
        }
    }
}
