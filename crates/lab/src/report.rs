//! Tables and figures spliced into a report.
