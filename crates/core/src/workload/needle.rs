//! What is planted in a head's context: needles, what looks like them, what hides them, and groups to count.
//!
//! After RULER (arXiv 2404.06654), but planted in keys instead of in a text. What is planted is set after RoPE, so a
//! cosine of 0.7 is 0.7 for the query at whatever distance. Each planted token's value is a code; the answer is the code
//! of the needle, the codes of all needles, or those of the large groups, and an attention output is read by its
//! products with all of them.

use super::generator::{CONTENT_NORM, Generator, OFFSET, OUTLIER};
use super::geometry::{Angles, directions, dot, rotate};
use super::rng::Stream;
use super::spec::{Channels, Distractors, GroupKind, Hide};
use super::{HeadType, Workload, purpose};

/// Tokens 0..4 are sinks.
pub(super) const SINKS: usize = 4;
/// Candidate values of a needle, and their norm.
const CODES: usize = 16;
const CODE_NORM: f32 = 2.0;
/// Log-odds of the needle's mass, cycled over the queries; depths, cycled over the needle heads.
const LOG_ODDS: [f64; 4] = [-2.0, 0.0, 2.0, 4.0];
const DEPTHS: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];
/// Cosine of a distractor, and of a counted token, with what the queries look for; the rest of the content is its own.
const DISTRACTOR: f32 = 0.7;
const MEMBER: f32 = 0.95;
/// Tokens of an aligned page whose mean is made blind to the needle.
const PAGE: usize = 16;

/// What is planted in a head, and what an attention output must name.
#[derive(Debug, Clone, PartialEq)]
pub struct Needle {
    /// Positions in the context that hold the answer or, of groups to count, all their tokens; ascending.
    pub positions: Vec<usize>,
    /// The candidates that the values there carry: what [`super::HeadWorkload::readout`] must return, in any order. Of
    /// groups to count, the large ones.
    pub answers: Vec<usize>,
    /// Number of candidates.
    pub candidates: usize,
    /// Log-odds of their mass together that each query of the group is solved for, `[group]`.
    pub log_odds: Vec<f64>,
}

/// What a planted token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Holds the answer.
    Needle(usize),
    /// Looks like a needle, and says something else.
    Distractor(usize),
    /// One of a group.
    Member,
    /// Large, and turned away from the queries; its value is an ordinary one.
    Outlier,
    /// An ordinary token that cancels its share of a needle in the mean of a page.
    Counter(usize),
}

/// A planted token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    pub(super) position: usize,
    pub(super) part: Part,
    code: usize,
}

/// Planted tokens and the queries' pull towards them.
#[derive(Debug, Clone)]
pub(super) struct Planted {
    pub(super) needle: Needle,
    /// Ascending.
    pub(super) marks: Vec<Mark>,
    /// `[needles][d]` keys, turned.
    keys: Vec<f32>,
    /// `[needles][d]` unit content, turned; one row of groups to count.
    contents: Vec<f32>,
    /// `[d]` what a pull of 1 adds to a query: raises all needles alike.
    pub(super) direction: Vec<f32>,
    /// `[needles][needles]`: what to add of each content so that needle logits change by given amounts; empty for one.
    inverse: Vec<f64>,
    /// `[steps][group]` the pull.
    pub(super) strength: Vec<f32>,
    pub(super) asked_by_prompt: bool,
    codes: Vec<f32>,
}

impl Planted {
    /// Plants the `ordinal`-th head of its type; the pull is not solved yet.
    pub(super) fn new(workload: &Workload, generator: &Generator, head: HeadType, ordinal: usize) -> Self {
        let spec = &workload.spec.needle;
        let group = workload.shape.group();
        let mut stream = generator.stream(purpose::NEEDLE, 0);
        let mut planted = if head == HeadType::Aggregation {
            Self::groups(workload, generator, &mut stream)
        } else {
            Self::needles(workload, generator, ordinal, &mut stream)
        };
        let cycle = |head: usize| match workload.spec.group {
            GroupKind::Same => ordinal,
            _ => ordinal * group + head,
        };
        planted.needle.log_odds =
            (0..group).map(|h| spec.margin.unwrap_or(LOG_ODDS[cycle(h) % LOG_ODDS.len()])).collect();
        planted.asked_by_prompt = spec.asked_by_prompt;
        planted.marks.sort_by_key(|mark| mark.position);
        planted
    }

