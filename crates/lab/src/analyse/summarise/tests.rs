//! Summaries of a synthetic run, and what becomes of damaged ones.

use super::*;
use crate::analyse::testing;
use crate::plan::VerifySpec;
use longbit_protocol::Probe;

fn by_method<'a>(records: &'a [Record], context: u64, method: &str) -> &'a Record {
    records.iter().find(|r| r.context_tokens == context && r.method == method).unwrap()
}

#[test]
fn every_planned_cell_appears_once_in_order() {
    let (plan, machine, lines) = testing::results();
    let records = summarise(&plan, &machine, &lines);
    let ids: Vec<_> = records.iter().map(|r| r.cell_id.clone()).collect();
    assert_eq!(ids, plan.cells.iter().map(|c| c.id.clone()).collect::<Vec<_>>());
    let empty = summarise(&plan, &machine, &[]);
    assert_eq!(empty.len(), plan.cells.len());
    assert!(empty.iter().all(|r| !r.measured()));
}

#[test]
fn numbers_of_a_cell() {
    let (plan, machine, lines) = testing::results();
    let records = summarise(&plan, &machine, &lines);
    let r = by_method(&records, 2048, "dense");
    assert_eq!((r.status, r.error.as_deref(), r.reps, r.tokens_timed), (Status::Ok, None, 6, 384));
    let all: Vec<u64> = token_times(&lines)[&r.cell_id].concat();
    let total: u64 = all.iter().sum();
    assert_eq!(r.decode_tok_s, Some(384.0 / (total as f64 / 1e9)));
    assert_eq!(r.tpot_min_ns, all.iter().min().copied());
    assert!(r.tpot_p50_lo95_ns <= r.tpot_p50_ns && r.tpot_p50_ns <= r.tpot_p50_hi95_ns);
    assert!(r.tpot_p99_ns.is_some() && r.tpot_p99_hi95_ns >= r.tpot_p99_ns);
    assert_eq!(r.kv_bytes_read_per_token, Some(2048 * 76_800));
    let bytes = (r.weight_bytes_per_token.unwrap() + 2048 * 76_800) as f64;
    let achieved = bytes / (total as f64 / 384.0);
    assert!((r.achieved_gb_s.unwrap() / achieved - 1.0).abs() < 1e-12);
    assert_eq!(r.probe_gb_s, Some(21.0), "the median of 20, 21 and 40");
    assert!((r.roofline_fraction.unwrap() - achieved / 21.0).abs() < 1e-12);
    assert_eq!((r.steal_pct, r.throttled_ms), (None, None));
}

#[test]
fn probes_of_other_threads_and_cohorts_do_not_count() {
    let (plan, machine, mut lines) = testing::results();
    let threads = plan.cells[0].threads;
    for (cohort, threads) in [(0, threads + 1), (1, threads)] {
        let probe = Probe { threads, gb_s: 900.0, round: 0 };
        lines.extend((0..9).map(|_| Line::Probe { cohort, attempt: 0, probe }));
    }
    let records = summarise(&plan, &machine, &lines);
    assert_eq!(by_method(&records, 2048, "dense").probe_gb_s, Some(21.0));
}

#[test]
fn an_unfinished_cell_is_an_error_with_the_count() {
    let (plan, machine, mut lines) = testing::results();
    let id = plan.cells[0].id.clone();
    lines.retain(|l| match l {
        Line::Done { cell, .. } => *cell != id,
        Line::Sample { sample, .. } => sample.cell != id || sample.rep < 3,
        _ => true,
    });
    let r = &summarise(&plan, &machine, &lines)[0];
    assert_eq!(r.status, Status::Error);
    assert_eq!(r.error.as_deref(), Some("incomplete: 3 of 6 repetitions"));
    assert_eq!((r.reps, r.decode_tok_s, r.tpot_p50_ns), (3, None, None));
    // Closed, but a line is gone.
    lines.push(Line::Done { cell: id, reps: 6 });
    let r = &summarise(&plan, &machine, &lines)[0];
    assert!(r.status == Status::Error && r.error.as_deref().unwrap().contains("although"), "{:?}", r.error);
}

