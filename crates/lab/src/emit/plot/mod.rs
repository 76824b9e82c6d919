//! Figures of a result as SVG and PNG: speed and latency against context, error against speed and against bytes read,
//! latency percentiles.

use std::path::{Path, PathBuf};

use crate::record::Record;
use crate::run::store::Line;
use crate::{LabError, Result};

mod backend;
pub mod bars;
mod batches;
mod charts;
mod errors;
pub mod figure;
mod formats;
mod layout;
mod look;
mod speed;
mod times;

pub use charts::figures;
use figure::Figure;

/// What was drawn.
#[derive(Clone, Debug, Default)]
pub struct Plots {
    /// The figures, in reading order.
    pub figures: Vec<Figure>,
    /// Their files.
    pub files: Vec<PathBuf>,
}

/// Draws every figure that the records can fill into `dir`, each as `name.svg` and `name.png`. Without a measured cell
/// there is none, and the directory is not made.
///
/// # Errors
/// [`LabError::Io`] when the directory or a file cannot be written, [`LabError::Plot`] when drawing fails.
pub fn write_figures(dir: &Path, records: &[Record], lines: &[Line]) -> Result<Plots> {
    let mut plots = Plots { figures: figures(records, lines), files: Vec::new() };
    if !plots.figures.is_empty() {
        std::fs::create_dir_all(dir).map_err(|e| LabError::io("create", dir, e))?;
    }
    for figure in &plots.figures {
        let (size, draw) =
            (layout::size(figure), |canvas: &mut dyn backend::Canvas| layout::draw(figure, canvas));
        let (svg, png) = (dir.join(format!("{}.svg", figure.name)), dir.join(format!("{}.png", figure.name)));
        backend::write_svg(&svg, size, &alt(figure), &draw)?;
        backend::write_png(&png, size, &draw)?;
        plots.files.extend([svg, png]);
    }
    Ok(plots)
}

/// What the figure shows, for those who do not see it.
fn alt(figure: &Figure) -> String {
    let series: Vec<&str> = figure.legend().into_iter().map(|(name, _)| name).collect();
    format!("{}. {} against {}. Series: {}.", figure.title, figure.y.title, figure.x.title, series.join(", "))
}

/// Markdown links to the SVG files of figures in `dir`, as seen from the page, with alternative texts.
pub fn links(figures: &[Figure], dir: &Path) -> String {
    let dir = dir.to_string_lossy().replace('\\', "/").replace(' ', "%20");
    let link = |f: &Figure| format!("![{}]({dir}/{}.svg)\n", alt(f).replace(['[', ']'], ""), f.name);
    figures.iter().map(link).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::summarise::summarise;
    use crate::analyse::testing::{self, Sweep};

    #[test]
    fn files_are_real_and_repeatable() {
        let (plan, machine, lines) = testing::with_gaps();
        let records = summarise(&plan, &machine, &lines);
        let dir = tempfile::tempdir().unwrap();
        let plots = write_figures(dir.path(), &records, &lines).unwrap();
        assert!(plots.files.len() >= 6 && plots.files.len() == 2 * plots.figures.len());
        let read = |p: &PathBuf| std::fs::read(p).unwrap();
        for file in &plots.files {
            let bytes = read(file);
            match file.extension().and_then(|e| e.to_str()) {
                Some("png") => assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 5_000),
                _ => {
                    let text = String::from_utf8(bytes).unwrap();
                    assert!(text.contains("<title>") && text.trim_end().ends_with("</svg>"));
                    assert!(!text.contains("2026-"), "no time stamp");
                }
            }
        }
        let svg = read(&plots.files[0]);
        write_figures(dir.path(), &records, &lines).unwrap();
        assert_eq!(svg, read(&plots.files[0]));
    }

    #[test]
    fn nothing_measured_draws_nothing() {
        let (plan, machine, _) = testing::results();
        let dir = tempfile::tempdir().unwrap();
        let plots = dir.path().join("plots");
        assert!(write_figures(&plots, &summarise(&plan, &machine, &[]), &[]).unwrap().files.is_empty());
        assert!(!plots.exists());
    }

    #[test]
    fn a_figure_that_cannot_be_written_leaves_nothing() {
        let (plan, machine, lines) = Sweep { contexts: vec![2048], ..Sweep::default() }.build();
        let records = summarise(&plan, &machine, &lines);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("plots");
        std::fs::write(&file, "in the way").unwrap();
        let error = write_figures(&file, &records, &lines).unwrap_err().to_string();
        assert!(error.contains("plots"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "in the way");
    }
}
