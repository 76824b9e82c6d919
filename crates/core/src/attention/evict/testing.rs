//! A layer for tests of methods that evict, small, and what is to be left of its scores.

use std::sync::{Arc, RwLockReadGuard};

use longbit_kernels::Kernels;
use longbit_sys::Team;

use super::super::partial::finish;
use super::super::testing::generator;
use super::super::{GroupQuery, HeadMethod, MethodShape, Place, Prompt, Selection, method};
use super::{Board, Occasion, Retained};
use crate::kv::{CacheShape, KvCache, KvHead, kv_dtype};
use crate::model::RopeTable;

pub(super) const D: usize = 32;
pub(super) const GROUP: usize = 2;
pub(super) const CAPACITY: usize = 2048;

pub(super) fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut next = generator(seed.wrapping_mul(2_654_435_761).wrapping_add(1));
    (0..n).map(|_| next() + next()).collect()
}

/// A layer that a method serves as a session does.
pub(super) struct Layer {
    pub(super) cache: KvCache,
    pub(super) states: Vec<Box<dyn HeadMethod>>,
    pub(super) keys: Vec<Vec<f32>>,
    pub(super) values: Vec<Vec<f32>>,
}

impl Layer {
    pub(super) fn new(spec: &str, dtype: &str, heads: usize) -> Self {
        let shape = CacheShape { layers: 1, kv_heads: heads, head_dim: D, capacity: CAPACITY };
        let cache = KvCache::new(shape, kv_dtype(dtype).unwrap(), Kernels::best()).unwrap();
        let team = Team::new(1, false).unwrap();
        let rope = Arc::new(RopeTable::new(10_000.0, D, CAPACITY, &team).unwrap());
        let (shape, spec) = (MethodShape::of(&cache), method(spec).unwrap());
        spec.check(&shape).unwrap();
        let board = Arc::new(Board::new(heads));
        let states = (0..heads).map(|kv_head| {
            let mut state = spec.make(&Place { shape, layer: 0, kv_head, rope: &rope });
            state.meet(&board, kv_head);
            state
        });
        let states = states.collect();
        let rows = |salt: u32| (0..heads as u32).map(|h| numbers(CAPACITY * D, 10 * h + salt)).collect();
        Layer { cache, states, keys: rows(1), values: rows(2) }
    }

