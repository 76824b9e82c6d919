//! The verb `cmp`: methods and KV dtypes of one result side by side, as ratios to dense attention.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use crate::analyse::Results;
use crate::analyse::label::{Labels, REFERENCE_KV, context, digits, distinct, percent};
use crate::emit::table::Rows;
use crate::emit::{Format, json};
use crate::record::Record;
use crate::{Exit, LabError, Result};

/// What `cmp` is asked.
#[derive(Clone, Debug, Default)]
pub struct CmpOptions {
    /// Results directory.
    pub result: PathBuf,
    /// How to print.
    pub format: Format,
    /// Colours in the table.
    pub color: bool,
}

/// A cell beside dense attention under the same conditions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Side {
    /// The cell.
    pub cell_id: String,
    /// Cached tokens.
    pub context_tokens: u64,
    /// Threads.
    pub threads: u64,
    /// Tokens that a timed pass takes together.
    pub batch: u64,
    /// KV dtype.
    pub kv_dtype: String,
    /// Method, with the parameters that differ within the result.
    pub method: String,
    /// Tokens a second.
    pub decode_tok_s: Option<f64>,
    /// Speed relative to dense with the same context, threads and KV dtype.
    pub speed_vs_dense: Option<f64>,
    /// Speed relative to dense with the reference KV dtype ([`reference_dtype`]).
    pub speed_vs_reference: Option<f64>,
    /// Cache and index bytes read per token, relative to dense with the same context and KV dtype.
    pub bytes_vs_dense: Option<f64>,
    /// Median relative L2 error.
    pub rel_l2_p50: Option<f64>,
    /// 95th percentile of it.
    pub rel_l2_p95: Option<f64>,
    /// Mean cosine.
    pub cosine_mean: Option<f64>,
    /// Share of needles found.
    pub needle_accuracy: Option<f64>,
    /// Mean divergence of the next-token distribution from the reference's, nats.
    pub kl_nats: Option<f64>,
    /// Largest.
    pub kl_nats_max: Option<f64>,
    /// Share of steps with the reference's most likely token.
    pub top1_agreement: Option<f64>,
    /// Mean cosine of the logits with the reference's.
    pub logit_cosine_mean: Option<f64>,
    /// Perplexity of the text relative to the reference.
    pub perplexity_ratio: Option<f64>,
}

/// The KV dtype that all others are compared with: bf16 where it was measured, otherwise the first.
pub fn reference_dtype(records: &[Record]) -> Option<&str> {
    let dtypes = distinct(records.iter().filter(|r| r.measured()).map(|r| r.kv_dtype.as_str()));
    dtypes.iter().find(|k| **k == REFERENCE_KV).or(dtypes.first()).copied()
}

/// Every measured cell beside dense, by context, threads, KV dtype and method in the order of the plan.
pub fn sides(records: &[Record]) -> Vec<Side> {
    let labels = Labels::new(records);
    let reference = reference_dtype(records);
    let dense = |like: &Record, kv: &str| {
        records.iter().find(|r| {
            r.measured()
                && r.is_dense()
                && r.kv_dtype == kv
                && (r.context_tokens, r.threads, r.batch_tokens())
                    == (like.context_tokens, like.threads, like.batch_tokens())
                && (&r.workload, &r.model, &r.head) == (&like.workload, &like.model, &like.head)
        })
    };
    let ratio = |a: Option<f64>, b: Option<f64>| a.zip(b).filter(|(_, b)| *b > 0.0).map(|(a, b)| a / b);
    let mut sides: Vec<Side> = records
        .iter()
        .filter(|r| r.measured())
        .map(|r| {
            let same = dense(r, &r.kv_dtype);
            let other = reference.and_then(|kv| dense(r, kv));
            let bytes = |r: &Record| r.cache_bytes_per_token().map(|b| b as f64);
            Side {
                cell_id: r.cell_id.clone(),
                context_tokens: r.context_tokens,
                threads: r.threads,
                batch: r.batch_tokens(),
                kv_dtype: r.kv_dtype.clone(),
                method: labels.method(r),
                decode_tok_s: r.decode_tok_s,
                speed_vs_dense: ratio(r.decode_tok_s, same.and_then(|d| d.decode_tok_s)),
                speed_vs_reference: ratio(r.decode_tok_s, other.and_then(|d| d.decode_tok_s)),
                bytes_vs_dense: ratio(bytes(r), same.and_then(bytes)),
                rel_l2_p50: r.rel_l2_p50,
                rel_l2_p95: r.rel_l2_p95,
                cosine_mean: r.cosine_mean,
                needle_accuracy: r.needle_accuracy,
                kl_nats: r.kl_nats,
                kl_nats_max: r.kl_nats_max,
                top1_agreement: r.top1_agreement,
                logit_cosine_mean: r.logit_cosine_mean,
                perplexity_ratio: r.perplexity_ratio(),
            }
        })
        .collect();
    sides.sort_by_key(|s| (s.context_tokens, s.threads, s.batch));
    sides
}

