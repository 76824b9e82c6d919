//! From axes to cells: multiplying out, identities, and narrowing by flags.

use longbit_protocol::{Capabilities, Measure, ModelSpec};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{PlannedCell, Predicted};
use crate::analyse::label::distinct;
use crate::spec::kv;
use crate::spec::named::{self, suggest};
use crate::spec::{Exclude, Experiment, hex};
use crate::{LabError, Result};

/// Cells with more threads a CPU than this are not measured: they would only wait for each other.
const MAX_THREADS_A_CPU: usize = 4;

/// Which cells of an experiment are wanted, from flags.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// `-f` and `-F`, in the order of the command line; the last that matches a cell's name decides.
    pub filters: Vec<Filter>,
    /// `-m`: bare names or full spellings; empty keeps all.
    pub methods: Vec<String>,
    /// `--set axis=v1,v2`: keeps these points of an axis of the file.
    pub set: Vec<String>,
}

/// One `-f` or `-F`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Part of a cell's name.
    pub text: String,
    /// `-F`: cells that match are left out.
    pub not: bool,
}

/// Everything that decides the numbers of a cell, in the order in which it is hashed.
#[derive(Serialize)]
struct Canonical<'a> {
    model: &'a ModelSpec,
    context: usize,
    threads: usize,
    kv_dtype: &'a str,
    method: String,
    workload: &'a str,
    seed: u64,
    gen_tokens: u32,
    warmup_tokens: u32,
    quality_steps: u32,
    pin: bool,
    /// All of the hash of which the workload shows a part. Where the text lies does not matter.
    #[serde(skip_serializing_if = "Option::is_none")]
    text_sha256: Option<&'a str>,
    /// As of a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_sha256: Option<&'a str>,
    /// Left out for decode steps, which were there first.
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<usize>,
}

/// 16 hexadecimal digits of the JSON of `value`.
pub(super) fn short_hash<T: Serialize>(value: &T) -> Result<String> {
    let text = serde_json::to_vec(value)
        .map_err(|e| LabError::engine(format!("a configuration cannot be written as JSON: {e}"), ""))?;
    Ok(hex(&Sha256::digest(&text)[..8]))
}

/// Identity of a cell: equal exactly when everything that decides its numbers is equal. The numbers of repetitions
/// and of seeds and the size of the probe are not part of it: they change how well a number is known, not what it is.
///
/// # Errors
/// Only where the configuration cannot be written as JSON.
pub fn cell_id(cell: &PlannedCell, measure: &Measure) -> Result<String> {
    short_hash(&Canonical {
        model: &cell.model,
        context: cell.context,
        threads: cell.threads,
        kv_dtype: &cell.kv_dtype,
        method: cell.method_string(),
        workload: &cell.workload,
        seed: cell.seed,
        gen_tokens: measure.gen_tokens,
        warmup_tokens: measure.warmup_tokens,
        quality_steps: measure.quality_steps,
        pin: measure.pin,
        text_sha256: cell.text.as_ref().map(|t| t.sha256.as_str()),
        trace_sha256: cell.trace.as_ref().map(|t| t.sha256.as_str()),
        batch: Some(cell.batch).filter(|&b| b != 1),
    })
}

/// The cells of an experiment on a machine that allows `cpus`, in the order context, KV dtype, method, threads,
/// batch.
/// Excluded cells and those with more than four threads a CPU carry the reason in `skip`; nothing is
/// predicted yet.
///
/// # Errors
/// As [`cell_id`].
pub fn expand(experiment: &Experiment, cpus: usize) -> Result<Vec<PlannedCell>> {
    let e = experiment;
    let threads = distinct(e.threads.iter().flat_map(|t| t.resolve(cpus)));
    let mut cells = Vec::new();
    for &context in &e.contexts {
        for kv_dtype in &e.kv_dtypes {
            for method in &e.methods {
                for &threads in &threads {
                    for &batch in &e.batches {
                        let mut cell = PlannedCell {
                            id: String::new(),
                            name: name(e, context, threads, kv_dtype, &method.text(), batch),
                            model: e.model.clone(),
                            context,
                            threads,
                            batch,
                            kv_dtype: kv_dtype.clone(),
                            method: method.name.clone(),
                            method_params: method.params.clone(),
                            workload: e.workload.clone(),
                            text: e.text.as_ref().map(|t| t.file.clone()),
                            trace: e.trace.clone(),
                            seed: e.seed,
                            predicted: Predicted::default(),
                            skip: None,
                        };
                        cell.id = cell_id(&cell, &e.measure)?;
                        cell.skip = skip(e, &cell, cpus);
                        cells.push(cell);
                    }
                }
            }
        }
    }
    Ok(cells)
}

/// For people and filters.
fn name(e: &Experiment, context: usize, threads: usize, kv: &str, method: &str, batch: usize) -> String {
    let mut name =
        format!("{}/context={context}/threads={threads}/kv={kv}/method={method}", e.meta.full_name());
    if batch != 1 {
        name.push_str(&format!("/batch={batch}"));
    }
    name
}

