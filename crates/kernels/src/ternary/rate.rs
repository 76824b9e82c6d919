//! How fast this processor multiplies bytes: what a product of many tokens is measured against.

use crate::{Isa, Kernels};

impl Kernels {
    /// Runs nothing but independent int8 dot products on registers, `rounds` times twelve, with the instructions that the
    /// ternary products of this instruction set are made of, and returns how many multiply-adds that was (a product and
    /// its addition count as one). Time it: the rate is the ceiling of [`Kernels::ternary_gemm`].
    ///
    /// The instructions are one `vpdpbusd` with VNNI, `sdot` with NEON, and `vpmaddubsw` and one 16-bit addition otherwise
    /// (codes are so small that sums go to 32 bits only now and then). The scalar set multiplies one byte at a time.
    pub fn int8_dot_rate(&self, rounds: usize) -> u64 {
        match self.isa() {
            // SAFETY: this table was handed out against proof of its instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { super::avx2::dots(rounds) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => unsafe { super::avxvnni::dots(rounds) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { super::avx512::dots(rounds) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni | Isa::Avx512Vbmi => unsafe { super::vnni::dots(rounds) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { sdots(rounds) },
            _ => scalar(rounds),
        }
    }
}

/// Twelve chains of one product each.
fn scalar(rounds: usize) -> u64 {
    let (code, activation) = std::hint::black_box((2i32, -3i32));
    let mut sums = [0i32; 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = std::hint::black_box(sum.wrapping_add(code * activation));
        }
    }
    std::hint::black_box(sums);
    rounds as u64 * 12
}

/// Twelve chains of `sdot`, whose intrinsic is not stable yet.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod")]
fn sdots(rounds: usize) -> u64 {
    use std::arch::aarch64::vdupq_n_s32;
    let ones = vdupq_n_s32(0x0101_0101);
    let mut sums = [vdupq_n_s32(0); 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            // SAFETY: the instruction belongs to `dotprod`, and touches these two registers only.
            unsafe {
                std::arch::asm!(
                    "sdot {sum:v}.4s, {ones:v}.16b, {ones:v}.16b",
                    sum = inout(vreg) *sum,
                    ones = in(vreg) ones,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    std::hint::black_box(sums);
    rounds as u64 * 12 * 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_counts_its_products() {
        for kernels in Isa::available().into_iter().filter_map(Kernels::for_isa) {
            let one = kernels.int8_dot_rate(1);
            assert!(one >= 12 && one.is_multiple_of(12), "{}: {one}", kernels.isa());
            assert_eq!(kernels.int8_dot_rate(1000), 1000 * one, "{}", kernels.isa());
        }
    }
}
