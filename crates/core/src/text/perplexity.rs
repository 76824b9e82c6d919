//! Perplexity of a text under several KV dtypes and attention methods, on the same tokens.
//!
//! The protocol. The text is tokenized once. Windows of `context` tokens start every `stride` text tokens; each begins
//! with the beginning-of-text token, if the model's prompts do, and goes on with the text. In each window the last
//! `stride` tokens are scored: everything before the last token that precedes them is prefilled in the KV dtype, densely
//! unless the method has a setting `prefill`, then the tokens are decoded one by one with the method, each fed as the text has it (teacher forcing), and each scored
//! by the negative logarithm of the probability that the step before gave it. So every scored token has between
//! `context - stride` and `context - 1` tokens before it, every text token after the first `context - stride - 1` or so is
//! scored exactly once, and all KV dtypes and methods score the same tokens. A last window that is not full is left out.
//!
//! Dense attention in bf16 is the baseline, and it is always measured. Dense scores are taken from prefill passes: prefill
//! and dense decode steps give the same bits, in every KV dtype.

use std::ops::ControlFlow;
use std::sync::Arc;

use longbit_sys::Team;

use super::compare::{Distribution, compare};
use crate::attention::{MethodSpec, method};
use crate::error::{Error, Result};
use crate::kv::{KvDtype, kv_dtype};
use crate::model::Model;
use crate::session::{Session, SessionOptions};

/// Tokens that a dense scoring pass takes at a time: their logits are held together. Also decode steps between two calls
/// for progress.
const DENSE_CHUNK: usize = 16;

/// A KV dtype with an attention method.
#[derive(Clone)]
pub struct Variant {
    /// Number format of keys and values.
    pub kv: KvDtype,
    /// Attention method of the scored steps.
    pub method: MethodSpec,
}

impl Variant {
    /// The variant called `kv` and `method`.
    ///
    /// # Errors
    /// A name that does not exist.
    pub fn new(kv: &str, how: &str) -> Result<Self> {
        Ok(Variant { kv: kv_dtype(kv)?, method: method(how)? })
    }

    fn is(&self, other: &Variant) -> bool {
        self.kv == other.kv && self.method.canonical() == other.method.canonical()
    }
}

/// What is measured, and where.
#[derive(Clone)]
pub struct PerplexityOptions {
    /// Tokens of a window.
    pub context: usize,
    /// Tokens that are scored in a window, and by which windows are apart.
    pub stride: usize,
    /// The token that begins every window.
    pub bos: Option<u32>,
    /// What is compared with dense bf16, which is added in front if it is not there.
    pub variants: Vec<Variant>,
}

/// How far the work is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scored {
    /// Tokens that went through the model: those of each window's prefill once a KV dtype and pattern of the prefill, the scored
    /// ones once a variant.
    pub done: usize,
    /// Such tokens in all.
    pub total: usize,
}

/// A paired difference to the baseline, over the scored tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Mean difference of the negative log-likelihoods (nats a token); positive is worse.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
    /// Mean Kullback-Leibler divergence of the distributions from the baseline's (nats a token); absent where the
    /// baseline's do not fit memory.
    pub kl: Option<f64>,
    /// Share of the tokens where both find the same token likeliest; absent with `kl`.
    pub same_top: Option<f64>,
}

/// The score of one variant.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// KV dtype.
    pub kv: String,
    /// Attention method with all parameters.
    pub method: String,
    /// Negative log-likelihood of each scored token (nats), in the order of the text.
    pub nats: Vec<f64>,
    /// Mean of `nats`.
    pub mean: f64,
    /// Its standard error, as if tokens were independent: text is not, so the true one is somewhat larger.
    pub error: f64,
    /// Bits a byte of text; absent where the scored tokens have no text.
    pub bits_per_byte: Option<f64>,
    /// Against dense bf16; absent for that itself.
    pub difference: Option<Difference>,
}

impl Score {
    /// The perplexity, `exp(mean)`.
    pub fn perplexity(&self) -> f64 {
        libm::exp(self.mean)
    }
}