    fn needles(workload: &Workload, generator: &Generator, ordinal: usize, stream: &mut Stream) -> Self {
        let (spec, context, dim) = (&workload.spec.needle, workload.context, generator.dim());
        let pairs = &generator.pairs;
        let first = spec.depth.unwrap_or(DEPTHS[ordinal % DEPTHS.len()]);
        let mut positions: Vec<usize> = Vec::new();
        for i in 0..spec.needles {
            let share = (first + i as f64 / spec.needles as f64) % 1.0;
            let mut at = ((share * context as f64) as usize).clamp(SINKS, context - 1);
            while positions.contains(&at) {
                at = if at + 1 < context { at + 1 } else { SINKS };
            }
            positions.push(at);
        }
        let content = match spec.channels {
            Channels::Spread => directions(pairs, pairs.needle, 1, stream),
            Channels::Sparse => even(generator, pairs.needle..pairs.sink, 8, stream),
            Channels::Thin => even(generator, 0..pairs.sink, usize::MAX, stream),
        };
        let angles = Angles::new(&workload.shape, positions.iter().copied());
        let plain: Vec<f32> =
            content.iter().zip(&generator.phasor).map(|(w, m)| CONTENT_NORM * w + m).collect();
        let (mut contents, mut keys) = (vec![0.0; spec.needles * dim], vec![0.0; spec.needles * dim]);
        for (i, &position) in positions.iter().enumerate() {
            let (cos, sin) = angles.rows(i, 1);
            rotate(&content, cos, sin, &mut contents[i * dim..][..dim]);
            let key = &mut keys[i * dim..][..dim];
            rotate(&plain, cos, sin, key);
            generator.shift(OFFSET, position, key);
        }
        let level = CODE_NORM / (dim as f32).sqrt();
        let codes = (0..CODES * dim).map(|_| if stream.word() >> 63 == 0 { level } else { -level }).collect();
        let mut order: Vec<usize> = (0..CODES).collect();
        order.swap(0, stream.below(CODES));
        let mut others = generator.stream(purpose::MARK, 0);
        others.shuffle(&mut order[1..]);
        let (answers, wrong) = order.split_at(spec.needles);
        let mut marks: Vec<Mark> = (0..spec.needles)
            .map(|i| Mark { position: positions[i], part: Part::Needle(i), code: answers[i] })
            .collect();
        let taken = |marks: &[Mark], at: usize| at < SINKS || marks.iter().any(|m| m.position == at);
        for (i, &at) in positions.iter().enumerate() {
            let page = at / PAGE * PAGE..(at / PAGE * PAGE + PAGE).min(context);
            let free: Vec<usize> = page.filter(|at| !taken(&marks, *at)).collect();
            let part = match spec.hide {
                Hide::No => continue,
                Hide::Outlier => Part::Outlier,
                Hide::Mean => Part::Counter(i),
            };
            let count = if part == Part::Outlier { 1 } else { PAGE };
            marks.extend(free.iter().take(count).map(|&position| Mark { position, part, code: 0 }));
        }
        let (count, every) = match spec.distractors {
            Distractors::Count(count) => (count, context.div_ceil(count.max(1))),
            Distractors::Every(every) => (context / every, every),
        };
        for i in 0..count {
            let (start, end) = (i * every, ((i + 1) * every).min(context));
            let at = start + others.below(end.saturating_sub(start).max(1));
            // Earlier distractors lie in strata of their own.
            let hidden = at < SINKS || positions.iter().any(|p| p / PAGE == at / PAGE);
            if at < context && !hidden {
                let part = Part::Distractor(i % spec.needles);
                marks.push(Mark { position: at, part, code: wrong[i % wrong.len()] });
            }
        }
        let mut answers = answers.to_vec();
        answers.sort_unstable();
        positions.sort_unstable();
        let needle = Needle { positions, answers, candidates: CODES, log_odds: Vec::new() };
        let mut planted = Self::bare(needle, marks, codes, contents);
        if spec.needles > 1 {
            planted.balance(&keys, dim);
        }
        planted.keys = keys;
        planted
    }

    /// Groups of tokens to count: large ones of 30 and small ones of 3, fewer and smaller where the context is short.
    fn groups(workload: &Workload, generator: &Generator, stream: &mut Stream) -> Self {
        let (context, dim) = (workload.context, generator.dim());
        let (large, size, small) = match context {
            1440.. => (10.min(dim / 4), 30, 20.min(dim / 2)),
            256..1440 => (10.min(dim / 4), context / 48, 20.min(dim / 2)),
            _ => (2, 2, 1),
        };
        let rare = (size / 10).max(1);
        let content = directions(&generator.pairs, generator.pairs.needle, 1, stream);
        let codes = orthogonal(large + small, dim, stream);
        let mut order: Vec<usize> = (0..large + small).collect();
        stream.shuffle(&mut order);
        let mut tokens: Vec<usize> = order[..large].iter().flat_map(|c| [*c].repeat(size)).collect();
        tokens.extend(order[large..].iter().flat_map(|c| [*c].repeat(rare)));
        stream.shuffle(&mut tokens);
        // One token a stratum.
        let (room, count) = (context - SINKS, tokens.len());
        let place = |i: usize| SINKS + i * room / count;
        let marks: Vec<Mark> = tokens
            .iter()
            .enumerate()
            .map(|(i, &code)| Mark {
                position: place(i) + stream.below((place(i + 1) - place(i)).max(1)),
                part: Part::Member,
                code,
            })
            .collect();
        let mut answers = order[..large].to_vec();
        answers.sort_unstable();
        let positions = marks.iter().map(|mark| mark.position).collect();
        let needle = Needle { positions, answers, candidates: large + small, log_odds: Vec::new() };
        Self::bare(needle, marks, codes, content)
    }

