//! The experiment runner of Longbit: spec -> plan -> run -> analyse -> emit.
//!
//! An experiment is a TOML file ([`spec`]). It is expanded into cells with predicted time, memory and disk
//! ([`plan`]), measured by engine processes ([`engine`], [`run`]) into an append-only log, and everything a reader
//! sees is derived from that log ([`analyse`], [`record`], [`emit`]). To this crate models, methods and KV dtypes are
//! strings that an engine lists; it knows the protocol and nothing below it.

#![forbid(unsafe_code)]

pub mod analyse;
pub mod check;
pub mod cmp;
pub mod emit;
pub mod engine;
pub mod error;
pub mod estimate;
pub mod exit;
pub mod machine;
pub mod plan;
pub mod profile;
pub mod record;
pub mod report;
pub mod run;
pub mod spec;
pub mod views;

pub use error::{Complaint, LabError, Result};
pub use exit::Exit;
