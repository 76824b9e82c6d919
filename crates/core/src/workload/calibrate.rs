//! Solves a head's free constants: noise scale of every query, strength of the sinks, strength of the needle.

use std::sync::Arc;

use super::generator::{DECODE, Generator, HITTER_NORM, HITTER_SHARE, NOISE_NORM, OFFSET, Parts, QUERY_SINK};
use super::geometry::{Angles, MAX_DIM, dot, rotate, rotate_back};
use super::heads::HeadTargets;
use super::needle::{Part, Planted, SINKS};
use super::queries::{Shaper, Trajectory, gains};
use super::rng::Stream;
use super::{BLOCK, HeadShape, HeadType, Workload, purpose};

/// Tokens before the first step whose logits are taken as they are.
const NEAR_BLOCKS: usize = 32;
/// Positions that stand for the tokens before those.
const FAR: usize = 768;
/// Steps that the sinks are solved for, and at most for the needle.
const SINK_PROBES: usize = 3;
const NEEDLE_PROBES: usize = 16;
/// What the calibration of every head shares: positions and their angles.
#[derive(Debug)]
pub(super) struct Plan {
    /// First position taken as it is; a multiple of [`BLOCK`].
    near: usize,
    /// Angles of positions near .. context + steps.
    near_angles: Angles,
    /// Positions before, the tokens that each stands for, and their angles.
    far: Vec<(usize, f64)>,
    far_angles: Angles,
    /// Angles of positions spread evenly over the context.
    span_angles: Angles,
}

impl Plan {
    /// Positions over which the noise variance is averaged.
    pub(super) const SPAN: usize = 128;

    pub(super) fn new(shape: &HeadShape, context: usize, steps: usize, seed: u64) -> Self {
        let near = context.div_ceil(BLOCK).saturating_sub(NEAR_BLOCKS) * BLOCK;
        let mut stream = Stream::new(seed, &[purpose::PROBE]);
        // Strata that widen with the distance, for the weights of recency heads fall with it.
        let mut far = Vec::new();
        if near > SINKS {
            let reach = (context - near) as f64;
            let growth = libm::log((context - SINKS) as f64 / reach);
            let mut end = near;
            for i in 1..=FAR {
                let distance = reach * libm::exp(growth * i as f64 / FAR as f64);
                let start =
                    if i == FAR { SINKS } else { (context - (distance as usize).min(context)).max(SINKS) };
                if start < end {
                    far.push((start + stream.below(end - start), (end - start) as f64));
                    end = start;
                }
            }
        }
        let span = (0..Self::SPAN).map(|i| {
            let (start, end) = (
                i * context / Self::SPAN,
                ((i + 1) * context / Self::SPAN).max(i * context / Self::SPAN + 1),
            );
            start + stream.below(end - start)
        });
        let span_angles = Angles::new(shape, span);
        Self {
            near,
            near_angles: Angles::new(shape, near..context + steps),
            far_angles: Angles::new(shape, far.iter().map(|(position, _)| *position)),
            far,
            span_angles,
        }
    }

    /// Angles of `count` positions from one of the last [`PROMPT_QUERIES`] of the context, or a step's, on.
    pub(super) fn angles(&self, position: usize, count: usize) -> (&[f32], &[f32]) {
        self.near_angles.rows(position - self.near, count)
    }

    /// Angles of one of the [`Plan::SPAN`] positions.
    pub(super) fn span(&self, row: usize) -> (&[f32], &[f32]) {
        self.span_angles.rows(row, 1)
    }
}

/// A structured head with its constants solved.
#[derive(Debug, Clone)]
pub(super) struct Solved {
    pub(super) plan: Arc<Plan>,
    pub(super) generator: Generator,
    /// `[4]` coordinates of the first keys along the sink direction.
    pub(super) sinks: [f32; SINKS],
    pub(super) trajectory: Trajectory,
    /// `[steps][d]` keys before RoPE, and values, of the decode steps.
    pub(super) new_keys: Vec<f32>,
    pub(super) new_values: Vec<f32>,
    pub(super) needle: Option<Planted>,
    /// Factors of the phasor, topic and hitter parts of a query.
    pub(super) gains: [f32; 3],
    /// Deviation of the noise logits.
    pub(super) noise_std: f64,
}

