//! The team: every worker runs, shares cover, barriers order, and a panic ends a run instead of hanging it.

use longbit_sys::{Pinning, Shared, SysError, Team, allowed_cpus, share};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn team(threads: usize) -> Team {
    Team::oversubscribed(threads).expect("threads")
}

/// The message of the panic that `f` ends with.
fn panic_of(f: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("a panic was due");
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => payload.downcast::<&str>().map_or("not a text".to_owned(), |text| text.to_string()),
    }
}

#[test]
fn shares_cover_in_order_and_differ_by_at_most_one() {
    for units in [0, 1, 2, 5, 7, 8, 64, 1001] {
        for parts in 1..=9 {
            let mut next = 0;
            for part in 0..parts {
                let range = share(units, part, parts);
                assert_eq!(range.start, next, "{units} units, part {part} of {parts}");
                assert!(range.len() == units / parts || range.len() == units / parts + 1);
                next = range.end;
            }
            assert_eq!(next, units);
        }
    }
    assert_eq!([share(7, 0, 3), share(7, 1, 3), share(7, 2, 3)], [0..3, 3..5, 5..7]);
}

#[test]
fn every_worker_runs_once_and_the_caller_is_the_first() {
    let caller = std::thread::current().id();
    for threads in 1..=8 {
        let team = team(threads);
        assert_eq!(team.threads(), threads);
        for _ in 0..20 {
            let seen = Mutex::new(vec![]);
            team.run(|worker| {
                assert_eq!(worker.count(), threads);
                assert_eq!(worker.index() == 0, std::thread::current().id() == caller);
                seen.lock().expect("no panic").push((worker.index(), worker.range(10)));
            });
            let mut seen = seen.into_inner().expect("no panic");
            seen.sort_by_key(|(index, _)| *index);
            let want: Vec<_> = (0..threads).map(|index| (index, share(10, index, threads))).collect();
            assert_eq!(seen, want);
        }
    }
}

#[test]
fn ten_thousand_barriers_order_every_write() {
    let team = team(2);
    let cells = [const { AtomicUsize::new(0) }; 2];
    team.run(|worker| {
        let (mine, other) = (&cells[worker.index()], &cells[1 - worker.index()]);
        for round in 1..=5_000 {
            // Relaxed: only the barrier orders it.
            mine.store(round, Ordering::Relaxed);
            worker.barrier();
            assert_eq!(other.load(Ordering::Relaxed), round);
            worker.barrier();
        }
    });
}

#[test]
fn more_threads_than_cpus_pass_barriers_and_hand_data_on() {
    for threads in 2..=8 {
        let team = team(threads);
        let buffer = Shared::even(threads, 3, threads, 0u64).named("ring");
        team.run(|worker| {
            for round in 1..=50u64 {
                buffer.write(worker.index()).fill(round * 100 + worker.index() as u64);
                worker.barrier();
                let next = (worker.index() + 1) % worker.count();
                assert_eq!(*buffer.read_stripe(next), [round * 100 + next as u64; 3]);
                assert_eq!(buffer.read()[0], round * 100);
                worker.barrier();
            }
        });
    }
}

