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
//! - `|w.x - w^.x^| <= |(w - w^).x^| + |w| D`, by Cauchy and Schwarz;
//! - `|S - w^.x^| <= c |w^| (|x| + D)`: the integer sums are exact, each is rounded once to f32, then there are as
//!   many fused additions as blocks of 256, the tree and two multiplications. `c = 1.01 u (blocks + 7) + 2^-21`, the last
//!   of which pays for the f32 arithmetic of the bound itself.
//!
//! What is left is `(w - w^).x^`. Two numbers are kept of each row, and a step has a factor for either.
//!
//! ## At 6 bits: for certain
//! `|(w - w^).x^| <= r (|x| + D)`, and `|w^| <= |w| + r`, so with `r` and `|w|` of each row
//!
//! `|E - S| <= r A + |w| B`, `A = (1 + c) (|x| + D)`, `B = D + a |x| + c (|x| + D)`, plus what gradual underflow can lose.
//!
//! ## At 4 bits: but for odds of 2^-64 a step
//! Cauchy and Schwarz allow for activations that point along the rounding errors, some fifty times what errors that have
//! nothing to do with the activations add up to; at 4 bits nearly every row would survive. So these rows are rounded with
//! subtractive dither (`longbit_kernels`, `blocks`): whatever the row, the error of a weight is `s (b + e)` with `s` its
//! scale, `|b| <= 2^-12` the same in every draw of the dither and `e` uniform on 4096 places between -1/2 and 1/2,
//! independent of the other columns. The moment generating function of `e` is at most `sinh(t / 2) / (t / 2) <= exp(t^2 /
//! 24)`, so a sum of them over activations that do not depend on the dither exceeds `K V`, `V^2 = sum of (s x^)^2`, with a
//! probability of at most `2 exp(-6 K^2)` (Hoeffding's lemma with the constant of the uniform distribution). For `N` rows
//! together to be within it but for odds of `2^-64`, `K = sqrt((65 ln 2 + ln N) / 6)`, some 3.1; the part of `b` is at most
//! `2^-12 sqrt(n) V`.
//!
//! The premise: neither weights nor activations were made with the dither in mind. It is a fixed pseudo-random sequence
//! that appears nowhere else, and what a session feeds back, the likeliest tokens and their logits, does not depend on it.
//! Who chooses a row or an input by the dither can break this, and gets a token that is nearly as likely.
//!
//! With `X[g]` the energy of `x^` in the columns of scale `g` of `G`, `T^2 = sum of s[g]^2`, and both parted into mean and
//! deviation, `V^2 = sum of s[g]^2 X[g] <= T^2 X / G + C Y`, where `X` is the sum of `X[g]`, `C` and `Y` the norms of
//! the deviations of `s^2` and `X[g]`; so `V <= T sqrt(X / G) + (C / T) Y / (2 sqrt(X / G))`. Also `|w| <= 56.1 T` and
//! `|w^| <= 60.1 T` (64 columns of up to 7 and 7.5 steps), and rounding the dither's sums to integers costs half a step
//! in each of four lanes of a scale, `2 sqrt(G) T` units of `x^`. So the two numbers are `T` and `C / T`.
//!
//! # Both
//! Norms are computed in f64 with a margin for their own rounding, and every step is rounded upwards. Where a product
//! could leave the range of f32 there is no bound, and the row is scored exactly.
//!
//! # What follows
//! The k-th largest of all `S - bound` is at most the k-th largest `E`. A row with `S + bound` below it is not among the
//! k likeliest, whatever the order of equal logits; all others are scored with the bf16 rows.

use longbit_kernels::{BLOCK_COLS, BlockFormat, BlockShape, Planes};

use super::weights::{BlockMatrix, Table};

/// Rows that are longer have no bound: the sums of their codes could overflow.
const LONGEST_ROW: f64 = (1u64 << 60) as f64;
/// Bounds that are larger count for nothing: a logit could overflow. `|w| |x|` is at most `2^20` times the bound.
const LARGEST_BOUND: f32 = 1.267_650_6e30;
/// Margin of norms that are summed up in f64, for `2^22` columns and more.
const MARGIN: f64 = 1.0 + 1.0 / (1u64 << 28) as f64;
/// Odds of a step whose bounds do not hold, at 4 bits: `2^-ODDS`.
const ODDS: f64 = 64.0;
/// Scales of a row of a block at 4 bits.
const SCALES: usize = 4;
/// A chunk of rows that is looked at together.
const CHUNK: usize = 64;

