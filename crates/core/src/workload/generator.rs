//! The rows of one structured head before sinks and needles: topics, noise, RoPE, values.

use super::geometry::{MAX_DIM, Pairs, Spectrum, directions, head_stream, rotate};
use super::heads::HeadTargets;
use super::rng::{NormalTable, Stream};
use super::{BLOCK, Workload, purpose};

/// Topics of a head; their popularity is Zipf(1).
pub(super) const TOPICS: usize = 64;
/// Norm of a topic in a key: 0.6 of the content norm 11.
pub(super) const TOPIC_NORM: f32 = 6.6;
/// Norm of a key's content.
pub(super) const CONTENT_NORM: f32 = 11.0;
/// Norm of the noise in a key: 0.8 of the content norm.
pub(super) const NOISE_NORM: f32 = 8.8;
/// Every key's coordinate along the sink direction.
pub(super) const OFFSET: f32 = -8.0;
/// Every query's coordinate along the sink direction.
pub(super) const QUERY_SINK: f32 = 12.0;
/// What a heavy hitter's key gets along the hitter direction.
pub(super) const HITTER_NORM: f32 = 3.0;
/// Heavy hitters are drawn by 16 bits: 655 of 65,536, one token in a hundred.
const HITTER_DRAWS: u64 = 655;
/// [`HITTER_DRAWS`] as a share.
pub(super) const HITTER_SHARE: f64 = HITTER_DRAWS as f64 / 65_536.0;
/// An outlier's coordinate along the sink direction: four times the norm of a key, away from the queries.
pub(super) const OUTLIER: f32 = -62.0;
/// Outliers are drawn by 16 bits, as hitters are.
const OUTLIER_DRAWS: u64 = 655;
/// Way of the keys' mean across the context, where it drifts.
const DRIFT: f64 = 16.0;
/// AR(1) coefficient of the key noise, and sqrt(1 - a^2).
const KEY_AR: [f32; 2] = [0.5, 0.866_025_4];
/// Blocks from here on hold the decode steps' rows.
pub(super) const DECODE: usize = 1 << 32;

/// Which parts of a key to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parts {
    /// The whole key.
    All,
    /// The noise alone.
    Noise,
}

/// The tables of one head.
#[derive(Debug, Clone)]
pub(super) struct Generator {
    pub(super) pairs: Pairs,
    pub(super) spectrum: Spectrum,
    /// `[d]` the phasor m, zero in the sink pairs.
    pub(super) phasor: Vec<f32>,
    /// `[TOPICS][d]` 6.6 U_c + m.
    base: Vec<f32>,
    /// `[TOPICS][d]` topic part and mean of the values.
    value_base: Vec<f32>,
    /// `[d]` the values' mean.
    pub(super) value_mean: Vec<f32>,
    /// Deviation of a value's coordinate.
    value_noise: f32,
    /// `[d]` deviation of a key's noise along each coordinate.
    noise: Vec<f32>,
    hitters: bool,
    outliers: bool,
    /// Tokens over which the mean drifts; `None` keeps it.
    drift: Option<usize>,
    seed: u64,
    layer: usize,
    kv_head: usize,
}

