//! From a plan to a model: every matrix repacked into the layout of the kernels, by all threads at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use longbit_kernels::{BadCode, Kernels, TernaryShape};
use longbit_sys::Team;

use super::ahead::while_reading_ahead;
use super::master::{self, Rounding};
use super::plan::{LayerPlan, LinearPlan, RowOrder, Scale, Stored};
use super::{Checkpoint, plan::WeightPlan};
use crate::error::{Error, Result};
use crate::formats::{Encoding, FormatError, Matrix};
use crate::model::build::{Job, WeightMemory, run_all};
use crate::model::{Compaction, HeadFormat, Layer, Model, Table, TableFormat, TernaryLinear};

/// Tiles of a ternary matrix that one job repacks.
const TILES_A_JOB: usize = 64;
/// Bytes of a stored table that one job converts.
const TABLE_BYTES_A_JOB: usize = 4 << 20;
/// Bytes that are looked at and copied together; half a second-level cache.
const COPY_BYTES: usize = 256 << 10;

/// A job and the place in the files where it reads: file, byte, part of the matrix.
type Placed<'a> = ((usize, usize, usize), Job<'a>);

pub(super) fn load(checkpoint: &Checkpoint, head_format: HeadFormat, team: &Team) -> Result<Model> {
    while_reading_ahead(&checkpoint.files, || repack(checkpoint, head_format, team))
}

fn repack(checkpoint: &Checkpoint, head_format: HeadFormat, team: &Team) -> Result<Model> {
    let (config, plan) = (&checkpoint.config, &checkpoint.plan);
    let kernels = Kernels::from_env()?;
    let roundings = roundings(checkpoint, plan, team)?;
    let mut memory = WeightMemory::new(config, head_format)?;
    let mut layers = Vec::new();
    for layer in &plan.layers {
        layers.push(empty_layer(layer, &mut memory)?);
    }
    let format = head_format.table();
    let table_bytes = config.vocab * config.hidden * format.size();
    let mut embedding = memory.take(table_bytes)?;
    let mut own = match plan.head {
        Some(_) => Some(memory.take(table_bytes)?),
        None => None,
    };

    let rounded = AtomicU64::new(0);
    let progress: Vec<Progress<'_>> =
        plan.layers.iter().flat_map(|layer| layer.linears.iter()).map(Progress::new).collect();
    let mut jobs: Vec<Placed<'_>> = Vec::new();
    let mut at = 0;
    for (layer, planned) in layers.iter_mut().zip(&plan.layers) {
        let Layer { q, k, v, o, gate, up, down, .. } = layer;
        for (linear, planned) in [q, k, v, o, gate, up, down].into_iter().zip(&planned.linears) {
            let repack = Repack { checkpoint, planned, rounding: &roundings[at], progress: &progress[at] };
            repack.jobs(linear, &mut jobs)?;
            at += 1;
        }
    }
    table_jobs(checkpoint, &plan.embedding, format, &mut embedding, kernels, &rounded, &mut jobs)?;
    if let (Some(stored), Some(own)) = (&plan.head, own.as_mut()) {
        table_jobs(checkpoint, stored, format, own, kernels, &rounded, &mut jobs)?;
    }
    // In the order of the file, which is read ahead; the last of the list is taken first.
    jobs.sort_unstable_by_key(|(place, _)| std::cmp::Reverse(*place));
    run_all(team, jobs.into_iter().map(|(_, job)| job).collect())?;

    let mut scales = progress.into_iter().zip(roundings).map(|(p, rounding)| p.scale(rounding));
    for layer in &mut layers {
        let Layer { q, k, v, o, gate, up, down, .. } = layer;
        for linear in [q, k, v, o, gate, up, down] {
            linear.scale = scales.next().unwrap_or(Ok(1.0))?;
        }
    }
    let embedding = Table::new(embedding, config.vocab, config.hidden, format);
    let own = own.map(|data| Table::new(data, config.vocab, config.hidden, format));
    let head = memory.head(config, head_format, own, &embedding, kernels, team)?;
    Ok(Model {
        config: config.clone(),
        embedding,
        layers,
        final_norm: plan.final_norm.clone(),
        head,
        head_format,
        kernels,
        rounded: rounded.into_inner(),
        compaction: Compaction::default(),
    })
}

/// How the floats of each linear layer become ternary, `[layers * 7]`; nothing for formats that are ternary already.
fn roundings(checkpoint: &Checkpoint, plan: &WeightPlan, team: &Team) -> Result<Vec<Option<Rounding>>> {
    let mut all = Vec::new();
    for layer in &plan.layers {
        for linear in &layer.linears {
            all.push(match linear.scale {
                Scale::Given(_) | Scale::Inside(_) => None,
                Scale::Absmean | Scale::Detect(_) => {
                    let span = &linear.stored.span;
                    let rounding = master::rounding(linear, checkpoint.bytes(span), team)?;
                    // All masters together are many times the model; they are read once more, matrix by matrix.
                    checkpoint.files[span.file].release(span.range.clone());
                    Some(rounding)
                }
            });
        }
    }
    Ok(all)
}

