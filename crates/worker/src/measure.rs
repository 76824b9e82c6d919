//! A job from the first event to the last: build the model, fill the cache, measure quality, then time the cells in
//! rounds. In a round every cell has one repetition, in an order drawn anew, beside a bandwidth probe a thread count.

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use longbit::Session;
use longbit::attention::{Attention, MethodSpec, method};
use longbit_protocol::{CellJob, Event, Job, Outcome, PROTOCOL, Probe, Quality, Ready, Status};
use longbit_sys::{ProcessFacts, ReadProbe, SysError, Team};

use crate::inputs::{self, Inputs, Prepared};
use crate::{Events, WorkerError, capabilities, matrix, panic_text, seeds, timing};

/// A cell that is still being measured.
struct Cell<'a> {
    job: &'a CellJob,
    team: Arc<Team>,
    /// Its method with all parameters, by which its state is found.
    method: String,
}

/// The sessions that cells run in, and the states of their methods. Cells of one method share its state: they differ in
/// threads, which change no bit.
struct Sessions<'a> {
    shared: &'a mut Session,
    methods: BTreeMap<String, Made>,
    context: usize,
}

/// A method that is ready to be measured.
struct Made {
    state: State,
    /// Time to build it.
    build_ns: u64,
}

/// Where a method is.
enum State {
    /// Its state goes into the session that all methods share; none while it is there.
    Shared(Option<Attention>),
    /// It evicts, or a text runs through the model with its own pattern, so it has a session of its own.
    Own(Box<Session>),
}

pub(crate) fn run<W: Write>(job: &Job, events: &mut Events<W>) -> Result<(), WorkerError> {
    if job.protocol != PROTOCOL {
        return Err(WorkerError::Request(format!(
            "the request speaks protocol {}, this engine {PROTOCOL}; use a runner of the same version",
            job.protocol
        )));
    }
    limit_memory(job)?;
    if matrix::is_job(job) {
        return matrix::run(job, events);
    }
    let mut teams = Teams::new(job.measure.pin);
    let widest = job.cells.iter().map(|c| c.threads).max().unwrap_or(1);
    let builders = teams.get(widest)?;

    let clock = Instant::now();
    events.send(&phase("building the model", 0, 1))?;
    let built = inputs::build(job, &builders)?;
    let build_ns = clock.elapsed().as_nanos() as u64;

    let sha256 = built.sha256.clone();
    let Prepared { mut session, inputs, fill_ns } = inputs::prepare(job, built, builders, events)?;
    let probe = ReadProbe::new(job.measure.probe_bytes as usize)?;
    let append_ns = inputs.append_ns(&mut session)?;
    let caps = capabilities()?;
    events.send(&Event::Ready(Box::new(Ready {
        engine: caps.engine,
        engine_version: caps.version,
        isa: session.model().kernels.isa().as_str().into(),
        model_sha256: sha256,
        weight_bytes_per_token: session.model().bytes().per_token,
        kv_bytes_stored: session.cache().stored_bytes(),
        fill: inputs.fill(),
        fill_sha256: inputs.fill_sha256().into(),
        build_ns,
        fill_ns,
        append_ns,
        huge_page_bytes: ProcessFacts::now().anon_huge_bytes,
        workload_stats: inputs.statistics(&session),
    })))?;

    let mut cells = Vec::new();
    let mut session = Sessions { shared: &mut session, methods: BTreeMap::new(), context: job.context };
    for cell in &job.cells {
        let made = teams.get(cell.threads).and_then(|team| {
            let method = session.make(method(&cell.method)?, &inputs)?;
            Ok(Cell { job: cell, team, method })
        });
        match made {
            Ok(cell) => cells.push(cell),
            Err(error) => events.send(&failed(cell, &error))?,
        }
    }
    compare_all(job, &mut session, &inputs, &mut cells, events)?;
    time_all(job, &mut session, &inputs, cells, &probe, events)?;
    events.send(&Event::End)
}

