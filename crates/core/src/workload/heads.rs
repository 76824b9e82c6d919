//! Head types, their parameters, and which head of a model has which.

use super::HeadShape;
use super::rng::Stream;

/// What a head does. The first seven make up the mix; the last three are the controls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HeadType {
    /// Most mass on the first token.
    Sink,
    /// Power law of the distance.
    Local,
    /// Topics and moderate noise.
    Content,
    /// Topics and strong noise: few tokens carry the mass.
    Peaked,
    /// A few tokens draw every query.
    HeavyHitter,
    /// Mass over half of the context.
    Diffuse,
    /// Content, and planted tokens.
    Needle,
    /// Diffuse, and groups of planted tokens to count.
    Aggregation,
    /// Control: independent N(0, 1).
    Gaussian,
    /// Control: equal logits.
    Uniform,
    /// Control: one token has all the mass.
    OneHot,
}

/// Every head type, mix first.
const ALL: [HeadType; 11] = [
    HeadType::Sink,
    HeadType::Local,
    HeadType::Content,
    HeadType::Peaked,
    HeadType::HeavyHitter,
    HeadType::Diffuse,
    HeadType::Needle,
    HeadType::Aggregation,
    HeadType::Gaussian,
    HeadType::Uniform,
    HeadType::OneHot,
];

/// Shares of the mix in percent.
const SHARES: [(HeadType, usize); 7] = [
    (HeadType::Sink, 30),
    (HeadType::Local, 20),
    (HeadType::Content, 20),
    (HeadType::Peaked, 10),
    (HeadType::HeavyHitter, 10),
    (HeadType::Diffuse, 5),
    (HeadType::Needle, 5),
];

/// The statistics that a head type is built to have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadTargets {
    /// Exponent of the power law of the distance: logits hold -alpha ln(distance).
    pub recency: f64,
    /// Logit gained by a token of the query's topic at distance 0 (RoPE wears it down with distance).
    pub topic_logit: f64,
    /// Standard deviation of the noise logits over the context, after RoPE.
    pub noise_std: f64,
    /// Mean mass of the first token over the group's queries.
    pub sink_mass: f64,
    /// Logit gained by a heavy hitter at distance 0; 0 plants none.
    pub hitter_logit: f64,
}

impl HeadType {
    /// The name used in specifications and columns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sink => "sink",
            Self::Local => "local",
            Self::Content => "content",
            Self::Peaked => "peaked",
            Self::HeavyHitter => "heavy-hitter",
            Self::Diffuse => "diffuse",
            Self::Needle => "needle",
            Self::Aggregation => "aggregation",
            Self::Gaussian => "gaussian",
            Self::Uniform => "uniform",
            Self::OneHot => "onehot",
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        ALL.into_iter().find(|t| t.name() == name)
    }

    /// What the type is calibrated to; `None` for the controls.
    pub fn targets(self) -> Option<HeadTargets> {
        let (recency, topic_logit, noise_std, sink_mass, hitter_logit) = match self {
            Self::Sink => (0.6, 1.0, 1.0, 0.85, 0.0),
            Self::Local => (1.2, 0.5, 0.5, 0.3, 0.0),
            Self::Content | Self::Needle => (0.3, 3.0, 2.0, 0.4, 0.0),
            Self::Peaked => (0.3, 4.0, 3.0, 0.4, 0.0),
            Self::HeavyHitter => (0.3, 1.0, 1.5, 0.3, 5.0),
            Self::Diffuse => (0.2, 0.5, 1.0, 0.05, 0.0),
            Self::Aggregation => (0.2, 0.5, 1.0, 0.1, 0.0),
            Self::Gaussian | Self::Uniform | Self::OneHot => return None,
        };
        Some(HeadTargets { recency, topic_logit, noise_std, sink_mass, hitter_logit })
    }
}

/// The type of each (layer, KV head) of a mix, `[layers * kv_heads]`.
///
/// Layers 0 and 1 are diffuse, as reported for trained models (in models of fewer than four layers no layer is set
/// aside). The rest gets the shares by largest remainder, shuffled by the seed.
pub(super) fn assign_mix(shape: &HeadShape, seed: u64) -> Vec<HeadType> {
    let diffuse = if shape.layers >= 4 { 2 * shape.kv_heads } else { 0 };
    let free = shape.layers * shape.kv_heads - diffuse;
    let mut counts: Vec<usize> = SHARES.iter().map(|(_, share)| free * share / 100).collect();
    let mut order: Vec<usize> = (0..SHARES.len()).collect();
    // Stable: among equal remainders the type that comes first in the table wins.
    order.sort_by_key(|&i| std::cmp::Reverse(free * SHARES[i].1 % 100));
    let missing = free - counts.iter().sum::<usize>();
    for &i in order.iter().take(missing) {
        counts[i] += 1;
    }
    let mut rest: Vec<HeadType> = SHARES
        .iter()
        .zip(&counts)
        .flat_map(|((head, _), &count)| std::iter::repeat_n(*head, count))
        .collect();
    Stream::new(seed, &[super::purpose::ASSIGN]).shuffle(&mut rest);
    let mut all = vec![HeadType::Diffuse; diffuse];
    all.append(&mut rest);
    all
}
