//! The read bandwidth of this machine, measured the way decode reads: every worker streams its own contiguous share.
//!
//! It is the yardstick of the lab: a decode step that reads B bytes cannot take less than B / bandwidth.

use crate::arena::Segment;
use crate::error::SysError;
use crate::team::Team;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Timed passes of one measurement; the median counts.
const PASSES: usize = 3;
/// Units in which the buffer is shared out: a page.
const UNIT: usize = 4096;
/// Independent accumulators: enough that the additions never wait for each other.
const LANES: usize = 32;

/// A buffer to stream. It should be several times larger than the last cache, or the probe measures the cache.
#[derive(Debug)]
pub struct ReadProbe {
    data: Segment,
}

impl ReadProbe {
    /// Allocates at least `bytes` (rounded up to a page), on huge pages where the kernel grants them, and touches all.
    ///
    /// # Errors
    /// [`SysError::Memory`] when there is not so much.
    pub fn new(bytes: usize) -> Result<Self, SysError> {
        let bytes = bytes.max(1).checked_next_multiple_of(UNIT).unwrap_or(usize::MAX);
        let mut data = Segment::new(bytes)?;
        // Written with something: untouched pages would all be the one zero page.
        for (i, word) in data.as_mut_slice_of::<u64>().iter_mut().enumerate() {
            *word = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        Ok(Self { data })
    }

    /// Bytes of the buffer.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Read bandwidth of the whole team in GB/s (10^9 bytes): the median of 3 passes over the buffer after an untimed one.
    pub fn measure(&self, team: &Team) -> f64 {
        let words: &[u64] = self.data.as_slice_of();
        const WORDS: usize = UNIT / size_of::<u64>();
        let took: [AtomicU64; PASSES] = [const { AtomicU64::new(0) }; PASSES];
        team.run(|worker| {
            let units = worker.range(words.len() / WORDS);
            let mine = &words[units.start * WORDS..units.end * WORDS];
            black_box(stream(mine));
            for pass in &took {
                worker.barrier();
                let start = Instant::now();
                black_box(stream(black_box(mine)));
                worker.barrier();
                if worker.index() == 0 {
                    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    pass.store(ns.max(1), Ordering::Relaxed);
                }
            }
        });
        let mut took = took.map(AtomicU64::into_inner);
        took.sort_unstable();
        self.bytes() as f64 / took[PASSES / 2] as f64
    }
}

/// Sums the words with independent accumulators, so that only the loads take time.
fn stream(words: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let mut chunks = words.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(word);
        }
    }
    let rest = chunks.remainder().iter().fold(0u64, |sum, &word| sum.wrapping_add(word));
    lanes.iter().fold(rest, |sum, &lane| sum.wrapping_add(lane))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_reads_every_word_once() {
        for len in [0usize, 1, 31, 32, 33, 1000] {
            let words: Vec<u64> = (0..len as u64).map(|i| i * i + 1).collect();
            assert_eq!(stream(&words), words.iter().sum::<u64>(), "{len} words");
        }
    }

    #[test]
    fn a_probe_gives_a_finite_rate_for_any_team() {
        let probe = ReadProbe::new(100_000).expect("memory");
        assert_eq!(probe.bytes(), 102_400);
        for threads in [1, 3] {
            let team = Team::oversubscribed(threads).expect("threads");
            let rate = probe.measure(&team);
            assert!(rate.is_finite() && rate > 0.0, "{rate}");
        }
    }
}
