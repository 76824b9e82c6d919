//! Models in GGUF: whatever is written reads back to the same bits, files of other writers are read as they mean it, and
//! what a file does not say is asked for, never guessed.

mod common;

use common::{bits, fixture, session, team, tokens};
use half::{bf16, f16};
use longbit::convert::{GgufOptions, Vocabulary, write_gguf, write_safetensors};
use longbit::formats::{Encoding, I2sLayout, encode_row};
use longbit::gguf::{Header, Metadata, TensorType, Value, Writer};
use longbit::{Activation, Checkpoint, Error, Model, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const ANY: OpenOptions = OpenOptions { i2s: None, activation: None };

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path, &ANY).unwrap()
}

fn refusal(path: &Path, options: &OpenOptions) -> String {
    match Checkpoint::open(path, options).map(|c| c.load(c.exact_head(), &team(2))) {
        Ok(Ok(_)) => panic!("{} was loaded", path.display()),
        Ok(Err(error)) | Err(error) => error.to_string(),
    }
}

fn logits(model: Model) -> Vec<u32> {
    let ids = tokens(20, model.config.vocab as u32);
    bits(&session(&Arc::new(model), 2, 64, "f32", "dense").logits_of(&ids, 7).unwrap())
}

fn logits_at(path: &Path, options: &OpenOptions) -> Vec<u32> {
    let checkpoint = Checkpoint::open(path, options).unwrap();
    logits(checkpoint.load(checkpoint.exact_head(), &team(2)).unwrap())
}

fn convert(from: &Path, to: &Path, linear: Encoding, head: Encoding) -> Result<(), Error> {
    let checkpoint = open(from);
    let model = checkpoint.load(checkpoint.exact_head(), &team(2))?;
    let vocabulary = Vocabulary::of(&checkpoint)?;
    write_gguf(&model, &vocabulary, GgufOptions { linear, head }, to, &mut |_, _| {}).map(|_| ())
}

/// A GGUF file taken apart, to be put together in another way.
#[derive(Clone)]
struct Parts {
    metadata: Metadata,
    tensors: Vec<(String, Vec<u64>, TensorType, Vec<u8>)>,
}

impl Parts {
    /// The tiny checkpoint as I2_S with a bf16 head.
    fn tiny(dir: &Path) -> Self {
        let path = dir.join("tiny.gguf");
        convert(&fixture("hf_bitnet/offline"), &path, Encoding::I2s(I2sLayout::X86), Encoding::Bf16).unwrap();
        Parts::read(&path)
    }

    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let header = Header::parse(&bytes).unwrap();
        let tensors = header
            .tensors
            .iter()
            .map(|t| (t.name.clone(), t.dims.clone(), t.kind, bytes[t.range.clone().unwrap()].to_vec()));
        Parts { tensors: tensors.collect(), metadata: header.metadata }
    }

    /// The same under another architecture, without the keys whose names contain one of `but`.
    fn renamed(mut self, arch: &str, but: &[&str]) -> Self {
        let mut metadata = Metadata::new();
        for (key, value) in self.metadata.iter().filter(|(key, _)| !but.iter().any(|b| key.contains(b))) {
            metadata.set(key.replace("bitnet-b1.58.", &format!("{arch}.")), value.clone());
        }
        metadata.set("general.architecture", Value::String(arch.into()));
        self.metadata = metadata;
        self
    }

    fn write(&self, path: &Path) -> PathBuf {
        let mut writer = Writer::new(self.metadata.clone()).unwrap();
        for (name, dims, kind, _) in &self.tensors {
            writer.tensor(name.clone(), dims, *kind).unwrap();
        }
        let mut file = std::fs::File::create(path).unwrap();
        writer.write(&mut file, |i, out| out.write_all(&self.tensors[i].3)).unwrap();
        path.to_path_buf()
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, TensorType, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }
}