pub(super) fn solve(
    workload: &Workload,
    plan: &Arc<Plan>,
    layer: usize,
    kv_head: usize,
    targets: &HeadTargets,
    ordinal: usize,
) -> Solved {
    let shape = &workload.shape;
    let generator = Generator::new(workload, targets, layer, kv_head);
    let root = (shape.head_dim as f64).sqrt();
    let gains = gains(targets, shape.head_dim, shape.rope_theta);
    let noise_std = targets.noise_std;
    let shaper = Shaper { plan, generator: &generator, noise_std, gains: &gains };
    let trajectory = Trajectory::new(&shaper, workload);
    let (new_keys, new_values) = decode_rows(&generator, workload.steps);
    let mut solved = Solved {
        plan: plan.clone(),
        generator,
        sinks: [0.0; SINKS],
        trajectory,
        new_keys,
        new_values,
        needle: None,
        gains,
        noise_std,
    };
    let head = workload.head_type(layer, kv_head);
    let is_needle = matches!(head, HeadType::Needle | HeadType::Aggregation);
    let needle = is_needle.then(|| Planted::new(workload, &solved.generator, head, ordinal));
    let probes = Probes::new(
        workload,
        plan,
        &solved,
        needle.as_ref(),
        if is_needle { NEEDLE_PROBES } else { SINK_PROBES },
    );
    let sink_logits = probes.sink_logits(targets.sink_mass);
    let along = root / f64::from(QUERY_SINK);
    solved.sinks = sink_logits.map(|logit| (logit * along) as f32);
    if let Some(mut planted) = needle {
        planted.strength = probes.strengths(workload, &planted, &sink_logits);
        solved.needle = Some(planted);
    }
    solved
}

/// Keys before RoPE and values of the decode steps, `[steps][d]` each.
fn decode_rows(generator: &Generator, steps: usize) -> (Vec<f32>, Vec<f32>) {
    let dim = generator.dim();
    let (mut keys, mut values) = (vec![0.0f32; steps * dim], vec![0.0f32; steps * dim]);
    for (chunk, (k, v)) in keys.chunks_mut(BLOCK * dim).zip(values.chunks_mut(BLOCK * dim)).enumerate() {
        generator.plain_keys(DECODE + chunk, Parts::All, k.len() / dim, |token, row| {
            k[token * dim..][..dim].copy_from_slice(row);
        });
        generator.values(DECODE + chunk, v);
    }
    (keys, values)
}

/// A token (or the tokens that one stands for) as a probe query with needle strength b sees it: weight
/// `exp(log_weight + z + b along + (b cross + b^2 square / 2))`.
#[derive(Debug, Clone, Copy, Default)]
struct Term {
    z: f64,
    along: f64,
    cross: f64,
    square: f64,
}

/// Probe queries and the terms of their log-sum-exp.
struct Probes {
    steps: Vec<usize>,
    /// `[steps][group]`, terms without sinks and needle.
    terms: Vec<Vec<Term>>,
    /// `[steps][group]`, what holds the answer.
    answer: Vec<Vec<Term>>,
    group: usize,
}

