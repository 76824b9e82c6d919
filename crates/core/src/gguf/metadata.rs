//! The keys of a file with their values, in the order of the file.

use std::collections::HashMap;

use super::value::{Array, Value};
use super::{GgufError, shown};

/// Keys with their values, in order; a key is there once. The typed getters give nothing for a key that is not there,
/// and an error that names key, found and expected type for a value that does not fit.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

/// Equal keys and values in equal order.
impl PartialEq for Metadata {
    fn eq(&self, other: &Metadata) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// No keys.
    pub fn new() -> Metadata {
        Metadata::default()
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|at| &self.entries[*at].1)
    }

    /// Gives `key` a value: in its place where the key is there already, otherwise at the end.
    pub fn set(&mut self, key: impl Into<String>, value: Value) {
        let key = key.into();
        match self.index.get(&key) {
            Some(at) => self.entries[*at].1 = value,
            None => {
                self.index.insert(key.clone(), self.entries.len());
                self.entries.push((key, value));
            }
        }
    }

    /// A string.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for a value of another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A number that is not negative, of any integer type.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for a value of another type or a negative one.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "an integer that is not negative", |value| match *value {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        })
    }

    /// A floating-point number; one of type f64 is rounded to f32.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for a value of another type.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a floating-point number", |value| match *value {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        })
    }

    /// A boolean.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for a value of another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", |value| match *value {
            Value::Bool(v) => Some(v),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for a value of another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::Strings(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any type, each of which fits i64.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for a value of another type or an element above the greatest i64.
    pub fn i64s(&self, key: &str) -> Result<Option<Vec<i64>>, GgufError> {
        fn wide<T: Copy + Into<i64>>(values: &[T]) -> Option<Vec<i64>> {
            Some(values.iter().map(|v| (*v).into()).collect())
        }
        self.typed(key, "an array of integers below 2^63", |value| match value {
            Value::Array(Array::U8(v)) => wide(v),
            Value::Array(Array::I8(v)) => wide(v),
            Value::Array(Array::U16(v)) => wide(v),
            Value::Array(Array::I16(v)) => wide(v),
            Value::Array(Array::U32(v)) => wide(v),
            Value::Array(Array::I32(v)) => wide(v),
            Value::Array(Array::I64(v)) => Some(v.clone()),
            Value::Array(Array::U64(v)) => v.iter().map(|v| i64::try_from(*v).ok()).collect(),
            _ => None,
        })
    }

    /// An array of floating-point numbers; those of type f64 are rounded to f32.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for a value of another type.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.typed(key, "an array of floating-point numbers", |value| match value {
            Value::Array(Array::F32(v)) => Some(v.clone()),
            Value::Array(Array::F64(v)) => Some(v.iter().map(|v| *v as f32).collect()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        take: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match take(value) {
            Some(taken) => Ok(Some(taken)),
            None => Err(GgufError::WrongType { key: shown(key), found: describe(value), expected }),
        }
    }
}

/// Keys in their order; of a key that is given twice, the last value counts.
impl<K: Into<String>> FromIterator<(K, Value)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (K, Value)>>(entries: I) -> Metadata {
        let mut metadata = Metadata::new();
        entries.into_iter().for_each(|(key, value)| metadata.set(key, value));
        metadata
    }
}

/// A value in a message: its type, and the value itself or the number of elements.
fn describe(value: &Value) -> String {
    match value {
        Value::Array(v) => format!("an {} with {} elements", v.type_name(), v.len()),
        scalar => format!("the {} {scalar}", scalar.type_name()),
    }
}
