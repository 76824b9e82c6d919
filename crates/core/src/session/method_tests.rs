//! Every method gives the same bits for any number of threads.

use std::collections::BTreeMap;
use std::sync::Arc;

use longbit_sys::Team;

use super::Session;
use super::traffic_tests::session;
use crate::attention::laws::CASES;
use crate::attention::{MethodShape, MethodSpec, method};
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
