//! The integer products, written once over [`ByteLanes`]: a register of bytes with the instruction set's own dot product.
//!
//! The bodies are compiled per instruction set by [`stamp_products`]. As in `crate::vector`, the methods of an
//! implementation may be *called* only where its instruction set is enabled, and never from closures.

use super::blocking::{Blocking, Machine};
use super::{Activations, BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, Tiles, UNIT};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Tokens of the largest register tile of any instruction set.
pub(super) const MOST_TOKENS: usize = 6;
/// In the place of a group of a unit: the weights are unpacked already.
const UNPACKED: usize = 4;

/// A register of bytes or of sums. See the module for who may call its methods.
pub(super) trait ByteLanes: Copy {
    /// Bytes of the register.
    const BYTES: usize;
    /// Tokens of a register tile: accumulators for 4 rows of so many tokens, and operands, fit the registers.
    const TOKENS: usize;
    /// Blocks of columns whose products [`ByteLanes::dot`] can sum before [`ByteLanes::widen`].
    const MAX_BLOCKS: usize;

    fn zero() -> Self;

    /// # Safety
    /// `p` is readable for a register.
    unsafe fn load(p: *const u8) -> Self;

    /// # Safety
    /// `p` is writable for a register.
    unsafe fn store(self, p: *mut u8);

    /// The codes of group `G` of some bytes of a unit: 0, 1 or 2.
    fn codes<const G: usize>(self) -> Self;

    /// The codes of group `G` times `4^G`, where that spares an instruction and the accumulator has room for it.
    #[inline(always)]
    fn scaled_codes<const G: usize>(self) -> Self {
        self.codes::<G>()
    }

    /// Takes an accumulator of scaled codes of group `G` to the scale of group `G - 1`.
    #[inline(always)]
    fn rescale(self) -> Self {
        self
    }

    /// Adds the products of unsigned `codes` and signed `activations` to an accumulator.
    fn dot(self, codes: Self, activations: Self) -> Self;

    /// An accumulator in lanes of 32 bits.
    fn widen(self) -> Self;

    /// Adds lanes of 32 bits.
    fn add(self, o: Self) -> Self;

    /// Sums the 32-bit lanes of each of four vectors.
    fn sum4(v: [Self; TILE_ROWS]) -> __m128i;
}

/// Turns the sums of codes into results: `(dot - sum) as f32 * scale`, for the rows that exist.
#[inline(always)]
pub(super) fn finish(dots: __m128i, sum: i32, scale: f32, out: &mut [f32]) {
    let mut four = [0i32; TILE_ROWS];
    // SAFETY: an array of four is writable for four; every x86-64 has this instruction.
    unsafe { _mm_storeu_si128(four.as_mut_ptr().cast(), dots) };
    for (o, dot) in out.iter_mut().zip(four) {
        *o = (dot - sum) as f32 * scale;
    }
}

/// The four rows of one tile for one token, in 32-bit lanes, in one pass over the bytes.
///
/// # Safety
/// `tile` is readable for `blocks` blocks of weights, `codes` for `blocks` blocks of activations.
#[inline(always)]
pub(super) unsafe fn tile_sums<V: ByteLanes, const AHEAD: bool>(
    tile: *const u8,
    blocks: usize,
    codes: *const i8,
) -> [V; TILE_ROWS] {
    let mut sums = [V::zero(); TILE_ROWS];
    let mut first = 0;
    while first < blocks {
        let last = blocks.min(first.saturating_add(V::MAX_BLOCKS));
        // Halves of a unit in accumulators of their own: twice as many chains of dot products.
        let mut acc = [[V::zero(); TILE_ROWS]; 2];
        for block in first..last {
            for half in 0..UNIT / V::BYTES {
                let mut a = [V::zero(); 4];
                for g in 0..4 {
                    let at = block * BLOCK_COLS + g * UNIT + half * V::BYTES;
                    // SAFETY: block < blocks, g < 4: codes of this block.
                    a[g] = unsafe { V::load(codes.add(at).cast()) };
                }
                for row in 0..TILE_ROWS {
                    let unit = tile.wrapping_add(block * BLOCK_BYTES + row * UNIT + half * V::BYTES);
                    if AHEAD && half == 0 {
                        request(unit.wrapping_add(PREFETCH_BYTES));
                    }
                    // SAFETY: block < blocks: bytes of this block.
                    let w = unsafe { V::load(unit) };
                    let mut sum = acc[half % 2][row];
                    sum = sum.dot(w.codes::<0>(), a[0]);
                    sum = sum.dot(w.codes::<1>(), a[1]);
                    sum = sum.dot(w.codes::<2>(), a[2]);
                    acc[half % 2][row] = sum.dot(w.codes::<3>(), a[3]);
                }
            }
        }
        for row in 0..TILE_ROWS {
            sums[row] = sums[row].add(acc[0][row].widen());
            if UNIT > V::BYTES {
                sums[row] = sums[row].add(acc[1][row].widen());
            }
        }
        first = last;
    }
    sums
}

