//! The vocabulary on its way from one container to another: tokenizer files of a directory, or keys of a GGUF file.
//!
//! GGUF gets the whole `tokenizer.json` under the key that its specification has for it, and beside it the arrays that
//! llama.cpp reads, as its converter writes them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use crate::checkpoint::{Checkpoint, Container};
use crate::error::{Error, Result};
use crate::files::{if_there, read};
use crate::gguf::{Array, Metadata, Value};
use crate::text::{LLAMA3_SPLIT, Named, TextModel, TextOptions, token_type};

/// Largest tokenizer file that is carried over.
const MAX_FILE: u64 = 64 << 20;

/// What a model knows of text, in both forms.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// Name of the model.
    pub(super) name: String,
    /// Keys for GGUF.
    pub(super) keys: Metadata,
    /// Files for a directory.
    files: BTreeMap<&'static str, Vec<u8>>,
    /// Token that begins a text.
    pub(super) bos: Option<u32>,
    /// Token that ends one.
    pub(super) eos: Option<u32>,
    /// What is lost on the way, or read in another way.
    note: Option<String>,
}

const TOKENIZER: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const GENERATION: &str = "generation_config.json";

/// Tokenizer files of a directory.
pub(super) const FILES: [&str; 5] =
    [TOKENIZER, SETTINGS, GENERATION, "special_tokens_map.json", "chat_template.jinja"];

impl Vocabulary {
    /// Of a model that has none.
    pub fn none(name: &str) -> Self {
        Vocabulary { name: name.into(), ..Vocabulary::default() }
    }

