//! Specifications of workloads: `mix:eta=1,placement=slow,values=topic`, parsed and checked here only.

use super::table::{ParamKind, ParamSpec, WORKLOADS, WorkloadInfo};
use super::{HeadType, WorkloadError};

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
