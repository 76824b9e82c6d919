//! What the tests of the whole binary share: starting it, small experiments, reading what it wrote.
//!
//! Nothing here waits for a time to pass by itself: tests poll for what must happen, with deadlines that only a hang
//! exceeds, so that they hold on a loaded machine.

#![allow(dead_code)] // each test binary uses its own part

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A row of `cells.csv` by column.
pub(crate) type Row = BTreeMap<String, String>;

/// Only a hang takes this long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(400);

/// Root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace root")
}

/// The tiny packed checkpoint in the offline layout.
pub(crate) fn checkpoint() -> PathBuf {
    root().join("fixtures/hf_bitnet/offline")
}

/// The binary, with arguments, in `dir`, free of what the caller's environment says about it.
pub(crate) fn longbit<S: AsRef<std::ffi::OsStr>>(dir: &Path, args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longbit"));
    command.args(args).current_dir(dir).stdin(Stdio::null());
    clean(&mut command);
    command
}

/// Removes the variables that change what the binary does.
pub(crate) fn clean(command: &mut Command) {
    for name in ["OUT", "REPS", "TIMEOUT", "MAX_RSS", "THREADS", "ISA", "COLOR"] {
        command.env_remove(format!("LONGBIT_{name}"));
    }
    command.env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
}

/// What a finished program left.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Exit code; -1 when a signal ended it.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Ran {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).expect("standard output is UTF-8"),
            err: String::from_utf8(output.stderr).expect("standard error is UTF-8"),
        }
    }
}

impl Ran {
    /// Asserts the exit code, with everything that was said when it is another.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "exit code\n--- stdout\n{}\n--- stderr\n{}", self.out, self.err);
        self
    }

    /// Asserts that standard error holds each text.
    #[track_caller]
    pub(crate) fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.err.contains(text), "{text:?} is missing in:\n{}", self.err);
        }
        self
    }
}

/// Runs the binary to its end.
pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(dir: &Path, args: &[S]) -> Ran {
    longbit(dir, args).output().expect("the binary starts").into()
}

/// `longbit run FILE --out OUT` with further flags, to its end.
pub(crate) fn measure(dir: &Path, file: &str, out: &str, flags: &[&str]) -> Ran {
    run(dir, &[&["run", file, "--out", out, "--no-progress"], flags].concat())
}

/// A sweep of the tiny model on one thread.
#[derive(Clone, Debug)]
pub(crate) struct Experiment {
    pub(crate) contexts: Vec<usize>,
    pub(crate) kv_dtypes: Vec<&'static str>,
    pub(crate) methods: Vec<&'static str>,
    pub(crate) reps: u32,
    pub(crate) gen_tokens: u32,
    pub(crate) cell_timeout: &'static str,
    pub(crate) max_rss: &'static str,
    /// The tiny checkpoint decodes `story.txt`, a text of the fixtures, in place of generated inputs of a preset.
    pub(crate) text: bool,
    /// Further TOML.
    pub(crate) rest: String,
}

impl Default for Experiment {
    fn default() -> Self {
        Experiment {
            contexts: vec![128],
            kv_dtypes: vec!["bf16"],
            methods: vec!["dense", "window:sinks=4,window=64"],
            reps: 2,
            gen_tokens: 8,
            cell_timeout: "60s",
            max_rss: "8GiB",
            text: false,
            rest: String::new(),
        }
    }
}

impl Experiment {
    /// The file's text.
    pub(crate) fn toml(&self) -> String {
        let (model, workload) = match self.text {
            false => ("preset = \"tiny\"".to_owned(), "name = \"mix\""),
            true => (format!("path = {:?}", checkpoint()), "name = \"text\"\nfile = \"story.txt\""),
        };
        format!(
            "schema = 1\n\n[experiment]\nname = \"small\"\nquestion = \"Does it hold?\"\n\n\
             [model]\n{model}\nhead = \"bf16\"\nseed = 1\n\n\
             [workload]\n{workload}\nseed = 1\n\n\
             [axes]\ncontext = {:?}\nthreads = [1]\nkv_dtype = {:?}\nmethod = {:?}\n\n\
             [measure]\nreps = {}\ngen_tokens = {}\nwarmup_tokens = 1\nquality_steps = 2\nprobe = \"1MiB\"\n\
             pin = false\n\n[limits]\ncell_timeout = {:?}\nmax_rss = {:?}\n{}",
            self.contexts,
            self.kv_dtypes,
            self.methods,
            self.reps,
            self.gen_tokens,
            self.cell_timeout,
            self.max_rss,
            self.rest
        )
    }

    /// Writes the file as `small.toml` into `dir`, and the text beside it when it reads one.
    pub(crate) fn write(&self, dir: &Path) -> &'static str {
        if self.text {
            std::fs::copy(root().join("fixtures/text/lighthouse.txt"), dir.join("story.txt"))
                .expect("a copy");
        }
        put(&dir.join("small.toml"), &self.toml());
        "small.toml"
    }

    /// Cells of the sweep.
    pub(crate) fn cells(&self) -> usize {
        self.contexts.len() * self.kv_dtypes.len() * self.methods.len()
    }
}

