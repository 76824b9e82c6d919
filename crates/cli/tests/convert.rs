//! `longbit convert` and `longbit inspect`: files that read back to the same logits, what they print, what they refuse.

mod common;

use common::{checkpoint, put, root, run};
use std::path::Path;

use longbit::gguf::{Metadata, TensorType, Value, Writer};

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
    run(dir, &["convert", &source, "kept.gguf/out.gguf"]).expect(1).says(&["kept.gguf/out.gguf"]);
    let bad = root().join("fixtures/hf_1bitllm");
    run(dir, &["convert", bad.to_str().unwrap(), "bad.gguf", "--type", "tq2_0"])
        .expect(1)
        .says(&["256", "--type"]);
    let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["kept.gguf"]);
}

#[test]
fn folders_on_the_way_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    run(dir, &["convert", &source, "one/two/a.gguf"]).expect(0);
    run(dir, &["convert", &source, "three/four"]).expect(0);
    assert_eq!(logits(dir, "one/two/a.gguf"), logits(dir, "three/four"));
}

/// The type of the embedding in a GGUF file.
fn table_type(dir: &Path, file: &str) -> String {
    let document = json(&run(dir, &["inspect", file, "--json", "--no-hash"]).expect(0).out);
    document["model"]["embedding_type"].as_str().unwrap().to_string()
}

#[test]
fn tables_are_written_as_they_were_stored() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    for (stored, kept) in [("bf16", "bf16"), ("f16", "f16"), ("f32", "f32"), ("q8_0", "f32"), ("q4_0", "f32")]
    {
        run(dir, &["convert", &source, "in.gguf", "--force", "--head", stored]).expect(0);
        let said = run(dir, &["convert", "in.gguf", "out.gguf", "--force"]).expect(0);
        assert!(!said.out.contains("rounded"), "{stored}: {}", said.out);
        assert_eq!((table_type(dir, "in.gguf"), table_type(dir, "out.gguf")), (stored.into(), kept.into()));
        // Every bit of the tables is there, so that f32 tables of both answer the same.
        let wide = |model: &str| {
            let args = [
                "logits",
                "--model",
                model,
                "--head",
                "f32",
                "--tokens",
                "1,2,300",
                "--out",
                "l.safetensors",
            ];
            run(dir, &args).expect(0);
            std::fs::read(dir.join("l.safetensors")).unwrap()
        };
        assert_eq!(wide("in.gguf"), wide("out.gguf"), "{stored}");
    }
}

#[test]
fn flags_without_effect_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    run(dir, &["convert", &source, "out.gguf", "--seed", "1"]).expect(2).says(&["--seed", "preset:"]);
    for flag in [["--i2s", "x86"], ["--activation", "relu2"]] {
        let args = [&["convert", "preset:tiny", "out.gguf"], &flag[..]].concat();
        run(dir, &args).expect(2).says(&[flag[0], "preset"]);
    }
    for verb in [&["convert", &source, "out.gguf"][..], &["inspect", &source]] {
        run(dir, &[verb, &["--i2s", "x86"]].concat()).expect(2).says(&["--i2s", "GGUF", &source]);
    }
    let part = format!("{source}/model.safetensors");
    run(dir, &["inspect", &part, "--activation", "relu2"]).expect(2).says(&["--activation"]);
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
}

