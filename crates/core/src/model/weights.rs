//! A model's weights, in the layout that the kernels read.

use longbit_kernels::{Kernels, TernaryShape};
use longbit_sys::Segment;

use super::config::ModelConfig;
use crate::error::{Error, Result};

/// A ternary matrix with one scale: `y = (codes . weights) * scale / activation_scale`.
pub struct TernaryLinear {
    /// Rows (outputs) and columns (inputs).
    pub shape: TernaryShape,
    /// Packed weights, see [`TernaryShape`].
    pub data: Segment,
    /// Multiplier of the integer dot product, whatever the checkpoint's own convention was.
    pub scale: f32,
}

/// A bf16 matrix, row-major.
pub struct Table {
    data: Segment,
    rows: usize,
    cols: usize,
}

impl Table {
    /// Wraps `data`, which holds `rows x cols` little-endian bf16 numbers.
    pub(crate) fn new(data: Segment, rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols * 2);
        Table { data, rows, cols }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows `range` as bf16 bits, `[range][cols]`.
    pub fn range(&self, range: std::ops::Range<usize>) -> &[u16] {
        &bytemuck::cast_slice(&self.data)[range.start * self.cols..range.end * self.cols]
    }
}

/// Number format of the output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadFormat {
    /// As published.
    Bf16,
    /// 8 bits a weight with one f32 scale a row, quantised from bf16 at load.
    Int8,
}

impl HeadFormat {
    /// All formats.
    pub const ALL: [HeadFormat; 2] = [HeadFormat::Bf16, HeadFormat::Int8];

    /// Name, as in experiment files.
    pub fn as_str(self) -> &'static str {
        match self {
            HeadFormat::Bf16 => "bf16",
            HeadFormat::Int8 => "int8",
        }
    }

    /// The format called `name`.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names that exist.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|f| f.as_str() == name).ok_or_else(|| Error::Unknown {
            kind: "head format",
            name: name.into(),
            known: Self::ALL.map(Self::as_str).join(", "),
        })
    }

    /// Bytes of a head of `rows x cols`.
    pub fn bytes(self, rows: usize, cols: usize) -> u64 {
        let (rows, cols) = (rows as u64, cols as u64);
        match self {
            HeadFormat::Bf16 => 2 * rows * cols,
            HeadFormat::Int8 => rows * cols + 4 * rows,
        }
    }
}

/// The output head.
pub enum Head {
    /// The embedding table itself.
    Tied,
    /// A table of its own.
    Bf16(Table),
    /// Quantised rows.
    Int8 {
        /// `[vocab][hidden]`.
        codes: Segment,
        /// One a row.
        scales: Vec<f32>,
    },
}

/// The weights of one transformer layer.
pub struct Layer {
    /// RMSNorm before attention, `[hidden]`.
    pub input_norm: Vec<f32>,
    /// Query projection.
    pub q: TernaryLinear,
    /// Key projection.
    pub k: TernaryLinear,
    /// Value projection.
    pub v: TernaryLinear,
    /// RMSNorm of the concatenated heads, `[heads * head_dim]`.
    pub attn_sub_norm: Option<Vec<f32>>,
    /// Output projection.
    pub o: TernaryLinear,
    /// RMSNorm before the feed-forward block, `[hidden]`.
    pub post_norm: Vec<f32>,
    /// Gate projection.
    pub gate: TernaryLinear,
    /// Up projection.
    pub up: TernaryLinear,
    /// RMSNorm before the down projection, `[intermediate]`.
    pub ffn_sub_norm: Option<Vec<f32>>,
    /// Down projection.
    pub down: TernaryLinear,
}

/// A model ready to run.
pub struct Model {
    /// Shape.
    pub config: ModelConfig,
    /// Token embedding, `[vocab][hidden]`.
    pub embedding: Table,
    /// Layers in order.
    pub layers: Vec<Layer>,
    /// Last RMSNorm, `[hidden]`.
    pub final_norm: Vec<f32>,
    /// Output head.
    pub head: Head,
    /// Format of `head`.
    pub head_format: HeadFormat,
    /// Kernels chosen for this process.
    pub kernels: &'static Kernels,
    /// SHA-256 that identifies the model: over configuration, weights and head format, or over the synthetic recipe.
    pub sha256: String,
}

/// What a model of a given shape weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelBytes {
    /// Everything that is in memory at once.
    pub resident: u64,
    /// What one decode step reads: ternary weights, norms, head, one embedding row.
    pub per_token: u64,
}

impl ModelBytes {
    /// Computed from the shape alone.
    pub fn of(config: &ModelConfig, head: HeadFormat) -> Self {
        let linear: u64 =
            config.linears().iter().map(|&(_, rows, cols)| TernaryShape { rows, cols }.bytes() as u64).sum();
        let norms = 4
            * (2 * config.hidden + if config.sub_norms { config.q_rows() + config.intermediate } else { 0 })
                as u64;
        let layers = config.layers as u64 * (linear + norms) + 4 * config.hidden as u64;
        let head_bytes = head.bytes(config.vocab, config.hidden);
        let table = 2 * config.vocab as u64 * config.hidden as u64;
        let own_head = !(config.tied_head && head == HeadFormat::Bf16);
        // Quantising a head of its own needs the published one beside it for a while.
        let source = if !config.tied_head && head == HeadFormat::Int8 { table } else { 0 };
        ModelBytes {
            resident: layers + table + source + if own_head { head_bytes } else { 0 },
            per_token: layers + head_bytes + 2 * config.hidden as u64,
        }
    }
}

impl Model {
    /// Bytes of this model.
    pub fn bytes(&self) -> ModelBytes {
        ModelBytes::of(&self.config, self.head_format)
    }
}
