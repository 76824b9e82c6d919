//! GGUF, as bitnet.cpp and llama.cpp read it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::vocabulary::Vocabulary;
use super::{Beside, Progress, Stop, Written, failed, linears, own_head, write_table};
use crate::checkpoint::RowOrder;
use crate::checkpoint::gguf::{ACTIVATION_KEYS, ARCHITECTURES, Architecture, I2S_KEY, LINEARS, type_of};
use crate::error::{Error, Result};
use crate::formats::{EncodeError, Encoding, encode_ternary, holds_scale};
use crate::gguf::{Metadata, TensorType, Value, Writer};
use crate::model::{Activation, Model, ModelConfig, TernaryLinear};

/// How a model is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufOptions {
    /// Format of the ternary matrices.
    pub linear: Encoding,
    /// Format of the embedding and of a head of its own.
    pub head: Encoding,
}

impl GgufOptions {
    /// Formats of the ternary matrices, by the name that the flag takes.
    pub const LINEAR: [(&'static str, Encoding); 6] = [
        ("i2_s", Encoding::I2s(crate::formats::I2sLayout::X86)),
        ("i2_s-arm", Encoding::I2s(crate::formats::I2sLayout::Arm)),
        ("tq2_0", Encoding::Tq2_0),
        ("tq1_0", Encoding::Tq1_0),
        ("iq2_bn", Encoding::Iq2Bn),
        ("iq1_bn", Encoding::Iq1Bn),
    ];
    /// Formats of the head.
    pub const HEAD: [(&'static str, Encoding); 7] = [
        ("f32", Encoding::F32),
        ("f16", Encoding::F16),
        ("bf16", Encoding::Bf16),
        ("q8_0", Encoding::Q8_0),
        ("q6_k", Encoding::Q6K),
        ("q5_0", Encoding::Q5_0),
        ("q4_0", Encoding::Q4_0),
    ];
}

/// The type under which a file lists an encoding.
fn kind(encoding: Encoding) -> Result<TensorType> {
    let none = || Error::Invalid(format!("GGUF has no type for {}", encoding.name()));
    type_of(encoding).ok_or_else(none)
}

/// `general.file_type` of llama.cpp and bitnet.cpp, where they have a number for it.
fn file_type(encoding: Encoding) -> Option<u32> {
    match encoding {
        Encoding::Tq1_0 => Some(36),
        Encoding::Tq2_0 => Some(37),
        Encoding::I2s(_) => Some(40),
        _ => None,
    }
}

/// The architecture under which other engines run such a model.
fn architecture(config: &ModelConfig) -> Result<&'static Architecture> {
    let name = match (config.sub_norms, config.activation) {
        (true, Activation::Relu2) => "bitnet-b1.58",
        (true, Activation::Silu) => "bitnet",
        (false, Activation::Silu) => "llama",
        (false, Activation::Relu2) => {
            return Err(Error::Invalid(
                "no GGUF architecture has squared ReLU without sub-norms; write safetensors instead".into(),
            ));
        }
    };
    ARCHITECTURES
        .iter()
        .find(|a| a.name == name)
        .ok_or_else(|| Error::Invalid(format!("architecture `{name}` is not in the table")))
}

fn metadata(model: &Model, arch: &Architecture, vocabulary: &Vocabulary, options: GgufOptions) -> Metadata {
    let c = &model.config;
    let mut m = Metadata::default();
    m.set("general.architecture", Value::String(arch.name.into()));
    m.set("general.name", Value::String(vocabulary.name.clone()));
    if let Some(number) = file_type(options.linear) {
        m.set("general.file_type", Value::U32(number));
    }
    m.set("general.quantization_version", Value::U32(2));
    let mut set = |name: &str, value| m.set(format!("{}.{name}", arch.name), value);
    let count = |n: usize| Value::U32(n as u32); // dimensions were checked to be far below
    set("vocab_size", count(c.vocab));
    set("context_length", count(c.trained_positions));
    set("embedding_length", count(c.hidden));
    set("block_count", count(c.layers));
    set("feed_forward_length", count(c.intermediate));
    set("rope.dimension_count", count(c.head_dim));
    set("attention.head_count", count(c.heads));
    set("attention.head_count_kv", count(c.kv_heads));
    if c.head_dim * c.heads != c.hidden {
        set("attention.key_length", count(c.head_dim));
        set("attention.value_length", count(c.head_dim));
    }
    set("attention.layer_norm_rms_epsilon", Value::F32(c.rms_eps));
    set("rope.freq_base", Value::F32(c.rope_theta as f32));
    set(ACTIVATION_KEYS[0], Value::String(c.activation.as_str().into()));
    if let Encoding::I2s(layout) = options.linear {
        m.set(I2S_KEY, Value::String(layout.as_str().into()));
    }
    for (key, value) in vocabulary.keys.iter() {
        m.set(key, value.clone());
    }
    m
}

/// What one tensor of the file is made of.
enum Source<'m> {
    Vector(&'m [f32]),
    Table(&'m crate::model::Table),
    Linear(&'m TernaryLinear, RowOrder),
    /// The scale of a linear layer whose format holds only f16.
    Scale(f32),
}

/// The tensors of the file in order: name, dimensions (innermost first), source.
fn tensors<'m>(
    model: &'m Model,
    arch: &Architecture,
    linear: Encoding,
) -> Result<Vec<(String, Vec<u64>, Source<'m>)>> {
    let c = &model.config;
    let mut all = Vec::new();
    let table = vec![c.hidden as u64, c.vocab as u64];
    let vector = |v: &'m [f32]| (vec![v.len() as u64], Source::Vector(v));
    all.push(("token_embd.weight".to_string(), table.clone(), Source::Table(&model.embedding)));
    let (dims, source) = vector(&model.final_norm);
    all.push(("output_norm.weight".into(), dims, source));
    if let Some(own) = own_head(model)? {
        all.push(("output.weight".into(), table, Source::Table(own)));
    }
    for (l, layer) in model.layers.iter().enumerate() {
        let norms = [
            ("attn_norm", Some(&layer.input_norm)),
            ("attn_sub_norm", layer.attn_sub_norm.as_ref()),
            ("ffn_norm", Some(&layer.post_norm)),
            ("ffn_sub_norm", layer.ffn_sub_norm.as_ref()),
        ];
        for (name, norm) in norms {
            if let Some(norm) = norm {
                let (dims, source) = vector(norm);
                all.push((format!("blk.{l}.{name}.weight"), dims, source));
            }
        }
    }
    for (l, i, matrix) in linears(model) {
        let name = LINEARS[i];
        let order = match arch.interleaved && matches!(name, "attn_q" | "attn_k") {
            true => RowOrder::Interleaved { head_dim: c.head_dim },
            false => RowOrder::Same,
        };
        let dims = vec![matrix.shape.cols as u64, matrix.shape.rows as u64];
        all.push((format!("blk.{l}.{name}.weight"), dims, Source::Linear(matrix, order)));
        if !holds_scale(linear, matrix.scale) {
            all.push((format!("blk.{l}.{name}.scale"), vec![1], Source::Scale(matrix.scale)));
        }
    }
    Ok(all)
}

/// Writes `model` as the GGUF file `path`: beside it, and renamed when it is whole.
///
/// A scale that the linear format cannot hold exactly goes into a tensor `….scale` of its own, as llama.cpp reads it, and
/// the blocks get the scale 1.
///
/// # Errors
/// The model has no GGUF architecture, its shape does not fit the formats, or the file cannot be written.
pub fn write_gguf(
    model: &Model,
    vocabulary: &Vocabulary,
    options: GgufOptions,
    path: &Path,
    progress: Progress<'_>,
) -> Result<Written> {
    let arch = architecture(&model.config)?;
    let tensors = tensors(model, arch, options.linear)?;
    let damaged = |source| Error::Gguf { path: path.into(), source };
    let mut writer = Writer::new(metadata(model, arch, vocabulary, options)).map_err(damaged)?;
    let mut total = 0;
    for (name, dims, source) in &tensors {
        let encoding = match source {
            Source::Vector(_) | Source::Scale(_) => Encoding::F32,
            Source::Table(_) => options.head,
            Source::Linear(..) => options.linear,
        };
        let (cols, rows) = (dims[0] as usize, dims.get(1).map_or(1, |&rows| rows as usize));
        let fail = |reason: String| Error::Tensor { path: path.into(), tensor: name.clone(), reason };
        total += encoding
            .bytes(rows, cols)
            .map_err(|e| fail(format!("cannot be written: {e}; choose another --type or --head")))?;
        writer.tensor(name, dims, kind(encoding)?).map_err(damaged)?;
    }
    let beside = Beside::new(path);
    let file = File::create(beside.path()).map_err(failed(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let (mut done, mut rounded) = (0u64, 0u64);
    let mut unfit = None;
    let written = writer.write(&mut out, |index, out| {
        let (name, dims, source) = &tensors[index];
        let done_with = match source {
            Source::Vector(values) => {
                values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())).map_err(Stop::Io)
            }
            Source::Scale(scale) => out.write_all(&scale.to_le_bytes()).map_err(Stop::Io),
            Source::Table(table) => write_table(model, table, options.head, out).map(|lost| rounded += lost),
            Source::Linear(linear, order) => write_linear(linear, *order, options.linear, out),
        };
        done_with.map_err(|stop| match stop {
            Stop::Io(error) => error,
            Stop::Unfit(reason) => {
                unfit = Some(Error::Tensor { path: path.into(), tensor: name.clone(), reason });
                io::Error::other("a tensor does not fit its format")
            }
        })?;
        let (cols, rows) = (dims[0] as usize, dims.get(1).map_or(1, |&rows| rows as usize));
        done += match source {
            Source::Table(_) => options.head.bytes(rows, cols).unwrap_or(0),
            Source::Linear(..) => options.linear.bytes(rows, cols).unwrap_or(0),
            _ => 4 * cols as u64,
        };
        progress(done.min(total), total);
        Ok(())
    });
    if let Some(error) = unfit {
        return Err(error);
    }
    written.map_err(damaged)?;
    out.flush().map_err(failed(path))?;
    Ok(Written { bytes: beside.finish()?, tensors: tensors.len(), rounded })
}

fn write_linear(
    linear: &TernaryLinear,
    order: RowOrder,
    encoding: Encoding,
    mut out: &mut dyn Write,
) -> std::result::Result<(), Stop> {
    let shape = linear.shape;
    let scale = if holds_scale(encoding, linear.scale) { linear.scale } else { 1.0 };
    let row = |stored: usize, codes: &mut [u8]| linear.unpack_row(order.model(stored), codes);
    encode_ternary(encoding, shape.rows, shape.cols, scale, row, &mut out).map_err(|error| match error {
        EncodeError::Io(error) => Stop::Io(error),
        EncodeError::Format(error) => {
            Stop::Unfit(format!("cannot be written: {error}; choose another --type"))
        }
    })
}
