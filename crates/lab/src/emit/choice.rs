//! Which configuration to take: for each context and each limit on the error, the fastest one measured and the smallest.

use longbit_protocol::Status;

use super::table::Rows;
use crate::analyse::label::{Labels, context, digits};
use crate::record::Record;

/// Limits on the relative L2 error that nineteen of twenty attention outputs keep.
const LIMITS: [f64; 5] = [0.02, 0.05, 0.1, 0.3, f64::INFINITY];

/// Bytes that cache and index take.
fn stored(r: &Record) -> u64 {
    r.kv_bytes_stored.unwrap_or(0) + r.index_bytes_stored.unwrap_or(0)
}

/// A row a context and limit; a limit that nothing measured keeps says so. Of cells that differ in threads the fastest counts.
/// Nothing where no cell has both a speed and an error.
pub fn choices(records: &[Record]) -> Rows {
    let labels = Labels::new(records);
    let usable = |r: &&Record| {
        r.measured()
            && r.status != Status::VerifyFailed
            && r.batch_tokens() == 1
            && r.rel_l2_p95.is_some()
            && r.decode_tok_s.is_some()
    };
    let usable: Vec<&Record> = records.iter().filter(usable).collect();
    let mut contexts: Vec<u64> = usable.iter().map(|r| r.context_tokens).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let mut body = Vec::new();
    for tokens in contexts {
        for limit in LIMITS {
            let within: Vec<&&Record> = usable
                .iter()
                .filter(|r| r.context_tokens == tokens && r.rel_l2_p95.is_some_and(|e| e <= limit))
                .collect();
            let speed = |r: &&&&Record| r.decode_tok_s.unwrap_or(0.0);
            let fastest = within.iter().max_by(|a, b| speed(a).total_cmp(&speed(b)));
            let smallest =
                within.iter().min_by(|a, b| stored(a).cmp(&stored(b)).then(speed(b).total_cmp(&speed(a))));
            let mut row = vec![context(tokens), if limit.is_finite() { digits(limit) } else { "any".into() }];
            match (fastest, smallest) {
                (Some(fast), Some(small)) => row.extend([
                    labels.method(fast),
                    fast.kv_dtype.clone(),
                    digits(fast.decode_tok_s.unwrap_or(0.0)),
                    fast.rel_l2_p50.map_or(String::new(), digits),
                    fast.rel_l2_p95.map_or(String::new(), digits),
                    fast.cache_bytes_per_token().map_or(String::new(), |b| digits(b as f64 / 1e6)),
                    digits(stored(fast) as f64 / 1e9),
                    format!("{}, {}", labels.method(small), small.kv_dtype),
                    digits(stored(small) as f64 / 1e9),
                    digits(small.decode_tok_s.unwrap_or(0.0)),
                ]),
                _ => {
                    row.push("nothing measured keeps it".into());
                    row.extend(std::iter::repeat_n(String::new(), 9));
                }
            }
            body.push(row);
        }
    }
    let head = [
        "context",
        "rel L2 p95 at most",
        "fastest",
        "KV",
        "tok/s",
        "rel L2 p50",
        "rel L2 p95",
        "KV MB/token",
        "GB stored",
        "smallest",
        "GB stored",
        "tok/s",
    ];
    Rows { head: head.map(str::to_owned).to_vec(), body, left: vec![2, 3, 9] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing::records;

    #[test]
    fn the_fastest_and_the_smallest_within_a_limit_are_named() {
        let like = records().swap_remove(0);
        let cell = |method: &str, kv: &str, speed: f64, p95: f64, stored: u64| Record {
            method: method.into(),
            method_params: String::new(),
            kv_dtype: kv.into(),
            context_tokens: 8192,
            decode_tok_s: Some(speed),
            rel_l2_p50: Some(p95 / 2.0),
            rel_l2_p95: Some(p95),
            kv_bytes_stored: Some(stored),
            index_bytes_stored: None,
            ..like.clone()
        };
        let records = [
            cell("dense", "bf16", 10.0, 0.015, 8_000_000_000),
            cell("dense", "int8", 14.0, 0.018, 4_000_000_000),
            cell("window", "bf16", 20.0, 0.7, 8_000_000_000),
            cell("cluster", "bf16", 18.0, 0.09, 8_200_000_000),
        ];
        let rows = choices(&records).body;
        let named: Vec<[&str; 4]> = rows.iter().map(|r| [&*r[1], &*r[2], &*r[3], &*r[9]]).collect();
        assert_eq!(
            named,
            [
                ["0.0200", "dense", "int8", "dense, int8"],
                ["0.0500", "dense", "int8", "dense, int8"],
                ["0.100", "cluster", "bf16", "dense, int8"],
                ["0.300", "cluster", "bf16", "dense, int8"],
                ["any", "window", "bf16", "dense, int8"],
            ]
        );
        let none = choices(&[cell("window", "bf16", 20.0, 0.7, 1)]).body;
        assert_eq!(none[0][2], "nothing measured keeps it");
        assert_eq!((none.len(), none[4][2].as_str()), (5, "window"));
        let unknown = Record { rel_l2_p95: None, ..cell("dense", "bf16", 1.0, 0.1, 1) };
        assert!(choices(&[unknown]).body.is_empty());
    }
}
