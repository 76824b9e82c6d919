//! Which figures a result fills, and what each shows.

use longbit_protocol::is_not_finite;

use super::batches;
use super::figure::{Axis, Figure, Panel, Point, Series, Style};
use super::formats;
use crate::analyse::label::{DENSE, Labels, context, distinct};
use crate::analyse::loss::Loss;
use crate::analyse::{stats, summarise};
use crate::record::Record;
use crate::run::store::Line;

/// More panels than this in a figure of one line a method are too small to read.
const MAX_PANELS: usize = 9;

/// More lines for limits than this would hide what was measured.
const MAX_LIMITS: usize = 4;

/// Errors up to this one are drawn as none.
const NO_ERROR: f64 = 1e-7;

/// Percentiles that carry a marker; more would hide the line.
const CURVE_POINTS: [f64; 10] = [1.0, 20.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.9, 99.99];

/// Every figure that `records` fill, in reading order; none when nothing was measured.
pub fn figures(records: &[Record], lines: &[Line]) -> Vec<Figure> {
    let measured: Vec<&Record> =
        records.iter().filter(|r| r.measured() && r.decode_tok_s.is_some()).collect();
    if measured.is_empty() {
        return Vec::new();
    }
    // An axis of contexts that double has no place for an empty cache.
    let decoded: Vec<&Record> = measured
        .iter()
        .filter(|r| r.batch_tokens() == 1 && !r.one_matrix() && r.context_tokens > 0)
        .copied()
        .collect();
    let mut figures = Vec::new();
    if !decoded.is_empty() {
        let look = Look::new(records, &decoded);
        figures.extend([speed(&look), latency(&look)]);
        figures.extend(threads(&look));
        figures.extend(error_against(&look, Price::Speed));
        figures.extend(error_against(&look, Price::Traffic));
        figures.extend(formats::error_against_bytes(&look));
        figures.push(percentiles(&look, lines));
    }
    figures.extend(batches::figures(&measured));
    figures.retain(|f| !f.is_empty());
    figures
}

/// How the series of one result are told apart, the same way in all of its figures.
pub(super) struct Look<'a> {
    records: Vec<&'a Record>,
    labels: Labels,
    methods: Vec<String>,
    kv_dtypes: Vec<&'a str>,
    threads: Vec<u64>,
    /// Each KV dtype has panels of its own, because one pair of axes would hold too many lines.
    split: bool,
}