#[test]
fn a_late_worker_finds_the_others_parked_and_wakes_them() {
    let team = team(3);
    let done = AtomicUsize::new(0);
    team.run(|worker| {
        for late in 0..3 {
            if worker.index() == late {
                std::thread::sleep(Duration::from_millis(5));
            }
            worker.barrier();
        }
        done.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(done.into_inner(), 3);
}

#[test]
fn a_panic_of_any_worker_is_raised_again_and_the_team_lives_on() {
    let team = team(4);
    for guilty in 0..4 {
        for barriers_before in [0, 3] {
            let left = AtomicUsize::new(0);
            let message = panic_of(|| {
                team.run(|worker| {
                    for _ in 0..barriers_before {
                        worker.barrier();
                    }
                    if worker.index() == guilty {
                        panic!("worker {guilty} fails");
                    }
                    worker.barrier();
                    left.fetch_add(1, Ordering::Relaxed);
                });
            });
            assert_eq!(message, format!("worker {guilty} fails"));
            assert_eq!(left.into_inner(), 0, "nobody passes a barrier that the guilty one never reached");
            let ran = AtomicUsize::new(0);
            team.run(|worker| {
                worker.barrier();
                ran.fetch_add(1, Ordering::Relaxed);
                worker.barrier();
            });
            assert_eq!(ran.into_inner(), 4);
        }
    }
}

#[test]
fn a_panic_wakes_workers_that_are_parked() {
    let team = team(3);
    let message = panic_of(|| {
        team.run(|worker| {
            if worker.index() == 1 {
                std::thread::sleep(Duration::from_millis(10));
                panic!("late");
            }
            worker.barrier();
        });
    });
    assert_eq!(message, "late");
}

#[test]
fn a_barrier_that_one_worker_leaves_out_is_a_panic_and_no_hang() {
    let team = team(3);
    for deserter in 0..3 {
        let message = panic_of(|| {
            team.run(|worker| {
                worker.barrier();
                if worker.index() != deserter {
                    worker.barrier();
                }
            });
        });
        assert!(message.contains("same number of barriers"), "{message}");
    }
    team.run(|worker| worker.barrier());
}

#[test]
fn a_run_inside_a_run_is_refused() {
    for threads in [1, 2] {
        let team = team(threads);
        let message = panic_of(|| team.run(|_| team.run(|_| {})));
        assert!(message.contains("inside Team::run"), "{message}");
        team.run(|worker| worker.barrier());
    }
}

#[test]
fn callers_take_turns() {
    let team = team(2);
    let inside = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..50 {
                    team.run(|worker| {
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 2, "two runs at once");
                        worker.barrier();
                        worker.barrier();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    });
                }
            });
        }
    });
}

#[test]
fn sizes_that_cannot_be_are_refused_with_a_number() {
    assert!(matches!(Team::new(0, false), Err(SysError::NoThreads)));
    assert!(matches!(Team::oversubscribed(0), Err(SysError::NoThreads)));
    let error = Team::new(1 << 20, false).expect_err("no machine has so many");
    assert!(matches!(error, SysError::TooManyThreads { asked: 1_048_576, .. }));
    assert!(error.to_string().contains("1048576"), "{error}");
    assert!(matches!(Team::with_threads(0, true), Err(SysError::NoThreads)));
    let error = Team::with_threads(longbit_sys::MAX_THREADS + 1, true).expect_err("above the limit");
    assert!(matches!(error, SysError::TooManyThreads { asked: 4097, .. }));
}

#[test]
fn pinned_workers_stay_on_their_cpus_and_the_caller_gets_its_own_back() {
    // On a thread of its own: affinity belongs to the thread.
    std::thread::spawn(|| {
        let Some(before) = allowed_cpus() else { return };
        let threads = before.len().min(2);
        let Ok(first) = Team::new(threads, true) else { return };
        let Pinning::Cpus(cpus) = first.pinning() else { return };
        assert_eq!(cpus, &before[..threads]);
        #[cfg(target_os = "linux")]
        first.run(|worker| {
            let set = rustix::thread::sched_getaffinity(None).expect("affinity");
            assert_eq!((set.count(), set.is_set(cpus[worker.index()])), (1, true));
        });
        // A second team of the same thread sees the machine, not the pin of the first.
        let second = Team::new(threads, true).expect("as many as the first");
        assert_eq!(second.pinning(), first.pinning());
        drop(first);
        drop(second);
        #[cfg(target_os = "linux")]
        assert_eq!(
            rustix::thread::sched_getaffinity(None).expect("affinity").count() as usize,
            before.len(),
            "the caller's affinity comes back"
        );
        assert_eq!(Team::new(1, false).expect("one").pinning(), &Pinning::Off);
    })
    .join()
    .expect("no panic");
}

#[test]
fn a_team_beyond_the_machine_works_unpinned() {
    let threads = longbit_sys::available_threads() + 1;
    assert!(matches!(Team::new(threads, true), Err(SysError::TooManyThreads { .. })));
    let team = Team::with_threads(threads, true).expect("threads");
    assert_eq!((team.threads(), team.pinning()), (threads, &Pinning::Off));
    let (sum, rounds) = (AtomicUsize::new(0), 20);
    team.run(|worker| {
        for round in 0..rounds {
            sum.fetch_add(worker.index(), Ordering::SeqCst);
            worker.barrier();
            assert_eq!(sum.load(Ordering::SeqCst), (round + 1) * threads * (threads - 1) / 2);
            worker.barrier();
        }
    });
    let within = Team::with_threads(1, true).expect("threads");
    assert_ne!(within.pinning(), &Pinning::Off, "a team that fits is pinned when asked");
}
