//! A decode step of every attention method beside the bytes that it counts: how far deciding and reading follow memory.
//!
//! Not a criterion bench: as in `attention_step`, what counts is a ratio to a bandwidth that drifts, so step and probe are
//! measured in turn. Rows and queries are those of the workload `mix`, for what a method reads depends on them; a few layers
//! of a 2B model on a residual stream of 256 stand for all. Columns: bytes of cached rows and of indexes a layer, time a
//! layer, shares of a thread's time that go to deciding, attending and waiting, and the time as a multiple of what the
//! bytes take at the bandwidth measured beside it.
//!
//! `LONGBIT_METHOD` (`name` or `name:key=value,…`, several between `;`; default: all), `LONGBIT_CONTEXTS` (default
//! `32768`), `LONGBIT_KV` (`bf16`), `LONGBIT_LAYERS` (4, the first two of which some methods would want dense),
//! `LONGBIT_THREADS`, and `LONGBIT_ROUNDS` of probe, steps, probe.

use std::time::Instant;

use longbit::attention::{METHODS, MethodShape, method};
use longbit::{Op, Session, Supplied};
use longbit_benches::{probe, sized, smoke, team, thread_counts, workload_session};
use longbit_sys::{ReadProbe, Team};

/// Steps before the room behind the context is used up.
const ROOM: usize = 200;

fn variable(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.into())
}

fn number(name: &str, default: usize) -> usize {
    variable(name, &default.to_string()).parse().unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    (x[x.len() / 2] + x[(x.len() - 1) / 2]) / 2.0
}

/// Seconds of a step, over at least 30 ms. What a rewind costs an index is no part of it.
fn step(session: &mut Session, steps: &[Supplied], context: usize) -> f64 {
    let (mut spent, mut n) = (0.0, 0);
    while n == 0 || spent < sized(30_000) as f64 * 1e-6 {
        let clock = Instant::now();
        session.decode_supplied(0, &steps[n % steps.len()], false).expect("a step");
        spent += clock.elapsed().as_secs_f64();
        n += 1;
        if n % ROOM == 0 {
            session.rewind(context);
        }
    }
    session.rewind(context);
    spent / n as f64
}

/// Measures a method at work in `session` and prints its line.
fn line(
    spec: &str,
    session: &mut Session,
    steps: &[Supplied],
    context: usize,
    probe: &ReadProbe,
    team: &Team,
) {
    step(session, steps, context);
    let (mut times, mut ratios, mut gb_s) = (Vec::new(), Vec::new(), Vec::new());
    session.start_profile();
    for _ in 0..number("LONGBIT_ROUNDS", 3) {
        let before = probe.measure(team);
        let seconds = step(session, steps, context);
        let bandwidth = (before + probe.measure(team)) / 2.0;
        let traffic = session.traffic();
        let bytes = (traffic.kv_bytes + traffic.index_bytes) as f64;
        times.push(seconds);
        ratios.push(seconds * bandwidth * 1e9 / bytes.max(1.0));
        gb_s.push(bandwidth);
    }
    let profile = session.take_profile().unwrap_or_default();
    let nanos = |op: Op| profile.threads.iter().map(|thread| thread[op as usize].nanos).sum::<u64>() as f64;
    let all = Op::ALL.into_iter().map(nanos).sum::<f64>().max(1.0) / 100.0;
    let (traffic, layers) = (session.traffic(), session.model().config.layers as f64);
    println!(
        "{spec:<34} {context:>7} {:>7} {:>8.2} {:>8.2} {:>9.3} {:>6.0} {:>7.0} {:>5.0} {:>9.1} {:>7.2}",
        team.threads(),
        traffic.kv_bytes as f64 / layers / 1e6,
        traffic.index_bytes as f64 / layers / 1e6,
        median(times) * 1e3 / layers,
        nanos(Op::Append) / all,
        (nanos(Op::Attention) + nanos(Op::Merge)) / all,
        nanos(Op::Wait) / all,
        median(gb_s),
        median(ratios),
    );
}

fn main() {
    let probe = probe();
    let specs: Vec<String> = match std::env::var("LONGBIT_METHOD") {
        Ok(list) => list.split(';').map(|spec| spec.trim().to_owned()).collect(),
        Err(_) => METHODS.iter().map(|method| method.name.to_owned()).collect(),
    };
    let kv = variable("LONGBIT_KV", "bf16");
    let layers = if smoke() { 1 } else { number("LONGBIT_LAYERS", 4) };
    let threads = match std::env::var("LONGBIT_THREADS") {
        Ok(_) => vec![number("LONGBIT_THREADS", 1)],
        Err(_) => thread_counts(),
    };
    println!("{kv}, {layers} layers");
    println!(
        "method                             context threads  kv MB/l  ix MB/l   ms/layer decide attend  wait read GB/s   ratio"
    );
    for context in variable("LONGBIT_CONTEXTS", if smoke() { "600" } else { "32768" }).split(',') {
        let context: usize = context.trim().parse().expect("a number of tokens");
        for &threads in &threads {
            let (mut session, steps) = workload_session(context, &kv, threads, layers);
            for spec in &specs {
                let parsed = method(spec).unwrap_or_else(|e| panic!("{e}"));
                if let Err(why) = parsed.check(&MethodShape::of(session.cache())) {
                    println!("{spec:<34} left out: {why}");
                    continue;
                }
                // Rows that are evicted do not come back.
                if parsed.evicts() {
                    println!("{spec:<34} left out: it evicts, and then reads what it kept as `window` does");
                    continue;
                }
                let state = session.attention_of(parsed).unwrap_or_else(|e| panic!("{e}"));
                let before = session.swap_attention(state);
                line(spec, &mut session, &steps, context, &probe, &team(threads));
                session.swap_attention(before);
            }
        }
    }
}
