//! Tokenizers against golden ids of the reference library, chat templates against theirs, generation and perplexity on
//! the tiny checkpoint.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::{argmax, fixture, session, team};
use longbit::text::{
    ChatTemplate, GenerateOptions, Generation, GgufVocabulary, Message, PerplexityOptions, Progress,
    SamplerOptions, Scored, StopReason, TextModel, TextOptions, Tokenizer, Variant, generate, perplexity,
};
use longbit::{Error, HeadFormat, Model};
use serde_json::Value;

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The arrays of `gguf.json`, as the metadata of a GGUF file would give them.
fn vocabulary(kind: &str) -> GgufVocabulary {
    let keys = json(&format!("tokenizer/{kind}/gguf.json"));
    let text = |key: &str| keys[key].as_str().map(str::to_owned);
    let texts = |key: &str| -> Vec<String> {
        keys[key].as_array().into_iter().flatten().map(|t| t.as_str().unwrap().to_owned()).collect()
    };
    let id = |name: &str| keys[format!("tokenizer.ggml.{name}_token_id")].as_u64().map(|id| id as u32);
    let numbers = |key: &str| keys[key].as_array().into_iter().flatten().map(|n| n.as_f64().unwrap());
    GgufVocabulary {
        architecture: "llama".into(),
        model: text("tokenizer.ggml.model").unwrap(),
        pre: text("tokenizer.ggml.pre"),
        tokens: texts("tokenizer.ggml.tokens"),
        scores: numbers("tokenizer.ggml.scores").map(|n| n as f32).collect(),
        token_types: numbers("tokenizer.ggml.token_type").map(|n| n as i32).collect(),
        merges: texts("tokenizer.ggml.merges"),
        bos: id("bos"),
        eos: id("eos"),
        eot: id("eot"),
        unknown: id("unknown"),
        add_bos: keys["tokenizer.ggml.add_bos_token"].as_bool(),
        add_space_prefix: keys["tokenizer.ggml.add_space_prefix"].as_bool(),
        chat_template: text("tokenizer.chat_template"),
    }
}

