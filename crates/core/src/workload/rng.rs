//! Counter-based random numbers with the same bits on every machine.
//!
//! A [`Stream`] is the SplitMix64 sequence from a start that is a hash of what the numbers are for (seed, layer, KV
//! head, purpose, block), so any thread may draw any part in any order. Normals come from a piecewise linear inverse
//! distribution function: 16 random bits a number (1 sign, 11 bin, 4 place inside the bin), four numbers a word.
//!
//! SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

use std::sync::OnceLock;

/// The golden-ratio increment of SplitMix64.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// Bins of the half-normal table.
const BINS: usize = 2048;
/// Where the last bin ends. A straight line from the 1/2048 quantile (3.49) to 4.0 has the mean of the true tail.
const TAIL: f64 = 4.0;

/// The output function of SplitMix64: a bijection of 64-bit words with full avalanche.
#[inline]
pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// One sequence of random words, addressed by counter or read in order.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    key: u64,
    next: u64,
}

impl Stream {
    /// The stream named by a seed and a path of small numbers.
    pub(super) fn new(seed: u64, path: &[u64]) -> Self {
        let mut key = mix(seed.wrapping_add(GAMMA));
        for (depth, &word) in path.iter().enumerate() {
            // The depth keeps [1, 0] and [0, 1] (and [0] and [0, 0]) apart.
            key = mix(key ^ mix(word.wrapping_add(GAMMA.wrapping_mul(depth as u64 + 2))));
        }
        Self { key, next: 0 }
    }

    /// Word `index` of the stream.
    #[inline]
    fn at(&self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index.wrapping_mul(GAMMA)))
    }

    /// The next 64 random bits.
    #[inline]
    pub(super) fn word(&mut self) -> u64 {
        let word = self.at(self.next);
        self.next += 1;
        word
    }

    /// Uniform in [0, 1), 53 bits.
    pub(super) fn unit(&mut self) -> f64 {
        (self.word() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0..bound (multiply-shift; the bias is below bound / 2^64).
    pub(super) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.word()) * bound as u128) >> 64) as usize
    }

    /// Fisher-Yates.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// Fills `out` with standard normals (mean 0, variance 1, |z| < 4.01); uses ceil(len / 4) words.
    #[inline]
    pub(super) fn normals(&mut self, table: &NormalTable, out: &mut [f32]) {
        let mut index = self.next;
        let mut quads = out.chunks_exact_mut(4);
        for quad in &mut quads {
            let word = self.at(index);
            index += 1;
            quad[0] = table.pick(word as u16);
            quad[1] = table.pick((word >> 16) as u16);
            quad[2] = table.pick((word >> 32) as u16);
            quad[3] = table.pick((word >> 48) as u16);
        }
        let rest = quads.into_remainder();
        if !rest.is_empty() {
            let word = self.at(index);
            index += 1;
            for (lane, value) in rest.iter_mut().enumerate() {
                *value = table.pick((word >> (16 * lane)) as u16);
            }
        }
        self.next = index;
    }
}

/// |z| of each bin's first sixteenth (its middle), and the step to the next sixteenth.
pub(super) struct NormalTable {
    bins: [[f32; 2]; BINS],
}

impl NormalTable {
    /// The one table of the process, built on first use (2,048 quantiles).
    pub(super) fn get() -> &'static Self {
        static TABLE: OnceLock<NormalTable> = OnceLock::new();
        TABLE.get_or_init(Self::build)
    }

    fn build() -> Self {
        let edge =
            |bin: usize| if bin == BINS { TAIL } else { half_normal_quantile(bin as f64 / BINS as f64) };
        let mut bins = [[0.0f64; 2]; BINS];
        let mut square = 0.0;
        let mut low = 0.0;
        for (bin, slot) in bins.iter_mut().enumerate() {
            let high = edge(bin + 1);
            let step = (high - low) / 16.0;
            *slot = [low + 0.5 * step, step];
            for place in 0..16 {
                let value = slot[0] + step * f64::from(place);
                square += value * value;
            }
            low = high;
        }
        // Straight lines in place of a curve change the variance by about 1e-4: put it back to 1.
        let scale = 1.0 / (square / (16 * BINS) as f64).sqrt();
        let mut table = Self { bins: [[0.0; 2]; BINS] };
        for (to, from) in table.bins.iter_mut().zip(&bins) {
            *to = [(from[0] * scale) as f32, (from[1] * scale) as f32];
        }
        table
    }

    #[inline]
    fn pick(&self, bits: u16) -> f32 {
        let [middle, step] = self.bins[usize::from(bits >> 4) & (BINS - 1)];
        let size = middle + step * f32::from(bits & 15);
        f32::from_bits(size.to_bits() | (u32::from(bits >> 15) << 31))
    }
}

/// x with P(|Z| < x) = p for a standard normal Z, 0 <= p < 1: Newton on erf, from below (the function is concave).
fn half_normal_quantile(p: f64) -> f64 {
    let mut x = 0.0;
    for _ in 0..100 {
        let miss = p - libm::erf(x * std::f64::consts::FRAC_1_SQRT_2);
        let slope = (2.0 / std::f64::consts::PI).sqrt() * libm::exp(-0.5 * x * x);
        let step = miss / slope;
        x += step;
        if step.abs() < 1e-13 {
            break;
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_matches_the_published_vectors() {
        // SplitMix64 from state 1234567 (the reference implementation's first outputs).
        let stream = Stream { key: 1_234_567, next: 1 };
        let mut stream = stream;
        let first: Vec<u64> = (0..3).map(|_| stream.word()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn streams_of_different_paths_differ() {
        let mut seen = std::collections::HashSet::new();
        for path in [&[0u64][..], &[0, 0], &[1], &[0, 1], &[1, 0], &[]] {
            assert!(seen.insert(Stream::new(7, path).word()), "{path:?}");
        }
        assert!(seen.insert(Stream::new(8, &[0]).word()));
    }

    #[test]
    fn normals_have_the_moments_and_tails_of_a_normal() {
        let table = NormalTable::get();
        let all: Vec<f64> = (0..=u16::MAX).map(|bits| f64::from(table.pick(bits))).collect();
        let count = all.len() as f64;
        let moment = |power: i32| all.iter().map(|z| z.powi(power)).sum::<f64>() / count;
        assert!(moment(1).abs() < 1e-12, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 1e-6, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.01, "kurtosis {}", moment(4));
        for (limit, mass) in [(1.0, 0.317_31), (2.0, 0.045_50), (3.0, 0.002_70)] {
            let beyond = all.iter().filter(|z| z.abs() > limit).count() as f64 / count;
            assert!((beyond - mass).abs() < 5e-5, "P(|z| > {limit}) = {beyond}");
        }
    }

    #[test]
    fn a_stream_of_normals_is_uncorrelated_and_ends_anywhere() {
        let table = NormalTable::get();
        let mut z = vec![0.0f32; 1 << 18];
        Stream::new(3, &[1, 2]).normals(table, &mut z);
        let lag = |k: usize| {
            z.iter().zip(&z[k..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / z.len() as f64
        };
        assert!((lag(0) - 1.0).abs() < 0.02, "{}", lag(0));
        for k in [1, 2, 3, 4, 5, 128] {
            assert!(lag(k).abs() < 0.01, "lag {k}: {}", lag(k));
        }
        let mut short = [0.0f32; 7];
        let mut stream = Stream::new(3, &[1, 2]);
        stream.normals(table, &mut short);
        assert_eq!(short, z[..7]);
        assert_eq!(stream.next, 2);
    }
}
