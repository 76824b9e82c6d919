//! What a configuration will weigh and read.

use std::path::Path;
use std::sync::Arc;

use longbit::attention::{MethodShape, MethodSpec, Place, method};
use longbit::gguf::Header;
use longbit::kv::kv_dtype;
use longbit::matrix::{is_name, shape_of};
use longbit::workload::{MAX_STEPS, MIN_CONTEXT};
use longbit::{
    Checkpoint, Error, HeadFormat, ModelConfig, PROCESS_BYTES, RopeTable, Trace, WeightFormat, footprint,
    pass_bytes, preset,
};
use longbit_protocol::{Estimate, EstimateRequest, Fill, ModelSpec};
use longbit_sys::{FileMap, Team};

use crate::capabilities::{compaction, open_options};
use crate::matrix;
use crate::reads::Scope;
use crate::replay;
use crate::seeds;
use crate::text::REFERENCE_KV;

/// Times that each decoded step's queries, keys and values are held at once, at the most: by the generators, by the
/// steps.
const STEP_COPIES: u64 = 2;

/// Bytes of a span of tokens.
const SPAN_BYTES: u64 = std::mem::size_of::<std::ops::Range<usize>>() as u64;

/// Bytes of memory that a tokenizer takes for each byte of its file while it is read. Measured: 53 MiB for a `tokenizer.json`
/// of 3.8 MB without white space, with 128,000 tokens and 142,000 merges (14.5); 5.2 for the same file indented.
const TOKENIZER_FACTOR: u64 = 16;
/// Memory that tokenizing a piece of a text takes at the most: some 160 bytes for each of 256 KiB (`text/cut.rs` of the core).
const PIECE_BYTES: u64 = 160 * (256 << 10);

/// Bytes of one configuration; impossible ones say why.
pub(crate) fn estimate(request: &EstimateRequest) -> Estimate {
    bytes(request).unwrap_or_else(|error| Estimate { error: Some(error.to_string()), ..Estimate::default() })
}

