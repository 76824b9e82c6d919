//! `dense`: every cached token. The exact baseline.

use super::{GroupQuery, HeadMethod, Method, Predicted, Selection};
use crate::kv::KvHead;

pub(super) const METHOD: Method = Method {
    name: "dense",
    summary: "every cached token, exactly (split-KV online softmax; FlashDecoding)",
    params: &[],
    settings: false,
    evicts: false,
    check: |_, _| Ok(()),
    make: |_, _| Box::new(Dense),
    predict: |_, context, _| Predicted::rows(context),
};

pub(super) struct Dense;

impl HeadMethod for Dense {
    fn select(&mut self, _: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        out.spans.push(0..kv.len());
    }
}
