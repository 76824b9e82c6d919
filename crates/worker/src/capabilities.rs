//! What the core crate offers, as data.

use longbit::attention::{Kind, METHODS};
use longbit::formats::I2sLayout;
use longbit::kv::{KV_FORMATS, KvFormat, PAGE_TOKENS, kv_dtype};
use longbit::workload::{ParamKind as WorkloadKind, WORKLOADS};
use longbit::{Activation, Compaction, Error, HeadFormat, OpenOptions, PRESETS};
use longbit_protocol::{
    Capabilities, KvDtypeInfo, MethodInfo, ModelSpec, ParamInfo, ParamKind, PresetInfo, WorkloadInfo,
};

use crate::{WorkerError, replay, text};

/// Head width at which bits a value are stated: that of all published shapes.
const HEAD_DIM: usize = 128;

fn format(format: &KvFormat) -> Result<KvDtypeInfo, WorkerError> {
    let dtype = kv_dtype(format.name)?;
    let bytes = dtype.keys.page_bytes(HEAD_DIM) + dtype.values.page_bytes(HEAD_DIM);
    Ok(KvDtypeInfo {
        name: format.name.into(),
        summary: format.summary.into(),
        bits_per_value: (bytes * 8) as f64 / (2 * PAGE_TOKENS * HEAD_DIM) as f64,
    })
}

/// Everything this engine can do.
///
/// # Errors
/// When `LONGBIT_ISA` names what this machine lacks.
pub fn capabilities() -> Result<Capabilities, WorkerError> {
    Ok(Capabilities {
        engine: "longbit".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        isa: longbit::isa()?.into(),
        presets: PRESETS.iter().map(preset).chain([of_a_trace(), one_matrix()]).collect(),
        kv_dtypes: KV_FORMATS.iter().map(format).collect::<Result<_, _>>()?,
        methods: METHODS
            .iter()
            .map(|m| MethodInfo {
                name: m.name.into(),
                summary: m.summary.into(),
                params: m
                    .all_params()
                    .enumerate()
                    .map(|(i, p)| ParamInfo {
                        name: p.name.into(),
                        summary: p.summary.into(),
                        kind: match p.kind {
                            Kind::Int { min, max } => ParamKind::Int { min, max },
                            Kind::Float { min, max } => ParamKind::Float { min, max },
                            Kind::Choice(of) => {
                                ParamKind::Choice { of: of.iter().map(|s| s.to_string()).collect() }
                            }
                            Kind::Layers => ParamKind::Layers,
                        },
                        default: p.default.into(),
                        setting: i >= m.params.len(),
                    })
                    .collect(),
            })
            .collect(),
        workloads: WORKLOADS
            .iter()
            .map(|w| WorkloadInfo {
                name: w.name.into(),
                summary: w.summary.into(),
                params: w
                    .params
                    .iter()
                    .map(|p| ParamInfo {
                        name: p.name.into(),
                        summary: p.summary.into(),
                        kind: match p.kind {
                            WorkloadKind::Number { min, max } => ParamKind::Float { min, max },
                            WorkloadKind::Choice(of) => {
                                ParamKind::Choice { of: of.iter().map(|s| s.to_string()).collect() }
                            }
                        },
                        default: p.default.into(),
                        setting: p.setting,
                    })
                    .collect(),
                reads_text: false,
                replays: false,
                one_matrix: false,
            })
            .chain([WorkloadInfo {
                name: replay::NAME.into(),
                summary: "file:PATH, a recorded trace of attention (docs/TRACES.md): its rows fill the cache, its last tokens are \
                          decoded"
                    .into(),
                replays: true,
                ..WorkloadInfo::default()
            }])
            .chain([WorkloadInfo {
                name: crate::matrix::NAME.into(),
                summary: "the product of one matrix (preset matrix:ROWSxCOLUMNS) with the activations of a batch of tokens".into(),
                one_matrix: true,
                ..WorkloadInfo::default()
            }])
            .chain([WorkloadInfo {
                name: text::NAME.into(),
                summary: "a text file (workload.file) through the checkpoint: real prefill, teacher-forced steps, quality from \
                          logits"
                    .into(),
                reads_text: true,
                ..WorkloadInfo::default()
            }])
            .collect(),
        heads: HeadFormat::ALL.iter().map(|h| h.as_str().into()).collect(),
        i2s: I2sLayout::ALL.iter().map(|l| l.as_str().into()).collect(),
        activations: Activation::ALL.iter().map(|a| a.as_str().into()).collect(),
        weights: Compaction::ALL.iter().map(|how| how.as_str().into()).collect(),
    })
}

/// What the user says about a file that does not say it itself.
pub(crate) fn open_options(model: &ModelSpec) -> Result<OpenOptions, Error> {
    let orders = I2sLayout::ALL.map(I2sLayout::as_str);
    let activations = Activation::ALL.map(Activation::as_str);
    Ok(OpenOptions {
        i2s: named("byte order of I2_S", &model.i2s, I2sLayout::parse, &orders)?,
        activation: named("activation", &model.activation, Activation::parse, &activations)?,
    })
}

/// How the weights of a model are repacked after loading.
pub(crate) fn compaction(model: &ModelSpec) -> Result<Compaction, Error> {
    if model.weights.is_empty() { Ok(Compaction::default()) } else { Compaction::parse(&model.weights) }
}

/// What `parse` makes of `name`; none for no name.
fn named<T>(
    kind: &'static str,
    name: &str,
    parse: fn(&str) -> Option<T>,
    known: &[&str],
) -> Result<Option<T>, Error> {
    match parse(name) {
        None if !name.is_empty() => Err(Error::unknown(kind, name, known.iter().map(AsRef::as_ref))),
        found => Ok(found),
    }
}

/// Stands for the shape of whichever trace a cell replays.
fn of_a_trace() -> PresetInfo {
    PresetInfo {
        name: replay::PRESET.into(),
        summary:
            "the attention shape of the trace that the workload file replays, with seeded weights around it"
                .into(),
        ..PresetInfo::default()
    }
}

/// Stands for all matrices: the name says the shape.
fn one_matrix() -> PresetInfo {
    PresetInfo {
        name: format!("{}ROWSxCOLUMNS", longbit::matrix::PREFIX),
        summary: "one ternary matrix, for the workload matrix: e.g. matrix:4096x4096".into(),
        parameters: 0,
        shape: Vec::new(),
    }
}

fn preset(preset: &longbit::Preset) -> PresetInfo {
    let c = preset.config();
    let shape = [
        ("hidden", c.hidden),
        ("intermediate", c.intermediate),
        ("layers", c.layers),
        ("heads", c.heads),
        ("kv_heads", c.kv_heads),
        ("head_dim", c.head_dim),
        ("vocab", c.vocab),
    ];
    PresetInfo {
        name: preset.name.into(),
        summary: preset.summary.into(),
        parameters: c.parameters(),
        shape: shape.into_iter().map(|(name, value)| (name.into(), value as u64)).collect(),
    }
}