#[test]
fn every_round_trip_keeps_every_bit_of_the_logits() {
    let dir = tempfile::tempdir().unwrap();
    for source in ["hf_bitnet/offline", "hf_bitnet/online", "hf_bitnet/bitlinear", "hf_llama"] {
        let direct = logits_at(&fixture(source), &ANY);
        for (name, linear) in GgufOptions::LINEAR {
            for (head_name, head) in [("bf16", Encoding::Bf16), ("f32", Encoding::F32)] {
                let path = dir.path().join(format!("{}-{name}-{head_name}.gguf", source.replace('/', "-")));
                convert(&fixture(source), &path, linear, head).unwrap();
                assert_eq!(logits_at(&path, &ANY), direct, "{source} as {name} with a {head_name} head");
            }
        }
    }
}

#[test]
fn f16_masters_of_odd_width_make_the_trip_in_what_fits_them() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("hf_1bitllm");
    let path = dir.path().join("silu.gguf");
    convert(&source, &path, Encoding::I2s(I2sLayout::X86), Encoding::F16).unwrap();
    assert_eq!(logits_at(&path, &ANY), logits_at(&source, &ANY));
    assert_eq!(Parts::read(&path).metadata.str("general.architecture").unwrap(), Some("bitnet"));
    // 128 columns are half a block of TQ2_0.
    let error = convert(&source, &path, Encoding::Tq2_0, Encoding::F16).unwrap_err().to_string();
    assert!(error.contains("attn_q") && error.contains("256") && error.contains("--type"), "{error}");
}

#[test]
fn packed_safetensors_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    for source in ["hf_bitnet/offline", "hf_bitnet/online", "hf_bitnet/bitlinear", "hf_llama", "hf_1bitllm"] {
        let checkpoint = open(&fixture(source));
        let model = checkpoint.load(checkpoint.exact_head(), &team(2)).unwrap();
        let out = dir.path().join(source.replace('/', "-"));
        let vocabulary = Vocabulary::of(&checkpoint).unwrap();
        write_safetensors(&model, &vocabulary, &out).unwrap();
        assert_eq!(logits_at(&out, &ANY), logits(model), "{source}");
    }
    // What came packed leaves packed in the same bytes.
    let weights = |dir: &Path| {
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let all = tensors.iter().map(|(n, v)| (n.to_string(), (v.shape().to_vec(), v.data().to_vec())));
        all.collect::<std::collections::BTreeMap<_, _>>()
    };
    assert_eq!(weights(&dir.path().join("hf_bitnet-offline")), weights(&fixture("hf_bitnet/offline")));
}

#[test]
fn quantised_heads_stay_close() {
    let dir = tempfile::tempdir().unwrap();
    let float = |bits: Vec<u32>| bits.into_iter().map(f32::from_bits).collect::<Vec<f32>>();
    let exact = float(logits_at(&fixture("hf_bitnet/offline"), &ANY));
    let norm = exact.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    // The head is the embedding: its error moves activations over rounding boundaries in every layer.
    for (name, bound) in [("f16", 1e-6), ("q8_0", 0.08), ("q6_k", 0.15), ("q5_0", 0.3), ("q4_0", 0.5)] {
        let path = dir.path().join(format!("{name}.gguf"));
        let head = GgufOptions::HEAD.iter().find(|(n, _)| *n == name).unwrap().1;
        convert(&fixture("hf_bitnet/offline"), &path, Encoding::Tq2_0, head).unwrap();
        let found = float(logits_at(&path, &ANY));
        let error =
            found.iter().zip(&exact).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt() / norm;
        println!("{name}: relative error {error:.4}");
        assert!(error <= bound, "{name}: {error}");
        assert!(name == "f16" || error > 0.0, "{name} changed nothing");
    }
}

