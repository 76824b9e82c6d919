//! What a method reads, held against the exact softmax of the same queries: the mass that it captures, the mass that it
//! assumes for the rest, and how many of the tokens that matter it finds.
//!
//! Exact weights of all tokens take memory, so they are kept for some layers and the first steps alone; see [`Scope`].

use longbit::attention::{TokenSet, top_p};
use longbit::{Captured, ModelConfig};
use longbit_protocol::{NOT_FINITE, Reads, TOP_P};

use crate::quality::quantile;

/// Bytes that exact weights may take in all.
const ROOM: u64 = 256 << 20;
/// Steps of a (layer, KV head) that are kept at the most: more layers tell more than more steps.
const STEPS: usize = 4;

/// For which layers and steps exact weights are kept: the first of the compared steps, at most 4, and as many layers, evenly
/// spaced and with all of their KV heads, as 256 MiB hold. Where a layer is too large for that there are fewer steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scope {
    /// The first of the compared steps.
    pub(crate) steps: usize,
    layers: Vec<usize>,
    bytes: u64,
}

impl Scope {
    pub(crate) fn new(config: &ModelConfig, context: usize, compared: usize) -> Self {
        let tokens = context.saturating_add(compared) as u64;
        // A weight and a bit for each token, and for each query head of a layer.
        let layer =
            (config.heads as u64).saturating_mul(tokens.saturating_mul(4).saturating_add(tokens / 8 + 64));
        let fits = |bytes: u64| usize::try_from(ROOM / bytes.max(1)).unwrap_or(usize::MAX);
        let steps = compared.min(STEPS).min(fits(layer));
        let of_layer = layer.saturating_mul(steps as u64);
        let count = if steps == 0 { 0 } else { config.layers.min(fits(of_layer)) };
        // The middles of as many equal parts of the stack.
        let layers: Vec<usize> = (0..count).map(|i| (2 * i + 1) * config.layers / (2 * count)).collect();
        Scope { steps, bytes: of_layer * count as u64, layers }
    }

    /// Whether weights of `layer` are kept.
    pub(crate) fn has(&self, layer: usize) -> bool {
        self.layers.contains(&layer)
    }

    /// Bytes that all weights take.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The exact softmax of a query head at a step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Softmax {
    /// One a token; their sum is 1.
    weights: Vec<f32>,
    /// Logarithm of the sum of `exp(logit)`.
    log_mass: f64,
    /// The fewest tokens that hold [`TOP_P`] of the mass.
    top: TokenSet,
    /// How many they are.
    top_tokens: usize,
}

impl Softmax {
    /// Of the logits of all tokens.
    pub(crate) fn new(mut logits: Vec<f32>) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|z| f64::from(z - max).exp()).sum();
        logits.iter_mut().for_each(|z| *z = (f64::from(*z - max).exp() / sum) as f32);
        let weights = logits;
        let (mut chosen, mut top) = (Vec::new(), TokenSet::default());
        top_p(&weights, TOP_P as f32, &mut chosen);
        top.reset(weights.len());
        chosen.iter().for_each(|&token| top.insert(token as usize));
        Softmax { log_mass: f64::from(max) + sum.ln(), top, top_tokens: chosen.len(), weights }
    }

    /// Share of the mass, and tokens of the top set, that `tokens` hold.
    fn among(&self, tokens: &TokenSet) -> (f64, usize) {
        let (mut mass, mut found, mut spans) = (0.0, 0, Vec::new());
        tokens.spans(&mut spans);
        for token in spans.into_iter().flatten() {
            mass += self.weights.get(token).map_or(0.0, |w| f64::from(*w));
            found += usize::from(self.top.contains(token));
        }
        (mass, found)
    }
}

/// The samples of a cell; see [`Reads`].
#[derive(Default)]
pub(crate) struct Samples {
    masses: Vec<f64>,
    tail_errors: Vec<f64>,
    recalls: Vec<f64>,
    densities: Vec<f64>,
    group_densities: Vec<f64>,
}