    /// That of a checkpoint; empty where it has no tokenizer. Its ends, its stop tokens and its chat template are those
    /// that [`TextModel`] uses it with.
    ///
    /// # Errors
    /// A tokenizer file is damaged, or larger than any is.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.path();
        let mut vocabulary = Vocabulary::none(&name_of(path));
        match checkpoint.container() {
            Container::Gguf(header) => vocabulary.take_keys(path, &header.metadata)?,
            Container::HuggingFace => vocabulary.take_files(path, checkpoint.config().vocab)?,
        }
        Ok(vocabulary)
    }

    /// Files for a directory: name and content.
    pub(super) fn files(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        self.files.iter().map(|(name, content)| (*name, content.as_slice()))
    }

    /// What the reader of the result should know.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Adds to what the reader of the result should know.
    fn remark(&mut self, text: String) {
        match &mut self.note {
            Some(note) => {
                note.push_str("; ");
                note.push_str(&text);
            }
            None => self.note = Some(text),
        }
    }

    /// How the text of the checkpoint at `path` is used; what its configuration names where its tokenizer or its
    /// template cannot be used.
    fn text(&mut self, path: &Path, there: bool) -> Result<(Option<TextModel>, Named)> {
        let mut named = TextModel::named(path)?;
        let text = match there.then(|| TextModel::open(path, &TextOptions::default())) {
            Some(Ok(text)) => Some(text),
            Some(Err(error)) => {
                self.remark(format!("its text is carried over as it is and cannot be used here: {error}"));
                None
            }
            None => None,
        };
        if let Some(text) = &text {
            (named.bos, named.eos) = (text.tokenizer.bos(), text.tokenizer.eos());
            named.stops = text.stop_tokens.clone();
            named.template = text.chat.as_ref().map(|chat| (path.to_path_buf(), chat.source().to_string()));
            named.add_bos = text.tokenizer.prompts_start_with_bos();
            text.notes.iter().for_each(|note| self.remark(note.clone()));
        }
        named.stops.sort_unstable();
        named.stops.dedup();
        (self.bos, self.eos) = (named.bos, named.eos);
        if let Some((_, template)) = &named.template {
            self.keys.set(TextModel::CHAT_KEY, Value::String(template.clone()));
        }
        if there || !named.stops.is_empty() {
            self.keys.set(TextModel::STOP_KEY, Value::Array(Array::U32(named.stops.clone())));
        }
        Ok((text, named))
    }

    fn take_keys(&mut self, path: &Path, metadata: &Metadata) -> Result<()> {
        let fail = |source| Error::Gguf { path: path.to_path_buf(), source };
        if let Some(name) = metadata.str("general.name").map_err(fail)? {
            self.name = name.into();
        }
        for (key, value) in metadata.iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
            self.keys.set(key, value.clone());
        }
        if self.keys.is_empty() {
            return Ok(());
        }
        let (text, named) = self.text(path, true)?;
        match metadata.str(TextModel::TOKENIZER_KEY).map_err(fail)? {
            Some(tokenizer) => drop(self.files.insert(TOKENIZER, tokenizer.as_bytes().to_vec())),
            None => self.remark(format!(
                "the file has no {}: its vocabulary can be carried into another GGUF file, but not into a directory, \
                 which needs a tokenizer.json",
                TextModel::TOKENIZER_KEY
            )),
        }
        let mut settings = serde_json::Map::new();
        let tokens = metadata.strings("tokenizer.ggml.tokens").map_err(fail)?.unwrap_or_default();
        let spelled = text.map(|text| text.spelled_ends()).unwrap_or_default();
        for (key, id, spelled) in [("bos_token", self.bos, spelled.0), ("eos_token", self.eos, spelled.1)] {
            let listed = id.and_then(|id| tokens.get(id as usize)).cloned();
            if let Some(token) = listed.or(Some(spelled)).filter(|token| !token.is_empty()) {
                settings.insert(key.into(), token.into());
            }
        }
        settings.insert("add_bos_token".into(), named.add_bos.into());
        if let Some((_, template)) = named.template {
            settings.insert("chat_template".into(), template.into());
        }
        settings.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        self.files.insert(SETTINGS, serde_json::to_vec_pretty(&settings).unwrap_or_default());
        self.add_stops(Json::Null, &named.stops);
        Ok(())
    }

    /// Makes generation_config.json list all tokens that end an answer.
    fn add_stops(&mut self, generation: Json, stops: &[u32]) {
        let mut all = match generation {
            Json::Object(all) => all,
            _ => serde_json::Map::new(),
        };
        let listed: Option<Vec<u64>> = match all.get("eos_token_id") {
            Some(Json::Array(ids)) => ids.iter().map(Json::as_u64).collect(),
            Some(id) => id.as_u64().map(|id| vec![id]),
            None => Some(Vec::new()),
        };
        let mut listed = listed.unwrap_or_default();
        listed.sort_unstable();
        if listed.iter().copied().eq(stops.iter().map(|id| u64::from(*id))) {
            return;
        }
        if let Some(bos) = self.bos {
            all.entry("bos_token_id").or_insert(bos.into());
        }
        all.insert("eos_token_id".into(), stops.into());
        self.files.insert(GENERATION, serde_json::to_vec_pretty(&all).unwrap_or_default());
    }

    fn take_files(&mut self, dir: &Path, vocab: usize) -> Result<()> {
        for name in FILES {
            if let Some(content) = if_there(read(&dir.join(name), MAX_FILE))? {
                self.files.insert(name, content);
            }
        }
        let (_, named) = self.text(dir, self.files.contains_key(TOKENIZER))?;
        let settings: Json = self.json(dir, SETTINGS)?.unwrap_or_default();
        match &settings["chat_template"] {
            Json::Null | Json::String(_) => {}
            Json::Array(all) if named.template.is_some() => {
                if all.len() > 1 {
                    let count = all.len();
                    self.remark(format!(
                        "of the {count} chat templates in {SETTINGS} a GGUF file takes only the one that is used by default"
                    ));
                }
            }
            _ if named.template.is_some() => {}
            _ => self.remark(format!(
                "chat_template in {SETTINGS} is neither a text nor a list of named ones: a GGUF file goes without"
            )),
        }
        let generation = self.json(dir, GENERATION)?.unwrap_or_default();
        self.add_stops(generation, &named.stops);
        let Some(tokenizer) = self.files.get(TOKENIZER) else { return Ok(()) };
        let path = dir.join(TOKENIZER);
        let fail = |reason: String| Error::Config { path: path.clone(), reason };
        let text = std::str::from_utf8(tokenizer).map_err(|e| fail(format!("not UTF-8: {e}")))?.to_string();
        let tokenizer: TokenizerFile =
            serde_json::from_str(&text).map_err(|e| fail(format!("not a tokenizer: {e}")))?;
        match tokenizer.arrays(vocab) {
            Ok(keys) => keys.into_iter().for_each(|(key, value)| self.keys.set(key, value)),
            Err(Unfit::Damaged(reason)) => return Err(fail(reason)),
            Err(Unfit::Unknown(why)) => self.remark(format!(
                "{why}: the whole tokenizer.json goes into the GGUF file, which Longbit reads; llama.cpp will miss its arrays"
            )),
        }
        for (key, id) in [("bos", self.bos), ("eos", self.eos), ("eot", tokenizer.id("<|eot_id|>"))] {
            if let Some(id) = id {
                self.keys.set(format!("tokenizer.ggml.{key}_token_id"), Value::U32(id));
            }
        }
        self.keys.set("tokenizer.ggml.add_bos_token", Value::Bool(named.add_bos));
        self.keys.set(TextModel::TOKENIZER_KEY, Value::String(text));
        Ok(())
    }

    fn json(&self, dir: &Path, name: &'static str) -> Result<Option<Json>> {
        let Some(content) = self.files.get(name) else { return Ok(None) };
        serde_json::from_slice(content)
            .map(Some)
            .map_err(|e| Error::Config { path: dir.join(name), reason: format!("not JSON: {e}") })
    }
}