impl Probes {
    fn new(
        workload: &Workload,
        plan: &Plan,
        solved: &Solved,
        needle: Option<&Planted>,
        count: usize,
    ) -> Self {
        let generator = &solved.generator;
        let (dim, group, context) = (generator.dim(), workload.shape.group(), workload.context);
        let root = (dim as f64).sqrt();
        let count = count.min(workload.steps);
        let steps: Vec<usize> = (0..count).map(|i| i * (workload.steps - 1) / (count - 1).max(1)).collect();
        let pairs = &generator.pairs;
        let mut turned = vec![0.0f32; steps.len() * group * dim];
        for (probe, out) in turned.chunks_exact_mut(dim).enumerate() {
            let step = steps[probe / group];
            let (cos, sin) = plan.near_angles.rows(context + step - plan.near, 1);
            rotate(&solved.trajectory.queries[(step * group + probe % group) * dim..][..dim], cos, sin, out);
            out[pairs.sink..pairs.half].fill(QUERY_SINK / (pairs.sink_len() as f32).sqrt());
            if let Some(planted) = needle {
                planted.equalise(out);
            }
        }
        let mut terms = vec![Vec::new(); steps.len() * group];
        let mut answer = terms.clone();
        let direction = needle.map(|planted| &planted.direction[..]);
        let near_term = |query: &[f32], key: &[f32], along: f64| Term {
            z: f64::from(dot(query, key)) / root,
            along,
            ..Term::default()
        };
        let along = |key: &[f32]| direction.map_or(0.0, |w| f64::from(dot(w, key)) / root);
        // The last tokens of the context, then the tokens of the decode steps, as they are.
        let mut keys = vec![0.0f32; BLOCK * dim];
        for block in plan.near / BLOCK..context.div_ceil(BLOCK) {
            let tokens = BLOCK.min(context - block * BLOCK);
            let (cos, sin) = plan.near_angles.rows(block * BLOCK - plan.near, tokens);
            generator.keys(block, Parts::All, cos, sin, &mut keys[..tokens * dim]);
            let mut marks = needle.map_or(&[][..], |p| p.between(block * BLOCK, block * BLOCK + tokens));
            for (token, key) in keys[..tokens * dim].chunks_exact_mut(dim).enumerate() {
                let position = block * BLOCK + token;
                if position < SINKS {
                    continue;
                }
                let mut holds = false;
                if let (Some((mark, rest)), Some(planted)) = (marks.split_first(), needle)
                    && mark.position == position
                {
                    let (cos, sin) = plan.angles(position, 1);
                    planted.write(mark, generator, cos, sin, key, None);
                    holds = matches!(mark.part, Part::Needle(_) | Part::Member);
                    marks = rest;
                }
                let along = along(key);
                let into = if holds { &mut answer } else { &mut terms };
                for (terms, query) in into.iter_mut().zip(turned.chunks_exact(dim)) {
                    terms.push(near_term(query, key, along));
                }
            }
        }
        let last = steps.last().copied().unwrap_or(0);
        let key = &mut keys[..dim];
        for (step, plain) in solved.new_keys.chunks_exact(dim).enumerate().take(last + 1) {
            let (cos, sin) = plan.near_angles.rows(context + step - plan.near, 1);
            rotate(plain, cos, sin, key);
            generator.shift(OFFSET, context + step, key);
            let along = along(key);
            for (probe, query) in turned.chunks_exact(dim).enumerate() {
                if step <= steps[probe / group] {
                    terms[probe].push(near_term(query, key, along));
                }
            }
        }
        far_terms(plan, solved, &turned, direction, &mut terms);
        // Whatever is planted before the near tokens comes on top of their expectation.
        for mark in needle.map_or(&[][..], |planted| planted.between(SINKS, plan.near)) {
            let (Some(planted), false) = (needle, matches!(mark.part, Part::Counter(_))) else { continue };
            let angles = Angles::new(&workload.shape, [mark.position]);
            let (cos, sin) = angles.rows(0, 1);
            planted.write(mark, generator, cos, sin, key, None);
            let along = along(key);
            let into =
                if matches!(mark.part, Part::Needle(_) | Part::Member) { &mut answer } else { &mut terms };
            for (terms, query) in into.iter_mut().zip(turned.chunks_exact(dim)) {
                terms.push(near_term(query, key, along));
            }
        }
        Self { steps, terms, answer, group }
    }

    /// Logits of tokens 0 to 3 at which token 0 has the stated mass, averaged over the probes.
    fn sink_logits(&self, mass: f64) -> [f64; SINKS] {
        let rest: Vec<f64> = self.terms.iter().map(|terms| log_sum(terms, 0.0).0).collect();
        let mean = |logit: f64| {
            let [first, others @ ..] = sinks_at(logit);
            let share = |rest: &f64| {
                let others = others.iter().map(|z| libm::exp(z - first)).sum::<f64>();
                1.0 / (1.0 + others + libm::exp(rest - first))
            };
            rest.iter().map(share).sum::<f64>() / rest.len() as f64
        };
        let (mut low, mut high) = (-100.0, 200.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if mean(middle) < mass {
                low = middle;
            } else {
                high = middle;
            }
        }
        sinks_at(0.5 * (low + high))
    }

