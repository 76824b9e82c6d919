//! Writing: header, then tensor after tensor, each padded to the alignment.

use std::collections::HashSet;
use std::io::{self, Write};

use super::value::{Array, Value};
use super::{
    GgufError, MAX_HEADER_BYTES, MAX_KEYS, MAX_NAME_BYTES, MAX_TENSORS, Metadata, TensorType, VERSION,
    align_up, header, shown,
};

/// Writes a file: [`Writer::new`] with the keys, [`Writer::tensor`] for each tensor in order, then [`Writer::write`] with
/// a function that writes the bytes of one tensor after the other. Nothing but the header is held in memory.
#[derive(Debug)]
pub struct Writer {
    metadata: Metadata,
    alignment: u64,
    tensors: Vec<Tensor>,
    names: HashSet<String>,
    data_bytes: u64,
}

#[derive(Debug)]
struct Tensor {
    name: String,
    dims: Vec<u64>,
    kind: TensorType,
    offset: u64,
    bytes: u64,
}

impl Writer {
    /// A file with these keys and no tensors yet. The alignment is what `general.alignment` says, otherwise 32.
    ///
    /// # Errors
    /// When the alignment is none, or there are more or longer keys than a reader takes.
    pub fn new(metadata: Metadata) -> Result<Writer, GgufError> {
        limited("keys", metadata.len() as u64, MAX_KEYS)?;
        metadata.iter().try_for_each(|(key, _)| name_length("key", key))?;
        let alignment = header::alignment(&metadata)?;
        Ok(Writer { metadata, alignment, tensors: Vec::new(), names: HashSet::new(), data_bytes: 0 })
    }

    /// Declares the next tensor, with dimensions `dims`, innermost first.
    ///
    /// # Errors
    /// When the name is taken or too long, or the dimensions do not fit the type, or its size is unknown.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dims: &[u64],
        kind: TensorType,
    ) -> Result<(), GgufError> {
        let name = name.into();
        name_length("the name of tensor", &name)?;
        let unknown = || GgufError::UnknownSize { name: shown(&name), kind: kind.to_string() };
        let bytes = header::size(&name, dims, kind)?.ok_or_else(unknown)?;
        let end = self.data_bytes.checked_add(bytes).and_then(|end| align_up(end, self.alignment));
        let end = end.ok_or_else(|| GgufError::Dims { name: shown(&name), dims: dims.into() })?;
        limited("tensors", self.tensors.len() as u64 + 1, MAX_TENSORS)?;
        if !self.names.insert(name.clone()) {
            return Err(GgufError::DuplicateTensor { name: shown(&name) });
        }
        self.tensors.push(Tensor { name, dims: dims.into(), kind, offset: self.data_bytes, bytes });
        self.data_bytes = end;
        Ok(())
    }

    /// Bytes of the tensors declared so far, with the padding after each.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Writes the file. `data` is called once for each tensor, in the order of declaration, with its index and where to
    /// write its bytes, in pieces of any size. What `data` writes goes to `out` as it comes, unbuffered; `out` is flushed
    /// at the end.
    ///
    /// # Errors
    /// [`GgufError::Written`] when `data` writes more or fewer bytes than the tensor has, [`GgufError::Write`] when `out` or
    /// `data` fail.
    pub fn write<W: Write>(
        self,
        out: &mut W,
        mut data: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
    ) -> Result<(), GgufError> {
        let header = self.header()?;
        out.write_all(&header)?;
        for (index, tensor) in self.tensors.iter().enumerate() {
            let mut sink = Sink { out: &mut *out, left: tensor.bytes, excess: 0 };
            let result = data(index, &mut sink);
            let written = tensor.bytes - sink.left + sink.excess;
            if sink.excess > 0 || result.is_ok() && sink.left > 0 {
                let name = shown(&tensor.name);
                return Err(GgufError::Written { name, expected: tensor.bytes, written });
            }
            result?;
            pad(out, tensor.bytes, self.alignment)?;
        }
        Ok(out.flush()?)
    }

    /// Everything before the tensors' bytes, padded.
    fn header(&self) -> Result<Vec<u8>, GgufError> {
        let mut out = Vec::new();
        out.extend(b"GGUF");
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            string(&mut out, key);
            out.extend(value.id().to_le_bytes());
            encode(&mut out, value);
        }
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.kind.id().to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        limited("bytes of keys and tensor entries", out.len() as u64, MAX_HEADER_BYTES)?;
        let bytes = out.len() as u64;
        pad(&mut out, bytes, self.alignment)?;
        Ok(out)
    }
}

/// Passes on at most the bytes that a tensor has.
struct Sink<'a> {
    out: &'a mut dyn Write,
    left: u64,
    excess: u64,
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let offered = bytes.len() as u64;
        if offered > self.left {
            self.excess = offered - self.left;
            self.left = 0;
            return Err(io::Error::other("more bytes than the tensor has"));
        }
        let taken = self.out.write(bytes)?;
        self.left -= taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn limited(what: &str, found: u64, limit: u64) -> Result<(), GgufError> {
    match found <= limit {
        true => Ok(()),
        false => Err(GgufError::Limit { what: what.into(), found, limit }),
    }
}

fn name_length(what: &str, name: &str) -> Result<(), GgufError> {
    match name.len() as u64 {
        found if found > MAX_NAME_BYTES => {
            Err(GgufError::NameLength { what: format!("{what} `{}`", shown(name)), found })
        }
        _ => Ok(()),
    }
}

/// Zeros from `at` to the next multiple of `alignment`, which is a power of two.
fn pad(out: &mut impl Write, at: u64, alignment: u64) -> io::Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut missing = at.wrapping_neg() & (alignment - 1);
    while missing > 0 {
        let some = missing.min(ZEROS.len() as u64);
        out.write_all(&ZEROS[..some as usize])?;
        missing -= some;
    }
    Ok(())
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn encode(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(v) => string(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Array(array) => {
            out.extend(array.id().to_le_bytes());
            out.extend((array.len() as u64).to_le_bytes());
            match array {
                Array::U8(v) => out.extend(v),
                Array::I8(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::U16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::I16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::U32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::I32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::F32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::Bool(v) => out.extend(v.iter().map(|v| u8::from(*v))),
                Array::Strings(v) => v.iter().for_each(|v| string(out, v)),
                Array::U64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::I64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::F64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
            }
        }
    }
}
