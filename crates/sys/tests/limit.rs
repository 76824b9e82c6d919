//! The address-space limit, in a process of its own: a limit cannot be taken back for the other tests.

#![cfg(target_os = "linux")]

use longbit_sys::{Arena, SysError, open_memory, set_address_space_limit};
use std::process::Command;

const CHILD: &str = "LONGBIT_SYS_TEST_LIMIT_CHILD";

#[test]
fn beyond_the_limit_memory_is_refused_with_the_number_and_the_process_lives() {
    if std::env::var_os(CHILD).is_some() {
        let limit = 1u64 << 30;
        set_address_space_limit(limit).expect("a lower limit is always allowed");
        let error = Arena::new(2 << 30, true).expect_err("it is over the limit");
        assert!(matches!(error, SysError::Memory { bytes, .. } if bytes >= 2 << 30), "{error}");
        let mut arena = Arena::new(64 << 20, true).expect("it is below the limit");
        arena.take(64 << 20).expect("all of it").fill(1);
        return;
    }
    let own = std::env::current_exe().expect("the test binary");
    let child = Command::new(own)
        .args(["--exact", "beyond_the_limit_memory_is_refused_with_the_number_and_the_process_lives"])
        .env(CHILD, "1")
        .output()
        .expect("the child starts");
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
}

#[test]
fn this_machine_says_how_much_memory_is_open() {
    let memory = open_memory();
    assert!(memory.available_bytes.is_some_and(|bytes| bytes > 1 << 20), "{memory:?}");
    assert!(memory.usable() <= memory.available_bytes);
}
