//! Every SIMD instruction of Longbit, behind one table of safe functions per instruction set.
//!
//! A [`Kernels`] table is chosen once, by [`Kernels::from_env`] (the variable `LONGBIT_ISA`, or the best set that
//! this processor has), and passed around by reference. Its methods check shapes and are safe; a wrong shape is a
//! programming error and panics.
//!
//! # The same bits on every instruction set
//!
//! Integer kernels are exact. A float reduction is *defined* as 16 virtual lanes: both inputs are padded with `+0.0`
//! to a multiple of 16, element `i` is added to lane `i % 16` by a fused multiply-add, in ascending order, and the
//! lanes are summed by a fixed tree: `l[i] += l[i + 8]`, then `+ 4`, `+ 2`, `+ 1`. Every table follows this definition,
//! so scalar, AVX2 and AVX-512 return identical bits (a NaN is a NaN; its payload is not defined).
//!
//! # The rooms
//!
//! - [`isa`]: which instruction sets there are, and proof that this processor has one.
//! - [`ternary`]: the 2-bit weight layout, its packing, and the integer matrix products.
//! - [`blocks`]: rows at 6 or 4 bits a weight, and their products in integers, for the head.
//! - [`codes`]: rows of small integer codes, and integer products from them, for quantised KV caches.
//! - `ops`: the float operations, each written once over `vector::F32x16` and compiled per instruction set.
//! - [`oracle`]: the obvious scalar code that every table is compared with, bit for bit.

#![allow(unsafe_code)]
// The one crate besides `longbit-sys` that may: intrinsics live here and nowhere else.
// Lane loops index several arrays by one constant-bounded index: that is what unrolls into registers.
#![allow(clippy::needless_range_loop)]

pub mod blocks;
pub mod codes;
pub mod isa;
mod ops;
pub mod oracle;
mod table;
pub mod ternary;
mod vector;

pub use blocks::{BlockFormat, BlockShape, Planes};
pub use codes::{CodeBits, CodeShape, QueryBits, QueryCodes, Rows, Scales};
pub use isa::{ISA_VARIABLE, Isa, IsaError};
pub use ops::depths::DEPTHS;
pub use ops::fp8::Fp8;
pub use ops::quantize::Quantized;
pub use table::Kernels;
pub use ternary::{
    BLOCK_COLS, BadCode, ColumnShape, RowShape, TILE_ROWS, TRIT_COLS, TernaryShape, TritShape,
};