#[test]
fn what_cannot_fit_memory_is_refused_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // A table of 2 TiB, all of it a hole in the file.
    let (vocab, hidden, kv, intermediate) = (1u64 << 24, 1u64 << 16, 128u64, 4u64);
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": 1, "num_attention_heads": hidden / kv,
        "num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 256, "tie_word_embeddings": true,
        "quantization_config":
            { "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online" },
    });
    let tensors: [(&str, &[u64]); 11] = [
        ("model.embed_tokens.weight", &[vocab, hidden]),
        ("model.norm.weight", &[hidden]),
        ("model.layers.0.input_layernorm.weight", &[hidden]),
        ("model.layers.0.post_attention_layernorm.weight", &[hidden]),
        ("model.layers.0.self_attn.q_proj.weight", &[hidden, hidden]),
        ("model.layers.0.self_attn.k_proj.weight", &[kv, hidden]),
        ("model.layers.0.self_attn.v_proj.weight", &[kv, hidden]),
        ("model.layers.0.self_attn.o_proj.weight", &[hidden, hidden]),
        ("model.layers.0.mlp.gate_proj.weight", &[intermediate, hidden]),
        ("model.layers.0.mlp.up_proj.weight", &[intermediate, hidden]),
        ("model.layers.0.mlp.down_proj.weight", &[hidden, intermediate]),
    ];
    let (mut header, mut end) = (serde_json::Map::new(), 0u64);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        let entry = serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.into(), entry);
    }
    std::fs::create_dir(dir.join("huge")).unwrap();
    put(&dir.join("huge/config.json"), &config.to_string());
    std::fs::write(dir.join("huge/model.safetensors"), safetensors(&header.into())).unwrap();
    let weights = std::fs::OpenOptions::new().append(true).open(dir.join("huge/model.safetensors")).unwrap();
    weights.set_len(weights.metadata().unwrap().len() + end).unwrap();
    let cost = json(&run(dir, &["inspect", "huge", "--no-hash", "--json"]).expect(0).out);
    assert!(cost["model"]["costs"][0]["weight_bytes_in_memory"].as_u64().unwrap() > 1 << 41);
    run(dir, &["convert", "huge", "new/out.gguf"]).expect(1).says(&[
        "not enough memory",
        "of weights",
        "GiB",
    ]);
    assert!(!dir.join("new").exists());
}

/// A safetensors file with this header and no bytes after it.
fn safetensors(header: &serde_json::Value) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
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
    assert!(seen.contains("(bf16 head, the default and exact)") && !seen.contains("f32 head"), "{seen}");
    // Tables that bf16 would round are told with both heads.
    run(dir, &["convert", &source, "b.gguf", "--head", "q6_k"]).expect(0);
    let seen = run(dir, &["inspect", "b.gguf"]).expect(0).out;
    for text in ["tied to the embedding", "q6_k", "(bf16 head, the default)", "(f32 head, exact)"] {
        assert!(seen.contains(text), "{text} is missing in:\n{seen}");
    }
}

fn keys(object: &serde_json::Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The document of `inspect --json`: these fields and no others; a number is a number, what is unknown is null.
#[test]
fn inspect_writes_one_document_for_programs() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, source) = (dir.path(), source());
    run(dir, &["convert", &source, "a.gguf", "--head", "f16"]).expect(0);
    let document = json(&run(dir, &["inspect", "a.gguf", "--json"]).expect(0).out);
    let fields = ["container", "files", "metadata", "model", "refused", "sha256", "tensor_bytes", "tensors"];
    assert_eq!(keys(&document), fields);
    assert_eq!((&document["container"], &document["files"][0]), (&"GGUF 3".into(), &"a.gguf".into()));
    assert!(document["refused"].is_null());
    let table = 512 * 256u64;
    let layer = 256 * (256 + 128 + 128 + 256 + 3 * 512u64);
    let norms = 4 * (4 * (3 * 256 + 512) + 256u64);
    let weights = 4 * layer / 4 + norms;
    let cost = |head: &str, exact: bool, width: u64| {
        serde_json::json!({
            "head": head,
            "exact": exact,
            "weight_bytes_in_memory": weights + width * table,
            "weight_bytes_per_token": weights + width * (table + 256),
        })
    };
    let model = serde_json::json!({
        "parameters": 2495744, "layers": 4, "hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2,
        "head_dim": 64, "vocabulary": 512, "activation": "relu2", "sub_norms": true, "rope_theta": 500000.0,
        "trained_positions": 256, "tied_head": true, "embedding_type": "f16", "head_type": null,
        "bf16_kv_bytes_per_position": 4 * 2 * 2 * 64 * 2,
        "costs": [cost("bf16", false, 2), cost("f32", true, 4)],
    });
    assert_eq!(document["model"], model);
    let metadata = &document["metadata"];
    assert_eq!(metadata["bitnet-b1.58.attention.head_count"], 4);
    assert_eq!(metadata["bitnet-b1.58.attention.layer_norm_rms_epsilon"], 1e-5);
    assert_eq!(metadata["longbit.i2_s.layout"], "x86");
    let tokens = serde_json::json!({ "type": "array of string", "length": 512 });
    assert_eq!(metadata["tokenizer.ggml.tokens"], tokens);
    let tensors = document["tensors"].as_array().unwrap();
    let q = tensors.iter().find(|t| t["name"] == "blk.0.attn_k.weight").unwrap();
    let entry = serde_json::json!({
        "name": "blk.0.attn_k.weight", "type": "i2_s", "shape": [128, 256], "bytes": 128 * 256 / 4 + 32
    });
    assert_eq!(*q, entry);
    let bytes: u64 = tensors.iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(document["tensor_bytes"], bytes);
    let folder = json(&run(dir, &["inspect", &source, "--json"]).expect(0).out);
    assert_eq!((keys(&folder), &folder["container"]), (fields.into(), &"safetensors".into()));
    assert_eq!(folder["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(folder["model"]["costs"].as_array().unwrap().len(), 1);
    assert!(json(&run(dir, &["inspect", &source, "--json", "--no-hash"]).expect(0).out)["sha256"].is_null());
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
    assert!(seen.contains("sha256"), "{seen}");
    let document = json(&run(dir, &["inspect", "b.gguf", "--json"]).expect(2).out);
    assert!(document["model"].is_null() && document["refused"].as_str().unwrap().contains("gemma-3-270m"));
    assert_eq!(document["sha256"].as_str().unwrap().len(), 64);
    std::fs::write(dir.join("c.gguf"), &bytes[..bytes.len() / 2]).unwrap();
    run(dir, &["inspect", "c.gguf"]).expect(1).says(&["c.gguf"]);
}

#[test]
fn a_safetensors_file_alone_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let part = format!("{}/model.safetensors", source());
    let seen = run(dir.path(), &["inspect", &part]).expect(0).out;
    for text in ["model.layers.N.mlp.down_proj.weight", "sha256", "directory with its config.json"] {
        assert!(seen.contains(text), "{text} is missing in:\n{seen}");
    }
    let document = json(&run(dir.path(), &["inspect", &part, "--json"]).expect(0).out);
    assert!(document["model"].is_null() && document["refused"].is_null());
    assert!(!document["tensors"].as_array().unwrap().is_empty());
}

