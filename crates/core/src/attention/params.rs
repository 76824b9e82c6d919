//! Parameters as text: `window:sinks=4,window=1024`. Parsed, checked and completed with defaults in this one place.

use std::fmt;

use super::layers::Layers;
use super::prefill::{self, Pattern};
use super::{METHODS, Method, MethodShape, Predicted};
use crate::error::{Error, Result};

/// Type and range of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A whole number within the bounds.
    Int {
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// A real number within the bounds.
    Float {
        /// Smallest allowed.
        min: f64,
        /// Largest allowed.
        max: f64,
    },
    /// One of some words.
    Choice(&'static [&'static str]),
    /// A list of [`Layers`].
    Layers,
}

/// A parameter of a method.
#[derive(Clone, Copy, Debug)]
pub struct ParamSpec {
    /// Key.
    pub name: &'static str,
    /// One line, with the unit.
    pub summary: &'static str,
    /// Type and range.
    pub kind: Kind,
    /// Default, as text; of a number it may be a word, for one that something else decides.
    pub default: &'static str,
}

impl ParamSpec {
    /// A whole number within the bounds.
    pub const fn int(
        name: &'static str,
        summary: &'static str,
        [min, max]: [u64; 2],
        default: &'static str,
    ) -> Self {
        ParamSpec { name, summary, kind: Kind::Int { min, max }, default }
    }

    /// A real number within the bounds.
    pub const fn float(
        name: &'static str,
        summary: &'static str,
        [min, max]: [f64; 2],
        default: &'static str,
    ) -> Self {
        ParamSpec { name, summary, kind: Kind::Float { min, max }, default }
    }

    /// One of some words.
    pub const fn choice(
        name: &'static str,
        summary: &'static str,
        words: &'static [&'static str],
        default: &'static str,
    ) -> Self {
        ParamSpec { name, summary, kind: Kind::Choice(words), default }
    }

    /// Which of the generators that `summary` tells: the same seed gives the same bits.
    pub const fn seed(summary: &'static str) -> Self {
        ParamSpec::int("seed", summary, [0, 1 << 32], "0")
    }

    /// How many of the first tokens a method always reads.
    pub const fn sinks(default: &'static str) -> Self {
        ParamSpec::int("sinks", "first tokens always read", [0, 1 << 20], default)
    }

    /// How many of the most recent tokens a method always reads.
    pub const fn local(default: &'static str) -> Self {
        ParamSpec::int("local", "most recent tokens always read, the newest included", [1, 1 << 24], default)
    }
}

/// The value of a parameter.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Number(f64),
    Word(&'static str),
    Layers(Layers),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Number(number) => number.fmt(f),
            Value::Word(word) => f.write_str(word),
            Value::Layers(layers) => layers.fmt(f),
        }
    }
}

/// Settings that methods which choose among the tokens take besides their own parameters; all take the
/// [`prefill::PREFILL_SETTINGS`].
pub static SETTINGS: &[ParamSpec] = &[
    ParamSpec {
        name: "dense_layers",
        summary: "layers that attend to everything",
        kind: Kind::Layers,
        default: "none",
    },
    ParamSpec {
        name: "reuse",
        summary: "decode steps that a selection serves; tokens appended meanwhile join it",
        kind: Kind::Int { min: 1, max: 1024 },
        default: "1",
    },
];

/// Values of all parameters of a method, in the order of its table, and of the settings that it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Params(Vec<(&'static str, Value)>);

impl Params {
    /// The whole number called `name`.
    ///
    /// # Panics
    /// When the method's own table does not list it as a number: a slip of its author.
    pub fn int(&self, name: &str) -> usize {
        self.float(name) as usize
    }

    /// The number called `name`.
    ///
    /// # Panics
    /// As [`Params::int`].
    pub fn float(&self, name: &str) -> f64 {
        match self.value(name) {
            Value::Number(value) => *value,
            other => panic!("the parameter `{name}` is {other}, no number"),
        }
    }

    /// The whole number called `name`, or `otherwise` where it is left to its default, a word.
    ///
    /// # Panics
    /// When there is no such number.
    pub(super) fn int_or(&self, name: &str, otherwise: usize) -> usize {
        if self.given(name) { self.int(name) } else { otherwise }
    }

    /// Whether the number called `name`, whose default is a word, was given.
    ///
    /// # Panics
    /// When the method's own table does not list it.
    pub(super) fn given(&self, name: &str) -> bool {
        matches!(self.value(name), Value::Number(_))
    }

