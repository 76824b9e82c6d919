//! The threads of a team: they live as long as it does and wait at a barrier for the next function to run.
//!
//! A decode step follows the other within microseconds, while waking a thread that sleeps takes the operating system tens
//! of them, which all others then wait. So the threads wait for the next run as they wait inside one: they spin for a
//! bounded time, then yield, then park.

use crate::barrier::Barrier;
use crate::error::SysError;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

/// What the threads run. It must not unwind.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

struct Post {
    start: Barrier,
    end: Barrier,
    /// The caller's [`Work`] from before the start of a run until after its end; null means that the threads may go.
    work: AtomicPtr<()>,
}

/// The threads of a team but for the caller.
pub(crate) struct Crew {
    post: Arc<Post>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts `threads - 1` threads; each does `prepare` with its index, from 1, before its first run. Returns the first
    /// complaint of those, too.
    ///
    /// # Errors
    /// [`SysError::Pool`] when a thread cannot be started.
    pub(crate) fn new<E: Send + 'static>(
        threads: usize,
        spins: bool,
        prepare: impl Fn(usize) -> Result<(), E> + Clone + Send + 'static,
    ) -> Result<(Self, Result<(), E>), SysError> {
        let post = Post {
            start: Barrier::new(threads, spins),
            end: Barrier::new(threads, spins),
            work: AtomicPtr::new(ptr::null_mut()),
        };
        let mut crew = Self { post: Arc::new(post), threads: Vec::new() };
        let (tell, told) = mpsc::channel();
        for index in 1..threads {
            let (post, prepare, tell) = (crew.post.clone(), prepare.clone(), tell.clone());
            let serve = move || {
                // Nobody listens any more once another thread could not be started.
                let _ = tell.send(prepare(index));
                drop(tell);
                post.serve(index);
            };
            match Builder::new().name(format!("longbit-{index}")).spawn(serve) {
                Ok(thread) => crew.threads.push(thread),
                Err(e) => {
                    // Too few will ever come to the barrier: those that wait there leave it by unwinding.
                    crew.post.start.poison();
                    return Err(SysError::Pool { threads, reason: e.to_string() });
                }
            }
        }
        drop(tell);
        let prepared = told.iter().collect();
        Ok((crew, prepared))
    }

    /// Runs `work` with index 0 here and with one of the others on each thread; returns when all are done. One run at a
    /// time: the caller sees to that.
    pub(crate) fn run(&self, work: Work<'_>) {
        self.post.work.store((&raw const work).cast_mut().cast(), Ordering::Relaxed);
        self.post.start.wait();
        work(0);
        self.post.end.wait();
    }
}

impl Post {
    fn serve(&self, index: usize) {
        loop {
            self.start.wait();
            let work = self.work.load(Ordering::Relaxed).cast::<Work<'_>>();
            if work.is_null() {
                return;
            }
            // SAFETY: `Crew::run` stored the address of its own `work`, a reference to something `Sync`, and this thread saw
            // it through the barrier. It leaves neither its frame nor the borrow before all threads have come to the end:
            // nothing between its two barriers unwinds, for `work` does not, and nobody sets off their alarms.
            let work = unsafe { *work };
            work(index);
            self.end.wait();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.post.work.store(ptr::null_mut(), Ordering::Relaxed);
        if self.threads.len() + 1 == self.post.start.count() {
            self.post.start.wait();
        }
        for thread in self.threads.drain(..) {
            // One that unwound had nothing more to do.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    #[test]
    fn every_run_is_done_when_it_returns_whether_the_threads_spin_or_are_parked() {
        for (threads, spins) in [(1, true), (2, true), (3, false)] {
            let (crew, prepared) = Crew::new(threads, spins, |_| Ok::<(), ()>(())).unwrap();
            assert_eq!(prepared, Ok(()));
            for round in 0..40 {
                if round % 10 == 9 {
                    std::thread::sleep(Duration::from_millis(2));
                }
                let ran: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                crew.run(&|index| {
                    ran[index].fetch_add(round + 1, Ordering::Relaxed);
                });
                assert!(ran.iter().all(|ran| ran.load(Ordering::Relaxed) == round + 1));
            }
        }
    }

    #[test]
    fn a_complaint_of_a_thread_is_told_and_the_crew_works() {
        let (crew, prepared) =
            Crew::new(3, true, |index| if index == 2 { Err(index) } else { Ok(()) }).unwrap();
        assert_eq!(prepared, Err(2));
        let sum = AtomicUsize::new(0);
        crew.run(&|index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 3);
    }
}
