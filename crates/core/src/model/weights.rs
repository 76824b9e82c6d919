//! A model's weights, in the layout that the kernels read.

use std::ops::Range;

use longbit_kernels::{BlockFormat, BlockShape, Kernels, TernaryShape};
use longbit_sys::Segment;

use super::compact::Compaction;
use super::config::ModelConfig;
use super::linear::{Packing, TernaryLinear};
use super::sparse::SparseFfn;
use super::two_stage::TwoStage;
use crate::error::{Error, Result};

/// Number format of a [`Table`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableFormat {
    /// The upper half of an f32.
    Bf16,
    /// Exact for every format that model files use.
    F32,
}

impl TableFormat {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            TableFormat::Bf16 => 2,
            TableFormat::F32 => 4,
        }
    }
}

/// A matrix of floats, row-major: the embedding, or a head of its own.
pub struct Table {
    data: Segment,
    rows: usize,
    cols: usize,
    format: TableFormat,
}

impl Table {
    /// Wraps `data`, which holds `rows x cols` little-endian numbers of `format`.
    pub(crate) fn new(data: Segment, rows: usize, cols: usize, format: TableFormat) -> Self {
        debug_assert_eq!(data.len(), rows * cols * format.size());
        Table { data, rows, cols, format }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number format.
    pub fn format(&self) -> TableFormat {
        self.format
    }

    /// The bytes of rows `range`.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        let width = self.cols * self.format.size();
        &self.data[range.start * width..range.end * width]
    }

    /// Row `row` as f32, `[cols]`.
    pub fn read(&self, kernels: &Kernels, row: usize, out: &mut [f32]) {
        let bytes = self.bytes(row..row + 1);
        match self.format {
            TableFormat::Bf16 => kernels.bf16_to_f32(bytemuck::cast_slice(bytes), out),
            TableFormat::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        }
    }

    /// Dot products of rows `range` with `x` (`[cols]`), into `out` (`[range]`).
    pub fn times(&self, kernels: &Kernels, range: Range<usize>, x: &[f32], out: &mut [f32]) {
        let bytes = self.bytes(range);
        match self.format {
            TableFormat::Bf16 => kernels.head_bf16(bytemuck::cast_slice(bytes), x, out),
            TableFormat::F32 => kernels.head_f32(bytemuck::cast_slice(bytes), x, out),
        }
    }
}

/// A matrix at 6 or 4 bits a weight.
pub struct BlockMatrix {
    /// Rows, columns and number format.
    pub shape: BlockShape,
    /// Packed weights, see [`longbit_kernels::blocks`].
    pub data: Segment,
}

impl BlockMatrix {
    /// Row `row` as the numbers that it stands for, `[cols]`.
    pub fn read(&self, row: usize, out: &mut [f32]) {
        self.shape.read(&self.data, row, out);
    }
}

/// Number format of the output head. A tied head is the embedding table, which then has this format too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadFormat {
    /// As published; files with wider numbers are rounded to nearest even.
    Bf16,
    /// Exact for every file, twice the bytes of bf16.
    F32,
    /// 8 bits a weight with one f32 scale a row, quantised from bf16 at load.
    Int8,
    /// 6 bits a weight with a scale for 256 columns, quantised from bf16 at load.
    Q6,
    /// 4 bits a weight with a scale for 64 columns, quantised from bf16 at load.
    Q4,
    /// The likeliest tokens of the bf16 head with its bits, found in a copy at 6 bits; see [`TwoStage`].
    TwoStage,
    /// The same, found in a copy at 4 bits, but for odds of 2^-64 a step.
    TwoStageQ4,
}

impl HeadFormat {
    /// All formats.
    pub const ALL: [HeadFormat; 7] = [
        HeadFormat::Bf16,
        HeadFormat::F32,
        HeadFormat::Int8,
        HeadFormat::Q6,
        HeadFormat::Q4,
        HeadFormat::TwoStage,
        HeadFormat::TwoStageQ4,
    ];

