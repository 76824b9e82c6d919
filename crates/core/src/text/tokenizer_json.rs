//! `tokenizer.json`, as the Hugging Face `tokenizers` library writes it.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;

use super::bytes::{METASPACE, Spelling};
use super::tokenizer::{Parts, Tokenizer};
use crate::error::{Error, Result};

/// Largest file that is read (bytes); that of Llama 3 has 9 MB.
const MAX_FILE: u64 = 64 << 20;
/// Longest text in the description of a processing step, such as a regular expression (bytes).
const MAX_TEXT: usize = 4096;
/// Longest text that a normalizer puts in the place of another (bytes).
const MAX_REPLACEMENT: usize = 8;
/// How many times as long normalizers may make a text, Unicode's own forms aside, which are bounded by their standard.
/// `▁` in front of a text and in the place of every space is 12.
const MAX_GROWTH: usize = 16;
/// Deepest nesting of processing steps.
const MAX_DEPTH: usize = 8;

/// Processing steps that are supported: those which published BPE tokenizers use and whose work is in proportion to the
/// text.
const NORMALIZERS: &[&str] =
    &["Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip"];
const PRE_TOKENIZERS: &[&str] = &[
    "Sequence",
    "ByteLevel",
    "Split",
    "Metaspace",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
];
const POST_PROCESSORS: &[&str] = &["Sequence", "ByteLevel", "TemplateProcessing"];

#[derive(Deserialize)]
struct Kinds {
    model: Kind,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    name: Option<String>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    added_tokens: Vec<RawAdded>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: RawModel,
}

#[derive(Deserialize)]
struct RawAdded {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct RawModel {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// A pair of tokens: two texts, or in older files one with a space between.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

/// Reads the tokenizer at `path`.
pub(super) fn read(path: &Path) -> Result<Tokenizer> {
    let fail = |reason: String| Error::Config { path: path.into(), reason };
    parse(&crate::files::read(path, MAX_FILE)?).map_err(fail)
}

/// Builds the tokenizer that the text of such a file describes; the error is a sentence without a place.
pub(super) fn parse(text: &[u8]) -> Result<Tokenizer, String> {
    if text.len() as u64 > MAX_FILE {
        return Err(format!("the tokenizer has more than {MAX_FILE} bytes; larger ones are not read"));
    }
    parts(text).and_then(Tokenizer::build)
}

fn parts(text: &[u8]) -> Result<Parts, String> {
    let not_one = |e: serde_json::Error| format!("not a tokenizer: {e}");
    let kinds: Kinds = serde_json::from_slice(text).map_err(not_one)?;
    if let Some(name) = kinds.model.name.filter(|name| name != "BPE") {
        return Err(format!("the tokenizer's model is `{name}`; only BPE is supported"));
    }
    let raw: Raw = serde_json::from_slice(text).map_err(not_one)?;
    let model = raw.model;
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err("continuing_subword_prefix and end_of_word_suffix are not supported".into());
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err("dropout makes tokens random; remove it from the tokenizer's model".into());
    }
    let steps = [
        ("normalizer", &raw.normalizer, NORMALIZERS),
        ("pre_tokenizer", &raw.pre_tokenizer, PRE_TOKENIZERS),
        ("post_processor", &raw.post_processor, POST_PROCESSORS),
    ];
    for (what, value, known) in steps {
        value.as_ref().map_or(Ok(()), |value| check_step(what, value, known, 0))?;
    }
    check_growth(raw.normalizer.as_ref())?;
    let spelling = spelling(raw.decoder.as_ref(), raw.pre_tokenizer.as_ref())?;
    let merge = |m| match m {
        Merge::Pair(left, right) => Ok((left, right)),
        Merge::Joined(text) => match text.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(format!("the merge `{text}` is not a pair")),
        },
    };
    Ok(Parts {
        vocab: model.vocab,
        merges: model.merges.into_iter().map(merge).collect::<Result<_, _>>()?,
        unk: model.unk_token,
        fuse_unk: model.fuse_unk,
        byte_fallback: model.byte_fallback,
        ignore_merges: model.ignore_merges,
        added: raw.added_tokens.into_iter().map(|a| (a.id, a.token)).collect(),
        normalizer: step("normalizer", raw.normalizer)?,
        pre_tokenizer: step("pre_tokenizer", raw.pre_tokenizer)?,
        post_processor: step("post_processor", raw.post_processor)?,
        spelling: Some(spelling),
    })
}

fn step<T: serde::de::DeserializeOwned>(what: &str, value: Option<Value>) -> Result<Option<T>, String> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value).map(Some).map_err(|e| format!("{what}: {e}")),
    }
}

/// Every step in `value` must be in `known`; its texts are short and its nesting shallow.
fn check_step(what: &str, value: &Value, known: &[&str], depth: usize) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("{what} is nested deeper than {MAX_DEPTH} levels"));
    }
    match value {
        Value::Object(map) => {
            if let Some(name) = map.get("type").and_then(Value::as_str)
                && !known.contains(&name)
            {
                return Err(format!("{what} `{name}` is not supported; supported are {}", known.join(", ")));
            }
            check_template(what, map)?;
            map.values().try_for_each(|value| check_step(what, value, known, depth + 1))
        }
        Value::Array(values) => values.iter().try_for_each(|value| check_step(what, value, known, depth + 1)),
        Value::String(text) if text.len() > MAX_TEXT => {
            Err(format!("{what} holds a text of {} bytes; at most {MAX_TEXT} are accepted", text.len()))
        }
        _ => Ok(()),
    }
}

