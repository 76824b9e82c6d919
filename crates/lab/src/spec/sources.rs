//! Where the numbers of a run come from: the sections `[model]` and `[workload]`.
//!
//! A file that decides numbers is known by the SHA-256 of its bytes: a changed one is another plan, a moved one is not. What
//! is in a trace the engine knows; here its bytes are hashed.

use std::io::Read;

use longbit_protocol::{MAX_TEXT_BYTES, MAX_TRACE_BYTES, ModelSpec, TextFile, TraceFile, WorkloadInfo};
use sha2::{Digest, Sha256};

use super::named::{self, suggest};
use super::read::{Listed, MAX_CONTEXT, Reader};
use super::units::show_bytes;
use super::walk::{At, Section};
use super::{TextPlan, hex, resolve};

/// Longest context that is run through a model unless the file says otherwise. Beyond it a prompt takes hours on the
/// machines that this is for.
const PREFILL_LIMIT: usize = 8192;

/// How to mend a path.
const RELATIVE: &str = "a path is relative to the directory of the experiment file";

/// What cells run on.
pub(super) struct Inputs {
    /// The workload with all its parameters.
    pub(super) workload: String,
    /// The text that it reads, if it reads one.
    pub(super) text: Option<TextPlan>,
    /// The trace that it replays, if it replays one.
    pub(super) trace: Option<TraceFile>,
    /// It times one matrix.
    pub(super) one_matrix: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn model(&self, section: &Section<'a>) -> Option<ModelSpec> {
        let preset = section.str("preset");
        let path = section.str("path");
        let head = section.str("head");
        let seed = section.int("seed", 0, u64::MAX).map_or(1, |at| at.value);
        let sha256 = section.str("sha256").and_then(|at| self.sha256(&at));
        let said = [
            ("i2s", &self.caps.i2s),
            ("activation", &self.caps.activations),
            ("weights", &self.caps.weights),
        ];
        let [i2s, activation, weights] = said.map(|(key, words)| self.word(section, key, words));
        section.end();
        match (&preset, &path) {
            (Some(_), Some(path)) => {
                self.source.complain(
                    &path.place,
                    "a model is either a preset or a path",
                    "remove one of the two",
                );
                return None;
            }
            (None, None) => {
                if !section.has("preset") && !section.has("path") {
                    let help = match self.caps.presets.first() {
                        Some(p) => format!("preset = {:?}, or path = \"…\"", p.name),
                        None => "path = \"…\"".to_owned(),
                    };
                    self.source.complain(&section.missing("preset"), "the model is missing", help);
                }
                return None;
            }
            _ => {}
        }
        if let Some(at) = &preset {
            let names: Vec<&str> = self.caps.presets.iter().map(|p| p.name.as_str()).collect();
            // `matrix:ROWSxCOLUMNS` stands for all names that begin so; the engine checks the rest.
            let known = |n: &&str| {
                *n == at.value
                    || n.split_once(':').is_some_and(|(n, _)| at.value.starts_with(&format!("{n}:")))
            };
            if !names.iter().any(known) {
                self.source.complain(
                    &at.place,
                    format!("unknown preset {:?}", at.value),
                    suggest(&at.value, &names),
                );
            }
        }
        if path.is_none() {
            for key in ["sha256", "i2s", "activation"].into_iter().filter(|key| section.has(key)) {
                let place = section.place_of(key);
                self.source.complain(
                    &place,
                    format!("{key} speaks of a checkpoint"),
                    "give path, or remove it",
                );
            }
        }
        if let Some(at) = path.as_ref().filter(|at| at.value.is_empty()) {
            self.source.complain(&at.place, "path is empty", "");
        }
        if let Some(at) = head.as_ref().filter(|at| !self.caps.heads.contains(&at.value)) {
            let what = format!("unknown number format {:?} of the head", at.value);
            self.source.complain(&at.place, what, suggest(&at.value, &self.caps.heads));
        }
        Some(ModelSpec {
            preset: preset.map(|at| at.value).unwrap_or_default(),
            path: path.map(|at| at.value).unwrap_or_default(),
            head: head.map_or_else(|| "bf16".to_owned(), |at| at.value),
            seed,
            sha256: sha256.unwrap_or_default(),
            i2s: i2s.unwrap_or_default(),
            activation: activation.unwrap_or_default(),
            weights: weights.unwrap_or_default(),
        })
    }

