//! How cells are measured and judged: the sections `[measure]`, `[verify]` and `[gate]`.

use longbit_protocol::Measure;

use super::named::{Named, suggest};
use super::read::Reader;
use super::units;
use super::walk::Section;
use crate::plan::{Gate, OnFail, VerifySpec};

/// More seeds tell no more than these.
const MAX_SEEDS: u64 = 1000;

impl<'a> Reader<'a> {
    pub(super) fn measure(&self, section: &Section<'a>) -> (Measure, u32, f64) {
        let count = |key, min, default: u32| {
            section.int(key, min, 1_000_000).and_then(|at| u32::try_from(at.value).ok()).unwrap_or(default)
        };
        let measure = Measure {
            reps: count("reps", 1, 6),
            gen_tokens: count("gen_tokens", 1, 64),
            warmup_tokens: count("warmup_tokens", 0, 8),
            quality_steps: count("quality_steps", 0, 4),
            seeds: section
                .int("seeds", 1, MAX_SEEDS)
                .and_then(|at| u32::try_from(at.value).ok())
                .unwrap_or(1),
            pin: section.bool("pin").is_none_or(|at| at.value),
            probe_bytes: section.quantity("probe", units::size).unwrap_or(1 << 30),
        };
        let min_samples = count("min_samples_p99", 1, 299);
        let drift = section.quantity("max_drift", units::percent).unwrap_or(2.0);
        section.has("seed");
        section.end();
        (measure, min_samples, drift)
    }

    pub(super) fn verify(
        &self,
        section: &Section<'a>,
        methods: &[Named],
        quality_steps: u32,
        reads_text: Option<bool>,
    ) -> Option<VerifySpec> {
        let verify = VerifySpec {
            cosine_min: section.float("cosine_min").map(|at| at.value),
            rel_l2_max: section.float("rel_l2_max").map(|at| at.value),
            kl_nats_max: section.float("kl_nats_max").map(|at| at.value),
            top1_min: section.float("top1_min").map(|at| at.value),
            on_fail: self
                .choice(section, "on_fail", &[("mark", OnFail::Mark), ("stop", OnFail::Stop)])
                .unwrap_or_default(),
            methods: section
                .strs("methods")
                .unwrap_or_default()
                .into_iter()
                .filter_map(|at| {
                    let names: Vec<&str> = methods.iter().map(|m| m.name.as_str()).collect();
                    if !names.contains(&at.value.as_str()) {
                        let what = format!("method {:?} is not on the axis", at.value);
                        self.source.complain(&at.place, what, suggest(&at.value, &names));
                        return None;
                    }
                    Some(at.value)
                })
                .collect(),
        };
        section.end();
        let (of_outputs, of_logits) = (["cosine_min", "rel_l2_max"], ["kl_nats_max", "top1_min"]);
        if section.is_present() && !of_outputs.iter().chain(&of_logits).any(|key| section.has(key)) {
            let help = match reads_text {
                Some(true) => "give kl_nats_max or top1_min, or remove [verify]",
                _ => "give cosine_min or rel_l2_max, or remove [verify]",
            };
            self.source.complain(&section.place, "[verify] limits nothing", help);
        }
        // What a workload does not measure would fail every cell.
        let (unknown, help) = match reads_text {
            Some(true) => (of_outputs, "a text is compared by its logits: kl_nats_max, top1_min"),
            _ => (
                of_logits,
                "generated and recorded inputs are compared by attention outputs: rel_l2_max, cosine_min",
            ),
        };
        for key in unknown.into_iter().filter(|key| reads_text.is_some() && section.has(key)) {
            let what = format!("{key} limits what this workload does not measure");
            self.source.complain(&section.place_of(key), what, help);
        }
        if section.is_present() && quality_steps == 0 {
            let help = "set measure.quality_steps to 1 or more, or remove [verify]";
            self.source.complain(
                &section.place,
                "[verify] needs quality, and measure.quality_steps is 0",
                help,
            );
        }
        section.is_present().then_some(verify)
    }

    pub(super) fn gate(&self, section: &Section<'a>) -> Gate {
        let default = Gate::default();
        let gate = Gate {
            tpot_p50_pct: section.quantity("tpot_p50", units::percent).unwrap_or(default.tpot_p50_pct),
            tpot_p99_pct: section.quantity("tpot_p99", units::percent).unwrap_or(default.tpot_p99_pct),
            kv_bytes_pct: section.quantity("kv_bytes", units::percent).unwrap_or(default.kv_bytes_pct),
            rel_l2_abs: section.quantity("rel_l2", units::number).unwrap_or(default.rel_l2_abs),
            cosine_abs: section.quantity("cosine", units::number).unwrap_or(default.cosine_abs),
            kl_abs: section.quantity("kl", units::number).unwrap_or(default.kl_abs),
            top1_abs: section.quantity("top1", units::number).unwrap_or(default.top1_abs),
            logit_cosine_abs: section
                .quantity("logit_cosine", units::number)
                .unwrap_or(default.logit_cosine_abs),
            nll_abs: section.quantity("nll", units::number).unwrap_or(default.nll_abs),
        };
        section.end();
        gate
    }
}
