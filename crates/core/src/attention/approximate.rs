//! What methods share that score every token roughly: room for the scores, thresholds without sorting, the mean
//! value.

use std::cell::RefCell;
use std::ops::Range;

use longbit_kernels::{DEPTHS, Kernels};

use super::{Chooser, TokenSet};
use crate::kv::KvHead;

/// Room for a scan of a whole context: one a thread, for a state for each (layer, KV head) would be hundreds of MB.
#[derive(Default)]
pub(super) struct Room {
    /// Logits or weights, `[group][tokens]`.
    pub(super) logits: Vec<f32>,
    /// A score a token.
    pub(super) total: Vec<f32>,
    /// A number a token.
    pub(super) steps: Vec<f32>,
    /// Indices.
    pub(super) chosen: Vec<u32>,
    pub(super) chooser: Chooser,
    /// Ranges of tokens.
    pub(super) runs: Vec<Range<usize>>,
    pub(super) set: TokenSet,
    /// Of a page: codes, sums of a group, numbers a token.
    pub(super) codes: Vec<u8>,
    pub(super) sums: Vec<f32>,
    pub(super) page: [Vec<f32>; 2],
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// Works in the room of this thread, which keeps nothing.
pub(super) fn with_room<T>(work: impl FnOnce(&mut Room) -> T) -> T {
    ROOM.with_borrow_mut(work)
}

/// Bins of [`Depths`] a unit of the logits: a weight is known to 3 %.
const PER_UNIT: f32 = 32.0;

/// How far below the largest logit the others lie, in bins of 1/32 and down to 32.
pub(super) struct Depths {
    pub(super) top: f32,
    counts: [u32; DEPTHS],
}

impl Depths {
    pub(super) fn of(kernels: &Kernels, logits: &[f32]) -> Self {
        let mut depths = Depths { top: kernels.max(logits), counts: [0; DEPTHS] };
        kernels.count_depths(logits, depths.top, PER_UNIT, &mut depths.counts);
        depths
    }

    /// Just below the logits of bin `bin`; below all, for the last bin has no bottom.
    fn below(&self, bin: usize) -> f32 {
        if bin + 1 >= DEPTHS { f32::NEG_INFINITY } else { self.top - (bin + 1) as f32 / PER_UNIT }
    }

    /// The weights above this floor have at least the share `p` of their sum, to 3 % of what is left out.
    pub(super) fn floor_of_mass(&self, p: f64) -> f32 {
        if p >= 1.0 {
            return f32::NEG_INFINITY;
        }
        // exp(-1 / PER_UNIT)
        const BIN_BELOW: f64 = 0.969_233_234_476_344_1;
        let mut mass = [0.0; DEPTHS];
        let (mut weight, mut all) = (1.0, 0.0);
        for (mass, &n) in mass.iter_mut().zip(&self.counts) {
            *mass = f64::from(n) * weight;
            all += *mass;
            weight *= BIN_BELOW;
        }
        let mut above = 0.0;
        let enough = mass.iter().position(|mass| {
            above += mass;
            above >= p * all
        });
        enough.map_or(f32::NEG_INFINITY, |bin| self.below(bin))
    }

    /// A floor, and how many logits lie above it: at least `k`, no more than share the bin of the last of them.
    pub(super) fn floor_of_count(&self, k: usize) -> (f32, usize) {
        let mut above = 0;
        let enough = self.counts.iter().position(|&n| {
            above += n as usize;
            above >= k
        });
        (enough.map_or(f32::NEG_INFINITY, |bin| self.below(bin)), above)
    }
}

/// The floor above which the `k` largest of `logits` lie, and at most an eighth more: what comes close to the last of them.
pub(super) fn floor_of_largest(kernels: &Kernels, logits: &[f32], k: usize, chooser: &mut Chooser) -> f32 {
    if k >= logits.len() {
        return f32::NEG_INFINITY;
    }
    let (floor, above) = Depths::of(kernels, logits).floor_of_count(k);
    if above <= k + k / 8 {
        return floor;
    }
    // Logits that lie closer together than the bins do, or further apart.
    chooser.largest(kernels, logits, k, floor).next_down()
}

/// Ascending indices as spans.
pub(super) fn push_spans(tokens: impl Iterator<Item = usize>, spans: &mut Vec<Range<usize>>) {
    for token in tokens {
        match spans.last_mut() {
            Some(last) if last.end == token => last.end += 1,
            _ => spans.push(token..token + 1),
        }
    }
}

/// Adds `span`, which begins at or behind the end of the last one.
pub(super) fn push_span(span: Range<usize>, spans: &mut Vec<Range<usize>>) {
    match spans.last_mut() {
        _ if span.is_empty() => {}
        Some(last) if last.end >= span.start => last.end = last.end.max(span.end),
        _ => spans.push(span),
    }
}

/// Tokens between two sums of [`MeanValue`] that are kept.
const SUMS_EVERY: usize = 256;
/// Rows that are decoded together.
const DECODED: usize = 64;

/// The mean of all values, a sum in token order.
pub(super) struct MeanValue {
    /// Of all values.
    sum: Vec<f64>,
    /// Sums of the values before every 256th token, for rewinds.
    before: Vec<f64>,
    tokens: usize,
}

impl MeanValue {
    pub(super) fn new(head_dim: usize) -> Self {
        MeanValue { sum: vec![0.0; head_dim], before: Vec::new(), tokens: 0 }
    }