impl<'a> Look<'a> {
    fn new(all: &[Record], records: &[&'a Record]) -> Self {
        let labels = Labels::new(all);
        // Dense first: it is black and on top in every figure.
        let mut methods = distinct(all.iter().map(|r| labels.method(r)));
        methods.sort_by_key(|m| m != DENSE);
        let kv_dtypes = distinct(records.iter().map(|r| r.kv_dtype.as_str()));
        let threads = distinct(records.iter().map(|r| r.threads));
        let used = distinct(records.iter().map(|r| labels.method(r))).len();
        let split = kv_dtypes.len() > 1 && used > 1 && (kv_dtypes.len() > 2 || used > 5);
        Look { records: records.to_vec(), labels, methods, kv_dtypes, threads, split }
    }

    pub(super) fn records(&self) -> &[&'a Record] {
        &self.records
    }

    pub(super) fn most_threads(&self) -> u64 {
        self.threads.iter().copied().max().unwrap_or(0)
    }

    fn one_method(&self) -> bool {
        distinct(self.records.iter().map(|r| self.labels.method(r))).len() == 1
    }

    /// Legend text: what differs.
    fn name(&self, r: &Record) -> String {
        let method = self.labels.method(r);
        match (self.kv_dtypes.len() > 1, self.split, self.one_method()) {
            (true, false, true) => format!("{} KV", r.kv_dtype),
            (true, false, false) => format!("{method}, {} KV", r.kv_dtype),
            _ => method,
        }
    }

    fn style(&self, r: &Record) -> Style {
        let method = self.methods.iter().position(|m| *m == self.labels.method(r)).unwrap_or(0);
        let kv = self.kv_dtypes.iter().position(|k| *k == r.kv_dtype).unwrap_or(0);
        match (self.kv_dtypes.len() > 1, self.split, self.one_method()) {
            (true, false, true) => Style::nth(kv),
            (true, false, false) => Style::nth(method).paired(kv == 1),
            _ => Style::nth(method),
        }
    }

    /// Series of the records that pass, one a method and KV dtype; a record may give no point.
    fn series(
        &self,
        pass: &dyn Fn(&Record) -> bool,
        point: &dyn Fn(&Record) -> Option<Point>,
    ) -> Vec<Series> {
        let mut series: Vec<(usize, Series)> = Vec::new();
        for r in self.records.iter().filter(|r| pass(r)) {
            let Some(point) = point(r) else { continue };
            let name = self.name(r);
            match series.iter_mut().find(|(_, s)| s.name == name) {
                Some((_, s)) => s.points.push(point),
                None => {
                    let place = self.methods.iter().position(|m| *m == self.labels.method(r)).unwrap_or(0);
                    series.push((place, Series { name, style: self.style(r), points: vec![point] }));
                }
            }
        }
        series.sort_by_key(|(place, _)| *place);
        let mut series: Vec<Series> = series.into_iter().map(|(_, s)| s).collect();
        for s in &mut series {
            s.points.sort_by(|a, b| a.x.total_cmp(&b.x));
        }
        series
    }

    /// KV dtypes and thread counts that get panels of their own. `None` means "all of them in one".
    fn facets(&self, times: usize) -> Vec<(Option<&'a str>, u64)> {
        let kvs: Vec<Option<&str>> =
            if self.split { self.kv_dtypes.iter().map(|k| Some(*k)).collect() } else { vec![None] };
        let all = self.threads.len() > 1 && kvs.len() * self.threads.len() * times <= MAX_PANELS;
        let threads = if all { self.threads.clone() } else { vec![self.most_threads()] };
        threads.iter().flat_map(|t| kvs.iter().map(move |kv| (*kv, *t))).collect()
    }

    fn facet_title(&self, (kv, threads): (Option<&str>, u64), several_threads: bool) -> String {
        let mut parts: Vec<String> = kv.map(|k| format!("{k} KV")).into_iter().collect();
        if several_threads {
            parts.push(thread_count(threads));
        }
        parts.join(", ")
    }

    /// The conditions that hold for the whole figure.
    pub(super) fn conditions(&self, threads: &[u64]) -> String {
        let one = |values: Vec<String>| (values.len() == 1).then(|| values[0].clone());
        let model = one(distinct(self.records.iter().map(|r| format!("{}, {} head", r.model, r.head))));
        let kv = one(distinct(self.records.iter().map(|r| format!("{} KV", r.kv_dtype))));
        let workload = one(distinct(self.records.iter().map(|r| format!("workload {}", r.workload))));
        let threads = (threads.len() == 1).then(|| thread_count(threads[0]));
        let method = self.one_method().then(|| format!("method {}", self.records[0].method_string()));
        [model, method, kv, workload, threads].into_iter().flatten().collect::<Vec<_>>().join(" · ")
    }

    /// Records by method, dense first.
    fn in_order(&self) -> Vec<&'a Record> {
        let mut records = self.records.clone();
        records.sort_by_key(|r| self.methods.iter().position(|m| *m == self.labels.method(r)));
        records
    }

    fn contexts(&self) -> Vec<u64> {
        let mut contexts = distinct(self.records.iter().map(|r| r.context_tokens));
        contexts.sort_unstable();
        contexts
    }

    fn max(&self, value: impl Fn(&Record) -> Option<f64>) -> f64 {
        self.records.iter().filter_map(|r| value(r)).fold(0.0, f64::max)
    }
}