    /// The word chosen for `name`.
    ///
    /// # Panics
    /// When the method's own table does not list it as a choice: a slip of its author.
    pub fn word(&self, name: &str) -> &'static str {
        match self.value(name) {
            Value::Word(word) => word,
            other => panic!("the parameter `{name}` is {other}, no word"),
        }
    }

    /// The layers given for `name`.
    ///
    /// # Panics
    /// When the method's own table does not list it as layers: a slip of its author.
    pub fn layers(&self, name: &str) -> &Layers {
        match self.value(name) {
            Value::Layers(layers) => layers,
            other => panic!("the parameter `{name}` is {other}, no layers"),
        }
    }

    fn value(&self, name: &str) -> &Value {
        match self.0.iter().find(|(n, _)| *n == name) {
            Some((_, value)) => value,
            None => panic!("no parameter `{name}` in the method's table"),
        }
    }
}

/// A method and all its parameters.
#[derive(Clone)]
pub struct MethodSpec {
    method: &'static Method,
    params: Params,
}

impl fmt::Debug for MethodSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical())
    }
}

impl MethodSpec {
    /// Parses `name` or `name:key=value,…`. A list of layers may be joined by commas too.
    ///
    /// # Errors
    /// [`Error::Unknown`] for the name, [`Error::Parameter`] for a key or value.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let method = METHODS
            .iter()
            .find(|m| m.name == name)
            .ok_or_else(|| Error::unknown("method", name, METHODS.iter().map(|m| m.name)))?;
        let fail = |reason: String| Error::Parameter { text: text.into(), reason };
        let mut values: Vec<Option<Value>> = vec![None; method.all_params().count()];
        for pair in &pairs(rest) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(fail(format!("`{pair}` is not of the form key=value")));
            };
            let Some((i, spec)) = method.all_params().enumerate().find(|(_, p)| p.name == key) else {
                let known: Vec<_> = method.all_params().map(|p| p.name).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                return Err(fail(format!("`{name}` has no parameter `{key}`; its parameters: {known}")));
            };
            if values[i].replace(parse_value(spec, value).map_err(fail)?).is_some() {
                return Err(fail(format!("`{key}` is given twice")));
            }
        }
        let defaults = method.all_params().map(|p| Ok((p.name, parse_value(p, p.default).map_err(fail)?)));
        let defaults: Vec<_> = defaults.collect::<Result<_>>()?;
        let params = defaults.into_iter().zip(values).map(|((n, d), v)| (n, v.unwrap_or(d))).collect();
        let params = Params(params);
        prefill::check(&params).map_err(fail)?;
        Ok(MethodSpec { method, params })
    }

    /// The table's entry.
    pub fn method(&self) -> &'static Method {
        self.method
    }

    /// The values.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The string with every parameter written out, and of the settings those that are not at their default; it parses to
    /// the same.
    pub fn canonical(&self) -> String {
        let own = self.method.params.len();
        let pairs = self.method.all_params().zip(&self.params.0).enumerate();
        let pairs = pairs.map(|(i, (spec, (name, value)))| (i < own, spec.default, *name, value.to_string()));
        let pairs: Vec<_> = pairs
            .filter(|(own, default, _, value)| *own || value != default)
            .map(|(_, _, name, value)| format!("{name}={value}"))
            .collect();
        if pairs.is_empty() {
            self.method.name.into()
        } else {
            format!("{}:{}", self.method.name, pairs.join(","))
        }
    }

    /// The method `dense` with the settings of this one that are those of prompts.
    ///
    /// # Errors
    /// None but of the table's own name.
    pub fn with_dense_steps(&self) -> Result<MethodSpec> {
        let (spec, own) = (MethodSpec::parse("dense")?, &self.params.0);
        let params = spec.params.0.iter().map(|(name, _)| *name);
        let params = params.filter_map(|name| own.iter().find(|(n, _)| *n == name).cloned()).collect();
        Ok(MethodSpec { params: Params(params), ..spec })
    }

    /// Whether tokens of a prompt see everything before them.
    pub fn is_prefill_dense(&self) -> bool {
        self.params.word("prefill") == prefill::DENSE
    }

    /// Which tokens those of a prompt see; none where they see everything.
    pub(super) fn prefill(&self) -> Option<Box<dyn Pattern>> {
        prefill::make(&self.params)
    }

    /// Whether tokens of a prompt see everything in `layer` of `layers`.
    pub(super) fn is_prefill_dense_in(&self, layer: usize, layers: usize) -> bool {
        self.params.layers("prefill_dense_layers").contains(layer, layers)
    }

    /// Checks what the shape of a model and the number format of its cache decide.
    ///
    /// # Errors
    /// [`Error::Parameter`] for layers that the model lacks, and for what the method itself cannot serve.
    pub fn check(&self, shape: &MethodShape) -> Result<()> {
        let fail = |reason: String| Error::Parameter { text: self.canonical(), reason };
        for (name, value) in &self.params.0 {
            if let Value::Layers(layers) = value {
                layers.check(shape.layers).map_err(|reason| fail(format!("{name}: {reason}")))?;
            }
        }
        (self.method.check)(&self.params, shape).map_err(fail)
    }

    /// Whether `layer` of `layers` attends to everything.
    pub(super) fn is_dense(&self, layer: usize, layers: usize) -> bool {
        self.method.settings && self.params.layers("dense_layers").contains(layer, layers)
    }

    /// Decode steps that a selection serves.
    pub(super) fn reuse(&self) -> usize {
        if self.method.settings { self.params.int("reuse") } else { 1 }
    }

    /// What a decode step at `context` reads and keeps for a (layer, KV head), on average over the layers.
    pub fn predict(&self, context: usize, shape: &MethodShape) -> Predicted {
        let p = (self.method.predict)(&self.params, context, shape);
        let dense = match self.method.settings {
            true => self.params.layers("dense_layers").count(shape.layers),
            false => 0,
        };
        let average = |sparse: usize, dense_value: usize| {
            let sum = sparse as u128 * (shape.layers - dense) as u128 + dense_value as u128 * dense as u128;
            usize::try_from(sum / shape.layers.max(1) as u128).unwrap_or(usize::MAX)
        };
        Predicted {
            rows: average(p.rows.min(context), context),
            state_bytes: average(p.state_bytes, 0),
            read_bytes: average(p.read_bytes / self.reuse(), 0),
        }
    }
}

