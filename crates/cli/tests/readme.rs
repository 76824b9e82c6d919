//! Runs the commands of README.md, so that what a newcomer types works.
//!
//! A command is a line of a fenced `sh` block. Lines for the binary (`cargo run --release -- …`, `longbit …`) are run with
//! it, in their order, in a folder that holds the repository's experiments, fixtures and results; sweeps are replaced by
//! the same sweep of a tiny model. Cargo lines are checked to name a command that cargo has and packages that there are.

#![forbid(unsafe_code)]

mod common;

use std::path::Path;

use common::*;

/// The longest context that the replaced sweeps keep, unless a command asks for a longer one.
const LONGEST: i64 = 8192;

/// A command with the place where it stands.
#[derive(Clone, Debug, PartialEq)]
struct Command {
    line: usize,
    words: Vec<String>,
}

/// The commands of all fenced `sh` blocks: prompts, comments and variables in front removed, broken lines joined.
fn commands(page: &str) -> Vec<Command> {
    let mut found = Vec::new();
    let mut block: Option<bool> = None;
    let mut pending: Option<Command> = None;
    for (i, raw) in page.lines().enumerate() {
        let line = raw.trim();
        if let Some(language) = line.strip_prefix("```") {
            block = match block {
                Some(_) => None,
                None => Some(matches!(language.trim(), "sh" | "bash" | "shell" | "console")),
            };
            continue;
        }
        if block != Some(true) {
            continue;
        }
        let text = line.strip_prefix("$ ").unwrap_or(line);
        let (text, goes_on) = match text.strip_suffix('\\') {
            Some(text) => (text, true),
            None => (text, false),
        };
        let mut command = pending.take().unwrap_or(Command { line: i + 1, words: Vec::new() });
        command.words.extend(words(text));
        match goes_on {
            true => pending = Some(command),
            false if !command.words.is_empty() => found.push(command),
            false => {}
        }
    }
    found
}

/// The words of a line up to a comment; quotes keep blanks together.
fn words(text: &str) -> Vec<String> {
    let (mut found, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in text.chars() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() => found.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    found.extend(word);
    found
}

impl Command {
    /// Variables set in front, e.g. `LONGBIT_ISA=scalar`.
    fn variables(&self) -> Vec<(&str, &str)> {
        let pair = |w: &'_ String| {
            w.split_once('=').is_some_and(|(k, _)| k.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        };
        self.words.iter().take_while(|w| pair(w)).filter_map(|w| w.split_once('=')).collect()
    }

    fn program(&self) -> Vec<&str> {
        self.words.iter().skip(self.variables().len()).map(String::as_str).collect()
    }

    /// The arguments of the binary, where the command is for it.
    fn longbit(&self) -> Option<Vec<&str>> {
        let program = self.program();
        match program.first() {
            Some(&"longbit" | &"target/release/longbit" | &"./target/release/longbit") => {
                Some(program[1..].to_vec())
            }
            Some(&"cargo") if matches!(program.get(1), Some(&"run" | &"r")) => {
                let split = program.iter().position(|w| *w == "--")?;
                Some(program[split + 1..].to_vec())
            }
            _ => None,
        }
    }
}

/// Checks what is not for the binary: cargo, git, scripts of the repository.
fn check_other(command: &Command) -> Result<(), String> {
    let program = command.program();
    match program.as_slice() {
        ["cargo", verb, rest @ ..] => {
            let known = ["test", "bench", "build", "install", "doc", "fmt", "clippy", "check"];
            if !known.contains(verb) {
                return Err(format!("`cargo {verb}` is not among {known:?}"));
            }
            let value = |flags: [&str; 2]| rest.windows(2).find(|w| flags.contains(&w[0])).map(|w| w[1]);
            if let Some(package) = value(["-p", "--package"]) {
                let has = |dir: &str| {
                    let folders = std::fs::read_dir(root().join(dir)).into_iter().flatten().flatten();
                    let manifests = folders.map(|e| e.path().join("Cargo.toml"));
                    manifests.chain([root().join(dir).join("Cargo.toml")]).any(|m| {
                        std::fs::read_to_string(m).is_ok_and(|t| t.contains(&format!("name = {package:?}")))
                    })
                };
                if !has("crates") && !has("benches") {
                    return Err(format!("there is no package `{package}`"));
                }
            }
            if let Some(path) =
                value(["--path", "--path"]).filter(|p| !root().join(p).join("Cargo.toml").exists())
            {
                return Err(format!("there is no crate in `{path}`"));
            }
            Ok(())
        }
        ["git" | "cd" | "rustup" | "export", ..] => Ok(()),
        [script, ..] if script.contains('/') || ["sh", "bash"].contains(script) => {
            let script = if script.contains('/') { script } else { program.get(1).unwrap_or(script) };
            let exists = root().join(script.trim_start_matches("./")).is_file();
            exists.then_some(()).ok_or_else(|| format!("there is no script `{script}`"))
        }
        other => Err(format!("this test does not know `{}`", other.first().unwrap_or(&""))),
    }
}

/// Contexts that a command asks for with `--set context=…`.
fn asked_contexts(all: &[Command]) -> Vec<i64> {
    let words = all.iter().flat_map(|c| &c.words);
    words
        .filter_map(|w| w.strip_prefix("context="))
        .flat_map(|v| v.split(','))
        .filter_map(|v| v.parse().ok())
        .collect()
}

/// The same sweep of a tiny model: axes, methods and flags as they are, without the long contexts and the many tokens.
fn tiny(text: &str, keep: &[i64]) -> String {
    let mut file: toml::Table = text.parse().expect("an experiment");
    let mut set = |table: &str, key: &str, value: toml::Value| {
        let table = file.get_mut(table).and_then(toml::Value::as_table_mut).expect("the table");
        table.insert(key.to_owned(), value);
    };
    // A checkpoint of the fixtures is tiny as it is.
    if !text.contains("\npath = ") {
        let preset = if text.contains("\npreset = \"matrix:") { "matrix:64x64" } else { "tiny" };
        set("model", "preset", preset.into());
    }
    set("measure", "probe", "1MiB".into());
    set("measure", "gen_tokens", 10.into());
    let axes = file["axes"].as_table_mut().expect("axes");
    // One matrix has none.
    if let Some(contexts) = axes.get_mut("context") {
        let contexts = contexts.as_array_mut().expect("contexts");
        contexts.retain(|c| c.as_integer().is_some_and(|c| c <= LONGEST || keep.contains(&c)));
    }
    toml::to_string(&file).expect("TOML")
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        std::fs::create_dir_all(to).expect("a folder");
        for entry in std::fs::read_dir(from).expect("a folder").flatten() {
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else if from.is_file() {
        std::fs::copy(from, to).expect("a copy");
    }
}

/// The folder in which the commands run.
fn prepare(dir: &Path, all: &[Command]) {
    for name in ["experiments", "fixtures", "results", "REPORT.md", "README.md"] {
        copy(&root().join(name), &dir.join(name));
    }
    // What a reader puts in: a checkpoint, and a file of token ids.
    copy(&checkpoint(), &dir.join("path/to/checkpoint"));
    put(&dir.join("ids.txt"), "1 2 3\n");
    let keep = asked_contexts(all);
    let mut folders = vec![dir.join("experiments")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("experiments").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "toml") {
                put(&path, &tiny(&get(&path), &keep));
            }
        }
    }
}