impl Generator {
    pub(super) fn new(workload: &Workload, targets: &HeadTargets, layer: usize, kv_head: usize) -> Self {
        let (spec, shape, seed) = (&workload.spec, &workload.shape, workload.seed);
        let dim = shape.head_dim;
        let pairs = Pairs::new(dim);
        let mut stream = head_stream(seed, layer, kv_head, purpose::MODEL, 0);
        let spectrum = Spectrum::new(&pairs, spec.eta, spec.placement, &mut stream);
        let mut phasor = vec![0.0f32; dim];
        for j in 0..pairs.sink {
            let (sin, cos) = libm::sincos(std::f64::consts::TAU * stream.unit());
            (phasor[j], phasor[j + pairs.half]) = (cos as f32, sin as f32);
        }
        let mut base = directions(&pairs, 0, TOPICS, &mut stream);
        for row in base.chunks_exact_mut(dim) {
            for (value, m) in row.iter_mut().zip(&phasor) {
                *value = TOPIC_NORM * *value + m;
            }
        }
        let root = (dim as f32).sqrt();
        let unit_rows = |rows: usize, stream: &mut Stream| {
            let mut all = vec![0.0f32; rows * dim];
            for row in all.chunks_exact_mut(dim) {
                stream.normals(NormalTable::get(), row);
                let norm = super::geometry::dot(row, row).sqrt();
                row.iter_mut().for_each(|v| *v /= norm);
            }
            all
        };
        let mut value_mean = unit_rows(1, &mut stream);
        value_mean.iter_mut().for_each(|v| *v *= 0.5);
        let mut value_base = unit_rows(TOPICS, &mut stream);
        let (topic, white) = if spec.topic_values { (0.6, 0.8) } else { (0.0, 1.0) };
        for row in value_base.chunks_exact_mut(dim) {
            for (value, mean) in row.iter_mut().zip(&value_mean) {
                *value = topic * *value + mean;
            }
        }
        let noise = spectrum.deviation.iter().map(|deviation| NOISE_NORM / root * deviation).collect();
        Self {
            pairs,
            spectrum,
            phasor,
            base,
            value_base,
            value_mean,
            value_noise: white / root,
            noise,
            hitters: targets.hitter_logit > 0.0,
            outliers: spec.outliers,
            drift: spec.drift.then_some(workload.context),
            seed,
            layer,
            kv_head,
        }
    }

    /// The head dimension.
    pub(super) fn dim(&self) -> usize {
        2 * self.pairs.half
    }

    /// `[d]` 6.6 U_c + m.
    pub(super) fn base(&self, topic: u8) -> &[f32] {
        let dim = self.dim();
        &self.base[usize::from(topic) * dim..][..dim]
    }

    /// This head's stream for a purpose.
    pub(super) fn stream(&self, purpose: purpose::Purpose, block: usize) -> Stream {
        head_stream(self.seed, self.layer, self.kv_head, purpose, block as u64)
    }

    /// Topic of each of a block's first `tokens` tokens, and whether it is a heavy hitter.
    pub(super) fn topics(&self, block: usize, tokens: usize) -> [(u8, bool); BLOCK] {
        let mut stream = self.stream(purpose::TOPIC, block);
        let mut all = [(0, false); BLOCK];
        let mut topic = 0;
        for (token, slot) in all.iter_mut().take(tokens).enumerate() {
            let word = stream.word();
            if token == 0 || word & 63 == 0 {
                topic = zipf((word >> 32) as u32);
            }
            *slot = (topic, self.hitters && (word >> 8) & 0xFFFF < HITTER_DRAWS);
        }
        all
    }

    /// Keys of a block, turned to their positions, `k` is `[tokens][d]`, `cos` and `sin` `[tokens][d/2]`.
    pub(super) fn keys(&self, block: usize, parts: Parts, cos: &[f32], sin: &[f32], k: &mut [f32]) {
        let half = self.pairs.half;
        let mut outliers = self.outliers.then(|| self.stream(purpose::OUTLIER, block));
        self.plain_keys(block, parts, k.len() / self.dim(), |token, row| {
            let out = &mut k[token * 2 * half..][..2 * half];
            rotate(row, &cos[token * half..][..half], &sin[token * half..][..half], out);
            if parts == Parts::All {
                let outlier = outliers.as_mut().is_some_and(|s| s.word() & 0xFFFF < OUTLIER_DRAWS);
                self.shift(if outlier { OUTLIER } else { OFFSET }, block * BLOCK + token, out);
            }
        });
    }

