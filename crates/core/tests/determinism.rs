//! The same bits for any instruction set, number of threads and prefill chunk.

mod common;

use common::{all_kernels, bits, session, tiny, tokens};
use longbit::HeadFormat;
use std::sync::Arc;

const TOKENS: usize = 70;

/// Logits of every token by prefill in chunks, then of three more decode steps.
fn run(model: &Arc<longbit::Model>, threads: usize, chunk: usize, kv: &str, how: &str) -> Vec<u32> {
    let mut session = session(model, threads, 128, kv, how);
    let prompt = tokens(TOKENS, 512);
    let mut all = bits(&session.logits_of(&prompt, chunk).unwrap());
    for token in [3, 500, 77] {
        all.extend(bits(session.decode(token).unwrap()));
    }
    all
}

#[test]
fn threads_and_chunks_do_not_change_a_bit() {
    for head in HeadFormat::ALL {
        let model = Arc::new(tiny(head));
        for (kv, how) in [("f32", "dense"), ("bf16", "dense"), ("bf16", "window:sinks=2,window=8")] {
            let expected = run(&model, 1, TOKENS, kv, how);
            // 23 leaves a last chunk of one token: prefill all the same.
            for (threads, chunk) in [(1, 1), (2, 1), (1, 16), (2, 23), (3, TOKENS), (4, 33), (5, 2)] {
                let got = run(&model, threads, chunk, kv, how);
                assert!(got == expected, "{kv}, {how}, {threads} threads, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn instruction_sets_do_not_change_a_bit() {
    for head in HeadFormat::ALL {
        let mut results = Vec::new();
        for kernels in all_kernels() {
            let mut model = tiny(head);
            model.kernels = kernels;
            let model = Arc::new(model);
            results.push((kernels.isa(), run(&model, 2, 24, "bf16", "window:sinks=2,window=20")));
        }
        for (isa, result) in &results[1..] {
            assert!(*result == results[0].1, "{isa} differs from {}", results[0].0);
        }
    }
}

#[test]
fn long_contexts_cross_chunks_and_pages_with_the_same_bits() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let prompt = tokens(1300, 512);
    let mut expected = None;
    for (threads, cut) in [(1, 1299), (2, 1200), (3, 512)] {
        let mut session = session(&model, threads, 1310, "bf16", "dense");
        session.prefill(&prompt[..cut]).unwrap();
        let mut last = Vec::new();
        for &token in &prompt[cut..] {
            last = bits(session.decode(token).unwrap());
        }
        assert_eq!(session.traffic().rows, 1300 * 4 * 2);
        assert_eq!(session.traffic().kv_bytes, 1300 * 4 * 2 * 2 * 128);
        let expected = expected.get_or_insert_with(|| last.clone());
        assert!(last == *expected, "{threads} threads, prefill of {cut}");
    }
}

#[test]
fn a_window_as_long_as_the_context_is_dense() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    assert!(run(&model, 2, 7, "f32", "window:sinks=0,window=4096") == run(&model, 2, 7, "f32", "dense"));
    assert!(run(&model, 2, 7, "f32", "window:sinks=2,window=8") != run(&model, 2, 7, "f32", "dense"));
}

#[test]
fn rewinding_and_decoding_again_repeats_the_bits() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let mut session = session(&model, 2, 700, "bf16", "window:sinks=4,window=64");
    session.prefill(&tokens(600, 512)).unwrap();
    let first: Vec<_> = [9, 8, 7].map(|t| bits(session.decode(t).unwrap())).into();
    session.rewind(600);
    assert_eq!(session.len(), 600);
    let again: Vec<_> = [9, 8, 7].map(|t| bits(session.decode(t).unwrap())).into();
    assert!(first == again);
}

#[test]
fn bad_requests_change_nothing() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let mut session = session(&model, 1, 256, "bf16", "dense");
    session.prefill(&tokens(250, 512)).unwrap();
    assert!(session.decode(512).unwrap_err().to_string().contains("vocabulary of 512"));
    assert!(session.prefill(&[]).is_err());
    assert!(session.prefill(&tokens(7, 512)).unwrap_err().to_string().contains("holds 256 tokens and 257"));
    assert!(session.logits_of(&[1], 0).is_err());
    assert_eq!(session.len(), 250);
    session.prefill(&tokens(6, 512)).unwrap();
    assert!(session.decode(1).is_err());
}
