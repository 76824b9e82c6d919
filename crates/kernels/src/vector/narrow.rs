//! Rows of binary16 and of 8-bit floats, as elements that a kernel widens while it reads.

use super::{Element, F32x16};

/// An element that is a code in a transparent wrapper, with what its loads are.
macro_rules! narrow {
    ($(#[$doc:meta])* $name:ident($code:ty) = $load:ident, $factor:expr) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, Default)]
        pub(crate) struct $name($code);

        impl $name {
            #[inline(always)]
            pub(crate) fn of(rows: &[$code]) -> &[$name] {
                // SAFETY: a transparent wrapper has the layout of what it wraps.
                unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len()) }
            }
        }

        impl Element for $name {
            const FACTOR: f32 = $factor;
            const COSTLY: bool = true;

            #[inline(always)]
            unsafe fn load<V: F32x16>(p: *const $name) -> V {
                // SAFETY: passed on to the caller.
                unsafe { V::$load(p.cast()) }
            }
        }
    };
}

narrow! {
    /// IEEE binary16.
    F16(u16) = load_f16, 1.0
}
narrow! {
    /// OCP E4M3 (FN), read as a 256th of its value.
    E4m3(u8) = load_e4m3, 256.0
}
narrow! {
    /// OCP E5M2.
    E5m2(u8) = load_e5m2, 1.0
}