#[test]
fn the_activation_is_the_architectures_own_and_never_silu_for_2b_4t() {
    let dir = tempfile::tempdir().unwrap();
    let parts = Parts::tiny(dir.path());
    let write = |arch: &str, but: &[&str]| {
        parts.clone().renamed(arch, but).write(&dir.path().join(format!("{arch}-{}.gguf", but.len())))
    };
    let activation = |path: &Path| open(path).config().activation;
    for arch in ["bitnet-25", "bitnet-b1.58"] {
        let silent = write(arch, &["hidden_activation"]);
        assert_eq!(activation(&silent), Activation::Relu2, "{arch}");
        let silu = OpenOptions { activation: Some(Activation::Silu), ..ANY };
        let message = refusal(&silent, &silu);
        assert!(message.contains("silu") && message.contains(arch) && message.contains("relu2"), "{message}");
    }
    // Two families share this name, and this file has grouped heads but is not 2B-4T: it has to be said.
    let silent = write("bitnet", &["hidden_activation"]);
    let message = refusal(&silent, &ANY);
    assert!(message.contains("--activation relu2") && message.contains("--activation silu"), "{message}");
    for wanted in [Activation::Relu2, Activation::Silu] {
        let options = OpenOptions { activation: Some(wanted), ..ANY };
        assert_eq!(Checkpoint::open(&silent, &options).unwrap().config().activation, wanted);
    }
    // The key decides, and a flag does not overrule it.
    let told = write("bitnet", &[]);
    assert_eq!(activation(&told), Activation::Relu2);
    let message = refusal(&told, &OpenOptions { activation: Some(Activation::Silu), ..ANY });
    assert!(message.contains("hidden_activation"), "{message}");
    let mut odd = parts.clone();
    odd.metadata.set("bitnet-b1.58.hidden_activation", Value::String("gelu".into()));
    assert!(refusal(&odd.write(&dir.path().join("gelu.gguf")), &ANY).contains("`gelu`"));
    let mut both = parts.clone();
    both.metadata.set("bitnet-b1.58.hidden_act", Value::String("silu".into()));
    let message = refusal(&both.write(&dir.path().join("both.gguf")), &ANY);
    for part in ["hidden_activation says relu2", "hidden_act says silu", "agree"] {
        assert!(message.contains(part), "{message}");
    }
    both.metadata.set("bitnet-b1.58.hidden_act", Value::String("relu_sqr".into()));
    assert_eq!(activation(&both.write(&dir.path().join("both.gguf"))), Activation::Relu2);
    // And it makes the difference that it should: the same weights say something else with SiLU.
    let other = OpenOptions { activation: Some(Activation::Silu), ..ANY };
    assert_ne!(logits_at(&silent, &other), logits_at(&told, &ANY));
    assert_eq!(logits_at(&told, &ANY), logits_at(&fixture("hf_bitnet/offline"), &ANY));
}

/// A file with a header and nothing behind it: what is known of an architecture `bitnet` from its shape alone, as
/// `[vocabulary, hidden, intermediate, layers, heads, key/value heads]`.
fn header_only(dir: &Path, shape: [u64; 6]) -> PathBuf {
    let [vocab, hidden, intermediate, layers, heads, kv_heads] = shape;
    let path = dir.join("shape.gguf");
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String("bitnet".into()));
    for (key, value) in [
        ("embedding_length", hidden),
        ("block_count", layers),
        ("feed_forward_length", intermediate),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
    ] {
        metadata.set(format!("bitnet.{key}"), Value::U32(value as u32));
    }
    metadata.set("bitnet.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    metadata.set("bitnet.rope.freq_base", Value::F32(500_000.0));
    let mut writer = Writer::new(metadata).unwrap();
    writer.tensor("token_embd.weight", &[hidden, vocab], TensorType::F16).unwrap();
    // The numbers of the embedding are a hole in the file: only the shape is read.
    let mut head = Vec::new();
    let error = writer.write(&mut head, |_, _| Err(std::io::Error::other("no data"))).unwrap_err();
    assert!(error.to_string().contains("no data"), "{error}");
    let file = std::fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut &file, &head).unwrap();
    file.set_len(head.len() as u64 + 2 * hidden * vocab + 4096).unwrap();
    path
}

const SHAPE_2B_4T: [u64; 6] = [128_256, 2560, 6912, 30, 20, 5];

/// Mainline's converter writes 2B-4T under `bitnet` without a word about the activation, and runs it with SiLU.
#[test]
fn the_shape_of_2b_4t_means_squared_relu_under_any_architecture() {
    let dir = tempfile::tempdir().unwrap();
    let path = header_only(dir.path(), SHAPE_2B_4T);
    let config = Checkpoint::config_of(&path, &ANY).unwrap();
    assert_eq!((config.activation, config.parameters()), (Activation::Relu2, 2_412_820_480));
}

