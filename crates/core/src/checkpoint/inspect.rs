//! What a model file holds, whether or not it can be run: the names, types and shapes that its containers list.

use std::borrow::Borrow;
use std::path::{Path, PathBuf};

use longbit_sys::FileMap;
use safetensors::tensor::SafeTensors;
use sha2::{Digest, Sha256};

use super::hf;
use crate::error::{Error, Result};
use crate::gguf::{Header, Metadata, Value};

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name, as the file has it; [`crate::gguf::shown`] makes it fit for a terminal.
    pub name: String,
    /// Number format, as the container names it.
    pub kind: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Bytes; none for a type of unknown size.
    pub bytes: Option<u64>,
}

/// What the containers at a path list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listing {
    /// `GGUF 3` or `safetensors`.
    pub container: String,
    /// The directory that holds the files; none where the path is itself a file.
    pub directory: Option<PathBuf>,
    /// The files that were read, in order: of a directory those that are loaded.
    pub files: Vec<PathBuf>,
    /// Keys and values, as the file has them. Of a key in several safetensors files, the last value counts.
    pub metadata: Metadata,
    /// Tensors of all files, in the order of the files.
    pub tensors: Vec<TensorEntry>,
}

impl Listing {
    /// SHA-256 of what is listed, the same as [`Checkpoint::sha256`](super::Checkpoint::sha256) of what can be run. Of a
    /// directory without config.json it is that of the lines for the weight files.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn sha256(&self) -> Result<String> {
        sha256(self.directory.as_deref(), self.files.iter().map(|file| Ok(FileMap::open(file)?)))
    }
}

/// SHA-256 that identifies weight files: of a single file its own; of those of a directory that of the lines which
/// `sha256sum` prints for its config.json, if it has one, and for `files`.
pub(super) fn sha256<M: Borrow<FileMap>>(
    dir: Option<&Path>,
    mut files: impl Iterator<Item = Result<M>>,
) -> Result<String> {
    let digest = |file: &FileMap| crate::hex(&Sha256::digest(&file[..]));
    let Some(dir) = dir else {
        return files.next().map_or(Ok(String::new()), |file| Ok(digest(file?.borrow())));
    };
    let config = dir.join("config.json");
    let mut lines = match std::fs::metadata(&config) {
        // An empty file cannot be mapped, and has a hash all the same.
        Ok(found) if found.is_file() && found.len() == 0 => {
            format!("{}  config.json\n", crate::hex(&Sha256::digest([])))
        }
        Ok(found) if found.is_file() => format!("{}  config.json\n", digest(&FileMap::open(&config)?)),
        _ => String::new(),
    };
    for file in files {
        let file = file?;
        let file: &FileMap = file.borrow();
        let name = file.path().file_name().unwrap_or_default().to_string_lossy();
        lines.push_str(&format!("{}  {name}\n", digest(file)));
    }
    Ok(crate::hex(&Sha256::digest(lines)))
}

/// Lists what is at `path`: a GGUF file, a safetensors file, or a directory of safetensors files. Of a directory these are
/// the files that are loaded, or all of them where that cannot be told.
///
/// # Errors
/// Nothing there is a model file, or a container is damaged.
pub fn list(path: &Path) -> Result<Listing> {
    let unreadable = |source| Error::Read { path: path.to_path_buf(), source };
    if std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        let mut files = hf::weight_files(path).unwrap_or_default();
        if files.is_empty() {
            files = std::fs::read_dir(path)
                .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
                .map_err(unreadable)?;
            files.retain(|file| is_safetensors(file));
            files.sort();
        }
        if files.is_empty() {
            let reason = "the directory holds no file *.safetensors".into();
            return Err(Error::Config { path: path.to_path_buf(), reason });
        }
        let directory = Some(path.to_path_buf());
        let mut listing = Listing { container: "safetensors".into(), directory, ..Listing::default() };
        for file in files {
            add_safetensors(&file, &FileMap::open(&file)?, &mut listing)?;
        }
        return Ok(listing);
    }
    let map = FileMap::open(path)?;
    let mut listing = Listing::default();
    if is_safetensors(path) {
        listing.container = "safetensors".into();
        add_safetensors(path, &map, &mut listing)?;
    } else {
        add_gguf(path, &map, &mut listing)?;
    }
    Ok(listing)
}