/// Both tokenizers of a kind: from `tokenizer.json` and from GGUF arrays.
fn both(kind: &str) -> [(&'static str, Tokenizer); 2] {
    let file = Tokenizer::from_file(&fixture(&format!("tokenizer/{kind}/tokenizer.json"))).unwrap();
    let arrays = Tokenizer::from_bpe_arrays(&vocabulary(kind)).unwrap();
    [("tokenizer.json", file), ("GGUF arrays", arrays)]
}

#[test]
fn ids_and_texts_equal_the_goldens() {
    for kind in ["bpe", "spm"] {
        let golden = json(&format!("tokenizer/{kind}/goldens.json"));
        for (source, tokenizer) in both(kind) {
            let mut seen = 0;
            for case in ["cases", "special_cases"].iter().flat_map(|key| golden[key].as_array().unwrap()) {
                let text = case["text"].as_str().unwrap();
                let plain = tokenizer.encode(text, false).unwrap();
                assert_eq!(plain, ids(&case["ids"]), "{kind}, {source}: {text:?}");
                let with = tokenizer.encode(text, true).unwrap();
                assert_eq!(with, ids(&case["ids_with_special"]), "{kind}, {source}: {text:?}");
                check_decoding(kind, source, &tokenizer, &plain, case);
                seen += 1;
            }
            for case in golden["decode_cases"].as_array().unwrap() {
                check_decoding(kind, source, &tokenizer, &ids(&case["ids"]), case);
                seen += 1;
            }
            assert!(seen > 100, "{seen} cases");
        }
    }
}

#[track_caller]
fn check_decoding(kind: &str, source: &str, tokenizer: &Tokenizer, tokens: &[u32], case: &Value) {
    for (skip, key) in [(false, "decoded"), (true, "decoded_without_special")] {
        let expected = case[key].as_str().unwrap();
        assert_eq!(tokenizer.decode(tokens, skip).unwrap(), expected, "{kind}, {source}: {tokens:?}");
        // Token by token, but for broken bytes, which the two treat differently in sentencepiece vocabularies.
        if kind == "bpe" || !expected.contains('\u{FFFD}') {
            let mut stream = tokenizer.stream(skip);
            let mut text = String::new();
            tokens.iter().for_each(|&token| stream.push(token, &mut text));
            stream.finish(&mut text);
            assert_eq!(text, expected, "{kind}, {source}: {tokens:?} in a stream");
        }
    }
}

#[test]
fn a_stream_gives_whole_characters_only() {
    for (_, tokenizer) in both("bpe") {
        let tokens = tokenizer.encode("a😀é日", false).unwrap();
        let mut stream = tokenizer.continuation(true);
        let mut pieces = Vec::new();
        for &token in &tokens {
            let mut piece = String::new();
            stream.push(token, &mut piece);
            pieces.push(piece);
        }
        assert!(pieces.len() > 4, "some character takes several tokens: {pieces:?}");
        assert_eq!(pieces.concat(), "a😀é日");
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        let mut end = String::new();
        stream.finish(&mut end);
        assert_eq!(end, "");
        // Half a character at the end, and half a character that something else follows.
        let half = tokenizer.encode("😀", false).unwrap()[0];
        let mut text = String::new();
        stream.push(half, &mut text);
        assert_eq!(text, "");
        stream.push(tokens[0], &mut text);
        stream.push(half, &mut text);
        stream.finish(&mut text);
        assert_eq!(text, "\u{FFFD}a\u{FFFD}");
    }
    let (_, spm) = &both("spm")[0];
    let tokens = spm.encode("Hello", false).unwrap();
    let mut text = String::new();
    let mut stream = spm.continuation(true);
    tokens.iter().for_each(|&t| stream.push(t, &mut text));
    assert_eq!(text, " Hello", "after a prompt the space is a space");
}

#[test]
fn ids_outside_the_vocabulary_are_errors() {
    for kind in ["bpe", "spm"] {
        for (_, tokenizer) in both(kind) {
            assert_eq!(tokenizer.vocab_size(), 512);
            let error = tokenizer.decode(&[1, 512], false).unwrap_err();
            assert!(matches!(error, Error::Token { token: 512, vocab: 512 }), "{error}");
        }
    }
}

#[test]
fn chat_prompts_equal_the_goldens() {
    let golden = json("tokenizer/bpe/chat.json");
    let (bos, eos) = (golden["bos_token"].as_str().unwrap(), golden["eos_token"].as_str().unwrap());
    let conversations: Vec<Vec<Message>> = golden["conversations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| {
            let text = |v: &Value| v.as_str().unwrap().to_owned();
            let messages = c["messages"].as_array().unwrap();
            messages.iter().map(|m| Message::new(text(&m["role"]), text(&m["content"]))).collect()
        })
        .collect();
    let mut rendered = 0;
    for case in golden["cases"].as_array().unwrap() {
        let source = golden["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let template = ChatTemplate::new(source, bos, eos).unwrap();
        let messages = &conversations[case["conversation"].as_u64().unwrap() as usize];
        let got = template.render(messages, case["add_generation_prompt"].as_bool().unwrap());
        match case["text"].as_str() {
            Some(expected) => {
                let text = got.unwrap();
                assert_eq!(text, expected, "{case}");
                if let Some(expected) = case.get("ids").filter(|ids| ids.is_array()) {
                    for (_, tokenizer) in [bpe_model().tokenizer].map(|t| ("directory", t)) {
                        assert_eq!(tokenizer.encode_chat(&text).unwrap(), ids(expected), "{case}");
                    }
                }
                rendered += 1;
            }
            None => assert!(got.is_err(), "{case}: {got:?}"),
        }
    }
    assert!(rendered >= 8, "{rendered}");
}

fn bpe_model() -> TextModel {
    TextModel::open(&fixture("tokenizer/bpe"), &TextOptions::default()).unwrap()
}

#[test]
fn a_directory_gives_tokenizer_template_and_both_stop_tokens() {
    // The configuration of the tiny model names a third, which its tokenizer did not know of.
    for (dir, stops) in [("tokenizer/bpe", vec![510, 511]), ("hf_bitnet/offline", vec![2, 510, 511])] {
        let model = TextModel::open(&fixture(dir), &TextOptions::default()).unwrap();
        assert_eq!(model.stop_tokens, stops, "{dir}");
        assert_eq!((model.tokenizer.bos(), model.tokenizer.eos()), (Some(509), Some(510)));
        assert!(model.tokenizer.is_special(509) && !model.tokenizer.is_special(508));
        let tokens = model.encode_chat(&[Message::new("user", "Hello!")]).unwrap();
        assert_eq!(tokens.iter().filter(|&&t| t == 509).count(), 1, "one beginning of the text");
        assert_eq!(model.tokenizer.decode(&tokens[1..], false).unwrap(), "User: Hello!<|eot_id|>Assistant: ");
    }
    let spm = TextModel::open(&fixture("tokenizer/spm"), &TextOptions::default()).unwrap();
    assert_eq!(spm.stop_tokens, [2]);
    let error = spm.encode_chat(&[Message::new("user", "Hello!")]).unwrap_err().to_string();
    assert!(error.contains("no chat template"), "{error}");
}

#[test]
fn stop_tokens_come_from_wherever_they_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let spm = std::fs::read_to_string(fixture("tokenizer/spm/tokenizer.json")).unwrap();
    put("tokenizer.json", &spm);
    let stops = || TextModel::open(dir.path(), &TextOptions::default()).unwrap().stop_tokens;
    assert_eq!(stops(), Vec::<u32>::new(), "nothing names one");
    put("config.json", r#"{"eos_token_id": 7, "bos_token_id": 1}"#);
    assert_eq!(stops(), [7]);
    put("generation_config.json", r#"{"eos_token_id": [9, 300]}"#);
    assert_eq!(stops(), [7, 9, 300]);
    put("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}, "chat_template": "one"}"#);
    assert_eq!(stops(), [2, 7, 9, 300]);
    // A template in a file of its own comes first; several in the settings have names.
    let chat =
        || TextModel::open(dir.path(), &TextOptions::default()).unwrap().chat.unwrap().source().to_owned();
    assert_eq!(chat(), "one");
    let named = r#"{"chat_template": [{"name": "tools", "template": "two"}, {"name": "default", "template": "three"}]}"#;
    put("tokenizer_config.json", named);
    assert_eq!(chat(), "three");
    put("chat_template.jinja", "four");
    assert_eq!(chat(), "four");
    put("chat_template.jinja", "{% if %}");
    let error = TextModel::open(dir.path(), &TextOptions::default()).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("cannot be used"), "{error}");
}

/// A GGUF file with the metadata of `gguf.json` and one tiny tensor.
fn gguf_file(dir: &Path, kind: &str, changes: &[(&str, longbit::gguf::Value)]) -> std::path::PathBuf {
    use longbit::gguf::{Array, Metadata, Value as Kv, Writer};
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Kv::String("llama".into()));
    for (key, value) in json(&format!("tokenizer/{kind}/gguf.json")).as_object().unwrap() {
        let value = match value {
            Value::String(text) => Kv::String(text.clone()),
            Value::Bool(flag) => Kv::Bool(*flag),
            Value::Number(number) => Kv::U32(number.as_u64().unwrap() as u32),
            Value::Array(items) if items[0].is_string() => {
                Kv::Array(Array::Strings(items.iter().map(|i| i.as_str().unwrap().to_owned()).collect()))
            }
            Value::Array(items) if key.ends_with("scores") => {
                Kv::Array(Array::F32(items.iter().map(|i| i.as_f64().unwrap() as f32).collect()))
            }
            Value::Array(items) => {
                Kv::Array(Array::I32(items.iter().map(|i| i.as_i64().unwrap() as i32).collect()))
            }
            other => panic!("{key}: {other}"),
        };
        metadata.set(key.as_str(), value);
    }
    for (key, value) in changes {
        metadata.set(*key, value.clone());
    }
    let path = dir.join(format!("{kind}.gguf"));
    let mut bytes = Vec::new();
    Writer::new(metadata).unwrap().write(&mut bytes, |_, _| Ok(())).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_gguf_file_gives_the_same_and_its_wrong_template_is_replaced() {
    use longbit::gguf::Value as Kv;
    let dir = tempfile::tempdir().unwrap();
    let open = |kind: &str, changes: &[(&str, Kv)]| {
        TextModel::open(&gguf_file(dir.path(), kind, changes), &TextOptions::default())
    };
    let hello = [Message::new("user", "Hello!")];
    let expected = bpe_model().encode_chat(&hello).unwrap();

    let plain = open("bpe", &[]).unwrap();
    assert_eq!((plain.stop_tokens.clone(), plain.notes.len()), (vec![510, 511], 0));
    assert_eq!(plain.encode_chat(&hello).unwrap(), expected);

    let bitnet = ("general.architecture", Kv::String("bitnet-b1.58".into()));
    let right = open("bpe", std::slice::from_ref(&bitnet)).unwrap();
    assert_eq!(
        (right.encode_chat(&hello).unwrap(), right.notes.len()),
        (expected.clone(), 0),
        "it was right"
    );

    let wrong = "{% for message in messages %}{{ 'Human: ' + message['content'] + '\\n\\nBITNETAssistant: ' }}{% endfor %}";
    let wrong = ("tokenizer.chat_template", Kv::String(wrong.into()));
    for changes in [vec![wrong.clone()], vec![wrong.clone(), bitnet.clone()]] {
        let model = open("bpe", &changes).unwrap();
        assert_eq!(model.encode_chat(&hello).unwrap(), expected);
        assert!(model.notes[0].contains("not the one that the model was trained with"), "{:?}", model.notes);
    }
    // A template that the user gives wins, and then there is nothing to say.
    let own = dir.path().join("own.jinja");
    std::fs::write(&own, "{{ bos_token }}{{ messages[0].content }}").unwrap();
    let options = TextOptions { chat_template: Some(own), ..TextOptions::default() };
    let model = TextModel::open(&gguf_file(dir.path(), "bpe", &[wrong, bitnet]), &options).unwrap();
    assert_eq!(model.encode_chat(&hello).unwrap(), model.tokenizer.encode("Hello!", true).unwrap());
    assert!(model.notes.is_empty());

    let spm = open("spm", &[]).unwrap();
    assert_eq!(spm.stop_tokens, [2]);
    let (_, file) = &both("spm")[0];
    assert_eq!(spm.tokenizer.encode("a b", true).unwrap(), file.encode("a b", true).unwrap());

    // A whole tokenizer.json in the file comes before the arrays.
    let whole = std::fs::read_to_string(fixture("tokenizer/spm/tokenizer.json")).unwrap();
    let key = "tokenizer.huggingface.json";
    let model =
        open("bpe", &[(key, Kv::String(whole)), ("tokenizer.ggml.bos_token_id", Kv::U32(1))]).unwrap();
    assert_eq!(model.tokenizer.encode("a b", true).unwrap(), file.encode("a b", true).unwrap());
    let error = open("bpe", &[(key, Kv::String("{".into()))]).unwrap_err().to_string();
    assert!(error.contains("bpe.gguf") && error.contains(key), "{error}");

    let error = open("bpe", &[("tokenizer.ggml.model", Kv::String("bert".into()))]).unwrap_err().to_string();
    assert!(error.contains("bpe.gguf") && error.contains("`bert` is not supported"), "{error}");
    let error = open("bpe", &[("tokenizer.ggml.tokens", Kv::U32(1))]).unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.tokens"), "{error}");
}

#[test]
fn damaged_tokenizer_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let good: Value = json("tokenizer/bpe/tokenizer.json");
    let refused = |change: &dyn Fn(&mut Value), says: &str| {
        let mut value = good.clone();
        change(&mut value);
        std::fs::write(&path, value.to_string()).unwrap();
        let message = Tokenizer::from_file(&path).unwrap_err().to_string();
        assert!(message.contains(says) && message.contains("tokenizer.json"), "{says}: {message}");
    };
    refused(&|v| v["model"]["type"] = "Unigram".into(), "`Unigram`; only BPE");
    refused(&|v| v["model"]["vocab"]["far"] = 9_000_000.into(), "ids up to 9000000");
    refused(&|v| v["model"]["vocab"]["twice"] = 7.into(), "both have id 7");
    refused(&|v| v["model"]["vocab"]["<|eot_id|>"] = 508.into(), "has id 511 and id 508");
    refused(&|v| v["model"]["merges"][0] = serde_json::json!(["zz", "y"]), "needs the token `zz`");
    // A concatenation longer than any token, which the library would copy past the end of its buffer.
    let long = "Ġthe";
    refused(&|v| v["model"]["merges"][0] = serde_json::json!([long, long]), "needs the token `ĠtheĠthe`");
    refused(&|v| v["model"]["merges"][0] = "alone".into(), "`alone` is not a pair");
    refused(&|v| v["model"]["continuing_subword_prefix"] = "####".into(), "continuing_subword_prefix");
    refused(&|v| v["model"]["dropout"] = 0.5.into(), "dropout");
    refused(&|v| v["model"]["unk_token"] = "nowhere".into(), "`nowhere` is not in the vocabulary");
    refused(
        &|v| v["normalizer"] = serde_json::json!({"type": "Precompiled"}),
        "`Precompiled` is not supported",
    );
    refused(&|v| v["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(".into(), "pre_tokenizer");
    refused(&|v| v["decoder"] = serde_json::json!({"type": "CTC"}), "CTC");
    refused(&|v| v["added_tokens"][0]["content"] = "".into(), "is empty");
    refused(&|v| v["model"]["vocab"] = serde_json::json!({}), "needs the token");
    refused(&|v| v["model"] = Value::Null, "not a tokenizer");

    // Cut off anywhere, the file is no tokenizer.
    let text = good.to_string();
    for cut in (0..text.len()).step_by(97).filter(|&cut| text.is_char_boundary(cut)) {
        std::fs::write(&path, &text[..cut]).unwrap();
        assert!(Tokenizer::from_file(&path).is_err(), "{cut}");
    }
    std::fs::File::create(&path).unwrap().set_len((64 << 20) + 1).unwrap();
    assert!(Tokenizer::from_file(&path).unwrap_err().to_string().contains("more than 67108864 bytes"));
}

#[test]
fn texts_that_the_splitting_would_mistake_are_refused() {
    let (_, tokenizer) = &both("bpe")[0];
    let blank = " ".repeat(200_000);
    let text = format!("a{blank}b");
    assert_eq!(tokenizer.decode(&tokenizer.encode(&text, false).unwrap(), false).unwrap(), text);
    let error = tokenizer.encode(&" \n".repeat(200_000), false).unwrap_err().to_string();
    assert!(error.contains("400000 white-space characters"), "{error}");
    let word = "aé".repeat(50_000);
    assert_eq!(tokenizer.decode(&tokenizer.encode(&word, false).unwrap(), false).unwrap(), word);
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
    for dtype in longbit::kv::KV_DTYPES {
        variants.push(Variant::new(dtype.name(), "dense").unwrap());
    }
    // A window that holds everything is dense, decoded step by step: it must give the very numbers of the dense passes.
    variants.push(Variant::new("bf16", "window:sinks=0,window=64").unwrap());
    variants.push(Variant::new("bf16", "window:sinks=1,window=4").unwrap());
    let options = PerplexityOptions { context: 32, stride: 12, bos: Some(509), variants };
    let scores = score(&options, &tokens);
    let by_name: BTreeMap<_, _> = scores.iter().map(|s| ((s.kv.as_str(), s.method.as_str()), s)).collect();
    assert_eq!(by_name.len(), scores.len(), "the baseline stands once");
    assert_eq!(scores.len(), longbit::kv::KV_DTYPES.len() + 2);
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
