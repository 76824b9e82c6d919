//! Replays the corpus of the fuzz targets on the stable toolchain: seeds, and every input that once broke something.

#[path = "common/untrusted.rs"]
mod untrusted;

use std::path::Path;
use std::time::{Duration, Instant};

/// Far beyond what any of these small files may take, and far below a hang.
const LIMIT: Duration = Duration::from_secs(20);

fn replay(target: &str, run: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 3, "{} holds {} files", dir.display(), files.len());
    for file in files {
        let clock = Instant::now();
        run(&std::fs::read(&file).unwrap());
        assert!(clock.elapsed() < LIMIT, "{} took {:?}", file.display(), clock.elapsed());
    }
}

#[test]
fn gguf() {
    replay("gguf", untrusted::gguf);
}

#[test]
fn safetensors() {
    replay("safetensors", untrusted::safetensors);
}

#[test]
fn index() {
    replay("index", untrusted::index);
}

#[test]
fn config() {
    replay("config", untrusted::config);
}

#[test]
fn tokenizer() {
    replay("tokenizer", untrusted::tokenizer);
}

/// The sound seeds are loaded and run: otherwise the fuzzers would only ever see refusals.
#[test]
fn sound_seeds_reach_the_forward_pass() {
    use longbit::{Checkpoint, OpenOptions};
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let dir = tempfile::tempdir().unwrap();
    for seed in ["floats", "spm", "llama", "i2_s", "iq2_bn", "types_a", "types_b"] {
        let path = dir.path().join(format!("{seed}.gguf"));
        std::fs::copy(corpus.join("gguf").join(seed), &path).unwrap();
        let opened = Checkpoint::open(&path, &OpenOptions::default());
        let checkpoint = opened.unwrap_or_else(|e| panic!("{seed}: {e}"));
        let team = longbit_sys::Team::new(1, false).unwrap();
        checkpoint.load(checkpoint.exact_head(), &team).unwrap_or_else(|e| panic!("{seed}: {e}"));
    }
    let masters = untrusted::CONFIG.replace("offline", "online");
    for (config, seed) in [(untrusted::CONFIG, "sound"), (&masters, "masters")] {
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        std::fs::copy(corpus.join("safetensors").join(seed), dir.path().join("model.safetensors")).unwrap();
        Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap_or_else(|e| panic!("{seed}: {e}"));
    }
    std::fs::rename(dir.path().join("model.safetensors"), dir.path().join("gone")).unwrap();
    std::fs::write(dir.path().join("config.json"), untrusted::CONFIG).unwrap();
    std::fs::copy(corpus.join("safetensors/sound"), dir.path().join("a.safetensors")).unwrap();
    std::fs::copy(corpus.join("index/sound"), dir.path().join("model.safetensors.index.json")).unwrap();
    Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap();
}
