//! How long a checkpoint takes to be ready, against the time to read its bytes, and how much memory it takes on the way.
//!
//! The head is bf16, as every verb has it. Reading goes through a small buffer and keeps nothing. Reading and loading alternate (A B B A), from a cold page cache (the file's pages are dropped first) and from a warm
//! one. Run alone on the machine:
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
    for cold in [true, false] {
        let (mut reads, mut loads) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let read = |times: &mut Vec<f64>| -> std::io::Result<()> {
                prepare(&files, cold)?;
                times.push(timed_read(&files)?);
                Ok(())
            };
            if round % 2 == 0 {
                read(&mut reads)?;
            }
            prepare(&files, cold)?;
            loads.push(timed_load(&path, &options, &team)?);
            if round % 2 == 1 {
                read(&mut reads)?;
            }
        }
        let (read, load) = (median(&mut reads), median(&mut loads));
        println!(
            "{} cache: read {read:.3} s ({:.2} GB/s), ready {load:.3} s, ratio {:.2}  (reads {reads:.3?}, loads {loads:.3?})",
            if cold { "cold" } else { "warm" },
            bytes as f64 / 1e9 / read,
            load / read
        );
    }
    // Before the whole file is held once more.
    let peak = ProcessFacts::now().rss_peak_bytes;
    let mut copies = Vec::new();
    for _ in 0..ROUNDS {
        let clock = Instant::now();
        for file in &files {
            drop(std::fs::read(file)?);
        }
        copies.push(clock.elapsed().as_secs_f64());
    }
    println!("warm cache, into memory of its own: read {:.3} s  ({copies:.3?})", median(&mut copies.clone()));
    if let Some(peak) = peak {
        println!(
            "peak resident memory {:.3} GB, {:.3} of the file",
            peak as f64 / 1e9,
            peak as f64 / bytes as f64
        );
    }
    Ok(())
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
