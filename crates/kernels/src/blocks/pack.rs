//! Rounding rows to blocks, reading them back, and rounding activations to planes. Plain loops, which the compiler
//! vectorises under the features of each table.

use super::{BlockFormat, BlockShape, GROUP, LARGEST, PlaneBlock};
use crate::vector::F32x16;
use crate::{BLOCK_COLS, TILE_ROWS};

/// The smallest scale is that of activations of this size, so that no quotient overflows.
const SMALLEST: f32 = 1e-30;

/// Units of dither in a step.
const UNITS: i32 = 8192;

/// Widens bfloat16 bits.
#[inline(always)]
fn wide(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds a number that is not negative up to bfloat16.
#[inline(always)]
fn bf16_up(x: f32) -> u16 {
    ((x.to_bits() + 0xffff) >> 16) as u16
}

/// The signed codes of a row of a block, and its scales.
#[inline(always)]
fn codes(
    format: BlockFormat,
    row: &[u16; BLOCK_COLS],
    dither: &[f32; BLOCK_COLS],
) -> ([u8; BLOCK_COLS], [u16; 4]) {
    // Without the sign, the order of bfloat16 bits is the order of the numbers; what is above infinity is NaN.
    let mut lanes = [0u16; 16];
    for row in row.as_chunks::<16>().0 {
        for l in 0..16 {
            let magnitude = row[l] & 0x7fff;
            let magnitude = if magnitude > 0x7f80 { 0 } else { magnitude };
            lanes[l] = if magnitude > lanes[l] { magnitude } else { lanes[l] };
        }
    }
    let steps = format.zero() - 1;
    let mut scales = [0u16; 4];
    for s in 0..format.scales() {
        let mut largest = 0;
        for l in 0..16 {
            if format.scale_of(l) == s {
                largest = largest.max(lanes[l]);
            }
        }
        scales[s] = bf16_up(wide(largest) / steps as f32);
    }
    let mut divisors = [1.0f32; 16];
    for l in 0..16 {
        let scale = wide(scales[format.scale_of(4 * l)]);
        // A block of zeros has the scale 0 and only zeros.
        divisors[l] = if scale > 0.0 { scale } else { 1.0 };
    }
    let mut out = [0u8; BLOCK_COLS];
    let limit = steps as f32;
    for (i, row) in row.as_chunks::<GROUP>().0.iter().enumerate() {
        for j in 0..GROUP {
            let v = (wide(row[j]) / divisors[j / 4] + dither[i * GROUP + j]).round_ties_even();
            let v = if v > -limit { v } else { -limit };
            let v = if v < limit { v } else { limit };
            let v = if wide(row[j]).is_nan() || divisors[j / 4] == f32::INFINITY { 0.0 } else { v };
            // SAFETY: v is an integer between -limit and limit.
            out[i * GROUP + j] = (unsafe { v.to_int_unchecked::<i32>() } + format.zero()) as u8;
        }
    }
    (out, scales)
}

#[inline(always)]
pub(crate) fn pack_tiles<V: F32x16>(shape: BlockShape, rows: &[u16], out: &mut [u8]) {
    let BlockShape { format, cols, .. } = shape;
    let (blocks, unit) = (shape.blocks(), format.unit());
    out.fill(0);
    let dither: Vec<f32> =
        (0..blocks * BLOCK_COLS).map(|c| format.dither(c) as f32 * BlockFormat::DITHER_UNIT).collect();
    let dither = dither.as_chunks::<BLOCK_COLS>().0;
    if cols == 0 {
        return;
    }
    for (rows, tile) in rows.chunks(TILE_ROWS * cols).zip(out.chunks_exact_mut(shape.tile_bytes())) {
        let (header, units) = tile.split_at_mut(format.header(blocks));
        for r in 0..TILE_ROWS {
            let row = rows.get(r * cols..(r + 1) * cols).unwrap_or(&[]);
            for b in 0..blocks {
                let mut block = [0u16; BLOCK_COLS];
                // Rows and columns of padding are zero.
                let some = row.get(b * BLOCK_COLS..cols.min((b + 1) * BLOCK_COLS)).unwrap_or(&[]);
                block[..some.len()].copy_from_slice(some);
                let (codes, scales) = codes(format, &block, &dither[b]);
                let at = 2 * format.scales() * (b * TILE_ROWS + r);
                for (s, scale) in scales[..format.scales()].iter().enumerate() {
                    header[at + 2 * s..at + 2 * s + 2].copy_from_slice(&scale.to_le_bytes());
                }
                let unit = &mut units[(b * TILE_ROWS + r) * unit..][..unit];
                let [c0, c1, c2, c3] = [0, 1, 2, 3].map(|g| &codes[g * GROUP..(g + 1) * GROUP]);
                for j in 0..GROUP {
                    match format {
                        BlockFormat::Q6 => {
                            unit[j] = c0[j] | c3[j] << 6;
                            unit[GROUP + j] = c1[j] | (c3[j] >> 2) << 6;
                            unit[2 * GROUP + j] = c2[j] | (c3[j] >> 4) << 6;
                        }
                        BlockFormat::Q4 | BlockFormat::Q4Dither => {
                            unit[j] = c0[j] | c1[j] << 4;
                            unit[GROUP + j] = c2[j] | c3[j] << 4;
                        }
                    }
                }
            }
        }
    }
}

/// The codes of a unit, group by group.
#[inline(always)]
pub(super) fn unpack(format: BlockFormat, unit: &[u8]) -> [[u8; GROUP]; 4] {
    let mut c = [[0u8; GROUP]; 4];
    for j in 0..GROUP {
        match format {
            BlockFormat::Q6 => {
                let (a, b, d) = (unit[j], unit[GROUP + j], unit[2 * GROUP + j]);
                (c[0][j], c[1][j], c[2][j]) = (a & 63, b & 63, d & 63);
                c[3][j] = a >> 6 | b >> 6 << 2 | d >> 6 << 4;
            }
            BlockFormat::Q4 | BlockFormat::Q4Dither => {
                let (a, b) = (unit[j], unit[GROUP + j]);
                (c[0][j], c[1][j], c[2][j], c[3][j]) = (a & 15, a >> 4, b & 15, b >> 4);
            }
        }
    }
    c
}

/// The `n` scales at place `at` of a header.
pub(super) fn scales(header: &[u8], n: usize, at: usize) -> impl Iterator<Item = f32> {
    let bytes = header[2 * n * at..2 * n * (at + 1)].as_chunks::<2>().0;
    bytes.iter().map(|&bytes| wide(u16::from_le_bytes(bytes)))
}

/// The scales of the sixteen lanes of row `r` in block `b`.
#[inline(always)]
pub(super) fn lane_scales(format: BlockFormat, header: &[u8], b: usize, r: usize) -> [f32; 16] {
    let at = 2 * format.scales() * (b * TILE_ROWS + r);
    let mut lanes = [0.0; 16];
    for l in 0..16 {
        let at = at + 2 * format.scale_of(4 * l);
        lanes[l] = wide(u16::from_le_bytes([header[at], header[at + 1]]));
    }
    lanes
}

impl BlockShape {
    /// Row `r` of a tile.
    pub(super) fn read_row(&self, tile: &[u8], r: usize, out: &mut [f32]) {
        let format = self.format;
        let (header, units) = tile.split_at(format.header(self.blocks()));
        for (b, out) in out.chunks_mut(BLOCK_COLS).enumerate() {
            let scales = lane_scales(format, header, b, r);
            let codes = unpack(format, &units[(b * TILE_ROWS + r) * format.unit()..][..format.unit()]);
            let mut block = [[0.0f32; GROUP]; 4];
            for g in 0..4 {
                for j in 0..GROUP {
                    let code = i32::from(codes[g][j]) - format.zero();
                    let steps = code * UNITS - format.dither(b * BLOCK_COLS + g * GROUP + j);
                    block[g][j] = steps as f32 * BlockFormat::DITHER_UNIT * scales[j / 4];
                }
            }
            out.copy_from_slice(&block.as_flattened()[..out.len()]);
        }
    }
}

/// The lanes of a reduction in f64 by the fixed tree.
#[inline(always)]
fn tree(mut lanes: [f64; 16]) -> f64 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn square_sums<V: F32x16>(row: &[u16], approximation: &[f32]) -> (f64, f64) {
    let (mut squares, mut errors) = ([0.0f64; 16], [0.0f64; 16]);
    let mut add = |row: &[u16; 16], approximation: &[f32; 16]| {
        for l in 0..16 {
            let w = wide(row[l]);
            // Exact: both are few bits of nearly the same size, or the approximation is zero.
            let error = w - approximation[l];
            squares[l] += f64::from(w) * f64::from(w);
            errors[l] += f64::from(error) * f64::from(error);
        }
    };
    let ((rows, row_tail), (others, other_tail)) = (row.as_chunks(), approximation.as_chunks());
    for (row, other) in rows.iter().zip(others) {
        add(row, other);
    }
    let (mut row, mut other) = ([0; 16], [0.0; 16]);
    row[..row_tail.len()].copy_from_slice(row_tail);
    other[..other_tail.len()].copy_from_slice(other_tail);
    add(&row, &other);
    (tree(squares), tree(errors))
}

#[inline(always)]
pub(crate) fn quantize_planes<V: F32x16>(
    x: &[f32],
    zero: i32,
    dither: &[i16],
    planes: &mut [PlaneBlock],
) -> f32 {
    let mut odd = 0;
    for x in x {
        odd |= u32::from(x.to_bits() & 0x7f80_0000 == 0x7f80_0000);
    }
    let absmax = crate::ops::reduce::max_of::<V>(x, true);
    let absmax = if odd == 0 && absmax > SMALLEST { absmax } else { SMALLEST };
    let inverse = LARGEST / absmax;
    for ((b, planes), dither) in planes.iter_mut().enumerate().zip(dither.as_chunks::<BLOCK_COLS>().0) {
        let mut block = [0.0f32; BLOCK_COLS];
        let some = &x[b * BLOCK_COLS..x.len().min((b + 1) * BLOCK_COLS)];
        if odd == 0 {
            block[..some.len()].copy_from_slice(some);
        }
        let mut v = [0i32; BLOCK_COLS];
        for (v, x) in v.iter_mut().zip(&block) {
            // SAFETY: the product is at most 32512 and a rounding in magnitude, and finite.
            *v = unsafe { (x * inverse).round_ties_even().to_int_unchecked::<i32>() };
        }
        let (hi, lo) = (planes.hi.as_flattened_mut(), planes.lo.as_flattened_mut());
        for i in 0..BLOCK_COLS {
            let upper = (v[i] + 128) >> 8;
            hi[i] = upper as i8;
            lo[i] = (v[i] - 256 * upper) as i8;
        }
        // Both sums are below 2^31: 16 columns of at most 32512 * 4095.
        let (mut sums, mut dithers) = ([0i32; 16], [0i32; 16]);
        for (v, dither) in v.as_chunks::<GROUP>().0.iter().zip(dither.as_chunks::<GROUP>().0) {
            for l in 0..16 {
                for j in 4 * l..4 * l + 4 {
                    sums[l] += v[j];
                    dithers[l] += v[j] * i32::from(dither[j]);
                }
            }
        }
        for l in 0..16 {
            planes.start[l] = -zero * sums[l] - ((dithers[l] + UNITS / 2) >> UNITS.ilog2());
        }
    }
    if odd == 0 { absmax / LARGEST } else { f32::NAN }
}
