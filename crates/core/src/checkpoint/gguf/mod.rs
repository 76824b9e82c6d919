//! Single GGUF files: names of tensors, and what their types mean for a ternary model.

mod config;
mod layout;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use longbit_sys::FileMap;

use super::plan::{LayerPlan, LinearPlan, RowOrder, Scale, Span, Stored, WeightPlan};
use super::{Checkpoint, Container, OpenOptions};
use crate::error::{Error, Result};
use crate::formats::{Encoding, I2sLayout, Matrix};
use crate::gguf::{Header, TensorInfo, TensorType};
use crate::model::ModelConfig;
use config::{Keys, at};

pub(crate) use config::{ACTIVATION_KEYS, ARCHITECTURES, Architecture};

/// Key in which this project's converter says the byte order of its I2_S tensors.
pub(crate) const I2S_KEY: &str = "longbit.i2_s.layout";

/// Tensor names of the linear layers, in the order of [`ModelConfig::linears`].
pub(crate) const LINEARS: [&str; 7] =
    ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// The shape, without the weights.
pub(super) fn config(path: &Path, options: &OpenOptions) -> Result<ModelConfig> {
    let map = FileMap::open(path)?;
    let header = Header::parse(&map).map_err(at(path))?;
    Source::new(path, &map, &header)?.config(options)
}

pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Checkpoint> {
    let map = FileMap::open(path)?;
    let header = Header::parse(&map).map_err(at(path))?;
    let mut source = Source::new(path, &map, &header)?;
    let config = source.config(options)?;
    let plan = source.plan(&config, options)?;
    source.nothing_besides()?;
    let container = Container::Gguf(Box::new(header));
    Ok(Checkpoint { path: path.to_path_buf(), container, config, files: vec![map], plan })
}

struct Source<'a> {
    path: &'a Path,
    map: &'a FileMap,
    header: &'a Header,
    keys: Keys<'a>,
    by_name: BTreeMap<&'a str, &'a TensorInfo>,
    /// Names that the plan asked for.
    used: BTreeSet<String>,
}

impl<'a> Source<'a> {
    fn new(path: &'a Path, map: &'a FileMap, header: &'a Header) -> Result<Self> {
        let keys = Keys::of(path, header)?;
        let by_name = header.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        Ok(Source { path, map, header, keys, by_name, used: BTreeSet::new() })
    }

    fn fail(&self, tensor: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { path: self.path.to_path_buf(), tensor: tensor.into(), reason: reason.into() }
    }

