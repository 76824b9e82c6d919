//! Where each weight of a model lies in its files, and what its numbers mean.

use std::ops::Range;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::formats::{Encoding, FormatError};

/// A range of one of the checkpoint's files, inside its length.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) file: usize,
    pub(super) range: Range<usize>,
}

/// A stored tensor, checked: `span` has the bytes that `rows x cols` take in `encoding`.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) name: String,
    /// The file, for messages.
    pub(super) path: PathBuf,
    pub(super) span: Span,
    pub(super) encoding: Encoding,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Stored {
    pub(super) fn fail(&self, reason: String) -> Error {
        Error::Tensor { path: self.path.clone(), tensor: self.name.clone(), reason }
    }

    pub(super) fn damaged(&self, error: &FormatError) -> Error {
        self.fail(format!("is damaged: {error}"))
    }

    /// The numbers of a vector, which must all be finite.
    pub(super) fn finite(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => {
                Err(self.fail(format!("holds {} at index {i}; every value must be finite", values[i])))
            }
            None => Ok(values),
        }
    }

    /// The same tensor after its length has been held against its shape.
    pub(super) fn checked(self) -> Result<Self> {
        let expected = self.encoding.bytes(self.rows, self.cols).map_err(|e| self.fail(e.to_string()))?;
        if expected != self.span.range.len() as u64 {
            let (name, found) = (self.encoding.name(), self.span.range.len());
            return Err(self.fail(format!(
                "has {found} bytes; {name} of {} x {} takes {expected}",
                self.rows, self.cols
            )));
        }
        Ok(self)
    }
}

/// What multiplies the integer dot products of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    /// This number; the format has none of its own.
    Given(f32),
    /// What the format holds, times this.
    Inside(f32),
    /// The weights are master weights: mean |W|, at least 1e-5, and weights rounded by it.
    Absmean,
    /// Floats that are either already ternary (all of one magnitude or zero), whose scale is that magnitude times this,
    /// or master weights.
    Detect(f32),
}

/// Which stored row holds a row of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// The same.
    Same,
    /// Rows of each head of this width are stored with the two halves of a rotary pair side by side (the `llama`
    /// architecture of GGUF): row `i` of the first half at `2i`, of the second at `2i + 1`.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row that holds row `row` of the model.
    pub(crate) fn stored(self, row: usize) -> usize {
        match self {
            RowOrder::Same => row,
            RowOrder::Interleaved { head_dim } => {
                let (head, within, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + if within < half { 2 * within } else { 2 * (within - half) + 1 }
            }
        }
    }

    /// The row of the model that stored row `row` holds.
    pub(crate) fn model(self, row: usize) -> usize {
        match self {
            RowOrder::Same => row,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within / 2 + within % 2 * (head_dim / 2)
            }
        }
    }
}

/// A linear layer.
#[derive(Clone, Debug)]
pub(super) struct LinearPlan {
    pub(super) stored: Stored,
    pub(super) scale: Scale,
    pub(super) order: RowOrder,
}

/// A transformer layer; norms as in [`crate::Layer`].
pub(super) struct LayerPlan {
    /// In the order of [`crate::ModelConfig::linears`].
    pub(super) linears: [LinearPlan; 7],
    pub(super) input_norm: Vec<f32>,
    pub(super) attn_sub_norm: Option<Vec<f32>>,
    pub(super) post_norm: Vec<f32>,
    pub(super) ffn_sub_norm: Option<Vec<f32>>,
}

/// Every weight of a model.
pub(super) struct WeightPlan {
    pub(super) embedding: Stored,
    /// None when the head is the embedding.
    pub(super) head: Option<Stored>,
    pub(super) final_norm: Vec<f32>,
    pub(super) layers: Vec<LayerPlan>,
}

#[cfg(test)]
mod tests {
    use super::RowOrder;

    #[test]
    fn interleaved_rows_lie_as_llama_cpp_lays_them() {
        let order = RowOrder::Interleaved { head_dim: 8 };
        let model: Vec<usize> = (0..16).map(|stored| order.model(stored)).collect();
        assert_eq!(model, [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]);
        for row in 0..16 {
            assert_eq!((order.model(order.stored(row)), order.stored(order.model(row))), (row, row));
            assert_eq!((RowOrder::Same.model(row), RowOrder::Same.stored(row)), (row, row));
        }
    }
}
