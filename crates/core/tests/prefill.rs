//! Patterns of prompts in whole sessions: the same bits for any number of threads, chunk and instruction set, dense where
//! everything is seen, and no trace of what was forked, rewound or exempted.

mod common;

use std::sync::Arc;

use common::{all_kernels, bits, session, tiny, tokens};
use longbit::attention::method;
use longbit::text::{PerplexityOptions, Variant, perplexity};
use longbit::{HeadFormat, Model, PrefixCache, SessionOptions};

/// Of each pattern one that leaves out much of 330 tokens, and one that sees all of them.
const PATTERNS: [(&str, &str); 4] = [
    (
        "prefill=window,prefill_sinks=3,prefill_window=37",
        "prefill=window,prefill_sinks=0,prefill_window=1000",
    ),
    ("prefill=ashape,prefill_sinks=3,prefill_window=20", "prefill=ashape,prefill_sinks=400,prefill_window=1"),
    (
        "prefill=vslash,prefill_columns=9,prefill_sinks=2,prefill_slashes=11,prefill_window=6,prefill_probes=4",
        "prefill=vslash,prefill_columns=1000,prefill_slashes=1",
    ),
    ("prefill=blocks,prefill_blocks=2", "prefill=blocks"),
];

const N: usize = 330;

/// Logits of a prompt in chunks, then of two steps.
fn run(model: &Arc<Model>, threads: usize, chunk: usize, kv: &str, how: &str) -> Vec<u32> {
    let mut session = session(model, threads, 400, kv, how);
    let mut all = bits(&session.logits_of(&tokens(N, 512), chunk).unwrap());
    for token in [3, 500] {
        all.extend(bits(session.decode(token).unwrap()));
    }
    all
}

fn model() -> Arc<Model> {
    Arc::new(tiny(HeadFormat::Bf16))
}

#[test]
fn threads_and_chunks_do_not_change_a_bit_and_seeing_everything_is_dense() {
    let model = model();
    for kv in ["bf16", "int8"] {
        let dense = run(&model, 1, N, kv, "dense");
        for (some, all) in PATTERNS {
            let how = format!("dense:{some}");
            let expected = run(&model, 1, N, kv, &how);
            assert!(expected != dense, "{kv}, {some} leaves something out");
            for (threads, chunk) in [(2, 1), (1, 16), (3, 100), (2, 128), (4, 33), (5, 200)] {
                assert!(
                    run(&model, threads, chunk, kv, &how) == expected,
                    "{kv}, {how}, {threads} threads, {chunk}"
                );
            }
            for (threads, chunk) in [(1, N), (2, 50), (3, 1)] {
                assert!(run(&model, threads, chunk, kv, &format!("dense:{all}")) == dense, "{kv}, {all}");
            }
        }
    }
}

#[test]
fn instruction_sets_do_not_change_a_bit() {
    for (some, _) in PATTERNS {
        let results = all_kernels().into_iter().map(|kernels| {
            let model = Model { kernels, ..tiny(HeadFormat::Bf16) };
            (kernels.isa(), run(&Arc::new(model), 2, 96, "bf16", &format!("window:window=50,{some}")))
        });
        let results: Vec<_> = results.collect();
        for (isa, result) in &results[1..] {
            assert!(*result == results[0].1, "{some}: {isa} differs from {}", results[0].0);
        }
    }
}

/// Every token of a call is that of the whole call, whatever came before: tokens one at a time are calls of their own.
#[test]
fn forks_and_rewinds_leave_no_trace_and_calls_end_where_blocks_do() {
    let model = model();
    let prompt = tokens(N, 512);
    for (some, _) in PATTERNS {
        let how = format!("window:window=60,{some}");
        let mut whole = session(&model, 2, 400, "bf16", &how);
        let expected = bits(whole.prefill(&prompt).unwrap());
        let mut cut = session(&model, 1, 400, "bf16", &how);
        cut.prefill(&prompt[..128]).unwrap();
        cut.prefill(&prompt[128..256]).unwrap();
        let mut fork = cut.fork().unwrap();
        assert_eq!(bits(cut.prefill(&prompt[256..]).unwrap()), expected, "{some}");
        fork.prefill(&tokens(80, 300)).unwrap();
        fork.rewind(128);
        assert_eq!(bits(fork.prefill(&prompt[128..]).unwrap()), expected, "{some}");
        // Within a block two calls are two calls, the same after a rewind into it.
        let mut apart = session(&model, 3, 400, "bf16", &how);
        apart.prefill(&prompt[..200]).unwrap();
        let twice = bits(apart.prefill(&prompt[200..]).unwrap());
        fork.rewind(0);
        fork.prefill(&prompt[..200]).unwrap();
        fork.prefill(&prompt[..50]).unwrap();
        fork.rewind(200);
        assert_eq!(bits(fork.prefill(&prompt[200..]).unwrap()), twice, "{some}");
        assert!(whole.known_tokens().is_empty() && fork.known_tokens().is_empty());
    }
}

