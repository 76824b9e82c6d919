//! Chat templates: the Jinja text in a checkpoint that turns messages into one prompt.
//!
//! Rendered as `transformers` renders them: blocks are trimmed, Python's string methods exist, `raise_exception` ends the
//! work with the template's own words, `strftime_now` tells the date (in UTC), the tags that mark what was generated do
//! nothing, and there are no tools and no documents.
//!
//! A template is a program that comes with a model and is trusted like it. Its steps and its output are limited, so that
//! a mistake in it ends; the memory that its variables take is not. It is compiled when it is first needed, so that a
//! checkpoint whose template is damaged can still be used without.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;

use crate::error::{Error, Result};

/// The template that microsoft/bitnet-b1.58-2B-4T was trained with, from its `tokenizer_config.json`. The files that its
/// authors converted to GGUF carry another, which the model does not know.
pub const BITNET_CHAT_TEMPLATE: &str = "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
    {{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
    {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// The same as its authors wrote it. There the tokenizer puts in the beginning of the text.
const BITNET_ORIGINAL: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}\
    {% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// What the wrong template of those files says.
const WRONG: &str = "BITNETAssistant: ";

/// Largest template (bytes).
const MAX_TEMPLATE: usize = 1 << 20;
/// Largest prompt (bytes).
const MAX_PROMPT: usize = 64 << 20;
/// Steps that a template may take, and more for each message.
const FUEL: u64 = 200_000;
const FUEL_A_MESSAGE: u64 = 2_000;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// A chat template with the tokens that it may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    source: String,
    bos: String,
    eos: String,
    /// The file that it is from.
    place: Option<PathBuf>,
}

impl ChatTemplate {
    /// A template, not looked at yet; `bos` and `eos` are the spellings of the tokens that begin and end a text, empty
    /// where there is none.
    pub fn new(source: &str, bos: &str, eos: &str) -> Self {
        ChatTemplate { source: source.into(), bos: bos.into(), eos: eos.into(), place: None }
    }

    /// The same template with the file that errors name.
    pub fn from_file(self, path: &Path) -> Self {
        ChatTemplate { place: Some(path.into()), ..self }
    }

    /// Whether `source` is the template that conversions of the 2B-4T model carry by mistake.
    pub fn is_known_wrong(source: &str) -> bool {
        source.contains(WRONG)
    }

    /// Whether `source` is the template of the 2B-4T model, but for white space.
    pub(super) fn is_known_right(source: &str) -> bool {
        let tight = |text: &str| text.split_whitespace().collect::<String>();
        [BITNET_CHAT_TEMPLATE, BITNET_ORIGINAL].iter().any(|right| tight(right) == tight(source))
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// A template that is too long or no Jinja, what it objects to, and one that goes on for too long or writes too much.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.try_render(messages, add_generation_prompt).map_err(|reason| {
            let reason = format!("the chat template cannot be used: {reason}");
            match &self.place {
                Some(path) => Error::Config { path: path.clone(), reason },
                None => Error::Invalid(reason),
            }
        })
    }

    fn try_render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
        if self.source.len() > MAX_TEMPLATE {
            return Err(format!("it has {} bytes; at most {MAX_TEMPLATE} are read", self.source.len()));
        }
        let mut environment = environment().map_err(|e| reason(&e))?;
        environment.set_fuel(Some(FUEL + FUEL_A_MESSAGE * messages.len() as u64));
        let source = without_marks(&self.source);
        let template = environment.template_from_str(&source).map_err(|e| reason(&e))?;
        let mut out = Bounded(Vec::new());
        let context = context! {
            messages => minijinja::value::Serde(messages),
            bos_token => self.bos.clone(),
            eos_token => self.eos.clone(),
            tools => (),
            documents => (),
            add_generation_prompt,
        };
        template.render_captured_to(context, &mut out).map_err(|e| reason(&e))?;
        String::from_utf8(out.0).map_err(|e| format!("it wrote no text: {e}"))
    }
}

/// The tags `{% generation %}` and `{% endgeneration %}`, with which `transformers` finds what an assistant wrote, as
/// blocks that do nothing and trim the same white space.
fn without_marks(source: &str) -> Cow<'_, str> {
    if !source.contains("endgeneration") {
        return source.into();
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag, after)) = tag(rest) {
        out.push_str(before);
        match tag.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out.into()
}

