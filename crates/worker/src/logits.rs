//! Logits against those of a reference at the same place of the same text: the figures of a cell from those of its steps.

use longbit::Error;
use longbit::text::{Compared, Distribution, compare};
use longbit_protocol::{NOT_FINITE, Quality};

/// Compares the logits of one step, `[vocab]` each; `next` is the token that really follows. Logits of ours that are not
/// finite are as wrong as can be said in finite numbers.
///
/// # Errors
/// Logits of the reference that are not finite: nothing can be held against them.
pub(crate) fn step(reference: &[f32], ours: &[f32], next: u32) -> Result<Compared, Error> {
    let reference = Distribution::new(reference)?;
    match Distribution::new(ours) {
        Ok(ours) => compare(&reference, &ours, next),
        Err(Error::NotFinite { .. }) => Ok(Compared {
            cosine: -1.0,
            kl: NOT_FINITE,
            same_top: false,
            nll: NOT_FINITE,
            reference_nll: reference.nll(next)?,
        }),
        Err(error) => Err(error),
    }
}

/// The figures of a cell; empty of no steps.
pub(crate) fn summary(steps: &[Compared]) -> Quality {
    let n = steps.len() as f64;
    let some = |value: f64| (!steps.is_empty()).then_some(value);
    let mean = |f: fn(&Compared) -> f64| some(steps.iter().map(f).sum::<f64>() / n);
    Quality {
        steps: steps.len() as u32,
        outputs: steps.len() as u64,
        top1_agreement: mean(|c| f64::from(u8::from(c.same_top))),
        kl_nats: mean(|c| c.kl),
        kl_nats_max: some(steps.iter().map(|c| c.kl).fold(0.0, f64::max)),
        logit_cosine_mean: mean(|c| c.cosine),
        logit_cosine_min: some(steps.iter().map(|c| c.cosine).fold(f64::INFINITY, f64::min)),
        nll_nats: mean(|c| c.nll),
        nll_reference_nats: mean(|c| c.reference_nll),
        ..Quality::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longbit_protocol::is_not_finite;

    #[test]
    fn output_that_is_not_finite_is_as_wrong_as_can_be() {
        let good = step(&[0.0, 1.0], &[0.0, 1.0], 1).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let c = step(&[0.0, 1.0], &[bad, 1.0], 1).unwrap();
            assert!(c.cosine == -1.0 && !c.same_top && c.reference_nll == good.nll);
            let all = summary(&[vec![good; 4000], vec![c]].concat());
            let figures = [all.kl_nats, all.kl_nats_max, all.nll_nats];
            assert!(figures.into_iter().flatten().filter(|f| is_not_finite(*f)).count() == 3, "{all:?}");
        }
    }

    #[test]
    fn a_reference_that_is_not_finite_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = step(&[bad, 1.0], &[bad, 1.0], 1).unwrap_err();
            assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        }
    }

    #[test]
    fn a_cell_is_the_mean_and_the_worst_of_its_steps() {
        let (p, q) = ([1.0f32, 0.0], [0.0f32, 1.0]);
        let all = summary(&[step(&p, &p, 0).unwrap(), step(&p, &q, 0).unwrap()]);
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
