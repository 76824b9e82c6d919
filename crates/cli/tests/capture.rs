//! `longbit capture` from the outside: what it records, and what it refuses.

#![forbid(unsafe_code)]

mod common;

use std::path::Path;

use common::*;
use longbit::Trace;

const PROMPT: &str = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.";

fn capture(dir: &Path, name: &str, args: &[&str]) -> Trace {
    put(&dir.join("prompt.txt"), PROMPT);
    let (model, file) = (checkpoint(), dir.join(name));
    let fixed = ["capture", "--model", path(&model), "--prompt-file", "prompt.txt", "--out", path(&file)];
    run(dir, &[&fixed, args].concat()).expect(0);
    Trace::open(&file).expect("a trace")
}

/// All keys, values and queries.
fn numbers(trace: &Trace, layer: usize, steps: std::ops::Range<usize>) -> [Vec<f32>; 3] {
    let shape = trace.shape();
    let (mut all, mut some) = ([const { Vec::new() }; 3], Vec::new());
    for kv_head in 0..shape.kv_heads {
        trace.keys(layer, kv_head, 0..shape.tokens, &mut some).expect("keys");
        all[0].extend_from_slice(&some);
        trace.values(layer, kv_head, 0..shape.tokens, &mut some).expect("values");
        all[1].extend_from_slice(&some);
        for step in steps.clone() {
            trace.queries(layer, kv_head, step, &mut some).expect("queries");
            all[2].extend_from_slice(&some);
        }
    }
    all
}

/// What is recorded of a token depends on neither threads nor on which layers and steps are kept.
#[test]
fn traces_of_one_prompt_agree() {
    let dir = tempfile::tempdir().expect("a folder");
    let long = capture(dir.path(), "long.safetensors", &["--steps", "6", "--threads", "1"]);
    let short =
        capture(dir.path(), "short.safetensors", &["--steps", "2", "--layers", "last1", "--threads", "2"]);
    let (a, b) = (long.shape(), short.shape());
    assert_eq!((a.steps, b.steps, b.layers), (6, 2, 1));
    assert_eq!((a.tokens, a.heads, a.kv_heads, a.head_dim), (b.tokens, b.heads, b.kv_heads, b.head_dim));
    let last = numbers(&long, a.layers - 1, 4..6);
    assert_eq!(last, numbers(&short, 0, 0..2));
    assert!(last.iter().all(|rows| rows.iter().any(|x| *x != 0.0)));
    assert_eq!(short.metadata()["layers"], (a.layers - 1).to_string());
    assert_eq!(short.metadata()["model"], long.metadata()["model"]);
    let half =
        capture(dir.path(), "half.safetensors", &["--steps", "6", "--format", "bf16", "--tokens", "12"]);
    assert_eq!(half.shape().tokens, 12);
    let [exact, _, _] = numbers(&long, 0, 0..6);
    let [rounded, _, _] = numbers(&half, 0, 0..6);
    let d = a.head_dim;
    // Of each KV head the first twelve rows; bfloat16 keeps eight bits.
    for (head, rounded) in rounded.chunks_exact(12 * d).enumerate() {
        let exact = &exact[head * a.tokens * d..][..12 * d];
        assert!(exact.iter().zip(rounded).all(|(x, y)| (x - y).abs() <= x.abs() / 256.0));
    }
}

#[test]
fn what_cannot_be_recorded_is_refused_before_the_weights_are_read() {
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir.path().join("prompt.txt"), PROMPT);
    let model = checkpoint();
    for (args, says) in [
        (&["--steps", "0"][..], "at least one step"),
        (&["--steps", "4000"], "the prompt has"),
        (&["--tokens", "5", "--steps", "5"], "5 tokens"),
        (&["--layers", "99"], "there is no layer 99"),
        (&["--layers", "third"], "`third` is not a layer"),
        (&["--layers", "none"], "no layer is named"),
        (&["--prompt-file", "nowhere.txt"], "nowhere.txt"),
    ] {
        let fixed = ["capture", "--model", path(&model), "--out", "x.safetensors"];
        let prompt = if args.contains(&"--prompt-file") { &[][..] } else { &["--prompt-file", "prompt.txt"] };
        let message = run(dir.path(), &[&fixed, prompt, args].concat()).expect(2).err;
        assert!(message.contains(says), "{args:?}: {message}");
        assert!(!dir.path().join("x.safetensors").exists());
    }
}
