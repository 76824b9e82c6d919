//! Directories as Hugging Face lays them out: `config.json` beside `model.safetensors`.

mod config;

use std::collections::BTreeSet;
use std::path::Path;

use longbit_sys::FileMap;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::plan::{LayerPlan, LinearPlan, RowOrder, Scale, Span, Stored, WeightPlan};
use super::{Checkpoint, Container, OpenOptions};
use crate::error::{Error, Result};
use crate::formats::{Encoding, Matrix};
use crate::model::ModelConfig;
use config::{CheckpointConfig, ScaleUse};

/// Largest `config.json` that is read (bytes).
const MAX_CONFIG: u64 = 1 << 20;

/// The shape, from `config.json` alone.
pub(super) fn config(dir: &Path, options: &OpenOptions) -> Result<ModelConfig> {
    Ok(read_config(dir, options)?.model)
}

fn read_config(dir: &Path, _options: &OpenOptions) -> Result<CheckpointConfig> {
    let path = dir.join("config.json");
    CheckpointConfig::parse(&path, &read_text(&path)?)
}

/// Reads a text that describes a model, which must be of a sane size.
fn read_text(path: &Path) -> Result<String> {
    let fail = |source| Error::Read { path: path.to_path_buf(), source };
    let length = std::fs::metadata(path).map_err(fail)?.len();
    if length > MAX_CONFIG {
        return Err(Error::Config {
            path: path.into(),
            reason: format!("{length} bytes; at most {MAX_CONFIG} are read"),
        });
    }
    std::fs::read_to_string(path).map_err(fail)
}

pub(super) fn open(dir: &Path, options: &OpenOptions) -> Result<Checkpoint> {
    let checkpoint = read_config(dir, options)?;
    let path = dir.join("model.safetensors");
    if !path.exists() && dir.join("model.safetensors.index.json").exists() {
        return Err(Error::Container {
            path,
            reason: "the checkpoint is split over several files; join them into one model.safetensors".into(),
        });
    }
    let map = FileMap::open(&path)?;
    let tensors = SafeTensors::deserialize(&map)
        .map_err(|e| Error::Container { path: path.clone(), reason: e.to_string() })?;
    let mut source = Source { path: &path, map: &map, tensors: &tensors, used: BTreeSet::new() };
    let plan = source.plan(&checkpoint)?;
    source.nothing_besides()?;
    Ok(Checkpoint {
        path: dir.to_path_buf(),
        container: Container::HuggingFace,
        config: checkpoint.model,
        files: vec![map],
        plan,
    })
}

struct Source<'a> {
    path: &'a Path,
    map: &'a FileMap,
    tensors: &'a SafeTensors<'a>,
    /// Names that the plan asked for.
    used: BTreeSet<String>,
}

impl<'a> Source<'a> {
    fn fail(&self, tensor: &str, reason: String) -> Error {
        Error::Tensor { path: self.path.to_path_buf(), tensor: tensor.into(), reason }
    }

