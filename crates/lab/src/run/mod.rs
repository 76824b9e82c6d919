//! Measuring a plan: cohorts, retries, resuming, and the append-only log that is the truth.

pub mod store;
