//! The names and parameters of workloads: `mix:eta=1,placement=slow,values=topic`, parsed and checked here only.

use super::{HeadType, WorkloadError};

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

const ETA: ParamSpec = ParamSpec {
    name: "eta",
    summary: "eigenvalues of the key noise fall as i^-eta: 0 is white, 1 about 18 directions, 1.5 about 5",
    kind: ParamKind::Number { min: 0.0, max: 3.0 },
    default: "1",
    setting: false,
};
const PLACEMENT: ParamSpec = ParamSpec {
    name: "placement",
    summary: "where the leading directions lie: in slow RoPE pairs (the rank survives RoPE) or scrambled over all",
    kind: ParamKind::Choice(&["slow", "scrambled"]),
    default: "slow",
    setting: false,
};
const VALUES: ParamSpec = ParamSpec {
    name: "values",
    summary: "values follow the topic of their token (autocorrelated) or are independent",
    kind: ParamKind::Choice(&["topic", "iid"]),
    default: "topic",
    setting: false,
};
const STEPS: ParamSpec = ParamSpec {
    name: "steps",
    summary: "queries move slowly (noise AR(1) 0.8, a new topic once in 16 steps) or are drawn anew at every step",
    kind: ParamKind::Choice(&["ar", "iid"]),
    default: "ar",
    setting: true,
};
const GROUP: ParamSpec = ParamSpec {
    name: "group",
    summary: "heads of a group: one topic half of the time and noise of their own, independent, alike (one topic, noise \
              correlation 0.64 to 0.8), or the same query",
    kind: ParamKind::Choice(&["shared", "independent", "alike", "same"]),
    default: "shared",
    setting: true,
};
const OUTLIERS: ParamSpec = ParamSpec {
    name: "outliers",
    summary: "one key in a hundred has four times the norm and points away from every query",
    kind: ParamKind::Choice(&["no", "yes"]),
    default: "no",
    setting: true,
};
const DRIFT: ParamSpec = ParamSpec {
    name: "drift",
    summary: "the mean of the keys moves by 16 across the context, where no query looks",
    kind: ParamKind::Choice(&["no", "yes"]),
    default: "no",
    setting: true,
};
const MARGIN: ParamSpec = ParamSpec {
    name: "margin",
    summary: "log-odds of what is planted against the rest of the context (its logit margin grows with ln n), or one each \
              for the queries in turn",
    kind: ParamKind::Choice(&["cycle", "-2", "0", "2", "4"]),
    default: "cycle",
    setting: true,
};
const DEPTH: ParamSpec = ParamSpec {
    name: "depth",
    summary: "place of the needle as a share of the context, or 0.1 to 0.9 for the heads in turn",
    kind: ParamKind::Choice(&["cycle", "0", "0.1", "0.3", "0.5", "0.7", "0.9"]),
    default: "cycle",
    setting: true,
};
const NEEDLES: ParamSpec = ParamSpec {
    name: "needles",
    summary: "tokens that hold the answer, all at one logit: with 4 the answer is a set of 4 values (RULER multi-value)",
    kind: ParamKind::Choice(&["1", "4"]),
    default: "1",
    setting: true,
};
const DISTRACTORS: ParamSpec = ParamSpec {
    name: "distractors",
    summary: "keys of cosine 0.7 with the needle, with values of their own: none, 4 or one in 64 tokens (RULER multi-key)",
    kind: ParamKind::Choice(&["0", "4", "many"]),
    default: "0",
    setting: true,
};
const ASKED: ParamSpec = ParamSpec {
    name: "asked",
    summary: "whether the last 32 positions of the prompt ask for what is planted, or the steps alone",
    kind: ParamKind::Choice(&["prompt", "steps"]),
    default: "prompt",
    setting: true,
};
const HIDE: ParamSpec = ParamSpec {
    name: "hide",
    summary: "mean: 15 neighbours cancel the needle in the mean of every page of 16 or more; outlier: a neighbour of four \
              times the norm drags that mean away from the queries",
    kind: ParamKind::Choice(&["no", "mean", "outlier"]),
    default: "no",
    setting: true,
};
const CHANNELS: ParamSpec = ParamSpec {
    name: "channels",
    summary: "channels of the needle: spread over the slower ones at random, 8 alone (easy for methods that read some \
              channels: SparQ, arXiv 2312.04985), or thin, evenly over all (hard)",
    kind: ParamKind::Choice(&["spread", "sparse", "thin"]),
    default: "spread",
    setting: true,
};

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

