//! Choosing the largest of many scores without sorting them, and sets of tokens.
//!
//! Scores are compared by their bits, brought into the order of the numbers; ties go to the lower index. So a choice is the
//! same on every machine.

use std::ops::Range;

/// Bins of the first pass: the sign, the exponent and the upper three bits of the mantissa.
const BINS: usize = 1 << 12;

/// The bits of `x` as an integer that orders as the numbers do, `-NaN` lowest and `NaN` highest.
fn key(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

fn bin(x: f32) -> usize {
    (key(x) >> 20) as usize
}

/// The `k` largest of `scores`, by index, ascending; all of them when there are no more than `k`. `out` is overwritten.
pub fn top_k(scores: &[f32], k: usize, out: &mut Vec<u32>) {
    out.clear();
    if k >= scores.len() {
        out.extend(0..scores.len() as u32);
        return;
    }
    let mut counts = vec![0u32; BINS];
    scores.iter().for_each(|&x| counts[bin(x)] += 1);
    // The bin that holds the k-th largest, and how many lie above it.
    let (mut edge, mut above) = (BINS, 0);
    while above < k && edge > 0 {
        edge -= 1;
        above += counts[edge] as usize;
    }
    let above = above.saturating_sub(counts.get(edge).map_or(0, |&n| n as usize));
    choose(scores, edge, out, |candidates| candidates.truncate(k.saturating_sub(above)));
}

/// The fewest of `weights`, which are not negative, that together have at least the share `p` of their sum: by index,
/// ascending, at least one if there is any. `out` is overwritten.
pub fn top_p(weights: &[f32], p: f32, out: &mut Vec<u32>) {
    out.clear();
    let mut mass = vec![0.0f64; BINS];
    weights.iter().for_each(|&w| mass[bin(w)] += f64::from(w));
    let wanted = f64::from(p) * mass.iter().sum::<f64>();
    let (mut edge, mut above) = (BINS, 0.0);
    while edge > 0 && above + mass[edge - 1] < wanted {
        edge -= 1;
        above += mass[edge];
    }
    if edge == 0 {
        // Rounding, or a share of 1.
        out.extend(0..weights.len() as u32);
        return;
    }
    choose(weights, edge - 1, out, |candidates| {
        let mut sum = above;
        let enough = candidates.iter().position(|&(w, _)| {
            sum += f64::from(w);
            sum >= wanted
        });
        candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
    });
}

/// All above bin `edge`, and of those within it what `cut` leaves of them, largest first.
fn choose(scores: &[f32], edge: usize, out: &mut Vec<u32>, cut: impl FnOnce(&mut Vec<(f32, u32)>)) {
    let mut candidates = Vec::new();
    for (i, &x) in scores.iter().enumerate() {
        match bin(x).cmp(&edge) {
            std::cmp::Ordering::Greater => out.push(i as u32),
            std::cmp::Ordering::Equal => candidates.push((x, i as u32)),
            std::cmp::Ordering::Less => {}
        }
    }
    candidates.sort_unstable_by_key(|&(x, i)| (std::cmp::Reverse(key(x)), i));
    cut(&mut candidates);
    out.extend(candidates.iter().map(|&(_, i)| i));
    out.sort_unstable();
}

/// Some tokens of a context.
#[derive(Clone, Debug, Default)]
pub struct TokenSet {
    /// Bit `t % 64` of word `t / 64`.
    words: Vec<u64>,
    len: usize,
}

impl TokenSet {
    /// Makes this the empty set of a context of `len` tokens.
    pub fn reset(&mut self, len: usize) {
        self.words.clear();
        self.words.resize(len.div_ceil(64), 0);
        self.len = len;
    }

    /// Adds a token of the context.
    pub fn insert(&mut self, token: usize) {
        self.words[token / 64] |= 1 << (token % 64);
    }

    /// Adds the tokens of `range` that the context has.
    pub fn insert_range(&mut self, range: Range<usize>) {
        let range = range.start..range.end.min(self.len);
        for word in range.start / 64..range.end.div_ceil(64) {
            let (from, to) =
                (range.start.max(64 * word) - 64 * word, range.end.min(64 * word + 64) - 64 * word);
            if from < to {
                self.words[word] |= (u64::MAX >> (64 - (to - from))) << from;
            }
        }
    }

    /// Whether `token` is in it.
    pub fn contains(&self, token: usize) -> bool {
        self.words.get(token / 64).is_some_and(|word| word >> (token % 64) & 1 == 1)
    }

    /// How many tokens there are.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Appends the tokens as spans: ascending, disjoint, as long as can be.
    pub fn spans(&self, out: &mut Vec<Range<usize>>) {
        let first = out.len();
        for (i, &word) in self.words.iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                let from = rest.trailing_zeros();
                let ones = (!(rest >> from)).trailing_zeros();
                let span = 64 * i + from as usize..64 * i + (from + ones) as usize;
                match out[first..].last_mut() {
                    Some(last) if last.end == span.start => last.end = span.end,
                    _ => out.push(span),
                }
                rest &= u64::MAX.checked_shl(from + ones).unwrap_or(0);
            }
        }
    }
}

