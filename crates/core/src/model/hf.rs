//! Checkpoints in the packed ("offline") layout of microsoft/bitnet-b1.58-2B-4T: `config.json` beside
//! `model.safetensors`, linear layers as U8 `[rows / 4, cols]` with a `weight_scale`, everything else bf16.

use std::path::{Path, PathBuf};

use longbit_kernels::{Kernels, TernaryShape};
use longbit_sys::{FileMap, Team};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use super::build::{Job, WeightMemory, run_all};
use super::config::{CheckpointConfig, ModelConfig, ScaleUse};
use super::weights::{HeadFormat, Layer, Model, Table, TernaryLinear};
use crate::error::{Error, Result};

/// Largest `config.json` that is read (bytes).
const MAX_CONFIG: u64 = 1 << 20;
/// Tiles of a ternary matrix that one job repacks.
const TILES_A_JOB: usize = 256;
/// Bytes of a bf16 table that one job copies.
const COPY_A_JOB: usize = 1 << 20;

impl Model {
    /// Loads the checkpoint in directory `dir`.
    ///
    /// # Errors
    /// Names the file, the tensor or key, and what was expected instead; a damaged file never panics.
    pub fn load(dir: &Path, head_format: HeadFormat, team: &Team) -> Result<Model> {
        let config_path = dir.join("config.json");
        let text = read_text(&config_path)?;
        let checkpoint = CheckpointConfig::parse(&config_path, &text)?;
        let path = dir.join("model.safetensors");
        if !path.exists() && dir.join("model.safetensors.index.json").exists() {
            return Err(Error::Container {
                path,
                reason: "the checkpoint is split over several files; join them into one model.safetensors"
                    .into(),
            });
        }
        let map = FileMap::open(&path)?;
        let tensors = SafeTensors::deserialize(&map)
            .map_err(|e| Error::Container { path: path.clone(), reason: e.to_string() })?;
        let source = Source { path: &path, tensors: &tensors };
        // All shapes first: a configuration that disagrees with the file is refused before it decides how much memory is
        // asked for.
        source.check(&checkpoint.model)?;
        let model = source.model(&checkpoint, head_format, team)?;
        let weights = hash_in_pieces(&map, team)?;
        let sha256 = crate::hex(&Sha256::digest(format!("{text}\n{weights}\n{}", head_format.as_str())));
        Ok(Model { sha256, ..model })
    }
}

/// Reads a `config.json`, which must be of a sane size.
pub(crate) fn read_text(path: &Path) -> Result<String> {
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

/// SHA-256 of a file as SHA-256 over the SHA-256s of its 16 MiB pieces, so that all threads share the work.
fn hash_in_pieces(bytes: &[u8], team: &Team) -> Result<String> {
    const PIECE: usize = 16 << 20;
    let mut digests = vec![[0u8; 32]; bytes.len().div_ceil(PIECE)];
    let jobs = bytes
        .chunks(PIECE)
        .zip(digests.iter_mut())
        .map(|(piece, slot)| -> Job<'_> {
            Box::new(move || {
                *slot = Sha256::digest(piece).into();
                Ok(())
            })
        })
        .collect();
    run_all(team, jobs)?;
    Ok(crate::hex(&Sha256::digest(digests.concat())))
}

struct Source<'a> {
    path: &'a Path,
    tensors: &'a SafeTensors<'a>,
}

impl<'a> Source<'a> {
    fn fail(&self, tensor: &str, reason: String) -> Error {
        Error::Tensor { path: PathBuf::from(self.path), tensor: tensor.into(), reason }
    }

    /// The tensor `name`, which must have one of `dtypes` and exactly `shape`.
    fn tensor(&self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<TensorView<'a>> {
        let view = self.tensors.tensor(name).map_err(|_| self.fail(name, "is missing".into()))?;
        if !dtypes.contains(&view.dtype()) {
            return Err(self.fail(name, format!("has type {:?}; expected {dtypes:?}", view.dtype())));
        }
        if view.shape() != shape {
            return Err(
                self.fail(name, format!("has shape {:?}; config.json implies {shape:?}", view.shape()))
            );
        }
        Ok(view)
    }

