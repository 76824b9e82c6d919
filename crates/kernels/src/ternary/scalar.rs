//! The integer products in plain Rust.

use super::{Activations, BLOCK_BYTES, BLOCK_COLS, TILE_ROWS, TernaryTable, Tiles, UNIT};

pub(crate) static TABLE: TernaryTable = TernaryTable { gemv, gemm };

/// Sums of code times activation for the four rows of a tile.
fn tile_sums(tile: &[u8], codes: &[i8]) -> [i32; TILE_ROWS] {
    let mut sums = [0; TILE_ROWS];
    for (block, a) in tile.chunks_exact(BLOCK_BYTES).zip(codes.chunks_exact(BLOCK_COLS)) {
        for (sum, unit) in sums.iter_mut().zip(block.chunks_exact(UNIT)) {
            for (g, a) in a.chunks_exact(UNIT).enumerate() {
                for (&w, &a) in unit.iter().zip(a) {
                    *sum += i32::from(w >> (2 * g) & 3) * i32::from(a);
                }
            }
        }
    }
    sums
}

fn gemv(tiles: Tiles<'_>, activations: Activations<'_>, out: &mut [f32]) {
    for (tile, out) in tiles.data.chunks_exact(tiles.blocks * BLOCK_BYTES).zip(out.chunks_mut(TILE_ROWS)) {
        for (o, sum) in out.iter_mut().zip(tile_sums(tile, activations.codes)) {
            *o = (sum - activations.sums[0]) as f32 * activations.scales[0];
        }
    }
}

fn gemm(tiles: Tiles<'_>, activations: Activations<'_>, out: &mut [f32]) {
    let cols = tiles.blocks * BLOCK_COLS;
    for (t, out) in out.chunks_mut(tiles.rows).enumerate() {
        let one = Activations {
            codes: &activations.codes[t * cols..][..cols],
            sums: &activations.sums[t..=t],
            scales: &activations.scales[t..=t],
        };
        gemv(tiles, one, out);
    }
}
