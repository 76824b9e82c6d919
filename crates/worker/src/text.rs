//! Cells that decode a real text: its tokens run through the model, the timed steps are teacher-forced on what follows,
//! and quality is that of the next-token distribution.
//!
//! The reference is dense attention over a bf16 cache, with the cell's own weights, head and tokens. Where the cells have
//! a bf16 cache it is the same session with another method; otherwise a second session is filled, read and dropped before
//! the cells' own is made.

use std::io::Read;
use std::sync::Arc;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::text::{Distribution, TextModel, TextOptions};
use longbit::{Checkpoint, Model, Session, SessionOptions};
use longbit_protocol::{Job, MAX_TEXT_BYTES, Measure, Quality, TextFile};
use longbit_sys::Team;
use sha2::{Digest, Sha256};

use crate::{WorkerError, fill, hex, logits, quality};

/// KV dtype of the reference: what released checkpoints are run with.
pub(crate) const REFERENCE_KV: &str = "bf16";

/// Whether a job's workload is a text: `text`, or `text:` with what identifies it.
pub(crate) fn is_workload(workload: &str) -> bool {
    workload.split(':').next() == Some(NAME)
}

/// Name of the workload.
pub(crate) const NAME: &str = "text";

/// The tokens of a job, and the logits that its cells are held against.
pub(crate) struct TextRun {
    /// The tokens of the text that the job needs, after the one that begins a sequence where the model's prompts have it.
    tokens: Vec<u32>,
    /// Tokens in the cache when a step is decoded.
    context: usize,
    /// Logits of the reference at each compared step; empty when no quality is asked for.
    reference: Vec<Vec<f32>>,
    /// SHA-256 over the SHA-256s of all heads' rows, once the cache is filled.
    pub(crate) sha256: String,
    /// Bytes of the file.
    pub(crate) file_bytes: u64,
}

/// Tokens that a job takes from its text: the context, the decoded ones or the largest batch, and the one that follows the
/// last compared step.
pub(crate) fn tokens_needed(context: usize, measure: &Measure, batch: usize) -> usize {
    let timed = (measure.warmup_tokens.saturating_add(measure.gen_tokens) as usize).max(batch);
    let compared = match measure.quality_steps {
        0 => 0,
        steps => steps as usize + 1,
    };
    context.saturating_add(timed.max(compared))
}

/// Tokens of the largest batch of a job.
fn largest_batch(job: &Job) -> usize {
    job.cells.iter().map(|c| c.batch).max().unwrap_or(1)
}

/// Reads the text of a job and makes its tokens with the checkpoint's tokenizer.
pub(crate) fn read(job: &Job, file: &TextFile, checkpoint: &Checkpoint) -> Result<TextRun, WorkerError> {
    let text = read_file(file)?;
    let needed = tokens_needed(job.context, &job.measure, largest_batch(job));
    let tokens = encode(checkpoint, &text, needed)?;
    if tokens.len() < needed {
        return Err(WorkerError::Request(format!(
            "{} has {} tokens, with the one that begins the sequence; a context of {} with its decoded tokens needs \
             {needed}: give a longer text, or shorten axes.context, measure.gen_tokens or measure.quality_steps",
            file.path,
            tokens.len(),
            job.context
        )));
    }
    let vocab = checkpoint.config().vocab;
    if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(longbit::Error::Token { token, vocab }.into());
    }
    Ok(TextRun {
        tokens,
        context: job.context,
        reference: Vec::new(),
        sha256: String::new(),
        file_bytes: text.len() as u64,
    })
}

/// The text, once it is known to be the one that was planned.
fn read_file(file: &TextFile) -> Result<String, WorkerError> {
    let cannot = |e: std::io::Error| WorkerError::Request(format!("cannot read {}: {e}", file.path));
    if !std::fs::metadata(&file.path).map_err(cannot)?.is_file() {
        return Err(WorkerError::Request(format!("{} is not a regular file", file.path)));
    }
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(&file.path).map_err(cannot)?;
    opened.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(WorkerError::Request(format!(
            "{} has more than {MAX_TEXT_BYTES} bytes, the most that a text may have",
            file.path
        )));
    }
    let found = hex(&Sha256::digest(&bytes));
    if found != file.sha256 {
        return Err(WorkerError::Request(format!(
            "{} has changed since the run was planned: its SHA-256 is {found}, planned was {}; restore it, or start anew \
             with --fresh",
            file.path, file.sha256
        )));
    }
    String::from_utf8(bytes)
        .map_err(|e| WorkerError::Request(format!("{} is not UTF-8 text: {}", file.path, e.utf8_error())))
}

