//! A Hugging Face `config.json`: the shape, the family, and how the ternary weights are stored. All of it is decided by
//! what the file says; what it does not say, or says in two ways, is refused.

use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

use super::super::OpenOptions;
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

/// How the linear layers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// U8, four rows a byte, with a `weight_scale`.
    Packed(ScaleUse),
    /// The floats that training went on with, made ternary by absmean at load; no `weight_scale`.
    Masters,
}

/// Architectures, which differ in their norms inside a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// `BitNetForCausalLM`: microsoft/bitnet-b1.58-2B-4T.
    BitNet,
    /// `BitnetForCausalLM`, with a small n: 1bitLLM's reproduction of the paper.
    OneBitLlm,
    /// `LlamaForCausalLM` whose linear layers are ternary: Falcon3-1.58bit, HF1BitLLM.
    Llama,
}

impl Family {
    /// Names of the norms before the output projection and before the down projection.
    pub(super) fn sub_norms(self) -> Option<[&'static str; 2]> {
        match self {
            Family::BitNet => Some(["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"]),
            Family::OneBitLlm => Some(["self_attn.inner_attn_ln", "mlp.ffn_layernorm"]),
            Family::Llama => None,
        }
    }

    fn architecture(self) -> &'static str {
        match self {
            Family::BitNet => "BitNetForCausalLM",
            Family::OneBitLlm => "BitnetForCausalLM",
            Family::Llama => "LlamaForCausalLM",
        }
    }
}

/// A checkpoint's configuration.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CheckpointConfig {
    /// The shape.
    pub(super) model: ModelConfig,
    /// Names of tensors.
    pub(super) family: Family,
    /// What the linear layers look like.
    pub(super) storage: Storage,
}

impl CheckpointConfig {
    /// What the file says of the storage, for messages about tensors that say otherwise.
    pub(super) fn storage_said(&self) -> &'static str {
        match (self.storage, self.family) {
            (Storage::Packed(ScaleUse::Multiply), _) => {
                "linear_class `autobitlinear` with quantization_mode `offline`: packed U8 weights with a weight_scale"
            }
            (Storage::Packed(ScaleUse::Divide), _) => {
                "linear_class `bitlinear`: packed U8 weights with a weight_scale"
            }
            (Storage::Masters, Family::OneBitLlm) => {
                "architecture `BitnetForCausalLM`: float master weights without a weight_scale"
            }
            (Storage::Masters, _) => {
                "quantization_mode `online`: float master weights without a weight_scale"
            }
        }
    }
}

#[derive(Deserialize)]
struct RawConfig {
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
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    partial_rotary_factor: Option<f64>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    quantization_config: Option<RawQuantization>,
    // 1bitLLM's own keys, and those of its repacked copies.
    weight_bits: Option<u64>,
    input_bits: Option<u64>,
    packed: Option<bool>,
    quant_bits: Option<u64>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    quantization_mode: Option<String>,
    use_rms_norm: Option<bool>,
    modules_to_not_convert: Option<Value>,
}

impl CheckpointConfig {
    /// Reads the text of a Hugging Face `config.json`; `path` is only for messages and the model's name.
    ///
    /// # Errors
    /// [`Error::Config`] with the key and what would be accepted.
    pub(super) fn parse(path: &Path, text: &str, options: &OpenOptions) -> Result<Self> {
        let fail = |reason: String| Error::Config { path: path.to_path_buf(), reason };
        // The architecture first: the keys of an unknown one need not be ours.
        let value: Value =
            serde_json::from_str(text).map_err(|e| fail(format!("not a model configuration: {e}")))?;
        let family = family(&value).map_err(fail)?;
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|e| fail(format!("not a model configuration: {e}")))?;
        raw.read(path, family, options).map_err(fail)
    }
}

