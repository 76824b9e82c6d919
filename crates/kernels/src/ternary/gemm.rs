//! The walk of many tokens over the weights, block by block: see [`super::blocking`] for why.

use super::blocking::{Blocking, Machine};
use super::lanes::{ByteLanes, finish};
use super::register_tile::register_tile;
use super::{Activations, BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, Tiles};
use std::cell::RefCell;

/// Tokens of the largest register tile of any instruction set.
pub(super) const MOST_TOKENS: usize = 6;

/// A row block meeting a token group.
pub(super) struct Panel<'a> {
    /// Tiles, packed or unpacked.
    weights: &'a [u8],
    /// Blocks of columns.
    blocks: usize,
    /// Blocks of columns at a time.
    part_blocks: usize,
    /// `[tokens][cols]`.
    codes: &'a [i8],
    sums: &'a [i32],
    scales: &'a [f32],
    /// Sums of the parts so far: `[tiles][tokens][4]` registers, where there is more than one part.
    saved: &'a mut [Line],
    /// How far ahead packed weights are requested; 0 for not.
    ahead: usize,
    /// `[tokens][stride]`, from the first row of the row block on.
    out: &'a mut [f32],
    stride: usize,
    rows: usize,
}

/// A cache line of scratch memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// Memory that a thread keeps for the products of many tokens.
struct Scratch {
    /// Weights of a row block.
    unpacked: Vec<Line>,
    /// Sums of parts.
    saved: Vec<Line>,
    /// Activations of a token group, if those of the caller cross cache lines.
    codes: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> =
        const { RefCell::new(Scratch { unpacked: Vec::new(), saved: Vec::new(), codes: Vec::new() }) };
}

