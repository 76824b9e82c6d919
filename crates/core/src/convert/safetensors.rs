//! A Hugging Face directory in the packed layout of `microsoft/bitnet-b1.58-2B-4T` (`autobitlinear`, `offline`), which
//! transformers reads.

use std::borrow::Cow;
use std::path::Path;

use safetensors::tensor::{Dtype, View};
use serde_json::{Map, Value, json};

use super::vocabulary::{FILES, Vocabulary};
use super::{Beside, Written, failed, linears, own_head};
use crate::error::{Error, Result};
use crate::formats::{Encoding, encode_ternary};
use crate::model::{Model, ModelConfig, Table, TableFormat, TernaryLinear};

/// What one tensor is made of; turned into bytes when its turn comes.
enum Tensor<'m> {
    Table(&'m Table),
    Linear(&'m TernaryLinear),
    /// Numbers written as bf16 if that holds them exactly, else as f32.
    Numbers(Cow<'m, [f32]>),
}

impl Tensor<'_> {
    fn is_bf16(values: &[f32]) -> bool {
        values.iter().all(|v| v.to_bits() & 0xFFFF == 0)
    }
}

struct Entry<'m> {
    shape: Vec<usize>,
    tensor: Tensor<'m>,
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        match &self.tensor {
            Tensor::Table(table) if table.format() == TableFormat::F32 => Dtype::F32,
            Tensor::Numbers(values) if !Tensor::is_bf16(values) => Dtype::F32,
            Tensor::Table(_) | Tensor::Numbers(_) => Dtype::BF16,
            Tensor::Linear(_) => Dtype::U8,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.tensor {
            Tensor::Table(table) => Cow::Borrowed(table.bytes(0..table.rows())),
            Tensor::Linear(linear) => {
                let shape = linear.shape;
                let mut bytes = Vec::with_capacity(self.data_len());
                let row = |row: usize, codes: &mut [u8]| linear.unpack_row(row, codes);
                // The shape was checked before, and a vector takes every byte.
                let _ = encode_ternary(Encoding::HfU8, shape.rows, shape.cols, 1.0, row, &mut bytes);
                Cow::Owned(bytes)
            }
            Tensor::Numbers(values) => Cow::Owned(match Tensor::is_bf16(values) {
                true => values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
                false => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            }),
        }
    }

    fn data_len(&self) -> usize {
        let width = match self.dtype() {
            Dtype::F32 => 4,
            Dtype::BF16 => 2,
            _ => 1,
        };
        self.shape.iter().product::<usize>() * width
    }
}

/// The configuration, without which nothing in a directory is loaded.
const CONFIG: &str = "config.json";
/// The weights.
const WEIGHTS: &str = "model.safetensors";

/// Writes `model` into directory `dir`: `config.json`, `model.safetensors`, and the files of the vocabulary. Weights and
/// tokenizer files of another model that lie there are removed.
///
/// Everything is written beside its place first. Then the old `config.json` goes, so that from there to the last step,
/// which puts the new one in its place, the directory is none that can be loaded: whenever this is stopped, new weights
/// never stand with old files.
///
/// # Errors
/// A matrix has rows that four cannot share, or a file cannot be written.
pub fn write_safetensors(model: &Model, vocabulary: &Vocabulary, dir: &Path) -> Result<Written> {
    let path = dir.join(WEIGHTS);
    let tensors = tensors(model, &path)?;
    let count = tensors.len();
    // Whoever loads "as stored" gets the widest type that is stored.
    let dtype = match tensors.iter().any(|(_, entry)| entry.dtype() == Dtype::F32) {
        true => "float32",
        false => "bfloat16",
    };
    let config = serde_json::to_vec_pretty(&config(&model.config, vocabulary, dtype)).unwrap_or_default();
    std::fs::create_dir_all(dir).map_err(failed(dir))?;
    let write = |name: &str, content: &[u8]| -> Result<Beside> {
        let place = dir.join(name);
        let beside = Beside::new(&place);
        std::fs::write(beside.path(), content).map_err(failed(&place))?;
        Ok(beside)
    };
    let mut new =
        vocabulary.files().map(|(name, content)| write(name, content)).collect::<Result<Vec<_>>>()?;
    let config = write(CONFIG, &config)?;
    let weights = Beside::new(&path);
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), weights.path()).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => Error::Write { path: path.clone(), source },
        other => Error::Write { path: path.clone(), source: std::io::Error::other(other) },
    })?;
    // The crate that writes tensors keeps its file to the owner; it is no more secret than the configuration beside it.
    let permissions = std::fs::metadata(config.path()).map_err(failed(dir))?.permissions();
    std::fs::set_permissions(weights.path(), permissions).map_err(failed(&path))?;

    remove(&dir.join(CONFIG))?;
    let kept: Vec<&str> = vocabulary.files().map(|(name, _)| name).collect();
    for old in std::fs::read_dir(dir).map_err(failed(dir))? {
        let old = old.map_err(failed(dir))?;
        if old.file_name().to_str().is_some_and(|name| is_of_a_model(name) && !kept.contains(&name)) {
            remove(&old.path())?;
        }
    }
    new.extend([weights, config]);
    let bytes = new.into_iter().map(Beside::finish).sum::<Result<u64>>()?;
    Ok(Written { bytes, tensors: count, rounded: 0 })
}

