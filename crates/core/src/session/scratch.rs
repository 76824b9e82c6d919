//! Everything a pass writes beside the KV cache, allocated once for a number of tokens and threads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, RwLock};

use longbit_kernels::{ColumnShape, Planes, Quantized, TILE_ROWS, TernaryShape};
use longbit_sys::{Shared, Worker};

use super::Traffic;
use super::capture::Capture;
use super::profile::{Clock, OpTotal};
use super::stage::{Stage, shares, stripes};
use crate::attention::prefill::{Decision, Scorer, Seen, TILE};
use crate::attention::tasks::{Task, most_tasks};
use crate::attention::{Retained, Selection, partial};
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

/// The first `len` numbers of a buffer that grows and never shrinks: what it holds is anyone's guess, and nobody pays for
/// clearing it once more.
pub(super) fn room<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
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
    /// Rows that remain of a head.
    pub(super) compaction: Retained,
    /// Tokens of all tasks of a step.
    pub(super) pieces: Vec<Range<usize>>,
    /// Tasks of a step: KV head and range of `pieces`. Those of a prompt's tokens: token and range.
    pub(super) tasks: Vec<Task>,
    /// What tokens of a prompt see.
    pub(super) seen: Seen,
    /// Rows that one of them sees.
    pub(super) spans: Vec<Range<usize>>,
    /// Scores that a pattern of a prompt decides by.
    pub(super) scorer: Scorer,
    /// Rows or columns that a sparse product takes.
    pub(super) listed: Vec<u32>,
    /// What the head multiplies, rounded for rows in blocks.
    pub(super) planes: Planes,
    /// Rows of a two-stage head that are scored exactly after the coarse ones, and their logits.
    pub(super) survivors: Vec<u32>,
    /// One a survivor.
    pub(super) exact: Vec<f32>,
    /// Lower bounds of logits.
    pub(super) lower: Vec<f32>,
    /// Stripes of the vocabulary that the thread scored.
    pub(super) scored: Vec<usize>,
    /// Rows of a two-stage head that the pass scored with the bf16 table.
    pub(super) rescored: u64,
    /// Laps of a profile.
    pub(super) clock: Clock,
}

/// See the module.
pub(super) struct Scratch {
    tokens: usize,
    layers: usize,
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
    /// What a pattern decided, `[kv_heads][blocks of tokens]`.
    pub(super) decisions: Vec<RwLock<Decision>>,
    /// Blocks that the tokens of a pass lie in, at the most.
    pub(super) most_decisions: usize,
    /// One stripe a decode attention task.
    pub(super) partials: Shared<f32>,
    /// Largest logits of a decode attention task, one a head of the group; one stripe a task.
    pub(super) largest: Shared<f32>,
    /// Attention output `[kv_heads][blocks][BLOCK_TOKENS][group * head_dim]`; one stripe a (KV head, block).
    pub(super) attn: Shared<f32>,
    /// Blocks of tokens a KV head.
    pub(super) blocks: usize,
    /// Normalised rows that the head reads, one stripe a token.
    pub(super) normed: Shared<f32>,
    /// Logits `[stripe][tokens][rows of the stripe]`; of one token `[vocab]`.
    pub(super) logits: Shared<f32>,
    /// Rows of each stripe of `logits`; see [`Stage`].
    pub(super) vocab: Vec<Range<usize>>,
    /// One a thread.
    pub(super) private: Vec<Mutex<Private>>,
    /// What is taken of the small stripes of each thread, `[phase % QUEUES][thread]`.
    queues: Vec<Queue>,
    /// How many tasks of the attention of each layer were taken that are nobody's.
    tickets: Vec<Ticket>,
    /// What the last captured step did; nothing before the first.
    pub(super) capture: OnceLock<Capture>,
    failure: Mutex<Option<Error>>,
    kv_bytes: AtomicU64,
    index_bytes: AtomicU64,
    rows: AtomicU64,
    skipped: AtomicU64,
}

/// Phases that have queues of their own. While one is under way the queues of the next are emptied, and those of the one
/// before may still be looked at by threads that have not come to the barrier: three.
const QUEUES: usize = 3;

