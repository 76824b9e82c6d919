//! Everything a pass writes beside the KV cache, allocated once for a number of tokens and threads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, RwLock};

use longbit_kernels::{ColumnShape, Planes, Quantized, TILE_ROWS, TernaryShape};
use longbit_sys::Shared;

use super::Traffic;
use super::profile::{Clock, OpTotal};
use super::stage::Stage;
use crate::attention::{CHUNK_TOKENS, Selection, partial};
use crate::error::Error;
use crate::kv::KvScratch;
use crate::model::ModelConfig;

/// Tokens of a prefill attention task.
pub(super) const BLOCK_TOKENS: usize = 16;

/// Quantised activations that all threads read; one stripe a token.
pub(super) struct ActBuffer {
    pub(super) codes: Shared<i8>,
    pub(super) quantized: Shared<Quantized>,
    pub(super) padded: usize,
}

impl ActBuffer {
    fn new(cols: usize, tokens: usize) -> Self {
        let padded = TernaryShape { rows: 1, cols }.padded_cols();
        ActBuffer {
            codes: Shared::even(tokens, padded, tokens, 0).named("codes"),
            quantized: Shared::even(tokens, 1, tokens, Quantized { scale: 1.0, sum: 0 })
                .named("activation scales"),
            padded,
        }
    }
}

/// What one thread keeps to itself.
#[derive(Default)]
pub(super) struct Private {
    /// Residual stream of the tokens that the thread owns, `[owned][hidden]`.
    pub(super) residual: Vec<f32>,
    /// A row of any width.
    pub(super) row: Vec<f32>,
    /// Another.
    pub(super) row2: Vec<f32>,
    /// Codes of the only token of a decode step.
    pub(super) codes: Vec<i8>,
    /// Gate rows before the activation.
    pub(super) gate: Vec<f32>,
    /// Up rows before the activation.
    pub(super) up: Vec<f32>,
    /// Attention weights.
    pub(super) weights: Vec<f32>,
    /// Attention accumulators.
    pub(super) attend: Vec<f32>,
    /// What the KV dtype needs.
    pub(super) kv: KvScratch,
    /// Factors of merged partials.
    pub(super) factors: Vec<f32>,
    /// Partials of a prefill block.
    pub(super) partials: Vec<f32>,
    /// Tokens of all tasks of a step.
    pub(super) pieces: Vec<Range<usize>>,
    /// Tasks of a step: KV head and range of `pieces`.
    pub(super) tasks: Vec<(usize, Range<usize>)>,
    /// Rows or columns that a sparse product takes.
    pub(super) listed: Vec<u32>,
    /// What the head multiplies, rounded for rows in blocks.
    pub(super) planes: Planes,
    /// Rows of a two-stage head that the pass scored exactly after the coarse ones, and their logits.
    pub(super) survivors: Vec<u32>,
    /// One a survivor.
    pub(super) exact: Vec<f32>,
    /// Lower bounds of logits.
    pub(super) lower: Vec<f32>,
    /// Rows of a two-stage head that the pass scored with the bf16 table.
    pub(super) rescored: u64,
    /// Laps of a profile.
    pub(super) clock: Clock,
}

/// See the module.
pub(super) struct Scratch {
    tokens: usize,
    /// Query, key and value rows.
    pub(super) qkv: Stage,
    /// Output projection.
    pub(super) o: Stage,
    /// Activated feed-forward rows.
    pub(super) ffn: Stage,
    /// Down projection.
    pub(super) down: Stage,
    /// Integer sums of a down projection that skips columns, one stripe a thread.
    pub(super) down_sums: Shared<i32>,
    /// Acts of width `hidden`.
    pub(super) hidden_acts: ActBuffer,
    /// Acts of width `heads * head_dim`.
    pub(super) attn_acts: ActBuffer,
    /// Acts of width `intermediate`.
    pub(super) ffn_acts: ActBuffer,
    /// Rotated, scaled queries `[kv_heads][tokens][group * head_dim]`; one stripe a KV head.
    pub(super) queries: Shared<f32>,
    /// One a KV head.
    pub(super) selections: Vec<RwLock<Selection>>,
    /// One stripe a decode attention task.
    pub(super) partials: Shared<f32>,
    /// Attention output `[kv_heads][blocks][BLOCK_TOKENS][group * head_dim]`; one stripe a (KV head, block).
    pub(super) attn: Shared<f32>,
    /// Blocks of tokens a KV head.
    pub(super) blocks: usize,
    /// Normalised rows that the head reads, one stripe a token.
    pub(super) normed: Shared<f32>,
    /// Logits `[thread][tokens][vocabulary share]`.
    pub(super) logits: Shared<f32>,
    /// First number of each stripe of `logits`.
    pub(super) vocab: Vec<Range<usize>>,
    /// One a thread.
    pub(super) private: Vec<Mutex<Private>>,
    capture: OnceLock<Shared<f32>>,
    failure: Mutex<Option<Error>>,
    kv_bytes: AtomicU64,
    index_bytes: AtomicU64,
    rows: AtomicU64,
    skipped: AtomicU64,
}

/// Rows of the head that thread `w` owns: whole tiles, for the formats that have them.
fn vocabulary_share(vocab: usize, w: usize, threads: usize) -> Range<usize> {
    let tiles = longbit_sys::share(vocab.div_ceil(TILE_ROWS), w, threads);
    vocab.min(tiles.start * TILE_ROWS)..vocab.min(tiles.end * TILE_ROWS)
}

