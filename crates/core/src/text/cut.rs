//! Where a long text can be taken apart before it is tokenized, so that the memory that this takes follows the longest
//! piece and not the text.
//!
//! A text is cut before a single space that stands between two characters which are no white space. The tokens of the
//! pieces are then those of the whole, for these reasons. No match of the splitting expressions of Llama 3, GPT-2 and
//! llama.cpp's `default` reaches from a character that is no white space over the space behind it, none of them looks
//! back, and only runs of white space look ahead. Sentencepiece vocabularies have no expression: there it is the merges
//! that never join a word to the space behind it. Both are seen from the vocabulary: where it has a token with a space
//! inside a word, or where a few short texts show that the tokens of parts are not those of the whole, no text is cut.
//! Added tokens are found before all this: nothing is cut next to a character that one of them begins or ends with.
//!
//! What this cannot see is a tokenizer of another family whose splitting looks across a single space: its tokens next to
//! a cut could be others than those of the whole text.

use std::collections::HashSet;
use std::ops::Range;

use super::bytes::METASPACE;

/// A text that is longer is cut (bytes); a byte takes some 160 bytes of memory while it is tokenized.
pub(super) const PIECE: usize = 64 << 10;
/// Longest piece, where no place to cut comes sooner (bytes).
pub(super) const MAX_PIECE: usize = 256 << 10;

/// How a tokenizer's texts are cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cuts {
    /// What becomes of the space at a cut; `None` where nothing is cut.
    space: Option<Space>,
    /// Characters that added tokens begin or end with.
    edges: HashSet<char>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    /// It begins the next piece.
    Kept,
    /// The tokenizer puts one in front of every piece.
    Dropped,
}

/// Texts and their continuations, with which the rule is tried on a tokenizer.
const TRIED: &[(&str, &str)] =
    &[("a", "b"), ("The", "end."), ("é!", "1234 5"), ("x\n2", "日本"), ("it's", "I'll\n\nno")];

impl Cuts {
    /// The rule for a tokenizer with these tokens, as bytes, and these added tokens. `encode` gives the tokens of a short
    /// text without those that every prompt starts with.
    pub(super) fn new<'a>(
        mut tokens: impl Iterator<Item = &'a [u8]>,
        added: &[String],
        encode: impl Fn(&str) -> Option<Vec<u32>>,
    ) -> Self {
        let joined = tokens.any(joins_words) || added.iter().any(|token| token.contains(' '));
        let equal = |space: Space| {
            let part = |(left, right): &(&str, &str)| {
                let mut parts = encode(left)?;
                parts.extend(encode(&match space {
                    Space::Kept => format!(" {right}"),
                    Space::Dropped => (*right).to_string(),
                })?);
                Some(parts == encode(&format!("{left} {right}"))?)
            };
            TRIED.iter().all(|pair| part(pair) == Some(true))
        };
        let space = [Space::Kept, Space::Dropped].into_iter().find(|&space| !joined && equal(space));
        let ends = |token: &String| [token.chars().next(), token.chars().next_back()];
        Cuts { space, edges: added.iter().flat_map(ends).flatten().collect() }
    }

    /// The pieces of `text`, each of about `size` bytes.
    pub(super) fn pieces<'c, 't>(&'c self, text: &'t str, size: usize) -> Pieces<'c, 't> {
        Pieces { cuts: self, text, from: 0, size }
    }

    /// Where the piece that ends before the byte `at` of `text` is followed by another.
    fn cut(&self, text: &str, at: usize) -> Option<usize> {
        let space = self.space?;
        if text.as_bytes().get(at) != Some(&b' ') {
            return None;
        }
        let inside = |c: Option<char>| {
            c.is_some_and(|c| !c.is_whitespace() && !METASPACE.contains(c) && !self.edges.contains(&c))
        };
        let both = inside(text[..at].chars().next_back()) && inside(text[at + 1..].chars().next());
        both.then_some(match space {
            Space::Kept => at,
            Space::Dropped => at + 1,
        })
    }
}

/// Whether a token reaches from a character that is no white space to the space behind it.
fn joins_words(token: &[u8]) -> bool {
    let before = |at: usize| String::from_utf8_lossy(&token[..at]).chars().next_back();
    // Half a character that a space follows ends in white space: no other is split so.
    let word = |c: char| !c.is_whitespace() && c != char::REPLACEMENT_CHARACTER;
    (1..token.len()).any(|at| token[at] == b' ' && before(at).is_some_and(word))
}

