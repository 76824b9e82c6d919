//! `longbit generate` and `longbit perplexity` on the tiny checkpoint: the same text on every instruction set and number
//! of threads, what they print, what they refuse.

mod common;

use common::{Ran, checkpoint, longbit, put, root};
use std::path::Path;

fn here() -> &'static Path {
    Path::new(".")
}

/// `longbit VERB --model CHECKPOINT` with further arguments and environment.
fn with(verb: &str, args: &[&str], variables: &[(&str, &str)]) -> Ran {
    let model = checkpoint();
    let mut all = vec![verb, "--model", model.to_str().expect("a path in UTF-8")];
    all.extend(args);
    let mut command = longbit(here(), &all);
    command.envs(variables.iter().copied());
    command.output().expect("the binary starts").into()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

const PROMPT: [&str; 4] = ["--prompt", "The quick brown fox", "--max-tokens", "20"];

#[test]
fn greedy_text_is_the_same_on_every_instruction_set_and_number_of_threads() {
    let expected = with("generate", &PROMPT, &[("LONGBIT_ISA", "scalar")]).expect(0);
    assert!(expected.out.trim_end().chars().count() > 5, "{expected:?}");
    let mut tried = vec!["scalar"];
    for isa in ["avx2", "avx-vnni", "avx512", "avx512-vnni", "avx512-vbmi", "neon"] {
        let got = with("generate", &PROMPT, &[("LONGBIT_ISA", isa)]);
        // What this machine lacks is refused by name.
        if got.code == 0 {
            assert_eq!(got.out, expected.out, "{isa}");
            tried.push(isa);
        } else {
            assert!(got.err.contains(isa), "{}", got.err);
        }
    }
    let own = longbit::isa().expect("an instruction set");
    assert!(tried.contains(&own), "{own} is not among {tried:?}");
    let all = longbit_sys::allowed_cpus().map_or(1, |cpus| cpus.len()).min(4).to_string();
    for (threads, chunk) in [("1", "1"), ("1", "3"), (&*all, "128"), (&*all, "2")] {
        let flags = [&PROMPT[..], &["--threads", threads, "--chunk", chunk]].concat();
        assert_eq!(with("generate", &flags, &[]).expect(0).out, expected.out, "{threads} threads");
    }
}

#[test]
fn the_document_has_text_ids_and_timings() {
    let text = with("generate", &PROMPT, &[]).expect(0);
    let text = text.says(&["prompt: ", "answer: 20 tokens", "tok/s", "p50", "p99", "ended: as many tokens"]);
    let document = json(&with("generate", &[&PROMPT[..], &["--json"]].concat(), &[]).expect(0).out);
    assert_eq!(document["text"].as_str().expect("text").trim_end(), text.out.trim_end());
    assert_eq!(document["ids"].as_array().map(Vec::len), Some(20));
    assert_eq!(document["prompt_ids"][0], 509, "a prompt begins with the beginning of the text");
    assert_eq!((&document["stop"]["reason"], &document["method"]), (&"length".into(), &"dense".into()));
    // What would be needed to do it again.
    let prompt = document["prompt_ids"].as_array().map_or(0, Vec::len);
    assert_eq!((&document["max_tokens"], &document["context"]), (&20.into(), &(prompt + 20).into()));
    assert_eq!((&document["top_k"], &document["chat"]), (&40.into(), &false.into()));
    assert_eq!((&document["top_p"], &document["min_p"]), (&0.95.into(), &0.05.into()));
    let timings = &document["timings"];
    assert_eq!(timings["step_ns"].as_array().map(Vec::len), Some(19));
    assert!(timings["prefill_ns"].as_u64() > Some(0) && timings["first_token_ns"].as_u64() > Some(0));
    assert!(timings["decode_tok_s"].as_f64() > Some(0.0), "{timings}");
}

#[test]
fn sampling_follows_the_seed_and_other_formats_and_methods_work() {
    let sampled = |seed: &str, threads: &str| {
        let flags = ["--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--json"];
        let flags = [&PROMPT[..], &flags, &["--seed", seed, "--threads", threads]].concat();
        json(&with("generate", &flags, &[]).expect(0).out)["ids"].clone()
    };
    assert_eq!(sampled("1", "1"), sampled("1", "2"));
    assert_ne!(sampled("1", "1"), sampled("2", "1"));
    for kv in longbit::kv::KV_FORMATS {
        let flags =
            [&PROMPT[..], &["--kv", kv.name, "--method", "window:sinks=2,window=8", "--json"]].concat();
        let document = json(&with("generate", &flags, &[]).expect(0).out);
        assert_eq!(document["kv_dtype"], kv.name);
        assert_eq!(document["method"], "window:sinks=2,window=8");
    }
}

#[test]
fn chat_prompts_and_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("prompt.txt");
    put(&file, "Hello!");
    let path = file.to_str().expect("a path in UTF-8");
    let chat = ["--chat", "--system", "Be brief.", "--max-tokens", "3", "--json"];
    let from_file =
        json(&with("generate", &[&["--prompt-file", path][..], &chat].concat(), &[]).expect(0).out);
    let from_flag =
        json(&with("generate", &[&["--prompt", "Hello!"][..], &chat].concat(), &[]).expect(0).out);
    assert_eq!(from_file["prompt_ids"], from_flag["prompt_ids"]);
    assert_eq!(from_file["ids"], from_flag["ids"]);
    let golden = json(&common::get(&root().join("fixtures/tokenizer/bpe/chat.json")));
    let plain =
        with("generate", &["--prompt", "Hello!", "--chat", "--max-tokens", "1", "--json"], &[]).expect(0);
    let case = golden["cases"].as_array().into_iter().flatten().find(|case| {
        case["template"] == "bitnet" && case["conversation"] == 0 && case["add_generation_prompt"] == true
    });
    assert_eq!(json(&plain.out)["prompt_ids"], case.expect("a golden of one message")["ids"]);
}

