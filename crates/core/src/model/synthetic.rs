//! Seeded ternary weights at true size: the bytes and the arithmetic of the real model, built in seconds.
//!
//! Every matrix is one third -1, 0 and +1; its scale makes an output of unit variance from a normalised input
//! (`1 / sqrt(2/3 * columns)`), so that activations stay in the range they have in a trained model. Norm weights are 1,
//! embeddings uniform in [-1, 1). The same seed gives the same bytes on every machine and any number of threads.

use longbit_kernels::{Kernels, TernaryShape};
use longbit_sys::Team;
use sha2::{Digest, Sha256};

use super::build::{Job, WeightMemory, run_all};
use super::compact::Compaction;
use super::config::ModelConfig;
use super::linear::TernaryLinear;
use super::weights::{HeadFormat, Layer, Model, Table, TableFormat};
use crate::error::Result;
use crate::rng::mix;

/// Version of the recipe; part of the model's identity.
const RECIPE: u32 = 1;
/// Tiles of a ternary matrix that one job fills.
const TILES_A_JOB: usize = 256;
/// Embedding rows that one job fills.
const ROWS_A_JOB: usize = 512;

impl Model {
    /// A model of shape `config` with weights from `seed`.
    ///
    /// # Errors
    /// When memory cannot be had, or `LONGBIT_ISA` names what this machine lacks.
    pub fn synthetic(config: ModelConfig, head_format: HeadFormat, seed: u64, team: &Team) -> Result<Model> {
        let kernels = Kernels::from_env()?;
        let mut memory = WeightMemory::new(&config, head_format)?;
        let mut layers = Vec::with_capacity(config.layers);
        for _ in 0..config.layers {
            layers.push(empty_layer(&config, &mut memory)?);
        }
        let format = head_format.table();
        let table_bytes = config.vocab * config.hidden * format.size();
        let mut embedding = memory.take(table_bytes)?;
        let mut own = if config.tied_head { None } else { Some(memory.take(table_bytes)?) };

        let mut jobs: Vec<Job<'_>> = Vec::new();
        for (l, layer) in layers.iter_mut().enumerate() {
            let Layer { q, k, v, o, gate, up, down, .. } = layer;
            for (m, linear) in [q, k, v, o, gate, up, down].into_iter().enumerate() {
                let shape = linear.shape;
                let matrix_seed = mix(seed, (l * 16 + m) as u64 + 1);
                for (i, out) in linear.data.chunks_mut(TILES_A_JOB * shape.tile_bytes()).enumerate() {
                    let first = i * TILES_A_JOB;
                    jobs.push(Box::new(move || {
                        let tiles = first..first + out.len() / shape.tile_bytes();
                        shape.fill_random(tiles, matrix_seed, out);
                        Ok(())
                    }));
                }
            }
        }
        for (t, table) in std::iter::once(&mut embedding).chain(own.as_mut()).enumerate() {
            let table_seed = mix(seed, u64::MAX - t as u64);
            for (i, out) in table.chunks_mut(ROWS_A_JOB * config.hidden * format.size()).enumerate() {
                let block_seed = mix(table_seed, i as u64);
                jobs.push(Box::new(move || {
                    match format {
                        TableFormat::Bf16 => uniform(block_seed, bytemuck::cast_slice_mut(out), bf16_bits),
                        TableFormat::F32 => uniform(block_seed, bytemuck::cast_slice_mut(out), f32::to_bits),
                    }
                    Ok(())
                }));
            }
        }
        run_all(team, jobs)?;

        let embedding = Table::new(embedding, config.vocab, config.hidden, format);
        let own = own.map(|data| Table::new(data, config.vocab, config.hidden, format));
        let head = memory.head(&config, head_format, own, &embedding, kernels, team)?;
        Ok(Model {
            final_norm: vec![1.0; config.hidden],
            config,
            embedding,
            layers,
            head,
            head_format,
            kernels,
            rounded: 0,
            compaction: Compaction::default(),
        })
    }

    /// SHA-256 that identifies the model that [`Model::synthetic`] makes: over everything that it depends on.
    pub fn synthetic_sha256(config: &ModelConfig, head_format: HeadFormat, seed: u64) -> String {
        let head = head_format.as_str();
        let recipe = format!("longbit synthetic {RECIPE}; seed {seed}; head {head}; {config:?}");
        crate::hex(&Sha256::digest(recipe))
    }
}

fn empty_layer(config: &ModelConfig, memory: &mut WeightMemory) -> Result<Layer> {
    let mut linears = Vec::with_capacity(7);
    for (_, rows, cols) in config.linears() {
        let shape = TernaryShape { rows, cols };
        let scale = 1.0 / (2.0 / 3.0 * cols as f32).sqrt();
        linears.push(TernaryLinear::new(shape, memory.take(shape.bytes())?, scale));
    }
    let Ok([q, k, v, o, gate, up, down]) = <[TernaryLinear; 7]>::try_from(linears) else {
        unreachable!("a layer has seven matrices")
    };
    Ok(Layer {
        input_norm: vec![1.0; config.hidden],
        q,
        k,
        v,
        attn_sub_norm: config.sub_norms.then(|| vec![1.0; config.q_rows()]),
        o,
        post_norm: vec![1.0; config.hidden],
        gate,
        up,
        ffn_sub_norm: config.sub_norms.then(|| vec![1.0; config.intermediate]),
        down,
        sparse: None,
    })
}

/// Upper half of `value`.
fn bf16_bits(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

/// Uniform bf16 numbers in [-1, 1), in the bits of a format that holds them exactly.
fn uniform<T>(seed: u64, out: &mut [T], bits: impl Fn(f32) -> T) {
    for (i, four) in out.chunks_mut(4).enumerate() {
        let random = mix(seed, i as u64);
        for (j, slot) in four.iter_mut().enumerate() {
            let value = f32::from((random >> (16 * j)) as u16 as i16) / 32768.0;
            *slot = bits(f32::from_bits(value.to_bits() & 0xFFFF_0000));
        }
    }
}