/// The architecture of a configuration.
fn family(config: &Value) -> Result<Family, String> {
    let name = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    let all = [Family::BitNet, Family::OneBitLlm, Family::Llama];
    all.into_iter().find(|f| Some(f.architecture()) == name).ok_or_else(|| {
        format!(
            "architecture {} (model_type {}) is not supported; supported are `BitNetForCausalLM` (bitnet-b1.58-2B-4T), \
             `BitnetForCausalLM` (1bitLLM), and `LlamaForCausalLM` with a quantization_config whose quant_method is \
             `bitnet` (Falcon3-1.58bit, HF1BitLLM)",
            found(name),
            found(config.get("model_type").and_then(Value::as_str))
        )
    })
}

impl RawConfig {
    fn read(self, path: &Path, family: Family, options: &OpenOptions) -> Result<CheckpointConfig, String> {
        let storage = self.storage(family)?;
        for (name, bias) in [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)] {
            if bias == Some(true) {
                return Err(format!("{name} is true; projections with a bias are not supported"));
            }
        }
        let model = ModelConfig {
            name: path.display().to_string(),
            vocab: self.vocab_size,
            hidden: self.hidden_size,
            intermediate: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim()?,
            rope_theta: self.rope_theta()?,
            rms_eps: self.rms_norm_eps.ok_or("rms_norm_eps is missing")? as f32,
            activation: self.activation(options)?,
            sub_norms: family.sub_norms().is_some(),
            tied_head: self.tie_word_embeddings.unwrap_or(false),
            trained_positions: self.max_position_embeddings.unwrap_or(0),
        };
        model.check()?;
        Ok(CheckpointConfig { model, family, storage })
    }

    fn storage(&self, family: Family) -> Result<Storage, String> {
        let reason = match (family, &self.quantization_config) {
            (Family::OneBitLlm, None) => return self.one_bit_masters(),
            (Family::BitNet | Family::Llama, Some(quantization)) => return quantization.storage(),
            (Family::OneBitLlm, Some(_)) => {
                "is present; checkpoints of `BitnetForCausalLM` hold float master weights, described by weight_bits and \
                 input_bits, and have none"
            }
            (Family::BitNet, None) => {
                "is missing; it must say whether the weights are packed (quantization_mode `offline`) or master weights \
                 (`online`)"
            }
            (Family::Llama, None) => {
                "is missing: this is an ordinary `LlamaForCausalLM`, whose weights are not ternary; supported is one \
                 whose quant_method is `bitnet`"
            }
        };
        Err(format!("quantization_config {reason}"))
    }

    /// 1bitLLM's `utils_quant.py` ternarizes with `weight_bits` 1 and rounds activations to `input_bits`.
    fn one_bit_masters(&self) -> Result<Storage, String> {
        let bits = [("weight_bits", self.weight_bits, 1), ("input_bits", self.input_bits, 8)];
        for (name, bits, right) in bits {
            if bits != Some(right) {
                let bits = bits.map_or("missing".into(), |b| b.to_string());
                return Err(format!("{name} is {bits}; it must be {right}"));
            }
        }
        if self.packed == Some(true) {
            return Err("packed is true; of this architecture only float master weights are supported".into());
        }
        match self.quant_bits {
            Some(bits) => Err(format!(
                "quant_bits is {bits}; of this architecture only float master weights are supported (null)"
            )),
            None => Ok(Storage::Masters),
        }
    }

    fn activation(&self, options: &OpenOptions) -> Result<Activation, String> {
        let name = self.hidden_act.as_deref();
        let said = match name {
            Some("relu2") => Some(Activation::Relu2),
            Some("silu") => Some(Activation::Silu),
            _ => None,
        };
        match (name, said, options.activation) {
            (None, _, Some(asked)) => Ok(asked),
            (_, Some(said), Some(asked)) if asked != said => {
                Err(format!("hidden_act is {}, and {asked:?} was asked for", found(name)))
            }
            (_, Some(said), _) => Ok(said),
            _ => Err(format!("hidden_act is {}; supported are `relu2` and `silu`", found(name))),
        }
    }

    fn head_dim(&self) -> Result<usize, String> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        match self.head_dim {
            Some(head_dim) => Ok(head_dim),
            None if heads > 0 && hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => Err(format!(
                "hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}) and head_dim is not given"
            )),
        }
    }

    /// The base of the plain rotary embedding; every other kind is refused.
    fn rope_theta(&self) -> Result<f64, String> {
        whole_rotation("partial_rotary_factor", self.partial_rotary_factor)?;
        let mut theta = self.rope_theta;
        // Older versions of transformers write `rope_scaling`, which always says its kind; newer ones `rope_parameters`,
        // which are those of the plain embedding unless they say otherwise.
        for (key, value, default) in [
            ("rope_scaling", &self.rope_scaling, None),
            ("rope_parameters", &self.rope_parameters, Some("default")),
        ] {
            let Some(value) = value else { continue };
            let kind = value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str);
            if !value.is_object() || kind.or(default) != Some("default") {
                return Err(format!(
                    "{key} is {value}: rope_type {} is not supported; only the plain rotary embedding (`default`) is",
                    found(kind)
                ));
            }
            let number = |name: &str| match value.get(name) {
                None | Some(Value::Null) => Ok(None),
                Some(v) => {
                    v.as_f64().map(Some).ok_or_else(|| format!("{key}.{name} is {v}; it must be a number"))
                }
            };
            whole_rotation("partial_rotary_factor", number("partial_rotary_factor")?)?;
            match (theta, number("rope_theta")?) {
                (Some(outer), Some(inner)) if outer != inner => {
                    return Err(format!(
                        "rope_theta is {outer}, and {key}.rope_theta is {inner}; they must agree"
                    ));
                }
                (outer, inner) => theta = outer.or(inner),
            }
        }
        theta.ok_or_else(|| "rope_theta is missing".into())
    }
}

