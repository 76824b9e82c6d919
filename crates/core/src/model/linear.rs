//! A ternary matrix in one of its packings, and the products that the engine asks of it.

use std::ops::Range;

use longbit_kernels::{Kernels, TernaryShape, TritShape};
use longbit_sys::Segment;

/// How ternary weights lie in memory. Every product has the same bits in every packing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Four weights a byte; decoded by masks alone.
    #[default]
    TwoBits,
    /// Five weights a byte: a fifth less to read, and more to compute for each byte.
    Trits,
}

impl Packing {
    /// Bytes of a tile of four rows.
    pub fn tile_bytes(self, shape: TernaryShape) -> usize {
        match self {
            Packing::TwoBits => shape.tile_bytes(),
            Packing::Trits => trits(shape).tile_bytes(),
        }
    }

    /// Bytes of a matrix.
    pub fn bytes(self, shape: TernaryShape) -> usize {
        shape.tiles() * self.tile_bytes(shape)
    }
}

fn trits(shape: TernaryShape) -> TritShape {
    TritShape { rows: shape.rows, cols: shape.cols }
}

/// A ternary matrix with one scale: `y = (codes . weights) * scale / activation_scale`.
pub struct TernaryLinear {
    /// Rows (outputs) and columns (inputs).
    pub shape: TernaryShape,
    /// How `data` is packed.
    pub packing: Packing,
    /// Packed weights, see [`TernaryShape`] and [`TritShape`].
    pub data: Segment,
    /// Multiplier of the integer dot product, whatever the checkpoint's own convention was.
    pub scale: f32,
}

impl TernaryLinear {
    /// A matrix at two bits a weight.
    pub fn new(shape: TernaryShape, data: Segment, scale: f32) -> Self {
        TernaryLinear { shape, packing: Packing::TwoBits, data, scale }
    }

    /// Bytes of a tile of four rows.
    pub fn tile_bytes(&self) -> usize {
        self.packing.tile_bytes(self.shape)
    }

    /// Writes the codes `weight + 1` of row `row`, one a byte, into `codes` (`[cols]`).
    pub fn unpack_row(&self, row: usize, codes: &mut [u8]) {
        match self.packing {
            Packing::TwoBits => self.shape.unpack_row(&self.data, row, codes),
            Packing::Trits => trits(self.shape).unpack_row(&self.data, row, codes),
        }
    }

    /// Length that the codes of one token must have for [`TernaryLinear::gemv`] in any packing, the rest zeros.
    pub fn room(cols: usize) -> usize {
        let shape = TernaryShape { rows: 1, cols };
        shape.padded_cols().max(trits(shape).padded_cols())
    }

    /// Rows of `tiles` times the codes of one token: `out[row] = (codes . weights) as f32 * scale`. `codes` has
    /// [`TernaryLinear::room`] entries.
    pub fn gemv(
        &self,
        kernels: &Kernels,
        tiles: Range<usize>,
        codes: &[i8],
        sum: i32,
        scale: f32,
        out: &mut [f32],
    ) {
        match self.packing {
            Packing::TwoBits => {
                let codes = &codes[..self.shape.padded_cols()];
                kernels.ternary_gemv(self.shape, &self.data, tiles, codes, sum, scale, out);
            }
            Packing::Trits => {
                let shape = trits(self.shape);
                let codes = &codes[..shape.padded_cols()];
                kernels.trit_gemv(shape, &self.data, tiles, codes, sum, scale, out);
            }
        }
    }

    /// Rows of `tiles` times the codes of several tokens, `[tokens][columns padded as `[`TernaryShape::padded_cols`]` says]`.
    #[expect(clippy::too_many_arguments, reason = "the operands of one product")]
    pub fn gemm(
        &self,
        kernels: &Kernels,
        tiles: Range<usize>,
        tokens: usize,
        codes: &[i8],
        sums: &[i32],
        scales: &[f32],
        out: &mut [f32],
    ) {
        match self.packing {
            Packing::TwoBits => {
                kernels.ternary_gemm(self.shape, &self.data, tiles, tokens, codes, sums, scales, out);
            }
            Packing::Trits => {
                kernels.trit_gemm(trits(self.shape), &self.data, tiles, tokens, codes, sums, scales, out);
            }
        }
    }

    /// The weights of `from` in another packing, for some tiles, into `out`.
    pub(crate) fn repack(from: &TernaryLinear, to: Packing, tiles: Range<usize>, out: &mut [u8]) {
        match (from.packing, to) {
            (Packing::TwoBits, Packing::Trits) => {
                trits(from.shape).repack(from.shape, &from.data, tiles, out);
            }
            _ => {
                let width = from.tile_bytes();
                out.copy_from_slice(&from.data[tiles.start * width..tiles.end * width]);
            }
        }
    }
}
