//! Chat templates: the Jinja text in a checkpoint that turns messages into one prompt.
//!
//! Rendered as `transformers` renders them: blocks are trimmed, Python's string methods exist, `raise_exception` ends the
//! work with the template's own words. A template is a program from a file, so its steps and its output are limited.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;

use crate::error::{Error, Result};

/// The template that microsoft/bitnet-b1.58-2B-4T was trained with, from its `tokenizer_config.json`. The files that its
/// authors converted to GGUF carry another, which the model does not know.
pub const BITNET_CHAT_TEMPLATE: &str = "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
    {{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
    {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

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
}

impl ChatTemplate {
    /// A template; `bos` and `eos` are the spellings of the tokens that begin and end a text, empty where there is none.
    ///
    /// # Errors
    /// A template that is too long or is not Jinja.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        if source.len() > MAX_TEMPLATE {
            return Err(Error::Invalid(format!(
                "the chat template has {} bytes; at most {MAX_TEMPLATE} are read",
                source.len()
            )));
        }
        environment()?.template_from_str(source).map_err(|e| failed(&e))?;
        Ok(ChatTemplate { source: source.into(), bos: bos.into(), eos: eos.into() })
    }

    /// Whether `source` is the template that conversions of the 2B-4T model carry by mistake.
    pub fn is_known_wrong(source: &str) -> bool {
        source.contains(WRONG)
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// What the template objects to, and a template that goes on for too long or writes too much.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut environment = environment()?;
        environment.set_fuel(Some(FUEL + FUEL_A_MESSAGE * messages.len() as u64));
        let template = environment.template_from_str(&self.source).map_err(|e| failed(&e))?;
        let mut out = Bounded(Vec::new());
        let context = context! {
            messages => minijinja::value::Serde(messages),
            bos_token => self.bos.clone(),
            eos_token => self.eos.clone(),
            add_generation_prompt,
        };
        template.render_captured_to(context, &mut out).map_err(|e| failed(&e))?;
        String::from_utf8(out.0).map_err(|e| Error::Invalid(format!("the chat template wrote no text: {e}")))
    }
}

/// Jinja as `transformers` sets it up.
fn environment<'a>() -> Result<Environment<'a>> {
    let mut environment = Environment::new();
    let syntax =
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| failed(&e))?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |text: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
    });
    Ok(environment)
}

fn failed(error: &minijinja::Error) -> Error {
    let reason = match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".to_string(),
        ErrorKind::WriteFailure => format!("it writes more than {MAX_PROMPT} bytes"),
        _ => error.to_string(),
    };
    Error::Invalid(format!("the chat template cannot be used: {reason}"))
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

    fn refusal(source: &str) -> String {
        let template = ChatTemplate::new(source, "<s>", "</s>");
        let rendered = template.and_then(|t| t.render(&[Message::new("user", "hi")], true));
        rendered.unwrap_err().to_string()
    }

    #[test]
    fn the_template_of_2b_4t() {
        let template =
            ChatTemplate::new(BITNET_CHAT_TEMPLATE, "<|begin_of_text|>", "<|end_of_text|>").unwrap();
        let messages = [Message::new("system", " Be brief. "), Message::new("user", "Hello?\n")];
        assert_eq!(
            template.render(&messages, true).unwrap(),
            "<|begin_of_text|>System: Be brief.<|eot_id|>User: Hello?<|eot_id|>Assistant: "
        );
        assert!(!ChatTemplate::is_known_wrong(BITNET_CHAT_TEMPLATE));
        assert!(ChatTemplate::is_known_wrong("{{ 'Human: ' + m + '\\n\\nBITNETAssistant: ' }}"));
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