/// Numbers that are taken once each, from both ends; on lines of its own (two, for the adjacent-line prefetcher).
#[derive(Default)]
#[repr(align(128))]
struct Queue(AtomicU64);

impl Queue {
    /// How many were taken from the end, in the upper half; from the front, in the lower.
    const BACK: u64 = 1 << 32;

    /// Takes one of `0..count`: the first that is left, or the last.
    fn take(&self, count: usize, last: bool) -> Option<usize> {
        let step = if last { Self::BACK } else { 1 };
        let left = |taken: u64| ((taken % Self::BACK + taken / Self::BACK) as usize) < count;
        let taken =
            self.0.fetch_update(Relaxed, Relaxed, |taken| left(taken).then_some(taken + step)).ok()?;
        Some(if last { count - 1 - (taken / Self::BACK) as usize } else { (taken % Self::BACK) as usize })
    }
}

/// Hands out the numbers from 0, each once a pass; on lines of its own, as a [`Queue`].
#[derive(Default)]
#[repr(align(128))]
struct Ticket(AtomicUsize);

/// A phase of a pass in which threads take work from one another. Every pass goes through all of them, in the order of
/// [`Phase::place`], with a barrier between two.
#[derive(Clone, Copy)]
pub(super) enum Phase {
    /// Query, key and value projections of a layer.
    Qkv(usize),
    /// Output projection of a layer.
    Output(usize),
    /// Gate and up projections of a layer.
    GateUp(usize),
    /// Down projection of a layer.
    Down(usize),
    /// The head.
    Head,
}

impl Phase {
    /// Place in a pass through `layers`.
    fn place(self, layers: usize) -> usize {
        match self {
            Phase::Qkv(l) => 4 * l,
            Phase::Output(l) => 4 * l + 1,
            Phase::GateUp(l) => 4 * l + 2,
            Phase::Down(l) => 4 * l + 3,
            Phase::Head => 4 * layers,
        }
    }
}

/// Rows of the vocabulary in stripes of whole tiles, for the head formats that have them.
fn vocabulary_stripes(vocab: usize, threads: usize, tokens: usize) -> Vec<Range<usize>> {
    /// Tiles in small stripes, in percent of all.
    const REST: usize = 12;
    /// Tiles of a small stripe.
    const BLOCK: usize = 32;
    let tiles = vocab.div_ceil(TILE_ROWS);
    let stripes = if tokens == 1 { stripes(tiles, threads, REST, BLOCK) } else { shares(tiles, threads) };
    let rows = |tiles: Range<usize>| vocab.min(tiles.start * TILE_ROWS)..vocab.min(tiles.end * TILE_ROWS);
    stripes.into_iter().map(rows).collect()
}

