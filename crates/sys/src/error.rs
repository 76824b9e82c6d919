//! What can go wrong at the OS edge: each error says what, where, and how to mend it.

use std::io;
use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SysError {
    /// A team of no thread was asked for.
    #[error("a team needs at least 1 thread, 0 were asked for")]
    NoThreads,
    /// More threads than this process may run at once.
    #[error(
        "{asked} threads were asked for, but this process may run only {available} at once \
         (CPU affinity and cgroup quota counted); ask for at most {available}"
    )]
    TooManyThreads {
        /// Threads asked for.
        asked: usize,
        /// Threads that can run at once.
        available: usize,
    },
    /// The threads could not be started.
    #[error("cannot start {threads} threads: {reason}; lower the thread count or raise the memory limit")]
    Pool {
        /// Threads asked for, the calling one included.
        threads: usize,
        /// The reason given by the thread pool.
        reason: String,
    },
    /// Memory was refused by the operating system (or by the address-space limit).
    #[error(
        "cannot map {bytes} bytes of memory: {source}; lower the context or the model size, or raise the limit"
    )]
    Memory {
        /// Bytes asked for, alignment slack included.
        bytes: usize,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A buffer whose size in bytes does not fit the address space.
    #[error("a buffer of {len} elements of {size} bytes does not fit the address space")]
    TooLarge {
        /// Elements asked for.
        len: usize,
        /// Bytes of one element.
        size: usize,
    },
    /// Stripe bounds that do not run from 0 to the length in ascending order.
    #[error("stripe bounds {bounds:?} must ascend from 0 to {len}, the length of the buffer")]
    Bounds {
        /// The bounds given.
        bounds: Vec<usize>,
        /// Length of the buffer in elements.
        len: usize,
    },
    /// A file that could not be opened or mapped.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A path that cannot be mapped for what it is.
    #[error("cannot map {}: it is {what}; name a regular file with content", path.display())]
    NotMappable {
        /// The path.
        path: PathBuf,
        /// What it is instead of a file with content.
        what: &'static str,
    },
    /// A resource limit was refused.
    #[error("cannot limit the address space to {bytes} bytes: {source}")]
    Limit {
        /// The limit asked for.
        bytes: u64,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The platform does not offer it.
    #[error("{what} is not available on this platform")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
}
