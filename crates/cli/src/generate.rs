//! `longbit generate`: text from a checkpoint, as it comes.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::text::generate;
use longbit::text::{GenerateOptions, Generation, Message, Progress, SamplerOptions, StopReason, TextModel};
use longbit::{Session, SessionOptions};
use longbit_lab::Exit;

use crate::model_args::{Opened, TextArgs};
use crate::status::{Status, say};
use crate::{Failure, Patient};

/// Largest prompt or text that is read (bytes).
const MAX_TEXT: u64 = 64 << 20;

/// The text of a file, or of standard input for `-`.
pub(crate) fn read_text(flag: &str, path: &std::path::Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin().lock().take(MAX_TEXT + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_TEXT + 1).read_to_string(&mut text))
    };
    read.map_err(|e| Failure::Usage(format!("{flag}: cannot read {}: {e}", path.display())))?;
    if text.len() as u64 > MAX_TEXT {
        return Err(Failure::Usage(format!("{flag}: {} has more than {MAX_TEXT} bytes", path.display())));
    }
    Ok(text)
}

/// A flag that the first Ctrl-C sets; the second ends the process at once.
pub(crate) fn interrupts() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let interrupt = signal_hook::consts::SIGINT;
    // In this order: the second signal finds the flag set. Without handlers Ctrl-C does what it always does.
    let _ = signal_hook::flag::register_conditional_shutdown(interrupt, 130, flag.clone());
    let _ = signal_hook::flag::register(interrupt, flag.clone());
    flag
}

/// Arguments of `longbit generate`.
#[derive(Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: TextArgs,
    /// The prompt.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file"
    )]
    pub(crate) prompt: Option<String>,
    /// A file with the prompt; - for standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Ask in the checkpoint's chat format: the prompt is the user's message.
    #[arg(long)]
    pub(crate) chat: bool,
    /// System message before the prompt.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
    /// A Jinja chat template to use instead of the checkpoint's own. A template is a program and is trusted like the model:
    /// its steps and its output are limited, the memory that it takes is not.
    #[arg(long, value_name = "FILE", requires = "chat")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Tokens to generate, at the most.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// With a temperature: keep the N likeliest tokens, 0 for all. First of the filters, then top-p, then min-p.
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub(crate) top_k: usize,
    /// With a temperature: keep the fewest tokens that have this probability together, 1 for all.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub(crate) top_p: f64,
    /// With a temperature: keep tokens this many times as likely as the likeliest, 0 for all.
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub(crate) min_p: f64,
    /// Seed of the random choices; the same seed gives the same text on every machine.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// KV dtype of the cache.
    #[arg(long, value_name = "DTYPE", default_value = "bf16")]
    pub(crate) kv: String,
    /// Attention method of decode steps, e.g. window:sinks=4,window=1020.
    #[arg(long, value_name = "METHOD", default_value = "dense")]
    pub(crate) method: String,
    /// Prompt tokens between two looks at Ctrl-C and the clock; the result does not depend on it.
    #[arg(long, value_name = "N", default_value_t = longbit::Session::DEFAULT_CHUNK)]
    pub(crate) chunk: usize,
    /// Tokens that the cache holds [default: prompt and answer].
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<usize>,
    /// Go on past tokens that end an answer.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Write special tokens too.
    #[arg(long)]
    pub(crate) show_special: bool,
    /// One JSON document at the end instead of text as it comes.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run<W: Write>(args: &GenerateArgs, out: &mut Patient<W>) -> Result<Exit, Failure> {
    let opened = args.model.model.open()?;
    // Names are checked before the larger files are read.
    let (kv, how) = (kv_dtype(&args.kv)?, method(&args.method)?);
    let sampler = SamplerOptions {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
    };
    longbit::text::Sampler::new(sampler)?;
    let text = args.model.text(args.chat_template.clone())?;
    let prompt = prompt(args, &text)?;
    let wanted = prompt.len().saturating_add(args.max_tokens);
    let capacity = match args.context {
        Some(context) if context < prompt.len() => {
            return Err(Failure::Usage(format!(
                "--context {context}: the prompt alone has more tokens; give a larger one or a shorter prompt"
            )));
        }
        Some(context) => context,
        None => wanted,
    };
    opened.note_positions("prompt and answer", wanted.min(capacity));
    let bytes = opened.footprint(&args.kv, &args.method, capacity)?;
    let rest = bytes.cache.saturating_add(bytes.index).saturating_add(bytes.scratch);
    Opened::check_memory(bytes.weights, rest, &format!("a cache of {capacity} tokens in {}", args.kv))?;
    let (model, team) = opened.load()?;
    let mut session = Session::new(model, team, SessionOptions { capacity, kv, method: how })?;

    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampler,
        stop: if args.ignore_eos { Vec::new() } else { text.stop_tokens.clone() },
        chunk: args.chunk,
        show_special: args.show_special,
    };
    let interrupted = interrupts();
    let mut status = Status::new(false);
    let done = generate(&mut session, &text.tokenizer, &prompt, &options, |progress| {
        match progress {
            Progress::Prompt { done, total } if done == total => status.clear(),
            Progress::Prompt { done, total } => status.show("reading the prompt, tokens", done, total),
            Progress::Token { text, .. } | Progress::End { text } if !args.json => {
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
            Progress::Token { .. } | Progress::End { .. } => {}
        }
        // A reader that has left (`| head`) wants no more text.
        let stop = interrupted.load(Ordering::Relaxed) || out.gone;
        Ok::<_, Failure>(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    status.clear();
    if args.json {
        let document = document(args, &opened, &prompt, capacity, &done)?;
        writeln!(out, "{document:#}")?;
    } else if !done.text.ends_with('\n') {
        writeln!(out)?;
    }
    out.flush()?;
    let interrupted = interrupted.load(Ordering::Relaxed) && done.stop == StopReason::Interrupted;
    summarise(&text, &done, interrupted);
    Ok(if interrupted { Exit::Incomplete } else { Exit::Ok })
}

fn prompt(args: &GenerateArgs, text: &TextModel) -> Result<Vec<u32>, Failure> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(path)) => read_text("--prompt-file", path)?,
        (None, None) => return Err(Failure::Usage("--prompt or --prompt-file is needed".into())),
    };
    // One more than fits tells that it does not.
    let limit = args.context.map_or(usize::MAX, |context| context.saturating_add(1));
    let tokens = if args.chat {
        text.notes.iter().for_each(|note| say(&format!("note: {note}")));
        let system = args.system.iter().map(|system| Message::new("system", system));
        let messages: Vec<Message> = system.chain([Message::new("user", prompt)]).collect();
        text.encode_chat_up_to(&messages, limit)?
    } else {
        text.tokenizer.encode_up_to(&prompt, true, limit)?
    };
    if tokens.is_empty() {
        return Err(Failure::Usage("--prompt: the prompt has no token".into()));
    }
    Ok(tokens)
}

