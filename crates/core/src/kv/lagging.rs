//! Formats for tests: they encode groups of 32 tokens together, and keep the newest ones exactly.

use std::ops::Range;

use longbit_kernels::Kernels;

use super::{
    Codec, KV_FORMATS, KeyCodec, KvDtype, KvFormat, KvScratch, PAGE_TOKENS, Rows, SideDtype, ValueCodec,
    kv_dtype,
};

const GROUP: usize = 32;

/// Integers of 8 bits with a scale for each group of tokens; at least `.0` tokens are not settled.
struct Lagging(usize);

static NEAR: KvFormat = format("near", &Lagging(0));
static FAR: KvFormat = format("far", &Lagging(100));
static PAGES: KvFormat = format("pages", &Lagging(300));

const fn format(name: &'static str, codec: &'static Lagging) -> KvFormat {
    KvFormat { name, summary: "of tests", keys: codec, values: codec, rotate: false, centre: false }
}

/// Every format that is listed, as it is and centred, some pairs with other options, and the formats of this module.
pub(super) fn all() -> Vec<KvDtype> {
    let listed = KV_FORMATS.iter().flat_map(|f| ["", "+centre"].map(|option| format!("{}{option}", f.name)));
    let others = [
        "k=int8+plain+rotate,v=q4_0+centre",
        "k=kivi4+rotate+centre,v=lm4",
        "k=planes8,v=kivi2",
        "int8+plain",
    ];
    let names = listed.chain(others.map(String::from));
    let mut all: Vec<KvDtype> = names.map(|name| kv_dtype(&name).unwrap()).collect();
    all.dedup();
    let side = |format, centre| SideDtype::of(format, true, false, centre);
    let near = side(&NEAR, false);
    all.push(KvDtype { keys: near, values: near });
    all.push(KvDtype { keys: near, values: side(&FAR, false) });
    all.push(KvDtype { keys: side(&FAR, true), values: side(&FAR, false) });
    all.push(KvDtype { keys: all[0].keys, values: side(&FAR, true) });
    all.push(KvDtype { keys: side(&PAGES, false), values: side(&PAGES, true) });
    all
}

fn scale_of(page: &[u8], row: usize, d: usize) -> f32 {
    let at = PAGE_TOKENS * d + row / GROUP * 4;
    f32::from_le_bytes(page[at..at + 4].try_into().unwrap())
}

impl Codec for Lagging {
    fn page_bytes(&self, head_dim: usize) -> usize {
        PAGE_TOKENS * head_dim + PAGE_TOKENS / GROUP * 4
    }

    fn group(&self) -> usize {
        GROUP
    }

    fn settled(&self, len: usize) -> usize {
        len.saturating_sub(self.0) / GROUP * GROUP
    }

    fn unsettled(&self) -> usize {
        self.0 + GROUP - 1
    }

    fn encode(&self, _: &Kernels, rows: &[f32], head_dim: usize, page: &mut [u8], first: usize) {
        let d = head_dim;
        for (i, rows) in rows.chunks_exact(GROUP * d).enumerate() {
            let row = first + i * GROUP;
            let scale = rows.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
            let at = PAGE_TOKENS * d + row / GROUP * 4;
            page[at..at + 4].copy_from_slice(&scale.to_le_bytes());
            for (byte, x) in page[row * d..].iter_mut().zip(rows) {
                *byte = (x / scale).round() as i8 as u8;
            }
        }
    }

    fn decode(&self, _: &Kernels, rows: &Rows<'_>, out: &mut [f32]) {
        let d = rows.head_dim;
        for (row, out) in rows.range.clone().zip(out.chunks_exact_mut(d)) {
            let scale = scale_of(rows.page, row, d);
            out.iter_mut()
                .zip(&rows.page[row * d..])
                .for_each(|(x, &byte)| *x = f32::from(byte as i8) * scale);
        }
    }

    fn parts<'a>(&self, page: &'a [u8], rows: Range<usize>, head_dim: usize) -> [&'a [u8]; 3] {
        let scales = PAGE_TOKENS * head_dim;
        let scales = scales + rows.start / GROUP * 4..scales + rows.end.div_ceil(GROUP) * 4;
        [&page[rows.start * head_dim..rows.end * head_dim], &page[scales], &[]]
    }
}

impl KeyCodec for Lagging {
    fn scores(
        &self,
        kernels: &Kernels,
        queries: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        out: &mut [f32],
    ) {
        let (d, n) = (rows.head_dim, rows.range.len());
        let mut decoded = vec![0.0; n * d];
        self.decode(kernels, rows, &mut decoded);
        for (query, out) in queries.chunks_exact(d).zip(out.chunks_exact_mut(n)) {
            out.iter_mut().zip(decoded.chunks_exact(d)).for_each(|(x, row)| *x = kernels.dot(query, row));
        }
    }
}

impl ValueCodec for Lagging {
    fn accumulate(
        &self,
        kernels: &Kernels,
        weights: &[f32],
        rows: &Rows<'_>,
        _: &mut KvScratch,
        acc: &mut [f32],
    ) {
        let (d, n) = (rows.head_dim, rows.range.len());
        let mut decoded = vec![0.0; n * d];
        self.decode(kernels, rows, &mut decoded);
        for (weights, acc) in weights.chunks_exact(n).zip(acc.chunks_exact_mut(d)) {
            weights
                .iter()
                .zip(decoded.chunks_exact(d))
                .for_each(|(&w, row)| kernels.scale_add(acc, 1.0, row, w));
        }
    }
}