    fn bare(needle: Needle, marks: Vec<Mark>, codes: Vec<f32>, contents: Vec<f32>) -> Self {
        let dim = codes.len() / needle.candidates;
        Self {
            needle,
            marks,
            keys: Vec::new(),
            direction: contents[..dim].to_vec(),
            contents,
            inverse: Vec::new(),
            strength: Vec::new(),
            asked_by_prompt: true,
            codes,
        }
    }

    /// Finds the direction that raises all needles alike, and the means to make their logits equal.
    fn balance(&mut self, keys: &[f32], dim: usize) {
        let count = keys.len() / dim;
        let mut gram = vec![0.0f64; count * count];
        for (i, key) in keys.chunks_exact(dim).enumerate() {
            for (j, content) in self.contents.chunks_exact(dim).enumerate() {
                gram[i * count + j] = f64::from(dot(key, content));
            }
        }
        self.inverse = invert(gram, count);
        let alike: Vec<f64> = vec![f64::from(CONTENT_NORM); count];
        self.direction = vec![0.0; dim];
        add_contents(&self.contents, &self.inverse, &alike, &mut self.direction);
    }

    /// The part of the queries' direction across one needle, of norm 1: a distractor keeps out of it, or some of many would
    /// be more like what the queries look for than the needles are. One needle has none.
    fn across(&self, content: &[f32]) -> Option<Vec<f32>> {
        if self.inverse.is_empty() {
            return None;
        }
        let along = dot(&self.direction, content);
        let mut rest: Vec<f32> = self.direction.iter().zip(content).map(|(d, c)| d - along * c).collect();
        let norm = dot(&rest, &rest).sqrt().max(1e-6);
        rest.iter_mut().for_each(|value| *value /= norm);
        Some(rest)
    }

    /// Makes the needles' logits equal in a turned query; one needle needs nothing.
    pub(super) fn equalise(&self, query: &mut [f32]) {
        if self.inverse.is_empty() {
            return;
        }
        let logits: Vec<f64> =
            self.keys.chunks_exact(query.len()).map(|key| f64::from(dot(key, query))).collect();
        let middle = logits.iter().sum::<f64>() / logits.len() as f64;
        let lack: Vec<f64> = logits.iter().map(|z| middle - z).collect();
        add_contents(&self.contents, &self.inverse, &lack, query);
    }

    /// `[d]` candidate value `index`.
    fn code(&self, index: usize) -> &[f32] {
        let dim = self.direction.len();
        &self.codes[index * dim..][..dim]
    }

    /// The marks at positions from `start` to before `end`.
    pub(super) fn between(&self, start: usize, end: usize) -> &[Mark] {
        let at = |position: usize| self.marks.partition_point(|mark| mark.position < position);
        &self.marks[at(start)..at(end)]
    }

    /// Writes a planted token's turned key over the ordinary one, and its value, where it has one of its own.
    pub(super) fn write(
        &self,
        mark: &Mark,
        generator: &Generator,
        cos: &[f32],
        sin: &[f32],
        key: &mut [f32],
        value: Option<&mut [f32]>,
    ) {
        let dim = key.len();
        let own = |cosine: f32, content: &[f32], key: &mut [f32]| {
            rotate(&generator.phasor, cos, sin, key);
            generator.shift(OFFSET, mark.position, key);
            let mut stream = generator.stream(purpose::MARK, 1 + mark.position);
            let mut rest = directions(&generator.pairs, generator.pairs.needle, 1, &mut stream);
            let along = dot(&rest, content);
            rest.iter_mut().zip(content).for_each(|(r, c)| *r -= along * c);
            if let Some(across) = self.across(content) {
                let along = dot(&rest, &across);
                rest.iter_mut().zip(&across).for_each(|(r, c)| *r -= along * c);
            }
            let sine = (1.0 - cosine * cosine).sqrt() / dot(&rest, &rest).sqrt().max(1e-6);
            for ((key, c), r) in key.iter_mut().zip(content).zip(&rest) {
                *key += CONTENT_NORM * (cosine * c + sine * r);
            }
        };
        match mark.part {
            Part::Needle(i) => key.copy_from_slice(&self.keys[i * dim..][..dim]),
            Part::Distractor(i) => own(DISTRACTOR, &self.contents[i * dim..][..dim], key),
            Part::Member => own(MEMBER, &self.direction, key),
            Part::Outlier => {
                rotate(&generator.phasor, cos, sin, key);
                generator.shift(OUTLIER, mark.position, key);
                return;
            }
            Part::Counter(i) => {
                let less = CONTENT_NORM / (PAGE - 1) as f32;
                for (key, c) in key.iter_mut().zip(&self.contents[i * dim..][..dim]) {
                    *key -= less * c;
                }
                return;
            }
        }
        if let Some(value) = value {
            value.copy_from_slice(self.code(mark.code));
            if self.needle.answers.len() > 1 {
                // What is read is small, and the reader takes the mean off: here it must be there.
                value.iter_mut().zip(&generator.value_mean).for_each(|(v, mean)| *v += mean);
            }
        }
    }

