//! The GGUF container: what gguf-py writes reads right, what is read writes back byte for byte, and damaged files are
//! refused with a reason, never a panic.

use std::io::{self, Write};
use std::path::Path;

use longbit::gguf::{
    Array, GgufError, Header, MAX_HEADER_BYTES, MAX_KEYS, MAX_TENSORS, Metadata, TensorType, Value, Writer,
};
use proptest::prelude::*;

/// A file made field by field, so that it can be wrong in one.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(tensors: u64, keys: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(3).u64(tensors).u64(keys)
    }

    fn bytes(mut self, bytes: &[u8]) -> Raw {
        self.0.extend(bytes);
        self
    }

    fn u32(self, v: u32) -> Raw {
        self.bytes(&v.to_le_bytes())
    }

    fn u64(self, v: u64) -> Raw {
        self.bytes(&v.to_le_bytes())
    }

    fn str(self, text: &[u8]) -> Raw {
        self.u64(text.len() as u64).bytes(text)
    }

    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Raw {
        let raw = self.str(name.as_bytes()).u32(dims.len() as u32);
        dims.iter().fold(raw, |raw, dim| raw.u64(*dim)).u32(kind).u64(offset)
    }

    /// Pads to 32 and appends the tensors' bytes.
    fn data(mut self, bytes: usize) -> Raw {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + bytes, 0);
        self
    }

    fn refusal(&self) -> String {
        match Header::parse(&self.0) {
            Ok(header) => panic!("read without an error: {header:?}"),
            Err(error) => error.to_string(),
        }
    }

    /// It is refused, in a message of reasonable length with these parts.
    fn refused(&self, parts: &[&str]) {
        let message = self.refusal();
        parts.iter().for_each(|part| assert!(message.contains(part), "`{part}` is not in: {message}"));
        assert!(message.len() < 600, "{message}");
    }
}

fn fixture() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/gguf/from_gguf_py.gguf"))
        .unwrap()
}

/// Writes what `header` says of `bytes`, tensors in their order.
fn rewritten(header: &Header, bytes: &[u8]) -> Vec<u8> {
    let mut writer = Writer::new(header.metadata.clone()).unwrap();
    for info in &header.tensors {
        writer.tensor(&info.name, &info.dims, info.kind).unwrap();
    }
    let mut out = Vec::new();
    let data = |at: usize, out: &mut dyn Write| {
        // In two pieces, as a converter writes row by row.
        let (first, second) = bytes[header.tensors[at].range.clone().unwrap()].split_at(5);
        out.write_all(first)?;
        out.write_all(second)
    };
    writer.write(&mut out, data).unwrap();
    out
}

/// What every header that was read without an error must hold.
fn sound(header: &Header, file: usize) {
    assert!(header.alignment.is_power_of_two());
    let mut taken = Vec::new();
    for info in &header.tensors {
        assert!(info.offset < file as u64 && info.offset >= header.data_start);
        assert!((info.offset - header.data_start).is_multiple_of(header.alignment));
        assert!((1..=4).contains(&info.dims.len()) && info.values() > 0);
        assert_eq!(info.range.is_some(), info.kind.sized());
        assert_eq!(header.tensor(&info.name), Some(info));
        if let Some(range) = info.range.clone() {
            assert!(range.end <= file && range.start as u64 == info.offset);
            assert_eq!(Some(range.len() as u64), info.kind.bytes(&info.dims));
            taken.push(range);
        }
    }
    taken.sort_by_key(|range| range.start);
    assert!(taken.windows(2).all(|pair| pair[0].end <= pair[1].start));
}

fn metadata<const N: usize>(entries: [(&str, Value); N]) -> Metadata {
    entries.into_iter().collect()
}

