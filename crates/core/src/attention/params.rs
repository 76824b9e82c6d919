//! Parameters as text: `window:sinks=4,window=1024`. Parsed, checked and completed with defaults in this one place.

use super::{METHODS, Method};
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
    /// Default.
    pub default: f64,
}

/// Values of all parameters of a method, in the order of its table.
#[derive(Clone, Debug, PartialEq)]
pub struct Params(Vec<(&'static str, f64)>);

impl Params {
    /// The whole number called `name`.
    ///
    /// # Panics
    /// When the method's own table does not list it: a slip of its author.
    pub fn int(&self, name: &str) -> usize {
        self.float(name) as usize
    }

    /// The number called `name`.
    ///
    /// # Panics
    /// When the method's own table does not list it: a slip of its author.
    pub fn float(&self, name: &str) -> f64 {
        match self.0.iter().find(|(n, _)| *n == name) {
            Some((_, value)) => *value,
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

impl std::fmt::Debug for MethodSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.canonical())
    }
}

impl MethodSpec {
    /// Parses `name` or `name:key=value,…`.
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
        let mut values: Vec<Option<f64>> = vec![None; method.params.len()];
        for pair in rest.split(',').filter(|p| !p.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(fail(format!("`{pair}` is not of the form key=value")));
            };
            let Some(i) = method.params.iter().position(|p| p.name == key) else {
                let known: Vec<_> = method.params.iter().map(|p| p.name).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                return Err(fail(format!("`{name}` has no parameter `{key}`; its parameters: {known}")));
            };
            if values[i].replace(parse_value(&method.params[i], value).map_err(fail)?).is_some() {
                return Err(fail(format!("`{key}` is given twice")));
            }
        }
        let params =
            method.params.iter().zip(values).map(|(p, v)| (p.name, v.unwrap_or(p.default))).collect();
        Ok(MethodSpec { method, params: Params(params) })
    }

    /// The table's entry.
    pub fn method(&self) -> &'static Method {
        self.method
    }

    /// The values.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The string with every parameter written out, which parses to the same.
    pub fn canonical(&self) -> String {
        let pairs: Vec<_> = self.params.0.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if pairs.is_empty() {
            self.method.name.into()
        } else {
            format!("{}:{}", self.method.name, pairs.join(","))
        }
    }
}

fn parse_value(spec: &ParamSpec, value: &str) -> Result<f64, String> {
    let name = spec.name;
    match spec.kind {
        Kind::Int { min, max } => match value.parse::<u64>() {
            Ok(v) if (min..=max).contains(&v) => Ok(v as f64),
            _ => Err(format!("{name}={value}: expected a whole number from {min} to {max}")),
        },
        Kind::Float { min, max } => match value.parse::<f64>() {
            Ok(v) if (min..=max).contains(&v) => Ok(v),
            _ => Err(format!("{name}={value}: expected a number from {min} to {max}")),
        },
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
    }

    #[test]
    fn refusals_say_what_exists() {
        for (text, says) in [
            ("widow", "did you mean `window`? known: dense, dense-skip, window"),
            ("window:size=3", "sinks, window"),
            ("dense:x=1", "its parameters: none"),
            ("window:window=0", "from 1 to"),
            ("window:window=-5", "whole number"),
            ("window:window=1e3", "whole number"),
            ("window:window=5,window=6", "twice"),
            ("window:window", "key=value"),
        ] {
            let message = MethodSpec::parse(text).unwrap_err().to_string();
            assert!(message.contains(says), "{text}: {message}");
        }
    }
}