    /// Makes it the mean of the first `until` values, which are settled.
    pub(super) fn update(&mut self, kv: &KvHead, until: usize) {
        let d = kv.head_dim();
        if until < self.tokens {
            let page = until / SUMS_EVERY;
            self.sum.copy_from_slice(&self.before[page * d..][..d]);
            self.before.truncate(page * d);
            self.tokens = page * SUMS_EVERY;
        }
        let mut rows = vec![0.0; DECODED * d];
        while self.tokens < until {
            if self.tokens.is_multiple_of(SUMS_EVERY) {
                self.before.extend_from_slice(&self.sum);
            }
            let end = until.min((self.tokens / DECODED + 1) * DECODED);
            let rows = &mut rows[..(end - self.tokens) * d];
            kv.decode_values(self.tokens..end, rows);
            for row in rows.chunks_exact(d) {
                self.sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            self.tokens = end;
        }
    }

    /// Values that it is the mean of.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Writes the mean times `factor`.
    pub(super) fn write(&self, factor: f32, out: &mut [f32]) {
        let factor = f64::from(factor) / self.tokens.max(1) as f64;
        out.iter_mut().zip(&self.sum).for_each(|(out, sum)| *out = (sum * factor) as f32);
    }

    pub(super) fn bytes(&self) -> usize {
        (self.sum.len() + self.before.len()) * size_of::<f64>()
    }

    /// Bytes that reading the mean touches.
    pub(super) fn read_bytes(&self) -> usize {
        self.sum.len() * size_of::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::testing::generator;

    fn logits(n: usize, spread: f32) -> Vec<f32> {
        let mut next = generator(5);
        (0..n).map(|_| 0.5 * spread * (next() + next() + next())).collect()
    }

    #[test]
    fn what_lies_above_a_floor_has_the_mass() {
        let kernels = Kernels::best();
        for spread in [0.0, 0.01, 3.0, 40.0] {
            let logits = logits(5000, spread);
            let depths = Depths::of(kernels, &logits);
            let mass = |floor: f32| -> f64 {
                logits.iter().filter(|x| **x > floor).map(|x| f64::from(x - depths.top).exp()).sum()
            };
            let all = mass(f32::NEG_INFINITY);
            for p in [0.5, 0.9, 0.98] {
                let floor = depths.floor_of_mass(p);
                assert!(1.0 - mass(floor) / all <= 1.04 * (1.0 - p), "{spread} {p}");
                // A bin less would not do.
                assert!(mass(floor + 2.0 / PER_UNIT) / all < p + 0.04, "{spread} {p}");
            }
            assert_eq!(depths.floor_of_mass(1.0), f32::NEG_INFINITY);
        }
    }

    #[test]
    fn what_lies_above_a_floor_is_as_many_as_asked_for() {
        let kernels = Kernels::best();
        for spread in [0.001, 3.0, 40.0, 1e4] {
            let logits = logits(5000, spread);
            for k in [1, 50, 300, 4999] {
                let floor = floor_of_largest(kernels, &logits, k, &mut Chooser::default());
                let above = logits.iter().filter(|x| **x > floor).count();
                assert!((k..=k + k / 8).contains(&above), "{spread} {k} {above}");
            }
            assert_eq!(floor_of_largest(kernels, &logits, 5000, &mut Chooser::default()), f32::NEG_INFINITY);
        }
    }

    #[test]
    fn spans_join() {
        let mut spans = Vec::new();
        push_spans([1, 2, 3, 7, 9, 10].into_iter(), &mut spans);
        push_span(10..10, &mut spans);
        push_span(11..20, &mut spans);
        push_span(30..31, &mut spans);
        assert_eq!(spans, [1..4, 7..8, 9..20, 30..31]);
    }
}
