//! `longbit estimate` from the outside: tables, CSV and JSON of presets, files and shapes, and what it refuses.

#![forbid(unsafe_code)]

mod common;

use common::*;

const PRESET: [&str; 5] = ["estimate", "--model", "preset:bitnet-2b-4t", "--bandwidth", "33GB/s"];
const GROUPED: [&str; 5] =
    ["estimate", "--model", "shape:layers=80,heads=64,kv_heads=8,head_dim=128", "--bandwidth", "100GB/s"];

#[test]
fn contexts_and_dtypes_make_a_table() {
    let dir = tempfile::tempdir().expect("a folder");
    let args =
        [&PRESET[..], &["--context", "2k,96k", "--kv", "bf16,k=f32,v=bf16", "--memory", "8GiB"]].concat();
    let table = run(dir.path(), &args).expect(0).out;
    assert!(table.contains("read bandwidth: 33.0 GB/s, as given"), "{table}");
    assert!(table.contains("weights: 1.2 GB, of which a step reads 1.2 GB"), "{table}");
    let json = run(dir.path(), &[&args[..], &["--format", "json"]].concat()).expect(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let rows = json["rows"].as_array().expect("rows");
    let names: Vec<_> = rows.iter().map(|r| (r["context_tokens"].as_u64(), r["kv_dtype"].as_str())).collect();
    let kvs = [Some("bf16"), Some("k=f32,v=bf16")];
    assert_eq!(
        names,
        [(Some(2048), kvs[0]), (Some(2048), kvs[1]), (Some(98_304), kvs[0]), (Some(98_304), kvs[1])]
    );
    // 76,800 bytes a token in bf16, half as many again with f32 keys.
    assert_eq!(rows[0]["kv_bytes_read_per_token"], 76_800 * 2048);
    assert_eq!(rows[3]["kv_bytes_read_per_token"], 76_800u64 * 98_304 / 2 * 3);
    assert_eq!((&rows[0]["bits_per_value"], &rows[1]["bits_per_value"]), (&16.0.into(), &24.0.into()));
    let longest = |i: usize| rows[i]["largest_context_tokens"].as_u64().expect("a context");
    assert!(longest(0) == longest(2) && longest(0) > longest(1), "{rows:?}");
    assert_eq!((&rows[0]["fits"], &rows[3]["fits"]), (&true.into(), &false.into()));
    // What is said to fit does, and one token more does not.
    let at = |context: u64| {
        let at = context.to_string();
        let args = [&PRESET[..], &["--context", &at, "--memory", "8GiB", "--format", "json"]].concat();
        let json: serde_json::Value =
            serde_json::from_str(&run(dir.path(), &args).expect(0).out).expect("JSON");
        json["rows"][0]["fits"].as_bool()
    };
    assert_eq!((at(longest(0)), at(longest(0) + 1)), (Some(true), Some(false)));
    let csv = run(dir.path(), &[&args[..], &["--format", "csv"]].concat()).expect(0).out;
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let kv: Vec<String> = reader.records().map(|r| r.expect("a row")[6].to_owned()).collect();
    assert_eq!(kv, ["bf16", "k=f32,v=bf16", "bf16", "k=f32,v=bf16"]);
    let markdown = run(dir.path(), &[&args[..], &["--format", "md"]].concat()).expect(0).out;
    assert!(markdown.starts_with("| context | KV"), "{markdown}");
}

#[test]
fn a_shape_alone_tells_its_cache() {
    let dir = tempfile::tempdir().expect("a folder");
    let args = [&GROUPED[..], &["--context", "128000,128k", "--memory", "80GB"]].concat();
    let table = run(dir.path(), &args).expect(0).out;
    // 327,680 bytes a token; of 80 GB as many as 244,096 tokens, whole pages.
    for words in ["weights: not counted", "41.9 GB", "42.9 GB", "328", "2.38", "2.33"] {
        assert!(table.contains(words), "{words} is missing in:\n{table}");
    }
    let whole = "shape:layers=4,heads=4,kv_heads=2,head_dim=64,hidden=256,intermediate=512,vocab=512";
    let bandwidth = ["--bandwidth", "1GB/s", "--context", "64", "--kv", "f32"];
    let table = run(dir.path(), &[&["estimate", "--model", whole][..], &bandwidth].concat()).expect(0).out;
    assert!(table.contains("of which a step reads"), "{table}");
}

#[test]
fn the_bandwidth_is_measured_where_it_is_not_given_and_files_are_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = checkpoint();
    let args = ["estimate", "--model", path(&model), "--context", "64", "--threads", "1", "--format", "json"];
    let json: serde_json::Value = serde_json::from_str(&run(dir.path(), &args).expect(0).out).expect("JSON");
    assert_eq!(json["bandwidth_measured"], true);
    assert!(json["bandwidth_gb_s"].as_f64().expect("a rate") > 0.0);
    assert!(json["rows"][0]["tok_s_at_most"].as_f64().expect("a rate") > 0.0, "{json}");
}

#[test]
fn what_cannot_be_estimated_is_said() {
    let dir = tempfile::tempdir().expect("a folder");
    let refused = |args: &[&str], words: &str| {
        let ran = run(dir.path(), args).expect(2);
        assert!(ran.err.contains(words), "{words} is missing in:\n{}", ran.err);
    };
    refused(&["estimate", "--model", "preset:bitnet-9b"], "did you mean");
    refused(&["estimate", "--model", "shape:layers=2"], "at least `layers`, `heads` and `head_dim`");
    refused(&[&PRESET[..], &["--kv", "bf61"]].concat(), "did you mean `bf16`");
    refused(&[&PRESET[..], &["--kv", "k=bf16,bf16"]].concat(), "given once each");
    refused(&[&PRESET[..], &["--context", "2m"]].concat(), "not a number of tokens");
    refused(&[&PRESET[..], &["--memory", "much"]].concat(), "not a memory limit");
    refused(&[&PRESET[..4], &["33"]].concat(), "not a bandwidth");
    refused(&[&PRESET[..], &["--method", "windo"]].concat(), "did you mean `window`");
    refused(&[&PRESET[..], &["--i2s", "x86"]].concat(), "a preset has no use for them");
}