    pub(super) fn head(&self, head: usize) -> RwLockReadGuard<'_, KvHead> {
        self.cache.head(0, head)
    }

    /// Scaled queries of `GROUP` heads at `position`, not rotated by a format.
    pub(super) fn query(head: usize, position: usize) -> Vec<f32> {
        numbers(GROUP * D, 5000 + 7 * position as u32 + head as u32).iter().map(|x| 0.4 * x).collect()
    }

    pub(super) fn append(&mut self, n: usize) {
        for (h, state) in self.states.iter_mut().enumerate() {
            let mut kv = self.cache.head_mut(0, h);
            let (rows, at) = (kv.len(), kv.tokens() * D..(kv.tokens() + n) * D);
            kv.append(&self.keys[h][at.clone()], &self.values[h][at]).unwrap();
            state.appended(&kv, rows);
        }
    }

    /// A prompt of `n` tokens, from which memory goes.
    pub(super) fn prompt(&mut self, n: usize) {
        self.append(n);
        for (h, state) in self.states.iter_mut().enumerate() {
            let kv = self.cache.head(0, h);
            let first = n - state.prompt_queries().min(n);
            let mut rows: Vec<f32> = (first..n).flat_map(|at| Self::query(h, at)).collect();
            kv.rotate_queries(&mut rows);
            // In two parts, as a prompt comes.
            let (a, b) = rows.split_at((n - first) / 2 * GROUP * D);
            for (rows, first) in [(a, first), (b, first + (n - first) / 2)] {
                state.prompted(Prompt { rows, group: GROUP, head_dim: D, first });
            }
        }
        for (h, state) in self.states.iter_mut().enumerate() {
            state.weigh(&self.cache.head(0, h));
        }
        self.compact(Occasion::PromptOver);
    }

    pub(super) fn compact(&mut self, when: Occasion) {
        let mut retained = Retained::default();
        for (h, state) in self.states.iter_mut().enumerate() {
            let mut kv = self.cache.head_mut(0, h);
            retained.clear();
            if state.compact(&kv, when, &mut retained) {
                retained.apply(&mut kv).unwrap();
            }
        }
    }

    /// A decode step: of each head what it decided, and the positions of the rows that it read.
    pub(super) fn step(&mut self) -> Vec<Selection> {
        self.compact(Occasion::Step);
        self.append(1);
        let steps = self.states.iter_mut().enumerate().map(|(h, state)| {
            let kv = self.cache.head(0, h);
            let position = kv.tokens() - 1;
            let mut rows = Self::query(h, position);
            kv.rotate_queries(&mut rows);
            let mut out = Selection::default();
            state.select(GroupQuery { rows: &rows, head_dim: D, position }, &kv, &mut out);
            out
        });
        steps.collect()
    }

    pub(super) fn rewind(&mut self, tokens: usize) {
        self.cache.truncate(tokens);
        for (h, state) in self.states.iter_mut().enumerate() {
            state.truncated(&self.cache.head(0, h));
        }
    }

    pub(super) fn positions(&self, head: usize) -> Vec<usize> {
        let kv = self.head(head);
        (0..kv.len()).map(|row| kv.position_of(row)).collect()
    }

    /// Softmax weights of the query at `position` over the tokens `rows`: `[group][rows]`.
    pub(super) fn weights(&self, head: usize, position: usize, rows: &[usize]) -> Vec<Vec<f64>> {
        let query = Self::query(head, position);
        let weights = query.chunks_exact(D).map(|query| {
            let dot = |row: &usize| -> f64 {
                let key = &self.keys[head][row * D..(row + 1) * D];
                key.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let exp: Vec<f64> = rows.iter().map(|row| dot(row).exp()).collect();
            let sum: f64 = exp.iter().sum();
            exp.iter().map(|x| x / sum).collect()
        });
        weights.collect()
    }

    /// The output over the tokens `rows`, `[group][D]`.
    pub(super) fn output(&self, head: usize, position: usize, rows: &[usize]) -> Vec<f64> {
        let weights = self.weights(head, position, rows);
        let value = |row: usize, i: usize| f64::from(self.values[head][row * D + i]);
        let of = |weights: &Vec<f64>, i: usize| -> f64 {
            rows.iter().zip(weights).map(|(&row, w)| w * value(row, i)).sum()
        };
        weights.iter().flat_map(|weights| (0..D).map(move |i| of(weights, i))).collect()
    }
}

/// What is left of `scores` (token, score) when all but `budget` go, of equal scores the newest first; the last `recent`
/// stay.
pub(super) fn keep(scores: &[(usize, f64)], budget: usize, recent: usize) -> Vec<usize> {
    let (open, safe) = scores.split_at(scores.len() - recent.min(scores.len()));
    let mut open = open.to_vec();
    open.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    open.truncate(budget - safe.len());
    let mut kept: Vec<usize> = open.iter().chain(safe).map(|x| x.0).collect();
    kept.sort_unstable();
    kept
}

pub(super) fn assert_output(layer: &Layer, head: usize, selection: &Selection, rows: &[usize]) {
    assert_eq!(selection.tail_rows as usize, rows.len());
    let position = layer.head(head).tokens() - 1;
    let mut ours = vec![0.0; GROUP * D];
    finish(Kernels::best(), &selection.tail, D, &mut ours);
    for (a, b) in ours.iter().zip(layer.output(head, position, rows)) {
        assert!((f64::from(*a) - b).abs() < 1e-4, "{a} {b}");
    }
}
