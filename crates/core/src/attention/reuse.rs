//! A selection that serves several decode steps: what queries look for changes slowly.
//!
//! Between two decisions the spans of the last one stand, tokens appended since join them, and its tail stays as it was. It
//! is decided anew after the given number of steps, and after every rewind. (Temporal reuse, e.g. Kascade, arXiv 2512.16391.)

use super::{GroupQuery, HeadMethod, Selection};
use crate::kv::KvHead;

pub(super) struct Reuse {
    inner: Box<dyn HeadMethod>,
    /// Steps that a decision serves.
    steps: usize,
    /// Steps that the last one has served; none when there is none.
    served: Option<usize>,
    last: Selection,
    /// Tokens cached at the last decision.
    seen: usize,
}

impl Reuse {
    pub(super) fn new(inner: Box<dyn HeadMethod>, steps: usize) -> Self {
        Reuse { inner, steps, served: None, last: Selection::default(), seen: 0 }
    }
}

impl HeadMethod for Reuse {
    fn appended(&mut self, kv: &KvHead, from: usize) {
        self.inner.appended(kv, from);
    }

    fn truncated(&mut self, kv: &KvHead) {
        self.served = None;
        self.inner.truncated(kv);
    }

    fn select(&mut self, query: GroupQuery<'_>, kv: &KvHead, out: &mut Selection) {
        match self.served {
            Some(served) if served < self.steps => {
                self.served = Some(served + 1);
                out.spans.extend_from_slice(&self.last.spans);
                match out.spans.last_mut() {
                    Some(last) if last.end == self.seen => last.end = kv.len(),
                    _ if self.seen < kv.len() => out.spans.push(self.seen..kv.len()),
                    _ => {}
                }
                out.tail.extend_from_slice(&self.last.tail);
                out.skip_below = self.last.skip_below;
                out.tail_rows = self.last.tail_rows;
            }
            _ => {
                self.inner.select(query, kv, out);
                self.last.clone_from(out);
                (self.served, self.seen) = (Some(1), kv.len());
            }
        }
    }

    fn state_bytes(&self) -> usize {
        let spans = self.last.spans.len() * size_of::<std::ops::Range<usize>>();
        self.inner.state_bytes() + spans + self.last.tail.len() * size_of::<f32>()
    }
}
