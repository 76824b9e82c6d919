//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use longbit_lab::plan::{Filter, PlanOptions, Selection};
use longbit_lab::{emit, spec::units};

use crate::Failure;
use crate::capture::CaptureArgs;
use crate::generate::GenerateArgs;
use crate::perplexity::{PROTOCOL, PerplexityArgs};

/// What keeps a ternary language model fast at long context on a CPU, and what does it cost in quality?
#[derive(Parser)]
#[command(name = "longbit", version, max_term_width = 110, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// When to colour.
    #[arg(long = "color", value_enum, default_value_t = Colour::Auto, global = true, env = "LONGBIT_COLOR")]
    pub(crate) colour: Colour,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  longbit run experiments/quick.toml          measure a true-size 2B model at 2k, 8k and 32k
  longbit plan experiments/long.toml          what that would take: time, memory, disk
  longbit list                                methods, KV dtypes, presets, workloads
  longbit cmp runs/main-quick                 methods side by side, with ratios and errors
  longbit check runs/before runs/after        did anything get slower or worse? (exit code 3)

Exit codes: 0 done, 1 tool or I/O error, 2 usage or invalid file, 3 regression proven, 4 verification failed,
5 inconclusive (with --strict), 6 incomplete.
LONGBIT_ISA=scalar|neon|avx2|avx-vnni|avx512|avx512-vnni|avx512-vbmi forces an instruction set.";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Colour {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    Always,
    Never,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Measure experiments; goes on where an earlier run was stopped.
    #[command(after_help = "\
Examples:
  longbit run experiments/quick.toml
  longbit run experiments/long.toml --out results/long
  longbit run experiments/long.toml -m dense --set context=2048,8192 --reps 12 --fresh")]
    Run(RunArgs),
    /// Show what `run` would measure, with predicted time, memory and disk; measures nothing.
    #[command(after_help = "Example:\n  longbit plan experiments/long.toml --list")]
    Plan(PlanVerbArgs),
    /// Compare every method with exact attention, without timing; exit code 4 when the limits of the file are violated.
    #[command(after_help = "Example:\n  longbit verify experiments/smoke.toml")]
    Verify(VerifyArgs),
    /// Describe this machine: CPU, memory, measured read bandwidth, what may disturb a measurement.
    Machine {
        /// One JSON document instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// List methods, KV dtypes, presets and workloads with their parameters.
    List {
        /// One JSON document instead of tables.
        #[arg(long)]
        json: bool,
    },
    /// Put the methods and KV dtypes of one result side by side, with ratios and errors.
    #[command(after_help = "Example:\n  longbit cmp runs/main-quick")]
    Cmp(CmpArgs),
    /// Tell whether HEAD is slower or worse than BASE, cell by cell, with intervals; exit code 3 if so.
    #[command(after_help = "\
Example:
  longbit run experiments/quick.toml --out runs/before
  (change something)
  longbit run experiments/quick.toml --out runs/after
  longbit check runs/before runs/after")]
    Check(CheckArgs),
    /// Print results, or splice them into a page between `<!-- BEGIN longbit: … -->` markers.
    #[command(after_help = "\
Examples:
  longbit report results/long
  longbit report results/long --splice REPORT.md
  longbit report --rebuild runs/main-quick")]
    Report(ReportArgs),
    /// Write the f32 logits of every position, to hold a checkpoint against another engine.
    #[command(after_help = "\
Examples:
  longbit logits --model path/to/checkpoint --tokens 1,2,3 --out logits.safetensors
  longbit logits --model path/to/checkpoint --tokens ids.txt --chunk 16")]
    Logits(LogitsArgs),
    /// Record queries, keys and values of a prompt on a checkpoint, for cells that replay them.
    #[command(after_help = "\
Examples:
  longbit capture --model path/to/checkpoint --prompt-file book.txt --tokens 4096 --out book.safetensors
  longbit capture --model path/to/checkpoint --prompt-file book.txt --layers 0+15+last1 --steps 16 --format bf16 --out few.safetensors

The layout of the file stands in docs/TRACES.md.")]
    Capture(CaptureArgs),
    /// Write text that a checkpoint goes on with, as it comes.
    #[command(after_help = "\
Examples:
  longbit generate --model path/to/checkpoint --prompt 'The capital of France is'
  longbit generate --model path/to/checkpoint --chat --prompt 'Why is the sky blue?' --temperature 0.7 --seed 3
  longbit generate --model path/to/checkpoint --prompt-file long.txt --kv bf16 --method window:sinks=4,window=1020

Exit code 6 when Ctrl-C ended it.")]
    Generate(GenerateArgs),
    /// Score a text with several KV dtypes and attention methods, on the same tokens.
    #[command(after_help = PROTOCOL)]
    Perplexity(PerplexityArgs),
    /// Show where the time of a decode step and of a prefill goes, operation by operation, beside the read bandwidth.
    #[command(after_help = "\
Examples:
  longbit profile --model preset:bitnet-2b-4t --context 8192
  longbit profile --model path/to/checkpoint --prefill 0 --threads 1 --out profiles/one-thread

Times are means over threads and steps: the rows add up to the step. Bytes are those of weights, cached rows and head.")]
    Profile(crate::profile::ProfileArgs),
    /// Say what a model with its cache weighs, what a decode step reads, and the longest context that fits; runs nothing.
    #[command(after_help = "\
Examples:
  longbit estimate --model preset:bitnet-2b-4t
  longbit estimate --model path/to/checkpoint --context 32k,96k --kv bf16,k=bf16,v=f32 --memory 16GiB
  longbit estimate --model shape:layers=80,heads=64,kv_heads=8,head_dim=128 --context 128k --memory 80GB \\
      --bandwidth 200GB/s

tok/s at most: the read bandwidth over the bytes of a step. A shape may also give hidden, intermediate and vocab (with both of
these the weights count) and tied=0; without kv_heads every head has keys and values of its own.")]
    Estimate(crate::estimate::EstimateArgs),
    /// Write a model as GGUF or as packed safetensors.
    #[command(after_help = "\
Examples:
  longbit convert path/to/checkpoint model.gguf
  longbit convert path/to/checkpoint model.gguf --type tq2_0 --head q6_k
  longbit convert model.gguf path/to/directory
  longbit convert preset:bitnet-2b-4t synthetic.gguf --head f16")]
    Convert(crate::convert::ConvertArgs),
    /// Describe a model file: keys, tensors, what Longbit makes of it, bytes a token, hash.
    #[command(after_help = "\
Examples:
  longbit inspect path/to/checkpoint
  longbit inspect model.gguf --tensors --no-hash")]
    Inspect(crate::inspect::InspectArgs),
}

