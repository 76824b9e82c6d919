//! Holds the house in shape: who may depend on whom, where memory safety may be suspended, how long a file may grow.
//!
//! The compiler enforces each rule only where somebody wrote it down; this test checks that it stays written down.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Directory of each member, its package, and the workspace packages that it may name. A new member needs a line here.
const MAY_KNOW: &[(&str, &str, &[&str])] = &[
    ("crates/kernels", "longbit-kernels", &[]),
    ("crates/sys", "longbit-sys", &[]),
    ("crates/protocol", "longbit-protocol", &[]),
    ("crates/core", "longbit", &["longbit-kernels", "longbit-sys"]),
    ("crates/worker", "longbit-worker", &["longbit", "longbit-protocol", "longbit-sys"]),
    ("crates/lab", "longbit-lab", &["longbit-protocol"]),
    (
        "crates/cli",
        "longbit-cli",
        &["longbit-lab", "longbit-worker", "longbit", "longbit-protocol", "longbit-sys"],
    ),
    ("benches", "longbit-benches", &["longbit-kernels", "longbit", "longbit-sys"]),
];

/// The two crates at the edge, where the keyword below is allowed.
const EDGE: &[&str] = &["crates/kernels", "crates/sys"];

/// The keyword, spelled so that this file does not contain it.
const KEYWORD: &str = concat!("un", "safe");

/// A file past 500 lines is asking to be two; here it must be.
const MAX_LINES: usize = 650;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace root")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn manifest(directory: &Path) -> toml::Table {
    let path = directory.join("Cargo.toml");
    read(&path).parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Directories of all members, relative to the root, from the workspace manifest (`dir/*` or `dir`).
fn members(root: &Path) -> BTreeSet<String> {
    let workspace = manifest(root);
    let listed = workspace["workspace"]["members"].as_array().expect("a list of members");
    let mut found = BTreeSet::new();
    for member in listed {
        let member = member.as_str().expect("a path");
        let Some(parent) = member.strip_suffix("/*") else {
            found.insert(member.to_owned());
            continue;
        };
        for entry in std::fs::read_dir(root.join(parent)).expect("the directory of the members") {
            let entry = entry.expect("a directory entry");
            if entry.path().join("Cargo.toml").is_file() {
                found.insert(format!("{parent}/{}", entry.file_name().to_string_lossy()));
            }
        }
    }
    found
}

/// Packages named in all dependency tables: normal, development and build, for every target and at any depth.
fn dependencies(table: &toml::Table) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (key, value) in table {
        let Some(inner) = value.as_table() else { continue };
        if matches!(key.as_str(), "dependencies" | "dev-dependencies" | "build-dependencies") {
            for (name, entry) in inner {
                // A renamed dependency says the package that it means.
                let package = entry.get("package").and_then(toml::Value::as_str).unwrap_or(name);
                found.insert(package.to_owned());
            }
        } else {
            found.extend(dependencies(inner));
        }
    }
    found
}

/// Every Rust file below a directory; the directory of each member has no build output in it.
fn rust_files(directory: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                rust_files(&path, into);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

fn files_of(member: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    rust_files(&root().join(member), &mut files);
    files.sort();
    assert!(!files.is_empty(), "{member} has no Rust file");
    files
}

/// Library root, binary roots: the files whose attributes hold for a whole crate.
fn crate_roots(directory: &Path) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = ["src/lib.rs", "src/main.rs"]
        .iter()
        .map(|path| directory.join(path))
        .filter(|p| p.is_file())
        .collect();
    if let Ok(entries) = std::fs::read_dir(directory.join("src/bin")) {
        roots.extend(entries.flatten().map(|entry| entry.path()).filter(|p| p.is_file()));
    }
    roots
}

/// Whether the attribute stands before the first item, among comments and other inner attributes.
fn opens_with_forbid(source: &str) -> bool {
    let attribute = format!("#![forbid({KEYWORD}_code)]");
    source
        .lines()
        .map(str::trim)
        .take_while(|line| line.is_empty() || line.starts_with("//") || line.starts_with("#!["))
        .any(|line| line == attribute)
}

/// The lines (from 1) on which the keyword stands as a word, outside `//` comments.
fn keyword_lines(source: &str) -> Vec<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let has = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        code.split(|c| !is_word(c)).any(|word| word == KEYWORD)
    };
    source.lines().enumerate().filter(|(_, line)| has(line)).map(|(i, _)| i + 1).collect()
}

#[test]
fn the_list_names_every_member() {
    let root = root();
    let listed: BTreeSet<String> = MAY_KNOW.iter().map(|(directory, ..)| directory.to_string()).collect();
    assert_eq!(members(&root), listed, "the members of the workspace and the list of this test differ");
    for (directory, package, _) in MAY_KNOW {
        let manifest = manifest(&root.join(directory));
        assert_eq!(manifest["package"]["name"].as_str(), Some(*package), "{directory}");
    }
}

#[test]
fn dependencies_point_down_only() {
    let ours: BTreeSet<&str> = MAY_KNOW.iter().map(|&(_, package, _)| package).collect();
    let mut wrong = Vec::new();
    for (directory, package, may_know) in MAY_KNOW {
        let named = dependencies(&manifest(&root().join(directory)));
        for other in named.iter().filter(|name| ours.contains(name.as_str())) {
            if !may_know.contains(&other.as_str()) {
                wrong.push(format!("{package} must not depend on {other}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_crate_but_the_edge_forbids_the_keyword_and_never_writes_it() {
    let mut wrong = Vec::new();
    for (directory, ..) in MAY_KNOW.iter().filter(|(directory, ..)| !EDGE.contains(directory)) {
        let roots = crate_roots(&root().join(directory));
        assert!(!roots.is_empty(), "{directory} has no crate root");
        for path in roots.iter().filter(|path| !opens_with_forbid(&read(path))) {
            wrong.push(format!("{} does not open with #![forbid({KEYWORD}_code)]", path.display()));
        }
        for path in files_of(directory) {
            for line in keyword_lines(&read(&path)) {
                wrong.push(format!("{}:{line} contains the word `{KEYWORD}`", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_file_grows_past_the_limit() {
    let mut wrong = Vec::new();
    for (directory, ..) in MAY_KNOW {
        for path in files_of(directory) {
            let lines = read(&path).lines().count();
            if lines > MAX_LINES {
                wrong.push(format!("{} has {lines} lines, more than {MAX_LINES}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_checks_can_fail() {
    let attribute = format!("#![forbid({KEYWORD}_code)]");
    assert!(opens_with_forbid(&format!(
        "//! What it is for.\n\n#![allow(dead_code)]\n{attribute}\nmod a;\n"
    )));
    assert!(!opens_with_forbid(&format!("mod a;\n{attribute}\n")));
    assert!(!opens_with_forbid(&format!("// {attribute}\nmod a;\n")));

    let source = format!("{attribute}\n// {KEYWORD} here is talk\nfn a() {{ {KEYWORD} {{}} }}\n");
    assert_eq!(keyword_lines(&source), [3]);

    let manifest: toml::Table = "[dependencies]\na = \"1\"\nb = { package = \"c\", path = \"c\" }\n\
         [target.'cfg(unix)'.dev-dependencies]\nd.workspace = true\n[package]\nname = \"e\"\n"
        .parse()
        .expect("TOML");
    assert_eq!(dependencies(&manifest), ["a", "c", "d"].map(str::to_owned).into());
}
