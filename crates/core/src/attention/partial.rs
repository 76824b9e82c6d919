//! A softmax over some of the tokens, in a form that merges: for each query head the largest logit, the sum of
//! `exp(logit - max)` and the so-weighted sum of values.
//!
//! Laid out flat as `[group][2 + head_dim]` f32 (max, sum, accumulator), so that partials live in buffers that threads
//! share. Partials of disjoint token sets merge exactly (log-sum-exp); merging in a fixed order gives fixed bits.

use longbit_kernels::Kernels;

/// Numbers of one query head's partial.
pub const fn stride(head_dim: usize) -> usize {
    2 + head_dim
}

/// Makes every head's partial the empty set.
pub fn clear(partials: &mut [f32], head_dim: usize) {
    for partial in partials.chunks_exact_mut(stride(head_dim)) {
        partial.fill(0.0);
        partial[0] = f32::NEG_INFINITY;
    }
}

/// Merges `others`, partials of the same group one after another, into `into`, head by head and in order. `factors` grows
/// as needed and keeps nothing.
///
/// The factors of all steps come first: they depend on the largest logits alone, so that all exponentials of a head are
/// taken in one go.
pub fn merge(kernels: &Kernels, into: &mut [f32], others: &[f32], head_dim: usize, factors: &mut Vec<f32>) {
    let (width, stride) = (into.len(), stride(head_dim));
    for (h, a) in into.chunks_exact_mut(stride).enumerate() {
        let parts = || others.chunks_exact(width).map(|other| &other[h * stride..(h + 1) * stride]);
        let parts = || parts().filter(|b| b[0] != f32::NEG_INFINITY);
        factors.clear();
        let mut max = a[0];
        for b in parts() {
            // Other threads left them in other caches; the accumulators are read when all exponentials are known.
            kernels.request(bytemuck::cast_slice(b));
            let next = max.max(b[0]);
            factors.extend([max - next, b[0] - next]);
            max = next;
        }
        kernels.exp_sum(factors, 0.0);
        a[0] = max;
        for (b, factors) in parts().zip(factors.chunks_exact(2)) {
            a[1] = b[1].mul_add(factors[1], a[1] * factors[0]);
            kernels.scale_add(&mut a[2..], factors[0], &b[2..], factors[1]);
        }
    }
}

/// Writes `accumulator / sum` of every head to `out`, `[group][head_dim]`; zeros where nothing was attended.
pub fn finish(kernels: &Kernels, partials: &[f32], head_dim: usize, out: &mut [f32]) {
    for (partial, out) in partials.chunks_exact(stride(head_dim)).zip(out.chunks_exact_mut(head_dim)) {
        out.copy_from_slice(&partial[2..]);
        let inverse = if partial[1] > 0.0 { 1.0 / partial[1] } else { 0.0 };
        kernels.scale(out, inverse);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The partial of explicit logits and values, head_dim 3.
    fn partial(tokens: &[(f32, [f32; 3])]) -> Vec<f32> {
        let max = tokens.iter().map(|t| t.0).fold(f32::NEG_INFINITY, f32::max);
        let mut out = vec![max, 0.0, 0.0, 0.0, 0.0];
        for (z, v) in tokens {
            let w = (z - max).exp();
            out[1] += w;
            for (o, x) in out[2..].iter_mut().zip(v) {
                *o += w * x;
            }
        }
        out
    }

    fn close(a: &[f32], b: &[f32]) {
        for (x, y) in a.iter().zip(b) {
            assert!((x - y).abs() <= 1e-5 * (1.0 + y.abs()), "{a:?} {b:?}");
        }
    }

    const TOKENS: [(f32, [f32; 3]); 5] = [
        (1.0, [1.0, 2.0, 3.0]),
        (-30.0, [5.0, -1.0, 0.5]),
        (4.0, [0.0, 1.0, -2.0]),
        (88.0, [0.1, 0.2, 0.3]),
        (87.0, [-4.0, 0.0, 9.0]),
    ];

    #[test]
    fn merging_disjoint_sets_is_the_whole_in_any_order() {
        let kernels = Kernels::best();
        let whole = partial(&TOKENS);
        for split in 0..=5 {
            let (left, right) = TOKENS.split_at(split);
            for (a, b) in [(left, right), (right, left)] {
                let mut merged = vec![0.0; 5];
                clear(&mut merged, 3);
                for part in [a, b] {
                    if !part.is_empty() {
                        merge(kernels, &mut merged, &partial(part), 3, &mut Vec::new());
                    }
                }
                close(&merged, &whole);
            }
        }
    }

    /// Several at once are the same bits as one after another, with an empty one among them.
    #[test]
    fn merging_at_once_is_merging_in_turn() {
        let kernels = Kernels::best();
        let mut empty = vec![0.0; 5];
        clear(&mut empty, 3);
        let parts = [partial(&TOKENS[..2]), empty.clone(), partial(&TOKENS[2..3]), partial(&TOKENS[3..])];
        // A group of two heads, the second with the same tokens in another order.
        let groups: Vec<Vec<f32>> = (0..4).map(|i| [&parts[i][..], &parts[3 - i][..]].concat()).collect();
        let mut start = [empty.clone(), empty].concat();
        let mut at_once = start.clone();
        merge(kernels, &mut at_once, &groups.concat(), 3, &mut vec![5.0]);
        for group in &groups {
            merge(kernels, &mut start, group, 3, &mut Vec::new());
        }
        assert_eq!(at_once, start);
        close(&at_once[..5], &partial(&TOKENS));
        close(&at_once[5..], &partial(&TOKENS));
    }

    #[test]
    fn the_empty_set_is_neutral_and_finishes_to_zero() {
        let kernels = Kernels::best();
        let mut empty = vec![7.0; 5];
        clear(&mut empty, 3);
        let mut a = partial(&TOKENS);
        let before = a.clone();
        merge(kernels, &mut a, &empty, 3, &mut Vec::new());
        assert_eq!(a, before);
        let mut out = vec![1.0; 3];
        finish(kernels, &empty, 3, &mut out);
        assert_eq!(out, [0.0; 3]);
        let mut from_empty = empty.clone();
        merge(kernels, &mut from_empty, &a, 3, &mut Vec::new());
        assert_eq!(from_empty, a);
    }
}
