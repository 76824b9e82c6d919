//! The query trajectory of a head: successive queries of the steps, and those of the prompt's end before them.
//!
//! Each head of a group has a noise process (AR(1), coefficient 0.8) and a topic (drawn anew once in 16 positions; half
//! of the time it is the group's; `steps=iid` and `group=` change that). Both are stationary and reversible: what is drawn backwards from the first step has
//! the law of what led up to it. So the prompt's queries cost the steps nothing and change none of their bytes.

use super::calibrate::Plan;
use super::generator::{Generator, NOISE_NORM, TOPIC_NORM};
use super::geometry::{MAX_DIM, rotate, rotate_back};
use super::heads::HeadTargets;
use super::rng::{NormalTable, Stream};
use super::spec::GroupKind;
use super::{BLOCK, Workload, WorkloadSpec, purpose};

/// AR(1) coefficient of the query noise, and sqrt(1 - a^2).
const QUERY_AR: [f32; 2] = [0.8, 0.6];
/// Correlation with the first head's noise where the heads of a group are alike (0.64 between others), and its sine.
const GROUP_NOISE: [f32; 2] = [0.8, 0.6];
/// A query's topic is drawn anew once in this many steps.
const TOPIC_STEPS: usize = 16;

/// Where the queries of a group stand.
#[derive(Debug, Clone)]
pub(super) struct Course {
    stream: Stream,
    context: usize,
    moving: bool,
    group: GroupKind,
    /// `[group][d]` the noise before the spectrum.
    state: Vec<f32>,
    /// The group's topic, and each head's own with whether it follows the group's.
    shared: u8,
    own: Vec<(u8, bool)>,
}

impl Course {
    /// The course of a head at its first step.
    pub(super) fn new(generator: &Generator, spec: &WorkloadSpec, context: usize, group: usize) -> Self {
        let mut course = Self {
            stream: generator.stream(purpose::QUERY, 0),
            context,
            moving: spec.moving,
            group: spec.group,
            state: vec![0.0; group * generator.dim()],
            shared: 0,
            own: vec![(0, false); group],
        };
        course.draw(generator, true);
        course
    }

    /// A course from here on whose numbers are other ones.
    pub(super) fn branch(&self, generator: &Generator, purpose: purpose::Purpose) -> Self {
        Self { stream: generator.stream(purpose, 0), ..self.clone() }
    }

    /// One position further.
    pub(super) fn advance(&mut self, generator: &Generator) {
        self.draw(generator, !self.moving);
    }

    fn draw(&mut self, generator: &Generator, afresh: bool) {
        let dim = generator.dim();
        let mut fresh = [0.0f32; MAX_DIM];
        let [keep, add] = if afresh { [0.0, 1.0] } else { QUERY_AR };
        if afresh || self.stream.below(TOPIC_STEPS) == 0 {
            self.shared = self.draw_topic(generator);
        }
        for head in 0..self.own.len() {
            if afresh || self.stream.below(TOPIC_STEPS) == 0 {
                self.own[head] = (self.draw_topic(generator), self.stream.below(2) == 0);
            }
            self.stream.normals(NormalTable::get(), &mut fresh[..dim]);
            for (state, fresh) in self.state[head * dim..][..dim].iter_mut().zip(&fresh) {
                *state = keep * *state + add * fresh;
            }
        }
    }

    /// The topic of a random token of the context: a topic that is there.
    fn draw_topic(&mut self, generator: &Generator) -> u8 {
        let position = self.stream.below(self.context);
        generator.topics(position / BLOCK, position % BLOCK + 1)[position % BLOCK].0
    }

    /// The topic of a head's query.
    pub(super) fn topic(&self, head: usize) -> u8 {
        let (own, follows) = self.own[head];
        match self.group {
            GroupKind::Shared if follows => self.shared,
            GroupKind::Shared | GroupKind::Independent => own,
            GroupKind::Alike | GroupKind::Same => self.shared,
        }
    }

    /// Coordinate `c` of a head's noise before the spectrum, of unit variance.
    fn noise(&self, head: usize, c: usize, dim: usize) -> f32 {
        let own = self.state[head * dim + c];
        match self.group {
            GroupKind::Alike if head > 0 => GROUP_NOISE[0] * self.state[c] + GROUP_NOISE[1] * own,
            GroupKind::Same => self.state[c],
            _ => own,
        }
    }
}

