//! Verdicts on synthetic runs with known changes.

use super::*;
use crate::analyse::testing::Sweep;

fn sweep(seed: u64) -> Sweep {
    Sweep { contexts: vec![2048, 32768], kv_dtypes: vec!["bf16"], seed, ..Sweep::default() }
}

fn side(seed: u64) -> Side {
    let (plan, machine, lines) = sweep(seed).build();
    let records = summarise::summarise(&plan, &machine, &lines);
    Side { records, times: summarise::token_times(&lines) }
}

/// The same run with every time multiplied.
fn scaled(seed: u64, percent: u64) -> Side {
    let (plan, machine, mut lines) = sweep(seed).build();
    for line in &mut lines {
        if let crate::run::store::Line::Sample { sample, .. } = line {
            sample.tok_ns.iter_mut().for_each(|t| *t = *t * percent / 100);
        }
    }
    let records = summarise::summarise(&plan, &machine, &lines);
    Side { records, times: summarise::token_times(&lines) }
}

fn verdicts(c: &Comparison, metric: Metric) -> Vec<Verdict> {
    c.changes.iter().filter(|c| c.metric == metric).map(|c| c.verdict).collect()
}

#[test]
fn the_rule_looks_at_the_whole_interval() {
    assert_eq!(verdict((0.06, 0.08), 0.05), Verdict::Regressed);
    assert_eq!(verdict((0.04, 0.08), 0.05), Verdict::Inconclusive);
    assert_eq!(verdict((-0.08, -0.06), 0.05), Verdict::Improved);
    assert_eq!(verdict((-0.01, 0.02), 0.05), Verdict::Unchanged);
    assert_eq!(verdict((-0.2, 0.2), 0.05), Verdict::Inconclusive);
    assert_eq!(verdict((0.0, 0.0), 0.0), Verdict::Unchanged);
    assert_eq!(verdict((1e-9, 1e-9), 0.0), Verdict::Regressed);
}

#[test]
fn a_run_against_itself_and_its_twin_is_unchanged() {
    for other in [1, 2] {
        let c = compare(&side(1), &side(other), &Gate::default(), 0.95);
        assert_eq!(c.changes.len(), 6 * 5);
        for metric in METRICS.iter().filter(|m| **m != Metric::TpotP99) {
            assert!(verdicts(&c, *metric).iter().all(|v| *v == Verdict::Unchanged), "{metric:?}");
        }
        assert!(c.changes.iter().all(|c| c.verdict != Verdict::Regressed));
        assert!(c.missing.is_empty() && c.others.is_empty() && c.verify_failed.is_empty());
    }
}

#[test]
fn slower_is_regressed_and_faster_is_improved() {
    let c = compare(&side(1), &scaled(2, 112), &Gate::default(), 0.95);
    assert!(verdicts(&c, Metric::TpotP50).iter().all(|v| *v == Verdict::Regressed));
    assert_eq!(c.changes[0].verdict, Verdict::Regressed, "regressions first");
    let first = c.changes.iter().find(|c| c.metric == Metric::TpotP50).unwrap();
    let (lo, hi) = first.interval.unwrap();
    assert!(lo < 0.12 && 0.12 < hi && (first.estimate.unwrap() - 0.12).abs() < 0.01);
    assert!(first.detectable.is_some_and(|d| d > 0.05 && d < 0.07), "{:?}", first.detectable);
    let c = compare(&side(1), &scaled(2, 88), &Gate::default(), 0.95);
    assert!(verdicts(&c, Metric::TpotP50).iter().all(|v| *v == Verdict::Improved));
}

#[test]
fn direction_belongs_to_the_metric() {
    let (base, mut head) = (side(1), side(1));
    for r in &mut head.records {
        r.cosine_mean = r.cosine_mean.map(|c| c + 0.002);
        r.rel_l2_p50 = r.rel_l2_p50.map(|e| e + 0.002);
    }
    let c = compare(&base, &head, &Gate::default(), 0.95);
    assert!(verdicts(&c, Metric::CosineMean).iter().all(|v| *v == Verdict::Improved));
    assert!(verdicts(&c, Metric::RelL2P50).iter().all(|v| *v == Verdict::Regressed));
    let c = compare(&head, &base, &Gate::default(), 0.95);
    assert!(verdicts(&c, Metric::CosineMean).iter().all(|v| *v == Verdict::Regressed));
}

#[test]
fn counted_bytes_are_exact() {
    let (base, mut head) = (side(1), side(2));
    head.records[0].kv_bytes_read_per_token = head.records[0].kv_bytes_read_per_token.map(|b| b + 1);
    let c = compare(&base, &head, &Gate::default(), 0.95);
    let regressed: Vec<&Change> = c.changes.iter().filter(|c| c.verdict == Verdict::Regressed).collect();
    assert_eq!(regressed.len(), 1);
    assert_eq!(
        (regressed[0].metric, &regressed[0].cell_id),
        (Metric::KvBytesReadPerToken, &base.records[0].cell_id)
    );
    let loose = Gate { kv_bytes_pct: 1.0, ..Gate::default() };
    assert!(compare(&base, &head, &loose, 0.95).changes.iter().all(|c| c.verdict != Verdict::Regressed));
}

