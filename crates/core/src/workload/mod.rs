//! Workloads: seeded queries, keys and values with stated statistics, for cells that have no trained model.
//!
//! A [`WorkloadSpec`] names what to make (`mix:eta=1,placement=slow,values=topic`), a [`Workload`] plans it for the
//! shape of a model and a context length, and a [`HeadWorkload`] makes the rows of one (layer, KV head).
//!
//! **What a row is made of** (d = 128; other dimensions keep the proportions, see [`HeadShape`]). Before RoPE a key is
//! `6.6 U_topic + (8.8 / sqrt d) x + m`: a topic direction, noise with eigenvalues `i^-eta`, and a unit phasor in
//! every pair but the three slowest, whose product with the query's phasor falls as `ln(distance)`, so that the weight
//! falls as a power of the distance. After RoPE every key but the sinks gets `-8 e`, and every query `12 e`, in the
//! three slowest pairs: the offset that makes centring matter, and the direction of the sinks. Token 0 is
//! `kappa e`, tokens 1 to 3 are half of it; kappa is solved so that the mean sink mass of the group's queries is the
//! head type's. Queries are `alpha m + topic + noise (+ hitter)`, the noise scaled so that its logits, *after RoPE and over
//! the whole context*, have the stated deviation. Values are `0.6 U'_topic + 0.8 noise + mean of norm 0.5`; the value
//! of token 0 has norm 0.05.
//!
//! Topics, noise and needles keep out of the pairs of the sinks and of the heavy hitters, so that those logits stay what
//! they were solved to be. Sinks and needles are set after RoPE: they hold at every decode step and for every base.
//!
//! **Placement decides the difficulty.** With the leading noise directions in slow RoPE pairs the cached keys have low
//! rank, as keys of trained models do. Scrambled over all pairs, RoPE spreads them and the cached keys are nearly white,
//! whatever eta says.
//!
//! **Blocks.** Rows come in blocks of [`BLOCK`] tokens that depend only on (specification, seed, layer, KV head, block), so
//! any thread makes any block in any order; only the planted rows, sinks and needle, depend on the context. The price: the noise (AR(1), coefficient 0.5) and the topic (switching once in 64
//! tokens) start afresh from their stationary laws in every block.
//!
//! **Queries are one trajectory**, of the prompt's last [`PROMPT_QUERIES`] positions and of the steps (`queries.rs`), so that
//! reuse from step to step, and eviction by what the prompt's end looks at, can be judged. `steps=iid` takes the trajectory
//! away; `group=` says how far the heads that share keys look for the same tokens.
//!
//! **What is planted has an answer** (`needle.rs`): one needle, four, needles among keys that look like them, or groups to
//! count. [`HeadWorkload::recall`] reads it from an attention output. A needle may be hidden from methods by name: from page
//! means (`hide=`), from those that read some channels (`channels=`). `outliers=` and `drift=` move keys where no query
//! looks: exact attention stays as it is, and what a method loses is its own.
//!
//! **Same bytes everywhere.** Only + - * / sqrt in a fixed order and the `libm` crate: a seed gives the same rows on every
//! machine and instruction set.
//!
//! **Calibration.** The noise deviation is analytic: the covariance is known, and is averaged over 128 positions of
//! the context. Sink and needle masses are solved against the log-sum-exp of the other tokens: the last 8,192 tokens as
//! they are, earlier ones by their expectation at 768 positions (so up to 8,192 tokens the solution is exact, and beyond
//! them a single draw scatters around it, most of all for peaked heads).

mod calibrate;
mod control;
mod generator;
mod geometry;
mod head;
mod heads;
mod needle;
mod queries;
mod rng;
mod spec;
mod statistics;
mod table;

pub use head::HeadWorkload;
pub use heads::{HeadTargets, HeadType};
pub use needle::Needle;
pub use spec::WorkloadSpec;
pub use statistics::{HeadStatistics, Overlap};
pub use table::{ParamKind, ParamSpec, WORKLOADS, WorkloadInfo};

use geometry::MAX_DIM;

/// Tokens that are generated together.
pub const BLOCK: usize = 256;

/// Most decode steps that a workload plans (their queries are kept in memory: steps x (group + 2) x d x 4 bytes a head).
pub const MAX_STEPS: usize = 4096;

/// Positions before the first step whose queries [`HeadWorkload::prompt_queries`] gives.
pub const PROMPT_QUERIES: usize = 1024;

/// Positions before the first step whose queries already ask for the needle: the question that ends a prompt.
pub const QUESTION: usize = 32;

/// Fewest tokens of context.
pub const MIN_CONTEXT: usize = 16;

/// What a number stream is for: the first word of its path.
mod purpose {
    pub(super) type Purpose = u64;
    pub(super) const ASSIGN: Purpose = 1;
    pub(super) const MODEL: Purpose = 2;
    pub(super) const TOPIC: Purpose = 3;
    pub(super) const KEY: Purpose = 4;
    pub(super) const VALUE: Purpose = 5;
    pub(super) const QUERY: Purpose = 6;
    pub(super) const PROBE: Purpose = 7;
    pub(super) const NEEDLE: Purpose = 8;
    pub(super) const PROMPT: Purpose = 9;
    pub(super) const OUTLIER: Purpose = 10;
    pub(super) const MARK: Purpose = 11;
}

