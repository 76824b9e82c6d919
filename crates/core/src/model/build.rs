//! Building weights on all threads: jobs over disjoint slices of fresh memory.

use std::sync::Mutex;

use longbit_kernels::{BlockShape, Kernels, TILE_ROWS};
use longbit_sys::{Arena, Segment, Team};

use super::config::ModelConfig;
use super::two_stage::{TwoStage, row_bound};
use super::weights::{BlockMatrix, Head, HeadFormat, ModelBytes, Table};
use crate::error::{Error, Result};

/// A unit of work that owns the memory it fills.
pub(crate) type Job<'a> = Box<dyn FnOnce() -> Result<()> + Send + 'a>;

/// Runs every job on the team, each once, and returns the first error.
pub(crate) fn run_all(team: &Team, jobs: Vec<Job<'_>>) -> Result<()> {
    let queue = Mutex::new(jobs);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    team.run(|_| {
        loop {
            let Some(job) = queue.lock().unwrap_or_else(|e| e.into_inner()).pop() else { return };
            if let Err(error) = job() {
                failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
            }
        }
    });
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The arena that all weights of a model share, and the pieces cut from it.
pub(crate) struct WeightMemory(Arena);

/// Alignment slack of one segment.
const SLACK: usize = 64;

impl WeightMemory {
    /// Room for the ternary matrices, the embedding and the head of `config`.
    pub(crate) fn new(config: &ModelConfig, head: HeadFormat) -> Result<Self> {
        let bytes = ModelBytes::of(config, head).resident as usize;
        let pieces = config.layers * config.linears().len() + 4;
        Ok(WeightMemory(Arena::new(bytes + pieces * SLACK, true)?))
    }

    /// Room for `pieces` of so many bytes.
    pub(crate) fn of(pieces: &[usize]) -> Result<Self> {
        Ok(WeightMemory(Arena::new(pieces.iter().map(|bytes| bytes + SLACK).sum(), true)?))
    }

    /// `bytes` of zeroed memory.
    pub(crate) fn take(&mut self, bytes: usize) -> Result<Segment> {
        match self.0.take(bytes) {
            Some(segment) => Ok(segment),
            None => Ok(Segment::new(bytes)?),
        }
    }

    /// The head of `config` in `format`, quantised from `source` (the embedding or a table of its own) where need be.
    pub(crate) fn head(
        &mut self,
        config: &ModelConfig,
        format: HeadFormat,
        own: Option<Table>,
        embedding: &Table,
        kernels: &'static Kernels,
        team: &Team,
    ) -> Result<Head> {
        if let Some(blocks) = format.blocks() {
            let shape = BlockShape { format: blocks, rows: config.vocab, cols: config.hidden };
            let two_stage = format.is_two_stage();
            let source = own.as_ref().unwrap_or(embedding);
            let (coarse, bounds) = self.block_head(shape, two_stage, source, kernels, team)?;
            return Ok(match two_stage {
                true => Head::TwoStage(TwoStage { own, coarse, bounds }),
                false => Head::Blocks(coarse),
            });
        }
        match (format, own) {
            (HeadFormat::Bf16 | HeadFormat::F32, None) => Ok(Head::Tied),
            (HeadFormat::Bf16 | HeadFormat::F32, Some(table)) => Ok(Head::Own(table)),
            (_, own) => {
                let source = own.as_ref().unwrap_or(embedding);
                let (vocab, hidden) = (config.vocab, config.hidden);
                let mut codes = self.take(vocab * hidden)?;
                let mut scales = vec![0.0f32; vocab];
                const ROWS: usize = 1024;
                let jobs = bytemuck::cast_slice_mut::<u8, i8>(&mut codes)
                    .chunks_mut(ROWS * hidden)
                    .zip(scales.chunks_mut(ROWS))
                    .enumerate()
                    .map(|(i, (codes, scales))| -> Job<'_> {
                        let rows = source.bytes(i * ROWS..i * ROWS + scales.len());
                        Box::new(move || {
                            kernels.quantize_rows_int8(bytemuck::cast_slice(rows), hidden, codes, scales);
                            Ok(())
                        })
                    })
                    .collect();
                run_all(team, jobs)?;
                Ok(Head::Int8 { codes, scales })
            }
        }
    }

    /// The rows of the bf16 table `source` in blocks and, with `bounded`, the bound of each.
    fn block_head(
        &mut self,
        shape: BlockShape,
        bounded: bool,
        source: &Table,
        kernels: &'static Kernels,
        team: &Team,
    ) -> Result<(BlockMatrix, Vec<[f32; 2]>)> {
        /// Tiles that one job fills.
        const TILES: usize = 128;
        let mut data = self.take(shape.bytes())?;
        let mut bounds = vec![[0.0f32; 2]; if bounded { shape.rows } else { 0 }];
        let each_bounds =
            bounds.chunks_mut(TILES * TILE_ROWS).map(Some).chain(std::iter::repeat_with(|| None));
        let jobs = data
            .chunks_mut(TILES * shape.tile_bytes())
            .zip(each_bounds)
            .enumerate()
            .map(|(i, (tiles, bounds))| -> Job<'_> {
                let rows = i * TILES * TILE_ROWS..shape.rows.min((i + 1) * TILES * TILE_ROWS);
                Box::new(move || {
                    let part = BlockShape { rows: rows.len(), ..shape };
                    let rows: &[u16] = bytemuck::cast_slice(source.bytes(rows));
                    kernels.pack_blocks(part, rows, tiles);
                    let Some(bounds) = bounds else { return Ok(()) };
                    let mut back = vec![0.0f32; shape.cols];
                    for (r, (row, bound)) in rows.chunks_exact(shape.cols).zip(bounds).enumerate() {
                        part.read(tiles, r, &mut back);
                        let (squares, errors) = kernels.square_sums(row, &back);
                        *bound = row_bound(part, tiles, r, squares, errors);
                    }
                    Ok(())
                })
            })
            .collect();
        run_all(team, jobs)?;
        Ok((BlockMatrix { shape, data }, bounds))
    }
}