#[test]
fn what_cannot_be_done_is_refused_before_it_is_begun() {
    with("generate", &[], &[]).expect(2).says(&["--prompt"]);
    with("generate", &["--prompt", "x", "--system", "y"], &[]).expect(2).says(&["--chat"]);
    with("generate", &["--prompt", "x", "--kv", "bf17"], &[]).expect(2).says(&["bf17", "bf16"]);
    with("generate", &["--prompt", "x", "--method", "dens"], &[]).expect(2).says(&["dens"]);
    with("generate", &["--prompt", "x", "--temperature", "-1"], &[]).expect(2);
    with("generate", &["--prompt", "x", "--top-p", "0"], &[]).expect(2).says(&["top-p"]);
    with("generate", &["--prompt-file", "no/such/file"], &[]).expect(2).says(&["no/such/file"]);
    with("generate", &["--prompt", "one two three", "--context", "2"], &[]).expect(2).says(&["--context 2"]);
    with("generate", &["--prompt", "x", "--max-tokens", "99999999999"], &[]).expect(1).says(&[
        "not enough memory",
        "bytes",
        "available",
    ]);
    // A checkpoint without a tokenizer says where one belongs.
    let bare = root().join("fixtures/hf_bitnet/bitlinear");
    let bare = bare.to_str().expect("a path in UTF-8");
    let ran: Ran =
        longbit(here(), &["generate", "--model", bare, "--prompt", "x"]).output().expect("it starts").into();
    ran.expect(1).says(&["tokenizer.json", "has no tokenizer"]);
    let own = root().join("fixtures/tokenizer/bpe/tokenizer.json");
    let own = ["--tokenizer", own.to_str().expect("a path in UTF-8"), "--max-tokens", "2"];
    let args = [&["generate", "--model", bare, "--prompt", "x"][..], &own].concat();
    let ran: Ran = longbit(here(), &args).output().expect("it starts").into();
    ran.expect(0);
}

