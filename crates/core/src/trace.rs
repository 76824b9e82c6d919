//! Traces: queries, keys and values of real attention in a safetensors file, written by `longbit capture` or by any
//! framework, and replayed by the worker.
//!
//! Three tensors, all after RoPE and before any scaling, of one type (F32, F16 or BF16): `k` and `v`
//! `[layers, kv_heads, tokens, head_dim]`, and `q` `[layers, heads, steps, head_dim]`: the queries of the last `steps` of
//! the tokens, so that query `i` sees the keys `0..=tokens - steps + i`. Query heads `g * kv_head..g * (kv_head + 1)`, with
//! `g = heads / kv_heads`, share a KV head. The layers may be some of a model's; `__metadata__` may say which and where
//! they come from, and is not needed.

mod replay;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use longbit_kernels::Kernels;
use longbit_sys::FileMap;
use safetensors::tensor::{Dtype, SafeTensors, TensorInfo};

use crate::error::{Error, Result};

/// Bytes of the length that opens a safetensors file.
const LENGTH_BYTES: usize = 8;

/// How much a trace holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceShape {
    /// Layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Numbers a row.
    pub head_dim: usize,
    /// Tokens with keys and values.
    pub tokens: usize,
    /// The last tokens, which have queries too.
    pub steps: usize,
}

impl TraceShape {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tokens before the first query's own.
    pub fn context(&self) -> usize {
        self.tokens - self.steps
    }
}

/// A trace, mapped from its file.
#[derive(Debug)]
pub struct Trace {
    map: FileMap,
    path: PathBuf,
    shape: TraceShape,
    dtype: Dtype,
    /// First bytes of `k`, `v` and `q`.
    starts: [usize; 3],
    metadata: HashMap<String, String>,
}

