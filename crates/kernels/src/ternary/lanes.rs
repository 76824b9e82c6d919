//! The integer products, written once over [`ByteLanes`]: a register of bytes with the instruction set's own dot product.
//!
//! The bodies are compiled per instruction set by [`stamp_products`]. As in `crate::vector`, the methods of an
//! implementation may be *called* only where its instruction set is enabled, and never from closures.

use super::{BLOCK_BYTES, BLOCK_COLS, PREFETCH_BYTES, TILE_ROWS, UNIT};
use std::arch::x86_64::*;

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
    // SAFETY: arrays of four are writable for four; every x86-64 has these instructions.
    unsafe {
        let exact = _mm_cvtepi32_ps(_mm_sub_epi32(dots, _mm_set1_epi32(sum)));
        let scaled = _mm_mul_ps(exact, _mm_set1_ps(scale));
        if let Ok(four) = <&mut [f32; TILE_ROWS]>::try_from(&mut *out) {
            return _mm_storeu_ps(four.as_mut_ptr(), scaled);
        }
        let mut four = [0.0; TILE_ROWS];
        _mm_storeu_ps(four.as_mut_ptr(), scaled);
        out.copy_from_slice(&four[..out.len()]);
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
                // Two instructions: the compiler would take the product of the same operands out of the loop.
                let two = V::MAX_BLOCKS < usize::MAX;
                // SAFETY: a reference is readable; a register is plain data.
                let a = if two { unsafe { std::ptr::read_volatile(&a) } } else { a };
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
        fn panel<const T: usize, const PACKED: bool>(p: crate::ternary::gemm::Panel<'_>) {
            crate::ternary::gemm::panel::<$lanes, T, PACKED>(p);
        }

        #[target_feature(enable = $features)]
        fn unpack(packed: &[u8], out: &mut [crate::ternary::gemm::Line]) {
            crate::ternary::gemm::unpack::<$lanes>(packed, out);
        }

        #[target_feature(enable = $features)]
        pub(in crate::ternary) fn dots(rounds: usize) -> u64 {
            crate::ternary::lanes::dots::<$lanes>(rounds)
        }

        static PRODUCTS: crate::ternary::gemm::Products = {
            use crate::ternary::lanes::ByteLanes as Lanes;
            crate::ternary::gemm::Products {
                packed: crate::ternary::lanes::panels!($lanes, true),
                unpacked: crate::ternary::lanes::panels!($lanes, false),
                unpack,
                gemv,
                tokens: <$lanes as Lanes>::TOKENS,
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
            unsafe { crate::ternary::gemm::gemm(&PRODUCTS, machine, tiles, activations, out) }
        }
    };
}

/// The panels of 1 to `MOST_TOKENS` tokens; those beyond the register tile repeat the largest and are never called.
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
