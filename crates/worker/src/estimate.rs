//! What a configuration will weigh and read.

use std::path::Path;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{CheckpointConfig, Error, HeadFormat, ModelConfig, footprint, preset};
use longbit_protocol::{Estimate, EstimateRequest, ModelSpec};

/// What the process takes beside its data: code, stacks, allocator.
const PROCESS_BYTES: u64 = 24 << 20;

/// Bytes of one configuration; impossible ones say why.
pub(crate) fn estimate(request: &EstimateRequest) -> Estimate {
    bytes(request).unwrap_or_else(|error| Estimate { error: Some(error.to_string()), ..Estimate::default() })
}

fn bytes(request: &EstimateRequest) -> Result<Estimate, Error> {
    let config = shape(&request.model)?;
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
    let supplied =
        4 * request.headroom as u64 * (config.layers * (config.q_rows() + 2 * config.kv_rows())) as u64;
    Ok(Estimate {
        weight_bytes: f.weights,
        cache_bytes: f.cache,
        index_bytes: f.index,
        scratch_bytes: f.scratch + supplied + PROCESS_BYTES,
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
    let path = Path::new(&model.path).join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
    Ok(CheckpointConfig::parse(&path, &text)?.model)
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