#[test]
fn a_silent_bitnet_file_is_1bitllms_only_with_its_heads_and_its_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let of = |shape, activation| {
        let config =
            Checkpoint::config_of(&header_only(dir.path(), shape), &OpenOptions { activation, ..ANY });
        config.map(|c| c.activation).map_err(|e| e.to_string())
    };
    // The 3B of 1bitLLM, and LLaMA's vocabulary without the two tokens added.
    for vocab in [32_002, 32_000] {
        assert_eq!(of([vocab, 3200, 8640, 26, 32, 32], None), Ok(Activation::Silu));
    }
    // Another vocabulary or grouped heads: nothing says what the model was trained with.
    for shape in [[128_256, 3200, 8640, 26, 32, 32], [32_002, 3200, 8640, 26, 32, 8]] {
        let message = of(shape, None).unwrap_err();
        assert!(message.contains("--activation relu2"), "{message}");
        assert_eq!(of(shape, Some(Activation::Silu)), Ok(Activation::Silu));
    }
    // What was inferred from a shape, the user may know better.
    assert_eq!(of([32_002, 3200, 8640, 26, 32, 32], Some(Activation::Relu2)), Ok(Activation::Relu2));
    assert_eq!(of(SHAPE_2B_4T, Some(Activation::Silu)), Ok(Activation::Silu));
}

#[test]
fn heads_without_groups_alone_say_nothing_of_the_activation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mha.gguf");
    convert(&fixture("hf_1bitllm"), &path, Encoding::I2s(I2sLayout::X86), Encoding::F16).unwrap();
    let silent = Parts::read(&path).renamed("bitnet", &["hidden_activation"]).write(&path);
    assert!(refusal(&silent, &ANY).contains("--activation silu"));
    let silu = OpenOptions { activation: Some(Activation::Silu), ..ANY };
    assert_eq!(logits_at(&silent, &silu), logits_at(&fixture("hf_1bitllm"), &ANY));
}

#[test]
fn the_byte_order_of_i2_s_is_told_or_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let direct = logits_at(&fixture("hf_bitnet/offline"), &ANY);
    for layout in [I2sLayout::X86, I2sLayout::Arm] {
        let path = dir.path().join("told.gguf");
        convert(&fixture("hf_bitnet/offline"), &path, Encoding::I2s(layout), Encoding::Bf16).unwrap();
        assert_eq!(logits_at(&path, &ANY), direct);
        let other = if layout == I2sLayout::X86 { I2sLayout::Arm } else { I2sLayout::X86 };
        let message = refusal(&path, &OpenOptions { i2s: Some(other), ..ANY });
        assert!(message.contains("longbit.i2_s.layout"), "{message}");

        let silent =
            Parts::read(&path).renamed("bitnet-b1.58", &["i2_s"]).write(&dir.path().join("silent.gguf"));
        let message = refusal(&silent, &ANY);
        assert!(message.contains("--i2s x86") && message.contains("--i2s arm"), "{message}");
        assert_eq!(logits_at(&silent, &OpenOptions { i2s: Some(layout), ..ANY }), direct);
        // Read the wrong way the model is another one: a guess would not be noticed.
        assert_ne!(logits_at(&silent, &OpenOptions { i2s: Some(other), ..ANY }), direct);
    }
}

