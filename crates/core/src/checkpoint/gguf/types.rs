//! Types of the container and number formats: which is which, for reading and for writing.

use crate::formats::{Encoding, I2sLayout};
use crate::gguf::TensorType;

/// Every format that a GGUF file can hold, with its type; [`TensorType::I2S`] stands for two.
const TYPES: [(TensorType, Encoding); 13] = [
    (TensorType::F32, Encoding::F32),
    (TensorType::F16, Encoding::F16),
    (TensorType::Bf16, Encoding::Bf16),
    (TensorType::Q8_0, Encoding::Q8_0),
    (TensorType::Q6K, Encoding::Q6K),
    (TensorType::Q5_0, Encoding::Q5_0),
    (TensorType::Q4_0, Encoding::Q4_0),
    (TensorType::Tq1_0, Encoding::Tq1_0),
    (TensorType::Tq2_0, Encoding::Tq2_0),
    (TensorType::I2S, Encoding::I2s(I2sLayout::X86)),
    (TensorType::I2S, Encoding::I2s(I2sLayout::Arm)),
    (TensorType::Iq1Bn, Encoding::Iq1Bn),
    (TensorType::Iq2Bn, Encoding::Iq2Bn),
];

/// The type under which a file lists `encoding`; none for a layout of other containers.
pub(crate) fn type_of(encoding: Encoding) -> Option<TensorType> {
    TYPES.iter().find(|(_, e)| *e == encoding).map(|(kind, _)| *kind)
}

/// The formats that `kind` may mean.
pub(super) fn encodings_of(kind: TensorType) -> impl Iterator<Item = Encoding> {
    TYPES.iter().filter(move |(k, _)| *k == kind).map(|(_, encoding)| *encoding)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_and_format_agree_about_sizes() {
        for (kind, encoding) in TYPES {
            assert_eq!(type_of(encoding), Some(kind));
            assert!(encodings_of(kind).any(|e| e == encoding));
            for cols in [1, 31, 32, 64, 96, 128, 256, 320, 768, 2560, 6912] {
                for rows in [1, 3, 8, 640] {
                    let of_container = kind.bytes(&[cols as u64, rows as u64]);
                    match encoding.bytes(rows, cols) {
                        Ok(bytes) => assert_eq!(of_container, Some(bytes), "{kind} {cols} x {rows}"),
                        // The container asks I2_S for whole bytes alone, the format for rows that can be read alone.
                        Err(_) if kind == TensorType::I2S => assert_ne!(cols % 128, 0),
                        Err(_) => assert_eq!(of_container, None, "{kind} {cols} x {rows}"),
                    }
                }
            }
        }
        assert_eq!(type_of(Encoding::HfU8), None);
    }
}
