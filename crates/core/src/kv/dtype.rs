//! Which format keys and values have: parsing of `int8`, `k=int8,v=int4`, `q4_0+rotate+centre`.

use std::fmt;

use super::side::{EXACT, exact_row_bytes};
use super::{Codec, KV_FORMATS, KeyCodec, PAGE_TOKENS, ValueCodec};
use crate::error::{Error, Result};

/// First tokens, which hold attention sinks, whose rows are unlike any other: they are a run of their own, and a centred side
/// keeps them exactly; the mean of its first page comes from them.
pub(super) const FIRST: usize = 32;

/// A number format for cached rows, as [`KV_FORMATS`] lists it.
pub struct KvFormat {
    /// Name, as in experiment files.
    pub name: &'static str,
    /// One line: the layout and its error bound.
    pub summary: &'static str,
    /// How keys are stored.
    pub keys: &'static dyn KeyCodec,
    /// How values are stored.
    pub values: &'static dyn ValueCodec,
    /// Rows are rotated unless the text says otherwise.
    pub rotate: bool,
    /// Rows are centred unless the text says otherwise.
    pub centre: bool,
}

/// How one side of a cache, keys or values, is stored.
#[derive(Clone, Copy)]
pub struct SideDtype {
    format: &'static KvFormat,
    codec: &'static dyn Codec,
    rotate: bool,
    centre: bool,
}

impl PartialEq for SideDtype {
    fn eq(&self, other: &Self) -> bool {
        (self.format.name, self.rotate, self.centre) == (other.format.name, other.rotate, other.centre)
    }
}

impl SideDtype {
    /// One side of `format`, which no table need list.
    #[cfg(test)]
    pub(super) fn of(format: &'static KvFormat, keys: bool, rotate: bool, centre: bool) -> Self {
        let codec: &dyn Codec = if keys { format.keys } else { format.values };
        SideDtype { format, codec, rotate, centre }
    }

    /// The codec.
    pub fn codec(&self) -> &'static dyn Codec {
        self.codec
    }

    /// The codec of the format's keys: of this side, if it is that of the keys.
    pub fn key_codec(&self) -> &'static dyn KeyCodec {
        self.format.keys
    }

    /// The codec of the format's values: of this side, if it is that of the values.
    pub fn value_codec(&self) -> &'static dyn ValueCodec {
        self.format.values
    }

    /// The largest magnitude that a number of a row may have.
    pub fn largest(&self, head_dim: usize) -> f32 {
        let exact = self.exact_first() + self.exact_recent() > 0;
        let stored = self.codec.largest().min(if exact { EXACT.largest() } else { f32::MAX });
        // Rotation adds all numbers of a row up, and a mean is taken off: sums of up to `sqrt(head_dim)` and twice that.
        let rotated = if self.rotate { stored / (head_dim as f32).sqrt() } else { stored };
        if self.centre { rotated / 2.0 } else { rotated }
    }

    /// Whether rows are rotated.
    pub fn rotate(&self) -> bool {
        self.rotate
    }

    /// Whether a mean is taken off.
    pub fn centre(&self) -> bool {
        self.centre
    }

    /// First tokens that are kept exactly.
    pub fn exact_first(&self) -> usize {
        if self.centre { FIRST } else { 0 }
    }

    /// Newest tokens that there is room to keep exactly: what is not settled, and as many as a page more, so that a
    /// rewind by that many finds them again.
    pub fn exact_recent(&self) -> usize {
        match self.codec.unsettled() {
            0 => 0,
            n => n.next_multiple_of(self.codec.group().max(64)) + PAGE_TOKENS,
        }
    }

    /// Why a row cannot be moved away from its neighbours, as eviction does, or nothing.
    pub fn rows_move(&self) -> Result<(), String> {
        let refers = if self.centre {
            "are stored less the mean of their page"
        } else if self.codec.group() > 1 || self.codec.unsettled() > 0 {
            "share their scales with the tokens around them"
        } else {
            return Ok(());
        };
        Err(format!(
            "rows of `{self}` {refers}, so single ones cannot be evicted: use bf16, q8_0 or int8+plain"
        ))
    }

    /// Bytes of a page.
    pub fn page_bytes(&self, head_dim: usize) -> usize {
        self.codec.page_bytes(head_dim) + if self.centre { 2 * head_dim } else { 0 }
    }

    /// Bytes of the rows kept exactly.
    pub fn exact_bytes(&self, head_dim: usize) -> usize {
        (self.exact_first() + self.exact_recent()) * exact_row_bytes(head_dim)
    }

    /// Bytes that reading all of `tokens` cached tokens touches.
    pub fn read_bytes(&self, head_dim: usize, tokens: usize) -> u64 {
        let settled = self.codec.settled(tokens);
        let exact = settled.min(self.exact_first()) + tokens - settled;
        let pages = (tokens - exact) as u64 * self.page_bytes(head_dim) as u64;
        pages.div_ceil(PAGE_TOKENS as u64) + (exact * exact_row_bytes(head_dim)) as u64
    }

    fn parse(text: &str, keys: bool) -> Result<Self> {
        let mut words = text.split('+').map(str::trim);
        let name = words.next().unwrap_or_default();
        let format = KV_FORMATS
            .iter()
            .find(|f| f.name == name)
            .ok_or_else(|| Error::unknown("KV dtype", name, KV_FORMATS.iter().map(|f| f.name)))?;
        let codec: &dyn Codec = if keys { format.keys } else { format.values };
        let mut side = SideDtype { format, codec, rotate: format.rotate, centre: format.centre };
        for word in words {
            match word {
                "rotate" => side.rotate = true,
                "centre" => side.centre = true,
                "plain" => (side.rotate, side.centre) = (false, false),
                _ => {
                    return Err(Error::Parameter {
                        text: text.into(),
                        reason: format!(
                            "`+{word}` is not an option of a KV dtype; there are +rotate, +centre and +plain"
                        ),
                    });
                }
            }
        }
        Ok(side)
    }
}

