//! Logits against those of a reference at the same place of the same text.
//!
//! Everything is f64 with transcendentals that have the same bits on every platform, and sums run in the order of the
//! vocabulary: equal logits give exactly no divergence, and the same logits the same figures everywhere. Logits that are
//! not finite have no distribution: a [`Distribution`] of them is an error, so no figure can hide them.

use crate::error::{Error, Result};

/// Logits of one step, all finite, with what turns them into log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distribution<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> Distribution<'a> {
    /// The distribution that `logits` stand for, one a token.
    ///
    /// # Errors
    /// [`Error::NotFinite`], and no logits at all.
    pub fn new(logits: &'a [f32]) -> Result<Self> {
        check_finite(logits)?;
        if logits.is_empty() {
            return Err(Error::Invalid("a distribution needs at least one logit".into()));
        }
        Ok(Distribution { logits, log_sum: log_sum_exp(logits) })
    }

    /// Logits that were kept together with their [`Distribution::log_sum`].
    pub(super) fn kept(logits: &'a [f32], log_sum: f64) -> Self {
        Distribution { logits, log_sum }
    }

    /// The logits.
    pub fn logits(&self) -> &'a [f32] {
        self.logits
    }

    /// `ln sum exp` of the logits.
    pub fn log_sum(&self) -> f64 {
        self.log_sum
    }

    /// Negative log-likelihood of `token` (nats).
    ///
    /// # Errors
    /// [`Error::Token`] for a token that the distribution does not have.
    pub fn nll(&self, token: u32) -> Result<f64> {
        let logit = self.logits.get(token as usize);
        let logit = logit.ok_or(Error::Token { token, vocab: self.logits.len() })?;
        Ok(self.log_sum - f64::from(*logit))
    }

    /// The likeliest token; of equals the lowest id.
    pub fn likeliest(&self) -> u32 {
        likeliest(self.logits)
    }
}

/// One compared step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Compared {
    /// Cosine of the logits.
    pub cosine: f64,
    /// Kullback-Leibler divergence of ours from the reference, KL(reference || ours) (nats).
    pub kl: f64,
    /// The likeliest token is the same.
    pub same_top: bool,
    /// Negative log-likelihood of the token that follows, ours (nats).
    pub nll: f64,
    /// The same, the reference's.
    pub reference_nll: f64,
}

/// Compares the distributions of one step; `next` is the token that really follows.
///
/// # Errors
/// Vocabularies of two sizes, and [`Error::Token`] for a token outside.
pub fn compare(reference: &Distribution<'_>, ours: &Distribution<'_>, next: u32) -> Result<Compared> {
    let lengths = (reference.logits.len(), ours.logits.len());
    if lengths.0 != lengths.1 {
        return Err(Error::Invalid(format!(
            "logits of {} and {} tokens cannot be compared: both must be of one vocabulary",
            lengths.0, lengths.1
        )));
    }
    let (mut kl, mut dot, mut reference2, mut ours2) = (0.0, 0.0, 0.0, 0.0);
    for (r, o) in reference.logits.iter().zip(ours.logits).map(|(r, o)| (f64::from(*r), f64::from(*o))) {
        let (p, q) = (r - reference.log_sum, o - ours.log_sum);
        kl += libm::exp(p) * (p - q);
        dot += r * o;
        reference2 += r * r;
        ours2 += o * o;
    }
    // The root of a square is exact, so equal logits have a cosine of exactly 1; all-zero logits equal only themselves.
    let length = (reference2 * ours2).sqrt();
    let cosine = if length > 0.0 { dot / length } else { f64::from(u8::from(reference2 == ours2)) };
    Ok(Compared {
        cosine,
        // A sum of terms of both signs: its rounding can fall below zero, the divergence cannot. What is not a number
        // stays so.
        kl: if kl < 0.0 { 0.0 } else { kl },
        same_top: reference.likeliest() == ours.likeliest(),
        nll: ours.nll(next)?,
        reference_nll: reference.nll(next)?,
    })
}

/// That all logits are finite.
pub(super) fn check_finite(logits: &[f32]) -> Result<()> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(token) => Err(Error::NotFinite { token, value: logits[token] }),
        None => Ok(()),
    }
}

/// The token of the largest logit; of equals the lowest id.
pub(super) fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in (0u32..).zip(logits) {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best.0
}

/// `ln sum exp`, shifted by the largest logit.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| libm::exp(f64::from(logit) - max)).sum();
    max + libm::log(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(reference: &[f32], ours: &[f32], next: u32) -> Result<Compared> {
        compare(&Distribution::new(reference)?, &Distribution::new(ours)?, next)
    }

    #[test]
    fn equal_logits_differ_by_exactly_nothing() {
        let logits: Vec<f32> = (0..513).map(|i| ((i * 7919) % 613) as f32 * 0.037 - 9.0).collect();
        let c = both(&logits, &logits, 17).unwrap();
        assert_eq!((c.kl, c.cosine, c.same_top, c.nll), (0.0, 1.0, true, c.reference_nll));
        assert_eq!(both(&[0.0; 3], &[0.0; 3], 0).unwrap().cosine, 1.0);
    }

    #[test]
    fn known_distributions_have_the_divergence_of_the_formula() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL(p || q) = 1/2 ln 2 - 1/4 ln 2.
        let (p, q) = ([2f32.ln(), 0.0, 0.0], [0.0, 0.0, 2f32.ln()]);
        let c = both(&p, &q, 2).unwrap();
        assert!((c.kl - 0.25 * 2f64.ln()).abs() < 1e-7, "{c:?}");
        assert!((c.nll - 2f64.ln()).abs() < 1e-7 && (c.reference_nll - 4f64.ln()).abs() < 1e-7, "{c:?}");
        assert!(!c.same_top && c.cosine == 0.0);
        // A shift of all logits changes the distribution by nothing, their angle by something.
        let shifted = both(&p, &p.map(|v| v + 3.0), 0).unwrap();
        assert!(shifted.kl < 1e-7 && shifted.same_top && shifted.cosine < 1.0, "{shifted:?}");
        assert_eq!(likeliest(&[0.0, 1.0, 1.0]), 1);
    }

    #[test]
    fn logits_that_are_not_finite_are_errors_on_either_side() {
        let good = [0.0, 1.0];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for error in [both(&good, &[1.0, bad], 0), both(&[1.0, bad], &good, 0)] {
                let error = error.unwrap_err();
                assert!(matches!(error, Error::NotFinite { token: 1, .. }), "{error}");
                assert!(error.to_string().contains("not finite"), "{error}");
            }
        }
        assert!(Distribution::new(&[]).is_err());
        assert!(both(&good, &[1.0; 3], 0).unwrap_err().to_string().contains("2 and 3 tokens"));
        assert!(matches!(both(&good, &good, 2), Err(Error::Token { token: 2, vocab: 2 })));
        // As far apart as finite logits can be.
        let far = both(&[f32::MAX, f32::MIN], &[f32::MIN, f32::MAX], 0).unwrap();
        assert!(far.kl.is_finite() && far.kl > 1e38 && !far.same_top, "{far:?}");
    }
}
