//! The normalised Walsh-Hadamard transform of rows: spreads what a row has in a few coordinates over all of them, and keeps
//! dot products, so that keys and queries, or values, may be rotated before a coarse number format (QuaRot,
//! arXiv 2404.00456).
//!
//! Work on 128 numbers: three levels between registers of sixteen (24 additions) and four within them (32 shuffles and
//! 32 multiply-adds by one or minus one, which are exact additions and subtractions).

use crate::Kernels;
use crate::vector::{F32x16, LANES};

/// Numbers after which the signs repeat.
const PERIOD: usize = 1024;

/// A fixed diagonal of pseudo-random signs (SplitMix64, the top bit of each draw).
static SIGNS: [f32; PERIOD] = {
    let mut signs = [1.0; PERIOD];
    let (mut state, mut i) = (0u64, 0);
    while i < PERIOD {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        if (z ^ (z >> 31)) >> 63 == 1 {
            signs[i] = -1.0;
        }
        i += 1;
    }
    signs
};

/// One, and minus one where the number of the lane has the bit `h`.
static PARITY: [[f32; LANES]; 4] = {
    let mut out = [[1.0; LANES]; 4];
    let (mut level, mut i) = (0, 0);
    while level < 4 {
        while i < LANES {
            if i >> level & 1 == 1 {
                out[level][i] = -1.0;
            }
            i += 1;
        }
        (level, i) = (level + 1, 0);
    }
    out
};

/// Sums of the lanes whose numbers lack the bit `H` with their partners, differences in the partners' lanes.
#[inline(always)]
fn within<V: F32x16, const H: usize>(v: V) -> V {
    let parity: V = crate::vector::load(&PARITY[H.trailing_zeros() as usize]);
    v.mul_add(parity, v.swap_lanes::<H>())
}

/// The levels of strides below `d`, for the `d <= LANES` first lanes of each vector, or all.
#[inline(always)]
fn within_all<V: F32x16, const N: usize>(v: &mut [V; N], d: usize) {
    for v in v {
        if d > 8 {
            *v = within::<V, 8>(*v);
        }
        if d > 4 {
            *v = within::<V, 4>(*v);
        }
        if d > 2 {
            *v = within::<V, 2>(*v);
        }
        if d > 1 {
            *v = within::<V, 1>(*v);
        }
    }
}

/// The levels of strides below `N` vectors, in registers, on a part of a row; `before` and `after` are factors.
#[inline(always)]
fn part<V: F32x16, const N: usize>(x: &mut [f32], before: Option<&[f32]>, after: Option<&[f32]>, scale: f32) {
    let mut v = [V::splat(0.0); N];
    let (x, _) = x.as_chunks_mut::<LANES>();
    for c in 0..N {
        v[c] = crate::vector::load(&x[c]);
    }
    if let Some((before, _)) = before.map(<[f32]>::as_chunks::<LANES>) {
        for c in 0..N {
            v[c] = v[c].mul(crate::vector::load(&before[c]));
        }
    }
    let mut stride = N / 2;
    while stride > 0 {
        for c in 0..N {
            if c & stride == 0 {
                (v[c], v[c + stride]) = (v[c].add(v[c + stride]), v[c].sub(v[c + stride]));
            }
        }
        stride /= 2;
    }
    within_all(&mut v, LANES);
    for c in 0..N {
        v[c] = v[c].mul(V::splat(scale));
    }
    if let Some((after, _)) = after.map(<[f32]>::as_chunks::<LANES>) {
        for c in 0..N {
            v[c] = v[c].mul(crate::vector::load(&after[c]));
        }
    }
    for c in 0..N {
        crate::vector::store(v[c], &mut x[c]);
    }
}

/// A row of fewer numbers than a vector has lanes.
#[inline(always)]
fn short<V: F32x16>(x: &mut [f32], before: bool, after: bool, scale: f32) {
    let signs = crate::vector::load_tail::<V>(&SIGNS[..x.len()], 1.0);
    let mut v = [crate::vector::load_tail::<V>(x, 0.0)];
    if before {
        v[0] = v[0].mul(signs);
    }
    within_all(&mut v, x.len());
    v[0] = v[0].mul(V::splat(scale));
    if after {
        v[0] = v[0].mul(signs);
    }
    crate::vector::store_tail(v[0], x);
}

#[inline(always)]
pub(crate) fn hadamard<V: F32x16>(rows: &mut [f32], d: usize, before: bool, after: bool) {
    const PART: usize = 8 * LANES;
    let half = f32::from_bits((127 - d.trailing_zeros() / 2) << 23);
    let scale =
        if d.trailing_zeros().is_multiple_of(2) { half } else { half * std::f32::consts::FRAC_1_SQRT_2 };
    let signs = |wanted: bool, at: usize| wanted.then(|| &SIGNS[at % PERIOD..]);
    for row in rows.chunks_exact_mut(d) {
        match d {
            16 => part::<V, 1>(row, signs(before, 0), signs(after, 0), scale),
            32 => part::<V, 2>(row, signs(before, 0), signs(after, 0), scale),
            64 => part::<V, 4>(row, signs(before, 0), signs(after, 0), scale),
            PART => part::<V, 8>(row, signs(before, 0), signs(after, 0), scale),
            ..LANES => short::<V>(row, before, after, scale),
            _ => {
                if before {
                    for (i, x) in row.iter_mut().enumerate() {
                        *x *= SIGNS[i % PERIOD];
                    }
                }
                let mut stride = d / 2;
                while stride >= PART {
                    for pair in row.chunks_exact_mut(2 * stride) {
                        let (a, b) = pair.split_at_mut(stride);
                        for (a, b) in a.iter_mut().zip(b) {
                            (*a, *b) = (*a + *b, *a - *b);
                        }
                    }
                    stride /= 2;
                }
                for (i, x) in row.chunks_exact_mut(PART).enumerate() {
                    part::<V, 8>(x, None, signs(after, i * PART), scale);
                }
            }
        }
    }
}

impl Kernels {
    fn rotate(&self, op: &str, rows: &mut [f32], d: usize, before: bool, after: bool) {
        assert!(d.is_power_of_two(), "{op}: rows of {d} numbers, which is no power of two");
        assert!(rows.len().is_multiple_of(d), "{op}: {} numbers in rows of {d}", rows.len());
        // SAFETY: this table was handed out against proof of its instruction set.
        unsafe { (self.float.hadamard)(rows, d, before, after) }
    }

    /// The Walsh-Hadamard transform H of each row of `d` numbers (a power of two), divided by `sqrt(d)`: orthogonal, and
    /// its own inverse but for rounding. In the natural order: entry `(i, j)` is negative where `i & j` has an odd number
    /// of bits. Butterflies of strides `d / 2` to 1, then one multiplication by the nearest f32 to `1 / sqrt(d)`.
    pub fn hadamard(&self, rows: &mut [f32], d: usize) {
        self.rotate("hadamard", rows, d, false, false);
    }

    /// [`Kernels::hadamard`] after a fixed diagonal D of pseudo-random signs, the same for every row: `H D x`. So no fixed
    /// direction of the data, such as a constant offset, can gather in one coordinate.
    pub fn hadamard_signed(&self, rows: &mut [f32], d: usize) {
        self.rotate("hadamard_signed", rows, d, true, false);
    }

    /// The inverse of [`Kernels::hadamard_signed`]: `D H x`.
    pub fn hadamard_unsigned(&self, rows: &mut [f32], d: usize) {
        self.rotate("hadamard_unsigned", rows, d, false, true);
    }
}
