//! The two-stage head against the bf16 head: the likeliest tokens with the same bits, whatever the rows and the input.

use std::sync::Arc;

use longbit_kernels::{Isa, Kernels};
use longbit_sys::{Segment, Team};

use super::{Session, SessionOptions};
use crate::model::build::WeightMemory;
use crate::model::{Head, HeadFormat, Model, ModelConfig, Table, TableFormat, preset};
use crate::text::{Sampler, SamplerOptions};

fn team(threads: usize) -> Arc<Team> {
    Arc::new(Team::oversubscribed(threads).unwrap())
}

fn session(model: &Arc<Model>, threads: usize) -> Session {
    let options = SessionOptions { capacity: 64, ..SessionOptions::default() };
    Session::new(model.clone(), team(threads), options).unwrap()
}

fn tokens(n: usize, vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| (crate::rng::mix(12, i) % vocab as u64) as u32).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A model of which the head is all that counts.
fn config(vocab: usize, hidden: usize, tied_head: bool) -> ModelConfig {
    ModelConfig { vocab, hidden, layers: 1, tied_head, ..preset("tiny").unwrap() }
}

/// Places and bits of the `k` largest logits; of equal ones the lowest place comes first.
fn top(logits: &[f32], k: usize) -> Vec<(usize, u32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.into_iter().take(k).map(|i| (i, logits[i].to_bits())).collect()
}

/// Decodes with both heads and compares; returns the rows that were scored exactly, over all steps with `k = 1`.
fn compare(bf16: &Arc<Model>, staged: &Arc<Model>, threads: usize) -> u64 {
    let vocab = bf16.config.vocab;
    let mut rows = 0;
    for k in [1, 5, 40, vocab, usize::MAX] {
        let (mut one, mut two) = (session(bf16, 1), session(staged, threads));
        two.set_exact_top(k);
        let check = |one: &[f32], two: &[f32]| {
            assert_eq!(top(one, k), top(two, k), "{k} of {vocab}, {threads} threads");
            if k >= vocab {
                assert!(bits(one) == bits(two));
            } else if let Some(&(_, least)) = top(one, k).last() {
                // All others are below or, where they were scored exactly, what they are.
                let least = f32::from_bits(least);
                assert!(one.iter().zip(two).all(|(a, b)| a.to_bits() == b.to_bits() || *b < least));
            }
        };
        check(one.prefill(&tokens(9, vocab)).unwrap(), two.prefill(&tokens(9, vocab)).unwrap());
        for token in tokens(6, vocab) {
            check(one.decode(token).unwrap(), two.decode(token).unwrap());
            assert_eq!(one.head_rows_rescored(), 0);
            assert!(two.head_rows_rescored() >= k.min(vocab) as u64);
            if k == 1 {
                rows += two.head_rows_rescored();
            }
        }
    }
    rows
}

/// Two models with the same weights but for the format of the head, after `change` of its bf16 rows `[vocab][hidden]`.
fn pair(config: &ModelConfig, change: impl Fn(&mut [u16])) -> [Arc<Model>; 2] {
    let [bf16, staged, _] = all(config, change);
    [bf16, staged]
}

/// A bf16 head and both two-stage heads.
fn all(config: &ModelConfig, change: impl Fn(&mut [u16])) -> [Arc<Model>; 3] {
    [HeadFormat::Bf16, HeadFormat::TwoStage, HeadFormat::TwoStageQ4].map(|format| {
        let mut model = Model::synthetic(config.clone(), HeadFormat::Bf16, 3, &team(2)).unwrap();
        let own = match &model.head {
            Head::Own(table) => {
                let mut data = Segment::new(2 * config.vocab * config.hidden).unwrap();
                data.copy_from_slice(table.bytes(0..config.vocab));
                change(data.as_mut_slice_of());
                Some(Table::new(data, config.vocab, config.hidden, TableFormat::Bf16))
            }
            _ => None,
        };
        let mut memory = WeightMemory::new(config, format).unwrap();
        model.head = memory.head(config, format, own, &model.embedding, model.kernels, &team(2)).unwrap();
        model.head_format = format;
        Arc::new(model)
    })
}

#[test]
fn the_likeliest_tokens_have_the_bits_of_the_bf16_head() {
    for (vocab, hidden, tied) in [(512, 256, true), (1003, 192, false), (6, 64, true)] {
        let [bf16, staged, four] = all(&config(vocab, hidden, tied), |_| {});
        for threads in 1..=4 {
            compare(&bf16, &staged, threads);
            compare(&bf16, &four, threads);
        }
    }
}

