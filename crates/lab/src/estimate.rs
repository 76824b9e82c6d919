//! What configurations would weigh and how fast memory lets them decode, as the verb `estimate` shows it: a table, CSV or
//! JSON. The bytes come from the caller; here KV dtypes and methods are words.

use serde::Serialize;

use crate::analyse::label::{context, digits};
use crate::emit::table::Rows;
use crate::spec::units::show_bytes;

/// Configurations of one model that differ in context and KV dtype.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// Preset, path or shape.
    pub model: String,
    /// Number format of the output head.
    pub head: String,
    /// Packing of the ternary weights.
    pub weights: String,
    /// Attention method with its parameters.
    pub method: String,
    /// Threads of the team.
    pub threads: usize,
    /// Read bandwidth, 10^9 bytes a second; none where none was given or measured.
    pub bandwidth_gb_s: Option<f64>,
    /// Whether it was measured here, just now.
    pub bandwidth_measured: bool,
    /// Memory that all must fit into; none where it is not known.
    pub memory_bytes: Option<u64>,
    /// Weights, embedding and head; none where the shape does not tell.
    pub weight_bytes: Option<u64>,
    /// Weights and head read by a decode step.
    pub weight_bytes_per_token: Option<u64>,
    /// One a context and KV dtype.
    pub rows: Vec<Row>,
}

/// One configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Tokens in the cache.
    pub context_tokens: u64,
    /// Number format of cached keys and values.
    pub kv_dtype: String,
    /// Bits stored for a cached number, scales included.
    pub bits_per_value: f64,
    /// Cached keys and values of one token, in all layers.
    pub cache_bytes_per_token: f64,
    /// The whole cache.
    pub cache_bytes: u64,
    /// State of the method beside it.
    pub index_bytes: u64,
    /// Tables, buffers and the process itself; none where the shape does not tell.
    pub scratch_bytes: Option<u64>,
    /// Everything together, as far as it is known.
    pub total_bytes: u64,
    /// Cached keys, values and index read by a decode step.
    pub kv_bytes_read_per_token: u64,
    /// Whether the total fits the memory.
    pub fits: Option<bool>,
    /// Longest context that fits the memory with this KV dtype.
    pub largest_context_tokens: Option<u64>,
}

impl Estimate {
    /// Decode steps a second when reading takes all the time: what no implementation of the same bytes can exceed unless caches
    /// serve a part of them.
    pub fn tok_s(&self, row: &Row) -> Option<f64> {
        let bytes = self.weight_bytes_per_token.unwrap_or(0).saturating_add(row.kv_bytes_read_per_token);
        (bytes > 0).then_some(self.bandwidth_gb_s? * 1e9 / bytes as f64)
    }

    /// The report for people.
    pub fn text(&self, color: bool) -> String {
        let s = if self.threads == 1 { "" } else { "s" };
        let mut text = match (self.weight_bytes, self.weight_bytes_per_token) {
            (Some(all), Some(step)) => format!(
                "{}, {} weights, {} head · {} · {} thread{s}\nweights: {}, of which a step reads {}\n",
                self.model,
                self.weights,
                self.head,
                self.method,
                self.threads,
                show_bytes(all),
                show_bytes(step)
            ),
            _ => format!(
                "{} · {}\nweights: not counted; a shape with intermediate= and vocab= has them\n",
                self.model, self.method
            ),
        };
        if let Some(rate) = self.bandwidth_gb_s {
            let how = if self.bandwidth_measured { "measured" } else { "as given" };
            text.push_str(&format!("read bandwidth: {} GB/s, {how}\n", digits(rate)));
        }
        if let Some(memory) = self.memory_bytes {
            text.push_str(&format!("memory: {}\n", show_bytes(memory)));
        }
        text.push('\n');
        text.push_str(&self.rows().terminal(color));
        text
    }

    /// The table.
    pub fn rows(&self) -> Rows {
        let head = [
            "context",
            "KV",
            "bits a number",
            "kB a token",
            "cache",
            "index",
            "scratch",
            "total",
            "fits",
            "KV read a step",
            "tok/s at most",
            "longest context",
        ];
        let body = self.rows.iter().map(|r| {
            vec![
                context(r.context_tokens),
                r.kv_dtype.clone(),
                digits(r.bits_per_value),
                digits(r.cache_bytes_per_token / 1e3),
                show_bytes(r.cache_bytes),
                if r.index_bytes > 0 { show_bytes(r.index_bytes) } else { String::new() },
                r.scratch_bytes.map_or(String::new(), show_bytes),
                show_bytes(r.total_bytes),
                r.fits.map_or(String::new(), |fits| if fits { "yes" } else { "no" }.to_owned()),
                show_bytes(r.kv_bytes_read_per_token),
                self.tok_s(r).map_or(String::new(), digits),
                match (r.fits, r.largest_context_tokens) {
                    (_, Some(tokens)) => tokens.to_string(),
                    (Some(_), None) => "none".to_owned(),
                    (None, None) => String::new(),
                },
            ]
        });
        Rows { head: head.map(str::to_owned).to_vec(), body: body.collect(), left: vec![1] }
            .without_empty_columns()
    }

