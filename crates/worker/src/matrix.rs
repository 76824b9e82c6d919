//! A job that times the product of one matrix: no cache, no attention, nothing to compare.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use longbit::matrix::{Matrix, Product, is_name, shape_of};
use longbit_protocol::{CellJob, Event, Fill, Job, Probe, Ready};
use longbit_sys::{ProcessFacts, ReadProbe, Team};

use crate::measure::{Teams, failed, phase, shuffle};
use crate::timing::{Passes, repetition};
use crate::{Events, WorkerError, capabilities};

/// Name of the workload.
pub(crate) const NAME: &str = "matrix";
/// What stands in place of a KV dtype and a method.
pub(crate) const NOTHING: &str = "-";

/// Whether a job is of this kind, by its model or its workload.
pub(crate) fn is_job(job: &Job) -> bool {
    is_name(&job.model.preset) || job.workload == NAME
}

/// A cell that is still being measured.
struct Cell<'a> {
    job: &'a CellJob,
    team: Arc<Team>,
    product: Product,
}

struct Products<'a>(&'a Cell<'a>, &'a Matrix);

impl Passes for Products<'_> {
    fn pass(&mut self, _step: usize) -> Result<(), WorkerError> {
        Ok(self.0.product.run(self.1, &self.0.team)?)
    }
}

/// Times every cell in rounds.
pub(crate) fn run<W: Write>(job: &Job, events: &mut Events<W>) -> Result<(), WorkerError> {
    if !is_name(&job.model.preset) || job.workload != NAME || job.context != 0 {
        return Err(WorkerError::Request(format!(
            "the workload {NAME} is for a preset like matrix:4096x4096 and a context of 0, and such a preset is for it"
        )));
    }
    let shape = shape_of(&job.model.preset)?;
    let clock = Instant::now();
    events.send(&phase("building the matrix", 0, 1))?;
    let matrix = Matrix::random(shape, job.model.seed)?;
    let caps = capabilities()?;
    let probe = ReadProbe::new(job.measure.probe_bytes as usize)?;
    events.send(&Event::Ready(Box::new(Ready {
        engine: caps.engine,
        engine_version: caps.version,
        isa: matrix.isa().into(),
        model_sha256: Matrix::sha256(shape, job.model.seed),
        weight_bytes_per_token: matrix.bytes(),
        fill: Fill::None,
        build_ns: clock.elapsed().as_nanos() as u64,
        huge_page_bytes: ProcessFacts::now().anon_huge_bytes,
        ..Ready::default()
    })))?;
    let mut teams = Teams::new(job.measure.pin);
    let mut cells = Vec::new();
    for cell in &job.cells {
        let made = teams.get(cell.threads).and_then(|team| {
            let product = Product::new(&matrix, cell.batch, cell.threads, job.seed)?;
            Ok(Cell { job: cell, team, product })
        });
        match made {
            Ok(cell) => cells.push(cell),
            Err(error) => events.send(&failed(cell, &error))?,
        }
    }
    for rep in 0..job.measure.reps {
        let mut order: Vec<usize> = (0..cells.len()).filter(|&i| cells[i].job.first_rep <= rep).collect();
        let mut threads: Vec<usize> = order.iter().map(|&i| cells[i].job.threads).collect();
        threads.sort_unstable();
        threads.dedup();
        for threads in threads {
            let gb_s = probe.measure(&*teams.get(threads)?);
            events.send(&Event::Probe(Probe { threads, gb_s, round: rep }))?;
        }
        shuffle(&mut order, job.seed ^ (u64::from(rep) << 32));
        for (slot, &i) in order.iter().enumerate() {
            let cell = &cells[i];
            let mut sample = repetition(&mut Products(cell, &matrix), cell.job.batch, &job.measure)?;
            (sample.cell, sample.rep) = (cell.job.id.clone(), rep);
            (sample.round, sample.slot) = (rep, slot as u32);
            events.send(&Event::Sample(Box::new(sample)))?;
        }
    }
    events.send(&Event::End)
}
