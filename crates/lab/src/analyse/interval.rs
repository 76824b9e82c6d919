//! Intervals that assume nothing about the distribution: order statistics for a median, a binomial bound for a tail
//! quantile, the Mann-Whitney interval for the shift between two runs, and a seeded bootstrap where no exact one exists.

use super::stats;

/// An interval and the confidence that it really has (discrete intervals overshoot what was asked).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
    /// Confidence reached, at least the one asked for.
    pub coverage: f64,
}

/// Two-sided interval for the median by order statistics (the sign test turned around): `[x_(k), x_(n+1-k)]` with the
/// largest `k` whose coverage `1 - 2 P(Bin(n, 1/2) < k)` reaches `confidence`. Six samples are the fewest that give
/// 95 % (their range covers 96.9 %); `None` below.
pub fn median_interval(samples: &[f64], confidence: f64) -> Option<Interval> {
    let n = samples.len();
    if n == 0 {
        return None;
    }
    // ln of P(Bin(n, 1/2) = i), from i = 0 upwards; logarithms because 2^-n underflows for long runs.
    let mut ln_pmf = -(n as f64) * std::f64::consts::LN_2;
    let (mut below, mut best) = (0.0, None);
    for k in 1..=n.div_ceil(2) {
        below += ln_pmf.exp();
        let coverage = 1.0 - 2.0 * below;
        if coverage < confidence {
            break;
        }
        best = Some((k, coverage));
        ln_pmf += ((n - k + 1) as f64 / k as f64).ln();
    }
    let (k, coverage) = best?;
    let s = stats::sorted(samples);
    Some(Interval { lo: s[k - 1], hi: s[n - k], coverage })
}

/// Fewest samples that bound the 99th percentile at 95 %: the smallest n with `0.99^n <= 0.05`.
pub const MIN_SAMPLES_P99_BOUND: usize = 299;

/// One-sided upper confidence bound of the 99th percentile: the smallest order statistic `x_(k)` with
/// `P(Bin(n, 0.99) >= k) <= 0.05`. `None` below [`MIN_SAMPLES_P99_BOUND`] samples, where not even the largest sample is
/// a bound. Takes the samples as independent; a burst of interference breaks that.
pub fn p99_upper_bound(samples: &[f64]) -> Option<f64> {
    let n = samples.len();
    if n < MIN_SAMPLES_P99_BOUND {
        return None;
    }
    let (p, alpha) = (stats::P99, 0.05);
    let step = ((1.0 - p) / p).ln();
    let mut k = n;
    let mut ln_pmf = n as f64 * p.ln(); // P(X = k)
    let mut tail = ln_pmf.exp(); // P(X >= k)
    while k > 1 {
        let next = ln_pmf + (k as f64 / (n - k + 1) as f64).ln() + step;
        if tail + next.exp() > alpha {
            break;
        }
        ln_pmf = next;
        tail += next.exp();
        k -= 1;
    }
    stats::sorted(samples).get(k - 1).copied()
}

/// How much larger `head` is than `base`, as a shift, without assuming a distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// Hodges-Lehmann estimate: the median of all differences `head_i - base_j`.
    pub estimate: f64,
    /// Its interval; none when there are too few samples for the confidence (four against four are enough for 95 %).
    pub interval: Option<Interval>,
}

/// Hodges-Lehmann shift with the exact Mann-Whitney interval: `[d_(k), d_(mn+1-k)]` of the ordered differences, with the
/// largest `k` for which `1 - 2 P(U < k)` reaches `confidence`.
pub fn shift(base: &[f64], head: &[f64], confidence: f64) -> Option<Shift> {
    let mut differences: Vec<f64> = head.iter().flat_map(|h| base.iter().map(move |b| h - b)).collect();
    differences.sort_unstable_by(f64::total_cmp);
    let estimate = stats::median_of_sorted(&differences)?;
    let pmf = mann_whitney_pmf(base.len(), head.len());
    let (mut below, mut best) = (0.0, None);
    for k in 1..=differences.len().div_ceil(2) {
        below += pmf[k - 1];
        let coverage = 1.0 - 2.0 * below;
        if coverage < confidence {
            break;
        }
        best = Some((k, coverage));
    }
    let interval = best.map(|(k, coverage)| Interval {
        lo: differences[k - 1],
        hi: differences[differences.len() - k],
        coverage,
    });
    Some(Shift { estimate, interval })
}