#[test]
fn rows_that_are_hard_to_tell_apart() {
    let config = config(600, 256, false);
    let hidden = config.hidden;
    let wide = |w: u16| f32::from_bits(u32::from(w) << 16);
    let narrow = |x: f32| (x.to_bits() >> 16) as u16;
    type Change<'a> = (&'a str, Box<dyn Fn(&mut [u16]) + 'a>);
    let changes: [Change<'_>; 6] = [
        ("all rows the same: ties", Box::new(|w| (hidden..w.len()).for_each(|i| w[i] = w[i - hidden]))),
        (
            "nearly the same rows",
            Box::new(|w| {
                (hidden..w.len()).for_each(|i| w[i] = w[i % hidden] ^ u16::from(i % 97 == i / hidden % 97))
            }),
        ),
        (
            "pairs of rows",
            Box::new(|w| w.chunks_exact_mut(2 * hidden).for_each(|p| p.copy_within(..hidden, hidden))),
        ),
        ("rows of zeros", Box::new(|w| w.iter_mut().take(300 * hidden).for_each(|w| *w = 0))),
        (
            "columns far larger than the rest",
            Box::new(|w| w.iter_mut().step_by(64).for_each(|w| *w = narrow(wide(*w) * 1e4))),
        ),
        (
            "rows of every size",
            Box::new(|w| {
                let row = |(r, row): (usize, &mut [u16])| {
                    row.iter_mut().for_each(|w| *w = narrow(wide(*w) * 2f32.powi(r as i32 % 200 - 120)));
                };
                w.chunks_exact_mut(hidden).enumerate().for_each(row);
            }),
        ),
    ];
    for (name, change) in &changes {
        let [bf16, staged, four] = all(&config, change);
        for threads in [1, 3] {
            let rows = [&staged, &four].map(|staged| compare(&bf16, staged, threads));
            println!("{name}, {threads} threads: {rows:?} rows in 6 steps");
        }
    }
}

#[test]
fn inputs_without_a_direction_or_without_an_end() {
    let config = config(500, 128, true);
    for (norm, finite) in
        [(0.0, true), (1e-38, true), (1e30, true), (f32::INFINITY, false), (f32::NAN, false)]
    {
        let formats = [HeadFormat::Bf16, HeadFormat::TwoStage, HeadFormat::TwoStageQ4];
        let [bf16, staged, four] = formats.map(|format| {
            let mut model = Model::synthetic(config.clone(), format, 3, &team(2)).unwrap();
            model.final_norm = vec![norm; config.hidden];
            Arc::new(model)
        });
        for staged in [staged, four] {
            if finite {
                compare(&bf16, &staged, 2);
                continue;
            }
            let (mut one, mut two) = (session(&bf16, 1), session(&staged, 3));
            let odd = |x: &[f32]| -> Vec<u32> {
                x.iter().map(|x| if x.is_nan() { 1 } else { x.to_bits() }).collect()
            };
            assert_eq!(odd(one.decode(1).unwrap()), odd(two.decode(1).unwrap()), "{norm}");
            assert_eq!(two.head_rows_rescored(), 500);
        }
    }
}

#[test]
fn every_instruction_set_and_any_threads_give_the_same_vector() {
    let config = config(777, 320, true);
    for format in [HeadFormat::TwoStage, HeadFormat::TwoStageQ4] {
        let mut expected: Option<(Vec<u32>, u64)> = None;
        for kernels in Isa::available().into_iter().filter_map(Kernels::for_isa) {
            let mut model = Model::synthetic(config.clone(), format, 3, &team(2)).unwrap();
            model.kernels = kernels;
            let model = Arc::new(model);
            for threads in 1..=4 {
                let mut session = session(&model, threads);
                session.set_exact_top(7);
                let got = (bits(session.decode(5).unwrap()), session.head_rows_rescored());
                assert!(*expected.get_or_insert_with(|| got.clone()) == got, "{} {threads}", kernels.isa());
            }
        }
    }
}

#[test]
fn sampling_draws_the_same_tokens_and_all_logits_are_at_hand() {
    let [bf16, staged] = pair(&config(900, 256, true), |_| {});
    let options = SamplerOptions { temperature: 0.9, top_k: 40, top_p: 0.95, min_p: 0.0, seed: 4 };
    let draw = |model: &Arc<Model>, threads: usize| -> Vec<u32> {
        let mut session: Session = session(model, threads);
        session.set_exact_top(options.top_k);
        let mut sampler = Sampler::new(options).unwrap();
        let mut drawn = vec![1];
        for i in 0..30 {
            let next = sampler.sample(session.decode(drawn[i]).unwrap()).unwrap();
            drawn.push(next);
        }
        drawn
    };
    assert_eq!(draw(&bf16, 1), draw(&staged, 2));
    let ids = tokens(20, 900);
    let all = |model: &Arc<Model>| bits(&session(model, 2).logits_of(&ids, 7).unwrap());
    assert!(all(&bf16) == all(&staged));
}
