//! The innermost loops of many tokens: four rows by a few tokens, in registers.

use super::lanes::{ByteLanes, request};
use super::{BLOCK_BYTES, BLOCK_COLS, TILE_ROWS, UNIT};
use std::ops::Range;

/// In the place of a group of a unit: the weights are unpacked already.
const UNPACKED: usize = 4;

/// Some blocks of a tile for `T` tokens, in 32-bit lanes.
///
/// # Safety
/// `tile` is readable for `range` of blocks, `codes` for the same columns of `T` tokens, `stride` apart.
#[inline(always)]
pub(super) unsafe fn register_tile<V: ByteLanes, const T: usize, const PACKED: bool>(
    tile: *const u8,
    range: Range<usize>,
    codes: *const i8,
    stride: usize,
    ahead: usize,
) -> [[V; TILE_ROWS]; T] {
    let mut sums = [[V::zero(); TILE_ROWS]; T];
    let mut first = range.start;
    while first < range.end {
        let some = first..range.end.min(first.saturating_add(V::MAX_BLOCKS));
        first = some.end;
        let mut acc = [[V::zero(); TILE_ROWS]; T];
        // SAFETY: the caller's.
        unsafe {
            if PACKED && T <= TILE_ROWS {
                single_pass::<V, T>(&mut acc, tile, some, codes, stride, ahead);
            } else if PACKED {
                pass::<V, T, 3>(&mut acc, tile, some.clone(), codes, stride, ahead);
                rescale(&mut acc);
                pass::<V, T, 2>(&mut acc, tile, some.clone(), codes, stride, ahead);
                rescale(&mut acc);
                pass::<V, T, 1>(&mut acc, tile, some.clone(), codes, stride, ahead);
                rescale(&mut acc);
                pass::<V, T, 0>(&mut acc, tile, some, codes, stride, ahead);
            } else {
                pass::<V, T, UNPACKED>(&mut acc, tile, 4 * some.start..4 * some.end, codes, stride, 0);
            }
        }
        if V::MAX_BLOCKS == usize::MAX {
            return acc;
        }
        for t in 0..T {
            for row in 0..TILE_ROWS {
                sums[t][row] = sums[t][row].add(acc[t][row].widen());
            }
        }
    }
    sums
}

#[inline(always)]
fn rescale<V: ByteLanes, const T: usize>(acc: &mut [[V; TILE_ROWS]; T]) {
    for t in 0..T {
        for row in 0..TILE_ROWS {
            acc[t][row] = acc[t][row].rescale();
        }
    }
}

/// Group `G` of some blocks of a packed tile, or (`G` = [`UNPACKED`]) some units of four rows of an unpacked one, for `T`
/// tokens. Group after group, one mask makes codes that are `4^G` too large, and the accumulators are taken down from
/// scale to scale exactly: no shift of weights, and one accumulator for each row and token.
///
/// # Safety
/// `tile` is readable for `range`, `codes` for the same columns of `T` tokens, `stride` apart.
#[inline(always)]
unsafe fn pass<V: ByteLanes, const T: usize, const G: usize>(
    acc: &mut [[V; TILE_ROWS]; T],
    tile: *const u8,
    range: Range<usize>,
    codes: *const i8,
    stride: usize,
    ahead: usize,
) {
    for i in range {
        let from = tile.wrapping_add(i * BLOCK_BYTES);
        let column = if G == UNPACKED { i * UNIT } else { i * BLOCK_COLS + G * UNIT };
        if G != UNPACKED {
            // A quarter of the lines in each pass.
            request(from.wrapping_add(G * UNIT + ahead));
        }
        for at in (0..UNIT).step_by(V::BYTES) {
            // SAFETY: the caller's: these columns of each row and each token.
            unsafe {
                // What there is less of stays in registers.
                if T < TILE_ROWS {
                    let mut a = [V::zero(); T];
                    for t in 0..T {
                        a[t] = V::load(codes.add(t * stride + column + at).cast());
                    }
                    for row in 0..TILE_ROWS {
                        let w = weight::<V, G>(from.add(row * UNIT + at));
                        for t in 0..T {
                            acc[t][row] = acc[t][row].dot(w, a[t]);
                        }
                    }
                } else {
                    let mut w = [V::zero(); TILE_ROWS];
                    for row in 0..TILE_ROWS {
                        w[row] = weight::<V, G>(from.add(row * UNIT + at));
                    }
                    for t in 0..T {
                        let a = V::load(codes.add(t * stride + column + at).cast());
                        for row in 0..TILE_ROWS {
                            acc[t][row] = acc[t][row].dot(w[row], a);
                        }
                    }
                }
            }
        }
    }
}

/// Some blocks of a packed tile for few tokens, which wait for memory: it would rest while [`pass`] takes later groups from
/// the cache.
///
/// # Safety
/// As [`pass`].
#[inline(always)]
unsafe fn single_pass<V: ByteLanes, const T: usize>(
    acc: &mut [[V; TILE_ROWS]; T],
    tile: *const u8,
    range: Range<usize>,
    codes: *const i8,
    stride: usize,
    ahead: usize,
) {
    for block in range {
        let from = tile.wrapping_add(block * BLOCK_BYTES);
        for row in 0..TILE_ROWS {
            if ahead > 0 {
                request(from.wrapping_add(row * UNIT + ahead));
            }
        }
        for at in (0..UNIT).step_by(V::BYTES) {
            // SAFETY: the caller's: these columns of each row and each token.
            unsafe {
                let mut w = [V::zero(); TILE_ROWS];
                for row in 0..TILE_ROWS {
                    w[row] = V::load(from.add(row * UNIT + at));
                }
                let codes = codes.add(block * BLOCK_COLS + at);
                one_group::<V, T, 0>(acc, &w, codes, stride);
                one_group::<V, T, 1>(acc, &w, codes, stride);
                one_group::<V, T, 2>(acc, &w, codes, stride);
                one_group::<V, T, 3>(acc, &w, codes, stride);
            }
        }
    }
}

/// # Safety
/// `codes` is readable for group `G` of `T` tokens, `stride` apart.
#[inline(always)]
unsafe fn one_group<V: ByteLanes, const T: usize, const G: usize>(
    acc: &mut [[V; TILE_ROWS]; T],
    w: &[V; TILE_ROWS],
    codes: *const i8,
    stride: usize,
) {
    let mut a = [V::zero(); T];
    for t in 0..T {
        // SAFETY: the caller's.
        a[t] = unsafe { V::load(codes.add(t * stride + G * UNIT).cast()) };
    }
    for row in 0..TILE_ROWS {
        let w = w[row].codes::<G>();
        for t in 0..T {
            acc[t][row] = acc[t][row].dot(w, a[t]);
        }
    }
}

/// # Safety
/// `p` is readable for a register.
#[inline(always)]
unsafe fn weight<V: ByteLanes, const G: usize>(p: *const u8) -> V {
    // SAFETY: the caller's.
    let w = unsafe { V::load(p) };
    if G == UNPACKED { w } else { w.scaled_codes::<G>() }
}
