//! What conversion keeps beside the weights: chat templates, stop tokens, names; and what it leaves behind when it is
//! stopped half-way.

mod common;

use common::{bits, fixture, hf, session, team, tokens};
use longbit::convert::{GgufOptions, Vocabulary, write_gguf, write_safetensors};
use longbit::formats::Encoding;
use longbit::gguf::{Array, Header, Value};
use longbit::text::{TextModel, TextOptions};
use longbit::{Checkpoint, Error, HeadFormat, Model, OpenOptions};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const OFFLINE: &str = "hf_bitnet/offline";

/// A copy of the tiny checkpoint, to be changed.
fn copy(to: &Path) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(fixture(OFFLINE)).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
    }
    to.to_path_buf()
}

fn read(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Puts `value` under `key` of a JSON file.
fn set(path: &Path, key: &str, value: Json) {
    let mut all = read(path);
    all[key] = value;
    std::fs::write(path, all.to_string()).unwrap();
}

fn load(from: &Path) -> (Model, Vocabulary) {
    let checkpoint = Checkpoint::open(from, &OpenOptions::default()).unwrap();
    let vocabulary = Vocabulary::of(&checkpoint).unwrap();
    (checkpoint.load(checkpoint.exact_head(), &team(2)).unwrap(), vocabulary)
}

/// Converts, to GGUF by the ending; returns what the user is told.
fn convert(from: &Path, to: &Path) -> Result<Option<String>, Error> {
    let (model, vocabulary) = load(from);
    match to.extension().is_some_and(|e| e == "gguf") {
        true => {
            let options = GgufOptions { linear: Encoding::Tq2_0, head: Encoding::Bf16 };
            write_gguf(&model, &vocabulary, options, to, &mut |_, _| {})?;
        }
        false => {
            write_safetensors(&model, &vocabulary, to)?;
        }
    }
    Ok(vocabulary.note().map(str::to_string))
}

fn text(path: &Path) -> TextModel {
    TextModel::open(path, &TextOptions::default()).unwrap()
}

fn key(path: &Path, key: &str) -> Option<Value> {
    Header::parse(&std::fs::read(path).unwrap()).unwrap().metadata.get(key).cloned()
}

fn logits(path: &Path) -> Vec<u32> {
    let model = Model::load(path, HeadFormat::F32, &team(2)).unwrap();
    bits(&session(&Arc::new(model), 2, 64, "f32", "dense").logits_of(&tokens(9, 500), 9).unwrap())
}

#[test]
fn the_chat_template_that_is_used_is_the_one_that_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let chat = |path: &Path| text(path).chat.unwrap().source().to_string();
    let source = copy(&at("source"));
    // Three places, in the order in which they are looked into: a file, one of a list, a text.
    let in_settings =
        read(&source.join("tokenizer_config.json"))["chat_template"].as_str().unwrap().to_string();
    let named =
        json!([{"name": "tools", "template": "tools"}, {"name": "default", "template": "{{ 'default' }}"}]);
    for (expected, notes) in [(in_settings.as_str(), 0), ("{{ 'default' }}", 1), ("{{ 'in a file' }}", 1)] {
        if expected.contains("default") {
            set(&source.join("tokenizer_config.json"), "chat_template", named.clone());
        } else if expected.contains("file") {
            std::fs::write(source.join("chat_template.jinja"), expected).unwrap();
        }
        assert_eq!(chat(&source), expected);
        let note = convert(&source, &at("a.gguf")).unwrap();
        assert_eq!(note.iter().filter(|n| n.contains("2 chat templates")).count(), notes, "{note:?}");
        assert_eq!(key(&at("a.gguf"), "tokenizer.chat_template"), Some(Value::String(expected.into())));
        convert(&at("a.gguf"), &at("b.gguf")).unwrap();
        convert(&at("b.gguf"), &at("packed")).unwrap();
        convert(&source, &at("copied")).unwrap();
        for path in ["a.gguf", "b.gguf", "packed", "copied"] {
            assert_eq!(chat(&at(path)), expected, "{path}");
            assert!(text(&at(path)).notes.is_empty(), "{path}");
        }
    }
    assert_eq!(std::fs::read(at("copied/chat_template.jinja")).unwrap(), b"{{ 'in a file' }}");
    // What is no template at all is said to stay behind.
    std::fs::remove_file(source.join("chat_template.jinja")).unwrap();
    set(&source.join("tokenizer_config.json"), "chat_template", json!({"default": 3}));
    let note = convert(&source, &at("a.gguf")).unwrap().unwrap();
    assert!(note.contains("chat_template") && note.contains("goes without"), "{note}");
    assert_eq!(key(&at("a.gguf"), "tokenizer.chat_template"), None);
}

