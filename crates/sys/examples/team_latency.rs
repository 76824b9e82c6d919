//! What a team costs on this machine: `cargo run --release -p longbit-sys --example team_latency -- [threads]`.
//!
//! Prints the latency of a barrier between workers that arrive together, the entry and exit of a run, the cost of
//! claims on a shared buffer, and the read bandwidth. Medians of many rounds; other load on the machine shows.

use longbit_sys::{ReadProbe, Shared, SysError, Team};
use std::hint::black_box;
use std::time::Instant;

/// Nanoseconds of one of `count` calls, median of 51 rounds.
fn median_ns(count: u32, mut calls: impl FnMut()) -> f64 {
    let mut rounds: Vec<f64> = (0..51)
        .map(|_| {
            let start = Instant::now();
            calls();
            start.elapsed().as_nanos() as f64 / f64::from(count)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

fn main() -> Result<(), SysError> {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(available);
    let team = Team::new(threads, true)?;
    println!("{threads} threads, {:?}", team.pinning());
    team.run(|worker| {
        let ns = median_ns(1000, || (0..1000).for_each(|_| worker.barrier()));
        if worker.index() == 0 {
            println!("barrier            {ns:9.1} ns");
        }
    });
    println!("run, empty         {:9.1} ns", median_ns(100, || (0..100).for_each(|_| team.run(|_| {}))));
    let pause = std::time::Duration::from_millis(1);
    let mut rested: Vec<u128> = (0..200)
        .map(|_| {
            std::thread::sleep(pause);
            let start = Instant::now();
            team.run(|worker| worker.barrier());
            start.elapsed().as_nanos()
        })
        .collect();
    rested.sort_unstable();
    println!("run after 1 ms off {:9} ns", rested[rested.len() / 2]);
    let buffer = Shared::even(threads, 64, threads, 0f32);
    let write = median_ns(1000, || (0..1000).for_each(|_| drop(black_box(buffer.write(0)))));
    let read = median_ns(1000, || (0..1000).for_each(|_| drop(black_box(buffer.read()))));
    println!("claim, uncontended {write:9.1} ns to write, {read:.1} ns to read");
    let probe = ReadProbe::new(512 << 20)?;
    println!("read bandwidth     {:9.1} GB/s", probe.measure(&team));
    Ok(())
}
