//! What KV dtypes cost and save: error against the bytes that a token takes in the cache.

use longbit_protocol::is_not_finite;

use super::errors::NO_ERROR;
use super::figure::{Axis, Figure, Panel, Point, Series, Style};
use super::look::{Look, columns};
use crate::analyse::label::{context, distinct};
use crate::analyse::loss::Loss;
use crate::analyse::stats;
use crate::record::Record;

/// Fewer formats than this are told apart in the other figures.
const ENOUGH: usize = 3;

/// Error of dense attention against stored bytes, a panel a context and a point a KV dtype; none without several of them.
pub(super) fn error_against_bytes(look: &Look<'_>) -> Option<Figure> {
    // Threads do not change a bit: any count has the same error.
    let threads = look.most_threads();
    let dense: Vec<&Record> =
        look.records.iter().copied().filter(|r| r.is_dense() && r.threads == threads).collect();
    let dtypes = distinct(dense.iter().map(|r| r.kv_dtype.as_str()));
    let loss = Loss::of(dense.iter().copied()).filter(|_| dtypes.len() >= ENOUGH)?;
    let point = |r: &Record| -> Option<(f64, f64, Option<f64>)> {
        let typical = loss.typical(r).filter(|e| !is_not_finite(*e))?;
        Some((r.kv_bytes_stored_per_token?, typical, loss.bad(r).filter(|e| !is_not_finite(*e))))
    };
    let points: Vec<_> = dense.iter().filter_map(|r| point(r)).collect();
    let errors: Vec<f64> =
        points.iter().flat_map(|p| [Some(p.1), p.2]).flatten().filter(|e| *e > NO_ERROR).collect();
    let bytes: Vec<f64> = points.iter().map(|p| p.0 / 1e3).filter(|b| *b > 0.0).collect();
    let y = Axis::log(loss.axis(), stats::min(&errors)?, stats::max(&errors)?);
    let x = Axis::log("Cache (kB a token)", stats::min(&bytes)?, stats::max(&bytes)?);
    let mut contexts = distinct(dense.iter().map(|r| r.context_tokens));
    contexts.sort_unstable();
    let panel = |tokens: u64| {
        let here = dense.iter().filter(|r| r.context_tokens == tokens);
        let series = here.filter_map(|r| {
            let (bytes, typical, bad) = point(r)?;
            let typical = typical.max(y.range.0);
            let place = dtypes.iter().position(|k| *k == r.kv_dtype)?;
            let whisker = bad.map(|bad| (typical, bad.max(typical)));
            Some(Series {
                name: format!("{} KV", r.kv_dtype),
                style: Style::nth(place).points(),
                points: vec![Point { x: bytes / 1e3, y: typical, whisker }],
            })
        });
        Panel { title: format!("{} tokens", context(tokens)), series: series.collect() }
    };
    let panels: Vec<Panel> =
        contexts.iter().map(|&tokens| panel(tokens)).filter(|p| !p.series.is_empty()).collect();
    Some(Figure {
        name: "error-bytes".into(),
        title: "Error against the size of the cache (lower left is better)".into(),
        subtitle: format!("{} · dense attention · {}", look.conditions(&[threads]), loss.caption()),
        columns: columns(panels.len()),
        panels,
        x,
        y,
    })
}

#[cfg(test)]
mod tests {
    use super::super::charts::figures;
    use crate::analyse::summarise::summarise;
    use crate::analyse::testing::Sweep;

    const MANY: [&str; 18] = [
        "f32",
        "bf16",
        "f16",
        "fp8-e4m3",
        "fp8-e4m3-row",
        "fp8-e5m2",
        "int8",
        "int8-channel",
        "q8_0",
        "q4_0",
        "int4",
        "int4+rotate",
        "kivi4",
        "kivi2",
        "lm4",
        "lm2",
        "k=int8,v=int4",
        "k=q8_0+rotate,v=q4_0",
    ];

    fn many(methods: &[&'static str]) -> Vec<super::Figure> {
        let sweep = Sweep {
            kv_dtypes: MANY.to_vec(),
            methods: methods.iter().map(|m| (*m, &[][..])).collect(),
            contexts: vec![2048, 98304],
            ..Sweep::default()
        };
        let (plan, machine, lines) = sweep.build();
        figures(&summarise(&plan, &machine, &lines), &lines)
    }

    #[test]
    fn every_dtype_is_a_point_of_its_own_look() {
        let figures = many(&["dense"]);
        let figure = figures.iter().find(|f| f.name == "error-bytes").unwrap();
        assert_eq!((figure.panels.len(), figure.panels[0].series.len()), (2, MANY.len()));
        let legend = figure.legend();
        let mut looks = Vec::new();
        for (name, style) in &legend {
            let look = (style.color, style.marker, style.hollow);
            assert!(!looks.contains(&look), "{name} looks like another");
            looks.push(look);
        }
        let int4 = figure.panels[0].series.iter().find(|s| s.name == "int4 KV").unwrap().points[0];
        let bf16 = figure.panels[0].series.iter().find(|s| s.name == "bf16 KV").unwrap().points[0];
        assert!((bf16.x - 76.8).abs() < 1e-9 && int4.x < 0.3 * bf16.x && int4.y > bf16.y);
        for f in &figures {
            for p in f.panels.iter().flat_map(|p| &p.series).flat_map(|s| &s.points) {
                assert!((-1e-9..=1.0 + 1e-9).contains(&f.x.place(p.x)), "{}: x {}", f.name, p.x);
            }
        }
        // One grey line for each of so many would hide what was measured.
        assert!(!figures.iter().any(|f| f.legend().iter().any(|(name, _)| name.starts_with("bandwidth"))));
        // Two dtypes need no figure of their own.
        let (plan, machine, lines) = Sweep::default().build();
        let two = super::super::charts::figures(&summarise(&plan, &machine, &lines), &lines);
        assert!(!two.iter().any(|f| f.name == "error-bytes"));
    }

    #[test]
    fn names_of_files_are_plain() {
        let figures = many(&["dense", "window"]);
        assert!(figures.iter().any(|f| f.name == "error-speed-k-int8-v-int4"));
        for f in &figures {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            assert!(f.name.chars().all(plain), "{}", f.name);
        }
        let mut names: Vec<&str> = figures.iter().map(|f| f.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), figures.len());
    }
}
