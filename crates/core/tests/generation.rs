//! Generation and perplexity on the tiny checkpoint.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use common::{argmax, fixture, session, team};
use longbit::text::{
    GenerateOptions, Generation, PerplexityOptions, Progress, SamplerOptions, Scored, StopReason, TextModel,
    TextOptions, Variant, generate, perplexity,
};
use longbit::{Error, HeadFormat, Model};

fn bpe_model() -> TextModel {
    TextModel::open(&fixture("tokenizer/bpe"), &TextOptions::default()).unwrap()
}

fn offline() -> Arc<Model> {
    Arc::new(Model::load(&fixture("hf_bitnet/offline"), HeadFormat::Bf16, &team(2)).unwrap())
}

fn go_on(_: Progress<'_>) -> Result<ControlFlow<()>, Error> {
    Ok(ControlFlow::Continue(()))
}

/// The answer of the tiny checkpoint to a prompt.
fn answer(model: &Arc<Model>, threads: usize, options: &GenerateOptions) -> Generation {
    let text = bpe_model();
    let prompt = text.tokenizer.encode("The quick brown fox", true).unwrap();
    let mut session = session(model, threads, prompt.len() + options.max_tokens, "bf16", "dense");
    generate(&mut session, &text.tokenizer, &prompt, options, go_on).unwrap()
}

#[test]
fn greedy_answers_do_not_depend_on_threads_chunks_or_kernels() {
    let model = offline();
    let options = GenerateOptions { max_tokens: 24, ..GenerateOptions::default() };
    let expected = answer(&model, 1, &options);
    assert_eq!((expected.tokens.len(), expected.stop), (24, StopReason::Length));
    assert_eq!(expected.steps.len(), 23, "the first token comes from the prompt");
    for threads in 1..=4 {
        for chunk in [1, 3, 128] {
            let got = answer(&model, threads, &GenerateOptions { chunk, ..options.clone() });
            assert_eq!(
                (got.tokens, got.text),
                (expected.tokens.clone(), expected.text.clone()),
                "{threads}, {chunk}"
            );
        }
    }
    for kernels in common::all_kernels() {
        let mut model = Model::load(&fixture("hf_bitnet/offline"), HeadFormat::Bf16, &team(2)).unwrap();
        model.kernels = kernels;
        let got = answer(&Arc::new(model), 2, &options);
        assert_eq!(got.tokens, expected.tokens, "{}", kernels.isa());
    }
    // By hand: the likeliest token, again and again.
    let text = bpe_model();
    let prompt = text.tokenizer.encode("The quick brown fox", true).unwrap();
    let mut session = session(&model, 2, 64, "bf16", "dense");
    let mut next = argmax(session.prefill(&prompt).unwrap()) as u32;
    for &token in &expected.tokens {
        assert_eq!(token, next);
        next = argmax(session.decode(token).unwrap()) as u32;
    }
}

