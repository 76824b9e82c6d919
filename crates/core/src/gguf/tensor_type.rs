//! Number formats of tensors: ids, names and sizes, of mainline ggml and of the forks that ternary models come from.
//! How the bits lie is no matter of the container.

/// How the size of a tensor follows from its dimensions.
#[derive(Clone, Copy, Debug)]
enum Size {
    /// Blocks of so many values and bytes along the innermost dimension.
    Blocks(u64, u64),
    /// Rows of so many bytes of scale, then blocks; so many rows are stored together.
    Rows { scale: u64, values: u64, bytes: u64, together: u64 },
    /// Four values a byte over the whole tensor, then 32 bytes with the scale.
    PackedTensor,
    /// Not known.
    Unknown,
}

macro_rules! tensor_types {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $name:literal, $size:expr;)*) => {
        /// The type of a tensor. The name of mainline's removed types 4, 5, 31 to 33 and 36 to 38 are not kept.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum TensorType {
            $($(#[$doc])* $variant,)*
            /// 2-bit ternary of bitnet.cpp for x86, in tiles that depend on how its kernels were generated. It has the id
            /// of [`TensorType::Mxfp4`]; [`Header::parse`](super::Header::parse) tells them apart by the room between
            /// tensors.
            Tl2,
            /// An id that this table does not list.
            Unknown(u32),
        }

        impl TensorType {
            /// The listed types, without [`TensorType::Tl2`], in the order of their ids.
            #[cfg(test)]
            const ALL: &[TensorType] = &[$(TensorType::$variant,)*];

            /// The type with this id in a file; 39 is taken for [`TensorType::Mxfp4`].
            pub fn from_id(id: u32) -> TensorType {
                match id {
                    $($id => TensorType::$variant,)*
                    unknown => TensorType::Unknown(unknown),
                }
            }

            /// The id in a file.
            pub fn id(self) -> u32 {
                match self {
                    $(TensorType::$variant => $id,)*
                    TensorType::Tl2 => 39,
                    TensorType::Unknown(id) => id,
                }
            }

            /// The name as ggml has it, in lower case; `unknown` for an id that is not listed.
            pub fn name(self) -> &'static str {
                match self {
                    $(TensorType::$variant => $name,)*
                    TensorType::Tl2 => "tl2",
                    TensorType::Unknown(_) => "unknown",
                }
            }

            fn size(self) -> Size {
                match self {
                    $(TensorType::$variant => $size,)*
                    TensorType::Tl2 | TensorType::Unknown(_) => Size::Unknown,
                }
            }
        }
    };
}

use Size::{Blocks, PackedTensor, Rows};

