//! `longbit convert`: a model from any layout that can be read into one that other engines read.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use longbit::convert::{GgufOptions, Vocabulary, Written, write_gguf, write_safetensors};
use longbit::formats::Encoding;
use longbit::{Checkpoint, HeadFormat, Model, ModelBytes, preset};
use longbit_lab::Exit;
use longbit_sys::{Team, available_threads};

use crate::Failure;
use crate::model_args::{FileArgs, check_weights};
use crate::status::Status;

/// What an input that is no path begins with.
const PRESET: &str = "preset:";

#[derive(Args)]
pub(crate) struct ConvertArgs {
    /// Checkpoint directory, GGUF file, or `preset:NAME` for a published shape with seeded weights.
    #[arg(value_name = "IN")]
    input: String,
    /// `….gguf` for a GGUF file; any other path is a directory of packed safetensors.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// GGUF: format of the ternary matrices [default: i2_s].
    #[arg(long = "type", value_name = "TYPE", value_parser = linear_names())]
    linear: Option<String>,
    /// GGUF: format of the embedding and head [default: that of the input where it is f32, f16 or bf16, else f32, which
    /// holds every other exactly].
    #[arg(long, value_name = "TYPE", value_parser = head_names())]
    head: Option<String>,
    /// Seed of the weights of a preset [default: 1].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Replace OUT if it exists.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    file: FileArgs,
}

fn linear_names() -> clap::builder::PossibleValuesParser {
    GgufOptions::LINEAR.map(|(name, _)| name).into()
}

fn head_names() -> clap::builder::PossibleValuesParser {
    GgufOptions::HEAD.map(|(name, _)| name).into()
}

fn named(table: &[(&str, Encoding)], name: &str) -> Result<Encoding, Failure> {
    let found = table.iter().find(|(n, _)| *n == name).map(|(_, encoding)| *encoding);
    found.ok_or_else(|| Failure::Usage(format!("there is no format {name:?}")))
}

pub(crate) fn run(args: &ConvertArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let gguf = args.output.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if !gguf && (args.linear.is_some() || args.head.is_some()) {
        return Err(Failure::Usage(
            "--type and --head choose formats of a GGUF file; give OUT the ending .gguf, or leave them out"
                .into(),
        ));
    }
    if args.output.exists() && !args.force {
        return Err(Failure::Usage(format!(
            "{} exists; pass --force to replace it, or choose another place",
            args.output.display()
        )));
    }
    if args.seed.is_some() && !args.input.starts_with(PRESET) {
        return Err(Failure::Usage("--seed is for the weights of preset:NAME; leave it out".into()));
    }
    let clock = Instant::now();
    let threads = available_threads();
    let team = Team::new(threads, false).map_err(longbit::Error::from)?;
    let Loaded { model, vocabulary, head } = load(args, &team)?;
    let read = clock.elapsed();
    let written = match gguf {
        true => {
            let head = match &args.head {
                Some(name) => named(&GgufOptions::HEAD, name)?,
                None => head,
            };
            let linear = named(&GgufOptions::LINEAR, args.linear.as_deref().unwrap_or("i2_s"))?;
            let options = GgufOptions { linear, head };
            if let Some(parent) = args.output.parent() {
                std::fs::create_dir_all(parent)
                    .map_err(|source| longbit::Error::Write { path: args.output.clone(), source })?;
            }
            let mut status = Status::new(false);
            let mut progress = |done: u64, total: u64| {
                status.show("writing, MB", (done / 1_000_000) as usize, (total / 1_000_000) as usize);
            };
            let written = write_gguf(&model, &vocabulary, options, &args.output, &mut progress)?;
            status.clear();
            written
        }
        false => write_safetensors(&model, &vocabulary, &args.output)?,
    };
    report(&args.output, &model, &vocabulary, &written, out)?;
    writeln!(
        out,
        "read in {:.1} s, written in {:.1} s",
        read.as_secs_f64(),
        (clock.elapsed() - read).as_secs_f64()
    )?;
    Ok(Exit::Ok)
}

/// What is written.
struct Loaded {
    model: Model,
    vocabulary: Vocabulary,
    /// Format that holds the tables as they were.
    head: Encoding,
}

fn load(args: &ConvertArgs, team: &Team) -> Result<Loaded, Failure> {
    if let Some(name) = args.input.strip_prefix(PRESET) {
        args.file.refuse_for("a preset")?;
        let (config, seed) = (preset(name)?, args.seed.unwrap_or(1));
        check_weights(ModelBytes::of(&config, HeadFormat::Bf16).resident)?;
        let model = Model::synthetic(config, HeadFormat::Bf16, seed, team)?;
        let vocabulary = Vocabulary::none(&format!("{name}, seeded weights {seed}"));
        return Ok(Loaded { model, vocabulary, head: Encoding::Bf16 });
    }
    let path = Path::new(&args.input);
    let checkpoint = Checkpoint::open(path, &args.file.options(path)?)?;
    let exact = checkpoint.exact_head();
    check_weights(ModelBytes::of(checkpoint.config(), exact).resident)?;
    let vocabulary = Vocabulary::of(&checkpoint)?;
    let head = as_stored(checkpoint.tables());
    Ok(Loaded { model: checkpoint.load(exact, team)?, vocabulary, head })
}

/// The plain format of both tables, or the one that holds any: the scales of a quantised block are products that f16 and
/// bf16 would round.
fn as_stored((embedding, head): (Encoding, Option<Encoding>)) -> Encoding {
    match embedding {
        Encoding::F32 | Encoding::F16 | Encoding::Bf16 if head.is_none_or(|head| head == embedding) => {
            embedding
        }
        _ => Encoding::F32,
    }
}

fn report(
    path: &Path,
    model: &Model,
    vocabulary: &Vocabulary,
    written: &Written,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mb = written.bytes as f64 / 1e6;
    writeln!(out, "wrote {}: {} tensors, {mb:.1} MB", path.display(), written.tensors)?;
    if written.rounded > 0 {
        let of = model.config.vocab as u64 * model.config.hidden as u64;
        writeln!(
            out,
            "note: {} of {of} numbers of the embedding or head did not fit the format and were rounded",
            written.rounded
        )?;
    }
    if let Some(note) = vocabulary.note() {
        writeln!(out, "note: {note}")?;
    }
    Ok(())
}