fn empty_layer(plan: &LayerPlan, memory: &mut WeightMemory) -> Result<Layer> {
    let mut linear = |planned: &LinearPlan| -> Result<TernaryLinear> {
        let shape = TernaryShape { rows: planned.stored.rows, cols: planned.stored.cols };
        Ok(TernaryLinear::new(shape, memory.take(shape.bytes())?, 1.0))
    };
    let [q, k, v, o, gate, up, down] = &plan.linears;
    Ok(Layer {
        input_norm: plan.input_norm.clone(),
        q: linear(q)?,
        k: linear(k)?,
        v: linear(v)?,
        attn_sub_norm: plan.attn_sub_norm.clone(),
        o: linear(o)?,
        post_norm: plan.post_norm.clone(),
        gate: linear(gate)?,
        up: linear(up)?,
        ffn_sub_norm: plan.ffn_sub_norm.clone(),
        down: linear(down)?,
        sparse: None,
    })
}

/// What the jobs of one matrix tell each other.
struct Progress<'a> {
    planned: &'a LinearPlan,
    /// Jobs that still read the stored matrix.
    left: AtomicUsize,
    /// The one scale of all its rows, once a row has shown it.
    scale: Mutex<Option<f32>>,
}

impl<'a> Progress<'a> {
    fn new(planned: &'a LinearPlan) -> Self {
        Progress { planned, left: AtomicUsize::new(0), scale: Mutex::new(None) }
    }

    /// Takes note of the scale of a stored row.
    fn saw(&self, row: usize, scale: f32) -> Result<(), FormatError> {
        let mut known = self.scale.lock().unwrap_or_else(|e| e.into_inner());
        let first = *known.get_or_insert(scale);
        if first == scale { Ok(()) } else { Err(FormatError::Scales { row, first, second: scale }) }
    }

    /// The multiplier of the whole matrix.
    fn scale(self, rounding: Option<Rounding>) -> Result<f32> {
        // A matrix of zeros shows no scale, and any will do.
        let inside = self.scale.into_inner().unwrap_or_else(|e| e.into_inner()).unwrap_or(1.0);
        let scale = match (self.planned.scale, rounding) {
            (_, Some(rounding)) => rounding.scale,
            (Scale::Given(scale), None) => scale,
            (Scale::Inside(times), None) => inside * times,
            (Scale::Absmean | Scale::Detect(_), None) => inside,
        };
        if scale.is_finite() && scale > 0.0 {
            return Ok(scale);
        }
        Err(self.planned.stored.fail(format!("has the scale {scale}; it must be a positive number")))
    }
}

/// A row that could not be read.
enum RowError {
    Format(FormatError),
    Kernel(BadCode),
}

impl From<BadCode> for RowError {
    fn from(error: BadCode) -> Self {
        RowError::Kernel(error)
    }
}

impl From<FormatError> for RowError {
    fn from(error: FormatError) -> Self {
        RowError::Format(error)
    }
}

/// One matrix on its way into a model.
#[derive(Clone, Copy)]
struct Repack<'a> {
    checkpoint: &'a Checkpoint,
    planned: &'a LinearPlan,
    rounding: &'a Option<Rounding>,
    progress: &'a Progress<'a>,
}

