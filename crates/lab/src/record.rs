//! One row of `cells.csv`, and the table of columns.
//!
//! The table below declares the struct, the header, the reader and the reference documentation together, so that they
//! cannot disagree. Units stand in the column names; an empty field means "not measured" and is never a zero or NaN.

use std::path::Path;
use std::str::FromStr;

use longbit_protocol::Status;
use serde::Serialize;

use crate::{LabError, Result};

/// A column: what the header says and the documentation explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Name in the header, with the unit.
    pub name: &'static str,
    /// Unit, or `-`.
    pub unit: &'static str,
    /// Type, with ` or empty` where it may not be measured.
    pub kind: &'static str,
    /// Meaning, one line.
    pub meaning: &'static str,
}

/// A value that a field of the CSV can hold.
trait Field: Sized {
    const KIND: &'static str;
    fn write(&self) -> String;
    fn parse(text: &str) -> std::result::Result<Self, String>;
}

macro_rules! field {
    ($ty:ty, $kind:literal) => {
        impl Field for $ty {
            const KIND: &'static str = $kind;
            fn write(&self) -> String {
                self.to_string() // floats: the shortest digits that read back as the same number
            }
            fn parse(text: &str) -> std::result::Result<Self, String> {
                <$ty>::from_str(text).map_err(|_| format!("`{text}` is not {}", <$ty as Field>::KIND))
            }
        }
        impl Field for Option<$ty> {
            const KIND: &'static str = concat!($kind, " or empty");
            fn write(&self) -> String {
                self.as_ref().map(Field::write).unwrap_or_default()
            }
            fn parse(text: &str) -> std::result::Result<Self, String> {
                if text.is_empty() { Ok(None) } else { <$ty as Field>::parse(text).map(Some) }
            }
        }
    };
}
field!(u64, "integer");
field!(f64, "number");
field!(bool, "boolean");
field!(String, "text");

impl Field for Status {
    const KIND: &'static str = "word";
    fn write(&self) -> String {
        self.as_str().to_owned()
    }
    fn parse(text: &str) -> std::result::Result<Self, String> {
        STATUSES
            .into_iter()
            .find(|s| s.as_str() == text)
            .ok_or_else(|| format!("`{text}` is not a status ({})", STATUSES.map(Status::as_str).join(", ")))
    }
}

/// Every status, in the order of the documentation.
pub const STATUSES: [Status; 7] = [
    Status::Ok,
    Status::Skipped,
    Status::Timeout,
    Status::Oom,
    Status::VerifyFailed,
    Status::Unstable,
    Status::Error,
];

macro_rules! columns {
    ($($name:ident: $ty:ty, $unit:literal, $meaning:literal;)*) => {
        /// One cell, summarised: one row of `cells.csv`.
        #[derive(Clone, Debug, PartialEq, Serialize)]
        pub struct Record {
            $(#[doc = $meaning] pub $name: $ty,)*
        }

        /// The columns of `cells.csv`, in order.
        pub const COLUMNS: &[Column] = &[
            $(Column { name: stringify!($name), unit: $unit, kind: <$ty as Field>::KIND, meaning: $meaning },)*
        ];

        impl Record {
            /// The fields as text, in the order of [`COLUMNS`].
            pub fn fields(&self) -> Vec<String> {
                vec![$(Field::write(&self.$name),)*]
            }

            /// Reads a row; `field` gives the text of a column by its place in [`COLUMNS`].
            fn from_fields<'a>(field: impl Fn(usize) -> &'a str) -> std::result::Result<Self, (&'static str, String)> {
                let mut place = 0usize..;
                let mut next = || place.next().map_or("", &field);
                Ok(Record {
                    $($name: <$ty as Field>::parse(next()).map_err(|e| (stringify!($name), e))?,)*
                })
            }
        }
    };
}

