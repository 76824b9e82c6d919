//! Summaries of blocks of tokens: which blocks a growing context has, and rows of signed bytes that stand for them.
//!
//! A block is summed up once, from its rows as the cache stores them, as soon as all of them are settled: formats that keep
//! the newest rows exactly encode them later, and a summary made before would not be the one that a rebuilt index has.
//! What lies behind the last block, the open one and rows that are not settled, the methods here always read.
//!
//! Keys that the format rotates are summed up rotated, and so are values. Means do not mind: they are linear. Smallest
//! and largest numbers and variances of channels are those of the rotated channels.
//!
//! A row of `d` numbers takes `d` bytes, `d` rounded up to 32, and four of scale: half of bfloat16. Rounding moves a
//! number by at most 1/254 of the largest of its row; queries and weights are rounded to 16 bits on the way.

use std::ops::Range;

use longbit_kernels::codes::MOST_ROWS;
use longbit_kernels::{CodeBits, CodeShape, Kernels, QueryBits, QueryCodes, Rows, Scales};

use super::partial::{self, stride};
use super::{Chooser, MethodShape, TokenSet};
use crate::kv::KvDtype;

/// Most numbers of a row.
const MOST_DIMS: usize = 512;

/// Says why rows of `times` times the head dimension cannot be summed up.
pub(super) fn check(shape: &MethodShape, times: usize) -> Result<(), String> {
    let most = MOST_DIMS / times;
    if shape.head_dim.is_multiple_of(8) && shape.head_dim <= most {
        return Ok(());
    }
    Err(format!(
        "its summaries are rows of bytes, which take a head dimension that is a multiple of 8 and at most {most}; this \
         model has {}: use a method without an index",
        shape.head_dim
    ))
}

/// Blocks of equal size, as far as a context has them.
pub(super) struct Blocks {
    dtype: KvDtype,
    first: usize,
    size: usize,
    /// Whether values are summed up too.
    values: bool,
    count: usize,
}

impl Blocks {
    /// Blocks of `size` tokens from token `first` on, summed up from keys alone or with `values`.
    pub(super) fn new(dtype: KvDtype, first: usize, size: usize, values: bool) -> Self {
        Blocks { dtype, first, size, values, count: 0 }
    }

    /// The same, with the blocks of `tokens` cached tokens.
    pub(super) fn at(mut self, tokens: usize) -> Self {
        self.update(tokens);
        self
    }

