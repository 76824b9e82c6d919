//! The generator of one (layer, KV head).

use std::ops::Range;

use super::calibrate::Solved;
use super::control::Control;
use super::generator::{OFFSET, Parts, QUERY_SINK};
use super::geometry::{dot, rotate};
use super::needle::Needle;
use super::queries::Shaper;
use super::{BLOCK, HeadType, PROMPT_QUERIES, QUESTION, Workload, purpose};

/// Makes the rows of one (layer, KV head). Holds only tables (about 70 kB, and the steps' rows); `Send + Sync`.
#[derive(Debug, Clone)]
pub struct HeadWorkload {
    head_type: HeadType,
    dim: usize,
    group: usize,
    context: usize,
    steps: usize,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Structured(Box<Solved>),
    Control(Control),
}

impl HeadWorkload {
    pub(super) fn structured(solved: Solved, workload: &Workload, head_type: HeadType) -> Self {
        Self::of(Kind::Structured(Box::new(solved)), workload, head_type)
    }

    pub(super) fn control(control: Control, workload: &Workload, head_type: HeadType) -> Self {
        Self::of(Kind::Control(control), workload, head_type)
    }

    fn of(kind: Kind, workload: &Workload, head_type: HeadType) -> Self {
        let shape = &workload.shape;
        Self {
            head_type,
            dim: shape.head_dim,
            group: shape.group(),
            context: workload.context,
            steps: workload.steps,
            kind,
        }
    }

    /// What the head does.
    pub fn head_type(&self) -> HeadType {
        self.head_type
    }

    /// The head dimension d.
    pub fn head_dim(&self) -> usize {
        self.dim
    }

    /// Queries of a step.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Cached tokens before the first step.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Decode steps planned.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Blocks of the context.
    pub fn blocks(&self) -> usize {
        self.context.div_ceil(BLOCK)
    }

    /// Tokens of a block: [`BLOCK`], or less in the last one.
    pub fn block_tokens(&self, block: usize) -> usize {
        self.context.saturating_sub(block * BLOCK).min(BLOCK)
    }

    /// Writes the keys (turned to their positions) and values of a block: positions `block * BLOCK ..` of the context.
    ///
    /// `k` and `v` are `[tokens][d]`, where tokens is at most [`HeadWorkload::block_tokens`] (fewer give the block's first
    /// rows); `cos` and `sin` are `[tokens][d/2]` of those positions, for pairs (i, i + d/2) and the shape's RoPE base.
    ///
    /// # Panics
    /// If the lengths do not fit each other or the block.
    pub fn block(&self, block: usize, cos: &[f32], sin: &[f32], k: &mut [f32], v: &mut [f32]) {
        let tokens = k.len() / self.dim;
        assert!(tokens <= self.block_tokens(block), "block {block} has fewer than {tokens} tokens");
        assert_eq!(k.len(), tokens * self.dim, "keys are [tokens][d]");
        assert_eq!(v.len(), k.len(), "values are shaped as keys");
        assert_eq!((cos.len(), sin.len()), (k.len() / 2, k.len() / 2), "angles are [tokens][d/2]");
        match &self.kind {
            Kind::Control(control) => control.rows(block, block * BLOCK, k, v),
            Kind::Structured(solved) => {
                solved.generator.keys(block, Parts::All, cos, sin, k);
                solved.generator.values(block, v);
                self.plant(solved, block, cos, sin, k, v);
            }
        }
    }

    /// Puts the sinks and the needle into a block.
    fn plant(&self, solved: &Solved, block: usize, cos: &[f32], sin: &[f32], k: &mut [f32], v: &mut [f32]) {
        let pairs = &solved.generator.pairs;
        if block == 0 {
            for (token, row) in k.chunks_exact_mut(self.dim).take(solved.sinks.len()).enumerate() {
                row.fill(0.0);
                row[pairs.sink..pairs.half].fill(solved.sinks[token] / (pairs.sink_len() as f32).sqrt());
            }
            if let Some(row) = v.chunks_exact_mut(self.dim).next() {
                let scale = 0.05 / dot(row, row).sqrt();
                row.iter_mut().for_each(|value| *value *= scale);
            }
        }
        if let Some(planted) = &solved.needle {
            let (start, half) = (block * BLOCK, pairs.half);
            for mark in planted.between(start, start + k.len() / self.dim) {
                let token = mark.position - start;
                let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
                let rows = token * self.dim..(token + 1) * self.dim;
                planted.write(mark, &solved.generator, cos, sin, &mut k[rows.clone()], Some(&mut v[rows]));
            }
        }
    }

    /// Writes decode step `step`, at position `context + step`: the group's queries `[group][d]`, turned and not scaled
    /// by 1/sqrt(d), and the new token's key and value `[d]`. `cos` and `sin` are `[d/2]` of that position.
    ///
    /// # Panics
    /// If the lengths do not fit, or the step was not planned.
    pub fn step(&self, step: usize, cos: &[f32], sin: &[f32], q: &mut [f32], k: &mut [f32], v: &mut [f32]) {
        let (dim, half) = (self.dim, self.dim / 2);
        assert!(step < self.steps, "step {step} of {} planned", self.steps);
        assert_eq!(q.len(), self.group * dim, "queries are [group][d]");
        assert_eq!((k.len(), v.len()), (dim, dim), "key and value are [d]");
        assert_eq!((cos.len(), sin.len()), (half, half), "angles are [d/2]");
        match &self.kind {
            Kind::Control(control) => control.step(step, self.context + step, q, k, v),
            Kind::Structured(solved) => {
                for (head, out) in q.chunks_exact_mut(dim).enumerate() {
                    let index = step * self.group + head;
                    let pull = solved.needle.as_ref().map(|planted| planted.strength[index]);
                    solved.turn(&solved.trajectory.queries[index * dim..][..dim], pull, cos, sin, out);
                }
                rotate(&solved.new_keys[step * dim..][..dim], cos, sin, k);
                solved.generator.shift(OFFSET, self.context + step, k);
                v.copy_from_slice(&solved.new_values[step * dim..][..dim]);
            }
        }
    }