/// Why a workload cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WorkloadError {
    /// No workload has that name.
    #[error("no workload is named `{name}`; known: {known}")]
    UnknownWorkload {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The workload takes no such parameter.
    #[error("workload `{workload}` takes no parameter `{key}`; it takes: {known}")]
    UnknownParameter {
        /// The workload.
        workload: String,
        /// The key given.
        key: String,
        /// The keys there are.
        known: String,
    },
    /// A parameter's value is out of range.
    #[error("workload `{workload}`: `{key}={value}` cannot be used; {why}")]
    BadValue {
        /// The workload.
        workload: String,
        /// The key.
        key: String,
        /// The value given.
        value: String,
        /// What would be taken.
        why: String,
    },
    /// The model's shape or the run's lengths are outside of what the generator makes.
    #[error("a workload needs {what} {range}, not {got}")]
    Range {
        /// Which quantity.
        what: &'static str,
        /// What is taken.
        range: String,
        /// What was given.
        got: String,
    },
}

/// The part of a model's shape that a workload depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadShape {
    /// Layers.
    pub layers: usize,
    /// Query heads of a layer; a multiple of `kv_heads`.
    pub heads: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Coordinates of a head: even, 16 to 256. Of the d/2 RoPE pairs the slowest twentieth carries sinks and offset,
    /// two more the heavy hitters, and the band from 44/64 on is the slow one.
    pub head_dim: usize,
    /// Base of the RoPE frequencies `theta^(-2i/d)`, as the model uses it (after any scaling of the base).
    pub rope_theta: f64,
}

impl HeadShape {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn check(&self) -> Result<(), WorkloadError> {
        let range =
            |what, range: &str, got: String| Err(WorkloadError::Range { what, range: range.to_owned(), got });
        if self.layers == 0 {
            return range("layers", "of 1 or more", self.layers.to_string());
        }
        if self.kv_heads == 0 || self.heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let got = format!("{} over {} KV heads", self.heads, self.kv_heads);
            return range("query heads", "in equal groups over the KV heads", got);
        }
        if !(16..=MAX_DIM).contains(&self.head_dim) || !self.head_dim.is_multiple_of(2) {
            return range("a head dimension", "that is even, from 16 to 256", self.head_dim.to_string());
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 2.0) {
            return range("a RoPE base", "of 2 or more", self.rope_theta.to_string());
        }
        Ok(())
    }
}

/// A workload planned for a model's shape, a context and a number of decode steps.
#[derive(Debug)]
pub struct Workload {
    spec: WorkloadSpec,
    shape: HeadShape,
    context: usize,
    steps: usize,
    seed: u64,
    types: Vec<HeadType>,
    plan: Option<std::sync::Arc<calibrate::Plan>>,
}

impl Workload {
    /// Plans the workload: checks the shape, gives every head its type, lays out the calibration's positions (tens of
    /// milliseconds at most). The work on a head is in [`Workload::calibrate`].
    ///
    /// `context` is the number of cached tokens before the first step, `steps` the number of decode steps.
    ///
    /// # Errors
    /// A shape, context (at least [`MIN_CONTEXT`]) or step count (1 to [`MAX_STEPS`]) that the generator does not make.
    pub fn new(
        spec: &WorkloadSpec,
        shape: &HeadShape,
        context: usize,
        steps: usize,
        seed: u64,
    ) -> Result<Self, WorkloadError> {
        shape.check()?;
        if !(MIN_CONTEXT..=1 << 30).contains(&context) {
            let range = format!("from {MIN_CONTEXT} to 2^30 tokens");
            return Err(WorkloadError::Range { what: "a context", range, got: context.to_string() });
        }
        if !(1..=MAX_STEPS).contains(&steps) {
            let range = format!("from 1 to {MAX_STEPS}");
            return Err(WorkloadError::Range {
                what: "a number of decode steps",
                range,
                got: steps.to_string(),
            });
        }
        let types = match spec.family {
            spec::Family::Mix => heads::assign_mix(shape, seed),
            spec::Family::Only(head) => vec![head; shape.layers * shape.kv_heads],
        };
        // The controls need no solving.
        let plan = types[0].targets().map(|_| calibrate::Plan::new(shape, context, steps, seed).into());
        Ok(Self { spec: spec.clone(), shape: shape.clone(), context, steps, seed, types, plan })
    }

    /// The type of a head.
    ///
    /// # Panics
    /// If the layer or the KV head is outside of the shape.
    pub fn head_type(&self, layer: usize, kv_head: usize) -> HeadType {
        assert!(
            layer < self.shape.layers && kv_head < self.shape.kv_heads,
            "no KV head {kv_head} in layer {layer}"
        );
        self.types[layer * self.shape.kv_heads + kv_head]
    }

    /// Builds the generator of one (layer, KV head): a few milliseconds, on any thread, in any order.
    ///
    /// # Panics
    /// If the layer or the KV head is outside of the shape.
    pub fn calibrate(&self, layer: usize, kv_head: usize) -> HeadWorkload {
        let head_type = self.head_type(layer, kv_head);
        match (&self.plan, head_type.targets()) {
            (Some(plan), Some(targets)) => {
                let index = layer * self.shape.kv_heads + kv_head;
                let ordinal = self.types[..index].iter().filter(|t| **t == head_type).count();
                HeadWorkload::structured(
                    calibrate::solve(self, plan, layer, kv_head, &targets, ordinal),
                    self,
                    head_type,
                )
            }
            _ => {
                HeadWorkload::control(control::Control::new(self, layer, kv_head, head_type), self, head_type)
            }
        }
    }

    /// The specification that this is a plan of.
    pub fn spec(&self) -> &WorkloadSpec {
        &self.spec
    }

    /// The shape planned for.
    pub fn shape(&self) -> &HeadShape {
        &self.shape
    }

    /// Cached tokens before the first step.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Decode steps planned.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Blocks of the context; the last one may be short.
    pub fn blocks(&self) -> usize {
        self.context.div_ceil(BLOCK)
    }
}