/// Why a cell is not run, as far as the experiment and the CPUs tell.
fn skip(e: &Experiment, cell: &PlannedCell, cpus: usize) -> Option<String> {
    if let Some(exclude) = e.excludes.iter().find(|x| excludes(x, cell, cpus)) {
        return Some(match &exclude.reason {
            r if r.is_empty() => "excluded by the experiment".to_owned(),
            r => format!("excluded: {r}"),
        });
    }
    (cell.threads > cpus.saturating_mul(MAX_THREADS_A_CPU)).then(|| {
        format!("{} threads on {cpus} CPUs: at most {MAX_THREADS_A_CPU} a CPU are measured", cell.threads)
    })
}

fn excludes(exclude: &Exclude, cell: &PlannedCell, cpus: usize) -> bool {
    let full = cell.method_string();
    (exclude.batches.is_empty() || exclude.batches.contains(&cell.batch))
        && (exclude.contexts.is_empty() || exclude.contexts.contains(&cell.context))
        && (exclude.threads.is_empty()
            || exclude.threads.iter().any(|t| t.resolve(cpus).contains(&cell.threads)))
        && (exclude.kv_dtypes.is_empty() || exclude.kv_dtypes.contains(&cell.kv_dtype))
        && (exclude.methods.is_empty() || exclude.methods.iter().any(|m| *m == cell.method || *m == full))
}

/// Keeps what the flags ask for.
///
/// # Errors
/// [`LabError::Invalid`] for an unknown axis, a point that the file does not have, or when nothing is left.
pub fn select(
    mut cells: Vec<PlannedCell>,
    selection: &Selection,
    capabilities: &Capabilities,
) -> Result<Vec<PlannedCell>> {
    for set in &selection.set {
        let at = format!("--set {set}");
        let Some((axis, values)) = set.split_once('=') else {
            return Err(LabError::invalid("--set needs axis=value", at, "e.g. --set context=2048,8192"));
        };
        let axis = axis.trim();
        let of: fn(&PlannedCell) -> Vec<String> = match axis {
            "context" => |c| vec![c.context.to_string()],
            "threads" => |c| vec![c.threads.to_string()],
            "batch" => |c| vec![c.batch.to_string()],
            "kv_dtype" | "kv" => |c| vec![c.kv_dtype.clone()],
            "method" => |c| vec![c.method.clone(), c.method_string()],
            other => {
                let help = suggest(other, &["context", "threads", "batch", "kv_dtype", "method"]);
                return Err(LabError::invalid(format!("unknown axis {other:?}"), at, help));
            }
        };
        let wanted: Vec<String> = split_values(values);
        narrow(&mut cells, axis, &wanted, &at, of, capabilities)?;
    }
    if !selection.methods.is_empty() {
        let at = format!("--method {}", selection.methods.join(" "));
        let wanted: Vec<String> = selection.methods.iter().flat_map(|m| split_values(m)).collect();
        let of = |c: &PlannedCell| vec![c.method.clone(), c.method_string()];
        narrow(&mut cells, "method", &wanted, &at, of, capabilities)?;
    }
    if let Some(first) = selection.filters.first() {
        cells.retain(|cell| {
            let last = selection.filters.iter().rev().find(|f| cell.name.contains(&f.text));
            last.map_or(first.not, |f| !f.not)
        });
    }
    if cells.is_empty() {
        return Err(LabError::invalid(
            "the filters leave no cell",
            "",
            "`longbit plan` lists the names of the cells",
        ));
    }
    Ok(cells)
}

fn narrow(
    cells: &mut Vec<PlannedCell>,
    axis: &str,
    wanted: &[String],
    at: &str,
    of: impl Fn(&PlannedCell) -> Vec<String>,
    capabilities: &Capabilities,
) -> Result<()> {
    let listed: Vec<_> =
        capabilities.methods.iter().map(|m| (m.name.as_str(), m.params.as_slice())).collect();
    let mut full = Vec::new();
    for value in wanted {
        let spelled = match axis {
            "method" if value.contains(':') => named::parse("method", value, &listed).ok().map(|m| m.text()),
            "kv_dtype" | "kv" => kv::canonical(value),
            _ => None,
        };
        let value = spelled.unwrap_or_else(|| value.clone());
        if !cells.iter().any(|c| of(c).contains(&value)) {
            let mut known: Vec<String> = cells.iter().filter_map(|c| of(c).pop()).collect();
            known.dedup();
            known.sort();
            known.dedup();
            let help = format!("flags only narrow an axis; {}", suggest(&value, &known));
            return Err(LabError::invalid(format!("{value} is not on the axis {axis}"), at, help));
        }
        full.push(value);
    }
    cells.retain(|c| of(c).iter().any(|v| full.contains(v)));
    Ok(())
}

/// Splits at commas, except inside the parameters of a method, `dense,window:sinks=4,window=8`, and between the keys and
/// the values of a KV dtype, `bf16,k=int8,v=int4`.
fn split_values(text: &str) -> Vec<String> {
    let mut values: Vec<String> = Vec::new();
    for part in text.split(',').map(str::trim) {
        match values.last_mut() {
            Some(last)
                if part.contains('=')
                    && !part.contains(':')
                    && (last.contains(':') || last.matches('=').count() == 1) =>
            {
                last.push(',');
                last.push_str(part);
            }
            _ => values.push(part.to_owned()),
        }
    }
    values
}