    /// 64 hexadecimal digits, in lower case.
    fn sha256(&self, at: &At<String>) -> Option<String> {
        if at.value.len() == 64 && at.value.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Some(at.value.to_ascii_lowercase());
        }
        self.source.complain(
            &at.place,
            format!("{:?} is not a SHA-256", at.value),
            "64 hexadecimal digits, as sha256sum prints them",
        );
        None
    }

    /// One of the words that the engine lists.
    fn word(&self, section: &Section<'a>, key: &'static str, words: &[String]) -> Option<String> {
        let at = section.str(key)?;
        if words.contains(&at.value) {
            return Some(at.value);
        }
        self.source.complain(
            &at.place,
            format!("{:?} is not a value of {key}", at.value),
            suggest(&at.value, words),
        );
        None
    }

    /// The section `[workload]`.
    pub(super) fn workload(&self, section: &Section<'a>, model: &Section<'a>) -> Option<Inputs> {
        let at = self.required(section, "name", section.str("name"))?;
        let (name, rest) = at.value.split_once(':').unwrap_or((&at.value, ""));
        if let Some(info) = self.caps.workloads.iter().find(|w| w.replays && w.name == name.trim()) {
            return self.replayed(section, &at, info, rest);
        }
        let listed: Listed<'_> =
            self.caps.workloads.iter().map(|w| (w.name.as_str(), w.params.as_slice())).collect();
        let workload = match named::parse("workload", &at.value, &listed) {
            Ok(workload) => workload,
            Err(wrong) => {
                self.source.wrong(&at.place, wrong);
                return None;
            }
        };
        let reads_text = self.caps.workloads.iter().any(|w| w.name == workload.name && w.reads_text);
        if !reads_text {
            self.no_text(section, &workload.name);
            let one_matrix = self.caps.workloads.iter().any(|w| w.name == workload.name && w.one_matrix);
            return Some(Inputs { workload: workload.text(), text: None, trace: None, one_matrix });
        }
        let limit = section.int("prefill_limit", 1, MAX_CONTEXT);
        let file = self.required(section, "file", section.str("file"));
        if !model.has("path") {
            let what = format!(
                "the workload {:?} runs a text through a checkpoint, and [model] names none",
                workload.name
            );
            self.source.complain(&at.place, what, "[model] path = \"…\" in place of a preset");
        }
        let file = self.text(&file?)?;
        // Enough digits to tell texts apart in a table; the identity of a cell takes all.
        let name = format!("{}:sha256={}", workload.text(), &file.sha256[..12]);
        let prefill_limit = limit.map_or(PREFILL_LIMIT, |at| usize::try_from(at.value).unwrap_or(usize::MAX));
        let text = Some(TextPlan { file, prefill_limit });
        Some(Inputs { workload: name, text, trace: None, one_matrix: false })
    }

    /// Complains about the keys of a text.
    fn no_text(&self, section: &Section<'a>, workload: &str) {
        for key in ["file", "prefill_limit"].into_iter().filter(|key| section.has(key)) {
            let what = format!("the workload {workload:?} reads no text, so it has no {key}");
            self.source.complain(
                &section.place_of(key),
                what,
                "remove it, or take a workload that reads one",
            );
        }
    }

    /// A workload `file:PATH`: a recorded trace that is there, known by its bytes.
    fn replayed(
        &self,
        section: &Section<'a>,
        at: &At<String>,
        info: &WorkloadInfo,
        path: &str,
    ) -> Option<Inputs> {
        self.no_text(section, &info.name);
        let path = path.trim();
        if path.is_empty() {
            let help =
                format!("name = \"{}:PATH\", relative to the directory of the experiment file", info.name);
            self.source.complain(&at.place, format!("the workload {:?} needs a file", info.name), help);
            return None;
        }
        let resolved = resolve(&self.dir, path);
        let help = ["record fewer layers, or a shorter prompt", "`longbit capture` records a trace"];
        self.regular(at, &resolved, MAX_TRACE_BYTES, help)?;
        let sha256 = match sha256_of(&resolved) {
            Ok(sha256) => sha256,
            Err(e) => {
                self.source.complain(&at.place, format!("cannot read {resolved}: {e}"), RELATIVE);
                return None;
            }
        };
        let workload = format!("{}:sha256={}", info.name, &sha256[..12]);
        let trace = Some(TraceFile { path: path.to_owned(), sha256 });
        Some(Inputs { workload, text: None, trace, one_matrix: false })
    }

    /// Complains where `path` is no file, or one that is larger than `most` or empty; `help` is for these two.
    fn regular(&self, at: &At<String>, path: &str, most: u64, help: [&str; 2]) -> Option<()> {
        let (what, help) = match std::fs::metadata(path) {
            Err(e) => (format!("cannot read {path}: {e}"), RELATIVE),
            Ok(m) if !m.is_file() => (format!("{path} is not a file"), RELATIVE),
            Ok(m) if m.len() > most => (
                format!("{path} has {}; at most {} are taken", show_bytes(m.len()), show_bytes(most)),
                help[0],
            ),
            Ok(m) if m.len() == 0 => (format!("{path} is empty"), help[1]),
            Ok(_) => return Some(()),
        };
        self.source.complain(&at.place, what, help);
        None
    }

    /// A text file that is there, with the hash of its bytes.
    fn text(&self, at: &At<String>) -> Option<TextFile> {
        let path = resolve(&self.dir, &at.value);
        let fail = |what: String, help: &str| {
            self.source.complain(&at.place, what, help);
            None
        };
        if at.value.is_empty() {
            return fail("file is empty".to_owned(), "the path of a text file");
        }
        let help = ["cut off what no context reaches", "a text long enough for the longest context"];
        self.regular(at, &path, MAX_TEXT_BYTES, help)?;
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) => return fail(format!("cannot read {path}: {e}"), RELATIVE),
        };
        if let Err(e) = std::str::from_utf8(&bytes) {
            let what = format!("{path} is not UTF-8 text: wrong at byte {}", e.valid_up_to());
            return fail(what, "convert it, e.g. with iconv -t UTF-8");
        }
        Some(TextFile { path: at.value.clone(), sha256: hex(&Sha256::digest(&bytes)) })
    }
}

/// Of the bytes of a file, a piece at a time; lower-case hexadecimal.
fn sha256_of(path: &str) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let (mut hash, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(n) => hash.update(&piece[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
