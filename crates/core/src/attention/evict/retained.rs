//! What is left of the rows of a head: which remain, and which others are merged into them.

use std::ops::Range;

use crate::error::Result;
use crate::kv::KvHead;

/// What is to become of the rows of a head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Retained {
    /// Rows that remain: ascending, disjoint.
    pub keep: Vec<Range<usize>>,
    /// Rows, counted among those that remain, which others were merged into, ascending.
    merged: Vec<usize>,
    /// Their keys and values, `[merged][head_dim]`, rotated as they are stored.
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Retained {
    /// Forgets everything but the memory.
    pub fn clear(&mut self) {
        self.keep.clear();
        self.merged.clear();
        self.keys.clear();
        self.values.clear();
    }

    /// Does it.
    ///
    /// # Errors
    /// As [`KvHead::retain`].
    pub fn apply(&self, kv: &mut KvHead) -> Result<()> {
        kv.retain(&self.keep)?;
        let d = kv.head_dim();
        for ((row, key), value) in
            self.merged.iter().zip(self.keys.chunks_exact(d)).zip(self.values.chunks_exact(d))
        {
            kv.replace(*row, key, value)?;
        }
        Ok(())
    }
}

/// The least score that counts, so that rows which nobody looked at have a mean too.
const LEAST: f32 = 1e-6;

/// Merges the rows `dead` into those of `out.keep` whose keys point most nearly the same way: the mean of both keys and of
/// both values, weighted by scores. No more than as many as remain, those with the largest scores.
pub(super) fn merge(kv: &KvHead, mut dead: Vec<(usize, f32)>, scores: &[f32], out: &mut Retained) {
    let (d, kernels) = (kv.head_dim(), kv.kernels());
    let kept: Vec<usize> = out.keep.iter().cloned().flatten().collect();
    dead.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    dead.truncate(kept.len());
    let decode = |rows: &[usize], keys: bool| {
        let mut all = vec![0.0; rows.len() * d];
        for (&row, to) in rows.iter().zip(all.chunks_exact_mut(d)) {
            match keys {
                true => kv.decode_keys(row..row + 1, to),
                false => kv.decode_values(row..row + 1, to),
            }
        }
        all
    };
    let rows: Vec<usize> = dead.iter().map(|x| x.0).collect();
    let (keys, mine) = (decode(&kept, true), decode(&rows, true));
    let lengths: Vec<f32> = keys.chunks_exact(d).map(|key| kernels.dot(key, key).sqrt().max(LEAST)).collect();
    let mut into: Vec<(usize, usize)> = Vec::with_capacity(dead.len());
    let mut dots = vec![0.0; kept.len()];
    for (i, key) in mine.chunks_exact(d).enumerate() {
        kernels.scores_f32(key, &keys, d, &mut dots, &[]);
        let nearest = dots.iter().zip(&lengths).map(|(dot, length)| dot / length).enumerate();
        into.extend(nearest.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map(|(row, _)| (row, i)));
    }
    into.sort_unstable();
    let values = decode(&rows, false);
    for same in into.chunk_by(|a, b| a.0 == b.0) {
        let row = same[0].0;
        let own = scores[kept[row]].max(LEAST);
        let total: f32 = own + same.iter().map(|&(_, i)| dead[i].1.max(LEAST)).sum::<f32>();
        let mut key = keys[row * d..(row + 1) * d].to_vec();
        let mut value = decode(&kept[row..row + 1], false);
        for x in [&mut key, &mut value] {
            kernels.scale(x, own / total);
        }
        for &(_, i) in same {
            let share = dead[i].1.max(LEAST) / total;
            kernels.scale_add(&mut key, 1.0, &mine[i * d..(i + 1) * d], share);
            kernels.scale_add(&mut value, 1.0, &values[i * d..(i + 1) * d], share);
        }
        out.merged.push(row);
        out.keys.extend(key);
        out.values.extend(value);
    }
}
