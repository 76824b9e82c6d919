//! Choosing the largest of many scores without sorting them, and sets of tokens.
//!
//! Scores are compared by their bits, brought into the order of the numbers; ties go to the lower index. So a choice is the
//! same on every machine.

use std::ops::Range;

use longbit_kernels::Kernels;

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
    let wanted = f64::from(p) * sum(weights);
    if !with_mass(weights, wanted, out) {
        // Rounding, or a share of 1.
        out.extend(0..weights.len() as u32);
    }
}

/// The sum of `x`, in 16 lanes as `Kernels::sum_f64` defines it.
fn sum(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 16];
    x.iter().enumerate().for_each(|(i, &x)| lanes[i % 16] += f64::from(x));
    for half in [8, 4, 2, 1] {
        (0..half).for_each(|l| lanes[l] += lanes[l + half]);
    }
    lanes[0]
}

/// Appends the fewest of `weights` that together have the sum `wanted`; nothing, and false, if all of them have less.
fn with_mass(weights: &[f32], wanted: f64, out: &mut Vec<u32>) -> bool {
    let mut mass = [0.0f64; BINS];
    weights.iter().for_each(|&w| mass[bin(w)] += f64::from(w));
    let (mut edge, mut above) = (BINS, 0.0);
    while edge > 0 && above + mass[edge - 1] < wanted {
        edge -= 1;
        above += mass[edge];
    }
    if edge == 0 {
        return false;
    }
    choose(weights, edge - 1, out, |candidates| {
        let mut sum = above;
        let enough = candidates.iter().position(|&rank| {
            sum += f64::from(weights[rank as u32 as usize]);
            sum >= wanted
        });
        candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
    });
    true
}

/// All above bin `edge`, and of those within it what `cut` leaves of their ranks, largest first.
fn choose(scores: &[f32], edge: usize, out: &mut Vec<u32>, cut: impl FnOnce(&mut Vec<u64>)) {
    let mut candidates = Vec::new();
    for (i, &x) in scores.iter().enumerate() {
        match bin(x).cmp(&edge) {
            std::cmp::Ordering::Greater => out.push(i as u32),
            std::cmp::Ordering::Equal => candidates.push(rank(scores, i)),
            std::cmp::Ordering::Less => {}
        }
    }
    candidates.sort_unstable();
    cut(&mut candidates);
    let from = out.len();
    out.extend(candidates.iter().map(|&rank| rank as u32));
    out[from..].sort_unstable();
    // Two runs that are in order, which a stable sort merges.
    out.sort();
}

/// From how many scores on a search for a bound pays.
const MANY: usize = 1024;

/// Chooses what [`top_k`] and [`top_p`] do, the same, and keeps the memory: a bound below the chosen scores is found by
/// kernels, and only what lies above it is looked at one by one.
///
/// Two or three passes of 16 scores an instruction over all of them replace two that take a few ns a score.
#[derive(Default)]
pub struct Chooser {
    maxima: Vec<f32>,
    of_maxima: Vec<f32>,
    keys: Vec<u32>,
    runs: Vec<Range<usize>>,
    /// What lies above the bound: key, upside down, then index, so that the smaller one comes first.
    above: Vec<u64>,
    weights: Vec<f32>,
    chosen: Vec<u32>,
}

impl Chooser {
    /// As [`top_k`].
    pub fn top_k(&mut self, kernels: &Kernels, scores: &[f32], k: usize, out: &mut Vec<u32>) {
        let bound = match k > 0 && k < scores.len() && scores.len() >= MANY {
            true => self.bound(kernels, scores, k),
            false => None,
        };
        let Some(last) = bound.and_then(|bound| self.last_above(kernels, scores, k, bound)) else {
            top_k(scores, k, out);
            return;
        };
        out.clear();
        for i in self.runs.iter().cloned().flatten() {
            if rank(scores, i) <= last {
                out.push(i as u32);
            }
        }
    }

    /// The `k`-th largest of `scores`, which has at least as many; it is found soon where few more lie above `bound`.
    pub fn largest(&mut self, kernels: &Kernels, scores: &[f32], k: usize, bound: f32) -> f32 {
        let all = f32::NEG_INFINITY;
        let last = self.last_above(kernels, scores, k, bound);
        last.or_else(|| self.last_above(kernels, scores, k, all))
            .map_or(all, |last| scores[last as u32 as usize])
    }

    /// The rank of the `k`-th largest, `k` not 0, if as many are above `bound`, all of which are in `self.runs` then.
    fn last_above(&mut self, kernels: &Kernels, scores: &[f32], k: usize, bound: f32) -> Option<u64> {
        kernels.runs_above(scores, &[bound], 1, &mut self.runs);
        self.above.clear();
        self.above.extend(self.runs.iter().cloned().flatten().map(|i| rank(scores, i)));
        (k <= self.above.len()).then(|| *self.above.select_nth_unstable(k - 1).1)
    }