/// Weights as other writers leave them: dequantised floats, or master weights.
#[test]
fn floats_are_taken_for_ternary_only_where_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let direct = logits_at(&fixture("hf_bitnet/offline"), &ANY);
    let parts = Parts::tiny(dir.path());
    for kind in [TensorType::F32, TensorType::F16, TensorType::Bf16] {
        let mut floats = parts.clone();
        for (_, dims, found, data) in floats.tensors.iter_mut().filter(|t| t.2 == TensorType::I2S) {
            let (rows, cols) = (dims[1] as usize, dims[0] as usize);
            let matrix =
                longbit::formats::Matrix::new(Encoding::I2s(I2sLayout::X86), rows, cols, data).unwrap();
            let mut values = vec![0.0f32; cols];
            let mut out = Vec::new();
            for row in 0..rows {
                matrix.dequantize_row(row, &mut values).unwrap();
                for v in &values {
                    match kind {
                        TensorType::F32 => out.extend(v.to_le_bytes()),
                        TensorType::F16 => out.extend(f16::from_f32(*v).to_le_bytes()),
                        _ => out.extend(bf16::from_f32(*v).to_le_bytes()),
                    }
                }
            }
            (*found, *data) = (kind, out);
        }
        let path = floats.write(&dir.path().join("floats.gguf"));
        assert_eq!(logits_at(&path, &ANY), direct, "{kind:?}");
    }
    // One weight of another magnitude, in a format that nobody keeps master weights in: no b1.58 matrix.
    let mut odd = parts.clone();
    let (_, dims, kind, data) = odd.tensor("blk.1.attn_q.weight");
    let mut values = vec![0.5f32; dims[0] as usize];
    values[7] = 0.1;
    *kind = TensorType::Q8_0;
    data.clear();
    (0..dims[1]).for_each(|_| encode_row(Encoding::Q8_0, &values, data).unwrap());
    let message = refusal(&odd.write(&dir.path().join("odd.gguf")), &ANY);
    assert!(message.contains("blk.1.attn_q.weight") && message.contains("ternary"), "{message}");
}

