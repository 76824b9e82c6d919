//! An engine in a process of its own: one request line in, event lines out.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use longbit_protocol::{Capabilities, Estimate, EstimateRequest, Event, Job, Probe, Request};

use super::{Engine, Next, Running};
use crate::{LabError, Result};

/// Hidden verb under which the binary is its own engine.
pub const ENGINE_VERB: &str = "__engine";
/// How much of the standard error of an engine is kept.
const STDERR_TAIL: usize = 32 << 10;
/// Longest line that is taken for an event.
const MAX_LINE: u64 = 256 << 20;
/// A question without measurement is answered within this time.
const ASK_TIMEOUT: Duration = Duration::from_secs(600);

/// Starts `program args…` for each request.
#[derive(Clone, Debug)]
pub struct ProcessEngine {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl ProcessEngine {
    /// This very binary, under its hidden verb.
    ///
    /// # Errors
    /// [`LabError::Engine`] when the system does not tell where the binary is.
    pub fn own() -> Result<Self> {
        let program = std::env::current_exe()
            .map_err(|e| LabError::engine(format!("the path of this binary is unknown: {e}"), ""))?;
        Ok(ProcessEngine { program, args: vec![ENGINE_VERB.into()] })
    }

    fn spawn(&self, request: &Request) -> Result<Process> {
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| {
                LabError::engine(format!("cannot start {}: {e}", self.program.display()), "check the path")
            })?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(mut stderr)) = (stdin, stdout, stderr) else {
            let _ = child.kill();
            return Err(LabError::engine("its pipes could not be opened", ""));
        };
        let (sender, lines) = channel();
        let reader = std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            loop {
                let mut line = Vec::new();
                match (&mut stdout).take(MAX_LINE).read_until(b'\n', &mut line) {
                    Ok(n) if n > 0 => {
                        if sender.send(line).is_err() {
                            break;
                        }
                    }
                    _ => break,
                }
            }
        });
        let tail = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&tail);
        let drain = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(n @ 1..) = stderr.read(&mut chunk) {
                let mut tail = shared.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend_from_slice(&chunk[..n]);
                let excess = tail.len().saturating_sub(STDERR_TAIL);
                tail.drain(..excess);
            }
        });
        let mut process = Process { child, lines, tail, threads: vec![reader, drain], status: None };
        let mut text = serde_json::to_vec(request)
            .map_err(|e| LabError::engine(format!("the request cannot be written as JSON: {e}"), ""))?;
        text.push(b'\n');
        // An engine that dies before it reads is reported by its exit, which says more than a broken pipe.
        if let Err(e) = stdin.write_all(&text)
            && e.kind() != std::io::ErrorKind::BrokenPipe
        {
            process.kill();
            return Err(LabError::engine(format!("cannot write the request: {e}"), ""));
        }
        Ok(process)
    }

    /// Sends a question and hands every event to `take` until it returns false.
    fn ask(&self, request: &Request, mut take: impl FnMut(Event) -> Result<bool>) -> Result<()> {
        let mut process = self.spawn(request)?;
        loop {
            match process.next(ASK_TIMEOUT) {
                Next::Event(Event::Fatal { error, .. }) => return Err(LabError::engine(error, "")),
                Next::Event(Event::Phase { .. }) => {}
                Next::Event(event) => {
                    if !take(event)? {
                        return Ok(());
                    }
                }
                Next::Garbled(what) => return Err(LabError::engine(what, "")),
                Next::TimedOut => {
                    let what = format!("no answer within {} s", ASK_TIMEOUT.as_secs());
                    return Err(LabError::engine(what, ""));
                }
                Next::Exited { code, signal, stderr_tail } => {
                    return Err(LabError::engine(death(code, signal, &stderr_tail), ""));
                }
            }
        }
    }
}

