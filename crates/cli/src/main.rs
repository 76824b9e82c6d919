//! The longbit command.
fn main() {}
