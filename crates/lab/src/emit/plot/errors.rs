//! Error against what it is weighed with: decode speed, or the bytes that a step reads.

use longbit_protocol::is_not_finite;

use super::figure::{Axis, Figure, Panel, Point};
use super::look::{Look, columns};
use crate::analyse::label::context;
use crate::analyse::loss::Loss;
use crate::analyse::stats;
use crate::record::Record;

/// Errors up to this one are drawn as none.
pub(super) const NO_ERROR: f64 = 1e-7;

/// What error is weighed against.
#[derive(Clone, Copy)]
pub(super) enum Price {
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
pub(super) fn error_against(look: &Look<'_>, price: Price) -> Vec<Figure> {
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
    let kvs = look.kv_facets();
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

/// A KV dtype as part of a file's name.
fn file_word(text: &str) -> String {
    text.replace(|c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c)), "-")
}