/// What a whole workload is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// The mix of head types.
    Mix,
    /// Every head of one type (controls included).
    Only(HeadType),
}

/// Where the leading noise directions lie before RoPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    Slow,
    Scrambled,
}

/// How the heads of a group go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupKind {
    Shared,
    Independent,
    Alike,
    Same,
}

/// What stands beside a needle to hide it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hide {
    No,
    Mean,
    Outlier,
}

/// Channels of a needle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channels {
    Spread,
    Sparse,
    Thin,
}

/// How many keys look like the needle's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Distractors {
    Count(usize),
    /// One in so many tokens.
    Every(usize),
}

/// Where and how a needle is planted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NeedleSpec {
    /// Log-odds of the mass; `None` goes through them query by query.
    pub(super) margin: Option<f64>,
    /// Share of the context; `None` goes through them head by head.
    pub(super) depth: Option<f64>,
    pub(super) needles: usize,
    pub(super) distractors: Distractors,
    pub(super) asked_by_prompt: bool,
    pub(super) hide: Hide,
    pub(super) channels: Channels,
}

/// A checked workload specification.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkloadSpec {
    info: usize,
    /// Values in canonical form, in the order of the parameters.
    texts: Vec<String>,
    pub(super) family: Family,
    pub(super) eta: f64,
    pub(super) placement: Placement,
    pub(super) topic_values: bool,
    pub(super) moving: bool,
    pub(super) group: GroupKind,
    pub(super) outliers: bool,
    pub(super) drift: bool,
    pub(super) needle: NeedleSpec,
}

impl WorkloadSpec {
    /// Reads `name` or `name:key=value,key=value`.
    ///
    /// # Errors
    /// An unknown name, an unknown or repeated key, or a value out of range; the error lists what is taken.
    pub fn parse(text: &str) -> Result<Self, WorkloadError> {
        let (name, rest) = match text.split_once(':') {
            Some((name, rest)) => (name.trim(), Some(rest)),
            None => (text.trim(), None),
        };
        let Some(info) = WORKLOADS.iter().position(|w| w.name == name) else {
            let known = WORKLOADS.iter().map(|w| w.name).collect::<Vec<_>>().join(", ");
            return Err(WorkloadError::UnknownWorkload { name: name.to_owned(), known });
        };
        let params = WORKLOADS[info].params;
        let mut given: Vec<Option<&str>> = vec![None; params.len()];
        for item in rest.into_iter().flat_map(|r| r.split(',')) {
            let (key, value) = item.split_once('=').map_or((item.trim(), ""), |(k, v)| (k.trim(), v.trim()));
            let Some(slot) = params.iter().position(|p| p.name == key) else {
                let known = params.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
                let known = if known.is_empty() { "none".to_owned() } else { known };
                return Err(WorkloadError::UnknownParameter {
                    workload: name.to_owned(),
                    key: key.to_owned(),
                    known,
                });
            };
            if given[slot].is_some() {
                return Err(bad_value(name, key, value, "it is given twice; give it once"));
            }
            check_value(name, &params[slot], value)?;
            given[slot] = Some(value);
        }
        let texts: Vec<String> =
            params.iter().zip(given).map(|(p, given)| tidy(p, given.unwrap_or(p.default))).collect();
        let value =
            |key: &str| params.iter().position(|p| p.name == key).map_or("", |slot| texts[slot].as_str());
        let family = match HeadType::from_name(name) {
            Some(head) => Family::Only(head),
            None => Family::Mix,
        };
        let needle = NeedleSpec {
            margin: value("margin").parse().ok(),
            depth: value("depth").parse().ok(),
            needles: if value("needles") == "4" { 4 } else { 1 },
            distractors: match value("distractors") {
                "4" => Distractors::Count(4),
                "many" => Distractors::Every(64),
                _ => Distractors::Count(0),
            },
            asked_by_prompt: value("asked") != "steps",
            hide: match value("hide") {
                "mean" => Hide::Mean,
                "outlier" => Hide::Outlier,
                _ => Hide::No,
            },
            channels: match value("channels") {
                "sparse" => Channels::Sparse,
                "thin" => Channels::Thin,
                _ => Channels::Spread,
            },
        };
        Ok(Self {
            info,
            family,
            eta: value("eta").parse().unwrap_or(0.0),
            placement: match value("placement") {
                "scrambled" => Placement::Scrambled,
                _ => Placement::Slow,
            },
            topic_values: value("values") == "topic",
            moving: value("steps") != "iid",
            group: match value("group") {
                "independent" => GroupKind::Independent,
                "alike" => GroupKind::Alike,
                "same" => GroupKind::Same,
                _ => GroupKind::Shared,
            },
            outliers: value("outliers") == "yes",
            drift: value("drift") == "yes",
            needle,
            texts,
        })
    }

