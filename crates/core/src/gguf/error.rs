//! What can be wrong with a GGUF file or with what is to be written.

use super::{DEFAULT_ALIGNMENT, MAX_ALIGNMENT, MAX_DIMS, MAX_NAME_BYTES, VERSION};

/// Why a GGUF file cannot be read or written: where, what was found and what was expected. Offsets are bytes from the
/// start of the file; names that come from the file are escaped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The first four bytes are something else.
    #[error("not a GGUF file: it begins with the bytes {found:02x?} instead of \"GGUF\"")]
    NotGguf {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A file for big-endian machines.
    #[error(
        "a big-endian GGUF file (version {version}, bytes swapped); only little-endian files are read: convert it \
         with `gguf-convert-endian FILE little` of the gguf Python package"
    )]
    BigEndian {
        /// The version, the right way round.
        version: u32,
    },
    /// A version other than 3.
    #[error(
        "GGUF version {found}; only version {VERSION} is read: convert the model anew with a current converter{}",
        if *.found > VERSION { ", or update this program" } else { "" }
    )]
    Version {
        /// The version of the file.
        found: u32,
    },
    /// The file ends too early.
    #[error(
        "the file ends inside {what}: {needed} bytes are needed at offset {offset} and {left} are there; it is cut \
         short (fetch it again) or damaged"
    )]
    Truncated {
        /// Where the bytes were to be.
        offset: u64,
        /// What they were to be.
        what: String,
        /// Bytes needed; for a count, at least.
        needed: u64,
        /// Bytes left in the file.
        left: u64,
    },
    /// A count beyond a documented cap.
    #[error("{found} {what} at offset {offset}; at most {limit} are read: the file is damaged")]
    TooMany {
        /// Where the count stands.
        offset: u64,
        /// What is counted.
        what: String,
        /// The count.
        found: u64,
        /// The cap.
        limit: u64,
    },
    /// More than a reader takes, to be written.
    #[error("{found} {what}; at most {limit} can be written")]
    Limit {
        /// What is counted.
        what: String,
        /// The count.
        found: u64,
        /// The cap.
        limit: u64,
    },
    /// Bytes that are no UTF-8.
    #[error("{what} at offset {offset} is not valid UTF-8: the file is damaged")]
    Utf8 {
        /// Where the string begins.
        offset: u64,
        /// Which string.
        what: String,
    },
    /// An unknown type of value.
    #[error(
        "key `{key}` has a value of type {id} at offset {offset}; known are 0 to 12: the file is damaged"
    )]
    ValueType {
        /// Where the type stands.
        offset: u64,
        /// The key.
        key: String,
        /// The type.
        id: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("key `{key}` has the boolean {found} at offset {offset}; only 0 and 1 are booleans")]
    Bool {
        /// Where it stands.
        offset: u64,
        /// The key.
        key: String,
        /// The byte.
        found: u8,
    },
    /// An array of arrays.
    #[error("key `{key}` holds an array of arrays at offset {offset}; no model needs one and none is read")]
    NestedArray {
        /// Where the inner type stands.
        offset: u64,
        /// The key.
        key: String,
    },
    /// A key that is there twice.
    #[error("key `{key}` is given twice, the second time at offset {offset}")]
    DuplicateKey {
        /// Where it is given again.
        offset: u64,
        /// The key.
        key: String,
    },
    /// A tensor that is there twice.
    #[error("tensor `{name}` is given twice")]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// A name that is too long.
    #[error("{what} has {found} bytes; at most {MAX_NAME_BYTES} are allowed")]
    NameLength {
        /// Whose name.
        what: String,
        /// Its length.
        found: u64,
    },
    /// An alignment that cannot be.
    #[error(
        "alignment {found}; it must be a power of two from 1 to {MAX_ALIGNMENT}, and is {DEFAULT_ALIGNMENT} where \
         `general.alignment` is not given"
    )]
    Alignment {
        /// What the file says.
        found: u64,
    },
    /// A value of another type than asked for.
    #[error("key `{key}` is {found}; {expected} was expected")]
    WrongType {
        /// The key.
        key: String,
        /// What it is, with the value where it is short.
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// Number of dimensions outside 1 to 4.
    #[error("tensor `{name}` has {found} dimensions; 1 to {MAX_DIMS} are allowed")]
    DimCount {
        /// The tensor.
        name: String,
        /// Its number of dimensions.
        found: u64,
    },
    /// Dimensions that make no tensor.
    #[error(
        "tensor `{name}` has dimensions {dims:?}; each must be at least 1 and their product at most 2^58"
    )]
    Dims {
        /// The tensor.
        name: String,
        /// Its dimensions, innermost first.
        dims: Vec<u64>,
    },
    /// Dimensions that do not fit the blocks of the type.
    #[error("tensor `{name}` has dimensions {dims:?} (innermost first), which {kind} cannot store: {rule}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its dimensions, innermost first.
        dims: Vec<u64>,
        /// Name of its type.
        kind: String,
        /// What the type asks for.
        rule: String,
    },
    /// A tensor whose bytes begin off the alignment.
    #[error(
        "tensor `{name}` begins {offset} bytes into the data, which is no multiple of the alignment {alignment}"
    )]
    Misaligned {
        /// The tensor.
        name: String,
        /// Its offset in the data.
        offset: u64,
        /// The alignment.
        alignment: u64,
    },
    /// A tensor that reaches beyond the file.
    #[error(
        "tensor `{name}` takes {needed} bytes at offset {offset} and the file has {file} bytes; it is cut short (fetch \
         it again) or damaged"
    )]
    BeyondEnd {
        /// The tensor.
        name: String,
        /// Where it begins in the file.
        offset: u64,
        /// Its size; 1 where the size of the type is unknown.
        needed: u64,
        /// Size of the file.
        file: u64,
    },
    /// Two tensors that share bytes.
    #[error("tensors `{first}` and `{second}` overlap at offset {offset}")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The other.
        second: String,
        /// Where the other begins in the file.
        offset: u64,
    },
    /// A tensor whose type has no known size, to be written.
    #[error("tensor `{name}` has the type {kind}, whose size is not known; it cannot be written")]
    UnknownSize {
        /// The tensor.
        name: String,
        /// Name of its type.
        kind: String,
    },
    /// A tensor was written with more or fewer bytes than it has.
    #[error("tensor `{name}` has {expected} bytes and {written} were written")]
    Written {
        /// The tensor.
        name: String,
        /// Bytes that it has.
        expected: u64,
        /// Bytes that were written or offered.
        written: u64,
    },
    /// The file could not be written.
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}