columns! {
    schema_version: u64, "-", "Version of this table: new columns only at the end; a rename or a new unit raises it.";
    run_id: String, "-", "Stamp, commit and machine of the run.";
    cell_id: String, "-", "16 hexadecimal digits over the canonical configuration of the cell.";
    experiment: String, "-", "`group/name`.";
    status: Status, "-", "How the cell ended: ok, skipped, timeout, oom, verify_failed, unstable (reserved: nothing gives it yet) or error.";
    error: Option<String>, "-", "The reason for anything but ok.";
    context_tokens: u64, "tokens", "Tokens in the KV cache when a decode step is timed.";
    threads: u64, "count", "Threads of the decode team.";
    kv_dtype: String, "-", "Number format of cached keys and values.";
    method: String, "-", "Attention method, bare name.";
    method_params: String, "JSON", "All its parameters with defaults filled in, as an object with sorted keys.";
    workload: String, "-", "Where queries, keys and values come from: a generator with its parameters, or a text or trace with the first digits of its SHA-256.";
    model: String, "-", "Model preset, or the path of a checkpoint.";
    head: String, "-", "Number format of the output head.";
    engine: String, "-", "Program that measured.";
    engine_version: String, "-", "Its version.";
    isa: Option<String>, "-", "Instruction set that its kernels used.";
    model_sha256: Option<String>, "hex", "Identifies the model: file, or preset, head and seed.";
    fill: Option<String>, "-", "How the cache was filled: synthetic (by a generator), trace (from a recorded one) or prefill (a text run through the model).";
    fill_sha256: Option<String>, "hex", "SHA-256 of the bytes of the filled cache.";
    seed: u64, "-", "Seed of the workload.";
    reps: u64, "count", "Repetitions recorded.";
    tokens_timed: u64, "tokens", "Timed tokens over all repetitions.";
    tokens_warmup: u64, "tokens", "Untimed tokens before them, over all repetitions.";
    fill_ns: Option<u64>, "ns", "Time to fill the cache, with the digest of its rows and, where a generator fills it, exact attention of the compared steps.";
    decode_tok_s: Option<f64>, "tokens/s", "Timed tokens divided by their summed time (not a mean of rates).";
    tpot_p50_ns: Option<u64>, "ns", "Median time per output token, over all timed tokens.";
    tpot_p90_ns: Option<u64>, "ns", "90th percentile (nearest rank).";
    tpot_p99_ns: Option<u64>, "ns", "99th percentile (nearest rank); empty below min_samples_p99 tokens.";
    tpot_p99_hi95_ns: Option<u64>, "ns", "One-sided 95 % upper bound of p99 (binomial order statistic); empty below 299 tokens.";
    tpot_mean_ns: Option<u64>, "ns", "Mean.";
    tpot_mad_ns: Option<u64>, "ns", "Median absolute deviation from the median, unscaled.";
    tpot_min_ns: Option<u64>, "ns", "Fastest token.";
    tpot_max_ns: Option<u64>, "ns", "Slowest token.";
    tpot_p50_lo95_ns: Option<u64>, "ns", "Lower end of the 95 % interval of the median of repetition medians (order statistics); empty below 6 repetitions.";
    tpot_p50_hi95_ns: Option<u64>, "ns", "Upper end.";
    drift_pct: Option<f64>, "%", "Median of the second half of the repetitions against the first half.";
    steady: Option<bool>, "-", "Whether the drift stays within max_drift of the experiment, either way.";
    outliers: Option<u64>, "count", "Tokens further than 14.826 MAD from the median; counted, never dropped.";
    rel_l2_p50: Option<f64>, "-", "Relative L2 error of an attention output against exact f32 attention on the same inputs, median over outputs; empty where a text is decoded.";
    rel_l2_p95: Option<f64>, "-", "95th percentile of it.";
    rel_l2_max: Option<f64>, "-", "Largest.";
    cosine_min: Option<f64>, "-", "Smallest cosine of an output with the exact one.";
    cosine_mean: Option<f64>, "-", "Mean cosine.";
    needle_accuracy: Option<f64>, "0-1", "Share of needle outputs whose readout names the planted value; empty where none is planted.";
    top1_agreement: Option<f64>, "0-1", "Share of compared steps whose most likely token is that of the reference (dense attention over a bf16 cache); empty where no text is decoded, like all that follows from logits.";
    kl_nats: Option<f64>, "nats", "Kullback-Leibler divergence of the next-token distribution from the reference's, KL(reference || cell), mean over steps.";
    kv_bytes_stored: Option<u64>, "bytes", "Rows of the filled cache, at the context.";
    kv_bytes_read_per_token: Option<u64>, "bytes", "Cached keys and values that a decode step read, counted by the engine, mean over timed tokens.";
    index_bytes_read_per_token: Option<u64>, "bytes", "Indexes and summaries that a decode step read.";
    index_bytes_stored: Option<u64>, "bytes", "State of the method beside the cache.";
    rows_read_per_token: Option<u64>, "rows", "Cached tokens attended exactly by a decode step, summed over layers and KV heads.";
    weight_bytes_per_token: Option<u64>, "bytes", "Weights and head that a decode step reads.";
    achieved_gb_s: Option<f64>, "10^9 bytes/s", "Weights, KV and index bytes read per token, divided by the mean time per token.";
    probe_gb_s: Option<f64>, "10^9 bytes/s", "Read bandwidth measured beside the cell with the same number of threads, median of the rounds.";
    roofline_fraction: Option<f64>, "-", "achieved_gb_s / probe_gb_s; above 1 when caches serve part of the bytes.";
    rss_peak_bytes: Option<u64>, "bytes", "Peak resident memory of the worker process up to the end of the cell.";
    rss_predicted_bytes: u64, "bytes", "Resident memory that the plan predicted for the worker, with the states of all cells that it serves; of a skipped cell, alone.";
    user_ns: Option<u64>, "ns", "User time of the process during the repetitions.";
    sys_ns: Option<u64>, "ns", "System time.";
    invol_switches: Option<u64>, "count", "Involuntary context switches during the repetitions.";
    major_faults: Option<u64>, "count", "Major page faults during the repetitions.";
    steal_pct: Option<f64>, "%", "Share of CPU time that the host stole, mean over repetitions.";
    throttled_ms: Option<f64>, "ms", "Time throttled by the control group, sum over repetitions.";
    psi_cpu_pct: Option<f64>, "%", "Pressure-stall share (cpu, some), mean over repetitions.";
    khz_min: Option<u64>, "kHz", "Lowest clock of a CPU seen.";
    khz_max: Option<u64>, "kHz", "Highest clock seen.";
    started_utc: Option<String>, "RFC 3339", "Start of the first repetition.";
    wall_ms: Option<f64>, "ms", "Time of all timed tokens together.";
    machine_id: String, "hex", "Identifies the machine.";
    machine_class: String, "hex", "Identifies machines that can be compared: CPU model, flags, cores, memory.";
    git_sha: String, "hex", "Commit of the binary, or unknown.";
    git_dirty: Option<bool>, "-", "The work tree differed from that commit.";
    rustc: String, "-", "Compiler.";
    target: String, "-", "Target triple.";
    profile: String, "-", "Build profile.";
    kl_nats_max: Option<f64>, "nats", "Largest divergence of a step.";
    logit_cosine_mean: Option<f64>, "-", "Cosine of the logits with those of the reference, mean over steps.";
    logit_cosine_min: Option<f64>, "-", "Smallest.";
    nll_nats: Option<f64>, "nats", "Negative log-likelihood of the token that really follows, mean over the compared steps; its exponential is the perplexity.";
    nll_reference_nats: Option<f64>, "nats", "The same of the reference.";
    quality_steps: Option<u64>, "count", "Decode steps compared.";
    batch: Option<u64>, "tokens", "Tokens that a timed pass takes together: 1 is a decode step, more are a prefill of as many at the context. The tpot columns are times of a pass; empty in files of before it was recorded, where it is 1.";
    cosine_p5: Option<f64>, "-", "5th percentile of the cosine of an attention output with the exact one.";
    attention_logit_error_max: Option<f64>, "nats", "Largest difference of a logit that attention sees, q.k/sqrt(head_dim), between rows as they are cached and as they were made: over compared steps, layers, query heads and all tokens of the context. It is that of the KV dtype, whatever the method reads; empty where a text is decoded.";
    kv_bytes_stored_per_token: Option<f64>, "bytes", "Bytes of the filled cache for each cached token, all layers and heads together.";
    append_ns: Option<u64>, "ns", "Time to append the keys and values of one token to every layer and head with one thread: encoding and writing, without projections and rotary embedding. Mean over 64 tokens, or as many as there is room for, median of 5 rounds; empty where no generator supplies them.";
    density_read: Option<f64>, "0-1", "Rows that a compared decode step attended, of those in the cache: mean over steps, layers and KV heads. The query heads of a group share what they read, so it is the density of a group.";
    top95_density_head: Option<f64>, "0-1", "Share of the tokens that are in the true top-p set of a query head, mean: the fewest tokens that hold 95 % of its exact softmax mass. It is that of the workload, whatever the method reads. This and what follows is taken from the first compared steps (at most 4) and as many layers, evenly spaced, as 256 MiB of exact weights hold; empty where a text is decoded.";
    top95_density_group: Option<f64>, "0-1", "The same of the union over the query heads of a group: what a method that knew everything would read.";
    captured_mass_p50: Option<f64>, "0-1", "Exact softmax mass of the tokens that a query head attended by their own rows, those that the method weighs itself among them: median over query heads and steps.";
    captured_mass_p5: Option<f64>, "0-1", "5th percentile of it.";
    tail_mass_error_p50: Option<f64>, "0-1", "Mass of the method's tail (its estimate, or rows under weights of its own), less the true mass of all tokens beyond the spans that are attended exactly, without the sign and as a share of the whole: median. Where a method has no tail it is the mass missed.";
    tail_mass_error_p95: Option<f64>, "0-1", "95th percentile of it.";
    top95_recall_mean: Option<f64>, "0-1", "Share of the tokens of the true top-p set that were attended, mean over query heads and steps.";
    top95_recall_p5: Option<f64>, "0-1", "5th percentile of it.";
    reads_samples: Option<u64>, "count", "Query heads times steps that the columns of mass and recall rest on.";
    index_bytes_stored_per_token: Option<f64>, "bytes", "State of the method for each token of the context, all layers and heads together.";
    index_build_ns: Option<u64>, "ns", "Time to build the state of the method from the filled cache with one thread, all layers and heads; once a worker, median over workers.";
    rel_l2_seed_mean: Option<f64>, "-", "rel_l2_p50, mean over seeds, of a method that draws at random (one with a parameter seed); empty for others and where measure.seeds is 1.";
    rel_l2_seed_sd: Option<f64>, "-", "Standard deviation of it, of the sample of seeds.";
    seeds: Option<u64>, "count", "Seeds: 1 and those that follow.";
    prefill_rel_l2_p50: Option<f64>, "-", "Relative L2 error of the attention outputs of the context's last 128 to 255 tokens under the pattern that the method gives to prompts, against dense attention over the same cached rows: median over tokens, query heads and some layers, evenly spaced. Empty where prompts are dense, rows were evicted or a text is decoded.";
    prefill_rel_l2_p95: Option<f64>, "-", "95th percentile of it.";
    prefill_density: Option<f64>, "0-1", "Rows that those tokens see, of those before them and their own.";
}

