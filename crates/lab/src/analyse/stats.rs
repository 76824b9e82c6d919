//! Statistics of exact samples: location, spread, quantiles, drift, outliers and percentile curves.
//!
//! Every function is pure, takes its samples in any order and says what it does with too few of them: `None`,
//! never a zero. Intervals are in [`super::interval`].

use hdrhistogram::Histogram;

/// A sample further than this many (unscaled) MADs from the median is counted as an outlier: ten standard deviations
/// of a normal distribution, the bound that hyperfine uses. Outliers are counted and kept, never dropped.
pub const OUTLIER_MADS: f64 = 14.826;

/// Share of samples below the tail quantile that the records report.
pub const P99: f64 = 0.99;

/// A sorted copy. Samples are finite by construction (integers, or checked on entry), so the total order is the
/// numeric one.
pub fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut copy = samples.to_vec();
    copy.sort_unstable_by(f64::total_cmp);
    copy
}

/// Median: the middle value, or the mean of the two middle values when there is an even number.
pub fn median(samples: &[f64]) -> Option<f64> {
    median_of_sorted(&sorted(samples))
}

/// [`median`] of samples that are sorted already.
pub fn median_of_sorted(sorted: &[f64]) -> Option<f64> {
    let n = sorted.len();
    if n == 0 {
        return None;
    }
    let upper = sorted[n / 2];
    Some(if n % 2 == 1 { upper } else { 0.5 * (sorted[n / 2 - 1] + upper) })
}

/// Median absolute deviation from the median, unscaled. The deviations are sorted anew: those of sorted samples fall
/// and rise again, so their middle element is not their median.
pub fn mad(samples: &[f64]) -> Option<f64> {
    let centre = median(samples)?;
    let deviations: Vec<f64> = samples.iter().map(|x| (x - centre).abs()).collect();
    median(&deviations)
}

/// Quantile by the inverse of the empirical distribution (nearest rank; type 1 of Hyndman and Fan 1996): the smallest
/// sample that at least a share `p` of the samples does not exceed. It is always a value that was measured.
pub fn quantile(samples: &[f64], p: f64) -> Option<f64> {
    quantile_of_sorted(&sorted(samples), p)
}

/// [`quantile`] of samples that are sorted already.
pub fn quantile_of_sorted(sorted: &[f64], p: f64) -> Option<f64> {
    if sorted.is_empty() || !(0.0..=1.0).contains(&p) {
        return None;
    }
    // The small slack keeps n * p that is a whole number on paper from being rounded up by its last bit.
    let rank = (sorted.len() as f64 * p - 1e-9).ceil().max(1.0) as usize;
    sorted.get(rank.min(sorted.len()) - 1).copied()
}

/// Arithmetic mean.
pub fn mean(samples: &[f64]) -> Option<f64> {
    if samples.is_empty() { None } else { Some(samples.iter().sum::<f64>() / samples.len() as f64) }
}

/// Smallest sample.
pub fn min(samples: &[f64]) -> Option<f64> {
    samples.iter().copied().min_by(f64::total_cmp)
}

/// Largest sample.
pub fn max(samples: &[f64]) -> Option<f64> {
    samples.iter().copied().max_by(f64::total_cmp)
}

/// Samples whose distance from the median exceeds [`OUTLIER_MADS`] median absolute deviations. With a MAD of zero
/// (more than half of the samples equal) every other value counts.
pub fn outliers(samples: &[f64]) -> Option<u64> {
    let (centre, spread) = (median(samples)?, mad(samples)?);
    Some(samples.iter().filter(|x| (**x - centre).abs() > OUTLIER_MADS * spread).count() as u64)
}

/// Drift in percent: how much larger the median of the second half of the repetitions is than that of the first half.
/// `medians` holds one number a repetition in the order of time; the middle one of an odd number belongs to neither
/// half. `None` below two repetitions.
pub fn drift_pct(medians: &[f64]) -> Option<f64> {
    let half = medians.len() / 2;
    let first = median(&medians[..half])?;
    let second = median(&medians[medians.len() - half..])?;
    (first > 0.0).then(|| (second / first - 1.0) * 100.0)
}

/// Points of a percentile curve: `(percentile, value)`, percentile in percent.
///
/// Built from an HDR histogram with three significant digits, which quantises to 0.1 % and is therefore for curves
/// only; medians and verdicts use the exact samples. Percentiles that fewer than one sample lies beyond are left out.
pub fn percentile_curve(nanoseconds: &[u64]) -> Vec<(f64, u64)> {
    let Some(&largest) = nanoseconds.iter().max() else { return Vec::new() };
    let Ok(mut histogram) = Histogram::<u64>::new_with_bounds(1, largest.max(2), 3) else {
        return Vec::new();
    };
    for &value in nanoseconds {
        histogram.saturating_record(value.max(1));
    }
    let n = nanoseconds.len() as f64;
    CURVE_PERCENTILES
        .iter()
        .filter(|p| n * (1.0 - **p / 100.0) >= 1.0 - 1e-9)
        .map(|&p| (p, histogram.value_at_quantile(p / 100.0)))
        .chain([(100.0, histogram.max())])
        .collect()
}