/// P(U = u) of the Mann-Whitney statistic for group sizes `m` and `n` under no difference: coefficients of the Gaussian
/// binomial, built as a product of `(1 - q^(n+i)) / (1 - q^i)` and normalised as it grows.
fn mann_whitney_pmf(m: usize, n: usize) -> Vec<f64> {
    let mut poly = vec![0.0; m * n + 1];
    poly[0] = 1.0;
    for i in 1..=m {
        for u in (n + i..poly.len()).rev() {
            poly[u] -= poly[u - n - i];
        }
        for u in i..poly.len() {
            poly[u] += poly[u - i];
        }
        let scale = i as f64 / (n + i) as f64; // the sum after this factor is C(n + i, i)
        poly.iter_mut().for_each(|p| *p *= scale);
    }
    poly
}

/// Percentile bootstrap, seeded: draws `rounds` times with replacement from the units `0..base` and `0..head`, hands
/// the drawn indices to `statistic` and takes the central `confidence` of what it returns. `None` when the statistic is.
pub fn bootstrap(
    base: usize,
    head: usize,
    rounds: usize,
    confidence: f64,
    seed: u64,
    mut statistic: impl FnMut(&[usize], &[usize]) -> Option<f64>,
) -> Option<Interval> {
    if base == 0 || head == 0 || rounds == 0 {
        return None;
    }
    let mut rng = SplitMix64(seed);
    let mut values = Vec::with_capacity(rounds);
    let (mut drawn_base, mut drawn_head) = (vec![0; base], vec![0; head]);
    for _ in 0..rounds {
        drawn_base.fill_with(|| rng.below(base));
        drawn_head.fill_with(|| rng.below(head));
        values.push(statistic(&drawn_base, &drawn_head)?);
    }
    values.sort_unstable_by(f64::total_cmp);
    let tail = 0.5 * (1.0 - confidence);
    Some(Interval {
        lo: stats::quantile_of_sorted(&values, tail)?,
        hi: stats::quantile_of_sorted(&values, 1.0 - tail)?,
        coverage: confidence,
    })
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, seeded, the same on every platform.
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n` (multiply-shift; its bias is below 2^-32 for the sizes used here).
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (((self.next_u64() >> 32) * n as u64) >> 32) as usize
    }

    /// Uniform in `[0, 1)`.
    #[cfg(test)]
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A skewed sample with median ln 2: order statistics must not care about the skew.
    fn exponential(rng: &mut SplitMix64, n: usize) -> Vec<f64> {
        (0..n).map(|_| -(1.0 - rng.unit()).ln()).collect()
    }

    #[test]
    fn median_interval_of_known_sizes() {
        let xs = |n: usize| (1..=n).map(|i| i as f64).collect::<Vec<_>>();
        assert_eq!(median_interval(&xs(5), 0.95), None);
        let six = median_interval(&xs(6), 0.95).unwrap();
        assert_eq!((six.lo, six.hi), (1.0, 6.0));
        assert!((six.coverage - 0.96875).abs() < 1e-12);
        // Table values for 95 %: n = 9 gives ranks 2 and 8, n = 20 gives 6 and 15, n = 50 gives 18 and 33.
        for (n, lo, hi) in [(9, 2.0, 8.0), (20, 6.0, 15.0), (50, 18.0, 33.0)] {
            let i = median_interval(&xs(n), 0.95).unwrap();
            assert_eq!((i.lo, i.hi), (lo, hi), "n = {n}");
        }
        assert!(median_interval(&xs(3000), 0.95).unwrap().coverage >= 0.95, "no underflow");
    }

    #[test]
    fn median_interval_covers_as_often_as_it_says() {
        let mut rng = SplitMix64(7);
        let truth = std::f64::consts::LN_2;
        for n in [6, 9, 20] {
            let rounds = 4000;
            let mut hits = 0;
            let mut claimed = 0.0;
            for _ in 0..rounds {
                let i = median_interval(&exponential(&mut rng, n), 0.95).unwrap();
                hits += u32::from(i.lo <= truth && truth <= i.hi);
                claimed = i.coverage;
            }
            let seen = f64::from(hits) / f64::from(rounds);
            assert!((seen - claimed).abs() < 0.012, "n = {n}: claims {claimed}, covers {seen}");
        }
    }

    #[test]
    fn p99_bound_needs_299_samples() {
        let xs: Vec<f64> = (1..=299).map(f64::from).collect();
        assert_eq!(p99_upper_bound(&xs[..298]), None);
        assert_eq!(p99_upper_bound(&xs), Some(299.0));
        assert!(0.99f64.powi(299) <= 0.05 && 0.99f64.powi(298) > 0.05);
        // With 473 samples the second largest becomes a bound: 0.99^473 + 473 * 0.01 * 0.99^472 <= 0.05.
        let more: Vec<f64> = (1..=473).map(f64::from).collect();
        assert_eq!(p99_upper_bound(&more[..472]), Some(472.0));
        assert_eq!(p99_upper_bound(&more), Some(472.0));
    }

    #[test]
    fn p99_bound_lies_above_the_quantile_often_enough() {
        let mut rng = SplitMix64(11);
        let truth = -(0.01f64).ln();
        let rounds = 1500;
        for n in [299, 384, 1000] {
            let over = (0..rounds)
                .filter(|_| p99_upper_bound(&exponential(&mut rng, n)).is_some_and(|b| b >= truth))
                .count();
            let share = over as f64 / rounds as f64;
            assert!(share > 0.935, "n = {n}: {share}");
        }
        let long = exponential(&mut rng, 120_000);
        let bound = p99_upper_bound(&long).unwrap();
        assert!((bound / truth - 1.0).abs() < 0.03, "no underflow at 120k samples: {bound} against {truth}");
    }

    #[test]
    fn mann_whitney_matches_counting() {
        // m = n = 2: the six interleavings give U = 0 1 2 2 3 4.
        let p = mann_whitney_pmf(2, 2);
        for (u, count) in [1.0, 1.0, 2.0, 1.0, 1.0].iter().enumerate() {
            assert!((p[u] - count / 6.0).abs() < 1e-12);
        }
        assert!((mann_whitney_pmf(20, 30).iter().sum::<f64>() - 1.0).abs() < 1e-9);
        // Critical values of the two-sided 5 % test: 6 against 6 rejects at U <= 5, 8 against 8 at U <= 13.
        for (n, critical) in [(6usize, 5usize), (8, 13)] {
            let p = mann_whitney_pmf(n, n);
            assert!(2.0 * p[..=critical].iter().sum::<f64>() <= 0.05);
            assert!(2.0 * p[..=critical + 1].iter().sum::<f64>() > 0.05);
        }
    }

    #[test]
    fn shift_finds_the_difference_and_covers_it() {
        assert!(shift(&[1.0, 2.0, 3.0], &[2.0, 3.0, 4.0], 0.95).unwrap().interval.is_none());
        assert!(shift(&[1.0, 2.0, 3.0, 4.0], &[2.0, 3.0, 4.0, 5.0], 0.95).unwrap().interval.is_some());
        assert_eq!(shift(&[], &[1.0], 0.95), None);
        let mut rng = SplitMix64(3);
        let (mut hits, rounds) = (0, 2000);
        for _ in 0..rounds {
            let base = exponential(&mut rng, 6);
            let head: Vec<f64> = exponential(&mut rng, 6).iter().map(|x| x + 0.3).collect();
            let i = shift(&base, &head, 0.95).unwrap().interval.unwrap();
            hits += u32::from(i.lo <= 0.3 && 0.3 <= i.hi);
        }
        assert!(f64::from(hits) / f64::from(rounds) > 0.945, "{hits} of {rounds}");
    }

    #[test]
    fn bootstrap_is_seeded_and_central() {
        let base = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let head = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        let run = |seed| {
            bootstrap(6, 6, 500, 0.95, seed, |b, h| {
                let pick = |xs: &[f64], at: &[usize]| at.iter().map(|i| xs[*i]).sum::<f64>() / 6.0;
                Some(pick(&head, h) - pick(&base, b))
            })
            .unwrap()
        };
        assert_eq!(run(5), run(5));
        assert!(run(5).lo < 1.0 && run(5).hi > 1.0);
        assert_eq!(bootstrap(0, 6, 10, 0.95, 1, |_, _| Some(0.0)), None);
    }

    proptest! {
        #[test]
        fn intervals_hold_the_median(xs in prop::collection::vec(1.0f64..1e6, 6..40)) {
            let i = median_interval(&xs, 0.95).unwrap();
            let m = stats::median(&xs).unwrap();
            prop_assert!(i.lo <= m && m <= i.hi);
        }

        #[test]
        fn shift_is_antisymmetric(a in prop::collection::vec(1u32..1000, 4..9), b in prop::collection::vec(1u32..1000, 4..9)) {
            let a: Vec<f64> = a.into_iter().map(f64::from).collect();
            let b: Vec<f64> = b.into_iter().map(f64::from).collect();
            let (x, y) = (shift(&a, &b, 0.95).unwrap(), shift(&b, &a, 0.95).unwrap());
            prop_assert_eq!(x.estimate, -y.estimate);
            prop_assert_eq!(x.interval.map(|i| (i.lo, i.hi)), y.interval.map(|i| (-i.hi, -i.lo)));
        }
    }
}
