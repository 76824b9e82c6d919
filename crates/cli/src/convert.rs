//! `longbit convert`: a model from any layout that can be read into one that other engines read.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use longbit::convert::{GgufOptions, Vocabulary, Written, write_gguf, write_safetensors};
use longbit::formats::Encoding;
use longbit::{Checkpoint, HeadFormat, Model, preset};
use longbit_lab::Exit;
use longbit_sys::{Team, allowed_cpus};

use crate::Failure;
use crate::model_args::FileArgs;
use crate::status::Status;

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
    /// GGUF: format of the embedding and head [default: as wide as in the input].
    #[arg(long, value_name = "TYPE", value_parser = head_names())]
    head: Option<String>,
    /// Seed of the weights of a preset.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
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
    let clock = Instant::now();
    let threads = allowed_cpus().map_or(1, |cpus| cpus.len());
    let team = Team::new(threads, false).map_err(longbit::Error::from)?;
    let (model, vocabulary) = load(args, &team)?;
    let read = clock.elapsed();
    let written = match gguf {
        true => {
            let head = match &args.head {
                Some(name) => named(&GgufOptions::HEAD, name)?,
                None if model.head_format == HeadFormat::Bf16 => Encoding::Bf16,
                None => Encoding::F32,
            };
            let linear = named(&GgufOptions::LINEAR, args.linear.as_deref().unwrap_or("i2_s"))?;
            let options = GgufOptions { linear, head };
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

fn load(args: &ConvertArgs, team: &Team) -> Result<(Model, Vocabulary), Failure> {
    if let Some(name) = args.input.strip_prefix("preset:") {
        let model = Model::synthetic(preset(name)?, HeadFormat::Bf16, args.seed, team)?;
        return Ok((model, Vocabulary::none(&format!("{name}, seeded weights {}", args.seed))));
    }
    let checkpoint = Checkpoint::open(Path::new(&args.input), &args.file.options())?;
    let vocabulary = Vocabulary::of(&checkpoint)?;
    Ok((checkpoint.load(checkpoint.exact_head(), team)?, vocabulary))
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
