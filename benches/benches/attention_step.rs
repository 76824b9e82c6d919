//! Dense attention as a session runs it: a decode step in bytes of cached keys and values, and a chunk of prefill in
//! multiply-adds; 30 layers of the heads of a 2B model on a residual stream of 256.
//!
//! Not a criterion bench: what counts is a ratio to a bandwidth that drifts, so step and probe are measured in turn (A B B
//! A), and the median of the ratios is printed. `LONGBIT_CONTEXTS` (default `2048,8192,32768`; 98304 takes 7.5 GB with
//! bf16) and `LONGBIT_KV` (default `bf16,f32`) say what is measured, `LONGBIT_THREADS` with how many threads;
//! `LONGBIT_PREFILL=0` leaves prefill out, `LONGBIT_ROUNDS` are the rounds of A B B A.

use std::time::Instant;

use longbit::{Session, Supplied};
use longbit_benches::{attention_session, model_2b, probe, sized, smoke, team, thread_counts};
use longbit_sys::{ReadProbe, Team};

/// Rounds of A B B A.
fn rounds() -> usize {
    std::env::var("LONGBIT_ROUNDS").map_or(4, |n| n.parse().expect("a number of rounds"))
}
/// Tokens of a chunk of prefill.
const PREFILL: usize = 512;

fn listed(variable: &str, default: &str) -> Vec<String> {
    let list = std::env::var(variable).unwrap_or_else(|_| default.into());
    list.split(',').map(|item| item.trim().to_string()).collect()
}

/// The thread counts of `LONGBIT_THREADS`, or all worth measuring.
fn threads() -> Vec<usize> {
    match std::env::var("LONGBIT_THREADS") {
        Ok(_) => {
            listed("LONGBIT_THREADS", "").iter().map(|n| n.parse().expect("a number of threads")).collect()
        }
        Err(_) => thread_counts(),
    }
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    (x[x.len() / 2] + x[(x.len() - 1) / 2]) / 2.0
}

/// GB/s of decode steps over at least 50 ms.
fn decode(session: &mut Session, supplied: &Supplied, context: usize) -> f64 {
    let (clock, mut bytes) = (Instant::now(), 0);
    while bytes == 0 || clock.elapsed().as_millis() < sized(50_000) as u128 / 1000 {
        session.decode_supplied(0, supplied, false).expect("a step");
        session.rewind(context);
        bytes += session.traffic().kv_bytes;
    }
    bytes as f64 / clock.elapsed().as_secs_f64() / 1e9
}

fn decode_line(kv: &str, context: usize, threads: usize, probe: &ReadProbe, team: &Team) {
    let (mut session, supplied) = attention_session(context, kv, threads);
    decode(&mut session, &supplied, context);
    let (mut ratios, mut speeds, mut reads) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds() {
        let (a, b) = (probe.measure(team), decode(&mut session, &supplied, context));
        let (c, d) = (decode(&mut session, &supplied, context), probe.measure(team));
        ratios.extend([b / a, c / d]);
        speeds.extend([b, c]);
        reads.extend([a, d]);
    }
    println!(
        "decode  {kv:<12} {context:>7} {threads:>7} {:>8.2} {:>8.1} {:>10.1} {:>9.2}",
        session.traffic().kv_bytes as f64 / median(speeds.clone()) / 1e6,
        median(speeds),
        median(reads),
        median(ratios)
    );
}

/// Multiply-adds of the attention of a chunk, in 10^9 a second and thread.
fn prefill_line(kv: &str, context: usize, threads: usize) {
    let config = model_2b();
    let (mut session, _) = attention_session(context + PREFILL, kv, threads);
    let tokens = vec![1; PREFILL];
    let seen: usize = (0..PREFILL).map(|i| context + i + 1).sum();
    let work = (seen * config.heads * config.layers * config.head_dim * 2) as f64;
    let rates = (0..3).map(|_| {
        session.rewind(context);
        let clock = Instant::now();
        session.prefill_at_once(&tokens).expect("a chunk");
        work / clock.elapsed().as_secs_f64() / 1e9 / threads as f64
    });
    println!(
        "prefill {kv:<5} {context:>7} {threads:>7} {:>8.1} G multiply-adds/s a thread",
        median(rates.collect())
    );
}

fn main() {
    let probe = probe();
    println!("        kv           context threads  ms/step     GB/s  read GB/s  fraction");
    for kv in listed("LONGBIT_KV", "bf16,f32") {
        for context in listed("LONGBIT_CONTEXTS", if smoke() { "256" } else { "2048,8192,32768" }) {
            let context = context.parse().expect("a number of tokens");
            for threads in threads() {
                decode_line(&kv, context, threads, &probe, &team(threads));
            }
        }
        let prefill = std::env::var("LONGBIT_PREFILL").map_or(true, |x| x != "0");
        for context in [0, sized(8192)].into_iter().filter(|_| prefill) {
            for threads in threads() {
                prefill_line(&kv, context, threads);
            }
        }
    }
}
