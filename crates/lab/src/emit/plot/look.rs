//! How the series of one result are told apart and laid out, the same way in all of its figures.

use super::figure::{Panel, Point, Series, Style};
use crate::analyse::label::{DENSE, Labels, distinct};
use crate::record::Record;

/// More panels than this in a figure of one line a method are too small to read.
const MAX_PANELS: usize = 9;

/// How the series of one result are told apart, the same way in all of its figures.
pub(super) struct Look<'a> {
    pub(super) records: Vec<&'a Record>,
    labels: Labels,
    methods: Vec<String>,
    pub(super) kv_dtypes: Vec<&'a str>,
    pub(super) threads: Vec<u64>,
    /// Each KV dtype has panels of its own, because one pair of axes would hold too many lines.
    pub(super) split: bool,
}

impl<'a> Look<'a> {
    pub(super) fn new(all: &[Record], records: &[&'a Record]) -> Self {
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

    pub(super) fn most_threads(&self) -> u64 {
        self.threads.iter().copied().max().unwrap_or(0)
    }

    fn one_method(&self) -> bool {
        distinct(self.records.iter().map(|r| self.labels.method(r))).len() == 1
    }

    /// Legend text: what differs.
    pub(super) fn name(&self, r: &Record) -> String {
        let method = self.labels.method(r);
        match (self.kv_dtypes.len() > 1, self.split, self.one_method()) {
            (true, false, true) => format!("{} KV", r.kv_dtype),
            (true, false, false) => format!("{method}, {} KV", r.kv_dtype),
            _ => method,
        }
    }

    pub(super) fn style(&self, r: &Record) -> Style {
        let method = self.methods.iter().position(|m| *m == self.labels.method(r)).unwrap_or(0);
        let kv = self.kv_dtypes.iter().position(|k| *k == r.kv_dtype).unwrap_or(0);
        match (self.kv_dtypes.len() > 1, self.split, self.one_method()) {
            (true, false, true) => Style::nth(kv),
            (true, false, false) => Style::nth(method).paired(kv == 1),
            _ => Style::nth(method),
        }
    }

    /// Series of the records that pass, one a method and KV dtype; a record may give no point.
    pub(super) fn series(
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

    /// KV dtypes that get panels of their own. `None` means "all of them in one".
    pub(super) fn kv_facets(&self) -> Vec<Option<&'a str>> {
        if self.split { self.kv_dtypes.iter().map(|k| Some(*k)).collect() } else { vec![None] }
    }

    /// KV dtypes and thread counts that get panels of their own. `None` means "all of them in one".
    pub(super) fn facets(&self, times: usize) -> Vec<(Option<&'a str>, u64)> {
        let kvs = self.kv_facets();
        let all = self.threads.len() > 1 && kvs.len() * self.threads.len() * times <= MAX_PANELS;
        let threads = if all { self.threads.clone() } else { vec![self.most_threads()] };
        threads.iter().flat_map(|t| kvs.iter().map(move |kv| (*kv, *t))).collect()
    }

    pub(super) fn facet_title(&self, (kv, threads): (Option<&str>, u64), several_threads: bool) -> String {
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
    pub(super) fn in_order(&self) -> Vec<&'a Record> {
        let mut records = self.records.clone();
        records.sort_by_key(|r| self.methods.iter().position(|m| *m == self.labels.method(r)));
        records
    }

    pub(super) fn contexts(&self) -> Vec<u64> {
        let mut contexts = distinct(self.records.iter().map(|r| r.context_tokens));
        contexts.sort_unstable();
        contexts
    }

    pub(super) fn max(&self, value: impl Fn(&Record) -> Option<f64>) -> f64 {
        self.records.iter().filter_map(|r| value(r)).fold(0.0, f64::max)
    }
}

/// Series at a single place of the axis would lie on each other: spread them a little, in order.
pub(super) fn spread(panels: &mut [Panel], single: bool) {
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
