//! The generation loop: prefill in chunks, then one token at a time, with the time of each.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::sampler::{Sampler, SamplerOptions};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::session::Session;

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens of the answer, at the most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampler: SamplerOptions,
    /// Tokens that end the answer; none to go on until the limit.
    pub stop: Vec<u32>,
    /// Prompt tokens between two calls for progress; the result does not depend on it.
    pub chunk: usize,
    /// Whether special tokens become text.
    pub show_special: bool,
}

impl Default for GenerateOptions {
    /// 128 greedy tokens, nothing stops.
    fn default() -> Self {
        GenerateOptions {
            max_tokens: 128,
            sampler: SamplerOptions::default(),
            stop: Vec::new(),
            chunk: Session::DEFAULT_CHUNK,
            show_special: false,
        }
    }
}

/// What happened just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// `done` of `total` prompt tokens are in the cache.
    Prompt {
        /// Tokens read.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// A token was chosen.
    Token {
        /// Its id.
        id: u32,
        /// The characters that it completes; often empty in scripts whose characters take several tokens.
        text: &'a str,
    },
    /// The answer has ended.
    End {
        /// What stands for a character that was begun and never completed; empty where there is none.
        text: &'a str,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model chose this stop token, which is not part of the answer.
    Token(u32),
    /// The answer has as many tokens as asked for.
    Length,
    /// The cache is full.
    Context,
    /// The caller ended it.
    Interrupted,
}

impl StopReason {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            StopReason::Token(_) => "stop",
            StopReason::Length => "length",
            StopReason::Context => "context",
            StopReason::Interrupted => "interrupted",
        }
    }
}

/// An answer and how long it took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Tokens of the answer, without the stop token.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Prompt tokens that were read.
    pub prompt_tokens: usize,
    /// Time to read the prompt.
    pub prefill: Duration,
    /// Time until the first token was chosen; absent when none was.
    pub first_token: Option<Duration>,
    /// Time of each decode step with the choice that followed: one for each token after the first, the stop token
    /// included.
    pub steps: Vec<Duration>,
}

impl Generation {
    /// Prompt tokens a second.
    pub fn prefill_rate(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Decoded tokens a second.
    pub fn decode_rate(&self) -> Option<f64> {
        rate(self.steps.len(), self.steps.iter().sum())
    }

    /// The decode step that the share `q` of all steps is not slower than (nearest rank).
    pub fn step_quantile(&self, q: f64) -> Option<Duration> {
        let mut sorted = self.steps.clone();
        sorted.sort_unstable();
        let rank = (q.clamp(0.0, 1.0) * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.max(1) - 1).copied()
    }
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    let seconds = time.as_secs_f64();
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}

/// Appends `prompt` to what `session` holds, then decodes. `progress` sees every step and may end the
/// work; its last call is [`Progress::End`].
///
/// # Errors
/// A prompt that is empty, does not fit the cache or has tokens that the model lacks; options out of range;
/// [`Error::NotFinite`] where the model's output is no distribution; what `progress` returns.
pub fn generate<E: From<Error>>(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    mut progress: impl FnMut(Progress<'_>) -> Result<ControlFlow<()>, E>,
) -> Result<Generation, E> {
    let mut sampler = Sampler::new(options.sampler)?;
    check(session, prompt, options)?;
    session.set_exact_top(exact_top(session, &options.sampler)?);
    let start = Instant::now();
    let mut done = Generation {
        tokens: Vec::new(),
        text: String::new(),
        stop: StopReason::Length,
        prompt_tokens: 0,
        prefill: Duration::ZERO,
        first_token: None,
        steps: Vec::new(),
    };
    let total = prompt.len();
    let mut next = None;
    for chunk in session.cut(prompt, options.chunk) {
        let logits = session.prefill(chunk)?;
        done.prompt_tokens += chunk.len();
        if done.prompt_tokens == total && options.max_tokens > 0 {
            done.prefill = start.elapsed();
            next = Some(sampler.sample(logits)?);
            done.first_token = Some(start.elapsed());
        }
        if progress(Progress::Prompt { done: done.prompt_tokens, total })?.is_break() {
            done.stop = StopReason::Interrupted;
            next = None;
            break;
        }
    }
    if next.is_none() {
        done.prefill = start.elapsed();
    }
    let mut stream = tokenizer.continuation(!options.show_special);
    while let Some(token) = next.take() {
        if options.stop.contains(&token) {
            done.stop = StopReason::Token(token);
            break;
        }
        done.tokens.push(token);
        let from = done.text.len();
        stream.push(token, &mut done.text);
        if progress(Progress::Token { id: token, text: &done.text[from..] })?.is_break() {
            done.stop = StopReason::Interrupted;
        } else if done.tokens.len() == options.max_tokens {
            done.stop = StopReason::Length;
        } else if session.len() == session.cache().shape().capacity {
            done.stop = StopReason::Context;
        } else {
            let step = Instant::now();
            next = Some(sampler.sample(session.decode(token)?)?);
            done.steps.push(step.elapsed());
        }
    }
    let from = done.text.len();
    stream.finish(&mut done.text);
    // Nothing is left to end.
    let _ = progress(Progress::End { text: &done.text[from..] })?;
    Ok(done)
}

/// How many of the likeliest tokens the sampler looks at.
fn exact_top(session: &Session, sampler: &SamplerOptions) -> Result<usize> {
    match (sampler.temperature > 0.0, sampler.top_k) {
        (false, _) => Ok(1),
        (true, 0) if session.model().head_format.is_two_stage() => Err(Error::Invalid(
            "a two-stage head knows the likeliest tokens only, and sampling without --top-k needs all of them; give \
             --top-k, or load the model with --head bf16"
                .into(),
        )),
        (true, 0) => Ok(usize::MAX),
        (true, top_k) => Ok(top_k),
    }
}

/// What would fail only after part of the prompt was read.
fn check(session: &Session, prompt: &[u32], options: &GenerateOptions) -> Result<()> {
    let vocab = session.model().config.vocab;
    if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab) {
        return Err(Error::Token { token, vocab });
    }
    let (wanted, capacity) = (session.len() + prompt.len(), session.cache().shape().capacity);
    if wanted > capacity {
        return Err(Error::CacheFull { capacity, wanted });
    }
    if prompt.is_empty() {
        return Err(Error::Invalid("the prompt has no token".into()));
    }
    if options.chunk == 0 {
        return Err(Error::Invalid("the chunk must be at least one token".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_quantiles_by_hand() {
        let ms = Duration::from_millis;
        let generation = Generation {
            tokens: vec![1, 2, 3],
            text: String::new(),
            stop: StopReason::Length,
            prompt_tokens: 10,
            prefill: ms(500),
            first_token: Some(ms(501)),
            steps: vec![ms(30), ms(10)],
        };
        assert_eq!((generation.prefill_rate(), generation.decode_rate()), (Some(20.0), Some(50.0)));
        assert_eq!(generation.step_quantile(0.5), Some(ms(10)));
        assert_eq!(generation.step_quantile(0.99), Some(ms(30)));
        let none = Generation { steps: Vec::new(), ..generation };
        assert_eq!((none.decode_rate(), none.step_quantile(0.5)), (None, None));
    }
}
