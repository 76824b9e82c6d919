//! One sentence that says what the numbers show, computed from the records and sensible when cells are missing.

use longbit_protocol::{Status, is_not_finite};

use super::label::{DENSE, Labels, REFERENCE_KV, context, digits, percent};
use super::loss::Loss;
use crate::record::Record;

/// What the records show, e.g. "At 32k tokens dense attention keeps 43 % of its speed at 2k tokens (12.1 of 28.0 tok/s); window
/// keeps 99 % but its output is off by 61 % (median relative L2)."
///
/// It speaks of one KV dtype (the one with the most measured cells) and the largest number of threads, and names the
/// fastest method and the most accurate one that is faster than dense.
pub fn sentence(records: &[Record]) -> String {
    let measured: Vec<&Record> =
        records.iter().filter(|r| r.measured() && r.decode_tok_s.is_some()).collect();
    let mut text = if measured.is_empty() { nothing_timed(records) } else { statement(records, &measured) };
    if let Some(gaps) = gaps(records).filter(|_| !measured.is_empty()) {
        text.push(' ');
        text.push_str(&gaps);
    }
    text
}

/// Without any timing: the quality alone, or that there is nothing.
fn nothing_timed(records: &[Record]) -> String {
    let measured = || records.iter().filter(|r| r.measured());
    let loss = Loss::of(measured());
    let with_quality: Vec<(&Record, f64)> = measured().filter_map(|r| Some((r, loss?.typical(r)?))).collect();
    let worst = with_quality.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    match (worst, loss) {
        (Some((r, error)), Some(loss)) => {
            let against = match loss {
                Loss::RelativeL2 => "Output of {} cells was compared with exact attention",
                Loss::Kl => "Logits of {} cells were compared with those of dense bf16 attention",
            };
            let far = match is_not_finite(*error) {
                true => "gives output that is not finite".to_owned(),
                false => format!("is furthest off, by {} ({})", loss.show(*error), loss.name()),
            };
            format!(
                "{}, nothing was timed; {} with {} keys and values at {} tokens {far}.",
                against.replace("{}", &with_quality.len().to_string()),
                Labels::new(records).method(r),
                r.kv_dtype,
                context(r.context_tokens),
            )
        }
        _ => match gaps(records) {
            Some(gaps) => format!("No cell was measured. {gaps}"),
            None => "No cell was measured.".to_owned(),
        },
    }
}

fn speed(r: &Record) -> f64 {
    r.decode_tok_s.unwrap_or(0.0)
}

/// Cells that have no numbers, by status.
fn gaps(records: &[Record]) -> Option<String> {
    let count = |wanted: fn(&Record) -> bool| records.iter().filter(|r| wanted(r)).count();
    let skipped = count(|r| r.status == Status::Skipped);
    let failed = count(|r| !r.measured() && r.status != Status::Skipped);
    let parts: Vec<String> = [(skipped, "skipped"), (failed, "failed or unfinished")]
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, word)| format!("{n} {word}"))
        .collect();
    (!parts.is_empty())
        .then(|| format!("({} of {} cells: {}.)", skipped + failed, records.len(), parts.join(", ")))
}

fn statement(records: &[Record], measured: &[&Record]) -> String {
    let labels = Labels::new(records);
    let group = main_group(measured);
    let loss = Loss::of(group.iter().copied());
    let error = |r: &Record| loss.and_then(|l| l.typical(r));
    let far = group.iter().map(|r| r.context_tokens).max().unwrap_or(0);
    // "Its own speed at the shortest context": the same series, elsewhere on the axis.
    let near_of = |r: &Record| {
        let label = labels.method(r);
        group
            .iter()
            .filter(|o| labels.method(o) == label && o.context_tokens < far)
            .min_by_key(|o| o.context_tokens)
            .copied()
    };
    let at_far: Vec<&Record> = group.iter().filter(|r| r.context_tokens == far).copied().collect();
    let dense = at_far.iter().find(|r| r.method == DENSE).copied();
    let others: Vec<&Record> = at_far.iter().filter(|r| r.method != DENSE).copied().collect();
    let fastest = others.iter().max_by(|a, b| speed(a).total_cmp(&speed(b))).copied();
    let careful = others
        .iter()
        .filter(|r| error(r).is_some() && dense.is_none_or(|d| speed(r) > speed(d)))
        .min_by(|a, b| error(a).unwrap_or(0.0).total_cmp(&error(b).unwrap_or(0.0)))
        .copied()
        .filter(|r| fastest.is_none_or(|f| f.cell_id != r.cell_id));

    let mut clauses = Vec::new();
    if let Some(d) = dense {
        clauses.push(match near_of(d) {
            Some(near) => format!(
                "dense attention keeps {} of its speed at {} tokens ({} of {} tok/s)",
                percent(speed(d) / speed(near)),
                context(near.context_tokens),
                digits(speed(d)),
                digits(speed(near)),
            ),
            None => format!("dense attention decodes {} tok/s", digits(speed(d))),
        });
    }
    for (r, role) in [(fastest, ""), (careful, ", the most accurate of the faster ones,")] {
        let Some(r) = r else { continue };
        clauses.push(other_clause(r, role, &labels.method(r), near_of(r), dense, loss));
    }
    let shown = loss.filter(|_| [fastest, careful].into_iter().flatten().any(|r| error(r).is_some()));
    let tail = shown.map(|l| format!(" ({})", l.name())).unwrap_or_default();
    let first = group.first().map(|r| (r.kv_dtype.as_str(), r.threads)).unwrap_or_default();
    let several_kv = measured.iter().any(|r| r.kv_dtype != first.0);
    let setting = if several_kv { format!(" with {} keys and values", first.0) } else { String::new() };
    format!("At {} tokens{setting} {}{tail}.", context(far), clauses.join("; "))
}

