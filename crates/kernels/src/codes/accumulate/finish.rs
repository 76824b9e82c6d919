//! From the sums of a segment to numbers.

use super::super::SEGMENT;

/// `acc[i] = fma((sum - taken[b]) as f32, step[b], acc[i])` for the numbers of a segment of `blocks` blocks. Sums are
/// `[chunk][quarter][lane]`, as in [`super::lanes::Lanes`].
#[inline(always)]
pub(super) fn finish<const LANES: usize>(
    sums: &[i32; SEGMENT],
    step: &[f32; 4],
    taken: &[i32; 4],
    blocks: usize,
    acc: &mut [f32],
) {
    let place = |sums: &[i32], b: usize, acc: &mut [f32]| {
        for (a, s) in acc.iter_mut().zip(sums) {
            *a = (s.wrapping_sub(taken[b]) as f32).mul_add(step[b], *a);
        }
    };
    if let Ok(acc) = <&mut [f32; SEGMENT]>::try_from(&mut *acc) {
        // A quarter is a block, and its lanes follow each other.
        for (c, sums) in sums.chunks_exact(4 * LANES).enumerate() {
            for (b, sums) in sums.chunks_exact(LANES).enumerate() {
                place(sums, b, &mut acc[32 * b + LANES * c..][..LANES]);
            }
        }
        return;
    }
    for (i, sums) in sums.chunks_exact(4).enumerate() {
        let (c, j, k) = (i / LANES, i % LANES / (LANES / 4), i % (LANES / 4));
        let lane = LANES * c + 4 * k + j;
        let at = 32 * (lane % blocks) + 4 * (lane / blocks);
        if lane < 8 * blocks && at < acc.len() {
            let end = acc.len().min(at + 4);
            place(sums, lane % blocks, &mut acc[at..end]);
        }
    }
}