/// The keys of the fixture, as scripts/oracles/gguf_container.py spells them.
fn fixture_metadata() -> Metadata {
    let strings = ["", "Ġthe", "<|eot_id|>", "é"].map(String::from).to_vec();
    metadata([
        ("general.architecture", Value::String("longbit-test".into())),
        ("general.alignment", Value::U32(64)),
        ("scalar.u8", Value::U8(255)),
        ("scalar.i8", Value::I8(-128)),
        ("scalar.u16", Value::U16(65535)),
        ("scalar.i16", Value::I16(-32768)),
        ("scalar.u32", Value::U32(u32::MAX)),
        ("scalar.i32", Value::I32(i32::MIN)),
        ("scalar.u64", Value::U64(u64::MAX)),
        ("scalar.i64", Value::I64(i64::MIN)),
        ("scalar.f32", Value::F32(1e-5)),
        ("scalar.f64", Value::F64(500_000.125)),
        ("scalar.yes", Value::Bool(true)),
        ("scalar.no", Value::Bool(false)),
        ("scalar.text", Value::String("Grüße, 世界\n\0🙂".into())),
        ("array.u8", Value::Array(Array::U8(vec![0, 255]))),
        ("array.i8", Value::Array(Array::I8(vec![-128, 127]))),
        ("array.u16", Value::Array(Array::U16(vec![0, 65535]))),
        ("array.i16", Value::Array(Array::I16(vec![-32768, 32767]))),
        ("array.u32", Value::Array(Array::U32(vec![0, u32::MAX]))),
        ("array.i32", Value::Array(Array::I32(vec![-1, 0, 1]))),
        ("array.u64", Value::Array(Array::U64(vec![0, u64::MAX]))),
        ("array.i64", Value::Array(Array::I64(vec![i64::MIN, 0]))),
        ("array.f32", Value::Array(Array::F32(vec![0.5, -0.0, f32::INFINITY]))),
        ("array.f64", Value::Array(Array::F64(vec![0.1]))),
        ("array.bool", Value::Array(Array::Bool(vec![true, false, true]))),
        ("array.strings", Value::Array(Array::Strings(strings))),
    ])
}

#[test]
fn what_gguf_py_writes_reads_right() {
    let file = fixture();
    let header = Header::parse(&file).unwrap();
    assert_eq!((header.version, header.alignment), (3, 64));
    assert_eq!(header.metadata, fixture_metadata());
    sound(&header, file.len());

    let tensor = |name: &str| {
        let info = header.tensor(name).unwrap();
        (info.kind, info.dims.clone(), &file[info.range.clone().unwrap()])
    };
    assert_eq!(header.tensors.len(), 4);
    let floats: Vec<u8> = (0..6u8).flat_map(|v| f32::from(v).to_le_bytes()).collect();
    assert_eq!(tensor("a.f32"), (TensorType::F32, vec![3, 2], floats.as_slice()));
    let halves = [0x3c00u16, 0xc000, 0x3800, 0x7bff].map(u16::to_le_bytes).concat();
    assert_eq!(tensor("a.f16"), (TensorType::F16, vec![2, 1, 2], halves.as_slice()));

    let (kind, dims, blocks) = tensor("a.q8_0");
    assert_eq!((kind, dims, blocks.len()), (TensorType::Q8_0, vec![64, 2], 4 * 34));
    let one = 0x3c00u16.to_le_bytes();
    let firsts = [96i8, -127, -96, 127];
    for (block, first) in blocks.chunks(34).zip(firsts) {
        assert_eq!(block[..2], one);
        let step = if first == 96 || first == -127 { 1 } else { -1 };
        let codes = (0..32).map(|at| (i32::from(first) + step * at) as u8).collect::<Vec<_>>();
        assert_eq!(block[2..], codes);
    }

    // Byte j of each half of a block holds values j, j + 32, j + 64 and j + 96, the first in the low bits, as value + 1.
    let (kind, dims, blocks) = tensor("a.tq2_0");
    assert_eq!((kind, dims, blocks.len()), (TensorType::Tq2_0, vec![512, 1], 2 * 66));
    for (at, block) in blocks.chunks(66).enumerate() {
        assert_eq!(block[64..], one);
        for (half, bytes) in block[..64].chunks(32).enumerate() {
            let value = |j: usize| (at * 256 + half * 128 + j) % 3;
            let expected = |j: usize| (0..4).map(|i| value(j + 32 * i) << (2 * i)).sum::<usize>();
            assert!(bytes.iter().enumerate().all(|(j, byte)| usize::from(*byte) == expected(j)));
        }
    }
}