/// Exit codes that tell of an outcome and not of a mistake in the command.
fn allowed(verb: &str) -> &'static [i32] {
    match verb {
        "check" => &[0, 3, 5, 6], // two short runs on a busy machine may differ
        "verify" => &[0, 4],
        _ => &[0],
    }
}

/// Files of experiments among the arguments.
fn experiments<'a>(args: &[&'a str]) -> Vec<&'a str> {
    args.iter().copied().filter(|a| a.ends_with(".toml")).collect()
}

#[test]
fn the_commands_of_the_readme_work() {
    let page = get(&root().join("README.md"));
    let all = commands(&page);
    let dir = tempfile::tempdir().expect("a folder");
    prepare(dir.path(), &all);
    let mut ran = 0;
    for command in &all {
        let place = format!("README.md:{}: {}", command.line, command.words.join(" "));
        let Some(args) = command.longbit() else {
            check_other(command).unwrap_or_else(|what| panic!("{place}\n{what}"));
            continue;
        };
        let verb = args.first().copied().unwrap_or_default();
        // The file as it stands in the repository is one that this binary accepts.
        for file in experiments(&args) {
            let plan = run(&root(), &["plan", file, "--list"]);
            assert_eq!(plan.code, 0, "{place}\n{}", plan.err);
        }
        let out = args.iter().position(|a| matches!(*a, "--out" | "-o")).and_then(|i| args.get(i + 1));
        if let Some(out) = out.filter(|_| verb == "run") {
            // A copied result of the true sweep would rightly be refused.
            let stored = dir.path().join(out).join("plan.json");
            if stored.exists() && !get(&stored).contains("\"tiny\"") {
                std::fs::remove_dir_all(dir.path().join(out)).expect("the copy can be removed");
            }
        }
        let mut binary = longbit(dir.path(), &args);
        binary.envs(command.variables());
        let done: Ran = binary.output().expect("the binary starts").into();
        assert!(
            allowed(verb).contains(&done.code),
            "{place}\nexit code {}\n{}\n{}",
            done.code,
            done.out,
            done.err
        );
        ran += 1;
    }
    assert!(ran > 0, "README.md has no command for the binary");
}

#[test]
fn the_readme_names_the_two_main_commands() {
    let all = commands(&get(&root().join("README.md")));
    for main in ["cargo run --release -- run experiments/quick.toml", "cargo test --workspace"] {
        assert!(all.iter().any(|c| c.words.join(" ") == main), "README.md does not name `{main}`");
    }
}

#[test]
fn commands_are_found_as_they_stand() {
    let page = "text\n```sh\n$ cargo run --release -- run a.toml \\\n    --out 'x y'  # why\n\n# comment\nA=1 longbit list\n\
                cargo dance\n```\n```rust\nlongbit no\n```\n```\nlongbit neither\n```\n";
    let all = commands(page);
    let lines: Vec<usize> = all.iter().map(|c| c.line).collect();
    assert_eq!(lines, [3, 7, 8]);
    assert_eq!(all[0].longbit(), Some(vec!["run", "a.toml", "--out", "x y"]));
    assert_eq!((all[1].longbit(), all[1].variables()), (Some(vec!["list"]), vec![("A", "1")]));
    assert!(all[2].longbit().is_none() && check_other(&all[2]).is_err());
    let line = |text: &str| Command { line: 1, words: words(text) };
    assert!(check_other(&line("cargo test --workspace")).is_ok());
    assert!(check_other(&line("cargo bench -p longbit-benches")).is_ok());
    assert!(check_other(&line("cargo test -p no-such-crate")).is_err());
    assert!(check_other(&line("scripts/no-such.sh")).is_err());
    assert!(check_other(&line("frobnicate now")).is_err());
}
