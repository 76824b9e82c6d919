//! The memory that a plan says a worker takes, with the states of all the cells that it serves, against what it takes; and a
//! cohort that is cut where memory is less.

#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

mod common;

use common::*;

/// Methods with large states and small ones, and some that evict.
const METHODS: [&str; 11] = [
    "dense",
    "sparq",
    "twilight",
    "magicpig:index=packed",
    "quest",
    "nsa",
    "cluster",
    "h2o",
    "snapkv",
    "tova",
    "expected",
];

fn sweep() -> Experiment {
    Experiment {
        contexts: vec![65_536],
        methods: METHODS.to_vec(),
        reps: 1,
        gen_tokens: 4,
        ..Experiment::default()
    }
}

fn number(row: &Row, column: &str) -> f64 {
    row[column].parse().unwrap_or_else(|_| panic!("{column} of {row:?}"))
}

#[test]
fn a_cohort_takes_the_memory_that_was_planned() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = sweep().write(dir.path());
    measure(dir.path(), file, "whole", &[]).expect(0);
    let rows = cells(&dir.path().join("whole"));
    let most = |column: &str| rows.iter().map(|r| number(r, column)).fold(0.0, f64::max);
    let (took, said) = (most("rss_peak_bytes"), most("rss_predicted_bytes"));
    eprintln!("took {:.1} MB, said {:.1} MB", took / 1e6, said / 1e6);
    assert!(rows.iter().all(|r| number(r, "rss_predicted_bytes") == said), "one worker for all");
    // The plan may say more, by what not all methods need at once, and hardly less.
    assert!(took < 1.05 * said && took > 0.7 * said, "took {took}, said {said}");

    // With three quarters of it there are two workers, and every cell is measured.
    let limit = format!("{}B", (0.75 * said) as u64);
    let plan = run(dir.path(), &["plan", file, "--max-rss", &limit]).expect(0);
    assert!(plan.out.contains("workers follow one another"), "{}", plan.out);
    measure(dir.path(), file, "cut", &["--max-rss", &limit]).expect(0);
    let cut = cells(&dir.path().join("cut"));
    assert_eq!(cut.len(), METHODS.len());
    assert!(cut.iter().all(|r| r["status"] == "ok"), "{:?}", statuses(&dir.path().join("cut")));
    for (whole, cut) in rows.iter().zip(&cut) {
        assert!(number(cut, "rss_predicted_bytes") <= 0.75 * said);
        assert!(number(cut, "rss_peak_bytes") < 1.05 * 0.75 * said);
        for exact in ["method", "rel_l2_p50", "kv_bytes_read_per_token", "index_bytes_stored"] {
            assert_eq!(whole[exact], cut[exact], "{exact}");
        }
    }
    let ready = log(&dir.path().join("cut")).iter().filter(|l| l["line"] == "ready").count();
    assert!(ready > 1, "{ready} workers");
}
