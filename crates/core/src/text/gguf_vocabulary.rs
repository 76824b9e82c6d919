//! The tokenizer that a GGUF file holds as arrays.
//!
//! `gpt2` is byte-level BPE with its merges; `llama` is sentencepiece BPE, whose merges follow from the scores of the
//! tokens. Which text is split where before merging is a name (`tokenizer.ggml.pre`) that stands for regular
//! expressions in the source of llama.cpp (`src/llama-vocab.cpp`); the few that models of this crate's kind use are known.

use std::collections::HashMap;

use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::bytes::{METASPACE, Spelling};
use super::tokenizer::{Parts, Tokenizer};
use crate::error::{Error, Result};

/// Tokens longer than this are not taken apart into merges (bytes): no text reaches them step by step.
const MAX_MERGED: usize = 256;

/// Merges that scores may stand for, and more for each token: the vocabulary of Llama 2 has two a token, and one of long
/// runs of equal characters has as many as its longest token has characters.
const MERGES: usize = 1 << 16;
const MERGES_A_TOKEN: usize = 8;

/// Tokens that are control tokens wherever a byte-level vocabulary has them. Some conversions of Llama 3 and its
/// relatives mark them as user-defined or as plain text.
pub(super) const ENDS: &[&str] = &["<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>"];

/// `tokenizer.ggml.token_type`, as llama.cpp numbers them.
pub(crate) mod token_type {
    pub(crate) const NORMAL: i32 = 1;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const CONTROL: i32 = 3;
    pub(crate) const USER_DEFINED: i32 = 4;
    pub(crate) const UNUSED: i32 = 5;
    pub(crate) const BYTE: i32 = 6;
}
use token_type::{BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED};

/// How Llama 3 and its relatives split text (the regular expression of its `tokenizer.json`).
pub(crate) const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How GPT-2 does.
const GPT2: &[&str] = &[r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"];
/// What llama.cpp does for `default`, one expression after the other.
const DEFAULT: &[&str] = &[
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// A way to split text, by the names that llama.cpp gives it.
struct Pre {
    names: &'static [&'static str],
    expressions: &'static [&'static str],
    /// A piece of text that is a token is taken whole, whatever the merges say.
    ignore_merges: bool,
    /// Prompts start with the beginning-of-text token unless the file says otherwise.
    add_bos: bool,
}

const PRES: &[Pre] = &[
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-e", "falcon_e"],
        expressions: &[LLAMA3_SPLIT],
        ignore_merges: true,
        add_bos: true,
    },
    Pre { names: &["gpt-2"], expressions: GPT2, ignore_merges: false, add_bos: false },
    Pre { names: &["default"], expressions: DEFAULT, ignore_merges: false, add_bos: false },
];

