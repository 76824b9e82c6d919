//! The errors of this crate: what went wrong, where, and how to mend it.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::Exit;

/// `Result` of this crate.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// One thing that is wrong with an input, e.g. an unknown key of an experiment file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// What is wrong.
    pub what: String,
    /// Where, as `file:line (key)`; empty when it has no place.
    pub at: String,
    /// How to mend it; empty when nothing is known.
    pub help: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if !self.at.is_empty() {
            write!(f, "\n   at: {}", self.at)?;
        }
        if !self.help.is_empty() {
            write!(f, "\n help: {}", self.help)?;
        }
        Ok(())
    }
}

/// What can go wrong in the lab. `Display` leaves out the leading `error: `, which the command line writes; further
/// complaints of [`LabError::Invalid`] bring their own.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// An experiment file, a flag or a request is not valid; nothing was written. Exit code 2.
    #[error("{}", join(.0))]
    Invalid(Vec<Complaint>),
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// Verb phrase, e.g. `write`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A stored file does not hold what it should.
    #[error("{what}\n   at: {}{}", path.display(), line.map(|l| format!(":{l}")).unwrap_or_default())]
    Data {
        /// The file.
        path: PathBuf,
        /// Line, from 1, where one is known.
        line: Option<usize>,
        /// What is wrong, with the way to mend it where there is one.
        what: String,
    },
    /// The engine could not be started, answered something else than the protocol, or failed as a whole.
    #[error("engine: {what}{}", if help.is_empty() { String::new() } else { format!("\n help: {help}") })]
    Engine {
        /// What happened.
        what: String,
        /// How to mend it; empty when nothing is known.
        help: String,
    },
    /// A figure could not be drawn.
    #[error("cannot draw {}: {what}", path.display())]
    Plot {
        /// The file that was to be written.
        path: PathBuf,
        /// The cause.
        what: String,
    },
    /// Text could not be written to the terminal or pipe.
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
}

fn join(complaints: &[Complaint]) -> String {
    complaints.iter().map(Complaint::to_string).collect::<Vec<_>>().join("\nerror: ")
}

impl LabError {
    /// A single invalid input; `at` and `help` may be empty.
    pub fn invalid(what: impl Into<String>, at: impl Into<String>, help: impl Into<String>) -> Self {
        LabError::Invalid(vec![Complaint { what: what.into(), at: at.into(), help: help.into() }])
    }

    /// An operating-system error on a path.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        LabError::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    /// A stored file that does not hold what it should.
    pub fn data(path: impl AsRef<Path>, line: Option<usize>, what: impl Into<String>) -> Self {
        LabError::Data { path: path.as_ref().to_path_buf(), line, what: what.into() }
    }

    /// A failing engine; `help` may be empty.
    pub fn engine(what: impl Into<String>, help: impl Into<String>) -> Self {
        LabError::Engine { what: what.into(), help: help.into() }
    }

    /// The exit code that belongs to this error: 2 for invalid input, otherwise 1.
    pub fn exit(&self) -> Exit {
        match self {
            LabError::Invalid(_) => Exit::Usage,
            _ => Exit::Tool,
        }
    }
}
