//! The output of one or more ternary projections that share an input, split over the threads by rows.
//!
//! Rows of all parts are numbered one after another. Thread `w` owns a contiguous range of row tiles; its stripe of the
//! shared buffer holds, for each part that the range touches, `[tokens][rows]`.

use std::ops::Range;

use longbit_kernels::{Kernels, Quantized, TernaryShape};
use longbit_sys::{Shared, share};

use crate::model::TernaryLinear;

/// Quantised activations of the tokens of a pass.
pub(super) struct Acts<'a> {
    /// Of several tokens `[tokens][padded_cols]`, of one token [`TernaryLinear::room`].
    pub(super) codes: &'a [i8],
    /// One a token.
    pub(super) quantized: &'a [Quantized],
}

/// Rows of one part in one thread's stripe.
struct Piece {
    part: usize,
    tiles: Range<usize>,
    /// First row, numbered over all parts.
    row: usize,
    rows: usize,
    /// Rows of this stripe before this piece.
    before: usize,
}

/// See the module.
pub(super) struct Stage {
    shared: Shared<f32>,
    /// First number of each stripe, for the largest number of tokens.
    starts: Vec<usize>,
    pieces: Vec<Vec<Piece>>,
    rows: usize,
}

impl Stage {
    pub(super) fn new(name: &'static str, parts: &[TernaryShape], tokens: usize, threads: usize) -> Self {
        let total: usize = parts.iter().map(|p| p.tiles()).sum();
        let mut pieces = Vec::with_capacity(threads);
        let mut starts = vec![0];
        for w in 0..threads {
            let mine = share(total, w, threads);
            let (mut owned, mut before, mut first_tile, mut first_row) = (Vec::new(), 0, 0, 0);
            for (part, shape) in parts.iter().enumerate() {
                let start = mine.start.max(first_tile);
                let end = mine.end.min(first_tile + shape.tiles());
                if start < end {
                    let tiles = start - first_tile..end - first_tile;
                    let row = (tiles.start * longbit_kernels::TILE_ROWS).min(shape.rows);
                    let rows = (tiles.end * longbit_kernels::TILE_ROWS).min(shape.rows) - row;
                    owned.push(Piece { part, tiles, row: first_row + row, rows, before });
                    before += rows;
                }
                first_tile += shape.tiles();
                first_row += shape.rows;
            }
            starts.push(starts[w] + before * tokens);
            pieces.push(owned);
        }
        let len = starts[threads];
        let shared = Shared::striped(len, &starts, 0.0).named(name);
        Stage { shared, starts, pieces, rows: parts.iter().map(|p| p.rows).sum() }
    }

    /// Rows of all parts.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that thread `w` owns.
    pub(super) fn owned_rows(&self, w: usize) -> usize {
        self.pieces[w].iter().map(|p| p.rows).sum()
    }

    /// Rows that thread `w` owns of a stage with one part.
    pub(super) fn rows_of(&self, w: usize) -> Range<usize> {
        self.pieces[w].first().map_or(0..0, |piece| piece.row..piece.row + piece.rows)
    }

    /// Bytes of weights that thread `w` reads for `linears`.
    pub(super) fn bytes(&self, w: usize, linears: &[&TernaryLinear]) -> usize {
        self.pieces[w].iter().map(|p| p.tiles.len() * linears[p.part].tile_bytes()).sum()
    }

    /// Computes the rows of thread `w` of `linears` into `out`, laid out as the stripe is.
    pub(super) fn project(
        &self,
        kernels: &Kernels,
        w: usize,
        linears: &[&TernaryLinear],
        acts: &Acts<'_>,
        out: &mut [f32],
    ) {
        let tokens = acts.quantized.len();
        for piece in &self.pieces[w] {
            let linear = linears[piece.part];
            let out = &mut out[piece.before * tokens..(piece.before + piece.rows) * tokens];
            if let [q] = acts.quantized {
                let scale = linear.scale / q.scale;
                linear.gemv(kernels, piece.tiles.clone(), acts.codes, q.sum, scale, out);
            } else {
                let sums: Vec<i32> = acts.quantized.iter().map(|q| q.sum).collect();
                let scales: Vec<f32> = acts.quantized.iter().map(|q| linear.scale / q.scale).collect();
                linear.gemm(kernels, piece.tiles.clone(), tokens, acts.codes, &sums, &scales, out);
            }
        }
    }

    /// Runs `fill` on the stripe of thread `w`, cut to `tokens`.
    pub(super) fn write(&self, w: usize, tokens: usize, fill: impl FnOnce(&mut [f32])) {
        let rows = self.owned_rows(w);
        fill(&mut self.shared.write(w)[..rows * tokens]);
    }

    /// Copies rows `range` (numbered over all parts) of token `token` out of `tokens` to `out`.
    pub(super) fn gather(&self, token: usize, tokens: usize, range: Range<usize>, out: &mut [f32]) {
        let shared = self.shared.read();
        for (w, pieces) in self.pieces.iter().enumerate() {
            for piece in pieces {
                let start = range.start.max(piece.row);
                let end = range.end.min(piece.row + piece.rows);
                if start < end {
                    let from =
                        self.starts[w] + piece.before * tokens + token * piece.rows + (start - piece.row);
                    out[start - range.start..end - range.start]
                        .copy_from_slice(&shared[from..from + end - start]);
                }
            }
        }
    }
}