    /// Writes the group's queries at `positions`, among the last [`PROMPT_QUERIES`] of the context:
    /// `[positions][group][d]`, turned and not scaled by 1/sqrt(d), as [`HeadWorkload::step`] gives them. `cos` and `sin` are
    /// `[positions][d/2]`.
    ///
    /// They are one trajectory with those of the steps: step 0 continues it as step 1 continues step 0. A needle is asked
    /// for in the last [`QUESTION`] positions, as strongly as in step 0 (with `asked=steps`, in none).
    ///
    /// Takes about 20 microseconds a query. The queries of a position do not depend on which others are asked for.
    ///
    /// # Panics
    /// If the lengths do not fit, or a position is outside of the last [`PROMPT_QUERIES`] of the context.
    pub fn prompt_queries(&self, positions: Range<usize>, cos: &[f32], sin: &[f32], out: &mut [f32]) {
        let (dim, half, count) = (self.dim, self.dim / 2, positions.len());
        let first = self.context.saturating_sub(PROMPT_QUERIES);
        assert!(
            count == 0 || (first <= positions.start && positions.end <= self.context),
            "positions {positions:?} of {first}..{}",
            self.context
        );
        assert_eq!(out.len(), count * self.group * dim, "queries are [positions][group][d]");
        assert_eq!((cos.len(), sin.len()), (count * half, count * half), "angles are [positions][d/2]");
        let solved = match &self.kind {
            Kind::Structured(solved) => solved,
            Kind::Control(control) => {
                for (position, rows) in positions.zip(out.chunks_exact_mut(self.group * dim)) {
                    control.prompt_queries(position, rows);
                }
                return;
            }
        };
        let (plan, generator) = (&*solved.plan, &solved.generator);
        let shaper = Shaper { plan, generator, noise_std: solved.noise_std, gains: &solved.gains };
        let mut course = solved.trajectory.start.branch(generator, purpose::PROMPT);
        let mut plain = vec![0.0f32; dim];
        for position in (positions.start..self.context).rev() {
            course.advance(generator);
            if position >= positions.end {
                continue;
            }
            let at = position - positions.start;
            let (cos, sin) = (&cos[at * half..][..half], &sin[at * half..][..half]);
            let rows = &mut out[at * self.group * dim..][..self.group * dim];
            for (head, row) in rows.chunks_exact_mut(dim).enumerate() {
                let asks = position + QUESTION >= self.context;
                let pull = match &solved.needle {
                    Some(planted) if asks && planted.asked_by_prompt => Some(planted.strength[head]),
                    _ => None,
                };
                shaper.query(&course, head, position, &mut plain);
                solved.turn(&plain, pull, cos, sin, row);
            }
        }
    }

    /// What is planted, if this is a head of needles or of groups to count.
    pub fn needle(&self) -> Option<&Needle> {
        self.solved()?.needle.as_ref().map(|planted| &planted.needle)
    }

    /// The candidate values that an attention output `[d]` names, as many as there are answers, best first: the codes
    /// nearest to it once the values' mean is taken off. `None` if nothing is planted or the output is not finite.
    pub fn readout(&self, output: &[f32]) -> Option<Vec<usize>> {
        let solved = self.solved()?;
        solved.needle.as_ref()?.read(output, &solved.generator.value_mean)
    }

    /// Share of the answers that an attention output `[d]` names, 0 if it is not finite; `None` if nothing is planted. With
    /// one answer this is 0 or 1.
    pub fn recall(&self, output: &[f32]) -> Option<f64> {
        let answers = &self.needle()?.answers;
        let named = self.readout(output).unwrap_or_default();
        Some(named.iter().filter(|code| answers.contains(code)).count() as f64 / answers.len() as f64)
    }

    /// The topic of each query of a step, `[group]`; `None` for the controls.
    pub fn topics(&self, step: usize) -> Option<&[u8]> {
        self.solved()?.trajectory.topics.get(step * self.group..(step + 1) * self.group)
    }

    pub(super) fn solved(&self) -> Option<&Solved> {
        match &self.kind {
            Kind::Structured(solved) => Some(solved),
            Kind::Control(_) => None,
        }
    }
}

impl Solved {
    /// Turns a query and gives it its sink part and, if it looks for what is planted, a pull of `pull`.
    fn turn(&self, plain: &[f32], pull: Option<f32>, cos: &[f32], sin: &[f32], out: &mut [f32]) {
        rotate(plain, cos, sin, out);
        let pairs = &self.generator.pairs;
        out[pairs.sink..pairs.half].fill(QUERY_SINK / (pairs.sink_len() as f32).sqrt());
        if let (Some(planted), Some(pull)) = (&self.needle, pull) {
            planted.equalise(out);
            for (value, along) in out.iter_mut().zip(&planted.direction) {
                *value += pull * along;
            }
        }
    }
}
