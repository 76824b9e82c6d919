//! What a checkpoint says about its text: tokenizer, chat template, and the tokens that end an answer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use longbit_sys::FileMap;
use serde_json::Value;

use super::chat::{BITNET_CHAT_TEMPLATE, ChatTemplate, Message};
use super::gguf_vocabulary::GgufVocabulary;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files::{if_there, read_text};
use crate::gguf::{GgufError, Header, Metadata};

/// Largest JSON file or template beside a tokenizer (bytes).
const MAX_TEXT: u64 = 16 << 20;
/// Tokens that end an answer wherever a vocabulary has them: some configurations name only one.
const KNOWN_STOPS: &[&str] = &["<|eot_id|>", "<|end_of_text|>"];
/// GGUF architectures of the 2B-4T model, whose published files carry a chat template that it was not trained with.
const BITNET_2B: &[&str] = &["bitnet-25", "bitnet-b1.58"];

/// Files to use instead of what the checkpoint holds.
#[derive(Clone, Debug, Default)]
pub struct TextOptions {
    /// A `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    /// A Jinja chat template.
    pub chat_template: Option<PathBuf>,
}

/// What the configuration of a checkpoint names, whether or not its tokenizer and its template can be used.
#[derive(Default)]
pub(crate) struct Named {
    /// The token that begins a text.
    pub(crate) bos: Option<u32>,
    /// The token that ends one.
    pub(crate) eos: Option<u32>,
    /// Tokens that end an answer.
    pub(crate) stops: Vec<u32>,
    /// The chat template's text, with the file or key it comes from.
    pub(crate) template: Option<(PathBuf, String)>,
    /// Prompts start with `bos`, whatever the tokenizer's own post-processor does.
    pub(crate) add_bos: bool,
}

/// Everything between a user's text and a model's tokens.
#[derive(Debug)]
pub struct TextModel {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; absent where the checkpoint has none.
    pub chat: Option<ChatTemplate>,
    /// Tokens that end an answer, ascending.
    pub stop_tokens: Vec<u32>,
    /// What whoever uses the chat template should know about it, one sentence each.
    pub notes: Vec<String>,
}

impl TextModel {
    /// Key of a whole `tokenizer.json` in a GGUF file, as its specification has it.
    pub(crate) const TOKENIZER_KEY: &str = "tokenizer.huggingface.json";
    /// Key of a chat template in a GGUF file.
    pub(crate) const CHAT_KEY: &str = "tokenizer.chat_template";
    /// Key of all tokens that end an answer, in the GGUF files that this project writes.
    pub(crate) const STOP_KEY: &str = "longbit.stop_token_ids";

    /// Reads what stands beside the weights of the checkpoint at `path`: in a directory `tokenizer.json` and the
    /// configuration files of `transformers`, in a GGUF file its metadata. The chat template is kept as it stands, and
    /// looked at when it is used.
    ///
    /// # Errors
    /// Names the file or key, and what is missing, damaged or not supported.
    pub fn open(path: &Path, options: &TextOptions) -> Result<Self> {
        let mut model = if path.is_dir() { directory(path, options)? } else { gguf(path, options)? };
        if let Some(path) = &options.chat_template {
            let source = read_text(path, MAX_TEXT)?;
            let (bos, eos) = ends(&model.tokenizer);
            model.chat = Some(ChatTemplate::new(&source, &bos, &eos).from_file(path));
            model.notes.clear();
        }
        Ok(model)
    }

    /// What the configuration of the checkpoint at `path` names.
    ///
    /// # Errors
    /// A file or key that is damaged.
    pub(crate) fn named(path: &Path) -> Result<Named> {
        if path.is_dir() {
            return Settings::read(path)?.named(path, |_| None, true);
        }
        let fail = |source| Error::Gguf { path: path.into(), source };
        let map = FileMap::open(path)?;
        let header = Header::parse(&map).map_err(fail)?;
        let vocabulary = GgufVocabulary::read(&header.metadata).map_err(fail)?;
        let stops = stop_ids(path, &header.metadata)?.unwrap_or_default();
        Ok(Named {
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            stops: stops.into_iter().chain(vocabulary.eot).chain(vocabulary.eos).collect(),
            add_bos: vocabulary.adds_bos(),
            template: vocabulary.chat_template.map(|source| (path.into(), source)),
        })
    }

