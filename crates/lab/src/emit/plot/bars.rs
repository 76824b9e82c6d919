//! Horizontal bars with their numbers beside them, for parts of a whole.

use std::path::{Path, PathBuf};

use super::backend::{self, Align, Canvas, text_width};
use super::figure::{Axis, PALETTE, Rgb};
use super::layout::{AXIS, FAINT, GRID, INK, SUBTITLE, TICK, TITLE, wrap};
use crate::Result;

/// A chart of bars, a panel a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// Name of the files without their ending.
    pub name: String,
    /// What is shown.
    pub title: String,
    /// Under which conditions.
    pub subtitle: String,
    /// Quantity of the bars with its unit.
    pub unit: String,
    /// The wholes, below each other; each has a scale of its own.
    pub panels: Vec<Panel>,
}

/// One whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Panel {
    /// What it is.
    pub title: String,
    /// Its parts, from top to bottom.
    pub bars: Vec<Bar>,
}

/// One part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bar {
    /// Words to the left.
    pub label: String,
    /// Length.
    pub value: f64,
    /// Words to the right.
    pub note: String,
    /// Drawn grey: nothing is done there.
    pub faint: bool,
}

const BAR: f64 = 22.0;
const WIDTH: f64 = 420.0;
const GREY: Rgb = (170, 170, 170);

/// Draws the chart as `name.svg` and `name.png` into `dir`.
///
/// # Errors
/// [`crate::LabError::Io`] when a file cannot be written, [`crate::LabError::Plot`] when drawing fails.
pub fn write(chart: &Chart, dir: &Path) -> Result<Vec<PathBuf>> {
    let size = Geometry::new(chart).size;
    let draw = |canvas: &mut dyn Canvas| draw(chart, canvas);
    let (svg, png) = (dir.join(format!("{}.svg", chart.name)), dir.join(format!("{}.png", chart.name)));
    let parts: Vec<String> = chart
        .panels
        .iter()
        .map(|p| {
            let bars: Vec<String> = p.bars.iter().map(|b| format!("{} {}", b.label, b.note)).collect();
            format!("{}: {}", p.title, bars.join("; "))
        })
        .collect();
    let alt = format!("{}. {}. {}.", chart.title, chart.unit, parts.join(". "));
    backend::write_svg(&svg, size, &alt, &draw)?;
    backend::write_png(&png, size, &draw)?;
    Ok(vec![svg, png])
}

struct Geometry {
    size: (f64, f64),
    left: f64,
    top: f64,
    subtitle: Vec<String>,
}

impl Geometry {
    fn new(chart: &Chart) -> Self {
        let bars = || chart.panels.iter().flat_map(|p| &p.bars);
        let widest = |of: fn(&Bar) -> &str| bars().map(|b| text_width(of(b), TICK)).fold(0.0, f64::max);
        let left = 16.0 + widest(|b| &b.label) + 10.0;
        let width = left + WIDTH + 10.0 + widest(|b| &b.note) + 16.0;
        let subtitle = wrap(&chart.subtitle, SUBTITLE, width - 32.0);
        let top = 18.0 + TITLE * 1.3 + subtitle.len() as f64 * SUBTITLE * 1.4 + 12.0;
        let height = chart.panels.iter().map(|p| panel_height(p) + 14.0).sum::<f64>() + top + AXIS + 8.0;
        Geometry { size: (width.ceil(), height.ceil()), left, top, subtitle }
    }
}

/// Title, bars and the labels of the scale.
fn panel_height(panel: &Panel) -> f64 {
    26.0 + panel.bars.len() as f64 * BAR + 8.0 + TICK + 8.0
}

fn draw(chart: &Chart, canvas: &mut dyn Canvas) {
    let g = Geometry::new(chart);
    canvas.text(&chart.title, (16.0, 18.0 + TITLE * 0.5), TITLE, INK, Align::Start, false);
    let mut y = 18.0 + TITLE * 1.3;
    for line in &g.subtitle {
        canvas.text(line, (16.0, y + SUBTITLE * 0.6), SUBTITLE, FAINT, Align::Start, false);
        y += SUBTITLE * 1.4;
    }
    let mut top = g.top;
    for panel in &chart.panels {
        canvas.text(&panel.title, (g.left, top + 12.0), AXIS, INK, Align::Start, false);
        let first = top + 26.0;
        let last = first + panel.bars.len() as f64 * BAR;
        let longest = panel.bars.iter().map(|b| b.value).filter(|v| v.is_finite()).fold(0.0, f64::max);
        let axis = Axis::from_zero("", longest);
        for (value, text) in &axis.ticks {
            let x = g.left + axis.place(*value) * WIDTH;
            canvas.line(&[(x, first), (x, last)], GRID, 0.8);
            canvas.text(text, (x, last + 6.0 + 0.5 * TICK), TICK, INK, Align::Middle, false);
        }
        for (i, bar) in panel.bars.iter().enumerate() {
            let middle = first + (i as f64 + 0.5) * BAR;
            let length = axis.place(bar.value).clamp(0.0, 1.0) * WIDTH;
            let (a, b) = (middle - 0.36 * BAR, middle + 0.36 * BAR);
            let corners = [(g.left, a), (g.left + length, a), (g.left + length, b), (g.left, b), (g.left, a)];
            canvas.polygon(&corners, if bar.faint { GREY } else { PALETTE[1] });
            canvas.text(&bar.label, (g.left - 8.0, middle), TICK, INK, Align::End, false);
            canvas.text(&bar.note, (g.left + length + 8.0, middle), TICK, INK, Align::Start, false);
        }
        canvas.line(&[(g.left, first), (g.left, last)], INK, 1.0);
        top += panel_height(panel) + 14.0;
    }
    let below = (g.left + 0.5 * WIDTH, top - 4.0);
    canvas.text(&chart.unit, below, AXIS, INK, Align::Middle, false);
}