/// Series at a single place of the axis would lie on each other: spread them a little, in order.
fn spread(panels: &mut [Panel], single: bool) {
    if !single {
        return;
    }
    for panel in panels {
        let n = panel.series.len() as f64;
        for (i, series) in panel.series.iter_mut().enumerate() {
            let factor = 2f64.powf((i as f64 - 0.5 * (n - 1.0)) * (0.7 / n.max(6.0)));
            series.points.iter_mut().for_each(|p| p.x *= factor);
        }
    }
}

/// A KV dtype as part of a file's name.
fn file_word(text: &str) -> String {
    text.replace(|c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c)), "-")
}

pub(super) fn thread_count(n: u64) -> String {
    format!("{n} {}", if n == 1 { "thread" } else { "threads" })
}

pub(super) fn columns(panels: usize) -> usize {
    match panels {
        0 | 1 => 1,
        2 | 4 => 2,
        7 | 8 => 4,
        _ => 3,
    }
}

/// Median speed: the figure that the interval belongs to.
fn median_speed(r: &Record) -> Option<f64> {
    Some(1e9 / r.tpot_p50_ns?.max(1) as f64)
}

/// Median speed interval as rates; the faster end belongs to the shorter time.
fn speed_whisker(r: &Record) -> Option<(f64, f64)> {
    let (lo, hi) = r.tpot_p50_lo95_ns.zip(r.tpot_p50_hi95_ns)?;
    Some((1e9 / hi.max(1) as f64, 1e9 / lo.max(1) as f64))
}

