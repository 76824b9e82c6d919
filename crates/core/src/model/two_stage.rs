//! The exact two-stage head: a coarse copy of the rows finds the few that can be among the likeliest, and the bf16 rows
//! score those.
//!
//! # The certificate
//! For a bf16 row `w` of `n` numbers and an activation vector `x`, let `w^` be the row that the codes of the coarse copy
//! stand for, `x^` the vector that the rounded activations stand for, `E` the logit of the bf16 head and `S` the coarse
//! score, both as computed in f32. With `|.|` the Euclidean norm, `r = |w - w^|`, `D = |x - x^|` and `u = 2^-24`:
//!
//! - `|E - w.x| <= a |w| |x|`, where `a` covers the roundings on the longest path of a sum: `n / 16` fused additions in
//!   a lane and four levels of the tree, `a = 1.01 u (n / 16 + 5)`;
//! - `|w.x - w^.x^| <= |(w - w^).x| + |w^.(x - x^)| <= r |x| + (|w| + r) D`, by Cauchy and Schwarz;
//! - `|S - w^.x^| <= c (|w| + r) (|x| + D)`: the integer sums are exact, each is rounded once to f32, then there are as
//!   many fused additions as blocks of 256, the tree and two multiplications. `c = 1.01 u (blocks + 7) + 2^-22`, the last
//!   of which pays for the f32 arithmetic of the bound itself.
//!
//! Together `|E - S| <= r A + |w| B` with `A = |x| + D + c (|x| + D)` and `B = D + a |x| + c (|x| + D)`. `B` is some
//! ten-thousandths of `A`, so one number a row is kept, `R = r + p |w|` with `p = 2^-12`, and
//!
//! `|E - S| <= R max(A, B / p)`, plus what gradual underflow can lose.
//!
//! Norms are computed in f64 with a margin for their own rounding, and every step is rounded upwards. Where a product
//! could leave the range of f32 there is no bound, and the row is scored exactly.
//!
//! # What follows
//! The k-th largest of all `S - bound` is at most the k-th largest `E`. A row with `S + bound` below it is not among the
//! k likeliest, whatever the order of equal logits; all others are scored with the bf16 rows.

use longbit_kernels::{BLOCK_COLS, Planes};

use super::weights::{BlockMatrix, Table};

/// The share of the row's norm in its bound.
const SHARE: f64 = 1.0 / 4096.0;
/// Rows that are longer have no bound: the sums of their codes could overflow.
const LONGEST_ROW: f64 = (1u64 << 60) as f64;
/// Bounds that are larger count for nothing: a logit could overflow. `|w| |x|` is at most `1 / SHARE` times the bound.
const LARGEST_BOUND: f32 = 1.267_650_6e30;
/// Margin of norms that are summed up in f64, for `2^22` columns and more.
const MARGIN: f64 = 1.0 + 1.0 / (1u64 << 28) as f64;
/// A chunk of rows that is looked at together.
const CHUNK: usize = 64;

/// A head of bf16 rows with a coarse copy.
pub struct TwoStage {
    /// The head's own bf16 table; none where it is the embedding.
    pub own: Option<Table>,
    /// The copy at 6 bits.
    pub coarse: BlockMatrix,
    /// `R` of each row; infinite for a row without a bound.
    pub bounds: Vec<f32>,
}

/// The next f32 that is not below `x`, which is not negative.
fn up(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) < x { near.next_up() } else { near }
}

/// `R` of a row with these sums of squares: of its numbers, and of what the copy is off.
pub(crate) fn row_bound(squares: f64, errors: f64) -> f32 {
    let (norm, error) = (squares.sqrt() * MARGIN, errors.sqrt() * MARGIN);
    let bound = up((error + SHARE * norm) * MARGIN);
    // Also where a number is not finite.
    if norm < LONGEST_ROW && bound.is_finite() { bound } else { f32::INFINITY }
}

/// What the bounds of all rows have in common for one vector of activations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Certificate {
    factor: f32,
    offset: f32,
}

