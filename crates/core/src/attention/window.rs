//! `window`: the first tokens and the most recent ones, at their original positions.
//!
//! Causal sliding window with attention sinks (StreamingLLM, arXiv 2309.17453, without its re-assigned positions): the
//! rest is dropped and the softmax renormalised over what is read. `window` counts the newest token.

use super::params::{Kind, ParamSpec};
use super::{GroupQuery, HeadMethod, Method, Predicted, Selection};
use crate::kv::KvHead;

pub(super) const METHOD: Method = Method {
    name: "window",
    summary: "attention sinks and the most recent tokens (StreamingLLM with original positions, arXiv 2309.17453)",
    params: &[
        ParamSpec::sinks("4"),
        ParamSpec {
            name: "window",
            summary: "most recent tokens read, the newest included",
            kind: Kind::Int { min: 1, max: 1 << 24 },
            default: "1024",
        },
    ],
    settings: true,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, _| Box::new(Window { sinks: p.int("sinks"), window: p.int("window") }),
    predict: |p, context, _| Predicted::rows((p.int("sinks") + p.int("window")).min(context)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{CacheShape, KvCache, kv_dtype};
    use longbit_kernels::Kernels;

    #[test]
    fn the_first_and_the_newest_tokens_are_read_and_no_others() {
        let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: 16, capacity: 1024 };
        let rows = vec![0.0; 1000 * 16];
        for (len, sinks, window, spans) in [
            (1, 4, 8, &[(0, 1)][..]),
            (4, 4, 8, &[(0, 4)][..]),
            (12, 4, 8, &[(0, 12)][..]),
            (13, 4, 8, &[(0, 4), (5, 13)][..]),
            (1000, 4, 8, &[(0, 4), (992, 1000)][..]),
            (1000, 0, 1, &[(999, 1000)][..]),
            (1000, 0, 5000, &[(0, 1000)][..]),
        ] {
            let cache = KvCache::new(shape, kv_dtype("f32").unwrap(), Kernels::best()).unwrap();
            cache.head_mut(0, 0).append(&rows[..len * 16], &rows[..len * 16]).unwrap();
            let mut selection = Selection::default();
            let query = GroupQuery { rows: &[0.0; 16], head_dim: 16, position: len - 1 };
            Window { sinks, window }.select(query, &cache.head(0, 0), &mut selection);
            let spans: Vec<_> = spans.iter().map(|&(start, end)| start..end).collect();
            assert_eq!(selection.spans, spans, "{len} tokens, {sinks} sinks, window {window}");
        }
    }
}