/// A head of bf16 rows with a coarse copy.
pub struct TwoStage {
    /// The head's own bf16 table; none where it is the embedding.
    pub own: Option<Table>,
    /// The copy at 6 bits, or at 4 with dither.
    pub coarse: BlockMatrix,
    /// What the bound of each row is made of; infinite for a row without a bound.
    pub bounds: Vec<[f32; 2]>,
}

/// The next f32 that is not below `x`, which is not negative.
fn up(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) < x { near.next_up() } else { near }
}

/// The two numbers of row `row` of `data` (tiles of `shape`), with these sums of squares: of its numbers, and of what the
/// copy is off.
pub(crate) fn row_bound(shape: BlockShape, data: &[u8], row: usize, squares: f64, errors: f64) -> [f32; 2] {
    let (norm, error) = (squares.sqrt() * MARGIN, errors.sqrt() * MARGIN);
    let numbers = match shape.format {
        BlockFormat::Q6 | BlockFormat::Q4 => [error, norm],
        BlockFormat::Q4Dither => {
            let squares = || shape.scales(data, row).map(|scale| f64::from(scale) * f64::from(scale));
            let (sum, groups) = (squares().sum::<f64>(), squares().count() as f64);
            let deviation: f64 = squares().map(|square| (square - sum / groups).powi(2)).sum();
            let spread = if sum > 0.0 { (deviation / sum).sqrt() } else { 0.0 };
            [sum.sqrt() * MARGIN, spread * MARGIN]
        }
    };
    let bound = numbers.map(|x| up(x * MARGIN));
    // Also where a number is not finite.
    if norm < LONGEST_ROW && bound.iter().all(|b| b.is_finite()) { bound } else { [f32::INFINITY; 2] }
}

/// What the bounds of all rows have in common for one vector of activations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Certificate {
    factors: [f32; 2],
    offset: f32,
}

impl Certificate {
    /// For the activations `x`, rounded to `planes`, and a head of `shape`; none where they are not finite.
    pub(crate) fn new(shape: BlockShape, x: &[f32], planes: &Planes) -> Option<Self> {
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
        let exact = unit * (x.len().div_ceil(16) + 5) as f64 * norm;
        let blocks = (x.len().div_ceil(BLOCK_COLS) + 7) as f64;
        let coarse = (unit * blocks + 1.0 / (1u64 << 21) as f64) * (norm + off);
        let factors = match shape.format {
            BlockFormat::Q6 | BlockFormat::Q4 => [norm + off + coarse, off + exact + coarse],
            BlockFormat::Q4Dither => {
                let (mean, spread) = energies(planes, scale);
                let groups = (SCALES * x.len().div_ceil(BLOCK_COLS)) as f64;
                let likely = (((ODDS + 1.0) * 2f64.ln() + (shape.rows as f64).ln()) / 6.0).sqrt();
                let most = likely + (x.len() as f64).sqrt() / (1u64 << 12) as f64;
                let rest = 56.1 * (off + exact) + 60.1 * coarse + 2.0 * groups.sqrt() * scale;
                let side = if mean > 0.0 { spread / (2.0 * mean.sqrt()) } else { 0.0 };
                [most * mean.sqrt() + rest, most * side]
            }
        };
        let factors = factors.map(|factor| up(factor * (1.0 + 1.0 / (1u64 << 20) as f64)));
        // A result below the normal numbers is off by 2^-150 for each operation, in units of the scale within the sum.
        let offset = up(f64::from(f32::MIN_POSITIVE) * x.len() as f64 * (1.0 + scale));
        Some(Certificate { factors, offset })
    }

    /// How far the coarse score of a row can be from its bf16 logit.
    #[inline(always)]
    pub(crate) fn bound(self, row: [f32; 2]) -> f32 {
        let bound = row[0] * self.factors[0] + row[1] * self.factors[1] + self.offset;
        if bound < LARGEST_BOUND { bound } else { f32::INFINITY }
    }