#[test]
fn names_of_any_number_and_content_leave_a_table_whole() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let evil = "a\u{1b}[31m\n\u{202e}\"".to_string();
    let long = "x".repeat(60_000);
    let metadata: Metadata = [
        ("general.architecture".to_string(), Value::String("nothing known".into())),
        (evil.clone(), Value::String(evil.clone())),
        (long.clone(), Value::U64(u64::MAX)),
    ]
    .into_iter()
    .chain((0..300).map(|i| (format!("key{i}"), Value::U8(7))))
    .collect();
    let mut writer = Writer::new(metadata).unwrap();
    writer.tensor(evil.as_str(), &[1], TensorType::F32).unwrap();
    for i in 0..20_000 {
        writer.tensor(format!("t{i}"), &[1], TensorType::F32).unwrap();
    }
    let mut file = Vec::new();
    writer.write(&mut file, |_, out| out.write_all(&[0; 4])).unwrap();
    std::fs::write(dir.join("odd.gguf"), &file).unwrap();
    let seen = run(dir, &["inspect", "odd.gguf"]).expect(2).out;
    assert!(!seen.contains(|c: char| (c.is_control() && c != '\n') || c == '\u{202e}'), "{seen}");
    for text in [
        "a\\u{1b}[31m\\n\\u{202e}",
        "… and 103 more (--json lists all)",
        "… and 19801 more (--json lists all)",
    ] {
        assert!(seen.contains(text), "{text} is missing in:\n{seen}");
    }
    assert!(seen.lines().count() < 450 && seen.lines().all(|line| line.len() < 400), "{seen}");
    let each = run(dir, &["inspect", "odd.gguf", "--tensors"]).expect(2).out;
    assert!(each.lines().any(|line| line.starts_with("t19999 ")));
    let document = json(&run(dir, &["inspect", "odd.gguf", "--json"]).expect(2).out);
    assert_eq!(document["metadata"][&evil], *evil);
    assert_eq!(document["metadata"][&long], u64::MAX);
    assert_eq!(
        (&document["tensors"][0]["name"], &document["tensors"][20_000]["name"]),
        (&(*evil).into(), &"t19999".into())
    );
}