tensor_types! {
    /// IEEE binary32.
    F32 = 0, "f32", Blocks(1, 4);
    /// IEEE binary16.
    F16 = 1, "f16", Blocks(1, 2);
    /// 4 bits, one scale a block.
    Q4_0 = 2, "q4_0", Blocks(32, 18);
    /// 4 bits, scale and minimum.
    Q4_1 = 3, "q4_1", Blocks(32, 20);
    /// 5 bits, one scale a block.
    Q5_0 = 6, "q5_0", Blocks(32, 22);
    /// 5 bits, scale and minimum.
    Q5_1 = 7, "q5_1", Blocks(32, 24);
    /// 8 bits, one scale a block.
    Q8_0 = 8, "q8_0", Blocks(32, 34);
    /// 8 bits, scale and sum; for activations.
    Q8_1 = 9, "q8_1", Blocks(32, 36);
    /// 2 bits, super-blocks.
    Q2K = 10, "q2_k", Blocks(256, 84);
    /// 3 bits, super-blocks.
    Q3K = 11, "q3_k", Blocks(256, 110);
    /// 4 bits, super-blocks.
    Q4K = 12, "q4_k", Blocks(256, 144);
    /// 5 bits, super-blocks.
    Q5K = 13, "q5_k", Blocks(256, 176);
    /// 6 bits, super-blocks.
    Q6K = 14, "q6_k", Blocks(256, 210);
    /// 8 bits, super-blocks; for activations.
    Q8K = 15, "q8_k", Blocks(256, 292);
    /// 2.06 bits, codebook.
    Iq2Xxs = 16, "iq2_xxs", Blocks(256, 66);
    /// 2.31 bits, codebook.
    Iq2Xs = 17, "iq2_xs", Blocks(256, 74);
    /// 3.06 bits, codebook.
    Iq3Xxs = 18, "iq3_xxs", Blocks(256, 98);
    /// 1.56 bits, codebook.
    Iq1S = 19, "iq1_s", Blocks(256, 50);
    /// 4 bits, non-linear.
    Iq4Nl = 20, "iq4_nl", Blocks(32, 18);
    /// 3.44 bits, codebook.
    Iq3S = 21, "iq3_s", Blocks(256, 110);
    /// 2.56 bits, codebook.
    Iq2S = 22, "iq2_s", Blocks(256, 82);
    /// 4.25 bits, non-linear.
    Iq4Xs = 23, "iq4_xs", Blocks(256, 136);
    /// Integers of 8 bits.
    I8 = 24, "i8", Blocks(1, 1);
    /// Integers of 16 bits.
    I16 = 25, "i16", Blocks(1, 2);
    /// Integers of 32 bits.
    I32 = 26, "i32", Blocks(1, 4);
    /// Integers of 64 bits.
    I64 = 27, "i64", Blocks(1, 8);
    /// IEEE binary64.
    F64 = 28, "f64", Blocks(1, 8);
    /// 1.75 bits, codebook.
    Iq1M = 29, "iq1_m", Blocks(256, 56);
    /// The upper half of binary32.
    Bf16 = 30, "bf16", Blocks(1, 2);
    /// Ternary, 1.69 bits.
    Tq1_0 = 34, "tq1_0", Blocks(256, 54);
    /// Ternary, 2.06 bits.
    Tq2_0 = 35, "tq2_0", Blocks(256, 66);
    /// Ternary, 2 bits, one scale a tensor, of bitnet.cpp and ik_llama.cpp. Files for x86 and for ARM differ in the order
    /// of the values, under one id.
    I2S = 36, "i2_s", PackedTensor;
    /// 8 bits, of bitnet.cpp; for activations.
    I8S = 37, "i8_s", Blocks(1, 1);
    /// Ternary, 2 bits, of bitnet.cpp for ARM, in tiles that depend on how its kernels were generated.
    Tl1 = 38, "tl1", Size::Unknown;
    /// 4-bit floats, one power of two a block.
    Mxfp4 = 39, "mxfp4", Blocks(32, 17);
    /// 4-bit floats, 8-bit float scales.
    Nvfp4 = 40, "nvfp4", Blocks(64, 36);
    /// 1 bit, one scale a block.
    Q1_0 = 41, "q1_0", Blocks(128, 18);
    /// 6 bits, one scale a block, of ik_llama.cpp.
    Q6_0 = 133, "q6_0", Blocks(32, 26);
    /// Ternary, 1.63 bits, an f16 scale a row, of ik_llama.cpp.
    Iq1Bn = 134, "iq1_bn", Rows { scale: 2, values: 64, bytes: 13, together: 1 };
    /// Ternary, 2 bits, an f32 scale a row, of ik_llama.cpp.
    Iq2Bn = 135, "iq2_bn", Rows { scale: 4, values: 64, bytes: 16, together: 1 };
    /// 2.38 bits, of ik_llama.cpp.
    Iq2K = 137, "iq2_k", Blocks(256, 76);
    /// 3.44 bits, of ik_llama.cpp.
    Iq3K = 138, "iq3_k", Blocks(256, 110);
    /// 4.5 bits, of ik_llama.cpp.
    Iq4K = 139, "iq4_k", Blocks(256, 144);
    /// 5.5 bits, of ik_llama.cpp.
    Iq5K = 140, "iq5_k", Blocks(256, 176);
    /// 6.63 bits, of ik_llama.cpp.
    Iq6K = 141, "iq6_k", Blocks(256, 212);
    /// [`TensorType::Iq2Bn`] with four rows interleaved.
    Iq2BnR4 = 335, "iq2_bn_r4", Rows { scale: 4, values: 64, bytes: 16, together: 4 };
}

impl TensorType {
    /// Values and bytes of a block, for a type that is nothing but blocks.
    pub fn block(self) -> Option<(u64, u64)> {
        match self.size() {
            Blocks(values, bytes) => Some((values, bytes)),
            _ => None,
        }
    }

    /// Whether the size of a tensor of this type follows from its dimensions.
    pub fn sized(self) -> bool {
        !matches!(self.size(), Size::Unknown)
    }