impl PerplexityOptions {
    /// Most memory for the baseline's logits of a window; with more the divergence is left out (bytes).
    pub const MAX_BASELINE: usize = 512 << 20;

    /// Bytes of the baseline's logits of a window over `vocab` tokens; 0 where they are not needed, since dense bf16 is
    /// all that is measured, or are more than [`PerplexityOptions::MAX_BASELINE`].
    ///
    /// # Errors
    /// None but of the tables' own names.
    pub fn baseline_bytes(&self, vocab: usize) -> Result<usize> {
        let bytes = self.stride.saturating_mul(vocab).saturating_mul(size_of::<f32>());
        Ok(if self.all_variants()?.len() > 1 && bytes <= Self::MAX_BASELINE { bytes } else { 0 })
    }

    /// What is measured: dense bf16 first, then each variant once.
    ///
    /// # Errors
    /// None but of the tables' own names.
    pub fn all_variants(&self) -> Result<Vec<Variant>> {
        let mut all = vec![Variant::new("bf16", "dense")?];
        for variant in &self.variants {
            if !all.iter().any(|known| known.is(variant)) {
                all.push(variant.clone());
            }
        }
        Ok(all)
    }

    /// Windows in a text of `tokens` tokens.
    pub fn windows(&self, tokens: usize) -> usize {
        let text = self.context.saturating_sub(usize::from(self.bos.is_some()));
        if tokens < text { 0 } else { (tokens - text) / self.stride.max(1) + 1 }
    }

    /// Whether a text of `tokens` tokens can be scored so.
    ///
    /// # Errors
    /// A stride that is no less than the context, and a text shorter than a window.
    pub fn check(&self, tokens: usize) -> Result<()> {
        if self.stride == 0 || self.context < self.stride.saturating_add(1) {
            return Err(Error::Invalid(format!(
                "a context of {} tokens cannot score {} of them; the stride must be at least 1 and below the context",
                self.context, self.stride
            )));
        }
        if self.windows(tokens) == 0 {
            return Err(Error::Invalid(format!(
                "the text has {tokens} tokens and a window of {} needs {}; use a longer text or a shorter context",
                self.context,
                self.context - usize::from(self.bos.is_some())
            )));
        }
        Ok(())
    }
}

/// Scores `tokens` with every variant; the first of the result is dense bf16. `text_bytes` gives the bytes of text that a
/// token stands for. `progress` is called after every chunk of a prefill and every few scored tokens, and may end the
/// work, which gives `None`.
///
/// # Errors
/// A text shorter than a window, a stride that is no less than the context, tokens that the model lacks, memory that
/// cannot be had, [`Error::NotFinite`] where the model's output is no distribution, and what `progress` returns.
pub fn perplexity<E: From<Error>>(
    model: &Arc<Model>,
    team: &Arc<Team>,
    tokens: &[u32],
    text_bytes: impl Fn(u32) -> usize,
    options: &PerplexityOptions,
    mut progress: impl FnMut(Scored) -> Result<ControlFlow<()>, E>,
) -> Result<Option<Vec<Score>>, E> {
    let mut tell = |scored| match progress(scored) {
        Ok(ControlFlow::Continue(())) => Ok(()),
        Ok(ControlFlow::Break(())) => Err(End::Asked),
        Err(error) => Err(End::Failed(error)),
    };
    match measure(model, team, tokens, &text_bytes, options, &mut tell) {
        Ok(scores) => Ok(Some(scores)),
        Err(End::Asked) => Ok(None),
        Err(End::Failed(error)) => Err(error),
    }
}

/// Why the work ended early.
enum End<E> {
    Asked,
    Failed(E),
}

impl<E: From<Error>> From<Error> for End<E> {
    fn from(error: Error) -> Self {
        End::Failed(error.into())
    }
}

