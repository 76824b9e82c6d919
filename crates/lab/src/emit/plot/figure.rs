//! What a figure shows, without how it is drawn: panels with shared axes, series of points, one legend.

use crate::analyse::label;

/// A colour.
pub type Rgb = (u8, u8, u8);

/// Okabe and Ito's colours (distinguishable with every common colour-vision deficiency) from dark to light, so that
/// neighbours also differ in greyscale; their yellow is left out, for it vanishes on white.
pub const PALETTE: [Rgb; 7] =
    [(0, 0, 0), (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)];

/// Shape of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    /// Disc.
    Circle,
    /// Square.
    Square,
    /// Triangle, point up.
    Up,
    /// Square on its corner.
    Diamond,
    /// Triangle, point down.
    Down,
    /// Five-pointed star.
    Star,
    /// Upright cross.
    Plus,
    /// None: the series is a line only.
    None,
}

const MARKERS: [Marker; 7] =
    [Marker::Circle, Marker::Square, Marker::Up, Marker::Diamond, Marker::Down, Marker::Star, Marker::Plus];

/// Lengths of strokes and gaps; empty is a solid line.
pub type Dash = &'static [f64];

const DASHES: [Dash; 5] = [&[], &[7.0, 3.0], &[2.0, 2.5], &[9.0, 3.0, 2.0, 3.0], &[14.0, 4.0]];

/// How a series looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Style {
    /// Colour of line and markers.
    pub color: Rgb,
    /// Shape of its points.
    pub marker: Marker,
    /// Points are outlines.
    pub hollow: bool,
    /// Line pattern; `None` draws no line.
    pub dash: Option<Dash>,
    /// Line width.
    pub width: f64,
}

impl Style {
    /// The `n`-th of a family in which colour, shape and pattern change together, so that any one of them is enough.
    pub fn nth(n: usize) -> Style {
        let cycle = n / PALETTE.len();
        Style {
            color: PALETTE[n % PALETTE.len()],
            // After filled and outlined ones of a colour the shapes change places.
            marker: MARKERS[(n + 3 * (cycle / 2)) % MARKERS.len()],
            hollow: cycle % 2 == 1,
            dash: Some(DASHES[n % DASHES.len()]),
            width: 1.8,
        }
    }

    /// A thin grey line for a limit, the `n`-th pattern.
    pub fn limit(n: usize) -> Style {
        Style {
            color: (120, 120, 120),
            marker: Marker::None,
            hollow: false,
            dash: Some(DASHES[(n + 2) % DASHES.len()]),
            width: 1.1,
        }
    }

    /// The same colour and shape, drawn as outlines with another line pattern: a second member of a pair.
    #[must_use]
    pub fn paired(self, second: bool) -> Style {
        Style { hollow: second, dash: Some(if second { DASHES[1] } else { DASHES[0] }), ..self }
    }

    /// Points without a line.
    #[must_use]
    pub fn points(self) -> Style {
        Style { dash: None, ..self }
    }
}

/// One measured point with an optional interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Horizontal value.
    pub x: f64,
    /// Vertical value.
    pub y: f64,
    /// Ends of the whisker.
    pub whisker: Option<(f64, f64)>,
}

/// Points that belong together.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Text of the legend.
    pub name: String,
    /// How it looks.
    pub style: Style,
    /// Its points in drawing order.
    pub points: Vec<Point>,
}

/// One pair of axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// What distinguishes it; empty when it is alone.
    pub title: String,
    /// What it shows.
    pub series: Vec<Series>,
}

/// How values become lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Proportional.
    Linear,
    /// Equal ratios, equal lengths.
    Log,
    /// For percentiles in percent: equal steps from 90 to 99 to 99.9.
    Tail,
}

