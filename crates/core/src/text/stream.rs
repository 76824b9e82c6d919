//! Tokens to text, one at a time.

use super::bytes::{Kind, Spelling};
use super::tokenizer::Tokenizer;

/// Turns tokens into text as they come, and gives out only whole characters: a token may end in the middle of one.
///
/// Bytes that cannot become a character are replaced by U+FFFD. A stream of all tokens of a text gives what
/// [`Tokenizer::decode`] gives, but for such bytes in sentencepiece vocabularies (see there).
#[derive(Clone, Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The space that encoding puts in front of a text is still to be dropped.
    strip: bool,
    /// The beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool, start_of_text: bool) -> Self {
        let strip =
            start_of_text && matches!(tokenizer.spelling(), Spelling::Metaspace { strip_first: true, .. });
        TokenStream { tokenizer, skip_special, strip, pending: Vec::new() }
    }

    /// Appends to `out` the text that `token` completes. An id that the vocabulary lacks has no text.
    pub fn push(&mut self, token: u32, out: &mut String) {
        let pieces = self.tokenizer.pieces();
        if self.skip_special && pieces.kind(token) == Kind::Special {
            return;
        }
        let mut bytes = pieces.bytes(token);
        if self.strip && !bytes.is_empty() {
            self.strip = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let mut rest = &self.pending[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    // No length: the character may go on in the next token.
                    let Some(invalid) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
    }

    /// Ends the text: a character that was begun and never completed becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}
