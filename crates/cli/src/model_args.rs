//! What every verb with a model file shares: which file, what it does not say about itself, and whether it fits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use longbit::attention::method;
use longbit::formats::I2sLayout;
use longbit::kv::kv_dtype;
use longbit::text::{TextModel, TextOptions};
use longbit::{
    Activation, Checkpoint, Compaction, Footprint, HeadFormat, Model, OpenOptions, WeightFormat, footprint,
};
use longbit_lab::plan::oversubscribed;
use longbit_sys::{Team, available_threads, open_memory};

use crate::Failure;
use crate::status::say;

/// What the process takes beside its data: code, stacks, tokenizer.
const PROCESS_BYTES: u64 = 256 << 20;

/// What the file does not say about itself.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct FileArgs {
    /// Byte order of I2_S tensors, for GGUF files that do not say it.
    #[arg(long, value_name = "LAYOUT", value_parser = layout)]
    i2s: Option<I2sLayout>,
    /// Feed-forward activation, for GGUF files that do not say it: relu2 or silu.
    #[arg(long, value_name = "NAME", value_parser = activation)]
    activation: Option<Activation>,
}

impl FileArgs {
    /// What they mean for the checkpoint at `path`.
    ///
    /// A flag that has no effect there is refused. Whether the activation has one is known when the file has been read.
    pub(crate) fn options(self, path: &Path) -> Result<OpenOptions, Failure> {
        if self.i2s.is_some() && path.is_dir() {
            return Err(Failure::Usage(format!(
                "--i2s is for GGUF files, and {} is a directory of safetensors; leave it out",
                path.display()
            )));
        }
        Ok(OpenOptions { i2s: self.i2s, activation: self.activation })
    }

    /// Refuses both where nothing is left unsaid.
    pub(crate) fn refuse_for(self, what: &str) -> Result<(), Failure> {
        match self.i2s.is_some() || self.activation.is_some() {
            true => Err(Failure::Usage(format!(
                "--i2s and --activation are for model files that do not say it; {what} has no use for them"
            ))),
            false => Ok(()),
        }
    }
}

fn layout(name: &str) -> Result<I2sLayout, String> {
    I2sLayout::parse(name).ok_or_else(|| "it is x86 or arm".into())
}

fn activation(name: &str) -> Result<Activation, String> {
    Activation::parse(name).ok_or_else(|| "it is relu2 or silu".into())
}

/// Which model, and how it is loaded.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Checkpoint: a directory with config.json and safetensors, or a GGUF file (`profile` and `estimate` also take preset:NAME).
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) model: PathBuf,
    /// Threads [default: all CPUs allowed]. More than those are possible and slow.
    #[arg(long, value_name = "N", env = "LONGBIT_THREADS")]
    pub(crate) threads: Option<usize>,
    /// Number format of the head: bf16, f32, int8, q6, q4, or two-stage, which finds the likeliest tokens of the bf16 head
    /// exactly in a copy at 6 bits; two-stage-q4 does so in a copy at 4 bits, but for odds of 2^-64 a step.
    #[arg(long, value_name = "FORMAT", default_value = "bf16")]
    pub(crate) head: String,
    /// How the ternary weights lie in memory: 2bit, 1.6bit (fewer bytes, for threads that share the bandwidth), 2bit+skip or
    /// 1.6bit+skip (decode steps leave out what meets zeros of ReLU²). The results are the same.
    #[arg(long, value_name = "PACKING", default_value = "2bit")]
    pub(crate) weights: String,
    #[command(flatten)]
    pub(crate) file: FileArgs,
}

/// A model together with its text.
#[derive(Args)]
pub(crate) struct TextArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// A tokenizer.json to use instead of the checkpoint's own.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

impl TextArgs {
    pub(crate) fn text(&self, chat_template: Option<PathBuf>) -> Result<TextModel, Failure> {
        let options = TextOptions { tokenizer: self.tokenizer.clone(), chat_template };
        Ok(TextModel::open(&self.model.model, &options)?)
    }
}

/// A checkpoint that was opened and not yet loaded.
pub(crate) struct Opened {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) weights: WeightFormat,
    pub(crate) threads: usize,
}

