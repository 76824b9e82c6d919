//! The bytes that each token stands for.
//!
//! Two spellings are in use. Byte-level BPE (GPT-2, Llama 3) writes each byte as one printable character of a fixed
//! alphabet; sentencepiece BPE (Llama 2) writes a space as `▁` and a byte that has no token of its own as `<0xAB>`.

/// How a vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// The GPT-2 alphabet.
    ByteLevel,
    /// `▁` for a space; `<0xAB>` for a byte where `bytes`; the first space of a text is not part of it where
    /// `strip_first`.
    Metaspace {
        /// Whether byte tokens exist.
        bytes: bool,
        /// Whether encoding put a space in front of the text.
        strip_first: bool,
    },
}

/// What stands for a space in sentencepiece vocabularies.
pub(super) const METASPACE: &str = "▁";

/// Bytes and kind of every token, by id.
#[derive(Clone, Debug, Default)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// `len + 1` places in `bytes`.
    starts: Vec<u32>,
    kinds: Vec<Kind>,
}

/// What sort of token an id is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The vocabulary has no such id.
    Missing,
    /// Text.
    Text,
    /// One byte of a character that has no token (`<0xAB>`).
    Byte,
    /// Control, never part of an answer's text.
    Special,
}

impl Pieces {
    /// The table of `tokens`: text and whether it is special, by id; an id without a token is `None`.
    pub(super) fn new(tokens: &[Option<(&str, bool)>], spelling: Spelling) -> Self {
        let alphabet = Alphabet::new();
        let mut pieces = Pieces::default();
        pieces.starts.push(0);
        for token in tokens {
            let kind = match token {
                None => Kind::Missing,
                Some((text, special)) => {
                    let byte = pieces.push(text, spelling, &alphabet);
                    match (special, byte) {
                        (true, _) => Kind::Special,
                        (false, true) => Kind::Byte,
                        (false, false) => Kind::Text,
                    }
                }
            };
            pieces.kinds.push(kind);
            // Tokenizer files are capped far below 4 GiB, and a piece is never longer than its spelling.
            pieces.starts.push(pieces.bytes.len() as u32);
        }
        pieces
    }

    /// Appends the bytes of `text`; true when it is a byte token.
    fn push(&mut self, text: &str, spelling: Spelling, alphabet: &Alphabet) -> bool {
        match spelling {
            Spelling::ByteLevel => {
                let start = self.bytes.len();
                for c in text.chars() {
                    match alphabet.byte(c) {
                        Some(byte) => self.bytes.push(byte),
                        None => {
                            // An added token is spelled as it is.
                            self.bytes.truncate(start);
                            self.bytes.extend_from_slice(text.as_bytes());
                            break;
                        }
                    }
                }
                false
            }
            Spelling::Metaspace { bytes, .. } => match byte_token(text).filter(|_| bytes) {
                Some(byte) => {
                    self.bytes.push(byte);
                    true
                }
                None => {
                    self.bytes.extend_from_slice(text.replace(METASPACE, " ").as_bytes());
                    false
                }
            },
        }
    }

    /// Ids, missing ones included.
    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The bytes of `id`; none for an id that is missing.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match self.kinds.get(id) {
            Some(_) => &self.bytes[self.starts[id] as usize..self.starts[id + 1] as usize],
            None => &[],
        }
    }

    /// The kind of `id`.
    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Missing)
    }
}

/// The byte of a token such as `<0x0A>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The printable alphabet of GPT-2: bytes that print as themselves, and 256 onwards for the others in order
/// (`bytes_to_unicode` of its published encoder).
struct Alphabet {
    /// Byte of each character below U+0144.
    bytes: [Option<u8>; 0x144],
}

impl Alphabet {
    fn new() -> Self {
        let mut bytes = [None; 0x144];
        let mut next = 0x100;
        for byte in 0..=255u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let place = if printable { usize::from(byte) } else { next };
            next += usize::from(!printable);
            bytes[place] = Some(byte);
        }
        Alphabet { bytes }
    }

    fn byte(&self, c: char) -> Option<u8> {
        self.bytes.get(c as usize).copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_names_every_byte_once() {
        let alphabet = Alphabet::new();
        let mut found: Vec<u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(|c| alphabet.byte(c)).collect();
        found.sort_unstable();
        assert_eq!(found, (0..=255).collect::<Vec<u8>>());
        // The two that everybody meets: space and newline.
        assert_eq!(
            (alphabet.byte('Ġ'), alphabet.byte('Ċ'), alphabet.byte('A')),
            (Some(b' '), Some(b'\n'), Some(b'A'))
        );
    }

    #[test]
    fn pieces_spell_bytes_both_ways() {
        let tokens = [Some(("Ġhi", false)), None, Some(("<|end|>", true)), Some(("日Ġ", false))];
        let pieces = Pieces::new(&tokens, Spelling::ByteLevel);
        assert_eq!(
            (pieces.bytes(0), pieces.bytes(1), pieces.bytes(2)),
            (&b" hi"[..], &b""[..], &b"<|end|>"[..])
        );
        assert_eq!(pieces.bytes(3), "日Ġ".as_bytes(), "a token outside the alphabet is spelled as it is");
        assert_eq!(
            (pieces.kind(1), pieces.kind(2), pieces.kind(9)),
            (Kind::Missing, Kind::Special, Kind::Missing)
        );

        let tokens =
            [Some(("▁a▁", false)), Some(("<0xE2>", false)), Some(("<0xZZ>", false)), Some(("<0x+1>", false))];
        let pieces = Pieces::new(&tokens, Spelling::Metaspace { bytes: true, strip_first: true });
        assert_eq!((pieces.bytes(0), pieces.bytes(1)), (&b" a "[..], &[0xE2][..]));
        assert_eq!((pieces.kind(1), pieces.kind(2), pieces.kind(3)), (Kind::Byte, Kind::Text, Kind::Text));
    }
}
