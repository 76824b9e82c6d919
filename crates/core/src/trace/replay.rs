//! What a trace needs around it to be replayed: a context, a model of its shape, and its identity.
//!
//! **Contexts.** Query `i` of a trace saw the keys of tokens `0..=tokens - steps + i`. A cache is therefore filled with
//! the first `context` tokens, all of them, and what follows is decoded: truthful for `tokens - steps <= context < tokens`.
//! The queries before `context` are then the last of a prompt, for methods that look at those. A shorter context would
//! need queries that were not recorded, or give the recorded ones other keys than they saw.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Trace, TraceShape};
use crate::error::{Error, Result};
use crate::model::{Activation, ModelConfig};

/// Base of the rotary embedding where the file does not name it: that of LLaMA, and the default of `config.json`.
const ROPE_THETA: f64 = 10_000.0;
/// Vocabulary of a model that is made for a trace: its head is no part of what the trace stands for.
const VOCAB: usize = 1024;
/// The width of its feed-forward block is 8/3 of the hidden one, rounded up to a multiple of this (LLaMA's rule).
const INTERMEDIATE_UNIT: usize = 256;
/// Bytes that are hashed together.
const PIECE: usize = 16 << 20;

impl TraceShape {
    /// Decode steps, and queries of the prompt before them, that a context leaves; none where it is not one of the trace.
    pub fn split_at(&self, context: usize) -> Option<(usize, usize)> {
        let prompt = context.checked_sub(self.context())?;
        (prompt < self.steps).then(|| (self.steps - prompt, prompt))
    }
}

