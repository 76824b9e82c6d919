//! What is done with a file from outside, up to a model that answers: shared by the fuzz targets and by the test that
//! replays their corpus. Nothing here may panic, and nothing may take time or memory out of proportion to the file.
#![allow(dead_code, reason = "each fuzz target uses one function")]

use longbit::convert::{GgufOptions, Vocabulary, write_gguf, write_safetensors};
use longbit::formats::Encoding;
use longbit::gguf::Header;
use longbit::text::{Message, TextModel, TextOptions, Tokenizer};
use longbit::{Checkpoint, OpenOptions, Session, SessionOptions, list};
use longbit_sys::Team;
use std::path::Path;
use std::sync::{Arc, LazyLock};

/// A shape that a file of a few hundred bytes can hold.
pub(crate) const CONFIG: &str = r#"{"architectures":["BitNetForCausalLM"],"vocab_size":4,"hidden_size":4,"intermediate_size":4,
    "num_hidden_layers":1,"num_attention_heads":1,"num_key_value_heads":1,"hidden_act":"relu2","rms_norm_eps":1e-5,
    "rope_theta":10000.0,"tie_word_embeddings":true,"quantization_config":{"quant_method":"bitnet",
    "linear_class":"autobitlinear","quantization_mode":"offline"}}"#;

/// The packed weights of that shape.
const SHARD: &[u8] = include_bytes!("../../../../fuzz/corpus/safetensors/sound");

/// The same shape with master weights.
fn masters() -> String {
    CONFIG.replace("offline", "online")
}

/// A directory in memory where there is one, so that a fuzzer does not wear out a disk.
fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a directory for a file of the test")
}

static TEAM: LazyLock<Arc<Team>> = LazyLock::new(|| Arc::new(Team::new(1, false).expect("one thread")));

/// Opens, loads, writes and asks what can be loaded.
fn run(path: &Path) {
    let _ = list(path);
    let Ok(checkpoint) = Checkpoint::open(path, &OpenOptions::default()) else { return };
    let head = checkpoint.exact_head();
    let Ok(model) = checkpoint.load(head, &TEAM) else { return };
    let out = place();
    if let Ok(vocabulary) = Vocabulary::of(&checkpoint) {
        let options = GgufOptions { linear: Encoding::Iq2Bn, head: Encoding::F32 };
        let _ = write_gguf(&model, &vocabulary, options, &out.path().join("out.gguf"), &mut |_, _| {});
        let _ = write_safetensors(&model, &vocabulary, &out.path().join("out"));
    }
    let options = SessionOptions { capacity: 4, ..Default::default() };
    if let Ok(mut session) = Session::new(Arc::new(model), TEAM.clone(), options) {
        let _ = session.prefill(&[0]);
    }
}

/// A GGUF file.
pub(crate) fn gguf(data: &[u8]) {
    if Header::parse(data).is_err() {
        return;
    }
    let dir = place();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, data).expect("room for the file");
    run(&path);
    let Ok(text) = TextModel::open(&path, &TextOptions::default()) else { return };
    speak(&text.tokenizer);
    if let Some(chat) = text.chat {
        let _ = chat.render(&[Message::new("user", "hello"), Message::new("assistant", "")], true);
    }
}

/// There and back.
fn speak(tokenizer: &Tokenizer) {
    if let Ok(ids) = tokenizer.encode("Hello, wörld  123 <|eot_id|>\n", true) {
        let _ = tokenizer.decode(&ids, false);
    }
}

/// The weights of a checkpoint whose `config.json` is sound: packed ones, or master weights.
pub(crate) fn safetensors(data: &[u8]) {
    let dir = place();
    std::fs::write(dir.path().join("model.safetensors"), data).expect("room for the file");
    for config in [CONFIG, &masters()] {
        std::fs::write(dir.path().join("config.json"), config).expect("room for the file");
        run(dir.path());
    }
}

/// The index of a checkpoint in shards, beside one shard with all tensors.
pub(crate) fn index(data: &[u8]) {
    let dir = place();
    std::fs::write(dir.path().join("config.json"), CONFIG).expect("room for the file");
    std::fs::write(dir.path().join("a.safetensors"), SHARD).expect("room for the file");
    std::fs::write(dir.path().join("model.safetensors.index.json"), data).expect("room for the file");
    run(dir.path());
}

/// A `config.json`.
pub(crate) fn config(data: &[u8]) {
    let dir = place();
    std::fs::write(dir.path().join("config.json"), data).expect("room for the file");
    let _ = Checkpoint::config_of(dir.path(), &OpenOptions::default());
}

/// A `tokenizer.json`, and what it makes of a text.
pub(crate) fn tokenizer(data: &[u8]) {
    let dir = place();
    std::fs::write(dir.path().join("tokenizer.json"), data).expect("room for the file");
    if let Ok(tokenizer) = Tokenizer::from_file(&dir.path().join("tokenizer.json")) {
        speak(&tokenizer);
    }
}
