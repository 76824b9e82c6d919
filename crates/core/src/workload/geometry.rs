//! The coordinates of a head: which RoPE pairs are set aside, where the noise lies, how rows turn.
//!
//! Rows use the half-rotation layout: pair j is (coordinate j, coordinate j + d/2) and turns by
//! theta^(-2j/d) radians a position.

use super::rng::Stream;
use super::spec::Placement;
use super::{HeadShape, purpose};

/// Largest head dimension; rows of work space are arrays of this size.
pub(super) const MAX_DIM: usize = 256;

/// Pairs set aside, in proportion to the 64 pairs of d = 128.
#[derive(Debug, Clone)]
pub(super) struct Pairs {
    /// Half the head dimension.
    pub(super) half: usize,
    /// First pair of the sink and offset directions: the slowest ones (61..64 of 64).
    pub(super) sink: usize,
    /// The two pairs of the hitter direction (58, 59 of 64).
    pub(super) hitter: [usize; 2],
    /// First and past-the-last pair of the slow band (44..61 of 64).
    pub(super) slow: [usize; 2],
    /// First pair of a needle's direction, which ends at `sink` (24 of 64).
    pub(super) needle: usize,
}

impl Pairs {
    pub(super) fn new(head_dim: usize) -> Self {
        let half = head_dim / 2;
        let sink = half - ((3 * half + 32) / 64).max(1);
        Self {
            half,
            sink,
            hitter: [sink - 3, sink - 2],
            slow: [(half * 44 / 64).min(sink - 4), sink],
            needle: half * 24 / 64,
        }
    }

    /// Whether noise, topics and needles live in pair j: they keep out of the sink's and the hitters' pairs, so that
    /// those logits stay what they were solved to be.
    pub(super) fn is_content(&self, pair: usize) -> bool {
        pair < self.sink && !self.hitter.contains(&pair)
    }

    /// Number of sink coordinates (the first of each sink pair).
    pub(super) fn sink_len(&self) -> usize {
        self.half - self.sink
    }
}

/// Deviation of the key noise along each coordinate, and the rotation that scrambles it.
#[derive(Debug, Clone)]
pub(super) struct Spectrum {
    /// `[d]`: square roots of the eigenvalues; mean square 1 over the coordinates used.
    pub(super) deviation: Vec<f32>,
    /// `[d]`: signs (0 where noise keeps out) applied after the Hadamard transform; `None` leaves the noise in place.
    scramble: Option<Vec<f32>>,
}

impl Spectrum {
    pub(super) fn new(pairs: &Pairs, eta: f64, placement: Placement, stream: &mut Stream) -> Self {
        let half = pairs.half;
        let content: Vec<usize> = (0..2 * half).filter(|&c| pairs.is_content(c % half)).collect();
        let (order, scramble) = match placement {
            Placement::Slow => {
                let in_band = |c: &usize| (pairs.slow[0]..pairs.slow[1]).contains(&(c % half));
                let (mut band, mut rest): (Vec<usize>, Vec<usize>) =
                    content.iter().copied().partition(in_band);
                stream.shuffle(&mut band);
                stream.shuffle(&mut rest);
                band.append(&mut rest);
                (band, None)
            }
            Placement::Scrambled => {
                let mut order: Vec<usize> = (0..2 * half).collect();
                stream.shuffle(&mut order);
                let mut signs = vec![0.0f32; 2 * half];
                for &c in &content {
                    signs[c] = if stream.word() >> 63 == 0 { 1.0 } else { -1.0 };
                }
                (order, Some(signs))
            }
        };
        let eigen: Vec<f64> = (1..=order.len()).map(|i| libm::pow(i as f64, -eta)).collect();
        let scale = order.len() as f64 / eigen.iter().sum::<f64>();
        let mut deviation = vec![0.0f32; 2 * half];
        for (&c, value) in order.iter().zip(&eigen) {
            deviation[c] = (value * scale).sqrt() as f32;
        }
        Self { deviation, scramble }
    }

