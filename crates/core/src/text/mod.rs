//! From text to tokens and back: tokenizer, chat template, sampling, generation and perplexity.
//!
//! A [`TextModel`] is what a checkpoint says about its text: the [`Tokenizer`], the [`ChatTemplate`] and the tokens that
//! end an answer. [`generate`] decodes with any session, KV dtype and attention method; [`perplexity`] scores a text
//! with several of them on the same tokens.

mod bytes;
mod chat;
mod compare;
mod cut;
mod generate;
mod gguf_vocabulary;
mod model;
mod perplexity;
mod sampler;
mod stream;
mod tokenizer;
mod tokenizer_json;

pub use chat::{BITNET_CHAT_TEMPLATE, ChatTemplate, Message};
pub use compare::{Compared, Distribution, compare};
pub use generate::{GenerateOptions, Generation, Progress, StopReason, generate};
pub use gguf_vocabulary::GgufVocabulary;
pub(crate) use gguf_vocabulary::{LLAMA3_SPLIT, token_type};
pub(crate) use model::Named;
pub use model::{TextModel, TextOptions};
pub use perplexity::{Difference, PerplexityOptions, Score, Scored, Variant, perplexity};
pub use sampler::{Sampler, SamplerOptions};
pub use stream::TokenStream;
pub use tokenizer::Tokenizer;
