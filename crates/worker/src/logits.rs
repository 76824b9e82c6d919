//! Logits against those of a reference at the same place of the same text.
//!
//! Everything is f64 with transcendentals that have the same bits on every platform, and sums run in the order of the
//! vocabulary: equal logits give exactly no divergence, and the same logits the same figures everywhere.

use longbit_protocol::Quality;

/// Divergence that stands for output which is not finite: as wrong as can be said in a finite number.
const HOPELESS: f64 = 1e150;

/// One compared step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Compared {
    /// Cosine of the logits.
    cosine: f64,
    /// KL(reference || ours), nats.
    kl: f64,
    /// The most likely token is the same.
    top1: bool,
    /// Negative log-likelihood of the token that follows, nats: ours and the reference's.
    nll: f64,
    reference_nll: f64,
}

/// Compares the logits of one step, `[vocab]` each; `next` is the token that really follows, below `vocab`.
pub(crate) fn compare(reference: &[f32], ours: &[f32], next: usize) -> Compared {
    let total = log_sum_exp(reference);
    let reference_nll = total - f64::from(reference[next]);
    if ours.iter().any(|v| !v.is_finite()) {
        return Compared { cosine: -1.0, kl: HOPELESS, top1: false, nll: HOPELESS, reference_nll };
    }
    let our_total = log_sum_exp(ours);
    let (mut kl, mut dot, mut reference2, mut ours2) = (0.0, 0.0, 0.0, 0.0);
    for (r, o) in reference.iter().zip(ours).map(|(r, o)| (f64::from(*r), f64::from(*o))) {
        let (p, q) = (r - total, o - our_total);
        kl += libm::exp(p) * (p - q);
        dot += r * o;
        reference2 += r * r;
        ours2 += o * o;
    }
    // The root of a square is exact, so equal logits have a cosine of exactly 1; all-zero logits equal only themselves.
    let length = (reference2 * ours2).sqrt();
    let cosine = if length > 0.0 { dot / length } else { f64::from(u8::from(reference2 == ours2)) };
    Compared {
        cosine,
        // A sum of terms of both signs: its rounding can fall below zero, the divergence cannot.
        kl: kl.max(0.0),
        top1: likeliest(reference) == likeliest(ours),
        nll: our_total - f64::from(ours[next]),
        reference_nll,
    }
}

/// The figures of a cell from those of its steps; empty of none.
pub(crate) fn summary(steps: &[Compared]) -> Quality {
    let n = steps.len() as f64;
    let some = |value: f64| (!steps.is_empty()).then_some(value);
    let mean = |f: fn(&Compared) -> f64| some(steps.iter().map(f).sum::<f64>() / n);
    Quality {
        steps: steps.len() as u32,
        outputs: steps.len() as u64,
        top1_agreement: mean(|c| f64::from(u8::from(c.top1))),
        kl_nats: mean(|c| c.kl),
        kl_nats_max: some(steps.iter().map(|c| c.kl).fold(0.0, f64::max)),
        logit_cosine_mean: mean(|c| c.cosine),
        logit_cosine_min: some(steps.iter().map(|c| c.cosine).fold(f64::INFINITY, f64::min)),
        nll_nats: mean(|c| c.nll),
        nll_reference_nats: mean(|c| c.reference_nll),
        ..Quality::default()
    }
}

/// `ln sum exp`, shifted by the largest logit.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|v| libm::exp(f64::from(*v) - f64::from(max))).sum();
    f64::from(max) + libm::log(sum)
}

/// The most likely token; of equals the lowest id.
fn likeliest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_differ_by_exactly_nothing() {
        let logits: Vec<f32> = (0..513).map(|i| ((i * 7919) % 613) as f32 * 0.037 - 9.0).collect();
        let c = compare(&logits, &logits, 17);
        assert_eq!((c.kl, c.cosine, c.top1, c.nll), (0.0, 1.0, true, c.reference_nll));
    }

    #[test]
    fn known_distributions_have_the_divergence_of_the_formula() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL(p || q) = 1/2 ln 2 - 1/4 ln 2.
        let (p, q) = ([2f32.ln(), 0.0, 0.0], [0.0, 0.0, 2f32.ln()]);
        let c = compare(&p, &q, 2);
        assert!((c.kl - 0.25 * 2f64.ln()).abs() < 1e-7, "{c:?}");
        assert!((c.nll - 2f64.ln()).abs() < 1e-7 && (c.reference_nll - 4f64.ln()).abs() < 1e-7, "{c:?}");
        assert!(!c.top1 && c.cosine == 0.0);
        // A shift of all logits changes the distribution by nothing, their angle by something.
        let shifted = compare(&p, &p.map(|v| v + 3.0), 0);
        assert!(shifted.kl < 1e-7 && shifted.top1 && shifted.cosine < 1.0, "{shifted:?}");
        assert_eq!(likeliest(&[0.0, 1.0, 1.0]), 1);
    }

    #[test]
    fn output_that_is_not_finite_is_as_wrong_as_can_be() {
        let c = compare(&[0.0, 1.0], &[f32::NAN, 1.0], 1);
        assert!(c.kl >= 1e100 && c.cosine == -1.0 && !c.top1 && c.reference_nll.is_finite());
    }

    #[test]
    fn a_cell_is_the_mean_and_the_worst_of_its_steps() {
        let (p, q) = ([1.0f32, 0.0], [0.0f32, 1.0]);
        let all = summary(&[compare(&p, &p, 0), compare(&p, &q, 0)]);
        let (kl, worst) = (all.kl_nats.unwrap(), all.kl_nats_max.unwrap());
        assert!(worst > 0.0 && (kl - worst / 2.0).abs() < 1e-12);
        assert_eq!(
            (all.top1_agreement, all.logit_cosine_mean, all.logit_cosine_min),
            (Some(0.5), Some(0.5), Some(0.0))
        );
        assert!(all.nll_nats > all.nll_reference_nats && all.steps == 2 && all.rel_l2_p50.is_none());
        assert_eq!(summary(&[]).kl_nats, None);
    }
}
