//! Single GGUF files: names of tensors, and what their types mean for a ternary model.

mod config;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
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
use types::encodings_of;
pub(crate) use types::type_of;

/// Key in which this project's converter says the byte order of its I2_S tensors.
pub(crate) const I2S_KEY: &str = "longbit.i2_s.layout";

/// Tensor names of the linear layers, in the order of [`ModelConfig::linears`].
pub(crate) const LINEARS: [&str; 7] =
    ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// The shape. No weight is read, but where the file has a head as large as its embedding the two are compared.
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

/// What a tensor is for, which decides how it may be stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Norms and scales: floats.
    Vector,
    /// The embedding and the head: floats, or blocks of integers.
    Table,
    /// Linear layers: any format.
    Linear,
}

impl Use {
    /// The formats that it may have, if not any, and why.
    fn formats(self) -> Option<(&'static [Encoding], &'static str)> {
        const FLOATS: [Encoding; 3] = [Encoding::F32, Encoding::F16, Encoding::Bf16];
        const NUMBERS: [Encoding; 7] = [
            Encoding::F32,
            Encoding::F16,
            Encoding::Bf16,
            Encoding::Q8_0,
            Encoding::Q6K,
            Encoding::Q5_0,
            Encoding::Q4_0,
        ];
        match self {
            Use::Vector => Some((&FLOATS, "norms and scales are f32, f16 or bf16")),
            Use::Table => Some((
                &NUMBERS,
                "the embedding and the head are not ternary in these models; supported are f32, f16, bf16, q8_0, q6_k, \
                 q5_0 and q4_0",
            )),
            Use::Linear => None,
        }
    }
}

/// Bytes of two tables that are compared before they are given back.
const COMPARED: usize = 1 << 20;

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
        let vocab = match embedding.dims[..] {
            [_, vocab] => vocab,
            [_] => 1,
            _ => {
                return Err(
                    self.fail(name, format!("has {} dimensions; an embedding has 2", embedding.dims.len()))
                );
            }
        };
        let vocab = usize::try_from(vocab).unwrap_or(usize::MAX);
        self.keys.config(vocab, !self.has_own_head(embedding), options)
    }

    /// Whether the file has a head that is not the embedding once more, as the first upload of 2B-4T has it.
    fn has_own_head(&self, embedding: &TensorInfo) -> bool {
        let Some(head) = self.find("output.weight") else { return false };
        match (&head.range, &embedding.range) {
            (Some(a), Some(b)) if head.kind == embedding.kind && head.dims == embedding.dims => {
                !self.same_bytes(a.clone(), b.clone())
            }
            _ => true,
        }
    }

    /// Whether two ranges of the file hold the same, up to the first difference. What was compared is given back: two
    /// tables may be more than is to be held in memory at once.
    fn same_bytes(&self, a: Range<usize>, b: Range<usize>) -> bool {
        a.len() == b.len()
            && (0..a.len()).step_by(COMPARED).all(|at| {
                let part =
                    |whole: &Range<usize>| whole.start + at..whole.end.min(whole.start + at + COMPARED);
                let (a, b) = (part(&a), part(&b));
                let same = self.map[a.clone()] == self.map[b.clone()];
                self.map.release(a);
                self.map.release(b);
                same
            })
    }

    /// How the tensor's type is read, where it is for `used_as`.
    fn encoding(&self, info: &TensorInfo, used_as: Use, layout: Option<I2sLayout>) -> Result<Encoding> {
        let refuse = |why: &str| Err(self.fail(&info.name, format!("has type {}: {why}", info.kind.name())));
        let meant: Vec<Encoding> = encodings_of(info.kind).collect();
        if let (Some(first), Some((formats, why))) = (meant.first(), used_as.formats())
            && !formats.contains(first)
        {
            return refuse(why);
        }
        match (meant[..].as_ref(), layout) {
            (&[only], _) => Ok(only),
            (&[_, ..], Some(layout)) => Ok(Encoding::I2s(layout)),
            (&[_, ..], None) => refuse(
                "files from x86 and from ARM share this type and differ in byte order, and this file does not say which it \
                 is; pass --i2s x86 (the files published for 2B-4T and Falcon3) or --i2s arm",
            ),
            ([], _) if matches!(info.kind, TensorType::Tl1 | TensorType::Tl2) => refuse(
                "its tiles depend on constants that were compiled into the program that wrote it and stand nowhere in the \
                 file; use a file with I2_S, or convert the original checkpoint",
            ),
            ([], _) => refuse(
                "it is not supported; use f32, f16, bf16, q8_0, q6_k, q5_0, q4_0, tq1_0, tq2_0, i2_s, iq1_bn or iq2_bn",
            ),
        }
    }

    /// The tensor `name`, which must have the dimensions `[cols, rows]`, innermost first; the last may be missing where
    /// it is 1.
    fn stored(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        used_as: Use,
        layout: Option<I2sLayout>,
    ) -> Result<Stored> {
        self.used.insert(name.into());
        let info = self.find(name).ok_or_else(|| self.fail(name, "is missing"))?;
        let encoding = self.encoding(info, used_as, layout)?;
        let (flat, whole) = ([cols as u64], [cols as u64, rows as u64]);
        if info.dims != whole && !(rows == 1 && info.dims == flat) {
            let expected: &[u64] = if used_as == Use::Vector { &flat } else { &whole };
            let reason = format!("has dimensions {:?}; the keys of the file imply {expected:?}", info.dims);
            return Err(self.fail(name, reason));
        }
        let range = info.range.clone().ok_or_else(|| self.fail(name, "lies nowhere in the file"))?;
        let (name, path) = (name.to_string(), self.path.to_path_buf());
        Stored { name, path, span: Span { file: 0, range }, encoding, rows, cols }.checked()
    }

    /// A vector of finite numbers.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.stored(name, [1, len], Use::Vector, None)?;
        let mut values = vec![0.0; len];
        Matrix::new(stored.encoding, 1, len, &self.map[stored.span.range.clone()])
            .and_then(|matrix| matrix.dequantize_row(0, &mut values))
            .map_err(|e| stored.damaged(&e))?;
        stored.finite(values)
    }

    fn table(&mut self, name: &str, config: &ModelConfig) -> Result<Stored> {
        self.stored(name, [config.vocab, config.hidden], Use::Table, None)
    }

    fn plan(&mut self, config: &ModelConfig, options: &OpenOptions) -> Result<WeightPlan> {
        let embedding = self.table("token_embd.weight", config)?;
        let head = match config.tied_head {
            true => {
                self.used.insert("output.weight".into());
                None
            }
            false => Some(self.table("output.weight", config)?),
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
        let stored = self.stored(&format!("{prefix}{name}.weight"), [rows, cols], Use::Linear, layout)?;
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
