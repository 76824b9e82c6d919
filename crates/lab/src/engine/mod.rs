//! Engines: programs that answer a job.
//!
//! The lab knows an engine by these four calls only. [`ProcessEngine`] starts a program and talks JSON lines with it,
//! so that a cell which runs out of memory, hangs or dies takes nothing else with it.

#[doc(hidden)]
pub mod mock;
mod process;

use std::time::Duration;

use longbit_protocol::{Capabilities, Estimate, EstimateRequest, Event, Job, Probe};

use crate::Result;
pub use process::{ENGINE_VERB, ProcessEngine};
pub(crate) use process::{death, out_of_memory};

/// Something that measures.
pub trait Engine {
    /// What it offers.
    ///
    /// # Errors
    /// [`crate::LabError::Engine`] when it cannot be started or answers something else.
    fn capabilities(&self) -> Result<Capabilities>;

    /// Predicts bytes, one answer for each entry, in order.
    ///
    /// # Errors
    /// As [`Engine::capabilities`].
    fn estimate(&self, entries: &[EstimateRequest]) -> Result<Vec<Estimate>>;

    /// Measures read bandwidth with each thread count.
    ///
    /// # Errors
    /// As [`Engine::capabilities`].
    fn probe(&self, threads: &[usize], bytes: u64) -> Result<Vec<Probe>>;

    /// Starts to measure a cohort.
    ///
    /// # Errors
    /// [`crate::LabError::Engine`] when it cannot be started at all.
    fn start(&self, job: &Job) -> Result<Box<dyn Running>>;
}

/// A measurement under way. Dropping it ends it.
pub trait Running {
    /// Waits for what comes next, at most `timeout`.
    fn next(&mut self, timeout: Duration) -> Next;

    /// Ends it at once.
    fn kill(&mut self);
}

/// What a running engine did.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// It said something.
    Event(Event),
    /// It wrote a line that is not an event; the reason is a sentence with the start of the line.
    Garbled(String),
    /// Nothing for the whole time.
    TimedOut,
    /// It is gone.
    Exited {
        /// Exit code, where it exited.
        code: Option<i32>,
        /// Signal, where one ended it.
        signal: Option<i32>,
        /// The end of what it wrote to standard error.
        stderr_tail: String,
    },
}
