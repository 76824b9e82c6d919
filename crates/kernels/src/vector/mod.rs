//! Sixteen `f32` lanes, as the float operations see them: one trait, one implementation per register width.
//!
//! # Contract
//! The methods of an implementation may be *called* only where its instruction set is enabled: from an
//! `#[inline(always)]` body that a `#[target_feature]` entry of the same table instantiates (`table::stamp_table`). The
//! trait is private to the crate, and the tables are handed out against a detection token, which makes that sound.
//! Bodies must not put lane arithmetic into closures: those are compiled without the features of their caller.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod narrow;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::A16;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Z16;
pub(crate) use narrow::{E4m3, E5m2, F16};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::N16;
pub(crate) use scalar::S16;

/// How many lanes a reduction has, on every instruction set.
pub(crate) const LANES: usize = 16;

/// Sixteen `f32` lanes. See the module for who may call its methods.
pub(crate) trait F32x16: Copy {
    /// Whether all sixteen lanes are one register and there are 32 of them: tiles may be larger.
    const WIDE: bool;

    /// All lanes `x`.
    fn splat(x: f32) -> Self;

    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load(p: *const f32) -> Self;

    /// # Safety
    /// `p` is writable for 16 elements.
    unsafe fn store(self, p: *mut f32);

    fn add(self, o: Self) -> Self;
    fn sub(self, o: Self) -> Self;
    fn mul(self, o: Self) -> Self;
    fn div(self, o: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    fn abs(self) -> Self;
    /// `-self`.
    fn neg(self) -> Self;
    /// `if self > o { self } else { o }` in each lane: a NaN in `self` gives `o`, a NaN in `o` gives NaN.
    fn max(self, o: Self) -> Self;
    /// `if self < o { self } else { o }` in each lane.
    fn min(self, o: Self) -> Self;
    /// The bits of each lane shifted left by 23: makes a power of two of a biased exponent.
    fn shl23(self) -> Self;
    /// Zero in the lanes where `x < bound`, `self` elsewhere (also where `x` is NaN).
    fn zero_where_less(self, x: Self, bound: Self) -> Self;

    /// Sums each of four vectors by the fixed tree.
    fn sum4(v: [Self; 4]) -> [f32; 4];

    /// Sums each of sixteen vectors by the fixed tree.
    #[inline(always)]
    fn sum16(v: [Self; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..4 {
            let four = Self::sum4([v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]]);
            out[4 * i..4 * i + 4].copy_from_slice(&four);
        }
        out
    }

    /// Sums the lanes by the fixed tree.
    #[inline(always)]
    fn sum(self) -> f32 {
        Self::sum4([self; 4])[0]
    }

    /// Widens 16 bfloat16, into the *row order* of this width: some fixed order of the lanes, cheap to widen into.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load_bf16(p: *const u16) -> Self;

    /// Widens two vectors of woven bfloat16: 16 words of 32 bits, the first vector in the lower halves, the second in the
    /// upper ones. Both come in the natural order.
    ///
    /// # Safety
    /// `p` is readable for 32 elements.
    unsafe fn load_woven(p: *const u16) -> [Self; 2];

    /// From the natural order of the lanes to the row order of [`F32x16::load_bf16`], or back.
    #[inline(always)]
    fn reorder(self) -> Self {
        self
    }

    /// [`F32x16::sum4`] of vectors in row order.
    #[inline(always)]
    fn sum4_reordered(v: [Self; 4]) -> [f32; 4] {
        Self::sum4(v)
    }

    /// Requests the cache line at an address, which need not be valid, into the second-level cache: requests into
    /// the first level get in the way of the hardware prefetchers.
    #[inline(always)]
    fn prefetch(p: *const u8) {
        let _ = p;
    }

    /// Converts 16 signed bytes.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load_i8(p: *const i8) -> Self;

    /// Widens 16 numbers of IEEE binary16, exactly.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load_f16(p: *const u16) -> Self;

    /// Rounds to IEEE binary16, to nearest with ties to even; overflow becomes infinity, a NaN stays one (quiet, with
    /// the upper bits of its payload).
    ///
    /// # Safety
    /// `p` is writable for 16 elements.
    unsafe fn store_f16(self, p: *mut u16);

    /// Widens 16 codes of E4M3, divided by 256: the seven bits below the sign, moved up by seven, are those of a
    /// binary16 that is so much smaller, subnormal codes included; a carry out of 127 marks the NaN.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load_e4m3(p: *const u8) -> Self;

    /// Widens 16 codes of E5M2, the upper bytes of binary16.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load_e5m2(p: *const u8) -> Self;

    /// Lane `i` of the result is lane `i ^ H`, for `H` 1, 2, 4 or 8.
    fn swap_lanes<const H: usize>(self) -> Self;

    /// Bit `i` is clear where lane `i` is at most that of `floor`, and set where it is not: also for a NaN.
    fn not_at_most(self, floor: Self) -> u16;

    /// Bit `i` is set where element `i` of sixteen is `code`.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn equal_u16(p: *const u16, code: u16) -> u16;
}

/// A number that rows are stored in, widened to `f32` lanes as it is read. Lanes of a row come in an order of the
/// element's own; what meets them is brought into the same order once, and the sums know of it.
pub(crate) trait Element: Copy + Default {
    /// What a loaded number must be multiplied by: a power of two.
    const FACTOR: f32 = 1.0;
    /// Whether widening costs enough that four heads should share it, not two.
    const COSTLY: bool = false;

    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load<V: F32x16>(p: *const Self) -> V;

