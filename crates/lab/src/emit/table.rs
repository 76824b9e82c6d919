//! The table of cells that the terminal, `summary.md` and spliced reports share.

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use longbit_protocol::Status;

use crate::analyse::label::{Labels, context, digits, distinct, percent};
use crate::record::Record;

/// Headings and rows as text; the first `text_columns` of them are words, the rest numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Headings.
    pub head: Vec<String>,
    /// Rows, as long as the heading.
    pub body: Vec<Vec<String>>,
    /// Columns whose text is aligned to the left; all others to the right.
    pub left: Vec<usize>,
}

/// The measured cells: speed, latency, error and traffic. Columns that no cell fills are left out.
pub fn measured(records: &[Record]) -> Rows {
    let labels = Labels::new(records);
    let batches = records.iter().any(|r| r.batch_tokens() != 1);
    // Without a cache there is nothing to say of it.
    let cached = records.iter().any(|r| !r.one_matrix());
    // What tells KV dtypes apart is left out where there is but one.
    let formats = distinct(records.iter().map(|r| &r.kv_dtype)).len() > 1;
    let head = [
        "context",
        "threads",
        "batch",
        "KV",
        "method",
        "tok/s",
        "median, 95 %",
        "p50 ms",
        "p99 ms",
        "rel L2 p50",
        "rel L2 p95",
        "rel L2 max",
        "cosine",
        "logit error",
        "needles",
        "KL nats",
        "KL max",
        "top-1",
        "logit cosine",
        "perplexity",
        "KV MB/token",
        "kB stored",
        "append µs",
        "GB/s",
        "of bandwidth",
    ];
    let ms = |ns: Option<u64>| ns.map_or(String::new(), |ns| digits(ns as f64 / 1e6));
    let number = |v: Option<f64>| v.map_or(String::new(), digits);
    let share = |v: Option<f64>| v.map_or(String::new(), percent);
    let rows = records.iter().filter(|r| r.measured()).map(|r| {
        let mark = match r.status {
            Status::VerifyFailed => " (verify failed)",
            Status::Unstable => " (unstable)",
            _ if r.steady == Some(false) => " (drifts)",
            _ => "",
        };
        // The fastest median is the highest speed.
        let interval = r.tpot_p50_hi95_ns.zip(r.tpot_p50_lo95_ns).map(|(slow, fast)| {
            let rate = |ns: u64| digits(r.batch_tokens() as f64 * 1e9 / ns.max(1) as f64);
            format!("{}–{}", rate(slow), rate(fast))
        });
        vec![
            if cached { context(r.context_tokens) } else { String::new() },
            r.threads.to_string(),
            if batches { r.batch_tokens().to_string() } else { String::new() },
            if cached { r.kv_dtype.clone() } else { String::new() },
            if r.one_matrix() { mark.trim().to_owned() } else { format!("{}{mark}", labels.method(r)) },
            number(r.decode_tok_s),
            interval.unwrap_or_default(),
            ms(r.tpot_p50_ns),
            ms(r.tpot_p99_ns),
            number(r.rel_l2_p50),
            number(r.rel_l2_p95),
            number(r.rel_l2_max.filter(|_| formats)),
            r.cosine_mean.map_or(String::new(), |c| format!("{c:.5}")),
            number(r.attention_logit_error_max.filter(|_| formats)),
            share(r.needle_accuracy),
            number(r.kl_nats),
            number(r.kl_nats_max),
            share(r.top1_agreement),
            r.logit_cosine_mean.map_or(String::new(), |c| format!("{c:.5}")),
            r.perplexity_ratio().map_or(String::new(), |x| format!("{x:.4}×")),
            r.cache_bytes_per_token().filter(|_| cached).map_or(String::new(), |b| digits(b as f64 / 1e6)),
            number(r.kv_bytes_stored_per_token.filter(|_| formats).map(|b| b / 1e3)),
            number(r.append_ns.filter(|_| formats).map(|ns| ns as f64 / 1e3)),
            number(r.achieved_gb_s),
            share(r.roofline_fraction),
        ]
    });
    Rows { head: head.map(str::to_owned).to_vec(), body: rows.collect(), left: vec![3, 4] }
        .without_empty_columns()
}

