//! Choosing the next token.
//!
//! The filters work in the order of llama.cpp's default chain: top-k, top-p, min-p, then temperature. The probabilities
//! that top-p and min-p look at are those of the model, before the temperature. All arithmetic is in f64 with `libm`, and
//! the random numbers are counter-based, so that a seed gives the same tokens on every machine.

use super::compare::{check_finite, likeliest};
use crate::error::{Error, Result};
use crate::rng::mix;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Keeps the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens whose probabilities sum to `top_p`; 1 keeps all.
    pub top_p: f64,
    /// Keeps tokens at least `min_p` times as likely as the likeliest; 0 keeps all.
    pub min_p: f64,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for SamplerOptions {
    /// The likeliest token; where a temperature is set, the filters of llama.cpp's defaults.
    fn default() -> Self {
        SamplerOptions { temperature: 0.0, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 0 }
    }
}

/// Chooses tokens, one after the other.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    drawn: u64,
    /// Kept from token to token only for its memory.
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: u32,
    logit: f64,
    /// Probability, or a number in proportion to it.
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// Names the option that is out of its range.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        let SamplerOptions { temperature, top_p, min_p, .. } = options;
        let parameter = |text: String, reason: &str| Err(Error::Parameter { text, reason: reason.into() });
        if !(temperature.is_finite() && temperature >= 0.0) {
            return parameter(format!("temperature={temperature}"), "must be 0 or more");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return parameter(format!("top-p={top_p}"), "must be above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&min_p) {
            return parameter(format!("min-p={min_p}"), "must be between 0 and 1");
        }
        Ok(Sampler { options, drawn: 0, candidates: Vec::new() })
    }

    /// The next token for `logits`, one a token of the vocabulary. Of equal logits the lowest id comes first.
    ///
    /// # Errors
    /// [`Error::NotFinite`]: what is not a distribution has no likeliest token.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        check_finite(logits)?;
        if self.options.temperature == 0.0 {
            return Ok(likeliest(logits));
        }
        self.filter(logits);
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let uniform = (mix(self.options.seed, self.drawn) >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        self.drawn += 1;
        let mut left = uniform * total;
        for candidate in &self.candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Ok(candidate.token);
            }
        }
        // Rounding used up the whole sum: the last one that was possible.
        let last = self.candidates.iter().rev().find(|c| c.weight > 0.0);
        Ok(last.map_or_else(|| likeliest(logits), |c| c.token))
    }

    /// Leaves the candidates that the filters keep, likeliest first, with weights at the temperature.
    fn filter(&mut self, logits: &[f32]) {
        let SamplerOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        let candidates = &mut self.candidates;
        candidates.clear();
        let candidate =
            |(token, &logit): (u32, &f32)| Candidate { token, logit: f64::from(logit), weight: 0.0 };
        candidates.extend((0u32..).zip(logits).map(candidate));
        let likelier = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likelier);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(likelier);
        let Some(best) = candidates.first().map(|c| c.logit) else { return };
        if top_p < 1.0 {
            candidates.iter_mut().for_each(|c| c.weight = libm::exp(c.logit - best));
            let total: f64 = candidates.iter().map(|c| c.weight).sum();
            let mut sum = 0.0;
            let enough = candidates.iter().position(|c| {
                sum += c.weight;
                sum >= top_p * total
            });
            candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
        }
        if min_p > 0.0 {
            let floor = best + libm::log(min_p);
            candidates.retain(|c| c.logit >= floor);
        }
        candidates.iter_mut().for_each(|c| c.weight = libm::exp((c.logit - best) / temperature));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 0.1, 0.4, 0.3, 0.2.
    fn logits() -> Vec<f32> {
        [0.1f32, 0.4, 0.3, 0.2].map(f32::ln).to_vec()
    }

    /// Token and probability of each candidate that is left.
    fn kept(options: SamplerOptions) -> Vec<(u32, f64)> {
        let mut sampler = Sampler::new(options).unwrap();
        sampler.filter(&logits());
        let total: f64 = sampler.candidates.iter().map(|c| c.weight).sum();
        sampler.candidates.iter().map(|c| (c.token, (c.weight / total * 1e6).round() / 1e6)).collect()
    }

    const OPEN: SamplerOptions =
        SamplerOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1 };

    #[test]
    fn each_filter_keeps_what_it_says() {
        assert_eq!(kept(OPEN), [(1, 0.4), (2, 0.3), (3, 0.2), (0, 0.1)]);
        assert_eq!(kept(SamplerOptions { top_k: 2, ..OPEN }), [(1, 0.571429), (2, 0.428571)]);
        assert_eq!(kept(SamplerOptions { top_p: 0.65, ..OPEN }), [(1, 0.571429), (2, 0.428571)]);
        assert_eq!(kept(SamplerOptions { top_p: 0.75, ..OPEN }).len(), 3);
        assert_eq!(kept(SamplerOptions { top_p: 1e-9, ..OPEN }), [(1, 1.0)], "one is always left");
        assert_eq!(kept(SamplerOptions { min_p: 0.6, ..OPEN }), [(1, 0.571429), (2, 0.428571)]);
        // 0.4² : 0.3² : 0.2² : 0.1² at half the temperature.
        let cold = [(1, 16.0 / 30.0), (2, 9.0 / 30.0), (3, 4.0 / 30.0), (0, 1.0 / 30.0)];
        let cold = cold.map(|(t, p): (u32, f64)| (t, (p * 1e6).round() / 1e6));
        assert_eq!(kept(SamplerOptions { temperature: 0.5, ..OPEN }), cold);
    }

    #[test]
    fn the_order_is_top_k_top_p_min_p_temperature() {
        // After top-k 2 the likeliest has 4/7 of the rest, which is above 0.5: alone it is enough for top-p.
        assert_eq!(kept(SamplerOptions { top_k: 2, top_p: 0.5, ..OPEN }), [(1, 1.0)]);
        assert_eq!(kept(SamplerOptions { top_p: 0.5, ..OPEN }).len(), 2, "of all, two are needed");
        // A high temperature would make all likely enough for min-p if it came first.
        assert_eq!(kept(SamplerOptions { temperature: 100.0, min_p: 0.6, ..OPEN }).len(), 2);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let mut sampler = Sampler::new(OPEN).unwrap();
        let mut counts = [0u32; 4];
        let n = 40_000;
        let first: Vec<u32> = (0..n).map(|_| sampler.sample(&logits()).unwrap()).collect();
        first.iter().for_each(|&t| counts[t as usize] += 1);
        for (count, p) in counts.iter().zip([0.1, 0.4, 0.3, 0.2]) {
            // Five standard errors.
            let error = (f64::from(n) * p * (1.0 - p)).sqrt();
            assert!((f64::from(*count) - f64::from(n) * p).abs() < 5.0 * error, "{counts:?}");
        }
        let mut again = Sampler::new(OPEN).unwrap();
        assert!(first.iter().all(|&t| t == again.sample(&logits()).unwrap()));
        let mut other = Sampler::new(SamplerOptions { seed: 2, ..OPEN }).unwrap();
        assert!(first.iter().any(|&t| t != other.sample(&logits()).unwrap()));
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equals() {
        let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
        assert_eq!(sampler.sample(&[1.0, 3.0, -1.0, 3.0]).unwrap(), 1);
    }

    #[test]
    fn logits_that_are_not_finite_are_errors() {
        let hot = SamplerOptions { temperature: 1.0, ..SamplerOptions::default() };
        for options in [SamplerOptions::default(), hot] {
            let mut sampler = Sampler::new(options).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let error = sampler.sample(&[1.0, 2.0, bad]).unwrap_err();
                assert!(matches!(error, Error::NotFinite { token: 2, .. }), "{error}");
            }
            // As far apart as finite logits can be.
            assert_eq!(sampler.sample(&[f32::MIN, f32::MAX]).unwrap(), 1);
        }
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for options in [
            SamplerOptions { temperature: -1.0, ..OPEN },
            SamplerOptions { temperature: f64::NAN, ..OPEN },
            SamplerOptions { top_p: 0.0, ..OPEN },
            SamplerOptions { top_p: 1.5, ..OPEN },
            SamplerOptions { min_p: f64::NAN, ..OPEN },
        ] {
            assert!(Sampler::new(options).unwrap_err().to_string().contains("must be"), "{options:?}");
        }
    }
}
