//! Master weights: floats that become ternary as the model was trained to make them so (BitNet b1.58, arXiv
//! 2402.17764, and `WeightQuant` of transformers' `integrations/bitnet.py`): `m = max(mean |W|, 1e-5)` over the whole
//! matrix, weights `clamp(round_half_even(W / m), -1, 1)`, scale `m`.

use std::sync::Mutex;

use longbit_sys::Team;

use super::plan::{LinearPlan, Scale};
use crate::error::Result;
use crate::formats::{Encoding, Matrix};
use crate::model::build::{Job, run_all};

/// Smallest mean magnitude.
const SMALLEST_MEAN: f32 = 1e-5;
/// Rows whose sum one job takes; fixed, so that the mean has the same bits for any number of threads.
const ROWS_A_JOB: usize = 64;

/// How floats become codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rounding {
    /// Multiplied before rounding.
    inverse: f32,
    /// Multiplier of the ternary matrix.
    pub(super) scale: f32,
}

/// What is known of the numbers of some rows.
#[derive(Clone, Copy)]
struct Magnitudes {
    sum: f64,
    /// Bits of the smallest magnitude above zero, minus one; `u32::MAX` when there is none.
    least: u32,
    /// Bits of the largest magnitude. The bits of magnitudes are ordered as their numbers are, infinity and what is no
    /// number at the end.
    most: u32,
}

/// Independent sums, so that additions need not wait for each other; added up in order, the same for any number of threads.
const LANES: usize = 8;

impl Magnitudes {
    const NONE: Magnitudes = Magnitudes { sum: 0.0, least: u32::MAX, most: 0 };

    fn of(values: &[f32]) -> Self {
        let (groups, rest) = values.as_chunks::<LANES>();
        let mut all = [Self::NONE; LANES];
        for group in groups {
            all.iter_mut().zip(group).for_each(|(lane, value)| lane.add(*value));
        }
        all.iter_mut().zip(rest).for_each(|(lane, value)| lane.add(*value));
        all.into_iter().fold(Self::NONE, Self::and)
    }

    fn add(&mut self, value: f32) {
        let bits = value.abs().to_bits();
        self.sum += f64::from(value.abs());
        self.least = self.least.min(bits.wrapping_sub(1));
        self.most = self.most.max(bits);
    }

    /// The magnitude of every number that is not zero, if it is one and has an inverse.
    fn one(&self) -> Option<f32> {
        let most = f32::from_bits(self.most);
        (self.most.checked_sub(1) == Some(self.least) && most.is_normal()).then_some(most)
    }

    fn and(self, other: Self) -> Self {
        Magnitudes {
            sum: self.sum + other.sum,
            least: self.least.min(other.least),
            most: self.most.max(other.most),
        }
    }
}

/// Reads the whole matrix once and says how its numbers become ternary.
pub(super) fn rounding(linear: &LinearPlan, bytes: &[u8], team: &Team) -> Result<Rounding> {
    let stored = &linear.stored;
    let matrix =
        Matrix::new(stored.encoding, stored.rows, stored.cols, bytes).map_err(|e| stored.damaged(&e))?;
    let parts = stored.rows.div_ceil(ROWS_A_JOB);
    let found: Vec<Mutex<Magnitudes>> = (0..parts).map(|_| Mutex::new(Magnitudes::NONE)).collect();
    let jobs = found
        .iter()
        .enumerate()
        .map(|(i, slot)| -> Job<'_> {
            Box::new(move || {
                let mut values = vec![0.0f32; stored.cols];
                let mut all = Magnitudes::NONE;
                for row in i * ROWS_A_JOB..stored.rows.min((i + 1) * ROWS_A_JOB) {
                    matrix.dequantize_row(row, &mut values).map_err(|e| stored.damaged(&e))?;
                    all = all.and(Magnitudes::of(&values));
                }
                *slot.lock().unwrap_or_else(|e| e.into_inner()) = all;
                Ok(())
            })
        })
        .collect();
    run_all(team, jobs)?;
    let found = found.into_iter().map(|slot| slot.into_inner().unwrap_or_else(|e| e.into_inner()));
    let all = found.fold(Magnitudes::NONE, Magnitudes::and);
    if !f32::from_bits(all.most).is_finite() {
        return Err(stored.fail("holds a number that is not finite".into()));
    }
    if let (Scale::Detect(times), Some(magnitude)) = (linear.scale, all.one()) {
        return Ok(Rounding { inverse: 1.0 / magnitude, scale: magnitude * times });
    }
    // Only floats are kept as master weights; whoever quantised to blocks did not mean these to be rounded again.
    if !matches!(stored.encoding, Encoding::F32 | Encoding::F16 | Encoding::Bf16) {
        return Err(stored.fail(format!(
            "has type {} and is not ternary: its numbers have more than one magnitude; use a file whose matrices are \
             ternary, or the original master weights",
            stored.encoding.name()
        )));
    }
    let mean = all.sum / (stored.rows as f64 * stored.cols as f64);
    // The very operations of the training code, in f32: the weights are divided by multiplying.
    let inverse = 1.0 / (mean as f32).max(SMALLEST_MEAN);
    let times = if let Scale::Detect(times) = linear.scale { times } else { 1.0 };
    Ok(Rounding { inverse, scale: 1.0 / inverse * times })
}

