//! The output of one or more ternary projections that share an input, split over the threads by rows.
//!
//! Rows of all parts are numbered one after another and cut into *stripes* of consecutive row tiles, as many for each
//! thread; a stripe of the shared buffer holds, for each part that it touches, `[tokens][rows]`. In a decode step the share
//! of a thread is one large stripe and behind it some small ones. The thread goes through them in the order of memory; one
//! that is done takes small ones from the end of another's share, so that threads which are not equally fast (another guest
//! on the same core, an interrupt) end together. Who computes a row changes none of its bits.

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

/// Tiles in small stripes, in percent of all.
const REST: usize = 20;
/// Bytes of a small stripe, about, at two bits a weight.
const STRIPE_BYTES: usize = 32 << 10;

/// Rows of one part in one stripe.
struct Piece {
    part: usize,
    tiles: Range<usize>,
    /// First row, numbered over all parts.
    row: usize,
    rows: usize,
    /// Rows of this stripe before this piece.
    before: usize,
}

/// One stripe of tiles a thread.
pub(super) fn shares(tiles: usize, threads: usize) -> Vec<Range<usize>> {
    (0..threads).map(|w| share(tiles, w, threads)).collect()
}

/// The stripes of the threads, as many for each: one large one, then `rest` percent of its share in stripes of `block` tiles,
/// or of a sixteenth of all where that is less.
pub(super) fn stripes(tiles: usize, threads: usize, rest: usize, block: usize) -> Vec<Range<usize>> {
    let block = block.min(tiles / 16).max(1);
    let blocks = if threads > 1 { tiles / threads * rest / 100 / block } else { 0 };
    let cut = |share: Range<usize>| {
        let first = share.end - blocks * block;
        let small = (0..blocks).map(move |i| first + i * block..first + (i + 1) * block);
        std::iter::once(share.start..first).chain(small)
    };
    shares(tiles, threads).into_iter().flat_map(cut).collect()
}

/// See the module.
pub(super) struct Stage {
    shared: Shared<f32>,
    /// First number of each stripe, for the largest number of tokens.
    starts: Vec<usize>,
    pieces: Vec<Vec<Piece>>,
    rows: usize,
    /// Largest number of tokens.
    tokens: usize,
}

impl Stage {
    pub(super) fn new(name: &'static str, parts: &[TernaryShape], tokens: usize, threads: usize) -> Self {
        let total: usize = parts.iter().map(|p| p.tiles()).sum();
        let cols = parts.iter().map(|p| p.cols).max().unwrap_or(1);
        let block = (STRIPE_BYTES / cols.max(1)).max(1);
        let stripes = if tokens == 1 { stripes(total, threads, REST, block) } else { shares(total, threads) };
        let mut pieces = Vec::with_capacity(stripes.len());
        let mut starts = vec![0];
        for mine in stripes {
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
            starts.push(starts[starts.len() - 1] + before * tokens);
            pieces.push(owned);
        }
        let len = starts[starts.len() - 1];
        let shared = Shared::striped(len, &starts, 0.0).named(name);
        Stage { shared, starts, pieces, rows: parts.iter().map(|p| p.rows).sum(), tokens }
    }

    /// Rows of all parts.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of stripes.
    pub(super) fn stripes(&self) -> usize {
        self.pieces.len()
    }

    /// Rows of stripe `w`.
    pub(super) fn stripe_rows(&self, w: usize) -> usize {
        self.pieces[w].iter().map(|p| p.rows).sum()
    }

    /// Rows of stripe `w` of a stage with one part.
    pub(super) fn rows_of(&self, w: usize) -> Range<usize> {
        self.pieces[w].first().map_or(0..0, |piece| piece.row..piece.row + piece.rows)
    }

    /// Bytes of weights that stripe `w` takes of `linears`.
    pub(super) fn bytes(&self, w: usize, linears: &[&TernaryLinear]) -> usize {
        self.pieces[w].iter().map(|p| p.tiles.len() * linears[p.part].tile_bytes()).sum()
    }

    /// Computes the rows of stripe `w` of `linears` into `out`, laid out as the stripe is.
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

    /// Runs `fill` on stripe `w`, cut to `tokens`.
    pub(super) fn write(&self, w: usize, tokens: usize, fill: impl FnOnce(&mut [f32])) {
        let rows = self.stripe_rows(w);
        fill(&mut self.shared.write(w)[..rows * tokens]);
    }

    /// Copies rows `range` (numbered over all parts) of token `token` out of `tokens` to `out`.
    pub(super) fn gather(&self, token: usize, tokens: usize, range: Range<usize>, out: &mut [f32]) {
        let shared = self.shared.read();
        if self.tokens == 1 {
            return out.copy_from_slice(&shared[range]);
        }
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

    /// Gives all rows of token `token` out of `tokens` to `then`; where they lie apart, they are brought together in `room`, as
    /// long as they are.
    pub(super) fn with_rows(
        &self,
        token: usize,
        tokens: usize,
        room: &mut [f32],
        then: &mut dyn FnMut(&[f32]),
    ) {
        if self.tokens == 1 {
            // The stripes of a single token follow one another as its rows do.
            return then(&self.shared.read()[..self.rows]);
        }
        self.gather(token, tokens, 0..self.rows, room);
        then(room);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_cover_all_tiles_once_and_in_order() {
        for (tiles, threads, rest, block, count) in [
            (1728, 2, 25, 19, 24),
            (100, 1, 25, 4, 1),
            (40, 3, 25, 99, 6),
            (41, 3, 50, 2, 12),
            (3, 2, 25, 8, 2),
            (1, 3, 100, 8, 3),
            (0, 4, 12, 32, 4),
        ] {
            let stripes = stripes(tiles, threads, rest, block);
            assert_eq!(stripes.len(), count, "{tiles} tiles");
            let ends =
                stripes.iter().scan(0, |end, stripe| Some((std::mem::replace(end, stripe.end), stripe)));
            assert!(ends.clone().all(|(end, stripe)| end == stripe.start), "{stripes:?}");
            assert_eq!(stripes.last().map(|s| s.end), Some(tiles));
        }
    }

    #[test]
    fn a_stage_that_hands_out_its_rest_gathers_the_rows_in_their_order() {
        let parts = [TernaryShape { rows: 150, cols: 64 }, TernaryShape { rows: 33, cols: 64 }];
        let stage = Stage::new("test", &parts, 1, 2);
        assert!(stage.stripes() > 2);
        let mut next = 0.0;
        for stripe in 0..stage.stripes() {
            stage.write(stripe, 1, |out| {
                for out in out {
                    *out = next;
                    next += 1.0;
                }
            });
        }
        let mut rows = [0.0; 183];
        stage.gather(0, 1, 0..183, &mut rows);
        assert!(rows.iter().enumerate().all(|(i, &row)| row == i as f32), "{rows:?}");
        assert_eq!((0..stage.stripes()).map(|i| stage.stripe_rows(i)).sum::<usize>(), stage.rows());
    }
}
