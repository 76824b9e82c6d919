//! One sentence that says what the numbers show, computed from the records and sensible when cells are missing.

use longbit_protocol::{Status, is_not_finite};

use super::label::{Labels, REFERENCE_KV, context, digits, percent};
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
    let decoded: Vec<&Record> =
        measured.iter().filter(|r| r.batch_tokens() == 1 && !r.one_matrix()).copied().collect();
    let mut text = match (measured.is_empty(), decoded.is_empty()) {
        (true, _) => nothing_timed(records),
        (false, true) => String::new(),
        (false, false) => statement(records, &decoded),
    };
    for more in [matrices(&measured), batches(&measured)].into_iter().flatten() {
        text.push_str(if text.is_empty() { "" } else { " " });
        text.push_str(&more);
    }
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

/// What one matrix takes, at the largest number of threads.
fn matrices(measured: &[&Record]) -> Option<String> {
    let threads = measured.iter().filter(|r| r.one_matrix()).map(|r| r.threads).max()?;
    let mut cells: Vec<&&Record> =
        measured.iter().filter(|r| r.one_matrix() && r.threads == threads).collect();
    cells.sort_by_key(|r| r.batch_tokens());
    let times: Vec<String> = cells
        .iter()
        .filter_map(|r| {
            let ms = digits(r.tpot_p50_ns? as f64 / 1e6);
            Some(match r.batch_tokens() {
                1 => format!("{ms} ms for one token"),
                batch => format!("{ms} ms for {batch}"),
            })
        })
        .collect();
    let plural = if threads == 1 { "" } else { "s" };
    let model = &cells.first()?.model;
    Some(format!("The product of {model} with {threads} thread{plural} takes {}.", times.join(", ")))
}

/// What taking many tokens together brings, at the largest batch, context and number of threads.
fn batches(measured: &[&Record]) -> Option<String> {
    let passes = || measured.iter().filter(|r| !r.one_matrix());
    let many = passes()
        .filter(|r| r.batch_tokens() > 1)
        .max_by_key(|r| (r.threads, r.context_tokens, r.batch_tokens()))?;
    let one = passes().find(|r| {
        r.batch_tokens() == 1
            && (r.threads, r.context_tokens) == (many.threads, many.context_tokens)
            && (&r.kv_dtype, &r.method) == (&many.kv_dtype, &many.method)
    });
    let gain = one.map_or(String::new(), |one| {
        format!(", {} times that of one token at a time", digits(speed(many) / speed(one)))
    });
    Some(format!(
        "A pass over {} tokens at {} tokens of context gives {} tok/s{gain}.",
        many.batch_tokens(),
        context(many.context_tokens),
        digits(speed(many)),
    ))
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
    let dense = at_far.iter().find(|r| r.is_dense()).copied();
    let others: Vec<&Record> = at_far.iter().filter(|r| !r.is_dense()).copied().collect();
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
    fn batches_and_matrices_have_sentences_of_their_own() {
        let mut records = testing::records();
        records.truncate(3);
        for (r, batch) in records.iter_mut().zip([1, 32, 384]) {
            r.batch = Some(batch);
            r.decode_tok_s = Some(10.0 * batch as f64);
            (r.tpot_p50_ns, r.context_tokens, r.method) = (Some(batch * 1_000_000), 64, "dense".into());
        }
        let text = sentence(&records);
        assert!(text.starts_with("At 64 tokens dense attention decodes 10.0 tok/s"), "{text}");
        let batch = "A pass over 384 tokens at 64 tokens of context gives 3840 tok/s, 384 times that of one token at a time.";
        assert!(text.ends_with(batch), "{text}");
        for r in &mut records {
            (r.method, r.model) = ("-".into(), "matrix:8x8".into());
        }
        let text = sentence(&records);
        let times = "takes 1.00 ms for one token, 32.0 ms for 32, 384 ms for 384.";
        assert!(text.starts_with("The product of matrix:8x8 with ") && text.ends_with(times), "{text}");
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
