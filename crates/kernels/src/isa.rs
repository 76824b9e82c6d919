//! Which instruction sets the kernels are built for, and which of them this processor can run.

use std::fmt;
use std::str::FromStr;

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "LONGBIT_ISA";

/// An instruction set that kernels can be built for, from plainest to fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, on every machine.
    Scalar,
    /// AArch64 with NEON and the int8 dot products of `dotprod`.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with the 256-bit int8 dot products of AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// [`Isa::Avx512`] with the int8 dot products of AVX-512 VNNI.
    Avx512Vnni,
    /// [`Isa::Avx512Vnni`] with the byte permutations of AVX-512 VBMI.
    Avx512Vbmi,
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// The name is not one that Longbit knows.
    #[error("{from}: there is no instruction set {value:?}; this processor can run {}", names(.available))]
    Unknown {
        /// Where the name came from, such as `LONGBIT_ISA`.
        from: String,
        /// The name that was given.
        value: String,
        /// What could be given instead.
        available: Vec<Isa>,
    },
    /// The instruction set exists, but not on this processor or not in this build.
    #[error("{from}: {isa} cannot run here; this processor can run {}", names(.available))]
    Unavailable {
        /// Where the name came from, such as `LONGBIT_ISA`.
        from: String,
        /// The instruction set that was asked for.
        isa: Isa,
        /// What could be asked for instead.
        available: Vec<Isa>,
    },
}

fn names(isas: &[Isa]) -> String {
    isas.iter().map(|i| i.as_str()).collect::<Vec<_>>().join(", ")
}

impl Isa {
    /// Every instruction set, from plainest to fastest.
    pub const ALL: [Isa; 7] =
        [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Vbmi];

    /// The name used in `LONGBIT_ISA` and in result columns.
    pub fn as_str(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx-vnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512-vnni",
            Isa::Avx512Vbmi => "avx512-vbmi",
        }
    }

    /// What this processor and this build can run, from plainest to fastest; [`Isa::Scalar`] is always first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this processor and this build can run this instruction set.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => token::Neon::detect().is_some(),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => token::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => token::AvxVnni::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => token::Avx512::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => token::Avx512Vnni::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => token::Avx512Vbmi::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Vbmi => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(s: &str) -> Result<Isa, IsaError> {
        Isa::ALL.into_iter().find(|i| i.as_str() == s).ok_or_else(|| IsaError::Unknown {
            from: "instruction set".into(),
            value: s.into(),
            available: Isa::available(),
        })
    }
}

/// Proofs that this processor has an instruction set. Only detection builds one, and a table of kernels is handed out
/// only against its token: that is the safety argument of every call through a table.
#[cfg(target_arch = "aarch64")]
pub(crate) mod token {
    /// Proof of NEON and of the int8 dot products of `dotprod`.
    #[derive(Clone, Copy)]
    pub(crate) struct Neon(());

    impl Neon {
        pub(crate) fn detect() -> Option<Neon> {
            (std::arch::is_aarch64_feature_detected!("neon")
                && std::arch::is_aarch64_feature_detected!("dotprod"))
            .then_some(Neon(()))
        }
    }
}

/// Proofs that this processor has an instruction set. Only detection builds one, and a table of kernels is handed out
/// only against its token: that is the safety argument of every call through a table.
#[cfg(target_arch = "x86_64")]
pub(crate) mod token {
    /// Proof of AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());
    /// Proof of AVX-512 F, BW, DQ and VL (and of AVX2 and FMA).
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());
    /// Proof of AVX-VNNI besides [`Avx2`].
    #[derive(Clone, Copy)]
    pub(crate) struct AvxVnni(());
    /// Proof of AVX-512 VNNI besides [`Avx512`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Vnni(());
    /// Proof of AVX-512 VBMI besides [`Avx512Vnni`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Vbmi(());

    impl AvxVnni {
        pub(crate) fn detect() -> Option<AvxVnni> {
            Avx2::detect()?;
            is_x86_feature_detected!("avxvnni").then_some(AvxVnni(()))
        }
    }

    impl Avx512Vbmi {
        pub(crate) fn detect() -> Option<Avx512Vbmi> {
            Avx512Vnni::detect()?;
            is_x86_feature_detected!("avx512vbmi").then_some(Avx512Vbmi(()))
        }
    }

    impl Avx2 {
        pub(crate) fn detect() -> Option<Avx2> {
            (is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            .then_some(Avx2(()))
        }
    }

    impl Avx512 {
        pub(crate) fn detect() -> Option<Avx512> {
            Avx2::detect()?;
            (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl"))
            .then_some(Avx512(()))
        }
    }

    impl Avx512Vnni {
        pub(crate) fn detect() -> Option<Avx512Vnni> {
            Avx512::detect()?;
            is_x86_feature_detected!("avx512vnni").then_some(Avx512Vnni(()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        assert_eq!(Isa::available()[0], Isa::Scalar);
    }

    #[test]
    fn an_unknown_name_says_what_there_is() {
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert!(error.contains("\"sse9\"") && error.contains("scalar"), "{error}");
    }
}