impl Trace {
    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// SHA-256 of the file, lower-case hexadecimal; reads all of it, and keeps none of it resident.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for start in (0..self.map.len()).step_by(PIECE) {
            let piece = start..self.map.len().min(start + PIECE);
            hash.update(&self.map[piece.clone()]);
            self.map.release(piece);
        }
        crate::hex(&hash.finalize())
    }

    /// Gives the memory of the keys and values of a (layer, KV head) back to the system; they can be read again.
    ///
    /// # Panics
    /// When layer or head are outside of the shape.
    pub fn release(&self, layer: usize, kv_head: usize) {
        let s = self.shape;
        assert!(layer < s.layers && kv_head < s.kv_heads, "head outside of the trace");
        let bytes = s.tokens * s.head_dim * self.width();
        for start in &self.starts[..2] {
            let from = start + (layer * s.kv_heads + kv_head) * bytes;
            self.map.release(from..from + bytes);
        }
    }

    /// Base of the rotary embedding, where the writer said it.
    ///
    /// # Errors
    /// A word that is no number above 1.
    pub fn rope_theta(&self) -> Result<Option<f64>> {
        let Some(word) = self.metadata.get("rope_theta") else { return Ok(None) };
        match word.parse::<f64>().ok().filter(|theta| theta.is_finite() && *theta > 1.0) {
            Some(theta) => Ok(Some(theta)),
            None => Err(Error::Config {
                path: self.path.clone(),
                reason: format!("rope_theta is {word:?} in __metadata__; a number above 1 was expected"),
            }),
        }
    }

    /// Decode steps, and queries of the prompt before them, at `context`.
    ///
    /// # Errors
    /// A context that the trace cannot serve, with those that it can.
    pub fn steps_at(&self, context: usize) -> Result<(usize, usize)> {
        let s = self.shape;
        s.split_at(context).ok_or_else(|| {
            let (first, last) = (s.context(), s.tokens - 1);
            let range = if first == last { first.to_string() } else { format!("{first} to {last}") };
            Error::Invalid(format!(
                "{} cannot be replayed at a context of {context}: it has {} tokens and the queries of the last {}, which saw all \
                 tokens before them; contexts that work: {range}",
                self.path.display(),
                s.tokens,
                s.steps
            ))
        })
    }

    /// The shape of a model with exactly the attention of the trace. The rest, which a trace does not tell: as wide as its
    /// heads together, a feed-forward block of 8/3 of that (rounded up to 256), relu2 with sub-norms, a tied head of 1,024
    /// tokens, and a rotary base of 10,000 where the file names none.
    ///
    /// # Errors
    /// A shape that no model can have, e.g. an odd head dimension.
    pub fn model_config(&self) -> Result<ModelConfig> {
        let TraceShape { layers, heads, kv_heads, head_dim, .. } = self.shape;
        let fail = |reason| Error::Config { path: self.path.clone(), reason };
        let hidden = heads
            .checked_mul(head_dim)
            .filter(|&hidden| hidden <= 1 << 24)
            .ok_or_else(|| fail(format!("has {heads} heads of {head_dim} numbers, which are too many")))?;
        let config = ModelConfig {
            name: "trace".into(),
            vocab: VOCAB,
            hidden,
            intermediate: (8 * hidden).div_ceil(3).next_multiple_of(INTERMEDIATE_UNIT),
            layers,
            heads,
            kv_heads,
            head_dim,
            rope_theta: self.rope_theta()?.unwrap_or(ROPE_THETA),
            rms_eps: 1e-5,
            activation: Activation::Relu2,
            sub_norms: true,
            tied_head: true,
            trained_positions: 0,
        };
        config.check().map_err(fail)?;
        Ok(config)
    }

    /// Checks that a model of shape `config` can be given this attention: layers, heads, head dimension and, where the file
    /// names it, the rotary base are the same.
    ///
    /// # Errors
    /// What differs, and how a model of the right shape is had.
    pub fn check_model(&self, config: &ModelConfig) -> Result<()> {
        let s = self.shape;
        let counts = [
            ("layers", s.layers, config.layers),
            ("query heads", s.heads, config.heads),
            ("KV heads", s.kv_heads, config.kv_heads),
            ("numbers a head", s.head_dim, config.head_dim),
        ];
        let mut differs: Vec<String> = counts
            .iter()
            .filter(|(_, trace, model)| trace != model)
            .map(|(what, trace, model)| format!("{trace} {what}, the model {model}"))
            .collect();
        if let Some(theta) = self.rope_theta()?.filter(|theta| *theta != config.rope_theta) {
            differs.push(format!("a rotary base of {theta}, the model {}", config.rope_theta));
        }
        if differs.is_empty() {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{} is not of the shape of the model {}: the trace has {}; model.preset = \"trace\" takes its shape from the trace",
            self.path.display(),
            config.name,
            differs.join("; it has ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{TraceFormat, TraceRows, preset, write_trace};

    fn trace(shape: TraceShape, metadata: &[(&str, &str)]) -> (tempfile::TempDir, Trace) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let kv = vec![0.5; shape.layers * shape.kv_heads * shape.tokens * shape.head_dim];
        let queries = vec![1.0; shape.layers * shape.heads * shape.steps * shape.head_dim];
        let rows = TraceRows { shape, keys: kv.clone(), values: kv, queries };
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        write_trace(&path, &rows, TraceFormat::F32, metadata).unwrap();
        let trace = Trace::open(&path).unwrap();
        (dir, trace)
    }

    const SHAPE: TraceShape =
        TraceShape { layers: 4, heads: 4, kv_heads: 2, head_dim: 64, tokens: 10, steps: 3 };

    #[test]
    fn contexts_leave_steps_and_queries_of_the_prompt() {
        let (_dir, trace) = trace(SHAPE, &[]);
        assert_eq!([7, 8, 9].map(|context| trace.steps_at(context).unwrap()), [(3, 0), (2, 1), (1, 2)]);
        for context in [0, 6, 10, usize::MAX] {
            let message = trace.steps_at(context).unwrap_err().to_string();
            assert!(message.contains("contexts that work: 7 to 9"), "{message}");
        }
        let (_dir, one) = self::trace(TraceShape { steps: 1, ..SHAPE }, &[]);
        let message = one.steps_at(4).unwrap_err().to_string();
        assert!(message.ends_with("contexts that work: 9"), "{message}");
    }

    #[test]
    fn a_model_is_made_to_the_shape_or_must_have_it() {
        let (_dir, same) = trace(SHAPE, &[("rope_theta", "500000")]);
        let tiny = preset("tiny").unwrap();
        same.check_model(&tiny).unwrap();
        let made = same.model_config().unwrap();
        same.check_model(&made).unwrap();
        assert_eq!((made.hidden, made.intermediate, made.rope_theta), (256, 768, 500_000.0));
        let (_dir, wide) = trace(TraceShape { heads: 32, kv_heads: 8, head_dim: 128, ..SHAPE }, &[]);
        let made = wide.model_config().unwrap();
        // The feed-forward width of LLaMA 7B.
        assert_eq!((made.hidden, made.intermediate, made.rope_theta), (4096, 11_008, 10_000.0));
        let message = wide.check_model(&preset("bitnet-2b-4t").unwrap()).unwrap_err().to_string();
        for part in
            ["4 layers, the model 30", "8 KV heads, the model 5", "model.preset = \"trace\"", "bitnet-2b-4t"]
        {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains("numbers a head"), "{message}");
        let (_dir, turned) = trace(SHAPE, &[("rope_theta", "10000.0")]);
        let message = turned.check_model(&tiny).unwrap_err().to_string();
        assert!(message.contains("a rotary base of 10000, the model 500000"), "{message}");
    }

    #[test]
    fn what_cannot_be_a_model_says_why() {
        let (_dir, odd) = trace(TraceShape { head_dim: 5, ..SHAPE }, &[]);
        let message = odd.model_config().unwrap_err().to_string();
        assert!(message.contains("head_dim is 5") && message.contains("t.safetensors"), "{message}");
        for word in ["ten", "1", "NaN", "inf", "-3"] {
            let (_dir, wrong) = trace(SHAPE, &[("rope_theta", word)]);
            let message = wrong.model_config().unwrap_err().to_string();
            assert!(message.contains(&format!("rope_theta is {word:?}")), "{message}");
        }
    }

    #[test]
    fn the_hash_is_that_of_the_file() {
        let (_dir, trace) = trace(SHAPE, &[]);
        let bytes = std::fs::read(trace.path()).unwrap();
        assert_eq!(trace.sha256(), crate::hex(&Sha256::digest(&bytes)));
        assert_eq!(trace.bytes(), bytes.len() as u64);
        let mut before = Vec::new();
        trace.keys(3, 1, 0..10, &mut before).unwrap();
        trace.release(3, 1);
        let mut after = Vec::new();
        trace.keys(3, 1, 0..10, &mut after).unwrap();
        assert_eq!(before, after);
    }
}
