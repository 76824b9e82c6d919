//! Words for the person at the terminal while something goes on.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// A line on standard error; nobody may be left to read it.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A line on a terminal that tells how far a long piece of work is, from its third second on.
pub(crate) struct Status {
    terminal: bool,
    started: Instant,
    last: Option<Instant>,
}

impl Status {
    /// Nothing is shown before this much time.
    const PATIENCE: Duration = Duration::from_secs(2);
    const EVERY: Duration = Duration::from_millis(200);

    pub(crate) fn new(quiet: bool) -> Self {
        Status { terminal: !quiet && std::io::stderr().is_terminal(), started: Instant::now(), last: None }
    }

    pub(crate) fn show(&mut self, what: &str, done: usize, total: usize) {
        let elapsed = self.started.elapsed();
        let due = self.last.is_none_or(|last| last.elapsed() >= Self::EVERY);
        if !self.terminal || elapsed < Self::PATIENCE || !due || done == 0 {
            return;
        }
        self.last = Some(Instant::now());
        let left = elapsed.as_secs_f64() * (total - done) as f64 / done as f64;
        let mut err = std::io::stderr();
        let _ = write!(err, "\r{what}: {done} of {total}, about {left:.0} s left\x1b[K");
        let _ = err.flush();
    }

    pub(crate) fn clear(&mut self) {
        if self.last.take().is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
