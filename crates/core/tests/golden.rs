//! Parity with Hugging Face transformers on the tiny checkpoints in `fixtures/hf_bitnet` (their `golden.json` names the
//! versions), and with this crate's own reference forward.

mod common;

use common::{argmax, fixture, session, team};
use longbit::reference::{Reference, quantize, rms_norm};
use longbit::{Activation, HeadFormat, Model, ModelConfig};
use safetensors::SafeTensors;
use std::sync::Arc;

struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    fn load() -> Self {
        Golden { bytes: std::fs::read(fixture("hf_bitnet/golden.safetensors")).unwrap() }
    }

    /// A tensor of 4-byte numbers.
    fn raw(&self, name: &str) -> (Vec<[u8; 4]>, Vec<usize>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = tensors.tensor(name).unwrap();
        (view.data().as_chunks::<4>().0.to_vec(), view.shape().to_vec())
    }

    fn f32(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let (raw, shape) = self.raw(name);
        (raw.into_iter().map(f32::from_le_bytes).collect(), shape)
    }

    fn ids(&self) -> Vec<u32> {
        self.raw("input_ids").0.into_iter().map(u32::from_le_bytes).collect()
    }

    /// The streams before each layer, `[layers][tokens][hidden]`.
    fn before_layers(&self, layers: usize) -> Vec<f32> {
        (0..layers).flat_map(|l| self.f32(&format!("hidden.{l}")).0).collect()
    }
}

fn load(variant: &str) -> Arc<Model> {
    Arc::new(Model::load(&fixture("hf_bitnet").join(variant), HeadFormat::Bf16, &team(2)).unwrap())
}

/// Share of rows of `width` whose largest difference is within `tolerance`.
fn rows_within(a: &[f32], b: &[f32], width: usize, tolerance: f32) -> f64 {
    let rows = a.chunks(width).zip(b.chunks(width));
    let good = rows.filter(|(x, y)| x.iter().zip(*y).all(|(p, q)| (p - q).abs() <= tolerance)).count();
    good as f64 / (a.len() / width) as f64
}

#[test]
fn teacher_forced_layers_agree_to_1e_4_on_98_percent_of_rows() {
    let (golden, model) = (Golden::load(), load("offline"));
    let (ids, hidden, layers) = (golden.ids(), model.config.hidden, model.config.layers);
    let forced = golden.before_layers(layers);
    let mut session = session(&model, 2, 64, "f32", "dense");
    let out = session.trace_layers(&ids, Some(&forced)).unwrap();
    let per_layer = ids.len() * hidden;
    let mut good = 0.0;
    for l in 0..layers {
        let mut ours = out[l * per_layer..(l + 1) * per_layer].to_vec();
        if l + 1 == layers {
            // The last hidden state of the golden file is after the final norm.
            for row in ours.chunks_mut(hidden) {
                let exact: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
                let normed = rms_norm(&exact, &model.final_norm, model.config.rms_eps);
                row.iter_mut().zip(normed).for_each(|(r, n)| *r = n as f32);
            }
        }
        let share = rows_within(&ours, &golden.f32(&format!("hidden.{}", l + 1)).0, hidden, 1e-4);
        println!("layer {l}: {:.1} % of rows within 1e-4", 100.0 * share);
        good += share / layers as f64;
    }
    assert!(good >= 0.98, "{good}");
}

#[test]
fn logits_choose_the_same_token_at_95_percent_of_positions() {
    let golden = Golden::load();
    let ids = golden.ids();
    for variant in ["offline", "online", "bitlinear"] {
        let model = load(variant);
        let (expected, shape) = golden.f32(&format!("logits.{variant}.f32"));
        assert_eq!(shape, [ids.len(), model.config.vocab]);
        let mut session = session(&model, 2, 64, "f32", "dense");
        let logits = session.logits_of(&ids, 48).unwrap();
        let rows = logits.chunks(shape[1]).zip(expected.chunks(shape[1]));
        let same = rows.filter(|(a, b)| argmax(a) == argmax(b)).count();
        let worst = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{variant}: top-1 {same} of {}, largest difference {worst}", ids.len());
        assert!(same as f64 >= 0.95 * ids.len() as f64);
        // An activation on a rounding boundary moves logits by some hundredths; anything structural moves them by units.
        assert!(worst < 0.5);
    }
}

#[test]
fn activation_codes_agree_except_on_rounding_boundaries() {
    let (golden, model) = (Golden::load(), load("offline"));
    let (mut codes, mut compared, mut flips) = (vec![0i8; 256], 0, 0);
    for (l, layer) in model.layers.iter().enumerate() {
        for row in golden.f32(&format!("hidden.{l}")).0.chunks(model.config.hidden) {
            let mut normed = vec![0.0; row.len()];
            model.kernels.rmsnorm(row, &layer.input_norm, model.config.rms_eps, &mut normed);
            model.kernels.quantize_activations(&normed, &mut codes);
            let exact: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            let exact = rms_norm(&exact, &layer.input_norm, model.config.rms_eps);
            let (expected, scale) = quantize(&exact);
            for ((code, expected), x) in codes.iter().zip(expected).zip(exact) {
                compared += 1;
                if *code != expected {
                    flips += 1;
                    let boundary = ((x * scale).fract().abs() - 0.5).abs();
                    assert!(boundary < 1e-3, "layer {l}: {code} for {expected}, {boundary} from a boundary");
                }
            }
        }
    }
    println!("{flips} of {compared} codes differ");
    assert_eq!(compared, 4 * 48 * 256);
}