#[derive(Args)]
pub(crate) struct PlanArgs {
    /// Keep cells whose name contains TEXT (group/experiment/context=8192/threads=2/kv=bf16/method=dense).
    #[arg(short = 'f', long = "filter", value_name = "TEXT")]
    filter: Vec<String>,
    /// Leave out cells whose name contains TEXT; of several -f and -F the last that matches decides.
    #[arg(short = 'F', long = "filter-not", value_name = "TEXT")]
    filter_not: Vec<String>,
    /// Keep cells of this method.
    #[arg(short = 'm', long = "method", value_name = "METHOD")]
    methods: Vec<String>,
    /// Narrow an axis of the file, e.g. context=2048,8192.
    #[arg(long = "set", value_name = "AXIS=V1,V2")]
    set: Vec<String>,
    /// Repetitions a cell, instead of the file's.
    #[arg(long, value_name = "N", env = "LONGBIT_REPS")]
    reps: Option<u32>,
    /// Give up on a cell after this time without progress, or in all its repetitions, e.g. 90s or 30m.
    #[arg(long, value_name = "DURATION", env = "LONGBIT_TIMEOUT")]
    timeout: Option<String>,
    /// Skip cells predicted to need more memory than this, e.g. 8GiB or 90%.
    #[arg(long, value_name = "SIZE", env = "LONGBIT_MAX_RSS")]
    max_rss: Option<String>,
}

impl PlanArgs {
    pub(crate) fn options(self, filters: Vec<Filter>) -> Result<PlanOptions, Failure> {
        let usage = |flag: &str, e: String| Failure::Usage(format!("{flag}: {e}"));
        Ok(PlanOptions {
            selection: Selection { filters, methods: self.methods, set: self.set },
            reps: self.reps,
            timeout_s: self
                .timeout
                .map(|t| units::duration(&t).map_err(|e| usage("--timeout", e)))
                .transpose()?,
            max_rss: self
                .max_rss
                .map(|m| units::memory_limit(&m).map_err(|e| usage("--max-rss", e)))
                .transpose()?,
        })
    }
}

/// KV dtypes of lists: commas part them, except those between the keys and the values of one (`k=int8,v=int4`).
pub(crate) fn kv_names(lists: &[String]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for list in lists {
        let mut half = false;
        for part in list.split(',').map(str::trim) {
            let side = part.contains('=');
            match names.last_mut() {
                Some(last) if half && side => {
                    last.push(',');
                    last.push_str(part);
                    half = false;
                }
                _ => {
                    names.push(part.to_owned());
                    half = side;
                }
            }
        }
    }
    names
}

