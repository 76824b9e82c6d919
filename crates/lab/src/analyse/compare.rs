//! Verdicts: what changed between two results, with an interval and a threshold fixed beforehand.
//!
//! The rule is criterion's with a fourth word: regressed or improved when the whole interval lies beyond the threshold,
//! unchanged when it lies within, inconclusive otherwise. Which direction is worse belongs to the metric.

use std::collections::BTreeMap;

use longbit_protocol::Status;
use serde::Serialize;

use super::{interval, stats, summarise};
use crate::plan::Gate;
use crate::record::Record;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Median time per token.
    TpotP50,
    /// 99th percentile of the time per token.
    TpotP99,
    /// KV bytes read per token.
    KvBytesReadPerToken,
    /// Median relative L2 error.
    RelL2P50,
    /// Mean cosine.
    CosineMean,
    /// Mean divergence of the next-token distribution.
    KlNats,
    /// Share of steps whose most likely token is that of the reference.
    Top1Agreement,
    /// Mean cosine of the logits.
    LogitCosineMean,
    /// Mean negative log-likelihood of the text.
    NllNats,
}

/// All metrics, in the order of the documentation.
pub const METRICS: [Metric; 9] = [
    Metric::TpotP50,
    Metric::TpotP99,
    Metric::KvBytesReadPerToken,
    Metric::RelL2P50,
    Metric::CosineMean,
    Metric::KlNats,
    Metric::Top1Agreement,
    Metric::LogitCosineMean,
    Metric::NllNats,
];

impl Metric {
    /// Name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Metric::TpotP50 => "tpot_p50",
            Metric::TpotP99 => "tpot_p99",
            Metric::KvBytesReadPerToken => "kv_bytes_read_per_token",
            Metric::RelL2P50 => "rel_l2_p50",
            Metric::CosineMean => "cosine_mean",
            Metric::KlNats => "kl_nats",
            Metric::Top1Agreement => "top1_agreement",
            Metric::LogitCosineMean => "logit_cosine_mean",
            Metric::NllNats => "nll_nats",
        }
    }

    /// Whether changes are ratios (true) or differences (false).
    pub fn relative(self) -> bool {
        matches!(self, Metric::TpotP50 | Metric::TpotP99 | Metric::KvBytesReadPerToken)
    }

    /// Whether the metric is measured with noise; the others are exact for a seed and hold on any machine.
    pub fn timed(self) -> bool {
        matches!(self, Metric::TpotP50 | Metric::TpotP99)
    }

    /// Whether a larger value is better.
    pub fn larger_is_better(self) -> bool {
        matches!(self, Metric::CosineMean | Metric::Top1Agreement | Metric::LogitCosineMean)
    }

    /// The threshold of `gate`: a share for relative metrics, an absolute difference for the others.
    pub fn threshold(self, gate: &Gate) -> f64 {
        match self {
            Metric::TpotP50 => gate.tpot_p50_pct / 100.0,
            Metric::TpotP99 => gate.tpot_p99_pct / 100.0,
            Metric::KvBytesReadPerToken => gate.kv_bytes_pct / 100.0,
            Metric::RelL2P50 => gate.rel_l2_abs,
            Metric::CosineMean => gate.cosine_abs,
            Metric::KlNats => gate.kl_abs,
            Metric::Top1Agreement => gate.top1_abs,
            Metric::LogitCosineMean => gate.logit_cosine_abs,
            Metric::NllNats => gate.nll_abs,
        }
    }

    fn value(self, r: &Record) -> Option<f64> {
        match self {
            Metric::TpotP50 => r.tpot_p50_ns.map(|v| v as f64),
            Metric::TpotP99 => r.tpot_p99_ns.map(|v| v as f64),
            Metric::KvBytesReadPerToken => r.kv_bytes_read_per_token.map(|v| v as f64),
            Metric::RelL2P50 => r.rel_l2_p50,
            Metric::CosineMean => r.cosine_mean,
            Metric::KlNats => r.kl_nats,
            Metric::Top1Agreement => r.top1_agreement,
            Metric::LogitCosineMean => r.logit_cosine_mean,
            Metric::NllNats => r.nll_nats,
        }
    }
}

/// What a change is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval is beyond the threshold, on the worse side.
    Regressed,
    /// The whole interval is beyond the threshold, on the better side.
    Improved,
    /// None of the others: the measurement cannot tell.
    Inconclusive,
    /// The whole interval is within the threshold.
    Unchanged,
}

impl Verdict {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Regressed => "regressed",
            Verdict::Improved => "improved",
            Verdict::Inconclusive => "inconclusive",
            Verdict::Unchanged => "unchanged",
        }
    }
}

/// The rule. `worse` is the interval of the change, positive when it is worse, in the unit of `threshold`.
pub fn verdict(worse: (f64, f64), threshold: f64) -> Verdict {
    match worse {
        (lo, _) if lo > threshold => Verdict::Regressed,
        (_, hi) if hi < -threshold => Verdict::Improved,
        (lo, hi) if lo >= -threshold && hi <= threshold => Verdict::Unchanged,
        _ => Verdict::Inconclusive,
    }
}