/// What turns a course into queries.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shaper<'a> {
    pub(super) plan: &'a Plan,
    pub(super) generator: &'a Generator,
    pub(super) noise_std: f64,
    pub(super) gains: &'a [f32; 3],
}

impl Shaper<'_> {
    /// The query of a head at a position, before RoPE, sink and needle. The noise is scaled to its deviation over the
    /// whole context, from the covariance of the key noise.
    pub(super) fn query(&self, course: &Course, head: usize, position: usize, out: &mut [f32]) {
        let dim = self.generator.dim();
        let spectrum = &self.generator.spectrum;
        let (mut noise, mut turned, mut back) = ([0.0f32; MAX_DIM], [0.0f32; MAX_DIM], [0.0f32; MAX_DIM]);
        let (noise, turned, back) = (&mut noise[..dim], &mut turned[..dim], &mut back[..dim]);
        for (c, (noise, deviation)) in noise.iter_mut().zip(&spectrum.deviation).enumerate() {
            *noise = course.noise(head, c, dim) * deviation;
        }
        spectrum.forward(noise);
        let (cos, sin) = self.plan.angles(position, 1);
        rotate(noise, cos, sin, turned);
        let mut variance = 0.0f64;
        for row in 0..Plan::SPAN {
            let (cos, sin) = self.plan.span(row);
            rotate_back(turned, cos, sin, back);
            variance += f64::from(spectrum.variance(back));
        }
        let deviation = (variance / Plan::SPAN as f64).sqrt() * f64::from(NOISE_NORM) / dim as f64;
        let scale = (self.noise_std / deviation) as f32;
        fixed_part(self.generator, self.gains, course.topic(head), out);
        for (value, noise) in out.iter_mut().zip(noise.iter()) {
            *value += scale * noise;
        }
    }
}

/// The queries of the steps.
#[derive(Debug, Clone)]
pub(super) struct Trajectory {
    /// `[steps][group][d]`, before RoPE.
    pub(super) queries: Vec<f32>,
    /// `[steps][group]`.
    pub(super) topics: Vec<u8>,
    /// Where the first step stands.
    pub(super) start: Course,
}

impl Trajectory {
    pub(super) fn new(shaper: &Shaper<'_>, workload: &Workload) -> Self {
        let (context, steps, group) = (workload.context, workload.steps, workload.shape.group());
        let dim = shaper.generator.dim();
        let start = Course::new(shaper.generator, &workload.spec, context, group);
        let mut course = start.clone();
        let mut queries = vec![0.0f32; steps * group * dim];
        let mut topics = Vec::with_capacity(steps * group);
        for (step, rows) in queries.chunks_exact_mut(group * dim).enumerate() {
            if step > 0 {
                course.advance(shaper.generator);
            }
            for (head, row) in rows.chunks_exact_mut(dim).enumerate() {
                topics.push(course.topic(head));
                shaper.query(&course, head, context + step, row);
            }
        }
        Self { queries, topics, start }
    }
}

/// Everything in a query but noise, sink and needle: phasor, topic, hitter.
pub(super) fn fixed_part(generator: &Generator, gains: &[f32; 3], topic: u8, query: &mut [f32]) {
    let phasor = &generator.phasor;
    for ((value, base), m) in query.iter_mut().zip(generator.base(topic)).zip(phasor) {
        *value = gains[0] * m + gains[1] / TOPIC_NORM * (base - m);
    }
    for pair in generator.pairs.hitter {
        query[pair] += gains[2] * std::f32::consts::FRAC_1_SQRT_2;
    }
}

/// Factors of the phasor, topic and hitter parts of a query.
pub(super) fn gains(targets: &HeadTargets, head_dim: usize, rope_theta: f64) -> [f32; 3] {
    let root = (head_dim as f64).sqrt();
    // Sum over pairs of cos(omega_j distance) falls by (d/2) / ln theta a unit of ln distance.
    let slope = head_dim as f64 / 2.0 / libm::log(rope_theta);
    [
        (targets.recency * root / slope) as f32,
        (targets.topic_logit * root / f64::from(TOPIC_NORM)) as f32,
        (targets.hitter_logit * root / f64::from(super::generator::HITTER_NORM)) as f32,
    ]
}
