//! Walking a parsed TOML document so that every complaint has file, line and key.

use std::cell::RefCell;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::named::{Wrong, suggest};
use crate::Complaint;

/// The text of a file, and what is wrong with it so far.
pub(super) struct Source<'a> {
    file: String,
    text: &'a str,
    complaints: RefCell<Vec<Complaint>>,
}

/// A place in the file: a key with the bytes it stands at.
#[derive(Clone, Debug)]
pub(super) struct Place {
    key: String,
    span: Range<usize>,
}

/// A value with its place.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

impl<'a> Source<'a> {
    pub(super) fn new(file: String, text: &'a str) -> Self {
        Source { file, text, complaints: RefCell::default() }
    }

    pub(super) fn root(&self) -> Place {
        Place { key: String::new(), span: 0..0 }
    }

    pub(super) fn complain(&self, place: &Place, what: impl Into<String>, help: impl Into<String>) {
        let before = self.text.as_bytes().get(..place.span.start).unwrap_or_default();
        let line = 1 + before.iter().filter(|&&b| b == b'\n').count();
        let key = if place.key.is_empty() { String::new() } else { format!(" ({})", place.key) };
        let complaint =
            Complaint { what: what.into(), at: format!("{}:{line}{key}", self.file), help: help.into() };
        self.complaints.borrow_mut().push(complaint);
    }

    pub(super) fn wrong(&self, place: &Place, wrong: Wrong) {
        self.complain(place, wrong.what, wrong.help);
    }

    /// Keeps the value, or turns the reason into a complaint.
    pub(super) fn check<T>(&self, place: &Place, result: Result<T, String>) -> Option<T> {
        result.map_err(|what| self.complain(place, what, "")).ok()
    }

    pub(super) fn syntax(&self, error: &toml::de::Error) {
        let place = Place { key: String::new(), span: error.span().unwrap_or(0..0) };
        self.complain(&place, format!("not valid TOML: {}", error.message()), "");
    }

    pub(super) fn into_complaints(self) -> Vec<Complaint> {
        self.complaints.into_inner()
    }
}

/// One table; every key that was asked for is known, the others are complaints when it is dropped by [`Section::end`].
pub(super) struct Section<'a> {
    source: &'a Source<'a>,
    pub(super) place: Place,
    table: Option<&'a DeTable<'a>>,
    known: RefCell<Vec<&'static str>>,
}

type Value<'a> = At<&'a DeValue<'a>>;

impl<'a> Section<'a> {
    pub(super) fn root(source: &'a Source<'a>, table: &'a DeTable<'a>) -> Self {
        Section { source, place: source.root(), table: Some(table), known: RefCell::default() }
    }

