//! Reading: everything before the tensors' bytes, and where those lie.

use std::collections::HashMap;
use std::ops::Range;

use super::cursor::Cursor;
use super::value::{ARRAY, Array, Value};
use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgufError, MAX_ALIGNMENT, MAX_DIMS, MAX_KEYS, MAX_TENSORS, Metadata,
    TensorType, VERSION, align_up, shown,
};

/// What stands before the tensors' bytes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Header {
    /// Version of the container: 3.
    pub version: u32,
    /// What the offsets of tensors are multiples of, in bytes.
    pub alignment: u64,
    /// The keys.
    pub metadata: Metadata,
    /// The tensors, in the order of the file's list.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensors' bytes begin in the file. Without tensors, it may lie beyond the end.
    pub data_start: u64,
    by_name: HashMap<String, usize>,
}

/// A tensor: its name and shape, and where its bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the file.
    pub name: String,
    /// Dimensions, innermost first, 1 to 4 of them, none 0; a matrix of `rows` times `cols` is `[cols, rows]`.
    pub dims: Vec<u64>,
    /// Type of its values.
    pub kind: TensorType,
    /// Where its bytes begin in the file; inside the file.
    pub offset: u64,
    /// Its bytes in the file, inside the file and shared with no other tensor; nothing when the type's size is unknown.
    pub range: Option<Range<usize>>,
}

/// Least bytes of a key with its value: length of the key, type, a byte.
const KEY_BYTES: u64 = 8 + 4 + 1;

/// Least bytes of a tensor's entry: length of the name, number of dimensions, one dimension, type, offset.
const TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Most values of a tensor: with at most 8 bytes a value, no size of a tensor overflows.
const MAX_VALUES: u64 = 1 << 58;

impl Header {
    /// Reads the header of a whole file, `bytes`, of which only the header is touched.
    ///
    /// # Errors
    /// [`GgufError`] when the file is no GGUF file of version 3, little-endian, whose tensors lie in it, aligned and apart.
    pub fn parse(bytes: &[u8]) -> Result<Header, GgufError> {
        let mut cursor = Cursor::new(bytes);
        let version = preamble(&mut cursor)?;
        let n_tensors = cursor.u64(format_args!("the number of tensors"))?;
        let n_keys = cursor.u64(format_args!("the number of keys"))?;
        capped(&cursor, "keys", n_keys, MAX_KEYS, KEY_BYTES)?;
        let metadata = keys(&mut cursor, n_keys)?;
        let alignment = alignment(&metadata)?;
        capped(&cursor, "tensors", n_tensors, MAX_TENSORS, TENSOR_BYTES)?;

        let mut tensors = Vec::with_capacity(n_tensors as usize);
        let mut by_name = HashMap::with_capacity(n_tensors as usize);
        for nth in 0..n_tensors {
            let info = entry(&mut cursor, nth, alignment)?;
            if by_name.insert(info.name.clone(), tensors.len()).is_some() {
                return Err(GgufError::DuplicateTensor { name: shown(&info.name) });
            }
            tensors.push(info);
        }
        // The header is inside a slice, so that its end plus an alignment is far from overflowing.
        let data_start = align_up(cursor.offset(), alignment).unwrap_or(u64::MAX);
        place(&mut tensors, data_start, bytes.len() as u64)?;
        Ok(Header { version, alignment, metadata, tensors, data_start, by_name })
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|at| self.tensors.get(*at))
    }
}

impl TensorInfo {
    /// Number of values.
    pub fn values(&self) -> u64 {
        self.dims.iter().product()
    }
}

/// Magic number and version.
fn preamble(cursor: &mut Cursor<'_>) -> Result<u32, GgufError> {
    let found = cursor.array(format_args!("the magic number"))?;
    if &found != b"GGUF" {
        return Err(GgufError::NotGguf { found });
    }
    let version = cursor.u32(format_args!("the version"))?;
    match version {
        VERSION => Ok(version),
        // A small number, in the other order.
        swapped if swapped & 0xffff == 0 && swapped != 0 => {
            Err(GgufError::BigEndian { version: swapped.swap_bytes() })
        }
        found => Err(GgufError::Version { found }),
    }
}

/// Holds a count against the bytes that are left and against its cap.
fn capped(cursor: &Cursor<'_>, what: &str, count: u64, limit: u64, each: u64) -> Result<(), GgufError> {
    cursor.holds(count, each, format_args!("the list of {count} {what}"))?;
    match count <= limit {
        true => Ok(()),
        false => Err(GgufError::TooMany { offset: cursor.offset(), what: what.into(), found: count, limit }),
    }
}

