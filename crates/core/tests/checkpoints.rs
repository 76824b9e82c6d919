//! Checkpoints of other shapes load; damaged ones are refused with the tensor's name, never a panic or a wrong answer.

mod common;

use common::hf::{Tensors, load, write};
use common::{argmax, fixture, session};
use longbit::reference::Reference;
use safetensors::tensor::Dtype;
use std::sync::Arc;

fn offline() -> (String, Tensors) {
    common::hf::read("hf_bitnet/offline")
}

fn refusal(change: impl FnOnce(&mut String, &mut Tensors)) -> String {
    common::hf::refusal("hf_bitnet/offline", change)
}

/// A checkpoint of another shape with bytes from a counter: other sizes, head counts, rope_theta, untied head.
fn other_shape(
    hidden: usize,
    inter: usize,
    heads: usize,
    kv: usize,
    head_dim: usize,
    tied: bool,
) -> (String, Tensors) {
    let (vocab, layers) = (96, 2);
    let config = format!(
        r#"{{"architectures":["BitNetForCausalLM"],"vocab_size":{vocab},"hidden_size":{hidden},"intermediate_size":{inter},
        "num_hidden_layers":{layers},"num_attention_heads":{heads},"num_key_value_heads":{kv},"head_dim":{head_dim},
        "hidden_act":"relu2","rms_norm_eps":1e-6,"rope_theta":10000.0,"tie_word_embeddings":{tied},
        "quantization_config":{{"quant_method":"bitnet","linear_class":"autobitlinear","quantization_mode":"offline"}}}}"#
    );
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u32
    };
    let mut tensors = Tensors::new();
    let bf16 = |v: f32| ((v.to_bits() >> 16) as u16).to_le_bytes();
    let mut put = |name: String, shape: Vec<usize>, near: f32, spread: f32| {
        let n: usize = shape.iter().product();
        let mut value = || near + spread * (next() as f32 / (1u64 << 30) as f32 - 1.0);
        // Norms in f32: products of bf16 numbers often end exactly on a rounding boundary, where two implementations
        // may differ by right.
        let (dtype, data) = match name.contains("norm") {
            true => (Dtype::F32, (0..n).flat_map(|_| value().to_le_bytes()).collect()),
            false => (Dtype::BF16, (0..n).flat_map(|_| bf16(value())).collect()),
        };
        tensors.insert(name, (dtype, shape, data));
    };
    put("model.embed_tokens.weight".into(), vec![vocab, hidden], 0.0, 0.5);
    put("model.norm.weight".into(), vec![hidden], 1.0, 0.1);
    if !tied {
        put("lm_head.weight".into(), vec![vocab, hidden], 0.0, 0.5);
    }
    let mut linears = Vec::new();
    for l in 0..layers {
        for (norm, n) in [
            ("input_layernorm", hidden),
            ("self_attn.attn_sub_norm", heads * head_dim),
            ("post_attention_layernorm", hidden),
            ("mlp.ffn_sub_norm", inter),
        ] {
            put(format!("model.layers.{l}.{norm}.weight"), vec![n], 1.0, 0.2);
        }
        for (name, rows, cols) in [
            ("self_attn.q_proj", heads * head_dim, hidden),
            ("self_attn.k_proj", kv * head_dim, hidden),
            ("self_attn.v_proj", kv * head_dim, hidden),
            ("self_attn.o_proj", hidden, heads * head_dim),
            ("mlp.gate_proj", inter, hidden),
            ("mlp.up_proj", inter, hidden),
            ("mlp.down_proj", hidden, inter),
        ] {
            let name = format!("model.layers.{l}.{name}.weight");
            put(format!("{name}_scale"), vec![1], 0.08, 0.0);
            linears.push((name, rows, cols));
        }
    }
    let mut state = 99u32;
    for (name, rows, cols) in linears {
        let mut byte = || {
            (0..4).fold(0u8, |b, i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                b | (((state >> 16) % 3) as u8) << (2 * i)
            })
        };
        let data = (0..rows / 4 * cols).map(|_| byte()).collect();
        tensors.insert(name, (Dtype::U8, vec![rows / 4, cols], data));
    }
    (config, tensors)
}

