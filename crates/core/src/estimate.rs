//! What a configuration will weigh and read, from shapes alone.

use crate::attention::MethodSpec;
use crate::kv::{CacheShape, KvDtype, PAGE_TOKENS};
use crate::model::{Compaction, HeadFormat, ModelBytes, ModelConfig, Packing};

/// Bytes of a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Weights, embedding, head.
    pub weights: u64,
    /// The KV cache with `context + headroom` tokens in it.
    pub cache: u64,
    /// State of the method.
    pub index: u64,
    /// Rotary table and the buffers of a decode step.
    pub scratch: u64,
    /// Weights read by a decode step.
    pub weights_per_token: u64,
    /// Cache and index read by a decode step at `context`.
    pub kv_per_token: u64,
}

/// What the weights of a model are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightFormat {
    /// Number format of the head.
    pub head: HeadFormat,
    /// How the ternary matrices are repacked after loading.
    pub compaction: Compaction,
}

impl From<HeadFormat> for WeightFormat {
    fn from(head: HeadFormat) -> Self {
        WeightFormat { head, compaction: Compaction::default() }
    }
}

/// Predicts the bytes of a session of `context + headroom` tokens.
pub fn footprint(
    config: &ModelConfig,
    weights: impl Into<WeightFormat>,
    kv: KvDtype,
    method: &MethodSpec,
    context: usize,
    headroom: usize,
    threads: usize,
) -> Footprint {
    let WeightFormat { head, compaction } = weights.into();
    let model = ModelBytes::compacted(config, head, compaction);
    // Matrices of another packing are in memory twice while they are made.
    let loaded = if compaction.packing == Packing::TwoBits {
        0
    } else {
        ModelBytes::ternary(config, Packing::TwoBits)
    };
    let capacity = context.saturating_add(headroom).div_ceil(PAGE_TOKENS).saturating_mul(PAGE_TOKENS);
    let shape = CacheShape::new(config, capacity);
    let rope = (capacity as u64).saturating_mul(config.head_dim as u64 * 4);
    // Partials of decode tasks, logits, and rows private to each thread.
    let partials = (capacity as u64 / 256).saturating_mul((config.heads * (config.head_dim + 2) * 4) as u64);
    let rows = (threads * (4 * config.intermediate + 8 * config.hidden) * 4) as u64 + 8 * config.vocab as u64;
    let read = method.predicted_reads(context);
    Footprint {
        weights: model.resident.saturating_add(loaded),
        cache: shape.stored_bytes(kv, capacity),
        index: 0,
        scratch: rope.saturating_add(partials).saturating_add(rows),
        weights_per_token: model.per_token,
        kv_per_token: shape.read_bytes(kv, read),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::method;
    use crate::kv::kv_dtype;
    use crate::model::preset;

    #[test]
    fn the_2b_model_at_96k_matches_the_arithmetic_of_its_shape() {
        let config = preset("bitnet-2b-4t").unwrap();
        let bf16 = kv_dtype("bf16").unwrap();
        let dense = method("dense").unwrap();
        let f = footprint(&config, HeadFormat::Bf16, bf16, &dense, 98_304, 0, 2);
        // 30 layers x 5 heads x 128 numbers x K and V x 2 bytes = 76,800 bytes a token.
        assert_eq!(f.cache, 76_800 * 98_304);
        assert_eq!(f.kv_per_token, 76_800 * 98_304);
        // 2.084 G ternary weights at 2 bits and a 657 MB head.
        let ternary = 30 * 69_468_160u64 / 4;
        let norms = 4 * (30 * (2 * 2560 + 2560 + 6912) + 2560);
        assert_eq!(f.weights_per_token, ternary + norms + 2 * 128_256 * 2560 + 2 * 2560);
        let window = method("window:sinks=4,window=1020").unwrap();
        let f = footprint(&config, HeadFormat::Bf16, bf16, &window, 98_304, 0, 2);
        assert_eq!(f.kv_per_token, 76_800 * 1024);
    }
}
