//! From a TOML document to a checked experiment, section by section.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use longbit_protocol::{Capabilities, ParamInfo};
use toml::de::{DeTable, DeValue};

use super::kv;
use super::named::{self, Named, suggest};
use super::sources::Inputs;
use super::walk::{At, Section, Source, integer, items, scalar};
use super::{Exclude, Experiment, MemoryLimit, OnExceed, Threads, units};
use crate::Complaint;
use crate::plan::{ExperimentMeta, NO_METHOD, SCHEMA};

/// Largest context and thread count that are taken for meant.
pub(super) const MAX_CONTEXT: u64 = 1 << 24;
const MAX_THREADS: u64 = 4096;
/// Largest batch that is taken for meant.
const MAX_BATCH: u64 = 1 << 16;
/// Largest product of the parameter lists of one `[[method]]`.
const MAX_VARIANTS: usize = 10_000;

/// The axes `context`, `kv_dtype` and `method`.
type Cached = (Option<Vec<usize>>, Option<Vec<String>>, Option<Vec<Named>>);

pub(super) type Listed<'a> = Vec<(&'a str, &'a [ParamInfo])>;

pub(super) fn read(file: &str, text: &str, caps: &Capabilities) -> Result<Experiment, Vec<Complaint>> {
    let source = Source::new(file.to_owned(), text);
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        source.syntax(error);
    }
    let experiment = if errors.is_empty() {
        let table = table.into_inner();
        // The complaints outlive the document, the document outlives the walk.
        let reader =
            Reader { source: &source, caps, dir: Path::new(file).parent().unwrap_or(Path::new("")).into() };
        reader.experiment(&Section::root(&source, &table))
    } else {
        None
    };
    let complaints = source.into_complaints();
    match experiment {
        Some(experiment) if complaints.is_empty() => Ok(experiment),
        _ => Err(complaints),
    }
}

pub(super) struct Reader<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) caps: &'a Capabilities,
    /// Directory of the file.
    pub(super) dir: PathBuf,
}

impl<'a> Reader<'a> {
    /// `None` only together with at least one complaint.
    fn experiment(&self, root: &Section<'a>) -> Option<Experiment> {
        match root.int("schema", 0, u64::from(u32::MAX)) {
            Some(at) if at.value != u64::from(SCHEMA) => {
                self.source.complain(&at.place, format!("schema {} is not known", at.value), "schema = 1");
            }
            None if !root.has("schema") => {
                self.source.complain(&root.missing("schema"), "schema is missing", "schema = 1");
            }
            _ => {}
        }
        let meta = self.meta(&root.section("experiment"));
        let model_section = root.section("model");
        let model = self.model(&model_section);
        let workload = root.section("workload");
        let inputs = self.workload(&workload, &model_section);
        let measure = root.section("measure");
        let seed = self.seed(&workload, &measure);
        let axes = root.section("axes");
        let threads = self.threads(&axes);
        let batches = self.batches(&axes);
        let tables = root.sections("method");
        let (contexts, kv_dtypes, methods) = match inputs.as_ref().is_some_and(|i| i.one_matrix) {
            true => self.nothing_cached(&axes, &tables),
            false => (self.contexts(&axes), self.kv_dtypes(&axes), self.methods(&axes, &tables)),
        };
        axes.end();
        workload.end();
        let excludes = root.sections("exclude");
        let excludes = match (&contexts, &kv_dtypes, &methods) {
            (Some(c), Some(k), Some(m)) => {
                let b = batches.as_deref().unwrap_or_default();
                excludes.iter().map(|e| self.exclude(e, c, b, k, m)).collect()
            }
            _ => Vec::new(),
        };
        let (measured, min_samples_p99, max_drift_pct) = self.measure(&measure);
        let limits = root.section("limits");
        let cell_timeout_s = limits.quantity("cell_timeout", units::duration).unwrap_or(1800.0);
        let max_rss = limits.quantity("max_rss", units::memory_limit).unwrap_or(MemoryLimit::Percent(90.0));
        let on_exceed =
            self.choice(&limits, "on_exceed", &[("skip", OnExceed::Skip), ("refuse", OnExceed::Refuse)]);
        limits.end();
        let verify = self.verify(
            &root.section("verify"),
            methods.as_deref().unwrap_or_default(),
            measured.quality_steps,
            inputs.as_ref().map(|i| i.text.is_some()),
        );
        let gate = self.gate(&root.section("gate"));
        root.end();
        let Inputs { workload, text, trace, .. } = inputs?;
        Some(Experiment {
            meta: meta?,
            dir: self.dir.clone(),
            model: model?,
            workload,
            text,
            trace,
            seed,
            contexts: contexts?,
            threads: threads?,
            batches: batches?,
            kv_dtypes: kv_dtypes?,
            methods: methods?,
            excludes,
            measure: measured,
            min_samples_p99,
            max_drift_pct,
            cell_timeout_s,
            max_rss,
            on_exceed: on_exceed.unwrap_or_default(),
            verify,
            gate,
        })
    }

