//! What a configuration will weigh and read.

use std::path::Path;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::workload::{MAX_STEPS, MIN_CONTEXT};
use longbit::{Checkpoint, Error, HeadFormat, ModelConfig, OpenOptions, footprint, preset};
use longbit_protocol::{Estimate, EstimateRequest, ModelSpec};

/// What the process takes beside its data: code, stacks, allocator.
const PROCESS_BYTES: u64 = 64 << 20;
/// Times that each decoded step's queries, keys and values are held at once, at the most: by the generators, by the
/// steps, and on the way from the one to the other.
const STEP_COPIES: u64 = 3;

/// Bytes of one configuration; impossible ones say why.
pub(crate) fn estimate(request: &EstimateRequest) -> Estimate {
    bytes(request).unwrap_or_else(|error| Estimate { error: Some(error.to_string()), ..Estimate::default() })
}

fn bytes(request: &EstimateRequest) -> Result<Estimate, Error> {
    let config = shape(&request.model)?;
    if request.context < MIN_CONTEXT {
        return Err(Error::Invalid(format!(
            "a context of {} is too short; at least {MIN_CONTEXT}",
            request.context
        )));
    }
    if request.headroom > MAX_STEPS {
        return Err(Error::Invalid(format!(
            "{} decoded tokens a repetition are too many; warm-up and timed tokens together are at most {MAX_STEPS}",
            request.headroom
        )));
    }
    let f = footprint(
        &config,
        HeadFormat::parse(&request.model.head)?,
        kv_dtype(&request.kv_dtype)?,
        &method(&request.method)?,
        request.context,
        request.headroom,
        request.threads,
    );
    // Each decoded step's queries, keys and values are made beforehand.
    let supplied = STEP_COPIES
        * 4
        * request.headroom as u64
        * (config.layers * (config.q_rows() + 2 * config.kv_rows())) as u64;
    Ok(Estimate {
        weight_bytes: f.weights,
        cache_bytes: f.cache,
        index_bytes: f.index,
        scratch_bytes: f.scratch.saturating_add(supplied + PROCESS_BYTES),
        weight_bytes_per_token: f.weights_per_token,
        kv_bytes_per_token: f.kv_per_token,
        fill_bytes: f.cache,
        error: None,
    })
}

/// The shape of `model`, without its weights.
pub(crate) fn shape(model: &ModelSpec) -> Result<ModelConfig, Error> {
    if model.path.is_empty() {
        return preset(&model.preset);
    }
    Checkpoint::config_of(Path::new(&model.path), &OpenOptions::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_configuration_says_why() {
        let request = EstimateRequest {
            model: ModelSpec {
                preset: "bitnet-9b".into(),
                path: String::new(),
                head: "bf16".into(),
                seed: 1,
            },
            context: 2048,
            headroom: 0,
            kv_dtype: "bf16".into(),
            method: "dense".into(),
            threads: 1,
        };
        assert!(estimate(&request).error.unwrap().contains("bitnet-2b-4t"));
        let known = ModelSpec { preset: "bitnet-2b-4t".into(), ..request.model.clone() };
        let good = estimate(&EstimateRequest { model: known, ..request });
        assert_eq!((good.error, good.kv_bytes_per_token), (None, 76_800 * 2048));
    }
}