#[test]
fn a_file_of_gguf_py_is_written_again_byte_for_byte() {
    let file = fixture();
    let header = Header::parse(&file).unwrap();
    assert_eq!(rewritten(&header, &file), file);
}

#[test]
fn every_prefix_is_refused() {
    let file = fixture();
    let end = Header::parse(&file).unwrap().tensors.iter().map(|info| info.range.clone().unwrap().end).max();
    for cut in 0..end.unwrap() {
        let message = Raw(file[..cut].to_vec()).refusal();
        assert!(message.contains("cut short"), "{cut}: {message}");
    }
    // The padding after the last tensor is nobody's.
    for cut in end.unwrap()..file.len() {
        sound(&Header::parse(&file[..cut]).unwrap(), cut);
    }
}

/// Parses `file` with each byte of its header changed to each of `changes`; how many of them were read.
fn damage(file: &[u8], changes: impl Fn(u8) -> Vec<u8>) -> (usize, usize) {
    let (mut damaged, mut fine, mut all) = (file.to_vec(), 0, 0);
    for at in 0..Header::parse(file).unwrap().data_start as usize {
        for byte in changes(file[at]) {
            damaged[at] = byte;
            all += 1;
            if let Ok(header) = Header::parse(&damaged) {
                sound(&header, damaged.len());
                fine += 1;
            }
        }
        damaged[at] = file[at];
    }
    (fine, all)
}

#[test]
fn no_byte_of_the_header_makes_it_panic() {
    let raw = Raw::new(2, 4).str(b"text").u32(8).str("\u{e9}".as_bytes()).str(b"flag").u32(7).bytes(&[1]);
    let raw = raw.str(b"words").u32(9).u32(8).u64(2).str(b"a").str(b"").str(b"ids").u32(9).u32(3).u64(1);
    let raw = raw.bytes(&[1, 2]).tensor("a", &[32, 2], 8, 0).tensor("b", &[3], 0, 96).data(108);
    let (fine, all) = damage(&raw.0, |_| (0..=255).collect());
    // Values, names and padding may be anything; counts, types and places may not.
    assert!(fine > all / 20 && fine < all / 2, "{fine} of {all}");
    let (fine, all) = damage(&fixture(), |byte| (0..8).map(|bit| byte ^ 1 << bit).collect());
    assert!(fine > all / 20 && fine < all * 2 / 3, "{fine} of {all}");
}

#[test]
fn no_length_makes_it_panic_or_ask_for_memory() {
    let file = fixture();
    let header = Header::parse(&file).unwrap().data_start as usize;
    for at in 0..header - 8 {
        for length in
            [u64::MAX, u64::MAX - 7, i64::MAX as u64, 1 << 61, 1 << 40, u64::from(u32::MAX), 1 << 20, 0]
        {
            let mut damaged = file.clone();
            damaged[at..][..8].copy_from_slice(&length.to_le_bytes());
            if let Ok(header) = Header::parse(&damaged) {
                sound(&header, damaged.len());
            }
        }
    }
}

#[test]
fn other_files_are_named() {
    Raw(b"PK\x03\x04 a zip file".to_vec()).refused(&["not a GGUF file", "50, 4b"]);
    Raw(Vec::new()).refused(&["the magic number", "4 bytes", "0 are there"]);
    Raw(b"GGUF".to_vec()).u32(1).refused(&["GGUF version 1;", "only version 3", "convert"]);
    Raw(b"GGUF".to_vec()).u32(2).refused(&["GGUF version 2;"]);
    Raw(b"GGUF".to_vec()).u32(4).refused(&["GGUF version 4;", "update"]);
    Raw(b"GGUF".to_vec()).u32(3u32.swap_bytes()).refused(&["big-endian", "version 3", "convert"]);
}

