//! Where everything goes: title, panels with ticks and grid, and the legend outside of them, so that nothing covers data.

use super::backend::{Align, Canvas, text_width};
use super::figure::{Axis, Figure, Marker, Panel, Rgb, Style};

pub(super) const INK: Rgb = (20, 20, 20);
pub(super) const FAINT: Rgb = (95, 95, 95);
pub(super) const GRID: Rgb = (226, 226, 226);
const WHITE: Rgb = (255, 255, 255);
pub(super) const TITLE: f64 = 19.0;
pub(super) const SUBTITLE: f64 = 13.0;
pub(super) const AXIS: f64 = 14.0;
pub(super) const TICK: f64 = 12.5;
const GAP: f64 = 22.0;

/// Sizes that follow from a figure.
struct Geometry {
    size: (f64, f64),
    title: Vec<String>,
    subtitle: Vec<String>,
    left: f64,
    top: f64,
    panel: (f64, f64),
    rows: usize,
    columns: usize,
    panel_title: f64,
    legend_x: f64,
}

impl Geometry {
    fn new(figure: &Figure) -> Self {
        let columns = figure.columns.clamp(1, figure.panels.len().max(1));
        let rows = figure.panels.len().max(1).div_ceil(columns);
        let panel = match columns {
            1 if rows == 1 => (640.0, 420.0),
            1 => (640.0, 260.0),
            2 => (420.0, 300.0),
            3 => (300.0, 230.0),
            _ => (240.0, 220.0),
        };
        let tick = figure.y.ticks.iter().map(|t| text_width(&t.1, TICK)).fold(0.0, f64::max);
        let left = 14.0 + AXIS + 14.0 + tick + 8.0;
        let legend = figure.legend().iter().map(|(n, _)| text_width(n, TICK)).fold(0.0, f64::max);
        let legend_x = left + columns as f64 * panel.0 + (columns - 1) as f64 * GAP + 22.0;
        let width = legend_x + 46.0 + legend + 16.0;
        let title = wrap(&figure.title, TITLE, width - 32.0);
        let subtitle = wrap(&figure.subtitle, SUBTITLE, width - 32.0);
        let panel_title = if figure.panels.iter().all(|p| p.title.is_empty()) { 0.0 } else { 24.0 };
        let top = 18.0
            + title.len() as f64 * TITLE * 1.3
            + subtitle.len() as f64 * SUBTITLE * 1.4
            + 12.0
            + panel_title;
        let panels = rows as f64 * panel.1 + (rows - 1) as f64 * (GAP + panel_title + TICK);
        let legend_bottom = top + figure.legend().len() as f64 * TICK * 1.7 + 20.0;
        let height = (top + panels + 22.0 + TICK + AXIS + 22.0).max(legend_bottom);
        Geometry {
            size: (width.ceil(), height.ceil()),
            title,
            subtitle,
            left,
            top,
            panel,
            rows,
            columns,
            panel_title,
            legend_x,
        }
    }

    /// Top left of a panel.
    fn origin(&self, index: usize) -> (f64, f64) {
        let (row, column) = (index / self.columns, index % self.columns);
        (
            self.left + column as f64 * (self.panel.0 + GAP),
            self.top + row as f64 * (self.panel.1 + GAP + self.panel_title + TICK),
        )
    }
}

/// Size of a figure in its units.
pub(super) fn size(figure: &Figure) -> (f64, f64) {
    Geometry::new(figure).size
}

