#![no_main]

#[path = "../../crates/core/tests/common/untrusted.rs"]
mod untrusted;

libfuzzer_sys::fuzz_target!(|data: &[u8]| untrusted::index(data));