impl Engine for ProcessEngine {
    fn capabilities(&self) -> Result<Capabilities> {
        let mut found = None;
        self.ask(&Request::Capabilities, |event| match event {
            Event::Capabilities(capabilities) => {
                found = Some(*capabilities);
                Ok(false)
            }
            other => Err(unexpected(&other)),
        })?;
        let found = found.ok_or_else(|| LabError::engine("no answer", ""))?;
        if found.version.is_empty() {
            return Err(LabError::engine(
                "it does not say its version",
                "a result without one cannot be used",
            ));
        }
        Ok(found)
    }

    fn estimate(&self, entries: &[EstimateRequest]) -> Result<Vec<Estimate>> {
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        self.ask(&Request::Estimate { entries: entries.to_vec() }, |event| match event {
            Event::Estimates { estimates } => {
                found = estimates;
                Ok(false)
            }
            other => Err(unexpected(&other)),
        })?;
        if found.len() != entries.len() {
            let what = format!("{} estimates for {} entries", found.len(), entries.len());
            return Err(LabError::engine(what, ""));
        }
        Ok(found)
    }

    fn probe(&self, threads: &[usize], bytes: u64) -> Result<Vec<Probe>> {
        let mut found = Vec::new();
        if threads.is_empty() {
            return Ok(found);
        }
        self.ask(&Request::Probe { threads: threads.to_vec(), bytes }, |event| match event {
            Event::Probe(probe) => {
                found.push(probe);
                Ok(found.len() < threads.len())
            }
            other => Err(unexpected(&other)),
        })?;
        Ok(found)
    }

    fn start(&self, job: &Job) -> Result<Box<dyn Running>> {
        Ok(Box::new(self.spawn(&Request::Measure(Box::new(job.clone())))?))
    }
}

fn unexpected(event: &Event) -> LabError {
    let text = serde_json::to_string(event).unwrap_or_default();
    LabError::engine(format!("it answered something else: {}", start_of(&text)), "")
}

fn start_of(text: &str) -> String {
    let mut short: String = text.trim().chars().take(120).collect();
    if short.len() < text.trim().len() {
        short.push('…');
    }
    short
}

/// The line of standard error that says that memory ran out, where one does.
pub(crate) fn out_of_memory(stderr_tail: &str) -> Option<&str> {
    let signs = ["memory allocation of", "out of memory", "cannot allocate memory", "bad_alloc"];
    let says_so = |line: &&str| {
        let line = line.to_ascii_lowercase();
        signs.iter().any(|s| line.contains(s))
    };
    stderr_tail.lines().find(says_so)
}

/// A sentence about the end of a process, with the line of its standard error that says most: that memory ran out, or the
/// last one. A backtrace ends with a note, which says nothing.
pub(crate) fn death(code: Option<i32>, signal: Option<i32>, stderr_tail: &str) -> String {
    let how = match (code, signal) {
        (_, Some(signal)) => format!("killed by signal {signal}"),
        (Some(code), None) => format!("exited with code {code} before it was done"),
        (None, None) => "gone without a word".to_owned(),
    };
    let says_something = |l: &&str| !l.trim().is_empty() && !l.trim_start().starts_with("note: ");
    match out_of_memory(stderr_tail).or_else(|| stderr_tail.lines().rev().find(says_something)) {
        Some(line) => format!("{how}: {}", start_of(line)),
        None => how,
    }
}

/// A child process with its reading threads.
struct Process {
    child: Child,
    lines: Receiver<Vec<u8>>,
    tail: Arc<Mutex<Vec<u8>>>,
    threads: Vec<JoinHandle<()>>,
    status: Option<ExitStatus>,
}