    pub(super) fn required<T>(
        &self,
        section: &Section<'a>,
        key: &'static str,
        value: Option<T>,
    ) -> Option<T> {
        if value.is_none() && !section.has(key) {
            self.source.complain(&section.missing(key), format!("{key} is missing"), "");
        }
        value
    }

    pub(super) fn choice<T: Copy>(
        &self,
        section: &Section<'a>,
        key: &'static str,
        of: &[(&str, T)],
    ) -> Option<T> {
        let at = section.str(key)?;
        let found = of.iter().find(|(word, _)| *word == at.value).map(|(_, value)| *value);
        if found.is_none() {
            let words: Vec<&str> = of.iter().map(|(word, _)| *word).collect();
            self.source.complain(
                &at.place,
                format!("{:?} is not a value of {key}", at.value),
                suggest(&at.value, &words),
            );
        }
        found
    }

    fn meta(&self, section: &Section<'a>) -> Option<ExperimentMeta> {
        let name = self.required(section, "name", section.str("name"));
        let question = self.required(section, "question", section.str("question"));
        let analysis = section.str("analysis").map(|a| a.value.trim().to_owned()).unwrap_or_default();
        section.end();
        let name = name?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.value.is_empty()
            || name.value.len() > 64
            || name.value.starts_with('-')
            || !name.value.chars().all(plain)
        {
            let what = format!("{:?} is not a name of an experiment", name.value);
            self.source.complain(
                &name.place,
                what,
                "lower-case letters, digits and '-', e.g. \"long-context\"",
            );
        }
        Some(ExperimentMeta {
            name: name.value,
            question: question?.value.trim().to_owned(),
            analysis,
            ..ExperimentMeta::default()
        })
    }

    fn seed(&self, workload: &Section<'a>, measure: &Section<'a>) -> u64 {
        let of_workload = workload.int("seed", 0, u64::MAX);
        let of_measure = measure.int("seed", 0, u64::MAX);
        if let (Some(w), Some(m)) = (&of_workload, &of_measure)
            && w.value != m.value
        {
            let what = format!("measure.seed = {} differs from workload.seed = {}", m.value, w.value);
            self.source.complain(&m.place, what, "one seed drives both; remove one of the two");
        }
        of_workload.or(of_measure).map_or(1, |at| at.value)
    }

    fn axis<T: PartialEq>(
        &self,
        section: &Section<'a>,
        key: &'static str,
        take: impl Fn(At<&'a DeValue<'a>>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let found = self.required(section, key, section.items(key))?;
        if found.is_empty() {
            self.source.complain(&section.missing(key), format!("the axis {key} is empty"), "");
            return None;
        }
        let mut values = Vec::new();
        for at in found {
            let value = take(at)?;
            if !values.contains(&value) {
                values.push(value);
            }
        }
        Some(values)
    }

    fn contexts(&self, axes: &Section<'a>) -> Option<Vec<usize>> {
        self.axis(axes, "context", |at| match integer(at.value).filter(|v| *v <= MAX_CONTEXT) {
            Some(value) => usize::try_from(value).ok(),
            None => axes.wrong_type(&at, &format!("a whole number of tokens from 0 to {MAX_CONTEXT}")),
        })
    }

    fn threads(&self, axes: &Section<'a>) -> Option<Vec<Threads>> {
        self.axis(axes, "threads", |at| thread_count(axes, &at))
    }

    /// The axis `batch`; decode steps alone where it is not given.
    fn batches(&self, axes: &Section<'a>) -> Option<Vec<usize>> {
        if !axes.has("batch") {
            return Some(vec![1]);
        }
        self.axis(axes, "batch", |at| match integer(at.value).filter(|v| (1..=MAX_BATCH).contains(v)) {
            Some(value) => usize::try_from(value).ok(),
            None => axes.wrong_type(&at, &format!("a whole number of tokens from 1 to {MAX_BATCH}")),
        })
    }

    /// Axes of a workload that has neither cache nor attention: they have one point each, which says so.
    fn nothing_cached(&self, axes: &Section<'a>, tables: &[Section<'a>]) -> Cached {
        for key in ["context", "kv_dtype", "method"].into_iter().filter(|key| axes.has(key)) {
            let what = format!("{key} means nothing where one matrix is timed");
            self.source.complain(&axes.place_of(key), what, "remove it");
        }
        for table in tables {
            self.source.complain(
                &table.place,
                "a method means nothing where one matrix is timed",
                "remove it",
            );
        }
        let nothing = Named { name: NO_METHOD.to_owned(), params: BTreeMap::new() };
        (Some(vec![0]), Some(vec![NO_METHOD.to_owned()]), Some(vec![nothing]))
    }

