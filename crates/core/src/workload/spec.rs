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

const STRUCTURED: &[ParamSpec] = &[
    ParamSpec {
        name: "eta",
        summary: "eigenvalues of the key noise fall as i^-eta: 0 is white, 1 about 18 directions, 1.5 about 5",
        kind: ParamKind::Number { min: 0.0, max: 3.0 },
        default: "1",
    },
    ParamSpec {
        name: "placement",
        summary: "where the leading directions lie: in slow RoPE pairs (the rank survives RoPE) or scrambled over all",
        kind: ParamKind::Choice(&["slow", "scrambled"]),
        default: "slow",
    },
    ParamSpec {
        name: "values",
        summary: "values follow the topic of their token (autocorrelated) or are independent",
        kind: ParamKind::Choice(&["topic", "iid"]),
        default: "topic",
    },
];

const fn structured(name: &'static str, summary: &'static str) -> WorkloadInfo {
    WorkloadInfo { name, summary, params: STRUCTURED }
}

/// Every workload by name.
pub static WORKLOADS: &[WorkloadInfo] = &[
    structured("mix", "the mix of head types reported for trained models; the first two layers are diffuse"),
    structured("sink", "every head puts 85 % of its mass on the first token"),
    structured("local", "every head falls off with distance as a power law, exponent 1.2"),
    structured("content", "every head follows topics and noise, noise logits of deviation 2"),
    structured("peaked", "as content, with noise logits of deviation 3"),
    structured("heavy-hitter", "one token in a hundred draws every query"),
    structured("diffuse", "every head spreads over half of the context"),
    structured(
        "needle",
        "content heads with one planted token, its mass set by a margin that grows with the context",
    ),
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

/// A checked workload specification.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkloadSpec {
    info: usize,
    pub(super) family: Family,
    pub(super) eta: f64,
    pub(super) placement: Placement,
    pub(super) topic_values: bool,
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
        let value = |key: &str| {
            let slot = params.iter().position(|p| p.name == key)?;
            Some(given[slot].unwrap_or(params[slot].default))
        };
        let family = match HeadType::from_name(name) {
            Some(head) => Family::Only(head),
            None => Family::Mix,
        };
        let eta = value("eta").and_then(|v| v.parse::<f64>().ok()).unwrap_or(0.0);
        Ok(Self {
            info,
            family,
            // -0 and 0 are one workload and must print as one.
            eta: if eta == 0.0 { 0.0 } else { eta },
            placement: if value("placement") == Some("scrambled") {
                Placement::Scrambled
            } else {
                Placement::Slow
            },
            topic_values: value("values") == Some("topic"),
        })
    }

    /// The specification with every parameter written out, in table order: equal workloads have equal text.
    pub fn canonical(&self) -> String {
        let info = &WORKLOADS[self.info];
        if info.params.is_empty() {
            return info.name.to_owned();
        }
        let placement = if self.placement == Placement::Slow { "slow" } else { "scrambled" };
        let values = if self.topic_values { "topic" } else { "iid" };
        format!("{}:eta={},placement={placement},values={values}", info.name, self.eta)
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
        ] {
            let error = WorkloadSpec::parse(text).expect_err(text).to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