#[test]
fn a_head_stored_twice_is_tied() {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = Parts::tiny(dir.path()).renamed("bitnet-25", &[]);
    let mut twice = parts.tensor("token_embd.weight").clone();
    twice.0 = "output.weight".into();
    parts.tensors.push(twice);
    let path = parts.write(&dir.path().join("twice.gguf"));
    assert!(open(&path).config().tied_head);
    assert_eq!(logits_at(&path, &ANY), logits_at(&fixture("hf_bitnet/offline"), &ANY));
    // Another table is another head.
    parts.tensor("output.weight").3[1000] ^= 0x40;
    assert!(!open(&parts.write(&path)).config().tied_head);
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let parts = Parts::tiny(dir.path());
    let path = dir.path().join("bad.gguf");
    let refused = |change: &dyn Fn(&mut Parts)| {
        let mut changed = parts.clone();
        change(&mut changed);
        refusal(&changed.write(&path), &ANY)
    };
    let unsupported = refused(&|p| *p = p.clone().renamed("gemma", &[]));
    assert!(unsupported.contains("`gemma`") && unsupported.contains("bitnet-b1.58"), "{unsupported}");
    let lrc = refused(&|p| {
        p.tensors.push(("blk.0.attn_q.lrc_U".into(), vec![4], TensorType::F32, vec![0; 16]));
    });
    assert!(lrc.contains("blk.0.attn_q.lrc_U") && lrc.contains("not part"), "{lrc}");
    let missing = refused(&|p| p.tensors.retain(|t| t.0 != "blk.3.ffn_sub_norm.weight"));
    assert!(missing.contains("blk.3.ffn_sub_norm.weight") && missing.contains("missing"), "{missing}");
    let shape = refused(&|p| p.metadata.set("bitnet-b1.58.feed_forward_length", Value::U32(768)));
    assert!(shape.contains("ffn_gate") && shape.contains("[256, 768]"), "{shape}");
    let heads = refused(&|p| p.metadata.set("bitnet-b1.58.attention.head_count_kv", Value::U32(3)));
    assert!(heads.contains("num_key_value_heads (3)"), "{heads}");
    let layers = refused(&|p| p.metadata.set("bitnet-b1.58.block_count", Value::U64(u64::MAX)));
    assert!(layers.contains("block_count") || layers.contains("num_hidden_layers"), "{layers}");
    let kind = refused(&|p| p.metadata.set("bitnet-b1.58.block_count", Value::String("4".into())));
    assert!(kind.contains("block_count"), "{kind}");
    let rope = refused(&|p| p.metadata.set("bitnet-b1.58.rope.scaling.type", Value::String("yarn".into())));
    assert!(rope.contains("`yarn`"), "{rope}");
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        for kind in [None, Some("none")] {
            let factor = refused(&|p| {
                p.metadata.set(format!("bitnet-b1.58.{key}"), Value::F32(4.0));
                if let Some(kind) = kind {
                    p.metadata.set("bitnet-b1.58.rope.scaling.type", Value::String(kind.into()));
                }
            });
            assert!(factor.contains(key) && factor.contains("is 4;"), "{factor}");
        }
        for plain in [0.0, 1.0] {
            let mut changed = parts.clone();
            changed.metadata.set(format!("bitnet-b1.58.{key}"), Value::F32(plain));
            open(&changed.write(&path));
        }
    }
    let part = refused(&|p| {
        p.metadata =
            [("split.no", 1), ("split.count", 3)].map(|(k, v)| (k, Value::U16(v))).into_iter().collect();
    });
    assert!(part.contains("part 2") && part.contains("llama-gguf-split --merge"), "{part}");
    let code = refused(&|p| p.tensor("blk.2.attn_v.weight").3[40] = 0xFF);
    assert!(code.contains("blk.2.attn_v.weight") && code.contains("damaged"), "{code}");
    let scale = refused(&|p| {
        let data = &mut p.tensor("blk.2.attn_v.weight").3;
        let at = data.len() - 32;
        data[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(scale.contains("blk.2.attn_v.weight"), "{scale}");
    let norm = refused(&|p| {
        p.tensor("blk.1.attn_norm.weight").3[8..12].copy_from_slice(&f32::INFINITY.to_le_bytes())
    });
    assert!(norm.contains("blk.1.attn_norm.weight") && norm.contains("index 2"), "{norm}");
    let table = refused(&|p| p.tensor("token_embd.weight").3[2..4].copy_from_slice(&[0x80, 0x7F]));
    assert!(table.contains("token_embd.weight") && table.contains("finite"), "{table}");
    for (kind, size) in [(TensorType::Tl1, 256 * 256 / 4 + 32), (TensorType::Tl2, 256 * 256 / 4 + 32)] {
        let mut changed = parts.clone();
        let tensor = changed.tensor("blk.0.attn_q.weight");
        (tensor.2, tensor.3) = (kind, vec![0; size]);
        // The container knows no size for it; a type that has one is written and its number then changed.
        tensor.2 = TensorType::I2S;
        tensor.3.resize(256 * 256 / 4 + 32, 0);
        let file = changed.write(&path);
        let mut bytes = std::fs::read(&file).unwrap();
        let name = b"blk.0.attn_q.weight";
        let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 4 + 16;
        bytes[at..at + 4].copy_from_slice(&kind.id().to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        let message = refusal(&file, &ANY);
        assert!(message.contains("blk.0.attn_q.weight") && message.contains("tiles"), "{kind:?}: {message}");
    }
}

#[test]
fn tables_and_norms_are_not_ternary() {
    let dir = tempfile::tempdir().unwrap();
    let parts = Parts::tiny(dir.path());
    let path = dir.path().join("bad.gguf");
    for (name, kind, size, why) in [
        ("token_embd.weight", TensorType::Tq2_0, 66 * 512, "not ternary"),
        ("token_embd.weight", TensorType::I2S, 256 * 512 / 4 + 32, "not ternary"),
        ("output_norm.weight", TensorType::Tq2_0, 66, "norms and scales are f32"),
        ("blk.0.attn_norm.weight", TensorType::Q8_0, 34 * 8, "norms and scales are f32"),
    ] {
        let mut changed = parts.clone();
        let tensor = changed.tensor(name);
        (tensor.2, tensor.3) = (kind, vec![0; size]);
        let message = refusal(&changed.write(&path), &ANY);
        for part in [name, kind.name(), why] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    // Neither the byte order of I2_S nor its absence is any matter of a table.
    let mut changed = parts.renamed("bitnet-b1.58", &["i2_s"]);
    let tensor = changed.tensor("token_embd.weight");
    (tensor.2, tensor.3) = (TensorType::I2S, vec![0; 256 * 512 / 4 + 32]);
    assert!(!refusal(&changed.write(&path), &ANY).contains("--i2s"));
}

/// Matrices of one row are listed with one dimension or with two; vectors too.
#[test]
fn a_matrix_of_one_row_is_a_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = Parts::tiny(dir.path());
    parts.metadata.set("bitnet-b1.58.vocab_size", Value::U32(1));
    parts.metadata.set("bitnet-b1.58.feed_forward_length", Value::U32(1));
    let f32s = |n: usize| std::iter::repeat_n(0.5f32.to_le_bytes(), n).flatten().collect::<Vec<u8>>();
    for (name, dims, kind, data) in &mut parts.tensors {
        match name.rsplit('.').nth(1) {
            Some("token_embd") => (*dims, *data) = (vec![256, 1], data[..512].to_vec()),
            Some("ffn_gate" | "ffn_up") => (*dims, *kind, *data) = (vec![256, 1], TensorType::F32, f32s(256)),
            Some("ffn_down") => (*dims, *kind, *data) = (vec![1, 256], TensorType::F32, f32s(256)),
            Some("ffn_sub_norm") => (*dims, *data) = (vec![1], f32s(1)),
            _ => {}
        }
    }
    let path = parts.write(&dir.path().join("two.gguf"));
    assert_eq!((open(&path).config().vocab, open(&path).config().intermediate), (1, 1));
    let direct = logits_at(&path, &ANY);
    let mut flat = parts.clone();
    for (_, dims, ..) in &mut flat.tensors {
        match dims[..] {
            [cols, 1] => *dims = vec![cols],
            [cols] => *dims = vec![cols, 1],
            _ => {}
        }
    }
    assert_eq!(logits_at(&flat.write(&dir.path().join("one.gguf")), &ANY), direct);
    // Blocks of numbers cannot hold the one column of its down projection, which is said before anything is written.
    let again = dir.path().join("again.gguf");
    let model = open(&path).load(longbit::HeadFormat::F32, &team(1)).unwrap();
    let options = GgufOptions { linear: Encoding::Iq2Bn, head: Encoding::F32 };
    let error = write_gguf(&model, &Vocabulary::none("one"), options, &again, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("ffn_down") && !again.exists(), "{error}");
}

#[test]
fn errors_about_interleaved_rows_name_the_row_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("llama.gguf");
    convert(&fixture("hf_llama"), &path, Encoding::Iq2Bn, Encoding::Bf16).unwrap();
    let mut parts = Parts::read(&path);
    let (_, dims, _, data) = parts.tensor("blk.1.attn_q.weight");
    let width = data.len() / dims[1] as usize;
    // A row that the model has in place 65.
    data[3 * width..3 * width + 4].copy_from_slice(&7f32.to_le_bytes());
    let message = refusal(&parts.write(&path), &ANY);
    assert!(
        message.contains("blk.1.attn_q.weight") && message.contains("row 3 has the scale 7"),
        "{message}"
    );
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    Parts::tiny(dir.path());
    let bytes = std::fs::read(dir.path().join("tiny.gguf")).unwrap();
    let header = Header::parse(&bytes).unwrap();
    let path = dir.path().join("cut.gguf");
    let edges = header.tensors.iter().flat_map(|t| {
        let range = t.range.clone().unwrap();
        [range.start, range.start + 1, range.end - 1]
    });
    let cuts =
        (0..256).chain((256..header.data_start as usize).step_by(37)).chain(edges).chain([bytes.len() - 40]);
    for cut in cuts {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        assert!(Checkpoint::open(&path, &ANY).is_err(), "{cut} of {} bytes were opened", bytes.len());
    }
}

#[test]
fn a_checkpoint_is_identified_by_what_sha256sum_prints() {
    use sha2::{Digest, Sha256};
    let hex = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let dir = tempfile::tempdir().unwrap();
    Parts::tiny(dir.path());
    let path = dir.path().join("tiny.gguf");
    assert_eq!(open(&path).sha256().unwrap(), hex(&std::fs::read(&path).unwrap()));
    let source = fixture("hf_llama");
    let mut lines = String::new();
    for name in ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        lines += &format!("{}  {name}\n", hex(&std::fs::read(source.join(name)).unwrap()));
    }
    assert_eq!(open(&source).sha256().unwrap(), hex(lines.as_bytes()));
}
