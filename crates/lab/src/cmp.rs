//! Methods side by side inside one result.
