//! The table of workloads: names, parameters, bounds and defaults.

/// What values a parameter takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ParamKind {
    /// A number between two bounds, both included.
    Number {
        /// Smallest value taken.
        min: f64,
        /// Largest value taken.
        max: f64,
    },
    /// One of a few words.
    Choice(&'static [&'static str]),
}

/// One parameter of a workload.
#[derive(Debug, Clone, Copy)]
pub struct ParamSpec {
    /// The key in `name:key=value`.
    pub name: &'static str,
    /// One line for a reader.
    pub summary: &'static str,
    /// Values taken.
    pub kind: ParamKind,
    /// The value when it is not given.
    pub default: &'static str,
    /// Left out of the canonical text where it has its default.
    pub setting: bool,
}

impl ParamSpec {
    const fn number(
        name: &'static str,
        summary: &'static str,
        [min, max]: [f64; 2],
        default: &'static str,
    ) -> Self {
        ParamSpec { name, summary, kind: ParamKind::Number { min, max }, default, setting: false }
    }

    const fn choice(
        name: &'static str,
        summary: &'static str,
        words: &'static [&'static str],
        default: &'static str,
    ) -> Self {
        ParamSpec { name, summary, kind: ParamKind::Choice(words), default, setting: false }
    }

    /// Left out of the canonical text where it has its default.
    const fn setting(self) -> Self {
        ParamSpec { setting: true, ..self }
    }
}

/// One line of the table of workloads.
#[derive(Debug, Clone, Copy)]
pub struct WorkloadInfo {
    /// The name in a specification.
    pub name: &'static str,
    /// One line for a reader.
    pub summary: &'static str,
    /// Parameters, in canonical order.
    pub params: &'static [ParamSpec],
}

const ETA: ParamSpec = ParamSpec::number(
    "eta",
    "eigenvalues of the key noise fall as i^-eta: 0 is white, 1 about 18 directions, 1.5 about 5",
    [0.0, 3.0],
    "1",
);
const PLACEMENT: ParamSpec = ParamSpec::choice(
    "placement",
    "where the leading directions lie: in slow RoPE pairs (the rank survives RoPE) or scrambled over all",
    &["slow", "scrambled"],
    "slow",
);
const VALUES: ParamSpec = ParamSpec::choice(
    "values",
    "values follow the topic of their token (autocorrelated) or are independent",
    &["topic", "iid"],
    "topic",
);
const STEPS: ParamSpec = ParamSpec::choice(
    "steps",
    "queries move slowly (noise AR(1) 0.8, a new topic once in 16 steps) or are drawn anew at every step",
    &["ar", "iid"],
    "ar",
)
.setting();
const GROUP: ParamSpec = ParamSpec::choice("group", "heads of a group: one topic half of the time and noise of their own, independent, alike (one topic, noise \
              correlation 0.64 to 0.8), or the same query", &["shared", "independent", "alike", "same"], "shared").setting();
const OUTLIERS: ParamSpec = ParamSpec::choice(
    "outliers",
    "one key in a hundred has four times the norm and points away from every query",
    &["no", "yes"],
    "no",
)
.setting();
const DRIFT: ParamSpec = ParamSpec::choice(
    "drift",
    "the mean of the keys moves by 16 across the context, where no query looks",
    &["no", "yes"],
    "no",
)
.setting();
const MARGIN: ParamSpec = ParamSpec::choice("margin", "log-odds of what is planted against the rest of the context (its logit margin grows with ln n), or one each \
              for the queries in turn", &["cycle", "-2", "0", "2", "4"], "cycle").setting();
