//! Pinning: worker `i` of a team stays on the `i`-th CPU that the process may use.
//!
//! The threads of a team belong to it, so only the caller's own affinity has to be given back. A ledger by thread
//! remembers it, so that two teams of one thread do not mistake each other's pin for the original.

/// What became of a team's wish to be pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pinning {
    /// Not asked for: the scheduler places the threads.
    Off,
    /// The CPU of each worker, by worker index.
    Cpus(Vec<usize>),
    /// Asked for and not to be had; the reason. The team works all the same.
    Unavailable(String),
}

#[cfg(target_os = "linux")]
mod linux {
    use rustix::process::Pid;
    use rustix::thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity};
    use std::collections::BTreeMap;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    struct Entry {
        holders: usize,
        original: CpuSet,
        parallelism: usize,
    }

    static LEDGER: Mutex<BTreeMap<i32, Entry>> = Mutex::new(BTreeMap::new());

    fn ledger() -> MutexGuard<'static, BTreeMap<i32, Entry>> {
        LEDGER.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn members(set: &CpuSet) -> Vec<usize> {
        (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
    }

    fn only(cpu: usize) -> CpuSet {
        let mut set = CpuSet::new();
        set.set(cpu);
        set
    }

    pub(crate) fn allowed() -> Result<Vec<usize>, String> {
        let me = gettid().as_raw_nonzero().get();
        if let Some(entry) = ledger().get(&me) {
            return Ok(members(&entry.original));
        }
        sched_getaffinity(None).map(|set| members(&set)).map_err(|e| format!("sched_getaffinity: {e}"))
    }

    pub(crate) fn parallelism() -> usize {
        let me = gettid().as_raw_nonzero().get();
        match ledger().get(&me) {
            Some(entry) => entry.parallelism,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    pub(crate) fn pin_thread(cpu: usize) -> Result<(), String> {
        sched_setaffinity(None, &only(cpu)).map_err(|e| format!("sched_setaffinity to CPU {cpu}: {e}"))
    }

    /// The caller's pin; its affinity comes back when the last pin of the thread is dropped, from whichever thread.
    pub(crate) struct CallerPin(Pid);

    impl CallerPin {
        pub(crate) fn new(cpu: usize) -> Result<Self, String> {
            let tid = gettid();
            let parallelism = parallelism();
            let mut ledger = ledger();
            let current = sched_getaffinity(None).map_err(|e| format!("sched_getaffinity: {e}"))?;
            pin_thread(cpu)?;
            ledger
                .entry(tid.as_raw_nonzero().get())
                .or_insert(Entry { holders: 0, original: current, parallelism })
                .holders += 1;
            Ok(Self(tid))
        }
    }

    impl Drop for CallerPin {
        fn drop(&mut self) {
            let mut ledger = ledger();
            let tid = self.0.as_raw_nonzero().get();
            let Some(entry) = ledger.get_mut(&tid) else { return };
            entry.holders -= 1;
            if entry.holders == 0 {
                // A thread that has ended needs no affinity: that error has nobody to tell.
                let _ = sched_setaffinity(Some(self.0), &entry.original);
                ledger.remove(&tid);
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod linux {
    const NOTE: &str = "thread pinning is not available on this platform";

    pub(crate) fn allowed() -> Result<Vec<usize>, String> {
        Err(NOTE.to_owned())
    }

    pub(crate) fn parallelism() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    pub(crate) fn pin_thread(_cpu: usize) -> Result<(), String> {
        Err(NOTE.to_owned())
    }

    pub(crate) struct CallerPin;

    impl CallerPin {
        pub(crate) fn new(_cpu: usize) -> Result<Self, String> {
            Err(NOTE.to_owned())
        }
    }
}

pub(crate) use linux::{CallerPin, allowed, parallelism, pin_thread};

/// The CPUs that the calling thread may use, ascending (before any pin of a team that it holds); `None` where the
/// platform does not say.
pub fn allowed_cpus() -> Option<Vec<usize>> {
    allowed().ok()
}

/// Threads of this process that can run at once, CPU affinity and the quota of the control group counted; at least 1.
pub fn available_threads() -> usize {
    parallelism()
}