/// The pieces of a text, in order.
pub(super) struct Pieces<'c, 't> {
    cuts: &'c Cuts,
    text: &'t str,
    from: usize,
    size: usize,
}

impl<'t> Pieces<'_, 't> {
    /// Whether all of the text was given out.
    pub(super) fn done(&self) -> bool {
        self.from == self.text.len()
    }

    /// The next piece; an empty text is one piece.
    ///
    /// # Errors
    /// A sentence, where no cut is possible for too long.
    pub(super) fn next(&mut self) -> Result<&'t str, String> {
        let from = self.from;
        let left = self.text.len() - from;
        let (end, next) = if left <= self.size {
            (self.text.len(), self.text.len())
        } else {
            let found = |at: usize| self.cuts.cut(self.text, at).map(|next| (at, next));
            let places = |range: Range<usize>| from + range.start..from + range.end;
            let back = places(1..self.size).rev().find_map(found);
            let ahead = || places(self.size..left.min(MAX_PIECE)).find_map(found);
            match back.or_else(ahead) {
                Some(found) => found,
                None if left <= MAX_PIECE => (self.text.len(), self.text.len()),
                None => {
                    return Err(format!(
                        "the {MAX_PIECE} bytes from byte {from} on have no single space between two words, where the \
                         text could be taken apart; break them up"
                    ));
                }
            }
        };
        self.from = next;
        Ok(&self.text[from..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn simple() -> Cuts {
        Cuts { space: Some(Space::Kept), edges: ['<', '>'].into_iter().collect() }
    }

    fn all<'a>(cuts: &Cuts, text: &'a str, size: usize) -> Result<Vec<&'a str>, String> {
        let mut pieces = cuts.pieces(text, size);
        let mut found = Vec::new();
        loop {
            found.push(pieces.next()?);
            if pieces.done() {
                return Ok(found);
            }
        }
    }

    #[test]
    fn texts_are_cut_before_single_spaces_between_words() {
        let text = "one two  three\n four <x> five 日 本";
        assert_eq!(
            all(&simple(), text, 4).unwrap(),
            ["one", " two  three\n four <x> five", " 日", " 本"],
            "the last place within the size, or the first behind it"
        );
        let dropped = Cuts { space: Some(Space::Dropped), ..simple() };
        assert_eq!(all(&dropped, "one two three", 8).unwrap(), ["one two", "three"]);
        assert_eq!(all(&dropped, "one two three", 13).unwrap(), ["one two three"]);
        assert_eq!(all(&simple(), "", 4).unwrap(), [""]);
        assert_eq!(all(&Cuts::default(), "one two three", 4).unwrap(), ["one two three"]);
        let long = "x".repeat(MAX_PIECE + 1);
        assert!(all(&simple(), &long, PIECE).unwrap_err().contains("no single space"));
        assert_eq!(all(&simple(), &long[1..], PIECE).unwrap().len(), 1);
        let later = format!("a b{long}");
        assert!(all(&simple(), &later, PIECE).unwrap_err().contains("from byte 1 on"));
    }

    #[test]
    fn vocabularies_that_join_words_are_not_cut() {
        assert!(joins_words(b"a b") && joins_words("日 ".as_bytes()) && joins_words(b"\x00 "));
        assert!(!joins_words(b" a") && !joins_words(b"\n  ") && !joins_words("\u{3000} ".as_bytes()));
        // A tokenizer of one byte a token: every cut is right. One that counts the words of a text: none is.
        let bytes = |text: &str| Some(text.bytes().map(u32::from).collect());
        let none: [&[u8]; 0] = [];
        assert_eq!(Cuts::new(none.into_iter(), &[], bytes).space, Some(Space::Kept));
        assert_eq!(Cuts::new([&b"a b"[..]].into_iter(), &[], bytes).space, None);
        assert_eq!(Cuts::new(none.into_iter(), &["<a b>".into()], bytes).space, None);
        let count = |text: &str| Some(vec![text.split_whitespace().count() as u32]);
        assert_eq!(Cuts::new(none.into_iter(), &[], count).space, None);
        let words = |text: &str| Some(text.split(' ').map(|word| word.len() as u32).collect());
        assert_eq!(Cuts::new(none.into_iter(), &["<s>".into()], words).space, Some(Space::Dropped));
    }
}