impl Scratch {
    pub(super) fn new(config: &ModelConfig, threads: usize, tokens: usize, capacity: usize) -> Self {
        let [q, k, v, o, gate, _, down] = config.linears().map(|(_, rows, cols)| TernaryShape { rows, cols });
        let stage = |name, parts: &[TernaryShape]| Stage::new(name, parts, tokens, threads);
        let (heads, width) = (config.kv_heads, config.group() * config.head_dim);
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let block = BLOCK_TOKENS.min(tokens);
        let slot = config.group() * partial::stride(config.head_dim);
        let slots = if tokens == 1 { heads * most_tasks(capacity) } else { 0 };
        // Prefill reads the matrices whole.
        let sums = if tokens == 1 { ColumnShape { rows: config.hidden, cols: 1 }.padded_rows() } else { 1 };
        let vocab = vocabulary_stripes(config.vocab, threads, tokens);
        // A block is a tile at the least, and need not begin where the pass does.
        let most_decisions = if tokens == 1 { 0 } else { tokens.div_ceil(TILE) + 1 };
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
            decisions: (0..heads * most_decisions).map(|_| RwLock::default()).collect(),
            most_decisions,
            partials: Shared::even(slots.max(1), slot, slots.max(1), 0.0).named("partials"),
            largest: Shared::even(slots.max(1), config.group(), slots.max(1), 0.0).named("largest logits"),
            attn: Shared::even(heads * blocks, block * width, heads * blocks, 0.0).named("attention output"),
            blocks,
            normed: Shared::even(tokens, config.hidden, tokens, 0.0).named("normalised rows"),
            logits: Shared::striped(bounds[bounds.len() - 1], &bounds, 0.0).named("logits"),
            vocab,
            private: (0..threads).map(|_| Mutex::default()).collect(),
            layers: config.layers,
            queues: (0..QUEUES * threads).map(|_| Queue::default()).collect(),
            tickets: (0..config.layers).map(|_| Ticket::default()).collect(),
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

    /// Adds to the bytes of weights that the step did not read: those of a matrix, less those that a thread did read. The
    /// sum over the threads is not negative.
    pub(super) fn count_skipped(&self, whole: usize, read: usize) {
        self.skipped.fetch_add((whole as u64).wrapping_sub(read as u64), Relaxed);
    }

    /// A pass begins.
    pub(super) fn reset_queues(&self) {
        self.queues.iter().for_each(|queue| queue.0.store(0, Relaxed));
        self.tickets.iter().for_each(|ticket| ticket.0.store(0, Relaxed));
    }

    /// The next number of the attention of layer `l` that no thread has had yet. What is done with it is ordered by barriers
    /// alone.
    pub(super) fn ticket(&self, l: usize) -> usize {
        self.tickets[l].0.fetch_add(1, Relaxed)
    }

    /// The stripes out of `count` that the worker takes: its own in their order, then of others what they have not come to
    /// yet, from their ends. What is done with a stripe is ordered by barriers alone.
    pub(super) fn stripes<'a>(
        &'a self,
        phase: Phase,
        worker: &Worker<'_>,
        count: usize,
    ) -> impl Iterator<Item = usize> + 'a {
        let (threads, me) = (worker.count(), worker.index());
        let each = count / threads;
        let place = phase.place(self.layers);
        let queue = move |place: usize, w: usize| &self.queues[place % QUEUES * threads + w];
        queue(place + 1, me).0.store(0, Relaxed);
        let mut victim = 0;
        let small = move || {
            while victim < threads && each > 1 {
                let w = (me + victim) % threads;
                if let Some(i) = queue(place, w).take(each - 1, victim > 0) {
                    return Some(w * each + 1 + i);
                }
                victim += 1;
            }
            None
        };
        std::iter::once(me * each).chain(std::iter::from_fn(small))
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_gives_each_number_once_from_both_ends() {
        let queue = Queue::default();
        let taken: Vec<_> = [false, true, true, false, false].map(|last| queue.take(4, last)).into();
        assert_eq!(taken, [Some(0), Some(3), Some(2), Some(1), None]);
        assert_eq!((queue.take(4, true), Queue::default().take(0, true)), (None, None));
    }

    #[test]
    fn the_threads_take_every_stripe_of_every_phase_once() {
        let config = crate::model::preset("tiny").unwrap();
        for threads in [1, 2, 3] {
            let scratch = Scratch::new(&config, threads, 1, 64);
            let team = longbit_sys::Team::oversubscribed(threads).unwrap();
            for each in [1, 2, 9] {
                let phases: Vec<Phase> = (0..config.layers)
                    .flat_map(|l| [Phase::Qkv(l), Phase::Output(l), Phase::GateUp(l), Phase::Down(l)])
                    .chain([Phase::Head])
                    .collect();
                let taken: Vec<_> = phases.iter().map(|_| Mutex::new(Vec::new())).collect();
                scratch.reset_queues();
                team.run(|worker| {
                    for (i, &phase) in phases.iter().enumerate() {
                        let stripes = scratch.stripes(phase, worker, threads * each);
                        for (nth, stripe) in stripes.enumerate() {
                            assert!(nth > 0 || stripe == worker.index() * each);
                            // The first thread is slow: the others take from it.
                            if worker.index() == 0 {
                                std::thread::yield_now();
                            }
                            taken[i].lock().unwrap().push(stripe);
                        }
                        worker.barrier();
                    }
                });
                for taken in taken {
                    let mut taken = taken.into_inner().unwrap();
                    taken.sort_unstable();
                    assert_eq!(taken, (0..threads * each).collect::<Vec<_>>());
                }
            }
        }
    }
}