    /// Strength of the needle's direction in each query, `[steps][group]`: solved at the probes, held between them.
    fn strengths(&self, workload: &Workload, planted: &Planted, sinks: &[f64; SINKS]) -> Vec<f32> {
        let solved: Vec<f32> = self
            .terms
            .iter()
            .zip(&self.answer)
            .enumerate()
            .map(|(probe, (terms, answer))| {
                let odds = planted.needle.log_odds[probe % self.group];
                let mut all = terms.clone();
                all.extend(sinks.map(|z| Term { z, ..Term::default() }));
                // Newton; the gap is nearly linear in the strength.
                let mut strength = 0.0f64;
                for _ in 0..40 {
                    let (rest, slope) = log_sum(&all, strength);
                    let (own, gain) = log_sum(answer, strength);
                    let gap = own - rest - odds;
                    let step = (gap / (gain - slope).max(0.25 * gain)).clamp(-8.0, 8.0);
                    strength -= step;
                    if step.abs() < 1e-7 {
                        break;
                    }
                }
                strength as f32
            })
            .collect();
        (0..workload.steps)
            .flat_map(|step| {
                let probe = self.steps.partition_point(|at| *at <= step) - 1;
                solved[probe * self.group..][..self.group].iter().copied()
            })
            .collect()
    }
}

/// Logits of the four sinks: the others stand half as high, or half as deep again where token 0 is below 0.
fn sinks_at(logit: f64) -> [f64; SINKS] {
    let other = logit - 0.5 * logit.abs();
    [logit, other, other, other]
}

/// Adds the expectation over the noise of the tokens before the near ones.
fn far_terms(
    plan: &Plan,
    solved: &Solved,
    turned: &[f32],
    direction: Option<&[f32]>,
    terms: &mut [Vec<Term>],
) {
    let generator = &solved.generator;
    let dim = generator.dim();
    let root = (dim as f64).sqrt();
    let offset = f64::from(OFFSET * QUERY_SINK) / root;
    let noise = f64::from(NOISE_NORM * NOISE_NORM) / (dim * dim) as f64;
    let (mut back, mut along, mut work) = ([0.0f32; MAX_DIM], [0.0f32; MAX_DIM], [0.0f32; MAX_DIM]);
    let (back, along, work) = (&mut back[..dim], &mut along[..dim], &mut work[..dim]);
    for (index, &(position, weight)) in plan.far.iter().enumerate() {
        let topic = generator.topics(position / BLOCK, position % BLOCK + 1)[position % BLOCK].0;
        let base = generator.base(topic);
        let (cos, sin) = plan.far_angles.rows(index, 1);
        let mut common = Term { z: libm::log(weight) + offset, ..Term::default() };
        if let Some(direction) = direction {
            rotate_back(direction, cos, sin, along);
            common.along = f64::from(dot(along, base)) / root;
            work.copy_from_slice(along);
            common.square = noise * f64::from(generator.spectrum.variance(work));
        }
        for (terms, query) in terms.iter_mut().zip(turned.chunks_exact(dim)) {
            rotate_back(query, cos, sin, back);
            work.copy_from_slice(back);
            let variance = noise * f64::from(generator.spectrum.variance(work));
            let mut term = common;
            term.z += f64::from(dot(back, base)) / root + 0.5 * variance;
            if solved.gains[2] > 0.0 {
                let pull = generator.pairs.hitter.iter().map(|pair| back[*pair]).sum::<f32>();
                let lift = f64::from(pull * HITTER_NORM * std::f32::consts::FRAC_1_SQRT_2) / root;
                term.z += libm::log(1.0 - HITTER_SHARE + HITTER_SHARE * libm::exp(lift));
            }
            if direction.is_some() {
                for ((sum, b), w) in work.iter_mut().zip(back.iter()).zip(along.iter()) {
                    *sum = b + w;
                }
                let both = noise * f64::from(generator.spectrum.variance(work));
                term.cross = 0.5 * (both - variance - common.square);
            }
            terms.push(term);
        }
    }
}

/// Log-sum-exp of the terms at a needle strength, and its slope in the strength.
fn log_sum(terms: &[Term], strength: f64) -> (f64, f64) {
    let logit = |t: &Term| t.z + strength * (t.along + t.cross + 0.5 * strength * t.square);
    let max = terms.iter().map(logit).fold(f64::NEG_INFINITY, f64::max);
    let (mut sum, mut slope) = (0.0, 0.0);
    for term in terms {
        let weight = libm::exp(logit(term) - max);
        sum += weight;
        slope += weight * (term.along + term.cross + strength * term.square);
    }
    (max + libm::log(sum), slope / sum)
}