impl Rounding {
    /// The codes `weight + 1` of some finite numbers. To round to even and clamp to one is to ask on which side of a half
    /// the number lies, ties going to zero.
    pub(super) fn codes(&self, values: &[f32], codes: &mut [u8]) {
        for (code, value) in codes.iter_mut().zip(values) {
            let scaled = value * self.inverse;
            *code = 1 + u8::from(scaled > 0.5) - u8::from(scaled < -0.5);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::plan::{RowOrder, Span, Stored};

    /// The codes and the scale of two rows of floats.
    fn ternary(values: [[f32; 3]; 2], scale: Scale) -> Result<([[u8; 3]; 2], f32)> {
        let bytes: Vec<u8> = values.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        let span = Span { file: 0, range: 0..bytes.len() };
        let (name, path) = ("w".to_string(), "model".into());
        let stored = Stored { name, path, span, encoding: Encoding::F32, rows: 2, cols: 3 };
        let rounding = rounding(
            &LinearPlan { stored, scale, order: RowOrder::Same },
            &bytes,
            &Team::oversubscribed(2).unwrap(),
        )?;
        let mut codes = [[9; 3]; 2];
        for (codes, values) in codes.iter_mut().zip(&values) {
            rounding.codes(values, codes);
        }
        Ok((codes, rounding.scale))
    }

    #[test]
    fn masters_are_rounded_by_their_mean() {
        // Mean 0.5: a quarter is a tie and goes to the even zero, and three quarters to one.
        let masters = [[0.25, -0.25, 0.75], [-0.75, 0.0, 1.0]];
        for scale in [Scale::Absmean, Scale::Detect(1.0)] {
            assert_eq!(ternary(masters, scale).unwrap(), ([[1, 1, 2], [0, 1, 2]], 0.5));
        }
        assert_eq!(ternary(masters, Scale::Detect(3.0)).unwrap().1, 1.5);
    }

    #[test]
    fn floats_of_one_magnitude_are_ternary_already() {
        let weights = [[0.3, 0.0, 0.0], [0.0, 0.0, -0.3]];
        assert_eq!(ternary(weights, Scale::Detect(2.0)).unwrap(), ([[2, 1, 1], [1, 1, 0]], 0.6));
        // By the mean the same weights, but not the same scale.
        let (codes, scale) = ternary(weights, Scale::Absmean).unwrap();
        assert_eq!(codes, [[2, 1, 1], [1, 1, 0]]);
        assert!((scale - 0.1).abs() < 1e-7);
    }

    #[test]
    fn numbers_too_small_for_the_mean_are_zeros() {
        let smallest = f32::from_bits(1);
        for weights in [[[0.0; 3]; 2], [[smallest, 0.0, -smallest]; 2], [[1e-34; 3]; 2]] {
            let (codes, scale) = ternary(weights, Scale::Absmean).unwrap();
            assert_eq!(codes, [[1; 3]; 2]);
            assert!((scale - SMALLEST_MEAN).abs() < 1e-11);
        }
        let (codes, scale) = ternary([[smallest, 0.0, -smallest]; 2], Scale::Detect(1.0)).unwrap();
        assert!(codes == [[1; 3]; 2] && scale > 0.0);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for scale in [Scale::Absmean, Scale::Detect(1.0)] {
                let message = ternary([[1.0, bad, 0.0], [0.0; 3]], scale).unwrap_err().to_string();
                assert!(message.contains("`w`") && message.contains("not finite"), "{message}");
            }
        }
    }
}
