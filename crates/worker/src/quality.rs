//! Attention outputs against exact attention on the same queries, keys and values.

use std::collections::BTreeMap;

use longbit::Session;
use longbit_protocol::{NOT_FINITE, Quality};

use crate::WorkerError;
use crate::fill::Filled;
use crate::reads::Samples;

/// One compared output.
pub(crate) struct Compared {
    pub(crate) relative_l2: f64,
    cosine: f64,
}

/// Decodes the first `compared` steps with the session's method and compares every head's output. The session must stand
/// at the filled context, and stands there again afterwards.
pub(crate) fn measure(
    session: &mut Session,
    filled: &Filled,
    compared: usize,
) -> Result<Quality, WorkerError> {
    let context = session.len();
    let config = session.model().config.clone();
    let (d, group) = (config.head_dim, config.group());
    let mut by_type: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let (mut all, mut needles) = (Vec::new(), Vec::new());
    let (mut samples, mut densities) = (Samples::default(), Vec::new());
    for step in 0..compared {
        session.decode_supplied(token(step, config.vocab), &filled.steps[step], true)?;
        let output = session.attention_output();
        densities.push(density_read(session));
        for (i, exact) in filled.exact.iter().enumerate() {
            if let Some(softmax) = exact.softmax.get(step * group..(step + 1) * group)
                && let Some(captured) = session.captured(i / config.kv_heads, i % config.kv_heads)
            {
                let kv = session.cache().head(i / config.kv_heads, i % config.kv_heads);
                samples.add(softmax, &captured, |row| kv.position_of(row));
            }
            let exact = exact.outputs(step, i, &filled.steps[..compared], d);
            for h in 0..group {
                let ours = &output[(i * group + h) * d..][..d];
                let compared = compare(ours, &exact[h * d..(h + 1) * d]);
                by_type.entry(filled.kind(i).into()).or_default().push(compared.relative_l2);
                all.push(compared);
                needles.extend(filled.recall(i, ours));
            }
        }
    }
    session.rewind(context);
    let mut errors: Vec<f64> = all.iter().map(|c| c.relative_l2).collect();
    errors.sort_by(f64::total_cmp);
    let mut cosines: Vec<f64> = all.iter().map(|c| c.cosine).collect();
    cosines.sort_by(f64::total_cmp);
    Ok(Quality {
        cell: String::new(),
        steps: compared as u32,
        outputs: all.len() as u64,
        rel_l2_p50: Some(quantile(&errors, 0.5)),
        rel_l2_p95: Some(quantile(&errors, 0.95)),
        rel_l2_max: Some(quantile(&errors, 1.0)),
        cosine_mean: mean(&cosines),
        cosine_p5: Some(quantile(&cosines, 0.05)),
        cosine_min: Some(cosines.iter().copied().fold(f64::INFINITY, f64::min)),
        attention_logit_error_max: Some(filled.exact.iter().map(|e| e.logit_error).fold(0.0, f64::max)),
        rel_l2_by_head: by_type
            .into_iter()
            .map(|(name, mut errors)| {
                errors.sort_by(f64::total_cmp);
                (name, quantile(&errors, 0.5))
            })
            .collect(),
        reads: samples.summary(),
        density_read: mean(&densities),
        needle_accuracy: mean(&needles),
        ..Quality::default()
    })
}

/// Share of the cached rows that the last decode step attended, over all layers and KV heads.
pub(crate) fn density_read(session: &Session) -> f64 {
    let config = &session.model().config;
    let rows = config.layers * config.kv_heads * session.len();
    session.traffic().rows as f64 / rows.max(1) as f64
}

/// None of no values.
pub(crate) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The token that step `step` decodes. Which one does not matter; that it differs from step to step keeps the embedding
/// row out of the caches.
pub(crate) fn token(step: usize, vocab: usize) -> u32 {
    (step.wrapping_mul(7919) % vocab) as u32
}

/// `|ours - exact| / |exact|` and the cosine; an exact zero vector is met by zero alone. Output that is not finite is as
/// wrong as can be said in a finite number.
pub(crate) fn compare(ours: &[f32], exact: &[f64]) -> Compared {
    if ours.iter().any(|v| !v.is_finite()) {
        return Compared { relative_l2: NOT_FINITE, cosine: -1.0 };
    }
    let (mut difference, mut ours2, mut exact2, mut dot) = (0.0, 0.0, 0.0, 0.0);
    for (a, b) in ours.iter().map(|v| f64::from(*v)).zip(exact) {
        difference += (a - b) * (a - b);
        ours2 += a * a;
        exact2 += b * b;
        dot += a * b;
    }
    let ratio = |a: f64, b: f64, both_zero: f64| if b > 0.0 { a / b } else { both_zero };
    Compared {
        relative_l2: ratio(difference, exact2, if ours2 > 0.0 { NOT_FINITE * NOT_FINITE } else { 0.0 })
            .sqrt(),
        cosine: ratio(dot, (ours2 * exact2).sqrt(), if ours2 == exact2 { 1.0 } else { 0.0 }),
    }
}

/// Nearest-rank quantile of sorted numbers; 0 of none.
pub(crate) fn quantile(sorted: &[f64], p: f64) -> f64 {
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_rank() {
        let x = [1.0, 2.0, 3.0, 4.0];
        assert_eq!([0.0, 0.5, 0.51, 0.95, 1.0].map(|p| quantile(&x, p)), [1.0, 2.0, 3.0, 4.0, 4.0]);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn comparison_of_known_vectors() {
        let same = compare(&[3.0, 4.0], &[3.0, 4.0]);
        assert_eq!((same.relative_l2, same.cosine), (0.0, 1.0));
        let turned = compare(&[0.0, 5.0], &[5.0, 0.0]);
        assert!((turned.relative_l2 - 2f64.sqrt()).abs() < 1e-12 && turned.cosine == 0.0);
        let twice = compare(&[2.0, 0.0], &[1.0, 0.0]);
        assert_eq!((twice.relative_l2, twice.cosine), (1.0, 1.0));
        let broken = compare(&[0.0, -f32::NAN], &[1.0, 0.0]);
        assert!(longbit_protocol::is_not_finite(broken.relative_l2) && broken.cosine == -1.0);
        let zero = compare(&[0.0, 0.0], &[0.0, 0.0]);
        assert_eq!((zero.relative_l2, zero.cosine), (0.0, 1.0));
    }
}
