//! Every layout of Hugging Face checkpoints: ternary Llamas in shards, the masters of 1bitLLM, masters and packed weights of
//! BitNet. Parity with transformers, with each other, and refusals where the tensors contradict the configuration.

mod common;

use common::hf::{self, Tensors, load, refusal};
use common::{argmax, bits, fixture, session, team, tokens};
use half::{bf16, f16};
use longbit::reference::rms_norm;
use longbit::{Activation, Checkpoint, HeadFormat, Layer, Model, OpenOptions, TernaryLinear};
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;

/// Names of the linear layers of one layer, in the order of [`linears`].
const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

fn linears(layer: &Layer) -> [&TernaryLinear; 7] {
    [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down]
}

fn all_linears(model: &Model) -> Vec<&TernaryLinear> {
    model.layers.iter().flat_map(linears).collect()
}

fn floats(tensor: &(Dtype, Vec<usize>, Vec<u8>)) -> Vec<f32> {
    let two = tensor.2.as_chunks::<2>().0.iter();
    match tensor.0 {
        Dtype::BF16 => two.map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => two.map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F32 => tensor.2.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        other => panic!("{other:?}"),
    }
}

fn logits(model: Model, ids: &[u32]) -> Vec<f32> {
    session(&Arc::new(model), 2, 64, "f32", "dense").logits_of(ids, ids.len()).unwrap()
}

/// Largest difference of two equally long vectors.
fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Layers on the golden file's own inputs, and logits of the whole, against transformers. The prompts of these files keep
/// every activation away from rounding boundaries (`tie_distance` in golden.json), so that nothing but the last bits of f32
/// may differ.
fn follows_transformers(name: &str, model: Model) {
    let golden = hf::tensors(&fixture(name).join("golden.safetensors"));
    let ids: Vec<u32> =
        golden["input_ids"].2.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let model = Arc::new(model);
    let (layers, hidden, vocab) = (model.config.layers, model.config.hidden, model.config.vocab);
    let state = |l: usize| floats(&golden[&format!("hidden.{l}")]);
    let forced: Vec<f32> = (0..layers).flat_map(state).collect();
    let mut out = session(&model, 2, 64, "f32", "dense").trace_layers(&ids, Some(&forced)).unwrap();
    // The last hidden state of the golden file is after the final norm.
    for row in out[(layers - 1) * ids.len() * hidden..].chunks_mut(hidden) {
        let exact: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
        let normed = rms_norm(&exact, &model.final_norm, model.config.rms_eps);
        row.iter_mut().zip(normed).for_each(|(r, n)| *r = n as f32);
    }
    let expected: Vec<f32> = (1..=layers).flat_map(state).collect();
    for (row, (a, b)) in out.chunks(hidden).zip(expected.chunks(hidden)).enumerate() {
        let worst = furthest(a, b);
        assert!(worst <= 1e-4, "{name}: row {row} of all layers' rows is off by {worst}");
    }
    let ours = session(&model, 2, 64, "f32", "dense").logits_of(&ids, ids.len()).unwrap();
    let theirs = floats(&golden["logits"]);
    let worst = furthest(&ours, &theirs);
    println!("{name}: largest difference {worst} of {} logits", ours.len());
    assert!(worst <= 1e-4, "{name}: logits are off by {worst}");
    for (a, b) in ours.chunks(vocab).zip(theirs.chunks(vocab)) {
        assert_eq!(argmax(a), argmax(b));
    }
}

#[test]
fn a_ternary_llama_in_shards_follows_transformers() {
    let dir = fixture("hf_llama");
    let checkpoint = Checkpoint::open(&dir, &OpenOptions::default()).unwrap();
    let config = checkpoint.config();
    assert_eq!((config.head_dim, config.q_rows(), config.hidden), (128, 512, 256));
    assert!(!config.tied_head && !config.sub_norms && config.activation == Activation::Silu);
    assert_eq!(*config, Checkpoint::config_of(&dir, &OpenOptions::default()).unwrap());
    follows_transformers("hf_llama", checkpoint.load(HeadFormat::F32, &team(2)).unwrap());
}

