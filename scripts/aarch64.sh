#!/usr/bin/env bash
# Checks and tests the AArch64 build from another machine: lints for the target, then the tests under emulation with NEON
# forced, so that every kernel is compared with the scalar oracle bit for bit.
#
#   scripts/aarch64.sh [CRATE...]        default: the tests of longbit-kernels; e.g. scripts/aarch64.sh longbit
#
# Needs the Rust target, a linker and QEMU's user-mode emulator; says how to install what is missing. On an AArch64 machine
# it needs none of them. Emulation shows that results are right, never how fast they are. QEMU names another emulator.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=aarch64-unknown-linux-gnu
emulator=${QEMU:-qemu-aarch64}
sysroot=/usr/aarch64-linux-gnu

missing=0
need() {
    echo "aarch64: needs $1; install it with: $2" >&2
    missing=1
}
# Cargo's names for what links and runs programs of this target.
run_with() { export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$emulator -cpu $1 -L $sysroot"; }

[ -d "$(rustc --print target-libdir --target "$target")" ] || need "the Rust target" "rustup target add $target"
if [ "$(uname -m)" != aarch64 ]; then
    command -v aarch64-linux-gnu-gcc >/dev/null || need "a linker" "apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    command -v "$emulator" >/dev/null || need "an emulator" "apt install qemu-user"
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    run_with max
fi
[ "$missing" -eq 0 ] || exit 2

crates=(longbit-kernels "$@")
step() {
    printf '\n== %s\n' "$*"
    "$@"
}

step cargo clippy -p longbit-kernels -p longbit-sys --all-targets --target "$target" --locked -- -D warnings
step cargo check -p longbit-cli --target "$target" --locked
for crate in "${crates[@]}"; do
    # Forced, so that a build without NEON fails instead of testing the scalar kernels twice.
    LONGBIT_ISA=neon step cargo test -p "$crate" --target "$target" --locked
done
if [ "$(uname -m)" != aarch64 ]; then
    # A processor without int8 dot products must end up with the scalar kernels.
    run_with cortex-a72
    step cargo test -p longbit-kernels --lib --target "$target" --locked
fi
printf '\n== all passed\n'