/// `-f` and `-F` of the verb in the order in which they were written.
pub(crate) fn filters(matches: &clap::ArgMatches) -> Vec<Filter> {
    let Some((_, verb)) = matches.subcommand() else { return Vec::new() };
    let mut found: Vec<(usize, Filter)> = Vec::new();
    for (id, not) in [("filter", false), ("filter_not", true)] {
        let Ok(Some(texts)) = verb.try_get_many::<String>(id) else { continue };
        let indices = verb.indices_of(id).into_iter().flatten();
        found.extend(indices.zip(texts).map(|(i, text)| (i, Filter { text: text.clone(), not })));
    }
    found.sort_by_key(|(i, _)| *i);
    found.into_iter().map(|(_, filter)| filter).collect()
}

#[derive(Args)]
pub(crate) struct RunArgs {
    /// Experiment files.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Results directory [default: runs/GROUP-NAME].
    #[arg(short, long, value_name = "DIR", env = "LONGBIT_OUT")]
    pub(crate) out: Option<PathBuf>,
    /// Start afresh instead of going on with what the directory holds.
    #[arg(long)]
    pub(crate) fresh: bool,
    #[command(flatten)]
    pub(crate) plan: PlanArgs,
    /// Stop at the first cell that fails.
    #[arg(long)]
    pub(crate) fail_fast: bool,
    /// Measure again the cells that failed in an earlier run.
    #[arg(long)]
    pub(crate) retry_failed: bool,
    /// No progress, only results and errors.
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Plain lines instead of a progress bar.
    #[arg(long)]
    pub(crate) no_progress: bool,
}

#[derive(Args)]
pub(crate) struct PlanVerbArgs {
    /// Experiment files.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) plan: PlanArgs,
    /// Only the names of the cells.
    #[arg(long)]
    pub(crate) list: bool,
    /// One JSON document instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// Experiment files.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) plan: PlanArgs,
    /// No progress, only results and errors.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// How results are printed.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    Table,
    Md,
    Csv,
    Json,
}

impl From<Format> for emit::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::Table => emit::Format::Table,
            Format::Md => emit::Format::Markdown,
            Format::Csv => emit::Format::Csv,
            Format::Json => emit::Format::Json,
        }
    }
}

#[derive(Args)]
pub(crate) struct CmpArgs {
    /// Results directory.
    pub(crate) result: PathBuf,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    /// Results directory before.
    pub(crate) base: PathBuf,
    /// Results directory after.
    pub(crate) head: PathBuf,
    /// Exit code 5 when something could not be told.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Compare results of unlike machines; the verdict is then advice and never exit code 3.
    #[arg(long)]
    pub(crate) allow_machine_mismatch: bool,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct ReportArgs {
    /// Results directories.
    #[arg(required = true)]
    pub(crate) results: Vec<PathBuf>,
    /// Rewrite the marked parts of this page.
    #[arg(long, value_name = "FILE")]
    pub(crate) splice: Option<PathBuf>,
    /// Write the derived files of the directories anew from their logs, whatever commit measured them.
    #[arg(long)]
    pub(crate) rebuild: bool,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) model: crate::model_args::ModelArgs,
    /// Token ids: 1,2,3 or a file of ids separated by commas or blanks.
    #[arg(long, value_name = "IDS|FILE")]
    pub(crate) tokens: String,
    /// Tokens that go through the model at a time; the result does not depend on it.
    #[arg(long, value_name = "N", default_value_t = longbit::Session::DEFAULT_CHUNK)]
    pub(crate) chunk: usize,
    /// Where to write the tensor `logits`, f32 [tokens, vocab], as safetensors; absent: the likeliest tokens are printed.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// KV dtype of the cache.
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub(crate) kv: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_part_kv_dtypes_but_not_their_sides() {
        let names = |lists: &[&str]| kv_names(&lists.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&["bf16"]), ["bf16"]);
        assert_eq!(names(&["bf16, f32", "int8"]), ["bf16", "f32", "int8"]);
        let mixed = "bf16,k=int8+rotate,v=q4_0,k=f32,v=bf16,int4";
        assert_eq!(names(&[mixed]), ["bf16", "k=int8+rotate,v=q4_0", "k=f32,v=bf16", "int4"]);
        // One that is not whole stays alone and is refused by its own parser; sides of two flags do not meet.
        assert_eq!(names(&["k=int8,bf16"]), ["k=int8", "bf16"]);
        assert_eq!(names(&["k=int8", "v=int4"]), ["k=int8", "v=int4"]);
        assert_eq!(names(&[""]), [""]);
    }
}