/// The arrays and keys of a GGUF file that describe its tokenizer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `general.architecture`: BitNet files that do not name a pre-tokenizer mean that of Llama 3.
    pub architecture: String,
    /// `tokenizer.ggml.model`: `gpt2` or `llama`.
    pub model: String,
    /// `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, one a token; only `llama` needs them.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`, one a token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; none
    /// means all normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`, halves separated by a space; only `gpt2` has them.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; `llama` does unless told otherwise.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl GgufVocabulary {
    pub(super) fn tokenizer(&self) -> Result<Tokenizer> {
        self.build().map_err(|reason| Error::Invalid(format!("the tokenizer of the GGUF file: {reason}")))
    }

    fn build(&self) -> Result<Tokenizer, String> {
        let n = self.tokens.len();
        if n == 0 {
            return Err("tokenizer.ggml.tokens is empty or missing".into());
        }
        if !self.token_types.is_empty() && self.token_types.len() != n {
            return Err(format!(
                "tokenizer.ggml.token_type has {} entries for {n} tokens",
                self.token_types.len()
            ));
        }
        self.check_ids(n)?;
        let mut vocab = HashMap::with_capacity(n);
        for (id, token) in (0u32..).zip(&self.tokens) {
            if let Some(other) = vocab.insert(token.clone(), id) {
                return Err(format!("tokens {other} and {id} are both `{token}`"));
            }
        }
        let parts = match self.model.as_str() {
            "gpt2" => self.byte_level(vocab)?,
            "llama" => self.sentencepiece(vocab)?,
            other => {
                return Err(format!(
                    "tokenizer.ggml.model `{other}` is not supported; supported are gpt2 and llama"
                ));
            }
        };
        self.with_ends(Tokenizer::build(parts)?)
    }

    /// `tokenizer` with the tokens that begin and end a text as the keys have them, whatever it was built from.
    pub(super) fn with_ends(&self, tokenizer: Tokenizer) -> Result<Tokenizer, String> {
        self.check_ids(tokenizer.vocab_size())?;
        Ok(tokenizer.with_ends(self.bos, self.eos, self.adds_bos()))
    }

    /// Whether prompts start with the beginning-of-text token: as the key says, otherwise as llama.cpp has it for the kind
    /// of vocabulary.
    pub(super) fn adds_bos(&self) -> bool {
        self.add_bos.unwrap_or_else(|| match self.model.as_str() {
            "llama" => true,
            "gpt2" => self.pre().is_ok_and(|pre| pre.add_bos),
            _ => false,
        })
    }

    /// That every id that a key names is one of `n` tokens.
    fn check_ids(&self, n: usize) -> Result<(), String> {
        let ids = [("bos", self.bos), ("eos", self.eos), ("eot", self.eot), ("unknown", self.unknown)];
        match ids.into_iter().find_map(|(key, id)| Some((key, id.filter(|&id| id as usize >= n)?))) {
            Some((key, id)) => Err(format!("tokenizer.ggml.{key}_token_id is {id}; there are {n} tokens")),
            None => Ok(()),
        }
    }

    /// How text is split.
    fn pre(&self) -> Result<&'static Pre, String> {
        let missing = if self.architecture.starts_with("bitnet") { "llama-bpe" } else { "default" };
        let name = self.pre.as_deref().unwrap_or(missing);
        PRES.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
            format!("tokenizer.ggml.pre `{name}` is not supported; supported are {}", known.join(", "))
        })
    }

    fn kind(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(1)
    }

    /// Tokens that are found in text before it is split. Those that end and begin a text are control tokens, whatever
    /// their type says; so is, with the splitting of Llama 3, a token without a type of its own that is spelled like its
    /// control tokens (`<|…|>`).
    fn added(&self) -> Vec<(u32, AddedToken)> {
        let ends = [self.bos, self.eos, self.eot];
        let bytes = self.model == "gpt2";
        let llama3 = bytes && self.pre().is_ok_and(|pre| pre.names.contains(&"llama-bpe"));
        let spelled = |text: &str, kind: i32| {
            let control = || text.len() > 4 && text.starts_with("<|") && text.ends_with("|>");
            (bytes && ENDS.contains(&text)) || (llama3 && kind != USER_DEFINED && control())
        };
        let token = |(id, text): (u32, &String)| {
            let kind = self.kind(id as usize);
            let special =
                matches!(kind, UNKNOWN | CONTROL) || ends.contains(&Some(id)) || spelled(text, kind);
            let added = (special || kind == USER_DEFINED) && !text.is_empty();
            added.then(|| (id, AddedToken::from(text.as_str(), special).normalized(false)))
        };
        (0u32..).zip(&self.tokens).filter_map(token).collect()
    }

    fn byte_level(&self, vocab: HashMap<String, u32>) -> Result<Parts, String> {
        let pre = self.pre()?;
        let merge = |(i, text): (usize, &String)| {
            // A half is never empty, but it may be a space in vocabularies that are not byte-level.
            let space = text.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
            let (left, right) = space
                .map(|at| (&text[..at], &text[at + 1..]))
                .ok_or_else(|| format!("tokenizer.ggml.merges[{i}] `{text}` is not a pair"))?;
            Ok((left.to_owned(), right.to_owned()))
        };
        let mut steps = Vec::new();
        for expression in pre.expressions {
            let pattern = SplitPattern::Regex((*expression).into());
            let split =
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|e| e.to_string())?;
            steps.push(PreTokenizerWrapper::Split(split));
        }
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
        Ok(Parts {
            vocab,
            merges: self.merges.iter().enumerate().map(merge).collect::<Result<_, String>>()?,
            ignore_merges: pre.ignore_merges,
            added: self.added(),
            pre_tokenizer: Some(PreTokenizerWrapper::Sequence(PreTokenizers::new(steps))),
            spelling: Some(Spelling::ByteLevel),
            ..Parts::default()
        })
    }

    fn sentencepiece(&self, vocab: HashMap<String, u32>) -> Result<Parts, String> {
        let n = self.tokens.len();
        if self.scores.len() != n {
            return Err(format!("tokenizer.ggml.scores has {} entries for {n} tokens", self.scores.len()));
        }
        if let Some(id) = self.scores.iter().position(|score| score.is_nan()) {
            return Err(format!("tokenizer.ggml.scores[{id}] is not a number"));
        }
        let prefix = self.add_space_prefix.unwrap_or(true);
        let mut normalizers = Vec::new();
        if prefix {
            normalizers.push(NormalizerWrapper::Prepend(Prepend::new(METASPACE.into())));
        }
        let spaces = Replace::new(" ", METASPACE).map_err(|e| e.to_string())?;
        normalizers.push(NormalizerWrapper::Replace(spaces));
        let unknown =
            self.unknown.map(|id| id as usize).or_else(|| (0..n).find(|&id| self.kind(id) == UNKNOWN));
        let bytes = (0..=255u8).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>")));
        Ok(Parts {
            merges: self.merges_of_scores(&vocab)?,
            vocab,
            unk: unknown.map(|id| self.tokens[id].clone()),
            fuse_unk: true,
            byte_fallback: bytes,
            added: self.added(),
            normalizer: Some(NormalizerWrapper::Sequence(Normalizers::new(normalizers))),
            spelling: Some(Spelling::Metaspace { bytes, strip_first: prefix }),
            ..Parts::default()
        })
    }

    /// Sentencepiece merges the two neighbours whose concatenation has the highest score: every way to take a token apart
    /// into two others is a merge, the best token first. Among the ways to one token the order is that of the
    /// `transformers` converter: longer left half first, then the ids of the halves.
    fn merges_of_scores(&self, vocab: &HashMap<String, u32>) -> Result<Vec<(String, String)>, String> {
        struct Found {
            score: f32,
            /// Ids of the halves, and their characters.
            ids: (u32, u32),
            lengths: (u32, u32),
        }
        // A half must be a token that text can turn into.
        let half = |text: &str| {
            let id = *vocab.get(text)?;
            (!matches!(self.kind(id as usize), UNKNOWN | CONTROL | UNUSED | BYTE)).then_some(id)
        };
        let limit = MERGES + MERGES_A_TOKEN * self.tokens.len();
        let mut found = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if matches!(self.kind(id), UNKNOWN | CONTROL | USER_DEFINED | UNUSED | BYTE)
                || token.len() > MAX_MERGED
            {
                continue;
            }
            let characters = token.chars().count() as u32;
            for (left, (at, _)) in (0u32..).zip(token.char_indices()).skip(1) {
                let (first, second) = token.split_at(at);
                if let (Some(a), Some(b)) = (half(first), half(second)) {
                    found.push(Found {
                        score: self.scores[id],
                        ids: (a, b),
                        lengths: (left, characters - left),
                    });
                }
            }
            if found.len() > limit {
                return Err(format!(
                    "the {} tokens of tokenizer.ggml.tokens can be taken apart in more than {limit} ways; no vocabulary \
                     that was trained can",
                    self.tokens.len()
                ));
            }
        }
        found.sort_by(|a, b| {
            let better = b.score.total_cmp(&a.score);
            let longer = b.lengths.cmp(&a.lengths);
            better.then(longer).then(a.ids.cmp(&b.ids))
        });
        let text = |id: u32| self.tokens[id as usize].clone();
        Ok(found.into_iter().map(|f| (text(f.ids.0), text(f.ids.1))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> GgufVocabulary {
        let tokens = ["a", "b", "ab", "Ġ", "<|end|>"].map(String::from).to_vec();
        GgufVocabulary {
            architecture: "bitnet-b1.58".into(),
            model: "gpt2".into(),
            tokens,
            token_types: vec![1, 1, 1, 1, 3],
            merges: vec!["a b".into()],
            bos: Some(4),
            ..GgufVocabulary::default()
        }
    }

    #[test]
    fn a_bitnet_file_without_a_pre_tokenizer_means_that_of_llama_3() {
        let tokenizer = small().tokenizer().unwrap();
        assert_eq!(tokenizer.encode("ab<|end|>b a", true).unwrap(), [4, 2, 4, 1, 3, 0]);
        assert_eq!(tokenizer.encode("ab", false).unwrap(), [2]);
        assert_eq!(tokenizer.decode(&[4, 2, 3, 0], true).unwrap(), "ab a");
        let quiet = GgufVocabulary { add_bos: Some(false), ..small() };
        assert_eq!(quiet.tokenizer().unwrap().encode("ab", true).unwrap(), [2]);
        let other = GgufVocabulary { architecture: "llama".into(), ..small() };
        assert_eq!(other.tokenizer().unwrap().encode("ab", true).unwrap(), [2], "`default` adds nothing");
    }

    #[test]
    fn refusals_name_the_key() {
        let refused = |change: fn(&mut GgufVocabulary), names: &str| {
            let mut vocabulary = small();
            change(&mut vocabulary);
            let message = vocabulary.tokenizer().unwrap_err().to_string();
            assert!(message.contains(names), "{names}: {message}");
        };
        refused(|v| v.model = "t5".into(), "`t5` is not supported");
        refused(|v| v.pre = Some("qwen2".into()), "`qwen2` is not supported");
        refused(|v| v.tokens.clear(), "tokens");
        refused(|v| v.token_types.truncate(2), "token_type");
        refused(|v| v.tokens[1] = "a".into(), "tokens 0 and 1 are both `a`");
        refused(|v| v.merges.push("ab".into()), "merges[1]");
        refused(|v| v.merges.push("a c".into()), "needs the token `c`");
        // Longer than any token: the library would write past its buffer's end.
        refused(|v| v.merges.push("<|end|> <|end|>".into()), "needs the token");
        refused(|v| v.eos = Some(5), "eos_token_id is 5");
        refused(|v| v.model = "llama".into(), "scores");
    }

    #[test]
    fn tokens_that_end_a_text_are_control_tokens_whatever_their_type_says() {
        for kind in [1, 4] {
            let mut vocabulary = small();
            for name in ["<|eot_id|>", "<|end_of_text|>", "<|python_tag|>"] {
                vocabulary.tokens.push(name.into());
                vocabulary.token_types.push(kind);
            }
            let tokenizer = vocabulary.tokenizer().unwrap();
            assert_eq!(tokenizer.encode("a<|eot_id|><|python_tag|>", false).unwrap(), [0, 5, 7], "{kind}");
            // The author of the file may say that another one is text.
            assert_eq!([5, 6, 7].map(|id| tokenizer.is_special(id)), [true, true, kind == 1], "{kind}");
            // Where text is split otherwise, only the names that are known are.
            let other = GgufVocabulary { pre: Some("default".into()), ..vocabulary };
            let tokenizer = other.tokenizer().unwrap();
            assert_eq!([5, 6, 7].map(|id| tokenizer.is_special(id)), [true, true, false], "{kind}");
        }
    }

    #[test]
    fn the_ends_are_the_same_for_every_source_of_the_tokenizer() {
        let own = small().tokenizer().unwrap();
        let other =
            small().with_ends(Tokenizer::build(small().byte_level(vocab()).unwrap()).unwrap()).unwrap();
        for tokenizer in [own, other] {
            assert_eq!(
                (tokenizer.bos(), tokenizer.eos(), tokenizer.prompts_start_with_bos()),
                (Some(4), None, true)
            );
        }
        let beyond = GgufVocabulary { eos: Some(5), ..small() };
        let tokenizer = Tokenizer::build(small().byte_level(vocab()).unwrap()).unwrap();
        assert!(beyond.with_ends(tokenizer).unwrap_err().contains("eos_token_id is 5; there are 5 tokens"));
    }

    fn vocab() -> HashMap<String, u32> {
        small().tokens.into_iter().zip(0..).collect()
    }

    #[test]
    fn merges_are_in_proportion_to_the_tokens() {
        // Runs of one character: 255 ways to take the longest apart.
        let runs = |characters: &[char]| {
            let run = |c: char| (1..=200).map(move |n| c.to_string().repeat(n));
            let tokens: Vec<String> = characters.iter().flat_map(|&c| run(c)).collect();
            let n = tokens.len();
            GgufVocabulary {
                model: "llama".into(),
                tokens,
                scores: vec![0.0; n],
                add_space_prefix: Some(false),
                ..GgufVocabulary::default()
            }
        };
        assert_eq!(runs(&['a']).tokenizer().unwrap().encode(&"a".repeat(150), false).unwrap(), [149]);
        let error = runs(&['a', 'b', 'c', 'd']).tokenizer().unwrap_err().to_string();
        assert!(error.contains("800 tokens") && error.contains("more than 71936 ways"), "{error}");
    }

    #[test]
    fn merges_follow_the_scores() {
        let tokens = ["<unk>", "▁", "a", "b", "ab", "▁a", "▁ab"].map(String::from).to_vec();
        let with = |scores: [f32; 7]| GgufVocabulary {
            model: "llama".into(),
            tokens: tokens.clone(),
            scores: scores.to_vec(),
            token_types: vec![2, 1, 1, 1, 1, 1, 1],
            unknown: Some(0),
            add_bos: Some(false),
            ..GgufVocabulary::default()
        };
        let encode = |v: &GgufVocabulary, text: &str| v.tokenizer().unwrap().encode(text, true).unwrap();
        let whole = with([0.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0]);
        assert_eq!(encode(&whole, "ab"), [6]);
        // `▁a` wins over `ab`, and then nothing makes `▁ab`, because it is worth less than nothing can reach.
        let early = with([0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]);
        assert_eq!(encode(&early, "ab a"), [6, 5]);
        assert_eq!(encode(&early, "ac"), [5, 0], "no byte tokens: the unknown token");
        let bare = GgufVocabulary { add_space_prefix: Some(false), ..early };
        assert_eq!(encode(&bare, "ab"), [4]);
    }
}
