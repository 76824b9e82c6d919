//! A Hugging Face `config.json`: the shape, and which conventions the weights follow.

use serde::Deserialize;
use std::path::Path;

use crate::error::{Error, Result};
use crate::model::{Activation, ModelConfig};

/// Which way `weight_scale` works: the two published layouts use the same name for opposite things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleUse {
    /// `autobitlinear`: the output is multiplied by it (it is mean |W|).
    Multiply,
    /// `bitlinear`: the output is divided by it (it is 1 / mean |W|).
    Divide,
}

/// A checkpoint's configuration: the shape, and how its packed weights are to be read.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CheckpointConfig {
    /// The shape.
    pub(super) model: ModelConfig,
    /// Meaning of `weight_scale`.
    pub(super) scale_use: ScaleUse,
}

#[derive(Deserialize)]
struct RawConfig {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<RawRope>,
    rope_scaling: Option<serde_json::Value>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<RawQuantization>,
}

#[derive(Deserialize)]
struct RawRope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    quantization_mode: Option<String>,
    use_rms_norm: Option<bool>,
}

impl CheckpointConfig {
    /// Reads the text of a Hugging Face `config.json`; `path` is only for messages and the model's name.
    ///
    /// # Errors
    /// [`Error::Config`] with the key and what would be accepted.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self> {
        let fail = |reason: String| Error::Config { path: path.to_path_buf(), reason };
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|e| fail(format!("not a model configuration: {e}")))?;
        let arch = raw.architectures.as_deref().and_then(|a| a.first()).map(String::as_str).unwrap_or("");
        if arch != "BitNetForCausalLM" {
            return Err(fail(format!(
                "architecture `{arch}` (model_type `{}`) is not supported; this loader reads BitNetForCausalLM in the \
                 packed U8 layout of bitnet-b1.58-2B-4T",
                raw.model_type.as_deref().unwrap_or("")
            )));
        }
        let q = raw.quantization_config.ok_or_else(|| {
            fail("quantization_config is missing; this loader reads checkpoints with packed U8 ternary weights".into())
        })?;
        if q.quant_method.as_deref() != Some("bitnet") {
            return Err(fail(format!("quant_method is {:?}; it must be \"bitnet\"", q.quant_method)));
        }
        if q.use_rms_norm == Some(true) {
            return Err(fail("use_rms_norm inside BitLinear is not supported".into()));
        }
        let scale_use = match (q.linear_class.as_deref(), q.quantization_mode.as_deref()) {
            (Some("autobitlinear"), Some("offline")) => ScaleUse::Multiply,
            (Some("autobitlinear"), mode) => {
                return Err(fail(format!(
                    "quantization_mode is {mode:?}: these are unpacked master weights; use the packed (\"offline\") \
                     checkpoint"
                )));
            }
            (None | Some("bitlinear"), None | Some("offline")) => ScaleUse::Divide,
            (class, mode) => {
                return Err(fail(format!(
                    "linear_class {class:?} with quantization_mode {mode:?} is not supported"
                )));
            }
        };
        let activation = match raw.hidden_act.as_deref() {
            Some("relu2") => Activation::Relu2,
            Some("silu") => Activation::Silu,
            other => {
                return Err(fail(format!("hidden_act is {other:?}; supported are \"relu2\" and \"silu\"")));
            }
        };
        if raw.attention_bias == Some(true) {
            return Err(fail("attention_bias is true; projections with a bias are not supported".into()));
        }
        if let Some(factor) = raw.partial_rotary_factor.filter(|f| *f != 1.0) {
            return Err(fail(format!(
                "partial_rotary_factor is {factor}; only the full rotary embedding is supported"
            )));
        }
        if let Some(scaling) = raw.rope_scaling.as_ref().filter(|s| !s.is_null()) {
            return Err(fail(format!(
                "rope_scaling {scaling} is not supported; only the plain rotary embedding is"
            )));
        }
        if let Some(kind) = raw.rope_parameters.as_ref().and_then(|r| r.rope_type.as_deref())
            && kind != "default"
        {
            return Err(fail(format!("rope_type `{kind}` is not supported; only `default` is")));
        }
        let theta = raw.rope_parameters.and_then(|r| r.rope_theta).or(raw.rope_theta);
        let rope_theta = theta.ok_or_else(|| fail("rope_theta is missing".into()))?;
        let head_dim = match raw.head_dim {
            Some(d) => d,
            None if raw.num_attention_heads > 0
                && raw.hidden_size.is_multiple_of(raw.num_attention_heads) =>
            {
                raw.hidden_size / raw.num_attention_heads
            }
            None => {
                return Err(fail(format!(
                    "hidden_size ({}) is not a multiple of num_attention_heads ({}) and head_dim is not given",
                    raw.hidden_size, raw.num_attention_heads
                )));
            }
        };
        let model = ModelConfig {
            name: path.display().to_string(),
            vocab: raw.vocab_size,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim,
            rope_theta,
            rms_eps: raw.rms_norm_eps.ok_or_else(|| fail("rms_norm_eps is missing".into()))? as f32,
            activation,
            sub_norms: true,
            tied_head: raw.tie_word_embeddings.unwrap_or(false),
            trained_positions: raw.max_position_embeddings.unwrap_or(0),
        };
        model.check().map_err(fail)?;
        Ok(CheckpointConfig { model, scale_use })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKED: &str = r#"{"architectures":["BitNetForCausalLM"],"model_type":"bitnet","vocab_size":512,
        "hidden_size":256,"intermediate_size":512,"num_hidden_layers":4,"num_attention_heads":4,
        "num_key_value_heads":2,"hidden_act":"relu2","rms_norm_eps":1e-05,"rope_theta":500000.0,
        "tie_word_embeddings":true,"quantization_config":{"quant_method":"bitnet",
        "linear_class":"autobitlinear","quantization_mode":"offline"}}"#;

    fn parse(text: &str) -> Result<CheckpointConfig> {
        CheckpointConfig::parse(Path::new("config.json"), text)
    }

    #[test]
    fn reads_the_packed_layout() {
        let config = parse(PACKED).unwrap();
        assert_eq!(config.scale_use, ScaleUse::Multiply);
        assert_eq!(config.model.head_dim, 64);
        assert_eq!(config.model.group(), 2);
        assert!(config.model.tied_head);
    }

    #[test]
    fn bitlinear_divides() {
        let text = PACKED.replace(
            r#""linear_class":"autobitlinear","quantization_mode":"offline""#,
            r#""modules_to_not_convert":null"#,
        );
        assert_eq!(parse(&text).unwrap().scale_use, ScaleUse::Divide);
    }

    #[test]
    fn refusals_name_the_key() {
        for (from, to, names) in [
            ("BitNetForCausalLM", "LlamaForCausalLM", "architecture"),
            ("\"offline\"", "\"online\"", "quantization_mode"),
            ("relu2", "gelu", "hidden_act"),
            ("\"num_key_value_heads\":2", "\"num_key_value_heads\":3", "num_key_value_heads"),
            ("500000.0", "-1.0", "rope_theta"),
            ("\"vocab_size\":512", "\"vocab_size\":0", "vocab_size"),
            ("\"hidden_size\":256", "\"hidden_size\":1e99", "not a model configuration"),
            ("\"num_attention_heads\":4", "\"num_attention_heads\":0", "num_attention_heads"),
            ("\"rms_norm_eps\":1e-05", "\"rms_norm_eps\":0", "rms_norm_eps"),
            (
                "\"tie_word_embeddings\"",
                "\"rope_scaling\":{\"type\":\"yarn\"},\"tie_word_embeddings\"",
                "rope_scaling",
            ),
            ("\"vocab_size\"", "\"attention_bias\":true,\"vocab_size\"", "attention_bias"),
            ("\"vocab_size\"", "\"partial_rotary_factor\":0.5,\"vocab_size\"", "partial_rotary_factor"),
        ] {
            let message = parse(&PACKED.replace(from, to)).unwrap_err().to_string();
            assert!(message.contains(names), "{to}: {message}");
        }
    }
}
