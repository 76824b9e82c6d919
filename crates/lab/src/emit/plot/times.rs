//! Times of tokens: median and tail against context, and by percentile.

use super::figure::{Axis, Figure, Panel, Point, Series};
use super::look::{Look, columns, spread};
use crate::analyse::label::{context, distinct};
use crate::analyse::{stats, summarise};
use crate::record::Record;
use crate::run::store::Line;

/// Percentiles that carry a marker; more would hide the line.
const CURVE_POINTS: [f64; 10] = [1.0, 20.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.9, 99.99];

pub(super) fn latency(look: &Look<'_>) -> Figure {
    let x = Axis::doubling("Context (tokens in the KV cache)", &look.contexts(), context);
    let with_tail = look.records.iter().any(|r| r.tpot_p99_ns.is_some());
    let quantiles: &[&str] = if with_tail { &["median", "99th percentile"] } else { &["median"] };
    let facets = look.facets(quantiles.len());
    let shown = distinct(facets.iter().map(|f| f.1));
    let ms = |ns: u64| ns as f64 / 1e6;
    let mut panels = Vec::new();
    for &(kv, threads) in &facets {
        for &quantile in quantiles {
            let point = |r: &Record| {
                let (y, whisker) = if quantile == "median" {
                    (r.tpot_p50_ns?, r.tpot_p50_lo95_ns.zip(r.tpot_p50_hi95_ns))
                } else {
                    (r.tpot_p99_ns?, r.tpot_p99_ns.zip(r.tpot_p99_hi95_ns))
                };
                let whisker = whisker.map(|(lo, hi)| (ms(lo), ms(hi)));
                Some(Point { x: r.context_tokens as f64, y: ms(y), whisker })
            };
            let facet = look.facet_title((kv, threads), shown.len() > 1);
            let title = if facet.is_empty() { quantile.to_owned() } else { format!("{quantile}, {facet}") };
            let pass = |r: &Record| r.threads == threads && kv.is_none_or(|k| r.kv_dtype == k);
            panels.push(Panel { title, series: look.series(&pass, &point) });
        }
    }
    spread(&mut panels, look.contexts().len() == 1);
    let values: Vec<f64> = panels
        .iter()
        .flat_map(|p| &p.series)
        .flat_map(|s| &s.points)
        .flat_map(|p| [p.y].into_iter().chain(p.whisker.map(|w| w.0)).chain(p.whisker.map(|w| w.1)))
        .collect();
    let range = (stats::min(&values).unwrap_or(1.0), stats::max(&values).unwrap_or(1.0));
    let tail = if with_tail {
        " of the median, and 95 % upper bound of the 99th percentile"
    } else {
        " of the median"
    };
    Figure {
        name: "latency".into(),
        title: "Time per token against context".into(),
        subtitle: format!("{} · bars: 95 % interval{tail}", look.conditions(&shown)),
        x,
        y: Axis::log("Time per token (ms)", range.0, range.1),
        columns: if with_tail { 2 } else { columns(panels.len()) },
        panels,
    }
}

/// Latency percentile curves at the shortest and the longest context.
pub(super) fn percentiles(look: &Look<'_>, lines: &[Line]) -> Figure {
    let times = summarise::token_times(lines);
    let threads = look.most_threads();
    let contexts = look.contexts();
    let ends = distinct([contexts.first().copied(), contexts.last().copied()].into_iter().flatten());
    let kvs = look.kv_facets();
    let (mut panels, mut last) = (Vec::new(), 0.0);
    let mut all: Vec<f64> = Vec::new();
    for &tokens in &ends {
        for kv in &kvs {
            let pass = |r: &&Record| {
                r.threads == threads && r.context_tokens == tokens && kv.is_none_or(|k| r.kv_dtype == k)
            };
            let mut series = Vec::new();
            for r in look.in_order().into_iter().filter(|r| pass(r)) {
                let ns = times.get(&r.cell_id).map(|reps| reps.concat()).unwrap_or_default();
                let curve = stats::percentile_curve(&ns);
                let points: Vec<Point> = curve
                    .into_iter()
                    .filter(|c| CURVE_POINTS.contains(&c.0))
                    .map(|(p, ns)| Point { x: p, y: ns as f64 / 1e6, whisker: None })
                    .collect();
                all.extend(points.iter().map(|p| p.y));
                last = points.iter().map(|p| p.x).fold(last, f64::max);
                series.push(Series { name: look.name(r), style: look.style(r), points });
            }
            let dtype = kv.map(|k| format!(", {k} KV")).unwrap_or_default();
            panels.push(Panel { title: format!("{} tokens{dtype}", context(tokens)), series });
        }
    }
    Figure {
        name: "percentiles".into(),
        title: "Time per token by percentile".into(),
        subtitle: format!(
            "{} · closed loop, one stream: service time, without queueing",
            look.conditions(&[threads])
        ),
        x: Axis::tail("Percentile of the timed tokens", last),
        y: Axis::log("Time per token (ms)", stats::min(&all).unwrap_or(1.0), stats::max(&all).unwrap_or(1.0)),
        columns: if kvs.len() > 1 { kvs.len().min(4) } else { columns(panels.len()) },
        panels,
    }
}