    /// Scrambles a row of noise that has been scaled by the deviations.
    #[inline]
    pub(super) fn forward(&self, row: &mut [f32]) {
        if let Some(signs) = &self.scramble {
            let block = largest_power(row.len());
            hadamard(&mut row[..block]);
            if block < signs.len() {
                let start = signs.len() - block;
                hadamard(&mut row[start..]);
            }
            for (value, sign) in row.iter_mut().zip(signs) {
                *value *= sign;
            }
        }
    }

    /// Variance of row . noise for noise of this spectrum; `row` is used up.
    #[inline]
    pub(super) fn variance(&self, row: &mut [f32]) -> f32 {
        if let Some(signs) = &self.scramble {
            for (value, sign) in row.iter_mut().zip(signs) {
                *value *= sign;
            }
            let block = largest_power(row.len());
            if block < signs.len() {
                let start = signs.len() - block;
                hadamard(&mut row[start..]);
            }
            hadamard(&mut row[..block]);
        }
        for (value, deviation) in row.iter_mut().zip(&self.deviation) {
            *value *= deviation;
        }
        dot(row, row)
    }
}

fn largest_power(len: usize) -> usize {
    if len.is_power_of_two() { len } else { len.next_power_of_two() / 2 }
}

/// Normalised Walsh-Hadamard transform of a power-of-two row: orthogonal, symmetric, its own inverse.
fn hadamard(row: &mut [f32]) {
    let mut span = 1;
    while span < row.len() {
        for pair in row.chunks_exact_mut(2 * span) {
            let (low, high) = pair.split_at_mut(span);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        span *= 2;
    }
    let scale = 1.0 / (row.len() as f32).sqrt();
    for value in row {
        *value *= scale;
    }
}

/// Turns a row forward: `out[j] + i out[j + d/2] = (row[j] + i row[j + d/2]) (cos[j] + i sin[j])`.
#[inline]
pub(super) fn rotate(row: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = row.len() / 2;
    let (a, b) = row.split_at(half);
    let (x, y) = out[..2 * half].split_at_mut(half);
    let (cos, sin, b) = (&cos[..half], &sin[..half], &b[..half]);
    for j in 0..half {
        x[j] = a[j] * cos[j] - b[j] * sin[j];
        y[j] = a[j] * sin[j] + b[j] * cos[j];
    }
}

/// Turns a row back: the transpose of [`rotate`].
#[inline]
pub(super) fn rotate_back(row: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = row.len() / 2;
    let (a, b) = row.split_at(half);
    let (x, y) = out[..2 * half].split_at_mut(half);
    let (cos, sin, b) = (&cos[..half], &sin[..half], &b[..half]);
    for j in 0..half {
        x[j] = a[j] * cos[j] + b[j] * sin[j];
        y[j] = b[j] * cos[j] - a[j] * sin[j];
    }
}

/// Dot product in 8 lanes with a fixed tree: the same bits with or without vector instructions.
#[inline]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (mut left, mut right) = (a.chunks_exact(8), b.chunks_exact(8));
    for (x, y) in (&mut left).zip(&mut right) {
        for lane in 0..8 {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    for (lane, (x, y)) in left.remainder().iter().zip(right.remainder()).enumerate() {
        lanes[lane] += x * y;
    }
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}

/// Rows of cosines and sines, `[rows][d/2]` each, computed with libm from the base of the frequencies.
#[derive(Debug, Clone)]
pub(super) struct Angles {
    half: usize,
    frequency: Vec<f64>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    pub(super) fn new(shape: &HeadShape, positions: impl IntoIterator<Item = usize>) -> Self {
        let half = shape.head_dim / 2;
        // Rounded to f32 first, as the model's own table is: the two must agree at distant positions.
        let frequency = (0..half)
            .map(|j| {
                f64::from((1.0 / libm::pow(shape.rope_theta, (2 * j) as f64 / shape.head_dim as f64)) as f32)
            })
            .collect();
        let mut angles = Self { half, frequency, cos: Vec::new(), sin: Vec::new() };
        for position in positions {
            angles.push(position);
        }
        angles
    }

    fn push(&mut self, position: usize) {
        for frequency in &self.frequency {
            let (sin, cos) = libm::sincos(position as f64 * frequency);
            self.cos.push(cos as f32);
            self.sin.push(sin as f32);
        }
    }

    /// Cosines and sines of `count` rows from row `start`.
    pub(super) fn rows(&self, start: usize, count: usize) -> (&[f32], &[f32]) {
        let range = start * self.half..(start + count) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Fills unit vectors of random direction in the content pairs from `first` on, `[rows][d]`.
pub(super) fn directions(pairs: &Pairs, first: usize, rows: usize, stream: &mut Stream) -> Vec<f32> {
    let dim = 2 * pairs.half;
    let mut all = vec![0.0f32; rows * dim];
    for row in all.chunks_exact_mut(dim) {
        stream.normals(super::rng::NormalTable::get(), row);
        for (c, value) in row.iter_mut().enumerate() {
            if !(pairs.is_content(c % pairs.half) && c % pairs.half >= first) {
                *value = 0.0;
            }
        }
        let norm = dot(row, row).sqrt();
        row.iter_mut().for_each(|value| *value /= norm);
    }
    all
}

/// The purpose's stream of one (layer, KV head).
pub(super) fn head_stream(
    seed: u64,
    layer: usize,
    kv_head: usize,
    purpose: purpose::Purpose,
    block: u64,
) -> Stream {
    Stream::new(seed, &[purpose, layer as u64, kv_head as u64, block])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_the_usual_head_dim_are_the_stated_ones() {
        let pairs = Pairs::new(128);
        assert_eq!(
            (pairs.half, pairs.sink, pairs.hitter, pairs.slow, pairs.needle),
            (64, 61, [58, 59], [44, 61], 24)
        );
        for dim in (16..=MAX_DIM).step_by(2) {
            let pairs = Pairs::new(dim);
            assert!(
                pairs.slow[0] < pairs.hitter[0] && pairs.hitter[1] < pairs.sink && pairs.sink < pairs.half,
                "{dim}"
            );
            assert!((pairs.needle..pairs.sink).any(|j| pairs.is_content(j)), "{dim}");
        }
    }

    #[test]
    fn scrambling_is_orthogonal_and_its_variance_is_the_noise_variance() {
        for dim in [64, 96, 100, 128] {
            let pairs = Pairs::new(dim);
            let spectrum =
                Spectrum::new(&pairs, 1.0, Placement::Scrambled, &mut Stream::new(1, &[dim as u64]));
            let mut query = directions(&pairs, 0, 1, &mut Stream::new(2, &[]));
            // Sum over the eigen-directions of (q . F e_i)^2 lambda_i, the slow way.
            let mut expected = 0.0;
            for i in 0..dim {
                let mut column = vec![0.0; dim];
                column[i] = spectrum.deviation[i];
                spectrum.forward(&mut column);
                expected += dot(&query, &column) * dot(&query, &column);
            }
            let got = spectrum.variance(&mut query);
            assert!((got - expected).abs() < 1e-4 * expected, "{dim}: {got} {expected}");
        }
    }

    #[test]
    fn turning_back_undoes_turning() {
        let shape = HeadShape { layers: 1, heads: 1, kv_heads: 1, head_dim: 20, rope_theta: 1e4 };
        let angles = Angles::new(&shape, [12_345]);
        let (cos, sin) = angles.rows(0, 1);
        let row: Vec<f32> = (0..20).map(|i| i as f32 - 7.0).collect();
        let (mut turned, mut back) = (vec![0.0; 20], vec![0.0; 20]);
        rotate(&row, cos, sin, &mut turned);
        rotate_back(&turned, cos, sin, &mut back);
        assert!(turned.iter().zip(&row).any(|(a, b)| (a - b).abs() > 0.5));
        assert!(back.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}
