//! Sessions on every KV dtype.

mod common;

use std::sync::Arc;

use common::{all_kernels, bits, session, tiny, tokens};
use longbit::kv::{KV_FORMATS, kv_dtype};
use longbit::{Error, HeadFormat, Model, Session, Supplied};
use proptest::prelude::*;

/// Decodes behind a prompt and returns the logits of all steps.
fn run(model: &Arc<Model>, threads: usize, chunk: usize, kv: &str, how: &str) -> Vec<u32> {
    let mut session = session(model, threads, 400, kv, how);
    for piece in tokens(270, 512).chunks(chunk) {
        session.prefill_at_once(piece).unwrap();
    }
    let mut all = Vec::new();
    for token in [3, 500, 77, 1, 2] {
        all.extend(bits(session.decode(token).unwrap()));
    }
    all
}

fn model() -> Arc<Model> {
    Arc::new(tiny(HeadFormat::Bf16))
}

/// Formats with options that the tests run beside the plain ones.
const MORE: [&str; 4] =
    ["k=int8+plain+rotate,v=q4_0+centre", "kivi4+centre", "bf16+rotate+centre", "k=planes8,v=lm4"];

#[test]
fn threads_and_instruction_sets_do_not_change_a_bit() {
    let names = KV_FORMATS.iter().map(|f| f.name).chain(MORE);
    for kv in names {
        let expected = run(&model(), 1, 300, kv, "dense");
        assert!(run(&model(), 3, 300, kv, "dense") == expected, "{kv}, 3 threads");
        for kernels in all_kernels() {
            let mut model = tiny(HeadFormat::Bf16);
            model.kernels = kernels;
            assert!(run(&Arc::new(model), 2, 300, kv, "dense") == expected, "{kv}, {}", kernels.isa());
        }
    }
}

/// A format that keeps the newest tokens exactly shows a prompt its own last tokens exactly, so its prefill depends on how
/// the prompt is cut; no other does.
#[test]
fn chunks_change_bits_only_where_the_newest_tokens_are_exact() {
    for format in KV_FORMATS {
        let dtype = kv_dtype(format.name).unwrap();
        let same = run(&model(), 2, 300, format.name, "dense") == run(&model(), 2, 77, format.name, "dense");
        let exact = dtype.keys.exact_recent() + dtype.values.exact_recent() > 0;
        assert!(same || exact, "{}", format.name);
    }
}

fn supplied(session: &Session, seed: u32) -> Supplied {
    let config = &session.model().config;
    let rows = config.layers * config.kv_heads * config.head_dim;
    let numbers = |n: usize, seed: u32| -> Vec<f32> {
        tokens(n + seed as usize, 2001)[seed as usize..].iter().map(|&x| x as f32 / 1000.0 - 1.0).collect()
    };
    Supplied {
        queries: numbers(rows * config.group(), seed),
        keys: numbers(rows, seed + 11),
        values: numbers(rows, seed + 23),
    }
}

#[test]
fn a_number_that_is_not_finite_is_an_error_with_its_place_and_changes_nothing() {
    for kv in KV_FORMATS.iter().map(|f| f.name) {
        for (what, layer, kv_head) in [("key", 0, 1), ("value", 3, 0)] {
            let mut session = session(&model(), 2, 400, kv, "dense");
            session.prefill(&tokens(130, 512)).unwrap();
            let good = supplied(&session, 5);
            let before = session.rewound(|s| bits(s.decode_supplied(7, &good, false).unwrap()));
            let mut bad = good.clone();
            let config = &session.model().config;
            let at = (layer * config.kv_heads + kv_head) * config.head_dim + 5;
            let rows = if what == "key" { &mut bad.keys } else { &mut bad.values };
            rows[at] = f32::NAN;
            let error = session.decode_supplied(7, &bad, false).map(|_| ()).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Unstorable { position: 130, .. }), "{kv}: {text}");
            assert!(
                text.starts_with(&format!("layer {layer}, KV head {kv_head}, position 130: a {what}")),
                "{text}"
            );
            assert_eq!(session.len(), 130);
            assert!(bits(session.decode_supplied(7, &good, false).unwrap()) == before, "{kv}");
        }
    }
}

trait Rewound {
    fn rewound<T>(&mut self, then: impl FnOnce(&mut Session) -> T) -> T;
}

impl Rewound for Session {
    /// Does something and takes it back.
    fn rewound<T>(&mut self, then: impl FnOnce(&mut Session) -> T) -> T {
        let len = self.len();
        let result = then(self);
        self.rewind(len);
        result
    }
}

