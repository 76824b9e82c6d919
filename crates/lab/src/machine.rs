//! What this machine is, as far as it says.
