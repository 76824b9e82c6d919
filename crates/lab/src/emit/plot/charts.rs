//! Which figures a result fills.

use super::errors::{Price, error_against};
use super::figure::Figure;
use super::look::Look;
use super::speed::{speed, threads};
use super::times::{latency, percentiles};
use super::{batches, formats};
use crate::record::Record;
use crate::run::store::Line;

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