    fn find(&self, name: &str) -> Option<&'a TensorInfo> {
        self.by_name.get(name).copied()
    }

    fn config(&self, options: &OpenOptions) -> Result<ModelConfig> {
        let name = "token_embd.weight";
        let embedding = self.find(name).ok_or_else(|| self.fail(name, "is missing"))?;
        let [_, vocab] = embedding.dims[..] else {
            return Err(
                self.fail(name, format!("has {} dimensions; an embedding has 2", embedding.dims.len()))
            );
        };
        let vocab = usize::try_from(vocab).unwrap_or(usize::MAX);
        self.keys.config(vocab, !self.has_own_head(embedding), options)
    }

    /// Whether the file has a head that is not the embedding once more, as the first upload of 2B-4T has it.
    fn has_own_head(&self, embedding: &TensorInfo) -> bool {
        let bytes = |t: &TensorInfo| t.range.clone().and_then(|range| self.map.get(range));
        match self.find("output.weight") {
            None => false,
            Some(head) => {
                let same = head.kind == embedding.kind && head.dims == embedding.dims;
                !(same && bytes(head).is_some() && bytes(head) == bytes(embedding))
            }
        }
    }

    /// How the tensor's type is read.
    fn encoding(&self, info: &TensorInfo, layout: Option<I2sLayout>) -> Result<Encoding> {
        let refuse = |why: &str| Err(self.fail(&info.name, format!("has type {}: {why}", info.kind.name())));
        match info.kind {
            TensorType::F32 => Ok(Encoding::F32),
            TensorType::F16 => Ok(Encoding::F16),
            TensorType::Bf16 => Ok(Encoding::Bf16),
            TensorType::Q4_0 => Ok(Encoding::Q4_0),
            TensorType::Q5_0 => Ok(Encoding::Q5_0),
            TensorType::Q8_0 => Ok(Encoding::Q8_0),
            TensorType::Q6K => Ok(Encoding::Q6K),
            TensorType::Tq1_0 => Ok(Encoding::Tq1_0),
            TensorType::Tq2_0 => Ok(Encoding::Tq2_0),
            TensorType::Iq1Bn => Ok(Encoding::Iq1Bn),
            TensorType::Iq2Bn => Ok(Encoding::Iq2Bn),
            TensorType::I2S => match layout {
                Some(layout) => Ok(Encoding::I2s(layout)),
                None => refuse(
                    "files from x86 and from ARM share this type and differ in byte order, and this file does not say which \
                     it is; pass --i2s x86 (the files published for 2B-4T and Falcon3) or --i2s arm",
                ),
            },
            TensorType::Tl1 | TensorType::Tl2 => refuse(
                "its tiles depend on constants that were compiled into the program that wrote it and stand nowhere in the \
                 file; use a file with I2_S, or convert the original checkpoint",
            ),
            _ => refuse(
                "it is not supported; use f32, f16, bf16, q8_0, q6_k, q5_0, q4_0, tq1_0, tq2_0, i2_s, iq1_bn or iq2_bn",
            ),
        }
    }

    /// The tensor `name`, which must have the dimensions `[cols, rows]`, innermost first.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize, layout: Option<I2sLayout>) -> Result<Stored> {
        self.used.insert(name.into());
        let info = self.find(name).ok_or_else(|| self.fail(name, "is missing"))?;
        let encoding = self.encoding(info, layout)?;
        let expected: &[u64] = if rows == 1 { &[cols as u64] } else { &[cols as u64, rows as u64] };
        if info.dims != expected {
            let reason = format!("has dimensions {:?}; the keys of the file imply {expected:?}", info.dims);
            return Err(self.fail(name, reason));
        }
        let range = info.range.clone().ok_or_else(|| self.fail(name, "lies nowhere in the file"))?;
        let (name, path) = (name.to_string(), self.path.to_path_buf());
        Stored { name, path, span: Span { file: 0, range }, encoding, rows, cols }.checked()
    }

    /// A vector of finite numbers.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.matrix(name, 1, len, None)?;
        let mut values = vec![0.0; len];
        Matrix::new(stored.encoding, 1, len, &self.map[stored.span.range.clone()])
            .and_then(|matrix| matrix.dequantize_row(0, &mut values))
            .map_err(|e| stored.damaged(&e))?;
        stored.finite(values)
    }

    fn plan(&mut self, config: &ModelConfig, options: &OpenOptions) -> Result<WeightPlan> {
        let embedding = self.matrix("token_embd.weight", config.vocab, config.hidden, None)?;
        let head = match config.tied_head {
            true => {
                self.used.insert("output.weight".into());
                None
            }
            false => Some(self.matrix("output.weight", config.vocab, config.hidden, None)?),
        };
        let final_norm = self.vector("output_norm.weight", config.hidden)?;
        let layout = self.i2s_layout(options)?;
        let mut layers = Vec::new();
        for l in 0..config.layers {
            layers.push(self.layer(config, &format!("blk.{l}."), layout)?);
        }
        Ok(WeightPlan { embedding, head, final_norm, layers })
    }

    /// Byte order of the I2_S tensors: as the file says, else as the user says.
    fn i2s_layout(&self, options: &OpenOptions) -> Result<Option<I2sLayout>> {
        let told = match self.header.metadata.str(I2S_KEY).map_err(at(self.path))? {
            Some(name) => Some(I2sLayout::parse(name).ok_or_else(|| Error::Config {
                path: self.path.to_path_buf(),
                reason: format!("{I2S_KEY} is `{name}`; it must be x86 or arm"),
            })?),
            None => None,
        };
        match (told, options.i2s) {
            (Some(told), Some(asked)) if told != asked => Err(Error::Config {
                path: self.path.to_path_buf(),
                reason: format!(
                    "the I2_S byte order asked for is {}, but {I2S_KEY} says {}",
                    asked.as_str(),
                    told.as_str()
                ),
            }),
            (told, asked) => Ok(told.or(asked)),
        }
    }

    fn layer(&mut self, config: &ModelConfig, prefix: &str, layout: Option<I2sLayout>) -> Result<LayerPlan> {
        let mut planned = Vec::with_capacity(LINEARS.len());
        for (name, (_, rows, cols)) in LINEARS.into_iter().zip(config.linears()) {
            planned.push(self.linear(config, prefix, name, rows, cols, layout)?);
        }
        let Ok(linears) = <[LinearPlan; 7]>::try_from(planned) else {
            unreachable!("a layer has seven matrices")
        };
        let mut norm = |name: &str, len| self.vector(&format!("{prefix}{name}.weight"), len);
        let (mut attn_sub_norm, mut ffn_sub_norm) = (None, None);
        if config.sub_norms {
            attn_sub_norm = Some(norm("attn_sub_norm", config.q_rows())?);
            ffn_sub_norm = Some(norm("ffn_sub_norm", config.intermediate)?);
        }
        Ok(LayerPlan {
            linears,
            input_norm: norm("attn_norm", config.hidden)?,
            attn_sub_norm,
            post_norm: norm("ffn_norm", config.hidden)?,
            ffn_sub_norm,
        })
    }

    fn linear(
        &mut self,
        config: &ModelConfig,
        prefix: &str,
        name: &str,
        rows: usize,
        cols: usize,
        layout: Option<I2sLayout>,
    ) -> Result<LinearPlan> {
        let stored = self.matrix(&format!("{prefix}{name}.weight"), rows, cols, layout)?;
        let scale_name = format!("{prefix}{name}.scale");
        let times = match self.find(&scale_name) {
            Some(_) => self.vector(&scale_name, 1)?[0],
            None => 1.0,
        };
        if !(times.is_finite() && times > 0.0) {
            return Err(self.fail(&scale_name, format!("is {times}; it must be a positive number")));
        }
        let rotated = matches!(name, "attn_q" | "attn_k");
        let order = match self.keys.architecture.interleaved && rotated {
            true => RowOrder::Interleaved { head_dim: config.head_dim },
            false => RowOrder::Same,
        };
        let scale = if stored.encoding.is_ternary() { Scale::Inside(times) } else { Scale::Detect(times) };
        Ok(LinearPlan { stored, scale, order })
    }

    /// The file has no tensor that the plan did not ask for.
    fn nothing_besides(&self) -> Result<()> {
        match self.header.tensors.iter().find(|t| !self.used.contains(&t.name)) {
            Some(tensor) if tensor.name == "rope_freqs.weight" => Err(self.fail(
                &tensor.name,
                "scales the rotary frequencies, which is not supported; only the plain rotary embedding is",
            )),
            Some(tensor) => Err(self.fail(
                &tensor.name,
                format!(
                    "is not part of architecture `{}` as it is supported here",
                    self.keys.architecture.name
                ),
            )),
            None => Ok(()),
        }
    }
}