#[test]
fn an_answer_ends_at_either_stop_token_at_a_full_cache_and_on_request() {
    let model = offline();
    let options = GenerateOptions { max_tokens: 24, ..GenerateOptions::default() };
    let free = answer(&model, 2, &options);
    // Any token that the model chooses can be declared a stop token: the first of its kind ends the answer.
    let distinct: Vec<usize> = (1..24).filter(|&i| !free.tokens[..i].contains(&free.tokens[i])).collect();
    let (near, far) = (distinct[0], distinct[distinct.len() - 1]);
    assert!(near < far);
    for (stop, at) in [(vec![free.tokens[near], free.tokens[far]], near), (vec![free.tokens[far]], far)] {
        let got = answer(&model, 2, &GenerateOptions { stop, ..options.clone() });
        assert_eq!((got.stop, got.tokens), (StopReason::Token(free.tokens[at]), free.tokens[..at].to_vec()));
    }

    let text = bpe_model();
    let prompt = text.tokenizer.encode("The quick brown fox", true).unwrap();
    let mut full = session(&model, 2, prompt.len() + 5, "bf16", "dense");
    let got = generate(&mut full, &text.tokenizer, &prompt, &options, go_on).unwrap();
    assert_eq!((got.stop, got.tokens), (StopReason::Context, free.tokens[..6].to_vec()));

    let mut session = session(&model, 2, 64, "bf16", "dense");
    let mut shown = String::new();
    let got = generate(&mut session, &text.tokenizer, &prompt, &options, |step| {
        if let Progress::Token { text, .. } | Progress::End { text } = step {
            shown.push_str(text);
        }
        let enough = matches!(step, Progress::Token { id, .. } if id == free.tokens[near]);
        Ok::<_, Error>(if enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })
    .unwrap();
    assert_eq!((got.stop, got.tokens), (StopReason::Interrupted, free.tokens[..=near].to_vec()));
    assert_eq!(shown, got.text, "what was shown is what was written");
}

#[test]
fn sampled_answers_depend_on_the_seed_alone() {
    let model = offline();
    let with = |seed, threads| {
        let sampler = SamplerOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed };
        answer(&model, threads, &GenerateOptions { max_tokens: 24, sampler, ..GenerateOptions::default() })
            .tokens
    };
    assert_eq!(with(1, 1), with(1, 3));
    assert_ne!(with(1, 1), with(2, 1));
}

#[test]
fn bad_prompts_are_refused_before_anything_is_read() {
    let model = offline();
    let text = bpe_model();
    let mut session = session(&model, 1, 64, "bf16", "dense");
    let mut try_with = |prompt: &[u32], options: &GenerateOptions| {
        let error = generate(&mut session, &text.tokenizer, prompt, options, go_on).unwrap_err().to_string();
        assert_eq!(session.len(), 0);
        error
    };
    let options = GenerateOptions::default();
    assert!(try_with(&[], &options).contains("no token"));
    assert!(try_with(&[1, 512], &options).contains("vocabulary of 512"));
    assert!(try_with(&[1; 65], &options).contains("holds 64 tokens and 65"));
    assert!(try_with(&[1], &GenerateOptions { chunk: 0, ..options.clone() }).contains("chunk"));
    let hot = SamplerOptions { temperature: -1.0, ..SamplerOptions::default() };
    assert!(try_with(&[1], &GenerateOptions { sampler: hot, ..options }).contains("temperature"));
}

fn score(options: &PerplexityOptions, tokens: &[u32]) -> Vec<longbit::text::Score> {
    let text = bpe_model();
    let bytes = |token| text.tokenizer.text_bytes(token);
    let go_on = |_: Scored| Ok::<_, Error>(ControlFlow::Continue(()));
    perplexity(&offline(), &team(2), tokens, bytes, options, go_on).unwrap().unwrap()
}

#[test]
fn dense_perplexity_equals_the_logits_by_hand() {
    let model = offline();
    let tokens = common::tokens(50, 500);
    let options = PerplexityOptions { context: 24, stride: 10, bos: Some(509), variants: Vec::new() };
    let scores = score(&options, &tokens);
    assert_eq!((scores.len(), scores[0].kv.as_str(), scores[0].method.as_str()), (1, "bf16", "dense"));
    assert!(scores[0].difference.is_none());
    let mut expected = Vec::new();
    // 23 text tokens a window, starting every 10: at 0, 10 and 20.
    for start in [0, 10, 20] {
        let mut window = vec![509];
        window.extend(&tokens[start..start + 23]);
        let mut session = session(&model, 1, 24, "bf16", "dense");
        let logits = session.logits_of(&window, 24).unwrap();
        for at in 14..24 {
            let row = &logits[(at - 1) * 512..at * 512];
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            expected.push(sum.ln() - f64::from(row[window[at] as usize]));
        }
    }
    assert_eq!(scores[0].nats.len(), 30);
    for (got, expected) in scores[0].nats.iter().zip(&expected) {
        assert!((got - expected).abs() < 1e-9, "{got} {expected}");
    }
    let mean = expected.iter().sum::<f64>() / 30.0;
    assert!(
        (scores[0].mean - mean).abs() < 1e-9
            && (scores[0].perplexity() - mean.exp()).abs() < 1e-6 * mean.exp()
    );
    let text = bpe_model();
    let bytes: usize =
        [13, 23, 33].iter().flat_map(|&s| &tokens[s..s + 10]).map(|&t| text.tokenizer.text_bytes(t)).sum();
    let bits = mean * 30.0 / std::f64::consts::LN_2 / bytes as f64;
    assert!((scores[0].bits_per_byte.unwrap() - bits).abs() < 1e-9);
}