    /// Name, as in experiment files.
    pub fn as_str(self) -> &'static str {
        match self {
            HeadFormat::Bf16 => "bf16",
            HeadFormat::F32 => "f32",
            HeadFormat::Int8 => "int8",
            HeadFormat::Q6 => "q6",
            HeadFormat::Q4 => "q4",
            HeadFormat::TwoStage => "two-stage",
            HeadFormat::TwoStageQ4 => "two-stage-q4",
        }
    }

    /// The format called `name`.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names that exist.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|f| f.as_str() == name)
            .ok_or_else(|| Error::unknown("head format", name, Self::ALL.into_iter().map(Self::as_str)))
    }

    /// Format of the tables that the head is made from, and of the embedding.
    pub fn table(self) -> TableFormat {
        match self {
            HeadFormat::F32 => TableFormat::F32,
            _ => TableFormat::Bf16,
        }
    }

    /// The format of the blocks that the head reads first, if it has any.
    pub fn blocks(self) -> Option<BlockFormat> {
        match self {
            HeadFormat::Q6 | HeadFormat::TwoStage => Some(BlockFormat::Q6),
            HeadFormat::Q4 => Some(BlockFormat::Q4),
            HeadFormat::TwoStageQ4 => Some(BlockFormat::Q4Dither),
            HeadFormat::Bf16 | HeadFormat::F32 | HeadFormat::Int8 => None,
        }
    }

    /// Whether the head knows the likeliest tokens only.
    pub fn is_two_stage(self) -> bool {
        matches!(self, HeadFormat::TwoStage | HeadFormat::TwoStageQ4)
    }

    /// Whether the head is something else than a table of floats: it is made from one at load.
    fn is_made(self) -> bool {
        !matches!(self, HeadFormat::Bf16 | HeadFormat::F32)
    }

    /// Bytes of a head of `rows x cols` that a step reads. The bf16 rows of a two-stage head come on top where they are
    /// scored, see [`Session::head_rows_rescored`](crate::Session::head_rows_rescored).
    pub fn bytes(self, rows: usize, cols: usize) -> u64 {
        let (rows, cols) = (rows as u64, cols as u64);
        match self {
            HeadFormat::Bf16 => 2 * rows * cols,
            HeadFormat::F32 => 4 * rows * cols,
            HeadFormat::Int8 => rows * cols + 4 * rows,
            HeadFormat::Q6 => block_bytes(BlockFormat::Q6, rows, cols),
            HeadFormat::Q4 => block_bytes(BlockFormat::Q4, rows, cols),
            HeadFormat::TwoStage => block_bytes(BlockFormat::Q6, rows, cols) + 8 * rows,
            HeadFormat::TwoStageQ4 => block_bytes(BlockFormat::Q4Dither, rows, cols) + 8 * rows,
        }
    }
}

fn block_bytes(format: BlockFormat, rows: u64, cols: u64) -> u64 {
    BlockShape { format, rows: rows as usize, cols: cols as usize }.bytes() as u64
}

/// The output head.
pub enum Head {
    /// The embedding table itself.
    Tied,
    /// A table of its own.
    Own(Table),
    /// Quantised rows.
    Int8 {
        /// `[vocab][hidden]`.
        codes: Segment,
        /// One a row.
        scales: Vec<f32>,
    },
    /// Quantised rows in blocks.
    Blocks(BlockMatrix),
    /// bf16 rows with a coarse copy.
    TwoStage(TwoStage),
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
    /// The feed-forward matrices once more, as decode steps read them that skip zeros; see [`Model::compact`].
    pub sparse: Option<SparseFfn>,
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
    /// Numbers of the embedding and the head that the tables could not hold exactly, and rounded.
    pub rounded: u64,
    /// What [`Model::compact`] did.
    pub compaction: Compaction,
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
    /// Bytes of all ternary matrices.
    pub(crate) fn ternary(config: &ModelConfig, packing: Packing) -> u64 {
        let bytes = |&(_, rows, cols): &(_, usize, usize)| packing.bytes(TernaryShape { rows, cols }) as u64;
        config.layers as u64 * config.linears().iter().map(bytes).sum::<u64>()
    }

    /// Computed from the shape alone, for weights as they are loaded.
    pub fn of(config: &ModelConfig, head: HeadFormat) -> Self {
        Self::compacted(config, head, Compaction::default())
    }

    /// Computed from the shape alone, for weights that [`Model::compact`] repacked. What zeros spare a step depends on its
    /// activations and is not taken off.
    pub fn compacted(config: &ModelConfig, head: HeadFormat, how: Compaction) -> Self {
        let copies =
            if how.skip_zeros { SparseFfn::bytes(config.hidden, config.intermediate) as u64 } else { 0 };
        let norms = 4
            * (2 * config.hidden + if config.sub_norms { config.q_rows() + config.intermediate } else { 0 })
                as u64;
        let layers =
            Self::ternary(config, how.packing) + config.layers as u64 * norms + 4 * config.hidden as u64;
        let head_bytes = head.bytes(config.vocab, config.hidden);
        let width = head.table().size() as u64;
        let table = width * config.vocab as u64 * config.hidden as u64;
        let own_head = !config.tied_head || head.is_made();
        // Quantising a head of its own needs the published one beside it for a while, a two-stage head for good.
        let source = if !config.tied_head && head.is_made() { table } else { 0 };
        ModelBytes {
            resident: layers
                + config.layers as u64 * copies
                + table
                + source
                + if own_head { head_bytes } else { 0 },
            per_token: layers + head_bytes + width * config.hidden as u64,
        }
    }
}

impl Model {
    /// Bytes of this model.
    pub fn bytes(&self) -> ModelBytes {
        ModelBytes::compacted(&self.config, self.head_format, self.compaction)
    }
}
