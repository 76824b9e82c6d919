//! The tokenizer: encoding by the `tokenizers` crate, decoding by a table of bytes.
//!
//! Whatever file a tokenizer comes from, it ends in one [`Parts`] and is built and checked here. The crate is trusted with
//! the algorithm and not with the input: it panics on some vocabularies that are malformed, so all that it assumes is
//! checked first.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};

use super::bytes::{Kind, Pieces, Spelling};
use super::cut::{Cuts, PIECE};
use super::gguf_vocabulary::GgufVocabulary;
use super::stream::TokenStream;
use crate::error::{Error, Result};

/// Ids that a vocabulary may leave out, so that a table by id stays in proportion to the file.
const MAX_MISSING: usize = 1 << 16;
/// Longest token (bytes).
const MAX_TOKEN: usize = 1 << 16;
/// Longest text that is encoded (bytes): it is held in memory with 4 bytes a token, and taken apart for all that needs
/// more.
const MAX_TEXT: usize = 64 << 20;
/// Longest run of white space that is encoded (characters). The pre-tokenizer's regular expression steps back through
/// such runs, and its engine (fancy-regex) gives up after a million steps without saying so.
const MAX_BLANK: usize = 250_000;

/// A tokenizer as files describe it.
#[derive(Default)]
pub(super) struct Parts {
    /// Tokens of the model with their ids.
    pub(super) vocab: HashMap<String, u32>,
    /// Pairs in the order in which they are merged.
    pub(super) merges: Vec<(String, String)>,
    /// Token of what has none.
    pub(super) unk: Option<String>,
    pub(super) fuse_unk: bool,
    pub(super) byte_fallback: bool,
    pub(super) ignore_merges: bool,
    /// Tokens that are found in text before anything else, with their ids.
    pub(super) added: Vec<(u32, AddedToken)>,
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(super) post_processor: Option<PostProcessorWrapper>,
    pub(super) spelling: Option<Spelling>,
}

