//! Every method gives the same bits for any number of threads.

use std::collections::BTreeMap;
use std::sync::Arc;

use longbit_sys::Team;

use super::traffic_tests::session;
use super::{Session, SessionOptions};
use crate::attention::laws::CASES;
use crate::attention::tasks::COARSE_FROM;
use crate::attention::testing::noise;
use crate::attention::{MethodShape, MethodSpec, method};
use crate::kv::kv_dtype;
use crate::model::{HeadFormat, Model, preset};

/// Logits of a few steps with `spec`, after which the session is what it was.
fn logits(session: &mut Session, spec: &MethodSpec) -> Vec<u32> {
    let steps = |session: &mut Session| -> Vec<u32> {
        (0..3).flat_map(|token| session.decode(token).unwrap().to_vec()).map(f32::to_bits).collect()
    };
    if spec.evicts() {
        let mut fork = session.fork_with(spec.clone()).unwrap();
        fork.end_prompt().unwrap();
        return steps(&mut fork);
    }
    let before = session.len();
    let attention = session.attention_of(spec.clone()).unwrap();
    let other = session.swap_attention(attention);
    let logits = steps(session);
    session.rewind(before);
    session.swap_attention(other);
    logits
}

#[test]
fn threads_do_not_change_a_bit_of_any_method() {
    let team = Arc::new(Team::new(1, false).unwrap());
    let model = Arc::new(Model::synthetic(preset("tiny").unwrap(), HeadFormat::Bf16, 3, &team).unwrap());
    let mut seen = BTreeMap::new();
    for dtype in ["bf16", "planes8"] {
        // Several tasks a head, and pages that are whole and one that is not.
        for threads in [1, 2, 3] {
            let mut session = session(&model, threads, dtype, 700);
            let shape = MethodShape::of(session.cache());
            for (spec, _) in CASES {
                let parsed = method(spec).unwrap();
                if parsed.check(&shape).is_ok() {
                    let bits = logits(&mut session, &parsed);
                    let expected = seen.entry((dtype, spec)).or_insert_with(|| bits.clone());
                    assert!(bits == *expected, "{spec} of {dtype}, {threads} threads");
                }
            }
        }
    }
    for (spec, _) in CASES {
        assert!(seen.keys().any(|(_, s)| *s == spec), "no format for {spec}");
    }
}

/// So many tasks that some go to whoever comes first.
#[test]
fn tasks_on_demand_change_no_bit() {
    let team = Arc::new(Team::new(1, false).unwrap());
    let model = Arc::new(Model::synthetic(preset("tiny").unwrap(), HeadFormat::Bf16, 3, &team).unwrap());
    let dense = method("dense").unwrap();
    let mut expected = None;
    for threads in [1, 2] {
        let mut session = session(&model, threads, "int8", 4200);
        for _ in 0..3 {
            let bits = logits(&mut session, &dense);
            assert!(bits == *expected.get_or_insert_with(|| bits.clone()), "{threads} threads");
        }
    }
}

/// Where tasks become coarse, steps and a prompt give the same bits for any number of threads.
#[test]
fn coarse_tasks_change_no_bit() {
    let team = Arc::new(Team::new(1, false).unwrap());
    let model = Arc::new(Model::synthetic(preset("tiny").unwrap(), HeadFormat::Bf16, 3, &team).unwrap());
    let start = COARSE_FROM - 2;
    let mut seen = BTreeMap::new();
    for threads in [1, 2, 3] {
        let team = Arc::new(Team::oversubscribed(threads).unwrap());
        let options =
            SessionOptions { capacity: start + 64, kv: kv_dtype("int8").unwrap(), ..Default::default() };
        let mut session = Session::new(model.clone(), team, options).unwrap();
        let shape = session.cache().shape();
        for i in 0..shape.layers * shape.kv_heads {
            let rows = |seed| noise(start * shape.head_dim, 2 * i as u32 + seed);
            let mut head = session.cache_mut().head_mut(i / shape.kv_heads, i % shape.kv_heads);
            head.append(&rows(0), &rows(1)).unwrap();
        }
        session.cache_mut().set_len(start).unwrap();
        for spec in ["dense", "dense-skip:lost=0.01", "window:sinks=4,window=16381"] {
            let attention = session.attention_of(method(spec).unwrap()).unwrap();
            session.swap_attention(attention);
            let steps: Vec<Vec<f32>> = (0..4).map(|token| session.decode(token).unwrap().to_vec()).collect();
            session.rewind(start);
            if spec == "dense" {
                assert!(session.prefill(&[0, 1, 2, 3]).unwrap() == steps[3], "{threads} threads, a prompt");
                session.rewind(start);
            }
            assert!(steps == *seen.entry(spec).or_insert_with(|| steps.clone()), "{spec}, {threads} threads");
        }
    }
}