#[test]
fn other_shapes_load_and_follow_the_reference() {
    for (hidden, inter, heads, kv, head_dim, tied) in [
        (96, 200, 6, 3, 16, true),
        (320, 128, 5, 1, 64, false),
        (64, 72, 2, 2, 48, true),
        (64, 96, 16, 1, 16, true),
    ] {
        let (config, tensors) = other_shape(hidden, inter, heads, kv, head_dim, tied);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &config, &tensors);
        let model = Arc::new(load(dir.path()).unwrap());
        let ids = common::tokens(20, 96);
        let trace = Reference::new(&model).run(&ids);
        let rows = |from: usize, to: usize| -> Vec<f32> {
            trace.hidden[from..to].iter().flatten().flatten().map(|&v| v as f32).collect()
        };
        let out = session(&model, 3, 64, "f32", "dense").trace_layers(&ids, Some(&rows(0, 2))).unwrap();
        let expected = rows(1, 3);
        let close = |(a, b): &(&[f32], &[f32])| a.iter().zip(*b).all(|(x, y)| (x - y).abs() < 1e-3);
        let good = out.chunks(hidden).zip(expected.chunks(hidden)).filter(close).count();
        assert!(good >= 38, "{hidden}/{inter}/{heads}/{kv}/{head_dim}");
        let logits = session(&model, 2, 64, "f32", "dense").logits_of(&ids, 7).unwrap();
        let same = logits.chunks(96).zip(&trace.logits).filter(|(a, b)| argmax(a) == argmax(b)).count();
        assert!(same >= 18, "top-1 {same} of 20 for {hidden}/{inter}/{heads}/{kv}/{head_dim}");
    }
}

const Q: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn missing_tensors_are_named() {
    for name in
        [Q, "model.norm.weight", "model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight_scale"]
    {
        let message = refusal(|_, t| drop(t.remove(name)));
        assert!(message.contains(name) && message.contains("missing"), "{message}");
    }
}