    /// A row a configuration; units in the column names.
    pub fn csv(&self) -> String {
        let head = [
            "model",
            "head",
            "weights",
            "method",
            "threads",
            "context_tokens",
            "kv_dtype",
            "bits_per_value",
            "cache_bytes_per_token",
            "weight_bytes",
            "cache_bytes",
            "index_bytes",
            "scratch_bytes",
            "total_bytes",
            "memory_bytes",
            "fits",
            "largest_context_tokens",
            "weight_bytes_per_token",
            "kv_bytes_read_per_token",
            "bandwidth_gb_s",
            "tok_s_at_most",
        ];
        fn or_empty<T: ToString>(value: Option<T>) -> String {
            value.map_or(String::new(), |v| v.to_string())
        }
        let body: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|r| {
                vec![
                    self.model.clone(),
                    self.head.clone(),
                    self.weights.clone(),
                    self.method.clone(),
                    self.threads.to_string(),
                    r.context_tokens.to_string(),
                    r.kv_dtype.clone(),
                    r.bits_per_value.to_string(),
                    r.cache_bytes_per_token.to_string(),
                    or_empty(self.weight_bytes),
                    r.cache_bytes.to_string(),
                    r.index_bytes.to_string(),
                    or_empty(r.scratch_bytes),
                    r.total_bytes.to_string(),
                    or_empty(self.memory_bytes),
                    or_empty(r.fits),
                    or_empty(r.largest_context_tokens),
                    or_empty(self.weight_bytes_per_token),
                    r.kv_bytes_read_per_token.to_string(),
                    or_empty(self.bandwidth_gb_s),
                    or_empty(self.tok_s(r)),
                ]
            })
            .collect();
        crate::emit::csv::table(&head.map(str::to_owned), &body)
    }

    /// One document, with the speed of each row in it.
    ///
    /// # Errors
    /// Only where it cannot be written as JSON.
    pub fn json(&self) -> crate::Result<String> {
        let wrong = |e: serde_json::Error| crate::LabError::Output(std::io::Error::other(e));
        let mut value = serde_json::to_value(self).map_err(wrong)?;
        if let Some(rows) = value.get_mut("rows").and_then(|rows| rows.as_array_mut()) {
            for (row, of) in rows.iter_mut().zip(&self.rows) {
                if let Some(row) = row.as_object_mut() {
                    row.insert("tok_s_at_most".to_owned(), self.tok_s(of).into());
                }
            }
        }
        crate::emit::json(&value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate() -> Estimate {
        let row = |tokens: u64, kv: &str, bits: f64| {
            let each = 76_800.0 * bits / 16.0;
            let cache = (each * tokens as f64) as u64;
            Row {
                context_tokens: tokens,
                kv_dtype: kv.into(),
                bits_per_value: bits,
                cache_bytes_per_token: each,
                cache_bytes: cache,
                index_bytes: 0,
                scratch_bytes: Some(100_000_000),
                total_bytes: 1_278_000_000 + cache,
                kv_bytes_read_per_token: cache,
                fits: Some(cache < 5_000_000_000),
                largest_context_tokens: Some(70_000),
            }
        };
        Estimate {
            model: "preset:bitnet-2b-4t".into(),
            head: "bf16".into(),
            weights: "2bit".into(),
            method: "dense".into(),
            threads: 2,
            bandwidth_gb_s: Some(33.0),
            bandwidth_measured: true,
            memory_bytes: Some(8_000_000_000),
            weight_bytes: Some(1_178_000_000),
            weight_bytes_per_token: Some(1_178_000_000),
            rows: vec![row(2048, "bf16", 16.0), row(98_304, "bf16", 16.0), row(98_304, "k=f32,v=bf16", 24.0)],
        }
    }

    #[test]
    fn the_table_has_a_row_a_configuration() {
        let estimate = estimate();
        let text = estimate.text(false);
        let last = text.lines().last().unwrap();
        assert!(
            text.starts_with("preset:bitnet-2b-4t, 2bit weights, bf16 head · dense · 2 threads"),
            "{text}"
        );
        assert!(
            text.contains("read bandwidth: 33.0 GB/s, measured") && text.contains("memory: 8.0 GB"),
            "{text}"
        );
        assert!(last.contains("k=f32,v=bf16") && last.contains(" no ") && last.ends_with("70000"), "{last}");
        assert!(!text.contains("index"), "no configuration has one: {text}");
        // 33 GB/s over 1.178 GB of weights and 7.55 GB of cache.
        let speed = estimate.tok_s(&estimate.rows[1]).unwrap();
        assert!(
            (speed - 33e9 / (1.178e9 + 76_800.0 * 98_304.0)).abs() < 1e-9 && text.contains("3.78"),
            "{text}"
        );
        let bare = Estimate { weight_bytes: None, bandwidth_gb_s: None, memory_bytes: None, ..estimate };
        let text = bare.text(false);
        assert!(text.contains("weights: not counted") && !text.contains("tok/s"), "{text}");
    }

    #[test]
    fn csv_and_json_hold_what_the_table_says() {
        let estimate = estimate();
        let text = estimate.csv();
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let rows: Vec<_> = reader.records().map(|r| r.unwrap()).collect();
        assert_eq!((rows.len(), &rows[2][6], &rows[2][15]), (3, "k=f32,v=bf16", "false"));
        let json: serde_json::Value = serde_json::from_str(&estimate.json().unwrap()).unwrap();
        assert_eq!(json["rows"][2]["kv_dtype"], "k=f32,v=bf16");
        assert_eq!(json["rows"][0]["tok_s_at_most"].as_f64(), estimate.tok_s(&estimate.rows[0]));
    }
}
