//! The thread team: the same function on every worker, static shares, one fork a token.
//!
//! The team owns its threads (`crew`); the caller takes part as worker 0. Inside [`Team::run`] the workers meet only at the
//! [`Worker::barrier`], so a decode step of hundreds of phases calls them together once.

use crate::affinity::{self, CallerPin, Pinning};
use crate::barrier::{Barrier, Poisoned};
use crate::crew::Crew;
use crate::error::SysError;
use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};

thread_local! {
    /// Whether this thread is inside a run: a nested one would wait for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Marks the thread for the time of a run, whichever way it ends.
struct Inside;

impl Inside {
    fn enter() -> Self {
        INSIDE.set(true);
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

/// Largest team: more than any machine that this is for has CPUs.
pub const MAX_THREADS: usize = 4096;

/// A fixed number of threads that run one function together.
pub struct Team {
    threads: usize,
    /// `threads - 1` threads; none for a team of one.
    crew: Option<Crew>,
    barrier: Barrier,
    /// One run at a time: the barrier belongs to it.
    turn: Mutex<()>,
    pinning: Pinning,
    _caller: Option<CallerPin>,
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("threads", &self.threads).field("pinning", &self.pinning).finish()
    }
}

impl Team {
    /// A team of `threads` workers, the calling thread included. With `pin`, worker `i` is bound to the `i`-th CPU that
    /// the caller may use; the caller is worker 0, and gets its own affinity back when the team is dropped. Where pinning
    /// is not to be had the team works without, and [`Team::pinning`] says why.
    ///
    /// # Errors
    /// [`SysError::NoThreads`], [`SysError::TooManyThreads`] when they could not all run at once (a barrier between
    /// threads that take turns on a CPU measures the scheduler), [`SysError::Pool`] when threads cannot be started.
    pub fn new(threads: usize, pin: bool) -> Result<Self, SysError> {
        let available = affinity::parallelism();
        if threads > available {
            return Err(SysError::TooManyThreads { asked: threads, available });
        }
        Self::build(threads, pin, true)
    }

    /// As [`Team::new`], but the team may be larger than the machine, up to [`MAX_THREADS`]. The workers of such a team take
    /// turns on the CPUs, unpinned, and a barrier gives its CPU away instead of spinning: it waits for time slices of the
    /// scheduler, which may cost more than the work between two barriers. Callers warn of it (see [`available_threads`]).
    ///
    /// # Errors
    /// [`SysError::NoThreads`], [`SysError::TooManyThreads`] above the limit, [`SysError::Pool`].
    ///
    /// [`available_threads`]: crate::available_threads
    pub fn with_threads(threads: usize, pin: bool) -> Result<Self, SysError> {
        if threads > MAX_THREADS {
            return Err(SysError::TooManyThreads { asked: threads, available: affinity::parallelism() });
        }
        let fits = threads <= affinity::parallelism();
        Self::build(threads, pin && fits, fits)
    }

    /// A team that may be larger than the machine: slow, and meant for tests of code that depends on the worker count.
    ///
    /// # Errors
    /// [`SysError::NoThreads`], [`SysError::Pool`].
    pub fn oversubscribed(threads: usize) -> Result<Self, SysError> {
        Self::build(threads, false, threads <= affinity::parallelism())
    }

    fn build(threads: usize, pin: bool, spins: bool) -> Result<Self, SysError> {
        if threads == 0 {
            return Err(SysError::NoThreads);
        }
        let cpus = match pin {
            true => Self::cpus(threads).map(Some),
            false => Ok(None),
        };
        let places = cpus.clone().unwrap_or_default();
        let prepare = move |index: usize| match &places {
            Some(cpus) => affinity::pin_thread(cpus[index]),
            None => Ok(()),
        };
        let (crew, prepared) = match threads {
            1 => (None, Ok(())),
            _ => Crew::new(threads, spins, prepare).map(|(crew, prepared)| (Some(crew), prepared))?,
        };
        let pinned = prepared.and(cpus).and_then(|cpus| match cpus {
            Some(cpus) => CallerPin::new(cpus[0]).map(|caller| (Pinning::Cpus(cpus), Some(caller))),
            None => Ok((Pinning::Off, None)),
        });
        let (pinning, caller) = pinned.unwrap_or_else(|note| (Pinning::Unavailable(note), None));
        let barrier = Barrier::new(threads, spins);
        Ok(Self { threads, crew, barrier, turn: Mutex::new(()), pinning, _caller: caller })
    }

    /// A CPU for each worker.
    fn cpus(threads: usize) -> Result<Vec<usize>, String> {
        let mut cpus = affinity::allowed()?;
        if cpus.len() < threads {
            return Err(format!("{threads} threads cannot have one of {} CPUs each", cpus.len()));
        }
        cpus.truncate(threads);
        Ok(cpus)
    }

    /// Number of workers.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Where the workers are pinned, or why they are not.
    pub fn pinning(&self) -> &Pinning {
        &self.pinning
    }

    /// Runs `f` once on every worker and returns when all are done. What the caller wrote before is visible to all
    /// workers, and what they wrote is visible to the caller after. Calls from several threads take turns.
    ///
    /// # Panics
    /// Re-raises the first panic of a worker: the others leave at their next barrier, and the team stays usable.
    /// Panics when called from inside a run (it would wait for itself), and when the workers do not all pass the same
    /// number of barriers.
    pub fn run<F>(&self, f: F)
    where
        F: Fn(&Worker<'_>) + Sync,
    {
        assert!(!INSIDE.get(), "Team::run was called from inside Team::run");
        let Some(crew) = &self.crew else {
            let _inside = Inside::enter();
            return f(&Worker { index: 0, count: 1, barrier: &self.barrier });
        };
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.barrier.reset();
        let first: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
        let work = |index: usize| {
            let _inside = Inside::enter();
            let worker = Worker { index, count: self.threads, barrier: &self.barrier };
            // Unwind safety: after a panic nothing is read here but the payload; the caller sees the panic itself.
            match catch_unwind(AssertUnwindSafe(|| f(&worker))) {
                Ok(()) => self.barrier.depart(),
                Err(payload) => {
                    if !payload.is::<Poisoned>() {
                        first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
                    }
                    self.barrier.poison();
                }
            }
        };
        crew.run(&work);
        drop(turn);
        if let Some(payload) = first.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
    }
}

/// One worker of a team, for the time of a run.
#[derive(Clone, Copy)]
pub struct Worker<'a> {
    index: usize,
    count: usize,
    barrier: &'a Barrier,
}

impl Worker<'_> {
    /// Position in the team, `0..count`; the caller of [`Team::run`] is 0.
    #[inline]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Number of workers in the team.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Waits for all workers: the end of a phase. What any of them wrote before is visible to all after. Every worker
    /// must pass the same barriers; a team of one passes at once.
    ///
    /// # Panics
    /// Unwinds when another worker has panicked, or has finished without coming to this barrier.
    #[inline]
    pub fn barrier(&self) {
        self.barrier.wait();
    }

    /// This worker's share of `0..units`: contiguous, ascending with the index, sizes that differ by at most 1.
    #[inline]
    pub fn range(&self, units: usize) -> Range<usize> {
        share(units, self.index, self.count)
    }
}

/// Part `index` of `0..units` cut into `parts` contiguous pieces whose sizes differ by at most 1; the larger come first.
/// Parts beyond the units are empty.
///
/// # Panics
/// When `parts` is 0.
#[inline]
pub fn share(units: usize, index: usize, parts: usize) -> Range<usize> {
    let (base, extra) = (units / parts, units % parts);
    let start = |i: usize| i * base + i.min(extra);
    start(index)..start(index + 1)
}
