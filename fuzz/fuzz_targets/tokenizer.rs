#![no_main]

mod guard;
#[path = "../../crates/core/tests/common/untrusted.rs"]
mod untrusted;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    guard::tokenizer_panics_are_caught();
    untrusted::tokenizer(data)
});