    /// The specification with its parameters written out in table order, settings only where they differ from their
    /// defaults: equal workloads have equal text.
    pub fn canonical(&self) -> String {
        let info = &WORKLOADS[self.info];
        let told = info.params.iter().zip(&self.texts).filter(|(p, text)| !p.setting || **text != p.default);
        let told: Vec<String> = told.map(|(p, text)| format!("{}={text}", p.name)).collect();
        if told.is_empty() { info.name.to_owned() } else { format!("{}:{}", info.name, told.join(",")) }
    }

    /// The line of [`WORKLOADS`] that this is an instance of.
    pub fn info(&self) -> &'static WorkloadInfo {
        &WORKLOADS[self.info]
    }
}

fn bad_value(workload: &str, key: &str, value: &str, why: &str) -> WorkloadError {
    WorkloadError::BadValue {
        workload: workload.to_owned(),
        key: key.to_owned(),
        value: value.to_owned(),
        why: why.to_owned(),
    }
}

/// A checked value in its one spelling.
fn tidy(spec: &ParamSpec, value: &str) -> String {
    match (spec.kind, value.parse::<f64>()) {
        // -0 and 0 are one workload and must print as one.
        (ParamKind::Number { .. }, Ok(number)) => (if number == 0.0 { 0.0 } else { number }).to_string(),
        _ => value.to_owned(),
    }
}

fn check_value(workload: &str, spec: &ParamSpec, value: &str) -> Result<(), WorkloadError> {
    match spec.kind {
        ParamKind::Number { min, max } => match value.parse::<f64>() {
            Ok(number) if number >= min && number <= max => Ok(()),
            _ => Err(bad_value(workload, spec.name, value, &format!("give a number from {min} to {max}"))),
        },
        ParamKind::Choice(words) if words.contains(&value) => Ok(()),
        ParamKind::Choice(words) => {
            Err(bad_value(workload, spec.name, value, &format!("give one of {}", words.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_text_is_a_fixed_point() {
        for (text, canonical) in [
            ("mix", "mix:eta=1,placement=slow,values=topic"),
            ("peaked: values=iid , eta=1.50", "peaked:eta=1.5,placement=slow,values=iid"),
            ("needle:placement=scrambled,eta=-0", "needle:eta=0,placement=scrambled,values=topic"),
            ("gaussian", "gaussian"),
            ("mix:steps=iid,drift=no", "mix:eta=1,placement=slow,values=topic,steps=iid"),
            (
                "needle:depth=0.5,needles=4,margin=cycle",
                "needle:eta=1,placement=slow,values=topic,depth=0.5,needles=4",
            ),
            ("aggregation:margin=2", "aggregation:eta=1,placement=slow,values=topic"),
        ] {
            let spec = WorkloadSpec::parse(text).expect(text);
            assert_eq!(spec.canonical(), canonical);
            assert_eq!(WorkloadSpec::parse(canonical).expect(canonical), spec);
        }
    }

    #[test]
    fn every_name_of_the_table_parses_and_defaults_are_legal() {
        for info in WORKLOADS {
            let spec = WorkloadSpec::parse(info.name).expect(info.name);
            assert_eq!(spec.info().name, info.name);
            for param in info.params {
                check_value(info.name, param, param.default).expect(param.name);
            }
        }
    }

    #[test]
    fn wrong_text_is_refused_with_the_choices() {
        for (text, hint) in [
            ("mixed", "heavy-hitter"),
            ("", "mix"),
            ("mix:", "eta"),
            ("mix:rank=3", "placement"),
            ("mix:eta=x", "0 to 3"),
            ("mix:eta=NaN", "0 to 3"),
            ("mix:eta=4", "0 to 3"),
            ("mix:eta=1,eta=1", "twice"),
            ("mix:placement=fast", "scrambled"),
            ("gaussian:eta=1", "none"),
            ("mix:depth=0.5", "group"),
            ("needle:needles=3", "1, 4"),
        ] {
            let error = WorkloadSpec::parse(text).expect_err(text).to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