    fn view(&mut self, name: &str) -> Result<TensorView<'a>> {
        self.used.insert(name.into());
        self.tensors.tensor(name).map_err(|_| self.fail(name, "is missing".into()))
    }

    /// The tensor `name`, whose numbers are `rows x cols` in one of `encodings`.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize, encodings: &[Encoding]) -> Result<Stored> {
        let view = self.view(name)?;
        let encoding = match view.dtype() {
            Dtype::F32 => Some(Encoding::F32),
            Dtype::F16 => Some(Encoding::F16),
            Dtype::BF16 => Some(Encoding::Bf16),
            Dtype::U8 => Some(Encoding::HfU8),
            _ => None,
        };
        let Some(encoding) = encoding.filter(|e| encodings.contains(e)) else {
            let known: Vec<&str> = encodings.iter().map(|e| e.name()).collect();
            let reason = format!("has type {:?}; expected {}", view.dtype(), known.join(" or "));
            return Err(self.fail(name, reason));
        };
        let shape = match encoding {
            Encoding::HfU8 => {
                if !rows.is_multiple_of(4) {
                    let reason = format!("would have {rows} rows; packing needs a multiple of 4");
                    return Err(self.fail(name, reason));
                }
                vec![rows / 4, cols]
            }
            _ => vec![rows, cols],
        };
        // A vector is a matrix of one row.
        let found = if rows == 1 && view.shape() == [cols] { vec![1, cols] } else { view.shape().to_vec() };
        if found != shape {
            let expected = if rows == 1 { vec![cols] } else { shape };
            let reason = format!("has shape {:?}; config.json implies {expected:?}", view.shape());
            return Err(self.fail(name, reason));
        }
        // The view borrows from the map: its place in the file is the distance between the two.
        let start = view.data().as_ptr() as usize - self.map.as_ptr() as usize;
        let range = start..start + view.data().len();
        let (name, path) = (name.to_string(), self.path.to_path_buf());
        Stored { name, path, span: Span { file: 0, range }, encoding, rows, cols }.checked()
    }

    /// A small vector of finite numbers.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.matrix(name, 1, len, &[Encoding::Bf16, Encoding::F32, Encoding::F16])?;
        let mut values = vec![0.0; len];
        Matrix::new(stored.encoding, 1, len, &self.map[stored.span.range.clone()])
            .and_then(|matrix| matrix.dequantize_row(0, &mut values))
            .map_err(|e| stored.damaged(&e))?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => {
                Err(stored.fail(format!("holds {} at index {i}; every value must be finite", values[i])))
            }
            None => Ok(values),
        }
    }

    fn plan(&mut self, checkpoint: &CheckpointConfig) -> Result<WeightPlan> {
        let config = &checkpoint.model;
        const TABLE: [Encoding; 3] = [Encoding::Bf16, Encoding::F32, Encoding::F16];
        let embedding = self.matrix("model.embed_tokens.weight", config.vocab, config.hidden, &TABLE)?;
        let head = match config.tied_head {
            true => None,
            false => Some(self.matrix("lm_head.weight", config.vocab, config.hidden, &TABLE)?),
        };
        let final_norm = self.vector("model.norm.weight", config.hidden)?;
        let mut layers = Vec::new();
        for l in 0..config.layers {
            layers.push(self.layer(checkpoint, &format!("model.layers.{l}."))?);
        }
        Ok(WeightPlan { embedding, head, final_norm, layers })
    }

    fn layer(&mut self, checkpoint: &CheckpointConfig, prefix: &str) -> Result<LayerPlan> {
        let config = &checkpoint.model;
        let [q, k, v, o, gate, up, down] = config.linears();
        let mut linear = |(name, rows, cols): (&str, usize, usize)| -> Result<LinearPlan> {
            let stored = self.matrix(&format!("{prefix}{name}.weight"), rows, cols, &[Encoding::HfU8])?;
            let scale_name = format!("{prefix}{name}.weight_scale");
            let number = self.vector(&scale_name, 1)?[0];
            let scale = match checkpoint.scale_use {
                ScaleUse::Multiply => number,
                ScaleUse::Divide => 1.0 / number,
            };
            if number <= 0.0 || !scale.is_finite() {
                return Err(self.fail(&scale_name, format!("is {number}; it must be a positive number")));
            }
            Ok(LinearPlan { stored, scale: Scale::Given(scale), order: RowOrder::Same })
        };
        let linears =
            [linear(q)?, linear(k)?, linear(v)?, linear(o)?, linear(gate)?, linear(up)?, linear(down)?];
        let mut norm = |name: &str, len| self.vector(&format!("{prefix}{name}.weight"), len);
        Ok(LayerPlan {
            linears,
            input_norm: norm("input_layernorm", config.hidden)?,
            attn_sub_norm: Some(norm("self_attn.attn_sub_norm", config.q_rows())?),
            post_norm: norm("post_attention_layernorm", config.hidden)?,
            ffn_sub_norm: Some(norm("mlp.ffn_sub_norm", config.intermediate)?),
        })
    }

    /// The file has no tensor that the plan did not ask for.
    fn nothing_besides(&self) -> Result<()> {
        // A tied head is often stored a second time, and old exports keep the rotary frequencies.
        let known =
            |name: &str| self.used.contains(name) || name == "lm_head.weight" || name.ends_with("inv_freq");
        match self.tensors.names().into_iter().filter(|name| !known(name)).min() {
            Some(name) => {
                Err(self.fail(name, "is not part of the architecture that config.json describes".into()))
            }
            None => Ok(()),
        }
    }
}
