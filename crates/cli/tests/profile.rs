//! `longbit profile` from the outside: rows, files, and what it refuses.

#![forbid(unsafe_code)]

mod common;

use common::*;

const TINY: [&str; 7] = ["profile", "--model", "preset:tiny", "--context", "64", "--steps", "5"];

#[test]
fn a_profile_has_a_row_an_operation_that_add_up_to_the_step() {
    let dir = tempfile::tempdir().expect("a folder");
    let ran = run(dir.path(), &[&TINY[..], &["--prefill", "20", "--out", "new/here"]].concat()).expect(0);
    for words in [
        "qkv",
        "attention",
        "gate-up",
        "down",
        "head",
        "wait",
        "fork",
        "of bandwidth",
        "prefill of 20 tokens",
    ] {
        assert!(ran.out.contains(words), "{words} is missing in:\n{}", ran.out);
    }
    assert_eq!(ran.out.matches("fork, barriers and serial gaps: ").count(), 2, "{}", ran.out);
    let here = dir.path().join("new/here");
    assert!(get(&here.join("profile.svg")).contains("</svg>") && here.join("profile.png").exists());
    let json: serde_json::Value = serde_json::from_str(&get(&here.join("profile.json"))).expect("JSON");
    assert_eq!((&json["model"], &json["context_tokens"]), (&"preset:tiny".into(), &64.into()));
    for part in json["parts"].as_array().expect("parts") {
        let rows = part["rows"].as_array().expect("rows");
        let sum: f64 = rows.iter().map(|r| r["time_ns"].as_f64().expect("a time")).sum();
        let step = part["step_ns"].as_f64().expect("a time");
        assert!((sum / step - 1.0).abs() < 1e-3, "{sum} of {step}");
    }
    let mut csv = csv::Reader::from_path(here.join("profile.csv")).expect("a table");
    let down: Vec<_> = csv.records().map(|r| r.expect("a row")).filter(|r| &r[3] == "down").collect();
    // 4 layers of 256 x 512 weights at 2 bits, in a step and in a prefill.
    assert!(down.len() == 2 && down.iter().all(|r| &r[8] == "131072"), "{down:?}");
}

#[test]
fn a_checkpoint_is_profiled_too_and_formats_are_what_they_say() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = checkpoint();
    let args = ["profile", "--model", path(&model), "--context", "3", "--steps", "2", "--prefill", "0"];
    let csv = run(dir.path(), &[&args[..], &["--format", "csv"]].concat()).expect(0).out;
    assert!(csv.starts_with("part,tokens,steps,operation,") && !csv.contains("prefill"), "{csv}");
    let markdown = run(dir.path(), &[&args[..], &["--format", "md"]].concat()).expect(0).out;
    assert!(markdown.contains("| operation "), "{markdown}");
    let json = run(dir.path(), &[&args[..], &["--format", "json"]].concat()).expect(0).out;
    assert!(serde_json::from_str::<serde_json::Value>(&json).expect("JSON")["parts"].is_array());
}

#[test]
fn what_cannot_be_profiled_is_said() {
    let dir = tempfile::tempdir().expect("a folder");
    let ask = |args: &[&str]| run(dir.path(), &[&TINY[..], args].concat());
    run(dir.path(), &["profile", "--model", "preset:tinny"]).expect(2).says(&["tinny", "bitnet-2b-4t"]);
    ask(&["--kv", "bf61"]).expect(2).says(&["bf61", "bf16"]);
    ask(&["--method", "windows"]).expect(2).says(&["windows", "dense"]);
    ask(&["--head", "int9"]).expect(2).says(&["int9"]);
    ask(&["--i2s", "x86"]).expect(2).says(&["preset"]);
    run(dir.path(), &["profile", "--model", "preset:tiny", "--steps", "0", "--prefill", "0"])
        .expect(2)
        .says(&["nothing is left"]);
    run(dir.path(), &["profile", "--model", "preset:tiny", "--context", "99999999999"])
        .expect(1)
        .says(&["not enough memory"]);
}
