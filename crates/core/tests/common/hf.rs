//! Hugging Face checkpoints that tests read, change and write.

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use std::collections::BTreeMap;
use std::path::Path;

use longbit::{Error, HeadFormat, Model};

/// Type, shape and bytes of every tensor.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Config and tensors of a committed checkpoint, in however many files.
pub(crate) fn read(fixture: &str) -> (String, Tensors) {
    let dir = super::fixture(fixture);
    let mut all = Tensors::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            all.extend(tensors(&path));
        }
    }
    (std::fs::read_to_string(dir.join("config.json")).unwrap(), all)
}

/// The tensors of one file.
pub(crate) fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(n, v)| (n.to_string(), (v.dtype(), v.shape().to_vec(), v.data().to_vec()))).collect()
}

/// Writes one safetensors file.
pub(crate) fn write_file(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(n, (t, s, d))| (n.as_str(), TensorView::new(*t, s.clone(), d).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// Writes a checkpoint in one file.
pub(crate) fn write(dir: &Path, config: &str, tensors: &Tensors) {
    write_file(&dir.join("model.safetensors"), tensors);
    std::fs::write(dir.join("config.json"), config).unwrap();
}

/// Writes a checkpoint in `shards` files, tensors dealt out in turn; returns the weight map of its index.
pub(crate) fn write_shards(
    dir: &Path,
    config: &str,
    tensors: &Tensors,
    shards: usize,
) -> BTreeMap<String, String> {
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut files = vec![Tensors::new(); shards];
    let mut map = BTreeMap::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        map.insert(name.clone(), shard(i % shards, shards));
        files[i % shards].insert(name.clone(), tensor.clone());
    }
    for (i, file) in files.iter().enumerate() {
        write_file(&dir.join(shard(i, shards)), file);
    }
    write_index(dir, &map);
    map
}

/// Name of shard `i`, counted from zero.
pub(crate) fn shard(i: usize, of: usize) -> String {
    format!("model-{:05}-of-{of:05}.safetensors", i + 1)
}

/// Writes the index of a checkpoint.
pub(crate) fn write_index(dir: &Path, map: &BTreeMap<String, String>) {
    let pairs: Vec<String> = map.iter().map(|(tensor, file)| format!("{tensor:?}: {file:?}")).collect();
    let text = format!("{{\"metadata\": {{\"total_size\": 1}}, \"weight_map\": {{{}}}}}", pairs.join(",\n"));
    std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}

/// Loads the checkpoint in `dir` with two threads and a bf16 head.
pub(crate) fn load(dir: &Path) -> Result<Model, Error> {
    Model::load(dir, HeadFormat::Bf16, &super::team(2))
}

/// What is said of a committed checkpoint after `change`.
pub(crate) fn refusal(fixture: &str, change: impl FnOnce(&mut String, &mut Tensors)) -> String {
    let (mut config, mut tensors) = read(fixture);
    change(&mut config, &mut tensors);
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config, &tensors);
    match load(dir.path()) {
        Ok(_) => panic!("the damaged checkpoint was loaded"),
        Err(error) => error.to_string(),
    }
}
