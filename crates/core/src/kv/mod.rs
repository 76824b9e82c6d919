//! The KV cache and its number formats.
//!
//! A [`KvDtype`] turns f32 rows into bytes and answers two questions about a run of encoded rows: the dot products of a
//! query group with them, and their weighted sum. It is called for runs of up to a page ([`PAGE_TOKENS`]), so dynamic
//! dispatch costs nothing. A new format is one file and one line in [`KV_DTYPES`].

mod bf16;
mod cache;
mod f32;

pub use cache::{CacheShape, KvCache, KvHead, PAGE_TOKENS};

use longbit_kernels::Kernels;

use crate::error::{Error, Result};

/// A number format for cached keys and values.
pub trait KvDtype: Send + Sync {
    /// Name, as in experiment files.
    fn name(&self) -> &'static str;

    /// One line: the layout and its error bound.
    fn summary(&self) -> &'static str;

    /// Bytes of one row of `head_dim` numbers.
    fn row_bytes(&self, head_dim: usize) -> usize;

    /// Encodes `rows`, `[n][head_dim]`, into `out`, `n * row_bytes`. Row by row, so that appending token by token or all
    /// at once gives the same bytes.
    fn encode(&self, kernels: &Kernels, rows: &[f32], head_dim: usize, out: &mut [u8]);

    /// Decodes `rows` into `out`, `[n][head_dim]`.
    fn decode(&self, kernels: &Kernels, rows: &[u8], head_dim: usize, out: &mut [f32]);

    /// Dot products: `out[h][t] = queries[h] . rows[t]`, with `queries` `[group][head_dim]` and `out` `[group][n]`.
    /// `upcoming` are encoded rows that are read next, to be requested from memory meanwhile; they change no result.
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &[u8],
        head_dim: usize,
        out: &mut [f32],
        upcoming: &[u8],
    );

    /// Weighted sum: `acc[h] += sum_t weights[h][t] * rows[t]`, with `weights` `[group][n]` and `acc`
    /// `[group][head_dim]`; `upcoming` as for [`KvDtype::scores`].
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &[u8],
        head_dim: usize,
        acc: &mut [f32],
        upcoming: &[u8],
    );
}

/// Every KV dtype.
pub static KV_DTYPES: &[&dyn KvDtype] = &[&f32::F32, &bf16::Bf16];

/// The KV dtype called `name`.
///
/// # Errors
/// [`Error::Unknown`] with the names that exist.
pub fn kv_dtype(name: &str) -> Result<&'static dyn KvDtype> {
    KV_DTYPES.iter().copied().find(|d| d.name() == name).ok_or_else(|| Error::Unknown {
        kind: "KV dtype",
        name: name.into(),
        known: KV_DTYPES.iter().map(|d| d.name()).collect::<Vec<_>>().join(", "),
    })
}