    /// A number that at least `k` of `scores` are above: the largest ones of `k` groups are not below the `k`-th of them.
    fn bound(&mut self, kernels: &Kernels, scores: &[f32], k: usize) -> Option<f32> {
        kernels.maxima(scores, &mut self.maxima);
        if few(k, self.maxima.len() / 256 * 16) {
            kernels.maxima(&self.maxima, &mut self.of_maxima);
            std::mem::swap(&mut self.maxima, &mut self.of_maxima);
        }
        if !few(k, self.maxima.len()) {
            return None;
        }
        self.keys.clear();
        self.keys.extend(self.maxima.iter().map(|&x| key(x)));
        let at = self.keys.len() - k;
        let bound = from_key(*self.keys.select_nth_unstable(at).1);
        (bound > f32::NEG_INFINITY).then(|| bound.next_down())
    }

    /// As [`top_p`].
    pub fn top_p(&mut self, kernels: &Kernels, weights: &[f32], p: f32, out: &mut Vec<u32>) {
        let (wanted, largest) = (f64::from(p) * kernels.sum_f64(weights), kernels.max(weights));
        if weights.len() >= MANY && largest.is_normal() {
            // Powers of two down to 2^-32 of the largest: first every eighth, then those between.
            let below =
                |halvings: u32| f32::from_bits((largest.to_bits() >> 23).saturating_sub(halvings) << 23);
            let mut first = 0;
            for step in [8, 2] {
                let bounds = [1, 2, 3, 4].map(|i| below(first + i * step));
                let sums = kernels.sums_from(weights, &bounds);
                // Sums of 16 lanes are rough.
                let enough = sums.iter().take_while(|&&sum| f64::from(sum) < 1.0001 * wanted).count();
                first += enough as u32 * step;
            }
            kernels.runs_above(weights, &[below(first + 2).next_down()], 1, &mut self.runs);
            self.weights.clear();
            self.runs.iter().for_each(|run| self.weights.extend_from_slice(&weights[run.clone()]));
            self.chosen.clear();
            if with_mass(&self.weights, wanted, &mut self.chosen) {
                out.clear();
                // From places among what lies above the bound to those among all.
                let (mut run, mut runs, mut before) = (0..0, self.runs.iter(), 0);
                for &i in &self.chosen {
                    while i as usize >= before + run.len() {
                        before += run.len();
                        run = runs.next().cloned().unwrap_or(0..usize::MAX);
                    }
                    out.push((run.start + i as usize - before) as u32);
                }
                return;
            }
        }
        top_p(weights, p, out);
    }
}

/// Whether `k` of the largest ones of so many groups are a good bound: what lies above is no more than about twice as much.
fn few(k: usize, groups: usize) -> bool {
    8 * k <= 7 * groups
}

/// Places a score: the smaller, the larger it is, and the lower its index.
fn rank(scores: &[f32], i: usize) -> u64 {
    u64::from(!key(scores[i])) << 32 | i as u64
}

/// The number of a key.
fn from_key(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
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
    use longbit_kernels::Isa;
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

        /// Many scores, of any distribution, so that bounds are searched.
        #[test]
        fn a_chooser_chooses_the_same(
            scores in prop::collection::vec(-20.0f32..4.0, 1500..3000),
            special in prop::collection::vec((0usize..1500, scores()), 0..3),
            rounded in any::<bool>(),
            (k, p) in (0usize..3000, prop_oneof![0.0f32..1.0, 0.8f32..1.0, Just(1.0f32)]),
        ) {
            let mut scores = scores;
            if rounded {
                scores.iter_mut().for_each(|x| *x = x.round());
            }
            for (at, some) in special {
                let n = some.len().min(1500 - at);
                scores[at..at + n].copy_from_slice(&some[..n]);
            }
            let (mut chooser, mut ours, mut plain) = (Chooser::default(), vec![3], vec![4]);
            for kernels in Isa::available().into_iter().filter_map(Kernels::for_isa) {
                for k in [k, k / 10, k / 100] {
                    chooser.top_k(kernels, &scores, k, &mut ours);
                    top_k(&scores, k, &mut plain);
                    prop_assert_eq!(&ours, &plain);
                    let last = plain.iter().map(|&i| key(scores[i as usize])).min();
                    for bound in [f32::NEG_INFINITY, -10.0, 3.0] {
                        let ours = (k > 0).then(|| key(chooser.largest(kernels, &scores, k.min(scores.len()), bound)));
                        prop_assert_eq!(ours, last);
                    }
                }
                let mut weights = scores.clone();
                let largest = kernels.max(&weights);
                kernels.exp_sum(&mut weights, largest);
                chooser.top_p(kernels, &weights, p, &mut ours);
                top_p(&weights, p, &mut plain);
                prop_assert_eq!(&ours, &plain);
            }
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