fn bytes(request: &EstimateRequest) -> Result<Estimate, Error> {
    if is_name(&request.model.preset) {
        return matrix_bytes(request);
    }
    batch_limits(request)?;
    let trace = request.trace.as_ref().map(replay::mapped).transpose()?;
    let config = shape(&request.model, trace.as_ref())?;
    kv_dtype(&request.kv_dtype)?.check(config.head_dim)?;
    let headroom = match &trace {
        Some(trace) => replayed_steps(request, trace, &config)?,
        None => request.headroom,
    };
    let weights = WeightFormat {
        head: HeadFormat::parse(&request.model.head)?,
        compaction: compaction(&request.model)?,
    };
    let of = |kv: &str| {
        let method = method(&request.method)?;
        let (context, headroom) = (request.context, headroom.max(request.batch));
        method.check(&method_shape(&config, kv)?)?;
        Ok::<_, Error>(footprint(
            &config,
            weights,
            kv_dtype(kv)?,
            &method,
            context,
            headroom,
            request.threads,
        ))
    };
    let f = of(&request.kv_dtype)?;
    let mut estimate = Estimate {
        weight_bytes: f.weights,
        cache_bytes: f.cache,
        index_bytes: f.index,
        forked_bytes: f.forked,
        scratch_bytes: f.scratch.saturating_add(PROCESS_BYTES),
        weight_bytes_per_token: f.weights_per_token,
        kv_bytes_per_token: f.kv_per_token,
        decide_bytes_per_token: f.decide_per_token,
        fill_bytes: 0,
        prefill_macs: 0,
        pass_macs: 0,
        trained_positions: config.trained_positions,
        error: None,
    };
    if request.batch > 1 {
        // Each of its tokens attends to the context and to half of the batch.
        let tokens = request.batch as u64;
        let seen = (config.layers * config.q_rows()) as u64 * 2 * request.context as u64;
        estimate.pass_macs = prefill_macs(&config, tokens).saturating_add(seen.saturating_mul(tokens));
        estimate.scratch_bytes = estimate.scratch_bytes.saturating_add(pass_bytes(&config, request.batch));
    }
    let more = match request.fill {
        Fill::Synthetic | Fill::None | Fill::Trace => {
            // The file is mapped whole, and read twice: to know it again, and to fill the cache.
            let file = trace.as_ref().map_or(0, Trace::bytes);
            if trace.is_none() {
                limits(request)?;
            }
            estimate.fill_bytes = f.cache.saturating_add(file);
            // Each decoded step's queries, keys and values are made beforehand.
            let numbers = (config.layers * (config.q_rows() + 2 * config.kv_rows())) as u64;
            let steps = STEP_COPIES * 4 * headroom as u64 * numbers;
            // Exact logits of a head, one head a thread; the statistics of a trace are those of a step.
            let attended = u64::from(request.quality_steps).max(u64::from(trace.is_some()));
            let head = 4 * attended * config.group() as u64;
            let logits = head.saturating_mul((request.context * request.threads) as u64);
            let method = method(&request.method)?;
            // Exact weights that stay, and what each head decided in a step.
            let scope = Scope::new(&config, request.context, request.quality_steps as usize);
            let shape = method_shape(&config, &request.kv_dtype)?;
            let decided = match request.quality_steps {
                0 => 0,
                _ => SPAN_BYTES * (1 + config.group() as u64) * most_spans(&method, request.context, &shape),
            };
            // The state of another seed beside that of the cell.
            let other = if seeds::reseeded(&method, request.seeds).is_empty() { 0 } else { f.index };
            [file, logits, scope.bytes(), decided, other].into_iter().fold(steps, u64::saturating_add)
        }
        Fill::Prefill => {
            let apart = request.quality_steps > 0 && request.kv_dtype != REFERENCE_KV;
            let macs = prefill_macs(&config, request.context as u64);
            estimate.prefill_macs = if apart { macs.saturating_mul(2) } else { macs };
            // The cache of the reference and the cells' own follow each other.
            let reference = if apart { of(REFERENCE_KV)?.cache } else { 0 };
            let kept = 4 * u64::from(request.quality_steps) * config.vocab as u64;
            // A prompt with a pattern fills a cache of its own.
            let own = if method(&request.method)?.is_prefill_dense() { 0 } else { f.cache };
            [f.prefill, kept, own, tokenizing_bytes(request)]
                .into_iter()
                .fold(reference.saturating_sub(f.cache), u64::saturating_add)
        }
    };
    estimate.scratch_bytes = estimate.scratch_bytes.saturating_add(more);
    Ok(estimate)
}

fn method_shape(config: &ModelConfig, kv: &str) -> Result<MethodShape, Error> {
    Ok(MethodShape::new(config, kv_dtype(kv)?))
}

/// Spans that the decisions of a step have at the most, all heads together, of a KV head and of each of its query heads: no
/// more than rows that are read, or gaps between them.
fn most_spans(method: &MethodSpec, context: usize, shape: &MethodShape) -> u64 {
    let rows = method.predict(context, shape).rows.min(context);
    let spans = rows.min(context - rows + 1) as u64;
    spans.saturating_mul((shape.layers * shape.kv_heads) as u64)
}

/// One matrix and the activations of a batch.
fn matrix_bytes(request: &EstimateRequest) -> Result<Estimate, Error> {
    let shape = shape_of(&request.model.preset)?;
    if request.method != matrix::NOTHING || request.kv_dtype != matrix::NOTHING || request.context != 0 {
        return Err(Error::Invalid(format!(
            "{} is one matrix, which has no cache: it needs workload.name = {:?}",
            request.model.preset,
            matrix::NAME
        )));
    }
    let tokens = request.batch as u64;
    let numbers = (8 * shape.padded_cols() + 8 * shape.rows) as u64;
    let bytes = shape.bytes() as u64;
    Ok(Estimate {
        weight_bytes: bytes,
        scratch_bytes: numbers.saturating_mul(tokens).saturating_add(PROCESS_BYTES),
        weight_bytes_per_token: bytes,
        pass_macs: (shape.rows as u64 * shape.cols as u64).saturating_mul(tokens),
        ..Estimate::default()
    })
}