/// Draws a figure.
pub(super) fn draw(figure: &Figure, canvas: &mut dyn Canvas) {
    let g = Geometry::new(figure);
    let mut y = 18.0;
    for line in &g.title {
        canvas.text(line, (16.0, y + TITLE * 0.5), TITLE, INK, Align::Start, false);
        y += TITLE * 1.3;
    }
    for line in &g.subtitle {
        canvas.text(line, (16.0, y + SUBTITLE * 0.6), SUBTITLE, FAINT, Align::Start, false);
        y += SUBTITLE * 1.4;
    }
    for (index, panel) in figure.panels.iter().enumerate() {
        let below_is_free = index + g.columns >= figure.panels.len();
        draw_panel(figure, panel, &g, g.origin(index), index % g.columns == 0, below_is_free, canvas);
    }
    let width = g.columns as f64 * g.panel.0 + (g.columns - 1) as f64 * GAP;
    let last = g.origin((g.rows - 1) * g.columns).1 + g.panel.1;
    let x_title = (g.left + 0.5 * width, last + 14.0 + TICK + 0.5 * AXIS + 8.0);
    canvas.text(&figure.x.title, x_title, AXIS, INK, Align::Middle, false);
    let middle = 0.5 * (g.top + last);
    canvas.text(&figure.y.title, (14.0 + 0.5 * AXIS, middle), AXIS, INK, Align::Middle, true);
    for (i, (name, style)) in figure.legend().into_iter().enumerate() {
        let at = g.top + 10.0 + i as f64 * TICK * 1.7;
        let ends = [(g.legend_x, at), (g.legend_x + 34.0, at)];
        if let Some(dash) = style.dash {
            dashed(&ends, style, dash, canvas);
        }
        marker((g.legend_x + 17.0, at), style, canvas);
        canvas.text(name, (g.legend_x + 44.0, at), TICK, INK, Align::Start, false);
    }
}

fn draw_panel(
    figure: &Figure,
    panel: &Panel,
    g: &Geometry,
    (left, top): (f64, f64),
    y_labels: bool,
    x_labels: bool,
    canvas: &mut dyn Canvas,
) {
    let (w, h) = g.panel;
    let (right, bottom) = (left + w, top + h);
    let px = |v: f64| left + figure.x.place(v) * w;
    let py = |v: f64| bottom - figure.y.place(v) * h;
    if !panel.title.is_empty() {
        canvas.text(&panel.title, (left + 2.0, top - 12.0), AXIS, INK, Align::Start, false);
    }
    for (value, text) in &figure.y.ticks {
        let y = py(*value);
        canvas.line(&[(left, y), (right, y)], GRID, 0.8);
        if y_labels {
            canvas.text(text, (left - 8.0, y), TICK, INK, Align::End, false);
        }
    }
    for (value, _) in &figure.x.ticks {
        canvas.line(&[(px(*value), top), (px(*value), bottom)], GRID, 0.8);
    }
    for value in labelled(&figure.x, w) {
        let (x, text) = (px(figure.x.ticks[value].0), &figure.x.ticks[value].1);
        canvas.line(&[(x, bottom), (x, bottom + 4.0)], INK, 0.9);
        if x_labels {
            canvas.text(text, (x, bottom + 8.0 + 0.5 * TICK), TICK, INK, Align::Middle, false);
        }
    }
    canvas.line(&[(left, top), (left, bottom), (right, bottom)], INK, 1.0);

    let clamp = |p: (f64, f64)| (p.0.clamp(left, right), p.1.clamp(top, bottom));
    for series in &panel.series {
        let at: Vec<(f64, f64)> = series.points.iter().map(|p| clamp((px(p.x), py(p.y)))).collect();
        if let Some(dash) = series.style.dash {
            dashed(&at, series.style, dash, canvas);
        }
        for (point, &(x, _)) in series.points.iter().zip(&at) {
            let Some((lo, hi)) = point.whisker else { continue };
            let (low, high) = (clamp((x, py(lo))).1, clamp((x, py(hi))).1);
            let color = series.style.color;
            canvas.line(&[(x, low), (x, high)], color, 1.1);
            for y in [low, high] {
                canvas.line(&[(x - 3.5, y), (x + 3.5, y)], color, 1.1);
            }
        }
    }
    // Markers over all lines, the first series on top: it is the one the others are compared with.
    for series in panel.series.iter().rev() {
        for p in &series.points {
            marker(clamp((px(p.x), py(p.y))), series.style, canvas);
        }
    }
}

