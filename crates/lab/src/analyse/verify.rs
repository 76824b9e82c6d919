//! The one rule of `[verify]`: whether the quality of a cell keeps within the limits of its experiment.

use longbit_protocol::{Quality, is_not_finite};

use super::label::NOT_FINITE;
use crate::plan::VerifySpec;

/// Why `quality` violates the limits of `verify` for a method, or none when it holds. A cell without quality, or without
/// the figure that is limited, violates them: an accuracy that was not measured is not an accuracy.
pub fn verify_violation(verify: &VerifySpec, method: &str, quality: Option<&Quality>) -> Option<String> {
    if !verify.methods.is_empty() && !verify.methods.iter().any(|m| m == method) {
        return None;
    }
    let limits = [
        ("smallest cosine", "verify.cosine_min", Side::AtLeast, verify.cosine_min),
        ("largest relative L2 error", "verify.rel_l2_max", Side::AtMost, verify.rel_l2_max),
        ("largest KL divergence", "verify.kl_nats_max", Side::AtMost, verify.kl_nats_max),
        ("top-1 agreement", "verify.top1_min", Side::AtLeast, verify.top1_min),
    ];
    if limits.iter().all(|(.., limit)| limit.is_none()) {
        return None;
    }
    let Some(q) = quality else { return Some("no quality was measured".to_owned()) };
    let found = [q.cosine_min, q.rel_l2_max, q.kl_nats_max, q.top1_agreement];
    let violations: Vec<String> = limits
        .into_iter()
        .zip(found)
        .filter_map(|((name, key, side, limit), found)| side.violation(name, key, limit?, found))
        .collect();
    (!violations.is_empty()).then(|| violations.join("; "))
}

/// On which side of its limit a figure may lie.
#[derive(Clone, Copy)]
enum Side {
    AtLeast,
    AtMost,
}

impl Side {
    fn violation(self, name: &str, key: &str, limit: f64, found: Option<f64>) -> Option<String> {
        let Some(found) = found else { return Some(format!("no {name} was measured ({key})")) };
        if is_not_finite(found) {
            return Some(format!("{name} is {NOT_FINITE} ({key})"));
        }
        // Written so that a number that cannot be compared counts as a violation.
        let order = found.partial_cmp(&limit);
        let (holds, word) = match self {
            Side::AtLeast => (order.is_some_and(|o| o.is_ge()), "is below"),
            Side::AtMost => (order.is_some_and(|o| o.is_le()), "exceeds"),
        };
        (!holds).then(|| format!("{name} {} {word} {limit} ({key})", significant(found)))
    }
}

/// Six digits after the point at most, for messages.
fn significant(value: f64) -> String {
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_has_its_side_and_nothing_measured_holds_none() {
        let q = Quality { kl_nats_max: Some(0.25), top1_agreement: Some(0.75), ..Quality::default() };
        let of = |verify: VerifySpec| verify_violation(&verify, "dense", Some(&q));
        assert_eq!(
            of(VerifySpec { kl_nats_max: Some(0.25), top1_min: Some(0.75), ..VerifySpec::default() }),
            None
        );
        assert_eq!(
            of(VerifySpec { kl_nats_max: Some(0.2), top1_min: Some(0.8), ..VerifySpec::default() }).unwrap(),
            "largest KL divergence 0.25 exceeds 0.2 (verify.kl_nats_max); top-1 agreement 0.75 is below 0.8 \
             (verify.top1_min)"
        );
        let broken = Quality { kl_nats_max: Some(longbit_protocol::NOT_FINITE), ..Quality::default() };
        let limit = VerifySpec { kl_nats_max: Some(1e300), ..VerifySpec::default() };
        assert_eq!(
            verify_violation(&limit, "dense", Some(&broken)).unwrap(),
            "largest KL divergence is not finite (verify.kl_nats_max)"
        );
        let missing = of(VerifySpec { rel_l2_max: Some(1.0), ..VerifySpec::default() }).unwrap();
        assert_eq!(missing, "no largest relative L2 error was measured (verify.rel_l2_max)");
        let other =
            VerifySpec { kl_nats_max: Some(0.0), methods: vec!["window".into()], ..VerifySpec::default() };
        assert_eq!(of(other), None);
    }
}
