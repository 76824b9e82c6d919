//! The forward pass as the papers write it: one token after another, plain loops, f64.
//!
//! Nothing here is fast and nothing is shared with the fast path but the weights: every kernel, cache format, thread
//! split and chunking is held against this file. Sources: BitNet b1.58 (arXiv 2402.17764), the 2B-4T report (arXiv
//! 2504.12285) and the Hugging Face implementation of `BitNetForCausalLM`.
//!
//! The only rounding is the model's own: activations to int8, one scale a token.

use crate::model::{Activation, Head, Layer, Model, ModelConfig, Table, TableFormat, TernaryLinear};

/// A ternary matrix, unpacked: `[rows][cols]` of -1, 0, +1.
struct Matrix {
    weights: Vec<i8>,
    cols: usize,
    scale: f64,
}

struct ReferenceLayer<'m> {
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    /// The packed layer, for its norms.
    norms: &'m Layer,
}

/// Keys and values seen so far by one layer: a row of `kv_heads * head_dim` a token.
#[derive(Clone, Default)]
struct Memory {
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

/// A model unpacked for reading. Small models only: a weight takes a byte, a step takes every weight.
pub struct Reference<'m> {
    model: &'m Model,
    layers: Vec<ReferenceLayer<'m>>,
}

/// What a run of tokens gave.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Residual stream: `hidden[l][t]` before layer `l`, and after the last layer at `l = layers`; `[hidden]` each.
    pub hidden: Vec<Vec<Vec<f64>>>,
    /// `logits[t]`, `[vocab]` each.
    pub logits: Vec<Vec<f64>>,
}

impl<'m> Reference<'m> {
    /// Unpacks `model`.
    pub fn new(model: &'m Model) -> Self {
        let layers = model.layers.iter().map(|layer| ReferenceLayer {
            q: Matrix::unpack(&layer.q),
            k: Matrix::unpack(&layer.k),
            v: Matrix::unpack(&layer.v),
            o: Matrix::unpack(&layer.o),
            gate: Matrix::unpack(&layer.gate),
            up: Matrix::unpack(&layer.up),
            down: Matrix::unpack(&layer.down),
            norms: layer,
        });
        Reference { model, layers: layers.collect() }
    }

    /// Runs `tokens` from an empty memory.
    pub fn run(&self, tokens: &[u32]) -> Trace {
        let embedded = tokens.iter().map(|&t| self.embed(t)).collect();
        let mut trace = Trace { hidden: vec![embedded], logits: Vec::new() };
        for l in 0..self.layers.len() {
            let next = self.layer(l, &trace.hidden[l]);
            trace.hidden.push(next);
        }
        trace.logits = trace.hidden[self.layers.len()].iter().map(|x| self.logits(x)).collect();
        trace
    }

    /// The residual stream after layer `l` for tokens whose stream before it is `hidden`.
    pub fn layer(&self, l: usize, hidden: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let mut memory = Memory::default();
        hidden
            .iter()
            .enumerate()
            .map(|(position, x)| self.step(&self.layers[l], x, position, &mut memory))
            .collect()
    }

    /// The embedding of `token`.
    pub fn embed(&self, token: u32) -> Vec<f64> {
        table_row(&self.model.embedding, token as usize)
    }

    /// Final norm and head.
    pub fn logits(&self, x: &[f64]) -> Vec<f64> {
        let x = self.final_norm(x);
        (0..self.model.config.vocab)
            .map(|row| {
                let weights = match &self.model.head {
                    Head::Tied => table_row(&self.model.embedding, row),
                    Head::Own(table) => table_row(table, row),
                    Head::TwoStage(head) => {
                        table_row(head.own.as_ref().unwrap_or(&self.model.embedding), row)
                    }
                    Head::Blocks(matrix) => {
                        let mut numbers = vec![0.0f32; x.len()];
                        matrix.read(row, &mut numbers);
                        numbers.into_iter().map(f64::from).collect()
                    }
                    Head::Int8 { codes, scales } => codes[row * x.len()..(row + 1) * x.len()]
                        .iter()
                        .map(|&code| f64::from(code as i8) * f64::from(scales[row]))
                        .collect(),
                };
                dot(&weights, &x)
            })
            .collect()
    }

    /// The last RMSNorm.
    pub fn final_norm(&self, x: &[f64]) -> Vec<f64> {
        rms_norm(x, &self.model.final_norm, self.model.config.rms_eps)
    }

