//! The number formats of an experiment beside each other: what each stores, its speed at every context, what it loses.

use super::table::Rows;
use crate::analyse::label::{context, digits, distinct};
use crate::record::Record;

/// A row a KV dtype, in the order of the cells. Speeds are those of the most threads at every context; what is stored, lost
/// and spent on appending is that of the longest context. Of several methods the first counts. Nothing where no cell was
/// measured.
pub fn formats(records: &[Record]) -> Rows {
    let measured = |r: &&Record| r.measured() && r.batch_tokens() == 1 && !r.one_matrix();
    let Some(first) = records.iter().find(measured) else { return Rows::default() };
    let same = |r: &&Record| (&r.method, &r.method_params) == (&first.method, &first.method_params);
    let usable: Vec<&Record> = records.iter().filter(measured).filter(same).collect();
    let mut contexts: Vec<u64> = usable.iter().map(|r| r.context_tokens).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let cell = |dtype: &str, tokens: u64| {
        let those = usable.iter().filter(|r| r.kv_dtype == dtype && r.context_tokens == tokens);
        those.max_by_key(|r| r.threads)
    };
    let number = |x: Option<f64>| x.map_or(String::new(), digits);
    let cosine = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.6}"));
    let mut body = Vec::new();
    for dtype in distinct(usable.iter().map(|r| &r.kv_dtype)) {
        let Some(last) = contexts.iter().rev().find_map(|&tokens| cell(dtype, tokens)) else { continue };
        let mut row = vec![dtype.clone(), number(last.kv_bytes_stored_per_token.map(|b| b / 1e3))];
        row.extend(contexts.iter().map(|&at| number(cell(dtype, at).and_then(|r| r.decode_tok_s))));
        let append = last.append_ns.map(|ns| ns as f64);
        let share = append.zip(last.tpot_p50_ns).map(|(ns, step)| 100.0 * ns / step.max(1) as f64);
        row.extend([
            number(last.rel_l2_p50),
            number(last.rel_l2_p95),
            number(last.rel_l2_max),
            cosine(last.cosine_mean),
            cosine(last.cosine_min),
            number(last.attention_logit_error_max),
            number(append.map(|ns| ns / 1e3)),
            number(share),
        ]);
        body.push(row);
    }
    let mut head = vec!["KV".to_owned(), "kB stored".to_owned()];
    head.extend(contexts.iter().map(|&tokens| format!("tok/s at {}", context(tokens))));
    head.extend(
        [
            "rel L2 p50",
            "rel L2 p95",
            "rel L2 max",
            "cosine",
            "least",
            "logit error",
            "append µs",
            "% of a step",
        ]
        .map(str::to_owned),
    );
    Rows { head, body, left: vec![0] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing::records;

    #[test]
    fn a_format_has_its_speeds_and_what_it_costs_at_the_longest_context() {
        let like = records().swap_remove(0);
        let cell = |kv: &str, tokens: u64, threads: u64, speed: f64, p95: f64| Record {
            method: "dense".into(),
            method_params: String::new(),
            kv_dtype: kv.into(),
            context_tokens: tokens,
            threads,
            decode_tok_s: Some(speed),
            tpot_p50_ns: Some(50_000_000),
            rel_l2_p95: Some(p95),
            kv_bytes_stored_per_token: Some(40_500.0),
            append_ns: Some(200_000),
            ..like.clone()
        };
        let mut records = vec![
            cell("bf16", 2048, 1, 11.0, 0.5),
            cell("bf16", 2048, 2, 21.0, 0.5),
            cell("bf16", 8192, 2, 13.0, 0.01),
            cell("int8", 2048, 2, 22.0, 0.5),
        ];
        records.push(Record { method: "window".into(), ..cell("int8", 8192, 2, 99.0, 0.9) });
        let rows = formats(&records);
        assert_eq!(rows.head[2..4], ["tok/s at 2k", "tok/s at 8k"]);
        let [bf16, int8] = &rows.body[..] else { panic!("{rows:?}") };
        assert_eq!([&*bf16[0], &bf16[1], &bf16[2], &bf16[3]], ["bf16", "40.5", "21.0", "13.0"]);
        assert_eq!([&*bf16[5], &bf16[10], &bf16[11]], ["0.0100", "200", "0.400"]);
        assert_eq!([&*int8[0], &int8[2], &int8[3], &int8[5]], ["int8", "22.0", "", "0.500"]);
        assert!(rows.body.iter().all(|row| row.len() == rows.head.len()));
        assert_eq!(formats(&[]), Rows::default());
    }
}