/// Normalizers must not make a text much longer: what follows takes memory in proportion.
fn check_growth(normalizer: Option<&Value>) -> Result<(), String> {
    let mut steps = Vec::new();
    flatten(normalizer, "normalizers", &mut steps, 0);
    let mut growth = 1usize;
    for step in steps {
        let text = |key: &str| step.get(key).and_then(Value::as_str).unwrap_or("");
        let times = match name(step) {
            // Once for every stretch between two added tokens, which may be one byte.
            "Prepend" => 1 + text("prepend").len(),
            "Replace" => {
                let content = text("content").len();
                if content > MAX_REPLACEMENT {
                    return Err(format!(
                        "the normalizer `Replace` puts in {content} bytes; at most {MAX_REPLACEMENT} are accepted"
                    ));
                }
                match step.pointer("/pattern/String").and_then(Value::as_str) {
                    Some(pattern) if !pattern.is_empty() => content.div_ceil(pattern.len()).max(1),
                    // An expression can match nothing, before every byte.
                    _ => 1 + content,
                }
            }
            _ => 1,
        };
        growth = growth.saturating_mul(times);
    }
    if growth > MAX_GROWTH {
        return Err(format!(
            "the normalizers can make a text {growth} times as long; at most {MAX_GROWTH} times is accepted"
        ));
    }
    Ok(())
}

/// A template names only special tokens that it lists: the library looks them up without asking.
fn check_template(what: &str, step: &serde_json::Map<String, Value>) -> Result<(), String> {
    if step.get("type").and_then(Value::as_str) != Some("TemplateProcessing") {
        return Ok(());
    }
    let listed = step.get("special_tokens").and_then(Value::as_object);
    let parts = ["single", "pair"].into_iter().filter_map(|key| step.get(key)?.as_array()).flatten();
    for id in parts.filter_map(|part| part.pointer("/SpecialToken/id")?.as_str()) {
        if !listed.is_some_and(|listed| listed.contains_key(id)) {
            return Err(format!(
                "{what} uses the special token `{id}`, which its special_tokens do not list"
            ));
        }
    }
    Ok(())
}

/// How the vocabulary spells bytes, from the decoder; without one, from the pre-tokenizer.
fn spelling(decoder: Option<&Value>, pre_tokenizer: Option<&Value>) -> Result<Spelling, String> {
    let mut steps = Vec::new();
    flatten(decoder, "decoders", &mut steps, 0);
    if steps.is_empty() {
        let mut before = Vec::new();
        flatten(pre_tokenizer, "pretokenizers", &mut before, 0);
        steps.extend(before.into_iter().filter(|step| matches!(name(step), "ByteLevel" | "Metaspace")));
    }
    if matches!(steps[..], [only] if name(only) == "ByteLevel") {
        return Ok(Spelling::ByteLevel);
    }
    let (mut bytes, mut strip_first, mut spaces) = (false, false, false);
    for step in steps {
        let text = |key: &str| step.get(key).and_then(Value::as_str);
        let supported = match name(step) {
            "Replace" => {
                spaces = true;
                let from = step.pointer("/pattern/String").and_then(Value::as_str);
                from == Some(METASPACE) && text("content") == Some(" ")
            }
            "ByteFallback" => {
                bytes = true;
                true
            }
            "Fuse" => true,
            "Strip" => {
                strip_first = true;
                let count = |key| step.get(key).and_then(Value::as_u64);
                text("content") == Some(" ") && count("start") == Some(1) && count("stop") == Some(0)
            }
            "Metaspace" => {
                spaces = true;
                // Before the scheme there was a flag.
                let flag = step.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(true);
                strip_first |= text("prepend_scheme").map_or(flag, |scheme| scheme != "never");
                text("replacement").is_none_or(|r| r == METASPACE)
            }
            _ => false,
        };
        if !supported {
            return Err(format!("the decoder step {step} is not supported"));
        }
    }
    if !spaces {
        return Err(
            "there is no decoder that says how spaces are spelled; ByteLevel and Metaspace are supported"
                .into(),
        );
    }
    Ok(Spelling::Metaspace { bytes, strip_first })
}

fn name(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or("")
}

/// The steps of a sequence, in order.
fn flatten<'a>(value: Option<&'a Value>, list: &str, into: &mut Vec<&'a Value>, depth: usize) {
    let Some(value) = value.filter(|value| !value.is_null() && depth <= MAX_DEPTH) else { return };
    match value.get(list).and_then(Value::as_array).filter(|_| name(value) == "Sequence") {
        Some(steps) => steps.iter().for_each(|step| flatten(Some(step), list, into, depth + 1)),
        None => into.push(value),
    }
}
