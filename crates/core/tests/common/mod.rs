//! What the integration tests share.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod hf;

use std::path::PathBuf;
use std::sync::Arc;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{HeadFormat, Model, Session, SessionOptions, preset};
use longbit_kernels::{Isa, Kernels};
use longbit_sys::Team;

/// A folder of committed data.
pub(crate) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A team, larger than the machine if need be.
pub(crate) fn team(threads: usize) -> Arc<Team> {
    Arc::new(Team::oversubscribed(threads).unwrap())
}

/// The tiny preset.
pub(crate) fn tiny(head: HeadFormat) -> Model {
    Model::synthetic(preset("tiny").unwrap(), head, 7, &team(2)).unwrap()
}

/// A session of up to `capacity` tokens.
pub(crate) fn session(model: &Arc<Model>, threads: usize, capacity: usize, kv: &str, how: &str) -> Session {
    let options = SessionOptions { capacity, kv: kv_dtype(kv).unwrap(), method: method(how).unwrap() };
    Session::new(model.clone(), team(threads), options).unwrap()
}

/// Pseudo-random tokens below `vocab`.
pub(crate) fn tokens(n: usize, vocab: u32) -> Vec<u32> {
    let mut state = 12_345u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % vocab
    };
    (0..n).map(|_| next()).collect()
}

/// Every kernel table of this machine.
pub(crate) fn all_kernels() -> Vec<&'static Kernels> {
    Isa::available().into_iter().filter_map(Kernels::for_isa).collect()
}

/// The bits of `x`.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// Index of the largest number.
pub(crate) fn argmax<T: PartialOrd + Copy>(x: &[T]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}
