//! The shape of a model: read from a checkpoint or taken from a preset, never typed in anywhere else.

use crate::error::Result;

/// Non-linearity of the gated feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `relu(gate)^2 * up` (BitNet 2B-4T).
    Relu2,
    /// `gate * sigmoid(gate) * up` (Llama-shaped models).
    Silu,
}

impl Activation {
    /// Every activation.
    pub const ALL: [Activation; 2] = [Activation::Relu2, Activation::Silu];

    /// Name, as configurations write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Activation::Relu2 => "relu2",
            Activation::Silu => "silu",
        }
    }

    /// The activation called `name`, in any of the spellings that files use.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "relu2" | "relu_sqr" | "relu_squared" | "squared_relu" => Some(Activation::Relu2),
            "silu" | "swish" | "swiglu" => Some(Activation::Silu),
            _ => None,
        }
    }
}

/// Shape and constants of a decoder-only transformer with ternary linear layers.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Where the shape comes from: a preset's name or a path.
    pub name: String,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward block.
    pub intermediate: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers a head.
    pub head_dim: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f32,
    /// Feed-forward non-linearity.
    pub activation: Activation,
    /// RMSNorm before the output projection and before the down projection.
    pub sub_norms: bool,
    /// The output head is the embedding table.
    pub tied_head: bool,
    /// Positions that the model was trained for (information only; nothing stops at it).
    pub trained_positions: usize,
}

/// Largest value accepted for any single dimension, so that products of two fit comfortably in 64 bits.
const MAX_DIMENSION: usize = 1 << 24;
/// Largest number of layers accepted.
const MAX_LAYERS: usize = 4096;

impl ModelConfig {
    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Rows of the query projection.
    pub fn q_rows(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Rows of the key (and of the value) projection.
    pub fn kv_rows(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The ternary matrices of one layer, in the order of the forward pass: name, rows, columns.
    pub fn linears(&self) -> [(&'static str, usize, usize); 7] {
        [
            ("self_attn.q_proj", self.q_rows(), self.hidden),
            ("self_attn.k_proj", self.kv_rows(), self.hidden),
            ("self_attn.v_proj", self.kv_rows(), self.hidden),
            ("self_attn.o_proj", self.hidden, self.q_rows()),
            ("mlp.gate_proj", self.intermediate, self.hidden),
            ("mlp.up_proj", self.intermediate, self.hidden),
            ("mlp.down_proj", self.hidden, self.intermediate),
        ]
    }

    /// Parameters, counted as the literature does: linear layers, norms, embedding, and the head unless tied.
    pub fn parameters(&self) -> u64 {
        let linear: u64 = self.linears().iter().map(|&(_, r, c)| r as u64 * c as u64).sum();
        let norms = 2 * self.hidden + if self.sub_norms { self.q_rows() + self.intermediate } else { 0 };
        let table = self.vocab as u64 * self.hidden as u64;
        self.layers as u64 * (linear + norms as u64)
            + self.hidden as u64
            + table * if self.tied_head { 1 } else { 2 }
    }

    /// Checks that the shape is one that the forward pass can run.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn check(&self) -> Result<(), String> {
        let dims = [
            ("vocab_size", self.vocab),
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
        ];
        for (name, value) in dims {
            if value == 0 || value > MAX_DIMENSION {
                return Err(format!("{name} is {value}; it must be between 1 and {MAX_DIMENSION}"));
            }
        }
        if self.layers == 0 || self.layers > MAX_LAYERS {
            return Err(format!(
                "num_hidden_layers is {}; it must be between 1 and {MAX_LAYERS}",
                self.layers
            ));
        }
        if self.q_rows() > MAX_DIMENSION {
            return Err(format!(
                "num_attention_heads x head_dim is {}, above {MAX_DIMENSION}",
                self.q_rows()
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {}; rotary embedding needs an even number", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return Err(format!("rope_theta is {}; it must be finite and above 1", self.rope_theta));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps > 0.0) {
            return Err(format!("rms_norm_eps is {}; it must be finite and positive", self.rms_eps));
        }
        Ok(())
    }
}
