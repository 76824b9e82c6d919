//! Tokenizers against golden ids of the reference library, chat templates against theirs, and what a checkpoint says of
//! both.

mod common;

use std::path::Path;

use common::fixture;
use longbit::Error;
use longbit::text::{ChatTemplate, GgufVocabulary, Message, TextModel, TextOptions, Tokenizer};
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
        let template = ChatTemplate::new(source, bos, eos);
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
    // A damaged template is in nobody's way who does not chat, and not looked at where another is given.
    let model = TextModel::open(dir.path(), &TextOptions::default()).unwrap();
    let error = model.encode_chat(&[Message::new("user", "x")]).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("cannot be used"), "{error}");
    std::fs::write(dir.path().join("chat_template.jinja"), b"\xFF").unwrap();
    assert!(TextModel::open(dir.path(), &TextOptions::default()).is_err());
    put("own.jinja", "{{ messages[0].content }}");
    let own = TextOptions { chat_template: Some(dir.path().join("own.jinja")), ..TextOptions::default() };
    let model = TextModel::open(dir.path(), &own).unwrap();
    let tokens = model.encode_chat(&[Message::new("user", "x y")]).unwrap();
    assert_eq!(tokens, model.tokenizer.encode("x y", true).unwrap());
    // A beginning that the tokenizer does not have belongs to another tokenizer.
    put("config.json", r#"{"bos_token_id": 512}"#);
    let error = TextModel::open(dir.path(), &own).unwrap_err().to_string();
    assert!(error.contains("has 512 tokens") && error.contains("bos_token_id is 512"), "{error}");
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
fn both_ends_of_llama_3_stop_an_answer_whatever_the_file_says_of_them() {
    use longbit::gguf::{Array, Value as Kv};
    let dir = tempfile::tempdir().unwrap();
    let right = vocabulary("bpe").token_types;
    // Plain text and user-defined, as some conversions have it, and no key that names the second.
    for kind in [1, 4] {
        let mut kinds = right.clone();
        kinds[509..512].fill(kind);
        let changes = [
            ("tokenizer.ggml.token_type", Kv::Array(Array::I32(kinds))),
            ("tokenizer.ggml.eot_token_id", Kv::U32(510)),
        ];
        let path = gguf_file(dir.path(), "bpe", &changes);
        let model = TextModel::open(&path, &TextOptions::default()).unwrap();
        assert_eq!(model.stop_tokens, [510, 511], "{kind}");
        let ids = model.tokenizer.encode("Hi<|eot_id|>", true).unwrap();
        assert_eq!((ids.first(), ids.last()), (Some(&509), Some(&511)), "{kind}");
        assert_eq!(model.tokenizer.decode(&ids, true).unwrap(), "Hi", "{kind}");
    }
    // A tokenizer given beside the file has the same ends, and must have room for them.
    let path = gguf_file(dir.path(), "bpe", &[]);
    let beside = |tokenizer: &str| {
        let options = TextOptions { tokenizer: Some(fixture(tokenizer)), ..TextOptions::default() };
        TextModel::open(&path, &options)
    };
    let model = beside("tokenizer/bpe/tokenizer.json").unwrap();
    assert_eq!((model.tokenizer.bos(), model.tokenizer.prompts_start_with_bos()), (Some(509), true));
    let path =
        gguf_file(dir.path(), "bpe", &[("tokenizer.ggml.tokens", Kv::Array(Array::Strings(Vec::new())))]);
    assert!(TextModel::open(&path, &TextOptions::default()).unwrap_err().to_string().contains("--tokenizer"));
    let path = gguf_file(dir.path(), "bpe", &[("tokenizer.ggml.eos_token_id", Kv::U32(512))]);
    let options =
        TextOptions { tokenizer: Some(fixture("tokenizer/bpe/tokenizer.json")), ..TextOptions::default() };
    let error = TextModel::open(&path, &options).unwrap_err().to_string();
    assert!(error.contains("eos_token_id is 512; there are 512 tokens"), "{error}");
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
    let replace = |n: usize, content: &str| {
        let step = serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": content});
        serde_json::json!({"type": "Sequence", "normalizers": vec![step; n]})
    };
    refused(&|v| v["normalizer"] = replace(1, "123456789"), "`Replace` puts in 9 bytes; at most 8");
    refused(&|v| v["normalizer"] = replace(2, "12345"), "25 times as long; at most 16");
    refused(&|v| v["normalizer"] = replace(100, "12345678"), "times as long");
    let before = serde_json::json!({"type": "Prepend", "prepend": "x".repeat(16)});
    refused(&|v| v["normalizer"] = before.clone(), "17 times as long");
    let nothing = serde_json::json!({"type": "Replace", "pattern": {"Regex": "b*"}, "content": "123456"});
    let twice = serde_json::json!({"type": "Sequence", "normalizers": [nothing.clone(), nothing]});
    refused(&|v| v["normalizer"] = twice.clone(), "49 times as long");
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
