//! `longbit inspect`: what a model file holds, what Longbit makes of it, and what it costs to run.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use longbit::{Checkpoint, Listing, ModelBytes, TensorEntry};
use longbit_lab::Exit;
use serde_json::{Value, json};

use crate::Failure;
use crate::model_args::FileArgs;

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// Checkpoint directory, GGUF file or safetensors file.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// List every tensor, not one line for all layers.
    #[arg(long)]
    tensors: bool,
    /// Leave out the SHA-256, which reads the whole file.
    #[arg(long)]
    no_hash: bool,
    /// One JSON document with every tensor.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    file: FileArgs,
}

pub(crate) fn run(args: &InspectArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let listing = longbit::list(&args.path)?;
    let opened = Checkpoint::open(&args.path, &args.file.options());
    let sha256 = match &opened {
        Ok(checkpoint) if !args.no_hash => Some(checkpoint.sha256()?),
        _ => None,
    };
    let facts = facts(&listing, opened.as_ref().ok(), sha256);
    if args.json {
        let tensors: Vec<Value> = listing
            .tensors
            .iter()
            .map(|t| json!({ "name": t.name, "type": t.kind, "shape": t.shape, "bytes": t.bytes }))
            .collect();
        let metadata: serde_json::Map<String, Value> =
            listing.metadata.iter().map(|(k, v)| (k.clone(), v.as_str().into())).collect();
        let facts: serde_json::Map<String, Value> =
            facts.into_iter().map(|(k, v)| (k.replace(' ', "_"), v.into())).collect();
        let refusal = opened.err().map(|e| e.to_string());
        let document =
            json!({ "model": facts, "refused": refusal, "metadata": metadata, "tensors": tensors });
        writeln!(out, "{document:#}")?;
        return Ok(Exit::Ok);
    }
    writeln!(out, "{}", plain(&["", ""], &[], facts.iter().map(|(k, v)| vec![k.to_string(), v.clone()])))?;
    if !listing.metadata.is_empty() {
        let rows = listing.metadata.iter().map(|(k, v)| vec![k.clone(), v.clone()]);
        writeln!(out, "\n{}", plain(&["key", "value"], &[], rows))?;
    }
    let rows = match args.tensors {
        true => listing.tensors.iter().map(|t| row(t, 1)).collect(),
        false => grouped(&listing),
    };
    writeln!(out, "\n{}", plain(&["tensor", "count", "type", "shape", "bytes"], &[1, 4], rows))?;
    match opened {
        Ok(_) => Ok(Exit::Ok),
        Err(error) => {
            writeln!(out, "\nThis file cannot be run: {error}")?;
            Ok(Exit::Usage)
        }
    }
}

/// What a person wants to know first.
fn facts(
    listing: &Listing,
    checkpoint: Option<&Checkpoint>,
    sha256: Option<String>,
) -> Vec<(&'static str, String)> {
    let bytes: u64 = listing.tensors.iter().filter_map(|t| t.bytes).sum();
    let mut facts = vec![
        ("container", listing.container.clone()),
        ("files", listing.files.len().to_string()),
        ("tensor bytes", bytes.to_string()),
    ];
    if let Some(checkpoint) = checkpoint {
        let c = checkpoint.config();
        let head = checkpoint.exact_head();
        let cost = ModelBytes::of(c, head);
        facts.extend([
            ("parameters", c.parameters().to_string()),
            ("layers", c.layers.to_string()),
            ("hidden", c.hidden.to_string()),
            ("intermediate", c.intermediate.to_string()),
            ("heads", format!("{} of {}, {} for keys and values", c.heads, c.head_dim, c.kv_heads)),
            ("vocabulary", c.vocab.to_string()),
            ("activation", c.activation.as_str().to_string()),
            ("sub-norms", if c.sub_norms { "yes" } else { "no" }.to_string()),
            ("head", if c.tied_head { "tied to the embedding" } else { "its own" }.to_string()),
            ("rope theta", c.rope_theta.to_string()),
            ("trained positions", c.trained_positions.to_string()),
            ("weight bytes in memory", format!("{} with a {} head", cost.resident, head.as_str())),
            ("weight bytes per token", format!("{} with a {} head", cost.per_token, head.as_str())),
            ("bf16 KV bytes per position", (4 * c.layers * c.kv_rows()).to_string()),
        ]);
    }
    facts.extend(sha256.map(|hash| ("sha256", hash)));
    facts
}

fn row(t: &TensorEntry, count: usize) -> Vec<String> {
    let bytes = t.bytes.map_or("?".into(), |b| b.to_string());
    vec![t.name.clone(), count.to_string(), t.kind.clone(), format!("{:?}", t.shape), bytes]
}

/// One line for the tensors of all layers that are alike; numbers in their names become `N`.
fn grouped(listing: &Listing) -> Vec<Vec<String>> {
    let mut groups: Vec<(TensorEntry, usize)> = Vec::new();
    for tensor in &listing.tensors {
        let part = |p: &str| if p.parse::<usize>().is_ok() { "N".to_string() } else { p.to_string() };
        let name = tensor.name.split('.').map(part).collect::<Vec<_>>().join(".");
        let like = TensorEntry { name, ..tensor.clone() };
        match groups
            .iter_mut()
            .find(|(g, _)| (&g.name, &g.kind, &g.shape) == (&like.name, &like.kind, &like.shape))
        {
            Some((group, count)) => {
                group.bytes = group.bytes.zip(like.bytes).map(|(a, b)| a + b);
                *count += 1;
            }
            None => groups.push((like, 1)),
        }
    }
    groups.iter().map(|(group, count)| row(group, *count)).collect()
}

/// An aligned table without lines; columns `right` are aligned right.
fn plain(header: &[&str], right: &[usize], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if header.iter().any(|h| !h.is_empty()) {
        table.set_header(header);
    }
    rows.into_iter().for_each(|row| {
        table.add_row(row);
    });
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}