/// What is said of a method other than dense.
fn other_clause(
    r: &Record,
    role: &str,
    label: &str,
    near: Option<&Record>,
    dense: Option<&Record>,
    loss: Option<Loss>,
) -> String {
    let pace = match (near, dense) {
        (Some(near), _) => format!("keeps {}", percent(speed(r) / speed(near))),
        (None, Some(d)) => format!("decodes {} tok/s ({:.2}×)", digits(speed(r)), speed(r) / speed(d)),
        (None, None) => format!("decodes {} tok/s", digits(speed(r))),
    };
    match loss.and_then(|l| Some((l, l.typical(r)?))) {
        Some((_, e)) if is_not_finite(e) => format!("{label}{role} {pace} but its output is not finite"),
        // Below a tenth (of the output, or of a nat) an error is a price, above it is an objection.
        Some((l, e)) => {
            let word = if e >= 0.1 { "but" } else { "and" };
            format!("{label}{role} {pace} {word} its output is off by {}", l.show(e))
        }
        None => format!("{label}{role} {pace}"),
    }
}

/// The cells the sentence speaks of: one KV dtype (most measured cells, then bf16, then the first) at the largest number of threads.
fn main_group<'a>(measured: &[&'a Record]) -> Vec<&'a Record> {
    let threads = measured.iter().map(|r| r.threads).max().unwrap_or(0);
    let at_threads: Vec<&Record> = measured.iter().filter(|r| r.threads == threads).copied().collect();
    let dtypes = super::label::distinct(at_threads.iter().map(|r| r.kv_dtype.as_str()));
    // Of equals bf16 speaks: it is what people run.
    let cells = |kv: &str| (at_threads.iter().filter(|r| r.kv_dtype == kv).count(), kv == REFERENCE_KV);
    // `max_by_key` takes the last of equals; the first one planned is wanted.
    let kv = dtypes.iter().rev().max_by_key(|kv| cells(kv)).copied().unwrap_or("");
    at_threads.into_iter().filter(|r| r.kv_dtype == kv).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing::{self, Sweep};

    fn of(sweep: Sweep) -> String {
        let (plan, machine, lines) = sweep.build();
        sentence(&crate::analyse::summarise::summarise(&plan, &machine, &lines))
    }

    #[test]
    fn a_full_sweep_names_dense_the_fastest_and_the_most_accurate() {
        let text = of(Sweep { kv_dtypes: vec!["bf16"], ..Sweep::default() });
        assert!(
            text.starts_with("At 96k tokens dense attention keeps 15 % of its speed at 2k tokens ("),
            "{text}"
        );
        assert!(text.contains("; window keeps ") && text.contains("but its output is off by 75 %"), "{text}");
        assert!(text.contains("quest, the most accurate of the faster ones, keeps"), "{text}");
        assert!(text.ends_with("(median relative L2)."), "{text}");
    }

    #[test]
    fn missing_cells_change_the_sentence_not_the_sense() {
        let text = sentence(&testing::records());
        assert!(text.starts_with("At 96k tokens with bf16 keys and values dense"), "{text}");
        assert!(text.ends_with("(2 of 42 cells: 1 skipped, 1 failed or unfinished.)"), "{text}");
        let (plan, machine, _) = testing::results();
        let none = sentence(&crate::analyse::summarise::summarise(&plan, &machine, &[]));
        assert_eq!(none, "No cell was measured. (42 of 42 cells: 42 failed or unfinished.)");
        assert_eq!(sentence(&[]), "No cell was measured.");
    }

    #[test]
    fn one_context_or_one_method_still_makes_sense() {
        let one = Sweep { contexts: vec![8192], kv_dtypes: vec!["bf16"], ..Sweep::default() };
        let text = of(one);
        assert!(text.starts_with("At 8k tokens dense attention decodes "), "{text}");
        assert!(text.contains("×)") && !text.contains("keeps"), "{text}");
        let lone = Sweep { methods: vec![("window", &[])], kv_dtypes: vec!["bf16"], ..Sweep::default() };
        let text = of(lone);
        assert!(text.starts_with("At 96k tokens window keeps "), "{text}");
    }
    #[test]
    fn a_text_speaks_of_divergence() {
        let text = of(Sweep { kv_dtypes: vec!["bf16"], text: true, ..Sweep::default() });
        assert!(text.contains("but its output is off by 0.566 nats"), "{text}");
        assert!(text.ends_with("(mean KL divergence of the next token from dense bf16)."), "{text}");
        assert!(!text.contains("L2"), "{text}");
        let mut records = testing::records();
        records.iter_mut().for_each(|r| (r.decode_tok_s, r.kl_nats, r.rel_l2_p50) = (None, Some(0.25), None));
        let text = sentence(&records);
        assert!(text.starts_with("Logits of 40 cells were compared with those of dense bf16"), "{text}");
        assert!(text.contains("furthest off, by 0.250 nats"), "{text}");
        records[7].kl_nats = Some(longbit_protocol::NOT_FINITE);
        assert!(sentence(&records).contains(" tokens gives output that is not finite."));
    }
}
