//! Whole decode steps against the read bandwidth of the same minute: bytes that the step must read, over its time, over
//! the bandwidth.
//!
//! Not a criterion bench, for the reason that `memory_wall` gives. `cargo bench -p longbit-benches --bench decode_wall --
//! [--context 64] [--kv bf16] [--threads 1,2] [--rounds 6] [--steps 16] CONFIGURATION…`, where a configuration is a head
//! format with the packing of the weights, such as `bf16`, `q6` or `two-stage+1.6bit+skip`. All configurations are in
//! memory together and take turns with the probe, so that their ratios hold when the machine drifts.

use std::sync::Arc;
use std::time::Instant;

use longbit::{Compaction, HeadFormat, Model, Session};
use longbit_benches::{filled_session, model_2b, probe, smoke, team, thread_counts};

struct Options {
    context: usize,
    kv: String,
    threads: Vec<usize>,
    rounds: usize,
    steps: usize,
    configurations: Vec<String>,
}

fn options() -> Options {
    let mut options = Options {
        context: 48,
        kv: "bf16".into(),
        threads: thread_counts(),
        rounds: if smoke() { 1 } else { 6 },
        steps: if smoke() { 2 } else { 16 },
        configurations: Vec::new(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse().ok()).expect("a number");
        match arg.as_str() {
            "--bench" | "--test" => {}
            "--context" => options.context = number(),
            "--rounds" => options.rounds = number(),
            "--steps" => options.steps = number(),
            "--kv" => options.kv = args.next().expect("a KV dtype"),
            "--threads" => {
                let list = args.next().expect("thread counts");
                options.threads = list.split(',').map(|n| n.parse().expect("a number")).collect();
            }
            name if name.starts_with("--") => panic!("{name} is not an option of this bench"),
            name => options.configurations.push(name.into()),
        }
    }
    if options.configurations.is_empty() {
        options.configurations =
            ["bf16", "q6", "two-stage", "two-stage+1.6bit+skip"].map(String::from).into();
    }
    options
}

fn build(configuration: &str) -> Arc<Model> {
    let (head, weights) = configuration.split_once('+').unwrap_or((configuration, "2bit"));
    let head = HeadFormat::parse(head).expect("a head format");
    let how = Compaction::parse(weights).expect("a packing of weights");
    let builders = team(*thread_counts().last().unwrap_or(&1));
    let model = Model::synthetic(model_2b(), head, 1, &builders).expect("a model");
    Arc::new(model.compact(how, &builders).expect("memory"))
}

struct Candidate {
    name: String,
    session: Session,
    /// Tokens a second, GB/s, fraction of the bandwidth measured just before or after.
    seen: Vec<[f64; 3]>,
    megabytes: f64,
    overhead: f64,
    /// Rows that a two-stage head scored twice in a step.
    rescored: f64,
}

impl Candidate {
    /// Decodes some tokens; returns the bytes that had to be read and the seconds.
    fn steps(&mut self, steps: usize, context: usize) -> (f64, f64) {
        let vocab = self.session.model().config.vocab as u32;
        let (mut bytes, mut seconds) = (0.0, 0.0);
        self.rescored = 0.0;
        for step in 0..steps as u32 {
            let token = (step * 7919 + 17) % vocab;
            let clock = Instant::now();
            self.session.decode(token).expect("a step");
            seconds += clock.elapsed().as_secs_f64();
            let traffic = self.session.traffic();
            let model = self.session.model();
            let rescored = self.session.head_rows_rescored();
            self.rescored += rescored as f64;
            let read = model.bytes().per_token + traffic.kv_bytes + 2 * rescored * model.config.hidden as u64;
            bytes += read as f64 - traffic.skipped_weight_bytes as f64;
        }
        self.session.rewind(context);
        self.rescored /= steps as f64;
        (bytes, seconds)
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2] + values[(values.len() - 1) / 2]) / 2.0
}

fn main() {
    let options = options();
    let probe = probe();
    let models: Vec<_> = options.configurations.iter().map(|name| (name.clone(), build(name))).collect();
    println!(
        "{:<32} {:>7} {:>7} {:>8} {:>8} {:>6} {:>10} {:>9} {:>9} {:>9}",
        "configuration",
        "context",
        "threads",
        "tok/s",
        "MB/token",
        "GB/s",
        "read GB/s",
        "fraction",
        "overhead",
        "re-scored"
    );
    for &threads in &options.threads {
        let team = team(threads);
        let mut candidates: Vec<Candidate> = models
            .iter()
            .map(|(name, model)| Candidate {
                name: name.clone(),
                session: filled_session(model.clone(), options.context, &options.kv, threads),
                seen: Vec::new(),
                megabytes: 0.0,
                overhead: 0.0,
                rescored: 0.0,
            })
            .collect();
        let mut reads = Vec::new();
        for candidate in &mut candidates {
            candidate.steps(2, options.context);
        }
        for round in 0..options.rounds {
            let mut order: Vec<usize> = (0..candidates.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for i in order {
                let read = probe.measure(&team);
                let candidate = &mut candidates[i];
                let (bytes, seconds) = candidate.steps(options.steps, options.context);
                let speed = bytes / seconds / 1e9;
                candidate.seen.push([options.steps as f64 / seconds, speed, speed / read]);
                candidate.megabytes = bytes / options.steps as f64 / 1e6;
                reads.push(read);
            }
        }
        for candidate in &mut candidates {
            candidate.session.start_profile();
            candidate.steps(options.steps, options.context);
            candidate.overhead = candidate.session.take_profile().map_or(0.0, |profile| profile.overhead());
            println!(
                "{:<32} {:>7} {threads:>7} {:>8.2} {:>8.1} {:>6.1} {:>10.1} {:>9.2} {:>8.1}% {:>9.0}",
                candidate.name,
                options.context,
                median(candidate.seen.iter().map(|s| s[0])),
                candidate.megabytes,
                median(candidate.seen.iter().map(|s| s[1])),
                median(reads.iter().copied()),
                median(candidate.seen.iter().map(|s| s[2])),
                100.0 * candidate.overhead,
                candidate.rescored,
            );
        }
    }
}
