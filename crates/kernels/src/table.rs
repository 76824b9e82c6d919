//! One table of function pointers per instruction set, and how one is chosen.
//!
//! The public methods of [`Kernels`] live beside the operations, in `ops` and [`crate::ternary`]: they check shapes and
//! call through the table.

use crate::blocks::{BlockTable, scalar as blocks_scalar};
use crate::codes::accumulate::{self, Accumulate};
use crate::codes::scores::{self, ScoreTable};
use crate::isa::{ISA_VARIABLE, Isa, IsaError};
use crate::ternary::TernaryTable;
use crate::ternary::{sparse, trits};
use crate::vector::S16;
#[cfg(target_arch = "x86_64")]
use crate::{
    blocks::{avx2 as blocks_avx2, avx512 as blocks_avx512},
    isa::token,
    ternary::{
        avx2 as ternary_avx2, avx512 as ternary_avx512, avxvnni as ternary_avxvnni, vnni as ternary_vnni,
    },
    vector::{A16, Z16},
};
#[cfg(target_arch = "aarch64")]
use crate::{isa::token, ternary::neon as ternary_neon, vector::N16};

/// The kernels of one instruction set. There is one static table per set; all give identical bits.
pub struct Kernels {
    isa: Isa,
    pub(crate) float: &'static FloatTable,
    pub(crate) ternary: &'static TernaryTable,
    pub(crate) blocks: &'static BlockTable,
    pub(crate) code_scores: &'static ScoreTable,
    pub(crate) code_accumulate: Accumulate,
    pub(crate) trits: &'static trits::TritTable,
    pub(crate) sparse: &'static sparse::SparseTable,
}