fn is_safetensors(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
}

fn add_safetensors(path: &Path, map: &FileMap, listing: &mut Listing) -> Result<()> {
    let fail =
        |e: safetensors::SafeTensorError| Error::Container { path: path.into(), reason: e.to_string() };
    // Checks that the tensors fill the rest of the file without gaps, each with the bytes of its shape.
    let (_, header) = SafeTensors::read_metadata(map).map_err(fail)?;
    let mut pairs: Vec<_> = header.metadata().iter().flatten().collect();
    pairs.sort();
    for (key, value) in pairs {
        listing.metadata.set(key, Value::String(value.clone()));
    }
    listing.tensors.extend(header.offset_keys().into_iter().filter_map(|name| {
        let info = header.info(&name)?;
        Some(TensorEntry {
            kind: format!("{:?}", info.dtype).to_lowercase(),
            shape: info.shape.iter().map(|&n| n as u64).collect(),
            bytes: Some((info.data_offsets.1 - info.data_offsets.0) as u64),
            name,
        })
    }));
    listing.files.push(path.to_path_buf());
    Ok(())
}

fn add_gguf(path: &Path, map: &FileMap, listing: &mut Listing) -> Result<()> {
    let header = Header::parse(map).map_err(|source| Error::Gguf { path: path.into(), source })?;
    listing.container = format!("GGUF {}", header.version);
    listing.tensors.extend(header.tensors.into_iter().map(|t| TensorEntry {
        kind: t.kind.name().into(),
        shape: t.dims.iter().rev().copied().collect(),
        bytes: t.range.as_ref().map(|r| r.len() as u64),
        name: t.name,
    }));
    listing.metadata = header.metadata;
    listing.files.push(path.to_path_buf());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, OpenOptions};

    #[test]
    fn a_listing_has_the_hash_of_the_checkpoint_and_of_no_other_file() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf_bitnet/offline");
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(source.join(name), at(name)).unwrap();
        }
        let hash = || list(dir.path()).unwrap().sha256().unwrap();
        let runs = Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap().sha256().unwrap();
        assert_eq!(hash(), runs);
        // Weights that are not loaded are neither listed nor hashed.
        std::fs::copy(at("model.safetensors"), at("another.safetensors")).unwrap();
        assert_eq!(list(dir.path()).unwrap().files, [at("model.safetensors")]);
        assert_eq!(hash(), runs);
        // What cannot be run has a hash by the same rule.
        let hex = |bytes: &[u8]| crate::hex(&Sha256::digest(bytes));
        let weights =
            format!("{}  model.safetensors\n", hex(&std::fs::read(at("model.safetensors")).unwrap()));
        for config in ["{}", ""] {
            std::fs::write(at("config.json"), config).unwrap();
            assert!(Checkpoint::open(dir.path(), &OpenOptions::default()).is_err());
            let lines = format!("{}  config.json\n{weights}", hex(config.as_bytes()));
            assert_eq!(hash(), hex(lines.as_bytes()));
        }
        std::fs::remove_file(at("config.json")).unwrap();
        assert_eq!(hash(), hex(weights.as_bytes()));
        let alone = list(&at("model.safetensors")).unwrap();
        assert_eq!(alone.sha256().unwrap(), weights[..64]);
        // Without a single file or an index all are listed; a damaged index does not hide them.
        std::fs::rename(at("model.safetensors"), at("b.safetensors")).unwrap();
        for _ in 0..2 {
            let files = list(dir.path()).unwrap().files;
            assert_eq!(files, [at("another.safetensors"), at("b.safetensors")]);
            std::fs::write(at("model.safetensors.index.json"), "{").unwrap();
        }
    }
}