/// Requests a line into the second-level cache; harmless beyond the end of a matrix, for prefetches do not fault.
#[inline(always)]
pub(super) fn request(p: *const u8) {
    // SAFETY: a hint that never faults; every x86-64 has it.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
}

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

thread_local! {
    /// Unpacked weights of a row block, and sums of parts.
    static SCRATCH: RefCell<(Vec<Line>, Vec<Line>)> = const { RefCell::new((Vec::new(), Vec::new())) };
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
    /// [`ByteLanes::TOKENS`], [`ByteLanes::MAX_BLOCKS`], [`ByteLanes::BYTES`].
    pub(super) tokens: usize,
    pub(super) max_blocks: usize,
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
    let plan = Blocking::new(machine, tokens, tiles.blocks, products.tokens, products.max_blocks);
    let tile_bytes = tiles.blocks * BLOCK_BYTES;
    let row_tiles = plan.tiles.min(tiles.rows.div_ceil(TILE_ROWS)).max(1);
    SCRATCH.with_borrow_mut(|(unpacked, saved)| {
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
                let panel = Panel {
                    weights,
                    blocks: tiles.blocks,
                    part_blocks: plan.part_blocks,
                    codes: &activations.codes[some.start * cols..some.end * cols],
                    sums: &activations.sums[some.clone()],
                    scales: &activations.scales[some.clone()],
                    saved,
                    ahead: if machine.request_ahead && group == 0 { PREFETCH_BYTES } else { 0 },
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
    let register_tile = T * TILE_ROWS * V::BYTES;
    assert!(p.weights.len() >= tiles * tile_bytes && p.codes.len() >= T * cols);
    assert!((1..=V::MAX_BLOCKS).contains(&p.part_blocks));
    assert!(p.part_blocks >= p.blocks || size_of_val(p.saved) >= tiles * register_tile);
    let saved = p.saved.as_mut_ptr().cast::<u8>();
    let mut first = 0;
    while first < p.blocks {
        let last = p.blocks.min(first + p.part_blocks);
        for tile in 0..tiles {
            let weights = p.weights[tile * tile_bytes..].as_ptr();
            let mut acc = [[V::zero(); TILE_ROWS]; T];
            // SAFETY: tile < tiles and last <= blocks, so by the assertions all weights and codes exist.
            unsafe {
                if PACKED {
                    pass::<V, T, 3>(&mut acc, weights, first..last, p.codes.as_ptr(), cols, p.ahead);
                    rescale(&mut acc);
                    pass::<V, T, 2>(&mut acc, weights, first..last, p.codes.as_ptr(), cols, p.ahead);
                    rescale(&mut acc);
                    pass::<V, T, 1>(&mut acc, weights, first..last, p.codes.as_ptr(), cols, p.ahead);
                    rescale(&mut acc);
                    pass::<V, T, 0>(&mut acc, weights, first..last, p.codes.as_ptr(), cols, p.ahead);
                } else {
                    let units = 4 * first..4 * last;
                    pass::<V, T, UNPACKED>(&mut acc, weights, units, p.codes.as_ptr(), cols, 0);
                }
            }
            for t in 0..T {
                for row in 0..TILE_ROWS {
                    acc[t][row] = acc[t][row].widen();
                    let at = saved.wrapping_add(tile * register_tile + (t * TILE_ROWS + row) * V::BYTES);
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

/// # Safety
/// `p` is readable for a register.
#[inline(always)]
unsafe fn weight<V: ByteLanes, const G: usize>(p: *const u8) -> V {
    // SAFETY: the caller's.
    let w = unsafe { V::load(p) };
    if G == UNPACKED { w } else { w.scaled_codes::<G>() }
}

/// A loop of nothing but independent dot products, in registers; returns the multiply-adds.
#[inline(always)]
pub(super) fn dots<V: ByteLanes>(rounds: usize) -> u64 {
    let ones = [1u8; UNIT];
    // SAFETY: 64 bytes are readable for any register.
    let (codes, a) = std::hint::black_box(unsafe { (V::load(ones.as_ptr()), V::load(ones.as_ptr())) });
    let mut acc = [[V::zero(); TILE_ROWS]; 3];
    for _ in 0..rounds {
        for four in &mut acc {
            for one in four {
                *one = one.dot(codes, a);
            }
        }
    }
    std::hint::black_box(&acc);
    (rounds * 3 * TILE_ROWS * V::BYTES) as u64
}

/// Stamps the products for one instruction set and one implementation of [`ByteLanes`]; `gemv` is the caller's.
macro_rules! stamp_products {
    ($features:literal, $lanes:ty) => {
        #[target_feature(enable = $features)]
        fn panel<const T: usize, const PACKED: bool>(p: crate::ternary::lanes::Panel<'_>) {
            crate::ternary::lanes::panel::<$lanes, T, PACKED>(p);
        }

        #[target_feature(enable = $features)]
        fn unpack(packed: &[u8], out: &mut [crate::ternary::lanes::Line]) {
            crate::ternary::lanes::unpack::<$lanes>(packed, out);
        }

        #[target_feature(enable = $features)]
        pub(in crate::ternary) fn dots(rounds: usize) -> u64 {
            crate::ternary::lanes::dots::<$lanes>(rounds)
        }

        static PRODUCTS: crate::ternary::lanes::Products = {
            use crate::ternary::lanes::ByteLanes as Lanes;
            crate::ternary::lanes::Products {
                packed: crate::ternary::lanes::panels!($lanes, true),
                unpacked: crate::ternary::lanes::panels!($lanes, false),
                unpack,
                gemv,
                tokens: <$lanes as Lanes>::TOKENS,
                max_blocks: <$lanes as Lanes>::MAX_BLOCKS,
                bytes: <$lanes as Lanes>::BYTES,
            }
        };

        #[target_feature(enable = $features)]
        fn gemm(
            tiles: crate::ternary::Tiles<'_>,
            activations: crate::ternary::Activations<'_>,
            out: &mut [f32],
        ) {
            let machine = crate::ternary::blocking::Machine::get();
            // SAFETY: the caller has this instruction set.
            unsafe { crate::ternary::lanes::gemm(&PRODUCTS, machine, tiles, activations, out) }
        }
    };
}

/// The panels of 1 to [`MOST_TOKENS`] tokens; those beyond the register tile repeat the largest and are never called.
macro_rules! panels {
    ($lanes:ty, $packed:literal) => {{
        const T: usize = <$lanes as crate::ternary::lanes::ByteLanes>::TOKENS;
        const fn at_most(t: usize) -> usize {
            if t < T { t } else { T }
        }
        [
            panel::<{ at_most(1) }, $packed>,
            panel::<{ at_most(2) }, $packed>,
            panel::<{ at_most(3) }, $packed>,
            panel::<{ at_most(4) }, $packed>,
            panel::<{ at_most(5) }, $packed>,
            panel::<{ at_most(6) }, $packed>,
        ]
    }};
}

/// Stamps a `gemv` of [`tile_sums`].
macro_rules! stamp_gemv {
    ($features:literal, $lanes:ty, $tile_sums:ident) => {
        #[target_feature(enable = $features)]
        fn gemv(
            tiles: crate::ternary::Tiles<'_>,
            activations: crate::ternary::Activations<'_>,
            out: &mut [f32],
        ) {
            if crate::ternary::blocking::Machine::get().request_ahead {
                gemv_ahead::<true>(tiles, activations, out);
            } else {
                gemv_ahead::<false>(tiles, activations, out);
            }
        }

        #[target_feature(enable = $features)]
        fn gemv_ahead<const AHEAD: bool>(
            tiles: crate::ternary::Tiles<'_>,
            activations: crate::ternary::Activations<'_>,
            out: &mut [f32],
        ) {
            use crate::ternary::{BLOCK_BYTES, BLOCK_COLS, TILE_ROWS};
            let tile_bytes = tiles.blocks * BLOCK_BYTES;
            let codes = &activations.codes[..tiles.blocks * BLOCK_COLS];
            assert!(tiles.data.len() >= tiles.rows.div_ceil(TILE_ROWS) * tile_bytes);
            let (sum, scale) = (activations.sums[0], activations.scales[0]);
            for (tile, out) in out[..tiles.rows].chunks_mut(TILE_ROWS).enumerate() {
                let data = tiles.data[tile * tile_bytes..].as_ptr();
                // SAFETY: the assertion above leaves a whole tile here; codes has a block for each of its.
                let sums = unsafe { $tile_sums::<$lanes, AHEAD>(data, tiles.blocks, codes.as_ptr()) };
                let dots = <$lanes as crate::ternary::lanes::ByteLanes>::sum4(sums);
                crate::ternary::lanes::finish(dots, sum, scale, out);
            }
        }
    };
}

pub(super) use {panels, stamp_gemv, stamp_products};
