//! Dense attention that keeps the queries it is asked with, for traces.

use std::sync::{Arc, Mutex};

use super::{Attention, GroupQuery, HeadMethod, MethodSpec, Selection};
use crate::error::Result;
use crate::kv::{KvCache, KvHead};

/// The queries of decode steps, of each (layer, KV head).
#[derive(Debug, Default)]
pub struct Recording {
    /// `[layers * kv_heads]`, each `[steps][group][head_dim]`.
    heads: Vec<Mutex<Vec<f32>>>,
}

impl Recording {
    /// Queries `[steps][group][head_dim]` of (layer, KV head) number `i`, as RoPE left them.
    ///
    /// # Panics
    /// When there is no such head.
    pub fn queries(&self, i: usize) -> Vec<f32> {
        self.heads[i].lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

struct Recorder {
    recording: Arc<Recording>,
    head: usize,
}

impl HeadMethod for Recorder {
    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        out.spans.push(0..kv.len());
        let mut rows = query.rows.to_vec();
        kv.restore_keys(&mut rows);
        let root = (query.head_dim as f32).sqrt();
        let mut kept = self.recording.heads[self.head].lock().unwrap_or_else(|e| e.into_inner());
        kept.extend(rows.iter().map(|x| x * root));
    }
}

impl Attention {
    /// Dense attention for `cache` that keeps the queries of every decode step.
    ///
    /// # Errors
    /// None that a caller could mend: the method `dense` is always there.
    pub fn recording(cache: &KvCache) -> Result<(Attention, Arc<Recording>)> {
        let spec = MethodSpec::parse("dense")?;
        let shape = cache.shape();
        let count = shape.layers * shape.kv_heads;
        let recording = Arc::new(Recording { heads: (0..count).map(|_| Mutex::default()).collect() });
        let state = |head| {
            let recorder = Recorder { recording: recording.clone(), head };
            Mutex::new(Box::new(recorder) as Box<dyn HeadMethod>)
        };
        let heads = (0..count).map(state).collect();
        Ok((
            Attention { spec, kv_heads: shape.kv_heads, heads, boards: Vec::new(), prefill: None },
            recording,
        ))
    }
}
