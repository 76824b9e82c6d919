//! The KV cache and its number formats.
//!
//! A [`KvDtype`] says how the keys and how the values of a cache are stored: a [`KvFormat`] for each, and whether rows are
//! rotated and centred first. A format is one file and one line in [`KV_FORMATS`]; what it does with bytes is a
//! [`KeyCodec`] and a [`ValueCodec`]. Codecs are called for runs of up to a page ([`PAGE_TOKENS`]), so dynamic dispatch
//! costs nothing.
//!
//! # Rotation and centring
//! Both are exact for attention, and both make rows easier to round. *Rotated* rows are `H D x` with the normalised
//! Walsh-Hadamard matrix `H` and a fixed diagonal of signs `D`, and so are the queries that meet rotated keys; `D H` gives
//! the output of rotated values. *Centred* rows lose a mean `m` that their page keeps: `q . x = q . (x - m) + q . m`, and weighted values get the
//! sum of their weights times `m` back. Rotation comes first; `m` is a mean of rotated rows.

mod bf16;
mod cache;
mod coded;
mod dtype;
mod f16;
mod f32;
mod floats;
mod fp8;
mod head;
mod int4;
mod int8;
mod int8_channel;
mod kivi;
mod lm;
mod planes8;
mod pool;
mod prefix;
mod q_0;
mod run;
mod scattered;
mod side;
mod unit;
mod watch;

pub use cache::{CacheShape, KvCache};
pub use dtype::{KvDtype, KvFormat, SideDtype, kv_dtype};
pub use head::KvHead;
pub use pool::{KvMemory, PagePool, PoolUsage};
pub use prefix::{PrefixMemory, PrefixTree};
pub use run::KvRun;

use std::ops::Range;

use longbit_kernels::{CodeShape, Kernels, QueryBits, QueryCodes};

/// Rows a page.
pub const PAGE_TOKENS: usize = 256;

/// Every number format of cached rows.
pub static KV_FORMATS: &[KvFormat] = &[
    f32::FORMAT,
    f16::FORMAT,
    bf16::FORMAT,
    fp8::E4M3,
    fp8::E4M3_ROW,
    fp8::E5M2,
    fp8::E5M2_ROW,
    int8::FORMAT,
    int8_channel::FORMAT,
    q_0::Q8_0,
    planes8::FORMAT,
    int4::FORMAT,
    q_0::Q4_0,
    kivi::KIVI4,
    lm::LM4,
    lm::LM3,
    lm::LM2,
    kivi::KIVI2,
];

/// Rows that a [`Codec`] reads.
#[derive(Clone, Debug)]
pub struct Rows<'a> {
    /// The page, or another buffer that begins with row 0.
    pub page: &'a [u8],
    /// Which rows of it.
    pub range: Range<usize>,
    /// Numbers a row.
    pub head_dim: usize,
    /// Encoded rows that are read next, to be requested from memory meanwhile; they change no result.
    pub upcoming: &'a [u8],
}

/// What codecs need room for while they work; one a thread. Buffers grow as needed and keep nothing but the query that
/// [`KeyCodec::prepare`] left.
#[derive(Default)]
pub struct KvScratch {
    /// The query that [`KeyCodec::prepare`] left.
    query: QueryCodes,
    /// Sums of the numbers of each query, for [`UpperKeys::scores`].
    query_sums: Vec<f32>,
    /// A query with scales of channels in it.
    folded_query: QueryCodes,
    /// The same before it is rounded.
    folded: Vec<f32>,
    /// Any numbers, such as scales.
    floats: Vec<f32>,
    /// Scores or sums of a group.
    group: Vec<f32>,
    /// The mean of a page.
    mean: Vec<f32>,
    /// Rows that lay apart.
    scattered: scattered::Room,
}

impl KvScratch {
    /// Multiplies each of `queries` by `floats`, channel by channel, and rounds them into `folded_query`.
    fn fold(&mut self, kernels: &Kernels, shape: CodeShape, bits: QueryBits, queries: &[f32]) {
        self.folded.resize(queries.len(), 0.0);
        kernels.multiply_rows(queries, &self.floats[..shape.dims], &mut self.folded);
        kernels.quantize_queries(shape, bits, &self.folded, &mut self.folded_query);
    }
}

/// How the rows of one side of the cache, keys or values, become bytes, and how attention reads those.
pub trait Codec: Send + Sync {
    /// Bytes of a page of [`PAGE_TOKENS`] rows of `head_dim` numbers.
    fn page_bytes(&self, head_dim: usize) -> usize;