    /// Bytes of a tensor with dimensions `dims`, innermost first. Nothing when the type's size is unknown, when the
    /// dimensions do not divide into its blocks, or when they are so great that the number of bytes overflows.
    pub fn bytes(self, dims: &[u64]) -> Option<u64> {
        let (cols, outer) = dims.split_first()?;
        let rows = outer.iter().try_fold(1, |rows: u64, dim| rows.checked_mul(*dim))?;
        let divided = |n: u64, unit: u64| n.is_multiple_of(unit).then_some(n / unit);
        match self.size() {
            Blocks(values, bytes) => divided(*cols, values)?.checked_mul(bytes)?.checked_mul(rows),
            Rows { scale, values, bytes, together } => {
                divided(rows, together)?;
                divided(*cols, values)?.checked_mul(bytes)?.checked_add(scale)?.checked_mul(rows)
            }
            PackedTensor => divided(cols.checked_mul(rows)?, 4)?.checked_add(32),
            Size::Unknown => None,
        }
    }

    /// What the dimensions of a tensor of this type must divide by, for a message.
    pub(super) fn rule(self) -> String {
        match self.size() {
            Blocks(values, _) | Rows { values, together: 1, .. } => {
                format!("the innermost dimension must be a multiple of {values}")
            }
            Rows { values, together, .. } => {
                format!(
                    "the innermost dimension must be a multiple of {values} and the rows a multiple of {together}"
                )
            }
            PackedTensor => "the number of values must be a multiple of 4".into(),
            Size::Unknown => "its size is not known".into(),
        }
    }
}

/// The name, with the id where it is not listed.
impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TensorType::Unknown(id) => write!(f, "type {id}"),
            known => f.write_str(known.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::TensorType;

    #[test]
    fn ids_lead_back_and_names_are_distinct() {
        let mut names = std::collections::HashSet::new();
        for kind in TensorType::ALL.iter().copied() {
            assert_eq!(TensorType::from_id(kind.id()), kind);
            assert!(names.insert(kind.name()), "{kind}");
        }
        assert!(TensorType::ALL.windows(2).all(|w| w[0].id() < w[1].id()));
        assert_eq!(TensorType::from_id(39), TensorType::Mxfp4);
        assert_eq!(TensorType::Tl2.id(), 39);
        for unlisted in [4, 5, 31, 33, 42, 136, 1 << 31, u32::MAX] {
            assert_eq!(TensorType::from_id(unlisted), TensorType::Unknown(unlisted));
            assert_eq!(TensorType::Unknown(unlisted).to_string(), format!("type {unlisted}"));
            assert_eq!(TensorType::Unknown(unlisted).bytes(&[256]), None);
        }
    }

    #[test]
    fn sizes_follow_the_dimensions() {
        use TensorType::*;
        let known: [(TensorType, &[u64], u64); 12] = [
            (F32, &[3, 5], 60),
            (Bf16, &[2560, 128_256], 656_670_720),
            (Q4_0, &[64, 3], 108),
            (Q6K, &[2560], 2100),
            (Tq1_0, &[256, 4], 216),
            (Tq2_0, &[6912, 2560], 6912 * 2560 / 256 * 66),
            (I2S, &[2560, 640], 2560 * 640 / 4 + 32),
            (Iq1Bn, &[2560, 10], 10 * (2 + 13 * 40)),
            (Iq2Bn, &[2560, 10], 10 * (4 + 640)),
            (Iq2BnR4, &[64, 8], 8 * (4 + 16)),
            (I8, &[1, 1, 1, 7], 7),
            (Q6_0, &[32], 26),
        ];
        for (kind, dims, bytes) in known {
            assert_eq!(kind.bytes(dims), Some(bytes), "{kind} {dims:?}");
        }
        let none: [(TensorType, &[u64]); 9] = [
            (F32, &[]),
            (Q4_0, &[33, 32]),
            (Tq2_0, &[128, 2]),
            (I2S, &[3, 3]),
            (Iq1Bn, &[32, 2]),
            (Iq2BnR4, &[64, 6]),
            (Tl1, &[256, 256]),
            (F32, &[1 << 62, 1]),
            (F32, &[1, u64::MAX, u64::MAX]),
        ];
        for (kind, dims) in none {
            assert_eq!(kind.bytes(dims), None, "{kind} {dims:?}");
        }
    }
}
