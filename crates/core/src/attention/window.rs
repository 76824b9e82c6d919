//! `window`: the first tokens and the most recent ones, at their original positions.
//!
//! Causal sliding window with attention sinks (StreamingLLM, arXiv 2309.17453, without its re-assigned positions): the
//! rest is dropped and the softmax renormalised over what is read. `window` counts the newest token.

use super::params::{Kind, ParamSpec};
use super::{GroupQuery, HeadMethod, Method, Selection};
use crate::kv::KvHead;

pub(super) const METHOD: Method = Method {
    name: "window",
    summary: "attention sinks and the most recent tokens (StreamingLLM with original positions, arXiv 2309.17453)",
    params: &[
        ParamSpec {
            name: "sinks",
            summary: "first tokens always read",
            kind: Kind::Int { min: 0, max: 1 << 20 },
            default: 4.0,
        },
        ParamSpec {
            name: "window",
            summary: "most recent tokens read, the newest included",
            kind: Kind::Int { min: 1, max: 1 << 24 },
            default: 1024.0,
        },
    ],
    make: |p| Box::new(Window { sinks: p.int("sinks"), window: p.int("window") }),
    reads: |p, context| (p.int("sinks") + p.int("window")).min(context),
};

struct Window {
    sinks: usize,
    window: usize,
}

impl HeadMethod for Window {
    fn select(&mut self, _: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let recent = kv.len().saturating_sub(self.window);
        if recent <= self.sinks {
            out.spans.push(0..kv.len());
        } else {
            if self.sinks > 0 {
                out.spans.push(0..self.sinks);
            }
            out.spans.push(recent..kv.len());
        }
    }
}