impl Samples {
    /// Adds one (layer, KV head) at one step: the exact softmax of each query head of its group, what the method did, and
    /// the position of each row of the cache.
    pub(crate) fn add(
        &mut self,
        exact: &[Softmax],
        captured: &Captured,
        position_of: impl Fn(usize) -> usize,
    ) {
        let Some(tokens) = exact.first().map(|s| s.weights.len()) else { return };
        let mut shared = TokenSet::default();
        shared.reset(tokens);
        let insert = |set: &mut TokenSet, row: usize| {
            let token = position_of(row);
            if token < tokens {
                set.insert(token);
            }
        };
        captured.selection.spans.iter().cloned().flatten().for_each(|row| insert(&mut shared, row));
        for (h, (softmax, tail)) in exact.iter().zip(&captured.tail).enumerate() {
            let beyond = 1.0 - softmax.among(&shared).0;
            let mut attended = shared.clone();
            captured
                .own
                .get(h)
                .into_iter()
                .flatten()
                .cloned()
                .flatten()
                .for_each(|row| insert(&mut attended, row));
            let (mass, found) = softmax.among(&attended);
            let assumed = (f64::from(*tail) - softmax.log_mass).exp();
            let error = (assumed - beyond).abs();
            self.masses.push(mass);
            self.tail_errors.push(if error.is_finite() { error } else { NOT_FINITE });
            self.recalls.push(found as f64 / softmax.top_tokens.max(1) as f64);
            self.densities.push(softmax.top_tokens as f64 / tokens.max(1) as f64);
        }
        let any = (0..tokens).filter(|&token| exact.iter().any(|s| s.top.contains(token))).count();
        self.group_densities.push(any as f64 / tokens.max(1) as f64);
    }