#[test]
fn counts_and_lengths_are_held_against_the_file() {
    for count in [u64::MAX, 1 << 32, 5_000_000_000, 4] {
        Raw::new(count, 0).data(64).refused(&["the list of", "tensors", "cut short"]);
        Raw::new(0, count).data(8).refused(&["the list of", "keys", "cut short"]);
    }
    Raw::new(MAX_TENSORS + 1, 0)
        .data(32 * (MAX_TENSORS as usize + 1))
        .refused(&["1048577 tensors", "at most"]);
    Raw::new(0, MAX_KEYS + 1).data(13 * (MAX_KEYS as usize + 1)).refused(&["65537 keys", "at most"]);
    for length in [u64::MAX, u64::MAX - 8, 1 << 40, 1000] {
        Raw::new(0, 1).u64(length).data(32).refused(&["key 1 of 1", "cut short"]);
        Raw::new(0, 1).str(b"k").u32(8).u64(length).data(32).refused(&["the value of key `k`", "cut short"]);
        for id in [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12] {
            let raw = Raw::new(0, 1).str(b"k").u32(9).u32(id).u64(length).data(32);
            raw.refused(&["the array of key `k`", "cut short"]);
        }
        Raw::new(1, 0).u64(length).data(32).refused(&["the name of tensor 0", "cut short"]);
    }
    // A string that claims the tensors' bytes of a large file.
    let length = MAX_HEADER_BYTES + 1;
    let small = Raw::new(0, 1).str(b"k").u32(8).u64(length);
    let mut large = vec![0; length as usize + 64];
    large[..small.0.len()].copy_from_slice(&small.0);
    Raw(large).refused(&["the value of key `k`", "at most 536870912"]);
    let long = vec![b'x'; 65_536];
    Raw::new(0, 1).str(&long).data(32).refused(&["key 1 of 1", "65536 bytes", "at most 65535"]);
    let fine = Raw::new(0, 1).str(&long[1..]).u32(0).bytes(&[7]);
    assert_eq!(Header::parse(&fine.0).unwrap().metadata.iter().next().unwrap().1, &Value::U8(7));
}

#[test]
fn damaged_keys_are_refused_by_name() {
    let key = |key: &[u8]| Raw::new(0, 1).str(key);
    key(b"\xff\xfe").u32(0).bytes(&[0; 8]).refused(&["key 1 of 1", "offset 32", "UTF-8"]);
    key(b"k").u32(8).str(b"\xc3").refused(&["the value of key `k`", "UTF-8"]);
    let strings = key(b"k").u32(9).u32(8).u64(2).str(b"fine").str(b"a\x80");
    strings.refused(&["element 1 of key `k`", "UTF-8"]);
    key(b"k").u32(9).u32(9).u64(1).u32(0).u64(0).refused(&["key `k`", "array of arrays"]);
    key(b"k").u32(13).u64(0).refused(&["key `k`", "type 13", "0 to 12"]);
    key(b"k").u32(9).u32(77).u64(0).refused(&["key `k`", "type 77"]);
    key(b"k").u32(7).bytes(&[2]).refused(&["key `k`", "boolean 2"]);
    key(b"k").u32(9).u32(7).u64(3).bytes(&[0, 1, 9]).refused(&["key `k`", "boolean 9", "offset 51"]);
    let twice = Raw::new(0, 2).str(b"k").u32(0).bytes(&[1]).str(b"k").u32(4).u32(1);
    twice.refused(&["key `k`", "twice", "offset 38"]);
    // Neither control characters nor a screenful reach a terminal.
    let loud = [b"\x1b[31m".as_slice(), &[b'A'; 5000]].concat();
    let message = key(&loud).u32(99).bytes(&[0; 8]).refusal();
    assert!(
        message.contains(r"\u{1b}[31mAAA") && !message.contains('\x1b') && message.len() < 300,
        "{message}"
    );
}