fn speed(look: &Look<'_>) -> Figure {
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

fn latency(look: &Look<'_>) -> Figure {
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

/// Speed against threads at the longest context, where several thread counts were measured.
fn threads(look: &Look<'_>) -> Option<Figure> {
    if look.threads.len() < 2 {
        return None;
    }
    let far = look.contexts().last().copied()?;
    let kvs: Vec<Option<&str>> =
        if look.split { look.kv_dtypes.iter().map(|k| Some(*k)).collect() } else { vec![None] };
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

/// What error is weighed against.
#[derive(Clone, Copy)]
enum Price {
    Speed,
    /// Bytes that a decode step reads of the cache and of the method's indexes.
    Traffic,
}

impl Price {
    fn of(self, r: &Record) -> Option<f64> {
        match self {
            Price::Speed => r.decode_tok_s,
            Price::Traffic => Some(r.cache_bytes_per_token().filter(|b| *b > 0)? as f64 / 1e6),
        }
    }

    fn file(self) -> &'static str {
        match self {
            Price::Speed => "error-speed",
            Price::Traffic => "error-traffic",
        }
    }

    fn title(self) -> (&'static str, &'static str) {
        match self {
            Price::Speed => ("decode speed", "lower right is better"),
            Price::Traffic => ("what a step reads", "lower left is better"),
        }
    }

    fn axis(self, values: &[f64]) -> Axis {
        let most = stats::max(values).unwrap_or(0.0);
        match self {
            Price::Speed => Axis::from_zero("Decode speed (tokens/s)", most),
            Price::Traffic => Axis::log(
                "Cached keys, values and indexes read per token (MB)",
                stats::min(values).unwrap_or(most),
                most,
            ),
        }
    }
}

/// Error against a price, one panel a context; one figure a KV dtype where they would not fit in one.
fn error_against(look: &Look<'_>, price: Price) -> Vec<Figure> {
    let threads = look.most_threads();
    let at_threads: Vec<&Record> = look.records.iter().copied().filter(|r| r.threads == threads).collect();
    let Some(loss) = Loss::of(at_threads.iter().copied()) else { return Vec::new() };
    let errors: Vec<f64> = at_threads
        .iter()
        .flat_map(|r| [loss.typical(r), loss.bad(r)])
        .flatten()
        .filter(|e| *e > NO_ERROR && !is_not_finite(*e))
        .collect();
    let (Some(lo), Some(hi)) = (stats::min(&errors), stats::max(&errors)) else { return Vec::new() };
    let y = Axis::log(loss.axis(), lo, hi);
    let floor = y.range.0;
    let compared = at_threads.iter().filter(|r| loss.typical(r).is_some());
    let prices: Vec<f64> = compared.filter_map(|r| price.of(r)).collect();
    let x = price.axis(&prices);
    let exact = at_threads.iter().any(|r| loss.typical(r).is_some_and(|e| e <= NO_ERROR));
    let kvs: Vec<Option<&str>> =
        if look.split { look.kv_dtypes.iter().map(|k| Some(*k)).collect() } else { vec![None] };
    kvs.into_iter()
        .map(|kv| {
            let mut panels = Vec::new();
            for tokens in look.contexts() {
                let pass = |r: &Record| {
                    r.threads == threads && r.context_tokens == tokens && kv.is_none_or(|k| r.kv_dtype == k)
                };
                let mut series = look.series(&pass, &|r| {
                    // What is not finite has no place on an axis.
                    let typical = loss.typical(r).filter(|e| !is_not_finite(*e))?.max(floor);
                    let whisker =
                        loss.bad(r).filter(|e| !is_not_finite(*e)).map(|bad| (typical, bad.max(typical)));
                    Some(Point { x: price.of(r)?, y: typical, whisker })
                });
                series.iter_mut().for_each(|s| s.style = s.style.points());
                if !series.is_empty() {
                    panels.push(Panel { title: format!("{} tokens", context(tokens)), series });
                }
            }
            let note = if exact { "; no error: at the lower edge" } else { "" };
            let dtype = kv.map(|k| format!(", {k} KV")).unwrap_or_default();
            let (what, better) = price.title();
            Figure {
                name: kv.map_or(price.file().into(), |k| format!("{}-{}", price.file(), file_word(k))),
                title: format!("Error against {what} at each context{dtype} ({better})"),
                subtitle: format!("{} · {}{note}", look.conditions(&[threads]), loss.caption()),
                x: x.clone(),
                y: y.clone(),
                columns: columns(panels.len()),
                panels,
            }
        })
        .collect()
}

/// Latency percentile curves at the shortest and the longest context.
fn percentiles(look: &Look<'_>, lines: &[Line]) -> Figure {
    let times = summarise::token_times(lines);
    let threads = look.most_threads();
    let contexts = look.contexts();
    let ends = distinct([contexts.first().copied(), contexts.last().copied()].into_iter().flatten());
    let kvs: Vec<Option<&str>> =
        if look.split { look.kv_dtypes.iter().map(|k| Some(*k)).collect() } else { vec![None] };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::summarise::summarise;
    use crate::analyse::testing::Sweep;

    fn of(sweep: Sweep) -> Vec<Figure> {
        let (plan, machine, lines) = sweep.build();
        figures(&summarise(&plan, &machine, &lines), &lines)
    }

    fn names(figures: &[Figure]) -> Vec<&str> {
        figures.iter().map(|f| f.name.as_str()).collect()
    }

    #[test]
    fn two_dtypes_share_a_panel_and_many_get_their_own() {
        let two = of(Sweep::default());
        assert_eq!(names(&two), ["speed", "latency", "error-speed", "error-traffic", "percentiles"]);
        assert_eq!(two[0].panels.len(), 1);
        let legend: Vec<&str> = two[0].legend().into_iter().map(|e| e.0).collect();
        assert_eq!(legend[..2], ["dense, bf16 KV", "dense, int8 KV"]);
        assert!(
            legend.ends_with(&["bandwidth limit of dense, bf16", "bandwidth limit of dense, int8"]),
            "{legend:?}"
        );
        let three = of(Sweep { kv_dtypes: vec!["bf16", "int8", "int4"], ..Sweep::default() });
        assert_eq!(three[0].panels.len(), 3);
        assert_eq!(three[0].legend().len(), 4);
        assert!(names(&three).contains(&"error-speed-int4"));
    }

    #[test]
    fn a_text_is_drawn_by_its_divergence_and_the_axis_says_so() {
        let sweep = Sweep { kv_dtypes: vec!["bf16"], contexts: vec![8192], text: true, ..Sweep::default() };
        let figures = of(sweep);
        let figure = figures.iter().find(|f| f.name == "error-speed").unwrap();
        assert_eq!(figure.y.title, "KL divergence of the next token (nats)");
        assert!(figure.subtitle.contains("dense attention over a bf16 cache"), "{}", figure.subtitle);
        let window = figure.panels[0].series.iter().find(|s| s.name == "window").unwrap();
        assert!((window.points[0].y - 0.43f64.powi(2)).abs() < 1e-4, "{:?}", window.points);
    }

    #[test]
    fn error_is_drawn_against_everything_that_a_step_reads() {
        let figures = of(Sweep { kv_dtypes: vec!["bf16"], contexts: vec![8192, 32768], ..Sweep::default() });
        let figure = figures.iter().find(|f| f.name == "error-traffic").unwrap();
        assert_eq!(
            figure.panels.iter().map(|p| p.title.as_str()).collect::<Vec<_>>(),
            ["8k tokens", "32k tokens"]
        );
        let at = |method: &str| {
            figure.panels[0].series.iter().find(|s| s.name == method).map(|s| s.points[0]).unwrap()
        };
        let (dense, quest) = (at("dense"), at("quest"));
        assert!((dense.x - 8192.0 * 76_800.0 / 1e6).abs() < 1e-6);
        // A quarter of the rows, and an index.
        assert!((quest.x - (2048.0 * 76_800.0 + 240.0 * 8192.0) / 1e6).abs() < 1e-6);
        let (low, high) = quest.whisker.unwrap();
        assert!(low == quest.y && (high / low - 2.2).abs() < 1e-9 && quest.y > dense.y);
        assert!(figure.title.contains("lower left is better") && figure.x.title.contains("(MB)"));
    }

    #[test]
    fn the_limit_is_the_probe_over_all_bytes() {
        let figures = of(Sweep { kv_dtypes: vec!["bf16"], ..Sweep::default() });
        let limit = figures[0].panels[0].series.iter().find(|s| s.name.starts_with("bandwidth")).unwrap();
        let expected = 21e9 / (1_178_000_000.0 + 2048.0 * 76_800.0);
        assert!((limit.points[0].y / expected - 1.0).abs() < 1e-9);
        assert_eq!(limit.points.len(), 7);
    }

    #[test]
    fn a_single_context_spreads_its_points() {
        let figures = of(Sweep { contexts: vec![8192], kv_dtypes: vec!["bf16"], ..Sweep::default() });
        let xs: Vec<f64> = figures[0].panels[0].series.iter().take(3).map(|s| s.points[0].x).collect();
        assert!(xs[0] < xs[1] && xs[1] < xs[2]);
        assert!(xs.iter().all(|x| (0.0..=1.0).contains(&figures[0].x.place(*x))));
    }

    #[test]
    fn several_threads_get_a_figure() {
        let sweep = Sweep {
            threads: vec![1, 2],
            kv_dtypes: vec!["bf16"],
            contexts: vec![2048, 8192],
            ..Sweep::default()
        };
        let figures = of(sweep);
        assert!(names(&figures).contains(&"threads"));
        assert_eq!(
            figures[0].panels.iter().map(|p| p.title.as_str()).collect::<Vec<_>>(),
            ["1 thread", "2 threads"]
        );
    }

    #[test]
    fn every_point_lies_on_its_axes() {
        for f in of(Sweep { kv_dtypes: vec!["f32", "int4"], ..Sweep::default() }) {
            for p in f
                .panels
                .iter()
                .flat_map(|p| &p.series)
                .filter(|s| s.style.marker != super::super::figure::Marker::None)
                .flat_map(|s| &s.points)
            {
                assert!((-1e-9..=1.0 + 1e-9).contains(&f.x.place(p.x)), "{}: x {}", f.name, p.x);
                assert!((-1e-9..=1.0 + 1e-9).contains(&f.y.place(p.y)), "{}: y {}", f.name, p.y);
            }
        }
    }
}
