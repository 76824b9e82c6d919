//! `longbit inspect`: what a model file holds, what Longbit makes of it, and what it costs to run.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use longbit::gguf::shown;
use longbit::{Checkpoint, HeadFormat, Listing, ModelBytes, ModelConfig, TensorEntry};
use longbit_lab::Exit;
use serde_json::{Value, json};

use crate::Failure;
use crate::model_args::FileArgs;

/// Rows of a table, at the most.
const MOST_ROWS: usize = 200;

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
    let state = if listing.directory.is_none() && listing.container == "safetensors" {
        args.file.refuse_for("a safetensors file on its own")?;
        State::Part
    } else {
        match Checkpoint::open(&args.path, &args.file.options(&args.path)?) {
            Ok(checkpoint) => State::Model(Box::new(checkpoint)),
            Err(error) => State::Refused(error.to_string()),
        }
    };
    let sha256 = if args.no_hash { None } else { Some(listing.sha256()?) };
    match args.json {
        // As one text: standard output goes out line by line.
        true => out.write_all(format!("{:#}\n", document(&listing, &state, sha256)).as_bytes())?,
        false => tables(args, &listing, &state, sha256, out)?,
    }
    Ok(if matches!(state, State::Refused(_)) { Exit::Usage } else { Exit::Ok })
}

/// What Longbit makes of what is listed.
enum State {
    /// It can be run.
    Model(Box<Checkpoint>),
    /// It cannot, and why.
    Refused(String),
    /// A safetensors file: what it means stands in the configuration beside it.
    Part,
}

impl State {
    fn checkpoint(&self) -> Option<&Checkpoint> {
        match self {
            State::Model(checkpoint) => Some(checkpoint),
            _ => None,
        }
    }
}

/// The head formats to tell the price of: the one that other verbs take, and the one that holds the tables exactly.
fn heads(checkpoint: &Checkpoint) -> Vec<HeadFormat> {
    let mut heads = vec![HeadFormat::Bf16, checkpoint.exact_head()];
    heads.dedup();
    heads
}

fn tensor_bytes(listing: &Listing) -> u64 {
    listing.tensors.iter().filter_map(|t| t.bytes).fold(0, u64::saturating_add)
}

/// Bytes of the keys and values of a position in bf16.
fn kv_bytes(c: &ModelConfig) -> usize {
    4 * c.layers * c.kv_rows()
}

/// All of it, for programs: names, keys and strings whole, numbers as numbers, null for what is not known.
fn document(listing: &Listing, state: &State, sha256: Option<String>) -> Value {
    let model = state.checkpoint().map(|checkpoint| {
        let c = checkpoint.config();
        let (embedding, head) = checkpoint.tables();
        let cost = |format: HeadFormat| {
            let bytes = ModelBytes::of(c, format);
            json!({
                "head": format.as_str(),
                "exact": format == checkpoint.exact_head(),
                "weight_bytes_in_memory": bytes.resident,
                "weight_bytes_per_token": bytes.per_token,
            })
        };
        json!({
            "parameters": c.parameters(),
            "layers": c.layers,
            "hidden": c.hidden,
            "intermediate": c.intermediate,
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "vocabulary": c.vocab,
            "activation": c.activation.as_str(),
            "sub_norms": c.sub_norms,
            "rope_theta": c.rope_theta,
            "trained_positions": c.trained_positions,
            "tied_head": c.tied_head,
            "embedding_type": embedding.name(),
            "head_type": head.map(|head| head.name()),
            "bf16_kv_bytes_per_position": kv_bytes(c),
            "costs": heads(checkpoint).into_iter().map(cost).collect::<Vec<_>>(),
        })
    });
    let refused = match state {
        State::Refused(why) => Some(why),
        _ => None,
    };
    let tensor =
        |t: &TensorEntry| json!({ "name": t.name, "type": t.kind, "shape": t.shape, "bytes": t.bytes });
    let keys = listing.metadata.iter().map(|(key, value)| (key.to_string(), json_of(value)));
    json!({
        "container": listing.container,
        "files": listing.files.iter().map(|file| file.to_string_lossy()).collect::<Vec<_>>(),
        "sha256": sha256,
        "tensor_bytes": tensor_bytes(listing),
        "model": model,
        "refused": refused,
        "metadata": keys.collect::<serde_json::Map<_, _>>(),
        "tensors": listing.tensors.iter().map(tensor).collect::<Vec<_>>(),
    })
}

/// A value; of an array its type and length. A number that JSON lacks is null.
fn json_of(value: &longbit::gguf::Value) -> Value {
    use longbit::gguf::Value as Key;
    match value {
        Key::U8(v) => json!(v),
        Key::I8(v) => json!(v),
        Key::U16(v) => json!(v),
        Key::I16(v) => json!(v),
        Key::U32(v) => json!(v),
        Key::I32(v) => json!(v),
        Key::U64(v) => json!(v),
        Key::I64(v) => json!(v),
        // Its own digits: as an f64 it would be written with those of the nearest one.
        Key::F32(v) => json!(v.to_string().parse::<f64>().ok()),
        Key::F64(v) => json!(v),
        Key::Bool(v) => json!(v),
        Key::String(v) => json!(v),
        Key::Array(v) => json!({ "type": v.type_name(), "length": v.len() }),
    }
}