/// What stands before the inside of the next `{% … %}`, the inside, and the rest.
fn tag(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_at(text.find("{%")? + 2);
    let (tag, after) = rest.split_at(rest.find("%}")?);
    Some((before, tag, after))
}

/// Jinja as `transformers` sets it up.
fn environment<'a>() -> Result<Environment<'a>, minijinja::Error> {
    let refuse = |text: String| minijinja::Error::new(ErrorKind::InvalidOperation, text);
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", move |text: String| -> Result<String, minijinja::Error> {
        Err(refuse(text))
    });
    environment.add_function("strftime_now", move |format: String| {
        jiff::fmt::strtime::format(format, jiff::Timestamp::now()).map_err(|e| refuse(e.to_string()))
    });
    Ok(environment)
}

fn reason(error: &minijinja::Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".to_string(),
        ErrorKind::WriteFailure => format!("it writes more than {MAX_PROMPT} bytes"),
        _ => error.to_string(),
    }
}

/// A buffer that refuses to grow past [`MAX_PROMPT`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_PROMPT - self.0.len() {
            return Err(io::Error::other("too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(source: &str) -> Result<String> {
        ChatTemplate::new(source, "<s>", "</s>").render(&[Message::new("user", "hi")], true)
    }

    fn refusal(source: &str) -> String {
        rendered(source).unwrap_err().to_string()
    }

    #[test]
    fn the_template_of_2b_4t() {
        let messages = [Message::new("system", " Be brief. "), Message::new("user", "Hello?\n")];
        let render =
            |source| ChatTemplate::new(source, "<|begin_of_text|>", "").render(&messages, true).unwrap();
        let expected = "System: Be brief.<|eot_id|>User: Hello?<|eot_id|>Assistant: ";
        assert_eq!(render(BITNET_CHAT_TEMPLATE), format!("<|begin_of_text|>{expected}"));
        assert_eq!(render(BITNET_ORIGINAL), expected);
        for right in [BITNET_CHAT_TEMPLATE, BITNET_ORIGINAL] {
            assert!(
                ChatTemplate::is_known_right(&format!("{right}\n")) && !ChatTemplate::is_known_wrong(right)
            );
        }
        let wrong = "{{ 'Human: ' + m + '\\n\\nBITNETAssistant: ' }}";
        assert!(ChatTemplate::is_known_wrong(wrong) && !ChatTemplate::is_known_right(wrong));
    }

    #[test]
    fn what_transformers_offers_is_there() {
        let marked = "{% for m in messages %}\n{%- generation %}\n  {{ m.content }} {%- endgeneration -%}\n{% endfor %}";
        assert_eq!(rendered(marked).unwrap(), "  hi");
        let nothing = "{{ tools is none }} {{ documents is none }} {{ custom is defined }}";
        assert_eq!(rendered(nothing).unwrap(), "True True False");
        let year = rendered("{{ strftime_now('%Y-%m-%d') }}").unwrap();
        let start = year.split_once('-').and_then(|(year, _)| year.parse::<u32>().ok());
        assert!(start.is_some_and(|year| year >= 2024) && year.len() == 10, "{year}");
        assert!(refusal("{{ strftime_now('%Q%') }}").contains("cannot be used"));
    }

    #[test]
    fn a_template_is_looked_at_when_it_is_used() {
        let bad = ChatTemplate::new("{% for %}", "", "").from_file(Path::new("dir/chat_template.jinja"));
        let error = bad.render(&[], true).unwrap_err().to_string();
        assert!(error.contains("dir/chat_template.jinja") && error.contains("cannot be used"), "{error}");
    }

    #[test]
    fn templates_are_stopped() {
        assert!(refusal("{{ raise_exception('no, thanks') }}").contains("no, thanks"));
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(refusal(loops).contains("too many steps"));
        assert!(refusal("{{ 'x' * 90000000 }}").contains("more than 67108864 bytes"));
        assert!(refusal("{% for %}").contains("cannot be used"));
        assert!(refusal(&"x".repeat(MAX_TEMPLATE + 1)).contains("at most"));
        assert!(refusal("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}").contains("cannot be used"));
    }
}
