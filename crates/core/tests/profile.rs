//! A profile counts every operation of a pass once, and changes nothing.

mod common;

use std::sync::Arc;

use common::{bits, session, tiny, tokens};
use longbit::{HeadFormat, Op, OpTotal, Profile};

fn profiled(threads: usize, method: &str) -> (Profile, Profile, u64) {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let prompt = tokens(40, model.config.vocab as u32);
    let mut plain = session(&model, threads, 64, "bf16", method);
    let mut measured = session(&model, threads, 64, "bf16", method);
    assert_eq!(measured.take_profile(), None);
    measured.start_profile();
    assert_eq!(bits(plain.prefill(&prompt).unwrap()), bits(measured.prefill(&prompt).unwrap()));
    let prefill = measured.take_profile().unwrap();
    measured.start_profile();
    let mut kv = 0;
    for token in [3, 5, 8] {
        assert_eq!(bits(plain.decode(token).unwrap()), bits(measured.decode(token).unwrap()));
        kv += measured.traffic().kv_bytes;
    }
    let decode = measured.take_profile().unwrap();
    assert_eq!(measured.take_profile(), None);
    (prefill, decode, kv)
}

#[test]
fn a_decode_step_reads_every_weight_and_every_selected_row_once() {
    let model = tiny(HeadFormat::Bf16);
    let matrices = |ops: &[Op], p: &Profile| ops.iter().map(|&op| p.total(op).bytes).sum::<u64>();
    let weights: usize = model
        .layers
        .iter()
        .flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down])
        .map(|linear| linear.shape.bytes())
        .sum();
    let head = model.head_format.bytes(model.config.vocab, model.config.hidden);
    for threads in [1, 3] {
        for method in ["dense", "window:sinks=2,window=16"] {
            let (prefill, decode, kv) = profiled(threads, method);
            let linears = [Op::Qkv, Op::Output, Op::GateUp, Op::Down];
            assert_eq!((prefill.passes, prefill.tokens), (1, 40));
            assert_eq!((decode.passes, decode.tokens, decode.threads.len()), (3, 3, threads));
            assert_eq!(matrices(&linears, &prefill), weights as u64, "prefill reads each weight once");
            assert_eq!(matrices(&linears, &decode), 3 * weights as u64);
            assert_eq!(decode.total(Op::Head).bytes, 3 * head);
            assert_eq!(decode.total(Op::Attention).bytes, kv, "as the traffic of the session says");
            let calls = (3 * threads * model.config.layers) as u64;
            for op in linears {
                // Work that is handed out on demand is a call a piece.
                assert!(decode.total(op).calls >= calls, "{}", op.as_str());
            }
        }
    }
}

#[test]
fn laps_fill_the_time_of_a_pass() {
    let (_, decode, _) = profiled(1, "dense");
    let laps: u64 = Op::ALL.map(|op| decode.total(op).nanos).iter().sum();
    assert!(laps > 0 && laps <= decode.wall_nanos, "{laps} of {} ns", decode.wall_nanos);
    assert_eq!(laps + decode.uncovered_nanos(), decode.wall_nanos);
    assert!((0.0..=1.0).contains(&decode.overhead()));
    assert!(decode.threads.iter().all(|ops| ops.len() == Op::ALL.len()));
    assert_ne!(decode.total(Op::Norm), OpTotal::default());
}
