//! Decode speed: against context, with what the read bandwidth allows, and against threads.

use super::figure::{Axis, Figure, Panel, Point, Series, Style};
use super::look::{Look, columns, spread};
use crate::analyse::label::{context, distinct};
use crate::record::Record;

/// More lines for limits than this would hide what was measured.
const MAX_LIMITS: usize = 4;

/// Median speed: the figure that the interval belongs to.
fn median_speed(r: &Record) -> Option<f64> {
    Some(1e9 / r.tpot_p50_ns?.max(1) as f64)
}

/// Median speed interval as rates; the faster end belongs to the shorter time.
fn speed_whisker(r: &Record) -> Option<(f64, f64)> {
    let (lo, hi) = r.tpot_p50_lo95_ns.zip(r.tpot_p50_hi95_ns)?;
    Some((1e9 / hi.max(1) as f64, 1e9 / lo.max(1) as f64))
}

pub(super) fn speed(look: &Look<'_>) -> Figure {
    let x = Axis::doubling("Context (tokens in the KV cache)", &look.contexts(), context);
    let facets = look.facets(1);
    let shown = distinct(facets.iter().map(|f| f.1));
    let mut panels: Vec<Panel> = facets
        .iter()
        .map(|&(kv, threads)| Panel {
            title: look.facet_title((kv, threads), shown.len() > 1),
            series: look.series(&|r| r.threads == threads && kv.is_none_or(|k| r.kv_dtype == k), &|r| {
                Some(Point { x: r.context_tokens as f64, y: median_speed(r)?, whisker: speed_whisker(r) })
            }),
        })
        .collect();
    let contexts = look.contexts();
    spread(&mut panels, contexts.len() == 1);
    for (panel, &(kv, threads)) in panels.iter_mut().zip(&facets) {
        panel.series.extend(limits(look, kv, threads));
    }
    let fastest = look.max(median_speed);
    // Where the cache serves the bytes the limit lies far above what is measured; it must not squeeze the data.
    let top = panels.iter().flat_map(|p| &p.series).flat_map(|s| &s.points).map(|p| p.y).fold(0.0, f64::max);
    Figure {
        name: "speed".into(),
        title: "Decode speed against context".into(),
        subtitle: format!("{} · bars: 95 % interval of the median over repetitions", look.conditions(&shown)),
        x,
        y: Axis::from_zero("Median decode speed (tokens/s)", top.min(1.5 * fastest).max(fastest)),
        columns: columns(panels.len()),
        panels,
    }
}

/// The speed that the measured read bandwidth allows when a step reads all weights and every cached row once.
fn limits(look: &Look<'_>, kv: Option<&str>, threads: u64) -> Vec<Series> {
    let mut series = Vec::new();
    if kv.is_none() && look.kv_dtypes.len() > MAX_LIMITS {
        return series;
    }
    for (n, dtype) in look.kv_dtypes.iter().enumerate().filter(|(_, k)| kv.is_none_or(|only| only == **k)) {
        let mut points: Vec<Point> = Vec::new();
        for tokens in look.contexts() {
            let limit = look.records.iter().find_map(|r| {
                let here = r.context_tokens == tokens && r.kv_dtype == *dtype && r.threads == threads;
                let bytes = r.weight_bytes_per_token? + r.kv_bytes_stored?;
                (here && bytes > 0).then_some(r.probe_gb_s? * 1e9 / bytes as f64)
            });
            points.extend(limit.map(|y| Point { x: tokens as f64, y, whisker: None }));
        }
        if points.len() == 1 {
            // A single context: a short level line, for a limit has no marker.
            let at = points[0];
            points = [0.75, 1.33].map(|f| Point { x: at.x * f, ..at }).to_vec();
        }
        let several = look.kv_dtypes.len() > 1 && !look.split;
        let name = if several {
            format!("bandwidth limit of dense, {dtype}")
        } else {
            "bandwidth limit of dense".into()
        };
        series.push(Series { name, style: Style::limit(if several { n } else { 0 }), points });
    }
    series
}

/// Speed against threads at the longest context, where several thread counts were measured.
pub(super) fn threads(look: &Look<'_>) -> Option<Figure> {
    if look.threads.len() < 2 {
        return None;
    }
    let far = look.contexts().last().copied()?;
    let kvs = look.kv_facets();
    let panels: Vec<Panel> = kvs
        .iter()
        .map(|kv| Panel {
            title: kv.map(|k| format!("{k} KV")).unwrap_or_default(),
            series: look.series(&|r| r.context_tokens == far && kv.is_none_or(|k| r.kv_dtype == k), &|r| {
                Some(Point { x: r.threads as f64, y: median_speed(r)?, whisker: speed_whisker(r) })
            }),
        })
        .collect();
    let top = panels.iter().flat_map(|p| &p.series).flat_map(|s| &s.points).map(|p| p.y).fold(0.0, f64::max);
    Some(Figure {
        name: "threads".into(),
        title: format!("Decode speed against threads at {} tokens", context(far)),
        subtitle: format!("{} · bars: 95 % interval of the median over repetitions", look.conditions(&[])),
        x: Axis::doubling("Threads", &look.threads, |t| t.to_string()),
        y: Axis::from_zero("Decode speed (tokens/s)", top),
        columns: columns(panels.len()),
        panels,
    })
}
