//! The only place that knows the drawing library: lines, shapes and text onto SVG or PNG.
//!
//! Everything is drawn four times as large as it is shown: the library works in whole units, so an SVG gets quarter
//! units that way, and a PNG is averaged down to twice the size, which smooths every edge.

use std::path::Path;
use std::sync::OnceLock;

use plotters::backend::{BitMapBackend, SVGBackend};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figure::Rgb;
use crate::emit::{commit, temporary, write_file};
use crate::{LabError, Result};

/// The font in the repository; the names after it are for readers of an SVG who do not have it.
const FAMILY: &str = "DejaVu Sans, Verdana, sans-serif";
static FONT: &[u8] = include_bytes!("../../../assets/fonts/DejaVuSans-subset.ttf");

/// Drawing units per unit of the figure.
const SCALE: f64 = 4.0;
/// Pixels of a PNG per unit of the figure.
const PIXELS: u32 = 2;

/// On a bitmap the library centres the box of the glyphs with room for descenders; on SVG the x-height.
const BITMAP_SINK: f64 = 0.18;

/// Where a text stands relative to its point, along the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    /// Begins there.
    Start,
    /// Is centred there.
    Middle,
    /// Ends there.
    End,
}

/// A surface in units of the figure, origin at the top left.
pub(super) trait Canvas {
    /// A connected line.
    fn line(&mut self, points: &[(f64, f64)], color: Rgb, width: f64);
    /// A filled shape.
    fn polygon(&mut self, points: &[(f64, f64)], color: Rgb);
    /// A filled disc.
    fn disc(&mut self, centre: (f64, f64), radius: f64, color: Rgb);
    /// One line of text, vertically centred on the point; upright, or read from below when `turned`.
    fn text(&mut self, text: &str, at: (f64, f64), size: f64, color: Rgb, align: Align, turned: bool);
}

/// Registers the font once.
fn font() -> Result<(), String> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let done = *REGISTERED.get_or_init(|| register_font(FAMILY, FontStyle::Normal, FONT).is_ok());
    if done { Ok(()) } else { Err("the font in the binary cannot be read".to_owned()) }
}

/// Width of a text in units of the figure.
pub(super) fn text_width(text: &str, size: f64) -> f64 {
    // Without the font nothing can be drawn anyway, and that is reported then.
    let measured = font().ok().and_then(|()| (FAMILY, size * SCALE).into_font().box_size(text).ok());
    measured.map_or(0.6 * size * text.chars().count() as f64, |(w, _)| f64::from(w) / SCALE)
}

/// A drawing area of the library; the first failure is kept.
struct Area<DB: DrawingBackend> {
    area: DrawingArea<DB, Shift>,
    /// Share of the text size by which the library centres text too high on this kind of surface.
    sink: f64,
    failed: Option<String>,
}

impl<DB: DrawingBackend> Area<DB> {
    fn keep<E: std::fmt::Display>(&mut self, done: std::result::Result<(), E>) {
        if let Err(e) = done {
            self.failed.get_or_insert_with(|| e.to_string());
        }
    }
}

fn unit(value: f64) -> i32 {
    (value * SCALE).round() as i32
}

fn units(points: &[(f64, f64)]) -> Vec<(i32, i32)> {
    points.iter().map(|p| (unit(p.0), unit(p.1))).collect()
}

fn paint(c: Rgb) -> RGBColor {
    RGBColor(c.0, c.1, c.2)
}

impl<DB: DrawingBackend> Canvas for Area<DB> {
    fn line(&mut self, points: &[(f64, f64)], color: Rgb, width: f64) {
        let style = paint(color).stroke_width(unit(width).max(1) as u32);
        let done = self.area.draw(&PathElement::new(units(points), style));
        self.keep(done);
    }

    fn polygon(&mut self, points: &[(f64, f64)], color: Rgb) {
        let done = self.area.draw(&Polygon::new(units(points), paint(color).filled()));
        self.keep(done);
    }

    fn disc(&mut self, centre: (f64, f64), radius: f64, color: Rgb) {
        let done = self.area.draw(&Circle::new(
            (unit(centre.0), unit(centre.1)),
            unit(radius),
            paint(color).filled(),
        ));
        self.keep(done);
    }