/// What a model at `path` is called: the last part of it, without the ending of a GGUF file.
fn name_of(path: &Path) -> String {
    // `.` and `..` have names too.
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let last = if path.is_dir() { whole.file_name() } else { path.file_name() };
    let name = last.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = name.len().checked_sub(5).and_then(|at| name.split_at_checked(at));
    match stem.filter(|(_, end)| end.eq_ignore_ascii_case(".gguf")) {
        Some((stem, _)) if !path.is_dir() => stem.to_string(),
        _ => name,
    }
}

/// The parts of a `tokenizer.json` that the arrays are made from.
#[derive(Deserialize)]
struct TokenizerFile {
    model: BpeModel,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    pre_tokenizer: Json,
}

#[derive(Deserialize)]
struct BpeModel {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Json,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    unk_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair([String; 2]),
}

impl Merge {
    fn text(&self) -> String {
        match self {
            Merge::Text(text) => text.clone(),
            Merge::Pair([left, right]) => format!("{left} {right}"),
        }
    }
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// Why there are no arrays.
enum Unfit {
    /// The file contradicts itself or the model.
    Damaged(String),
    /// A sound tokenizer of a kind that has no name in GGUF.
    Unknown(String),
}

impl TokenizerFile {
    fn id(&self, token: &str) -> Option<u32> {
        let added = self.added_tokens.iter().find(|t| t.content == token).map(|t| t.id);
        added.or_else(|| self.model.vocab.get(token)?.as_u64()?.try_into().ok())
    }

    /// Name of the pre-tokenizer in llama.cpp.
    fn pre(&self) -> Option<&'static str> {
        let parts = match self.pre_tokenizer.get("pretokenizers").and_then(Json::as_array) {
            Some(parts) => parts.iter().collect(),
            None => vec![&self.pre_tokenizer],
        };
        let is = |part: &Json, kind: &str| part.get("type").and_then(Json::as_str) == Some(kind);
        match parts.as_slice() {
            [split, bytes] if is(split, "Split") && is(bytes, "ByteLevel") => {
                let regex = split.pointer("/pattern/Regex").and_then(Json::as_str);
                (regex == Some(LLAMA3_SPLIT)).then_some("llama-bpe")
            }
            [bytes] if is(bytes, "ByteLevel") => {
                (bytes.get("use_regex").and_then(Json::as_bool) != Some(false)).then_some("gpt-2")
            }
            _ => None,
        }
    }

