//! GGUF version 3, the container of the ggml family: a reader and a writer that know bytes, keys and tensors, and no
//! model.
//!
//! Layout (little-endian throughout): `"GGUF"`, `u32` version, `u64` number of tensors, `u64` number of keys; each key
//! with its typed value; each tensor's name, dimensions (innermost first), type and offset; padding to the alignment
//! (`general.alignment`, 32 by default); the tensors' bytes. Source: the specification in ggml's `docs/gguf.md`.
//!
//! A file comes from anywhere, so nothing in it is believed: every length is held against the bytes that are left
//! before memory is asked for, and [`Header::parse`] takes time and memory in proportion to the file, at most
//! [`MAX_KEYS`] keys and [`MAX_TENSORS`] tensors in [`MAX_HEADER_BYTES`]. A string of the file that stands in a message is escaped and cut.
//!
//! ```
//! use longbit::gguf::{Header, Metadata, TensorType, Value, Writer};
//! let mut metadata = Metadata::new();
//! metadata.set("general.architecture", Value::String("bitnet-b1.58".into()));
//! let mut writer = Writer::new(metadata)?;
//! writer.tensor("output_norm.weight", &[2], TensorType::F32)?;
//! let mut file = Vec::new();
//! writer.write(&mut file, |_, out| out.write_all(&[0, 0, 128, 63, 0, 0, 0, 64]))?;
//!
//! let header = Header::parse(&file)?;
//! assert_eq!(header.metadata.str("general.architecture")?, Some("bitnet-b1.58"));
//! let norm = header.tensor("output_norm.weight").unwrap();
//! assert_eq!(file[norm.range.clone().unwrap()][4..], 2f32.to_le_bytes());
//! # Ok::<(), longbit::gguf::GgufError>(())
//! ```

mod cursor;
mod error;
mod header;
mod metadata;
mod tensor_type;
mod value;
mod writer;

pub use error::GgufError;
pub use header::{Header, TensorInfo};
pub use metadata::Metadata;
pub use tensor_type::TensorType;
pub use value::{Array, Value};
pub use writer::Writer;

/// The version that is read and written.
pub const VERSION: u32 = 3;

/// Alignment of a file that names none, in bytes.
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// The key that names another alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// Largest alignment that is believed: 16 MiB.
pub const MAX_ALIGNMENT: u64 = 1 << 24;

/// Most keys in a file. Files of today have less than a hundred.
pub const MAX_KEYS: u64 = 1 << 16;

/// Most tensors in a file. Files of today have a few thousand at most.
pub const MAX_TENSORS: u64 = 1 << 20;

/// Most bytes before the tensors' data: half a GiB. The vocabularies and merges of today take a few MiB.
pub const MAX_HEADER_BYTES: u64 = 1 << 29;

/// Longest key or tensor name, in bytes, as the specification has it for keys.
pub const MAX_NAME_BYTES: u64 = 65_535;

/// Most dimensions of a tensor.
pub const MAX_DIMS: u32 = 4;

/// A string of a file, fit to stand in a message or a table: control characters escaped, cut to 96 characters.
pub fn shown(text: &str) -> String {
    let cut = text.char_indices().nth(96).map_or(text.len(), |(at, _)| at);
    let dots = if cut < text.len() { "..." } else { "" };
    format!("{}{dots}", text[..cut].escape_debug())
}

/// `at`, moved up to the next multiple of `alignment` (a power of two); nothing on overflow.
fn align_up(at: u64, alignment: u64) -> Option<u64> {
    at.checked_next_multiple_of(alignment)
}
