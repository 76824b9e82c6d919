//! `longbit profile`: where the time of a decode step and of a prefill goes, operation by operation.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{Model, ModelConfig, Op, WeightFormat, footprint, preset};
use longbit_lab::profile::{Part, Profile, Row};
use longbit_lab::{Exit, emit};
use longbit_sys::Team;
use longbit_worker::WorkerError;
use longbit_worker::profile::{ProfileOptions, profile};

use crate::Failure;
use crate::args::Format;
use crate::model_args::{ModelArgs, Opened, threads};
use crate::status::Status;

/// What names a preset in place of a checkpoint.
const PRESET: &str = "preset:";
/// Seed of the weights of a preset.
const SEED: u64 = 1;

/// Arguments of `longbit profile`.
#[derive(Args)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Tokens in the cache when a step begins; they are generated.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(crate) context: usize,
    /// KV dtype of the cache.
    #[arg(long, value_name = "DTYPE", default_value = "bf16")]
    pub(crate) kv: String,
    /// Attention method of decode steps.
    #[arg(long, value_name = "METHOD", default_value = "dense")]
    pub(crate) method: String,
    /// Decode steps; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) steps: usize,
    /// Tokens of the prefill that is profiled at the same context; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) prefill: usize,
    /// Also write profile.csv, profile.json, profile.svg and profile.png into this directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

pub(crate) fn run(args: &ProfileArgs, color: bool, out: &mut dyn Write) -> Result<Exit, Failure> {
    if args.steps == 0 && args.prefill == 0 {
        return Err(Failure::Usage("--steps 0 --prefill 0: nothing is left to profile".into()));
    }
    let options = ProfileOptions {
        context: args.context,
        kv: args.kv.clone(),
        method: args.method.clone(),
        steps: args.steps,
        prefill: args.prefill,
    };
    // Names are checked before the weights are read.
    kv_dtype(&args.kv)?;
    let spelled = method(&args.method)?.canonical();
    let (model, team) = load(args, &options)?;
    let isa = model.kernels.isa().as_str();
    let mut status = Status::new(false);
    let found = profile(model, team.clone(), &options, |what, done, total| {
        status.show(what, done as usize, total as usize);
        Ok(())
    })
    .map_err(failure)?;
    status.clear();
    let parts = [("decode", 1, found.decode), ("prefill", args.prefill as u64, found.prefill)];
    let report = Profile {
        model: args.model.model.display().to_string(),
        head: args.model.head.clone(),
        kv_dtype: args.kv.clone(),
        method: spelled,
        isa: isa.to_owned(),
        threads: team.threads(),
        context_tokens: args.context,
        probe_before_gb_s: found.probe_before_gb_s,
        probe_after_gb_s: found.probe_after_gb_s,
        parts: parts
            .into_iter()
            .filter_map(|(name, tokens, measured)| measured.map(|(p, steps)| part(name, tokens, &p, steps)))
            .collect(),
    };
    match args.format.into() {
        emit::Format::Table => write!(out, "{}", report.text(color))?,
        emit::Format::Csv => write!(out, "{}", report.csv())?,
        emit::Format::Json => {
            writeln!(out, "{:#}", serde_json::to_value(&report).map_err(std::io::Error::from)?)?
        }
        emit::Format::Markdown => {
            for part in &report.parts {
                writeln!(out, "{}\n\n{}", part.title(), report.rows(part).markdown())?;
            }
        }
    }
    if let Some(dir) = &args.out {
        for file in report.write(dir)? {
            crate::status::say(&format!("wrote {}", file.display()));
        }
    }
    Ok(Exit::Ok)
}