#[test]
fn short_prompts_and_single_tokens_are_dense() {
    let model = model();
    for (some, _) in PATTERNS {
        let mut dense = session(&model, 2, 64, "bf16", "dense");
        let mut ours = session(&model, 2, 64, "bf16", &format!("dense:{some}"));
        // No more than the tile and the smallest window hold; a slash is its whole tile.
        for piece in [&[5][..], &[6, 7, 8], &[9]] {
            assert_eq!(bits(dense.prefill(piece).unwrap()), bits(ours.prefill(piece).unwrap()), "{some}");
        }
        assert_eq!(bits(dense.decode(4).unwrap()), bits(ours.decode(4).unwrap()), "{some}");
    }
}

#[test]
fn exempt_layers_are_dense() {
    let model = model();
    let run = |how: &str| run(&model, 2, 128, "bf16", how);
    let some = PATTERNS[0].0;
    let dense = run("dense");
    assert!(run(&format!("dense:{some},prefill_dense_layers=all")) == dense);
    let half = run(&format!("dense:{some},prefill_dense_layers=odd"));
    assert!(half != dense && half != run(&format!("dense:{some}")));
    // The layers of the steps are others.
    let window = run("window:window=60,dense_layers=odd");
    assert!(run(&format!("window:window=60,dense_layers=odd,{some},prefill_dense_layers=all")) == window);
}

/// Prompts that are not dense have no rows to share, and take none.
#[test]
fn prefixes_are_those_of_dense_prompts() {
    let model = model();
    let prompt = tokens(600, 512);
    let team = common::team(2);
    let options =
        |how: &str| SessionOptions { capacity: 640, method: method(how).unwrap(), ..Default::default() };
    let mut prefixes = PrefixCache::new(model.clone(), options("dense").kv, 1 << 30).unwrap();
    let how = format!("dense:{}", PATTERNS[0].0);
    let mut ours = prefixes.session(team.clone(), options(&how), &prompt).unwrap();
    let expected = bits(ours.prefill(&prompt).unwrap());
    assert_eq!(prefixes.insert(&ours).unwrap(), 0);
    let mut dense = prefixes.session(team.clone(), options("dense"), &prompt).unwrap();
    dense.prefill(&prompt).unwrap();
    assert_eq!(prefixes.insert(&dense).unwrap(), 512);
    let mut again = prefixes.session(team, options(&how), &prompt).unwrap();
    assert_eq!(again.len(), 0);
    assert_eq!(bits(again.prefill(&prompt).unwrap()), expected);
}

/// A method that evicts goes on from what the prompt left, and a fork of dense rows keeps them.
#[test]
fn methods_that_evict_have_patterns_too() {
    let model = model();
    let prompt = tokens(N, 512);
    for (some, all) in PATTERNS {
        let run = |settings: &str, threads: usize| {
            let mut session = session(
                &model,
                threads,
                500,
                "int8+plain",
                &format!("snapkv:capacity=80,window=16{settings}"),
            );
            session.prefill(&prompt).unwrap();
            session.decode(1).unwrap();
            // A prompt after rows were evicted sees what is left of them.
            session.prefill(&prompt[..100]).unwrap();
            bits(session.decode(2).unwrap())
        };
        assert_eq!(run(&format!(",{some}"), 1), run(&format!(",{some}"), 3));
        assert_eq!(run(&format!(",{all}"), 2), run("", 1), "{all}");
        let mut dense = session(&model, 2, 500, "int8+plain", "dense");
        dense.prefill(&prompt).unwrap();
        let fork = |how: &str| dense.fork_with(method(how).unwrap()).unwrap();
        let plain = bits(fork("snapkv:capacity=80,window=16").decode(1).unwrap());
        assert_eq!(bits(fork(&format!("snapkv:capacity=80,window=16,{some}")).decode(1).unwrap()), plain);
    }
}

/// Scored tokens are decoded, after a prompt that saw less.
#[test]
fn perplexity_prefills_with_the_pattern_and_scores_by_steps() {
    let model = model();
    let (text, team) = (tokens(260, 512), common::team(2));
    let how = format!("dense:{}", PATTERNS[0].0);
    let all = format!("dense:{}", PATTERNS[0].1);
    let variants = [how.as_str(), all.as_str()].map(|how| Variant::new("bf16", how).unwrap()).to_vec();
    let options = PerplexityOptions { context: 200, stride: 30, bos: None, variants };
    let scores = perplexity::<longbit::Error>(
        &model,
        &team,
        &text,
        |_| 1,
        &options,
        |_| Ok(std::ops::ControlFlow::Continue(())),
    );
    let scores = scores.unwrap().unwrap();
    assert_eq!((scores.len(), scores[1].method.as_str()), (3, how.as_str()));
    assert_eq!(scores[2].nats, scores[0].nats);
    assert_ne!(scores[1].nats, scores[0].nats);
    // The first window by hand.
    let mut session = session(&model, 1, 200, "bf16", &how);
    session.prefill(&text[..169]).unwrap();
    for (i, nats) in scores[1].nats[..30].iter().enumerate() {
        let logits = session.decode(text[169 + i]).unwrap();
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|z| f64::from(z - max).exp()).sum();
        let exact = sum.ln() - f64::from(logits[text[170 + i] as usize] - max);
        assert!((nats - exact).abs() < 1e-4, "token {i}: {nats} {exact}");
    }
}
