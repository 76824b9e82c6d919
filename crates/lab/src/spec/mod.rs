//! Experiment files: TOML, checked against what an engine offers.
