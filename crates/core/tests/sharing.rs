//! Sessions that share pages go on with the bits of sessions that do not.

mod common;

use std::sync::Arc;

use common::{bits, session, team, tiny, tokens};
use longbit::attention::{METHODS, MethodShape, method};
use longbit::kv::{KV_FORMATS, PAGE_TOKENS, kv_dtype};
use longbit::{HeadFormat, Model, PrefixCache, Session, SessionOptions};

/// Every format, and some with options.
fn dtypes() -> impl Iterator<Item = &'static str> {
    KV_FORMATS
        .iter()
        .map(|format| format.name)
        .chain(["bf16+rotate+centre", "k=kivi4+centre,v=int8+plain+rotate"])
}

/// Methods to go through with `kv`: all that can serve bf16, and with planes the one that needs them.
fn methods(kv: &str) -> Vec<&'static str> {
    let small = |name| match name {
        "window" => "window:sinks=4,window=64",
        "magicpig" => "magicpig:tables=8",
        other => other,
    };
    let shape = MethodShape { layers: 4, kv_heads: 2, head_dim: 64, group: 1, dtype: kv_dtype(kv).unwrap() };
    let serves = |name: &&str| method(name).unwrap().check(&shape).is_ok();
    match kv {
        "bf16" => METHODS.iter().map(|method| small(method.name)).filter(serves).collect(),
        "planes8" => vec!["dense", "bitplane:sinks=4,local=16"],
        _ => vec!["dense"],
    }
}

fn decode(session: &mut Session, tokens: &[u32]) -> Vec<Vec<u32>> {
    tokens.iter().map(|&token| bits(session.decode(token).unwrap())).collect()
}

/// Logits of the tokens after a prefilled prompt.
fn alone(model: &Arc<Model>, kv: &str, how: &str, prompt: &[u32], then: &[u32]) -> Vec<Vec<u32>> {
    let mut session = session(model, 2, 700, kv, how);
    if !prompt.is_empty() {
        session.prefill(prompt).unwrap();
    }
    decode(&mut session, then)
}

#[test]
fn a_fork_decodes_as_if_it_were_alone() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let prompt = tokens(300, 512);
    let (left, right) = (&prompt[100..108], &prompt[200..208]);
    for kv in dtypes() {
        for how in methods(kv) {
            let places: &[usize] = if kv == "bf16" { &[0, 256, 300] } else { &[300] };
            for &at in places {
                let label = format!("{kv}, {how}, at {at}");
                let mut first = session(&model, 2, 700, kv, how);
                if at > 0 {
                    first.prefill(&prompt[..at]).unwrap();
                }
                let mut second = first.fork().unwrap();
                assert_eq!((second.len(), second.known_tokens()), (at, &prompt[..at]), "{label}");
                let (mut got_left, mut got_right) = (Vec::new(), Vec::new());
                for (a, b) in left.chunks(4).zip(right.chunks(4)) {
                    got_left.extend(decode(&mut first, a));
                    got_right.extend(decode(&mut second, b));
                }
                drop(first);
                let mut third = second.fork().unwrap();
                drop(second);
                got_right.extend(decode(&mut third, left));
                assert!(got_left == alone(&model, kv, how, &prompt[..at], left), "{label}, left");
                let longer = [right, left].concat();
                assert!(got_right == alone(&model, kv, how, &prompt[..at], &longer), "{label}, right");
            }
        }
    }
}

#[test]
fn a_known_prefix_changes_no_bit() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let prompt = tokens(650, 512);
    let question = [&prompt[..540], &prompt[10..40]].concat();
    let then = &prompt[300..304];
    for kv in dtypes() {
        let kv_dtype = kv_dtype(kv).unwrap();
        let mut prefixes = PrefixCache::new(model.clone(), kv_dtype, u64::MAX).unwrap();
        let options =
            |how: &str| SessionOptions { capacity: 700, kv: kv_dtype, method: method(how).unwrap() };
        let mut donor = prefixes.session(team(1), options("dense"), &prompt).unwrap();
        assert!(donor.is_empty());
        donor.prefill(&prompt[..600]).unwrap();
        decode(&mut donor, &prompt[600..]);
        assert_eq!(donor.known_tokens(), prompt);
        assert_eq!(prefixes.insert(&donor).unwrap(), 512);
        drop(donor);
        // A method that evicts judges by queries of the whole prompt, and those of a known prefix were not kept.
        for how in methods(kv).into_iter().filter(|how| !method(how).unwrap().evicts()) {
            let mut session = prefixes.session(team(2), options(how), &question).unwrap();
            assert_eq!((session.len(), session.known_tokens()), (512, &question[..512]), "{kv}");
            let rest = &question[session.len()..];
            let mut plain = common::session(&model, 2, 700, kv, how);
            let expected = bits(plain.prefill(&question).unwrap());
            assert!(bits(session.prefill(rest).unwrap()) == expected, "{kv}, {how}");
            assert!(decode(&mut session, then) == decode(&mut plain, then), "{kv}, {how}");
        }
        // All but the last token, whose logits are wanted; where the newest tokens are exact, only the end of the donor will
        // do.
        let unsettled = [kv_dtype.keys, kv_dtype.values].iter().any(|side| side.codec().settled(256) < 256);
        let reused = if unsettled { 0 } else { 256 };
        let mut session = prefixes.session(team(2), options("dense"), &prompt[..512]).unwrap();
        assert_eq!((session.len(), prefixes.longest(&prompt[..512])), (reused, reused), "{kv}");
        let got = bits(session.prefill(&prompt[reused..512]).unwrap());
        assert!(got == bits(common::session(&model, 1, 700, kv, "dense").prefill(&prompt[..512]).unwrap()));
    }
}