fn tables(
    args: &InspectArgs,
    listing: &Listing,
    state: &State,
    sha256: Option<String>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let facts = facts(listing, state.checkpoint(), sha256);
    writeln!(out, "{}", plain(&["", ""], &[], facts.into_iter().map(|(k, v)| vec![k.to_string(), v])))?;
    if !listing.metadata.is_empty() {
        let rows = listing.metadata.iter().map(|(key, value)| vec![shown(key), value.to_string()]);
        writeln!(out, "\n{}", plain(&["key", "value"], &[], rows.take(MOST_ROWS)))?;
        more(listing.metadata.len(), out)?;
    }
    let header = ["tensor", "count", "type", "shape", "bytes"];
    if args.tensors {
        writeln!(out, "\n{}", plain(&header, &[1, 4], listing.tensors.iter().map(|t| row(t, 1))))?;
    } else {
        let groups = grouped(&listing.tensors);
        let rows = groups.iter().take(MOST_ROWS).map(|group| row(&group.entry, group.count));
        writeln!(out, "\n{}", plain(&header, &[1, 4], rows))?;
        more(groups.len(), out)?;
    }
    match state {
        State::Model(_) => {}
        State::Refused(why) => writeln!(out, "\nThis cannot be run: {why}")?,
        State::Part => writeln!(
            out,
            "\nThis is a file of tensors; what can be run is the directory with its config.json."
        )?,
    }
    Ok(())
}

/// Says how many rows of a table were left out.
fn more(rows: usize, out: &mut dyn Write) -> std::io::Result<()> {
    match rows.checked_sub(MOST_ROWS) {
        Some(left @ 1..) => writeln!(out, "… and {left} more (--json lists all)"),
        _ => Ok(()),
    }
}

/// What a person wants to know first.
fn facts(
    listing: &Listing,
    checkpoint: Option<&Checkpoint>,
    sha256: Option<String>,
) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("container", listing.container.clone()),
        ("files", listing.files.len().to_string()),
        ("tensor bytes", tensor_bytes(listing).to_string()),
    ];
    if let Some(checkpoint) = checkpoint {
        let c = checkpoint.config();
        let (embedding, head) = checkpoint.tables();
        facts.extend([
            ("parameters", c.parameters().to_string()),
            ("layers", c.layers.to_string()),
            ("hidden", c.hidden.to_string()),
            ("intermediate", c.intermediate.to_string()),
            ("heads", format!("{} of {}, {} for keys and values", c.heads, c.head_dim, c.kv_heads)),
            ("vocabulary", c.vocab.to_string()),
            ("activation", c.activation.as_str().to_string()),
            ("sub-norms", if c.sub_norms { "yes" } else { "no" }.to_string()),
            ("embedding", embedding.name().to_string()),
            ("head", head.map_or("tied to the embedding".into(), |head| format!("its own, {}", head.name()))),
            ("rope theta", c.rope_theta.to_string()),
            ("trained positions", c.trained_positions.to_string()),
        ]);
        for head in heads(checkpoint) {
            let bytes = ModelBytes::of(c, head);
            let name = match (head == HeadFormat::Bf16, head == checkpoint.exact_head()) {
                (true, true) => "bf16 head, the default and exact".to_string(),
                (true, false) => "bf16 head, the default".into(),
                (false, _) => format!("{} head, exact", head.as_str()),
            };
            facts.push(("weight bytes in memory", format!("{} ({name})", bytes.resident)));
            facts.push(("weight bytes per token", format!("{} ({name})", bytes.per_token)));
        }
        facts.push(("bf16 KV bytes per position", kv_bytes(c).to_string()));
    }
    facts.extend(sha256.map(|hash| ("sha256", hash)));
    facts
}

fn row(t: &TensorEntry, count: usize) -> Vec<String> {
    let bytes = t.bytes.map_or("?".into(), |b| b.to_string());
    vec![shown(&t.name), count.to_string(), t.kind.clone(), format!("{:?}", t.shape), bytes]
}

/// Tensors of all layers that are alike.
struct Group {
    /// The first, with the numbers in its name as `N` and the bytes of all.
    entry: TensorEntry,
    count: usize,
}

/// Groups in the order of their first tensors.
fn grouped(tensors: &[TensorEntry]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut places = HashMap::new();
    for tensor in tensors {
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let parts = tensor.name.split('.').map(|part| if is_number(part) { "N" } else { part });
        let name = parts.collect::<Vec<_>>().join(".");
        match places.entry((name, &tensor.kind, &tensor.shape)) {
            Entry::Occupied(place) => {
                let group: &mut Group = &mut groups[*place.get()];
                group.entry.bytes = group.entry.bytes.zip(tensor.bytes).map(|(a, b)| a.saturating_add(b));
                group.count += 1;
            }
            Entry::Vacant(place) => {
                let entry = TensorEntry { name: place.key().0.clone(), ..tensor.clone() };
                place.insert(groups.len());
                groups.push(Group { entry, count: 1 });
            }
        }
    }
    groups
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
