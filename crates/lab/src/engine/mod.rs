//! Engines: programs that answer a job.