/// An axis that all panels of a figure share.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// Quantity with its unit.
    pub title: String,
    /// How values become lengths.
    pub scale: Scale,
    /// First and last value shown.
    pub range: (f64, f64),
    /// Where the labels stand.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Place of a value: 0 at the start of the axis, 1 at its end.
    pub fn place(&self, value: f64) -> f64 {
        let f = |v: f64| match self.scale {
            Scale::Linear => v,
            Scale::Log => v.max(f64::MIN_POSITIVE).ln(),
            Scale::Tail => -(1.0 - v / 100.0).max(1e-9).log10(),
        };
        let (a, b) = (f(self.range.0), f(self.range.1));
        if b > a { (f(value) - a) / (b - a) } else { 0.5 }
    }

    /// Counts that double (contexts, threads): a tick at each value that occurs.
    pub fn doubling(title: &str, values: &[u64], show: fn(u64) -> String) -> Axis {
        let mut at: Vec<u64> = values.iter().copied().filter(|v| *v > 0).collect();
        at.sort_unstable();
        at.dedup();
        let lo = at.first().copied().unwrap_or(1) as f64;
        let hi = at.last().copied().unwrap_or(1) as f64;
        let room = if at.len() < 2 { 1.5 } else { (hi / lo).powf(0.04) };
        let ticks = at.into_iter().map(|v| (v as f64, show(v))).collect();
        Axis { title: title.to_owned(), scale: Scale::Log, range: (lo / room, hi * room), ticks }
    }

    /// From zero to a little above `max`, with round steps.
    pub fn from_zero(title: &str, max: f64) -> Axis {
        let max = if max.is_finite() && max > 0.0 { max * 1.06 } else { 1.0 };
        let raw = max / 6.0;
        let power = 10f64.powf(raw.log10().floor());
        let step =
            [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw).unwrap_or(raw);
        let decimals = (0..6).find(|d| (step * 10f64.powi(*d)).fract().abs() < 1e-9).unwrap_or(6) as usize;
        let ticks = (0..=(max / step + 1e-9).floor() as usize).map(|i| i as f64 * step);
        Axis {
            title: title.to_owned(),
            scale: Scale::Linear,
            range: (0.0, max),
            ticks: ticks.map(|v| (v, format!("{v:.decimals$}"))).collect(),
        }
    }

    /// A logarithmic axis that holds `lo..hi`, with ticks at 1, 2 and 5 times powers of ten, or at powers of ten alone
    /// when there are many.
    pub fn log(title: &str, lo: f64, hi: f64) -> Axis {
        let (lo, hi) =
            if lo.is_finite() && hi.is_finite() && lo > 0.0 && hi >= lo { (lo, hi) } else { (0.1, 10.0) };
        let room = (hi / lo).powf(0.05).max(1.15);
        let range = (lo / room, hi * room);
        let (first, last) = (range.0.log10().floor() as i32, range.1.log10().ceil() as i32);
        let steps: &[f64] = match (range.1 / range.0).log10() {
            d if d > 3.0 => &[1.0],
            d if d > 0.6 => &[1.0, 2.0, 5.0],
            _ => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        };
        let show = |v: f64| {
            let text = label::digits(v);
            if text.contains('.') {
                text.trim_end_matches('0').trim_end_matches('.').to_owned()
            } else {
                text
            }
        };
        let ticks = (first..=last)
            .flat_map(|e| steps.iter().map(move |m| m * 10f64.powi(e)))
            .filter(|v| *v >= range.0 && *v <= range.1)
            .map(|v| (v, show(v)))
            .collect();
        Axis { title: title.to_owned(), scale: Scale::Log, range, ticks }
    }

    /// Percentiles from 0 to a little beyond `last`.
    pub fn tail(title: &str, last: f64) -> Axis {
        let end = last.clamp(50.0, 99.999);
        let ticks = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99];
        let ticks = ticks.into_iter().filter(|t| *t <= end).map(|t| (t, t.to_string())).collect();
        Axis { title: title.to_owned(), scale: Scale::Tail, range: (0.0, end + (100.0 - end) * 0.15), ticks }
    }
}

/// A figure: panels in rows of `columns`, all with the same axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Name of the file without its ending.
    pub name: String,
    /// What is shown.
    pub title: String,
    /// Under which conditions.
    pub subtitle: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// The panels.
    pub panels: Vec<Panel>,
    /// Panels in a row.
    pub columns: usize,
}

impl Figure {
    /// Series by name in order of appearance, for the legend.
    pub fn legend(&self) -> Vec<(&str, Style)> {
        let mut entries: Vec<(&str, Style)> = Vec::new();
        for series in self.panels.iter().flat_map(|p| &p.series) {
            if !series.points.is_empty() && entries.iter().all(|(name, _)| *name != series.name) {
                entries.push((&series.name, series.style));
            }
        }
        // Limits last, whatever the panel in which they came first.
        entries.sort_by_key(|(_, style)| style.marker == Marker::None);
        entries
    }

    /// Whether anything would be drawn.
    pub fn is_empty(&self) -> bool {
        self.panels.iter().flat_map(|p| &p.series).all(|s| s.points.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn styles_of_twenty_series_all_differ_without_colour() {
        let grey = |s: Style| (s.marker, s.hollow, s.dash);
        let styles: Vec<_> = (0..20).map(|n| grey(Style::nth(n))).collect();
        for i in 0..styles.len() {
            assert!(!styles[..i].contains(&styles[i]), "{i}");
        }
    }

    #[test]
    fn palette_goes_from_dark_to_light() {
        let luminance = |c: Rgb| 0.2126 * f64::from(c.0) + 0.7152 * f64::from(c.1) + 0.0722 * f64::from(c.2);
        assert!(
            luminance(PALETTE[0]) < luminance(PALETTE[1]) && luminance(PALETTE[5]) > luminance(PALETTE[2])
        );
        for (i, c) in PALETTE.iter().enumerate() {
            assert!(!PALETTE[..i].contains(c));
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::from_zero("tok/s", 28.3);
        assert_eq!(
            axis.ticks.iter().map(|t| t.1.as_str()).collect::<Vec<_>>(),
            ["0", "5", "10", "15", "20", "25"]
        );
        let axis = Axis::log("ms", 35.0, 81.0);
        assert!(axis.ticks.len() >= 3 && axis.ticks.iter().all(|t| (0.0..=1.0).contains(&axis.place(t.0))));
        let axis = Axis::log("error", 0.002, 0.9);
        assert_eq!(
            axis.ticks.iter().map(|t| t.1.as_str()).collect::<Vec<_>>(),
            ["0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]
        );
        let axis = Axis::doubling("context", &[2048, 98304, 2048], label::context);
        assert_eq!(axis.ticks, [(2048.0, "2k".to_owned()), (98304.0, "96k".to_owned())]);
        let one = Axis::doubling("context", &[2048], label::context);
        assert!((one.place(2048.0) - 0.5).abs() < 1e-9);
        assert!(
            Axis::from_zero("x", f64::NAN).ticks.len() > 2
                && Axis::log("x", 0.0, f64::INFINITY).ticks.len() > 2
        );
    }
}