fn measure<E: From<Error>>(
    model: &Arc<Model>,
    team: &Arc<Team>,
    tokens: &[u32],
    text_bytes: &dyn Fn(u32) -> usize,
    options: &PerplexityOptions,
    tell: &mut dyn FnMut(Scored) -> Result<(), End<E>>,
) -> Result<Vec<Score>, End<E>> {
    options.check(tokens.len())?;
    let vocab = model.config.vocab;
    // The last token of a window is scored and never fed, so no session would refuse it.
    if let Some(&token) = tokens.iter().chain(&options.bos).find(|&&token| token as usize >= vocab) {
        return Err(Error::Token { token, vocab }.into());
    }
    let mut tallies = options.all_variants()?.into_iter().map(Tally::new).collect::<Vec<_>>();
    let (context, stride) = (options.context, options.stride);
    let windows = options.windows(tokens.len());
    let mut sessions: Vec<Session> = Vec::new();
    for tally in &mut tallies {
        let Variant { kv, method } = &tally.variant;
        let method = method.with_dense_steps()?;
        let same =
            |s: &Session| s.cache().dtype() == *kv && s.attention().spec().canonical() == method.canonical();
        tally.session = match sessions.iter().position(same) {
            Some(known) => known,
            None => {
                let options = SessionOptions { capacity: context, kv: *kv, method };
                let mut session = Session::new(model.clone(), team.clone(), options)?;
                // Probabilities need all logits.
                session.set_exact_top(usize::MAX);
                sessions.push(session);
                sessions.len() - 1
            }
        };
    }
    let with_divergence = options.baseline_bytes(vocab)? > 0;
    let mut baseline = Baseline { vocab, logits: Vec::new(), log_sums: Vec::new() };
    // The first scored token of a window, and the tokens that are prefilled before the one that predicts it.
    let scored = context - stride;
    let before = scored - 1;
    let total = windows * (sessions.len() * before + tallies.len() * stride);
    let mut done = 0;
    let mut advance = |tokens: usize| {
        done += tokens;
        tell(Scored { done, total })
    };
    let mut bytes = 0;
    for window in 0..windows {
        let first = window * stride;
        let text = &tokens[first..first + context - usize::from(options.bos.is_some())];
        let input: Vec<u32> = options.bos.into_iter().chain(text.iter().copied()).collect();
        bytes += input[scored..].iter().map(|&token| text_bytes(token)).sum::<usize>();
        for session in &mut sessions {
            session.rewind(0);
            for chunk in input[..before].chunks(Session::DEFAULT_CHUNK) {
                session.prefill(chunk)?;
                advance(chunk.len())?;
            }
        }
        baseline.clear();
        for (i, tally) in tallies.iter_mut().enumerate() {
            let session = &mut sessions[tally.session];
            let mut at = scored;
            let variant = tally.variant.clone();
            score(session, &variant, &input[before..context - 1], |logits| {
                let rows = logits.len() / vocab;
                for logits in logits.chunks_exact(vocab) {
                    let ours = Distribution::new(logits)?;
                    tally.nats.push(ours.nll(input[at])?);
                    match i {
                        _ if !with_divergence => {}
                        0 => baseline.keep(&ours),
                        _ => {
                            let step = compare(&baseline.row(at - scored), &ours, input[at])?;
                            tally.kl += step.kl;
                            tally.same_top += usize::from(step.same_top);
                        }
                    }
                    at += 1;
                }
                // Every few steps of one token, and every chunk.
                tally.untold += rows;
                if tally.untold >= DENSE_CHUNK || at == context {
                    advance(std::mem::take(&mut tally.untold))?;
                }
                Ok::<(), End<E>>(())
            })?;
            session.rewind(before);
        }
    }
    Ok(finish(tallies, bytes, with_divergence))
}

/// Feeds `tokens` to `session` and hands the logits that follow, of one or several tokens together, to `each`; leaves the
/// cache longer by `tokens`.
fn score<E: From<Error>>(
    session: &mut Session,
    variant: &Variant,
    tokens: &[u32],
    mut each: impl FnMut(&[f32]) -> Result<(), E>,
) -> Result<(), E> {
    if variant.method.method().name == "dense" {
        // Steps, whatever the prompt saw: those are dense.
        let pattern = session.swap_attention(session.attention_of(method("dense")?)?);
        let scored = session.each_logits(tokens, DENSE_CHUNK, each);
        session.swap_attention(pattern);
        return scored;
    }
    if variant.method.evicts() {
        // Its rows are its own; the session stays as long as it was.
        let mut own = session.fork_with(variant.method.clone())?;
        own.end_prompt()?;
        return tokens.iter().try_for_each(|&token| each(own.decode(token)?));
    }
    let attention = session.attention_of(variant.method.clone())?;
    let dense = session.swap_attention(attention);
    let scored = tokens.iter().try_for_each(|&token| each(session.decode(token)?));
    session.swap_attention(dense);
    scored
}

