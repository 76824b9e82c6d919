//! Everything derived from the log: CSV, Markdown, figures.