/// The last column that every file has; what follows was added later and may be empty.
const LAST_OF_THE_FIRST: &str = "profile";

impl Record {
    /// Method with its parameters, e.g. `window:sinks=4,window=1024`.
    pub fn method_string(&self) -> String {
        crate::plan::method_string(&self.method, &self.params())
    }

    /// The method's parameters; empty when the column does not hold an object of texts.
    pub fn params(&self) -> std::collections::BTreeMap<String, String> {
        serde_json::from_str(&self.method_params).unwrap_or_default()
    }

    /// Tokens that a timed pass takes together.
    pub fn batch_tokens(&self) -> u64 {
        self.batch.unwrap_or(1)
    }

    /// Whether one matrix is timed, without cache and attention.
    pub fn one_matrix(&self) -> bool {
        self.method == crate::plan::NO_METHOD
    }

    /// Whether the numbers of this row may be shown and compared: measured in full, whatever its errors are.
    pub fn measured(&self) -> bool {
        matches!(self.status, Status::Ok | Status::VerifyFailed | Status::Unstable)
    }

    /// Perplexity of the text under this cell relative to the reference: above 1 when the text surprises it more. None where
    /// it is not finite.
    pub fn perplexity_ratio(&self) -> Option<f64> {
        let ratio = (self.nll_nats? - self.nll_reference_nats?).exp();
        (!longbit_protocol::is_not_finite(ratio)).then_some(ratio)
    }

