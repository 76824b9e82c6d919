//! Models to files: GGUF for other engines, and packed safetensors in the layout of `microsoft/bitnet-b1.58-2B-4T`.
//!
//! Both writers start from a [`Model`], whatever it was read from, so that every layout that can be loaded can be written
//! as every layout that there is a writer for. Ternary weights and their scales are kept exactly.

mod gguf;
mod safetensors;
mod vocabulary;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::{Encoding, encode_row};
use crate::model::{Head, Model, Table, TernaryLinear};

pub use gguf::{GgufOptions, write_gguf};
pub use safetensors::write_safetensors;
pub use vocabulary::Vocabulary;

/// What a writer did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the files.
    pub bytes: u64,
    /// Tensors.
    pub tensors: usize,
    /// Numbers of the embedding and head that the format asked for cannot hold exactly.
    pub rounded: u64,
}

/// Told of bytes written, and of all that will be.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

fn failed(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |source| Error::Write { path: path.to_path_buf(), source }
}

/// A file written beside its place and renamed into it when it is whole; removed when it is not.
struct Beside {
    place: PathBuf,
    beside: PathBuf,
    done: bool,
}

impl Beside {
    fn new(place: &Path) -> Self {
        let mut name = place.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        Beside { place: place.to_path_buf(), beside: place.with_file_name(name), done: false }
    }

    /// Where it is until it is finished.
    fn path(&self) -> &Path {
        &self.beside
    }

    fn finish(mut self) -> Result<u64> {
        let bytes = std::fs::metadata(&self.beside).map_err(failed(&self.place))?.len();
        std::fs::rename(&self.beside, &self.place).map_err(failed(&self.place))?;
        self.done = true;
        Ok(bytes)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.done {
            // Leave nothing behind that looks like a result.
            let _ = std::fs::remove_file(&self.beside);
        }
    }
}

/// The linear layers of a model in the order of [`crate::ModelConfig::linears`], with the layer's number.
fn linears(model: &Model) -> impl Iterator<Item = (usize, usize, &TernaryLinear)> {
    model.layers.iter().enumerate().flat_map(|(l, layer)| {
        [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down]
            .into_iter()
            .enumerate()
            .map(move |(i, linear)| (l, i, linear))
    })
}

/// The head's own table.
///
/// # Errors
/// The head was quantised at load, so that what the file held is gone.
fn own_head(model: &Model) -> Result<Option<&Table>> {
    match &model.head {
        Head::Tied => Ok(None),
        Head::Own(table) => Ok(Some(table)),
        Head::TwoStage(head) => Ok(head.own.as_ref()),
        Head::Int8 { .. } | Head::Blocks(_) => Err(Error::Invalid(format!(
            "a model with an {} head cannot be written; load it with a bf16 or f32 head",
            model.head_format.as_str()
        ))),
    }
}

/// Why the bytes of a tensor did not come.
enum Stop {
    /// They could not be written.
    Io(io::Error),
    /// The format cannot hold them: a sentence without a place.
    Unfit(String),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Io(error)
    }
}

/// Writes a table in a number format; how many of its numbers the format cannot hold exactly, for the plain formats.
fn write_table(
    model: &Model,
    table: &Table,
    encoding: Encoding,
    out: &mut dyn Write,
) -> std::result::Result<u64, Stop> {
    let mut values = vec![0.0f32; table.cols()];
    let (mut bytes, mut lost) = (Vec::new(), 0);
    for row in 0..table.rows() {
        table.read(model.kernels, row, &mut values);
        bytes.clear();
        encode_row(encoding, &values, &mut bytes).map_err(|error| {
            // The exponents of bf16 are those of f32; only the very largest numbers round to infinity.
            let wider = if encoding == Encoding::Bf16 { "f32" } else { "bf16" };
            Stop::Unfit(format!("cannot be written: row {row}: {error}; choose --head {wider}"))
        })?;
        lost += match encoding {
            Encoding::Bf16 => values.iter().filter(|v| v.to_bits() & 0xFFFF != 0).count() as u64,
            Encoding::F16 => {
                values.iter().filter(|v| half::f16::from_f32(**v).to_f32().to_bits() != v.to_bits()).count()
                    as u64
            }
            _ => 0,
        };
        out.write_all(&bytes)?;
    }
    Ok(lost)
}
