//! From the sums of a segment to numbers.

use super::super::SEGMENT;
use super::lanes::Lanes;

/// `acc[i] = fma((sum - taken[b]) as f32, step[b], acc[i])` for the numbers of a segment of `blocks` blocks. Sums are
/// `[chunk][quarter][lane]`, as in [`Lanes`]; `turned`, they have quarters and lanes of 128 bits the other way round.
///
/// # Safety
/// The instruction set of `V` is enabled.
#[inline(always)]
pub(super) unsafe fn finish<V: Lanes>(
    sums: &mut [i32; SEGMENT],
    turned: bool,
    step: &[f32; 4],
    taken: &[i32; 4],
    blocks: usize,
    acc: &mut [f32],
) {
    if turned {
        for chunk in sums.chunks_exact_mut(4 * V::LANES) {
            let at: [*mut u8; 4] = std::array::from_fn(|j| chunk[j * V::LANES..].as_mut_ptr().cast());
            // SAFETY: four registers of sums.
            unsafe {
                let four = V::transposed([V::load(at[0]), V::load(at[1]), V::load(at[2]), V::load(at[3])]);
                for j in 0..4 {
                    four[j].store(at[j]);
                }
            }
        }
    }
    if let Ok(acc) = <&mut [f32; SEGMENT]>::try_from(&mut *acc) {
        // A quarter is a block, and its lanes follow each other. By registers: left to the compiler, the loop over blocks
        // became gathers and scatters, a third of all time.
        for (c, sums) in sums.chunks_exact(4 * V::LANES).enumerate() {
            for (b, sums) in sums.chunks_exact(V::LANES).enumerate() {
                let to = acc[32 * b + V::LANES * c..][..V::LANES].as_mut_ptr();
                // SAFETY: both slices have a register.
                unsafe { V::load(sums.as_ptr().cast()).add_scaled(taken[b], step[b], to) };
            }
        }
        return;
    }
    for (i, sums) in sums.chunks_exact(4).enumerate() {
        let (c, j, k) = (i / V::LANES, i % V::LANES / (V::LANES / 4), i % (V::LANES / 4));
        let lane = V::LANES * c + 4 * k + j;
        let at = 32 * (lane % blocks) + 4 * (lane / blocks);
        if lane < 8 * blocks && at < acc.len() {
            let (b, end) = (lane % blocks, acc.len().min(at + 4));
            for (a, s) in acc[at..end].iter_mut().zip(sums) {
                *a = (s.wrapping_sub(taken[b]) as f32).mul_add(step[b], *a);
            }
        }
    }
}