#[test]
fn failure_is_never_timed_as_success() {
    let (plan, machine, mut lines) = testing::results();
    let id = plan.cells[0].id.clone();
    for line in &mut lines {
        if let Line::Sample { sample, .. } = line
            && sample.cell == id
            && sample.rep == 2
        {
            sample.tok_ns.truncate(10);
        }
    }
    let r = &summarise(&plan, &machine, &lines)[0];
    assert_eq!(r.error.as_deref(), Some("repetition 2 has 10 timed tokens, expected 64"));
    assert_eq!((r.status, r.decode_tok_s), (Status::Error, None));
    let outcome = Outcome { cell: id.clone(), status: Status::Timeout, error: "no token for 30 min".into() };
    lines.push(Line::Failed { outcome });
    let r = &summarise(&plan, &machine, &lines)[0];
    assert_eq!((r.status, r.decode_tok_s), (Status::Timeout, None));
}

#[test]
fn the_last_word_on_a_cell_stands() {
    let (plan, machine, mut lines) = testing::results();
    let id = plan.cells[0].id.clone();
    let outcome = Outcome { cell: id.clone(), status: Status::Oom, error: "killed".into() };
    lines.push(Line::Failed { outcome });
    assert_eq!(summarise(&plan, &machine, &lines)[0].status, Status::Oom);
    lines.push(Line::Done { cell: id, reps: 6 });
    assert_eq!(summarise(&plan, &machine, &lines)[0].status, Status::Ok);
}

#[test]
fn a_repetition_recorded_twice_counts_once() {
    let (plan, machine, lines) = testing::results();
    let before = summarise(&plan, &machine, &lines);
    let again: Vec<Line> = lines.iter().filter(|l| matches!(l, Line::Sample { .. })).cloned().collect();
    let doubled: Vec<Line> = lines.into_iter().chain(again).collect();
    assert_eq!(summarise(&plan, &machine, &doubled), before);
}

#[test]
fn few_samples_leave_the_tail_empty() {
    let (mut plan, machine, lines) = testing::results();
    plan.min_samples_p99 = 385;
    let records = summarise(&plan, &machine, &lines);
    let r = by_method(&records, 2048, "dense");
    assert_eq!(r.tpot_p99_ns, None);
    assert!(r.tpot_p90_ns.is_some());
}

#[test]
fn verify_marks_rows_and_keeps_their_numbers() {
    let (mut plan, machine, lines) = testing::results();
    plan.verify = Some(VerifySpec { rel_l2_max: Some(0.5), cosine_min: Some(0.9), ..VerifySpec::default() });
    let records = summarise(&plan, &machine, &lines);
    let window = by_method(&records, 32768, "window");
    assert_eq!(window.status, Status::VerifyFailed);
    assert!(window.error.as_deref().unwrap().contains("exceeds 0.5"), "{:?}", window.error);
    assert!(window.decode_tok_s.is_some());
    assert_eq!(by_method(&records, 32768, "dense").status, Status::Ok);
    plan.verify.as_mut().unwrap().methods = vec!["dense".into()];
    let records = summarise(&plan, &machine, &lines);
    assert_eq!(by_method(&records, 32768, "window").status, Status::Ok);
    let spec = VerifySpec { cosine_min: Some(0.9), ..VerifySpec::default() };
    assert!(
        crate::analyse::verify::verify_violation(&spec, "dense", None).is_some(),
        "not measured is not passed"
    );
}

#[test]
fn drift_marks_a_cell_unsteady() {
    let (plan, machine, mut lines) = testing::results();
    let id = plan.cells[0].id.clone();
    assert_eq!(summarise(&plan, &machine, &lines)[0].steady, Some(true));
    for line in &mut lines {
        if let Line::Sample { sample, .. } = line
            && sample.cell == id
            && sample.rep >= 3
        {
            sample.tok_ns.iter_mut().for_each(|t| *t = *t * 105 / 100);
        }
    }
    let r = &summarise(&plan, &machine, &lines)[0];
    assert_eq!(r.steady, Some(false));
    assert!((r.drift_pct.unwrap() - 5.0).abs() < 1.0);
}