impl Trace {
    /// Opens a trace and checks its layout; numbers are checked as they are read.
    ///
    /// # Errors
    /// A file that cannot be read, is no safetensors file, or lacks one of the three tensors in its shape, each with what
    /// was expected.
    pub fn open(path: &Path) -> Result<Self> {
        let map = FileMap::open(path)?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::Container { path: path.into(), reason: e.to_string() })?;
        let fail =
            |tensor: &str, reason: String| Error::Tensor { path: path.into(), tensor: tensor.into(), reason };
        let dims = |name: &str| -> Result<(&TensorInfo, [usize; 4])> {
            let info = metadata.info(name).ok_or_else(|| {
                fail(name, "is missing; a trace has `k` and `v` [layers, kv_heads, tokens, head_dim] and `q` [layers, heads, \
                            steps, head_dim]".into())
            })?;
            match <[usize; 4]>::try_from(info.shape.as_slice()) {
                Ok(dims) if dims.iter().all(|&n| n > 0) => Ok((info, dims)),
                _ => Err(fail(name, format!("is {:?}; four numbers above 0 were expected", info.shape))),
            }
        };
        let ((k, keys), (v, values), (q, queries)) = (dims("k")?, dims("v")?, dims("q")?);
        let [layers, kv_heads, tokens, head_dim] = keys;
        let [_, heads, steps, _] = queries;
        if values != keys {
            return Err(fail("v", format!("is {values:?}, but `k` is {keys:?}")));
        }
        if queries[0] != layers || queries[3] != head_dim {
            let expected = format!("[{layers}, heads, steps, {head_dim}]");
            return Err(fail("q", format!("is {queries:?}; {expected} was expected, for `k` is {keys:?}")));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(fail(
                "q",
                format!("has {heads} heads, which {kv_heads} KV heads cannot share evenly"),
            ));
        }
        if steps >= tokens {
            let reason = format!(
                "has queries of {steps} of {tokens} tokens; at least the first token must come before them"
            );
            return Err(fail("q", reason));
        }
        if !matches!(k.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(fail("k", format!("is {:?}; F32, F16 or BF16 was expected", k.dtype)));
        }
        for (name, info) in [("v", v), ("q", q)] {
            if info.dtype != k.dtype {
                return Err(fail(name, format!("is {:?}, but `k` is {:?}", info.dtype, k.dtype)));
            }
        }
        let start = |info: &TensorInfo| LENGTH_BYTES + header + info.data_offsets.0;
        Ok(Trace {
            starts: [start(k), start(v), start(q)],
            dtype: k.dtype,
            shape: TraceShape { layers, heads, kv_heads, head_dim, tokens, steps },
            metadata: metadata.metadata().clone().unwrap_or_default(),
            path: path.into(),
            map,
        })
    }

    /// How much it holds.
    pub fn shape(&self) -> TraceShape {
        self.shape
    }

    /// What its writer said of it.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// The keys of `tokens` of a (layer, KV head) as `[tokens][head_dim]`; `out` is overwritten.
    ///
    /// # Errors
    /// A number that is not finite, with its place.
    ///
    /// # Panics
    /// When layer, head or tokens are outside of the shape.
    pub fn keys(&self, layer: usize, kv_head: usize, tokens: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        self.read("k", 0, [layer, kv_head], [self.shape.kv_heads, self.shape.tokens], tokens, out)
    }

    /// The values of `tokens`, as [`Trace::keys`].
    ///
    /// # Errors
    /// As [`Trace::keys`].
    pub fn values(
        &self,
        layer: usize,
        kv_head: usize,
        tokens: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        self.read("v", 1, [layer, kv_head], [self.shape.kv_heads, self.shape.tokens], tokens, out)
    }

    /// The queries of a step of the group of a (layer, KV head), `[group][head_dim]`; `out` is overwritten.
    ///
    /// # Errors
    /// As [`Trace::keys`].
    pub fn queries(&self, layer: usize, kv_head: usize, step: usize, out: &mut Vec<f32>) -> Result<()> {
        let group = self.shape.group();
        let mut row = Vec::new();
        out.clear();
        for head in kv_head * group..(kv_head + 1) * group {
            self.read("q", 2, [layer, head], [self.shape.heads, self.shape.steps], step..step + 1, &mut row)?;
            out.extend_from_slice(&row);
        }
        Ok(())
    }

    /// Bytes of a number.
    fn width(&self) -> usize {
        if self.dtype == Dtype::F32 { 4 } else { 2 }
    }

    /// Rows `rows` of the `[heads, rows]` of a layer of tensor `tensor`.
    fn read(
        &self,
        name: &str,
        tensor: usize,
        [layer, head]: [usize; 2],
        [heads, all]: [usize; 2],
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let d = self.shape.head_dim;
        assert!(layer < self.shape.layers && head < heads && rows.end <= all, "row outside of the trace");
        let width = self.width();
        let first = ((layer * heads + head) * all + rows.start) * d;
        let from = self.starts[tensor] + first * width;
        let bytes = &self.map[from..from + rows.len() * d * width];
        out.clear();
        out.resize(rows.len() * d, 0.0);
        if self.dtype == Dtype::F32 {
            for (x, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *x = f32::from_le_bytes(*bytes);
            }
        } else {
            let bits: Vec<u16> = bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
            match self.dtype {
                Dtype::F16 => Kernels::best().f16_to_f32(&bits, out),
                _ => Kernels::best().bf16_to_f32(&bits, out),
            }
        }
        match out.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::Tensor {
                path: self.path.clone(),
                tensor: name.into(),
                reason: format!(
                    "holds {} at [{layer}, {head}, {}, {}]",
                    out[at],
                    rows.start + at / d,
                    at % d
                ),
            }),
        }
    }
}

/// Rows of a trace on their way to a file.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceRows {
    /// The shape of the rows.
    pub shape: TraceShape,
    /// `[layers][kv_heads][tokens][head_dim]`.
    pub keys: Vec<f32>,
    /// `[layers][kv_heads][tokens][head_dim]`.
    pub values: Vec<f32>,
    /// `[layers][heads][steps][head_dim]`.
    pub queries: Vec<f32>,
}

/// Number format of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceFormat {
    /// As they are.
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

impl TraceFormat {
    /// Name in a safetensors header, and bytes a number.
    fn dtype(self) -> (&'static str, usize) {
        match self {
            TraceFormat::F32 => ("F32", 4),
            TraceFormat::Bf16 => ("BF16", 2),
        }
    }

    /// Appends `numbers` to `out`.
    fn encode(self, numbers: &[f32], out: &mut Vec<u8>) {
        match self {
            TraceFormat::F32 => out.extend(numbers.iter().flat_map(|x| x.to_le_bytes())),
            TraceFormat::Bf16 => {
                let mut bits = vec![0; numbers.len()];
                Kernels::best().f32_to_bf16(numbers, &mut bits);
                out.extend(bits.into_iter().flat_map(u16::to_le_bytes));
            }
        }
    }
}

/// A tensor on its way to a file.
type Tensor<'a> = (&'static str, [usize; 4], &'a [f32]);

