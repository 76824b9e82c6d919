//! Figures of cells that take several tokens together, and of those that time one matrix.

use super::figure::{Axis, Figure, Panel, Point, Series, Style};
use super::look::{columns, thread_count};
use crate::analyse::label::{context, distinct};
use crate::analyse::stats;
use crate::record::Record;

/// More panels than this are too small to read.
const MAX_PANELS: usize = 6;

/// Speed against batch, where there are several; time of one matrix against threads.
pub(super) fn figures(measured: &[&Record]) -> Vec<Figure> {
    let (matrices, passes): (Vec<&Record>, Vec<&Record>) = measured.iter().partition(|r| r.one_matrix());
    let several = |records: &[&Record]| distinct(records.iter().map(|r| r.batch_tokens())).len() > 1;
    let mut figures = Vec::new();
    for records in [&passes, &matrices].into_iter().filter(|r| several(r)) {
        figures.push(speed(records));
    }
    figures.extend(matrix_threads(&matrices));
    figures
}

fn values(records: &[&Record], of: fn(&Record) -> u64) -> Vec<u64> {
    let mut values = distinct(records.iter().map(|r| of(r)));
    values.sort_unstable();
    values
}

/// What holds for the whole figure.
fn conditions(records: &[&Record]) -> String {
    let one = |of: fn(&Record) -> String| {
        let found = distinct(records.iter().map(|r| of(r)));
        (found.len() == 1).then(|| found[0].clone()).filter(|text| !text.is_empty())
    };
    let parts = [
        one(|r| if r.one_matrix() { r.model.clone() } else { format!("{}, {} head", r.model, r.head) }),
        one(|r| if r.one_matrix() { String::new() } else { format!("{} KV", r.kv_dtype) }),
        one(|r| thread_count(r.threads)),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" · ")
}

/// Points by the value of `of`, one series a name.
fn series(
    records: &[&Record],
    name: impl Fn(&Record) -> String,
    point: fn(&Record) -> Option<Point>,
) -> Vec<Series> {
    let names = distinct(records.iter().map(|r| name(r)));
    let of = |(i, series_name): (usize, &String)| {
        let mut points: Vec<Point> =
            records.iter().filter(|r| name(r) == *series_name).filter_map(|r| point(r)).collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        Series { name: series_name.clone(), style: Style::nth(i), points }
    };
    names.iter().enumerate().map(of).collect()
}

/// Tokens a second against tokens taken together, a panel a context.
fn speed(records: &[&Record]) -> Figure {
    let rate = |r: &Record| {
        let rate = |ns: u64| r.batch_tokens() as f64 * 1e9 / ns.max(1) as f64;
        let whisker = r.tpot_p50_lo95_ns.zip(r.tpot_p50_hi95_ns).map(|(lo, hi)| (rate(hi), rate(lo)));
        Some(Point { x: r.batch_tokens() as f64, y: rate(r.tpot_p50_ns?), whisker })
    };
    let contexts = values(records, |r| r.context_tokens);
    let shown = &contexts[contexts.len().saturating_sub(MAX_PANELS)..];
    let several = |of: fn(&Record) -> String| distinct(records.iter().map(|r| of(r))).len() > 1;
    let (threads, kv) = (several(|r| r.threads.to_string()), several(|r| r.kv_dtype.clone()));
    let name = |r: &Record| {
        let parts = [threads.then(|| thread_count(r.threads)), kv.then(|| format!("{} KV", r.kv_dtype))];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        if parts.is_empty() { "measured".to_owned() } else { parts.join(", ") }
    };
    let panels: Vec<Panel> = shown
        .iter()
        .map(|&tokens| {
            let here: Vec<&Record> = records.iter().filter(|r| r.context_tokens == tokens).copied().collect();
            let title =
                if contexts.len() > 1 { format!("{} tokens", context(tokens)) } else { String::new() };
            Panel { title, series: series(&here, name, rate) }
        })
        .collect();
    let top = panels.iter().flat_map(|p| &p.series).flat_map(|s| &s.points).map(|p| p.y).fold(0.0, f64::max);
    let matrix = records.iter().all(|r| r.one_matrix());
    Figure {
        name: if matrix { "matrix-batch" } else { "batch" }.into(),
        title: "Speed against tokens taken together".into(),
        subtitle: format!("{} · bars: 95 % interval of the median over repetitions", conditions(records)),
        x: Axis::doubling("Tokens of a pass", &values(records, |r| r.batch_tokens()), |t| t.to_string()),
        y: Axis::from_zero("Median speed (tokens/s)", top),
        columns: columns(panels.len()),
        panels,
    }
}

/// Time of one matrix against threads, a line a batch.
fn matrix_threads(records: &[&Record]) -> Option<Figure> {
    let threads = values(records, |r| r.threads);
    if threads.len() < 2 {
        return None;
    }
    let time = |r: &Record| {
        let ms = |ns: u64| ns as f64 / 1e6;
        let whisker = r.tpot_p50_lo95_ns.zip(r.tpot_p50_hi95_ns).map(|(lo, hi)| (ms(lo), ms(hi)));
        Some(Point { x: r.threads as f64, y: ms(r.tpot_p50_ns?), whisker })
    };
    let name = |r: &Record| match r.batch_tokens() {
        1 => "1 token".to_owned(),
        batch => format!("{batch} tokens"),
    };
    let series = series(records, name, time);
    let all: Vec<f64> = series.iter().flat_map(|s| &s.points).map(|p| p.y).collect();
    Some(Figure {
        name: "matrix-threads".into(),
        title: "Time of one product against threads".into(),
        subtitle: format!("{} · bars: 95 % interval of the median over repetitions", conditions(records)),
        x: Axis::doubling("Threads", &threads, |t| t.to_string()),
        y: Axis::log("Median time (ms)", stats::min(&all)?, stats::max(&all)?),
        columns: 1,
        panels: vec![Panel { title: String::new(), series }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing;

    fn cell(batch: u64, threads: u64, method: &str) -> Record {
        Record {
            batch: Some(batch),
            threads,
            method: method.into(),
            tpot_p50_ns: Some(1_000_000 * batch / threads),
            tpot_p50_lo95_ns: None,
            context_tokens: 64,
            ..testing::records().remove(0)
        }
    }

    #[test]
    fn batches_have_a_figure_and_matrices_one_of_threads() {
        let cells: Vec<Record> =
            [1, 32, 384].into_iter().flat_map(|b| [1, 2].map(|t| cell(b, t, "dense"))).collect();
        let found = figures(&cells.iter().collect::<Vec<_>>());
        assert_eq!(found.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["batch"]);
        let lines = &found[0].panels[0].series;
        assert_eq!(lines.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["1 thread", "2 threads"]);
        assert_eq!(lines[1].points.iter().map(|p| (p.x, p.y)).collect::<Vec<_>>()[2], (384.0, 2000.0));
        let cells: Vec<Record> = [1, 64].into_iter().flat_map(|b| [1, 2].map(|t| cell(b, t, "-"))).collect();
        let found = figures(&cells.iter().collect::<Vec<_>>());
        let names: Vec<&str> = found.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["matrix-batch", "matrix-threads"]);
        assert_eq!(found[1].panels[0].series[1].points[1].y, 32.0);
        assert!(figures(&[&cell(1, 1, "dense"), &cell(1, 2, "dense")]).is_empty());
    }
}
