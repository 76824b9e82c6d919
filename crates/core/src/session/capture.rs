//! What attention did in a captured step: its outputs, what the method decided, and how much softmax mass it found.
//!
//! A measurement asks for it; other steps pay nothing.

use std::ops::Range;
use std::sync::Mutex;

use longbit_sys::Shared;

use crate::attention::{Selection, partial};
use crate::model::ModelConfig;

/// What a decode step did in one (layer, KV head).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Captured {
    /// What the method decided; rows of the cache, which are positions unless the method evicted some.
    pub selection: Selection,
    /// Rows that the method attended itself, under weights that are part of its tail: by query head; empty where it did not.
    pub own: Vec<Vec<Range<usize>>>,
    /// Logarithm of the softmax mass, the sum of `exp(logit)`, of the tokens attended exactly: one a query head, negative
    /// infinity of none. Logits are `q . k / sqrt(head_dim)`, of keys as they are cached.
    pub exact: Vec<f32>,
    /// The same of the method's own tail.
    pub tail: Vec<f32>,
}

/// Room for what a step does.
pub(super) struct Capture {
    /// One stripe a (layer, KV head).
    outputs: Shared<f32>,
    heads: Vec<Mutex<Captured>>,
}

/// The masses of the partials of a group.
fn masses(partials: &[f32], head_dim: usize, out: &mut Vec<f32>) {
    out.clear();
    out.extend(partials.chunks_exact(partial::stride(head_dim)).map(|p| p[0] + p[1].ln()));
}

impl Capture {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let stripes = config.layers * config.kv_heads;
        let width = config.group() * config.head_dim;
        Capture {
            outputs: Shared::even(stripes, width, stripes, 0.0).named("capture"),
            heads: (0..stripes).map(|_| Mutex::default()).collect(),
        }
    }

    /// Keeps what `selection` led to: `exact` are the partials of its spans, merged, before the tail joined them.
    pub(super) fn decided(&self, stripe: usize, selection: &Selection, exact: &[f32], head_dim: usize) {
        let mut kept = self.heads[stripe].lock().unwrap_or_else(|e| e.into_inner());
        let kept = &mut *kept;
        masses(exact, head_dim, &mut kept.exact);
        masses(&selection.tail, head_dim, &mut kept.tail);
        kept.tail.resize(kept.exact.len(), f32::NEG_INFINITY);
        kept.selection.clone_from(selection);
    }

    /// Keeps the rows that the method attended itself.
    pub(super) fn attended(&self, stripe: usize, own: Vec<Vec<Range<usize>>>) {
        self.heads[stripe].lock().unwrap_or_else(|e| e.into_inner()).own = own;
    }

    /// Keeps the attention output of stripe `layer * kv_heads + kv_head`.
    pub(super) fn output(&self, stripe: usize, output: &[f32]) {
        self.outputs.write(stripe).copy_from_slice(output);
    }

    /// `[layers][heads][head_dim]`.
    pub(super) fn outputs(&self) -> Vec<f32> {
        self.outputs.read().to_vec()
    }

    /// What the step did in a stripe.
    pub(super) fn head(&self, stripe: usize) -> Captured {
        self.heads[stripe].lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use longbit_sys::Team;

    use super::*;
    use crate::attention::method;
    use crate::model::{HeadFormat, Model, preset};
    use crate::session::{Session, SessionOptions, Supplied};

    /// Masses of known keys: the spans of a window hold what their own tokens weigh, and there is no tail.
    #[test]
    fn the_mass_of_a_window_is_that_of_its_tokens() {
        let team = Arc::new(Team::new(1, false).unwrap());
        let config = preset("tiny").unwrap();
        let model = Arc::new(Model::synthetic(config.clone(), HeadFormat::Bf16, 1, &team).unwrap());
        let options = SessionOptions {
            capacity: 64,
            kv: crate::kv::kv_dtype("f32").unwrap(),
            method: method("window:sinks=1,window=2").unwrap(),
        };
        let mut session = Session::new(model, team, options).unwrap();
        let (heads, d, group) = (config.layers * config.kv_heads, config.head_dim, config.group());
        assert!(session.captured(0, 0).is_none());
        // Every key is a multiple of the first unit vector: 1, 2, 3, …; so is every query, with the head's number.
        for token in 0..6u32 {
            let mut supplied = Supplied {
                queries: vec![0.0; heads * group * d],
                keys: vec![0.0; heads * d],
                values: vec![1.0; heads * d],
            };
            supplied.keys.iter_mut().step_by(d).for_each(|k| *k = (token + 1) as f32);
            for (i, query) in supplied.queries.chunks_exact_mut(d).enumerate() {
                query[0] = (i % group) as f32 * (d as f32).sqrt();
            }
            session.decode_supplied(token, &supplied, true).unwrap();
        }
        for stripe in 0..heads {
            let found = session.captured(stripe / config.kv_heads, stripe % config.kv_heads).unwrap();
            assert_eq!(found.selection.spans, [0..1, 4..6]);
            for (h, (exact, tail)) in found.exact.iter().zip(&found.tail).enumerate() {
                let mass = [1.0f32, 5.0, 6.0].map(|key| (key * h as f32).exp()).iter().sum::<f32>();
                assert!((exact - mass.ln()).abs() < 1e-5, "{exact} {}", mass.ln());
                assert_eq!(*tail, f32::NEG_INFINITY);
            }
            assert_eq!((found.exact.len(), found.tail.len()), (group, group));
        }
        assert!(
            session.captured(config.layers, 0).is_none() && session.captured(0, config.kv_heads).is_none()
        );
    }

    #[test]
    fn masses_are_logarithms_and_the_empty_set_has_none() {
        let mut room = vec![0.0; 3 * partial::stride(2)];
        partial::clear(&mut room, 2);
        room[4..6].copy_from_slice(&[100.0, 2.0]);
        let mut out = vec![7.0];
        masses(&room, 2, &mut out);
        assert_eq!(out, [f32::NEG_INFINITY, 100.0 + 2f32.ln(), f32::NEG_INFINITY]);
    }
}