/// Text to tokens and back.
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    pieces: Pieces,
    spelling: Spelling,
    cuts: Cuts,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Prompts start with `bos`.
    starts_with_bos: bool,
    /// The post-processor does not see to that.
    insert_bos: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("spelling", &self.spelling)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json` of the Hugging Face `tokenizers` library, whose model must be BPE.
    ///
    /// # Errors
    /// Names the file and what in it is damaged or not supported.
    pub fn from_file(path: &Path) -> Result<Self> {
        super::tokenizer_json::read(path)
    }

    /// Builds the tokenizer that a GGUF file holds as arrays.
    ///
    /// # Errors
    /// Names the key and what in it is damaged or not supported.
    pub fn from_bpe_arrays(vocabulary: &GgufVocabulary) -> Result<Self> {
        vocabulary.tokenizer()
    }

    /// Checks and builds; the error is a sentence without a place.
    pub(super) fn build(parts: Parts) -> Result<Self, String> {
        let spelling = parts.spelling.ok_or("there is no decoder")?;
        let mut vocab = parts.vocab;
        for (id, token) in &parts.added {
            if token.content.is_empty() {
                return Err(format!("the added token {id} is empty"));
            }
            let known = *vocab.entry(token.content.clone()).or_insert(*id);
            if known != *id {
                return Err(format!("the added token `{}` has id {id} and id {known}", token.content));
            }
        }
        let pieces = {
            let table = by_id(&vocab, &parts.added)?;
            Pieces::new(&table, spelling)
        };
        check_merges(&vocab, &parts.merges)?;
        if let Some(unk) = parts.unk.as_ref().filter(|unk| !vocab.contains_key(*unk)) {
            return Err(format!("the unknown token `{unk}` is not in the vocabulary"));
        }
        let added: Vec<String> = parts.added.iter().map(|(_, token)| token.content.clone()).collect();
        let encoder = guarded("building it", || {
            let mut builder = BPE::builder()
                .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), parts.merges)
                .fuse_unk(parts.fuse_unk)
                .byte_fallback(parts.byte_fallback)
                .ignore_merges(parts.ignore_merges);
            if let Some(unk) = parts.unk {
                builder = builder.unk_token(unk);
            }
            let mut encoder = tokenizers::Tokenizer::new(builder.build()?);
            encoder.with_normalizer(parts.normalizer)?;
            encoder.with_pre_tokenizer(parts.pre_tokenizer);
            encoder.with_post_processor(parts.post_processor);
            encoder.add_tokens(parts.added.into_iter().map(|(_, token)| token))?;
            Ok(encoder)
        })?;
        let ids = |text: &str| {
            guarded("encoding", || encoder.encode_fast(text, false)).ok().map(|e| e.get_ids().to_vec())
        };
        let texts = (0..pieces.len() as u32).filter(|&id| pieces.kind(id) == Kind::Text);
        let texts = texts.map(|id| pieces.bytes(id));
        let cuts = Cuts::new(texts, &added, ids);
        Ok(Tokenizer {
            encoder,
            pieces,
            spelling,
            cuts,
            bos: None,
            eos: None,
            starts_with_bos: false,
            insert_bos: false,
        })
    }

    /// Says which tokens begin and end a text, and whether every prompt starts with the former even where the
    /// post-processor does not put it there.
    pub(super) fn with_ends(mut self, bos: Option<u32>, eos: Option<u32>, add_bos: bool) -> Self {
        // A tokenizer that fails on an empty text fails on every other, and says so then.
        let empty = guarded("encoding", || self.encoder.encode_fast("", true));
        let processed = empty.is_ok_and(|empty| bos.is_some() && empty.get_ids().first().copied() == bos);
        self.insert_bos = add_bos && bos.is_some() && !processed;
        self.starts_with_bos = processed || self.insert_bos;
        self.bos = bos;
        self.eos = eos;
        self
    }

    /// Tokens of `text`. Special tokens that stand in the text are recognised. With `add_special` the tokens that every
    /// prompt of the model starts with are added. A long text is tokenized piece by piece (64 KiB where it has spaces), so
    /// that memory stays in proportion to a piece; the tokens are those of the whole text for every tokenizer of the
    /// families that this crate's models have (`text/cut.rs` has the reasons and the limits).
    ///
    /// # Errors
    /// A text that is too long to be encoded: in all, in one run of white space, or in one word.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.encode_up_to(text, add_special, usize::MAX)
    }

    /// The first `limit` tokens of what [`Tokenizer::encode`] gives; no more of the text is tokenized than they need, up
    /// to the end of a piece.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_up_to(&self, text: &str, add_special: bool, limit: usize) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT {
            return Err(Error::Invalid(format!(
                "the text has {} bytes; at most {MAX_TEXT} can be tokenized at once",
                text.len()
            )));
        }
        let blank = longest_blank(text);
        if blank > MAX_BLANK {
            return Err(Error::Invalid(format!(
                "the text has a run of {blank} white-space characters; at most {MAX_BLANK} can be tokenized"
            )));
        }
        self.encode_pieces(text, add_special, limit, PIECE)
            .map_err(|e| Error::Invalid(format!("the text cannot be tokenized: {e}")))
    }

    /// The first `limit` tokens of `text`, in pieces of about `size` bytes.
    fn encode_pieces(
        &self,
        text: &str,
        special: bool,
        limit: usize,
        size: usize,
    ) -> Result<Vec<u32>, String> {
        let mut pieces = self.cuts.pieces(text, size);
        let first = pieces.next()?;
        let mut ids = self.encode_piece(first, special)?;
        let mut suffix = Vec::new();
        if special && !pieces.done() {
            // What the post-processor puts behind the first piece belongs behind the last.
            let plain = self.encode_piece(first, false)?;
            let same = |k: &usize| ids[*k..].starts_with(&plain);
            let before = (0..ids.len()).find(same).ok_or("the tokenizer's post-processor changes tokens")?;
            suffix = ids.split_off(before + plain.len());
        }
        if let Some(bos) = self.bos.filter(|_| special && self.insert_bos) {
            ids.insert(0, bos);
        }
        while !pieces.done() && ids.len() < limit {
            let piece = pieces.next()?;
            ids.append(&mut self.encode_piece(piece, false)?);
        }
        if pieces.done() {
            ids.append(&mut suffix);
        }
        ids.truncate(limit);
        Ok(ids)
    }

    fn encode_piece(&self, text: &str, special: bool) -> Result<Vec<u32>, String> {
        Ok(guarded("encoding", || self.encoder.encode_fast(text, special))?.get_ids().to_vec())
    }

    /// Tokens of a text that a chat template rendered: its special tokens are recognised, and it starts with the
    /// beginning-of-text token exactly once where the model's prompts do.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_chat_up_to(text, usize::MAX)
    }

    /// The first `limit` tokens of what [`Tokenizer::encode_chat`] gives.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(super) fn encode_chat_up_to(&self, text: &str, limit: usize) -> Result<Vec<u32>> {
        let mut ids = self.encode_up_to(text, false, limit)?;
        if let Some(bos) = self.bos.filter(|bos| self.starts_with_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
            ids.truncate(limit);
        }
        Ok(ids)
    }

    /// Whether [`Tokenizer::encode`] with `add_special` puts the beginning-of-text token first.
    pub fn prompts_start_with_bos(&self) -> bool {
        self.starts_with_bos
    }

    /// The text of `tokens`, without special tokens where `skip_special`. Bytes that are no UTF-8 become U+FFFD; in
    /// sentencepiece vocabularies a run of byte tokens with one such byte becomes one U+FFFD a byte, as in the
    /// `tokenizers` library.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String> {
        let missing = |t: &&u32| self.pieces.kind(**t) == Kind::Missing;
        if let Some(&token) = tokens.iter().find(missing) {
            return Err(Error::Token { token, vocab: self.vocab_size() });
        }
        let mut text = String::new();
        let mut stream = self.stream(skip_special);
        let is_byte = |t: &u32| self.pieces.kind(*t) == Kind::Byte;
        for run in tokens.chunk_by(|a, b| is_byte(a) == is_byte(b)) {
            let bytes: Vec<u8> = run.iter().flat_map(|&t| self.pieces.bytes(t)).copied().collect();
            if is_byte(&run[0]) && std::str::from_utf8(&bytes).is_err() {
                text.extend(bytes.iter().map(|_| char::REPLACEMENT_CHARACTER));
            } else {
                run.iter().for_each(|&token| stream.push(token, &mut text));
            }
        }
        stream.finish(&mut text);
        Ok(text)
    }

    /// A decoder that takes the tokens of a text one by one from its beginning.
    pub fn stream(&self, skip_special: bool) -> TokenStream<'_> {
        TokenStream::new(self, skip_special, true)
    }

    /// A decoder of tokens that follow a prompt: a space in front belongs to the text.
    pub fn continuation(&self, skip_special: bool) -> TokenStream<'_> {
        TokenStream::new(self, skip_special, false)
    }

    /// The id of the token that is spelled `token` in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.encoder.token_to_id(token)
    }

    /// Ids from 0, those included that the vocabulary leaves out.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `token` is a control token, which is no part of a text.
    pub fn is_special(&self, token: u32) -> bool {
        self.pieces.kind(token) == Kind::Special
    }

    /// Bytes of text that `token` stands for; 0 for special tokens.
    pub fn text_bytes(&self, token: u32) -> usize {
        if self.is_special(token) { 0 } else { self.pieces.bytes(token).len() }
    }

    /// The spelling of `token` in a text, also of a special one.
    pub(super) fn spelled(&self, token: u32) -> String {
        String::from_utf8_lossy(self.pieces.bytes(token)).into_owned()
    }

    pub(super) fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    pub(super) fn spelling(&self) -> Spelling {
        self.spelling
    }
}

/// Runs a call into the `tokenizers` crate. What it assumes is checked before; should it panic all the same, on a file
/// that passed the checks, the caller gets an error and not an abort.
fn guarded<T>(what: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("the tokenizer library failed at {what}")),
    }
}

/// Text and speciality of each token by id; refuses ids that are given twice or too far apart.
fn by_id<'a>(
    vocab: &'a HashMap<String, u32>,
    added: &[(u32, AddedToken)],
) -> Result<Vec<Option<(&'a str, bool)>>, String> {
    let Some(&last) = vocab.values().max() else { return Err("the vocabulary is empty".into()) };
    let size = last as usize + 1;
    if size > vocab.len() + MAX_MISSING {
        return Err(format!("the vocabulary has {} tokens but ids up to {last}", vocab.len()));
    }
    let mut table = vec![None; size];
    for (token, &id) in vocab {
        if token.len() > MAX_TOKEN {
            return Err(format!("token {id} has {} bytes; at most {MAX_TOKEN} are accepted", token.len()));
        }
        let place: &mut Option<(&str, bool)> = &mut table[id as usize];
        if let Some((other, _)) = place {
            let (first, second) =
                if *other < token.as_str() { (*other, token.as_str()) } else { (token.as_str(), *other) };
            return Err(format!("`{first}` and `{second}` both have id {id}"));
        }
        *place = Some((token, false));
    }
    for (id, token) in added.iter().filter(|(_, token)| token.special) {
        debug_assert_eq!(vocab.get(&token.content), Some(id));
        if let Some((_, special)) = &mut table[*id as usize] {
            *special = true;
        }
    }
    Ok(table)
}

/// Both halves of each merge and their concatenation must be tokens; the crate does not check that before it copies.
fn check_merges(vocab: &HashMap<String, u32>, merges: &[(String, String)]) -> Result<(), String> {
    let mut whole = String::new();
    for (i, (left, right)) in merges.iter().enumerate() {
        whole.clear();
        whole.push_str(left);
        whole.push_str(right);
        if let Some(missing) = [left, right, &whole].into_iter().find(|t| !vocab.contains_key(*t)) {
            return Err(format!(
                "merge {i} (`{left}` `{right}`) needs the token `{missing}`, which is not there"
            ));
        }
    }
    Ok(())
}

/// Characters of the longest run of white space.
fn longest_blank(text: &str) -> usize {
    let (mut longest, mut run) = (0, 0);
    for c in text.chars() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
    }

    #[test]
    fn pieces_have_the_tokens_of_the_whole() {
        let prose = std::fs::read_to_string(fixture("text/lighthouse.txt")).unwrap();
        for kind in ["bpe", "spm"] {
            let tokenizer =
                Tokenizer::from_file(&fixture(&format!("tokenizer/{kind}/tokenizer.json"))).unwrap();
            let golden = std::fs::read(fixture(&format!("tokenizer/{kind}/goldens.json"))).unwrap();
            let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
            let cases = ["cases", "special_cases"].iter().flat_map(|key| golden[key].as_array().unwrap());
            let cases: Vec<&str> = cases.map(|case| case["text"].as_str().unwrap()).collect();
            // Odd texts beside each other, with and without a place to cut between them.
            for text in
                [prose.clone(), cases.concat(), cases.join(" "), cases.join(" x "), cases.join("\n y\r\n")]
            {
                let whole = tokenizer.encode_piece(&text, true).unwrap();
                for size in [1, 7, 64, 1000] {
                    let pieces = tokenizer.encode_pieces(&text, true, usize::MAX, size).unwrap();
                    assert_eq!(pieces, whole, "{kind}, {size}");
                    let mut cut = tokenizer.cuts.pieces(&text, size);
                    let n = std::iter::from_fn(|| (!cut.done()).then(|| cut.next().unwrap().len())).count();
                    assert!(n > text.len() / size.max(40) / 4, "{kind}, {size}: only {n} pieces");
                }
                for limit in [0, 1, 2, 30, whole.len(), whole.len() + 1] {
                    let some = tokenizer.encode_pieces(&text, true, limit, 16).unwrap();
                    assert_eq!(some, whole[..limit.min(whole.len())], "{kind}, {limit}");
                }
            }
        }
    }

    #[test]
    fn a_limit_stops_the_work_early() {
        let tokenizer = Tokenizer::from_file(&fixture("tokenizer/bpe/tokenizer.json")).unwrap();
        // The second megabyte could not be tokenized at all.
        let text = format!("{}{}", "a word or two ".repeat(80_000), "x".repeat(1 << 20));
        assert_eq!(tokenizer.encode_up_to(&text, true, 500).unwrap().len(), 500);
        let error = tokenizer.encode(&text, true).unwrap_err().to_string();
        assert!(error.contains("cannot be tokenized") && error.contains("no single space"), "{error}");
    }

    #[test]
    fn what_a_template_puts_behind_a_text_comes_behind_its_last_piece() {
        let text = std::fs::read_to_string(fixture("tokenizer/spm/tokenizer.json")).unwrap();
        let mut file: serde_json::Value = serde_json::from_str(&text).unwrap();
        let start = file["post_processor"]["single"][0].clone();
        file["post_processor"]["single"].as_array_mut().unwrap().push(start);
        let tokenizer = super::super::tokenizer_json::parse(file.to_string().as_bytes()).unwrap();
        let text = "one two three four five six";
        let whole = tokenizer.encode(text, true).unwrap();
        assert_eq!((whole.first(), whole.last()), (Some(&1), Some(&1)));
        assert_eq!(tokenizer.encode_pieces(text, true, usize::MAX, 5).unwrap(), whole);
        assert_eq!(tokenizer.encode_pieces(text, true, 4, 5).unwrap(), whole[..4]);
    }
}