/// The first `needed` tokens of a text, with those in front that every prompt of the model starts with; all, where there
/// are fewer.
fn encode(checkpoint: &Checkpoint, text: &str, needed: usize) -> Result<Vec<u32>, WorkerError> {
    let model = TextModel::open(checkpoint.path(), &TextOptions::default())?;
    Ok(model.tokenizer.encode_up_to(text, true, needed)?)
}

impl TextRun {
    /// Tokens that were taken from the text.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The token that decode step `step` is given.
    pub(crate) fn token(&self, step: usize) -> u32 {
        self.tokens[self.context + step]
    }

    /// An empty session with dense attention for these tokens.
    pub(crate) fn session(
        &self,
        job: &Job,
        kv: &str,
        model: &Arc<Model>,
        team: &Arc<Team>,
    ) -> Result<Session, WorkerError> {
        let timed = job.measure.warmup_tokens.saturating_add(job.measure.gen_tokens);
        let options = SessionOptions {
            capacity: job
                .context
                .saturating_add((timed.max(job.measure.quality_steps) as usize).max(largest_batch(job))),
            kv: kv_dtype(kv)?,
            method: method("dense")?,
        };
        Ok(Session::new(model.clone(), team.clone(), options)?)
    }

    /// Runs the context through the model, densely or with the pattern of the session. `progress(done, total)` is told of tokens.
    pub(crate) fn prefill(
        &self,
        session: &mut Session,
        mut progress: impl FnMut(u64, u64) -> Result<(), WorkerError>,
    ) -> Result<(), WorkerError> {
        for chunk in self.tokens[..self.context].chunks(Session::DEFAULT_CHUNK) {
            session.prefill(chunk)?;
            progress(session.len() as u64, self.context as u64)?;
        }
        Ok(())
    }

    /// Notes what the rows of the filled cache are.
    pub(crate) fn identify(&mut self, session: &Session) {
        self.sha256 = fill::rows_sha256(session);
    }

    /// Makes the logits of `session`, which must be filled, dense and bf16, the reference of `steps` steps.
    pub(crate) fn take_reference(
        &mut self,
        session: &mut Session,
        steps: usize,
        mut progress: impl FnMut(u64, u64) -> Result<(), WorkerError>,
    ) -> Result<(), WorkerError> {
        self.reference.clear();
        // Distributions need all logits; the steps that are timed do not.
        session.set_exact_top(usize::MAX);
        for step in 0..steps {
            let logits = session.decode(self.token(step))?;
            Distribution::new(logits).map_err(|e| {
                WorkerError::Request(format!(
                    "nothing can be held against the reference, dense attention over a bf16 cache, at step {step}: {e}"
                ))
            })?;
            self.reference.push(logits.to_vec());
            progress(step as u64 + 1, steps as u64)?;
        }
        session.set_exact_top(1);
        session.rewind(self.context);
        Ok(())
    }

    /// Decodes the compared steps with the session's method and compares the logits of each with the reference. The
    /// session must stand at the filled context, and stands there again afterwards.
    pub(crate) fn compare(
        &self,
        session: &mut Session,
        mut progress: impl FnMut(u64, u64) -> Result<(), WorkerError>,
    ) -> Result<Quality, WorkerError> {
        let mut steps = Vec::with_capacity(self.reference.len());
        let mut densities = Vec::new();
        session.set_exact_top(usize::MAX);
        for (step, reference) in self.reference.iter().enumerate() {
            let ours = session.decode(self.token(step))?;
            steps.push(logits::step(reference, ours, self.token(step + 1))?);
            densities.push(quality::density_read(session));
            progress(step as u64 + 1, self.reference.len() as u64)?;
        }
        session.set_exact_top(1);
        session.rewind(self.context);
        Ok(Quality { density_read: quality::mean(&densities), ..logits::summary(&steps) })
    }
}