    /// The value of a key, which from now on counts as known.
    pub(super) fn value(&self, key: &'static str) -> Option<Value<'a>> {
        self.known.borrow_mut().push(key);
        let (k, v) = self.table?.iter().find(|(k, _)| k.get_ref() == key)?;
        Some(At { value: v.get_ref(), place: Place { key: self.path(key), span: k.span() } })
    }

    /// The names of the keys that are there, with their values.
    pub(super) fn entries(&self) -> Vec<(String, Value<'a>)> {
        let entries = self.table.into_iter().flat_map(|t| t.iter());
        entries
            .map(|(k, v)| {
                let place = Place { key: self.path(k.get_ref()), span: k.span() };
                (k.get_ref().to_string(), At { value: v.get_ref(), place })
            })
            .collect()
    }

    /// The place of a key that is missing: the table itself.
    pub(super) fn missing(&self, key: &str) -> Place {
        Place { key: self.path(key), span: self.place.span.clone() }
    }

    /// The place of a key, or of the table where it is missing.
    pub(super) fn place_of(&self, key: &'static str) -> Place {
        self.value(key).map_or_else(|| self.missing(key), |at| at.place)
    }

    fn path(&self, key: &str) -> String {
        if self.place.key.is_empty() { key.to_owned() } else { format!("{}.{key}", self.place.key) }
    }

    /// A table below this one; an absent one is empty.
    pub(super) fn section(&self, key: &'static str) -> Section<'a> {
        let (place, table) = match self.value(key) {
            None => (self.missing(key), None),
            Some(at) => match at.value.as_table() {
                Some(table) => (at.place, Some(table)),
                None => {
                    self.wrong_type::<()>(&at, "a table");
                    (at.place, None)
                }
            },
        };
        Section { source: self.source, place, table, known: RefCell::default() }
    }

    /// An array of tables below this one.
    pub(super) fn sections(&self, key: &'static str) -> Vec<Section<'a>> {
        let Some(at) = self.value(key) else { return Vec::new() };
        let Some(array) = at.value.as_array() else {
            self.wrong_type::<()>(&at, &format!("written [[{key}]]"));
            return Vec::new();
        };
        let mut found = Vec::new();
        for item in array.iter() {
            let place = Place { key: at.place.key.clone(), span: item.span() };
            match item.get_ref().as_table() {
                Some(table) => found.push(Section {
                    source: self.source,
                    place,
                    table: Some(table),
                    known: RefCell::default(),
                }),
                None => {
                    self.wrong_type::<()>(&At { value: item.get_ref(), place }, "a table");
                }
            }
        }
        found
    }

    pub(super) fn is_present(&self) -> bool {
        self.table.is_some()
    }

    /// Whether the key stands in the table (which makes it known).
    pub(super) fn has(&self, key: &'static str) -> bool {
        self.value(key).is_some()
    }

    pub(super) fn str(&self, key: &'static str) -> Option<At<String>> {
        let at = self.value(key)?;
        match at.value.as_str() {
            Some(text) => Some(At { value: text.to_owned(), place: at.place }),
            None => self.wrong_type(&at, "a string"),
        }
    }

    pub(super) fn bool(&self, key: &'static str) -> Option<At<bool>> {
        let at = self.value(key)?;
        match at.value.as_bool() {
            Some(value) => Some(At { value, place: at.place }),
            None => self.wrong_type(&at, "true or false"),
        }
    }

    /// A whole number from `min` to `max`.
    pub(super) fn int(&self, key: &'static str, min: u64, max: u64) -> Option<At<u64>> {
        let at = self.value(key)?;
        match integer(at.value) {
            Some(value) if (min..=max).contains(&value) => Some(At { value, place: at.place }),
            _ => self.wrong_type(&at, &format!("a whole number from {min} to {max}")),
        }
    }

    /// A number, written as such.
    pub(super) fn float(&self, key: &'static str) -> Option<At<f64>> {
        let at = self.value(key)?;
        match scalar(at.value).and_then(|t| t.parse::<f64>().ok()).filter(|v| v.is_finite()) {
            Some(value) if at.value.as_str().is_none() => Some(At { value, place: at.place }),
            _ => self.wrong_type(&at, "a number"),
        }
    }

    /// A quantity with a unit, by a parser of [`super::units`].
    pub(super) fn quantity<T>(&self, key: &'static str, parse: fn(&str) -> Result<T, String>) -> Option<T> {
        let at = self.value(key)?;
        match scalar(at.value) {
            Some(text) => self.source.check(&at.place, parse(&text)),
            None => self.wrong_type(&at, "a string with a unit"),
        }
    }

    /// The items of a list; a single value counts as a list of one.
    pub(super) fn items(&self, key: &'static str) -> Option<Vec<Value<'a>>> {
        self.value(key).map(items)
    }

    /// A list of strings.
    pub(super) fn strs(&self, key: &'static str) -> Option<Vec<At<String>>> {
        let items = self.items(key)?;
        let text = |at: Value<'a>| match at.value.as_str() {
            Some(text) => Some(At { value: text.to_owned(), place: at.place }),
            None => self.wrong_type(&at, "a string"),
        };
        Some(items.into_iter().filter_map(text).collect())
    }

    /// Complains that a value has the wrong type.
    pub(super) fn wrong_type<T>(&self, at: &Value<'_>, wanted: &str) -> Option<T> {
        let key = at.place.key.rsplit('.').next().unwrap_or_default();
        let got = scalar(at.value).map_or_else(|| at.value.type_str().to_owned(), |t| format!("{t:?}"));
        let got = if at.value.as_str().is_none() { got.trim_matches('"').to_owned() } else { got };
        self.source.complain(&at.place, format!("{key} must be {wanted}, not {got}"), "");
        None
    }

    /// Complains about every key that nobody asked for.
    pub(super) fn end(&self) {
        let known = self.known.borrow();
        for (key, at) in self.entries() {
            if !known.contains(&key.as_str()) {
                self.source.complain(&at.place, format!("unknown key {key:?}"), suggest(&key, &known));
            }
        }
    }
}

/// The items of an array, each with its own place; a single value is an array of one.
pub(super) fn items<'a>(at: Value<'a>) -> Vec<Value<'a>> {
    match at.value.as_array() {
        Some(array) => array
            .iter()
            .map(|i: &Spanned<DeValue<'a>>| At {
                value: i.get_ref(),
                place: Place { key: at.place.key.clone(), span: i.span() },
            })
            .collect(),
        None => vec![at],
    }
}

/// A whole number that is not negative.
pub(super) fn integer(value: &DeValue<'_>) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(&integer.as_str().replace('_', ""), integer.radix()).ok()
}

/// The text of a string or number.
pub(super) fn scalar(value: &DeValue<'_>) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    if let Some(value) = integer(value) {
        return Some(value.to_string());
    }
    if let Some(value) = value.as_integer() {
        return Some(value.as_str().to_owned());
    }
    value.as_float().map(|f| f.as_str().replace('_', ""))
}
