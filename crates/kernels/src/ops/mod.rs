//! The float operations: one family a file, each written once and compiled per instruction set.
//!
//! A body is generic over [`crate::vector::F32x16`] and `#[inline(always)]`. Element-wise bodies are plain loops, which
//! the compiler vectorises under the features of each table: without a reduction, their bits cannot depend on the width.

pub(crate) use crate::{blocks, codes};

pub(crate) mod attention;
pub(crate) mod convert;
pub(crate) mod depths;
pub(crate) mod elementwise;
pub(crate) mod exp;
pub(crate) mod fp8;
pub(crate) mod hadamard;
pub(crate) mod half;
pub(crate) mod head;
pub(crate) mod norm;
pub(crate) mod quantize;
pub(crate) mod reduce;
pub(crate) mod rows;
pub(crate) mod runs;
pub(crate) mod search;
