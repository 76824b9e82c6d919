//! `longbit perplexity`: what KV dtypes and attention methods cost on a text, on the same tokens.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use clap::Args;
use longbit::text::{PerplexityOptions, Score, Scored, Variant, perplexity};
use longbit_lab::Exit;

use crate::Failure;
use crate::args::kv_names;
use crate::generate::{interrupts, read_text};
use crate::model_args::{Opened, TextArgs};
use crate::status::{Status, say};

/// The protocol, as `--help` tells it.
pub(crate) const PROTOCOL: &str = "\
Protocol:
  The text is tokenized once. Windows of --context N tokens start every --stride M text tokens; each begins with the
  beginning-of-text token if the model's prompts do. In each window the last M tokens are scored: what comes before is
  prefilled in the KV dtype, densely unless the method says otherwise (prefill=...), then tokens are decoded one by one
  with the method, each fed as the text has it. So every scored token has between N-M and N-1 tokens before it, and all
  KV dtypes and methods score the same tokens. A last window that is not full is left out. Dense bf16 is always measured, and differences are paired with it.
  Standard errors treat tokens as independent; those of text are not, so the true ones are somewhat larger.

Examples:
  longbit perplexity --model path/to/checkpoint --text book.txt
  longbit perplexity --model path/to/checkpoint --text book.txt --context 4096 --stride 512 --limit 20000 \\
      --kv bf16,f32 --method dense --method window:sinks=4,window=1020";