/// One metric of one cell, before and after.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// The cell.
    pub cell_id: String,
    /// Its configuration in words.
    pub cell: String,
    /// What is compared.
    pub metric: Metric,
    /// Before, in the unit of the column.
    pub base: f64,
    /// After; none when it was not measured any more.
    pub head: Option<f64>,
    /// Head against base: a share (0.05 is 5 % more) for relative metrics, a difference for the others. None when the
    /// base is zero and the head is not.
    pub estimate: Option<f64>,
    /// Interval of the estimate; none when there are too few repetitions.
    pub interval: Option<(f64, f64)>,
    /// Threshold, in the unit of the estimate.
    pub threshold: f64,
    /// What it is called.
    pub verdict: Verdict,
    /// The smallest change that an interval of this width would have shown to be beyond the threshold.
    pub detectable: Option<f64>,
    /// Anything that a reader must know.
    pub note: String,
}

/// A cell that cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The cell.
    pub cell_id: String,
    /// Its configuration in words.
    pub cell: String,
    /// How it ended before; none when it was not there.
    pub base: Option<String>,
    /// How it ended after.
    pub head: Option<String>,
    /// The reason that the later one gives.
    pub reason: String,
}

/// Two results, compared.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Every metric of every cell measured on both sides, regressions first, then by size.
    pub changes: Vec<Change>,
    /// Measured before and not after: failed, skipped or gone.
    pub missing: Vec<Gap>,
    /// Output that fails verification now and did not before.
    pub verify_failed: Vec<Gap>,
    /// Not comparable without a loss: new, or not measured on either side.
    pub others: Vec<Gap>,
}

/// One side of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Side {
    /// Its rows.
    pub records: Vec<Record>,
    /// Token times by cell and repetition; empty when only the rows are at hand, which widens the intervals.
    pub times: BTreeMap<String, Vec<Vec<u64>>>,
}

/// Configuration of a record in words.
pub fn describe(r: &Record) -> String {
    let batch = match r.batch_tokens() {
        1 => String::new(),
        tokens => format!(" batch={tokens}"),
    };
    format!(
        "context={} threads={} kv={} method={}{batch}",
        r.context_tokens,
        r.threads,
        r.kv_dtype,
        r.method_string()
    )
}

/// Compares cell by cell (same `cell_id`) with intervals of the given confidence.
pub fn compare(base: &Side, head: &Side, gate: &Gate, confidence: f64) -> Comparison {
    let mut out = Comparison::default();
    let after: BTreeMap<&str, &Record> = head.records.iter().map(|r| (r.cell_id.as_str(), r)).collect();
    let before: BTreeMap<&str, &Record> = base.records.iter().map(|r| (r.cell_id.as_str(), r)).collect();
    for b in &base.records {
        let h = after.get(b.cell_id.as_str()).copied();
        let gap = || Gap {
            cell_id: b.cell_id.clone(),
            cell: describe(b),
            base: Some(b.status.as_str().to_owned()),
            head: h.map(|h| h.status.as_str().to_owned()),
            reason: h.map_or("not in HEAD".to_owned(), |h| h.error.clone().unwrap_or_default()),
        };
        match h {
            Some(h) if b.measured() && h.measured() => {
                if h.status == Status::VerifyFailed && b.status != Status::VerifyFailed {
                    out.verify_failed.push(gap());
                }
                out.changes
                    .extend(METRICS.iter().filter_map(|m| change(*m, b, h, base, head, gate, confidence)));
            }
            Some(h) if h.status == Status::VerifyFailed => out.verify_failed.push(gap()),
            _ if b.measured() => out.missing.push(gap()),
            _ => out.others.push(gap()),
        }
    }
    for h in head.records.iter().filter(|h| !before.contains_key(h.cell_id.as_str())) {
        let failed = h.status == Status::VerifyFailed;
        let list = if failed { &mut out.verify_failed } else { &mut out.others };
        list.push(Gap {
            cell_id: h.cell_id.clone(),
            cell: describe(h),
            base: None,
            head: Some(h.status.as_str().to_owned()),
            reason: match h.error.as_ref().filter(|_| failed) {
                Some(error) => format!("not in BASE; {error}"),
                None => "not in BASE".to_owned(),
            },
        });
    }
    let size = |c: &Change| c.estimate.map_or(f64::INFINITY, f64::abs);
    out.changes.sort_by(|a, b| {
        let late = |c: &Change| c.verdict != Verdict::Regressed;
        late(a).cmp(&late(b)).then(size(b).total_cmp(&size(a)))
    });
    out
}