/// What a batch can be.
fn batch_limits(request: &EstimateRequest) -> Result<(), Error> {
    if request.method == matrix::NOTHING {
        return Err(Error::Invalid(format!(
            "the workload {:?} times one matrix; give model.preset = \"matrix:4096x4096\" or another workload",
            matrix::NAME
        )));
    }
    if request.batch > 1 && method(&request.method)?.method().name != "dense" {
        return Err(Error::Invalid(format!(
            "a batch of {} tokens is a prefill, which is dense but for the setting `prefill` of the method dense: the method {} \
             has no effect on it",
            request.batch, request.method
        )));
    }
    Ok(())
}

/// What a generator can make.
fn limits(request: &EstimateRequest) -> Result<(), Error> {
    if request.context < MIN_CONTEXT {
        // Nothing is generated then.
        return match request.quality_steps {
            0 => Ok(()),
            _ => Err(Error::Invalid(format!(
                "a context of {} is too short for generated inputs, which quality is measured on; at least {MIN_CONTEXT}, or \
                 measure.quality_steps = 0",
                request.context
            ))),
        };
    }
    if request.headroom > MAX_STEPS {
        return Err(Error::Invalid(format!(
            "{} decoded tokens a repetition are too many; warm-up and timed tokens together are at most {MAX_STEPS}",
            request.headroom
        )));
    }
    Ok(())
}

/// Multiply-adds of `tokens` tokens through the model: every linear layer once a token, causal attention twice (scores and
/// weighted sum) over half of the square. The head, which runs once a chunk, is left out.
fn prefill_macs(config: &ModelConfig, tokens: u64) -> u64 {
    let linear: u64 = config.linears().iter().map(|&(_, rows, cols)| rows as u64 * cols as u64).sum();
    let attention = (config.q_rows() as u64).saturating_mul(tokens);
    (config.layers as u64).saturating_mul(linear.saturating_add(attention)).saturating_mul(tokens)
}

/// The text, a piece of it on its way to tokens, and the tokenizer.
fn tokenizing_bytes(request: &EstimateRequest) -> u64 {
    let path = Path::new(&request.model.path);
    // What cannot be read here is refused when the tokenizer is read, with its reason.
    let described = if path.is_dir() {
        std::fs::metadata(path.join("tokenizer.json")).map_or(0, |m| m.len())
    } else {
        header_bytes(path).unwrap_or(0)
    };
    described.saturating_mul(TOKENIZER_FACTOR).saturating_add(PIECE_BYTES).saturating_add(request.text_bytes)
}

/// Bytes before the tensors of a GGUF file; most of them are its tokenizer.
fn header_bytes(path: &Path) -> Option<u64> {
    let map = path.is_file().then(|| FileMap::open(path).ok())??;
    Some(Header::parse(&map).ok()?.data_start.min(map.len() as u64))
}

/// Checks that `trace` can be replayed as asked; the decode steps of a repetition that are made beforehand.
fn replayed_steps(request: &EstimateRequest, trace: &Trace, config: &ModelConfig) -> Result<usize, Error> {
    trace.check_model(config)?;
    let method = method(&request.method)?;
    let mut wanted = 0;
    if method.evicts() {
        let rope = Arc::new(RopeTable::new(config.rope_theta, config.head_dim, 1, &Team::new(1, false)?)?);
        let shape = method_shape(config, &request.kv_dtype)?;
        let states = (0..config.layers)
            .map(|layer| method.make(&Place { shape, layer, kv_head: 0, rope: &rope }).prompt_queries());
        wanted = states.max().unwrap_or(0).min(request.context);
    }
    let steps = replay::check(trace, request.context, request.quality_steps as usize, wanted)?;
    Ok(request.headroom.clamp(1, steps))
}