/// Arguments of `longbit perplexity`.
#[derive(Args)]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    pub(crate) model: TextArgs,
    /// The text; - for standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(crate) context: usize,
    /// Tokens scored in each window, and distance of the windows.
    #[arg(long, value_name = "M", default_value_t = 512)]
    pub(crate) stride: usize,
    /// KV dtypes: bf16,f32 or, with one for keys and one for values, k=f32,v=bf16.
    #[arg(long, value_name = "DTYPES", default_value = "bf16")]
    pub(crate) kv: Vec<String>,
    /// Attention method; may be given several times [default: dense].
    #[arg(long = "method", value_name = "METHOD")]
    pub(crate) methods: Vec<String>,
    /// Reads no more than this many tokens of the text.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) limit: Option<usize>,
    /// One JSON document instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &PerplexityArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let opened = args.model.model.open()?;
    let dense = ["dense".to_string()];
    let methods = if args.methods.is_empty() { &dense[..] } else { &args.methods };
    let mut variants = Vec::new();
    for kv in &kv_names(&args.kv) {
        for how in methods {
            variants.push(Variant::new(kv, how)?);
        }
    }
    let text = args.model.text(None)?;
    let limit = args.limit.unwrap_or(usize::MAX);
    let tokens = text.tokenizer.encode_up_to(&read_text("--text", &args.text)?, false, limit)?;
    let bos = text.tokenizer.bos().filter(|_| text.tokenizer.prompts_start_with_bos());
    let options = PerplexityOptions { context: args.context, stride: args.stride, bos, variants };
    options.check(tokens.len()).map_err(|e| Failure::Usage(e.to_string()))?;
    check_memory(&options, &opened)?;
    opened.note_positions("a window", args.context);
    let (model, team) = opened.load()?;

    let interrupted = interrupts();
    let mut status = Status::new(false);
    let bytes = |token| text.tokenizer.text_bytes(token);
    let scores = perplexity(&model, &team, &tokens, bytes, &options, |Scored { done, total }| {
        status.show("scoring, tokens", done, total);
        let stop = interrupted.load(Ordering::Relaxed);
        Ok::<_, Failure>(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    status.clear();
    let Some(scores) = scores else {
        say("interrupted");
        return Ok(Exit::Incomplete);
    };
    if args.json {
        writeln!(out, "{:#}", document(args, &opened, &options, tokens.len(), &scores)?)?;
    } else {
        let windows = options.windows(tokens.len());
        let (scored, stride) = (windows * args.stride, args.stride);
        writeln!(
            out,
            "{scored} of {} tokens scored: {windows} windows of {}, the last {stride} of each\n",
            tokens.len(),
            args.context
        )?;
        write!(out, "{}", table(&scores))?;
    }
    Ok(Exit::Ok)
}

/// Weights once, a cache for every KV dtype and pattern of the prefill, the largest index, since one method is at work at a time, and the logits
/// that others are compared with.
fn check_memory(options: &PerplexityOptions, opened: &Opened) -> Result<(), Failure> {
    let (mut names, mut caches) = (Vec::new(), Vec::new());
    let (mut weights, mut rest, mut index) = (0, 0u64, 0u64);
    for variant in options.all_variants()? {
        let kv = variant.kv.to_string();
        let bytes = opened.footprint(&kv, &variant.method.canonical(), options.context)?;
        weights = bytes.weights;
        index = index.max(bytes.index);
        // Prompts of another pattern have a cache of their own.
        let cache = (kv.clone(), variant.method.with_dense_steps()?.canonical());
        if !caches.contains(&cache) {
            caches.push(cache);
            rest = rest.saturating_add(bytes.cache).saturating_add(bytes.scratch);
        }
        if !names.contains(&kv) {
            names.push(kv);
        }
    }
    let baseline = options.baseline_bytes(opened.checkpoint.config().vocab)?;
    rest = rest.saturating_add(index).saturating_add(baseline as u64);
    let what = format!("caches of {} tokens in {}", options.context, names.join(", "));
    Opened::check_memory(weights, rest, &what)
}

/// Aligned columns, a line a score.
fn table(scores: &[Score]) -> String {
    let mut rows = vec![
        ["kv", "method", "nats/token", "±", "perplexity", "bits/byte", "Δ nats", "±", "KL", "same top"]
            .map(String::from),
    ];
    for score in scores {
        let number =
            |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        let signed = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:+.5}"));
        let difference = score.difference;
        rows.push([
            score.kv.clone(),
            score.method.clone(),
            number(Some(score.mean), 5),
            number(Some(score.error), 5),
            number(Some(score.perplexity()), 4),
            number(score.bits_per_byte, 4),
            signed(difference.map(|d| d.mean)),
            number(difference.map(|d| d.error), 5),
            number(difference.and_then(|d| d.kl), 6),
            difference.and_then(|d| d.same_top).map_or("-".into(), |share| format!("{:.2} %", 100.0 * share)),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(i, (cell, &width))| match i {
            // Names to the left, numbers to the right.
            0 | 1 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn document(
    args: &PerplexityArgs,
    opened: &Opened,
    options: &PerplexityOptions,
    tokens: usize,
    scores: &[Score],
) -> Result<serde_json::Value, Failure> {
    let score = |score: &Score| {
        serde_json::json!({
            "kv_dtype": score.kv,
            "method": score.method,
            "scored_tokens": score.nats.len(),
            "nats_per_token": score.mean,
            "standard_error": score.error,
            "perplexity": score.perplexity(),
            "bits_per_byte": score.bits_per_byte,
            "difference": score.difference.map(|d| serde_json::json!({
                "nats_per_token": d.mean,
                "standard_error": d.error,
                "kl_nats": d.kl,
                "same_top": d.same_top,
            })),
        })
    };
    Ok(serde_json::json!({
        "model": opened.checkpoint.path().display().to_string(),
        "text": args.text.display().to_string(),
        "head": args.model.model.head,
        "isa": longbit::isa()?,
        "threads": opened.threads,
        "kv_dtypes": kv_names(&args.kv),
        "methods": args.methods,
        "limit": args.limit,
        "bos": options.bos,
        "tokens": tokens,
        "context": options.context,
        "stride": options.stride,
        "windows": options.windows(tokens),
        "scores": scores.iter().map(score).collect::<Vec<_>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use longbit::text::Difference;

    #[test]
    fn columns_are_aligned() {
        let base = Score {
            kv: "bf16".into(),
            method: "dense".into(),
            nats: vec![2.0],
            mean: 2.0,
            error: 0.1,
            bits_per_byte: None,
            difference: None,
        };
        let difference = Difference { mean: -0.25, error: 0.5, kl: Some(0.001), same_top: Some(0.5) };
        let other = Score { method: "window:sinks=4".into(), difference: Some(difference), ..base.clone() };
        let text = table(&[base, other]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let end = |line: &str, word: &str| {
            line.split(word).next().map(|before| before.chars().count() + word.len())
        };
        assert_eq!(end(lines[0], "perplexity"), end(lines[1], "7.3891"));
        assert!(lines[2].contains("-0.25000") && lines[2].ends_with("50.00 %"), "{text}");
    }
}