/// What the measured methods read against what matters, a row a context, KV dtype and method: threads change nothing of it.
/// Nothing where all attend to everything.
pub fn reads(records: &[Record]) -> Rows {
    let labels = Labels::new(records);
    if !records.iter().any(|r| r.measured() && r.chooses()) {
        return Rows::default();
    }
    let head = [
        "context",
        "KV",
        "method",
        "density",
        "needed, head",
        "needed, group",
        "mass p50",
        "mass p5",
        "tail error p50",
        "tail error p95",
        "recall",
        "recall p5",
        "KV MB/token",
        "index MB/token",
        "index MB",
        "index ms",
        "rel L2 over seeds",
        "prefill density",
        "prefill rel L2 p50",
        "prefill rel L2 p95",
    ];
    let number = |v: Option<f64>| v.map_or(String::new(), digits);
    let share = |v: Option<f64>| v.map_or(String::new(), percent);
    let mb = |bytes: Option<u64>| number(bytes.map(|b| b as f64 / 1e6));
    let mut seen = Vec::new();
    let mut body = Vec::new();
    for r in records.iter().filter(|r| r.measured() && r.batch_tokens() == 1 && !r.one_matrix()) {
        let key = (r.context_tokens, r.kv_dtype.as_str(), labels.method(r));
        if seen.contains(&key) {
            continue;
        }
        let indexed = r.index_bytes_stored.is_some_and(|bytes| bytes > 0);
        let seeds = r.rel_l2_seed_mean.zip(r.rel_l2_seed_sd).zip(r.seeds);
        body.push(vec![
            context(r.context_tokens),
            r.kv_dtype.clone(),
            labels.method(r),
            share(r.density_read),
            share(r.top95_density_head),
            share(r.top95_density_group),
            share(r.captured_mass_p50),
            share(r.captured_mass_p5),
            share(r.tail_mass_error_p50),
            share(r.tail_mass_error_p95),
            share(r.top95_recall_mean),
            share(r.top95_recall_p5),
            mb(r.kv_bytes_read_per_token),
            mb(r.index_bytes_read_per_token.filter(|_| indexed)),
            mb(r.index_bytes_stored.filter(|_| indexed)),
            number(r.index_build_ns.filter(|_| indexed).map(|ns| ns as f64 / 1e6)),
            seeds
                .map_or(String::new(), |((mean, sd), n)| format!("{} ± {} of {n}", digits(mean), digits(sd))),
            share(r.prefill_density),
            number(r.prefill_rel_l2_p50),
            number(r.prefill_rel_l2_p95),
        ]);
        seen.push(key);
    }
    Rows { head: head.map(str::to_owned).to_vec(), body, left: vec![1, 2] }.without_empty_columns()
}

/// The cells without numbers, with the reason.
pub fn gaps(records: &[Record]) -> Rows {
    let batches = records.iter().any(|r| r.batch_tokens() != 1);
    let rows = records.iter().filter(|r| !r.measured()).map(|r| {
        vec![
            context(r.context_tokens),
            r.threads.to_string(),
            if batches { r.batch_tokens().to_string() } else { String::new() },
            r.kv_dtype.clone(),
            r.method_string(),
            r.status.as_str().to_owned(),
            r.error.clone().unwrap_or_default().replace('\n', " "),
        ]
    });
    let head = ["context", "threads", "batch", "KV", "method", "status", "reason"];
    Rows { head: head.map(str::to_owned).to_vec(), body: rows.collect(), left: vec![3, 4, 5, 6] }
        .without_empty_columns()
}

impl Rows {
    /// Drops the columns in which every field is empty.
    #[must_use]
    pub fn without_empty_columns(self) -> Rows {
        let keep: Vec<usize> =
            (0..self.head.len()).filter(|&c| self.body.iter().any(|row| !row[c].is_empty())).collect();
        let pick = |row: &Vec<String>| keep.iter().map(|&c| row[c].clone()).collect();
        Rows {
            head: pick(&self.head),
            body: self.body.iter().map(pick).collect(),
            left: self.left.iter().filter_map(|l| keep.iter().position(|k| k == l)).collect(),
        }
    }

    /// An aligned table for the terminal; headings are bold and marked rows coloured when `color` is set.
    pub fn terminal(&self, color: bool) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        let bold = |text: &String| {
            let cell = Cell::new(text);
            if color { cell.add_attribute(Attribute::Bold) } else { cell }
        };
        table.set_header(self.head.iter().map(bold));
        for row in &self.body {
            let paint = color.then(|| row_color(row)).flatten();
            table.add_row(row.iter().map(|text| match paint {
                Some(paint) => Cell::new(text).fg(paint),
                None => Cell::new(text),
            }));
        }
        for (place, column) in table.column_iter_mut().enumerate() {
            let left = self.left.contains(&place);
            column.set_cell_alignment(if left { CellAlignment::Left } else { CellAlignment::Right });
            column.set_padding((if place == 0 { 0 } else { 1 }, 1));
        }
        if color {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }

    /// Comma-separated, with the headings first.
    pub fn csv(&self) -> String {
        super::csv::table(&self.head, &self.body)
    }

