//! Where the time of a pass goes: for every thread and operation the nanoseconds, the calls and the bytes that it read.
//!
//! A thread looks at the clock when one operation ends and the next begins, so its laps cover the pass without a hole. Off,
//! a lap is one branch on a flag of the thread's own. Bytes are those of weights, cached rows and head that an operation
//! must read, counted from shapes (cached rows that tokens of a prompt see once for 16 neighbouring tokens, which share them); activations stay in the caches and count as nothing.

use std::time::Instant;

use super::Session;

/// What a thread does in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    /// The rows of the tokens in the embedding table.
    Embedding,
    /// RMSNorm and int8 quantisation before a projection. In a decode step every thread does all of it.
    Norm,
    /// Query, key and value projections.
    Qkv,
    /// Rotation, append to the KV cache, index upkeep and selection.
    Append,
    /// Scores, softmax and weighted sums over cached rows.
    Attention,
    /// Merging the partials of attention tasks.
    Merge,
    /// Output projection of attention.
    Output,
    /// Gate and up projections.
    GateUp,
    /// The activation between them and the down projection.
    Activation,
    /// Down projection.
    Down,
    /// Adding to the residual stream.
    Residual,
    /// Final norm and output head.
    Head,
    /// Waiting at a barrier.
    Wait,
}

impl Op {
    /// Every operation, in the order of a layer; `op as usize` is its place.
    pub const ALL: [Op; 13] = [
        Op::Embedding,
        Op::Norm,
        Op::Qkv,
        Op::Append,
        Op::Attention,
        Op::Merge,
        Op::Output,
        Op::GateUp,
        Op::Activation,
        Op::Down,
        Op::Residual,
        Op::Head,
        Op::Wait,
    ];

    /// A short name, as in tables and columns.
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Embedding => "embedding",
            Op::Norm => "norm",
            Op::Qkv => "qkv",
            Op::Append => "append",
            Op::Attention => "attention",
            Op::Merge => "merge",
            Op::Output => "output",
            Op::GateUp => "gate-up",
            Op::Activation => "activation",
            Op::Down => "down",
            Op::Residual => "residual",
            Op::Head => "head",
            Op::Wait => "wait",
        }
    }

    /// What the operation is, in a few words.
    pub fn describe(self) -> &'static str {
        match self {
            Op::Embedding => "embedding rows",
            Op::Norm => "RMSNorm and int8 quantisation",
            Op::Qkv => "query, key and value projections",
            Op::Append => "rotation, append to the cache, selection",
            Op::Attention => "attention over cached rows",
            Op::Merge => "merging attention partials",
            Op::Output => "attention output projection",
            Op::GateUp => "gate and up projections",
            Op::Activation => "feed-forward activation",
            Op::Down => "down projection",
            Op::Residual => "residual additions",
            Op::Head => "final norm and head",
            Op::Wait => "waiting at barriers",
        }
    }
}

/// Totals of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTotal {
    /// Time.
    pub nanos: u64,
    /// How often it ran; pieces that are handed out on demand count one by one.
    pub calls: u64,
    /// Bytes of weights, cached rows or head that it read.
    pub bytes: u64,
}

/// The totals of some passes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// Passes.
    pub passes: u64,
    /// Tokens that they took.
    pub tokens: u64,
    /// Time of all passes as the caller saw it.
    pub wall_nanos: u64,
    /// `[thread][operation]`, operations in the order of [`Op::ALL`].
    pub threads: Vec<Vec<OpTotal>>,
}

impl Profile {
    /// One operation, summed over the threads.
    pub fn total(&self, op: Op) -> OpTotal {
        let mut sum = OpTotal::default();
        for total in self.threads.iter().filter_map(|ops| ops.get(op as usize)) {
            sum.nanos += total.nanos;
            sum.calls += total.calls;
            sum.bytes += total.bytes;
        }
        sum
    }