#[test]
fn every_format_and_method_scores_the_same_tokens() {
    let tokens = common::tokens(60, 500);
    let mut variants = Vec::new();
    for dtype in longbit::kv::KV_FORMATS {
        variants.push(Variant::new(dtype.name, "dense").unwrap());
    }
    // A window that holds everything is dense, decoded step by step: it must give the very numbers of the dense passes.
    variants.push(Variant::new("bf16", "window:sinks=0,window=64").unwrap());
    variants.push(Variant::new("bf16", "window:sinks=1,window=4").unwrap());
    let options = PerplexityOptions { context: 32, stride: 12, bos: Some(509), variants };
    let scores = score(&options, &tokens);
    let by_name: BTreeMap<_, _> = scores.iter().map(|s| ((s.kv.as_str(), s.method.as_str()), s)).collect();
    assert_eq!(by_name.len(), scores.len(), "the baseline stands once");
    assert_eq!(scores.len(), longbit::kv::KV_FORMATS.len() + 2);
    assert!(scores.iter().all(|s| s.nats.len() == 36 && s.mean.is_finite() && s.error > 0.0));
    let find = |method: &str| scores.iter().find(|s| s.method.contains(method)).unwrap();
    let whole = find("window=64");
    assert_eq!(whole.nats, scores[0].nats);
    let zero = whole.difference.unwrap();
    assert_eq!((zero.mean, zero.error, zero.kl, zero.same_top), (0.0, 0.0, Some(0.0), Some(1.0)));
    let narrow = find("window=4").difference.unwrap();
    assert!(narrow.kl.unwrap() > 1e-3 && narrow.error > 0.0, "{narrow:?}");
    let f32 = by_name[&("f32", "dense")].difference.unwrap();
    assert!(f32.kl.unwrap() < narrow.kl.unwrap() && f32.mean.abs() < 0.05, "{f32:?}");
}

#[test]
fn perplexity_refuses_what_cannot_be_scored_and_stops_on_request() {
    let model = offline();
    let options = PerplexityOptions { context: 24, stride: 10, bos: None, variants: Vec::new() };
    let run = |options: &PerplexityOptions, n: usize| {
        let stop = |_: Scored| Ok::<_, Error>(ControlFlow::Break(()));
        perplexity(&model, &team(1), &common::tokens(n, 500), |_| 1, options, stop)
    };
    assert!(run(&options, 23).unwrap_err().to_string().contains("23 tokens and a window of 24 needs 24"));
    let wide = PerplexityOptions { stride: 24, ..options.clone() };
    assert!(run(&wide, 100).unwrap_err().to_string().contains("stride"));
    assert!(run(&options, 100).unwrap().is_none());

    // The last token of a window is scored and never fed; one outside the vocabulary is an error wherever it stands.
    let go_on = |_: Scored| Ok::<_, Error>(ControlFlow::Continue(()));
    let outside = |options: &PerplexityOptions, tokens: &[u32]| {
        perplexity(&model, &team(1), tokens, |_| 1, options, go_on).unwrap_err()
    };
    for at in [0, 13, 23] {
        let mut tokens = common::tokens(24, 500);
        tokens[at] = 512;
        let error = outside(&options, &tokens);
        assert!(matches!(error, Error::Token { token: 512, vocab: 512 }), "{at}: {error}");
    }
    let begun = PerplexityOptions { bos: Some(600), ..options.clone() };
    assert!(matches!(outside(&begun, &common::tokens(24, 500)), Error::Token { token: 600, .. }));
}

