//! Records how the binary is built, so that every result can say it. Works without git: then the commit is `unknown`.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let sha = git(&["rev-parse", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    // The answer below depends on the work tree, not on the index alone.
    for source in ["../../crates", "../../Cargo.toml", "../../Cargo.lock"] {
        // A path that does not exist would make every build run this again.
        if std::path::Path::new(source).exists() {
            println!("cargo:rerun-if-changed={source}");
        }
    }
    // Only what decides the binary: an edited report does not make it another one.
    let sources =
        ["status", "--porcelain", "--untracked-files=all", "--", ":/crates", ":/Cargo.toml", ":/Cargo.lock"];
    let dirty = git(&sources).map(|s| (!s.is_empty()).to_string()).unwrap_or_default();
    let branch = git(&["symbolic-ref", "-q", "HEAD"]);
    for file in ["HEAD", "index", "packed-refs"].into_iter().chain(branch.as_deref()) {
        // A path that does not exist would make every build run this again.
        if let Some(path) = git(&["rev-parse", "--git-path", file])
            && std::path::Path::new(&path).exists()
        {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let rustc = output(Command::new(rustc).arg("--version")).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=LONGBIT_GIT_SHA={sha}");
    println!("cargo:rustc-env=LONGBIT_GIT_DIRTY={dirty}");
    println!("cargo:rustc-env=LONGBIT_RUSTC={rustc}");
    for (name, of_cargo) in [("LONGBIT_TARGET", "TARGET"), ("LONGBIT_PROFILE", "PROFILE")] {
        println!("cargo:rustc-env={name}={}", std::env::var(of_cargo).unwrap_or_default());
    }
}

fn git(args: &[&str]) -> Option<String> {
    output(Command::new("git").args(args))
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