fn rows(sides: &[Side], reference: &str) -> Rows {
    let times = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.2}×"));
    let number = |v: Option<f64>| v.map_or(String::new(), digits);
    // With one KV dtype both ratios are the same column.
    let several = sides.iter().any(|s| s.kv_dtype != reference);
    let batches = sides.iter().any(|s| s.batch != 1);
    let against = format!("vs dense {reference}");
    let head = [
        "context",
        "threads",
        "batch",
        "KV",
        "method",
        "tok/s",
        "vs dense",
        &against,
        "bytes vs dense",
        "rel L2 p50",
        "rel L2 p95",
        "cosine",
        "needles",
        "KL nats",
        "KL max",
        "top-1",
        "logit cosine",
        "perplexity",
    ];
    let row = |s: &Side| {
        vec![
            context(s.context_tokens),
            s.threads.to_string(),
            if batches { s.batch.to_string() } else { String::new() },
            s.kv_dtype.clone(),
            s.method.clone(),
            number(s.decode_tok_s),
            times(s.speed_vs_dense),
            if several { times(s.speed_vs_reference) } else { String::new() },
            s.bytes_vs_dense.map_or(String::new(), percent),
            number(s.rel_l2_p50),
            number(s.rel_l2_p95),
            s.cosine_mean.map_or(String::new(), |c| format!("{c:.5}")),
            s.needle_accuracy.map_or(String::new(), percent),
            number(s.kl_nats),
            number(s.kl_nats_max),
            s.top1_agreement.map_or(String::new(), percent),
            s.logit_cosine_mean.map_or(String::new(), |c| format!("{c:.5}")),
            s.perplexity_ratio.map_or(String::new(), |x| format!("{x:.4}×")),
        ]
    };
    let head = head.map(str::to_owned).to_vec();
    Rows { head, body: sides.iter().map(row).collect(), left: vec![3, 4] }.without_empty_columns()
}

/// Prints the comparison to `out`. Exit code 6 when the result has unfinished or failed cells, otherwise 0.
///
/// # Errors
/// What [`Results::read`] says, and [`LabError::Output`].
pub fn cmp(options: &CmpOptions, out: &mut dyn Write) -> Result<Exit> {
    let records = Results::read(&options.result)?.records();
    let sides = sides(&records);
    let table = rows(&sides, reference_dtype(&records).unwrap_or_default());
    let text = match options.format {
        Format::Json => json(&sides)?,
        Format::Csv => table.csv(),
        Format::Markdown => table.markdown(),
        Format::Table if table.body.is_empty() => "No cell was measured.\n".to_owned(),
        Format::Table => table.terminal(options.color),
    };
    out.write_all(text.as_bytes()).map_err(LabError::Output)?;
    let whole = records.iter().all(|r| r.measured() || r.status == longbit_protocol::Status::Skipped);
    Ok(if whole { Exit::Ok } else { Exit::Incomplete })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::summarise::summarise;
    use crate::analyse::testing::{self, Sweep};

    #[test]
    fn ratios_are_to_dense_under_the_same_conditions() {
        let (plan, machine, lines) = Sweep { threads: vec![1, 2], ..Sweep::default() }.build();
        let records = summarise(&plan, &machine, &lines);
        let sides = sides(&records);
        let find = |kv: &str, method: &str, threads: u64| {
            sides
                .iter()
                .find(|s| {
                    s.context_tokens == 32768
                        && s.kv_dtype == kv
                        && s.method == method
                        && s.threads == threads
                })
                .unwrap()
        };
        assert_eq!(find("int8", "dense", 2).speed_vs_dense, Some(1.0));
        assert_eq!(find("bf16", "dense", 1).speed_vs_reference, Some(1.0));
        let (int8, bf16) = (find("int8", "dense", 2), find("bf16", "dense", 2));
        let expected = int8.decode_tok_s.unwrap() / bf16.decode_tok_s.unwrap();
        assert_eq!(int8.speed_vs_reference, Some(expected));
        assert!(expected > 1.3);
        let window = find("bf16", "window", 1);
        assert!((window.bytes_vs_dense.unwrap() - 1028.0 / 32768.0).abs() < 1e-6);
        let text = rows(&sides, "bf16").terminal(false);
        assert!(text.contains("vs dense bf16") && !text.contains("needles"), "{text}");
    }

    #[test]
    fn a_text_is_compared_by_its_logits() {
        let (plan, machine, lines) = Sweep { text: true, ..Sweep::default() }.build();
        let sides = sides(&summarise(&plan, &machine, &lines));
        let far = sides.iter().find(|s| s.method == "window" && s.context_tokens == 98_304).unwrap();
        assert!(far.kl_nats.unwrap() > 0.5 && far.kl_nats_max > far.kl_nats && far.rel_l2_p50.is_none());
        assert!((far.perplexity_ratio.unwrap() - far.kl_nats.unwrap().exp()).abs() < 1e-9);
        let text = rows(&sides, "bf16").terminal(false);
        assert!(text.contains("KL nats") && text.contains("perplexity") && !text.contains("L2"), "{text}");
    }

    #[test]
    fn without_dense_there_is_no_ratio() {
        let (plan, machine, lines) =
            Sweep { methods: vec![("window", &[])], kv_dtypes: vec!["int8"], ..Sweep::default() }.build();
        let sides = sides(&summarise(&plan, &machine, &lines));
        assert!(sides.iter().all(|s| s.speed_vs_dense.is_none() && s.decode_tok_s.is_some()));
        assert!(!rows(&sides, "int8").markdown().contains("vs dense"));
    }

    #[test]
    fn failed_cells_make_the_view_incomplete_and_stdout_stays_valid() {
        let dir = tempfile::tempdir().unwrap();
        let (plan, machine, lines) = testing::with_gaps();
        testing::write(dir.path(), &plan, &machine, &lines);
        let mut out = Vec::new();
        let options = CmpOptions { result: dir.path().into(), format: Format::Json, color: false };
        assert_eq!(cmp(&options, &mut out).unwrap(), Exit::Incomplete);
        let parsed: Vec<serde_json::Value> = serde_json::from_slice(&out).unwrap();
        assert_eq!(parsed.len(), 40);
        let mut out = Vec::new();
        cmp(&CmpOptions { format: Format::Csv, ..options }, &mut out).unwrap();
        let mut reader = csv::Reader::from_reader(out.as_slice());
        assert_eq!(reader.records().filter(|r| r.is_ok()).count(), 40);
    }
}
