//! `dense-skip`: every key, and the values that matter (community practice in llama.cpp forks, "sparse V").
//!
//! All logits come first; then values are read only of tokens whose weight `exp(z - max)` is at least `below` for some head of
//! the group, `max` being the largest logit of the head over the whole context. Weights of the others stay in the
//! denominator, so what is lost is their part of the sum: with `n` tokens at most `n * below` of the mass, for the sum of
//! weights is at least 1. The output moves by at most `n * below * max|v|`.

use super::params::{Kind, ParamSpec};
use super::{GroupQuery, HeadMethod, Method, Predicted, Selection};
use crate::kv::KvHead;

pub(super) const METHOD: Method = Method {
    name: "dense-skip",
    summary: "every key, and values whose weight is not negligible; the output moves by at most n * below * max|v|",
    params: &[ParamSpec {
        name: "below",
        summary: "values are not read where the weight is below this share of the head's largest",
        kind: Kind::Float { min: 0.0, max: 0.01 },
        default: "0.000001",
    }],
    settings: false,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, _| Box::new(DenseSkip { below: p.float("below") as f32 }),
    // How many values are read depends on the data.
    predict: |_, context, _| Predicted::rows(context),
};

struct DenseSkip {
    below: f32,
}

impl HeadMethod for DenseSkip {
    fn select(&mut self, _: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        out.spans.push(0..kv.len());
        out.skip_below = self.below;
    }
}
