//! Requests of rows that are read later. What is computed for a row of codes takes as long as its way from memory, and the
//! prefetchers of a processor do not begin early enough for both to go on at once.

use super::Rows;
use crate::Kernels;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

impl Kernels {
    /// Requests the lines of `bytes` from memory; a few KB at most, for a core keeps few requests under way. Does nothing
    /// where that is not possible.
    pub fn request(&self, bytes: &[u8]) {
        for line in bytes.chunks(LINE) {
            request(line.as_ptr());
        }
    }

    /// Requests what `values` are stored in, as [`Kernels::request`] does.
    pub fn request_values<T>(&self, values: &[T]) {
        let start = values.as_ptr().cast::<u8>();
        let bytes = size_of_val(values);
        for at in (0..bytes).step_by(LINE) {
            request(start.wrapping_add(at));
        }
        // The first may begin within a line.
        request(start.wrapping_add(bytes.saturating_sub(1)));
    }
}

/// Requests a line into the second-level cache.
#[inline(always)]
pub(crate) fn request(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address does not fault, and SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

impl Rows<'_> {
    /// Where the bytes of the rows lie from `at` on, or behind their end those that are read after them; null where nothing
    /// is known of that. To be requested, not read.
    #[inline(always)]
    pub(crate) fn later(&self, at: usize) -> *const u8 {
        if let Some(at) = self.codes.get(at..)
            && !at.is_empty()
        {
            return at.as_ptr();
        }
        match self.upcoming.get(at - self.codes.len()..) {
            Some(at) if !at.is_empty() => at.as_ptr(),
            _ => std::ptr::null(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_later_goes_on_in_other_rows() {
        let (bytes, others) = ([0u8; 128], [0u8; 64]);
        let rows = Rows::bytes(&bytes).before(&others);
        assert_eq!(rows.later(127), bytes[127..].as_ptr());
        assert_eq!(rows.later(128), others.as_ptr());
        assert_eq!(rows.later(191), others[63..].as_ptr());
        assert!(rows.later(192).is_null() && Rows::bytes(&bytes).later(128).is_null());
        Kernels::best().request(&bytes[1..]);
    }
}
