//! Things that an engine lists by name: `window:sinks=4,window=1024` checked against its parameters.

use std::collections::BTreeMap;

use longbit_protocol::{ParamInfo, ParamKind};

use crate::plan::method_string;

/// A method or workload with all its parameters, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Named {
    /// Bare name.
    pub name: String,
    /// Every parameter, as the engine takes it.
    pub params: BTreeMap<String, String>,
}

impl Named {
    /// `name:key=value,key=value`.
    pub fn text(&self) -> String {
        method_string(&self.name, &self.params)
    }
}

/// What is wrong with a name or parameter, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// What.
    pub what: String,
    /// How to mend it.
    pub help: String,
}

/// `did you mean "window"?`, or the list of what there is.
pub fn suggest<S: AsRef<str>>(word: &str, known: &[S]) -> String {
    let near = known
        .iter()
        .map(|k| (strsim::damerau_levenshtein(word, k.as_ref()), k.as_ref()))
        .min()
        .filter(|(distance, k)| *distance <= 1 + word.chars().count().min(k.chars().count()) / 3);
    match near {
        Some((_, name)) => format!("did you mean {name:?}?"),
        None if known.is_empty() => "the engine lists none".to_owned(),
        None => {
            let names: Vec<&str> = known.iter().map(AsRef::as_ref).collect();
            format!("there is: {}", names.join(", "))
        }
    }
}

/// Parses `name` or `name:key=value,…` against the listed names with their parameters. `kind` is the word for
/// messages, e.g. `method`.
///
/// # Errors
/// [`Wrong`] for an unknown name or parameter, a parameter given twice, or a value out of range.
pub fn parse(kind: &str, text: &str, listed: &[(&str, &[ParamInfo])]) -> Result<Named, Wrong> {
    let (name, rest) = match text.split_once(':') {
        Some((name, rest)) => (name.trim(), Some(rest)),
        None => (text.trim(), None),
    };
    let mut given = BTreeMap::new();
    for pair in rest.into_iter().flat_map(pairs) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Wrong {
                what: format!("{pair:?} in {kind} {text:?} is not key=value"),
                help: format!("write e.g. \"{name}:key=value,key=value\""),
            });
        };
        if given.insert(key.trim().to_owned(), value.trim().to_owned()).is_some() {
            let what = format!("parameter {:?} of {kind} {name:?} is given twice", key.trim());
            return Err(Wrong { what, help: String::new() });
        }
    }
    complete(kind, name, given, listed)
}

/// The pairs of `a=1,b=2,3,c=4`: what has no `=` goes on with the pair before it, for lists may be joined by commas.
fn pairs(text: &str) -> Vec<String> {
    let mut pairs: Vec<String> = Vec::new();
    for part in text.split(',') {
        match pairs.last_mut() {
            Some(last) if !part.contains('=') && last.contains('=') => *last = format!("{last},{part}"),
            _ => pairs.push(part.to_owned()),
        }
    }
    pairs
}

/// Checks parameters and fills in the defaults; a setting at its default is left out.
///
/// # Errors
/// As [`parse`].
pub fn complete(
    kind: &str,
    name: &str,
    given: BTreeMap<String, String>,
    listed: &[(&str, &[ParamInfo])],
) -> Result<Named, Wrong> {
    let Some((_, infos)) = listed.iter().find(|(n, _)| *n == name) else {
        let names: Vec<&str> = listed.iter().map(|(n, _)| *n).collect();
        return Err(Wrong { what: format!("unknown {kind} {name:?}"), help: suggest(name, &names) });
    };
    // A default may be a word outside the range (such as `auto`); it is passed on as the engine lists it.
    let mut params: BTreeMap<String, String> = infos
        .iter()
        .filter(|i| !i.setting)
        .map(|i| (i.name.clone(), value(&i.kind, &i.default).unwrap_or_else(|_| i.default.clone())))
        .collect();
    for (key, text) in given {
        let Some(info) = infos.iter().find(|i| i.name == key) else {
            let names: Vec<&str> = infos.iter().map(|i| i.name.as_str()).collect();
            let what = format!("unknown parameter {key:?} of {kind} {name:?}");
            let help =
                if names.is_empty() { format!("{name} takes no parameters") } else { suggest(&key, &names) };
            return Err(Wrong { what, help });
        };
        if text == info.default {
            // Already there, as the engine spells it, or left out.
            continue;
        }
        let text = check(kind, name, info, &text)?;
        if !(info.setting && text == info.default) {
            params.insert(key, text);
        }
    }
    Ok(Named { name: name.to_owned(), params })
}

fn check(kind: &str, name: &str, info: &ParamInfo, text: &str) -> Result<String, Wrong> {
    value(&info.kind, text).map_err(|range| Wrong {
        what: format!("{}={text} of {kind} {name:?} is out of range", info.name),
        help: format!("{}: {range} ({})", info.name, info.summary),
    })
}

/// Whether a list of layers can have this letter.
fn layers(letter: u8) -> bool {
    letter.is_ascii_lowercase() || letter.is_ascii_digit() || b"+,-".contains(&letter)
}

/// The value in its one canonical spelling, or the range that it should be in.
fn value(kind: &ParamKind, text: &str) -> Result<String, String> {
    match kind {
        ParamKind::Int { min, max } => match text.parse::<u64>() {
            Ok(v) if (*min..=*max).contains(&v) => Ok(v.to_string()),
            _ => Err(format!("a whole number from {min} to {max}")),
        },
        ParamKind::Float { min, max } => match text.parse::<f64>() {
            Ok(v) if v >= *min && v <= *max => Ok(v.to_string()),
            _ => Err(format!("a number from {min} to {max}")),
        },
        ParamKind::Choice { of } if of.iter().any(|w| w == text) => Ok(text.to_owned()),
        ParamKind::Choice { of } => Err(format!("one of {}", of.join(", "))),
        // Which rules there are, and which layers, the engine knows.
        ParamKind::Layers if !text.is_empty() && text.bytes().all(layers) => Ok(text.replace(',', "+")),
        ParamKind::Layers => Err("layers joined by `+`, e.g. 0+1, 0-3, odd, every4, first2, last2".into()),
    }
}
