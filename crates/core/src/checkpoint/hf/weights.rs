//! Which tensors a Hugging Face checkpoint must hold, and what they mean.

use std::collections::BTreeSet;

use safetensors::tensor::Dtype;

use super::config::{CheckpointConfig, ScaleUse, Storage};
use super::files::Tensors;
use crate::checkpoint::plan::{LayerPlan, LinearPlan, RowOrder, Scale, Span, Stored, WeightPlan};
use crate::error::{Error, Result};
use crate::formats::{Encoding, Matrix};

/// What tables, norms, scales and master weights may be stored as.
const FLOATS: [Encoding; 3] = [Encoding::Bf16, Encoding::F32, Encoding::F16];

/// Finds every tensor of the architecture, and checks that there is no other.
pub(super) fn plan(config: &CheckpointConfig, tensors: &Tensors) -> Result<WeightPlan> {
    let mut planner = Planner { config, tensors, used: BTreeSet::new() };
    let plan = planner.plan()?;
    planner.nothing_besides()?;
    Ok(plan)
}

struct Planner<'a> {
    config: &'a CheckpointConfig,
    tensors: &'a Tensors,
    /// Names that the plan asked for.
    used: BTreeSet<String>,
}

impl Planner<'_> {
    fn fail(&self, tensor: &str, reason: String) -> Error {
        self.tensors.fail(tensor, reason)
    }

    fn plan(&mut self) -> Result<WeightPlan> {
        let model = &self.config.model;
        let embedding = self.matrix("model.embed_tokens.weight", model.vocab, model.hidden, &FLOATS)?;
        let head = match model.tied_head {
            true => None,
            false => Some(self.matrix("lm_head.weight", model.vocab, model.hidden, &FLOATS)?),
        };
        let final_norm = self.vector("model.norm.weight", model.hidden)?;
        let mut layers = Vec::new();
        for l in 0..model.layers {
            layers.push(self.layer(&format!("model.layers.{l}."))?);
        }
        Ok(WeightPlan { embedding, head, final_norm, layers })
    }

    fn layer(&mut self, prefix: &str) -> Result<LayerPlan> {
        let model = &self.config.model;
        let [q, k, v, o, gate, up, down] = model.linears();
        let mut linear = |(name, rows, cols): (&str, usize, usize)| {
            self.linear(&format!("{prefix}{name}.weight"), rows, cols)
        };
        let linears =
            [linear(q)?, linear(k)?, linear(v)?, linear(o)?, linear(gate)?, linear(up)?, linear(down)?];
        let sub_norms = self.config.family.sub_norms();
        let mut norm = |name: &str, len| self.vector(&format!("{prefix}{name}.weight"), len);
        let (attn_sub_norm, ffn_sub_norm) = match sub_norms {
            Some([attn, ffn]) => (Some(norm(attn, model.q_rows())?), Some(norm(ffn, model.intermediate)?)),
            None => (None, None),
        };
        Ok(LayerPlan {
            linears,
            input_norm: norm("input_layernorm", model.hidden)?,
            attn_sub_norm,
            post_norm: norm("post_attention_layernorm", model.hidden)?,
            ffn_sub_norm,
        })
    }

    fn linear(&mut self, name: &str, rows: usize, cols: usize) -> Result<LinearPlan> {
        let scale_name = format!("{name}_scale");
        let (stored, scale) = match self.config.storage {
            Storage::Packed(scale_use) => {
                let stored = self.matrix(name, rows, cols, &[Encoding::HfU8])?;
                let number = self.vector(&scale_name, 1)?[0];
                let scale = match scale_use {
                    ScaleUse::Multiply => number,
                    ScaleUse::Divide => 1.0 / number,
                };
                if number <= 0.0 || !scale.is_finite() {
                    return Err(self.fail(&scale_name, format!("is {number}; it must be a positive number")));
                }
                (stored, Scale::Given(scale))
            }
            Storage::Masters => {
                let stored = self.matrix(name, rows, cols, &FLOATS)?;
                if self.tensors.has(&scale_name) {
                    let said = self.config.storage_said();
                    return Err(self.fail(&scale_name, format!("is present; config.json has {said}")));
                }
                (stored, Scale::Absmean)
            }
        };
        Ok(LinearPlan { stored, scale, order: RowOrder::Same })
    }

    /// A matrix of `rows x cols` in one of `encodings`.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize, encodings: &[Encoding]) -> Result<Stored> {
        self.stored(name, [rows, cols], &[rows, cols], encodings)
    }

    /// The tensor `name`, whose numbers are `rows x cols` in one of `encodings`; floats have the shape `shape`.
    fn stored(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        shape: &[usize],
        encodings: &[Encoding],
    ) -> Result<Stored> {
        self.used.insert(name.into());
        let tensor = self.tensors.get(name)?;
        let encoding = match tensor.dtype {
            Dtype::F32 => Some(Encoding::F32),
            Dtype::F16 => Some(Encoding::F16),
            Dtype::BF16 => Some(Encoding::Bf16),
            Dtype::U8 => Some(Encoding::HfU8),
            _ => None,
        };
        let Some(encoding) = encoding.filter(|e| encodings.contains(e)) else {
            let expected = match encodings {
                [Encoding::HfU8] => "U8",
                _ => "BF16, F32 or F16",
            };
            // For linear layers it is the configuration that says which: both may be wrong.
            let why = match self
                .config
                .model
                .linears()
                .iter()
                .any(|(l, ..)| name.ends_with(&format!("{l}.weight")))
            {
                true => format!(": config.json has {}", self.config.storage_said()),
                false => String::new(),
            };
            return Err(self.fail(name, format!("has type {:?}; expected {expected}{why}", tensor.dtype)));
        };
        let packed = [rows / 4, cols];
        let expected = match encoding {
            Encoding::HfU8 if !rows.is_multiple_of(4) => {
                return Err(self.fail(name, format!("would have {rows} rows; packing needs a multiple of 4")));
            }
            Encoding::HfU8 => &packed,
            _ => shape,
        };
        if tensor.shape != expected {
            let reason = format!("has shape {:?}; config.json implies {expected:?}", tensor.shape);
            return Err(self.fail(name, reason));
        }
        let (name, path) = (name.to_string(), self.tensors.path_of(name).to_path_buf());
        let span = Span { file: tensor.file, range: tensor.range.clone() };
        Stored { name, path, span, encoding, rows, cols }.checked()
    }

    /// A small vector of finite numbers.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.stored(name, [1, len], &[len], &FLOATS)?;
        let bytes = self.tensors.bytes(stored.span.file, stored.span.range.clone());
        let mut values = vec![0.0; len];
        Matrix::new(stored.encoding, 1, len, bytes)
            .and_then(|matrix| matrix.dequantize_row(0, &mut values))
            .map_err(|e| stored.damaged(&e))?;
        stored.finite(values)
    }

    /// The files have no tensor that the plan did not ask for.
    fn nothing_besides(&self) -> Result<()> {
        // A tied head is often stored a second time, and old exports keep the rotary frequencies.
        let known =
            |name: &str| self.used.contains(name) || name == "lm_head.weight" || name.ends_with("inv_freq");
        match self.tensors.names().find(|name| !known(name)) {
            Some(name) => {
                Err(self.fail(name, "is not part of the architecture that config.json describes".into()))
            }
            None => Ok(()),
        }
    }
}