#[test]
fn the_masters_of_1bitllm_follow_transformers() {
    let model = Model::load(&fixture("hf_1bitllm"), HeadFormat::F32, &team(2)).unwrap();
    assert!(model.config.tied_head && model.config.sub_norms && model.config.group() == 1);
    // An f32 head holds f16 numbers exactly; in bf16 some are rounded, and counted.
    assert_eq!(model.rounded, 0);
    assert!(load(&fixture("hf_1bitllm")).unwrap().rounded > 0);
    follows_transformers("hf_1bitllm", model);
}

#[test]
fn the_masters_of_bitnet_follow_transformers() {
    let model = load(&fixture("hf_bitnet/online")).unwrap();
    assert_eq!(model.rounded, 0);
    follows_transformers("hf_bitnet/online", model);
}

#[test]
fn masters_become_the_weights_that_were_packed_from_them() {
    let (online, offline) =
        ["online", "offline"].map(|v| load(&fixture("hf_bitnet").join(v)).unwrap()).into();
    for (l, (a, b)) in all_linears(&online).into_iter().zip(all_linears(&offline)).enumerate() {
        assert!(a.shape == b.shape && a.data[..] == b.data[..], "matrix {l}");
        // The packed checkpoint holds the mean in bf16; the mean itself may differ in its last bits.
        let relative = (a.scale - b.scale).abs() / b.scale;
        assert!(relative <= 1.0 / 256.0 && a.scale != 1.0, "matrix {l}: {} and {}", a.scale, b.scale);
    }
    let (divided, multiplied) = (load(&fixture("hf_bitnet/bitlinear")).unwrap(), offline);
    for (a, b) in all_linears(&divided).into_iter().zip(all_linears(&multiplied)) {
        assert!(a.data[..] == b.data[..] && (a.scale - b.scale).abs() / b.scale <= 1.0 / 128.0);
    }
}

#[test]
fn masters_are_ternary_by_their_mean() {
    for name in ["hf_1bitllm", "hf_bitnet/online"] {
        let (_, tensors) = hf::read(name);
        let model = load(&fixture(name)).unwrap();
        for (l, layer) in model.layers.iter().enumerate() {
            for (linear, key) in linears(layer).into_iter().zip(LINEARS) {
                let masters = floats(&tensors[&format!("model.layers.{l}.{key}.weight")]);
                let mean = masters.iter().map(|v| f64::from(v.abs())).sum::<f64>() / masters.len() as f64;
                assert!((f64::from(linear.scale) - mean).abs() < 1e-6 * mean, "{name} {l} {key}");
                let mut codes = vec![0; linear.shape.cols];
                for (row, masters) in masters.chunks(linear.shape.cols).enumerate() {
                    linear.unpack_row(row, &mut codes);
                    let weight = |v: &f32| (f64::from(*v) / mean).round_ties_even().clamp(-1.0, 1.0) as i8;
                    let expected: Vec<u8> = masters.iter().map(|v| (weight(v) + 1) as u8).collect();
                    assert_eq!(codes, expected, "{name} {l} {key} {row}");
                }
            }
        }
    }
}

#[test]
fn masters_load_alike_with_any_number_of_threads() {
    for name in ["hf_bitnet/online", "hf_1bitllm"] {
        let one = Model::load(&fixture(name), HeadFormat::Bf16, &team(1)).unwrap();
        for threads in [2, 3, 7] {
            let more = Model::load(&fixture(name), HeadFormat::Bf16, &team(threads)).unwrap();
            for (a, b) in all_linears(&one).into_iter().zip(all_linears(&more)) {
                assert!(a.data[..] == b.data[..] && a.scale.to_bits() == b.scale.to_bits(), "{threads}");
            }
        }
    }
}