/// Writes a trace to `path`, beside its place first; returns its bytes. The same rows and metadata give the same bytes:
/// runs know a trace by them.
///
/// # Errors
/// Numbers that do not fill the shape, or a file that cannot be written.
pub fn write_trace(
    path: &Path,
    rows: &TraceRows,
    format: TraceFormat,
    metadata: HashMap<String, String>,
) -> Result<u64> {
    let s = &rows.shape;
    let kv = [s.layers, s.kv_heads, s.tokens, s.head_dim];
    let queries = [s.layers, s.heads, s.steps, s.head_dim];
    let tensors: [Tensor<'_>; 3] =
        [("k", kv, &rows.keys), ("v", kv, &rows.values), ("q", queries, &rows.queries)];
    for (name, shape, numbers) in &tensors {
        if numbers.len() != shape.iter().product::<usize>() {
            let reason = format!("has {} numbers, which do not fill {shape:?}", numbers.len());
            return Err(Error::Tensor { path: path.into(), tensor: (*name).into(), reason });
        }
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let beside = path.with_file_name(name);
    let written =
        write_file(&beside, &tensors, format, metadata).and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        // Leave nothing behind that looks like a result.
        let _ = std::fs::remove_file(&beside);
    }
    let bytes = written.and_then(|()| std::fs::metadata(path));
    bytes.map(|m| m.len()).map_err(|source| Error::Write { path: path.into(), source })
}

/// The file as a whole: length of the header, header, numbers.
fn write_file(
    path: &Path,
    tensors: &[Tensor<'_>],
    format: TraceFormat,
    metadata: HashMap<String, String>,
) -> std::io::Result<()> {
    let (dtype, width) = format.dtype();
    let (mut header, mut end) = (BTreeMap::new(), 0);
    for &(name, shape, numbers) in tensors {
        let start = end;
        end += numbers.len() * width;
        let info = [
            ("dtype".to_owned(), dtype.into()),
            ("shape".to_owned(), shape.to_vec().into()),
            ("data_offsets".to_owned(), vec![start, end].into()),
        ];
        header.insert(name, BTreeMap::<String, serde_json::Value>::from(info));
    }
    header.insert("__metadata__", metadata.into_iter().map(|(word, what)| (word, what.into())).collect());
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut bytes = Vec::new();
    for numbers in tensors.iter().flat_map(|(_, _, numbers)| numbers.chunks(1 << 16)) {
        bytes.clear();
        format.encode(numbers, &mut bytes);
        file.write_all(&bytes)?;
    }
    file.into_inner()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: TraceShape =
        TraceShape { layers: 2, heads: 4, kv_heads: 2, head_dim: 16, tokens: 5, steps: 2 };

    fn rows() -> TraceRows {
        let numbers = |n: usize, by: f32| (0..n).map(|i| by * ((i % 200) as f32 - 40.0)).collect();
        let kv = SHAPE.layers * SHAPE.kv_heads * SHAPE.tokens * SHAPE.head_dim;
        TraceRows {
            shape: SHAPE,
            keys: numbers(kv, 0.5),
            values: numbers(kv, 0.25),
            queries: numbers(SHAPE.layers * SHAPE.heads * SHAPE.steps * SHAPE.head_dim, -1.0),
        }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        for format in [TraceFormat::F32, TraceFormat::Bf16] {
            let path = dir.path().join("a.safetensors");
            let rows = rows();
            let words = ["model", "b", "layers", "a"].map(|word| (word.to_string(), "x".to_string()));
            let bytes = write_trace(&path, &rows, format, words.clone().into()).unwrap();
            let first = std::fs::read(&path).unwrap();
            write_trace(&path, &rows, format, words.into_iter().rev().collect()).unwrap();
            assert!(std::fs::read(&path).unwrap() == first, "a map in another order gives other bytes");
            assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
            let trace = Trace::open(&path).unwrap();
            assert_eq!((trace.shape(), trace.shape().context(), trace.shape().group()), (SHAPE, 3, 2));
            assert_eq!(trace.metadata()["model"], "x");
            let mut out = vec![1.0];
            // Numbers with few bits are the same in bfloat16.
            trace.keys(1, 1, 1..4, &mut out).unwrap();
            assert_eq!(out, rows.keys[(3 * 5 + 1) * 16..(3 * 5 + 4) * 16]);
            trace.values(0, 1, 0..5, &mut out).unwrap();
            assert_eq!(out, rows.values[5 * 16..10 * 16]);
            trace.queries(1, 1, 1, &mut out).unwrap();
            let head = |h: usize| &rows.queries[((4 + h) * 2 + 1) * 16..((4 + h) * 2 + 2) * 16];
            assert_eq!(out, [head(2), head(3)].concat());
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
        }
    }

    /// The file that `scripts/write-trace.py` wrote, and what it writes now where there is a Python.
    #[test]
    fn the_writer_for_other_frameworks_is_understood() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let fixture = root.join("fixtures/traces/ramp.safetensors");
        let trace = Trace::open(&fixture).unwrap();
        let shape = TraceShape { layers: 2, heads: 4, kv_heads: 2, head_dim: 16, tokens: 24, steps: 3 };
        assert_eq!(trace.shape(), shape);
        assert_eq!(trace.metadata()["model"], "a ramp");
        let ramp = |first: f32, step: f32, at: usize| first + step * (at % 97) as f32;
        let mut out = Vec::new();
        trace.keys(1, 0, 5..6, &mut out).unwrap();
        assert_eq!(out[7], ramp(1.0, -0.015625, ((2 * 24) + 5) * 16 + 7));
        trace.values(0, 1, 23..24, &mut out).unwrap();
        assert_eq!(out[15], ramp(0.0, 0.25, (24 + 23) * 16 + 15));
        trace.queries(1, 1, 2, &mut out).unwrap();
        assert_eq!(out[16 + 3], ramp(-1.0, 0.03125, ((4 + 3) * 3 + 2) * 16 + 3));
        let dir = tempfile::tempdir().unwrap();
        let again = dir.path().join("again.safetensors");
        let python = std::process::Command::new("python3")
            .arg(root.join("scripts/write-trace.py"))
            .arg(&again)
            .status();
        match python {
            Ok(status) => {
                assert!(status.success());
                assert!(
                    std::fs::read(again).unwrap() == std::fs::read(fixture).unwrap(),
                    "the script writes another file"
                );
            }
            // A machine without Python has the fixture.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
        }
    }

    #[test]
    fn what_is_no_trace_is_refused_with_what_was_expected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let write = |shapes: [(&'static str, [usize; 4]); 3]| {
            let numbers = vec![0.0; shapes.iter().map(|(_, s)| s.iter().product()).max().unwrap()];
            let tensors =
                shapes.map(|(name, shape)| (name, shape, &numbers[..shape.iter().product::<usize>()]));
            write_file(&path, &tensors, TraceFormat::F32, HashMap::new()).unwrap();
            Trace::open(&path).unwrap_err().to_string()
        };
        let (k, q) = ([2, 2, 5, 16], [2, 4, 2, 16]);
        for (shapes, says) in [
            ([("k", k), ("v", k), ("x", q)], "`q` is missing"),
            ([("k", k), ("v", [2, 2, 6, 16]), ("q", q)], "`v` is [2, 2, 6, 16], but `k` is [2, 2, 5, 16]"),
            ([("k", k), ("v", k), ("q", [1, 4, 2, 16])], "[2, heads, steps, 16] was expected"),
            ([("k", k), ("v", k), ("q", [2, 3, 2, 16])], "cannot share evenly"),
            ([("k", k), ("v", k), ("q", [2, 4, 5, 16])], "queries of 5 of 5 tokens"),
            ([("k", [2, 2, 0, 16]), ("v", k), ("q", q)], "above 0"),
        ] {
            let message = write(shapes);
            assert!(message.contains(says), "{message}");
        }
        std::fs::write(&path, b"not one").unwrap();
        assert!(Trace::open(&path).unwrap_err().to_string().contains("safetensors"));
        let short = TraceRows { keys: vec![0.0], ..rows() };
        let message = write_trace(&path, &short, TraceFormat::F32, HashMap::new()).unwrap_err().to_string();
        assert!(message.contains("do not fill [2, 2, 5, 16]"), "{message}");
    }

    #[test]
    fn numbers_that_are_not_finite_are_named_with_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let mut broken = rows();
        broken.values[(2 * 5 + 3) * 16 + 7] = f32::NAN;
        write_trace(&path, &broken, TraceFormat::F32, HashMap::new()).unwrap();
        let trace = Trace::open(&path).unwrap();
        trace.values(1, 0, 0..3, &mut Vec::new()).unwrap();
        let message = trace.values(1, 0, 2..5, &mut Vec::new()).unwrap_err().to_string();
        assert!(message.contains("`v` holds NaN at [1, 0, 3, 7]"), "{message}");
    }
}