/// The tiny checkpoint with a final norm that makes every logit not a number.
fn broken() -> Arc<Model> {
    let mut model = Model::load(&fixture("hf_bitnet/offline"), HeadFormat::Bf16, &team(1)).unwrap();
    model.final_norm.fill(f32::NAN);
    Arc::new(model)
}

#[test]
fn output_that_is_not_finite_is_an_error_and_never_a_number() {
    let model = broken();
    let options = PerplexityOptions { context: 24, stride: 10, bos: None, variants: Vec::new() };
    let go_on_scoring = |_: Scored| Ok::<_, Error>(ControlFlow::Continue(()));
    let error = perplexity(&model, &team(1), &common::tokens(30, 500), |_| 1, &options, go_on_scoring);
    let error = error.unwrap_err();
    assert!(matches!(error, Error::NotFinite { token: 0, .. }), "{error}");
    let text = bpe_model();
    for temperature in [0.0, 1.0] {
        let sampler = SamplerOptions { temperature, ..SamplerOptions::default() };
        let options = GenerateOptions { sampler, ..GenerateOptions::default() };
        let mut session = session(&model, 1, 64, "bf16", "dense");
        let error = generate(&mut session, &text.tokenizer, &[1, 2, 3], &options, go_on).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
    }
}

#[test]
fn a_two_stage_head_generates_the_same_tokens_or_refuses() {
    let two_stage = Model::load(&fixture("hf_bitnet/offline"), HeadFormat::TwoStage, &team(2)).unwrap();
    let (bf16, two_stage) = (offline(), Arc::new(two_stage));
    let text = bpe_model();
    let run = |model: &Arc<Model>, sampler: SamplerOptions| {
        let options = GenerateOptions { sampler, max_tokens: 20, ..GenerateOptions::default() };
        let mut session = session(model, 2, 64, "bf16", "dense");
        generate(&mut session, &text.tokenizer, &[1, 2, 3], &options, go_on).map(|done| done.tokens)
    };
    let sampled = SamplerOptions { temperature: 1.0, ..SamplerOptions::default() };
    for sampler in [SamplerOptions::default(), sampled, SamplerOptions { top_k: 3, ..sampled }] {
        assert_eq!(run(&bf16, sampler).unwrap(), run(&two_stage, sampler).unwrap(), "{sampler:?}");
    }
    let all = SamplerOptions { top_k: 0, ..sampled };
    assert_eq!(run(&bf16, all).unwrap().len(), 20);
    let error = run(&two_stage, all).unwrap_err().to_string();
    assert!(error.contains("--head bf16") && error.contains("--top-k"), "{error}");
}

#[test]
fn progress_counts_tokens_and_is_seen_within_a_chunk() {
    let model = offline();
    let variants =
        vec![Variant::new("f32", "dense").unwrap(), Variant::new("bf16", "window:sinks=1,window=8").unwrap()];
    let options = PerplexityOptions { context: 200, stride: 40, bos: None, variants };
    let mut seen = Vec::new();
    let tokens = common::tokens(250, 500);
    let scores = perplexity(
        &model,
        &team(2),
        &tokens,
        |_| 1,
        &options,
        |scored| {
            seen.push(scored);
            Ok::<_, Error>(ControlFlow::Continue(()))
        },
    );
    assert_eq!(scores.unwrap().map(|scores| scores.len()), Some(3));
    // Two windows; 159 tokens prefilled in two formats, 40 scored by three variants.
    let total = 2 * (2 * 159 + 3 * 40);
    assert!(seen.iter().all(|s| s.total == total) && seen.last().unwrap().done == total);
    let mut steps = seen.windows(2).map(|pair| pair[1].done - pair[0].done);
    assert!(steps.all(|step| (1..=128).contains(&step)), "{seen:?}");
    // Ended in the first prefill: nothing more is done.
    let mut calls = 0;
    let ended = perplexity(
        &model,
        &team(2),
        &tokens,
        |_| 1,
        &options,
        |scored| {
            calls += 1;
            assert!(scored.done <= 128);
            Ok::<_, Error>(ControlFlow::Break(()))
        },
    );
    assert!(ended.unwrap().is_none() && calls == 1);
}
