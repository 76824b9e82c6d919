//! `longbit convert` and `longbit inspect`: files that read back to the same logits, what they print, what they refuse.

mod common;

use common::{checkpoint, root, run};
use std::path::Path;

/// The logits that the model at `model` gives for a few tokens, as the bytes of the file that the verb writes.
fn logits(dir: &Path, model: &str) -> Vec<u8> {
    run(dir, &["logits", "--model", model, "--tokens", "1,2,3,300", "--out", "logits.safetensors"]).expect(0);
    std::fs::read(dir.join("logits.safetensors")).unwrap()
}

fn source() -> String {
    checkpoint().to_str().expect("a path in UTF-8").to_string()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn files_go_round_and_answer_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    let direct = logits(dir, &source);
    run(dir, &["convert", &source, "a.gguf"]).expect(0);
    run(dir, &["convert", "a.gguf", "b.gguf", "--type", "tq1_0", "--head", "f32"]).expect(0);
    let said = run(dir, &["convert", "b.gguf", "packed"]).expect(0);
    assert!(said.out.contains("wrote packed: ") && said.out.contains(" tensors"), "{}", said.out);
    for model in ["a.gguf", "b.gguf", "packed"] {
        assert_eq!(logits(dir, model), direct, "{model}");
    }
    // The tokenizer has come along through both containers.
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(dir.join("packed").join(name).is_file(), "{name}");
    }
    let prompt = ["--prompt", "The quick", "--max-tokens", "8"];
    let text = |model: &str| run(dir, &[&["generate", "--model", model], &prompt[..]].concat()).expect(0).out;
    assert_eq!(text("packed"), text(&source));
    assert_eq!(text("b.gguf"), text(&source));
}

#[test]
fn nothing_is_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    std::fs::write(dir.join("kept.gguf"), "kept").unwrap();
    run(dir, &["convert", &source, "kept.gguf"]).expect(2).says(&["kept.gguf", "--force"]);
    assert_eq!(std::fs::read(dir.join("kept.gguf")).unwrap(), b"kept");
    run(dir, &["convert", &source, "kept.gguf", "--force"]).expect(0);
    assert_ne!(std::fs::read(dir.join("kept.gguf")).unwrap(), b"kept");
    // A conversion that fails leaves neither a result nor a part of one.
    run(dir, &["convert", &source, "absent/out.gguf"]).expect(1).says(&["absent/out.gguf"]);
    let bad = root().join("fixtures/hf_1bitllm");
    run(dir, &["convert", bad.to_str().unwrap(), "bad.gguf", "--type", "tq2_0"])
        .expect(1)
        .says(&["256", "--type"]);
    let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["kept.gguf"]);
}

#[test]
fn wrong_words_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    run(dir, &["convert", &source, "out", "--type", "tq2_0"]).expect(2).says(&["--type", ".gguf"]);
    run(dir, &["convert", &source, "out.gguf", "--type", "tl2"]).expect(2).says(&["tl2", "tq2_0"]);
    run(dir, &["convert", "preset:bitnet-9b", "out.gguf"]).expect(2).says(&["bitnet-9b", "bitnet-2b-4t"]);
    run(dir, &["convert", "no-such-model", "out.gguf"]).expect(1).says(&["no-such-model"]);
    run(dir, &["inspect", "no-such-model"]).expect(1).says(&["no-such-model"]);
    run(dir, &["convert", &source, "out.gguf", "--i2s", "mips"]).expect(2).says(&["mips", "x86"]);
}

#[test]
fn a_preset_becomes_a_file_and_loads() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &["convert", "preset:tiny", "tiny.gguf", "--seed", "3"]).expect(0);
    run(dir.path(), &["convert", "preset:tiny", "tiny", "--seed", "3"]).expect(0);
    assert_eq!(logits(dir.path(), "tiny.gguf"), logits(dir.path(), "tiny"));
    run(dir.path(), &["convert", "preset:tiny", "other.gguf", "--seed", "4"]).expect(0);
    assert_ne!(logits(dir.path(), "tiny.gguf"), logits(dir.path(), "other.gguf"));
}

#[test]
fn inspect_says_what_a_file_is_and_costs() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    run(dir, &["convert", &source, "a.gguf"]).expect(0);
    let seen = run(dir, &["inspect", "a.gguf"]).expect(0).out;
    for text in ["GGUF 3", "bitnet-b1.58", "relu2", "blk.N.ffn_down.weight", "i2_s", "longbit.i2_s.layout"] {
        assert!(seen.contains(text), "{text} is missing in:\n{seen}");
    }
    let each = run(dir, &["inspect", "a.gguf", "--tensors", "--no-hash"]).expect(0).out;
    assert!(each.contains("blk.3.ffn_down.weight") && !each.contains("sha256"), "{each}");
    let document = json(&run(dir, &["inspect", "a.gguf", "--json"]).expect(0).out);
    assert_eq!(document["model"]["parameters"], "2495744");
    let q =
        document["tensors"].as_array().unwrap().iter().find(|t| t["name"] == "blk.0.attn_k.weight").unwrap();
    assert_eq!((&q["type"], &q["bytes"]), (&"i2_s".into(), &(128 * 256 / 4 + 32).into()));
    let folder = json(&run(dir, &["inspect", &source, "--json"]).expect(0).out);
    assert_eq!(folder["model"]["container"], "safetensors");
    assert_eq!(folder["model"]["sha256"].as_str().unwrap().len(), 64);
}

#[test]
fn inspect_lists_what_cannot_be_run_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(dir, &["convert", &source(), "a.gguf"]).expect(0);
    let mut bytes = std::fs::read(dir.join("a.gguf")).unwrap();
    // Another architecture of the same length.
    while let Some(at) = bytes.windows(12).position(|w| w == b"bitnet-b1.58") {
        bytes[at..at + 12].copy_from_slice(b"gemma-3-270m");
    }
    std::fs::write(dir.join("b.gguf"), &bytes).unwrap();
    let seen = run(dir, &["inspect", "b.gguf"]).expect(2).out;
    for text in ["blk.N.attn_q.weight", "cannot be run", "gemma-3-270m", "supported are"] {
        assert!(seen.contains(text), "{text} is missing in:\n{seen}");
    }
    std::fs::write(dir.join("c.gguf"), &bytes[..bytes.len() / 2]).unwrap();
    run(dir, &["inspect", "c.gguf"]).expect(1).says(&["c.gguf"]);
}