impl Certificate {
    /// For the activations `x`, rounded to `planes`; none where they are not finite.
    pub(crate) fn new(x: &[f32], planes: &Planes) -> Option<Self> {
        let scale = f64::from(planes.scale());
        if !scale.is_finite() {
            return None;
        }
        let (mut squares, mut errors) = (0.0f64, 0.0f64);
        for (&x, v) in x.iter().zip(planes.codes()) {
            let x = f64::from(x);
            let error = x - f64::from(v) * scale;
            squares += x * x;
            errors += error * error;
        }
        let norm = squares.sqrt() * MARGIN;
        // The difference itself is rounded, by 2^-53 of x at the most.
        let off = errors.sqrt() * MARGIN + norm / (1u64 << 50) as f64;
        let unit = 1.01 / (1u64 << 24) as f64;
        let lanes = (x.len().div_ceil(16) + 5) as f64;
        let blocks = (x.len().div_ceil(BLOCK_COLS) + 7) as f64;
        let coarse = (unit * blocks + 1.0 / (1u64 << 22) as f64) * (norm + off);
        let a = norm + off + coarse;
        let b = off + unit * lanes * norm + coarse;
        let factor = up(a.max(b / SHARE) * (1.0 + 1.0 / (1u64 << 20) as f64));
        // A result below the normal numbers is off by 2^-150 for each operation, in units of the scale within the sum.
        let offset = up(f64::from(f32::MIN_POSITIVE) * x.len() as f64 * (1.0 + scale));
        Some(Certificate { factor, offset })
    }

    /// How far the coarse score of a row can be from its bf16 logit.
    pub(crate) fn bound(self, row: f32) -> f32 {
        let bound = row * self.factor + self.offset;
        if bound < LARGEST_BOUND { bound } else { f32::INFINITY }
    }

    /// The largest `k` of all `score - bound`, in any order; fewer where there are fewer.
    pub(crate) fn largest_lower(self, scores: &[f32], rows: &[f32], k: usize, best: &mut Vec<f32>) {
        best.clear();
        // Nothing that is not above it counts; a NaN is not above anything.
        let mut enough = f32::NEG_INFINITY;
        let mut lower = [f32::NEG_INFINITY; CHUNK];
        for (scores, rows) in scores.chunks(CHUNK).zip(rows.chunks(CHUNK)) {
            let mut any = 0;
            for ((lower, &score), &row) in lower.iter_mut().zip(scores).zip(rows) {
                *lower = score - self.bound(row);
                any |= u32::from(*lower > enough);
            }
            if any == 0 {
                continue;
            }
            for &lower in &lower[..scores.len()] {
                if lower > enough {
                    best.push(lower);
                    // Twice as many as are needed, so that they are seldom sorted out.
                    if best.len() >= 2 * k {
                        enough = keep(best, k);
                    }
                }
            }
        }
        if best.len() > k {
            keep(best, k);
        }
    }

    /// The rows whose `score + bound` is not below `threshold`, counted from `first`.
    pub(crate) fn survivors(
        self,
        scores: &[f32],
        rows: &[f32],
        threshold: f32,
        first: usize,
        out: &mut Vec<u32>,
    ) {
        for (i, (scores, rows)) in scores.chunks(CHUNK).zip(rows.chunks(CHUNK)).enumerate() {
            let below = |score: f32, row: f32| score + self.bound(row) < threshold;
            let mut all = 1;
            for (&score, &row) in scores.iter().zip(rows) {
                all &= u32::from(below(score, row));
            }
            if all == 0 {
                let some = scores.iter().zip(rows).enumerate().filter(|&(_, (&s, &r))| !below(s, r));
                out.extend(some.map(|(j, _)| (first + i * CHUNK + j) as u32));
            }
        }
    }
}

/// Keeps the `k` largest of more numbers, none of which is a NaN, and returns the least of them.
pub(crate) fn keep(best: &mut Vec<f32>, k: usize) -> f32 {
    let (_, &mut least, _) = best.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    best.truncate(k);
    least
}

#[cfg(test)]
mod tests {
    use super::*;
    use longbit_kernels::{BlockFormat, BlockShape, Kernels};
    use proptest::prelude::*;