    /// Why rows of `head_dim` numbers cannot be stored, or nothing.
    fn refuses(&self, head_dim: usize) -> Option<String> {
        let _ = head_dim;
        None
    }

    /// The largest magnitude that a number may have; beyond it a row is refused, not stored as something else.
    fn largest(&self) -> f32 {
        f32::MAX
    }

    /// Tokens that are encoded together.
    fn group(&self) -> usize {
        1
    }

    /// How many of `len` cached tokens are encoded: a multiple of [`Codec::group`]. The newer ones are kept exactly.
    fn settled(&self, len: usize) -> usize {
        len
    }

    /// Largest `len - settled(len)`.
    fn unsettled(&self) -> usize {
        0
    }

    /// Whether the first tokens of a sequence, which attract most weight whatever their values, are best a run of their own:
    /// where weights are rounded in steps of the largest of their run, and any row can begin one.
    fn first_apart(&self) -> bool {
        false
    }

    /// Encodes `rows`, `[n][head_dim]`, into `page` from row `first` on; `first` and `n` are multiples of
    /// [`Codec::group`]. The bytes depend on nothing but the rows of their group.
    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize);

    /// Decodes `rows` into `out`, `[n][head_dim]`.
    fn decode(&self, kernels: &Kernels, rows: &Rows<'_>, out: &mut [f32]);

    /// The bytes of `page` that reading `rows` touches: what is largest first.
    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3];
}

/// A [`Codec`] whose rows can be keys.
pub trait KeyCodec: Codec {
    /// Brings `queries`, `[group][head_dim]`, into the form that [`KeyCodec::scores`] multiplies, which `scratch` keeps
    /// until the next call.
    fn prepare(&self, kernels: &Kernels, queries: &[f32], head_dim: usize, scratch: &mut KvScratch) {
        let _ = (kernels, queries, head_dim, scratch);
    }

    /// Dot products: `out[h][t] = queries[h] . rows[t]`, with `queries` `[group][head_dim]`, those of the last
    /// [`KeyCodec::prepare`], and `out` `[group][n]`.
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        out: &mut [f32],
    );

    /// As [`KeyCodec::scores`]; `largest` `[group]` becomes the largest of each head.
    fn scores_and_largest(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        (out, largest): (&mut [f32], &mut [f32]),
    ) {
        self.scores(kernels, queries, rows, scratch, out);
        for (largest, scores) in largest.iter_mut().zip(out.chunks_exact(rows.range.len())) {
            *largest = kernels.max(scores);
        }
    }

    /// What reads the upper part of the codes alone, where that is fewer bytes.
    fn upper(&self) -> Option<&'static dyn UpperKeys> {
        None
    }
}

/// Keys of which an upper part of every code can be read alone: their dot products, known less finely, at fewer bytes.
pub trait UpperKeys: Send + Sync {
    /// The bytes of `page` that [`UpperKeys::scores`] of `rows` reads: what is largest first.
    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3];

    /// As [`KeyCodec::prepare`].
    fn prepare(&self, kernels: &Kernels, queries: &[f32], head_dim: usize, scratch: &mut KvScratch);

    /// As [`KeyCodec::scores`], as if each number stood in the middle of its step; `steps` become the steps of the rows, so
    /// that a number is at most half a step from what [`KeyCodec::scores`] reads.
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        steps: &mut [f32],
        out: &mut [f32],
    );
}

/// A [`Codec`] whose rows can be values.
pub trait ValueCodec: Codec {
    /// Weighted sum: `acc[h] += sum_t weights[h][t] * rows[t]`, with `weights` `[group][n]` and `acc`
    /// `[group][head_dim]`.
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        scratch: &mut KvScratch,
        acc: &mut [f32],
    );
}

/// The rows `range` of a page in which rows of `row_bytes` follow one another from byte `from` on.
pub(crate) fn slice_rows<'a>(
    page: &'a [u8],
    from: usize,
    row_bytes: usize,
    range: &Range<usize>,
) -> &'a [u8] {
    &page[from + range.start * row_bytes..from + range.end * row_bytes]
}

#[cfg(test)]
mod fork_tests;
#[cfg(test)]
mod lagging;
#[cfg(test)]
mod prefix_tests;
#[cfg(test)]
mod retain_tests;
#[cfg(test)]
mod tests;