fn whole_rotation(name: &str, factor: Option<f64>) -> Result<(), String> {
    match factor.filter(|f| *f != 1.0) {
        Some(factor) => Err(format!("{name} is {factor}; only the full rotary embedding (1) is supported")),
        None => Ok(()),
    }
}

impl RawQuantization {
    /// Absent keys have the defaults of transformers' `BitNetQuantConfig`: `bitlinear`, `offline`, no norm, and all linear
    /// layers but the output head.
    fn storage(&self) -> Result<Storage, String> {
        let method = self.quant_method.as_deref();
        if method != Some("bitnet") {
            return Err(format!(
                "quantization_config.quant_method is {}; it must be `bitnet`",
                found(method)
            ));
        }
        if self.use_rms_norm == Some(true) {
            let why = "an RMSNorm inside each linear layer is not supported; it must be false or absent";
            return Err(format!("quantization_config.use_rms_norm is true: {why}"));
        }
        if let Some(kept) = &self.modules_to_not_convert
            && *kept != serde_json::json!(["lm_head"])
        {
            return Err(format!(
                "quantization_config.modules_to_not_convert is {kept}; supported are null and [\"lm_head\"]: every \
                 linear layer ternary, and the output head not"
            ));
        }
        let (class, mode) = (self.linear_class.as_deref(), self.quantization_mode.as_deref());
        match (class.unwrap_or("bitlinear"), mode.unwrap_or("offline")) {
            ("autobitlinear", "offline") => Ok(Storage::Packed(ScaleUse::Multiply)),
            ("autobitlinear", "online") => Ok(Storage::Masters),
            ("bitlinear", "offline") => Ok(Storage::Packed(ScaleUse::Divide)),
            _ => Err(format!(
                "quantization_config has linear_class {} with quantization_mode {}; supported are `autobitlinear` with \
                 `offline` or `online`, and `bitlinear` with `offline`",
                found(class),
                found(mode)
            )),
        }
    }
}

/// A value of a key, for messages.
fn found(value: Option<&str>) -> String {
    value.map_or("missing".into(), |value| format!("`{value}`"))
}

#[cfg(test)]
mod tests;