fn keys(cursor: &mut Cursor<'_>, count: u64) -> Result<Metadata, GgufError> {
    let mut metadata = Metadata::new();
    for nth in 1..=count {
        let offset = cursor.offset();
        let key = cursor.name(format_args!("key {nth} of {count}"))?;
        if metadata.get(key).is_some() {
            return Err(GgufError::DuplicateKey { offset, key: shown(key) });
        }
        let value = value(cursor, key)?;
        metadata.set(key, value);
    }
    Ok(metadata)
}

fn value(cursor: &mut Cursor<'_>, key: &str) -> Result<Value, GgufError> {
    let name = shown(key);
    let what = format_args!("the value of key `{name}`");
    let offset = cursor.offset();
    Ok(match cursor.u32(what)? {
        0 => Value::U8(u8::from_le_bytes(cursor.array(what)?)),
        1 => Value::I8(i8::from_le_bytes(cursor.array(what)?)),
        2 => Value::U16(u16::from_le_bytes(cursor.array(what)?)),
        3 => Value::I16(i16::from_le_bytes(cursor.array(what)?)),
        4 => Value::U32(cursor.u32(what)?),
        5 => Value::I32(i32::from_le_bytes(cursor.array(what)?)),
        6 => Value::F32(f32::from_le_bytes(cursor.array(what)?)),
        7 => {
            let offset = cursor.offset();
            let [byte] = cursor.array(what)?;
            Value::Bool(boolean(byte, &name, offset)?)
        }
        8 => Value::String(cursor.str(what)?.into()),
        ARRAY => Value::Array(array(cursor, &name)?),
        10 => Value::U64(cursor.u64(what)?),
        11 => Value::I64(i64::from_le_bytes(cursor.array(what)?)),
        12 => Value::F64(f64::from_le_bytes(cursor.array(what)?)),
        id => return Err(GgufError::ValueType { offset, key: name, id }),
    })
}

/// An array; `key` is fit for a message.
fn array(cursor: &mut Cursor<'_>, key: &str) -> Result<Array, GgufError> {
    fn numbers<T, const N: usize>(
        cursor: &mut Cursor<'_>,
        key: &str,
        count: u64,
        make: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let bytes = cursor
            .take(count.saturating_mul(N as u64), format_args!("the array of key `{key}`, {count} long"))?;
        Ok(bytes.as_chunks().0.iter().copied().map(make).collect())
    }

    let offset = cursor.offset();
    let id = cursor.u32(format_args!("the type of the array of key `{key}`"))?;
    let count = cursor.u64(format_args!("the length of the array of key `{key}`"))?;
    Ok(match id {
        0 => Array::U8(numbers(cursor, key, count, u8::from_le_bytes)?),
        1 => Array::I8(numbers(cursor, key, count, i8::from_le_bytes)?),
        2 => Array::U16(numbers(cursor, key, count, u16::from_le_bytes)?),
        3 => Array::I16(numbers(cursor, key, count, i16::from_le_bytes)?),
        4 => Array::U32(numbers(cursor, key, count, u32::from_le_bytes)?),
        5 => Array::I32(numbers(cursor, key, count, i32::from_le_bytes)?),
        6 => Array::F32(numbers(cursor, key, count, f32::from_le_bytes)?),
        7 => {
            let start = cursor.offset();
            let bytes = numbers(cursor, key, count, |[byte]: [u8; 1]| byte)?;
            let checked = (start..).zip(bytes).map(|(at, byte)| boolean(byte, key, at));
            Array::Bool(checked.collect::<Result<_, _>>()?)
        }
        8 => {
            cursor.holds(count, 8, format_args!("the array of key `{key}`, {count} long"))?;
            let mut strings = Vec::with_capacity(count as usize);
            for nth in 0..count {
                strings.push(cursor.str(format_args!("element {nth} of key `{key}`"))?.to_owned());
            }
            Array::Strings(strings)
        }
        ARRAY => return Err(GgufError::NestedArray { offset, key: key.into() }),
        10 => Array::U64(numbers(cursor, key, count, u64::from_le_bytes)?),
        11 => Array::I64(numbers(cursor, key, count, i64::from_le_bytes)?),
        12 => Array::F64(numbers(cursor, key, count, f64::from_le_bytes)?),
        id => return Err(GgufError::ValueType { offset, key: key.into(), id }),
    })
}

