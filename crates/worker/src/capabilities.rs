//! What the core crate offers, as data.

use longbit::attention::{Kind, METHODS};
use longbit::kv::KV_DTYPES;
use longbit::workload::{ParamKind as WorkloadKind, WORKLOADS};
use longbit::{HeadFormat, PRESETS};
use longbit_protocol::{
    Capabilities, KvDtypeInfo, MethodInfo, ParamInfo, ParamKind, PresetInfo, WorkloadInfo,
};

use crate::WorkerError;

/// Head width at which bits a value are stated: that of all published shapes.
const HEAD_DIM: usize = 128;

/// Everything this engine can do.
///
/// # Errors
/// When `LONGBIT_ISA` names what this machine lacks.
pub fn capabilities() -> Result<Capabilities, WorkerError> {
    Ok(Capabilities {
        engine: "longbit".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        isa: longbit::isa()?.into(),
        presets: PRESETS.iter().map(preset).collect(),
        kv_dtypes: KV_DTYPES
            .iter()
            .map(|d| KvDtypeInfo {
                name: d.name().into(),
                summary: d.summary().into(),
                bits_per_value: (d.row_bytes(HEAD_DIM) * 8) as f64 / HEAD_DIM as f64,
            })
            .collect(),
        methods: METHODS
            .iter()
            .map(|m| MethodInfo {
                name: m.name.into(),
                summary: m.summary.into(),
                params: m
                    .params
                    .iter()
                    .map(|p| ParamInfo {
                        name: p.name.into(),
                        summary: p.summary.into(),
                        kind: match p.kind {
                            Kind::Int { min, max } => ParamKind::Int { min, max },
                            Kind::Float { min, max } => ParamKind::Float { min, max },
                        },
                        default: p.default.to_string(),
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
                    })
                    .collect(),
            })
            .collect(),
        heads: HeadFormat::ALL.iter().map(|h| h.as_str().into()).collect(),
    })
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
