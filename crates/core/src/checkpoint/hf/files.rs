//! The safetensors files of a checkpoint and where each tensor lies in them: one `model.safetensors`, or the shards that
//! `model.safetensors.index.json` maps tensors to.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use longbit_sys::FileMap;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::files::read_text;

/// The one file of a small checkpoint.
const SINGLE: &str = "model.safetensors";
/// The index of a checkpoint in several files.
const INDEX: &str = "model.safetensors.index.json";
/// Largest index that is read (bytes).
const MAX_INDEX: u64 = 16 << 20;
/// Bytes of the length that opens a safetensors file.
const LENGTH_BYTES: usize = 8;

/// A tensor as its file describes it.
pub(super) struct Tensor {
    /// Index of the file.
    pub(super) file: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Its bytes, inside the file.
    pub(super) range: Range<usize>,
}

/// All tensors of a checkpoint.
pub(super) struct Tensors {
    /// In the order of their names.
    files: Vec<FileMap>,
    tensors: BTreeMap<String, Tensor>,
    /// The file that a reader would look into first: the only one, or the index.
    described: PathBuf,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Tensors {
    /// Maps the files in `dir` and reads their headers. As in transformers, a single file comes before an index.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        if there(dir, SINGLE) {
            let described = dir.join(SINGLE);
            let mut tensors = Tensors { files: Vec::new(), tensors: BTreeMap::new(), described };
            tensors.add(&dir.join(SINGLE))?;
            return Ok(tensors);
        }
        if !there(dir, INDEX) {
            return Err(Error::Config {
                path: dir.into(),
                reason: format!(
                    "holds no weights: looked for {SINGLE} and {INDEX}; weights in another format must be converted to \
                     safetensors"
                ),
            });
        }
        Self::sharded(dir, dir.join(INDEX))
    }

    fn sharded(dir: &Path, index: PathBuf) -> Result<Self> {
        let weight_map = read_index(dir, &index)?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        let mut tensors = Tensors { files: Vec::new(), tensors: BTreeMap::new(), described: index };
        for name in &names {
            tensors.add(&dir.join(name))?;
        }
        let names: Vec<&String> = names.into_iter().collect();
        for (tensor, file) in &weight_map {
            match tensors.tensors.get(tensor) {
                Some(found) if names[found.file] == file => {}
                Some(found) => {
                    let reason = format!("is in `{}`; the index says `{file}`", names[found.file]);
                    return Err(tensors.fail(tensor, reason));
                }
                None => {
                    return Err(
                        tensors.fail(tensor, format!("is missing from `{file}`, where the index says it is"))
                    );
                }
            }
        }
        match tensors.tensors.iter().find(|(name, _)| !weight_map.contains_key(*name)) {
            Some((name, found)) => {
                Err(tensors.fail(name, format!("is in `{}`; the index does not name it", names[found.file])))
            }
            None => Ok(tensors),
        }
    }

    /// Maps one more file and takes note of its tensors.
    fn add(&mut self, path: &Path) -> Result<()> {
        let map = FileMap::open(path)?;
        // Checks that the tensors fill the rest of the file without gaps, each with the bytes of its shape.
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::Container { path: path.into(), reason: e.to_string() })?;
        let start = LENGTH_BYTES + header;
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            let tensor = Tensor { file, dtype: info.dtype, shape: info.shape.clone(), range };
            if let Some(first) = self.tensors.get(&name) {
                let first = self.files[first.file].path().display();
                let reason = format!("is also in {first}; a tensor must be in one file");
                return Err(Error::Tensor { path: path.into(), tensor: name, reason });
            }
            self.tensors.insert(name, tensor);
        }
        self.files.push(map);
        Ok(())
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| self.fail(name, "is missing".into()))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The bytes of `range` of a file.
    pub(super) fn bytes(&self, file: usize, range: Range<usize>) -> &[u8] {
        &self.files[file][range]
    }

    /// The file that holds the tensor `name`, or the one that ought to name it.
    pub(super) fn path_of(&self, name: &str) -> &Path {
        match self.tensors.get(name) {
            Some(tensor) => self.files[tensor.file].path(),
            None => &self.described,
        }
    }

    /// An error about the tensor `name`.
    pub(super) fn fail(&self, name: &str, reason: String) -> Error {
        Error::Tensor { path: self.path_of(name).into(), tensor: name.into(), reason }
    }

    pub(super) fn into_files(self) -> Vec<FileMap> {
        self.files
    }
}

/// A link whose target is gone is there, and says so when it is opened.
fn there(dir: &Path, name: &str) -> bool {
    dir.join(name).symlink_metadata().is_ok()
}

/// The weight files that are loaded from `dir`, in the order of their names; none where it has neither a single file nor
/// an index.
///
/// # Errors
/// The index is damaged, or names what is not there.
pub(in crate::checkpoint) fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    if there(dir, SINGLE) {
        return Ok(vec![dir.join(SINGLE)]);
    }
    if !there(dir, INDEX) {
        return Ok(Vec::new());
    }
    let names: BTreeSet<String> = read_index(dir, &dir.join(INDEX))?.into_values().collect();
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// The file of each tensor, by the names that an index gives both.
fn read_index(dir: &Path, index: &Path) -> Result<BTreeMap<String, String>> {
    let fail = |reason: String| Error::Config { path: index.into(), reason };
    let Index { weight_map } = serde_json::from_str(&read_text(index, MAX_INDEX)?)
        .map_err(|e| fail(format!("is not the index of a checkpoint: {e}")))?;
    if weight_map.is_empty() {
        return Err(fail("names no tensor: weight_map is empty".into()));
    }
    for (tensor, file) in &weight_map {
        if !plain_name(file) {
            return Err(fail(format!(
                "names the file `{file}` for tensor `{tensor}`; it must be the plain name of a .safetensors file in the \
                 same directory"
            )));
        }
        if !there(dir, file) {
            return Err(fail(format!(
                "names the file `{file}` for tensor `{tensor}`; there is no such file in {}",
                dir.display()
            )));
        }
    }
    Ok(weight_map)
}

/// Whether `name` names a safetensors file of the directory itself, on any system.
fn plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let alone =
        matches!(components.next(), Some(Component::Normal(n)) if n == name) && components.next().is_none();
    alone && !name.contains(['/', '\\', ':', '\0']) && name.ends_with(".safetensors")
}

#[cfg(test)]
mod tests {
    use super::plain_name;

    #[test]
    fn only_plain_names_are_followed() {
        assert!(plain_name("model-00001-of-00002.safetensors") && plain_name("..safetensors"));
        for name in [
            "",
            ".",
            "..",
            "config.json",
            "/model.safetensors",
            "../model.safetensors",
            "a/model.safetensors",
            "./model.safetensors",
            "model.safetensors/",
            "..\\model.safetensors",
            "C:model.safetensors",
            "a\0.safetensors",
        ] {
            assert!(!plain_name(name), "{name:?}");
        }
    }
}
