//! Runs of cached rows, found once and read several times.

use std::ops::Range;

use super::side::Place;
use super::{KvHead, KvScratch};

/// Tokens whose keys lie in one place, and whose values do: one of [`KvHead::runs`].
#[derive(Clone)]
pub struct KvRun<'a> {
    head: &'a KvHead,
    keys: Place<'a>,
    values: Place<'a>,
}

impl KvHead {
    /// Finds the rows of `tokens`, one of [`KvHead::runs`].
    pub fn run(&self, tokens: &Range<usize>) -> KvRun<'_> {
        let [keys, values] = self.sides().map(|side| side.place(tokens));
        KvRun { head: self, keys, values }
    }
}

// A run has a token at the least.
#[expect(clippy::len_without_is_empty)]
impl<'a> KvRun<'a> {
    /// Tokens.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// The stored bytes of the keys, in pieces: the largest first; some are empty.
    pub fn key_parts(&self) -> [&'a [u8]; 4] {
        self.keys.parts()
    }

    /// The stored bytes of the values, in pieces: the largest first; some are empty.
    pub fn value_parts(&self) -> [&'a [u8]; 4] {
        self.values.parts()
    }

    /// Dot products of `queries` `[group][head_dim]`, those of the last [`KvHead::prepare`], with the keys: `out` is
    /// `[group][tokens]`. The bytes `upcoming`, which are read next, are requested from memory in time.
    pub fn scores(&self, queries: &[f32], upcoming: &[u8], scratch: &mut KvScratch, out: &mut [f32]) {
        #[cfg(test)]
        self.head.observe_bytes(self.key_parts().iter().map(|part| part.len()).sum());
        let keys = self.head.sides()[0];
        keys.scores(self.head.kernels(), queries, &self.keys, upcoming, scratch, out);
    }

    /// As [`KvRun::scores`], less `offsets` `[group]`, which are the same for all tokens: the mean of centred keys. `largest`
    /// `[group]` become the largest of `out`.
    pub fn scores_apart(
        &self,
        queries: &[f32],
        upcoming: &[u8],
        scratch: &mut KvScratch,
        (out, largest, offsets): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        #[cfg(test)]
        self.head.observe_bytes(self.key_parts().iter().map(|part| part.len()).sum());
        let (keys, kernels) = (self.head.sides()[0], self.head.kernels());
        keys.scores_less_mean(kernels, queries, &self.keys, upcoming, scratch, (out, largest));
        keys.scores_of_mean(kernels, queries, &self.keys, scratch, offsets);
    }

    /// Adds the values, weighted by `weights` `[group][tokens]`, to `acc` `[group][head_dim]`, rotated if they are. `masses`
    /// are the sums of the weights of each head as [`Kernels::sum`](longbit_kernels::Kernels::sum) has them, if they are known.
    /// `upcoming` as for [`KvRun::scores`].
    pub fn accumulate(
        &self,
        weights: &[f32],
        masses: Option<&[f32]>,
        upcoming: &[u8],
        scratch: &mut KvScratch,
        acc: &mut [f32],
    ) {
        #[cfg(test)]
        self.head.observe_bytes(self.value_parts().iter().map(|part| part.len()).sum());
        let values = self.head.sides()[1];
        values.accumulate(self.head.kernels(), (weights, masses), &self.values, upcoming, scratch, acc);
    }
}
