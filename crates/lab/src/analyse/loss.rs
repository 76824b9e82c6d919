//! Which figure says what a cell loses: the error of attention outputs where a generator supplied the inputs, the
//! divergence of the next token where a text was decoded.

use longbit_protocol::is_not_finite;

use super::label::{digits, percent};
use crate::record::Record;

/// A measure of loss; smaller is better and zero is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Relative L2 error of attention outputs.
    RelativeL2,
    /// Kullback-Leibler divergence of the next-token distribution.
    Kl,
}

impl Loss {
    /// The measure that `records` have: outputs first, where there are both; none without quality.
    pub fn of<'a>(records: impl IntoIterator<Item = &'a Record> + Clone) -> Option<Loss> {
        let known = |loss: &Loss| records.clone().into_iter().any(|r| loss.typical(r).is_some());
        [Loss::RelativeL2, Loss::Kl].into_iter().find(known)
    }

    /// What is usual in a cell: the median over outputs, the mean over steps.
    pub fn typical(self, r: &Record) -> Option<f64> {
        match self {
            Loss::RelativeL2 => r.rel_l2_p50,
            Loss::Kl => r.kl_nats,
        }
    }

    /// What is bad in a cell: the 95th percentile over outputs, the largest of the few steps.
    pub fn bad(self, r: &Record) -> Option<f64> {
        match self {
            Loss::RelativeL2 => r.rel_l2_p95,
            Loss::Kl => r.kl_nats_max,
        }
    }

    /// Title of an axis.
    pub fn axis(self) -> &'static str {
        match self {
            Loss::RelativeL2 => "Relative L2 error of the attention output",
            Loss::Kl => "KL divergence of the next token (nats)",
        }
    }

    /// What the points and bars of a figure are.
    pub fn caption(self) -> &'static str {
        match self {
            Loss::RelativeL2 => {
                "against exact f32 attention on the same inputs: median, bars up to the 95th percentile"
            }
            Loss::Kl => {
                "against dense attention over a bf16 cache on the same text: mean, bars up to the largest"
            }
        }
    }

    /// `61 %`, `0.012 nats`.
    pub fn show(self, value: f64) -> String {
        match self {
            Loss::RelativeL2 => percent(value),
            Loss::Kl if is_not_finite(value) => digits(value),
            Loss::Kl => format!("{} nats", digits(value)),
        }
    }

    /// What a sentence says about the figures in it.
    pub fn name(self) -> &'static str {
        match self {
            Loss::RelativeL2 => "median relative L2",
            Loss::Kl => "mean KL divergence of the next token from dense bf16",
        }
    }
}