#[test]
fn alignment_is_believed_within_reason() {
    let aligned = |id: u32, value: u64| {
        let raw = Raw::new(0, 1).str(b"general.alignment").u32(id);
        if id == 10 { raw.u64(value) } else { raw.u32(value as u32) }
    };
    for bad in [0, 3, 33, 1 << 25, 1 << 31] {
        aligned(4, bad).refused(&[&format!("alignment {bad};"), "power of two"]);
    }
    aligned(10, 1 << 63).refused(&["alignment 9223372036854775808;"]);
    aligned(6, 32).refused(&["`general.alignment`", "the f32", "integer"]);
    for good in [1, 8, 32, 64, 4096, 1 << 24] {
        let header = Header::parse(&aligned(4, good).0).unwrap();
        assert_eq!((header.alignment, header.data_start), (good, 57u64.next_multiple_of(good)));
    }
}

#[test]
fn damaged_tensors_are_refused_by_name() {
    let one = |dims: &[u64], kind, offset| Raw::new(1, 0).tensor("t", dims, kind, offset).data(64);
    one(&[], 0, 0).refused(&["`t`", "0 dimensions", "1 to 4"]);
    one(&[1, 1, 1, 1, 1], 0, 0).refused(&["`t`", "5 dimensions"]);
    Raw::new(1, 0).str(b"t").u32(u32::MAX).data(64).refused(&["`t`", "4294967295 dimensions"]);
    for dims in [[0, 4], [4, 0], [1 << 32, 1 << 32], [u64::MAX, 2], [1 << 58, 2]] {
        one(&dims, 0, 0).refused(&["`t`", &format!("{dims:?}"), "at least 1"]);
    }
    one(&[33], 2, 0).refused(&["`t`", "[33]", "q4_0", "multiple of 32"]);
    one(&[64, 2], 35, 0).refused(&["tq2_0", "multiple of 256"]);
    one(&[64, 2], 335, 0).refused(&["iq2_bn_r4", "multiple of 64", "rows a multiple of 4"]);
    one(&[3, 3], 36, 0).refused(&["i2_s", "multiple of 4"]);
    one(&[4], 0, 8).refused(&["`t`", "8 bytes into the data", "alignment 32"]);
    one(&[17], 0, 0).refused(&["`t`", "68 bytes at offset 64", "128 bytes", "cut short"]);
    one(&[1 << 58], 28, 0).refused(&["`t`", "2305843009213693952 bytes"]);
    one(&[1], 0, u64::MAX - 31).refused(&["`t`", "cut short"]);
    one(&[1], 0, 64).refused(&["`t`", "4 bytes at offset 128"]);
    one(&[1], 99, 64).refused(&["`t`", "1 bytes at offset 128"]);

    let two = |first: (&str, u64, u32), second: (&str, u64, u32)| {
        let raw = Raw::new(2, 0).tensor(first.0, &[16], first.2, first.1);
        raw.tensor(second.0, &[16], second.2, second.1).data(128)
    };
    two(("t", 0, 0), ("t", 64, 0)).refused(&["tensor `t`", "twice"]);
    two(("a", 32, 0), ("b", 64, 0)).refused(&["`a` and `b` overlap at offset 160"]);
    two(("a", 32, 0), ("b", 0, 0)).refused(&["`b` and `a` overlap"]);
    two(("a", 64, 0), ("b", 64, 0)).refused(&["overlap"]);
    two(("a", 0, 0), ("b", 32, 99)).refused(&["`a` and `b` overlap"]);
    two(("a", 32, 99), ("b", 32, 99)).refused(&["overlap"]);
    Raw::new(1, 0).str(b"\xf0").u32(1).data(64).refused(&["the name of tensor 0", "UTF-8"]);

    // Any order and gaps are fine, and so is a type that nobody knows.
    let header = Header::parse(&two(("a", 64, 0), ("b", 0, 99)).0).unwrap();
    assert_eq!(header.tensors[0].range, Some(160..224));
    assert_eq!(header.tensors[1].kind, TensorType::Unknown(99));
    assert_eq!((header.tensors[1].offset, header.tensors[1].range.clone()), (96, None));
}

