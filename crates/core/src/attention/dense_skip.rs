//! `dense-skip`: every key, and the values that matter (community practice in llama.cpp forks, "sparse V").
//!
//! All logits come first; then values are read only of tokens whose weight `exp(z - max)` is at least `lost / n` for some
//! head of the group, `max` being the largest logit of the head over the whole context of `n` tokens. Weights of the others
//! stay in the denominator, so what is lost is their part of the sum: less than `n * lost / n` of the mass, for the sum of
//! weights is at least 1. The output moves by at most `lost * max|v|`, whatever the context.
//!
//! The forks compare the weight itself with a constant. Then what may be lost grows with the context, `n * constant`: at 96k
//! tokens a floor of a millionth gives up as much as a tenth. Here the floor falls as the context grows.
//!
//! Cost: no index. Beside its rows a token costs a group of four heads sixteen bytes of weights, which are kept for the whole
//! context and read again once all keys are scored (1.5 MB a KV head at 98,304 tokens, more than a second-level cache), four
//! comparisons with floors, and, where its value is read, a copy of its four weights. Values are read in runs as short as the
//! data make them, each with the start of a weighted sum. So it is slower than `dense` unless most values are left out.

use super::params::{Kind, ParamSpec};
use super::{GroupQuery, HeadMethod, Method, Predicted, Selection};
use crate::kv::KvHead;

pub(super) const METHOD: Method = Method {
    name: "dense-skip",
    summary: "every key, and values whose weight is not negligible; the output moves by at most lost * max|v|",
    params: &[ParamSpec {
        name: "lost",
        summary: "share of a head's weight that may be left out, all tokens together: values are not read where the weight is \
                  below lost/n of the largest",
        kind: Kind::Float { min: 0.0, max: 1.0 },
        default: "0.01",
    }],
    settings: false,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, _| Box::new(DenseSkip { lost: p.float("lost") }),
    // How many values are read depends on the data.
    predict: |_, context, _| Predicted::rows(context),
};

struct DenseSkip {
    lost: f64,
}

impl HeadMethod for DenseSkip {
    fn select(&mut self, _: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        out.spans.push(0..kv.len());
        out.skip_below = (self.lost / kv.len().max(1) as f64) as f32;
    }
}