/// Masters in f32 are those in bf16, and dead channels, whose numbers are near the smallest that bf16 has, become zeros.
#[test]
fn masters_of_every_float_type_and_size_load() {
    let (config, mut tensors) = hf::read("hf_bitnet/online");
    let before = load(&fixture("hf_bitnet/online")).unwrap();
    for tensor in tensors.values_mut() {
        let wide = floats(tensor).iter().flat_map(|v| v.to_le_bytes()).collect();
        *tensor = (Dtype::F32, tensor.1.clone(), wide);
    }
    let dir = tempfile::tempdir().unwrap();
    hf::write(dir.path(), &config, &tensors);
    let wide = load(dir.path()).unwrap();
    for (a, b) in all_linears(&before).into_iter().zip(all_linears(&wide)) {
        assert!(a.data[..] == b.data[..] && a.scale.to_bits() == b.scale.to_bits());
    }

    let (_, mut tensors) = hf::read("hf_bitnet/online");
    let gate = tensors.get_mut("model.layers.1.mlp.gate_proj.weight").unwrap();
    // Rows 2 and 511 of [512, 256].
    for row in [2, 511] {
        for (i, to) in gate.2[row * 512..(row + 1) * 512].as_chunks_mut::<2>().0.iter_mut().enumerate() {
            *to = bf16::from_f32(if i % 3 == 0 { -1e-34 } else { 1e-39 }).to_le_bytes();
        }
    }
    tensors.get_mut("model.layers.1.mlp.ffn_sub_norm.weight").unwrap().2[4..6]
        .copy_from_slice(&bf16::from_f32(1e-32).to_le_bytes());
    tensors.get_mut("model.layers.2.mlp.up_proj.weight").unwrap().2.fill(0);
    let all_tiny = tensors.get_mut("model.layers.3.mlp.up_proj.weight").unwrap();
    let tiny = bf16::from_f32(-1e-34).to_le_bytes();
    all_tiny.2.as_chunks_mut::<2>().0.fill(tiny);
    hf::write(dir.path(), &config, &tensors);
    let dead = load(dir.path()).unwrap();
    let mut codes = vec![0; 256];
    for row in [2, 511] {
        let gate = &dead.layers[1].gate;
        gate.unpack_row(row, &mut codes);
        assert_eq!(codes, [1; 256]);
    }
    for layer in [2, 3] {
        let up = &dead.layers[layer].up;
        up.unpack_row(77, &mut codes);
        assert_eq!(codes, [1; 256]);
        // The smallest mean there is.
        assert!((up.scale - 1e-5).abs() < 1e-11, "{}", up.scale);
    }
    assert!(logits(dead, &tokens(20, 512)).iter().all(|v| v.is_finite()));
}

#[test]
fn shards_are_the_same_tensors_as_one_file() {
    for (name, vocab) in [("hf_bitnet/offline", 512), ("hf_llama", 256), ("hf_1bitllm", 256)] {
        let (config, tensors) = hf::read(name);
        let ids = tokens(24, vocab);
        let mut all = Vec::new();
        for shards in [1, 2, 5] {
            let dir = tempfile::tempdir().unwrap();
            hf::write_shards(dir.path(), &config, &tensors, shards);
            all.push(bits(&logits(load(dir.path()).unwrap(), &ids)));
        }
        let dir = tempfile::tempdir().unwrap();
        hf::write(dir.path(), &config, &tensors);
        all.push(bits(&logits(load(dir.path()).unwrap(), &ids)));
        all.push(bits(&logits(load(&fixture(name)).unwrap(), &ids)));
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{name}");
    }
}

#[test]
fn files_are_hashed_in_the_order_of_their_names() {
    let (config, tensors) = hf::read("hf_llama");
    let dir = tempfile::tempdir().unwrap();
    hf::write_shards(dir.path(), &config, &tensors, 3);
    let names = ["config.json".to_string(), hf::shard(0, 3), hf::shard(1, 3), hf::shard(2, 3)];
    let hex = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let read = |name: &String| std::fs::read(dir.path().join(name)).unwrap();
    let lines: String = names.iter().map(|name| format!("{}  {name}\n", hex(&read(name)))).collect();
    let checkpoint = Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap();
    assert_eq!(checkpoint.sha256().unwrap(), hex(lines.as_bytes()));
    let size: usize = names[1..].iter().map(|name| read(name).len()).sum();
    assert_eq!(checkpoint.file_bytes(), size as u64);
}

