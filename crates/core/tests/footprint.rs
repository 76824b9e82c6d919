//! What a session is said to weigh against what the process really takes. A binary of its own: no other test may allocate
//! meanwhile.

mod common;

use std::sync::Arc;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{HeadFormat, Model, Session, SessionOptions, footprint, preset};
use longbit_sys::ProcessFacts;

/// Resident bytes now; none where the system does not say.
fn resident() -> Option<u64> {
    ProcessFacts::counters().rss_bytes
}

#[test]
fn a_session_takes_what_its_footprint_says() {
    let config = preset("tiny").unwrap();
    let (kv, dense, context) = (kv_dtype("k=f32,v=bf16").unwrap(), method("dense").unwrap(), 30_000);
    let said = footprint(&config, HeadFormat::Bf16, kv, &dense, context, 100, 2);
    // 8 heads of 64 numbers, 4 and 2 bytes, in whole pages.
    assert_eq!(said.cache, 8 * 64 * 6 * 30_208);
    assert_eq!(said.resident(), said.weights + said.cache + said.index + said.scratch);
    let team = common::team(2);
    let Some(before) = resident() else { return };
    let model = Model::synthetic(config.clone(), HeadFormat::Bf16, 1, &team).unwrap();
    assert_eq!(model.bytes().resident, said.weights);
    let options = SessionOptions { capacity: context + 100, kv, method: dense };
    let mut session = Session::new(Arc::new(model), team, options).unwrap();
    let rows = vec![0.5f32; 1000 * config.head_dim];
    for head in 0..config.layers * config.kv_heads {
        for _ in 0..context / 1000 {
            let mut kv = session.cache().head_mut(head / config.kv_heads, head % config.kv_heads);
            kv.append(&rows, &rows).unwrap();
        }
    }
    session.cache_mut().set_len(context).unwrap();
    session.refresh();
    session.decode(1).unwrap();
    let Some(after) = resident() else { return };
    let took = after.saturating_sub(before) as f64;
    let said = said.resident() as f64;
    // Some MiB for stacks, the last huge pages and what the allocator keeps; a buffer that is forgotten is larger.
    assert!((took - said).abs() < 0.03 * said + 6e6, "took {took}, said {said}");
}