    /// Spellings of the tokens that begin and end a text, empty where there is none.
    pub(crate) fn spelled_ends(&self) -> (String, String) {
        ends(&self.tokenizer)
    }

    /// The tokens of a conversation, up to where the assistant's answer begins.
    ///
    /// # Errors
    /// Where the checkpoint has no chat template, and what the template objects to.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode_chat_up_to(messages, usize::MAX)
    }

    /// The first `limit` tokens of what [`TextModel::encode_chat`] gives.
    ///
    /// # Errors
    /// As [`TextModel::encode_chat`].
    pub fn encode_chat_up_to(&self, messages: &[Message], limit: usize) -> Result<Vec<u32>> {
        let chat = self.chat.as_ref().ok_or_else(|| {
            Error::Invalid(
                "the checkpoint has no chat template; prompt it without --chat, or give one with --chat-template".into(),
            )
        })?;
        self.tokenizer.encode_chat_up_to(&chat.render(messages, true)?, limit)
    }
}

/// Spellings of the tokens that begin and end a text.
fn ends(tokenizer: &Tokenizer) -> (String, String) {
    let spelled = |id: Option<u32>| id.map(|id| tokenizer.spelled(id)).unwrap_or_default();
    (spelled(tokenizer.bos()), spelled(tokenizer.eos()))
}

/// The stop tokens that were `named`, with those that are known by their spelling.
fn stops(tokenizer: &Tokenizer, named: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let known = KNOWN_STOPS.iter().filter_map(|token| tokenizer.token_id(token));
    // An id that the vocabulary lacks can stand in a configuration, and is never chosen.
    known.chain(named).chain(tokenizer.eos()).collect::<BTreeSet<u32>>().into_iter().collect()
}

fn at(path: &Path, error: Error) -> Error {
    match error {
        Error::Invalid(reason) => Error::Config { path: path.into(), reason },
        other => other,
    }
}

/// A JSON file; `null` where it is absent.
fn json(path: &Path) -> Result<Value> {
    let Some(text) = if_there(read_text(path, MAX_TEXT))? else { return Ok(Value::Null) };
    serde_json::from_str(&text)
        .map_err(|e| Error::Config { path: path.into(), reason: format!("not JSON: {e}") })
}

/// The configuration files of a directory; `null` for those that are absent.
struct Settings {
    config: Value,
    generation: Value,
    tokenizer: Value,
}

impl Settings {
    fn read(dir: &Path) -> Result<Self> {
        let of = |name: &str| json(&dir.join(name));
        Ok(Settings {
            config: of("config.json")?,
            generation: of("generation_config.json")?,
            tokenizer: of("tokenizer_config.json")?,
        })
    }

    /// What they name, where `id` knows the ids of tokens; the chat template only where it is asked for.
    fn named(&self, dir: &Path, id: impl Fn(&str) -> Option<u32>, template: bool) -> Result<Named> {
        let end = |key: &str| {
            let token = &self.tokenizer[key];
            let spelled = token.as_str().or_else(|| token["content"].as_str()).and_then(&id);
            spelled.or_else(|| ids(&self.config[format!("{key}_id")]).first().copied())
        };
        // A template in a file of its own comes first.
        let file = dir.join("chat_template.jinja");
        let own = || {
            let source = template_of(&self.tokenizer["chat_template"])?;
            Some((dir.join("tokenizer_config.json"), source))
        };
        Ok(Named {
            bos: end("bos_token"),
            eos: end("eos_token"),
            stops: [&self.generation, &self.config]
                .into_iter()
                .flat_map(|c| ids(&c["eos_token_id"]))
                .collect(),
            template: match template {
                true => if_there(read_text(&file, MAX_TEXT))?.map(|source| (file, source)).or_else(own),
                false => None,
            },
            add_bos: self.tokenizer["add_bos_token"] == Value::Bool(true),
        })
    }
}