    /// An aligned Markdown table, with a line feed at the end; empty without rows.
    pub fn markdown(&self) -> String {
        if self.body.is_empty() {
            return String::new();
        }
        let escape = |row: &Vec<String>| row.iter().map(|f| f.replace('|', "\\|")).collect::<Vec<_>>();
        let (head, body) = (escape(&self.head), self.body.iter().map(escape).collect::<Vec<_>>());
        let wide = |text: &String| text.chars().count();
        let widths: Vec<usize> = (0..head.len())
            .map(|c| body.iter().map(|row| wide(&row[c])).chain([wide(&head[c]), 3]).max().unwrap_or(3))
            .collect();
        let mut text = String::new();
        let mut line = |row: &[String]| {
            for (c, field) in row.iter().enumerate() {
                let fill = " ".repeat(widths[c] - wide(field).min(widths[c]));
                let field =
                    if self.left.contains(&c) { format!("{field}{fill}") } else { format!("{fill}{field}") };
                text.push_str("| ");
                text.push_str(&field);
                text.push(' ');
            }
            text.push_str("|\n");
        };
        line(&head);
        let rule = |c: usize| {
            if self.left.contains(&c) {
                "-".repeat(widths[c])
            } else {
                format!("{}:", "-".repeat(widths[c] - 1))
            }
        };
        line(&(0..head.len()).map(rule).collect::<Vec<_>>());
        body.iter().for_each(|row| line(row));
        text
    }
}

/// Rows that say something bad are red, something good green.
fn row_color(row: &[String]) -> Option<Color> {
    let says =
        |words: &[&str]| row.iter().any(|f| words.iter().any(|w| f == w || f.ends_with(&format!("({w})"))));
    if says(&["regressed", "verify failed", "verify_failed", "error", "oom", "timeout", "missing"]) {
        Some(Color::Red)
    } else if says(&["improved"]) {
        Some(Color::Green)
    } else if says(&["inconclusive", "unstable", "drifts", "skipped"]) {
        Some(Color::Yellow)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing;

    #[test]
    fn markdown_is_aligned_and_complete() {
        let records = testing::records();
        let text = measured(&records).markdown();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2 + 40);
        let width = lines[0].chars().count();
        assert!(lines.iter().all(|l| l.chars().count() == width), "{text}");
        assert!(!text.contains("needles"), "no cell has them");
        let gaps = gaps(&records).markdown();
        assert!(gaps.contains("oom") && gaps.contains("predicted 15.1 GB exceeds"), "{gaps}");
    }

    #[test]
    fn a_text_has_columns_of_logits_and_none_of_outputs() {
        let (plan, machine, lines) = testing::Sweep { text: true, ..testing::Sweep::default() }.build();
        let rows = measured(&crate::analyse::summarise::summarise(&plan, &machine, &lines));
        for name in ["KL nats", "KL max", "top-1", "logit cosine", "perplexity"] {
            assert!(rows.head.iter().any(|h| h == name), "{name}");
        }
        assert!(!rows.head.iter().any(|h| h.contains("L2") || h == "cosine"), "{:?}", rows.head);
        let text = rows.markdown();
        assert!(text.contains("1.0000×") && text.contains("100 %"), "{text}");
        assert!(!measured(&testing::records()).head.iter().any(|h| h.contains("KL")));
    }

    #[test]
    fn what_was_read_is_told_once_a_method() {
        let methods: Vec<(&str, &[(&str, &str)])> = vec![
            ("dense", &[]),
            ("quest", &[("budget", "2048"), ("page", "16")]),
            ("window", &[("seed", "7"), ("window", "1024")]),
        ];
        let of = |methods| {
            let sweep = testing::Sweep {
                contexts: vec![8192],
                kv_dtypes: vec!["bf16"],
                threads: vec![1, 2],
                methods,
                ..testing::Sweep::default()
            };
            let (plan, machine, lines) = sweep.build();
            reads(&crate::analyse::summarise::summarise(&plan, &machine, &lines))
        };
        let rows = of(methods.clone());
        assert_eq!(rows.body.len(), 3, "{rows:?}");
        let field = |row: usize, name: &str| {
            rows.body[row][rows.head.iter().position(|h| h == name).unwrap()].as_str()
        };
        // A quarter of 8k, whose root is a half.
        assert_eq!(
            [field(1, "density"), field(1, "mass p50"), field(0, "recall")],
            ["25 %", "50 %", "100 %"]
        );
        assert_eq!([field(1, "index MB"), field(1, "index ms"), field(0, "index ms")], ["1.97", "6.00", ""]);
        assert!(field(2, "rel L2 over seeds").ends_with(" of 5") && field(1, "rel L2 over seeds").is_empty());
        // Nothing is chosen where everything is read.
        assert_eq!(of(methods[..1].to_vec()), Rows::default());
    }

    #[test]
    fn colours_only_when_asked() {
        let mut records = testing::records();
        records[0].status = Status::VerifyFailed;
        let rows = measured(&records);
        assert!(!rows.terminal(false).contains('\u{1b}'));
        assert!(rows.terminal(true).contains('\u{1b}'));
        assert!(rows.terminal(false).contains("dense (verify failed)"));
    }

    #[test]
    fn pipes_are_escaped() {
        let rows = Rows { head: vec!["a".into()], body: vec![vec!["x|y".into()]], left: vec![0] };
        assert!(rows.markdown().contains("x\\|y"));
        assert_eq!(Rows::default().markdown(), "");
    }
}