fn summarise(text: &TextModel, done: &Generation, interrupted: bool) {
    let rate = |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{rate:.1}"));
    let ms =
        |time: Option<Duration>| time.map_or("-".into(), |time| format!("{:.1}", time.as_secs_f64() * 1e3));
    say(&format!(
        "prompt: {} tokens, {} tok/s, first token after {} ms",
        done.prompt_tokens,
        rate(done.prefill_rate()),
        ms(done.first_token)
    ));
    say(&format!(
        "answer: {} tokens, {} tok/s, p50 {} ms, p99 {} ms",
        done.tokens.len(),
        rate(done.decode_rate()),
        ms(done.step_quantile(0.5)),
        ms(done.step_quantile(0.99))
    ));
    say(&match done.stop {
        StopReason::Token(id) => {
            let token = text.tokenizer.decode(&[id], false).unwrap_or_default();
            format!("ended: stop token {id} ({token})")
        }
        StopReason::Length => "ended: as many tokens as asked for (--max-tokens)".into(),
        StopReason::Context => "ended: the cache is full (--context)".into(),
        StopReason::Interrupted if !interrupted => "ended: nobody reads standard output any more".into(),
        StopReason::Interrupted => "ended: interrupted".into(),
    });
}

fn document(
    args: &GenerateArgs,
    opened: &Opened,
    prompt: &[u32],
    capacity: usize,
    done: &Generation,
) -> Result<serde_json::Value, Failure> {
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let stop_token = match done.stop {
        StopReason::Token(id) => Some(id),
        _ => None,
    };
    Ok(serde_json::json!({
        "model": opened.checkpoint.path().display().to_string(),
        "kv_dtype": args.kv,
        "method": method(&args.method)?.canonical(),
        "head": args.model.model.head,
        "weights": args.model.model.weights,
        "isa": longbit::isa()?,
        "threads": opened.threads,
        "chat": args.chat,
        "max_tokens": args.max_tokens,
        "context": capacity,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "prompt_ids": prompt,
        "ids": done.tokens,
        "text": done.text,
        "stop": { "reason": done.stop.name(), "token": stop_token },
        "timings": {
            "prompt_tokens": done.prompt_tokens,
            "prefill_ns": ns(done.prefill),
            "prefill_tok_s": done.prefill_rate(),
            "first_token_ns": done.first_token.map(ns),
            "decode_tok_s": done.decode_rate(),
            "p50_ns": done.step_quantile(0.5).map(ns),
            "p99_ns": done.step_quantile(0.99).map(ns),
            "step_ns": done.steps.iter().copied().map(ns).collect::<Vec<_>>(),
        },
    }))
}
