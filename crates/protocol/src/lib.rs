//! Plain serde data between the experiment runner and an engine.
//!
//! The runner starts an engine process, writes one [`Request`] as a line of JSON on its standard input and reads
//! [`Event`]s, one a line, from its standard output. An engine times itself; the runner only records. Nothing here
//! computes: whatever knows a kernel, a method or a KV dtype lives behind this boundary, where it is a string that
//! [`Capabilities`] lists.

#![forbid(unsafe_code)]

mod capabilities;
mod event;
mod job;
mod machine;

pub use capabilities::{
    Capabilities, KvDtypeInfo, MethodInfo, ParamInfo, ParamKind, PresetInfo, WorkloadInfo,
};
pub use event::{
    Event, Fill, NOT_FINITE, Outcome, PrefillQuality, Probe, Quality, Reads, Ready, Sample, SeedSpread,
    Status, TOP_P, Traffic, is_not_finite,
};
pub use job::{
    CellJob, Estimate, EstimateRequest, Job, Limits, MAX_TEXT_BYTES, MAX_TRACE_BYTES, Measure, ModelSpec,
    Request, TextFile, TraceFile,
};
pub use machine::{Machine, Toolchain};

/// Version of the messages. An engine refuses a request of another version.
pub const PROTOCOL: u32 = 2;
