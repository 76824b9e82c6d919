//! Longbit's own engine: reads one [`Request`] as a line of JSON, answers with [`Event`]s, one a line.
//!
//! - `capabilities`, `estimate`: what the core crate offers and what a configuration will weigh.
//! - `inputs`: the model, the filled cache, and what each decode step is given.
//! - `fill`: a generator fills the cache, while exact attention is computed on the same rows in f32; `quality`: attention
//!   outputs against exact ones; `reads`: what a method reads against exact softmax; `seeds`: the spread of methods that draw
//!   at random.
//! - `replay`: a recorded trace in place of a generator.
//! - `append`: what appending a token to the cache takes.
//! - `text`: the tokens of a real text fill the cache; `logits`: next-token distributions against those of a reference.
//! - `matrix`: a job that times the product of one matrix.
//! - [`profile`]: where the time of a step goes.
//! - `measure`: a job from the first event to the last; `timing`: one repetition.

#![forbid(unsafe_code)]

mod append;
mod capabilities;
mod estimate;
mod fill;
mod inputs;
mod logits;
mod matrix;
mod measure;
mod prefill;
pub mod profile;
mod quality;
mod reads;
mod replay;
mod seeds;
mod text;
mod timing;

use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use longbit_protocol::{Event, Probe, Request, Status};
use longbit_sys::{ReadProbe, SysError, Team};

pub use capabilities::capabilities;

/// Why a request, or one cell of it, could not be answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The core crate refused.
    #[error(transparent)]
    Core(#[from] longbit::Error),
    /// The operating system refused.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The workload cannot be made.
    #[error(transparent)]
    Workload(#[from] longbit::workload::WorkloadError),
    /// The request is not one this engine answers.
    #[error("{0}")]
    Request(String),
    /// The runner went away.
    #[error("cannot write to the runner: {0}")]
    Output(#[from] std::io::Error),
}

impl WorkerError {
    /// Whether memory ran out.
    fn status(&self) -> Status {
        let (WorkerError::Core(longbit::Error::Sys(error)) | WorkerError::Sys(error)) = self else {
            return Status::Error;
        };
        match error {
            SysError::Memory { .. } | SysError::TooLarge { .. } => Status::Oom,
            SysError::File { source, .. } if source.kind() == std::io::ErrorKind::OutOfMemory => Status::Oom,
            _ => Status::Error,
        }
    }
}

/// Where events go: one line each, flushed at once.
struct Events<W: Write>(W);

impl<W: Write> Events<W> {
    fn send(&mut self, event: &Event) -> Result<(), WorkerError> {
        let mut line = serde_json::to_vec(event).map_err(std::io::Error::from)?;
        line.push(b'\n');
        self.0.write_all(&line)?;
        Ok(self.0.flush()?)
    }
}

/// Answers the one request on `input` with events on `output`; the exit code of the process.
pub fn serve(mut input: impl BufRead, output: impl Write) -> u8 {
    let mut events = Events(output);
    let mut line = String::new();
    let outcome = input.read_line(&mut line).map_err(WorkerError::from).and_then(|_| {
        let request = serde_json::from_str(&line)
            .map_err(|e| WorkerError::Request(format!("the request is not understood: {e}")))?;
        // A panic is a defect of this engine; it becomes an event so that the runner can record it.
        catch_unwind(AssertUnwindSafe(|| answer(request, &mut events))).unwrap_or_else(|panic| {
            Err(WorkerError::Request(format!("the engine panicked: {}", panic_text(&*panic))))
        })
    });
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            let fatal = Event::Fatal { status: error.status(), error: error.to_string() };
            // If even this cannot be written the exit code still says so.
            let _ = events.send(&fatal);
            1
        }
    }
}

/// Lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The message of a panic.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let known = panic
        .downcast_ref::<&str>()
        .map(|s| s.to_string())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    known.unwrap_or_else(|| "no message".into())
}

fn answer<W: Write>(request: Request, events: &mut Events<W>) -> Result<(), WorkerError> {
    match request {
        Request::Capabilities => events.send(&Event::Capabilities(Box::new(capabilities()?))),
        Request::Estimate { entries } => {
            let estimates = entries.iter().map(estimate::estimate).collect();
            events.send(&Event::Estimates { estimates })
        }
        Request::Probe { threads, bytes } => {
            let probe = ReadProbe::new(bytes as usize)?;
            for threads in threads {
                let gb_s = probe.measure(&Team::with_threads(threads, true)?);
                events.send(&Event::Probe(Probe { threads, gb_s, round: 0 }))?;
            }
            Ok(())
        }
        Request::Measure(job) => measure::run(&job, events),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(request: &str) -> (u8, Vec<Event>) {
        let mut out = Vec::new();
        let code = serve(request.as_bytes(), &mut out);
        let text = String::from_utf8(out).unwrap();
        (code, text.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
    }

    #[test]
    fn capabilities_list_what_the_tables_hold() {
        let (code, events) = ask("{\"request\":\"capabilities\"}\n");
        let [Event::Capabilities(c)] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!(code, 0);
        assert!(c.presets.iter().any(|p| p.name == "bitnet-2b-4t" && p.parameters == 2_412_820_480));
        assert!(
            c.methods
                .iter()
                .any(|m| m.name == "window" && m.params.iter().filter(|p| !p.setting).count() == 2)
        );
        assert!(c.kv_dtypes.iter().any(|d| d.name == "bf16" && d.bits_per_value == 16.0));
        assert!(c.workloads.iter().any(|w| w.name == "gaussian"));
        assert!(!c.version.is_empty());
    }

    #[test]
    fn nonsense_is_a_fatal_event_and_exit_1() {
        for request in ["", "{}", "{\"request\":\"dance\"}", "[1,2"] {
            let (code, events) = ask(request);
            assert_eq!(code, 1);
            assert!(matches!(events.as_slice(), [Event::Fatal { .. }]), "{events:?}");
        }
    }
}