#[test]
fn cached_decode_equals_prefill_bit_for_bit() {
    let (golden, model) = (Golden::load(), load("offline"));
    let ids = golden.ids();
    let whole = session(&model, 2, 64, "f32", "dense").logits_of(&ids, 48).unwrap();
    let mut stepwise = session(&model, 1, 64, "f32", "dense");
    for (position, &id) in ids.iter().enumerate() {
        let logits = stepwise.decode(id).unwrap();
        let vocab = logits.len();
        assert_eq!(
            common::bits(logits),
            common::bits(&whole[position * vocab..(position + 1) * vocab]),
            "{position}"
        );
    }
}

#[test]
fn the_fast_path_follows_the_reference_layer_by_layer() {
    let model = load("offline");
    let ids = Golden::load().ids();
    let reference = Reference::new(&model);
    let trace = reference.run(&ids);
    let before: Vec<f32> = trace.hidden[..4].iter().flatten().flatten().map(|&v| v as f32).collect();
    let after: Vec<f32> = trace.hidden[1..].iter().flatten().flatten().map(|&v| v as f32).collect();
    let out = session(&model, 2, 64, "f32", "dense").trace_layers(&ids, Some(&before)).unwrap();
    let share = rows_within(&out, &after, model.config.hidden, 1e-4);
    println!("{:.1} % of rows within 1e-4 of the reference", 100.0 * share);
    assert!(share >= 0.98, "{share}");
    let logits = session(&model, 2, 64, "f32", "dense").logits_of(&ids, 48).unwrap();
    let same = logits.chunks(512).zip(&trace.logits).filter(|(a, b)| argmax(a) == argmax(b)).count();
    assert!(same >= 46, "top-1 {same} of 48");
}

#[test]
fn the_reference_follows_hugging_face() {
    let (golden, model) = (Golden::load(), load("offline"));
    let reference = Reference::new(&model);
    for l in 0..model.config.layers - 1 {
        let rows = |name: &str| -> Vec<Vec<f64>> {
            golden.f32(name).0.chunks(256).map(|r| r.iter().map(|&v| f64::from(v)).collect()).collect()
        };
        let ours = reference.layer(l, &rows(&format!("hidden.{l}")));
        let theirs = rows(&format!("hidden.{}", l + 1));
        let good =
            ours.iter().zip(&theirs).filter(|(a, b)| a.iter().zip(*b).all(|(x, y)| (x - y).abs() < 1e-4));
        assert!(good.count() >= 47, "layer {l}");
    }
}

/// The other branches of the forward pass: silu, no sub-norms, a head of its own, in both formats.
#[test]
fn llama_shaped_models_follow_the_reference() {
    let config = ModelConfig {
        name: "llama-shaped".into(),
        vocab: 300,
        hidden: 192,
        intermediate: 320,
        layers: 3,
        heads: 6,
        kv_heads: 6,
        head_dim: 32,
        rope_theta: 10_000.0,
        rms_eps: 1e-6,
        activation: Activation::Silu,
        sub_norms: false,
        tied_head: false,
        trained_positions: 64,
    };
    let ids = common::tokens(24, 300);
    for head in HeadFormat::ALL {
        let model = Arc::new(Model::synthetic(config.clone(), head, 5, &team(2)).unwrap());
        let reference = Reference::new(&model);
        let trace = reference.run(&ids);
        // Embeddings are short binary fractions, and ratios of such numbers often end exactly on a rounding boundary: the
        // layers are compared on inputs that are a little off.
        let off = |(i, v): (usize, &f64)| f64::from((v + 1e-3 * (i as f64 * 0.7).sin()) as f32);
        let inputs: Vec<Vec<Vec<f64>>> = trace.hidden[..3]
            .iter()
            .map(|rows| rows.iter().map(|row| row.iter().enumerate().map(off).collect()).collect())
            .collect();
        let flat = |layers: &[Vec<Vec<f64>>]| -> Vec<f32> {
            layers.iter().flatten().flatten().map(|&v| v as f32).collect()
        };
        let outputs: Vec<_> = inputs.iter().enumerate().map(|(l, rows)| reference.layer(l, rows)).collect();
        let out = session(&model, 2, 64, "f32", "dense").trace_layers(&ids, Some(&flat(&inputs))).unwrap();
        let share = rows_within(&out, &flat(&outputs), config.hidden, 1e-4);
        assert!(share >= 0.95, "{share} with a {} head", head.as_str());
        let logits = session(&model, 2, 64, "f32", "dense").logits_of(&ids, 5).unwrap();
        let same = logits.chunks(300).zip(&trace.logits).filter(|(a, b)| argmax(a) == argmax(b)).count();
        assert!(same >= 22, "top-1 {same} of 24 with a {} head", head.as_str());
    }
}

#[test]
fn an_int8_head_stays_close_to_bf16() {
    let ids = Golden::load().ids();
    let dir = fixture("hf_bitnet/offline");
    let bf16 = session(&load("offline"), 1, 64, "f32", "dense").logits_of(&ids, 48).unwrap();
    let model = Arc::new(Model::load(&dir, HeadFormat::Int8, &team(1)).unwrap());
    let int8 = session(&model, 1, 64, "f32", "dense").logits_of(&ids, 48).unwrap();
    let worst = bf16.iter().zip(&int8).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst > 0.0 && worst < 0.15, "{worst}");
}
