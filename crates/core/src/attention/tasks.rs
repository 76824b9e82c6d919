//! How what a query attends is cut into tasks: units of work, each one softmax that gives one partial.
//!
//! Cuts depend on the tokens that are attended and on nothing else, neither the number of threads nor how a prompt was cut,
//! so that the order of summation and with it the bits do not depend on those either. Where a query attends few tokens,
//! tasks are fine, so that many threads get a share. Where it attends many, those behind the first are coarse: a partial is
//! written, leaves the caches before it is merged, and comes back, which for a fine task of 8-bit rows is a twentieth of
//! its bytes.

use std::ops::Range;

/// Tokens of a fine task: large enough that calls cost little beside its rows, small enough that five KV heads at 2k tokens
/// keep many threads busy.
pub(crate) const CHUNK_TOKENS: usize = 512;
/// Tokens of a coarse task, the most that any has: the logits of four query heads take a first-level cache.
pub(crate) const COARSE_TOKENS: usize = 2048;
/// Tokens that a query must attend for coarse tasks.
pub(crate) const COARSE_FROM: usize = 16_384;
/// Positions before this one are cut finely always: what threads share evenly in the end.
const FINE_UNTIL: usize = 8192;

/// A task: whose it is, and its range in a list of pieces.
pub(crate) type Task = (usize, Range<usize>);

/// Which tasks of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Of at most [`CHUNK_TOKENS`] tokens.
    Fine,
    /// Of more, one piece each.
    Coarse,
}

/// In which the partials of a query are merged.
pub(crate) const ORDER: [Grain; 2] = [Grain::Fine, Grain::Coarse];

/// Whether a query attends so many tokens that some tasks are coarse.
fn are_many(spans: &[Range<usize>]) -> bool {
    spans.iter().map(Range::len).sum::<usize>() >= COARSE_FROM
}

/// Cuts `spans` at the places where chunks end.
fn chunks(spans: &[Range<usize>], many: bool) -> impl Iterator<Item = Range<usize>> + '_ {
    spans.iter().flat_map(move |span| {
        let (mut start, end) = (span.start, span.end);
        std::iter::from_fn(move || {
            (start < end).then(|| {
                let tokens = if many && start >= FINE_UNTIL { COARSE_TOKENS } else { CHUNK_TOKENS };
                let stop = end.min((start / tokens + 1) * tokens);
                let chunk = start..stop;
                start = stop;
                chunk
            })
        })
    })
}

/// Cuts `spans`, ascending and disjoint, into pieces, appended to `pieces`, and those of `grain` into tasks, appended to
/// `tasks` under the name `of`, in order. Short pieces are packed into fine tasks.
pub(crate) fn cut(
    of: usize,
    spans: &[Range<usize>],
    grain: Grain,
    pieces: &mut Vec<Range<usize>>,
    tasks: &mut Vec<Task>,
) {
    let many = are_many(spans);
    if grain == Grain::Coarse && !many {
        return;
    }
    let mut held = CHUNK_TOKENS;
    for piece in chunks(spans, many) {
        if (piece.len() > CHUNK_TOKENS) != (grain == Grain::Coarse) {
            continue;
        }
        if held + piece.len() > CHUNK_TOKENS {
            tasks.push((of, pieces.len()..pieces.len()));
            held = 0;
        }
        held += piece.len();
        pieces.push(piece);
        if let Some((_, range)) = tasks.last_mut() {
            range.end = pieces.len();
        }
    }
}

/// Most tasks of a query that attends up to `tokens` tokens: two consecutive fine ones hold more than a chunk together.
pub(crate) fn most_tasks(tokens: usize) -> usize {
    2 * tokens.div_ceil(CHUNK_TOKENS) + 2
}

/// Tokens of a task.
pub(crate) fn tokens(task: &Task, pieces: &[Range<usize>]) -> usize {
    pieces[task.1.clone()].iter().map(Range::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tasks of spans, each as its pieces, in the order of merging.
    fn all(spans: &[Range<usize>]) -> Vec<Vec<Range<usize>>> {
        let (mut pieces, mut tasks) = (Vec::new(), Vec::new());
        ORDER.into_iter().for_each(|grain| cut(7, spans, grain, &mut pieces, &mut tasks));
        assert!(tasks.iter().all(|task| task.0 == 7 && tokens(task, &pieces) <= COARSE_TOKENS));
        assert!(tasks.len() <= most_tasks(spans.iter().map(Range::len).sum()));
        tasks.into_iter().map(|(_, range)| pieces[range].to_vec()).collect()
    }

    fn one(piece: Range<usize>) -> Vec<Range<usize>> {
        [piece].into()
    }

    #[test]
    fn chunks_are_cut_at_fixed_places() {
        let cut: Vec<_> = chunks(&[0..4, 300..1500], false).collect();
        assert_eq!(cut, [0..4, 300..512, 512..1024, 1024..1500]);
        assert_eq!(all(&[0..4, 300..1500]), [vec![0..4, 300..512], one(512..1024), one(1024..1500)]);
    }

    /// One token more and what lies behind the first 8192 is coarse, but for an end that is short.
    #[test]
    fn many_tokens_are_cut_coarsely() {
        let fine = all(std::slice::from_ref(&(0..COARSE_FROM - 1)));
        assert_eq!((fine.len(), &fine[31]), (32, &one(15_872..16_383)));
        let end = COARSE_FROM + 100;
        let coarse = all(std::slice::from_ref(&(0..end)));
        assert_eq!(coarse.len(), 16 + 1 + 4);
        assert_eq!(coarse[15..18], [one(7680..8192), one(16_384..end), one(8192..10_240)]);
        // Short spans that lie apart stay packed finely, however many there are.
        let apart: Vec<_> = (0..2000).map(|i| 40 * i..40 * i + 10).collect();
        let held = |task: &Vec<Range<usize>>| task.iter().map(Range::len).sum::<usize>();
        assert!(all(&apart).iter().all(|task| held(task) <= CHUNK_TOKENS));
    }

    /// Every token is in one task.
    #[test]
    fn tasks_hold_all_tokens_once() {
        for spans in [vec![], one(0..1), vec![5..700, 8000..9000, 9001..40_000], vec![100..300, 8191..30_001]]
        {
            let mut held: Vec<usize> = all(&spans).into_iter().flatten().flatten().collect();
            held.sort_unstable();
            assert_eq!(held, spans.iter().cloned().flatten().collect::<Vec<_>>());
        }
    }
}
