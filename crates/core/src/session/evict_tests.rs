//! Sessions whose method evicts.

use std::sync::Arc;

use longbit_sys::Team;

use super::{Session, SessionOptions};
use crate::attention::method;
use crate::kv::kv_dtype;
use crate::model::{HeadFormat, Model, preset};

const METHODS: [&str; 5] = [
    "h2o:budget=80,merge=on",
    "lru:budget=80",
    "tova:budget=80",
    "snapkv:capacity=80,window=16,ada=0.2",
    "expected:budget=80,interval=20",
];

fn team(threads: usize) -> Arc<Team> {
    Arc::new(Team::oversubscribed(threads).unwrap())
}

fn model() -> Arc<Model> {
    Arc::new(Model::synthetic(preset("tiny").unwrap(), HeadFormat::Bf16, 1, &team(1)).unwrap())
}

fn session(model: &Arc<Model>, threads: usize, spec: &str) -> Session {
    let (kv, method) = (kv_dtype("int8+plain").unwrap(), method(spec).unwrap());
    Session::new(model.clone(), team(threads), SessionOptions { capacity: 1400, kv, method }).unwrap()
}

fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + i / 7) % 512).collect()
}

fn decode(session: &mut Session, n: u32) -> Vec<f32> {
    (0..n).flat_map(|i| session.decode(i % 512).unwrap().to_vec()).collect()
}

/// The same bits with any number of threads and any chunks of the prompt, through compactions; memory really falls.
#[test]
fn threads_and_chunks_do_not_matter_and_memory_falls() {
    let model = model();
    let tokens = prompt(600);
    for spec in METHODS {
        let mut first = session(&model, 1, spec);
        first.prefill(&tokens).unwrap();
        let full = first.cache().memory();
        let logits = decode(&mut first, 270);
        let small = first.cache().memory();
        assert!(small.pages < full.pages, "{spec}: {} of {} pages", small.pages, full.pages);
        assert_eq!(first.len(), 870);
        assert!(first.known_tokens().is_empty());
        let counts: &[usize] = if spec.starts_with("tova") { &[2, 3, 4] } else { &[3] };
        for &threads in counts {
            let mut other = session(&model, threads, spec);
            for chunk in tokens.chunks(55) {
                other.prefill(chunk).unwrap();
            }
            assert!(decode(&mut other, 270) == logits, "{spec}, {threads} threads");
        }
    }
}

/// What a method with room for everything gives is what dense attention gives, up to rounding.
#[test]
fn with_room_for_all_it_is_dense() {
    let model = model();
    let mut dense = session(&model, 2, "dense");
    dense.prefill(&prompt(300)).unwrap();
    let expected = decode(&mut dense, 20);
    for spec in ["h2o:budget=1000", "lru", "tova", "snapkv", "expected"] {
        let mut other = session(&model, 2, spec);
        other.prefill(&prompt(300)).unwrap();
        let ours = decode(&mut other, 20);
        let worst = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(worst < 0.05 * largest, "{spec}: {worst} of {largest}");
    }
}

/// A fork with a method that evicts leaves its parent as it was; repeats itself after a rewind; and is what a session is
/// that had the method from the start.
#[test]
fn a_fork_evicts_for_itself() {
    let model = model();
    let mut parent = session(&model, 2, "dense");
    parent.prefill(&prompt(600)).unwrap();
    let expected = decode(&mut parent, 10);
    parent.rewind(600);
    for spec in METHODS {
        assert!(parent.attention_of(method(spec).unwrap()).is_err());
        let mut alone = session(&model, 2, spec);
        alone.prefill(&prompt(600)).unwrap();
        let wanted = decode(&mut alone, 60);
        let mut fork = parent.fork_with(method(spec).unwrap()).unwrap();
        fork.end_prompt().unwrap();
        let rows = fork.cache().head(0, 0).len();
        assert!(rows < 200, "{spec}: {rows} rows");
        if spec.starts_with("expected") {
            // It evicts at the next interval, which a rewind does not take back.
            assert!(decode(&mut fork, 60) == wanted, "{spec}");
            continue;
        }
        for _ in 0..2 {
            assert!(decode(&mut fork, 60) == wanted, "{spec}");
            fork.rewind(600);
        }
        // A fork of the fork goes on as it does.
        decode(&mut fork, 30);
        let mut second = fork.fork().unwrap();
        assert!(decode(&mut second, 20) == decode(&mut fork, 20), "{spec}");
        // Another prompt, and on.
        fork.prefill(&prompt(150)).unwrap();
        decode(&mut fork, 5);
    }
    assert!(decode(&mut parent, 10) == expected);
    assert!(!parent.cache().has_evicted());
}
