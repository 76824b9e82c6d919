//! Which rows a method attended itself, beside the spans that it asked for: kept while a measurement watches.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Rows by query head of the group. Unwatched, it costs a look at a flag.
#[derive(Default)]
pub(crate) struct Watch {
    on: AtomicBool,
    rows: Mutex<Vec<Vec<Range<usize>>>>,
}

impl Watch {
    /// Starts to watch.
    pub(crate) fn begin(&self) {
        self.rows.lock().unwrap_or_else(|e| e.into_inner()).clear();
        self.on.store(true, Relaxed);
    }

    /// The rows since [`Watch::begin`], in the order in which they were noted; ends it.
    pub(crate) fn take(&self) -> Vec<Vec<Range<usize>>> {
        self.on.store(false, Relaxed);
        std::mem::take(&mut self.rows.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Notes the rows of `spans` that have a weight, `[group][rows]`.
    pub(crate) fn note(&self, spans: &[Range<usize>], weights: &[f32]) {
        if !self.on.load(Relaxed) {
            return;
        }
        let rows: usize = spans.iter().map(Range::len).sum();
        let mut kept = self.rows.lock().unwrap_or_else(|e| e.into_inner());
        for (h, weights) in weights.chunks_exact(rows.max(1)).enumerate() {
            if kept.len() <= h {
                kept.push(Vec::new());
            }
            let weighed = spans.iter().cloned().flatten().zip(weights).filter(|(_, w)| **w > 0.0);
            for (row, _) in weighed {
                match kept[h].last_mut() {
                    Some(last) if last.end == row => last.end += 1,
                    _ => kept[h].push(row..row + 1),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_a_weight_is_noted_while_it_is_watched() {
        let watch = Watch::default();
        let spans = [2..5, 7..8];
        let weights = [1.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0];
        watch.note(&spans, &weights);
        assert!(watch.take().is_empty());
        watch.begin();
        watch.note(&spans, &weights);
        watch.note(&[9..10, 12..13], &[0.0, 0.0, 1.0, 1.0]);
        assert_eq!(watch.take(), [vec![2..4, 7..8], vec![9..10, 12..13]]);
        watch.note(&spans, &weights);
        assert!(watch.take().is_empty());
    }
}
