//! Repacked weights and skipped zeros change no bit of any result.

mod common;

use std::sync::Arc;

use common::{bits, session, team, tiny, tokens};
use longbit::{Compaction, HeadFormat, Model, Packing, Session, preset};

fn ways() -> Vec<Compaction> {
    for how in Compaction::ALL {
        assert_eq!(Compaction::parse(how.as_str()).unwrap(), how);
    }
    Compaction::ALL.into()
}

/// Logits of a prompt and of some steps after it, and the bytes that the last step skipped.
fn run(mut session: Session) -> (Vec<u32>, u64) {
    let prompt = tokens(21, session.model().config.vocab as u32);
    let mut all = bits(session.prefill(&prompt).unwrap());
    for token in [1, 4, 9, 16] {
        all.extend(bits(session.decode(token).unwrap()));
    }
    (all, session.traffic().skipped_weight_bytes)
}

/// A model in which some channels are dead: rows of `gate` or of `up` without a weight.
fn with_dead_channels() -> Model {
    let mut model = tiny(HeadFormat::Bf16);
    for layer in &mut model.layers {
        let shape = layer.gate.shape;
        for (matrix, rows) in [(&mut layer.gate, 0..shape.rows / 2), (&mut layer.up, 3..9)] {
            let mut codes = vec![vec![1u8; shape.cols]; shape.rows];
            for (row, codes) in codes.iter_mut().enumerate().filter(|(row, _)| !rows.contains(row)) {
                matrix.unpack_row(row, codes);
            }
            let weight = |row: usize, col: usize| codes[row][col] as i8 - 1;
            shape.pack(0..shape.tiles(), weight, &mut matrix.data);
        }
    }
    model
}

#[test]
fn every_way_gives_the_same_bits_for_any_number_of_threads() {
    let (plain, skipped) = run(session(&Arc::new(tiny(HeadFormat::Bf16)), 1, 32, "bf16", "dense"));
    assert_eq!(skipped, 0);
    for how in ways() {
        let model = Arc::new(tiny(HeadFormat::Bf16).compact(how, &team(3)).unwrap());
        for threads in 1..=4 {
            let (logits, skipped) = run(session(&model, threads, 32, "bf16", "dense"));
            assert!(logits == plain, "{how:?}, {threads} threads");
            assert_eq!(skipped > 0, how.skip_zeros, "{how:?}, {threads} threads");
        }
    }
}

#[test]
fn dead_channels_are_left_out_and_nothing_changes() {
    let (plain, _) = run(session(&Arc::new(with_dead_channels()), 1, 32, "bf16", "dense"));
    let mut least = 0;
    for how in ways().into_iter().filter(|how| how.skip_zeros) {
        let model = Arc::new(with_dead_channels().compact(how, &team(2)).unwrap());
        for layer in &model.layers {
            let sparse = layer.sparse.as_ref().unwrap();
            let channels = model.config.intermediate;
            assert_eq!(sparse.dead, channels / 2, "the six rows of `up` are among the dead half");
            let (_, live) = sparse.gate.as_ref().expect("half of the gate need not be read");
            assert_eq!(live.len(), channels - sparse.dead);
        }
        for threads in [1, 3] {
            let (logits, skipped) = run(session(&model, threads, 32, "bf16", "dense"));
            assert!(logits == plain, "{how:?}, {threads} threads");
            assert!(skipped > least / 2);
            least = least.max(skipped);
        }
    }
}

#[test]
fn weights_are_repacked_once_and_silu_has_no_zeros() {
    let how = Compaction { packing: Packing::Trits, skip_zeros: false };
    let model = tiny(HeadFormat::Bf16).compact(how, &team(1)).unwrap();
    assert_eq!(model.compaction, how);
    let again = model.compact(how, &team(1)).err().unwrap().to_string();
    assert!(again.contains("repacked before"), "{again}");
    let mut config = preset("tiny").unwrap();
    config.activation = longbit::Activation::Silu;
    let silu = Model::synthetic(config, HeadFormat::Bf16, 1, &team(1)).unwrap();
    let refused = silu.compact(Compaction { skip_zeros: true, ..how }, &team(1)).err().unwrap().to_string();
    assert!(refused.contains("ReLU²"), "{refused}");
    assert!(Compaction::parse("2").unwrap_err().to_string().contains("2bit, 1.6bit, 2bit+skip"));
}
