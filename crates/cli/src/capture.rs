//! `longbit capture`: queries, keys and values of a real prompt on a real checkpoint, in a file that cells replay.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use longbit::attention::{Attention, Layers, Recording, method};
use longbit::kv::kv_dtype;
use longbit::{Session, SessionOptions, TraceFormat, TraceRows, TraceShape, write_trace};
use longbit_lab::Exit;

use crate::Failure;
use crate::generate::read_text;
use crate::model_args::{Opened, TextArgs};
use crate::status::Status;

/// Rows are kept as the model makes them until they are written.
const KV: &str = "f32";

/// Arguments of `longbit capture`.
#[derive(Args)]
pub(crate) struct CaptureArgs {
    #[command(flatten)]
    pub(crate) model: TextArgs,
    /// The prompt: a UTF-8 file, - for standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: PathBuf,
    /// Tokens of the prompt that are taken [default: all].
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    /// Of these the last ones, whose queries are kept: the decode steps of the trace.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) steps: usize,
    /// Layers that are kept: numbers and rules joined by +, e.g. 0+7, 0-3, odd, every4, last2.
    #[arg(long, value_name = "LAYERS", default_value = "all", value_parser = layers)]
    pub(crate) layers: Layers,
    /// Number format of the file.
    #[arg(long, value_enum, default_value_t = Format::F32)]
    pub(crate) format: Format,
    /// Where to write the trace.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// As the model makes them.
    F32,
    /// Half of the bytes.
    Bf16,
}

fn layers(text: &str) -> Result<Layers, String> {
    Layers::parse(text)
}

pub(crate) fn run(args: &CaptureArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let opened = args.model.model.open()?;
    let config = opened.checkpoint.config().clone();
    args.layers.check(config.layers).map_err(|reason| Failure::Usage(format!("--layers: {reason}")))?;
    let kept: Vec<usize> = (0..config.layers).filter(|&l| args.layers.contains(l, config.layers)).collect();
    if kept.is_empty() {
        return Err(Failure::Usage("--layers: no layer is named".into()));
    }
    let text = read_text("--prompt-file", &args.prompt_file)?;
    let limit = args.tokens.unwrap_or(usize::MAX);
    let tokens = args.model.text(None)?.tokenizer.encode_up_to(&text, true, limit)?;
    if args.steps == 0 || args.steps >= tokens.len() {
        return Err(Failure::Usage(format!(
            "--steps {}: the prompt has {} tokens; at least one step, and one token before it, are needed",
            args.steps,
            tokens.len()
        )));
    }
    let shape = TraceShape {
        layers: kept.len(),
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        tokens: tokens.len(),
        steps: args.steps,
    };
    let bytes = opened.footprint(KV, "dense", tokens.len())?;
    let copies = 4
        * (shape.layers * shape.head_dim) as u64
        * (2 * shape.kv_heads * shape.tokens + shape.heads * shape.steps) as u64;
    let what = format!("a cache of {} tokens in {KV} and a copy of {} layers", tokens.len(), kept.len());
    let rest = [bytes.scratch, bytes.prefill, copies].into_iter().fold(bytes.cache, u64::saturating_add);
    Opened::check_memory(bytes.weights, rest, &what)?;
    opened.note_positions("the prompt", tokens.len());

    let (model, team) = opened.load()?;
    let options = SessionOptions { capacity: tokens.len(), kv: kv_dtype(KV)?, method: method("dense")? };
    let mut session = Session::new(model, team, options)?;
    let mut status = Status::new(false);
    let (prompt, steps) = tokens.split_at(shape.context());
    let mut done = 0;
    for chunk in prompt.chunks(Session::DEFAULT_CHUNK) {
        session.prefill(chunk)?;
        done += chunk.len();
        status.show("reading the prompt", done, tokens.len());
    }
    let (attention, recording) = Attention::recording(session.cache())?;
    session.swap_attention(attention);
    for &token in steps {
        session.decode(token)?;
        done += 1;
        status.show("recording", done, tokens.len());
    }
    status.clear();

    let rows = rows(&session, &recording, &kept, shape);
    let format = match args.format {
        Format::F32 => TraceFormat::F32,
        Format::Bf16 => TraceFormat::Bf16,
    };
    let list = |numbers: &[usize]| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let metadata = HashMap::from([
        ("format".to_string(), "longbit-trace".to_string()),
        ("version".to_string(), "1".to_string()),
        ("model".to_string(), opened.checkpoint.sha256()?),
        ("layers".to_string(), list(&kept)),
        ("rope_theta".to_string(), config.rope_theta.to_string()),
    ]);
    let bytes = write_trace(&args.out, &rows, format, metadata)?;
    writeln!(
        out,
        "wrote {}: {bytes} bytes; k and v [{}, {}, {}, {}], q [{}, {}, {}, {}]; cells replay it at contexts from {} to {}",
        args.out.display(),
        shape.layers,
        shape.kv_heads,
        shape.tokens,
        shape.head_dim,
        shape.layers,
        shape.heads,
        shape.steps,
        shape.head_dim,
        shape.context(),
        shape.tokens - 1,
    )?;
    Ok(Exit::Ok)
}

/// What the cache and the recording hold of the layers `kept`.
fn rows(session: &Session, recording: &Recording, kept: &[usize], shape: TraceShape) -> TraceRows {
    let TraceShape { kv_heads, head_dim: d, tokens, steps, .. } = shape;
    let mut rows = TraceRows { shape, keys: Vec::new(), values: Vec::new(), queries: Vec::new() };
    for &layer in kept {
        for kv_head in 0..kv_heads {
            let kv = session.cache().head(layer, kv_head);
            let append = |all: &mut Vec<f32>, values: bool| {
                let start = all.len();
                all.resize(start + tokens * d, 0.0);
                match values {
                    false => kv.decode_keys(0..tokens, &mut all[start..]),
                    true => kv.decode_values(0..tokens, &mut all[start..]),
                }
            };
            append(&mut rows.keys, false);
            append(&mut rows.values, true);
            // Steps come one after another in a recording, heads in a trace.
            let queries = recording.queries(layer * kv_heads + kv_head);
            for h in 0..shape.group() {
                for step in 0..steps {
                    let at = (step * shape.group() + h) * d;
                    rows.queries.extend_from_slice(&queries[at..at + d]);
                }
            }
        }
    }
    rows
}