    /// Bytes of cache and index that a decode step reads.
    pub fn cache_bytes_per_token(&self) -> Option<u64> {
        Some(self.kv_bytes_read_per_token? + self.index_bytes_read_per_token.unwrap_or(0))
    }

    /// Whether anything but attending to everything is known of what the method read.
    pub fn chooses(&self) -> bool {
        let some = |density: Option<f64>| density.is_some_and(|d| d < 1.0);
        some(self.density_read)
            || some(self.prefill_density)
            || self.index_bytes_stored.is_some_and(|b| b > 0)
    }

    /// Whether it attends to everything, in its steps and in its prompt: what all others are compared with.
    pub fn is_dense(&self) -> bool {
        self.method_string() == crate::analyse::label::DENSE
    }

    /// Reads a `cells.csv`. Columns that were added later than this binary are ignored, those that were added later than
    /// the file are empty; any other that is missing is an error.
    ///
    /// # Errors
    /// [`LabError::Io`] when the file cannot be read, [`LabError::Data`] with the line and the column of what is wrong.
    pub fn read_csv(path: &Path) -> Result<Vec<Record>> {
        let text = std::fs::read(path).map_err(|e| LabError::io("read", path, e))?;
        let mut reader = csv::ReaderBuilder::new().from_reader(text.as_slice());
        let bad = |e: &csv::Error| {
            LabError::data(
                path,
                e.position().map(|p| p.line() as usize),
                format!("not a table of cells: {e}"),
            )
        };
        let header = reader.headers().map_err(|e| bad(&e))?.clone();
        let mut places = Vec::with_capacity(COLUMNS.len());
        let first = 1 + COLUMNS.iter().position(|c| c.name == LAST_OF_THE_FIRST).unwrap_or(COLUMNS.len());
        for (i, column) in COLUMNS.iter().enumerate() {
            let place = header.iter().position(|h| h == column.name);
            if place.is_none() && i < first {
                let what = format!(
                    "the column `{}` is missing; `longbit report --rebuild DIR` writes the file anew",
                    column.name
                );
                return Err(LabError::data(path, Some(1), what));
            }
            places.push(place);
        }
        let mut records = Vec::new();
        for row in reader.records() {
            let row = row.map_err(|e| bad(&e))?;
            let line = row.position().map(|p| p.line() as usize);
            let record = Record::from_fields(|i| {
                places.get(i).copied().flatten().and_then(|p| row.get(p)).unwrap_or("")
            })
            .map_err(|(column, what)| LabError::data(path, line, format!("column `{column}`: {what}")))?;
            if record.schema_version != u64::from(crate::plan::SCHEMA) {
                let what = format!(
                    "row of version {}, this binary reads {}",
                    record.schema_version,
                    crate::plan::SCHEMA
                );
                return Err(LabError::data(path, line, what));
            }
            records.push(record);
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing;
    use crate::emit::csv;

    fn round_trip(text: &str) -> Result<Vec<Record>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cells.csv");
        std::fs::write(&path, text).unwrap();
        Record::read_csv(&path)
    }

    #[test]
    fn header_is_the_table_and_names_are_unique() {
        let records = testing::records();
        let text = csv::to_string(&records);
        let header: Vec<&str> = text.lines().next().unwrap().split(',').collect();
        assert_eq!(header, COLUMNS.iter().map(|c| c.name).collect::<Vec<_>>());
        let mut names = header.clone();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), COLUMNS.len());
        assert_eq!(COLUMNS[4].kind, "word");
        assert_eq!(COLUMNS.iter().find(|c| c.name == "fill_ns").unwrap().kind, "integer or empty");
    }

    #[test]
    fn rows_read_back_as_they_were() {
        let mut records = testing::records();
        // Text that needs quoting, a float with many digits, and a skipped row with empty numbers.
        records[0].error = Some("a \"quoted\", reason\nof two lines".into());
        records[0].drift_pct = Some(0.1 + 0.2);
        assert!(records.iter().any(|r| r.status == Status::Skipped && r.tpot_p50_ns.is_none()));
        let text = csv::to_string(&records);
        assert_eq!(round_trip(&text).unwrap(), records);
        assert!(!text.contains("NaN") && !text.contains("inf"));
    }

    #[test]
    fn not_measured_is_an_empty_field() {
        let records = testing::records();
        let skipped = records.iter().find(|r| r.status == Status::Skipped).unwrap();
        let fields = skipped.fields();
        for name in ["decode_tok_s", "tpot_p50_ns", "rel_l2_p50", "probe_gb_s", "steal_pct", "started_utc"] {
            let place = COLUMNS.iter().position(|c| c.name == name).unwrap();
            assert_eq!(fields[place], "", "{name}");
        }
    }

    #[test]
    fn later_columns_are_ignored_and_missing_ones_named() {
        let records = testing::records();
        let text = csv::to_string(&records[..1]);
        let (header, row) = text.trim_end().split_once('\n').unwrap();
        assert_eq!(round_trip(&format!("{header},later\n{row},7\n")).unwrap(), records[..1]);
        // A file of before the last columns: they are empty.
        let old: Vec<&str> = header.split(',').take_while(|h| *h != "kl_nats_max").collect();
        let cut = |line: &str| line.rsplitn(COLUMNS.len() - old.len() + 1, ',').last().unwrap().to_owned();
        assert_eq!(cut(header), old.join(","));
        let read = round_trip(&format!("{}\n{}\n", cut(header), cut(row))).unwrap();
        assert_eq!((read[0].quality_steps, read[0].profile.as_str()), (None, records[0].profile.as_str()));
        assert_eq!((read[0].batch, read[0].batch_tokens()), (None, 1));
        assert_eq!((read[0].append_ns, read[0].attention_logit_error_max), (None, None));
        // All others are what they were.
        let first = old.len();
        assert_eq!(read[0].fields()[..first], records[0].fields()[..first]);
        let empty = |(place, field): (usize, &String)| place < first || field.is_empty();
        assert!(read[0].fields().iter().enumerate().all(empty));
        let error = round_trip(&text.replacen("threads", "thread", 1)).unwrap_err().to_string();
        assert!(error.contains("`threads` is missing"), "{error}");
        let error = round_trip(&text.replacen(",ok,", ",fine,", 1)).unwrap_err().to_string();
        assert!(
            error.contains("column `status`: `fine` is not a status") && error.contains("cells.csv:2"),
            "{error}"
        );
    }
}
