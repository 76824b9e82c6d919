//! `longbit logits`: what a checkpoint says after every token, in a file that any framework reads.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{HeadFormat, Model, Session, SessionOptions};
use longbit_lab::{Exit, LabError};
use longbit_sys::{Team, allowed_cpus};
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::Failure;
use crate::args::LogitsArgs;

/// Most likely tokens that are printed a position.
const SHOWN: usize = 5;

pub(crate) fn run(args: &LogitsArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let tokens = tokens(&args.tokens)?;
    let threads = args.threads.unwrap_or_else(|| allowed_cpus().map_or(1, |cpus| cpus.len()));
    let team = Arc::new(Team::new(threads, true).map_err(longbit::Error::from)?);
    let model = Arc::new(Model::load(&args.model, HeadFormat::parse(&args.head)?, &team)?);
    let vocab = model.config.vocab;
    let options =
        SessionOptions { capacity: tokens.len(), kv: kv_dtype(&args.kv)?, method: method("dense")? };
    let logits = Session::new(model, team, options)?.logits_of(&tokens, args.chunk)?;
    match &args.out {
        Some(path) => {
            write(path, &logits, vocab)?;
            writeln!(out, "wrote {}: logits f32 [{}, {vocab}]", path.display(), tokens.len())?;
        }
        None => show(&tokens, &logits, vocab, out)?,
    }
    Ok(Exit::Ok)
}

/// Ids from the flag itself or from the file that it names.
fn tokens(text: &str) -> Result<Vec<u32>, Failure> {
    let inline = text.chars().all(|c| c.is_ascii_digit() || c == ',' || c.is_whitespace());
    let content = match inline {
        true => text.to_string(),
        false => std::fs::read_to_string(text).map_err(|e| {
            Failure::Usage(format!(
                "--tokens: `{text}` is neither a list of ids like 1,2,3 nor a readable file: {e}"
            ))
        })?,
    };
    let words = content.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty());
    let ids: Result<Vec<u32>, _> = words.map(|w| w.parse().map_err(|_| w.to_string())).collect();
    match ids {
        Ok(ids) if ids.is_empty() => Err(Failure::Usage("--tokens: no token id is given".into())),
        Ok(ids) => Ok(ids),
        Err(word) => Err(Failure::Usage(format!("--tokens: `{word}` is not a token id"))),
    }
}

/// Writes beside the target and renames, so that a reader never sees half a file.
fn write(path: &Path, logits: &[f32], vocab: usize) -> Result<(), Failure> {
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let failed = |source| Failure::Lab(LabError::Io { action: "write", path: path.into(), source });
    let view = TensorView::new(Dtype::F32, vec![logits.len() / vocab, vocab], &bytes)
        .map_err(|e| failed(std::io::Error::other(e.to_string())))?;
    let file =
        serialize([("logits", view)], None).map_err(|e| failed(std::io::Error::other(e.to_string())))?;
    let beside = path.with_extension("partial");
    std::fs::write(&beside, file).and_then(|()| std::fs::rename(&beside, path)).map_err(|e| {
        // Leave nothing behind that looks like a result.
        let _ = std::fs::remove_file(&beside);
        failed(e)
    })
}

fn show(tokens: &[u32], logits: &[f32], vocab: usize, out: &mut dyn Write) -> Result<(), Failure> {
    writeln!(out, "{:>8}  {:>8}  likeliest next tokens (logit)", "position", "token")?;
    for (position, (token, row)) in tokens.iter().zip(logits.chunks_exact(vocab)).enumerate() {
        let mut order: Vec<usize> = (0..vocab).collect();
        let shown = SHOWN.min(vocab);
        order.select_nth_unstable_by(shown - 1, |&a, &b| row[b].total_cmp(&row[a]));
        order[..shown].sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let best: Vec<String> = order[..shown].iter().map(|&i| format!("{i} ({:.3})", row[i])).collect();
        writeln!(out, "{position:>8}  {token:>8}  {}", best.join("  "))?;
    }
    Ok(())
}