/// What one variant has gathered.
struct Tally {
    variant: Variant,
    /// Index of the session with its KV dtype.
    session: usize,
    nats: Vec<f64>,
    kl: f64,
    same_top: usize,
    /// Scored tokens that progress was not told of.
    untold: usize,
}

impl Tally {
    fn new(variant: Variant) -> Self {
        Tally { variant, session: 0, nats: Vec::new(), kl: 0.0, same_top: 0, untold: 0 }
    }
}

/// Logits of dense bf16 for the scored tokens of the window. They are kept as they came, so that equal logits have no
/// divergence at all.
struct Baseline {
    vocab: usize,
    logits: Vec<f32>,
    log_sums: Vec<f64>,
}

impl Baseline {
    fn clear(&mut self) {
        self.logits.clear();
        self.log_sums.clear();
    }

    fn keep(&mut self, row: &Distribution<'_>) {
        self.logits.extend_from_slice(row.logits());
        self.log_sums.push(row.log_sum());
    }

    fn row(&self, i: usize) -> Distribution<'_> {
        Distribution::kept(&self.logits[i * self.vocab..(i + 1) * self.vocab], self.log_sums[i])
    }
}

fn finish(tallies: Vec<Tally>, bytes: usize, with_divergence: bool) -> Vec<Score> {
    let base = tallies[0].nats.clone();
    let score = |(i, tally): (usize, Tally)| {
        let n = tally.nats.len() as f64;
        let (mean, error) = mean_and_error(tally.nats.iter().copied());
        let difference = (i > 0).then(|| {
            let (mean, error) = mean_and_error(tally.nats.iter().zip(&base).map(|(a, b)| a - b));
            let kl = with_divergence.then_some(tally.kl / n);
            let same_top = with_divergence.then_some(tally.same_top as f64 / n);
            Difference { mean, error, kl, same_top }
        });
        let bits = mean * n / std::f64::consts::LN_2;
        Score {
            kv: tally.variant.kv.to_string(),
            method: tally.variant.method.canonical(),
            nats: tally.nats,
            mean,
            error,
            bits_per_byte: (bytes > 0).then(|| bits / bytes as f64),
            difference,
        }
    };
    tallies.into_iter().enumerate().map(score).collect()
}

/// Mean and its standard error; the latter is 0 for a single number.
fn mean_and_error(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let squares: f64 = values.map(|v| (v - mean) * (v - mean)).sum();
    (mean, if n > 1.0 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_error_by_hand() {
        // 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14/3, error sqrt(14/12).
        let (mean, error) = mean_and_error([1.0, 2.0, 3.0, 6.0].into_iter());
        assert_eq!((mean, error), (3.0, (14.0f64 / 12.0).sqrt()));
        assert_eq!(mean_and_error([5.0].into_iter()), (5.0, 0.0));
    }

    #[test]
    fn windows_cover_the_text_without_overlap_of_what_is_scored() {
        let options = PerplexityOptions { context: 8, stride: 3, bos: Some(0), variants: Vec::new() };
        // 7 text tokens a window.
        assert_eq!([6, 7, 9, 10, 13].map(|n| options.windows(n)), [0, 1, 1, 2, 3]);
        let plain = PerplexityOptions { bos: None, ..options };
        assert_eq!([7, 8, 10, 11].map(|n| plain.windows(n)), [0, 1, 1, 2]);
        for stride in [0, 8, 9] {
            assert!(PerplexityOptions { stride, ..plain.clone() }.check(100).is_err());
        }
        assert!(plain.check(7).unwrap_err().to_string().contains("7 tokens and a window of 8 needs 8"));
    }
}