    fn text(&mut self, text: &str, at: (f64, f64), size: f64, color: Rgb, align: Align, turned: bool) {
        let h = match align {
            Align::Start => HPos::Left,
            Align::Middle => HPos::Center,
            Align::End => HPos::Right,
        };
        let font = (FAMILY, size * SCALE).into_font();
        let font = if turned { font.transform(FontTransform::Rotate270) } else { font };
        let style = font.color(&paint(color)).pos(Pos::new(h, VPos::Center));
        let sink = self.sink * size;
        let at = if turned { (at.0 + sink, at.1) } else { (at.0, at.1 + sink) };
        let done = self.area.draw(&Text::new(text.to_owned(), (unit(at.0), unit(at.1)), style));
        self.keep(done);
    }
}

fn draw_on<DB: DrawingBackend>(backend: DB, sink: f64, draw: &dyn Fn(&mut dyn Canvas)) -> Result<(), String> {
    font()?;
    let area = backend.into_drawing_area();
    let mut canvas = Area { area, sink, failed: None };
    let done = canvas.area.fill(&WHITE);
    canvas.keep(done);
    draw(&mut canvas);
    let done = canvas.area.present();
    canvas.keep(done);
    canvas.failed.map_or(Ok(()), Err)
}

fn scaled(size: (f64, f64)) -> (u32, u32) {
    ((size.0 * SCALE).round() as u32, (size.1 * SCALE).round() as u32)
}

/// Draws `size` units onto an SVG file with an alternative text.
///
/// # Errors
/// [`LabError::Plot`] when drawing fails, [`LabError::Io`] when writing does.
pub(super) fn write_svg(
    path: &Path,
    size: (f64, f64),
    alt: &str,
    draw: &dyn Fn(&mut dyn Canvas),
) -> Result<()> {
    let plot = |what: String| LabError::Plot { path: path.to_path_buf(), what };
    let (w, h) = scaled(size);
    let mut text = String::new();
    draw_on(SVGBackend::with_string(&mut text, (w, h)), 0.0, draw).map_err(plot)?;
    // Shown at the size of the figure; the finer units stay in the view box.
    let large = format!("width=\"{w}\" height=\"{h}\" viewBox");
    let shown = format!("role=\"img\" width=\"{}\" height=\"{}\" viewBox", size.0.round(), size.1.round());
    let escaped = alt.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let text = text.replacen(&large, &shown, 1);
    let text = match text.find("<svg").and_then(|open| text[open..].find('>').map(|close| open + close + 1)) {
        Some(end) => format!("{}\n<title>{escaped}</title>{}", &text[..end], &text[end..]),
        None => return Err(plot("the drawing library returned no SVG".to_owned())),
    };
    write_file(path, text.as_bytes())
}

/// Draws `size` units onto a PNG file of twice as many pixels each way.
///
/// # Errors
/// [`LabError::Plot`] when drawing or encoding fails, [`LabError::Io`] when renaming does.
pub(super) fn write_png(path: &Path, size: (f64, f64), draw: &dyn Fn(&mut dyn Canvas)) -> Result<()> {
    let plot = |what: String| LabError::Plot { path: path.to_path_buf(), what };
    let (w, h) = scaled(size);
    let mut pixels = vec![255u8; w as usize * h as usize * 3];
    draw_on(BitMapBackend::with_buffer(&mut pixels, (w, h)), BITMAP_SINK, draw).map_err(plot)?;
    let block = SCALE as u32 / PIXELS;
    let (small, sw, sh) = shrink(&pixels, w as usize, h as usize, block as usize);
    let temporary = temporary(path);
    let encode = || {
        let mut file = BitMapBackend::new(&temporary, (sw as u32, sh as u32));
        file.blit_bitmap((0, 0), (sw as u32, sh as u32), &small)?;
        file.present()
    };
    let written = encode().map_err(|e| plot(e.to_string()));
    commit(written, &temporary, path)
}

/// Averages blocks of `block` x `block` pixels.
fn shrink(pixels: &[u8], w: usize, h: usize, block: usize) -> (Vec<u8>, usize, usize) {
    let (sw, sh) = (w / block, h / block);
    let mut small = Vec::with_capacity(sw * sh * 3);
    for y in 0..sh {
        for x in 0..sw {
            for channel in 0..3 {
                let sum: usize = (0..block)
                    .flat_map(|dy| {
                        (0..block).map(move |dx| ((y * block + dy) * w + x * block + dx) * 3 + channel)
                    })
                    .map(|at| usize::from(pixels[at]))
                    .sum();
                small.push((sum / (block * block)) as u8);
            }
        }
    }
    (small, sw, sh)
}
