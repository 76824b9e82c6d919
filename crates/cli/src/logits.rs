//! `longbit logits`: what a checkpoint says after every token, in a file that any framework reads.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{Session, SessionOptions};
use longbit_lab::{Exit, LabError};

use crate::Failure;
use crate::args::LogitsArgs;
use crate::model_args::Opened;

/// Most likely tokens that are printed a position.
const SHOWN: usize = 5;

pub(crate) fn run(args: &LogitsArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let tokens = tokens(&args.tokens)?;
    let opened = args.model.open()?;
    let bytes = opened.footprint(&args.kv, "dense", tokens.len())?;
    let what = format!("a cache of {} tokens in {}", tokens.len(), args.kv);
    Opened::check_memory(bytes.weights, bytes.cache.saturating_add(bytes.scratch), &what)?;
    let (model, team) = opened.load()?;
    let vocab = model.config.vocab;
    let options =
        SessionOptions { capacity: tokens.len(), kv: kv_dtype(&args.kv)?, method: method("dense")? };
    let mut session = Session::new(model, team, options)?;
    // No more than a chunk of logits is held: those of a long text would not fit.
    let chunk = args.chunk.min(tokens.len());
    match &args.out {
        Some(path) => {
            write(path, [tokens.len(), vocab], |file| {
                session.each_logits(&tokens, chunk, |rows| {
                    let bytes: Vec<u8> = rows.iter().flat_map(|v| v.to_le_bytes()).collect();
                    file.write_all(&bytes).map_err(|e| failed(path, e))
                })
            })?;
            writeln!(out, "wrote {}: logits f32 [{}, {vocab}]", path.display(), tokens.len())?;
        }
        None => {
            writeln!(out, "{:>8}  {:>8}  likeliest next tokens (logit)", "position", "token")?;
            let mut position = 0;
            session.each_logits(&tokens, chunk, |rows| {
                let shown = &tokens[position..position + rows.len() / vocab];
                show(position, shown, rows, vocab, out)?;
                position += shown.len();
                Ok::<(), Failure>(())
            })?;
        }
    }
    Ok(Exit::Ok)
}

fn failed(path: &Path, source: std::io::Error) -> Failure {
    Failure::Lab(LabError::Io { action: "write", path: path.into(), source })
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

/// Writes a safetensors file with the one tensor `logits`, f32 of `shape`, whose bytes `fill` writes; beside the target
/// and renamed, so that a reader never sees half a file.
fn write(
    path: &Path,
    shape: [usize; 2],
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let bytes = shape[0] * shape[1] * size_of::<f32>();
    let tensor = serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [0, bytes] });
    let mut header = serde_json::json!({ "logits": tensor }).to_string();
    // The format wants its data on a multiple of 8 bytes.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let beside = path.with_extension("partial");
    let written = File::create(&beside).map_err(|e| failed(path, e)).and_then(|file| {
        let mut file = BufWriter::new(file);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(|e| failed(path, e))?;
        file.write_all(header.as_bytes()).map_err(|e| failed(path, e))?;
        fill(&mut file)?;
        file.flush().map_err(|e| failed(path, e))?;
        std::fs::rename(&beside, path).map_err(|e| failed(path, e))
    });
    if written.is_err() {
        // Leave nothing behind that looks like a result.
        let _ = std::fs::remove_file(&beside);
    }
    written
}

fn show(
    first: usize,
    tokens: &[u32],
    logits: &[f32],
    vocab: usize,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    for (i, (token, row)) in tokens.iter().zip(logits.chunks_exact(vocab)).enumerate() {
        let position = first + i;
        let mut order: Vec<usize> = (0..vocab).collect();
        let shown = SHOWN.min(vocab);
        order.select_nth_unstable_by(shown - 1, |&a, &b| row[b].total_cmp(&row[a]));
        order[..shown].sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let best: Vec<String> = order[..shown].iter().map(|&i| format!("{i} ({:.3})", row[i])).collect();
        writeln!(out, "{position:>8}  {token:>8}  {}", best.join("  "))?;
    }
    Ok(())
}