    /// Thread time that no lap covers: starting the team, meeting at the end, collecting the logits.
    pub fn uncovered_nanos(&self) -> u64 {
        let laps: u64 = self.threads.iter().flatten().map(|total| total.nanos).sum();
        (self.wall_nanos * self.threads.len() as u64).saturating_sub(laps)
    }

    /// Share of all thread time that is spent waiting, starting and stopping: fork, barriers and serial gaps.
    pub fn overhead(&self) -> f64 {
        let all = self.wall_nanos * self.threads.len() as u64;
        (self.total(Op::Wait).nanos + self.uncovered_nanos()) as f64 / all.max(1) as f64
    }
}

impl Session {
    /// Measures every pass from here on, operation by operation; see [`Session::take_profile`].
    pub fn start_profile(&mut self) {
        for scratch in [Some(&self.decode), self.prefill.as_ref()].into_iter().flatten() {
            scratch.take_laps();
        }
        self.profiled = Some(Profile::default());
    }

    /// What the passes since [`Session::start_profile`] took; ends the measurement. `None` when none was started.
    pub fn take_profile(&mut self) -> Option<Profile> {
        let mut profile = self.profiled.take()?;
        for scratch in [Some(&self.decode), self.prefill.as_ref()].into_iter().flatten() {
            let laps = scratch.take_laps();
            profile.threads.resize(laps.len(), vec![OpTotal::default(); Op::ALL.len()]);
            for (sum, lap) in profile.threads.iter_mut().flatten().zip(laps.iter().flatten()) {
                sum.nanos += lap.nanos;
                sum.calls += lap.calls;
                sum.bytes += lap.bytes;
            }
        }
        Some(profile)
    }
}

/// The stopwatch of one thread.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// When the last lap ended; nothing while no profile is taken.
    last: Option<Instant>,
    totals: [OpTotal; Op::ALL.len()],
}

impl Clock {
    /// A pass begins.
    pub(super) fn begin(&mut self, on: bool) {
        self.last = on.then(Instant::now);
    }

    /// Everything since the last lap was `op`, which read `bytes`.
    #[inline]
    pub(super) fn lap(&mut self, op: Op, bytes: impl FnOnce() -> usize) {
        let Some(last) = &mut self.last else { return };
        let now = Instant::now();
        let total = &mut self.totals[op as usize];
        total.nanos += now.duration_since(*last).as_nanos() as u64;
        total.calls += 1;
        total.bytes += bytes() as u64;
        *last = now;
    }

    /// The totals; starts anew.
    pub(super) fn take(&mut self) -> Vec<OpTotal> {
        std::mem::take(&mut self.totals).to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_know_their_places() {
        for (i, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op as usize, i, "{}", op.as_str());
        }
    }

    #[test]
    fn the_overhead_is_what_no_work_covers() {
        let mut threads = vec![vec![OpTotal::default(); Op::ALL.len()]; 2];
        threads[0][Op::Down as usize] = OpTotal { nanos: 90, calls: 1, bytes: 10 };
        threads[1][Op::Down as usize] = OpTotal { nanos: 70, calls: 1, bytes: 20 };
        threads[1][Op::Wait as usize] = OpTotal { nanos: 20, calls: 1, bytes: 0 };
        let profile = Profile { passes: 1, tokens: 1, wall_nanos: 100, threads };
        assert_eq!(profile.total(Op::Down), OpTotal { nanos: 160, calls: 2, bytes: 30 });
        assert_eq!(profile.uncovered_nanos(), 20);
        assert!((profile.overhead() - 0.2).abs() < 1e-12);
        assert_eq!(Profile::default().overhead(), 0.0);
    }

    #[test]
    fn a_clock_that_is_off_counts_nothing() {
        let mut clock = Clock::default();
        clock.begin(false);
        clock.lap(Op::Head, || unreachable!("nobody asks for bytes"));
        assert!(clock.take().iter().all(|t| *t == OpTotal::default()));
        clock.begin(true);
        clock.lap(Op::Head, || 7);
        let totals = clock.take();
        assert_eq!((totals[Op::Head as usize].calls, totals[Op::Head as usize].bytes), (1, 7));
    }
}