    /// The figures; none of no samples.
    pub(crate) fn summary(mut self) -> Option<Reads> {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        for values in [&mut self.masses, &mut self.tail_errors, &mut self.recalls] {
            values.sort_by(f64::total_cmp);
        }
        (!self.masses.is_empty()).then(|| Reads {
            samples: self.masses.len() as u64,
            captured_mass_p50: quantile(&self.masses, 0.5),
            captured_mass_p5: quantile(&self.masses, 0.05),
            tail_mass_error_p50: quantile(&self.tail_errors, 0.5),
            tail_mass_error_p95: quantile(&self.tail_errors, 0.95),
            top_recall_mean: mean(&self.recalls),
            top_recall_p5: quantile(&self.recalls, 0.05),
            top_density_head: mean(&self.densities),
            top_density_group: mean(&self.group_densities),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longbit::attention::Selection;
    use longbit::preset;

    /// A softmax of these weights.
    fn softmax(weights: &[f32]) -> Softmax {
        Softmax::new(weights.iter().map(|w| w.ln() + 50.0).collect())
    }

    fn reading(spans: &[std::ops::Range<usize>], tail: &[f64]) -> Captured {
        Captured {
            selection: Selection { spans: spans.to_vec(), ..Selection::default() },
            own: Vec::new(),
            exact: vec![0.0; tail.len()],
            tail: tail.iter().map(|mass| (mass.ln() + 50.0) as f32).collect(),
        }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }

    /// Ten tokens of known mass, two query heads.
    #[test]
    fn figures_of_known_weights() {
        // Top sets: 0.5, 0.3, 0.16 are the first three tokens; 0.95 and more is the last token alone.
        let one = softmax(&[0.5, 0.3, 0.16, 0.02, 0.02, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6]);
        let two = softmax(&[0.01, 0.01, 0.01, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 0.97]);
        assert_eq!((one.top_tokens, two.top_tokens), (3, 1));
        let mut samples = Samples::default();
        // The tail of the first head is told rightly, that of the second not at all.
        samples.add(&[one, two], &reading(&[0..2, 4..5], &[0.18, 0.0]), |row| row);
        let reads = samples.summary().unwrap();
        assert_eq!(reads.samples, 2);
        close(reads.captured_mass_p50, 0.02);
        close(reads.captured_mass_p5, 0.02);
        close(reads.tail_mass_error_p50, 0.0);
        close(reads.tail_mass_error_p95, 0.98);
        close(reads.top_recall_mean, (2.0 / 3.0 + 0.0) / 2.0);
        close(reads.top_recall_p5, 0.0);
        close(reads.top_density_head, 0.2);
        close(reads.top_density_group, 0.4);
    }

    /// What a method attends itself is attended, by the head that weighs it, and its mass is that of the tail.
    #[test]
    fn rows_of_its_own_are_attended_and_stand_in_the_tail() {
        let weights = [0.5, 0.25, 0.25];
        let mut captured = reading(std::slice::from_ref(&(0..1)), &[0.25, 0.5]);
        captured.own = vec![vec![1..2, 0..2], vec![1..2, 2..3]];
        let mut samples = Samples::default();
        samples.add(&[softmax(&weights), softmax(&weights)], &captured, |row| row);
        let reads = samples.summary().unwrap();
        close(reads.captured_mass_p5, 0.75);
        close(reads.top_recall_mean, (2.0 / 3.0 + 1.0) / 2.0);
        close(reads.tail_mass_error_p50, 0.0);
        close(reads.tail_mass_error_p95, 0.25);
    }

    #[test]
    fn reading_everything_leaves_nothing_out() {
        let mut samples = Samples::default();
        let all = softmax(&[0.1; 10]);
        assert_eq!(all.top_tokens, 10);
        samples.add(&[all], &reading(std::slice::from_ref(&(0..10)), &[0.0]), |row| row);
        let reads = samples.summary().unwrap();
        close(reads.captured_mass_p5, 1.0);
        close(reads.tail_mass_error_p95, 0.0);
        assert_eq!((reads.top_recall_p5, reads.top_density_group), (1.0, 1.0));
        assert_eq!(Samples::default().summary(), None);
    }

    /// Rows of an evicting cache are not positions, and an estimate may be anything.
    #[test]
    fn rows_have_positions_and_bad_tails_stay_numbers() {
        let weights = [0.96, 0.01, 0.01, 0.02];
        let mut samples = Samples::default();
        samples.add(&[softmax(&weights)], &reading(&[0..1, 2..3], &[f64::INFINITY]), |row| row + 1);
        let reads = samples.summary().unwrap();
        close(reads.captured_mass_p50, 0.03);
        assert_eq!((reads.tail_mass_error_p50, reads.top_recall_mean), (NOT_FINITE, 0.0));
    }

    #[test]
    fn what_is_kept_stays_within_the_room() {
        let config = preset("bitnet-2b-4t").unwrap();
        let near = Scope::new(&config, 2048, 4);
        assert_eq!((near.steps, near.layers.len()), (4, 30));
        assert!((0..30).all(|layer| near.has(layer)));
        let far = Scope::new(&config, 98_304, 64);
        assert_eq!((far.steps, far.layers.as_slice()), (4, &[1, 5, 9, 13, 16, 20, 24, 28][..]));
        assert!(far.bytes() <= ROOM && far.bytes() > ROOM / 2);
        // Where four steps of a layer are too many there are fewer, and at last none.
        let vast = Scope::new(&config, 2 << 20, 4);
        assert_eq!((vast.steps, vast.layers.as_slice()), (1, &[15][..]));
        let endless = Scope::new(&config, 1 << 40, 4);
        assert_eq!((endless.steps, endless.layers.len(), endless.bytes()), (0, 0, 0));
        assert_eq!(Scope::new(&config, 4096, 0).bytes(), 0);
        assert!(Scope::new(&config, usize::MAX, usize::MAX).bytes() <= ROOM);
    }
}