#[test]
fn id_39_is_mxfp4_where_its_tensors_have_room_and_tl2_otherwise() {
    let file = |second: u64, data| {
        Raw::new(2, 0).tensor("a", &[64, 32], 39, 0).tensor("b", &[64, 32], 39, second).data(data)
    };
    let size = TensorType::Mxfp4.bytes(&[64, 32]).unwrap();
    let roomy = Header::parse(&file(size, 2 * size as usize).0).unwrap();
    assert!(roomy.tensors.iter().all(|t| t.kind == TensorType::Mxfp4 && t.range.is_some()));
    let crowded = Header::parse(&file(512, 1024).0).unwrap();
    assert!(crowded.tensors.iter().all(|t| t.kind == TensorType::Tl2 && t.range.is_none()));
    // The last tensor of a file that is cut short stays what it is.
    file(size, 2 * size as usize - 1).refused(&["`b`", "cut short"]);
}

#[test]
fn getters_name_key_found_and_expected() {
    let all = fixture_metadata();
    assert_eq!(all.str("scalar.text").unwrap(), Some("Grüße, 世界\n\0🙂"));
    assert_eq!(all.u64("scalar.u64").unwrap(), Some(u64::MAX));
    assert_eq!(all.u64("scalar.u8").unwrap(), Some(255));
    assert_eq!(all.f32("scalar.f32").unwrap(), Some(1e-5));
    assert_eq!(all.f32("scalar.f64").unwrap(), Some(500_000.125f64 as f32));
    assert_eq!(all.bool("scalar.yes").unwrap(), Some(true));
    assert_eq!(all.bool("scalar.no").unwrap(), Some(false));
    assert_eq!(all.strings("array.strings").unwrap().unwrap()[1], "Ġthe");
    assert_eq!(all.i64s("array.i8").unwrap(), Some(vec![-128, 127]));
    assert_eq!(all.i64s("array.u32").unwrap(), Some(vec![0, i64::from(u32::MAX)]));
    assert_eq!(all.i64s("array.i64").unwrap(), Some(vec![i64::MIN, 0]));
    assert_eq!(all.f32s("array.f32").unwrap(), Some(vec![0.5, -0.0, f32::INFINITY]));
    assert_eq!(all.f32s("array.f64").unwrap(), Some(vec![0.1]));
    assert_eq!(all.str("absent").unwrap(), None);
    assert_eq!(all.strings("absent").unwrap(), None);

    fn says<T: std::fmt::Debug>(result: Result<T, GgufError>, message: &str) {
        assert_eq!(result.unwrap_err().to_string(), message);
    }
    says(
        all.u64("scalar.i8"),
        "key `scalar.i8` is the i8 -128; an integer that is not negative was expected",
    );
    says(all.str("scalar.u8"), "key `scalar.u8` is the u8 255; a string was expected");
    says(all.bool("scalar.u8"), "key `scalar.u8` is the u8 255; a boolean was expected");
    says(all.f32("scalar.u8"), "key `scalar.u8` is the u8 255; a floating-point number was expected");
    says(
        all.u64("general.architecture"),
        "key `general.architecture` is the string \"longbit-test\"; an integer that is not negative was expected",
    );
    says(
        all.strings("array.i32"),
        "key `array.i32` is an array of i32 with 3 elements; an array of strings was expected",
    );
    says(
        all.i64s("array.u64"),
        "key `array.u64` is an array of u64 with 2 elements; an array of integers below 2^63 was expected",
    );
    says(
        all.f32s("scalar.f32"),
        "key `scalar.f32` is the f32 0.00001; an array of floating-point numbers was expected",
    );

    let mut changed = metadata([("a", Value::U8(1)), ("b", Value::U8(2))]);
    changed.set("a", Value::Bool(true));
    changed.set("c", Value::U8(3));
    let keys: Vec<_> = changed.iter().map(|(key, value)| (key.to_string(), value.type_name())).collect();
    assert_eq!(keys, [("a".into(), "bool"), ("b".into(), "u8"), ("c".into(), "u8")]);
    assert!(changed != metadata([("b", Value::U8(2)), ("a", Value::Bool(true)), ("c", Value::U8(3))]));
}