#[test]
fn a_single_file_comes_before_an_index() {
    let (config, tensors) = hf::read("hf_llama");
    let dir = tempfile::tempdir().unwrap();
    hf::write(dir.path(), &config, &tensors);
    std::fs::write(dir.path().join("model.safetensors.index.json"), "no index").unwrap();
    assert!(load(dir.path()).is_ok());
}

/// What is said of hf_llama in three shards after `change`.
fn sharded_refusal(change: impl FnOnce(&Path, &mut std::collections::BTreeMap<String, String>)) -> String {
    let (config, tensors) = hf::read("hf_llama");
    let dir = tempfile::tempdir().unwrap();
    let mut map = hf::write_shards(dir.path(), &config, &tensors, 3);
    change(dir.path(), &mut map);
    hf::write_index(dir.path(), &map);
    load(dir.path()).err().expect("the damaged checkpoint was loaded").to_string()
}

const HEAD: &str = "lm_head.weight";

#[test]
fn an_index_names_files_of_its_own_directory_only() {
    let outside = tempfile::tempdir().unwrap();
    let (_, tensors) = hf::read("hf_llama");
    hf::write_file(&outside.path().join("all.safetensors"), &tensors);
    let absolute = outside.path().join("all.safetensors").to_str().unwrap().to_string();
    let above = format!("../{}/all.safetensors", outside.path().file_name().unwrap().to_str().unwrap());
    for name in [
        absolute.as_str(),
        above.as_str(),
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "a\\b.safetensors",
    ] {
        let message = sharded_refusal(|_, map| drop(map.insert(HEAD.into(), name.into())));
        for part in ["index.json", HEAD, "plain name"] {
            assert!(message.contains(part), "{name:?}: {message}");
        }
    }
    let message = sharded_refusal(|_, map| drop(map.insert(HEAD.into(), "absent.safetensors".into())));
    assert!(message.contains("absent.safetensors") && message.contains("no such file"), "{message}");
}

