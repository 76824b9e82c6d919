//! `longbit estimate`: what a model with a cache weighs, what a decode step reads, and the longest context that fits.

use std::io::Write;

use clap::Args;
use longbit::attention::{MethodShape, MethodSpec, method};
use longbit::kv::{CacheShape, KvDtype, kv_dtype};
use longbit::{
    Checkpoint, ModelConfig, PROCESS_BYTES, PlainShape, WeightFormat, footprint, largest_context, preset,
};
use longbit_lab::estimate::{Estimate, Row};
use longbit_lab::spec::units;
use longbit_lab::{Exit, emit};
use longbit_sys::{ReadProbe, Team, available_threads, open_memory};

use crate::Failure;
use crate::args::{Format, kv_names};
use crate::model_args::ModelArgs;

/// What names a preset in place of a checkpoint.
const PRESET: &str = "preset:";
/// What names a shape in place of a checkpoint.
const SHAPE: &str = "shape:";
/// Buffer of the read probe: larger than any cache, and read in a moment.
const PROBE_BYTES: usize = 512 << 20;

/// Arguments of `longbit estimate`.
#[derive(Args)]
pub(crate) struct EstimateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Contexts in tokens; `32k` is 32,768.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = tokens, default_value = "2k,8k,32k,96k")]
    pub(crate) context: Vec<usize>,
    /// KV dtypes; may be given several times.
    #[arg(long, value_name = "DTYPES", default_value = "bf16")]
    pub(crate) kv: Vec<String>,
    /// Attention method of decode steps.
    #[arg(long, value_name = "METHOD", default_value = "dense")]
    pub(crate) method: String,
    /// Read bandwidth to reckon with, e.g. 33GB/s [default: measured here].
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bandwidth: Option<f64>,
    /// Memory that all must fit into, e.g. 24GiB, or a share of what is free, e.g. 90% [default: what is free].
    #[arg(long, value_name = "SIZE", value_parser = units::memory_limit)]
    pub(crate) memory: Option<units::MemoryLimit>,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

/// Tokens: a whole number, or one of 1,024s with a `k` behind it.
fn tokens(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.trim().strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text.trim(), 1),
    };
    let number: Option<usize> = digits.parse().ok();
    let tokens = number.and_then(|n| n.checked_mul(unit)).filter(|n| (1..=1 << 40).contains(n));
    tokens.ok_or_else(|| format!("{text:?} is not a number of tokens; write e.g. 2048 or 2k"))
}

/// 10^9 bytes a second of e.g. `33GB/s`.
fn rate(text: &str) -> Result<f64, String> {
    let size = text.trim().strip_suffix("/s").and_then(|size| units::size(size).ok()).filter(|&b| b > 0);
    size.map(|bytes| bytes as f64 / 1e9)
        .ok_or_else(|| format!("{text:?} is not a bandwidth; write e.g. 33GB/s"))
}

/// A model as far as it is known.
struct Known {
    config: ModelConfig,
    /// None where the shape does not tell the weights.
    weights: Option<WeightFormat>,
    method: MethodSpec,
    threads: usize,
}

impl Known {
    /// The cache alone, or all of a process, that has `context` tokens in a cache of `kv`.
    fn row(&self, kv: KvDtype, context: usize) -> Row {
        let shape = CacheShape::new(&self.config, context);
        let predicted = self.method.predict(context, &MethodShape::new(&self.config, kv));
        let numbers = 2.0 * (self.config.layers * self.config.kv_rows()) as f64;
        let mut row = Row {
            context_tokens: context as u64,
            kv_dtype: kv.to_string(),
            cache_bytes: shape.mapped_bytes(kv),
            kv_bytes_read_per_token: shape.read_bytes(kv, predicted.rows),
            ..Row::default()
        };
        // Long enough that rows which are kept exactly do not count.
        const LONG: usize = 1 << 30;
        row.cache_bytes_per_token = shape.stored_bytes(kv, LONG) as f64 / LONG as f64;
        row.bits_per_value = 8.0 * row.cache_bytes_per_token / numbers;
        row.total_bytes = row.cache_bytes;
        if let Some(weights) = self.weights {
            let f = footprint(&self.config, weights, kv, &self.method, context, 0, self.threads);
            row.cache_bytes = f.cache;
            row.index_bytes = f.index;
            row.scratch_bytes = Some(f.scratch.saturating_add(f.prefill).saturating_add(PROCESS_BYTES));
            row.total_bytes = f.resident().saturating_add(f.prefill).saturating_add(PROCESS_BYTES);
            row.kv_bytes_read_per_token = f.kv_per_token;
        }
        row
    }
}

