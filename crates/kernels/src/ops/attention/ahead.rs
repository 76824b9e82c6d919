//! Requests of memory that run ahead of the reading.
//!
//! The prefetchers of a processor follow a stream of ascending lines at the full bandwidth of memory, and rows that are
//! read side by side at a third of it: so rows are read one after another. Requests by software cannot replace that (a
//! core keeps too few of them under way: one a line gives half of the bandwidth); they only carry the stream over what
//! stops a prefetcher, the borders of pages and the change to what is read next.

use crate::vector::F32x16;

/// Bytes by which requests run ahead of the reading.
pub(super) const DISTANCE: usize = 4096;
/// Bytes for each request within a stream.
const STRIDE: usize = 1024;
/// Bytes of a cache line.
const LINE: usize = 64;

/// The rows that are read after those at hand.
#[derive(Clone, Copy)]
pub(super) struct Upcoming {
    next: *const u8,
    len: usize,
}

impl Upcoming {
    #[inline(always)]
    pub(super) fn of<E>(rows: &[E]) -> Self {
        Upcoming { next: rows.as_ptr().cast(), len: size_of_val(rows) }
    }

    /// Nothing, as far as is known.
    #[inline(always)]
    pub(super) fn none() -> Self {
        Upcoming { next: std::ptr::null(), len: 0 }
    }

    /// To be called before the next `bytes` bytes are read, at `here`, `left` bytes before the end of their rows.
    #[inline(always)]
    pub(super) fn request<V: F32x16, E>(&self, here: *const E, left: usize, bytes: usize) {
        let mut at = 0;
        if left > DISTANCE {
            while at < bytes {
                V::prefetch(here.cast::<u8>().wrapping_add(DISTANCE + at));
                at += STRIDE;
            }
        } else {
            // What lies behind the last row may never be read.
            let first = DISTANCE - left;
            while at < bytes && first + at < self.len {
                V::prefetch(self.next.wrapping_add(first + at));
                at += LINE;
            }
        }
    }
}

/// The address, out of sight of the optimiser. A loop up to it is not unrolled: several rows at once would be read side by
/// side again.
#[inline(always)]
pub(super) fn unknown<T>(mut p: *const T) -> *const T {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: no instruction at all.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) p, options(nostack, preserves_flags))
    };
    p
}