fn boolean(byte: u8, key: &str, offset: u64) -> Result<bool, GgufError> {
    match byte {
        0 | 1 => Ok(byte == 1),
        found => Err(GgufError::Bool { offset, key: key.into(), found }),
    }
}

/// What the metadata say of the alignment.
pub(super) fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    match metadata.u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT) {
        fine if fine.is_power_of_two() && fine <= MAX_ALIGNMENT => Ok(fine),
        found => Err(GgufError::Alignment { found }),
    }
}

/// A tensor of the list; its offset is still that in the data, and aligned.
fn entry(cursor: &mut Cursor<'_>, nth: u64, alignment: u64) -> Result<TensorInfo, GgufError> {
    let name = cursor.name(format_args!("the name of tensor {nth}"))?;
    let what = shown(name);
    let what = format_args!("the entry of tensor `{what}`");
    let n_dims = cursor.u32(what)?;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(GgufError::DimCount { name: shown(name), found: n_dims.into() });
    }
    let dims = (0..n_dims).map(|_| cursor.u64(what)).collect::<Result<Vec<_>, _>>()?;
    let kind = TensorType::from_id(cursor.u32(what)?);
    let offset = cursor.u64(what)?;
    if !offset.is_multiple_of(alignment) {
        return Err(GgufError::Misaligned { name: shown(name), offset, alignment });
    }
    size(name, &dims, kind)?;
    Ok(TensorInfo { name: name.into(), dims, kind, offset, range: None })
}

/// Checks the dimensions of a tensor and gives its bytes, nothing where the type's size is unknown.
pub(super) fn size(name: &str, dims: &[u64], kind: TensorType) -> Result<Option<u64>, GgufError> {
    if !(1..=MAX_DIMS as usize).contains(&dims.len()) {
        return Err(GgufError::DimCount { name: shown(name), found: dims.len() as u64 });
    }
    let values = dims.iter().try_fold(1, |all: u64, dim| all.checked_mul(*dim));
    if !values.is_some_and(|values| (1..=MAX_VALUES).contains(&values)) {
        return Err(GgufError::Dims { name: shown(name), dims: dims.into() });
    }
    match kind.bytes(dims) {
        None if kind.sized() => Err(GgufError::Shape {
            name: shown(name),
            dims: dims.into(),
            kind: kind.to_string(),
            rule: kind.rule(),
        }),
        bytes => Ok(bytes),
    }
}

/// Turns offsets in the data into offsets and ranges in the file, which hold `file` bytes, and checks that the tensors
/// lie in it and apart.
fn place(tensors: &mut [TensorInfo], data_start: u64, file: u64) -> Result<(), GgufError> {
    for info in tensors.iter_mut() {
        info.offset = info.offset.saturating_add(data_start);
    }
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|at| tensors[*at].offset);

    // Id 39 has two meanings. TL2 takes less than half the bytes of MXFP4, so that its tensors follow each other too
    // closely to be MXFP4.
    let crowded = |pair: &[usize]| {
        let (info, next) = (&tensors[pair[0]], &tensors[pair[1]]);
        let room = next.offset - info.offset;
        info.kind == TensorType::Mxfp4 && info.kind.bytes(&info.dims).is_some_and(|bytes| bytes > room)
    };
    if order.windows(2).any(crowded) {
        let ambiguous = tensors.iter_mut().filter(|info| info.kind == TensorType::Mxfp4);
        ambiguous.for_each(|info| info.kind = TensorType::Tl2);
    }

    let mut before: Option<(usize, u64)> = None;
    for at in order {
        let info = &tensors[at];
        let bytes = info.kind.bytes(&info.dims);
        let (start, needed) = (info.offset, bytes.unwrap_or(1));
        let end = start.saturating_add(needed);
        if end > file {
            return Err(GgufError::BeyondEnd { name: shown(&info.name), offset: start, needed, file });
        }
        if let Some((first, taken)) = before
            && start < taken
        {
            let (first, second) = (shown(&tensors[first].name), shown(&info.name));
            return Err(GgufError::Overlap { first, second, offset: start });
        }
        before = Some((at, end));
        // Both fit a usize, for they are at most the length of a slice.
        tensors[at].range = bytes.map(|_| start as usize..end as usize);
    }
    Ok(())
}