pub(crate) fn run(args: &EstimateArgs, color: bool, out: &mut dyn Write) -> Result<Exit, Failure> {
    let threads = args.model.threads.unwrap_or_else(available_threads).max(1);
    let (config, weights) = model(&args.model)?;
    let known = Known { config, weights, method: method(&args.method)?, threads };
    let mut dtypes = Vec::new();
    for name in kv_names(&args.kv) {
        let dtype = kv_dtype(&name)?;
        dtype.check(known.config.head_dim)?;
        if !dtypes.contains(&dtype) {
            dtypes.push(dtype);
        }
    }
    let free = open_memory().usable();
    let memory = match args.memory {
        Some(limit) => Some(limit.resolve(free.unwrap_or(0))).filter(|&bytes| bytes > 0),
        None => free,
    };
    let weight_bytes = weights.map(|w| footprint(&known.config, w, dtypes[0], &known.method, 1, 0, threads));
    let mut estimate = Estimate {
        model: args.model.model.display().to_string(),
        head: args.model.head.clone(),
        weights: args.model.weights.clone(),
        method: known.method.canonical(),
        threads,
        bandwidth_gb_s: args.bandwidth,
        bandwidth_measured: false,
        memory_bytes: memory,
        weight_bytes: weight_bytes.map(|f| f.weights),
        weight_bytes_per_token: weight_bytes.map(|f| f.weights_per_token),
        rows: Vec::new(),
    };
    for &kv in &dtypes {
        let longest = memory.and_then(|m| largest_context(m, |context| known.row(kv, context).total_bytes));
        for &context in &args.context {
            let row = known.row(kv, context);
            let fits = memory.map(|memory| row.total_bytes <= memory);
            estimate.rows.push(Row { fits, largest_context_tokens: longest.map(|n| n as u64), ..row });
        }
    }
    estimate.rows.sort_by_key(|row| row.context_tokens);
    if args.bandwidth.is_none() {
        let team = Team::with_threads(threads, true).map_err(longbit::Error::from)?;
        let probe = ReadProbe::new(PROBE_BYTES).map_err(longbit::Error::from)?;
        estimate.bandwidth_gb_s = Some(probe.measure(&team));
        estimate.bandwidth_measured = true;
    }
    match args.format.into() {
        emit::Format::Table => write!(out, "{}", estimate.text(color))?,
        emit::Format::Markdown => write!(out, "{}", estimate.rows().markdown())?,
        emit::Format::Csv => write!(out, "{}", estimate.csv())?,
        emit::Format::Json => write!(out, "{}", estimate.json()?)?,
    }
    Ok(Exit::Ok)
}

/// The shape of a preset, of a file or as it is written down, and what its weights are made of where that can be told.
fn model(args: &ModelArgs) -> Result<(ModelConfig, Option<WeightFormat>), Failure> {
    let weights = args.weights()?;
    let text = args.model.to_str().unwrap_or_default();
    if let Some(shape) = text.strip_prefix(SHAPE) {
        args.file.refuse_for("a shape")?;
        let plain = PlainShape::parse(shape)?;
        return Ok((plain.config, plain.weights.then_some(weights)));
    }
    if let Some(name) = text.strip_prefix(PRESET) {
        args.file.refuse_for("a preset")?;
        return Ok((preset(name)?, Some(weights)));
    }
    let options = args.file.options(&args.model)?;
    Ok((Checkpoint::config_of(&args.model, &options)?, Some(weights)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_rates_have_units() {
        assert_eq!(["2048", "2k", " 96K"].map(tokens), [Ok(2048), Ok(2048), Ok(98_304)]);
        for bad in ["", "k", "0", "-1", "2m", "1.5k", "99999999999999999999"] {
            assert!(tokens(bad).is_err(), "{bad}");
        }
        assert_eq!(rate("33GB/s"), Ok(33.0));
        assert_eq!(rate("1 GiB/s"), Ok(1.073741824));
        for bad in ["33", "33GB", "0GB/s", "GB/s", "fast"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }
}