/// Largest number of tasks that one KV head's selection makes: two consecutive tasks hold more than a chunk together.
pub(super) fn max_tasks(capacity: usize) -> usize {
    2 * capacity.div_ceil(CHUNK_TOKENS) + 2
}

impl Scratch {
    pub(super) fn new(config: &ModelConfig, threads: usize, tokens: usize, capacity: usize) -> Self {
        let [q, k, v, o, gate, _, down] = config.linears().map(|(_, rows, cols)| TernaryShape { rows, cols });
        let stage = |name, parts: &[TernaryShape]| Stage::new(name, parts, tokens, threads);
        let (heads, width) = (config.kv_heads, config.group() * config.head_dim);
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let block = BLOCK_TOKENS.min(tokens);
        let slot = config.group() * partial::stride(config.head_dim);
        let slots = if tokens == 1 { heads * max_tasks(capacity) } else { 0 };
        // Prefill reads the matrices whole.
        let sums = if tokens == 1 { ColumnShape { rows: config.hidden, cols: 1 }.padded_rows() } else { 1 };
        let vocab: Vec<_> = (0..threads).map(|w| vocabulary_share(config.vocab, w, threads)).collect();
        let mut bounds = vec![0];
        for share in &vocab {
            bounds.push(bounds[bounds.len() - 1] + share.len() * tokens);
        }
        Scratch {
            tokens,
            qkv: stage("query, key and value rows", &[q, k, v]),
            o: stage("output projection", &[o]),
            ffn: stage("feed-forward rows", &[gate]),
            down: stage("down projection", &[down]),
            down_sums: Shared::even(threads, sums, threads, 0).named("down sums"),
            hidden_acts: ActBuffer::new(config.hidden, tokens),
            attn_acts: ActBuffer::new(config.q_rows(), tokens),
            ffn_acts: ActBuffer::new(config.intermediate, tokens),
            queries: Shared::even(heads, tokens * width, heads, 0.0).named("queries"),
            selections: (0..heads).map(|_| RwLock::default()).collect(),
            partials: Shared::even(slots.max(1), slot, slots.max(1), 0.0).named("partials"),
            attn: Shared::even(heads * blocks, block * width, heads * blocks, 0.0).named("attention output"),
            blocks,
            normed: Shared::even(tokens, config.hidden, tokens, 0.0).named("normalised rows"),
            logits: Shared::striped(bounds[threads], &bounds, 0.0).named("logits"),
            vocab,
            private: (0..threads).map(|_| Mutex::default()).collect(),
            capture: OnceLock::new(),
            failure: Mutex::default(),
            kv_bytes: AtomicU64::new(0),
            index_bytes: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
        }
    }

    /// Largest number of tokens.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Keeps what went wrong in a pass; of several things that which stands first in the model.
    pub(super) fn fail(&self, error: Error) {
        let place = |error: &Error| match error {
            Error::Unstorable { layer, kv_head, .. } => (*layer, *kv_head),
            _ => (0, 0),
        };
        let mut kept = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        if kept.as_ref().is_none_or(|kept| place(&error) < place(kept)) {
            *kept = Some(error);
        }
    }

    /// What went wrong in the pass, if anything did; starts anew.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).take()
    }

    /// Adds to what the step read.
    pub(super) fn count(&self, kv_bytes: u64, index_bytes: u64, rows: u64) {
        self.kv_bytes.fetch_add(kv_bytes, Relaxed);
        self.index_bytes.fetch_add(index_bytes, Relaxed);
        self.rows.fetch_add(rows, Relaxed);
    }

    /// Adds to the bytes of weights that the step did not read.
    pub(super) fn count_skipped(&self, bytes: usize) {
        self.skipped.fetch_add(bytes as u64, Relaxed);
    }

    /// What the step read; starts counting anew.
    pub(super) fn take_traffic(&self) -> Traffic {
        Traffic {
            kv_bytes: self.kv_bytes.swap(0, Relaxed),
            index_bytes: self.index_bytes.swap(0, Relaxed),
            rows: self.rows.swap(0, Relaxed),
            skipped_weight_bytes: self.skipped.swap(0, Relaxed),
        }
    }

    /// The laps of each thread, `[thread][operation]`; starts anew.
    pub(super) fn take_laps(&self) -> Vec<Vec<OpTotal>> {
        self.private.iter().map(|p| p.lock().unwrap_or_else(|e| e.into_inner()).clock.take()).collect()
    }

    /// Makes room for captured attention output.
    pub(super) fn prepare_capture(&self, config: &ModelConfig) {
        let stripes = config.layers * config.kv_heads;
        self.capture.get_or_init(|| {
            Shared::even(stripes, config.group() * config.head_dim, stripes, 0.0).named("capture")
        });
    }

    /// Keeps the attention output of (`layer`, `kv_head`), stripe `layer * kv_heads + kv_head`.
    pub(super) fn capture(&self, stripe: usize, output: &[f32]) {
        if let Some(capture) = self.capture.get() {
            capture.write(stripe).copy_from_slice(output);
        }
    }

    /// The captured attention output, `[layers][heads][head_dim]`; empty when none was.
    pub(super) fn captured(&self) -> Vec<f32> {
        self.capture.get().map(|c| c.read().to_vec()).unwrap_or_default()
    }
}
