//! What is predicted of a decode step against what recorded ones read: `results/methods*`, every method from 8k to 96k tokens.

#![forbid(unsafe_code)]

mod common;

use std::collections::BTreeMap;

use common::*;
use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{HeadFormat, footprint, preset};

/// The method of a row with its parameters; those that it has no more are at their default.
fn method_of(row: &Row) -> longbit::attention::MethodSpec {
    let params: BTreeMap<String, String> =
        serde_json::from_str(&row["method_params"]).expect("parameters of a method");
    let pairs: Vec<String> = params.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let text = format!("{}:{}", row["method"], pairs.join(","));
    method(&text).or_else(|_| method(&row["method"])).expect("a method that still exists")
}

#[test]
fn predicted_bytes_are_within_a_factor_of_two_of_recorded_ones() {
    let mut seen = 0;
    for result in ["methods", "methods-96k", "methods-planes8"] {
        for row in cells(&root().join("results").join(result)).iter().filter(|r| r["status"] == "ok") {
            let number = |column: &str| row[column].parse::<f64>().unwrap_or(0.0);
            let (config, spec) = (preset(&row["model"]).expect("a preset"), method_of(row));
            let (head, kv) = (HeadFormat::parse(&row["head"]), kv_dtype(&row["kv_dtype"]));
            let (head, kv) = (head.expect("a head"), kv.expect("a dtype"));
            let context = row["context_tokens"].parse().expect("tokens");
            let said = footprint(&config, head, kv, &spec, context, 9, 2);
            let read = number("kv_bytes_read_per_token") + number("index_bytes_read_per_token");
            let ratio = said.kv_per_token as f64 / read;
            let state = number("index_bytes_stored");
            eprintln!(
                "{context:>6} {:<7} {:<15} predicted {:7.1} MB, read {:7.1} MB: {ratio:.2}; state {:6.1} of {:6.1} MB; forked {:.1} MB",
                row["kv_dtype"],
                row["method"],
                said.kv_per_token as f64 / 1e6,
                read / 1e6,
                said.index as f64 / 1e6,
                state / 1e6,
                said.forked as f64 / 1e6
            );
            assert!((0.5..=2.0).contains(&ratio), "{spec:?} at {context}: {ratio}");
            let apart = (said.index as f64 - state).abs();
            assert!(apart <= 0.15 * state + 20e6, "{spec:?} at {context}: {} of {state}", said.index);
            seen += 1;
        }
    }
    assert!(seen > 90, "{seen} rows");
}
