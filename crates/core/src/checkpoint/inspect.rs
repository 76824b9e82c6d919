//! What a model file holds, whether or not it can be run: the names, types and shapes that its containers list.

use std::path::{Path, PathBuf};

use longbit_sys::FileMap;
use safetensors::tensor::SafeTensors;

use crate::error::{Error, Result};
use crate::gguf::{Array, Header, Value};

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Number format, as the container names it.
    pub kind: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Bytes; none for a type of unknown size.
    pub bytes: Option<u64>,
}

/// What the containers at a path list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// `GGUF 3` or `safetensors`.
    pub container: String,
    /// The files that were read, in order.
    pub files: Vec<PathBuf>,
    /// Keys and values, shortened to a line each.
    pub metadata: Vec<(String, String)>,
    /// Tensors of all files, in the order of the files.
    pub tensors: Vec<TensorEntry>,
}

/// Characters of a value that are shown.
const SHOWN: usize = 60;

/// Lists what is at `path`: a GGUF file, a safetensors file, or a directory of safetensors files.
///
/// # Errors
/// Nothing there is a model file, or a container is damaged.
pub fn list(path: &Path) -> Result<Listing> {
    let unreadable = |source| Error::Read { path: path.to_path_buf(), source };
    if std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        let mut files: Vec<PathBuf> = std::fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(unreadable)?;
        files.retain(|file| file.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
        if files.is_empty() {
            return Err(Error::Container {
                path: path.to_path_buf(),
                reason: "the directory holds no file *.safetensors".into(),
            });
        }
        let mut listing = Listing { container: "safetensors".into(), ..Listing::default() };
        for file in files {
            add_safetensors(&file, &FileMap::open(&file)?, &mut listing)?;
        }
        return Ok(listing);
    }
    let map = FileMap::open(path)?;
    let mut listing = Listing::default();
    if path.extension().is_some_and(|e| e == "safetensors") {
        listing.container = "safetensors".into();
        add_safetensors(path, &map, &mut listing)?;
    } else {
        add_gguf(path, &map, &mut listing)?;
    }
    Ok(listing)
}

fn add_safetensors(path: &Path, map: &FileMap, listing: &mut Listing) -> Result<()> {
    let fail =
        |e: safetensors::SafeTensorError| Error::Container { path: path.into(), reason: e.to_string() };
    let (_, header) = SafeTensors::read_metadata(map).map_err(fail)?;
    let mut pairs: Vec<_> =
        header.metadata().iter().flatten().map(|(k, v)| (k.clone(), shortened(v))).collect();
    pairs.sort();
    listing.metadata.extend(pairs);
    let tensors = SafeTensors::deserialize(map).map_err(fail)?;
    for name in header.offset_keys() {
        let view = tensors.tensor(&name).map_err(fail)?;
        listing.tensors.push(TensorEntry {
            kind: format!("{:?}", view.dtype()).to_lowercase(),
            shape: view.shape().iter().map(|&n| n as u64).collect(),
            bytes: Some(view.data().len() as u64),
            name,
        });
    }
    listing.files.push(path.to_path_buf());
    Ok(())
}

fn add_gguf(path: &Path, map: &FileMap, listing: &mut Listing) -> Result<()> {
    let header = Header::parse(map).map_err(|source| Error::Gguf { path: path.into(), source })?;
    listing.container = format!("GGUF {}", header.version);
    listing.metadata.extend(header.metadata.iter().map(|(key, value)| (key.to_string(), shown(value))));
    listing.tensors.extend(header.tensors.iter().map(|t| TensorEntry {
        name: t.name.clone(),
        kind: t.kind.name().into(),
        shape: t.dims.iter().rev().copied().collect(),
        bytes: t.range.as_ref().map(|r| r.len() as u64),
    }));
    listing.files.push(path.to_path_buf());
    Ok(())
}

/// A value on one line.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => shortened(text),
        Value::Array(Array::Strings(items)) => {
            let first: Vec<String> = items.iter().take(3).map(|s| format!("`{}`", shortened(s))).collect();
            format!("{} strings: {}", items.len(), first.join(", "))
        }
        Value::Array(array) => format!("{} x {}", array.len(), array.type_name()),
        Value::U8(v) => v.to_string(),
        Value::I8(v) => v.to_string(),
        Value::U16(v) => v.to_string(),
        Value::I16(v) => v.to_string(),
        Value::U32(v) => v.to_string(),
        Value::I32(v) => v.to_string(),
        Value::U64(v) => v.to_string(),
        Value::I64(v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
    }
}

/// Text on one line of bounded length, without control characters.
fn shortened(text: &str) -> String {
    let line: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() { format!("{line}… ({} bytes)", text.len()) } else { line }
}