#[test]
fn an_index_and_its_files_must_agree() {
    // The index says another shard than the one that has the tensor.
    let message = sharded_refusal(|_, map| drop(map.insert(HEAD.into(), hf::shard(1, 3))));
    assert!(message.contains(HEAD) && message.contains(&hf::shard(1, 3)), "{message}");
    // The index names a tensor that no shard has.
    let message = sharded_refusal(|_, map| drop(map.insert("extra.weight".into(), hf::shard(2, 3))));
    assert!(message.contains("extra.weight") && message.contains("missing"), "{message}");
    // A shard has a tensor that the index does not name.
    let message = sharded_refusal(|_, map| drop(map.remove(HEAD)));
    assert!(message.contains(HEAD) && message.contains("does not name it"), "{message}");
    // Two shards have the same tensor.
    let message = sharded_refusal(|dir, _| {
        let path = dir.join(hf::shard(2, 3));
        let mut last = hf::tensors(&path);
        last.insert(HEAD.into(), hf::tensors(&dir.join(hf::shard(0, 3)))[HEAD].clone());
        hf::write_file(&path, &last);
    });
    let both = message.contains(&hf::shard(0, 3)) && message.contains(&hf::shard(2, 3));
    assert!(both && message.contains(HEAD), "{message}");
    // A shard is cut off, or is no safetensors file.
    let message = sharded_refusal(|dir, _| {
        let path = dir.join(hf::shard(1, 3));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(message.contains(&hf::shard(1, 3)) && message.contains("not a valid"), "{message}");
    // A tensor of the architecture is nowhere: the index is where one would look.
    let message = sharded_refusal(|dir, map| {
        map.remove(HEAD);
        let path = dir.join(hf::shard(0, 3));
        let mut first = hf::tensors(&path);
        first.remove(HEAD);
        hf::write_file(&path, &first);
    });
    assert!(
        message.contains("index.json") && message.contains(HEAD) && message.contains("missing"),
        "{message}"
    );
}

#[test]
fn damaged_indexes_say_what_is_wrong() {
    let (config, _) = hf::read("hf_llama");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let said = || load(dir.path()).err().unwrap().to_string();
    let nothing = said();
    assert!(nothing.contains("model.safetensors and model.safetensors.index.json"), "{nothing}");
    let index = dir.path().join("model.safetensors.index.json");
    for (text, reason) in [
        ("", "not the index"),
        ("{", "not the index"),
        ("{}", "weight_map"),
        ("[1]", "not the index"),
        (r#"{"weight_map": 3}"#, "not the index"),
        (r#"{"weight_map": {"a": 3}}"#, "not the index"),
        (r#"{"weight_map": {}}"#, "weight_map is empty"),
    ] {
        std::fs::write(&index, text).unwrap();
        let message = said();
        assert!(message.contains("index.json") && message.contains(reason), "{text}: {message}");
    }
    let file = std::fs::File::create(&index).unwrap();
    file.set_len((16 << 20) + 1).unwrap();
    assert!(said().contains("more than 16777216 bytes"), "{}", said());
    std::fs::remove_file(&index).unwrap();
    std::fs::create_dir(&index).unwrap();
    assert!(said().contains("not a regular file"), "{}", said());
}

const Q: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn tensors_that_contradict_the_config_are_refused_with_both_sides() {
    let to_online = |c: &mut String, _: &mut Tensors| *c = c.replace("\"offline\"", "\"online\"");
    let message = refusal("hf_bitnet/offline", to_online);
    for part in ["model.layers.0.self_attn.q_proj.weight", "type U8", "BF16", "online", "master"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let message = refusal("hf_bitnet/online", |c, _| *c = c.replace("\"online\"", "\"offline\""));
    for part in ["model.layers.0.self_attn.q_proj.weight", "type BF16", "U8", "offline", "packed"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let scale = format!("{Q}_scale");
    let message = refusal("hf_bitnet/online", |_, t| {
        t.insert(scale.clone(), (Dtype::BF16, vec![1], bf16::ONE.to_le_bytes().to_vec()));
    });
    for part in [scale.as_str(), "present", "online", "without a weight_scale"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let message =
        refusal("hf_1bitllm", |_, t| *t.get_mut(Q).unwrap() = (Dtype::U8, vec![32, 128], vec![0x55; 4096]));
    for part in [Q, "type U8", "BitnetForCausalLM", "float master weights"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let message =
        refusal("hf_llama", |_, t| *t.get_mut(Q).unwrap() = (Dtype::BF16, vec![512, 256], vec![0; 262_144]));
    for part in [Q, "type BF16", "bitlinear", "U8"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn each_family_has_its_own_norms() {
    // The masters of 1bitLLM under the names of BitNet, and the other way round.
    let message = refusal("hf_1bitllm", |_, t| {
        let name = "model.layers.0.self_attn.inner_attn_ln.weight";
        let norm = t.remove(name).unwrap();
        t.insert(name.replace("inner_attn_ln", "attn_sub_norm"), norm);
    });
    assert!(message.contains("self_attn.inner_attn_ln") && message.contains("missing"), "{message}");
    let message =
        refusal("hf_bitnet/offline", |c, _| *c = c.replace("BitNetForCausalLM", "LlamaForCausalLM"));
    assert!(message.contains("sub_norm") && message.contains("not part"), "{message}");
    let message = refusal("hf_llama", |_, t| {
        t.insert(
            "model.layers.0.mlp.down_proj.rms_norm.weight".into(),
            (Dtype::BF16, vec![512], vec![0; 1024]),
        );
    });
    assert!(message.contains("rms_norm") && message.contains("not part"), "{message}");
    let message = refusal("hf_llama", |_, t| drop(t.remove(HEAD)));
    assert!(message.contains(HEAD) && message.contains("missing"), "{message}");
}

#[test]
fn masters_that_are_no_numbers_are_refused() {
    for value in [f16::INFINITY, f16::NAN] {
        let message =
            refusal("hf_1bitllm", |_, t| t.get_mut(Q).unwrap().2[6..8].copy_from_slice(&value.to_le_bytes()));
        assert!(message.contains(Q) && message.contains("not finite"), "{message}");
    }
    let message = refusal("hf_bitnet/online", |_, t| t.get_mut(Q).unwrap().1 = vec![64, 1024]);
    assert!(
        message.contains(Q) && message.contains("[64, 1024]") && message.contains("[256, 256]"),
        "{message}"
    );
}