/// Lists every float operation once, as `name(arguments) -> result = file::function`, for the macros below.
macro_rules! for_each_float_op {
    ($callback:ident $($context:tt)*) => {
        $callback! { ($($context)*)
            dot(a: &[f32], b: &[f32]) -> f32 = reduce::dot;
            sum(x: &[f32]) -> f32 = reduce::sum;
            max(x: &[f32]) -> f32 = reduce::max;
            exp_sum(x: &mut [f32], offset: f32, shift: f32) -> f32 = exp::exp_sum;
            silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) -> () = exp::silu_mul;
            rmsnorm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> () = norm::rmsnorm;
            rope(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) -> () = elementwise::rope;
            relu2_mul(gate: &[f32], up: &[f32], out: &mut [f32]) -> () = elementwise::relu2_mul;
            add_assign(x: &mut [f32], y: &[f32]) -> () = elementwise::add_assign;
            mul_assign(x: &mut [f32], y: &[f32]) -> () = elementwise::mul_assign;
            scale(x: &mut [f32], f: f32) -> () = elementwise::scale;
            scale_add(acc: &mut [f32], f: f32, other: &[f32], g: f32) -> () = elementwise::scale_add;
            add_to_rows(rows: &mut [f32], y: &[f32]) -> () = elementwise::add_to_rows;
            multiply_rows(rows: &[f32], factors: &[f32], out: &mut [f32]) -> () = elementwise::multiply_rows;
            f32_to_bf16(x: &[f32], out: &mut [u16]) -> () = convert::f32_to_bf16;
            bf16_to_f32(x: &[u16], out: &mut [f32]) -> () = convert::bf16_to_f32;
            weave_bf16(x: &[f32], d: usize, out: &mut [u16]) -> () = convert::weave_bf16;
            unweave_bf16(x: &[u16], d: usize, out: &mut [f32]) -> () = convert::unweave_bf16;
            f32_to_f16(x: &[f32], out: &mut [u16]) -> () = half::f32_to_f16;
            f16_to_f32(x: &[u16], out: &mut [f32]) -> () = half::f16_to_f32;
            f32_to_e4m3(x: &[f32], out: &mut [u8]) -> () = fp8::f32_to_e4m3;
            f32_to_e5m2(x: &[f32], out: &mut [u8]) -> () = fp8::f32_to_e5m2;
            e4m3_to_f32(x: &[u8], out: &mut [f32]) -> () = fp8::e4m3_to_f32;
            e5m2_to_f32(x: &[u8], out: &mut [f32]) -> () = fp8::e5m2_to_f32;
            hadamard(rows: &mut [f32], d: usize, before: bool, after: bool) -> () = hadamard::hadamard;
            runs_above(weights: &[f32], floors: &[f32], min_gap: usize, runs: &mut Vec<std::ops::Range<usize>>) -> ()
                = runs::runs_above;
            count_depths(x: &[f32], top: f32, per_unit: f32, counts: &mut [u32; crate::DEPTHS]) -> () = depths::count_depths;
            maxima(x: &[f32], out: &mut [f32]) -> () = search::maxima;
            sums_from(x: &[f32], bounds: &[f32; 4]) -> [f32; 4] = search::sums_from;
            sum_f64(x: &[f32]) -> f64 = search::sum_f64;
            marks_equal(codes: &[u16], code: u16, marks: &mut [u64]) -> () = search::marks_equal;
            quantize_activations(x: &[f32], codes: &mut [i8]) -> crate::Quantized
                = quantize::quantize_activations;
            quantize_rows_int8(rows: &[u16], k: usize, codes: &mut [i8], scales: &mut [f32]) -> ()
                = quantize::quantize_rows_int8;
            scores_f32(queries: &[f32], rows: &[f32], d: usize, out: &mut [f32], upcoming: &[f32]) -> () = attention::scores_f32;
            scores_bf16(queries: &[f32], rows: &[u16], d: usize, out: &mut [f32], upcoming: &[u16]) -> () = attention::scores_bf16;
            accumulate_f32(weights: &[f32], rows: &[f32], d: usize, acc: &mut [f32], upcoming: &[f32]) -> ()
                = attention::accumulate_f32;
            accumulate_bf16(weights: &[f32], rows: &[u16], d: usize, acc: &mut [f32], upcoming: &[u16]) -> ()
                = attention::accumulate_bf16;
            scores_f16(queries: &[f32], rows: &[u16], d: usize, out: &mut [f32], upcoming: &[u16]) -> () = attention::scores_f16;
            accumulate_f16(weights: &[f32], rows: &[u16], d: usize, acc: &mut [f32], upcoming: &[u16]) -> ()
                = attention::accumulate_f16;
            scores_e4m3(queries: &[f32], rows: &[u8], d: usize, scales: Option<&[f32]>, out: &mut [f32], upcoming: &[u8]) -> ()
                = attention::scores_e4m3;
            scores_e5m2(queries: &[f32], rows: &[u8], d: usize, scales: Option<&[f32]>, out: &mut [f32], upcoming: &[u8]) -> ()
                = attention::scores_e5m2;
            accumulate_e4m3(weights: &[f32], scales: Option<&[f32]>, rows: &[u8], d: usize, acc: &mut [f32], upcoming: &[u8]) -> ()
                = attention::accumulate_e4m3;
            accumulate_e5m2(weights: &[f32], scales: Option<&[f32]>, rows: &[u8], d: usize, acc: &mut [f32], upcoming: &[u8]) -> ()
                = attention::accumulate_e5m2;
            head_f32(rows: &[f32], x: &[f32], out: &mut [f32]) -> () = head::head_f32;
            head_bf16(rows: &[u16], x: &[f32], out: &mut [f32]) -> () = head::head_bf16;
            head_bf16_rows(table: &[u16], rows: &[u32], x: &[f32], out: &mut [f32]) -> () = head::head_bf16_rows;
            pack_tiles(shape: crate::BlockShape, rows: &[u16], out: &mut [u8]) -> () = blocks::pack_tiles;
            square_sums(row: &[u16], approximation: &[f32]) -> (f64, f64) = blocks::square_sums;
            quantize_planes(x: &[f32], zero: i32, dither: &[i16], planes: &mut [crate::blocks::PlaneBlock]) -> f32
                = blocks::quantize_planes;
            pack_codes(shape: crate::CodeShape, rows: &[i8], out: &mut [u8], low: &mut [u8]) -> () = codes::pack;
            unpack_codes(shape: crate::CodeShape, rows: crate::codes::Rows<'_>, out: &mut [i8]) -> () = codes::unpack;
            magnitudes(x: &[f32], run: usize, out: &mut [f32]) -> () = codes::magnitudes;
            round_codes(x: &[f32], run: usize, offsets: &[f32], factors: &[f32], limits: [f32; 2], codes: &mut [i8]) -> ()
                = codes::round_codes;
            encode_int8(shape: crate::CodeShape, blocks: bool, rows: &[f32], out: &mut [u8], low: &mut [u8], scales: &mut [f32])
                -> () = codes::encode_int8;
            head_int8(rows: &[i8], scales: &[f32], x: &[f32], out: &mut [f32]) -> () = head::head_int8;
        }
    };
}