    /// Brings them up to date with `tokens` cached tokens; returns the new ones. After a rewind there are fewer.
    pub(super) fn update(&mut self, tokens: usize) -> Range<usize> {
        let mut settled = self.dtype.keys.codec().settled(tokens);
        if self.values {
            settled = settled.min(self.dtype.values.codec().settled(tokens));
        }
        let from = self.count;
        self.count = settled.saturating_sub(self.first) / self.size;
        from.min(self.count)..self.count
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// How many end at or before token `end`.
    pub(super) fn before(&self, end: usize) -> usize {
        self.count.min(end.saturating_sub(self.first) / self.size)
    }

    /// The tokens of a block, or of a range of blocks.
    pub(super) fn tokens(&self, blocks: Range<usize>) -> Range<usize> {
        self.first + blocks.start * self.size..self.first + blocks.end * self.size
    }

    /// Appends the tokens of `chosen` blocks, and those from `recent` on, to `spans`, which end before them.
    pub(super) fn spans(&self, chosen: &TokenSet, recent: Range<usize>, spans: &mut Vec<Range<usize>>) {
        let first = spans.len();
        chosen.spans(spans);
        for span in &mut spans[first..] {
            *span = self.tokens(span.clone());
        }
        join(recent, spans);
    }
}

/// Appends a span, or lengthens the last one, which ends at or before it.
pub(super) fn join(span: Range<usize>, spans: &mut Vec<Range<usize>>) {
    match spans.last_mut() {
        Some(last) if last.end == span.start => last.end = span.end,
        _ if span.is_empty() => {}
        _ => spans.push(span),
    }
}

/// What scans need room for; kept from call to call for its memory.
#[derive(Default)]
pub(super) struct Room {
    query: QueryCodes,
    weights: Vec<f32>,
    sums: Vec<f32>,
    chooser: Chooser,
    /// Chosen rows of a head.
    pub(super) chosen: Vec<u32>,
    /// Rows chosen by any head.
    pub(super) union: TokenSet,
    /// Decoded rows of a block.
    pub(super) rows: Vec<f32>,
    /// A row on its way.
    pub(super) row: Vec<f32>,
}

impl Room {
    /// The `k` rows with the largest of `scores`, `[group][n]`, of each head; [`Room::union`] becomes all of them.
    pub(super) fn choose(&mut self, kernels: &Kernels, scores: &[f32], n: usize, k: usize) {
        self.union.reset(n);
        for scores in scores.chunks_exact(n.max(1)) {
            self.chooser.top_k(kernels, scores, k, &mut self.chosen);
            self.chosen.iter().for_each(|&row| self.union.insert(row as usize));
        }
    }
}

/// Rows of signed bytes with a scale each.
pub(super) struct CodeRows {
    shape: CodeShape,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl CodeRows {
    /// No rows of `dims` numbers yet.
    pub(super) fn new(dims: usize) -> Self {
        CodeRows { shape: CodeShape { dims, bits: CodeBits::Eight }, codes: Vec::new(), scales: Vec::new() }
    }

    /// Bytes of a row of `dims` numbers.
    pub(super) const fn row_bytes(dims: usize) -> usize {
        CodeShape { dims, bits: CodeBits::Eight }.row_bytes() + size_of::<f32>()
    }

    /// Bytes of `rows` rows.
    pub(super) fn bytes(&self, rows: usize) -> usize {
        rows * Self::row_bytes(self.shape.dims)
    }

    /// Bytes of all rows.
    pub(super) fn state_bytes(&self) -> usize {
        self.bytes(self.scales.len())
    }

    /// Forgets all but the first `rows` rows.
    pub(super) fn truncate(&mut self, rows: usize) {
        self.codes.truncate(rows * self.shape.row_bytes());
        self.scales.truncate(rows);
    }

    /// Appends a row, rounded to nearest.
    pub(super) fn push(&mut self, kernels: &Kernels, row: &[f32]) {
        let at = self.codes.len();
        self.codes.resize(at + self.shape.row_bytes(), 0);
        let mut scale = [0.0];
        kernels.encode_int8(self.shape, false, row, &mut self.codes[at..], &mut [], &mut scale);
        self.scales.push(scale[0]);
    }

    /// Appends a row, rounded up: no number that is stored is below the one that was given.
    pub(super) fn push_up(&mut self, kernels: &Kernels, row: &[f32]) {
        let at = self.codes.len();
        self.codes.resize(at + self.shape.row_bytes(), 0);
        let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        // The next number, so that 127 of them are not below the largest; at least one whose inverse is finite.
        let scale = (largest / 127.0).next_up().max(1e-30);
        let mut codes = [0i8; MOST_DIMS];
        for (code, &x) in codes.iter_mut().zip(row) {
            let up = (x / scale).ceil();
            // The quotient may have been rounded down to a whole number.
            let up = if up * scale < x { up + 1.0 } else { up };
            *code = up as i8;
        }
        kernels.pack_codes(self.shape, &codes[..self.shape.dims], &mut self.codes[at..], &mut []);
        self.scales.push(scale);
    }

    fn rows(&self, rows: Range<usize>) -> (Rows<'_>, Scales<'_>) {
        let row = self.shape.row_bytes();
        let codes = &self.codes[rows.start * row..rows.end * row];
        (Rows::bytes(codes), Scales::Row(&self.scales[rows]))
    }

    /// Dot products of `queries`, `[group][dims]`, with the first `n` rows: `out` becomes `[group][n]`.
    pub(super) fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        n: usize,
        room: &mut Room,
        out: &mut Vec<f32>,
    ) {
        out.clear();
        out.resize(queries.len() / self.shape.dims * n, 0.0);
        kernels.quantize_queries(self.shape, QueryBits::Sixteen, queries, &mut room.query);
        let (rows, scales) = self.rows(0..n);
        kernels.code_scores(self.shape, &room.query, rows, scales, out);
    }