    /// A small vector of finite numbers.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let view = self.tensor(name, &[Dtype::BF16, Dtype::F32], &[len])?;
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            _ => view
                .data()
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
                .collect(),
        };
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(
                self.fail(name, format!("holds {} at index {i}; every value must be finite", values[i]))
            );
        }
        Ok(values)
    }

    /// Every tensor that `config` implies is there in its type and shape, and none besides.
    fn check(&self, config: &ModelConfig) -> Result<()> {
        let mut expected = std::collections::BTreeSet::new();
        let mut expect = |name: String, dtypes: &[Dtype], shape: &[usize]| -> Result<()> {
            self.tensor(&name, dtypes, shape)?;
            expected.insert(name);
            Ok(())
        };
        const VECTOR: [Dtype; 2] = [Dtype::BF16, Dtype::F32];
        let table = [config.vocab, config.hidden];
        expect("model.embed_tokens.weight".into(), &[Dtype::BF16], &table)?;
        if !config.tied_head {
            expect("lm_head.weight".into(), &[Dtype::BF16], &table)?;
        }
        expect("model.norm.weight".into(), &VECTOR, &[config.hidden])?;
        for l in 0..config.layers {
            let prefix = format!("model.layers.{l}.");
            for (name, rows, cols) in config.linears() {
                self.packed(&prefix, name, TernaryShape { rows, cols })?;
                expect(format!("{prefix}{name}.weight"), &[Dtype::U8], &[rows / 4, cols])?;
                expect(format!("{prefix}{name}.weight_scale"), &VECTOR, &[1])?;
            }
            for (name, len) in [
                ("input_layernorm", config.hidden),
                ("self_attn.attn_sub_norm", config.q_rows()),
                ("post_attention_layernorm", config.hidden),
                ("mlp.ffn_sub_norm", config.intermediate),
            ] {
                expect(format!("{prefix}{name}.weight"), &VECTOR, &[len])?;
            }
        }
        // A tied head is often stored a second time, and old exports keep the rotary frequencies.
        let known =
            |name: &str| expected.contains(name) || name == "lm_head.weight" || name.ends_with("inv_freq");
        match self.tensors.names().into_iter().filter(|name| !known(name)).min() {
            Some(name) => {
                Err(self.fail(name, "is not part of the architecture that config.json describes".into()))
            }
            None => Ok(()),
        }
    }

    fn model(&self, checkpoint: &CheckpointConfig, head_format: HeadFormat, team: &Team) -> Result<Model> {
        let config = &checkpoint.model;
        let kernels = Kernels::from_env()?;
        let mut memory = WeightMemory::new(config, head_format)?;
        let mut layers = Vec::new();
        for l in 0..config.layers {
            layers.push(self.layer(config, checkpoint.scale_use, l, &mut memory)?);
        }
        let embedding_view = self.table_view("model.embed_tokens.weight", config)?;
        let mut embedding = memory.take(embedding_view.data().len())?;
        let head_view = match config.tied_head {
            true => None,
            false => Some(self.table_view("lm_head.weight", config)?),
        };
        let mut own = match &head_view {
            Some(view) => Some(memory.take(view.data().len())?),
            None => None,
        };

        let mut jobs: Vec<Job<'_>> = Vec::new();
        for (l, layer) in layers.iter_mut().enumerate() {
            self.repack_jobs(config, l, layer, &mut jobs)?;
        }
        self.copy_jobs("model.embed_tokens.weight", embedding_view.data(), &mut embedding, &mut jobs);
        if let (Some(view), Some(own)) = (&head_view, own.as_mut()) {
            self.copy_jobs("lm_head.weight", view.data(), own, &mut jobs);
        }
        run_all(team, jobs)?;

        let embedding = Table::new(embedding, config.vocab, config.hidden);
        let own = own.map(|data| Table::new(data, config.vocab, config.hidden));
        let head = memory.head(config, head_format, own, &embedding, kernels, team)?;
        Ok(Model {
            config: config.clone(),
            embedding,
            layers,
            final_norm: self.vector("model.norm.weight", config.hidden)?,
            head,
            head_format,
            kernels,
            sha256: String::new(),
        })
    }

    fn table_view(&self, name: &str, config: &ModelConfig) -> Result<TensorView<'a>> {
        self.tensor(name, &[Dtype::BF16], &[config.vocab, config.hidden])
    }

    fn layer(
        &self,
        config: &ModelConfig,
        scale_use: ScaleUse,
        l: usize,
        memory: &mut WeightMemory,
    ) -> Result<Layer> {
        let prefix = format!("model.layers.{l}.");
        let mut linear = |index: usize| -> Result<TernaryLinear> {
            let (name, rows, cols) = config.linears()[index];
            let scale_name = format!("{prefix}{name}.weight_scale");
            let stored = self.vector(&scale_name, 1)?[0];
            let scale = match scale_use {
                ScaleUse::Multiply => stored,
                ScaleUse::Divide => 1.0 / stored,
            };
            if stored <= 0.0 || !scale.is_finite() {
                return Err(self.fail(&scale_name, format!("is {stored}; it must be a positive number")));
            }
            let shape = TernaryShape { rows, cols };
            self.packed(&prefix, name, shape)?;
            Ok(TernaryLinear { shape, data: memory.take(shape.bytes())?, scale })
        };
        let (q, k, v, o) = (linear(0)?, linear(1)?, linear(2)?, linear(3)?);
        let (gate, up, down) = (linear(4)?, linear(5)?, linear(6)?);
        let norm = |name: &str, len| self.vector(&format!("{prefix}{name}.weight"), len);
        Ok(Layer {
            input_norm: norm("input_layernorm", config.hidden)?,
            q,
            k,
            v,
            attn_sub_norm: Some(norm("self_attn.attn_sub_norm", config.q_rows())?),
            o,
            post_norm: norm("post_attention_layernorm", config.hidden)?,
            gate,
            up,
            ffn_sub_norm: Some(norm("mlp.ffn_sub_norm", config.intermediate)?),
            down,
        })
    }

    fn packed(&self, prefix: &str, name: &str, shape: TernaryShape) -> Result<TensorView<'a>> {
        let name = format!("{prefix}{name}.weight");
        if !shape.rows.is_multiple_of(4) {
            return Err(
                self.fail(&name, format!("would have {} rows; packing needs a multiple of 4", shape.rows))
            );
        }
        self.tensor(&name, &[Dtype::U8], &[shape.rows / 4, shape.cols])
    }

    fn repack_jobs<'j>(
        &'j self,
        config: &ModelConfig,
        l: usize,
        layer: &'j mut Layer,
        jobs: &mut Vec<Job<'j>>,
    ) -> Result<()> {
        let Layer { q, k, v, o, gate, up, down, .. } = layer;
        for (linear, (name, _, _)) in [q, k, v, o, gate, up, down].into_iter().zip(config.linears()) {
            let prefix = format!("model.layers.{l}.");
            let shape = linear.shape;
            let view = self.packed(&prefix, name, shape)?;
            let packed = view.data();
            for (i, out) in linear.data.chunks_mut(TILES_A_JOB * shape.tile_bytes()).enumerate() {
                let tensor = format!("{prefix}{name}.weight");
                jobs.push(Box::new(move || {
                    let first = i * TILES_A_JOB;
                    let tiles = first..first + out.len() / shape.tile_bytes();
                    shape
                        .repack_hf(packed, tiles, out)
                        .map_err(|e| self.fail(&tensor, format!("is damaged: {e}")))
                }));
            }
        }
        Ok(())
    }

    /// Copies a bf16 table whose numbers must all be finite.
    fn copy_jobs<'j>(
        &'j self,
        name: &'static str,
        from: &'j [u8],
        to: &'j mut [u8],
        jobs: &mut Vec<Job<'j>>,
    ) {
        for (from, to) in from.chunks(COPY_A_JOB).zip(to.chunks_mut(COPY_A_JOB)) {
            jobs.push(Box::new(move || {
                // All exponent bits set: infinite or not a number.
                if from.as_chunks::<2>().0.iter().any(|b| u16::from_le_bytes(*b) & 0x7F80 == 0x7F80) {
                    return Err(self.fail(name, "holds a number that is not finite".into()));
                }
                to.copy_from_slice(from);
                Ok(())
            }));
        }
    }
}
