//! Reading little-endian numbers and strings off a slice, with every length checked before it is used.

use std::fmt::{Arguments, Display};

use super::{GgufError, MAX_HEADER_BYTES, MAX_NAME_BYTES};

/// A place in the bytes of a file.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, at: 0 }
    }

    /// Offset in the file.
    pub(super) fn offset(&self) -> u64 {
        self.at as u64
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `n` bytes, which are `what`.
    pub(super) fn take(&mut self, n: u64, what: Arguments<'_>) -> Result<&'a [u8], GgufError> {
        self.holds(n, 1, what)?;
        // It fits a usize, for no more bytes than that are left.
        let bytes = &self.bytes[self.at..][..n as usize];
        self.at += bytes.len();
        Ok(bytes)
    }

    /// Checks that `count` things of at least `each` bytes can be left, before room for them is made.
    pub(super) fn holds(&self, count: u64, each: u64, what: impl Display) -> Result<(), GgufError> {
        let needed = count.saturating_mul(each);
        if needed > self.left() {
            let (offset, what, left) = (self.offset(), what.to_string(), self.left());
            return Err(GgufError::Truncated { offset, what, needed, left });
        }
        if self.offset() + needed > MAX_HEADER_BYTES {
            let (what, found) = (format!("bytes up to the end of {what}"), self.offset() + needed);
            return Err(GgufError::TooMany { offset: self.offset(), what, found, limit: MAX_HEADER_BYTES });
        }
        Ok(())
    }

    /// The next bytes as an array, to make a number of.
    pub(super) fn array<const N: usize>(&mut self, what: Arguments<'_>) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: Arguments<'_>) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: Arguments<'_>) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A string: `u64` length, then that many bytes of UTF-8.
    pub(super) fn str(&mut self, what: Arguments<'_>) -> Result<&'a str, GgufError> {
        let length = self.u64(what)?;
        let offset = self.offset();
        let bytes = self.take(length, what)?;
        str::from_utf8(bytes).map_err(|_| GgufError::Utf8 { offset, what: what.to_string() })
    }

    /// A string that is a key or the name of a tensor.
    pub(super) fn name(&mut self, what: Arguments<'_>) -> Result<&'a str, GgufError> {
        let name = self.str(what)?;
        match name.len() as u64 {
            n if n > MAX_NAME_BYTES => Err(GgufError::NameLength { what: what.to_string(), found: n }),
            _ => Ok(name),
        }
    }
}
