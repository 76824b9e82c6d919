//! The block products in plain Rust.

use super::pack::{lane_scales, unpack};
use super::{BlockFormat, BlockTable, Blocks, GROUP, PlaneBlock};
use crate::TILE_ROWS;
use crate::vector::{F32x16, S16, load};

pub(crate) static TABLE: BlockTable = BlockTable { q6, q4 };

fn q6(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
    product(BlockFormat::Q6, tiles, planes, scale, out);
}

fn q4(tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
    product(BlockFormat::Q4, tiles, planes, scale, out);
}

#[inline(always)]
fn product(format: BlockFormat, tiles: Blocks<'_>, planes: &[PlaneBlock], scale: f32, out: &mut [f32]) {
    let unit = format.unit();
    let tile_bytes = format.header(tiles.blocks) + tiles.blocks * TILE_ROWS * unit;
    for (t, out) in out[..tiles.rows].chunks_mut(TILE_ROWS).enumerate() {
        let tile = &tiles.data[t * tile_bytes..(t + 1) * tile_bytes];
        let (header, units) = tile.split_at(format.header(tiles.blocks));
        for (r, o) in out.iter_mut().enumerate() {
            let mut acc = [0.0f32; 16];
            for (b, planes) in planes[..tiles.blocks].iter().enumerate() {
                let codes = unpack(format, &units[(b * TILE_ROWS + r) * unit..][..unit]);
                let mut sums = planes.start;
                for g in 0..4 {
                    for j in 0..GROUP {
                        let v = 256 * i32::from(planes.hi[g][j]) + i32::from(planes.lo[g][j]);
                        sums[j / 4] += i32::from(codes[g][j]) * v;
                    }
                }
                let scales = lane_scales(format, header, b, r);
                for l in 0..16 {
                    acc[l] = (sums[l] as f32).mul_add(scales[l], acc[l]);
                }
            }
            *o = load::<S16>(&acc).sum() * scale;
        }
    }
}
