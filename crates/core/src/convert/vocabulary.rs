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
use crate::gguf::{Array, Metadata, Value};

/// The key of the GGUF specification for a whole `tokenizer.json`.
pub(crate) const TOKENIZER_KEY: &str = "tokenizer.huggingface.json";
const CHAT_KEY: &str = "tokenizer.chat_template";
/// Largest tokenizer file that is carried over.
const MAX_FILE: u64 = 64 << 20;

/// The split of Llama 3, by which its tokenizers are known.
const LLAMA3_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// `token_type` of llama.cpp.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
    pub(super) const BYTE: i32 = 6;
}

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
    /// Why engines that read arrays will not find any, where they will not.
    note: Option<String>,
}

/// Tokenizer files of a directory.
const FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"];

impl Vocabulary {
    /// Of a model that has none.
    pub fn none(name: &str) -> Self {
        Vocabulary { name: name.into(), ..Vocabulary::default() }
    }

    /// That of a checkpoint; empty where it has no tokenizer.
    ///
    /// # Errors
    /// A tokenizer file is damaged, or larger than any is.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.path();
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let mut vocabulary = Vocabulary::none(&name);
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

    fn take_keys(&mut self, path: &Path, metadata: &Metadata) -> Result<()> {
        let fail = |source| Error::Gguf { path: path.to_path_buf(), source };
        let id = |key| Ok::<_, Error>(metadata.u64(key).map_err(fail)?.and_then(|id| u32::try_from(id).ok()));
        self.bos = id("tokenizer.ggml.bos_token_id")?;
        self.eos = id("tokenizer.ggml.eos_token_id")?;
        for (key, value) in metadata.iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
            self.keys.set(key, value.clone());
        }
        let Some(tokenizer) = metadata.str(TOKENIZER_KEY).map_err(fail)? else {
            if !self.keys.is_empty() {
                self.note = Some(format!(
                    "the file has no {TOKENIZER_KEY}: its vocabulary can be carried into another GGUF file, but not into a \
                     directory"
                ));
            }
            return Ok(());
        };
        self.files.insert("tokenizer.json", tokenizer.as_bytes().to_vec());
        let mut config = serde_json::Map::new();
        let tokens = metadata.strings("tokenizer.ggml.tokens").map_err(fail)?.unwrap_or_default();
        for (key, id) in [("bos_token", self.bos), ("eos_token", self.eos)] {
            if let Some(token) = id.and_then(|id| tokens.get(id as usize)) {
                config.insert(key.into(), token.as_str().into());
            }
        }
        if let Some(template) = metadata.str(CHAT_KEY).map_err(fail)? {
            config.insert("chat_template".into(), template.into());
        }
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        self.files.insert("tokenizer_config.json", serde_json::to_vec_pretty(&config).unwrap_or_default());
        let stops: Vec<u32> = self.eos.into_iter().chain(id("tokenizer.ggml.eot_token_id")?).collect();
        let generation = serde_json::json!({ "bos_token_id": self.bos, "eos_token_id": stops });
        self.files
            .insert("generation_config.json", serde_json::to_vec_pretty(&generation).unwrap_or_default());
        Ok(())
    }

    fn take_files(&mut self, dir: &Path, vocab: usize) -> Result<()> {
        for name in FILES {
            let path = dir.join(name);
            let Ok(found) = std::fs::metadata(&path) else { continue };
            if found.len() > MAX_FILE {
                let reason = format!("{} bytes; at most {MAX_FILE} are read", found.len());
                return Err(Error::Config { path, reason });
            }
            let content = std::fs::read(&path).map_err(|source| Error::Read { path, source })?;
            self.files.insert(name, content);
        }
        let config: Json = self.json(dir, "tokenizer_config.json")?.unwrap_or_default();
        if let Some(template) = config.get("chat_template").and_then(Json::as_str) {
            self.keys.set(CHAT_KEY, Value::String(template.into()));
        }
        let Some(tokenizer) = self.files.get("tokenizer.json") else { return Ok(()) };
        let path = dir.join("tokenizer.json");
        let fail = |reason: String| Error::Config { path: path.clone(), reason };
        let text = std::str::from_utf8(tokenizer).map_err(|e| fail(format!("not UTF-8: {e}")))?.to_string();
        let tokenizer: TokenizerFile =
            serde_json::from_str(&text).map_err(|e| fail(format!("not a tokenizer: {e}")))?;
        let id = |key: &str| {
            // Either the token itself or an object with its content.
            let token = config.get(key)?;
            tokenizer.id(token.as_str().or_else(|| token.get("content")?.as_str())?)
        };
        (self.bos, self.eos) = (id("bos_token"), id("eos_token"));
        match tokenizer.arrays(vocab) {
            Ok(keys) => keys.into_iter().for_each(|(key, value)| self.keys.set(key, value)),
            Err(Unfit::Damaged(reason)) => return Err(fail(reason)),
            Err(Unfit::Unknown(why)) => {
                self.note = Some(format!(
                    "{why}: the whole tokenizer.json goes into the GGUF file, which Longbit reads; llama.cpp will miss its arrays"
                ));
            }
        }
        for (key, id) in [("bos", self.bos), ("eos", self.eos), ("eot", tokenizer.id("<|eot_id|>"))] {
            if let Some(id) = id {
                self.keys.set(format!("tokenizer.ggml.{key}_token_id"), Value::U32(id));
            }
        }
        self.keys.set("tokenizer.ggml.add_bos_token", Value::Bool(tokenizer.adds_bos(self.bos)));
        self.keys.set(TOKENIZER_KEY, Value::String(text));
        Ok(())
    }

    fn json(&self, dir: &Path, name: &'static str) -> Result<Option<Json>> {
        let Some(content) = self.files.get(name) else { return Ok(None) };
        serde_json::from_slice(content)
            .map(Some)
            .map_err(|e| Error::Config { path: dir.join(name), reason: format!("not JSON: {e}") })
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
    #[serde(default)]
    post_processor: Json,
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

    /// Whether the post-processor puts `bos` before a text.
    fn adds_bos(&self, bos: Option<u32>) -> bool {
        fn names(json: &Json, id: u32) -> bool {
            match json {
                Json::Object(object) => {
                    object.get("ids").and_then(Json::as_array).is_some_and(|ids| ids.contains(&id.into()))
                        || object.values().any(|v| names(v, id))
                }
                Json::Array(items) => items.iter().any(|v| names(v, id)),
                _ => false,
            }
        }
        bos.is_some_and(|id| names(&self.post_processor, id))
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
        let mut types = vec![kind::UNUSED; vocab];
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
            place(id, token, if byte { kind::BYTE } else { kind::NORMAL })?;
        }
        for token in &self.added_tokens {
            let unknown = self.model.unk_token.as_deref() == Some(&token.content);
            let kind = match (unknown, token.special) {
                (true, _) => kind::UNKNOWN,
                (false, true) => kind::CONTROL,
                (false, false) => kind::USER,
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
