#!/usr/bin/env python3
"""Writes a trace of attention that Longbit replays (docs/TRACES.md). Needs nothing but Python 3.8.

    from write_trace import write_trace         # any arrays with .shape and .tobytes(): numpy, or torch's .numpy()
    write_trace("mine.safetensors", q, k, v, model="my-model")

    python scripts/write-trace.py OUT           # a small example with known numbers
"""
import array
import json
import struct
import sys


def write_trace(path, q, k, v, **about):
    """q [layers, heads, steps, head_dim], k and v [layers, kv_heads, tokens, head_dim]: float32, after RoPE, not scaled."""
    header, data = {"__metadata__": {"format": "longbit-trace", "version": "1", **about}}, b""
    for name, tensor in (("k", k), ("v", v), ("q", q)):
        raw = tensor.tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


class Ramp(array.array):
    """Numbers first, first + step, … in a shape."""

    def __new__(cls, shape, first, step):
        count = shape[0] * shape[1] * shape[2] * shape[3]
        self = super().__new__(cls, "f", [first + step * (i % 97) for i in range(count)])
        self.shape = shape
        return self


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    layers, heads, kv_heads, tokens, steps, head_dim = 2, 4, 2, 24, 3, 16
    kv = (layers, kv_heads, tokens, head_dim)
    write_trace(sys.argv[1], Ramp((layers, heads, steps, head_dim), -1.0, 0.03125), Ramp(kv, 1.0, -0.015625), Ramp(kv, 0.0, 0.25), model="a ramp")
