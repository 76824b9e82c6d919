//! Weights repacked after loading, so that a decode step reads fewer bytes and computes the same bits.

use longbit_sys::Team;

use super::build::{Job, WeightMemory, run_all};
use super::config::Activation;
use super::linear::{Packing, TernaryLinear};
use super::sparse::SparseFfn;
use super::weights::{Layer, Model};
use crate::error::{Error, Result};

/// Tiles that one job repacks.
const TILES_A_JOB: usize = 64;

/// What [`Model::compact`] does. None of it changes a bit of any result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Compaction {
    /// Packing of the ternary matrices.
    pub packing: Packing,
    /// Decode steps skip rows of `up` and columns of `down` that meet an exact zero; takes a second copy of both, since
    /// prefill reads them whole.
    pub skip_zeros: bool,
}

impl Compaction {
    /// Every way.
    pub const ALL: [Compaction; 4] = [
        Compaction { packing: Packing::TwoBits, skip_zeros: false },
        Compaction { packing: Packing::Trits, skip_zeros: false },
        Compaction { packing: Packing::TwoBits, skip_zeros: true },
        Compaction { packing: Packing::Trits, skip_zeros: true },
    ];

    /// Name, as in experiment files: the packing, with `+skip` where zeros are skipped.
    pub fn as_str(self) -> &'static str {
        match (self.packing, self.skip_zeros) {
            (Packing::TwoBits, false) => "2bit",
            (Packing::Trits, false) => "1.6bit",
            (Packing::TwoBits, true) => "2bit+skip",
            (Packing::Trits, true) => "1.6bit+skip",
        }
    }

    /// The way called `name`.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names that exist.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|how| how.as_str() == name).ok_or_else(|| {
            Error::unknown("packing of the weights", name, Self::ALL.into_iter().map(Self::as_str))
        })
    }
}

impl Model {
    /// Repacks the weights on all threads of `team`. Old and new weights of the model are in memory together for a while.
    ///
    /// # Errors
    /// When memory cannot be had, when weights were repacked before, or when zeros are to be skipped in a model whose
    /// activation makes none (SiLU).
    pub fn compact(mut self, how: Compaction, team: &Team) -> Result<Model> {
        if how == Compaction::default() {
            return Ok(self);
        }
        if self.compaction != Compaction::default() {
            return Err(Error::Invalid(
                "the weights of this model were repacked before; load it anew".into(),
            ));
        }
        if how.skip_zeros && self.config.activation != Activation::Relu2 {
            return Err(Error::Invalid(
                "skipping zeros needs a model with ReLU² (`relu2`): the activation of this one, SiLU, is zero nowhere"
                    .into(),
            ));
        }
        if how.skip_zeros {
            for layer in &mut self.layers {
                layer.sparse =
                    Some(SparseFfn::build(&layer.gate, &layer.up, &layer.down, how.packing, team)?);
            }
        }
        if how.packing != Packing::TwoBits {
            self.repack(how.packing, team)?;
        }
        self.compaction = how;
        Ok(self)
    }

    fn repack(&mut self, packing: Packing, team: &Team) -> Result<()> {
        let matrices = |layer: &Layer| {
            let Layer { q, k, v, o, gate, up, down, .. } = layer;
            [q, k, v, o, gate, up, down].map(|linear| packing.bytes(linear.shape))
        };
        let bytes: Vec<usize> = self.layers.iter().flat_map(matrices).collect();
        let mut memory = WeightMemory::of(&bytes)?;
        for layer in &mut self.layers {
            let Layer { q, k, v, o, gate, up, down, .. } = layer;
            for linear in [q, k, v, o, gate, up, down] {
                let width = packing.tile_bytes(linear.shape);
                let mut data = memory.take(packing.bytes(linear.shape))?;
                let from: &TernaryLinear = linear;
                let jobs = data.chunks_mut(TILES_A_JOB * width.max(1)).enumerate();
                let jobs = jobs.map(|(i, out)| -> Job<'_> {
                    Box::new(move || {
                        let first = i * TILES_A_JOB;
                        TernaryLinear::repack(from, packing, first..first + out.len() / width, out);
                        Ok(())
                    })
                });
                run_all(team, jobs.collect())?;
                (linear.data, linear.packing) = (data, packing);
            }
        }
        Ok(())
    }
}