#[test]
fn the_writer_refuses_what_a_reader_would() {
    let refused = |result: Result<(), GgufError>, parts: &[&str]| {
        let message = result.unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "`{part}` is not in: {message}"));
    };
    let mut writer = Writer::new(Metadata::new()).unwrap();
    writer.tensor("t", &[4], TensorType::F32).unwrap();
    refused(writer.tensor("t", &[4], TensorType::F32), &["`t`", "twice"]);
    refused(writer.tensor("u", &[], TensorType::F32), &["`u`", "0 dimensions"]);
    refused(writer.tensor("u", &[4, 0], TensorType::F32), &["`u`", "[4, 0]"]);
    refused(writer.tensor("u", &[4], TensorType::Q8_0), &["`u`", "q8_0", "multiple of 32"]);
    refused(writer.tensor("u", &[256], TensorType::Tl2), &["`u`", "tl2", "not known"]);
    refused(writer.tensor("u", &[256], TensorType::Unknown(99)), &["`u`", "type 99"]);
    refused(writer.tensor("x".repeat(65_536), &[4], TensorType::F32), &["65536 bytes", "xxx..."]);
    assert_eq!(writer.data_bytes(), 32);
    let new = |entries: Metadata| Writer::new(entries).map(|_| ());
    refused(new(metadata([("general.alignment", Value::U32(48))])), &["alignment 48"]);
    refused(new(metadata([(&"k".repeat(65_536), Value::U32(48))])), &["65536 bytes"]);
    let many = (0..=MAX_KEYS).map(|at| (at.to_string(), Value::Bool(true)));
    refused(new(many.collect()), &["65537 keys", "65536 can be written"]);

    let write = |data: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>| {
        let mut writer = Writer::new(Metadata::new()).unwrap();
        writer.tensor("t", &[4], TensorType::F32).unwrap();
        writer.write(&mut Vec::new(), |_, out| data(out))
    };
    write(&mut |out| out.write_all(&[1; 16])).unwrap();
    refused(write(&mut |_| Ok(())), &["`t` has 16 bytes and 0 were written"]);
    refused(write(&mut |out| out.write_all(&[1; 15])), &["16 bytes and 15 were written"]);
    refused(write(&mut |out| out.write_all(&[1; 17])), &["16 bytes and 17 were written"]);
    let late = |out: &mut dyn Write| {
        out.write_all(&[1; 16])?;
        // A caller that ignores the error is found out.
        let _ = out.write_all(&[1; 2]);
        Ok(())
    };
    refused(write(&mut { late }), &["16 bytes and 18 were written"]);
    refused(write(&mut |_| Err(io::Error::other("disk on fire"))), &["cannot write", "disk on fire"]);

    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            if taken == 0 { Err(io::Error::other("full")) } else { Ok(taken) }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    for room in 0..96 + 32 {
        let mut writer = Writer::new(Metadata::new()).unwrap();
        writer.tensor("t", &[4], TensorType::F32).unwrap();
        let result = writer.write(&mut Full(room), |_, out| out.write_all(&[1; 16]));
        assert_eq!(result.is_ok(), room >= 64 + 32, "{room}");
    }
}