/// The shape of `model`, without its weights; `trace` is the one that it is given.
pub(crate) fn shape(model: &ModelSpec, trace: Option<&Trace>) -> Result<ModelConfig, Error> {
    if model.path.is_empty() {
        return match (model.preset.as_str(), trace) {
            (replay::PRESET, Some(trace)) => trace.model_config(),
            (replay::PRESET, None) => Err(Error::Invalid(
                "the preset trace has the shape of a trace, and the workload replays none: give workload.name = \
                 \"file:PATH\", or another preset"
                    .into(),
            )),
            (name, _) => preset(name),
        };
    }
    Checkpoint::config_of(Path::new(&model.path), &open_options(model)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_configuration_says_why() {
        let request = EstimateRequest {
            model: ModelSpec {
                preset: "bitnet-9b".into(),
                head: "bf16".into(),
                seed: 1,
                ..ModelSpec::default()
            },
            context: 2048,
            headroom: 0,
            kv_dtype: "bf16".into(),
            method: "dense".into(),
            threads: 1,
            batch: 1,
            fill: Fill::Synthetic,
            quality_steps: 0,
            seeds: 1,
            text_bytes: 0,
            trace: None,
        };
        assert!(estimate(&request).error.unwrap().contains("bitnet-2b-4t"));
        let known = ModelSpec { preset: "bitnet-2b-4t".into(), ..request.model.clone() };
        let good = estimate(&EstimateRequest { model: known, ..request });
        assert_eq!((good.error, good.kv_bytes_per_token), (None, 76_800 * 2048));
    }

    #[test]
    fn batches_and_matrices_have_their_own_bytes_and_limits() {
        let step = EstimateRequest {
            model: ModelSpec { preset: "bitnet-2b-4t".into(), head: "bf16".into(), ..ModelSpec::default() },
            context: 0,
            headroom: 10,
            kv_dtype: "bf16".into(),
            method: "dense".into(),
            threads: 1,
            batch: 1,
            fill: Fill::Synthetic,
            quality_steps: 0,
            seeds: 1,
            text_bytes: 0,
            trace: None,
        };
        let batch = EstimateRequest { batch: 512, ..step.clone() };
        let (one, many) = (estimate(&step), estimate(&batch));
        assert_eq!((one.error, many.error, one.pass_macs), (None, None, 0));
        assert_eq!(many.pass_macs, 512 * 30 * (69_468_160 + 2560 * 512));
        assert_eq!((one.cache_bytes, many.cache_bytes), (76_800 * 256, 76_800 * 512));
        // Logits of every token are the largest part.
        assert!(many.scratch_bytes - one.scratch_bytes > 4 * 512 * 128_256);
        let error = |request: EstimateRequest| estimate(&request).error.unwrap_or_default();
        let batch_of = batch.clone();
        let window = EstimateRequest { method: "window".into(), ..batch };
        assert!(error(window).contains("the method window has no effect"));
        let pattern = EstimateRequest { method: "dense:prefill=blocks".into(), ..batch_of.clone() };
        assert_eq!(estimate(&pattern).error, None);
        let short = EstimateRequest { quality_steps: 4, ..step.clone() };
        assert!(error(short).contains("at least 16, or measure.quality_steps = 0"));

        let model = ModelSpec { preset: "matrix:4096x4096".into(), ..step.model.clone() };
        let nothing = EstimateRequest { model, kv_dtype: "-".into(), method: "-".into(), batch: 64, ..step };
        let found = estimate(&nothing);
        assert_eq!((found.error, found.weight_bytes, found.cache_bytes), (None, 4 << 20, 0));
        assert_eq!(found.pass_macs, 64 << 24);
        let cached = EstimateRequest { kv_dtype: "bf16".into(), ..nothing.clone() };
        assert!(error(cached).contains("workload.name = \"matrix\""));
        let model = ModelSpec { preset: "tiny".into(), ..nothing.model.clone() };
        assert!(error(EstimateRequest { model, ..nothing }).contains("matrix:4096x4096"));
    }

    #[test]
    fn comparing_keeps_exact_weights_within_their_room() {
        let timed = EstimateRequest {
            model: ModelSpec { preset: "bitnet-2b-4t".into(), head: "bf16".into(), ..ModelSpec::default() },
            context: 98_304,
            headroom: 64,
            kv_dtype: "bf16".into(),
            method: "window".into(),
            threads: 2,
            batch: 1,
            fill: Fill::Synthetic,
            quality_steps: 0,
            seeds: 1,
            text_bytes: 0,
            trace: None,
        };
        let compared = EstimateRequest { quality_steps: 4, ..timed.clone() };
        let more = estimate(&compared).scratch_bytes - estimate(&timed).scratch_bytes;
        // Logits of a head for each of two threads, 260 MB of weights, and 1028 spans for each of 150 KV heads and 600 query heads.
        let logits = 2 * 4 * 4 * 4 * 98_304;
        let spans = 750 * 1028 * 16;
        assert!(more > logits + spans + (200 << 20) && more <= logits + spans + (256 << 20), "{more}");
        // Another seed of a method that draws nothing is the same method.
        let seeds = EstimateRequest { seeds: 5, ..compared.clone() };
        assert_eq!(estimate(&seeds), estimate(&compared));
    }

    #[test]
    fn a_prompt_costs_its_multiplications_and_the_reference_its_own() {
        let request = EstimateRequest {
            model: ModelSpec { preset: "bitnet-2b-4t".into(), head: "bf16".into(), ..ModelSpec::default() },
            context: 8192,
            headroom: 64,
            kv_dtype: "bf16".into(),
            method: "dense".into(),
            threads: 1,
            batch: 1,
            fill: Fill::Prefill,
            quality_steps: 8,
            seeds: 1,
            text_bytes: 0,
            trace: None,
        };
        let same = estimate(&request);
        // 30 layers of 69,468,160 weights, and 2560 numbers a query with each of 8192 keys and values, half of them seen.
        assert_eq!(same.prefill_macs, 8192 * 30 * (69_468_160 + 2560 * 8192));
        assert_eq!(same.fill_bytes, 0);
        let f32 = estimate(&EstimateRequest { kv_dtype: "f32".into(), ..request.clone() });
        assert_eq!(f32.prefill_macs, 2 * same.prefill_macs);
        // The bf16 cache of the reference is gone before the larger one is made.
        assert_eq!(f32.scratch_bytes, same.scratch_bytes);
        let untold =
            estimate(&EstimateRequest { quality_steps: 0, kv_dtype: "f32".into(), ..request.clone() });
        assert_eq!(untold.prefill_macs, same.prefill_macs);
        assert_eq!(same.scratch_bytes - untold.scratch_bytes, 8 * 4 * 128_256);
        // What no generator makes, a text may ask for.
        let long = EstimateRequest { headroom: 5000, ..request };
        assert_eq!(estimate(&long).error, None);
        assert!(estimate(&EstimateRequest { fill: Fill::Synthetic, ..long }).error.is_some());
    }

    #[test]
    fn a_text_costs_its_bytes_and_those_of_the_tokenizer() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
        let model = fixtures.join("hf_bitnet/offline");
        let request = EstimateRequest {
            model: ModelSpec {
                path: model.to_str().unwrap().into(),
                head: "bf16".into(),
                ..ModelSpec::default()
            },
            context: 64,
            headroom: 8,
            kv_dtype: "bf16".into(),
            method: "dense".into(),
            threads: 1,
            batch: 1,
            fill: Fill::Prefill,
            quality_steps: 0,
            seeds: 1,
            text_bytes: 0,
            trace: None,
        };
        let bare = estimate(&request);
        assert_eq!((bare.error.as_ref(), bare.trained_positions), (None, 256));
        let read = estimate(&EstimateRequest { text_bytes: 1 << 20, ..request.clone() });
        assert_eq!(read.scratch_bytes - bare.scratch_bytes, 1 << 20);
        let file = std::fs::metadata(model.join("tokenizer.json")).unwrap().len();
        assert_eq!(tokenizing_bytes(&request), file * TOKENIZER_FACTOR + PIECE_BYTES);
        // A GGUF file holds its tokenizer before its tensors.
        let gguf = fixtures.join("gguf/from_gguf_py.gguf");
        let whole = std::fs::metadata(&gguf).unwrap().len();
        let header = header_bytes(&gguf).unwrap();
        assert!(header > 0 && header < whole, "{header} of {whole}");
        assert_eq!(header_bytes(Path::new("no/such.gguf")), None);
    }
}