/// Output of attention after 1,100 tokens of which few matter.
fn skipping(how: &str, threads: usize) -> (Vec<f32>, u64) {
    let mut session = session(&model(), threads, 1200, "f32", how);
    session.prefill(&tokens(1100, 512)).unwrap();
    let mut step = supplied(&session, 3);
    step.queries.iter_mut().for_each(|x| *x *= 6.0);
    session.decode_supplied(7, &step, true).unwrap();
    (session.attention_output(), session.traffic().kv_bytes)
}

#[test]
fn values_that_do_not_matter_are_not_read_and_nothing_is_lost() {
    let (dense, all) = skipping("dense", 2);
    let (same, whole) = skipping("dense-skip:lost=0", 2);
    assert!(bits(&dense) == bits(&same) && all == whole);
    let size = dense.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let mut last = all;
    for lost in [1e-6, 1e-3, 1e-2, 1.0] {
        let how = format!("dense-skip:lost={lost}");
        let (output, read) = skipping(&how, 2);
        let off = dense.iter().zip(&output).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        // lost * max|v|, and rounding; values are within 1 here, or what the prompt's are.
        assert!(off <= lost as f32 * 4.0 + 1e-5 * size, "{how}: {off}");
        assert!(read <= last && read >= all / 2, "{how}: {read} of {all}");
        last = read;
        for threads in [1, 3, 5] {
            let (other, bytes) = skipping(&how, threads);
            assert!(bits(&other) == bits(&output) && bytes == read, "{how}, {threads} threads");
        }
    }
    assert!(last < all * 4 / 5, "{last} of {all} bytes were read at the largest floor");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// With values of 1 an output is the weight that was kept, so what is missing is what was lost.
    #[test]
    fn no_head_loses_more_weight_than_it_may(
        n in 1usize..1500,
        exponent in -4.0f64..0.0,
        scale in 0.0f32..6.0,
        seed in 0u32..1000,
    ) {
        let lost = 10f64.powf(exponent);
        let mut session = session(&model(), 2, 1500, "f32", &format!("dense-skip:lost={lost}"));
        let (layers, kv_heads, d) = (4, 2, 64);
        for i in 0..layers * kv_heads {
            let numbers = tokens(n * d + seed as usize + i, 2001);
            let keys: Vec<f32> =
                numbers[seed as usize + i..].iter().map(|&x| x as f32 / 1000.0 - 1.0).collect();
            session.cache_mut().head_mut(i / kv_heads, i % kv_heads).append(&keys, &vec![1.0; n * d]).unwrap();
        }
        session.cache_mut().set_len(n).unwrap();
        session.refresh();
        let mut step = supplied(&session, seed);
        step.queries.iter_mut().for_each(|x| *x *= scale);
        step.values.fill(1.0);
        session.decode_supplied(7, &step, true).unwrap();
        for kept in session.attention_output() {
            prop_assert!(f64::from(1.0 - kept) <= lost + 1e-5, "{kept} of {n} tokens, lost={lost}");
        }
    }
}

#[test]
fn formats_refuse_rows_that_they_cannot_store() {
    let preset = longbit::preset("tiny").unwrap();
    for (kv, head_dim, says) in [
        ("q8_0", 40, "not whole blocks of 32"),
        ("int4", 96, "power of two"),
        ("lm3", 48, "power of two"),
        ("int8", 36, "not whole blocks of 8"),
        ("kivi2", 16, "not whole blocks of 32"),
        ("bf16+rotate", 24, "power of two"),
    ] {
        let mut config = preset.clone();
        config.head_dim = head_dim;
        let model = Model::synthetic(config, HeadFormat::Bf16, 1, &common::team(1)).unwrap();
        let options = longbit::SessionOptions { kv: kv_dtype(kv).unwrap(), ..Default::default() };
        let error =
            Session::new(Arc::new(model), common::team(1), options).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains(&head_dim.to_string()), "{kv}: {error}");
    }
}

#[test]
fn what_does_not_fit_the_cache_is_refused_and_changes_nothing() {
    for (kv, how) in
        [("bf16", "dense"), ("int4", "window:window=8"), ("kivi4", "quest"), ("f32", "streaming")]
    {
        let mut session = session(&model(), 2, 300, kv, how);
        let full = tokens(301, 512);
        let refused = |result: longbit::Result<()>| {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::CacheFull { capacity: 300, wanted: 301 }), "{kv}, {how}: {error}");
        };
        refused(session.prefill(&full).map(|_| ()));
        assert_eq!(session.len(), 0);
        let whole = bits(session.prefill(&full[..300]).unwrap());
        refused(session.decode(5).map(|_| ()));
        refused(session.prefill(&full[300..]).map(|_| ()));
        assert_eq!(session.len(), 300);
        session.rewind(0);
        assert!(bits(session.prefill(&full[..300]).unwrap()) == whole, "{kv}, {how}");
    }
}