    /// The candidates whose codes have the largest products with an output less the values' mean, as many as there are
    /// answers, best first; `None` if it is not finite.
    pub(super) fn read(&self, output: &[f32], value_mean: &[f32]) -> Option<Vec<usize>> {
        let centred: Vec<f32> = output.iter().zip(value_mean).map(|(o, mean)| o - mean).collect();
        if centred.iter().any(|value| !value.is_finite()) {
            return None;
        }
        // The codes have one norm, so the nearest has the largest product.
        let mut products: Vec<(f32, usize)> =
            (0..self.needle.candidates).map(|code| (dot(self.code(code), &centred), code)).collect();
        products.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        Some(products[..self.needle.answers.len()].iter().map(|(_, code)| *code).collect())
    }
}

/// A unit vector whose coordinates in some of the content channels of these pairs have one size and random signs.
fn even(generator: &Generator, range: std::ops::Range<usize>, count: usize, stream: &mut Stream) -> Vec<f32> {
    let half = generator.pairs.half;
    let inside = |c: &usize| range.contains(&(c % half)) && generator.pairs.is_content(c % half);
    let mut channels: Vec<usize> = (0..2 * half).filter(inside).collect();
    stream.shuffle(&mut channels);
    channels.truncate(count);
    let size = 1.0 / (channels.len() as f32).sqrt();
    let mut row = vec![0.0f32; 2 * half];
    for c in channels {
        row[c] = if stream.word() >> 63 == 0 { size } else { -size };
    }
    row
}

/// Orthogonal rows of [`CODE_NORM`], `[rows][dim]` (Gram-Schmidt, twice).
fn orthogonal(rows: usize, dim: usize, stream: &mut Stream) -> Vec<f32> {
    let mut all = vec![0.0f32; rows * dim];
    for i in 0..rows {
        let (done, rest) = all.split_at_mut(i * dim);
        let row = &mut rest[..dim];
        stream.normals(super::rng::NormalTable::get(), row);
        for _ in 0..2 {
            for earlier in done.chunks_exact(dim) {
                let along = dot(earlier, row) / (CODE_NORM * CODE_NORM);
                row.iter_mut().zip(earlier).for_each(|(r, e)| *r -= along * e);
            }
        }
        let scale = CODE_NORM / dot(row, row).sqrt();
        row.iter_mut().for_each(|value| *value *= scale);
    }
    all
}

/// Adds `contents^T (inverse wanted)` to a row.
fn add_contents(contents: &[f32], inverse: &[f64], wanted: &[f64], row: &mut [f32]) {
    for (line, content) in inverse.chunks_exact(wanted.len()).zip(contents.chunks_exact(row.len())) {
        let factor = line.iter().zip(wanted).map(|(a, b)| a * b).sum::<f64>() as f32;
        row.iter_mut().zip(content).for_each(|(value, c)| *value += factor * c);
    }
}

/// Inverse of a small, well-conditioned matrix (Gauss-Jordan). The largest entry of a column is its pivot; one near 0,
/// as where two needles lie side by side, is lifted.
fn invert(mut matrix: Vec<f64>, n: usize) -> Vec<f64> {
    let mut inverse: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i / n == i % n))).collect();
    for column in 0..n {
        let size = |row: &usize| matrix[row * n + column].abs();
        let pivot = (column..n).max_by(|a, b| size(a).total_cmp(&size(b))).unwrap_or(column);
        for c in 0..n {
            matrix.swap(column * n + c, pivot * n + c);
            inverse.swap(column * n + c, pivot * n + c);
        }
        let lead = matrix[column * n + column];
        let lead = if lead.abs() < 0.5 { 0.5 } else { lead };
        for c in 0..n {
            matrix[column * n + c] /= lead;
            inverse[column * n + c] /= lead;
        }
        for row in (0..n).filter(|row| *row != column) {
            let factor = matrix[row * n + column];
            for c in 0..n {
                matrix[row * n + c] -= factor * matrix[column * n + c];
                inverse[row * n + c] -= factor * inverse[column * n + c];
            }
        }
    }
    inverse
}