macro_rules! define_table {
    (() $($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $file:ident::$body:ident;)*) => {
        /// The float operations of one instruction set. Calling an entry requires a processor that has the set.
        pub(crate) struct FloatTable {
            $(pub(crate) $name: unsafe fn($($ty),*) -> $ret,)*
        }
    };
}
for_each_float_op!(define_table);

/// Compiles every operation for one vector type under the given attribute (`[target_feature(...)]` or `[inline]`).
macro_rules! stamp_table {
    (($vector:ty, $attribute:tt)
     $($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $file:ident::$body:ident;)*) => {
        $(
            # $attribute
            fn $name($($arg: $ty),*) -> $ret {
                crate::ops::$file::$body::<$vector>($($arg),*)
            }
        )*
        pub(crate) static TABLE: crate::table::FloatTable = crate::table::FloatTable { $($name,)* };
    };
}

mod scalar {
    use super::S16;
    for_each_float_op!(stamp_table S16, [inline]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::A16;
    for_each_float_op!(stamp_table A16, [target_feature(enable = "avx2,fma,f16c")]);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Z16;
    for_each_float_op!(stamp_table Z16, [target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]);
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::N16;
    for_each_float_op!(stamp_table N16, [target_feature(enable = "neon,dotprod")]);
}

#[cfg(target_arch = "aarch64")]
static NEON: Kernels = Kernels {
    isa: Isa::Neon,
    float: &neon::TABLE,
    blocks: &blocks_scalar::TABLE,
    code_scores: &scores::neon::TABLE,
    code_accumulate: accumulate::neon::accumulate,
    ternary: &ternary_neon::TABLE,
    trits: &trits::PORTABLE,
    sparse: &sparse::PORTABLE,
};
#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = Kernels {
    isa: Isa::Avx2,
    float: &avx2::TABLE,
    blocks: &blocks_avx2::TABLE,
    code_scores: &scores::avx2::TABLE,
    code_accumulate: accumulate::avx2::plain::accumulate,
    ternary: &ternary_avx2::TABLE,
    trits: &trits::PORTABLE,
    sparse: &sparse::AVX2,
};
#[cfg(target_arch = "x86_64")]
static AVX512: Kernels = Kernels {
    isa: Isa::Avx512,
    float: &avx512::TABLE,
    blocks: &blocks_avx512::bw::TABLE,
    code_scores: &scores::avx2::bw::TABLE,
    code_accumulate: accumulate::avx512::bw::accumulate,
    ternary: &ternary_avx512::TABLE,
    trits: &trits::PORTABLE,
    sparse: &sparse::AVX512,
};
#[cfg(target_arch = "x86_64")]
static AVX512_VNNI: Kernels = Kernels {
    isa: Isa::Avx512Vnni,
    float: &avx512::TABLE,
    blocks: &blocks_avx512::vnni::TABLE,
    code_scores: &scores::vnni::TABLE,
    code_accumulate: accumulate::avx512::vnni::accumulate,
    ternary: &ternary_vnni::TABLE,
    trits: &trits::PORTABLE,
    sparse: &sparse::vnni::TABLE,
};
#[cfg(target_arch = "x86_64")]
static AVX512_VBMI: Kernels = Kernels {
    isa: Isa::Avx512Vbmi,
    float: &avx512::TABLE,
    blocks: &blocks_avx512::vnni::TABLE,
    code_scores: &scores::vnni::TABLE,
    code_accumulate: accumulate::avx512::vnni::accumulate,
    ternary: &ternary_vnni::TABLE,
    trits: &trits::vbmi::TABLE,
    sparse: &sparse::vnni::TABLE,
};
#[cfg(target_arch = "x86_64")]
static AVX_VNNI: Kernels = Kernels {
    isa: Isa::AvxVnni,
    float: &avx2::TABLE,
    blocks: &blocks_avx2::TABLE,
    code_scores: &scores::avx2::TABLE,
    code_accumulate: accumulate::avx2::vnni::accumulate,
    ternary: &ternary_avxvnni::TABLE,
    trits: &trits::PORTABLE,
    sparse: &sparse::AVX2,
};

static SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    float: &scalar::TABLE,
    blocks: &blocks_scalar::TABLE,
    code_scores: &scores::portable::TABLE,
    code_accumulate: accumulate::scalar::accumulate,
    ternary: &crate::ternary::scalar::TABLE,
    trits: &trits::PORTABLE,
    sparse: &sparse::PORTABLE,
};

impl Kernels {
    /// The table of an instruction set, or `None` where this processor or this build lacks it.
    pub fn for_isa(isa: Isa) -> Option<&'static Kernels> {
        match isa {
            Isa::Scalar => Some(&SCALAR),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => token::Neon::detect().map(|_| &NEON),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => None,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => token::Avx2::detect().map(|_| &AVX2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => token::Avx512::detect().map(|_| &AVX512),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => token::AvxVnni::detect().map(|_| &AVX_VNNI),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => token::Avx512Vnni::detect().map(|_| &AVX512_VNNI),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => token::Avx512Vbmi::detect().map(|_| &AVX512_VBMI),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Vbmi => None,
        }
    }

    /// The table that `LONGBIT_ISA` names, or the best one when the variable is unset or empty.
    ///
    /// # Errors
    /// The variable names no instruction set, or one that cannot run here; the error lists those that can.
    pub fn from_env() -> Result<&'static Kernels, IsaError> {
        match std::env::var_os(ISA_VARIABLE) {
            None => Ok(Kernels::best()),
            Some(value) if value.is_empty() => Ok(Kernels::best()),
            Some(value) => Kernels::named(&value.to_string_lossy(), ISA_VARIABLE),
        }
    }

    /// The table of a named instruction set; `from` says in the error where the name came from.
    ///
    /// # Errors
    /// As [`Kernels::from_env`].
    pub fn named(name: &str, from: &str) -> Result<&'static Kernels, IsaError> {
        let Ok(isa) = name.parse::<Isa>() else {
            return Err(IsaError::Unknown {
                from: from.into(),
                value: name.into(),
                available: Isa::available(),
            });
        };
        Kernels::for_isa(isa).ok_or_else(|| IsaError::Unavailable {
            from: from.into(),
            isa,
            available: Isa::available(),
        })
    }

    /// The fastest table that this processor can run.
    pub fn best() -> &'static Kernels {
        Isa::available().into_iter().rev().find_map(Kernels::for_isa).unwrap_or(&SCALAR)
    }

    /// The instruction set of this table.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels").field("isa", &self.isa).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_set_has_its_table() {
        for isa in Isa::available() {
            assert_eq!(Kernels::for_isa(isa).map(Kernels::isa), Some(isa));
        }
        assert_eq!(Some(&Kernels::best().isa()), Isa::available().last());
    }

    #[test]
    fn a_set_that_cannot_run_here_is_refused_by_name() {
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        let error = Kernels::named(foreign, ISA_VARIABLE).unwrap_err();
        assert!(error.to_string().starts_with(&format!("LONGBIT_ISA: {foreign} cannot run here")), "{error}");
        let error = Kernels::named("fast", ISA_VARIABLE).unwrap_err();
        assert!(matches!(error, IsaError::Unknown { ref value, .. } if value == "fast"), "{error}");
        assert_eq!(Kernels::named("scalar", ISA_VARIABLE).unwrap().isa(), Isa::Scalar);
    }

    /// With the variable set, this fails where the set cannot run: `scripts/aarch64.sh` relies on it.
    #[test]
    fn the_variable_is_obeyed_and_the_best_set_is_the_default() {
        let isa = Kernels::from_env().unwrap().isa();
        match std::env::var(ISA_VARIABLE) {
            Ok(name) if !name.is_empty() => assert_eq!(isa.as_str(), name),
            _ => assert_eq!(isa, Kernels::best().isa()),
        }
    }
}
