//! Verdicts of one result against another.