impl<'a> Repack<'a> {
    fn jobs(self, linear: &'a mut TernaryLinear, jobs: &mut Vec<Placed<'a>>) -> Result<()> {
        let shape = linear.shape;
        let stored = &self.planned.stored;
        let matrix =
            Matrix::new(stored.encoding, stored.rows, stored.cols, self.checkpoint.bytes(&stored.span))
                .map_err(|e| stored.damaged(&e))?;
        for (i, out) in linear.data.chunks_mut(TILES_A_JOB * shape.tile_bytes()).enumerate() {
            self.progress.left.fetch_add(1, Ordering::Relaxed);
            let job: Job<'a> = Box::new(move || {
                self.checkpoint.files[stored.span.file].populate(stored.span.range.clone());
                let first = i * TILES_A_JOB;
                let tiles = first..first + out.len() / shape.tile_bytes();
                self.tiles(shape, matrix, tiles, out)?;
                if self.progress.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    self.checkpoint.files[stored.span.file].release(stored.span.range.clone());
                }
                Ok(())
            });
            jobs.push(((stored.span.file, stored.span.range.start, i), job));
        }
        Ok(())
    }

    fn tiles(
        self,
        shape: TernaryShape,
        matrix: Matrix<'_>,
        tiles: std::ops::Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let (planned, order) = (self.planned, self.planned.order);
        let done = match self.rounding {
            // The layout of most checkpoints has a path of its own: no row is unpacked on the way.
            None if matrix.encoding() == Encoding::HfU8 && order == RowOrder::Same => shape
                .repack_hf(self.checkpoint.bytes(&planned.stored.span), tiles, out)
                .map_err(RowError::Kernel),
            None => {
                let mut seen = None;
                let rows = |row: usize, codes: &mut [u8]| -> Result<(), RowError> {
                    // Errors are about the row of the file.
                    let row = order.stored(row);
                    if let Some(scale) = matrix.ternary_row(row, codes)?
                        && seen != Some(scale)
                    {
                        self.progress.saw(row, scale)?;
                        seen = Some(scale);
                    }
                    Ok(())
                };
                shape.pack_rows(tiles, rows, out)
            }
            Some(rounding) => {
                let mut values = vec![0.0f32; shape.cols];
                let rows = |row: usize, codes: &mut [u8]| -> Result<(), RowError> {
                    matrix.dequantize_row(order.stored(row), &mut values)?;
                    rounding.codes(&values, codes);
                    Ok(())
                };
                shape.pack_rows(tiles, rows, out)
            }
        };
        done.map_err(|error| match error {
            RowError::Format(error) => planned.stored.damaged(&error),
            RowError::Kernel(error) => planned.stored.fail(format!("is damaged: {error}")),
        })
    }
}

/// Converts a stored table, whose numbers must all be finite, into the format of the model's.
fn table_jobs<'a>(
    checkpoint: &'a Checkpoint,
    stored: &'a Stored,
    format: TableFormat,
    to: &'a mut [u8],
    kernels: &'static Kernels,
    rounded: &'a AtomicU64,
    jobs: &mut Vec<Placed<'a>>,
) -> Result<()> {
    let bytes = checkpoint.bytes(&stored.span);
    let matrix =
        Matrix::new(stored.encoding, stored.rows, stored.cols, bytes).map_err(|e| stored.damaged(&e))?;
    let (from_width, to_width) = (bytes.len() / stored.rows, stored.cols * format.size());
    let rows_a_job = (TABLE_BYTES_A_JOB / from_width.max(1)).max(1);
    for (i, to) in to.chunks_mut(rows_a_job * to_width).enumerate() {
        let start = stored.span.range.start;
        let job: Job<'a> = Box::new(move || {
            let rows = i * rows_a_job..i * rows_a_job + to.len() / to_width;
            let range = rows.start * from_width..rows.end * from_width;
            checkpoint.files[stored.span.file].populate(start + range.start..start + range.end);
            let same = matches!((stored.encoding, format), (Encoding::Bf16, TableFormat::Bf16));
            if same && cfg!(target_endian = "little") {
                let from = &bytes[range.clone()];
                // A part at a time, so that what was looked at is copied from the cache.
                for (from, to) in from.chunks(COPY_BYTES).zip(to.chunks_mut(COPY_BYTES)) {
                    // All exponent bits set: infinite or not a number. Without an early end this is vector code.
                    let odd = |b: &[u8; 2]| u16::from_le_bytes(*b) & 0x7F80 == 0x7F80;
                    if from.as_chunks::<2>().0.iter().fold(false, |any, b| any | odd(b)) {
                        return Err(not_finite(stored));
                    }
                    to.copy_from_slice(from);
                }
            } else {
                let lost = convert_rows(stored, matrix, rows, format, kernels, to)?;
                rounded.fetch_add(lost, Ordering::Relaxed);
            }
            checkpoint.files[stored.span.file].release(start + range.start..start + range.end);
            Ok(())
        });
        jobs.push(((stored.span.file, start + i * rows_a_job * from_width, i), job));
    }
    Ok(())
}

fn not_finite(stored: &Stored) -> Error {
    stored.fail("holds a number that is not finite".into())
}

/// Rows of any format into a table; how many numbers it could not hold exactly.
fn convert_rows(
    stored: &Stored,
    matrix: Matrix<'_>,
    rows: std::ops::Range<usize>,
    format: TableFormat,
    kernels: &'static Kernels,
    to: &mut [u8],
) -> Result<u64> {
    let mut values = vec![0.0f32; stored.cols];
    let mut lost = 0;
    for (row, to) in rows.zip(to.chunks_exact_mut(stored.cols * format.size())) {
        matrix.dequantize_row(row, &mut values).map_err(|e| stored.damaged(&e))?;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(not_finite(stored));
        }
        match format {
            TableFormat::F32 => bytemuck::cast_slice_mut(to).copy_from_slice(&values),
            TableFormat::Bf16 => {
                kernels.f32_to_bf16(&values, bytemuck::cast_slice_mut(to));
                lost += values.iter().filter(|v| v.to_bits() & 0xFFFF != 0).count() as u64;
            }
        }
    }
    Ok(lost)
}