/// The `key=value` pairs of `text`: what has no `=` goes on with the pair before it, for lists may be joined by commas.
fn pairs(text: &str) -> Vec<String> {
    let mut pairs: Vec<String> = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        match pairs.last_mut() {
            Some(last) if !part.contains('=') && last.contains('=') => *last = format!("{last},{part}"),
            _ => pairs.push(part.to_owned()),
        }
    }
    pairs
}

fn parse_value(spec: &ParamSpec, value: &str) -> Result<Value, String> {
    let name = spec.name;
    match spec.kind {
        Kind::Int { min, max } => match value.parse::<u64>() {
            Ok(v) if (min..=max).contains(&v) => Ok(Value::Number(v as f64)),
            // A word that leaves it to something else.
            Err(_) if value == spec.default => Ok(Value::Word(spec.default)),
            _ => Err(format!("{name}={value}: expected a whole number from {min} to {max}")),
        },
        Kind::Float { min, max } => match value.parse::<f64>() {
            Ok(v) if (min..=max).contains(&v) => Ok(Value::Number(v)),
            _ => Err(format!("{name}={value}: expected a number from {min} to {max}")),
        },
        Kind::Choice(words) => match words.iter().find(|word| **word == value) {
            Some(word) => Ok(Value::Word(word)),
            None => Err(format!("{name}={value}: expected one of {}", words.join(", "))),
        },
        Kind::Layers => {
            Layers::parse(value).map(Value::Layers).map_err(|reason| format!("{name}={value}: {reason}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_filled_in_and_the_canonical_form_parses_back() {
        let spec = MethodSpec::parse("window:window=64").unwrap();
        assert_eq!(spec.canonical(), "window:sinks=4,window=64");
        assert_eq!(MethodSpec::parse(&spec.canonical()).unwrap().canonical(), spec.canonical());
        assert_eq!(MethodSpec::parse("dense").unwrap().canonical(), "dense");
        for text in ["window:dense_layers=0,1,window=64,reuse=1", "window:window=64,dense_layers=0+1"] {
            let spec = MethodSpec::parse(text).unwrap();
            assert_eq!(spec.canonical(), "window:sinks=4,window=64,dense_layers=0+1");
            assert_eq!(MethodSpec::parse(&spec.canonical()).unwrap().canonical(), spec.canonical());
        }
    }

    /// Names of methods without a pattern are what they were, and what is left to a pattern is not written out.
    #[test]
    fn settings_of_prompts_are_written_where_they_are_given() {
        for (text, canonical) in [
            ("dense:prefill=dense", "dense"),
            ("dense:prefill=dense,prefill_window=auto", "dense"),
            ("window:prefill=dense,window=64", "window:sinks=4,window=64"),
            ("dense:prefill_window=64,prefill=window", "dense:prefill=window,prefill_window=64"),
            (
                "window:prefill=vslash,prefill_dense_layers=0,2,reuse=2",
                "window:sinks=4,window=1024,reuse=2,prefill=vslash,prefill_dense_layers=0+2",
            ),
        ] {
            let spec = MethodSpec::parse(text).unwrap();
            assert_eq!(spec.canonical(), canonical);
            assert_eq!(MethodSpec::parse(&spec.canonical()).unwrap().canonical(), canonical);
        }
        let spec = MethodSpec::parse("window:prefill=window,prefill_sinks=0").unwrap();
        assert_eq!(spec.with_dense_steps().unwrap().canonical(), "dense:prefill=window,prefill_sinks=0");
        assert!(!spec.is_prefill_dense() && MethodSpec::parse("window").unwrap().is_prefill_dense());
    }

    #[test]
    fn layers_that_the_model_lacks_are_refused() {
        let dtype = crate::kv::kv_dtype("bf16").unwrap();
        let shape = MethodShape { layers: 30, kv_heads: 5, head_dim: 128, group: 1, dtype };
        let spec = MethodSpec::parse("window:dense_layers=0+40").unwrap();
        let message = spec.check(&shape).unwrap_err().to_string();
        assert!(message.contains("dense_layers: there is no layer 40: the model has 30"), "{message}");
        assert!(MethodSpec::parse("window:dense_layers=0+29").unwrap().check(&shape).is_ok());
        let spec = MethodSpec::parse("dense:prefill=window,prefill_dense_layers=30").unwrap();
        assert!(
            spec.check(&shape)
                .unwrap_err()
                .to_string()
                .contains("prefill_dense_layers: there is no layer 30")
        );
    }

    #[test]
    fn predictions_average_over_the_layers() {
        let dtype = crate::kv::kv_dtype("bf16").unwrap();
        let shape = MethodShape { layers: 30, kv_heads: 5, head_dim: 128, group: 1, dtype };
        let spec = MethodSpec::parse("window:sinks=4,window=996,dense_layers=first3").unwrap();
        assert_eq!(spec.predict(10_000, &shape).rows, (27 * 1000 + 3 * 10_000) / 30);
    }

    /// Whatever lies beyond a bound, is no number, or is no word of the table, of any parameter of any method.
    #[test]
    fn every_parameter_refuses_what_it_does_not_list() {
        for method in METHODS {
            for param in method.all_params() {
                let (bad, says): (Vec<String>, &str) = match param.kind {
                    Kind::Int { min, max } => {
                        let below = min.checked_sub(1).map_or("-1".into(), |below| below.to_string());
                        let words = ["", " ", "1.5", "1e3", "0x10", "18446744073709551616"].map(String::from);
                        (
                            [below, (max + 1).to_string()].into_iter().chain(words).collect(),
                            "a whole number from",
                        )
                    }
                    Kind::Float { min, max } => {
                        let words = ["", "x", "NaN", "inf", "-inf", "1e400", "0,5"].map(String::from);
                        let beyond = [min - 1e-6, max * (1.0 + 1e-6) + 1e-6].map(|x| x.to_string());
                        (beyond.into_iter().chain(words).collect(), "expected a number from")
                    }
                    Kind::Choice(words) => (vec!["".into(), format!("{}x", words[0])], words[0]),
                    Kind::Layers => (vec!["".into(), "x".into(), "-1".into(), "0..3".into()], "not a layer"),
                };
                for bad in bad {
                    let text = format!("{}:{}={bad}", method.name, param.name);
                    let message = MethodSpec::parse(&text).unwrap_err().to_string();
                    assert!(message.contains(says) && message.contains(param.name), "{text}: {message}");
                }
            }
        }
    }

    #[test]
    fn refusals_say_what_exists() {
        for (text, says) in [
            ("widow", "did you mean `window`?"),
            ("window:size=3", "sinks, window"),
            ("dense:x=1", "its parameters: prefill, prefill_dense_layers"),
            ("dense:prefill=slash", "one of dense, window, ashape, vslash, blocks"),
            ("dense:prefill=window,prefill_window=0", "from 1 to"),
            (
                "dense:prefill_window=64",
                "no effect with prefill=dense: leave it out, or choose prefill=window or",
            ),
            ("window:prefill=blocks,prefill_sinks=4", "prefill_sinks has no effect with prefill=blocks"),
            ("dense:prefill=window,prefill_blocks=4", "leave it out, or choose prefill=blocks"),
            ("dense:prefill_dense_layers=0", "or choose a pattern, e.g. prefill=window"),
            ("dense:prefill=window,dense_layers=0", "has no parameter `dense_layers`"),
            ("window:window=0", "from 1 to"),
            ("window:window=-5", "whole number"),
            ("window:window=1e3", "whole number"),
            ("window:window=5,window=6", "twice"),
            ("window:window", "key=value"),
            ("window:dense_layers=x", "every4"),
            ("window:reuse=0", "from 1 to 1024"),
            ("window:sinks=1,dense_layers=0,1,x", "`x` is not a layer"),
        ] {
            let message = MethodSpec::parse(text).unwrap_err().to_string();
            assert!(message.contains(says), "{text}: {message}");
        }
    }
}