#[test]
fn only_rows_of_exact_attention_are_kept() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let prompt = tokens(600, 512);
    let mut prefixes = PrefixCache::new(model.clone(), kv_dtype("bf16").unwrap(), u64::MAX).unwrap();
    let mut windowed = session(&model, 2, 700, "bf16", "window:sinks=4,window=64");
    windowed.prefill(&prompt[..500]).unwrap();
    decode(&mut windowed, &prompt[500..]);
    assert_eq!(windowed.known_tokens(), &prompt[..500]);
    assert_eq!(prefixes.insert(&windowed).unwrap(), 256);
    windowed.rewind(300);
    windowed.prefill(&prompt[300..]).unwrap();
    assert_eq!(windowed.known_tokens(), prompt);
    assert_eq!(prefixes.insert(&windowed).unwrap(), 512);
    // Rows from outside are no one's prefix.
    windowed.cache_mut();
    assert!(windowed.known_tokens().is_empty());
    assert_eq!(prefixes.insert(&windowed).unwrap(), 0);
}

#[test]
fn sessions_and_prefixes_that_do_not_fit_are_refused() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let other = Arc::new(tiny(HeadFormat::Bf16));
    let bf16 = kv_dtype("bf16").unwrap();
    let mut prefixes = PrefixCache::new(model.clone(), bf16, 1 << 20).unwrap();
    let says = |error: longbit::Error, what: &str| assert!(error.to_string().contains(what), "{error}");
    says(prefixes.insert(&session(&other, 1, 64, "bf16", "dense")).unwrap_err(), "another model");
    says(prefixes.insert(&session(&model, 1, 64, "f32", "dense")).unwrap_err(), "in f32 does not fit");
    let options = SessionOptions { capacity: 64, ..Default::default() };
    let f32 = SessionOptions { kv: kv_dtype("f32").unwrap(), ..options.clone() };
    says(prefixes.session(team(1), f32, &[1]).err().unwrap(), "a session of f32 cannot begin");
    says(prefixes.session(team(1), options.clone(), &[1; 65]).err().unwrap(), "holds 64 tokens and 65");
    let none = SessionOptions { capacity: 0, ..options };
    says(prefixes.session(team(1), none, &[]).err().unwrap(), "at least one token");
}

/// A budget holds what was used last, and what is evicted is computed again.
#[test]
fn a_budget_is_kept() {
    let model = Arc::new(tiny(HeadFormat::Bf16));
    let bf16 = kv_dtype("bf16").unwrap();
    let page =
        (model.config.layers * model.config.kv_heads * 2 * PAGE_TOKENS * 2 * model.config.head_dim) as u64;
    let mut prefixes = PrefixCache::new(model.clone(), bf16, 3 * page).unwrap();
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| tokens(520 + i, 512).into_iter().rev().collect()).collect();
    let options = SessionOptions { capacity: 600, ..Default::default() };
    for prompt in &prompts {
        let mut session = prefixes.session(team(2), options.clone(), prompt).unwrap();
        assert!(session.is_empty());
        session.prefill(prompt).unwrap();
        assert_eq!(prefixes.insert(&session).unwrap(), 512);
        assert!(prefixes.memory().page_bytes <= 3 * page);
    }
    let held: Vec<usize> = prompts.iter().map(|prompt| prefixes.longest(prompt)).collect();
    assert_eq!(held, [0, 0, 256, 512]);
    let memory = prefixes.memory();
    assert_eq!((memory.page_bytes, memory.shared_pages, memory.tokens), (3 * page, 0, 768));
    assert_eq!(prefixes.pool().usage().page_bytes, 3 * page);
    prefixes.set_budget(0);
    assert_eq!(prefixes.pool().usage().pages, 0);
}

/// A prefix that is kept does not hold on to the rest of its sequence.
#[cfg(target_os = "linux")]
#[test]
fn memory_goes_back_to_the_system() {
    use longbit::kv::{CacheShape, PrefixTree};
    let resident = || longbit_sys::ProcessFacts::counters().rss_bytes.unwrap();
    let shape = CacheShape { layers: 2, kv_heads: 4, head_dim: 128, capacity: 16 * PAGE_TOKENS };
    let kernels = longbit_kernels::Kernels::best();
    let mut tree = PrefixTree::new(shape, kv_dtype("f32").unwrap(), kernels, u64::MAX).unwrap();
    let mut cache = tree.cache(&[], shape.capacity).unwrap();
    let rows = vec![1.0; shape.capacity * shape.head_dim];
    for i in 0..8 {
        cache.head_mut(i / 4, i % 4).append(&rows, &rows).unwrap();
    }
    cache.set_len(shape.capacity).unwrap();
    tree.insert(&tokens(PAGE_TOKENS, 512), &cache).unwrap();
    let (pages, before) = (tree.memory().page_bytes, resident());
    let all = cache.memory().page_bytes;
    assert_eq!((all, pages), (32 << 20, 2 << 20));
    drop(cache);
    assert_eq!(tree.pool().usage().page_bytes, pages);
    // The other tests of this process move it too, by less.
    assert!(resident() + (all - pages) / 2 < before, "{before} before, {} after", resident());
}
