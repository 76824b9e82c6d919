//! Published model shapes with seeded synthetic weights: true bytes and arithmetic without a download.

use super::config::{Activation, ModelConfig};
use crate::error::{Error, Result};

/// A named shape.
pub struct Preset {
    /// Name used in experiment files.
    pub name: &'static str,
    /// One line: what it is and where the shape is published.
    pub summary: &'static str,
    make: fn() -> ModelConfig,
}

/// Every preset; the only place where these shapes are written down.
pub static PRESETS: &[Preset] = &[
    Preset {
        name: "bitnet-2b-4t",
        summary: "microsoft/bitnet-b1.58-2B-4T: relu2, sub-norms, tied head, 4 query heads a KV head",
        make: || ModelConfig {
            name: "bitnet-2b-4t".into(),
            vocab: 128_256,
            hidden: 2560,
            intermediate: 6912,
            layers: 30,
            heads: 20,
            kv_heads: 5,
            head_dim: 128,
            rope_theta: 500_000.0,
            rms_eps: 1e-5,
            activation: Activation::Relu2,
            sub_norms: true,
            tied_head: true,
            trained_positions: 4096,
        },
    },
    Preset {
        name: "notebook-2b",
        summary: "the 2B shape of the founding notebook: 2048/5632, 24 layers, 16 heads without grouping",
        make: || ModelConfig {
            name: "notebook-2b".into(),
            vocab: 128_256,
            hidden: 2048,
            intermediate: 5632,
            layers: 24,
            heads: 16,
            kv_heads: 16,
            head_dim: 128,
            rope_theta: 500_000.0,
            rms_eps: 1e-5,
            activation: Activation::Relu2,
            sub_norms: true,
            tied_head: true,
            trained_positions: 4096,
        },
    },
    Preset {
        name: "falcon3-7b-like",
        summary: "the notebook's name for the matrices of llama-7b with a vocabulary of 131,072, four times its head; the \
                  published Falcon3 7B has another shape",
        make: || ModelConfig {
            name: "falcon3-7b-like".into(),
            vocab: 131_072,
            hidden: 4096,
            intermediate: 11_008,
            layers: 32,
            heads: 32,
            kv_heads: 32,
            head_dim: 128,
            rope_theta: 1_000_042.0,
            rms_eps: 1e-6,
            activation: Activation::Silu,
            sub_norms: false,
            tied_head: false,
            trained_positions: 32_768,
        },
    },
    Preset {
        name: "llama-7b",
        summary: "LLaMA 7B, the shape of the founding notebook's throughput table: 4096/11008, 32 layers, 32 heads without \
                  grouping, silu, untied head of 32,000",
        make: || ModelConfig {
            name: "llama-7b".into(),
            vocab: 32_000,
            hidden: 4096,
            intermediate: 11_008,
            layers: 32,
            heads: 32,
            kv_heads: 32,
            head_dim: 128,
            rope_theta: 10_000.0,
            rms_eps: 1e-6,
            activation: Activation::Silu,
            sub_norms: false,
            tied_head: false,
            trained_positions: 2048,
        },
    },
    Preset {
        name: "tiny",
        summary: "4 layers, 256 wide, heads of 64: seconds on any machine; for tests and first tries",
        make: || ModelConfig {
            name: "tiny".into(),
            vocab: 512,
            hidden: 256,
            intermediate: 512,
            layers: 4,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            rope_theta: 500_000.0,
            rms_eps: 1e-5,
            activation: Activation::Relu2,
            sub_norms: true,
            tied_head: true,
            trained_positions: 256,
        },
    },
];

impl Preset {
    /// The shape.
    pub fn config(&self) -> ModelConfig {
        (self.make)()
    }
}

/// The shape of the preset called `name`.
///
/// # Errors
/// [`Error::Unknown`] with the names that exist.
pub fn preset(name: &str) -> Result<ModelConfig> {
    PRESETS
        .iter()
        .find(|p| p.name == name)
        .map(Preset::config)
        .ok_or_else(|| Error::unknown("preset", name, PRESETS.iter().map(|p| p.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_a_valid_shape_under_its_own_name() {
        for p in PRESETS {
            let config = p.config();
            assert_eq!(config.name, p.name);
            config.check().unwrap();
        }
    }

    #[test]
    fn the_two_7b_shapes_differ_in_vocabulary_and_positions_alone() {
        let (llama, falcon) = (preset("llama-7b").unwrap(), preset("falcon3-7b-like").unwrap());
        assert_eq!((llama.vocab, falcon.vocab), (32_000, 131_072));
        let ModelConfig { name, vocab, rope_theta, trained_positions, .. } = llama.clone();
        assert_eq!(ModelConfig { name, vocab, rope_theta, trained_positions, ..falcon }, llama);
    }

    #[test]
    fn the_2b_preset_has_the_published_parameter_count() {
        assert_eq!(preset("bitnet-2b-4t").unwrap().parameters(), 2_412_820_480);
    }
}
