//! The views that need no results: `list`, `plan`, `machine`, `verify`.