    fn kv_dtypes(&self, axes: &Section<'a>) -> Option<Vec<String>> {
        let names: Vec<&str> = self.caps.kv_dtypes.iter().map(|k| k.name.as_str()).collect();
        self.axis(axes, "kv_dtype", |at| {
            let Some(text) = at.value.as_str() else { return axes.wrong_type(&at, "the name of a KV dtype") };
            if let Some(name) = kv::formats(text).find(|name| !names.contains(name)) {
                let unknown = format!("unknown KV dtype {name:?}");
                self.source.complain(&at.place, unknown, suggest(name, &names));
                return None;
            }
            let dtype = kv::canonical(text);
            if dtype.is_none() {
                let help = "one name for both, or one each: \"k=int8,v=int4\"";
                self.source.complain(&at.place, format!("{text:?} is not a KV dtype"), help);
            }
            dtype
        })
    }

    /// The axis `method`, with the variants that `[[method]]` tables define for bare names.
    fn methods(&self, axes: &Section<'a>, tables: &[Section<'a>]) -> Option<Vec<Named>> {
        let listed: Listed<'_> =
            self.caps.methods.iter().map(|m| (m.name.as_str(), m.params.as_slice())).collect();
        let mut defined: BTreeMap<String, Vec<Named>> = BTreeMap::new();
        let mut names = Vec::new();
        for table in tables {
            let Some(name) = self.required(table, "name", table.str("name")) else { continue };
            let variants = self.variants(&name, &table.section("params"), &listed);
            table.end();
            defined.entry(name.value.clone()).or_default().extend(variants);
            names.push(name);
        }
        let axis = self.required(axes, "method", axes.strs("method"))?;
        if axis.is_empty() {
            self.source.complain(&axes.missing("method"), "the axis method is empty", "");
            return None;
        }
        let mut methods: Vec<Named> = Vec::new();
        for at in &axis {
            let found = match defined.get(&at.value) {
                Some(variants) => variants.clone(),
                None => match named::parse("method", &at.value, &listed) {
                    Ok(method) => vec![method],
                    Err(wrong) => {
                        self.source.wrong(&at.place, wrong);
                        continue;
                    }
                },
            };
            for method in found {
                if !methods.contains(&method) {
                    methods.push(method);
                }
            }
        }
        for name in names {
            if !axis.iter().any(|at| at.value == name.value) {
                let what = format!("method {:?} is defined but not on the axis", name.value);
                self.source.complain(&name.place, what, format!("add {:?} to axes.method", name.value));
            }
        }
        Some(methods)
    }

    /// Every combination of the parameter lists of one `[[method]]`.
    fn variants(&self, name: &At<String>, params: &Section<'a>, listed: &Listed<'_>) -> Vec<Named> {
        let mut combinations = vec![BTreeMap::new()];
        for (key, at) in params.entries() {
            let mut values = Vec::new();
            for item in items(at.clone()) {
                match scalar(item.value) {
                    Some(text) => values.push(text),
                    None => {
                        params.wrong_type::<()>(&item, "a number, a word, or a list of them");
                    }
                }
            }
            // Checked alone first, so that the complaint stands at the line of the parameter.
            for text in &values {
                let one = BTreeMap::from([(key.clone(), text.clone())]);
                if let Err(wrong) = named::complete("method", &name.value, one, listed)
                    && listed.iter().any(|(n, _)| *n == name.value)
                {
                    self.source.wrong(&at.place, wrong);
                }
            }
            if combinations.len().saturating_mul(values.len()) > MAX_VARIANTS {
                let what = format!("the lists multiply to more than {MAX_VARIANTS} variants");
                self.source.complain(&at.place, what, "");
                return Vec::new();
            }
            combinations = combinations
                .into_iter()
                .flat_map(|c: BTreeMap<String, String>| {
                    let key = key.clone();
                    values.iter().map(move |v| {
                        let mut c = c.clone();
                        c.insert(key.clone(), v.clone());
                        c
                    })
                })
                .collect();
        }
        let mut found = Vec::new();
        for combination in combinations {
            match named::complete("method", &name.value, combination, listed) {
                Ok(method) => found.push(method),
                Err(wrong) => {
                    if !listed.iter().any(|(n, _)| *n == name.value) {
                        self.source.wrong(&name.place, wrong);
                    }
                    break;
                }
            }
        }
        found
    }

    fn exclude(
        &self,
        section: &Section<'a>,
        contexts: &[usize],
        batches: &[usize],
        kv: &[String],
        methods: &[Named],
    ) -> Exclude {
        let absent = |at: &At<&'a DeValue<'a>>, value: &str, axis: &str| {
            self.source.complain(
                &at.place,
                format!("{value} is not on the axis {axis}"),
                "nothing would be excluded",
            );
        };
        let mut exclude = Exclude::default();
        for at in section.items("context").unwrap_or_default() {
            match integer(at.value).and_then(|v| usize::try_from(v).ok()).filter(|v| contexts.contains(v)) {
                Some(value) => exclude.contexts.push(value),
                None => absent(&at, &scalar(at.value).unwrap_or_default(), "context"),
            }
        }
        for at in section.items("threads").unwrap_or_default() {
            exclude.threads.extend(thread_count(section, &at));
        }
        for at in section.items("batch").unwrap_or_default() {
            match integer(at.value).and_then(|v| usize::try_from(v).ok()).filter(|v| batches.contains(v)) {
                Some(value) => exclude.batches.push(value),
                None => absent(&at, &scalar(at.value).unwrap_or_default(), "batch"),
            }
        }
        for at in section.items("kv_dtype").unwrap_or_default() {
            match at.value.as_str().and_then(kv::canonical).filter(|v| kv.contains(v)) {
                Some(value) => exclude.kv_dtypes.push(value),
                None => absent(&at, &scalar(at.value).unwrap_or_default(), "kv_dtype"),
            }
        }
        let listed: Listed<'_> =
            self.caps.methods.iter().map(|m| (m.name.as_str(), m.params.as_slice())).collect();
        for at in section.items("method").unwrap_or_default() {
            let text = scalar(at.value).unwrap_or_default();
            let full = match text.contains(':') {
                true => {
                    named::parse("method", &text, &listed).map(|m| m.text()).unwrap_or_else(|_| text.clone())
                }
                false => text.clone(),
            };
            match methods.iter().any(|m| m.name == full || m.text() == full) {
                true => exclude.methods.push(full),
                false => absent(&at, &text, "method"),
            }
        }
        if !["context", "threads", "batch", "kv_dtype", "method"].iter().any(|key| section.has(key)) {
            self.source.complain(
                &section.place,
                "this [[exclude]] names no axis",
                "it would exclude everything",
            );
        }
        exclude.reason = section.str("reason").map(|at| at.value).unwrap_or_default();
        section.end();
        exclude
    }
}

fn thread_count<'a>(section: &Section<'a>, at: &At<&'a DeValue<'a>>) -> Option<Threads> {
    match at.value.as_str() {
        Some("all") => return Some(Threads::All(0)),
        Some("1..all") => return Some(Threads::Doubling),
        Some(text) => {
            let more = text.strip_prefix("all+").and_then(|n| n.parse::<u16>().ok());
            if let Some(more) = more.filter(|n| u64::from(*n) <= MAX_THREADS) {
                return Some(Threads::All(more.into()));
            }
        }
        None => {}
    }
    match integer(at.value).filter(|v| (1..=MAX_THREADS).contains(v)).and_then(|v| usize::try_from(v).ok()) {
        Some(count) => Some(Threads::Count(count)),
        None => section.wrong_type(
            at,
            &format!("\"all\", \"all+1\", \"1..all\" or a whole number from 1 to {MAX_THREADS}"),
        ),
    }
}
