#!/usr/bin/env python3
"""A small GGUF file with a value of every type and tensors of four types, by gguf-py: writes fixtures/gguf/from_gguf_py.gguf.

crates/core/tests/gguf_container.rs reads every value of it, and writes it again byte for byte.

Needs: pip install gguf==0.19.0      Call: python scripts/oracles/gguf_container.py [FILE]
With --read FILE it prints what gguf-py makes of a file of ours: keys, types, values, tensors.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

T = GGUFValueType


def write(path):
    writer = GGUFWriter(path, "longbit-test")
    writer.add_custom_alignment(64)
    for name, value, kind in (
        ("u8", 255, T.UINT8),
        ("i8", -128, T.INT8),
        ("u16", 65535, T.UINT16),
        ("i16", -32768, T.INT16),
        ("u32", 4294967295, T.UINT32),
        ("i32", -2147483648, T.INT32),
        ("u64", 18446744073709551615, T.UINT64),
        ("i64", -9223372036854775808, T.INT64),
        ("f32", 1e-5, T.FLOAT32),
        ("f64", 500000.125, T.FLOAT64),
        ("yes", True, T.BOOL),
        ("no", False, T.BOOL),
        ("text", "Grüße, 世界\n\0🙂", T.STRING),
    ):
        writer.add_key_value(f"scalar.{name}", value, kind)
    for name, values, kind in (
        ("u8", [0, 255], T.UINT8),
        ("i8", [-128, 127], T.INT8),
        ("u16", [0, 65535], T.UINT16),
        ("i16", [-32768, 32767], T.INT16),
        ("u32", [0, 4294967295], T.UINT32),
        ("i32", [-1, 0, 1], T.INT32),
        ("u64", [0, 18446744073709551615], T.UINT64),
        ("i64", [-9223372036854775808, 0], T.INT64),
        ("f32", [0.5, -0.0, float("inf")], T.FLOAT32),
        ("f64", [0.1], T.FLOAT64),
        ("bool", [True, False, True], T.BOOL),
        ("strings", ["", "Ġthe", "<|eot_id|>", "é"], T.STRING),
    ):
        writer.add_key_value(f"array.{name}", values, T.ARRAY, sub_type=kind)

    writer.add_tensor("a.f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("a.f16", np.array([[[1.0, -2.0]], [[0.5, 65504.0]]], dtype=np.float16))
    # The largest magnitude of each block is 127, so that every scale is 1 and the codes are the values.
    row = np.concatenate([np.arange(96, 128), np.arange(-127, -95)]).astype(np.float32)
    codes = np.stack([row, -row])
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor("a.q8_0", quants.quantize(codes, kind), raw_dtype=kind)
    ternary = (np.arange(512) % 3 - 1).astype(np.float32).reshape(1, 512)
    kind = GGMLQuantizationType.TQ2_0
    writer.add_tensor("a.tq2_0", quants.quantize(ternary, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path):
    reader = GGUFReader(path)
    for name, field in reader.fields.items():
        print(name, "/".join(kind.name for kind in field.types), repr(field.contents())[:200])
    for tensor in reader.tensors:
        print(tensor.name, tensor.tensor_type.name, tensor.shape.tolist(), tensor.n_bytes, tensor.data.ravel()[:4])


if sys.argv[1:2] == ["--read"]:
    read(sys.argv[2])
else:
    write(sys.argv[1] if len(sys.argv) > 1 else "fixtures/gguf/from_gguf_py.gguf")