/// What [`gemm`] needs of an instruction set; the functions require it.
pub(super) struct Products {
    /// By tokens less one; packed weights.
    pub(super) packed: [unsafe fn(Panel<'_>); MOST_TOKENS],
    /// By tokens less one; unpacked weights.
    pub(super) unpacked: [unsafe fn(Panel<'_>); MOST_TOKENS],
    /// Packed tiles into `[block][group][row][64 codes]`.
    pub(super) unpack: unsafe fn(&[u8], &mut [Line]),
    pub(super) gemv: unsafe fn(Tiles<'_>, Activations<'_>, &mut [f32]),
    /// [`ByteLanes::TOKENS`], [`ByteLanes::BYTES`].
    pub(super) tokens: usize,
    pub(super) bytes: usize,
}

/// Some tiles times any number of tokens, block by block: see [`super::blocking`].
///
/// # Safety
/// The processor has the instruction set of `products`.
pub(super) unsafe fn gemm(
    products: &Products,
    machine: Machine,
    tiles: Tiles<'_>,
    activations: Activations<'_>,
    out: &mut [f32],
) {
    let (tokens, cols) = (activations.sums.len(), tiles.blocks * BLOCK_COLS);
    if tokens == 1 {
        // SAFETY: the caller's.
        return unsafe { (products.gemv)(tiles, activations, out) };
    }
    let plan = Blocking::new(machine, tokens, tiles.blocks, products.tokens);
    let tile_bytes = tiles.blocks * BLOCK_BYTES;
    let row_tiles = plan.tiles.min(tiles.rows.div_ceil(TILE_ROWS)).max(1);
    SCRATCH.with_borrow_mut(|Scratch { unpacked, saved, codes: aligned }| {
        if plan.part_blocks < tiles.blocks {
            let lines =
                (row_tiles * products.tokens * TILE_ROWS * products.bytes).div_ceil(size_of::<Line>());
            saved.resize(saved.len().max(lines), Line([0; 64]));
        }
        for row in (0..tiles.rows).step_by(row_tiles * TILE_ROWS) {
            let rows = (tiles.rows - row).min(row_tiles * TILE_ROWS);
            let bytes = row / TILE_ROWS * tile_bytes..(row + rows).div_ceil(TILE_ROWS) * tile_bytes;
            let mut weights = &tiles.data[bytes];
            if plan.unpack {
                let lines = weights.len() * 4 / size_of::<Line>();
                unpacked.resize(unpacked.len().max(lines), Line([0; 64]));
                // SAFETY: the caller's.
                unsafe { (products.unpack)(weights, &mut unpacked[..lines]) };
                weights = bytes_of(&unpacked[..lines]);
            }
            for group in 0..plan.groups {
                let some = tokens * group / plan.groups..tokens * (group + 1) / plan.groups;
                let mut codes = &activations.codes[some.start * cols..some.end * cols];
                // Loads across lines cost twice, and every code is loaded once for each tile.
                if codes.as_ptr().align_offset(size_of::<Line>()) != 0 && row_tiles > 1 {
                    let lines = codes.len() / size_of::<Line>();
                    aligned.resize(aligned.len().max(lines), Line([0; 64]));
                    for (to, from) in aligned.iter_mut().zip(codes.as_chunks::<64>().0) {
                        to.0 = from.map(|code: i8| code as u8);
                    }
                    codes = &codes_of(aligned)[..codes.len()];
                }
                let panel = Panel {
                    weights,
                    blocks: tiles.blocks,
                    part_blocks: plan.part_blocks,
                    codes,
                    sums: &activations.sums[some.clone()],
                    scales: &activations.scales[some.clone()],
                    saved,
                    ahead: if plan.request_ahead && group == 0 { PREFETCH_BYTES } else { 0 },
                    out: &mut out[some.start * tiles.rows + row..some.end * tiles.rows],
                    stride: tiles.rows,
                    rows,
                };
                let panels = if plan.unpack { &products.unpacked } else { &products.packed };
                // SAFETY: the caller's.
                unsafe { panels[some.len() - 1](panel) };
            }
        }
    });
}

fn bytes_of(lines: &[Line]) -> &[u8] {
    // SAFETY: a line is 64 initialised bytes without padding.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}

fn codes_of(lines: &[Line]) -> &[i8] {
    // SAFETY: as above; any bits are a signed byte.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}

/// See [`Products::unpack`].
#[inline(always)]
pub(super) fn unpack<V: ByteLanes>(packed: &[u8], out: &mut [Line]) {
    assert_eq!(packed.len() * 4, size_of_val(out));
    let out = out.as_mut_ptr().cast::<u8>();
    for (block, bytes) in packed.chunks_exact(BLOCK_BYTES).enumerate() {
        for at in (0..BLOCK_BYTES).step_by(V::BYTES) {
            // SAFETY: a register of the block's 256 bytes, and of the 4 x 256 bytes that the block becomes.
            unsafe {
                let w = V::load(bytes.as_ptr().add(at));
                let to = out.add(block * BLOCK_BYTES * 4 + at);
                w.codes::<0>().store(to);
                w.codes::<1>().store(to.add(BLOCK_BYTES));
                w.codes::<2>().store(to.add(2 * BLOCK_BYTES));
                w.codes::<3>().store(to.add(3 * BLOCK_BYTES));
            }
        }
    }
}

/// A row block meets a token group of `T` tokens.
#[inline(always)]
pub(super) fn panel<V: ByteLanes, const T: usize, const PACKED: bool>(p: Panel<'_>) {
    let tile_bytes = p.blocks * BLOCK_BYTES * if PACKED { 1 } else { 4 };
    let (cols, tiles) = (p.blocks * BLOCK_COLS, p.rows.div_ceil(TILE_ROWS));
    let tile_sums = T * TILE_ROWS * V::BYTES;
    assert!(p.weights.len() >= tiles * tile_bytes && p.codes.len() >= T * cols && p.part_blocks > 0);
    assert!(p.part_blocks >= p.blocks || size_of_val(p.saved) >= tiles * tile_sums);
    let saved = p.saved.as_mut_ptr().cast::<u8>();
    let mut first = 0;
    while first < p.blocks {
        let last = p.blocks.min(first + p.part_blocks);
        for tile in 0..tiles {
            let weights = p.weights[tile * tile_bytes..].as_ptr();
            // SAFETY: tile < tiles and last <= blocks, so by the assertion all weights and codes exist.
            let mut acc = unsafe {
                register_tile::<V, T, PACKED>(weights, first..last, p.codes.as_ptr(), cols, p.ahead)
            };
            for t in 0..T {
                for row in 0..TILE_ROWS {
                    let at = saved.wrapping_add(tile * tile_sums + (t * TILE_ROWS + row) * V::BYTES);
                    // SAFETY: with more than one part, `saved` has room for the register tiles of all tiles.
                    unsafe {
                        if first > 0 {
                            acc[t][row] = acc[t][row].add(V::load(at));
                        }
                        if last < p.blocks {
                            acc[t][row].store(at);
                        }
                    }
                }
            }
            if last == p.blocks {
                let rows = tile * TILE_ROWS..p.rows.min((tile + 1) * TILE_ROWS);
                for t in 0..T {
                    let out = &mut p.out[t * p.stride..][rows.clone()];
                    finish(V::sum4(acc[t]), p.sums[t], p.scales[t], out);
                }
            }
        }
        first = last;
    }
}