/// Percentiles of a curve, denser towards the tail.
const CURVE_PERCENTILES: [f64; 22] = [
    1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 92.5, 95.0, 96.0, 97.0, 98.0,
    99.0, 99.5, 99.9, 99.99,
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_vectors_of_odd_and_even_length() {
        let odd = [7.0, 1.0, 3.0, 100.0, 5.0];
        assert_eq!(median(&odd), Some(5.0));
        // Deviations 2 4 2 95 0: sorted 0 2 2 4 95. Taking the middle of the unsorted ones would give 2 by luck here
        // and 4 below.
        assert_eq!(mad(&odd), Some(2.0));
        let even = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(median(&even), Some(3.0));
        // Deviations 2 1 1 5: sorted 1 1 2 5.
        assert_eq!(mad(&even), Some(1.5));
        // Deviations of the sorted samples are 5 4 0 1 2; unsorted middle 0, true median 2.
        assert_eq!(mad(&[0.0, 1.0, 5.0, 6.0, 7.0]), Some(2.0));
        assert_eq!(mean(&even), Some(3.75));
        assert_eq!((min(&odd), max(&odd)), (Some(1.0), Some(100.0)));
        assert_eq!(median(&[]), None);
        assert_eq!(mad(&[]), None);
        assert_eq!(mean(&[]), None);
    }

    #[test]
    fn quantile_is_the_nearest_rank() {
        let ten: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!(quantile(&ten, 0.0), Some(1.0));
        assert_eq!(quantile(&ten, 0.1), Some(1.0));
        assert_eq!(quantile(&ten, 0.11), Some(2.0));
        assert_eq!(quantile(&ten, 0.9), Some(9.0));
        assert_eq!(quantile(&ten, 0.95), Some(10.0));
        assert_eq!(quantile(&ten, 1.0), Some(10.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&hundred, P99), Some(99.0));
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&ten, 1.5), None);
    }

    #[test]
    fn outliers_are_counted_by_mads() {
        let mut samples: Vec<f64> = (0..100).map(|i| 1000.0 + f64::from(i % 5)).collect();
        assert_eq!(outliers(&samples), Some(0));
        samples[17] = 1030.0; // MAD is 1: bound 14.8
        samples[40] = 1016.0; // within
        assert_eq!(outliers(&samples), Some(1));
        assert_eq!(outliers(&[5.0, 5.0, 5.0, 9.0]), Some(1));
    }

    #[test]
    fn drift_compares_halves_in_time() {
        assert_eq!(drift_pct(&[100.0]), None);
        assert_eq!(drift_pct(&[100.0, 110.0]).map(f64::round), Some(10.0));
        let d = drift_pct(&[100.0, 100.0, 100.0, 500.0, 98.0, 98.0, 98.0]).unwrap();
        assert!((d + 2.0).abs() < 1e-9, "{d}");
    }

    #[test]
    fn percentile_curve_is_within_a_thousandth() {
        let ns: Vec<u64> = (1..=1000).map(|i| i * 1_000).collect();
        let curve = percentile_curve(&ns);
        let at = |p: f64| curve.iter().find(|c| c.0 == p).map(|c| c.1 as f64);
        assert!((at(50.0).unwrap() / 500_000.0 - 1.0).abs() < 2e-3);
        assert!((at(99.0).unwrap() / 990_000.0 - 1.0).abs() < 2e-3);
        assert!(at(99.9).is_some() && at(99.99).is_none(), "beyond 99.99 % of 1000 samples there is nothing");
        assert!(curve.windows(2).all(|w| w[0].1 <= w[1].1));
        assert!(percentile_curve(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn order_does_not_matter(mut xs in prop::collection::vec(1.0f64..1e9, 1..60), seed in 0usize..1000) {
            let before = (median(&xs), mad(&xs), quantile(&xs, 0.9), outliers(&xs));
            let n = xs.len();
            xs.rotate_left(seed % n);
            xs.reverse();
            prop_assert_eq!(before, (median(&xs), mad(&xs), quantile(&xs, 0.9), outliers(&xs)));
        }

        #[test]
        fn scale_carries_over(xs in prop::collection::vec(1u32..1_000_000, 1..60)) {
            let a: Vec<f64> = xs.iter().map(|x| f64::from(*x)).collect();
            let b: Vec<f64> = a.iter().map(|x| x * 4.0).collect(); // a power of two scales exactly
            prop_assert_eq!(median(&a).map(|x| x * 4.0), median(&b));
            prop_assert_eq!(mad(&a).map(|x| x * 4.0), mad(&b));
            prop_assert_eq!(quantile(&a, 0.99).map(|x| x * 4.0), quantile(&b, 0.99));
            prop_assert_eq!(outliers(&a), outliers(&b));
            prop_assert_eq!(drift_pct(&a), drift_pct(&b));
        }

        #[test]
        fn order_of_the_figures(xs in prop::collection::vec(1.0f64..1e9, 1..200)) {
            let s = sorted(&xs);
            let q = |p| quantile_of_sorted(&s, p).unwrap();
            prop_assert!(min(&xs).unwrap() <= q(0.5) && q(0.5) <= q(0.9) && q(0.9) <= q(0.99));
            prop_assert!(q(0.99) <= max(&xs).unwrap());
        }
    }
}