#[track_caller]
pub(crate) fn put(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

#[track_caller]
pub(crate) fn get(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A path as an argument.
pub(crate) fn path(p: &Path) -> &str {
    p.to_str().expect("a path in UTF-8")
}

/// The rows of CSV text.
#[track_caller]
pub(crate) fn rows(text: &str) -> Vec<Row> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().expect("a header").clone();
    let row = |r: csv::Result<csv::StringRecord>| {
        let r = r.expect("a row as long as the header");
        header.iter().zip(r.iter()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    };
    reader.records().map(row).collect()
}

/// The rows of `cells.csv` in a results directory.
#[track_caller]
pub(crate) fn cells(dir: &Path) -> Vec<Row> {
    rows(&get(&dir.join("cells.csv")))
}

/// `context method` -> status and error of every row.
pub(crate) fn statuses(dir: &Path) -> BTreeMap<String, (String, String)> {
    let name = |r: &Row| format!("{} {}", r["context_tokens"], r["method"]);
    cells(dir).iter().map(|r| (name(r), (r["status"].clone(), r["error"].clone()))).collect()
}

/// The complete lines of `samples.jsonl`; none before it exists.
#[track_caller]
pub(crate) fn log(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("samples.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// How often each (cell, repetition) stands in the log.
pub(crate) fn repetitions(dir: &Path) -> BTreeMap<(String, u64), usize> {
    let mut found = BTreeMap::new();
    for line in log(dir).iter().filter(|l| l["line"] == "sample") {
        let cell = line["sample"]["cell"].as_str().expect("a cell").to_owned();
        *found.entry((cell, line["sample"]["rep"].as_u64().expect("a repetition"))).or_insert(0) += 1;
    }
    found
}

/// Asserts that the log holds every repetition of every cell exactly once.
#[track_caller]
pub(crate) fn assert_each_repetition_once(dir: &Path, cells: usize, reps: u32) {
    let found = repetitions(dir);
    assert_eq!(found.len(), cells * reps as usize, "repetitions in {}", dir.display());
    let doubled: Vec<_> = found.iter().filter(|(_, n)| **n != 1).collect();
    assert!(doubled.is_empty(), "{doubled:?}");
}

/// Waits until `done` gives something.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "{what} did not happen within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A runner in a process group of its own, killed with all of it when dropped.
#[cfg(target_os = "linux")]
pub(crate) struct Group(pub(crate) Child);

#[cfg(target_os = "linux")]
mod group {
    use super::*;
    use rustix::process::{Pid, Signal, kill_process, kill_process_group};
    use std::os::unix::process::CommandExt;

    impl Group {
        /// Starts `command` with its output thrown away.
        pub(crate) fn start(mut command: Command) -> Group {
            command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
            Group(command.spawn().expect("the binary starts"))
        }

        /// SIGKILL to the runner and its workers at once.
        pub(crate) fn kill(&mut self) {
            let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL); // may have ended already
            self.0.wait().expect("the runner can be waited for");
        }

        /// `signal` to the runner, and to its workers at once where `all`; waits for the runner's end.
        pub(crate) fn interrupt(&mut self, signal: Signal, all: bool) {
            let runner = Pid::from_child(&self.0);
            // It may have ended already.
            let _ = if all { kill_process_group(runner, signal) } else { kill_process(runner, signal) };
            wait_for("the end of the runner", || self.ended().then_some(()));
        }

        /// Whether it has ended by itself.
        pub(crate) fn ended(&mut self) -> bool {
            self.0.try_wait().expect("the runner can be asked").is_some()
        }

        /// Exit code once it ends by itself.
        #[track_caller]
        pub(crate) fn code(&mut self) -> i32 {
            wait_for("the end of the runner", || self.0.try_wait().expect("the runner can be asked"))
                .code()
                .unwrap_or(-1)
        }

        /// Sends `signal` to a worker that may be gone by now.
        pub(crate) fn signal(pid: i32, signal: Signal) {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, signal);
            }
        }

        /// The workers that run now.
        pub(crate) fn workers(&self) -> Vec<i32> {
            children(self.0.id())
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            self.kill();
        }
    }

    /// Processes whose parent is `parent` and that still run.
    fn children(parent: u32) -> Vec<i32> {
        let entries = std::fs::read_dir("/proc").expect("/proc");
        let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            // `pid (name) state ppid …`; the name may hold anything, so the last bracket counts.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let mut fields = fields.split_whitespace();
            let state = fields.next();
            fields.next() == Some(parent.to_string().as_str()) && state.is_some_and(|s| s != "Z")
        })
        .collect()
    }
}