#[test]
fn a_stop_token_ends_the_answer_unless_it_is_ignored() {
    let dir = tempfile::tempdir().expect("a directory");
    for file in std::fs::read_dir(checkpoint()).expect("the checkpoint") {
        let file = file.expect("a file").path();
        std::fs::copy(&file, dir.path().join(file.file_name().expect("a name"))).expect("a copy");
    }
    let document = |flags: &[&str]| {
        let model = dir.path().to_str().expect("a path in UTF-8");
        let args = [&["generate", "--model", model][..], &PROMPT, &["--json"], flags].concat();
        let ran: Ran = longbit(here(), &args).output().expect("it starts").into();
        json(&ran.expect(0).out)
    };
    let free = document(&["--ignore-eos"]);
    let ids = free["ids"].as_array().expect("ids").clone();
    let stop = ids[5].clone();
    let at = ids.iter().position(|id| *id == stop).expect("it is there");
    put(&dir.path().join("generation_config.json"), &format!(r#"{{"eos_token_id": [511, {stop}]}}"#));
    let stopped = document(&[]);
    assert_eq!(stopped["ids"].as_array().expect("ids")[..], ids[..at]);
    assert_eq!((&stopped["stop"]["reason"], &stopped["stop"]["token"]), (&"stop".into(), &stop));
    assert_eq!(document(&["--ignore-eos"])["ids"], free["ids"]);
}

#[test]
fn a_converted_model_writes_the_same_text() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = checkpoint();
    let model = model.to_str().expect("a path in UTF-8");
    let expected = with("generate", &PROMPT, &[]).expect(0).out;
    let chat = ["--chat", "--prompt", "Hello!", "--max-tokens", "4", "--json"];
    let asked = json(&with("generate", &chat, &[]).expect(0).out);
    for kind in ["i2_s", "tq2_0"] {
        let run = |args: &[&str]| -> Ran { longbit(dir.path(), args).output().expect("it starts").into() };
        run(&["convert", model, "tiny.gguf", "--force", "--type", kind]).expect(0);
        let got = run(&[&["generate", "--model", "tiny.gguf"][..], &PROMPT].concat()).expect(0);
        assert_eq!(got.out, expected, "{kind}");
        let got = json(&run(&[&["generate", "--model", "tiny.gguf"][..], &chat].concat()).expect(0).out);
        assert_eq!((&got["prompt_ids"], &got["ids"]), (&asked["prompt_ids"], &asked["ids"]), "{kind}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_with_a_clean_line_and_a_summary() {
    use rustix::process::{Pid, Signal, kill_process};
    use std::io::Read;
    use std::process::Stdio;
    let model = checkpoint();
    let model = model.to_str().expect("a path in UTF-8");
    let args = ["generate", "--model", model, "--prompt", "The", "--max-tokens", "200000", "--ignore-eos"];
    let mut command = longbit(here(), &args);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let mut out = child.stdout.take().expect("a pipe");
    // The first byte of text says that it is at work.
    let mut text = vec![0];
    out.read_exact(&mut text).expect("text");
    kill_process(Pid::from_child(&child), Signal::INT).expect("a signal");
    out.read_to_end(&mut text).expect("the rest");
    let output = child.wait_with_output().expect("its end");
    assert_eq!(output.status.code(), Some(6));
    assert!(text.ends_with(b"\n"));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains("ended: interrupted") && err.contains("answer: "), "{err}");
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_ends_the_answer() {
    use std::io::Read;
    use std::process::Stdio;
    let model = checkpoint();
    let model = model.to_str().expect("a path in UTF-8");
    // Without an end of its own it would go on for minutes.
    let args = ["generate", "--model", model, "--prompt", "The", "--max-tokens", "200000", "--ignore-eos"];
    let mut command = longbit(here(), &args);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let mut out = child.stdout.take().expect("a pipe");
    out.read_exact(&mut [0]).expect("text");
    drop(out);
    let output = child.wait_with_output().expect("its end");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert!(err.contains("nobody reads") && err.contains("answer: "), "{err}");
    let tokens = err.split("answer: ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<usize>().ok());
    assert!(tokens.is_some_and(|n| n < 200_000), "{err}");
}

#[test]
fn what_goes_beyond_the_trained_positions_is_said() {
    let within = with("generate", &["--prompt", "x", "--max-tokens", "3"], &[]).expect(0);
    assert!(!within.err.contains("trained"), "{}", within.err);
    let beyond = ["--prompt", "x", "--max-tokens", "300", "--ignore-eos"];
    with("generate", &beyond, &[]).expect(0).says(&["note: prompt and answer", "trained for 256 positions"]);
    let small = [&beyond[..], &["--context", "100"]].concat();
    assert!(!with("generate", &small, &[]).expect(0).err.contains("trained"));
}

#[test]
fn perplexity_prints_a_line_for_each_format_and_method() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("text.txt");
    put(&file, &"The quick brown fox jumps over the lazy dog. Ça va? 日本語 🙂\n".repeat(8));
    let path = file.to_str().expect("a path in UTF-8");
    let args = ["--text", path, "--context", "48", "--stride", "16", "--kv", "bf16,f32", "--limit", "120"];
    let args = [&args[..], &["--method", "dense", "--method", "window:sinks=1,window=8"]].concat();
    let table = with("perplexity", &args, &[]).expect(0).out;
    assert!(table.starts_with("80 of 120 tokens scored: 5 windows of 48, the last 16 of each"), "{table}");
    let lines: Vec<&str> = table.lines().skip(2).collect();
    assert_eq!(lines.len(), 1 + 4, "{table}");
    assert!(lines[0].starts_with("kv") && lines[1].starts_with("bf16  dense"), "{table}");
    let document =
        json(&with("perplexity", &[&args[..], &["--json", "--threads", "1"]].concat(), &[]).expect(0).out);
    let scores = document["scores"].as_array().expect("scores");
    assert_eq!(scores.len(), 4);
    assert!(scores[0]["difference"].is_null());
    for score in scores {
        let nats = score["nats_per_token"].as_f64().expect("a number");
        assert_eq!(score["scored_tokens"], 80);
        let perplexity = score["perplexity"].as_f64().expect("a number");
        assert!((nats.exp() - perplexity).abs() < 1e-9 * perplexity);
        assert!(table.contains(&format!("{nats:.5}")), "{nats} in\n{table}");
    }
    with("perplexity", &["--text", path, "--context", "48", "--stride", "48"], &[])
        .expect(2)
        .says(&["stride"]);
    with("perplexity", &["--text", path, "--context", "4096"], &[]).expect(2).says(&["needs 4095"]);
    with("perplexity", &["--text", path, "--kv", "int3"], &[]).expect(2).says(&["int3"]);
    assert_eq!(
        (&document["threads"], &document["limit"], &document["bos"]),
        (&1.into(), &120.into(), &509.into())
    );
    assert_eq!(document["kv_dtypes"], serde_json::json!(["bf16", "f32"]));
    assert_eq!(document["methods"], serde_json::json!(["dense", "window:sinks=1,window=8"]));
    assert_eq!(document["isa"].as_str(), longbit::isa().ok());
    let help = with("perplexity", &["--help"], &[]).expect(0).out;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for words in [
        "tokenized once",
        "every --stride M",
        "beginning-of-text token",
        "prefilled in the KV dtype, densely unless the method says otherwise",
        "decoded one by one with the method",
        "between N-M and N-1 tokens before it",
        "score the same tokens",
        "left out",
        "Dense bf16 is always measured",
        "Standard errors treat tokens as independent",
    ] {
        assert!(help.contains(words), "{words}: {help}");
    }
}
