//! The barrier between the phases of a decode step: spins a bounded while, then yields, then parks.
//!
//! A generation counter replaces the classical sense flag: each arrival remembers the generation, the last one to
//! arrive advances it. Two alarms keep a broken phase from hanging: a worker that panics *poisons* the barrier, and a
//! worker that finishes while others still wait marks it *departed*; both make the waiting workers unwind.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a waiter polls with PAUSE: longer than the usual imbalance of a phase, shorter than a scheduler slice.
const SPIN: Duration = Duration::from_micros(100);
/// How long it then polls with a yield between looks, before it parks.
const YIELD: Duration = Duration::from_micros(400);
/// PAUSEs between two looks at the clock and the alarm.
const POLLS: u32 = 32;

const CALM: u32 = 0;
const DEPARTED: u32 = 1;
const POISONED: u32 = 2;

/// The payload with which workers leave a poisoned barrier. It is thrown past the panic hook, for it is the echo of a
/// panic that was already reported.
pub(crate) struct Poisoned;

/// Keeps its content on cache lines of its own (two, for the adjacent-line prefetcher).
#[repr(align(128))]
struct Line<T>(T);

/// A reusable barrier for a fixed number of threads.
pub struct Barrier {
    count: u32,
    spin: Duration,
    /// Threads that arrived in this generation.
    arrived: Line<AtomicU32>,
    /// Polled by the waiters; advanced by the last arrival.
    generation: Line<AtomicU32>,
    /// `CALM`, `DEPARTED` or `POISONED`. Written at most once in a run, so that polling it is cheap.
    alarm: Line<AtomicU32>,
    /// Threads that are parked or about to be.
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Barrier {
    /// A barrier for `count` threads. With `spins` false the waiters yield from the start, which is right when there are
    /// more threads than CPUs: a spinning waiter would then keep the one it waits for from running.
    pub fn new(count: usize, spins: bool) -> Self {
        Self {
            count: u32::try_from(count).unwrap_or(u32::MAX),
            spin: if spins { SPIN } else { Duration::ZERO },
            arrived: Line(AtomicU32::new(0)),
            generation: Line(AtomicU32::new(0)),
            alarm: Line(AtomicU32::new(CALM)),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// Threads that meet here.
    pub(crate) fn count(&self) -> usize {
        self.count as usize
    }

    /// Waits until all threads have arrived. What they wrote before is visible to all of them after.
    ///
    /// # Panics
    /// Unwinds when the barrier is poisoned, and panics when another worker has finished without coming here.
    #[inline]
    pub fn wait(&self) {
        if self.count <= 1 {
            return;
        }
        // The generation cannot advance before this thread has arrived, so a relaxed load is current.
        let generation = self.generation.0.load(Ordering::Relaxed);
        if self.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
            // Nobody arrives again before the new generation is visible, so this store cannot eat an arrival.
            self.arrived.0.store(0, Ordering::Relaxed);
            // SeqCst here and in `park`: either the sleeper sees the new generation or this thread sees the sleeper.
            self.generation.0.store(generation.wrapping_add(1), Ordering::SeqCst);
            self.wake_sleepers();
        } else {
            self.wait_for(generation);
        }
    }

    fn wait_for(&self, generation: u32) {
        if !self.spin.is_zero() {
            let mut since = None;
            loop {
                for _ in 0..POLLS {
                    if self.passed(generation) {
                        return;
                    }
                    std::hint::spin_loop();
                }
                if self.alarmed(generation) {
                    return;
                }
                // The clock is read only once the first polls were in vain.
                if since.get_or_insert_with(Instant::now).elapsed() >= self.spin {
                    break;
                }
            }
        }
        let since = Instant::now();
        while since.elapsed() < YIELD {
            if self.passed(generation) || self.alarmed(generation) {
                return;
            }
            std::thread::yield_now();
        }
        self.park(generation);
    }

    #[cold]
    fn park(&self, generation: u32) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.generation.0.load(Ordering::SeqCst) == generation
            && self.alarm.0.load(Ordering::SeqCst) == CALM
        {
            held = self.wake.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        drop(held);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        if !self.passed(generation) {
            self.alarmed(generation);
        }
    }

    #[inline]
    fn passed(&self, generation: u32) -> bool {
        self.generation.0.load(Ordering::Acquire) != generation
    }

    /// False without an alarm; true when the alarm turns out to come after this generation was completed.
    #[inline]
    fn alarmed(&self, generation: u32) -> bool {
        match self.alarm.0.load(Ordering::Acquire) {
            CALM => false,
            alarm => self.leave(generation, alarm),
        }
    }

    #[cold]
    fn leave(&self, generation: u32, alarm: u32) -> bool {
        if alarm == POISONED {
            resume_unwind(Box::new(Poisoned));
        }
        // Whoever departed had passed every barrier that it came to. So if this generation is still open after its
        // departure is visible, it will never come here.
        assert!(
            self.passed(generation),
            "a worker finished without coming to the barrier where another one waits: \
             all workers must pass the same number of barriers"
        );
        true
    }

    /// Makes every waiting and every later thread unwind until [`Barrier::reset`].
    pub(crate) fn poison(&self) {
        self.alarm.0.store(POISONED, Ordering::SeqCst);
        self.wake_sleepers();
    }

    /// Says that one thread is done with its run.
    pub(crate) fn depart(&self) {
        if self.alarm.0.compare_exchange(CALM, DEPARTED, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
            self.wake_sleepers();
        }
    }

    /// Makes the barrier usable for a new run. No thread may be waiting.
    pub(crate) fn reset(&self) {
        self.arrived.0.store(0, Ordering::SeqCst);
        self.alarm.0.store(CALM, Ordering::SeqCst);
    }

    #[inline]
    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // A sleeper holds the lock from its last look until it waits: taking it means that the call is heard.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    /// Every thread must see all the others' increments of a round, whichever way it waited.
    fn rounds(threads: usize, spins: bool, rounds: u64, nap: Option<Duration>) {
        let barrier = Barrier::new(threads, spins);
        let sum = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for index in 0..threads {
                let (barrier, sum) = (&barrier, &sum);
                scope.spawn(move || {
                    for round in 1..=rounds {
                        if let (0, Some(nap)) = (index, nap) {
                            std::thread::sleep(nap);
                        }
                        sum.fetch_add(1, Ordering::Relaxed);
                        barrier.wait();
                        assert_eq!(sum.load(Ordering::Relaxed), round * threads as u64);
                        barrier.wait();
                    }
                });
            }
        });
    }

    #[test]
    fn spinning_yielding_and_parked_waiters_agree() {
        rounds(1, true, 10, None);
        rounds(2, true, 2_000, None);
        rounds(3, false, 300, None);
        rounds(5, false, 20, Some(Duration::from_millis(2)));
        rounds(2, true, 20, Some(Duration::from_millis(2)));
    }

    #[test]
    fn poison_wakes_a_parked_waiter() {
        let barrier = Barrier::new(2, true);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| barrier.wait());
            while barrier.sleepers.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            barrier.poison();
            let payload = waiter.join().expect_err("a poisoned barrier must unwind");
            assert!(payload.is::<Poisoned>());
        });
        barrier.reset();
        std::thread::scope(|scope| {
            scope.spawn(|| barrier.wait());
            barrier.wait();
        });
    }
}
