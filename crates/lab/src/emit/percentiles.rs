//! `percentiles.csv`: the latency curve of each measured cell, from an HDR histogram with three significant digits.

use crate::analyse::{stats, summarise};
use crate::record::Record;
use crate::run::store::Line;

/// Columns of the file: name and meaning.
pub const COLUMNS: [(&str, &str); 3] = [
    ("cell_id", "The cell."),
    ("percentile", "Percent of the timed tokens that are not slower."),
    ("tpot_ns", "Time per token at that percentile, to three significant digits."),
];

/// The table as text, in the order of the records.
pub fn to_string(records: &[Record], lines: &[Line]) -> String {
    let times = summarise::token_times(lines);
    let mut text = COLUMNS.map(|c| c.0).join(",") + "\n";
    for record in records.iter().filter(|r| r.measured()) {
        let Some(reps) = times.get(&record.cell_id) else { continue };
        for (percentile, ns) in stats::percentile_curve(&reps.concat()) {
            text.push_str(&format!("{},{percentile},{ns}\n", record.cell_id));
        }
    }
    text
}
