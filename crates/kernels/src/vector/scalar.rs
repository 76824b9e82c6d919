//! The sixteen lanes as an array: plain Rust for every machine.

use super::{F32x16, LANES};

/// Sixteen lanes in an array.
#[derive(Clone, Copy)]
pub(crate) struct S16([f32; LANES]);

/// The number that the bits of a binary16 mean.
#[inline(always)]
fn widen(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let special = if magnitude >= 0x7c00 << 13 { 0xff << 23 } else { 0 };
    // As an f32 the bits mean too little by a power of two, also where they are those of a subnormal.
    let number = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    f32::from_bits(u32::from(bits & 0x8000) << 16 | number | special)
}

/// The bits of the nearest binary16, the even one of two.
#[inline(always)]
fn narrow(x: f32) -> u16 {
    let (sign, magnitude) = ((x.to_bits() >> 16) as u16 & 0x8000, x.to_bits() & 0x7fff_ffff);
    let code = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13 & 0x3ff) // quiet
    } else if magnitude >= (127 + 16) << 23 {
        0x7c00
    } else if magnitude < (127 - 14) << 23 {
        // The last place of 0.5 is the smallest subnormal: the addition rounds.
        (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()
    } else {
        ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)
    };
    sign | code as u16
}

macro_rules! lanewise {
    ($lane:ident, $value:expr) => {{
        let mut out = [0.0f32; LANES];
        for $lane in 0..LANES {
            out[$lane] = $value;
        }
        S16(out)
    }};
}

impl F32x16 for S16 {
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> S16 {
        S16([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> S16 {
        // SAFETY: the caller gives 16 readable elements.
        S16(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller gives 16 writable elements.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    fn add(self, o: S16) -> S16 {
        lanewise!(i, self.0[i] + o.0[i])
    }

    #[inline(always)]
    fn sub(self, o: S16) -> S16 {
        lanewise!(i, self.0[i] - o.0[i])
    }

    #[inline(always)]
    fn mul(self, o: S16) -> S16 {
        lanewise!(i, self.0[i] * o.0[i])
    }

    #[inline(always)]
    fn div(self, o: S16) -> S16 {
        lanewise!(i, self.0[i] / o.0[i])
    }

    #[inline(always)]
    fn mul_add(self, b: S16, c: S16) -> S16 {
        lanewise!(i, self.0[i].mul_add(b.0[i], c.0[i]))
    }

    #[inline(always)]
    fn abs(self) -> S16 {
        lanewise!(i, self.0[i].abs())
    }

    #[inline(always)]
    fn neg(self) -> S16 {
        lanewise!(i, -self.0[i])
    }

    #[inline(always)]
    fn max(self, o: S16) -> S16 {
        lanewise!(i, if self.0[i] > o.0[i] { self.0[i] } else { o.0[i] })
    }

    #[inline(always)]
    fn min(self, o: S16) -> S16 {
        lanewise!(i, if self.0[i] < o.0[i] { self.0[i] } else { o.0[i] })
    }

    #[inline(always)]
    fn shl23(self) -> S16 {
        lanewise!(i, f32::from_bits(self.0[i].to_bits() << 23))
    }

    #[inline(always)]
    fn zero_where_less(self, x: S16, bound: S16) -> S16 {
        lanewise!(i, if x.0[i] < bound.0[i] { 0.0 } else { self.0[i] })
    }

    #[inline(always)]
    fn sum4(v: [S16; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        for (o, mut lanes) in out.iter_mut().zip(v) {
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    lanes.0[i] += lanes.0[i + half];
                }
            }
            *o = lanes.0[0];
        }
        out
    }

    #[inline(always)]
    unsafe fn load_woven(p: *const u16) -> [S16; 2] {
        // SAFETY: the caller gives 32 readable elements.
        let x = unsafe { p.cast::<[u16; 2 * LANES]>().read_unaligned() };
        [
            lanewise!(i, f32::from_bits(u32::from(x[2 * i]) << 16)),
            lanewise!(i, f32::from_bits(u32::from(x[2 * i + 1]) << 16)),
        ]
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> S16 {
        // SAFETY: the caller gives 16 readable elements.
        let x = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        lanewise!(i, f32::from_bits(u32::from(x[i]) << 16))
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> S16 {
        // SAFETY: the caller gives 16 readable elements.
        let x = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        lanewise!(i, f32::from(x[i]))
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> S16 {
        // SAFETY: the caller gives 16 readable elements.
        let x = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        lanewise!(i, widen(x[i]))
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        let mut out = [0; LANES];
        for i in 0..LANES {
            out[i] = narrow(self.0[i]);
        }
        // SAFETY: the caller gives 16 writable elements.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(out) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> S16 {
        // SAFETY: the caller gives 16 readable elements.
        let x = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        let nan = |code: u8| u16::from(code & 0x7f == 0x7f) << 14;
        lanewise!(i, widen(u16::from(x[i] & 0x80) << 8 | u16::from(x[i] & 0x7f) << 7 | nan(x[i])))
    }

    #[inline(always)]
    unsafe fn load_e5m2(p: *const u8) -> S16 {
        // SAFETY: the caller gives 16 readable elements.
        let x = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        lanewise!(i, widen(u16::from(x[i]) << 8))
    }

    #[inline(always)]
    fn swap_lanes<const H: usize>(self) -> S16 {
        lanewise!(i, self.0[i ^ H])
    }

    #[inline(always)]
    fn not_at_most(self, floor: S16) -> u16 {
        let mut mask = 0;
        for i in 0..LANES {
            let at_most = self.0[i] <= floor.0[i];
            mask |= u16::from(!at_most) << i;
        }
        mask
    }

    #[inline(always)]
    unsafe fn equal_u16(p: *const u16, code: u16) -> u16 {
        let mut mask = 0;
        for i in 0..LANES {
            // SAFETY: the caller gives 16 readable elements.
            mask |= u16::from(unsafe { *p.add(i) } == code) << i;
        }
        mask
    }
}