fn change(
    metric: Metric,
    b: &Record,
    h: &Record,
    base: &Side,
    head: &Side,
    gate: &Gate,
    confidence: f64,
) -> Option<Change> {
    let threshold = metric.threshold(gate);
    let (before, after) = match (metric.value(b), metric.value(h)) {
        (Some(before), Some(after)) => (before, after),
        // Was measured, is not any more: that is not "unchanged".
        (Some(before), None) => {
            return Some(Change {
                cell_id: b.cell_id.clone(),
                cell: describe(b),
                metric,
                base: before,
                head: None,
                estimate: None,
                interval: None,
                threshold,
                verdict: Verdict::Inconclusive,
                detectable: None,
                note: "not measured in HEAD".to_owned(),
            });
        }
        _ => return None,
    };
    let mut note = String::new();
    let (estimate, interval) = if metric.timed() {
        let (estimate, found) = timed(metric, b, h, base, head, confidence, &mut note);
        (Some(estimate), found)
    } else if metric.relative() {
        match (before, after) {
            (x, y) if x == y => (Some(0.0), Some((0.0, 0.0))),
            (x, y) if x > 0.0 => (Some(y / x - 1.0), Some((y / x - 1.0, y / x - 1.0))),
            _ => (None, Some((f64::INFINITY, f64::INFINITY))), // from nothing to something
        }
    } else {
        (Some(after - before), Some((after - before, after - before)))
    };
    let sign = if metric.larger_is_better() { -1.0 } else { 1.0 };
    // Ratios are judged by their logarithm, so that a change and its reverse are equally large.
    let scale = |v: f64| if metric.relative() { v.ln_1p() } else { v };
    let limit = scale(threshold);
    let worse = interval.map(|(lo, hi)| {
        let (a, b) = (sign * scale(lo), sign * scale(hi));
        (a.min(b), a.max(b))
    });
    let detectable = worse.filter(|_| metric.timed()).map(|(lo, hi)| (limit + 0.5 * (hi - lo)).exp_m1());
    Some(Change {
        cell_id: b.cell_id.clone(),
        cell: describe(b),
        metric,
        base: before,
        head: Some(after),
        estimate,
        interval: interval.filter(|i| i.0.is_finite() && i.1.is_finite()),
        threshold,
        verdict: worse.map_or(Verdict::Inconclusive, |w| verdict(w, limit)),
        detectable,
        note,
    })
}

/// Change of a time as a share, with its interval.
fn timed(
    metric: Metric,
    b: &Record,
    h: &Record,
    base: &Side,
    head: &Side,
    confidence: f64,
    note: &mut String,
) -> (f64, Option<(f64, f64)>) {
    let share = |log: f64| log.exp_m1();
    let plain = match (metric.value(b), metric.value(h)) {
        (Some(x), Some(y)) if x > 0.0 => y / x - 1.0,
        _ => 0.0,
    };
    let (Some(before), Some(after)) = (base.times.get(&b.cell_id), head.times.get(&h.cell_id)) else {
        if metric == Metric::TpotP99 {
            "no samples: the tail has no interval".clone_into(note);
            return (plain, None);
        }
        "no samples: interval from the stored ends".clone_into(note);
        let ends = |r: &Record| Some((r.tpot_p50_lo95_ns? as f64, r.tpot_p50_hi95_ns? as f64));
        let found = ends(b).zip(ends(h)).filter(|(b, _)| b.0 > 0.0 && b.1 > 0.0);
        return (plain, found.map(|(b, h)| (h.0 / b.1 - 1.0, h.1 / b.0 - 1.0)));
    };
    let found = if metric == Metric::TpotP50 {
        let logs = |reps: &[Vec<u64>]| -> Vec<f64> {
            reps.iter().filter_map(|r| summarise::repetition_median(r)).map(|m| m.max(1.0).ln()).collect()
        };
        let shift = interval::shift(&logs(before), &logs(after), confidence);
        let found = shift.and_then(|s| s.interval).map(|i| (share(i.lo), share(i.hi)));
        if let Some(shift) = shift {
            if found.is_none() {
                "too few repetitions for an interval".clone_into(note);
            }
            return (share(shift.estimate), found);
        }
        found
    } else if before.len() < 4 || after.len() < 4 {
        None
    } else {
        let p99 = |reps: &[Vec<u64>], drawn: &[usize]| {
            let mut pool: Vec<u64> = drawn.iter().flat_map(|i| &reps[*i]).copied().collect();
            // Nearest rank, as in the records.
            let rank = ((pool.len() as f64 * stats::P99 - 1e-9).ceil().max(1.0) as usize).min(pool.len()) - 1;
            (!pool.is_empty()).then(|| (*pool.select_nth_unstable(rank).1).max(1) as f64)
        };
        interval::bootstrap(
            before.len(),
            after.len(),
            BOOTSTRAP_ROUNDS,
            confidence,
            BOOTSTRAP_SEED,
            |x, y| Some((p99(after, y)? / p99(before, x)?).ln()),
        )
        .map(|i| (share(i.lo), share(i.hi)))
    };
    if found.is_none() {
        "too few repetitions for an interval".clone_into(note);
    }
    (plain, found)
}

const BOOTSTRAP_ROUNDS: usize = 1000;
const BOOTSTRAP_SEED: u64 = 0x6c6f_6e67_6269_7421;

#[cfg(test)]
mod tests;
