//! `longformer`: a window, dilated if asked for, and global tokens (Longformer, arXiv 2004.05150; as a mask for decoding).
//!
//! A query at the last position `n` reads the tokens `n - dilation * j` for `j < window`, the first `globals`, and with
//! `global_every` the first token of every so many (the global blocks of BigBird, arXiv 2007.14062, thinned to one token). The
//! rest is dropped and the softmax renormalised.
//!
//! What differs: the authors' window of 512 lies half on each side of a token, the causal one goes back only; their global
//! tokens have projections of their own and are dilated in a few upper heads, all of it trained. Here the projections are
//! shared and nothing was trained for it, so expect what `window` gives. With `dilation=mixed` the KV heads of a layer take
//! turns with 1, 2 and 4, so that a layer sees both near and far. Dilated tokens lie apart: rows are read one by one, and a
//! line of memory or a page of codes may be touched for one row.
//!
//! Cost of a decode step: `window + globals + context / global_every` rows, nothing kept.

use super::params::ParamSpec;
use super::{GroupQuery, HeadMethod, Method, Params, Predicted, Selection, TokenSet};
use crate::kv::KvHead;

pub(super) const METHOD: Method = Method {
    name: "longformer",
    summary: "a window, dilated if asked for, and global tokens (Longformer, arXiv 2004.05150, causal, untrained)",
    params: &[
        ParamSpec::int("window", "tokens of the window, the newest included", [1, 1 << 24], "512"),
        ParamSpec::choice(
            "dilation",
            "positions between tokens of the window; mixed: 1, 2, 4 in turn over the KV heads",
            &["1", "2", "4", "8", "16", "mixed"],
            "1",
        ),
        ParamSpec::int("globals", "first tokens always read", [0, 1 << 20], "4"),
        ParamSpec::int(
            "global_every",
            "the first token of every so many is read too; 0: none",
            [0, 1 << 24],
            "0",
        ),
    ],
    settings: true,
    evicts: false,
    check: |_, _| Ok(()),
    make: |p, place| Box::new(Longformer::new(p, dilation(p, place.kv_head))),
    predict: |p, context, _| {
        let scattered = context.checked_div(p.int("global_every")).unwrap_or(0);
        Predicted::rows((p.int("window") + p.int("globals") + scattered).min(context))
    },
};

fn dilation(p: &Params, kv_head: usize) -> usize {
    // Every word but `mixed` is a number.
    p.word("dilation").parse().unwrap_or([1, 2, 4][kv_head % 3])
}

struct Longformer {
    window: usize,
    dilation: usize,
    globals: usize,
    every: usize,
    tokens: TokenSet,
}

impl Longformer {
    fn new(p: &Params, dilation: usize) -> Self {
        Longformer {
            window: p.int("window"),
            dilation,
            globals: p.int("globals"),
            every: p.int("global_every"),
            tokens: TokenSet::default(),
        }
    }
}

impl HeadMethod for Longformer {
    fn select(&mut self, _: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        let n = kv.len();
        self.tokens.reset(n);
        self.tokens.insert_range(0..self.globals);
        if self.dilation == 1 {
            self.tokens.insert_range(n.saturating_sub(self.window)..n);
        } else {
            (0..n).rev().step_by(self.dilation).take(self.window).for_each(|t| self.tokens.insert(t));
        }
        if self.every > 0 {
            (0..n).step_by(self.every).for_each(|t| self.tokens.insert(t));
        }
        self.tokens.spans(&mut out.spans);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use longbit_kernels::Kernels;
    use longbit_sys::Team;

    use super::*;
    use crate::attention::{MethodShape, Place, method};
    use crate::kv::{CacheShape, KvCache, kv_dtype};
    use crate::model::RopeTable;

    #[test]
    fn the_set_is_the_definition() {
        let shape = CacheShape { layers: 1, kv_heads: 5, head_dim: 16, capacity: 1024 };
        let cache = KvCache::new(shape, kv_dtype("f32").unwrap(), Kernels::best()).unwrap();
        let rope = Arc::new(RopeTable::new(10_000.0, 16, 8, &Team::new(1, false).unwrap()).unwrap());
        let zeros = vec![0.0; 1000 * 16];
        for len in [1, 4, 5, 63, 64, 65, 700, 1000] {
            for kv_head in 0..5 {
                let cached = cache.head(0, kv_head).len();
                cache
                    .head_mut(0, kv_head)
                    .append(&zeros[cached * 16..len * 16], &zeros[cached * 16..len * 16])
                    .unwrap();
                for (dilation, globals, window, every) in [
                    ("1", 4, 60, 0),
                    ("2", 4, 60, 0),
                    ("4", 0, 7, 64),
                    ("16", 1, 512, 1),
                    ("mixed", 4, 100, 33),
                ] {
                    let spec = format!(
                        "longformer:window={window},dilation={dilation},globals={globals},global_every={every}"
                    );
                    let place = Place { shape: MethodShape::of(&cache), layer: 0, kv_head, rope: &rope };
                    let mut selection = Selection::default();
                    let query = GroupQuery { rows: &[0.0; 16], head_dim: 16, position: len - 1 };
                    let spec = method(&spec).unwrap();
                    spec.make(&place).select(query, &cache.head(0, kv_head), &mut selection);
                    let step = if dilation == "mixed" {
                        [1, 2, 4, 1, 2][kv_head]
                    } else {
                        dilation.parse().unwrap()
                    };
                    let in_window =
                        |t: usize| (len - 1 - t).is_multiple_of(step) && (len - 1 - t) / step < window;
                    let is_global = |t: usize| t < globals || (every > 0 && t.is_multiple_of(every));
                    let expected: Vec<usize> = (0..len).filter(|&t| in_window(t) || is_global(t)).collect();
                    assert_eq!(
                        selection.spans.iter().cloned().flatten().collect::<Vec<_>>(),
                        expected,
                        "{spec:?}"
                    );
                    assert!(spec.predict(len, &place.shape).rows >= expected.len().min(window), "{spec:?}");
                }
            }
        }
    }
}