const DEPTH: ParamSpec = ParamSpec::choice(
    "depth",
    "place of the needle as a share of the context, or 0.1 to 0.9 for the heads in turn",
    &["cycle", "0", "0.1", "0.3", "0.5", "0.7", "0.9"],
    "cycle",
)
.setting();
const NEEDLES: ParamSpec = ParamSpec::choice("needles", "tokens that hold the answer, all at one logit: with 4 the answer is a set of 4 values (RULER multi-value)", &["1", "4"], "1").setting();
const DISTRACTORS: ParamSpec = ParamSpec::choice("distractors", "keys of cosine 0.7 with the needle, with values of their own: none, 4 or one in 64 tokens (RULER multi-key)", &["0", "4", "many"], "0").setting();
const ASKED: ParamSpec = ParamSpec::choice(
    "asked",
    "whether the last 32 positions of the prompt ask for what is planted, or the steps alone",
    &["prompt", "steps"],
    "prompt",
)
.setting();
const HIDE: ParamSpec = ParamSpec::choice("hide", "mean: 15 neighbours cancel the needle in the mean of every page of 16 or more; outlier: a neighbour of four \
              times the norm drags that mean away from the queries", &["no", "mean", "outlier"], "no").setting();
const CHANNELS: ParamSpec = ParamSpec::choice(
    "channels",
    "channels of the needle: spread over the slower ones at random, 8 alone (easy for methods that read some \
              channels: SparQ, arXiv 2312.04985), or thin, evenly over all (hard)",
    &["spread", "sparse", "thin"],
    "spread",
)
.setting();

/// `margin` where one query looks for everything at once.
const SET_MARGIN: ParamSpec = ParamSpec { default: "2", ..MARGIN };

const STRUCTURED: &[ParamSpec] = &[ETA, PLACEMENT, VALUES, STEPS, GROUP, OUTLIERS, DRIFT];

const MIXED: &[ParamSpec] = &[ETA, PLACEMENT, VALUES, STEPS, GROUP, OUTLIERS, DRIFT, ASKED];

const PLANTED: &[ParamSpec] = &[
    ETA,
    PLACEMENT,
    VALUES,
    STEPS,
    GROUP,
    OUTLIERS,
    DRIFT,
    MARGIN,
    DEPTH,
    NEEDLES,
    DISTRACTORS,
    ASKED,
    HIDE,
    CHANNELS,
];

const COUNTED: &[ParamSpec] = &[ETA, PLACEMENT, VALUES, STEPS, GROUP, OUTLIERS, DRIFT, SET_MARGIN, ASKED];

const fn structured(name: &'static str, summary: &'static str) -> WorkloadInfo {
    WorkloadInfo { name, summary, params: STRUCTURED }
}

/// Every workload by name.
pub static WORKLOADS: &[WorkloadInfo] = &[
    WorkloadInfo {
        name: "mix",
        summary: "the mix of head types reported for trained models; the first two layers are diffuse",
        params: MIXED,
    },
    structured(
        "sink",
        "every head puts 85 % of its mass on the first token (attention sinks, arXiv 2410.10781)",
    ),
    structured("local", "every head falls off with distance as a power law, exponent 1.2"),
    structured(
        "content",
        "every head follows topics and noise, noise logits of deviation 2 (arXiv 2502.09647)",
    ),
    structured("peaked", "as content, with noise logits of deviation 3"),
    structured("heavy-hitter", "one token in a hundred draws every query (H2O, arXiv 2306.14048)"),
    structured("diffuse", "every head spreads over half of the context"),
    WorkloadInfo {
        name: "needle",
        summary: "content heads with planted tokens, their mass set by a margin that grows with the context (RULER, arXiv \
                  2404.06654)",
        params: PLANTED,
    },
    WorkloadInfo {
        name: "aggregation",
        summary: "diffuse heads that count: 10 groups of 30 planted tokens against 20 of 3, at one mild boost; which groups \
                  are large? (RULER common words, arXiv 2404.06654)",
        params: COUNTED,
    },
    WorkloadInfo {
        name: "gaussian",
        summary: "control: independent N(0, 1) queries, keys and values; says nothing about a model",
        params: &[],
    },
    WorkloadInfo {
        name: "uniform",
        summary: "control: every logit is 0, every token weighs the same",
        params: &[],
    },
    WorkloadInfo {
        name: "onehot",
        summary: "control: all mass on one token in the middle of the context",
        params: &[],
    },
];
