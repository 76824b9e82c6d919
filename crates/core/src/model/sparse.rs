//! The feed-forward matrices in the layouts that let a decode step skip zeros exactly.
//!
//! With ReLU² a gate that is not positive makes its channel exactly zero: the row of `up` need not be read. And every
//! input of `down` whose int8 code is zero adds nothing to any output: its column need not be read. Channels whose row of
//! `gate` or `up` is all zeros are dead in every token, and their rows of `gate` are not read either.

use longbit_kernels::{ColumnShape, RowShape};
use longbit_sys::{Segment, Team};

use super::build::{Job, run_all};
use super::linear::{Packing, TernaryLinear};
use crate::error::Result;

/// Rows or columns that one job repacks.
const A_JOB: usize = 256;

/// See the module.
pub struct SparseFfn {
    /// Rows of `gate` where enough channels are dead, with the channels that live, ascending.
    pub gate: Option<(Segment, Vec<u32>)>,
    /// Rows of `up`.
    pub up: Segment,
    /// Shape of `gate` and `up`.
    pub rows: RowShape,
    /// Columns of `down`.
    pub down: Segment,
    /// Shape of `down`.
    pub columns: ColumnShape,
    /// Channels that are zero for every token.
    pub dead: usize,
}

impl SparseFfn {
    /// Repacks the matrices of one layer, which must be packed at two bits. `packing` is that of the gate that decode
    /// steps would read otherwise.
    pub(crate) fn build(
        gate: &TernaryLinear,
        up: &TernaryLinear,
        down: &TernaryLinear,
        packing: Packing,
        team: &Team,
    ) -> Result<Self> {
        let rows = RowShape { rows: up.shape.rows, cols: up.shape.cols };
        let columns = ColumnShape { rows: down.shape.rows, cols: down.shape.cols };
        let live = live_channels(gate, up);
        let by_rows = |linear: &TernaryLinear| -> Result<Segment> {
            let mut data = Segment::new(rows.bytes())?;
            let jobs = data.chunks_mut(A_JOB * rows.row_bytes().max(1)).enumerate();
            let jobs = jobs.map(|(i, out)| -> Job<'_> {
                Box::new(move || {
                    let first = i * A_JOB;
                    let some = first..first + out.len() / rows.row_bytes();
                    rows.repack(linear.shape, &linear.data, some, out);
                    Ok(())
                })
            });
            run_all(team, jobs.collect())?;
            Ok(data)
        };
        let mut down_data = Segment::new(columns.bytes())?;
        let jobs = down_data.chunks_mut(A_JOB * columns.column_bytes().max(1)).enumerate();
        let jobs = jobs.map(|(i, out)| -> Job<'_> {
            Box::new(move || {
                let first = i * A_JOB;
                let some = first..first + out.len() / columns.column_bytes();
                columns.repack(down.shape, &down.data, some, out);
                Ok(())
            })
        });
        run_all(team, jobs.collect())?;
        let dead = rows.rows - live.len();
        let pruned = live.len() * rows.row_bytes() < packing.bytes(gate.shape);
        Ok(SparseFfn {
            gate: if dead > 0 && pruned { Some((by_rows(gate)?, live)) } else { None },
            up: by_rows(up)?,
            rows,
            down: down_data,
            columns,
            dead,
        })
    }

    /// Bytes of the copies for a layer of `hidden x intermediate` without dead channels.
    pub(crate) fn bytes(hidden: usize, intermediate: usize) -> usize {
        RowShape { rows: intermediate, cols: hidden }.bytes()
            + ColumnShape { rows: hidden, cols: intermediate }.bytes()
    }
}

/// Channels with a weight other than zero in both matrices.
fn live_channels(gate: &TernaryLinear, up: &TernaryLinear) -> Vec<u32> {
    let mut codes = vec![0; gate.shape.cols];
    let mut lives = |linear: &TernaryLinear, row: usize| {
        linear.unpack_row(row, &mut codes);
        codes.iter().any(|&code| code != 1)
    };
    (0..gate.shape.rows).filter(|&row| lives(gate, row) && lives(up, row)).map(|row| row as u32).collect()
}