impl fmt::Display for SideDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.format.name)?;
        if (self.format.rotate, self.format.centre) == (self.rotate, self.centre) {
            return Ok(());
        }
        // What a format does by itself can only be undone as a whole.
        let undone = self.format.rotate && !self.rotate || self.format.centre && !self.centre;
        let base = if undone { (false, false) } else { (self.format.rotate, self.format.centre) };
        f.write_str(if undone { "+plain" } else { "" })?;
        f.write_str(if self.rotate && !base.0 { "+rotate" } else { "" })?;
        f.write_str(if self.centre && !base.1 { "+centre" } else { "" })
    }
}

/// How the keys and the values of a cache are stored.
#[derive(Clone, Copy, PartialEq)]
pub struct KvDtype {
    /// The keys.
    pub keys: SideDtype,
    /// The values.
    pub values: SideDtype,
}

impl KvDtype {
    /// Why rows of `head_dim` numbers cannot be stored so.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the reason and what would do.
    pub fn check(&self, head_dim: usize) -> Result<()> {
        for side in [&self.keys, &self.values] {
            if let Some(reason) = side.codec.refuses(head_dim) {
                return Err(Error::Invalid(format!("KV dtype `{side}`: {reason}")));
            }
            if side.rotate && !head_dim.is_power_of_two() {
                return Err(Error::Invalid(format!(
                    "KV dtype `{side}` rotates rows, which needs a head dimension that is a power of two; this model has \
                     {head_dim}: use `{}+plain`, or a format that does not rotate",
                    side.format.name
                )));
            }
        }
        Ok(())
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (keys, values) = (self.keys.to_string(), self.values.to_string());
        if keys == values { f.write_str(&keys) } else { write!(f, "k={keys},v={values}") }
    }
}

impl fmt::Debug for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KvDtype({self})")
    }
}

/// The KV dtype that `text` names: a format for both sides (`int8`) or one for each (`k=int8,v=int4`), each with
/// options: `+rotate` and `+centre` (see the module), and `+plain` for neither where a format does either by itself.
///
/// # Errors
/// [`Error::Unknown`] with the names that exist, or [`Error::Parameter`].
pub fn kv_dtype(text: &str) -> Result<KvDtype> {
    if !text.contains('=') {
        return Ok(KvDtype { keys: SideDtype::parse(text, true)?, values: SideDtype::parse(text, false)? });
    }
    let (mut keys, mut values) = (None, None);
    let wrong = || Error::Parameter {
        text: text.into(),
        reason: "keys and values are given once each, as in `k=int8,v=int4`".into(),
    };
    for part in text.split(',') {
        match part.split_once('=').map(|(side, name)| (side.trim(), name)) {
            Some(("k", name)) if keys.is_none() => keys = Some(SideDtype::parse(name, true)?),
            Some(("v", name)) if values.is_none() => values = Some(SideDtype::parse(name, false)?),
            _ => return Err(wrong()),
        }
    }
    match (keys, values) {
        (Some(keys), Some(values)) => Ok(KvDtype { keys, values }),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_parse_and_print_back() {
        for (text, printed) in [
            ("bf16", "bf16"),
            ("k=f32,v=bf16", "k=f32,v=bf16"),
            ("v=bf16, k=f32", "k=f32,v=bf16"),
            ("k=bf16,v=bf16", "bf16"),
            ("bf16+centre+rotate", "bf16+rotate+centre"),
            ("bf16+rotate+plain", "bf16"),
            ("k=bf16+rotate,v=f32+centre", "k=bf16+rotate,v=f32+centre"),
            ("int4+rotate", "int4"),
            ("int4+plain", "int4+plain"),
            ("int8+rotate+centre", "int8"),
            ("k=int8+plain,v=int8", "k=int8+plain,v=int8"),
            ("k=int4+plain+centre,v=int4", "k=int4+plain+centre,v=int4"),
            ("lm4+centre", "lm4+centre"),
        ] {
            let dtype = kv_dtype(text).unwrap();
            assert_eq!(dtype.to_string(), printed, "{text}");
            assert_eq!(kv_dtype(printed).unwrap(), dtype);
        }
    }

    #[test]
    fn what_is_no_dtype_says_why() {
        for (text, says) in [
            ("bf61", "there is no KV dtype `bf61`: did you mean `bf16`? known: f32, f16, bf16"),
            ("", "there is no KV dtype ``"),
            ("bf16+spin", "`+spin` is not an option"),
            ("k=bf16", "given once each"),
            ("k=bf16,k=f32", "given once each"),
            ("k=bf16,v=f32,v=f32", "given once each"),
            ("bf16,v=f32", "given once each"),
            ("k=bf16,v=f23", "there is no KV dtype `f23`"),
        ] {
            let error = kv_dtype(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn rotation_needs_a_power_of_two() {
        assert!(kv_dtype("bf16+rotate").unwrap().check(64).is_ok());
        let error = kv_dtype("bf16+rotate").unwrap().check(96).unwrap_err().to_string();
        assert!(
            error.contains("power of two") && error.contains("96") && error.contains("bf16+plain"),
            "{error}"
        );
        assert!(kv_dtype("bf16+centre").unwrap().check(96).is_ok());
    }
}