    /// Adds what every turned key has: `level` along the sink direction, and the drifting mean, which lies in the other
    /// coordinates of the sink pairs, where queries are 0.
    pub(super) fn shift(&self, level: f32, position: usize, key: &mut [f32]) {
        let root = (self.pairs.sink_len() as f32).sqrt();
        let (half, sink) = (self.pairs.half, self.pairs.sink);
        key[sink..half].iter_mut().for_each(|value| *value += level / root);
        if let Some(context) = self.drift {
            let way = (DRIFT * (position as f64 / context as f64 - 0.5)) as f32;
            key[half + sink..].iter_mut().for_each(|value| *value += way / root);
        }
    }

    /// Keys before RoPE and without the offset, row by row.
    pub(super) fn plain_keys(
        &self,
        block: usize,
        parts: Parts,
        tokens: usize,
        mut emit: impl FnMut(usize, &[f32]),
    ) {
        let dim = self.dim();
        let table = NormalTable::get();
        let topics = self.topics(block, tokens);
        let mut stream = self.stream(purpose::KEY, block);
        let (mut state, mut fresh, mut row) = ([0.0f32; MAX_DIM], [0.0f32; MAX_DIM], [0.0f32; MAX_DIM]);
        let (state, fresh, row) = (&mut state[..dim], &mut fresh[..dim], &mut row[..dim]);
        let noise = &self.noise[..dim];
        let along = HITTER_NORM * std::f32::consts::FRAC_1_SQRT_2;
        for (token, &(topic, hitter)) in topics.iter().enumerate().take(tokens) {
            stream.normals(table, fresh);
            let [keep, add] = if token == 0 { [0.0, 1.0] } else { KEY_AR };
            for c in 0..dim {
                state[c] = keep * state[c] + add * fresh[c];
                row[c] = state[c] * noise[c];
            }
            self.spectrum.forward(row);
            if parts == Parts::All {
                for (value, base) in row.iter_mut().zip(self.base(topic)) {
                    *value += base;
                }
                if hitter {
                    for pair in self.pairs.hitter {
                        row[pair] += along;
                    }
                }
            }
            emit(token, row);
        }
    }

    /// Values of a block, `v` is `[tokens][d]`.
    pub(super) fn values(&self, block: usize, v: &mut [f32]) {
        let dim = self.dim();
        let table = NormalTable::get();
        let topics = self.topics(block, v.len() / dim);
        let mut stream = self.stream(purpose::VALUE, block);
        for (row, &(topic, _)) in v.chunks_exact_mut(dim).zip(&topics) {
            stream.normals(table, row);
            let base = &self.value_base[usize::from(topic) * dim..][..dim];
            for (value, base) in row.iter_mut().zip(base) {
                *value = *value * self.value_noise + base;
            }
        }
    }
}

/// A topic by popularity 1/1, 1/2, … 1/64.
pub(super) fn zipf(draw: u32) -> u8 {
    /// Upper ends of the topics' shares of 2^32.
    const ENDS: [u32; TOPICS] = {
        let mut total = 0.0;
        let mut rank = 1;
        while rank <= TOPICS {
            total += 1.0 / rank as f64;
            rank += 1;
        }
        let mut ends = [u32::MAX; TOPICS];
        let mut sum = 0.0;
        rank = 1;
        while rank < TOPICS {
            sum += 1.0 / rank as f64;
            ends[rank - 1] = (sum / total * 4_294_967_296.0) as u32;
            rank += 1;
        }
        ends
    };
    ENDS.partition_point(|end| *end <= draw).min(TOPICS - 1) as u8
}

#[cfg(test)]
mod tests {
    use super::zipf;

    #[test]
    fn topics_follow_zipf() {
        let draws = 1u64 << 20;
        let mut counts = [0u32; super::TOPICS];
        for i in 0..draws {
            counts[usize::from(zipf((i << 12) as u32))] += 1;
        }
        let total: f64 = (1..=64).map(|r| 1.0 / f64::from(r)).sum();
        for (rank, &count) in counts.iter().enumerate() {
            let expected = draws as f64 / (rank as f64 + 1.0) / total;
            assert!((f64::from(count) - expected).abs() < 2.0, "rank {rank}: {count} for {expected}");
        }
    }
}
