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

    /// Read bandwidth of the whole team in GB/s (10^9 bytes): the median of 3 passes over the buffer. Before them every way
    /// to stream that is worth trying takes one pass, and the fastest goes on: whether requests ahead of
    /// the loads help or hinder differs between processors by tens of per cent.
    pub fn measure(&self, team: &Team) -> f64 {
        let best = streams().into_iter().min_by_key(|&way| self.passes::<1>(team, way)[0]);
        let mut took = self.passes::<PASSES>(team, best.unwrap_or(stream));
        took.sort_unstable();
        self.bytes() as f64 / took[PASSES / 2] as f64
    }

    /// Nanoseconds of `N` passes after an untimed part of one.
    fn passes<const N: usize>(&self, team: &Team, stream: Stream) -> [u64; N] {
        let words: &[u64] = self.data.as_slice_of();
        const WORDS: usize = UNIT / size_of::<u64>();
        let took: [AtomicU64; N] = [const { AtomicU64::new(0) }; N];
        team.run(|worker| {
            let units = worker.range(words.len() / WORDS);
            let mine = &words[units.start * WORDS..units.end * WORDS];
            // A part is enough to have the pages and the clock of the core at hand.
            black_box(stream(&mine[..mine.len() / 8]));
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
        took.map(AtomicU64::into_inner)
    }
}

/// Sums all words (wrapping), with the widest loads that this CPU has: narrow ones leave a third of the bandwidth.
type Stream = fn(&[u64]) -> u64;

/// The ways to stream that are worth trying on this CPU: the widest loads, with and without requests ahead.
fn streams() -> Vec<Stream> {
    #[cfg(target_arch = "x86_64")]
    if let Some(ways) = with_x86() {
        return ways;
    }
    vec![stream]
}

#[cfg(target_arch = "x86_64")]
fn with_x86() -> Option<Vec<Stream>> {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was just detected.
        return Some(vec![|words| unsafe { stream_avx512::<0>(words) }, |words| unsafe {
            stream_avx512::<AHEAD>(words)
        }]);
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was just detected.
        return Some(vec![|words| unsafe { stream_avx2(words) }]);
    }
    None
}

/// The portable stream: independent accumulators, so that only the loads take time.
#[inline(always)]
fn stream(words: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let mut chunks = words.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(word);
        }
    }
    finish(&lanes, chunks.remainder())
}

#[inline(always)]
fn finish(lanes: &[u64], rest: &[u64]) -> u64 {
    lanes.iter().chain(rest).fold(0u64, |sum, &word| sum.wrapping_add(word))
}

/// The portable loop, compiled for 256-bit loads.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn stream_avx2(words: &[u64]) -> u64 {
    stream(words)
}

/// How far ahead lines are requested: hardware prefetchers stop at page borders.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// 512-bit loads, written out because the compiler prefers 256-bit ones, with a request `AHEAD` bytes on for each if that
/// is not 0: the probe is a ceiling, so it must not be slower than the best kernel.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn stream_avx512<const AHEAD: usize>(words: &[u64]) -> u64 {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_prefetch, _mm512_add_epi64, _mm512_loadu_si512, _mm512_setzero_si512,
        _mm512_storeu_si512,
    };
    const VECTORS: usize = 8;
    let mut sums = [_mm512_setzero_si512(); VECTORS];
    let mut chunks = words.chunks_exact(VECTORS * 8);
    for chunk in &mut chunks {
        for (sum, vector) in sums.iter_mut().zip(chunk.chunks_exact(8)) {
            if AHEAD > 0 {
                // A hint that never faults, whatever the address.
                _mm_prefetch::<_MM_HINT_T0>(vector.as_ptr().cast::<i8>().wrapping_add(AHEAD));
            }
            // SAFETY: `vector` holds 8 words, the 64 bytes of an unaligned load.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(vector.as_ptr().cast()) });
        }
    }
    let mut lanes = [0u64; VECTORS * 8];
    for (lane, sum) in lanes.chunks_exact_mut(8).zip(sums) {
        // SAFETY: `lane` holds 8 words, the 64 bytes of an unaligned store.
        unsafe { _mm512_storeu_si512(lane.as_mut_ptr().cast(), sum) };
    }
    finish(&lanes, chunks.remainder())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_reads_every_word_once() {
        for len in [0usize, 1, 31, 32, 33, 63, 64, 65, 1000] {
            let words: Vec<u64> = (0..len as u64).map(|i| i * i + 1).collect();
            let all = std::iter::once(stream as Stream).chain(streams());
            for (way, stream) in all.enumerate() {
                assert_eq!(stream(&words), words.iter().sum::<u64>(), "{len} words, way {way}");
            }
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