#[test]
fn every_stop_token_survives_every_container() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let source = copy(&at("source"));
    set(&source.join("generation_config.json"), "eos_token_id", json!([7, 300, 510]));
    set(&source.join("generation_config.json"), "temperature", json!(0.25));
    set(&source.join("tokenizer_config.json"), "add_bos_token", json!(true));
    let expected = text(&source);
    assert_eq!(expected.stop_tokens, [2, 7, 300, 510, 511]);
    convert(&source, &at("a.gguf")).unwrap();
    convert(&at("a.gguf"), &at("b.gguf")).unwrap();
    convert(&at("b.gguf"), &at("packed")).unwrap();
    convert(&source, &at("copied")).unwrap();
    for path in ["a.gguf", "b.gguf", "packed", "copied"] {
        let found = text(&at(path));
        assert_eq!(found.stop_tokens, expected.stop_tokens, "{path}");
        let ends =
            |t: &TextModel| (t.tokenizer.bos(), t.tokenizer.eos(), t.tokenizer.prompts_start_with_bos());
        assert_eq!(ends(&found), ends(&expected), "{path}");
    }
    let all = Value::Array(Array::U32(expected.stop_tokens.clone()));
    assert_eq!(key(&at("a.gguf"), "longbit.stop_token_ids"), Some(all));
    for path in ["packed", "copied"] {
        let generation = read(&at(path).join("generation_config.json"));
        assert_eq!(generation["eos_token_id"], json!(expected.stop_tokens), "{path}");
    }
    // What else the file says stays as it is.
    assert_eq!(read(&at("copied/generation_config.json"))["temperature"], 0.25);
}

#[test]
fn a_tokenizer_that_cannot_be_used_is_carried_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let source = copy(&at("source"));
    let mut unigram = read(&source.join("tokenizer.json"));
    unigram["model"] = json!({"type": "Unigram", "vocab": [["a", -1.0]]});
    std::fs::write(source.join("tokenizer.json"), unigram.to_string()).unwrap();
    let note = convert(&source, &at("a.gguf")).unwrap().unwrap();
    assert!(note.contains("cannot be used") && note.contains("Unigram"), "{note}");
    let whole = std::fs::read_to_string(source.join("tokenizer.json")).unwrap();
    assert_eq!(key(&at("a.gguf"), "tokenizer.huggingface.json"), Some(Value::String(whole.clone())));
    convert(&at("a.gguf"), &at("packed")).unwrap();
    assert_eq!(std::fs::read_to_string(at("packed/tokenizer.json")).unwrap(), whole);
    assert_eq!(read(&at("packed/generation_config.json"))["eos_token_id"], json!([2, 510, 511]));
}

#[cfg(unix)]
#[test]
fn special_files_are_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let source = copy(&dir.path().join("source"));
    let config = source.join("generation_config.json");
    std::fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &config).unwrap();
    let checkpoint = Checkpoint::open(&source, &OpenOptions::default()).unwrap();
    let message = Vocabulary::of(&checkpoint).unwrap_err().to_string();
    assert!(
        message.contains("generation_config.json") && message.contains("not a regular file"),
        "{message}"
    );
    let message = TextModel::open(&source, &TextOptions::default()).unwrap_err().to_string();
    assert!(message.contains("not a regular file"), "{message}");
}

#[test]
fn names_are_kept_whole() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let name = |path: &Path| match key(path, "general.name") {
        Some(Value::String(name)) => name,
        other => panic!("{other:?}"),
    };
    let source = copy(&at("Falcon3-1.58bit"));
    for from in [source.clone(), source.join("../Falcon3-1.58bit/.")] {
        convert(&from, &at("a.gguf")).unwrap();
        assert_eq!(name(&at("a.gguf")), "Falcon3-1.58bit");
    }
    // A name in the file comes before the name of the file.
    convert(&at("a.gguf"), &at("b.gguf")).unwrap();
    assert_eq!(name(&at("b.gguf")), "Falcon3-1.58bit");
    let (model, _) = load(&source);
    let options = GgufOptions { linear: Encoding::Tq2_0, head: Encoding::Bf16 };
    let nameless = at("model.v1.5.gguf");
    write_gguf(&model, &Vocabulary::none("x"), options, &nameless, &mut |_, _| {}).unwrap();
    let bytes = std::fs::read(&nameless).unwrap();
    let key_at = bytes.windows(12).position(|w| w == b"general.name").unwrap();
    let mut renamed = bytes.clone();
    renamed[key_at..key_at + 12].copy_from_slice(b"general.none");
    std::fs::write(&nameless, renamed).unwrap();
    convert(&nameless, &at("b.gguf")).unwrap();
    assert_eq!(name(&at("b.gguf")), "model.v1.5");
}