    /// One token through one layer.
    fn step(
        &self,
        layer: &ReferenceLayer<'_>,
        residual: &[f64],
        position: usize,
        memory: &mut Memory,
    ) -> Vec<f64> {
        let config = &self.model.config;
        let norms = layer.norms;

        // Attention.
        let x = rms_norm(residual, &norms.input_norm, config.rms_eps);
        let mut q = layer.q.multiply(&x);
        let mut k = layer.k.multiply(&x);
        let v = layer.v.multiply(&x);
        for head in q.chunks_mut(config.head_dim).chain(k.chunks_mut(config.head_dim)) {
            rotate(head, position, config);
        }
        memory.keys.push(k);
        memory.values.push(v);
        let mut heads = Vec::with_capacity(config.q_rows());
        for (h, query) in q.chunks(config.head_dim).enumerate() {
            heads.extend(attend(query, h / config.group(), memory, config));
        }
        if let Some(weight) = &norms.attn_sub_norm {
            heads = rms_norm(&heads, weight, config.rms_eps);
        }
        let after_attention = add(residual, &layer.o.multiply(&heads));

        // Feed-forward.
        let x = rms_norm(&after_attention, &norms.post_norm, config.rms_eps);
        let gate = layer.gate.multiply(&x);
        let up = layer.up.multiply(&x);
        let mut y: Vec<f64> =
            gate.iter().zip(&up).map(|(&g, &u)| activate(config.activation, g) * u).collect();
        if let Some(weight) = &norms.ffn_sub_norm {
            y = rms_norm(&y, weight, config.rms_eps);
        }
        add(&after_attention, &layer.down.multiply(&y))
    }
}

impl Matrix {
    fn unpack(linear: &TernaryLinear) -> Self {
        let shape = linear.shape;
        let mut codes = vec![0; shape.rows * shape.cols];
        for (row, codes) in codes.chunks_exact_mut(shape.cols).enumerate() {
            linear.unpack_row(row, codes);
        }
        Matrix {
            weights: codes.into_iter().map(|code| code as i8 - 1).collect(),
            cols: shape.cols,
            scale: f64::from(linear.scale),
        }
    }

    /// `W x` as the model does it: int8 activations with one scale, integer dot products.
    fn multiply(&self, x: &[f64]) -> Vec<f64> {
        let (codes, scale) = quantize(x);
        self.weights
            .chunks(self.cols)
            .map(|row| {
                let sum: i64 = row.iter().zip(&codes).map(|(&w, &a)| i64::from(w) * i64::from(a)).sum();
                sum as f64 * self.scale / scale
            })
            .collect()
    }
}

/// Activation codes and their scale: `s = 127 / max(max |x|, 1e-5)`, `round(x * s)` half to even.
pub fn quantize(x: &[f64]) -> (Vec<i8>, f64) {
    let scale = 127.0 / x.iter().fold(1e-5, |max: f64, v| max.max(v.abs()));
    (x.iter().map(|v| (v * scale).round_ties_even().clamp(-128.0, 127.0) as i8).collect(), scale)
}

/// `x / sqrt(mean(x^2) + eps) * weight`.
pub fn rms_norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = dot(x, x) / x.len() as f64;
    let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(v, &w)| v * inverse * f64::from(w)).collect()
}

/// Rotary embedding of one head, pairs `(i, i + d/2)`.
fn rotate(head: &mut [f64], position: usize, config: &ModelConfig) {
    let half = head.len() / 2;
    for i in 0..half {
        let inv_freq = (1.0 / config.rope_theta.powf((2 * i) as f64 / head.len() as f64)) as f32;
        let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

/// Softmax attention of one query head over everything in `memory`.
fn attend(query: &[f64], kv_head: usize, memory: &Memory, config: &ModelConfig) -> Vec<f64> {
    let own = kv_head * config.head_dim..(kv_head + 1) * config.head_dim;
    let scale = 1.0 / (config.head_dim as f64).sqrt();
    let logits: Vec<f64> = memory.keys.iter().map(|key| dot(query, &key[own.clone()]) * scale).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|z| (z - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; config.head_dim];
    for (weight, value) in weights.iter().zip(&memory.values) {
        for (o, v) in out.iter_mut().zip(&value[own.clone()]) {
            *o += weight / total * v;
        }
    }
    out
}

fn activate(activation: Activation, gate: f64) -> f64 {
    match activation {
        Activation::Relu2 => gate.max(0.0).powi(2),
        Activation::Silu => gate / (1.0 + (-gate).exp()),
    }
}

fn table_row(table: &Table, row: usize) -> Vec<f64> {
    let bytes = table.bytes(row..row + 1);
    match table.format() {
        TableFormat::Bf16 => {
            let bits = bytes.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b)) << 16);
            bits.map(|bits| f64::from(f32::from_bits(bits))).collect()
        }
        TableFormat::F32 => {
            bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(x, y)| x + y).collect()
}