impl ModelArgs {
    /// What the weights are to be made of.
    pub(crate) fn weights(&self) -> Result<WeightFormat, Failure> {
        let (head, compaction) = (HeadFormat::parse(&self.head)?, Compaction::parse(&self.weights)?);
        Ok(WeightFormat { head, compaction })
    }

    pub(crate) fn open(&self) -> Result<Opened, Failure> {
        let weights = self.weights()?;
        let threads = threads(self.threads);
        let options = self.file.options(&self.model)?;
        Ok(Opened { checkpoint: Checkpoint::open(&self.model, &options)?, weights, threads })
    }
}

impl Opened {
    /// Bytes of a session with room for `tokens`.
    pub(crate) fn footprint(&self, kv: &str, how: &str, tokens: usize) -> Result<Footprint, Failure> {
        let config = self.checkpoint.config();
        Ok(footprint(config, self.weights, kv_dtype(kv)?, &method(how)?, tokens, 0, self.threads))
    }

    /// Refuses what cannot fit memory: `weights` and `rest` are predicted bytes, `what` names the rest.
    pub(crate) fn check_memory(weights: u64, rest: u64, what: &str) -> Result<(), Failure> {
        let alone = weights.saturating_add(PROCESS_BYTES);
        refuse(alone, |usable| {
            format!(
                "not enough memory: the weights alone take {} and {usable} are available; a smaller head (--head int8), a \
                 smaller model or more memory is needed",
                gib(alone),
            )
        })?;
        let needed = alone.saturating_add(rest);
        refuse(needed, |usable| {
            format!(
                "not enough memory: {} are needed ({} of weights, {} for {what}) and {usable} are available; ask for fewer \
                 tokens or a smaller KV dtype",
                gib(needed),
                gib(weights),
                gib(rest),
            )
        })
    }

    /// Says so where `what`, of so many `tokens`, goes beyond the positions that the model was trained for.
    pub(crate) fn note_positions(&self, what: &str, tokens: usize) {
        let trained = self.checkpoint.config().trained_positions;
        if trained > 0 && tokens > trained {
            say(&format!(
                "note: {what} can take {tokens} tokens, and the model was trained for {trained} positions: expect worse \
                 text beyond them"
            ));
        }
    }

    pub(crate) fn load(&self) -> Result<(Arc<Model>, Arc<Team>), Failure> {
        let team = Arc::new(Team::with_threads(self.threads, true).map_err(longbit::Error::from)?);
        let WeightFormat { head, compaction } = self.weights;
        let model = self.checkpoint.load(head, &team)?.compact(compaction, &team)?;
        if model.rounded > 0 {
            say(&format!(
                "note: {} numbers of the embedding or head are wider than bf16 and were rounded; --head f32 keeps them",
                model.rounded
            ));
        }
        Ok((Arc::new(model), team))
    }
}

/// The threads that a flag asks for, or as many as can run at once. Says what more than those cost.
pub(crate) fn threads(asked: Option<usize>) -> usize {
    let available = available_threads();
    let threads = asked.unwrap_or(available);
    if let Some(cost) = oversubscribed(threads, available) {
        say(&format!("warning: {cost}; use --threads {available}"));
    }
    threads
}

/// Refuses a model of `weights` predicted bytes that cannot fit memory.
pub(crate) fn check_weights(weights: u64) -> Result<(), Failure> {
    let needed = weights.saturating_add(PROCESS_BYTES);
    refuse(needed, |usable| {
        format!(
            "not enough memory: {} are needed ({} of weights) and {usable} are available; free some, or go where there is \
             more",
            gib(needed),
            gib(weights),
        )
    })
}

/// An error with the message for the memory that is open, where that is less than `needed`.
fn refuse(needed: u64, message: impl FnOnce(String) -> String) -> Result<(), Failure> {
    match open_memory().usable() {
        Some(usable) if needed > usable => Err(longbit::Error::Invalid(message(gib(usable))).into()),
        _ => Ok(()),
    }
}

fn gib(bytes: u64) -> String {
    format!("{bytes} bytes ({:.2} GiB)", bytes as f64 / (1u64 << 30) as f64)
}