#[test]
fn many_tensors_of_every_type_round_trip() {
    use TensorType::*;
    let kinds =
        [F32, F16, Bf16, Q4_0, Q5_0, Q8_0, Q6K, Tq1_0, Tq2_0, I2S, Iq1Bn, Iq2Bn, Iq2BnR4, Mxfp4, I64, Nvfp4];
    for alignment in [1u32, 32, 8192] {
        let mut writer = Writer::new(metadata([("general.alignment", Value::U32(alignment))])).unwrap();
        for at in 0..1000u64 {
            let dims = [256 * (1 + at % 3), 4 * (1 + at % 5), 1 + at % 2];
            writer.tensor(format!("blk.{at}"), &dims, kinds[at as usize % kinds.len()]).unwrap();
        }
        let (mut file, data) = (Vec::new(), writer.data_bytes());
        let sizes: Vec<u64> = (0..1000u64)
            .map(|at| {
                let dims = [256 * (1 + at % 3), 4 * (1 + at % 5), 1 + at % 2];
                kinds[at as usize % kinds.len()].bytes(&dims).unwrap()
            })
            .collect();
        let fill = |at: usize, out: &mut dyn Write| out.write_all(&vec![at as u8; sizes[at] as usize]);
        writer.write(&mut file, fill).unwrap();
        let header = Header::parse(&file).unwrap();
        sound(&header, file.len());
        assert_eq!(header.data_start + data, file.len() as u64);
        for (at, info) in header.tensors.iter().enumerate() {
            assert_eq!((info.kind, info.dims.len()), (kinds[at % kinds.len()], 3));
            assert!(file[info.range.clone().unwrap()].iter().all(|byte| *byte == at as u8));
        }
        assert_eq!(rewritten(&header, &file), file);
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    fn list<T: Arbitrary + 'static>(wrap: fn(Vec<T>) -> Array) -> BoxedStrategy<Value> {
        prop::collection::vec(any::<T>(), 0..20).prop_map(move |v| Value::Array(wrap(v))).boxed()
    }
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<f64>().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
        prop_oneof![
            list(Array::U8),
            list(Array::I8),
            list(Array::U16),
            list(Array::I16),
            list(Array::Strings)
        ],
        prop_oneof![list(Array::U32), list(Array::I32), list(Array::U64), list(Array::I64)],
        prop_oneof![list(Array::F32), list(Array::F64), list(Array::Bool)],
    ]
}

proptest! {
    #[test]
    fn any_keys_round_trip(entries in prop::collection::vec((any::<String>(), any_value()), 0..20)) {
        let mut entries: Metadata = entries.into_iter().collect();
        entries.set("general.alignment", Value::U8(16));
        let mut file = Vec::new();
        Writer::new(entries.clone()).unwrap().write(&mut file, |_, _| Ok(())).unwrap();
        let header = Header::parse(&file).unwrap();
        prop_assert_eq!(&header.metadata, &entries);
        prop_assert_eq!(rewritten(&header, &file), file);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Header::parse(&bytes);
        let after = |raw: Raw| Header::parse(&raw.bytes(&bytes).0).map(|header| sound(&header, 1 << 20));
        let _ = after(Raw(b"GGUF".to_vec()).u32(3));
        let _ = after(Raw::new(1, 1));
        let _ = after(Raw::new(3, 0));
        let _ = after(Raw::new(0, 1).str(b"key").u32(9));
        let _ = after(Raw::new(1, 0).str(b"tensor"));
    }

    /// Pieces of a good file in the wrong places reach deeper than random bytes.
    #[test]
    fn spliced_files_never_panic(splices in prop::collection::vec((0usize..1400, 0usize..1400, 1usize..40), 1..6)) {
        let file = fixture();
        let mut spliced = file.clone();
        for (from, to, length) in splices {
            spliced[to..][..length].copy_from_slice(&file[from..][..length]);
        }
        if let Ok(header) = Header::parse(&spliced) {
            sound(&header, spliced.len());
        }
    }
}
