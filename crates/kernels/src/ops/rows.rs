//! Dot products of long stored rows with one vector.

use crate::vector::{Element, F32x16, LANES};

/// Bytes of a row by which requests run ahead of the reading.
const AHEAD: usize = 2048;

/// `out[r] = rows[r] . x` for `N` rows, `N` at most 4, side by side: one row alone would wait for its own chain of
/// additions. `ahead` elements further on are requested meanwhile.
///
/// # Safety
/// `x` is readable for `k` elements, `rows` for `N * k`, and `out` is writable for `N`.
#[inline(always)]
unsafe fn tile<V: F32x16, E: Element, const N: usize>(
    rows: *const E,
    x: *const f32,
    k: usize,
    out: *mut f32,
    ahead: usize,
) {
    let mut acc = [V::splat(0.0); 4];
    // SAFETY: j + 16 <= k, or the tail ends at k; the caller vouches for k elements of x and of each row.
    unsafe {
        let mut j = 0;
        while j + LANES <= k {
            let x = E::reorder(V::load(x.add(j)));
            for r in 0..N {
                let at = rows.add(r * k + j);
                V::prefetch(at.wrapping_add(ahead).cast());
                acc[r] = E::load::<V>(at).mul_add(x, acc[r]);
            }
            j += LANES;
        }
        if j < k {
            let x = E::reorder(f32::load_n(x.add(j), k - j));
            for r in 0..N {
                acc[r] = E::load_n::<V>(rows.add(r * k + j), k - j).mul_add(x, acc[r]);
            }
        }
        std::ptr::copy_nonoverlapping(E::sum4(acc).as_ptr(), out, N);
    }
}

/// `out[r] = rows[r] . x`, in the 16-lane semantics; `rows` `[n][k]`.
#[inline(always)]
pub(crate) fn rows_times<V: F32x16, E: Element>(rows: &[E], x: &[f32], out: &mut [f32]) {
    let (n, k) = (out.len(), x.len());
    assert!(rows.len() >= n * k);
    let ahead = AHEAD.div_ceil(k.max(1) * size_of::<E>()) + 4;
    let mut r = 0;
    // SAFETY: r + 4 <= n or r < n; rows holds n * k elements, x holds k, and out holds n.
    unsafe {
        while r + 4 <= n {
            // What lies behind the last row may never be read.
            let ahead = if r + ahead + 4 <= n { ahead * k } else { 0 };
            tile::<V, E, 4>(rows.as_ptr().add(r * k), x.as_ptr(), k, out.as_mut_ptr().add(r), ahead);
            r += 4;
        }
        while r < n {
            tile::<V, E, 1>(rows.as_ptr().add(r * k), x.as_ptr(), k, out.as_mut_ptr().add(r), 0);
            r += 1;
        }
    }
}