/// The model, from a file or as a preset, and the team.
fn load(args: &ProfileArgs, options: &ProfileOptions) -> Result<(Arc<Model>, Arc<Team>), Failure> {
    let name = args.model.model.to_str().and_then(|model| model.strip_prefix(PRESET));
    let Some(name) = name else {
        let opened = args.model.open()?;
        check_memory(opened.checkpoint.config(), opened.weights, opened.threads, options)?;
        return opened.load();
    };
    args.model.file.refuse_for("a preset")?;
    let (config, weights) = (preset(name)?, args.model.weights()?);
    let threads = threads(args.model.threads);
    check_memory(&config, weights, threads, options)?;
    let team = Arc::new(Team::with_threads(threads, true).map_err(longbit::Error::from)?);
    Ok((
        Arc::new(Model::synthetic(config, weights.head, SEED, &team)?.compact(weights.compaction, &team)?),
        team,
    ))
}

fn check_memory(
    config: &ModelConfig,
    weights: WeightFormat,
    threads: usize,
    options: &ProfileOptions,
) -> Result<(), Failure> {
    let capacity = options.capacity();
    let bytes =
        footprint(config, weights, kv_dtype(&options.kv)?, &method(&options.method)?, capacity, 0, threads);
    let rest = [bytes.index, bytes.scratch, options.scratch_bytes()]
        .into_iter()
        .fold(bytes.cache, u64::saturating_add);
    Opened::check_memory(bytes.weights, rest, &format!("a cache of {capacity} tokens in {}", options.kv))
}

fn failure(error: WorkerError) -> Failure {
    match error {
        WorkerError::Core(error) => Failure::Core(error),
        WorkerError::Sys(error) => Failure::Core(error.into()),
        other => Failure::Core(longbit::Error::Invalid(other.to_string())),
    }
}

/// One kind of step as rows: times are means over threads and steps.
fn part(name: &str, tokens: u64, profile: &longbit::Profile, steps: u64) -> Part {
    let shares = profile.threads.len().max(1) as f64 * steps.max(1) as f64;
    let mut rows: Vec<Row> = Op::ALL
        .into_iter()
        .map(|op| {
            let total = profile.total(op);
            Row {
                operation: op.as_str().to_owned(),
                description: op.describe().to_owned(),
                waiting: op == Op::Wait,
                calls: total.calls as f64 / shares,
                time_ns: total.nanos as f64 / shares,
                bytes: total.bytes / steps.max(1),
            }
        })
        .collect();
    rows.push(Row {
        operation: "fork".to_owned(),
        description: "starting and ending the team, collecting logits".to_owned(),
        waiting: true,
        calls: profile.passes as f64 / steps.max(1) as f64,
        time_ns: profile.uncovered_nanos() as f64 / shares,
        bytes: 0,
    });
    let step_ns = profile.wall_nanos as f64 / steps.max(1) as f64;
    Part { name: name.to_owned(), tokens, steps, step_ns, overhead: profile.overhead(), rows }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longbit::OpTotal;

    #[test]
    fn rows_add_up_to_the_step() {
        let mut threads = vec![vec![OpTotal::default(); Op::ALL.len()]; 2];
        threads[0][Op::Down as usize] = OpTotal { nanos: 900, calls: 20, bytes: 1000 };
        threads[1][Op::Down as usize] = OpTotal { nanos: 700, calls: 20, bytes: 1000 };
        threads[1][Op::Wait as usize] = OpTotal { nanos: 200, calls: 30, bytes: 0 };
        let profile = longbit::Profile { passes: 10, tokens: 10, wall_nanos: 1000, threads };
        let part = part("decode", 1, &profile, 10);
        assert_eq!(part.step_ns, 100.0);
        let sum: f64 = part.rows.iter().map(|r| r.time_ns).sum();
        assert!((sum - part.step_ns).abs() < 1e-9, "{sum}");
        let down = part.rows.iter().find(|r| r.operation == "down").expect("a row an operation");
        assert_eq!((down.calls, down.time_ns, down.bytes), (2.0, 80.0, 200));
        assert!((part.overhead - 0.2).abs() < 1e-12);
    }
}
