//! Rotary position embedding: the table of angles, shared by the model and the workloads.
//!
//! Half-rotation (NEOX) pairs `(i, i + d/2)`, `inv_freq_i = theta^(-2i/d)` (Su et al. 2021, arXiv 2104.09864). The angle
//! is the f32 product `position * inv_freq_i`, as in the reference implementations; its cosine and sine come from
//! `libm` in f64, so that the table has the same bits on every machine.

use longbit_sys::{Shared, Team};

use crate::error::Result;

/// Cosines and sines for positions `0..len`, each `[len][head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Computes the table for `len` positions, split over `team`.
    ///
    /// # Errors
    /// When memory for it cannot be had.
    pub fn new(theta: f64, head_dim: usize, len: usize, team: &Team) -> Result<Self> {
        let half = head_dim / 2;
        let inv_freq: Vec<f32> =
            (0..half).map(|i| (1.0 / libm::pow(theta, (2 * i) as f64 / head_dim as f64)) as f32).collect();
        let mut bounds = vec![0];
        bounds.extend((0..team.threads()).map(|w| longbit_sys::share(len, w, team.threads()).end * half));
        let cos = Shared::try_striped(len * half, &bounds, 0.0f32)?;
        let sin = Shared::try_striped(len * half, &bounds, 0.0f32)?;
        team.run(|worker| {
            let (mut c, mut s) = (cos.write(worker.index()), sin.write(worker.index()));
            for (row, position) in worker.range(len).enumerate() {
                for (i, f) in inv_freq.iter().enumerate() {
                    let (sine, cosine) = libm::sincos(f64::from(position as f32 * f));
                    c[row * half + i] = cosine as f32;
                    s[row * half + i] = sine as f32;
                }
            }
        });
        let unshare = |table: &Shared<f32>| -> Result<Vec<f32>> {
            let mut plain = Vec::new();
            plain
                .try_reserve_exact(table.len())
                .map_err(|_| longbit_sys::SysError::TooLarge { len: table.len(), size: 4 })?;
            plain.extend_from_slice(&table.read());
            Ok(plain)
        };
        Ok(RopeTable { half, cos: unshare(&cos)?, sin: unshare(&sin)? })
    }

    /// Positions in the table.
    pub fn len(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// True when the table has no position.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }

    /// Cosines of `positions`, `[positions][head_dim / 2]`.
    pub fn cos(&self, positions: std::ops::Range<usize>) -> &[f32] {
        &self.cos[positions.start * self.half..positions.end * self.half]
    }

    /// Sines of `positions`, `[positions][head_dim / 2]`.
    pub fn sin(&self, positions: std::ops::Range<usize>) -> &[f32] {
        &self.sin[positions.start * self.half..positions.end * self.half]
    }
}
