//! The OS edge of Longbit: everything that has to ask the operating system, or to step outside safe Rust for memory and
//! threads, so that the inference crate above can forbid `unsafe`.
//!
//! - [`Team`] and [`Worker`]: one fork a token; inside it static shares and a barrier, never a parallel iterator.
//! - [`Shared`]: a buffer that all workers see, with conflicting claims caught instead of racing.
//! - [`Arena`] and [`Segment`]: huge-page memory that is zeroed, aligned, and refused with an error instead of an abort.
//! - [`FileMap`]: a read-only file in memory.
//! - [`ProcessFacts`], [`HostFacts`]: what a measurement row needs to know about its surroundings; an unknown is `None`.
//! - [`set_address_space_limit`], [`open_memory`]: caps and head room.
//! - [`ReadProbe`]: the machine's measured read bandwidth, the yardstick of every decode figure.
//!
//! The crate knows no model, no kernel and no number format. Where a platform offers less than Linux does, functions
//! answer with `None`, a note or [`SysError::Unsupported`]; they never invent a value.

mod affinity;
mod arena;
mod bandwidth;
mod barrier;
mod cgroup;
mod crew;
mod error;
mod facts;
mod limits;
mod map;
mod shared;
mod team;

pub use affinity::{Pinning, allowed_cpus, available_threads};
pub use arena::{Arena, HUGE_PAGE, Segment, SharedSegment};
pub use bandwidth::ReadProbe;
pub use barrier::Barrier;
pub use error::SysError;
pub use facts::{HostFacts, ProcessFacts, psi_pct, steal_pct};
pub use limits::{OpenMemory, die_with_parent, open_memory, set_address_space_limit};
pub use map::{FileMap, drop_cached_pages};
pub use shared::{ReadGuard, Shared, WriteGuard};
pub use team::{MAX_THREADS, Team, Worker, share};

/// Result of this crate's fallible functions.
pub type Result<T, E = SysError> = std::result::Result<T, E>;