/// Ticks whose labels fit beside each other; the first and the last take precedence.
fn labelled(axis: &Axis, width: f64) -> Vec<usize> {
    let span = |i: usize| {
        let (value, text) = &axis.ticks[i];
        let half = 0.5 * text_width(text, TICK) + 3.0;
        let centre = axis.place(*value) * width;
        (centre - half, centre + half)
    };
    let mut chosen: Vec<usize> = Vec::new();
    let n = axis.ticks.len();
    let order = [0, n.saturating_sub(1)].into_iter().chain(1..n.saturating_sub(1));
    for i in order.filter(|i| *i < n) {
        let (a, b) = span(i);
        if chosen.iter().all(|&c| span(c).1 <= a || b <= span(c).0) {
            chosen.push(i);
        }
    }
    chosen
}

/// A line in strokes and gaps.
fn dashed(points: &[(f64, f64)], style: Style, dash: &[f64], canvas: &mut dyn Canvas) {
    if points.len() < 2 {
        return;
    }
    if dash.is_empty() {
        return canvas.line(points, style.color, style.width);
    }
    let (mut piece, mut left, mut on) = (0, dash[0], true);
    let mut stroke = vec![points[0]];
    for pair in points.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let length = (b.0 - a.0).hypot(b.1 - a.1);
        let mut done = 0.0;
        while length - done > left {
            done += left;
            let t = done / length;
            let at = (a.0 + t * (b.0 - a.0), a.1 + t * (b.1 - a.1));
            if on {
                stroke.push(at);
                canvas.line(&stroke, style.color, style.width);
            }
            stroke = vec![at];
            on = !on;
            piece = (piece + 1) % dash.len();
            left = dash[piece];
        }
        left -= length - done;
        if on {
            stroke.push(b);
        }
    }
    if on && stroke.len() > 1 {
        canvas.line(&stroke, style.color, style.width);
    }
}

fn marker(at: (f64, f64), style: Style, canvas: &mut dyn Canvas) {
    let shape = |radius: f64| -> Vec<(f64, f64)> {
        let ring = |n: usize, turn: f64, r: &dyn Fn(usize) -> f64| {
            let angle = |i: usize| std::f64::consts::TAU * (i as f64 / n as f64 + turn);
            (0..n).map(|i| (at.0 + r(i) * angle(i).sin(), at.1 - r(i) * angle(i).cos())).collect::<Vec<_>>()
        };
        let even = |r: f64| move |_: usize| r;
        match style.marker {
            Marker::Square => ring(4, 0.125, &even(radius * 1.3)),
            Marker::Up => ring(3, 0.0, &even(radius * 1.4)),
            Marker::Diamond => ring(4, 0.0, &even(radius * 1.4)),
            Marker::Down => ring(3, 0.5, &even(radius * 1.4)),
            Marker::Star => ring(10, 0.0, &|i| if i % 2 == 0 { radius * 1.6 } else { radius * 0.7 }),
            Marker::Plus => {
                let (l, s) = (radius * 1.35, radius * 0.45);
                [
                    (s, l),
                    (s, s),
                    (l, s),
                    (l, -s),
                    (s, -s),
                    (s, -l),
                    (-s, -l),
                    (-s, -s),
                    (-l, -s),
                    (-l, s),
                    (-s, s),
                    (-s, l),
                ]
                .iter()
                .map(|d| (at.0 + d.0, at.1 + d.1))
                .collect()
            }
            Marker::Circle | Marker::None => Vec::new(),
        }
    };
    let mut fill = |radius: f64, color: Rgb| match style.marker {
        Marker::None => {}
        Marker::Circle => canvas.disc(at, radius, color),
        _ => canvas.polygon(&shape(radius), color),
    };
    // A white rim keeps neighbours apart.
    fill(5.6, WHITE);
    fill(4.6, style.color);
    if style.hollow {
        fill(2.7, WHITE);
    }
}

/// Breaks a text at spaces so that no line is wider than `width`.
pub(super) fn wrap(text: &str, size: f64, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let joined = lines.last().map(|line| format!("{line} {word}"));
        match (joined, lines.last_mut()) {
            (Some(joined), Some(last)) if text_width(&joined, size) <= width => *last = joined,
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