/// Sets the cap of the job on this process.
fn limit_memory(job: &Job) -> Result<(), WorkerError> {
    let Some(bytes) = job.limits.address_space_bytes else { return Ok(()) };
    match longbit_sys::set_address_space_limit(bytes) {
        // Where there is no such limit the runner's prediction is the only guard.
        Ok(()) | Err(SysError::Unsupported { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// One team for each thread count.
pub(crate) struct Teams {
    pin: bool,
    made: BTreeMap<usize, Arc<Team>>,
}

impl Teams {
    pub(crate) fn new(pin: bool) -> Self {
        Teams { pin, made: BTreeMap::new() }
    }

    pub(crate) fn get(&mut self, threads: usize) -> Result<Arc<Team>, WorkerError> {
        if let Some(team) = self.made.get(&threads) {
            return Ok(team.clone());
        }
        let team = Arc::new(Team::with_threads(threads, self.pin)?);
        self.made.insert(threads, team.clone());
        Ok(team)
    }
}

/// Quality of every cell that lacks it. Threads do not change a bit, so cells of one method share one comparison.
fn compare_all<W: Write>(
    job: &Job,
    session: &mut Sessions<'_>,
    inputs: &Inputs,
    cells: &mut Vec<Cell<'_>>,
    events: &mut Events<W>,
) -> Result<(), WorkerError> {
    if job.measure.quality_steps == 0 {
        return Ok(());
    }
    let mut known: BTreeMap<String, Quality> = BTreeMap::new();
    let mut kept = Vec::new();
    for cell in cells.drain(..) {
        if !cell.job.quality_done && cell.job.batch == 1 {
            let measured = match known.get(&cell.method) {
                Some(quality) => Ok(quality.clone()),
                None => compare(job, session, inputs, &cell, events)
                    .and_then(|quality| spread(job, session, inputs, &cell, quality, events)),
            };
            match measured {
                Ok(quality) => {
                    known.insert(cell.method.clone(), quality.clone());
                    events
                        .send(&Event::Quality(Box::new(Quality { cell: cell.job.id.clone(), ..quality })))?;
                }
                Err(error) => {
                    events.send(&failed(cell.job, &error))?;
                    continue;
                }
            }
        }
        kept.push(cell);
    }
    *cells = kept;
    Ok(())
}

/// Quality of the cell's method.
fn compare<W: Write>(
    job: &Job,
    session: &mut Sessions<'_>,
    inputs: &Inputs,
    cell: &Cell<'_>,
    events: &mut Events<W>,
) -> Result<Quality, WorkerError> {
    with_cell(session, cell, |session| {
        inputs.quality(session, job.measure.quality_steps as usize, &mut |done, total| {
            events.send(&phase("comparing the output", done, total))
        })
    })
}

/// `own`, the quality of the cell's method, with that of other seeds where the method draws at random. One state at a time is
/// there beside those of the cells.
fn spread<W: Write>(
    job: &Job,
    session: &mut Sessions<'_>,
    inputs: &Inputs,
    cell: &Cell<'_>,
    own: Quality,
    events: &mut Events<W>,
) -> Result<Quality, WorkerError> {
    let seeds = seeds::reseeded(&method(&cell.method)?, job.measure.seeds);
    // Without attention outputs there is no error to spread.
    let Some(error) = own.rel_l2_p50 else { return Ok(own) };
    let mut errors = Vec::new();
    for other in seeds {
        if other == cell.method {
            errors.push(error);
            continue;
        }
        let kept = session.methods.contains_key(&other);
        let reseeded =
            Cell { job: cell.job, team: cell.team.clone(), method: session.make(method(&other)?, inputs)? };
        let quality = compare(job, session, inputs, &reseeded, events);
        if !kept {
            session.methods.remove(&other);
        }
        errors.extend(quality?.rel_l2_p50);
    }
    Ok(Quality { seeds: seeds::spread(&errors), ..own })
}

fn time_all<W: Write>(
    job: &Job,
    session: &mut Sessions<'_>,
    inputs: &Inputs,
    mut cells: Vec<Cell<'_>>,
    probe: &ReadProbe,
    events: &mut Events<W>,
) -> Result<(), WorkerError> {
    for rep in 0..job.measure.reps {
        let mut order: Vec<usize> = (0..cells.len()).filter(|&i| cells[i].job.first_rep <= rep).collect();
        if order.is_empty() {
            continue;
        }
        let mut probed: BTreeMap<usize, Arc<Team>> = BTreeMap::new();
        for &i in &order {
            probed.entry(cells[i].job.threads).or_insert_with(|| cells[i].team.clone());
        }
        for (threads, team) in probed {
            events.send(&Event::Probe(Probe { threads, gb_s: probe.measure(&team), round: rep }))?;
        }
        shuffle(&mut order, job.seed ^ (u64::from(rep) << 32));
        let mut lost = Vec::new();
        for (slot, &i) in order.iter().enumerate() {
            let cell = &cells[i];
            let batch = cell.job.batch;
            let timed = with_cell(session, cell, |session| {
                let mut passes = inputs.passes(session, job.context, batch);
                timing::repetition(&mut passes, batch, &job.measure)
            });
            match timed {
                Ok(mut sample) => {
                    (sample.cell, sample.rep) = (cell.job.id.clone(), rep);
                    (sample.round, sample.slot) = (rep, slot as u32);
                    sample.index_build_ns = session.methods.get(&cell.method).map(|made| made.build_ns);
                    events.send(&Event::Sample(Box::new(sample)))?;
                }
                Err(error) => {
                    events.send(&failed(cell.job, &error))?;
                    lost.push(i);
                }
            }
        }
        lost.sort_unstable();
        for i in lost.into_iter().rev() {
            cells.remove(i);
        }
    }
    Ok(())
}

impl Sessions<'_> {
    /// Makes what cells of `method` need, if it is not there yet, and returns its name. A method that evicts is told the last
    /// queries of the prompt, and drops its rows now. The time is that to build the state, and of a session of its own that to
    /// fork it and drop rows; where a prompt ran through the model the state grew with it, and what is left is to drop rows.
    fn make(&mut self, method: MethodSpec, inputs: &Inputs) -> Result<String, WorkerError> {
        let name = method.canonical();
        if self.methods.contains_key(&name) {
            return Ok(name);
        }
        let mut clock = Instant::now();
        let state = if method.evicts() || inputs.prefills(&method) {
            let mut session = match inputs.prefilled(self.shared, &method)? {
                Some(session) => {
                    clock = Instant::now();
                    session
                }
                None => self.shared.fork_with(method)?,
            };
            inputs.supply_prompt(&session)?;
            session.end_prompt()?;
            State::Own(Box::new(session))
        } else {
            State::Shared(Some(self.shared.attention_of(method)?))
        };
        let build_ns = clock.elapsed().as_nanos() as u64;
        self.methods.insert(name.clone(), Made { state, build_ns });
        Ok(name)
    }
}

/// Runs `work` with the cell's team and method in place; a failure leaves the session at the filled context. A panic is the
/// cell's failure, not the job's, and the state that it left is not used again.
fn with_cell<T>(
    sessions: &mut Sessions<'_>,
    cell: &Cell<'_>,
    work: impl FnOnce(&mut Session) -> Result<T, WorkerError>,
) -> Result<T, WorkerError> {
    let lost = || WorkerError::Request("the cell's method state was lost in an earlier failure".into());
    let made = sessions.methods.get_mut(&cell.method).ok_or_else(lost)?;
    let (session, place) = match &mut made.state {
        State::Shared(place) => {
            let attention = place.take().ok_or_else(lost)?;
            let other = sessions.shared.swap_attention(attention);
            (&mut *sessions.shared, Some((place, other)))
        }
        State::Own(session) => (&mut **session, None),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        session.set_team(cell.team.clone());
        let outcome = work(session);
        if outcome.is_err() {
            // The state that was at work is rewound with the cache.
            session.rewind(sessions.context);
        }
        outcome
    }));
    let sound = outcome.is_ok();
    if let Some((place, other)) = place {
        let used = session.swap_attention(other);
        *place = sound.then_some(used);
    }
    if !sound {
        session.rewind(sessions.context);
    }
    let panicked = |what: &str| Err(WorkerError::Request(format!("the engine panicked: {what}")));
    outcome.unwrap_or_else(|panic| panicked(&panic_text(&*panic)))
}

/// Fisher-Yates with SplitMix64: the order of a round is part of the plan, not of the platform.
pub(crate) fn shuffle(order: &mut [usize], seed: u64) {
    let mut state = seed;
    for i in (1..order.len()).rev() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        order.swap(i, ((z ^ (z >> 31)) % (i as u64 + 1)) as usize);
    }
}

pub(crate) fn phase(what: &str, done: u64, total: u64) -> Event {
    Event::Phase { what: what.into(), done, total }
}

pub(crate) fn failed(cell: &CellJob, error: &WorkerError) -> Event {
    let status = match error.status() {
        Status::Oom => Status::Oom,
        _ => Status::Error,
    };
    Event::Failed(Outcome { cell: cell.id.clone(), status, error: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_every_cell_once_in_a_fixed_order_that_changes() {
        let orders: Vec<Vec<usize>> = (0..8)
            .map(|rep| {
                let mut order: Vec<usize> = (0..6).collect();
                shuffle(&mut order, 1 ^ (rep << 32));
                let mut sorted = order.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, [0, 1, 2, 3, 4, 5]);
                order
            })
            .collect();
        assert!(orders.windows(2).any(|w| w[0] != w[1]));
    }
}