    /// Adds the largest of all `score - bound` to `best`, which keeps the `k` largest in any order; fewer where there are
    /// fewer.
    pub(crate) fn largest_lower(self, scores: &[f32], rows: &[[f32; 2]], k: usize, best: &mut Vec<f32>) {
        // Nothing that is not above it counts; a NaN is not above anything.
        let mut enough = if best.len() < k { f32::NEG_INFINITY } else { keep(best, k) };
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
        rows: &[[f32; 2]],
        threshold: f32,
        first: usize,
        out: &mut Vec<u32>,
    ) {
        for (i, (scores, rows)) in scores.chunks(CHUNK).zip(rows.chunks(CHUNK)).enumerate() {
            let below = |score: f32, row: [f32; 2]| score + self.bound(row) < threshold;
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

/// Mean energy of the rounded activations in the columns of a scale, and the norm of the deviations from it.
fn energies(planes: &Planes, scale: f64) -> (f64, f64) {
    let mut groups = Vec::new();
    for (i, v) in planes.codes().enumerate() {
        let group = i / BLOCK_COLS * SCALES + i / 4 % SCALES;
        if groups.len() <= group {
            groups.resize((i / BLOCK_COLS + 1) * SCALES, 0i64);
        }
        // Below 2^37: 64 squares of 15 bits.
        groups[group] += i64::from(v) * i64::from(v);
    }
    let mean = groups.iter().sum::<i64>() as f64 / groups.len().max(1) as f64;
    let deviation: f64 = groups.iter().map(|&energy| (energy as f64 - mean).powi(2)).sum();
    let unit = scale * scale * MARGIN;
    (mean * unit, deviation.sqrt() * unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use longbit_kernels::{BlockFormat, BlockShape, Kernels};
    use proptest::prelude::*;

    /// Whether the certificate holds for each of `rows`, and the largest share of a bound that was used.
    fn holds(format: BlockFormat, rows: &[u16], x: &[f32]) -> Result<f32, TestCaseError> {
        let k = Kernels::best();
        let n = rows.len() / x.len();
        let shape = BlockShape { format, rows: n, cols: x.len() };
        let mut data = vec![0; shape.bytes()];
        k.pack_blocks(shape, rows, &mut data);
        let mut planes = Planes::default();
        k.quantize_planes(format, x, &mut planes);
        let certificate = Certificate::new(shape, x, &planes);
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
            let bound = certificate.bound(row_bound(shape, &data, r, squares, errors));
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
            for format in [BlockFormat::Q6, BlockFormat::Q4Dither] {
                holds(format, &rows, &x)?;
            }
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
            let used = holds(BlockFormat::Q6, &row, &x)?;
            prop_assert!(used > 0.9, "{used}");
        }
    }

    /// The sum of `errors * x` of a row over the norm of `scale * x`, for rows of `q4-dither`.
    fn normed_errors(rows: &[u16], x: &[f32]) -> Vec<f64> {
        let k = Kernels::best();
        let shape = BlockShape { format: BlockFormat::Q4Dither, rows: rows.len() / x.len(), cols: x.len() };
        let mut data = vec![0; shape.bytes()];
        k.pack_blocks(shape, rows, &mut data);
        let mut back = vec![0.0; x.len()];
        let mut of = |(r, row): (usize, &[u16])| {
            shape.read(&data, r, &mut back);
            let scales: Vec<f64> = shape.scales(&data, r).map(f64::from).collect();
            let (mut sum, mut squares) = (0.0, 0.0);
            for (i, (&w, &b)) in row.iter().zip(&back).enumerate() {
                let x = f64::from(x[i]);
                sum += (f64::from(f32::from_bits(u32::from(w) << 16)) - f64::from(b)) * x;
                squares += (x * scales[i / BLOCK_COLS * SCALES + i / 4 % SCALES]).powi(2);
            }
            sum / squares.sqrt()
        };
        rows.chunks_exact(x.len()).enumerate().map(&mut of).collect()
    }

    #[test]
    fn errors_under_dither_add_up_as_independent_uniform_numbers_do_whatever_the_rows() {
        let cols = 2560;
        let unit = |i: usize| (crate::rng::mix(77, i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        // All weights but one of a scale at the same place between two codes, and activations that all agree with it:
        // without dither the errors would be the same and add up to hundreds.
        let level = |r: usize, i: usize| {
            if i % 256 < 16 && i.is_multiple_of(4) { 7.0 } else { r as f32 / 250.0 - 2.0 }
        };
        let leveled: Vec<u16> = (0..1000 * cols).map(|i| bf16(level(i / cols, i % cols))).collect();
        let random: Vec<u16> = (0..1000 * cols).map(|i| bf16(unit(i))).collect();
        for (rows, name) in [(&leveled, "leveled"), (&random, "random")] {
            for agreeing in [true, false] {
                let x: Vec<f32> = (0..cols).map(|i| if agreeing { 1.0 } else { unit(i + 99) }).collect();
                let errors = normed_errors(rows, &x);
                let largest = errors.iter().fold(0.0f64, |m, e| m.max(e.abs()));
                let rms = (errors.iter().map(|e| e * e).sum::<f64>() / errors.len() as f64).sqrt();
                println!("{name} {agreeing}: rms {rms:.3}, largest {largest:.3}");
                // A uniform number has the variance 1 / 12. All rows share the dither, so like rows have like errors.
                assert!(largest < 1.8, "{name}: {largest}");
                assert!(rms < 0.6 && (name == "leveled" || rms > 0.25), "{name}: {rms}");
            }
        }
    }

    #[test]
    fn the_bound_at_4_bits_is_near_what_its_formula_says() {
        let (cols, rows) = (2560, 64);
        let unit = |i: usize| (crate::rng::mix(5, i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let x: Vec<f32> = (0..cols).map(unit).collect();
        let weights: Vec<u16> = (0..rows * cols).map(|i| bf16(unit(i + cols))).collect();
        let k = Kernels::best();
        let shape = BlockShape { format: BlockFormat::Q4Dither, rows, cols };
        let mut data = vec![0; shape.bytes()];
        k.pack_blocks(shape, &weights, &mut data);
        let mut planes = Planes::default();
        k.quantize_planes(shape.format, &x, &mut planes);
        let certificate = Certificate::new(shape, &x, &planes).unwrap();
        for r in 0..rows {
            let numbers = row_bound(shape, &data, r, 1.0, 1.0);
            let scales: Vec<f64> = shape.scales(&data, r).map(f64::from).collect();
            let group = |i: usize| i / BLOCK_COLS * SCALES + i / 4 % SCALES;
            let energy: f64 = (0..cols).map(|i| (f64::from(x[i]) * scales[group(i)]).powi(2)).sum();
            let likely = ((65.0 * 2f64.ln() + (rows as f64).ln()) / 6.0).sqrt() * energy.sqrt();
            let bound = f64::from(certificate.bound(numbers));
            assert!(bound >= likely && bound < 1.04 * likely, "{r}: {bound} {likely}");
        }
        // Rows with a number that is none, or of zeros.
        assert_eq!(row_bound(shape, &data, 0, f64::NAN, 0.0), [f32::INFINITY; 2]);
        let zeros = vec![0; shape.bytes()];
        assert_eq!(row_bound(shape, &zeros, 0, 0.0, 0.0), [0.0; 2]);
    }

    #[test]
    fn selections_by_hand() {
        let certificate = Certificate { factors: [1.0, 0.0], offset: 0.0 };
        let scores: Vec<f32> = (0..200).map(|i| ((i * 37) % 200) as f32).collect();
        let mut rows = vec![[0.5f32, 7.0]; 200];
        rows[10] = [f32::INFINITY; 2];
        for k in [1, 5, 40, 199, 200, 300] {
            let mut best = Vec::new();
            certificate.largest_lower(&scores, &rows, k, &mut best);
            best.sort_by(|a, b| b.total_cmp(a));
            let mut all: Vec<f32> =
                scores.iter().zip(&rows).filter(|(_, r)| r[0].is_finite()).map(|(s, r)| s - r[0]).collect();
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