    /// Whether the certificate holds for each of `rows`, and the largest share of a bound that was used.
    fn holds(rows: &[u16], x: &[f32]) -> Result<f32, TestCaseError> {
        let k = Kernels::best();
        let n = rows.len() / x.len();
        let shape = BlockShape { format: BlockFormat::Q6, rows: n, cols: x.len() };
        let mut data = vec![0; shape.bytes()];
        k.pack_blocks(shape, rows, &mut data);
        let mut planes = Planes::default();
        k.quantize_planes(x, &mut planes);
        let certificate = Certificate::new(x, &planes);
        let (mut exact, mut coarse, mut back) = (vec![0.0; n], vec![0.0; n], vec![0.0; x.len()]);
        k.head_bf16(rows, x, &mut exact);
        k.head_blocks(shape, &data, 0..shape.tiles(), &planes, &mut coarse);
        let mut used = 0.0f32;
        for (r, row) in rows.chunks(x.len()).enumerate() {
            shape.read(&data, r, &mut back);
            let (squares, errors) = k.square_sums(row, &back);
            let Some(certificate) = certificate else {
                prop_assert!(x.iter().any(|x| !x.is_finite()));
                continue;
            };
            let bound = certificate.bound(row_bound(squares, errors));
            prop_assert!(bound >= 0.0);
            if bound.is_finite() {
                let off = f64::from(exact[r]) - f64::from(coarse[r]);
                prop_assert!(off.abs() <= f64::from(bound), "row {r}: {} {} {bound}", exact[r], coarse[r]);
                used = used.max((off.abs() / f64::from(bound)) as f32);
            }
        }
        Ok(used)
    }

    fn bf16(x: f32) -> u16 {
        (x.to_bits() >> 16) as u16
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn a_coarse_score_is_within_its_bound(
            cols in 1usize..700,
            seed in any::<u64>(),
            (row_power, x_power) in (-140i32..127, -140i32..127),
            outliers in 0usize..4,
            factor in 0i32..30,
        ) {
            let random = |i: usize| crate::rng::mix(seed, i as u64);
            let unit = |i: usize| (random(i) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let mut x: Vec<f32> = (0..cols).map(|i| unit(i) * 2f32.powi(x_power)).collect();
            let mut rows: Vec<u16> = (0..5 * cols).map(|i| bf16(unit(i + cols) * 2f32.powi(row_power))).collect();
            for i in 0..outliers {
                x[random(i + 7777) as usize % cols] *= 2f32.powi(factor);
                let at = random(i + 8888) as usize % rows.len();
                rows[at] = bf16(unit(i) * 2f32.powi((row_power + factor).min(127)));
            }
            rows[..cols].fill(0);
            holds(&rows, &x)?;
        }

        #[test]
        fn vectors_that_point_along_the_error_come_near_the_bound(cols in 200usize..700, seed in any::<u64>()) {
            let unit = |i: usize| (crate::rng::mix(seed, i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let row: Vec<u16> = (0..cols).map(|i| bf16(unit(i))).collect();
            let shape = BlockShape { format: BlockFormat::Q6, rows: 1, cols };
            let mut data = vec![0; shape.bytes()];
            Kernels::best().pack_blocks(shape, &row, &mut data);
            let mut back = vec![0.0; cols];
            shape.read(&data, 0, &mut back);
            let wide = |w: u16| f32::from_bits(u32::from(w) << 16);
            let x: Vec<f32> = row.iter().zip(&back).map(|(&w, &b)| wide(w) - b).collect();
            let used = holds(&row, &x)?;
            prop_assert!(used > 0.9, "{used}");
        }
    }

    #[test]
    fn selections_by_hand() {
        let certificate = Certificate { factor: 1.0, offset: 0.0 };
        let scores: Vec<f32> = (0..200).map(|i| ((i * 37) % 200) as f32).collect();
        let mut rows = vec![0.5f32; 200];
        rows[10] = f32::INFINITY;
        for k in [1, 5, 40, 199, 200, 300] {
            let mut best = Vec::new();
            certificate.largest_lower(&scores, &rows, k, &mut best);
            best.sort_by(|a, b| b.total_cmp(a));
            let mut all: Vec<f32> =
                scores.iter().zip(&rows).filter(|(_, r)| r.is_finite()).map(|(s, r)| s - r).collect();
            all.sort_by(|a, b| b.total_cmp(a));
            all.truncate(k);
            assert_eq!(best, all, "{k}");
        }
        let mut out = Vec::new();
        certificate.survivors(&scores, &rows, 199.0, 1000, &mut out);
        let expected: Vec<u32> =
            (0..200u32).filter(|&i| i == 10 || scores[i as usize] >= 198.5).map(|i| i + 1000).collect();
        assert_eq!(out, expected);
    }
}