    /// Turns logits `[group][n]` of the first `n` rows, which are values, into weights, in place, and writes the partials of
    /// the group over them to `out`. A logit of negative infinity leaves a row out for its head.
    pub(super) fn partial(
        &self,
        kernels: &Kernels,
        logits: &mut [f32],
        n: usize,
        room: &mut Room,
        out: &mut Vec<f32>,
    ) {
        let d = self.shape.dims;
        let group = logits.len() / n;
        out.clear();
        out.resize(group * stride(d), 0.0);
        partial::clear(out, d);
        for (partial, logits) in out.chunks_exact_mut(stride(d)).zip(logits.chunks_exact_mut(n)) {
            let max = kernels.max(logits);
            if max == f32::NEG_INFINITY {
                logits.fill(0.0);
                continue;
            }
            (partial[0], partial[1]) = (max, kernels.exp_sum(logits, max));
        }
        room.sums.clear();
        room.sums.resize(group * d, 0.0);
        for from in (0..n).step_by(MOST_ROWS) {
            let some = from..n.min(from + MOST_ROWS);
            room.weights.clear();
            for weights in logits.chunks_exact(n) {
                room.weights.extend_from_slice(&weights[some.clone()]);
            }
            let (rows, scales) = self.rows(some);
            kernels.code_accumulate(self.shape, &room.weights, rows, scales, &mut room.sums);
        }
        for (partial, sums) in out.chunks_exact_mut(stride(d)).zip(room.sums.chunks_exact(d)) {
            partial[2..].copy_from_slice(sums);
        }
    }
}

/// Means of the channels of `rows`, `[n][d]`, added up in the order of the tokens.
pub(super) fn mean(kernels: &Kernels, rows: &[f32], d: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(d, 0.0);
    rows.chunks_exact(d).for_each(|row| kernels.add_assign(out, row));
    kernels.scale(out, d as f32 / rows.len() as f32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::method;
    use crate::attention::testing::{cache, noise, select, state};
    use crate::kv::kv_dtype;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounding_up_never_lowers_a_number(
            row in prop::collection::vec(prop_oneof![-1.0f32..1.0, -1e-3f32..1e-3, Just(0.0), -1e20f32..1e20], 40),
        ) {
            let (kernels, mut rows) = (Kernels::best(), CodeRows::new(40));
            rows.push_up(kernels, &row);
            let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let mut codes = [0i8; 40];
            rows.shape.unpack(rows.rows(0..1).0, &mut codes);
            for (&code, x) in codes.iter().zip(row) {
                let stored = f32::from(code) * rows.scales[0];
                prop_assert!(stored >= x && stored <= x + largest / 126.9 + 1e-29, "{stored} {x}");
            }
            prop_assert_eq!(rows.state_bytes(), CodeRows::row_bytes(40));
        }
    }

    #[test]
    fn blocks_are_those_that_are_settled() {
        let blocks = |dtype: &str, values: bool, tokens: usize| {
            Blocks::new(kv_dtype(dtype).unwrap(), 4, 64, values).at(tokens).count()
        };
        assert_eq!([67, 68, 131, 132].map(|tokens| blocks("bf16", true, tokens)), [0, 1, 1, 2]);
        // Keys of kivi settle 128 at a time, of values the newest 128 never are.
        assert_eq!([127, 128, 255, 256].map(|tokens| blocks("kivi4", false, tokens)), [0, 1, 1, 3]);
        assert_eq!([195, 196, 255, 256].map(|tokens| blocks("kivi4", true, tokens)), [0, 1, 1, 1]);
        let mut blocks = Blocks::new(kv_dtype("f32").unwrap(), 0, 16, true);
        assert_eq!([40, 50, 31, 33].map(|tokens| blocks.update(tokens)), [0..2, 2..3, 1..1, 1..2]);
    }

    /// With one head what is predicted is what is read, at every length and for formats that settle late.
    #[test]
    fn predictions_are_what_is_read() {
        const D: usize = 64;
        let (keys, values, query) = (noise(2048 * D, 1), noise(2048 * D, 2), noise(D, 3));
        for dtype in ["bf16", "int8", "kivi4", "int8-channel"] {
            for tokens in [1, 16, 65, 700, 1024, 1511, 2048] {
                let cache = cache(dtype, D, &keys[..tokens * D], &values[..tokens * D]);
                for spec in SPECS {
                    let mut state = state(spec, &cache);
                    let kv = cache.head(0, 0);
                    kv.take_observed();
                    let selection = select(&mut *state, &kv, &query);
                    let predicted = method(spec).unwrap().predict(tokens, &MethodShape::of(&cache));
                    let what = format!("{spec} of {dtype}, {tokens} tokens");
                    assert_eq!(predicted.read_bytes as u64, selection.index_bytes, "{what}");
                    assert_eq!(predicted.state_bytes, state.state_bytes(), "{what}");
                    let rows = selection.tokens() as u64 + selection.tail_rows;
                    assert_eq!(predicted.rows as u64, rows, "{what}");
                }
            }
        }
    }

    /// Rows that are encoded late, or less a mean, in all orders of appends and rewinds.
    #[test]
    fn grown_equals_rebuilt_where_rows_settle_late() {
        const D: usize = 64;
        let (keys, values, queries) = (noise(1024 * D, 1), noise(1024 * D, 2), noise(2 * D, 3));
        for dtype in ["int8-channel", "kivi2+centre", "k=lm4+centre,v=kivi4", "k=int8+rotate+centre,v=bf16"] {
            for spec in SPECS {
                let (part, whole) = (cache(dtype, D, &keys, &values), cache(dtype, D, &keys, &values));
                part.head_mut(0, 0).truncate(0);
                let mut grown = state(spec, &part);
                for (rewind, len) in [(0, 300), (290, 300), (300, 301), (301, 530), (510, 700), (250, 1024)] {
                    let mut kv = part.head_mut(0, 0);
                    kv.truncate(rewind);
                    grown.truncated(&kv);
                    kv.append(&keys[rewind * D..len * D], &values[rewind * D..len * D]).unwrap();
                    grown.appended(&kv, rewind);
                }
                let what = format!("{spec} of {dtype}");
                assert_eq!(state(spec, &part).state_bytes(), grown.state_bytes(), "{what}");
                let ours = select(&mut *grown, &part.head(0, 0), &queries);
                assert_eq!(ours, select(&mut *state(spec, &part), &part.head(0, 0), &queries), "{what}");
                // A rewind by more than a page may have cost exact rows their exactness, but no block its place.
                let rebuilt = select(&mut *state(spec, &whole), &whole.head(0, 0), &queries);
                assert_eq!(ours.index_bytes, rebuilt.index_bytes, "{what}");
            }
        }
    }

    const SPECS: [&str; 9] = [
        "quest",
        "quest:page=32,budget=64",
        "blocktopk",
        "blocktopk:second=on,budget=256",
        "blocktopk:tail=mean,budget=64,sinks=0",
        "landmark",
        "landmark:softmax=grouped,local=2",
        "nsa",
        "nsa:top=4,window=64,stride=32",
    ];

    #[test]
    fn head_dimensions_that_do_not_fit_are_refused() {
        let dtype = kv_dtype("bf16").unwrap();
        let shape = |head_dim| MethodShape { layers: 1, kv_heads: 1, head_dim, group: 1, dtype };
        assert!(check(&shape(128), 2).is_ok() && check(&shape(256), 2).is_ok());
        let message = check(&shape(512), 2).unwrap_err();
        assert!(message.contains("at most 256") && message.contains("512"), "{message}");
        assert!(check(&shape(512), 1).is_ok() && check(&shape(100), 1).is_err());
    }
}
