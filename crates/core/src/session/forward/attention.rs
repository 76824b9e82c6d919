//! Rows of the new tokens of a pass go into the cache, and the method decides; what heads put out comes together. Prompts
//! attend in [`super::prefill`], decode steps in [`super::decode`].

use super::super::scratch::{BLOCK_TOKENS, Private, room};
use super::Pass;
use crate::attention::{GroupQuery, Occasion, Prompt};

impl Pass<'_> {
    /// Rotates and appends the keys and values of one KV head, rotates its queries, and lets the method decide.
    pub(super) fn append(&self, p: &mut Private, l: usize, kv_head: usize) {
        let config = &self.model.config;
        let (d, group, n) = (config.head_dim, config.group(), self.tokens.len());
        let (q_rows, kv_rows) = (config.q_rows(), config.kv_rows());
        let kernels = self.kernels();
        let scale = 1.0 / (d as f32).sqrt();
        let width = group * d;
        let (row, row2) = (room(&mut p.row, n * d), room(&mut p.row2, n * d));
        let mut queries = self.scratch.queries.write(kv_head);
        for j in 0..n {
            let keys = &mut row[j * d..(j + 1) * d];
            let values = &mut row2[j * d..(j + 1) * d];
            let query = &mut queries[j * width..(j + 1) * width];
            if let Some(supplied) = self.supplied {
                let at = (l * config.kv_heads + kv_head) * d;
                query.copy_from_slice(&supplied.queries[at * group..(at + d) * group]);
                keys.copy_from_slice(&supplied.keys[at..at + d]);
                values.copy_from_slice(&supplied.values[at..at + d]);
            } else {
                let qkv = &self.scratch.qkv;
                qkv.gather(j, n, kv_head * width..(kv_head + 1) * width, query);
                qkv.gather(j, n, q_rows + kv_head * d..q_rows + (kv_head + 1) * d, keys);
                let first = q_rows + kv_rows + kv_head * d;
                qkv.gather(j, n, first..first + d, values);
                let at = self.position + j;
                let (cos, sin) = (self.rope.cos(at..at + 1), self.rope.sin(at..at + 1));
                for head in query.chunks_exact_mut(d).chain(std::iter::once(keys)) {
                    kernels.rope(head, cos, sin);
                }
            }
            kernels.scale(query, scale);
        }
        let mut kv = self.cache.head_mut(l, kv_head);
        kv.rotate_queries(&mut queries[..n * width]);
        let mut state = self.attention.head(l, kv_head);
        p.compaction.clear();
        // A prompt sees all rows that there are, so those that are evicted must be gone.
        let when = if self.decoding { Occasion::Step } else { Occasion::Prompt };
        let compacted = match state.compact(&kv, when, &mut p.compaction) {
            true => p.compaction.apply(&mut kv),
            false => Ok(()),
        };
        let from = kv.len();
        if let Err(error) = compacted.and_then(|()| kv.append(&p.row[..n * d], &p.row2[..n * d])) {
            // The session takes the whole pass back; until then this head serves what it has.
            self.scratch.fail(error);
            self.scratch.selections[kv_head].write().unwrap_or_else(|e| e.into_inner()).clear();
            return;
        }
        state.appended(&kv, from);
        if !self.decoding {
            let last = n - n.min(state.prompt_queries());
            if last < n {
                let rows = &queries[last * width..n * width];
                state.prompted(Prompt { rows, group, head_dim: d, first: self.position + last });
            }
        }
        #[cfg(test)]
        kv.begin_observing();
        if n == 1 {
            let mut selection = self.scratch.selections[kv_head].write().unwrap_or_else(|e| e.into_inner());
            selection.clear();
            match self.decoding {
                true => {
                    let query = GroupQuery { rows: &queries[..width], head_dim: d, position: self.position };
                    let capture = self.scratch.capture.get().filter(|_| self.capture);
                    if capture.is_some() {
                        kv.watch().begin();
                    }
                    state.select(query, &kv, &mut selection);
                    if let Some(capture) = capture {
                        capture.attended(l * config.kv_heads + kv_head, kv.watch().take());
                    }
                }
                false => self.see_alone(p, l, &queries[..width], &kv, &mut selection),
            }
            // What is attended is counted where it is read.
            let rows = selection.tokens() as u64 + selection.tail_rows;
            self.scratch.count(selection.read_bytes, selection.index_bytes, rows);
        }
    }

    /// Gives the attention output of one token, heads one after another, to `then`; where they lie apart, they are brought
    /// together in `room`, as long as they are.
    pub(super) fn with_heads(&self, token: usize, room: &mut [f32], then: &mut dyn FnMut(&[f32])) {
        let (s, config) = (self.scratch, &self.model.config);
        let width = config.group() * config.head_dim;
        let block_len = BLOCK_TOKENS.min(s.tokens()) * width;
        let attn = s.attn.read();
        if s.tokens() == 1 {
            return then(&attn);
        }
        for (kv_head, out) in room.chunks_exact_mut(width).enumerate() {
            let block = kv_head * s.blocks + token / BLOCK_TOKENS;
            let at = block * block_len + token % BLOCK_TOKENS * width;
            out.copy_from_slice(&attn[at..at + width]);
        }
        then(room);
    }
}