    /// The arrays of llama.cpp, for a model of `vocab` tokens.
    fn arrays(&self, vocab: usize) -> std::result::Result<Vec<(&'static str, Value)>, Unfit> {
        if self.model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
            return Err(Unfit::Unknown(format!("the tokenizer is a {:?}, not a BPE", self.model.kind)));
        }
        let entries =
            self.model.vocab.as_object().ok_or_else(|| Unfit::Damaged("model.vocab is no object".into()))?;
        let mut tokens: Vec<String> = (0..vocab).map(|i| format!("[PAD{i}]")).collect();
        let mut types = vec![token_type::UNUSED; vocab];
        let mut place = |id: u64, token: &str, kind: i32| {
            let place = usize::try_from(id).ok().filter(|id| *id < vocab).ok_or_else(|| {
                Unfit::Damaged(format!("token {token:?} has id {id}; the model has {vocab} tokens"))
            })?;
            tokens[place] = token.into();
            types[place] = kind;
            Ok(())
        };
        for (token, id) in entries {
            let id = id.as_u64().ok_or_else(|| Unfit::Damaged(format!("token {token:?} has no id")))?;
            let byte = self.model.byte_fallback
                && token.len() == 6
                && token.starts_with("<0x")
                && token.ends_with('>');
            place(id, token, if byte { token_type::BYTE } else { token_type::NORMAL })?;
        }
        for token in &self.added_tokens {
            let unknown = self.model.unk_token.as_deref() == Some(&token.content);
            let kind = match (unknown, token.special) {
                (true, _) => token_type::UNKNOWN,
                (false, true) => token_type::CONTROL,
                (false, false) => token_type::USER_DEFINED,
            };
            place(u64::from(token.id), &token.content, kind)?;
        }
        let (model, pre) = match self.model.byte_fallback {
            true => ("llama", "default"),
            false => {
                let why = "the pre-tokenizer has no name in llama.cpp";
                ("gpt2", self.pre().ok_or_else(|| Unfit::Unknown(why.into()))?)
            }
        };
        let mut keys = vec![
            ("tokenizer.ggml.model", Value::String(model.into())),
            ("tokenizer.ggml.pre", Value::String(pre.into())),
            ("tokenizer.ggml.token_type", Value::Array(Array::I32(types))),
        ];
        if self.model.byte_fallback {
            keys.push(("tokenizer.ggml.scores", Value::Array(Array::F32(self.scores(&tokens)))));
        } else {
            let merges = self.model.merges.iter().map(Merge::text).collect();
            keys.push(("tokenizer.ggml.merges", Value::Array(Array::Strings(merges))));
        }
        keys.push(("tokenizer.ggml.tokens", Value::Array(Array::Strings(tokens))));
        Ok(keys)
    }

    /// Scores in the order of the merges: what is merged first has the highest.
    fn scores(&self, tokens: &[String]) -> Vec<f32> {
        let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
        for (rank, merge) in self.model.merges.iter().enumerate() {
            let merged: String = match merge {
                Merge::Text(text) => text.split(' ').collect(),
                Merge::Pair([left, right]) => format!("{left}{right}"),
            };
            ranks.entry(merged).or_insert(rank);
        }
        let last = ranks.len();
        // Tokens that no merge makes (bytes, single characters) come after all merges, as sentencepiece has them.
        tokens.iter().map(|token| -(*ranks.get(token).unwrap_or(&last) as f32)).collect()
    }
}