#[test]
fn the_declared_type_is_the_widest_that_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    for (source, dtype) in [(OFFLINE, "bfloat16"), ("hf_1bitllm", "float32")] {
        let to = dir.path().join(dtype);
        convert(&fixture(source), &to).unwrap();
        assert_eq!(read(&to.join("config.json"))["torch_dtype"], dtype);
        let wide = hf::tensors(&to.join("model.safetensors"));
        let wide = wide.values().any(|t| t.0 == safetensors::tensor::Dtype::F32);
        assert_eq!(wide, dtype == "float32");
    }
}

/// Files in a directory, by name.
fn names(dir: &Path) -> Vec<String> {
    let all = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut all: Vec<String> = all.collect();
    all.sort();
    all
}

#[test]
fn nothing_of_another_model_stays_in_a_directory_that_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path();
    let (config, tensors) = hf::read("hf_llama");
    hf::write_shards(to, &config, &tensors, 3);
    for stale in
        ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "README.md", "model-card.md"]
    {
        std::fs::write(to.join(stale), "of another model").unwrap();
    }
    convert(&fixture(OFFLINE), to).unwrap();
    let mut expected = vec!["README.md", "config.json", "model-card.md", "model.safetensors"];
    expected.extend(["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    expected.sort_unstable();
    assert_eq!(names(to), expected);
    assert_eq!(logits(to), logits(&fixture(OFFLINE)));
    assert_eq!(text(to).stop_tokens, text(&fixture(OFFLINE)).stop_tokens);
    // A model without a tokenizer does not keep one.
    convert(&fixture("hf_1bitllm"), to).unwrap();
    assert!(!to.join("tokenizer.json").exists() && !to.join("tokenizer_config.json").exists());
}

#[test]
fn a_directory_that_was_not_finished_is_the_old_one_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let to = copy(&dir.path().join("out"));
    let before = logits(&to);
    // The weights cannot be written: nothing has changed.
    std::fs::create_dir_all(to.join("model.safetensors.partial")).unwrap();
    let message = convert(&fixture("hf_llama"), &to).unwrap_err().to_string();
    assert!(message.contains("model.safetensors"), "{message}");
    std::fs::remove_dir(to.join("model.safetensors.partial")).unwrap();
    assert_eq!(names(&to), names(&fixture(OFFLINE)));
    assert_eq!(logits(&to), before);
    // One of the last steps fails: what is there is no model.
    std::fs::remove_file(to.join("model.safetensors")).unwrap();
    std::fs::create_dir(to.join("model.safetensors")).unwrap();
    convert(&fixture(OFFLINE), &to).unwrap_err();
    let message = Model::load(&to, HeadFormat::F32, &team(1)).err().unwrap().to_string();
    assert!(message.contains("config.json"), "{message}");
    assert!(!names(&to).iter().any(|name| name.ends_with(".partial")), "{:?}", names(&to));
}

#[test]
fn numbers_beyond_a_format_are_named_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let (config, mut tensors) = hf::read(OFFLINE);
    let table = &mut tensors.get_mut("model.embed_tokens.weight").unwrap().2;
    // Row 3, column 5 of [512, 256] in bf16.
    let at = 2 * (3 * 256 + 5);
    table[at..at + 2].copy_from_slice(&half::bf16::from_f32(1e6).to_le_bytes());
    hf::write(dir.path(), &config, &tensors);
    let (model, vocabulary) = load(dir.path());
    let path = dir.path().join("out.gguf");
    let write = |head| {
        let options = GgufOptions { linear: Encoding::Tq2_0, head };
        write_gguf(&model, &vocabulary, options, &path, &mut |_, _| {})
    };
    let message = write(Encoding::F16).unwrap_err().to_string();
    for part in ["token_embd.weight", "row 3", "column 5", "--head bf16"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert_eq!(names(dir.path()), ["config.json", "model.safetensors"]);
    write(Encoding::Bf16).unwrap();
}