#[test]
fn wrong_types_and_shapes_are_named() {
    let message = refusal(|_, t| t.get_mut(Q).unwrap().0 = Dtype::I8);
    assert!(message.contains(Q) && message.contains("U8"), "{message}");
    let message = refusal(|_, t| t.get_mut(Q).unwrap().1 = vec![256, 64]);
    assert!(message.contains(Q) && message.contains("[64, 256]"), "{message}");
    let message = refusal(|c, _| *c = c.replace("\"intermediate_size\": 512", "\"intermediate_size\": 768"));
    assert!(message.contains("mlp.gate_proj") && message.contains("[192, 256]"), "{message}");
    // However large the shape: nothing is allocated for a file that does not have it.
    let message =
        refusal(|c, _| *c = c.replace("\"intermediate_size\": 512", "\"intermediate_size\": 16000000"));
    assert!(message.contains("mlp.gate_proj") && message.contains("[4000000, 256]"), "{message}");
    let message = refusal(|c, _| *c = c.replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3"));
    assert!(message.contains("model.layers.3.") && message.contains("not part"), "{message}");
    let message = refusal(|c, _| *c = c.replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5"));
    assert!(message.contains("model.layers.4") && message.contains("missing"), "{message}");
    let message = refusal(|c, _| *c = c.replace("\"vocab_size\": 512", "\"vocab_size\": 513"));
    assert!(message.contains("model.embed_tokens.weight"), "{message}");
}

#[test]
fn impossible_numbers_are_named() {
    let scale = format!("{Q}_scale");
    for bits in [0x7FC0u16, 0x7F80, 0x0000, 0xBF80] {
        let message = refusal(|_, t| t.get_mut(&scale).unwrap().2 = bits.to_le_bytes().to_vec());
        assert!(message.contains(&scale), "{bits:x}: {message}");
    }
    let table = "model.embed_tokens.weight";
    let message =
        refusal(|_, t| t.get_mut(table).unwrap().2[4000..4002].copy_from_slice(&0xFF80u16.to_le_bytes()));
    assert!(message.contains(table) && message.contains("finite"), "{message}");
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let message = refusal(|_, t| drop(t.insert(bias.into(), (Dtype::BF16, vec![256], vec![0; 512]))));
    assert!(message.contains(bias) && message.contains("not part"), "{message}");
    let norm = "model.layers.0.input_layernorm.weight";
    let message =
        refusal(|_, t| t.get_mut(norm).unwrap().2[10..12].copy_from_slice(&0x7FC0u16.to_le_bytes()));
    assert!(message.contains(norm) && message.contains("index 5"), "{message}");
    let message = refusal(|_, t| t.get_mut(Q).unwrap().2[300] = 0xFF);
    assert!(message.contains(Q) && message.contains("damaged"), "{message}");
}

#[test]
fn every_truncation_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("hf_bitnet/offline");
    std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let cuts = (0..64).chain((64..bytes.len()).step_by(9973)).chain([bytes.len() - 1]);
    for cut in cuts {
        std::fs::write(dir.path().join("model.safetensors"), &bytes[..cut]).unwrap();
        assert!(load(dir.path()).is_err(), "{cut} of {} bytes were loaded", bytes.len());
    }
}

#[test]
fn hostile_headers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (config, tensors) = offline();
    write(dir.path(), &config, &tensors);
    let good = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let file = |header: &str, body: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + body, 0);
        bytes
    };
    let mut huge_length = good.clone();
    huge_length[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let overlapping = file(
        r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}"#,
        12,
    );
    let outside = file(r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,1000]}}"#, 8);
    let overflow = file(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#, 16);
    let trailing = [good.as_slice(), &[0; 5]].concat();
    for (what, bytes) in [
        ("length", huge_length),
        ("overlap", overlapping),
        ("outside", outside),
        ("overflow", overflow),
        ("trailing", trailing),
        ("empty", Vec::new()),
        ("garbage", vec![0xA5; 4096]),
    ] {
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let message = load(dir.path()).err().unwrap_or_else(|| panic!("{what} was loaded")).to_string();
        assert!(message.contains("model.safetensors"), "{what}: {message}");
    }
}

#[test]
fn absent_files_say_which() {
    let dir = tempfile::tempdir().unwrap();
    assert!(load(dir.path()).err().unwrap().to_string().contains("config.json"));
    let (config, _) = offline();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    assert!(load(dir.path()).err().unwrap().to_string().contains("model.safetensors"));
    let message = load(dir.path()).err().unwrap().to_string();
    assert!(message.contains("model.safetensors.index.json"), "{message}");
}

#[test]
fn what_is_no_checkpoint_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let said = |path: &std::path::Path| {
        let opened = longbit::Checkpoint::open(path, &longbit::OpenOptions::default());
        let shape = longbit::Checkpoint::config_of(path, &longbit::OpenOptions::default());
        let message = opened.err().unwrap().to_string();
        assert_eq!(shape.unwrap_err().to_string(), message);
        message
    };
    let message = said(&at("absent"));
    assert!(message.contains("absent") && !message.contains("config.json"), "{message}");
    std::fs::copy(fixture("hf_bitnet/offline/model.safetensors"), at("model.safetensors")).unwrap();
    let message = said(&at("model.safetensors"));
    assert!(message.contains("without config.json") && message.contains("give the directory"), "{message}");
    for name in ["b.gguf", "a.gguf"] {
        std::fs::write(at(name), "GGUF").unwrap();
    }
    let message = said(dir.path());
    assert!(message.contains("a.gguf, b.gguf") && message.contains("no config.json"), "{message}");
    std::fs::remove_file(at("a.gguf")).unwrap();
    std::fs::remove_file(at("b.gguf")).unwrap();
    let message = said(dir.path());
    assert!(message.contains("config.json") && !message.contains("gguf"), "{message}");
    #[cfg(unix)]
    {
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        assert!(said(&at("pipe")).contains("not a regular file"));
    }
}