#[test]
fn too_few_repetitions_are_inconclusive() {
    let (mut base, mut head) = (side(1), scaled(2, 200));
    for s in [&mut base, &mut head] {
        s.times.values_mut().for_each(|reps| reps.truncate(3));
    }
    let c = compare(&base, &head, &Gate::default(), 0.95);
    assert!(verdicts(&c, Metric::TpotP50).iter().all(|v| *v == Verdict::Inconclusive));
    assert!(c.changes.iter().any(|c| c.note.contains("too few repetitions")));
}

#[test]
fn rows_without_samples_use_their_stored_interval() {
    let strip = |s: Side| Side { times: BTreeMap::new(), ..s };
    let c = compare(&strip(side(1)), &strip(scaled(2, 150)), &Gate::default(), 0.95);
    assert!(verdicts(&c, Metric::TpotP50).iter().all(|v| *v == Verdict::Regressed));
    assert!(verdicts(&c, Metric::TpotP99).iter().all(|v| *v == Verdict::Inconclusive));
}

#[test]
fn vanished_cells_are_listed() {
    let (base, mut head) = (side(1), side(2));
    let gone = head.records.remove(0).cell_id;
    head.records[0].status = Status::Oom;
    head.records[1].status = Status::VerifyFailed;
    let c = compare(&base, &head, &Gate::default(), 0.95);
    assert_eq!(c.missing.iter().map(|g| g.head.as_deref()).collect::<Vec<_>>(), [None, Some("oom")]);
    assert_eq!(c.missing[0].cell_id, gone);
    assert_eq!(c.verify_failed.len(), 1);
    let c = compare(&head, &base, &Gate::default(), 0.95);
    assert!(c.missing.is_empty() && c.verify_failed.is_empty());
    assert_eq!(c.others.len(), 2, "one new, one that failed before");
}

#[test]
fn a_metric_that_is_gone_is_not_unchanged() {
    let (base, mut head) = (side(1), side(1));
    head.records[0].rel_l2_p50 = None;
    let c = compare(&base, &head, &Gate::default(), 0.95);
    let gone: Vec<&Change> = c.changes.iter().filter(|c| c.note == "not measured in HEAD").collect();
    assert_eq!(gone.len(), 1);
    assert_eq!(gone[0].verdict, Verdict::Inconclusive);
}

#[test]
fn a_failed_verification_counts_whatever_base_was() {
    let (mut base, mut head) = (side(1), side(2));
    base.records[0].status = Status::Oom;
    head.records[0].status = Status::VerifyFailed;
    let new = base.records.remove(1).cell_id;
    head.records[1].status = Status::VerifyFailed;
    let found = compare(&base, &head, &Gate::default(), 0.95);
    let ids: Vec<&str> = found.verify_failed.iter().map(|g| g.cell_id.as_str()).collect();
    assert_eq!(ids, [base.records[0].cell_id.as_str(), new.as_str()]);
}

#[test]
fn figures_of_logits_are_gated_like_those_of_outputs() {
    let (plan, machine, lines) = Sweep { kv_dtypes: vec!["bf16"], text: true, ..Sweep::default() }.build();
    let records = summarise::summarise(&plan, &machine, &lines);
    let base = Side { records, times: BTreeMap::new() };
    let mut head = base.clone();
    for r in &mut head.records {
        r.kl_nats = r.kl_nats.map(|v| v + 0.001);
        r.nll_nats = r.nll_nats.map(|v| v + 0.001);
        r.top1_agreement = r.top1_agreement.map(|v| v - 0.002);
        r.logit_cosine_mean = r.logit_cosine_mean.map(|v| v - 0.002);
    }
    let logits = [Metric::KlNats, Metric::NllNats, Metric::Top1Agreement, Metric::LogitCosineMean];
    let of = |a: &Side, b: &Side, gate: &Gate, m| verdicts(&compare(a, b, gate, 0.95), m);
    for metric in logits {
        let all = |v: Vec<Verdict>, wanted| v.len() == base.records.len() && v.iter().all(|v| *v == wanted);
        assert!(all(of(&base, &head, &Gate::default(), metric), Verdict::Regressed), "{metric:?}");
        assert!(all(of(&head, &base, &Gate::default(), metric), Verdict::Improved), "{metric:?}");
        let loose =
            Gate { kl_abs: 0.1, nll_abs: 0.1, top1_abs: 0.1, logit_cosine_abs: 0.1, ..Gate::default() };
        assert!(all(of(&base, &head, &loose, metric), Verdict::Unchanged), "{metric:?}");
    }
    assert!(verdicts(&compare(&base, &head, &Gate::default(), 0.95), Metric::RelL2P50).is_empty());
    // A plan of before these thresholds has their defaults.
    let old =
        r#"{"tpot_p50_pct":5.0,"tpot_p99_pct":15.0,"kv_bytes_pct":0.0,"rel_l2_abs":0.01,"cosine_abs":0.001}"#;
    let gate: Gate = serde_json::from_str(old).unwrap();
    assert_eq!(gate, Gate { rel_l2_abs: 0.01, ..Gate::default() });
}
