//! `longbit logits` from the outside: the same bits whatever the chunk, refusals, damaged checkpoints.

#![forbid(unsafe_code)]

mod common;

use std::path::Path;

use common::*;
use safetensors::{Dtype, SafeTensors};

/// `longbit logits` on the tiny checkpoint with further arguments, and the bytes of the file it wrote.
fn logits(dir: &Path, name: &str, args: &[&str]) -> Vec<u8> {
    let (model, file) = (checkpoint(), dir.join(name));
    let all = [&["logits", "--model", path(&model), "--out", path(&file)], args].concat();
    run(dir, &all).expect(0);
    std::fs::read(file).expect("the file of logits")
}

#[test]
fn logits_do_not_depend_on_the_chunk() {
    let dir = tempfile::tempdir().expect("a folder");
    let ids: Vec<String> = (0..48u32).map(|i| (i * 37 % 512).to_string()).collect();
    let ids = ids.join(",");
    let one = logits(dir.path(), "one.safetensors", &["--tokens", &ids, "--chunk", "1", "--threads", "1"]);
    let all = logits(dir.path(), "all.safetensors", &["--tokens", &ids, "--chunk", "48"]);
    assert!(one == all, "chunks of 1 and of 48 differ");
    put(&dir.path().join("ids.txt"), &ids.replace(',', "\n"));
    assert!(one == logits(dir.path(), "file.safetensors", &["--tokens", "ids.txt"]), "a file of ids differs");
    let scalar: Ran = longbit(
        dir.path(),
        &["logits", "--model", path(&checkpoint()), "--tokens", &ids, "--out", "scalar.safetensors"],
    )
    .env("LONGBIT_ISA", "scalar")
    .output()
    .expect("it starts")
    .into();
    scalar.expect(0);
    assert!(one == std::fs::read(dir.path().join("scalar.safetensors")).expect("a file"), "the ISA shows");

    let file = SafeTensors::deserialize(&one).expect("safetensors");
    let tensor = file.tensor("logits").expect("the tensor");
    assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[48, 512][..]));
    let values: Vec<f32> = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert!(values.iter().all(|v| v.is_finite()));
    let rows: std::collections::BTreeSet<Vec<u32>> =
        values.chunks(512).map(|r| r.iter().map(|v| v.to_bits()).collect()).collect();
    assert_eq!(rows.len(), 48, "every position says something else");
    let left = std::fs::read_dir(dir.path()).expect("the folder").count();
    assert_eq!(left, 5, "nothing is left beside the files that were asked for");
}

#[test]
fn logits_without_a_file_show_the_likeliest_tokens() {
    let dir = tempfile::tempdir().expect("a folder");
    let text =
        run(dir.path(), &["logits", "--model", path(&checkpoint()), "--tokens", "1,2,3"]).expect(0).out;
    assert_eq!(text.lines().count(), 4, "{text}");
}

#[test]
fn logits_refuse_what_they_cannot_use() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = checkpoint();
    let ask = |args: &[&str]| {
        let all = [&["logits", "--model", path(&model), "--out", "out.safetensors"], args].concat();
        run(dir.path(), &all)
    };
    ask(&["--tokens", "1,x"]).expect(2).says(&["1,x"]);
    ask(&["--tokens", ","]).expect(2).says(&["no token id"]);
    ask(&["--tokens", "99999999999"]).expect(2).says(&["99999999999", "not a token id"]);
    ask(&["--tokens", "gone.txt"]).expect(2).says(&["gone.txt"]);
    ask(&["--tokens", "1", "--kv", "bf61"]).expect(2).says(&["bf61", "bf16"]);
    ask(&["--tokens", "1", "--head", "int9"]).expect(2).says(&["int9", "int8"]);
    let unknown = ask(&["--tokens", "1,512"]).says(&["512"]);
    assert!(matches!(unknown.code, 1 | 2), "{unknown:?}");
    let chunk = ask(&["--tokens", "1", "--chunk", "0"]).says(&["chunk"]);
    assert!(matches!(chunk.code, 1 | 2), "{chunk:?}");
    let threads = ask(&["--tokens", "1", "--threads", "0"]).says(&["thread"]);
    assert!(matches!(threads.code, 1 | 2), "{threads:?}");
    // More threads than CPUs are slow and work; the cost is said.
    let many = (std::thread::available_parallelism().map_or(1, usize::from) + 1).to_string();
    run(dir.path(), &["logits", "--model", path(&model), "--tokens", "1", "--threads", &many])
        .expect(0)
        .says(&["warning: ", &many, "each barrier waits for a time slice", "use --threads"]);
    let nowhere = run(dir.path(), &["logits", "--model", "gone", "--tokens", "1"]).says(&["gone"]);
    assert!(matches!(nowhere.code, 1 | 2), "{nowhere:?}");
    assert!(!dir.path().join("out.safetensors").exists());
}

#[test]
fn a_damaged_checkpoint_is_an_error_that_names_the_tensor() {
    let dir = tempfile::tempdir().expect("a folder");
    let broken = dir.path().join("broken");
    std::fs::create_dir(&broken).expect("a folder");
    let whole = std::fs::read(checkpoint().join("model.safetensors")).expect("the checkpoint");
    let config = get(&checkpoint().join("config.json"));
    let ask = |bytes: &[u8], config: &str| {
        std::fs::write(broken.join("model.safetensors"), bytes).expect("a file");
        put(&broken.join("config.json"), config);
        let ran = run(dir.path(), &["logits", "--model", "broken", "--tokens", "1,2"]);
        assert!(matches!(ran.code, 1 | 2), "{ran:?}");
        assert!(!ran.err.contains("panicked") && ran.err.starts_with("error: "), "{}", ran.err);
        ran.err
    };
    let cut = ask(&whole[..whole.len() / 2], &config);
    assert!(cut.contains("model.safetensors"), "{cut}");
    let shape = ask(&whole, &config.replace("\"intermediate_size\": 512", "\"intermediate_size\": 1024"));
    assert!(shape.contains("model.layers.0.mlp."), "{shape}");
    let text = String::from_utf8_lossy(&whole[8..]).into_owned();
    let name = "model.layers.3.self_attn.o_proj.weight";
    assert!(text.contains(name), "the checkpoint holds other names than this test expects");
    let place = whole.windows(name.len()).position(|w| w == name.as_bytes()).expect("the name");
    let mut renamed = whole.clone();
    renamed[place + 13] = b'9'; // model.layers.9: as long, so that no offset moves
    let missing = ask(&renamed, &config);
    assert!(missing.contains(name) && missing.contains("is missing"), "{missing}");
    let config_cut = ask(&whole, &config[..config.len() / 2]);
    assert!(config_cut.contains("config.json"), "{config_cut}");
    ask(&[], &config);
}

/// Wider numbers than the head can hold are said, with the flag that keeps them.
#[test]
fn rounding_of_the_head_is_said() {
    let dir = tempfile::tempdir().expect("a folder");
    let wide = root().join("fixtures/hf_1bitllm");
    let args = ["logits", "--model", path(&wide), "--tokens", "1,2,3"];
    run(dir.path(), &args).expect(0).says(&["were rounded", "--head f32"]);
    let exact = run(dir.path(), &[&args[..], &["--head", "f32"]].concat()).expect(0);
    assert!(!exact.err.contains("rounded"), "{}", exact.err);
}