impl Process {
    /// The exit of a process that has closed its output: given a while to end by itself, then ended.
    fn exited(&mut self) -> Next {
        let patience = Instant::now() + Duration::from_secs(5);
        while self.status.is_none() {
            match self.child.try_wait() {
                Ok(Some(status)) => self.status = Some(status),
                Ok(None) if Instant::now() < patience => std::thread::sleep(Duration::from_millis(5)),
                _ => {
                    self.kill();
                    break;
                }
            }
        }
        for thread in self.threads.drain(..) {
            // A grandchild may hold the pipe open; the exit is known without the rest of its output.
            let patience = Instant::now() + Duration::from_millis(500);
            while !thread.is_finished() && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        Next::Exited {
            code: self.status.and_then(|s| s.code()),
            signal: self.status.and_then(signal),
            stderr_tail: String::from_utf8_lossy(&tail).into_owned(),
        }
    }
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_status: ExitStatus) -> Option<i32> {
    None
}

impl Running for Process {
    fn next(&mut self, timeout: Duration) -> Next {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => match serde_json::from_slice(&line) {
                Ok(event) => Next::Event(event),
                Err(e) => {
                    let text = String::from_utf8_lossy(&line);
                    Next::Garbled(format!("it wrote a line that is not an event ({e}): {}", start_of(&text)))
                }
            },
            Err(RecvTimeoutError::Timeout) => Next::TimedOut,
            Err(RecvTimeoutError::Disconnected) => self.exited(),
        }
    }

    fn kill(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill(); // already gone is fine
            self.status = self.child.wait().ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell(script: &str) -> ProcessEngine {
        ProcessEngine { program: "/bin/sh".into(), args: vec!["-c".into(), script.into()] }
    }

    #[test]
    fn speaks_the_protocol() {
        let engine = shell(
            r#"read request; case "$request" in
            *'"request":"probe"'*) echo '{"event":"probe","threads":1,"gb_s":8.5}'; echo '{"event":"probe","threads":2,"gb_s":12}';;
            *capabilities*) echo '{"event":"capabilities","engine":"e","version":"1","isa":"scalar","presets":[],"kv_dtypes":[],"methods":[],"workloads":[],"heads":[]}';;
            esac"#,
        );
        let probes = engine.probe(&[1, 2], 1 << 20).unwrap();
        assert_eq!(probes.iter().map(|p| p.gb_s).collect::<Vec<_>>(), [8.5, 12.0]);
        assert_eq!(engine.capabilities().unwrap().engine, "e");
    }

    #[test]
    fn a_line_that_is_not_an_event_is_named() {
        let error = shell("read r; echo hello").capabilities().unwrap_err().to_string();
        assert!(error.contains("not an event") && error.contains("hello"), "{error}");
    }

    #[test]
    fn deaths_are_told() {
        let error = shell("read r; echo memory allocation of 9 bytes failed >&2; kill -9 $$");
        let error = error.capabilities().unwrap_err().to_string();
        assert!(error.contains("signal 9") && error.contains("memory allocation of 9"), "{error}");
        let trace = "memory allocation of 7 bytes failed\nstack backtrace:\n   0: main\nnote: Some details are omitted, run \
                     with `RUST_BACKTRACE=full` for a verbose backtrace.\n";
        assert_eq!(death(None, Some(6), trace), "killed by signal 6: memory allocation of 7 bytes failed");
        assert_eq!(out_of_memory("all is well\n"), None);
        let panic = "thread main panicked:\nthe reason\nnote: run with `RUST_BACKTRACE=1`\n";
        assert!(death(Some(101), None, panic).ends_with(": the reason"));
        let error = shell("exit 3").capabilities().unwrap_err().to_string();
        assert!(error.contains("code 3"), "{error}");
        let missing = ProcessEngine { program: "/nonexistent/engine".into(), args: vec![] };
        assert!(missing.capabilities().unwrap_err().to_string().contains("/nonexistent/engine"));
    }

    #[test]
    fn kill_ends_a_process_that_hangs() {
        let mut process = shell("read r; exec sleep 1000").spawn(&Request::Capabilities).unwrap();
        assert_eq!(process.next(Duration::from_millis(20)), Next::TimedOut);
        process.kill();
        assert!(matches!(process.next(Duration::from_secs(5)), Next::Exited { signal: Some(9), .. }));
    }
}