/// How many of `of` things a group of query heads reads together, of which each chooses `chosen`: an expectation, for the heads
/// agree in part. Half of what a further head chooses is taken to be new: 2.5 times `chosen` for four heads. Recorded for four
/// heads on the workload `mix` from 8k to 96k tokens: 1.9 to 3.0 times (`results/methods`, `results/methods-96k`).
pub(super) fn union(chosen: usize, group: usize, of: usize) -> usize {
    let others = group.saturating_sub(1);
    chosen.saturating_add(chosen.saturating_mul(others) / 2).min(of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted(scores: &[f32]) -> Vec<u32> {
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        order
    }

    /// Few different numbers, so that there are ties; some close together, so that they share a bin.
    fn scores() -> impl Strategy<Value = Vec<f32>> {
        let number = prop_oneof![
            (-4i32..5).prop_map(|x| x as f32),
            1.0f32..1.001,
            Just(f32::NEG_INFINITY),
            -1e30f32..1e30
        ];
        prop::collection::vec(number, 0..200)
    }

    proptest! {
        #[test]
        fn the_largest_are_those_that_sorting_finds(scores in scores(), k in 0usize..210) {
            let mut expected = sorted(&scores);
            expected.truncate(k);
            expected.sort_unstable();
            let mut ours = vec![7];
            top_k(&scores, k, &mut ours);
            prop_assert_eq!(ours, expected);
        }

        #[test]
        fn the_fewest_with_a_share_are_the_largest(
            weights in prop::collection::vec(prop_oneof![0.0f32..1.0, Just(0.5f32), 1e-6f32..1e-5], 0..200),
            p in prop_oneof![0.0f32..1.0, Just(1.0f32)],
        ) {
            let mut ours = Vec::new();
            top_p(&weights, p, &mut ours);
            let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
            let order = sorted(&weights);
            let mass = |n: usize| order[..n].iter().map(|&i| f64::from(weights[i as usize])).sum::<f64>();
            let slack = 1e-9 * total;
            prop_assert!(mass(ours.len()) >= f64::from(p) * total - slack);
            if p < 1.0 && ours.len() > 1 {
                prop_assert!(mass(ours.len() - 1) < f64::from(p) * total + slack);
            }
            let mut expected = order[..ours.len()].to_vec();
            expected.sort_unstable();
            prop_assert_eq!(ours, expected);
        }

        #[test]
        fn spans_are_the_tokens(
            len in 1usize..400,
            ranges in prop::collection::vec((0usize..400, 0usize..130), 0..6),
            tokens in prop::collection::vec(0usize..400, 0..20),
        ) {
            let mut set = TokenSet::default();
            set.reset(500);
            set.insert(499);
            set.reset(len);
            let mut expected = vec![false; len];
            for (start, n) in ranges {
                set.insert_range(start..start + n);
                (start..(start + n).min(len)).for_each(|t| expected[t] = true);
            }
            for token in tokens.into_iter().filter(|t| *t < len) {
                set.insert(token);
                expected[token] = true;
            }
            let mut spans = Vec::new();
            set.spans(&mut spans);
            prop_assert!(spans.windows(2).all(|w| w[0].end < w[1].start));
            let listed: Vec<usize> = spans.into_iter().flatten().collect();
            let expected: Vec<usize> = (0..len).filter(|&t| expected[t]).collect();
            prop_assert_eq!(set.count(), expected.len());
            prop_assert!(expected.iter().all(|&t| set.contains(t)) && !set.contains(len));
            prop_assert_eq!(listed, expected);
        }
    }
}
