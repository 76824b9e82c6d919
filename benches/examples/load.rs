//! How long a checkpoint takes to be ready, against the time to read its bytes, and how much memory it takes on the way.
//!
//! The head is bf16, as every verb has it. Two ways of reading stand beside it: through a small buffer that keeps nothing,
//! and into memory. They alternate with loading, from a cold page cache (the file's pages are dropped first) and from a
//! warm one. Run alone on the machine:
//!
//! ```sh
//! cargo run --release -p longbit-benches --example load -- path/to/model.gguf
//! ```

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use longbit::{Checkpoint, HeadFormat, OpenOptions, list};
use longbit_sys::{ProcessFacts, Team, allowed_cpus};

const ROUNDS: usize = 6;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(path) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err("usage: load PATH [x86|arm]".into());
    };
    let i2s = std::env::args().nth(2).and_then(|name| longbit::formats::I2sLayout::parse(&name));
    let options = OpenOptions { i2s, ..OpenOptions::default() };
    let files = list(&path)?.files;
    let bytes: u64 = files.iter().map(|f| std::fs::metadata(f).map(|m| m.len())).sum::<Result<u64, _>>()?;
    let team = Team::new(allowed_cpus().map_or(1, |cpus| cpus.len()), true)?;
    println!("{}: {:.3} GB, {} threads", path.display(), bytes as f64 / 1e9, team.threads());
    let mut peak = None;
    for cold in [true, false] {
        let (mut streams, mut copies, mut loads) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let mut order = [Work::Stream, Work::Load, Work::Copy];
            if round % 2 == 1 {
                order.reverse();
            }
            for work in order {
                prepare(&files, cold)?;
                match work {
                    Work::Stream => streams.push(timed_read(&files)?),
                    Work::Copy => copies.push(timed_copy(&files)?),
                    Work::Load => loads.push(timed_load(&path, &options, &team)?),
                }
                if matches!(work, Work::Load) && copies.is_empty() {
                    peak = ProcessFacts::now().rss_peak_bytes;
                }
            }
        }
        let (stream, copy, load) = (median(&mut streams), median(&mut copies), median(&mut loads));
        println!("{} page cache, medians of {ROUNDS}:", if cold { "cold" } else { "warm" });
        println!(
            "  read through a buffer  {stream:.3} s, {:.2} GB/s  {streams:.3?}",
            bytes as f64 / 1e9 / stream
        );
        println!("  read into memory       {copy:.3} s  {copies:.3?}");
        println!("  model ready            {load:.3} s  {loads:.3?}");
        println!("  ready / read: {:.2} through a buffer, {:.2} into memory", load / stream, load / copy);
    }
    if let Some(peak) = peak {
        println!(
            "peak resident memory {:.3} GB, {:.3} of the file",
            peak as f64 / 1e9,
            peak as f64 / bytes as f64
        );
    }
    Ok(())
}

/// What is timed.
#[derive(Clone, Copy)]
enum Work {
    /// All bytes through a buffer that fits a cache; nothing is kept.
    Stream,
    /// All bytes into fresh memory, as a program has them that wants to use them.
    Copy,
    /// The checkpoint opened and its model built.
    Load,
}

/// Drops the pages of the files from the page cache, or brings all of them in.
fn prepare(files: &[PathBuf], cold: bool) -> std::io::Result<()> {
    if !cold {
        return timed_read(files).map(|_| ());
    }
    files.iter().try_for_each(|file| longbit_sys::drop_cached_pages(file))
}

/// Seconds to read all bytes through a buffer that fits a cache.
fn timed_read(files: &[PathBuf]) -> std::io::Result<f64> {
    let mut buffer = vec![0u8; 1 << 20];
    let clock = Instant::now();
    for path in files {
        let mut file = File::open(path)?;
        while file.read(&mut buffer)? > 0 {}
    }
    Ok(clock.elapsed().as_secs_f64())
}

/// Seconds to read all bytes into memory that is asked for on the way.
fn timed_copy(files: &[PathBuf]) -> std::io::Result<f64> {
    let clock = Instant::now();
    let held = files.iter().map(std::fs::read).collect::<std::io::Result<Vec<_>>>()?;
    let seconds = clock.elapsed().as_secs_f64();
    drop(held);
    Ok(seconds)
}

/// Seconds until the model is ready.
fn timed_load(path: &Path, options: &OpenOptions, team: &Team) -> Result<f64, longbit::Error> {
    let clock = Instant::now();
    let checkpoint = Checkpoint::open(path, options)?;
    let model = checkpoint.load(HeadFormat::Bf16, team)?;
    let seconds = clock.elapsed().as_secs_f64();
    drop(model);
    Ok(seconds)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0
}