    /// Two vectors in the natural order.
    ///
    /// # Safety
    /// `p` is readable for 32 elements.
    #[inline(always)]
    unsafe fn load_two<V: F32x16>(p: *const Self) -> [V; 2] {
        // SAFETY: passed on to the caller.
        unsafe { [Self::load(p), Self::load(p.add(LANES))] }
    }

    /// The first `n < 16` elements, and `+0.0` for the others.
    ///
    /// # Safety
    /// `p` is readable for `n` elements.
    #[inline(always)]
    unsafe fn load_n<V: F32x16>(p: *const Self, n: usize) -> V {
        let mut padded = [Self::default(); LANES];
        // SAFETY: the caller gives `n` readable elements; `min` keeps the copy inside `padded`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), n.min(LANES));
            Self::load(padded.as_ptr())
        }
    }

    /// From the natural order of the lanes to the order of [`Element::load`], or back.
    #[inline(always)]
    fn reorder<V: F32x16>(v: V) -> V {
        v
    }

    /// Sums each of four vectors in the order of [`Element::load`], by the fixed tree over the natural order.
    #[inline(always)]
    fn sum4<V: F32x16>(v: [V; 4]) -> [f32; 4] {
        V::sum4(v)
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const f32) -> V {
        // SAFETY: passed on to the caller.
        unsafe { V::load(p) }
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const u16) -> V {
        // SAFETY: passed on to the caller.
        unsafe { V::load_bf16(p) }
    }

    #[inline(always)]
    fn reorder<V: F32x16>(v: V) -> V {
        v.reorder()
    }

    #[inline(always)]
    fn sum4<V: F32x16>(v: [V; 4]) -> [f32; 4] {
        V::sum4_reordered(v)
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const i8) -> V {
        // SAFETY: passed on to the caller.
        unsafe { V::load_i8(p) }
    }
}

/// An element of a row of woven bfloat16 (see [`crate::Kernels::weave_bf16`]): pairs of vectors are widened by a shift and
/// a mask; what is left of a row lies in the natural order.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Woven(u16);

impl Woven {
    #[inline(always)]
    pub(crate) fn of(rows: &[u16]) -> &[Woven] {
        // SAFETY: a transparent wrapper has the layout of what it wraps.
        unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len()) }
    }
}

impl Element for Woven {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const Woven) -> V {
        // SAFETY: passed on to the caller.
        unsafe { V::load_bf16(p.cast()).reorder() }
    }

    #[inline(always)]
    unsafe fn load_two<V: F32x16>(p: *const Woven) -> [V; 2] {
        // SAFETY: passed on to the caller.
        unsafe { V::load_woven(p.cast()) }
    }
}

/// Loads 16 elements of a whole chunk.
#[inline(always)]
pub(crate) fn load<V: F32x16>(x: &[f32; LANES]) -> V {
    // SAFETY: an array of 16 elements is readable for 16 elements.
    unsafe { V::load(x.as_ptr()) }
}

/// Stores 16 elements over a whole chunk.
#[inline(always)]
pub(crate) fn store<V: F32x16>(v: V, x: &mut [f32; LANES]) {
    // SAFETY: an array of 16 elements is writable for 16 elements.
    unsafe { v.store(x.as_mut_ptr()) }
}

/// A tail of fewer than 16 elements, padded with `pad`.
#[inline(always)]
pub(crate) fn load_tail<V: F32x16>(x: &[f32], pad: f32) -> V {
    let mut padded = [pad; LANES];
    padded[..x.len()].copy_from_slice(x);
    load(&padded)
}

/// Stores the first lanes over a tail of fewer than 16 elements.
#[inline(always)]
pub(crate) fn store_tail<V: F32x16>(v: V, x: &mut [f32]) {
    let mut whole = [0.0; LANES];
    store(v, &mut whole);
    x.copy_from_slice(&whole[..x.len()]);
}