fn directory(dir: &Path, options: &TextOptions) -> Result<TextModel> {
    let path = options.tokenizer.clone().unwrap_or_else(|| dir.join("tokenizer.json"));
    if options.tokenizer.is_none() && !path.exists() {
        let reason =
            "the checkpoint has no tokenizer; put its tokenizer.json there, or say where one is with --tokenizer".into();
        return Err(Error::Config { path, reason });
    }
    let tokenizer = Tokenizer::from_file(&path)?;
    let own_template = options.chat_template.is_none();
    let named = Settings::read(dir)?.named(dir, |token| tokenizer.token_id(token), own_template)?;
    let n = tokenizer.vocab_size();
    for (key, id) in [("bos_token_id", named.bos), ("eos_token_id", named.eos)] {
        if let Some(id) = id.filter(|&id| id as usize >= n) {
            let reason = format!("has {n} tokens, and the checkpoint's {key} is {id}");
            return Err(Error::Config { path, reason });
        }
    }
    let tokenizer = tokenizer.with_ends(named.bos, named.eos, named.add_bos);
    let stop_tokens = stops(&tokenizer, named.stops);
    let (bos, eos) = ends(&tokenizer);
    let chat = named.template.map(|(path, source)| ChatTemplate::new(&source, &bos, &eos).from_file(&path));
    Ok(TextModel { tokenizer, chat, stop_tokens, notes: Vec::new() })
}

/// A token id or a list of them.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

/// A template, or the one named `default` of a list.
fn template_of(value: &Value) -> Option<String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match value {
        Value::Array(named) => {
            let default = named.iter().find(|template| template["name"] == "default");
            default.or(named.first()).and_then(|template| text(&template["template"]))
        }
        value => text(value),
    }
}

fn gguf(path: &Path, options: &TextOptions) -> Result<TextModel> {
    let fail = |source| Error::Gguf { path: path.into(), source };
    let map = FileMap::open(path)?;
    let header = Header::parse(&map).map_err(fail)?;
    let vocabulary = GgufVocabulary::read(&header.metadata).map_err(fail)?;
    let tokenizer = match &options.tokenizer {
        Some(file) => vocabulary.with_ends(Tokenizer::from_file(file)?).map_err(|reason| Error::Config {
            path: path.into(),
            reason: format!("does not fit the tokenizer {}: {reason}", file.display()),
        })?,
        None => gguf_tokenizer(&header.metadata, &vocabulary).map_err(|e| at(path, e))?,
    };
    let own_stops = stop_ids(path, &header.metadata)?;
    // Whoever wrote the key took the template from the model's own directory.
    let trusted = own_stops.is_some();
    let stop_tokens = stops(&tokenizer, own_stops.unwrap_or_default().into_iter().chain(vocabulary.eot));
    let (chat, notes) = gguf_chat(&vocabulary, &tokenizer, trusted);
    let chat = chat.map(|chat| chat.from_file(path));
    Ok(TextModel { tokenizer, chat, stop_tokens, notes })
}

/// The tokens that a GGUF file lists as ends of an answer.
fn stop_ids(path: &Path, metadata: &Metadata) -> Result<Option<Vec<u32>>> {
    let key = TextModel::STOP_KEY;
    let ids = metadata.i64s(key).map_err(|source| Error::Gguf { path: path.into(), source })?;
    let id = |id: i64| {
        u32::try_from(id).map_err(|_| Error::Config {
            path: path.into(),
            reason: format!("{key} has the element {id}, which no token can be"),
        })
    };
    ids.map(|ids| ids.into_iter().map(id).collect()).transpose()
}

/// The tokenizer of a GGUF file: the whole `tokenizer.json` where the file holds it, as the GGUF specification allows,
/// otherwise what the arrays describe.
fn gguf_tokenizer(metadata: &Metadata, vocabulary: &GgufVocabulary) -> Result<Tokenizer> {
    let whole = metadata.str(TextModel::TOKENIZER_KEY).map_err(|e| Error::Invalid(e.to_string()))?;
    match whole {
        Some(text) => {
            let tokenizer = super::tokenizer_json::parse(text.as_bytes());
            let built = tokenizer.and_then(|tokenizer| vocabulary.with_ends(tokenizer));
            built.map_err(|reason| Error::Invalid(format!("{}: {reason}", TextModel::TOKENIZER_KEY)))
        }
        None if vocabulary.tokens.is_empty() => Err(Error::Invalid(
            "the file has no tokenizer; say where a tokenizer.json is with --tokenizer".into(),
        )),
        None => Tokenizer::from_bpe_arrays(vocabulary),
    }
}

