//! What a fork takes of memory and of addresses when its method evicts, against what is said. A binary of its own: no other test
//! may allocate meanwhile.

mod common;

use std::sync::Arc;

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::{HeadFormat, Model, Session, SessionOptions, footprint, preset};
use longbit_sys::ProcessFacts;

/// Resident bytes, and bytes of addresses; none where the system does not say.
fn taken() -> Option<[f64; 2]> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some([ProcessFacts::counters().rss_bytes? as f64, 1024.0 * kib])
}

#[test]
fn a_fork_takes_what_it_keeps_not_what_the_cache_has() {
    let config = preset("tiny").unwrap();
    let (kv, context, headroom) = (kv_dtype("bf16").unwrap(), 120_000, 16);
    let team = common::team(2);
    let model = Model::synthetic(config.clone(), HeadFormat::Bf16, 1, &team).unwrap();
    let options = SessionOptions { capacity: context + headroom, kv, method: method("dense").unwrap() };
    let mut session = Session::new(Arc::new(model), team, options).unwrap();
    for head in 0..config.layers * config.kv_heads {
        let rows: Vec<f32> =
            common::tokens(1000 * config.head_dim, 2001).iter().map(|&x| x as f32 / 1000.0 - 1.0).collect();
        for _ in 0..context / 1000 {
            let mut kv = session.cache().head_mut(head / config.kv_heads, head % config.kv_heads);
            kv.append(&rows, &rows).unwrap();
        }
    }
    session.cache_mut().set_len(context).unwrap();
    session.refresh();
    let queries: Vec<f32> = common::tokens(64 * config.group() * config.head_dim, 2001)
        .iter()
        .map(|&x| x as f32 / 1000.0 - 1.0)
        .collect();
    let dense = footprint(&config, HeadFormat::Bf16, kv, &method("dense").unwrap(), context, headroom, 2);
    assert!(dense.forked == 0 && dense.cache > 240_000_000);
    let mut first = true;
    // What weighing the prompt takes for a while, the first of them leaves in the allocator for the others.
    for how in ["h2o", "snapkv", "snapkv:ada=0.2", "h2o", "tova", "expected", "lru", "tova:budget=200000"] {
        let Some(before) = taken() else { return };
        let first = std::mem::replace(&mut first, false);
        let method = method(how).unwrap();
        let said = footprint(&config, HeadFormat::Bf16, kv, &method, context, headroom, 2);
        let mut fork = session.fork_with(method).unwrap();
        for head in 0..config.layers * config.kv_heads {
            fork.supply_prompt(head / config.kv_heads, head % config.kv_heads, &queries).unwrap();
        }
        fork.end_prompt().unwrap();
        (0..4).for_each(|token| assert!(!fork.decode(token).unwrap().is_empty()));
        let Some(after) = taken() else { return };
        let [resident, addresses] = [after[0] - before[0], after[1] - before[1]];
        let said = (said.forked + said.index) as f64;
        eprintln!(
            "{how}: {:.1} MB resident, {:.1} MB of addresses, {:.1} MB said",
            resident / 1e6,
            addresses / 1e6,
            said / 1e6
        );
        assert!(first || resident < 1.1 * said + 12e6, "{how}: {resident} bytes resident, {said} said");
        assert!(addresses < 1.2 * said + 40e6, "{how}: {addresses} bytes of addresses, {said} said");
    }
}