/// Whether a file of this name would be taken for a part of the model whose configuration lies beside it.
fn is_of_a_model(name: &str) -> bool {
    let shard = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    FILES.contains(&name)
        || name == WEIGHTS
        || name == "model.safetensors.index.json"
        || shard.is_some_and(|numbers| numbers.contains("-of-"))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Write { path: path.into(), source })
        }
        _ => Ok(()),
    }
}

fn tensors<'m>(model: &'m Model, path: &Path) -> Result<Vec<(String, Entry<'m>)>> {
    let c = &model.config;
    let mut all = Vec::new();
    let vector = |v: &'m [f32]| Entry { shape: vec![v.len()], tensor: Tensor::Numbers(v.into()) };
    let table = |t: &'m Table| Entry { shape: vec![c.vocab, c.hidden], tensor: Tensor::Table(t) };
    all.push(("model.embed_tokens.weight".to_string(), table(&model.embedding)));
    all.push(("model.norm.weight".into(), vector(&model.final_norm)));
    if let Some(own) = own_head(model)? {
        all.push(("lm_head.weight".into(), table(own)));
    }
    for (l, layer) in model.layers.iter().enumerate() {
        let norms = [
            ("input_layernorm", Some(&layer.input_norm)),
            ("self_attn.attn_sub_norm", layer.attn_sub_norm.as_ref()),
            ("post_attention_layernorm", Some(&layer.post_norm)),
            ("mlp.ffn_sub_norm", layer.ffn_sub_norm.as_ref()),
        ];
        for (name, norm) in norms {
            if let Some(norm) = norm {
                all.push((format!("model.layers.{l}.{name}.weight"), vector(norm)));
            }
        }
    }
    for (l, i, linear) in linears(model) {
        let name = format!("model.layers.{l}.{}.weight", c.linears()[i].0);
        let shape = linear.shape;
        if let Err(error) = Encoding::HfU8.bytes(shape.rows, shape.cols) {
            let reason = format!("cannot be written: {error}");
            return Err(Error::Tensor { path: path.into(), tensor: name, reason });
        }
        let scale = Entry { shape: vec![1], tensor: Tensor::Numbers(vec![linear.scale].into()) };
        all.push((format!("{name}_scale"), scale));
        all.push((name, Entry { shape: vec![shape.rows / 4, shape.cols], tensor: Tensor::Linear(linear) }));
    }
    Ok(all)
}

/// The `config.json` that describes what was written.
fn config(c: &ModelConfig, vocabulary: &Vocabulary, dtype: &str) -> Value {
    // A float in JSON has the digits of an f64: those of the f32 would come out as 0.000009999999747378752.
    let eps: Value = c.rms_eps.to_string().parse::<f64>().map(Value::from).unwrap_or_default();
    let (class, kind) = match c.sub_norms {
        true => ("BitNetForCausalLM", "bitnet"),
        false => ("LlamaForCausalLM", "llama"),
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": kind,
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.intermediate,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": c.activation.as_str(),
        "rms_norm_eps": eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.trained_positions,
        "tie_word_embeddings": c.tied_head,
        "torch_dtype": dtype,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    });
    let mut ids = Map::new();
    for (key, id) in [("bos_token_id", vocabulary.bos), ("eos_token_id", vocabulary.eos)] {
        ids.extend(id.map(|id| (key.to_string(), json!(id))));
    }
    if let Some(object) = config.as_object_mut() {
        object.extend(ids);
    }
    config
}