/// The chat template of a GGUF file, or the one that its model was trained with where the file's is not `trusted`.
fn gguf_chat(
    vocabulary: &GgufVocabulary,
    tokenizer: &Tokenizer,
    trusted: bool,
) -> (Option<ChatTemplate>, Vec<String>) {
    let (bos, eos) = ends(tokenizer);
    let own = vocabulary.chat_template.as_deref();
    let known = BITNET_2B.contains(&vocabulary.architecture.as_str()) && !(trusted && own.is_some());
    if !known && !own.is_some_and(ChatTemplate::is_known_wrong) {
        return (own.map(|source| ChatTemplate::new(source, &bos, &eos)), Vec::new());
    }
    let notes = match own {
        Some(source) if ChatTemplate::is_known_right(source) => Vec::new(),
        Some(_) => vec![
            "the chat template in the file is not the one that the model was trained with; using `Role: text<|eot_id|>` \
             of BitNet b1.58 2B-4T instead (--chat-template FILE uses another)"
                .to_string(),
        ],
        None => vec!["the file has no chat template; using that of BitNet b1.58 2B-4T".to_string()],
    };
    (Some(ChatTemplate::new(BITNET_CHAT_TEMPLATE, &bos, &eos)), notes)
}

impl GgufVocabulary {
    /// Reads the arrays and keys from the metadata of a GGUF file.
    ///
    /// # Errors
    /// Names the key whose type is another.
    pub fn read(metadata: &Metadata) -> Result<Self, GgufError> {
        let text = |key: &str| metadata.str(key).map(|text| text.map(str::to_owned));
        let strings = |key: &str| metadata.strings(key).map(|s| s.map(<[_]>::to_vec).unwrap_or_default());
        let model = text("tokenizer.ggml.model")?.unwrap_or_default();
        // Sentencepiece vocabularies begin with the same three tokens, and older files do not say so.
        let llama = model == "llama";
        let id = |name: &str, default: u32| -> Result<Option<u32>, GgufError> {
            let id = metadata.u64(&format!("tokenizer.ggml.{name}_token_id"))?;
            // An id that large is beyond every vocabulary, and is refused as such.
            Ok(id.map(|id| u32::try_from(id).unwrap_or(u32::MAX)).or(llama.then_some(default)))
        };
        Ok(GgufVocabulary {
            architecture: text("general.architecture")?.unwrap_or_default(),
            pre: text("tokenizer.ggml.pre")?,
            tokens: strings("tokenizer.ggml.tokens")?,
            scores: metadata.f32s("tokenizer.ggml.scores")?.unwrap_or_default(),
            token_types: metadata
                .i64s("tokenizer.ggml.token_type")?
                .unwrap_or_default()
                .into_iter()
                .map(|kind| i32::try_from(kind).unwrap_or(0))
                .collect(),
            merges: strings("tokenizer.ggml.merges")?,
            bos: id("bos", 1)?,
            eos: id("eos", 2)?,
            unknown: id("unknown", 0)?,
            eot: metadata.u64("tokenizer.ggml.eot_token_id")?.map(|id| u32::try_from(id).unwrap_or(u32::MAX)),
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?,
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: text(TextModel::CHAT_KEY)?,
            model,
        })
    }
}

impl Tokenizer {
    /// Builds the tokenizer that the metadata of a GGUF file holds.
    ///
    /// # Errors
    /// A key of another type, and as [`Tokenizer::from_bpe_arrays`].
    pub fn from_gguf(metadata: &Metadata) -> Result<Self> {
        let vocabulary = GgufVocabulary::read(metadata).map_err(|e| Error::Invalid(e.to_string()))?;
        gguf_tokenizer(metadata, &vocabulary)
    }
}
